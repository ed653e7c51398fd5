"""Many networks come to one frame: consistently, monotonically, and as far as is known."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geojax import permute, tree
from geojax.permute import many
from geojax.symmetry import Factor, Group, Leaf, PermutationSpec, SpecError, action


def mlp(*sizes):
    leaves, last = [], len(sizes) - 2
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        before = Factor(f"h{i - 1}", n) if i else Factor("", n)
        after = Factor(f"h{i}", m) if i < last else Factor("", m)
        leaves += [
            Leaf(f"['bias{i}']", (m,), (after,)),
            Leaf(f"['kernel{i}']", (n, m), (before, after)),
        ]
    return PermutationSpec(
        tuple(leaves), tuple(Group(f"h{i}", m) for i, m in enumerate(sizes[1:-1]))
    )


SPEC = mlp(6, 30, 30, 4)


def product(a, b) -> float:
    """The inner product of what the groups move: all but the last bias."""
    return sum(float(np.vdot(np.float64(a[k]), np.float64(b[k]))) for k in a if k != "bias2")


def draw(seed):
    rng = np.random.default_rng(seed)
    return {x.path[2:-2]: rng.normal(size=x.shape).astype(np.float32) for x in SPEC.leaves}


@functools.cache
def planted(rho: float, num: int = 5, seed: int = 0):
    """Networks that share a part, each permuted at random; and the value of the true alignment."""
    base, networks, straight = draw(seed), [], []
    for i in range(num):
        noise = draw(1000 * seed + i + 1)
        x = {k: np.float32(np.sqrt(rho)) * base[k] + np.float32(np.sqrt(1 - rho)) * noise[k]
             for k in base}  # fmt: skip
        straight.append(x)
        p = action.random(jax.random.key(i), SPEC)
        networks.append(jax.tree.map(np.asarray, action.apply(SPEC, p, x)))
    value = sum(product(a, b) for a, b in itertools.combinations(straight, 2))
    return networks, value


def test_star_and_refinement_find_the_true_alignment_where_merging_by_descent_does_not():
    networks, truth = planted(0.6)
    key = jax.random.key(0)
    old = permute.merge_many(SPEC, networks, key=key, method="coordinate_descent")
    new = permute.cycle_consistent_matching(SPEC, networks, key=key)
    merged = permute.merge_many(SPEC, networks, key=key)
    assert old.objective < 0.6 * truth
    np.testing.assert_allclose(new.objective, truth, rtol=1e-5)
    assert merged.objective > old.objective
    for result in (old, new, merged):
        assert result.converged
        assert result.objective <= result.bound


def test_refinement_gains_on_the_star_where_little_is_shared():
    networks, _ = planted(0.3)
    run = functools.partial(
        permute.cycle_consistent_matching, SPEC, networks, key=jax.random.key(0)
    )
    star, refined = run(refine=False), run()
    assert refined.objective > 1.05 * star.objective
    assert (np.diff(refined.history) > 0).all()


def test_going_around_any_cycle_is_the_identity_exactly():
    networks, _ = planted(0.3)
    result = permute.cycle_consistent_matching(SPEC, networks, key=jax.random.key(0))
    identity = action.identity(SPEC)
    for i, j, k in itertools.permutations(range(5), 3):
        p = result.pairwise(SPEC, i, j)
        q = result.pairwise(SPEC, j, k)
        r = result.pairwise(SPEC, k, i)
        around = action.compose(SPEC, p, action.compose(SPEC, q, r))
        for name in identity:
            np.testing.assert_array_equal(around[name], identity[name])
    fixed = [p for p in result.permutations if all((p[n] == identity[n]).all() for n in identity)]
    assert len(fixed) == 1  # the reference


def test_the_result_is_what_it_says():
    networks, _ = planted(0.6)
    result = permute.merge_many(SPEC, networks, key=jax.random.key(0))
    moved = [action.apply(SPEC, p, x) for p, x in zip(result.permutations, networks, strict=True)]
    pairs = sum(product(a, b) for a, b in itertools.combinations(moved, 2))
    np.testing.assert_allclose(result.objective, pairs, rtol=1e-5)
    np.testing.assert_allclose(result.history[-1], result.objective, rtol=1e-5)
    mean = jax.tree.map(lambda *x: sum(x) / 5, *moved)
    for name in mean:
        np.testing.assert_allclose(result.params[name], mean[name], rtol=1e-5, atol=1e-6)
    start = sum(product(a, b) for a, b in itertools.combinations(networks, 2))
    np.testing.assert_allclose(result.initial, start, rtol=1e-5, atol=1e-3)


def test_squared_distances_only_fall_and_nothing_given_is_changed():
    networks, _ = planted(0.3)
    before = jax.tree.map(np.copy, networks)
    result = permute.merge_many(SPEC, networks, key=jax.random.key(1))
    # The norms do not change, so distances fall as inner products rise.
    assert (np.diff(result.history) > 0).all()
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(networks), strict=True):
        np.testing.assert_array_equal(x, y)


def test_two_networks_are_matched_as_a_pair():
    networks, _ = planted(0.6)
    result = permute.merge_many(SPEC, networks[:2], key=jax.random.key(0))
    pair = permute.weight_matching(SPEC, *networks[:2], method="progressive")
    np.testing.assert_allclose(result.objective, pair.objective, rtol=1e-6)


def test_stacked_points_are_networks_too():
    networks, _ = planted(0.6)
    one = permute.merge_many(SPEC, networks, key=jax.random.key(0))
    points = permute.merge_many(SPEC, tree.stack(networks), key=jax.random.key(0))
    np.testing.assert_allclose(one.objective, points.objective, rtol=1e-6)


def test_the_gradient_of_the_pair_sum_is_the_scores_against_all_others():
    with jax.enable_x64(True):
        networks = [jax.tree.map(np.float64, draw(i)) for i in range(4)]
        frame = many._Frame(SPEC, [{f"['{k}']": v for k, v in x.items()} for x in networks])
        rng = np.random.default_rng(0)
        matrices = [{k: rng.random((30, 30)) for k in ("h0", "h1")} for _ in networks]

        def pair_sum(matrices):
            moved = []
            for x, m in zip(networks, matrices, strict=True):
                moved.append([
                    m["h0"] @ x["bias0"], x["kernel0"] @ m["h0"].T,
                    m["h1"] @ x["bias1"], m["h0"] @ x["kernel1"] @ m["h1"].T,
                    m["h1"] @ x["kernel2"],
                ])  # fmt: skip
            return sum(
                jnp.sum(a * b) for p, q in itertools.combinations(moved, 2)
                for a, b in zip(p, q, strict=True)
            )  # fmt: skip

        expected = jax.grad(pair_sum)(matrices)
        for i, m in enumerate(matrices):
            frame.put(i, {(k, ()): many.Dense(x) for k, x in m.items()})
        frame.refresh()
        for i in range(4):
            problem = frame.facing_others(i)
            for name in ("h0", "h1"):
                scores, _ = problem.scores((name, ()), frame.states[i])
                np.testing.assert_allclose(scores, expected[i][name], rtol=1e-5)


def test_corrupted_pairwise_permutations_are_synchronized():
    spec = PermutationSpec((Leaf("['w']", (64,), (Factor("h", 64),)),), (Group("h", 64),))
    rng = np.random.default_rng(0)
    to_frame = [np.arange(64), *(rng.permutation(64) for _ in range(7))]
    pairs = {}
    for i, j in itertools.combinations(range(8), 2):
        # j to the frame, then from the frame to i.
        p = {"h": np.argsort(to_frame[i]).astype(np.int32)}
        pairs[i, j] = action.compose(spec, p, {"h": to_frame[j].astype(np.int32)})
    bad = rng.choice(len(pairs), size=round(0.2 * len(pairs)), replace=False)
    for index in bad:
        pairs[list(pairs)[index]] = {"h": rng.permutation(64).astype(np.int32)}
    found = permute.synchronize(spec, pairs)
    for p, truth in zip(found, to_frame, strict=True):
        np.testing.assert_array_equal(p["h"], truth)


def test_what_does_not_fit_is_refused_in_a_sentence():
    networks, _ = planted(0.6)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="1 network was given"):
        permute.merge_many(SPEC, networks[:1], key=key)
    with pytest.raises(ValueError, match="reference is 7"):
        permute.cycle_consistent_matching(SPEC, networks, key=key, reference=7)
    with pytest.raises(SpecError, match="missing from network 1"):
        permute.merge_many(SPEC, [networks[0], {"bias0": networks[1]["bias0"]}], key=key)
    identity = action.identity(SPEC)
    with pytest.raises(ValueError, match="do not connect"):
        permute.synchronize(SPEC, {(0, 1): identity, (2, 3): identity})
