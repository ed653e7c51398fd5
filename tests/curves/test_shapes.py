"""Shapes of curves, and statistics of several positions at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from geojax import batches, curves, models, objectives, statistics, tree

EPS = float(np.finfo(np.float32).eps)


def test_the_shape_of_a_square_corner_and_of_a_return():
    w = {"a": jnp.array([[0.0], [3.0], [3.0], [3.0]]), "b": jnp.array([0.0, 0.0, 4.0, 1.0])}
    found = curves.shape(curves.polychain(4), w, num_steps=300)  # the joints are on the grid
    np.testing.assert_allclose(found.distances[0], [0, 3, 5, np.sqrt(10)], rtol=4 * EPS)
    np.testing.assert_allclose(found.distances, found.distances.T)
    np.testing.assert_allclose(found.angles, [np.pi / 2, np.pi], rtol=1e-6)
    assert found.polygon == pytest.approx(10, rel=1e-6)
    assert found.length == pytest.approx(10, rel=1e-5)
    assert found.ratio == pytest.approx(10 / np.sqrt(10), rel=1e-5)
    assert found.chord == pytest.approx(np.sqrt(10), rel=1e-6)


def test_a_bezier_is_shorter_than_its_polygon_and_longer_than_its_chord():
    rng = np.random.default_rng(0)
    w = {"w": jnp.asarray(rng.normal(size=(4, 20)), jnp.float32)}
    found = curves.shape(curves.bezier(4), w)
    assert found.chord < found.length < found.polygon
    assert found.length == curves.length(curves.bezier(4), w)
    x = np.asarray(w["w"], np.float64)
    distances = np.linalg.norm(x[:, None] - x[None], axis=-1)
    np.testing.assert_allclose(found.distances, distances, rtol=16 * EPS)
    steps = np.diff(x, axis=0)
    cosines = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in zip(steps, steps[1:], strict=False)
    ]
    np.testing.assert_allclose(found.angles, np.arccos(cosines), rtol=1e-6)


def test_small_angles_are_exact_and_a_point_has_none():
    w = {"w": jnp.array([[0.0, 0.0], [1.0, 0.0], [2.0, 1e-5]])}
    assert curves.shape(curves.polychain(3), w).angles[0] == pytest.approx(1e-5, rel=1e-4)
    still = curves.shape(curves.polychain(3), {"w": jnp.ones((3, 2))})
    assert np.isnan(still.angles).all()
    assert np.isnan(still.ratio)


@functools.cache
def network():
    model = models.build("mlp", widths=[16], num_classes=4, norm="batch")
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(32, 8)).astype(np.float32)
    labels = rng.integers(4, size=32).astype(np.int32)
    members = [model.init(jax.random.key(s), rows[:1]) for s in range(3)]
    w = tree.stack([params for params, _ in members])
    return model, members[0][1], w, (rows, labels)


def state_fns(model, state, data, num):
    def one(params):
        return statistics.refresh(model.apply, params, state, data)

    def many(points):
        return statistics.refresh_points(model.apply, points, state, data, num_at_once=num)

    return one, many


def test_statistics_of_several_positions_at_once_are_those_of_each():
    model, state, w, arrays = network()
    data = batches.split(arrays, 16)
    one, many = state_fns(model, state, data, 4)
    run = functools.partial(
        curves.evaluate, objectives.metrics_with_state(model.apply), curves.bezier(3), w, data, 7
    )
    given = []

    def counted(points):
        given.append(tree.num_points(points))
        return many(points)

    apart, together = run(state_fn=one), run(states_fn=counted, num_at_once=4)
    assert given == [4, 3]
    stale = curves.evaluate(objectives.metrics(model.apply, state), curves.bezier(3), w, data, 7)
    for name, metric in apart.metrics.items():
        np.testing.assert_allclose(
            together.metrics[name].values, metric.values, rtol=1e-5, atol=1e-6
        )
    assert abs(stale.metrics["loss"].mean - apart.metrics["loss"].mean) > 1e-3
    with pytest.raises(ValueError, match="expected one of them"):
        run(state_fn=one, states_fn=many)
    with pytest.raises(ValueError, match="num_at_once is 0"):
        run(states_fn=many, num_at_once=0)


def test_statistics_at_once_on_sharded_data_are_those_of_one_device(mesh):
    model, state, w, arrays = network()
    run = functools.partial(
        curves.evaluate, objectives.metrics_with_state(model.apply), curves.polychain(3), w, ts=5
    )
    reference = run(batches=arrays, state_fn=state_fns(model, state, arrays, 1)[0])
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec("data"))
        data = tuple(jax.device_put(x, rows) for x in arrays)
        found = run(batches=data, states_fn=state_fns(model, state, data, 3)[1], num_at_once=3)
    for name, metric in reference.metrics.items():
        np.testing.assert_allclose(found.metrics[name].values, metric.values, rtol=1e-5, atol=1e-6)
