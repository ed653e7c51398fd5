"""Merging: exact ends, norms that interpolate, Fisher and regression means against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import batches, tree
from geojax.permute import merging

EPS = float(np.finfo(np.float32).eps)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
SCOPES = ("global", "leaf", "axis")


def network(seed=0, dtype=jnp.float32):
    shapes = {"dense": {"kernel": (4, 8)}, "conv": [(2, 2, 4, 6)], "gain": ()}
    like = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    return tree.random_like(jax.random.key(seed), like)


def stacked(n=3, dtype=jnp.float32):
    return tree.stack([network(i, dtype) for i in range(n)])


def close(a, b, rtol=8 * EPS, atol=0.0):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol + rtol * np.abs(y).max())


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def bend(kind):
    """lerp or one scope of slerp, as a function of (a, b, t)."""
    if kind == "lerp":
        return merging.lerp
    return lambda a, b, t: merging.slerp(a, b, t, scope=kind)


# ------------------------------------------------------------------------------- between two points


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["lerp", *SCOPES])
def test_the_ends_are_the_points_themselves(kind, dtype):
    a, b = network(0, dtype), network(1, dtype)
    many = bend(kind)(a, b, jnp.array([0.0, 1.0, 0.3]))
    same(tree.unstack(many)[0], a)
    same(tree.unstack(many)[1], b)
    for t, end in ((0, a), (1, b)):
        same(bend(kind)(a, b, t), end)


@pytest.mark.parametrize("kind", ["lerp", *SCOPES])
def test_many_parameters_give_a_stack_of_the_single_points(kind):
    a, b = network(0), network(1)
    ts = np.array([[0.1, 0.5, 0.9], [-0.2, 1.0, 1.3]])
    many = bend(kind)(a, b, ts)
    for index in np.ndindex(ts.shape):
        one = bend(kind)(a, b, ts[index])
        close(jax.tree.map(lambda x, i=index: x[i], many), one)
    jitted = jax.jit(bend(kind))(a, b, ts)
    close(jitted, many)


def test_lerp_is_on_the_line():
    a, b = network(0), network(1)
    want = jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, a, b)
    close(merging.lerp(a, b, 0.25), want, atol=EPS)


def pieces(point, scope):
    """The vectors of a scope, as flat float64 arrays."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(point)]
    if scope == "global":
        return [np.concatenate([x.ravel() for x in leaves])]
    if scope == "leaf":
        return [x.ravel() for x in leaves]
    out = []
    for x in leaves:
        out += [x.ravel()] if x.ndim < 2 else list(x.reshape(-1, x.shape[-1]).T)
    return out


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("t", [0.2, 0.5])
def test_slerp_turns_at_constant_speed_and_interpolates_the_norm(scope, t):
    a, b = network(0), tree.scale(3.0, network(1))
    found = merging.slerp(a, b, t, scope=scope)
    for x, y, z in zip(*(pieces(p, scope) for p in (a, b, found)), strict=True):
        norm_x, norm_y, norm_z = (np.linalg.norm(v) for v in (x, y, z))
        assert norm_z == pytest.approx((1 - t) * norm_x + t * norm_y, rel=32 * EPS)
        if len(x) == 1:
            continue  # two numbers have no angle between them
        whole = np.arccos(x @ y / norm_x / norm_y)
        assert np.arccos(x @ z / norm_x / norm_z) == pytest.approx(t * whole, rel=32 * EPS)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("factor", "tiny"), [(1.0, 0.0), (2.5, 0.0), (-1.0, 0.0), (0.0, 0.0), (1.0, 1e-6), (-1.0, 1e-6)]
)
def test_slerp_of_collinear_opposite_and_zero_vectors_is_the_line(scope, factor, tiny):
    a = network(0)
    b = tree.axpy(factor, a, tree.scale(tiny, network(1)))
    for x, y in ((a, b), (b, a)):
        found = merging.slerp(x, y, 0.3, scope=scope)
        close(found, merging.lerp(x, y, 0.3), rtol=64 * EPS, atol=64 * EPS)


