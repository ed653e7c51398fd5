"""Lines through weight space, barriers on them, and directions to walk in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import batches, hessian, krylov, surface, tree

EPS = float(np.finfo(np.float32).eps)
A = {"w": jnp.array([1.0, 0.0, 0.0]), "b": jnp.array(2.0)}
B = {"w": jnp.array([0.0, 3.0, 0.0]), "b": jnp.array(0.0)}


def metrics(params, batch):
    out = batch["x"] @ params["w"] + params["b"]
    return {"linear": jnp.mean(out), "square": jnp.mean(out**2)}


def data(n=17):
    return {"x": np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)}


def test_a_metric_linear_in_the_parameters_is_linear_on_the_line():
    ts = np.linspace(-0.5, 1.5, 9)
    found = surface.line(metrics, A, B, batches.split(data(), 5), ts)
    first, last = (metrics(p, data())["linear"] for p in (A, B))
    np.testing.assert_allclose(found.values["linear"], (1 - ts) * first + ts * last, atol=1e-5)
    assert found.distance == pytest.approx(np.sqrt(1 + 9 + 4))


def test_the_ends_are_the_points_themselves():
    found = surface.line(metrics, A, B, data(), [0.0, 1.0])
    for i, point in enumerate((A, B)):
        assert found.values["square"][i] == float(jax.jit(metrics)(point, data())["square"])


def test_state_is_made_anew_at_each_position():
    def with_state(params, state, batch):
        return {"gap": jnp.abs(state - params["b"]) + 0 * jnp.mean(batch["x"])}

    found = surface.line(
        with_state, A, B, data(), [0.0, 0.3, 1.0], state_fn=lambda params: params["b"]
    )
    np.testing.assert_array_equal(found.values["gap"], 0)


def test_the_metrics_are_compiled_once_for_the_line():
    traces = []

    def counted(params, batch):
        traces.append(1)
        return metrics(params, batch)

    surface.line(counted, A, B, data(), np.linspace(0, 1, 7))
    assert len(traces) == 1


def test_a_barrier_is_measured_above_the_chord_and_carries_both_ends():
    ts = np.linspace(0, 1, 5)
    found = surface.barrier(ts, [1.0, 1.0, 4.0, 2.5, 3.0])
    assert found == surface.Barrier(2.0, 0.5, 1.0, 3.0, 4.0)
    assert surface.barrier(ts, [2.0] * 5).height == 0


@pytest.mark.parametrize(
    ("ts", "values", "says"),
    [
        ([0.0, 0.5], [1.0, 2.0], "both ends"),
        ([0.0, 1.0], [1.0, np.nan], "t=1.0 is not finite"),
        ([0.0, 1.0], [1.0], "expected"),
        ([1.0, 0.0], [1.0, 1.0], "ascend"),
    ],
)
def test_a_barrier_of_half_a_path_is_refused(ts, values, says):
    with pytest.raises(ValueError, match=says):
        surface.barrier(ts, values)


def test_points_of_different_shapes_and_bad_positions_are_refused():
    with pytest.raises(ValueError, match=r"\['w'\] has shape \(3,\) in tree 0 and \(2,\)"):
        surface.line(metrics, A, B | {"w": jnp.ones(2)}, data(), [0.0])
    with pytest.raises(ValueError, match="at least one position"):
        surface.line(metrics, A, B, data(), [])
    with pytest.raises(TypeError, match="dict of scalars"):
        surface.line(lambda p, b: p["w"], A, B, data(), [0.0])


@pytest.mark.parametrize("shard", ["data", "parameters"])
def test_a_sharded_line_equals_one_device(mesh, shard):
    a, b = ({"w": jnp.arange(4.0) + i, "b": jnp.array(1.0 * i)} for i in range(2))
    arrays = {"x": np.random.default_rng(0).normal(size=(17, 4)).astype(np.float32)}

    def loss(params, batch):
        out = jnp.sum(batch["x"] * params["w"][None], axis=1) + params["b"]
        return {"square": jnp.mean(out**2)}

    source = batches.split(arrays, 8)
    want = surface.line(loss, a, b, source, [0.0, 0.4, 1.0])
    if shard == "parameters":
        where = {"w": NamedSharding(mesh, P("model")), "b": NamedSharding(mesh, P())}
        a, b = jax.device_put(a, where), jax.device_put(b, where)
    with jax.set_mesh(mesh):
        got = surface.line(loss, a, b, source, [0.0, 0.4, 1.0], mesh=mesh)
    np.testing.assert_allclose(got.values["square"], want.values["square"], rtol=1e-5)
    assert got.distance == pytest.approx(want.distance, rel=1e-6)


# ------------------------------------------------------------------------------------ directions


def quadratic(dtype, n=12):
    """L0 + (p - c)^T H (p - c) / 2 on a pytree of two leaves, at its stationary point."""
    r = np.random.default_rng(0)
    matrix = r.normal(size=(n, n))
    matrix = matrix + matrix.T

    def loss(params, batch):
        p = jnp.concatenate([params["a"].reshape(-1), params["b"]])
        away = p - batch["center"][0]
        return {"loss": batch["offset"][0] + away @ batch["matrix"][0] @ away / 2}

    center = r.normal(size=n)
    arrays = {"center": center[None], "matrix": matrix[None], "offset": np.array([3.0])}
    params = {"a": center[:6].reshape(2, 3), "b": center[6:]}
    cast = lambda x: jnp.asarray(x, dtype)  # noqa: E731
    return loss, jax.tree.map(cast, params), jax.tree.map(cast, arrays), matrix


def scalar_loss(params, batch):
    return quadratic(jnp.float32)[0](params, batch)["loss"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_along_an_eigenvector_of_a_quadratic_the_loss_is_half_lambda_a_squared(dtype):
    distances = np.linspace(-2, 2, 9)
    with jax.enable_x64(dtype == np.float64):
        loss, params, data, matrix = quadratic(dtype)
        operator = hessian.hessian(scalar_loss, params, data)
        pairs = krylov.eigsh(operator, 2, key=jax.random.key(0))
        for value, direction in zip(
            pairs.eigenvalues, tree.unstack(pairs.eigenvectors), strict=True
        ):
            found = surface.along(loss, params, direction, distances, data)
            curve = 3.0 + 0.5 * value * distances**2
            np.testing.assert_allclose(found.values["loss"], curve, rtol=1e-6)
            np.testing.assert_array_equal(found.ts, distances)
            assert found.distance == pytest.approx(1, rel=1e-6)


def test_the_curve_of_a_network_bends_by_the_eigenvalue():
    def loss(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["in"])
        return jnp.mean((hidden @ params["out"] - batch["x"][:, 0]) ** 2)

    with jax.enable_x64(True):
        r = np.random.default_rng(0)
        params = {"in": jnp.asarray(r.normal(size=(3, 4))), "out": jnp.asarray(r.normal(size=4))}
        data = {"x": r.normal(size=(17, 3))}
        pairs = krylov.eigsh(
            hessian.hessian(loss, params, data), 1, key=jax.random.key(0), tol=1e-8
        )
        top = tree.unstack(pairs.eigenvectors)[0]
        step = 1e-4
        found = surface.along(
            lambda p, b: {"loss": loss(p, b)}, params, top, [-step, 0, step], batches.split(data, 8)
        )
        below, here, above = found.values["loss"]
    assert (above + below - 2 * here) / step**2 == pytest.approx(pairs.eigenvalues[0], rel=1e-5)


def test_along_compiles_once_keeps_dtypes_and_leaves_none_where_it_is():
    traces = []

    def counted(params, batch):
        traces.append(params["w"].dtype)
        return {"w": jnp.sum(params["w"].astype(jnp.float32)), "b": params["b"]}

    params = {"w": jnp.array([1.0, 2.0], jnp.bfloat16), "b": jnp.array(2.0)}
    # As the eigenvectors of a selected part come: float32, and None elsewhere.
    direction = {"w": jnp.array([0.5, 0.0], jnp.float32), "b": None}
    found = surface.along(counted, params, direction, [0.0, 2.0, -4.0], data())
    assert found.values["w"].tolist() == [3.0, 4.0, 1.0]
    assert found.values["b"].tolist() == [2.0, 2.0, 2.0]
    assert traces == [jnp.bfloat16]


def test_along_makes_state_anew_and_equals_the_line_to_the_far_end():
    direction = jax.tree.map(jnp.subtract, B, A)
    ts = [0.0, 0.3, 1.0]
    found = surface.along(metrics, A, direction, ts, batches.split(data(), 5))
    want = surface.line(metrics, A, B, batches.split(data(), 5), ts)
    np.testing.assert_allclose(found.values["square"], want.values["square"], rtol=1e-5)
    assert found.distance == pytest.approx(want.distance)

    def with_state(params, state, batch):
        return {"gap": jnp.abs(state - params["b"]) + 0 * jnp.mean(batch["x"])}

    found = surface.along(with_state, A, direction, ts, data(), state_fn=lambda params: params["b"])
    np.testing.assert_array_equal(found.values["gap"], 0)


def test_directions_that_lead_nowhere_are_refused():
    direction = {"w": jnp.ones(3), "b": jnp.ones(())}
    along = lambda d, a: surface.along(metrics, A, d, a, data())  # noqa: E731
    with pytest.raises(
        ValueError, match=r"\['w'\] has shape \(3,\) in params and \(2,\) in the dir"
    ):
        along(direction | {"w": jnp.ones(2)}, [1.0])
    with pytest.raises(ValueError, match=r"lacks leaf \['b'\]"):
        along({"w": jnp.ones(3)}, [1.0])
    with pytest.raises(ValueError, match="length of the direction is 0"):
        along(tree.scale(0.0, direction), [1.0])
    with pytest.raises(ValueError, match="length of the direction is nan"):
        along(tree.scale(np.nan, direction), [1.0])
    with pytest.raises(ValueError, match="distances have shape"):
        along(direction, 1.0)
    with pytest.raises(TypeError, match=r"direction: leaf \['w'\] is int32"):
        along(direction | {"w": jnp.arange(3)}, [1.0])


def network():
    r = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (3, 3, 2, 5), "bias": (5,)},
        "dense": {"kernel": (20, 4), "bias": (4,)},
        "scale": (4,),
    }
    params = jax.tree.map(
        lambda s: jnp.asarray(r.normal(size=s) * r.uniform(0.01, 3, s[-1]), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    # A filter that is zero, and one whose squares vanish in float32.
    kernel = params["dense"]["kernel"].at[:, 1].set(0).at[:, 2].multiply(1e-30)
    return params | {"dense": params["dense"] | {"kernel": kernel}}


def norms(x, axis):
    x = np.asarray(x, np.float64)
    return np.sqrt((x**2).sum(tuple(a for a in range(x.ndim) if a != axis % x.ndim)))


@pytest.mark.parametrize("filter_axis", [-1, 0])
def test_each_filter_of_a_direction_gets_the_norm_of_the_weights_filter(filter_axis):
    params = network()
    direction = tree.random_like(jax.random.key(0), params)
    out = surface.filter_normalize(direction, params, filter_axis=filter_axis)
    for layer in ("conv", "dense"):
        got, before = out[layer]["kernel"], direction[layer]["kernel"]
        size = norms(params[layer]["kernel"], filter_axis)
        np.testing.assert_allclose(norms(got, filter_axis), size, rtol=8 * EPS)
        # Filters keep their direction.
        shape = [1] * got.ndim
        shape[filter_axis] = -1
        want = before / norms(before, filter_axis).reshape(shape) * size.reshape(shape)
        np.testing.assert_allclose(got, want, rtol=8 * EPS)
        assert not out[layer]["bias"].any()
    assert not out["scale"].any()


def test_vectors_layers_leaves_and_the_network_are_scaled_where_asked():
    params = network()
    direction = tree.random_like(jax.random.key(0), params)
    length = lambda x: float(tree.norm(x))  # noqa: E731
    scaled = surface.filter_normalize(direction, params, vectors="scale")
    leaf = surface.filter_normalize(direction, params, scope="leaf")
    layer = surface.filter_normalize(direction, params, scope="layer", vectors="scale")
    kernels = surface.filter_normalize(direction, params, scope="layer")
    whole = surface.filter_normalize(direction, params, scope="network", vectors="scale")
    assert length(scaled["scale"]) == pytest.approx(length(params["scale"]), rel=8 * EPS)
    for name in ("conv", "dense"):
        p = params[name]
        assert length(scaled[name]["bias"]) == pytest.approx(length(p["bias"]), rel=8 * EPS)
        assert length(leaf[name]["kernel"]) == pytest.approx(length(p["kernel"]), rel=8 * EPS)
        assert length(layer[name]) == pytest.approx(length(p), rel=8 * EPS)
        assert length(kernels[name]) == pytest.approx(length(p["kernel"]), rel=8 * EPS)
        # One factor for the layer, not one for each of its leaves.
        factor = length(p) / length(direction[name])
        np.testing.assert_allclose(
            layer[name]["bias"], direction[name]["bias"] * factor, rtol=8 * EPS
        )
    assert length(whole) == pytest.approx(length(params), rel=8 * EPS)
    factor = length(params) / length(direction)
    np.testing.assert_allclose(whole["scale"], direction["scale"] * factor, rtol=8 * EPS)


def test_a_direction_of_zeros_or_of_a_part_stays_so():
    params = network()
    direction = tree.random_like(jax.random.key(0), params)
    zero = direction["conv"]["kernel"].at[..., 0].set(0)
    direction = {"conv": {"kernel": zero, "bias": None}, "dense": direction["dense"], "scale": None}
    out = jax.jit(surface.filter_normalize)(direction, params)
    assert not out["conv"]["kernel"][..., 0].any()
    assert out["conv"]["bias"] is None
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))
    half = surface.filter_normalize(tree.cast(direction, jnp.bfloat16), params)
    assert half["dense"]["kernel"].dtype == jnp.bfloat16


def test_random_directions_depend_on_the_key_alone_and_unknown_options_are_refused():
    params = network()
    unit = surface.random_direction(jax.random.key(0), params, scope=None)
    assert float(tree.norm(unit)) == pytest.approx(1, rel=4 * EPS)
    got = surface.random_direction(jax.random.key(0), params, vectors="scale")
    want = surface.filter_normalize(unit, params, vectors="scale")
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=16 * EPS)
    with pytest.raises(ValueError, match="scope is 'weight'; expected one of filter, leaf"):
        surface.random_direction(jax.random.key(0), params, scope="weight")
    with pytest.raises(ValueError, match="vectors is 'drop'"):
        surface.filter_normalize(unit, params, vectors="drop")
    with pytest.raises(
        ValueError, match=r"filter_axis is 3, and leaf \['dense'\]\['kernel'\] has 2"
    ):
        surface.filter_normalize(unit, params, filter_axis=3)


def test_sharded_directions_equal_those_of_one_device(mesh):
    params = {"kernel": jnp.arange(24.0).reshape(6, 4) / 10, "bias": jnp.ones(4)}
    arrays = {"x": np.random.default_rng(0).normal(size=(17, 6)).astype(np.float32)}
    key, distances = jax.random.key(0), [-1.0, 0.0, 0.5]

    def loss(params, batch):
        out = batch["x"] @ params["kernel"] + params["bias"][None]
        return {"square": jnp.mean(out**2)}

    source = batches.split(arrays, 8)
    direction = surface.random_direction(key, params, vectors="scale")
    want = surface.along(loss, params, direction, distances, source)
    where = {"kernel": NamedSharding(mesh, P(None, "model")), "bias": NamedSharding(mesh, P())}
    with jax.set_mesh(mesh):
        params = jax.device_put(params, where)
        sharded = surface.random_direction(key, params, vectors="scale")
        got = surface.along(loss, params, sharded, distances, source, mesh=mesh)
    for name, leaf in sharded.items():
        np.testing.assert_allclose(leaf, direction[name], rtol=8 * EPS)
        assert leaf.sharding.is_equivalent_to(where[name], leaf.ndim)
    np.testing.assert_allclose(got.values["square"], want.values["square"], rtol=1e-5)
