"""Lines through weight space and barriers on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import batches, surface

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
