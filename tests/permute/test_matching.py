"""Weight matching finds what was planted, never loses ground, and says how good it is."""

import functools
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy.spatial.distance import cdist

from geojax import permute
from geojax.permute import _problem, _solvers, matching
from geojax.symmetry import Factor, Group, Leaf, PermutationSpec, Product, SpecError, action

METHODS = ["coordinate_descent", "progressive", "frank_wolfe", "best"]


def residual_mlp(width: int, inner: int, num_blocks: int, inputs: int, kind="permutation"):
    """A spec: in -> width, blocks width -> inner -> width that are added, -> 10."""
    r = functools.partial(Factor, "r", width)
    leaves = [
        Leaf("['in']", (inputs, width), (Factor("", inputs), r(1))),
        Leaf("['in_bias']", (width,), (r(1),)),
        Leaf("['out']", (width, 10), (r(-1), Factor("", 10))),
    ]
    groups = [Group("r", width, kind=kind)]
    for i in range(num_blocks):
        h = functools.partial(Factor, f"h{i}", inner)
        leaves += [
            Leaf(f"['up{i}']", (width, inner), (r(-1), h(1))),
            Leaf(f"['up_bias{i}']", (inner,), (h(1),)),
            Leaf(f"['down{i}']", (inner, width), (h(-1), r(1))),
            Leaf(f"['down_bias{i}']", (width,), (r(1),)),
        ]
        groups.append(Group(f"h{i}", inner, kind=kind))
    return PermutationSpec(tuple(leaves), tuple(groups))


def mlp(*sizes: int, kind="permutation"):
    leaves, last = [], len(sizes) - 2
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        before = Factor(f"h{i - 1}", n, -1) if i else Factor("", n)
        after = Factor(f"h{i}", m, 1) if i < last else Factor("", m)
        leaves += [
            Leaf(f"['kernel{i}']", (n, m), (before, after)),
            Leaf(f"['bias{i}']", (m,), (after,)),
        ]
    groups = tuple(Group(f"h{i}", m, kind=kind) for i, m in enumerate(sizes[1:-1]))
    return PermutationSpec(tuple(leaves), groups)


def draw(spec, seed: int, fan_in: bool = False):
    rng = np.random.default_rng(seed)
    out = {}
    for leaf in spec.leaves:
        scale = 1 / np.sqrt(leaf.shape[0]) if fan_in and len(leaf.shape) > 1 else 1.0
        out[leaf.path[2:-2]] = (scale * rng.normal(size=leaf.shape)).astype(np.float32)
    return out


def plant(spec, params, seed: int):
    """The parameters permuted at random, and the permutation that undoes it."""
    p = action.random(jax.random.key(seed), spec)
    moved = jax.tree.map(np.asarray, action.apply(spec, p, params))
    return moved, action.inverse(spec, p)


def same(p, q) -> bool:
    return all(bool((np.asarray(p[name]) == np.asarray(q[name])).all()) for name in p)


def objective(spec, a, b, permutation) -> float:
    moved = action.apply(spec, permutation, b)
    return sum(float(np.vdot(np.float64(a[k]), np.float64(moved[k]))) for k in a)


# ------------------------------------------------------------------------------- planted


@pytest.mark.parametrize("shape", [(30, 50, 2, 4), (64, 64, 8, 3)])
def test_barycentre_methods_recover_every_plant_where_coordinate_descent_gets_stuck(shape):
    spec = residual_mlp(*shape)
    found = dict.fromkeys(METHODS, 0)
    for seed in range(20):
        a = draw(spec, seed)
        b, truth = plant(spec, a, seed)
        for method in METHODS:
            result = permute.weight_matching(spec, a, b, method=method, key=jax.random.key(seed))
            assert result.converged
            assert result.optimal == same(result.permutation, truth)
            found[method] += result.optimal
    assert {m: found[m] for m in METHODS[1:]} == {"progressive": 20, "frank_wolfe": 20, "best": 20}
    assert found["coordinate_descent"] <= 17


@pytest.mark.parametrize("order", matching.ORDERS)
def test_every_order_of_visits_recovers_a_planted_wide_mlp(order):
    spec = mlp(50, 128, 128, 128, 10)
    a = draw(spec, 0, fan_in=True)
    b, truth = plant(spec, a, 1)
    result = permute.weight_matching(
        spec, a, b, method="coordinate_descent", order=order, key=jax.random.key(0)
    )
    assert same(result.permutation, truth)
    assert result.converged
    assert result.optimal
    assert result.num_sweeps <= (10 if order == "greedy" else 5)