def test_slerp_meets_the_line_without_a_step_as_the_angle_closes():
    # The switch to the line is at an angle of sqrt(eps) = 3.5e-4.
    a = {"w": jnp.array([1.0, 0.0])}
    for angle in (1e-4, 3e-4, 4e-4, 1e-3):
        b = {"w": jnp.array([np.cos(angle), np.sin(angle)], jnp.float32)}
        found = np.asarray(merging.slerp(a, b, 0.3)["w"], np.float64)
        np.testing.assert_allclose(
            found, [np.cos(0.3 * angle), np.sin(0.3 * angle)], rtol=0, atol=2 * EPS
        )


@pytest.mark.parametrize("scope", SCOPES)
def test_slerp_neither_overflows_nor_underflows(scope):
    a, b = network(0), network(1)
    want = merging.slerp(a, b, 0.4, scope=scope)
    for size in (1e-30, 1e30):
        found = merging.slerp(tree.scale(size, a), tree.scale(size, b), 0.4, scope=scope)
        close(tree.scale(1 / size, found), want, rtol=64 * EPS)


def test_in_float64_the_line_between_points_keeps_its_digits():
    with jax.enable_x64(True):
        a, b = (tree.cast(network(i), jnp.float64) for i in range(2))
        for kind in ("lerp", *SCOPES):
            found = bend(kind)(a, b, 0.3)
            assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(found))
        close(merging.lerp(a, b, 0.3), jax.tree.map(lambda x, y: 0.7 * x + 0.3 * y, a, b), 1e-15)


# ----------------------------------------------------------------------------- means of many points


def test_a_weighted_mean_and_the_uniform_soup_are_numpys():
    points = stacked(3)
    weights = np.array([0.5, 0.7, -0.2])
    want = jax.tree.map(lambda x: np.average(x, axis=0, weights=weights).astype(np.float32), points)
    close(merging.weighted_mean(points, weights), want)
    want = jax.tree.map(lambda x: np.mean(np.asarray(x, np.float64), 0).astype(np.float32), points)
    close(merging.uniform_soup(points), want)
    many = merging.weighted_mean(points, np.stack([weights, [0.0, 1.0, 0.0]]))
    same(tree.unstack(many)[1], tree.unstack(points)[1])


def test_weights_that_do_not_sum_to_one_are_refused():
    for weights in ([0.5, 0.5, 0.1], [[0.5, 0.5, 0.0], [1.0, 1.0, 1.0]], [np.nan, 0.5, 0.5]):
        with pytest.raises(ValueError, match="weights sum to .*; expected 1"):
            merging.weighted_mean(stacked(3), np.array(weights))


def positive(points):
    return jax.tree.map(lambda x: jnp.square(x) + jnp.asarray(0.1, x.dtype), points)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 1e-35, 1e30])
def test_equal_fishers_give_the_mean(dtype, factor):
    points = stacked(3, dtype)
    one = tree.scale(factor, tree.cast(positive(network(9)), jnp.float32))
    fishers = tree.stack([one] * 3)
    rtol = 4 * float(jnp.finfo(dtype).eps)
    close(merging.fisher_merge(points, fishers), merging.uniform_soup(points), rtol)
    weights = np.array([0.2, 0.5, 0.3])
    found = merging.fisher_merge(points, fishers, weights=7 * weights)
    close(found, merging.weighted_mean(points, weights), rtol)


def test_fishers_weigh_entry_by_entry():
    points, fishers = stacked(3), positive(stacked(3))
    c = np.array([0.2, 0.5, 0.3])
    for floor in (0.0, 0.5):
        found = merging.fisher_merge(points, fishers, weights=c, floor=floor)

        def by_hand(x, f, floor=floor):
            share = (np.asarray(f, float) + floor) * c.reshape((3,) + (1,) * (x.ndim - 1))
            return ((share * np.asarray(x, float)).sum(0) / share.sum(0)).astype(np.float32)

        close(found, jax.tree.map(by_hand, points, fishers), 16 * EPS)


def test_entries_without_any_fisher_get_the_mean_and_no_nan():
    points = stacked(3)
    zero = jax.tree.map(jnp.zeros_like, points)
    same(merging.fisher_merge(points, zero), merging.uniform_soup(points))
    only_second = jax.tree.map(lambda x: x.at[1].set(2e-38), zero)
    close(merging.fisher_merge(points, only_second), tree.unstack(points)[1])