def test_noisy_plants_are_found_where_coordinate_descent_finds_none():
    spec = residual_mlp(30, 50, 2, 4)
    found = dict.fromkeys(("coordinate_descent", "best"), 0)
    for seed in range(5):
        a, noise = draw(spec, seed), draw(spec, 100 + seed)
        mixed = {k: np.float32(0.5) * a[k] + np.float32(np.sqrt(0.75)) * noise[k] for k in a}
        b, truth = plant(spec, mixed, seed)
        for method in found:
            result = permute.weight_matching(spec, a, b, method=method)
            found[method] += same(result.permutation, truth)
    assert found["best"] == 5
    assert found["coordinate_descent"] <= 1


def attention_spec(heads: int, width: int, model: int, queries: int = 1):
    """Keys, values, queries (grouped where queries > 1), output; biases of each."""
    m, h = Factor("model", model), Factor("head", heads)
    qk, v, q = Factor("qk", width), Factor("v", width), Factor("q", queries)
    spare = () if queries == 1 else (q,)
    size = () if queries == 1 else (queries,)
    leaves = (
        Leaf("['embedding']", (7, model), (Factor("", 7), m)),
        Leaf("['key']", (model, heads, width), (m, h, qk)),
        Leaf("['key_bias']", (heads, width), (h, qk)),
        Leaf("['out']", (heads, *size, width, model), (h, *spare, v, m)),
        Leaf("['query']", (model, heads, *size, width), (m, h, *spare, qk)),
        Leaf("['value']", (model, heads * width), (m, Product((h, v)))),
    )
    inner = dict(index=("head",), index_sizes=(heads,))
    groups = [
        Group("model", model), Group("head", heads),
        Group("qk", width, **inner), Group("v", width, **inner),
    ]  # fmt: skip
    return PermutationSpec(
        leaves, tuple([*groups, Group("q", queries, **inner)] if spare else groups)
    )


@pytest.mark.parametrize(("heads", "width", "queries"), [(8, 16, 1), (3, 4, 3)])
@pytest.mark.parametrize("method", METHODS[1:])
def test_heads_and_the_dimensions_inside_each_are_recovered(heads, width, queries, method):
    spec = attention_spec(heads, width, 24, queries)
    a = draw(spec, 0)
    b, truth = plant(spec, a, 1)
    result = permute.weight_matching(spec, a, b, method=method)
    assert same(result.permutation, truth)
    assert result.optimal


def test_two_level_assignment_is_the_best_of_all_by_brute_force():
    spec = PermutationSpec(
        (Leaf("['w']", (3, 3, 5), (Factor("head", 3), Factor("d", 3), Factor("", 5))),),
        (Group("head", 3), Group("d", 3, ("head",), (3,))),
    )
    a, b = draw(spec, 0), draw(spec, 1)
    orders = list(itertools.permutations(range(3)))
    best = -np.inf
    for outer in orders:
        total = 0.0
        for i, j in enumerate(outer):
            total += max(float(np.vdot(a["w"][i], b["w"][j][list(p)])) for p in orders)
        best = max(best, total)
    result = permute.weight_matching(spec, a, b)
    np.testing.assert_allclose(result.objective, best, rtol=1e-6)


def test_each_layer_of_a_stack_has_a_permutation_of_its_own():
    layers = Factor("layer", 4)
    spec = PermutationSpec(
        (
            Leaf("['down']", (4, 12, 9), (layers, Factor("h", 12), Factor("r", 9))),
            Leaf("['in']", (5, 9), (Factor("", 5), Factor("r", 9))),
            Leaf("['up']", (4, 9, 12), (layers, Factor("r", 9), Factor("h", 12))),
        ),
        (Group("r", 9), Group("h", 12, ("layer",), (4,))),
    )
    a = draw(spec, 0)
    b, truth = plant(spec, a, 1)
    for method in METHODS[1:]:
        result = permute.weight_matching(spec, a, b, method=method)
        assert result.permutation["h"].shape == (4, 12)
        assert same(result.permutation, truth)


def test_a_group_on_two_axes_of_one_leaf_is_recovered():
    h = Factor("h", 20)
    spec = PermutationSpec(
        (
            Leaf("['in']", (3, 20), (Factor("", 3), h)),
            Leaf("['recurrent']", (20, 20), (h, h)),
        ),
        (Group("h", 20),),
    )
    for seed in range(5):
        a = draw(spec, seed)
        b, truth = plant(spec, a, seed)
        for method in METHODS[1:]:
            result = permute.weight_matching(spec, a, b, method=method)
            assert same(result.permutation, truth)
            assert (np.diff(result.history) > 0).all()


def test_planted_signs_are_recovered():
    spec = residual_mlp(20, 30, 2, 8, kind="signed")
    a = draw(spec, 0)
    b, truth = plant(spec, a, 1)
    for method in METHODS[1:]:
        found = permute.weight_matching(spec, a, b, method=method).permutation
        for name in found:
            np.testing.assert_array_equal(found[name].permutation, truth[name].permutation)
            np.testing.assert_array_equal(found[name].scale, truth[name].scale)


@pytest.mark.parametrize("kind", ["scaled", "signed_scaled"])
def test_planted_scales_are_recovered_and_the_function_with_them(kind):
    spec = mlp(12, 16, 16, 10, kind=kind)
    a = draw(spec, 0)
    b, _ = plant(spec, a, 1)
    result = permute.weight_matching(spec, a, b)
    assert result.optimal
    moved = permute.apply_permutation(spec, result.permutation, b)
    for name, x in a.items():
        np.testing.assert_allclose(moved[name], x, atol=1e-4 * np.abs(x).max())


def test_balancing_finds_the_least_norm_of_the_orbit_and_keeps_the_function():
    spec = mlp(5, 8, 8, 3, kind="scaled")
    a = draw(spec, 0)
    b, _ = plant(spec, a, 1)
    found = permute.balance(spec, b)
    assert found.converged
    assert found.norm[1] < found.norm[0]
    incoming = np.square(found.params["kernel0"]).sum(0) + np.square(found.params["bias0"])
    outgoing = np.square(found.params["kernel1"]).sum(1)
    np.testing.assert_allclose(incoming, outgoing, rtol=1e-4)
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)

    def outputs(p):
        y = x
        for i in range(3):
            y = np.maximum(y, 0) if i else y
            y = y @ np.asarray(p[f"kernel{i}"]) + np.asarray(p[f"bias{i}"])
        return y

    np.testing.assert_allclose(outputs(found.params), outputs(b), rtol=1e-4, atol=1e-4)


def test_units_of_a_narrow_network_are_found_in_a_wide_one():
    narrow, wide = mlp(10, 64, 64, 5), mlp(10, 96, 96, 5)
    a = draw(narrow, 0)
    b = draw(wide, 1)
    for name, x in a.items():
        b[name] = np.float32(0.05) * b[name]
        b[name][tuple(slice(n) for n in x.shape)] = x
    shuffled, truth = plant(wide, b, 2)
    result = permute.weight_matching(narrow, a, shuffled, spec_b=wide)
    for name, order in result.permutation.items():
        np.testing.assert_array_equal(order, np.asarray(truth[name])[:64])
    selected = permute.select_units(narrow, wide, result.permutation, shuffled)
    for name, x in a.items():
        np.testing.assert_array_equal(selected[name], x)
    with pytest.raises(SpecError, match="narrower network as A"):
        permute.weight_matching(wide, shuffled, a, spec_b=narrow)


# ------------------------------------------------------------------------------- guarantees


def test_the_objective_never_falls_and_is_the_sum_of_its_gains():
    spec = residual_mlp(16, 24, 2, 6)
    for seed in range(40):
        a, b = draw(spec, seed), draw(spec, 1000 + seed)
        method = METHODS[seed % 4]
        result = permute.weight_matching(spec, a, b, method=method, key=jax.random.key(seed))
        assert (np.diff(result.history) > 0).all()
        exact = objective(spec, a, b, result.permutation)
        np.testing.assert_allclose(result.objective, exact, rtol=1e-9)
        np.testing.assert_allclose(result.history[-1], exact, rtol=1e-9)
        assert result.objective <= result.bound
        if method == "coordinate_descent":
            identity = objective(spec, a, b, action.identity(spec))
            np.testing.assert_allclose(result.initial, identity, rtol=1e-9)
            np.testing.assert_allclose(result.history[0], identity, rtol=1e-9)


def test_at_a_returned_point_no_group_alone_can_gain():
    spec = residual_mlp(16, 24, 2, 6)
    a, b = draw(spec, 0), draw(spec, 1)
    result = permute.weight_matching(spec, a, b)
    again = permute.weight_matching(
        spec, a, b, method="coordinate_descent", init=result.permutation
    )
    assert len(again.history) == 1
    assert same(again.permutation, result.permutation)