def test_fishers_that_are_none_are_refused():
    points = stacked(2)
    bad = jax.tree.map(jnp.ones_like, points)
    bad["dense"]["kernel"] = bad["dense"]["kernel"].at[0, 3, 1].set(-1.0)
    with pytest.raises(ValueError, match=r"leaf \['dense'\]\['kernel'\].*negative or NaN"):
        merging.fisher_merge(points, bad)
    good = jax.tree.map(jnp.ones_like, points)
    with pytest.raises(ValueError, match="expected nonnegative"):
        merging.fisher_merge(points, good, weights=np.array([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"shape \(3,\); expected \(2,\)"):
        merging.fisher_merge(points, good, weights=np.ones(3))
    with pytest.raises(ValueError, match="floor is -1"):
        merging.fisher_merge(points, good, floor=-1.0)


def regression_loss(params, batch):
    x, y = batch
    return 0.5 * jnp.mean(jnp.square(x @ params["w"] + params["b"] - y))


def test_the_fisher_diagonal_is_the_mean_square_of_the_gradients_of_the_examples(rng):
    x = rng.normal(size=(23, 4)).astype(np.float32)
    y = rng.normal(size=23).astype(np.float32)
    params = {"w": jnp.asarray(rng.normal(size=4), jnp.float32), "b": jnp.float32(0.3)}
    residual = x @ np.asarray(params["w"]) + 0.3 - y
    for size in (23, 5):
        found = merging.fisher_diagonal(regression_loss, params, batches.split((x, y), size))
        np.testing.assert_allclose(found["w"], np.mean((residual[:, None] * x) ** 2, 0), rtol=1e-5)
        np.testing.assert_allclose(found["b"], np.mean(residual**2), rtol=1e-5)


# ------------------------------------------------------------------------------ regression means


def linear_data(rng, counts=(40, 25, 60), d=6, k=3, bias=False):
    """Inputs of each member, their own least-squares kernels, and the joint one."""
    inputs, targets = [], []
    for count in counts:
        x = rng.normal(size=(count, d)) @ rng.normal(size=(d, d))
        inputs.append(x)
        targets.append(x @ rng.normal(size=(d, k)) + 0.1 * rng.normal(size=(count, k)))
    own = [np.linalg.lstsq(x, y)[0] for x, y in zip(inputs, targets, strict=True)]
    joint = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(targets))[0]
    return inputs, np.stack(own), joint


@pytest.mark.parametrize(("wide", "tolerance"), [(False, 1e-4), (True, 1e-11)])
def test_the_regression_mean_is_the_joint_least_squares_solution(rng, wide, tolerance):
    inputs, own, joint = linear_data(rng)
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        points = {"kernel": jnp.asarray(own, dtype), "bias": jnp.asarray(own[:, 0], dtype)}
        grams = jnp.stack([jnp.asarray(x.T @ x, dtype) for x in inputs])
        found = merging.regression_mean(points, {"['kernel']": grams})
        assert found.ranks == {"['kernel']": 6}
        assert found.params["kernel"].dtype == dtype
        np.testing.assert_allclose(found.params["kernel"], joint, rtol=0, atol=tolerance)
        same(found.params["bias"], merging.uniform_soup(points)["bias"])


def test_a_kernel_with_its_inputs_on_two_axes_is_regressed_over_both(rng):
    inputs, own, joint = linear_data(rng, d=4)
    points = {"layer": jnp.asarray(own.reshape(3, 2, 2, 3), jnp.float32)}
    found = merging.regression_mean(points, {"['layer']": np.stack([x.T @ x for x in inputs])})
    np.testing.assert_allclose(found.params["layer"].reshape(4, 3), joint, atol=1e-5)


def test_directions_without_inputs_keep_the_mean_and_full_shrinkage_weighs_by_the_diagonal(rng):
    inputs, own, _ = linear_data(rng)
    for x in inputs:
        x[:, 2] = 0  # a dead unit
        x[:, 5] = x[:, 4]  # two that are always equal
    points = {"w": jnp.asarray(own, jnp.float32)}
    grams = np.stack([x.T @ x for x in inputs])
    found = merging.regression_mean(points, {"['w']": grams})
    assert found.ranks == {"['w']": 4}
    np.testing.assert_allclose(found.params["w"][2], own[:, 2].mean(0), rtol=1e-5)
    want = np.concatenate([x @ w for x, w in zip(inputs, own, strict=True)])
    normal = np.concatenate(inputs)
    np.testing.assert_allclose(
        normal.T @ (normal @ np.asarray(found.params["w"], float)), normal.T @ want,
        atol=1e-4 * np.abs(normal.T @ want).max(),
    )  # fmt: skip
    diagonal = np.diagonal(grams, axis1=1, axis2=2)[..., None]
    found = merging.regression_mean(points, {"['w']": grams}, shrinkage=1.0).params["w"]
    used = np.arange(6) != 2
    by_entry = (diagonal * own).sum(0)[used] / diagonal.sum(0)[used]
    np.testing.assert_allclose(found[used], by_entry, rtol=1e-4, atol=1e-5)


def test_grams_that_fit_no_kernel_are_refused(rng):
    points = {"w": jnp.ones((2, 4, 3))}
    cases = [
        ({"['v']": np.ones((2, 4, 4))}, r"\['v'\].*no leaf"),
        ({"['w']": np.ones((2, 5, 5))}, "no leading axes"),
        ({"['w']": np.ones((3, 4, 4))}, r"expected \(2, d, d\)"),
        ({"['w']": np.full((2, 4, 4), np.nan)}, "not finite"),
    ]
    for grams, says in cases:
        with pytest.raises(ValueError, match=says):
            merging.regression_mean(points, grams)
    with pytest.raises(ValueError, match="shrinkage is 2"):
        merging.regression_mean(points, {}, shrinkage=2.0)


# -------------------------------------------------------------------------------------------- soups


def score_by(table):
    """A score of the mean of one-hot members, looked up by which of them it contains."""
    return lambda params: table[tuple(np.flatnonzero(np.asarray(params["w"]) > 0).tolist())]


def test_a_greedy_soup_takes_in_what_does_not_harm():
    points = {"w": jnp.eye(4)}
    table = {
        (0,): 0.5, (1,): 0.9, (2,): 0.8, (3,): 0.9,  # 1 before 3: equal scores in the order given
        (1, 3): 0.85, (1, 2): 0.9, (0, 1, 2): 0.95,
    }  # fmt: skip
    soup = merging.greedy_soup(points, score_by(table), progress=False)
    assert soup.members == (1, 2, 0)
    assert soup.score == 0.95
    np.testing.assert_array_equal(soup.scores, [0.5, 0.9, 0.8, 0.9])
    np.testing.assert_allclose(soup.params["w"], [1 / 3, 1 / 3, 1 / 3, 0], rtol=2 * EPS)


def test_a_greedy_soup_is_never_worse_than_the_best_member(rng):
    points = stacked(5)
    for seed in range(5):
        target = network(10 + seed)
        scores = []

        def score(params, target=target, scores=scores):
            scores.append(-float(tree.norm(tree.axpy(-1.0, target, params))))
            return scores[-1]

        soup = merging.greedy_soup(points, score, progress=False)
        assert len(scores) == 9
        assert soup.score >= soup.scores.max()
        assert score(soup.params) == soup.score


def test_scores_that_are_no_numbers_keep_members_out():
    points = {"w": jnp.eye(3)}
    table = {(0,): np.nan, (1,): 0.1, (2,): 0.2, (1, 2): np.nan}
    soup = merging.greedy_soup(points, score_by(table), progress=False)
    assert soup.members == (2,)
    same(soup.params, {"w": jnp.eye(3)[2]})
    with pytest.raises(ValueError, match="every member is NaN"):
        merging.greedy_soup(points, lambda params: np.nan, progress=False)


# ------------------------------------------------------------------------------------- task vectors


@pytest.mark.parametrize("dtype", DTYPES)
def test_task_vectors_add_up(dtype):
    base, one, two = (network(i, dtype) for i in range(3))
    vectors = tree.stack([merging.task_vector(one, base), merging.task_vector(two, base)])
    rtol = 4 * float(jnp.finfo(dtype).eps)
    same(merging.add_task_vectors(base, vectors, [0.0, 0.0]), base)
    close(merging.add_task_vectors(base, vectors, [1.0, 0.0]), one, rtol)
    half = merging.add_task_vectors(base, vectors, [0.5, 0.5])
    close(half, merging.uniform_soup(tree.stack([one, two])), rtol)
    many = merging.add_task_vectors(base, vectors, np.array([[1.0, 0.0], [0.5, 0.5]]))
    close(tree.unstack(many)[1], half)
    with pytest.raises(ValueError, match=r"shape \(3,\); expected \(..., 2\)"):
        merging.add_task_vectors(base, vectors, np.ones(3))


# ---------------------------------------------------------------------- all of them: kinds, meshes


FRONT_DOORS = {
    "lerp": lambda a, b: merging.lerp(a, b, jnp.array([0.2, 0.6])),
    "slerp": lambda a, b: merging.slerp(a, b, 0.3),
    "slerp by leaf": lambda a, b: merging.slerp(a, b, jnp.array([0.2, 0.6]), scope="leaf"),
    "slerp by axis": lambda a, b: merging.slerp(a, b, jnp.array([0.2, 0.6]), scope="axis"),
    "weighted mean": lambda a, b: merging.weighted_mean(tree.stack([a, b]), [0.3, 0.7]),
    "uniform soup": lambda a, b: merging.uniform_soup(tree.stack([a, b])),
    "fisher": lambda a, b: merging.fisher_merge(
        tree.stack([a, b]), tree.stack([positive(b), positive(a)]), floor=0.1
    ),
    "task vector": merging.task_vector,
    "task arithmetic": lambda a, b: merging.add_task_vectors(a, tree.stack([a, b]), [0.5, -0.5]),
    "regression mean": lambda a, b: (
        merging.regression_mean(
            tree.stack([a, b]), {"['dense']['kernel']": np.stack([np.eye(4), 2 * np.eye(4)])}
        ).params
    ),
    "greedy soup": lambda a, b: (
        merging.greedy_soup(tree.stack([a, b]), lambda p: p["gain"], progress=False).params
    ),
}


@pytest.mark.parametrize("name", FRONT_DOORS)
def test_sharded_parameters_give_the_same_and_stay_sharded(mesh, name):
    front_door = FRONT_DOORS[name]
    a, b = network(0), network(1)
    want = front_door(a, b)
    with jax.set_mesh(mesh):
        put = lambda x: jax.device_put(  # noqa: E731
            x, NamedSharding(mesh, P(*(None,) * (x.ndim - 1), "model") if x.ndim else P())
        )
        found = front_door(jax.tree.map(put, a), jax.tree.map(put, b))
    close(found, want, 32 * EPS)
    assert found["dense"]["kernel"].sharding.spec[-1] == "model"


def test_the_fisher_diagonal_of_sharded_data_is_the_same(mesh, rng):
    x, y = rng.normal(size=(18, 4)).astype(np.float32), rng.normal(size=18).astype(np.float32)
    params = {"w": jnp.ones(4), "b": jnp.float32(0.3)}
    want = merging.fisher_diagonal(regression_loss, params, (x, y))
    with jax.set_mesh(mesh):
        found = merging.fisher_diagonal(regression_loss, params, (x, y), mesh=mesh)
    close(found, want, 16 * EPS)


@pytest.mark.parametrize("name", [n for n in FRONT_DOORS if n != "regression mean"])
def test_leaves_that_are_no_floats_are_refused_by_path(name):
    a, b = ({**network(i), "gain": jnp.int32(3)} for i in range(2))
    with pytest.raises(TypeError, match=r"\['gain'\] is int32"):
        FRONT_DOORS[name](a, b)


@pytest.mark.parametrize("kind", ["lerp", *SCOPES])
def test_points_of_different_shapes_are_refused_by_path(kind):
    a = network(0)
    b = {**a, "gain": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"\['gain'\] has shape \(\)"):
        bend(kind)(a, b, 0.5)


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="'unit'; expected one of global, leaf, axis"):
        merging.slerp(network(0), network(1), 0.5, scope="unit")  # pyright: ignore