def test_ties_keep_what_stands():
    spec = residual_mlp(8, 8, 1, 4)
    ones = {leaf.path[2:-2]: np.ones(leaf.shape, np.float32) for leaf in spec.leaves}
    result = permute.weight_matching(spec, ones, ones, method="coordinate_descent")
    assert same(result.permutation, action.identity(spec))
    assert (result.num_sweeps, len(result.history)) == (1, 1)


def test_the_best_method_beats_ten_runs_of_coordinate_descent_on_the_mean():
    spec = mlp(32, 48, 48, 48, 10)
    ratios = []
    for seed in range(6):
        a, b = draw(spec, seed, fan_in=True), draw(spec, 100 + seed, fan_in=True)
        ten = permute.weight_matching(
            spec, a, b, method="coordinate_descent", key=jax.random.key(seed), num_restarts=10
        )
        best = permute.weight_matching(spec, a, b)
        assert best.objective == max(c.objective for c in best.candidates)
        ratios.append(best.objective / ten.objective)
    assert np.mean(ratios) > 1.002
    assert min(ratios) > 0.995


def test_restarts_are_single_runs_and_the_best_of_them_is_kept():
    spec = residual_mlp(12, 16, 2, 3)
    a, b = draw(spec, 0), draw(spec, 1)
    key = jax.random.key(3)
    run = functools.partial(permute.weight_matching, spec, a, b, method="coordinate_descent")
    many = run(key=key, num_restarts=4)
    single = [run(key=k) for k in jax.random.split(key, 4)]
    np.testing.assert_array_equal(many.spread, [r.objective for r in single])
    assert len(set(many.spread)) > 1
    best = int(many.spread.argmax())
    assert many.objective == many.spread[best]
    assert same(many.permutation, single[best].permutation)


def test_the_exact_step_is_the_best_of_a_fine_grid():
    grid = np.linspace(0, 1, 201)
    three = PermutationSpec(
        (
            Leaf("['t']", (5, 6, 7), (Factor("a", 5), Factor("b", 6), Factor("c", 7))),
            Leaf("['u']", (5, 4), (Factor("a", 5), Factor("", 4))),
            Leaf("['v']", (6, 7), (Factor("b", 6), Factor("c", 7))),
        ),
        (Group("a", 5), Group("b", 6), Group("c", 7)),
    )
    for spec, seed in itertools.product((three, residual_mlp(5, 6, 1, 3)), range(10)):
        a, b = draw(spec, seed), draw(spec, 50 + seed)
        a, b = (jax.tree.map(np.float64, x) for x in (a, b))
        problem = _problem.make_problem(
            spec,
            [(spec, *({leaf.path: x[leaf.path[2:-2]] for leaf in spec.leaves} for x in (a, b)))],
        )
        rng = np.random.default_rng(seed)
        state = {
            key: _problem.Dense(np.eye(n)[rng.permutation(n)] * 0.4 + 0.6 / n)
            for key, (n, _) in problem.sizes.items()
        }
        gap, length, corners = _solvers._direction(problem, state, problem.plain)
        assert gap >= 0
        along = [problem.value(_solvers._between(state, corners, t)) for t in grid[1:-1]]
        best = max([problem.value(state), *along])
        found = problem.value(_solvers._between(state, corners, length) if length else state)
        assert found >= best - 1e-6 * abs(best)


def test_frank_wolfe_reports_its_gap_and_never_falls():
    spec = residual_mlp(12, 16, 2, 3)
    values = []
    result = permute.weight_matching(
        spec, draw(spec, 0), draw(spec, 1), method="frank_wolfe",
        callback=lambda step: values.append(step) if step.method == "frank_wolfe" else None,
    )  # fmt: skip
    objectives = [step.objective for step in values]
    assert len(objectives) > 3
    assert (np.diff(objectives) >= -1e-6 * abs(objectives[-1])).all()
    assert result.gap >= 0
    one = mlp(4, 9, 3)
    single = permute.weight_matching(one, draw(one, 0), draw(one, 1), method="frank_wolfe")
    assert single.gap <= 1e-4 * single.objective
    assert single.optimal


# ------------------------------------------------------------------------------- objectives


def test_cosine_scores_are_those_of_scipy():
    spec = mlp(6, 5, 4)
    a, b = draw(spec, 0), draw(spec, 1)
    pairs = [(spec, *({leaf.path: x[leaf.path[2:-2]] for leaf in spec.leaves} for x in (a, b)))]
    problem = _problem.make_problem(spec, pairs, "cosine")
    key = ("h0", ())
    scores, _ = problem.scores(key, problem.identity())
    expected = (
        1 - cdist(a["kernel0"].T, b["kernel0"].T, "cosine")
        + 1 - cdist(a["kernel1"], b["kernel1"], "cosine")
        + np.sign(a["bias0"])[:, None] * np.sign(b["bias0"])[None, :]
    )  # fmt: skip
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_cosine_matching_does_not_see_positive_rescaling_of_units():
    spec = mlp(6, 20, 4)
    a, b = draw(spec, 0), draw(spec, 1)
    scale = np.exp(np.random.default_rng(0).normal(size=20)).astype(np.float32)
    c = {**b, "kernel0": b["kernel0"] * scale, "bias0": b["bias0"] * scale}
    c["kernel1"] = b["kernel1"] / scale[:, None]
    run = functools.partial(
        permute.weight_matching, spec, a, method="coordinate_descent", score="cosine"
    )
    assert same(run(b).permutation, run(c).permutation)
    assert not same(permute.weight_matching(spec, a, b).permutation,
                    permute.weight_matching(spec, a, c).permutation)  # fmt: skip


def test_importance_minimises_the_weighted_distance():
    spec = mlp(3, 5, 2)
    a, b = draw(spec, 0), draw(spec, 1)
    f = jax.tree.map(np.square, draw(spec, 2))

    def distance(order):
        moved = action.apply(spec, {"h0": np.asarray(order, np.int32)}, b)
        return sum(float((f[k] * np.square(a[k] - np.asarray(moved[k]))).sum()) for k in a)

    best = min(itertools.permutations(range(5)), key=distance)
    found = permute.weight_matching(spec, a, b, importance=f).permutation["h0"]
    assert tuple(found) == best
    assert tuple(permute.weight_matching(spec, a, b).permutation["h0"]) != best


def test_the_least_distance_is_the_largest_inner_product():
    spec = mlp(3, 8, 8, 2)
    for seed in range(5):
        a, b = draw(spec, seed), draw(spec, 50 + seed)
        ones = jax.tree.map(np.ones_like, a)
        least = permute.weight_matching(spec, a, b, importance=ones)
        assert same(least.permutation, permute.weight_matching(spec, a, b).permutation)


def test_leaf_weights_choose_what_is_matched_on():
    spec = mlp(6, 12, 4)
    a, b = draw(spec, 0), draw(spec, 1)
    only = permute.weight_matching(spec, a, b, leaf_weights={"*": 0.0, "kernel1": 1.0})
    scores = a["kernel1"] @ b["kernel1"].T
    rows = np.arange(12)
    total = scores[rows, only.permutation["h0"]].sum()
    np.testing.assert_allclose(only.objective, total, rtol=1e-5)
    normed = permute.weight_matching(spec, a, b, leaf_weights="norm")
    np.testing.assert_allclose(normed.bound, 3, rtol=1e-5)
    assert normed.objective <= normed.bound


def test_pinned_groups_stay_and_the_others_still_gain():
    spec = mlp(6, 12, 12, 12, 4)
    a, b = draw(spec, 0), draw(spec, 1)
    part = spec.subset(include=["kernel0", "bias0", "kernel1"])
    assert [g.name for g in part.groups] == ["h0"]
    for method in METHODS:
        result = permute.weight_matching(part, a, b, method=method)
        moved = permute.apply_permutation(part, result.permutation, b)
        assert result.objective > result.initial
        for name in ("bias1", "kernel2", "bias2", "kernel3", "bias3"):
            np.testing.assert_array_equal(moved[name], b[name])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_parameters_of_any_precision_are_matched_and_keep_it(dtype):
    spec = residual_mlp(30, 50, 2, 4)
    with jax.enable_x64(True):
        a = jax.tree.map(lambda x: jnp.asarray(x, dtype), draw(spec, 0))
        p = action.random(jax.random.key(1), spec)
        b = action.apply(spec, p, a)
        result = permute.weight_matching(spec, a, b)
        assert same(result.permutation, action.inverse(spec, p))
        moved = permute.apply_permutation(spec, result.permutation, b)
        assert {x.dtype for x in jax.tree.leaves(moved)} == {jnp.dtype(dtype)}


# ------------------------------------------------------------------------------- conduct


def test_nothing_given_is_changed():
    spec = residual_mlp(12, 16, 2, 3)
    a, b = draw(spec, 0), draw(spec, 1)
    init = jax.tree.map(np.array, action.random(jax.random.key(0), spec))
    before = jax.tree.map(np.copy, (a, b, init))
    result = permute.weight_matching(spec, a, b, init=init, method="coordinate_descent")
    permute.weight_matching(spec, a, b)
    assert not same(result.permutation, init)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves((a, b, init)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_callback_can_stop_and_keeps_the_best_so_far():
    spec = residual_mlp(12, 16, 2, 3)
    a, b = draw(spec, 0), draw(spec, 1)

    def stop(step):
        raise StopIteration

    for method in METHODS:
        result = permute.weight_matching(spec, a, b, method=method, callback=stop)
        assert not result.converged
        assert result.objective > result.initial
        exact = objective(spec, a, b, result.permutation)
        np.testing.assert_allclose(result.objective, exact, rtol=1e-9)
        on = permute.weight_matching(
            spec, a, b, method="coordinate_descent", init=result.permutation
        )
        assert on.converged
        assert on.objective >= result.objective


PROGRAM = """
import sys
sys.path.insert(0, "tests/permute")
import jax, numpy as np
from test_matching import residual_mlp, draw
from geojax import permute
spec = residual_mlp(12, 16, 2, 3)
r = permute.weight_matching(
    spec, draw(spec, 0), draw(spec, 1), key=jax.random.key(0), num_restarts=2
)
print(r.objective.hex(), {k: np.asarray(v).tolist() for k, v in r.permutation.items()})
"""


def test_the_result_depends_on_no_hash_seed_and_no_number_of_threads():
    found = set()
    for seed, threads in (("0", "1"), ("random", "2")):
        env = os.environ | {"PYTHONHASHSEED": seed, "OPENBLAS_NUM_THREADS": threads}
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True
        )
        found.add(run.stdout)
    assert len(found) == 1


def test_sharded_parameters_are_matched_as_on_one_device(mesh):
    spec = residual_mlp(16, 32, 2, 8)
    a = draw(spec, 0)
    b, truth = plant(spec, a, 1)
    axis = mesh.axis_names[0]

    def place(x):
        spec_ = PartitionSpec(axis) if x.shape[0] % mesh.shape[axis] == 0 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec_))

    with jax.set_mesh(mesh):
        sharded = jax.tree.map(place, (a, b))
        result = permute.weight_matching(spec, *sharded)
        moved = permute.apply_permutation(spec, result.permutation, sharded[1])
    assert same(result.permutation, truth)
    for name, x in a.items():
        np.testing.assert_array_equal(moved[name], x)
        assert moved[name].sharding.is_equivalent_to(sharded[1][name].sharding, x.ndim)


def test_what_does_not_fit_is_refused_in_a_sentence():
    spec = mlp(3, 5, 2)
    a, b = draw(spec, 0), draw(spec, 1)
    run = functools.partial(permute.weight_matching, spec)
    with pytest.raises(SpecError, match=r"\['bias0'\] of params_b has 1 entries that are not fin"):
        run(a, {**b, "bias0": np.array([0, 1, np.nan, 3, 4], np.float32)})
    with pytest.raises(SpecError, match=r"\['bias0'\] of the spec is missing from params_b"):
        run(a, {k: v for k, v in b.items() if k != "bias0"})
    with pytest.raises(SpecError, match=r"\['other'\] of params_a has no place"):
        run({**a, "other": np.ones(3, np.float32)}, b)
    with pytest.raises(SpecError, match=r"has shape \(4,\); the spec was made for \(5,\)"):
        run(a, {**b, "bias0": np.ones(4, np.float32)})
    with pytest.raises(TypeError, match="int32"):
        run(a, {**b, "bias0": np.ones(5, np.int32)})
    with pytest.raises(ValueError, match="method is 'best_of'"):
        run(a, b, method="best_of")
    with pytest.raises(ValueError, match="need a key"):
        run(a, b, num_restarts=3)
    with pytest.raises(ValueError, match="no joint objective"):
        run(a, b, score="cosine")
    with pytest.raises(SpecError, match="matches no leaf"):
        run(a, b, leaf_weights={"kernel9": 1.0})
