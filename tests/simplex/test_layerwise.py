"""Coefficients for every layer apart: draws, the step by hand, meshes, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from geojax import simplex, tree

KEY = jax.random.key(5)
UNITS = {"a": {"bias": jnp.eye(4), "kernel": jnp.eye(4)}, "b": {"kernel": jnp.eye(4)}}


def two_triangles():
    return simplex.SimplicialComplex(UNITS, [(0, 1, 2), (1, 2, 3)])


def test_a_layer_has_its_own_coefficients_within_a_simplex_that_all_share():
    drawn = simplex.sample_layer_weights(KEY, two_triangles(), 2000, choose="uniform")
    first, bias, second = drawn["a"]["kernel"], drawn["a"]["bias"], drawn["b"]["kernel"]
    assert np.array_equal(first, bias)
    np.testing.assert_allclose(first.sum(1), 1, atol=1e-6)
    # Vertex 0 or vertex 3 is left out, of all layers at once.
    assert np.array_equal(first == 0, second == 0)
    assert ((np.asarray(first) == 0).sum(1) == 1).all()
    # Within a triangle: mean 1/3, variance 1/18, and layers uncorrelated.
    inside = np.asarray(first)[:, 3] == 0
    x, y = np.asarray(first)[inside, 1], np.asarray(second)[inside, 1]
    assert abs(x.mean() - 1 / 3) < 0.03
    assert abs(x.var() - 1 / 18) < 0.01
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.1


def test_the_points_are_the_combinations_of_each_leaf():
    rng = np.random.default_rng(0)
    points = {"a": {"w": rng.normal(size=(3, 2, 5))}, "b": {"w": rng.normal(size=(3, 4))}}
    points = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), points)
    drawn = simplex.sample_layer_weights(KEY, simplex.single(points), 6)
    made = tree.combine_leaves(points, drawn)
    for name in "ab":
        expected = np.tensordot(np.asarray(drawn[name]["w"]), np.asarray(points[name]["w"]), 1)
        np.testing.assert_allclose(made[name]["w"], expected, atol=1e-6)
    same = jax.tree.map(lambda _: drawn["a"]["w"], points)
    together = tree.combine(points, drawn["a"]["w"])
    assert jax.tree.all(jax.tree.map(np.array_equal, tree.combine_leaves(points, same), together))


@functools.lru_cache
def seen_points(samples, layerwise):
    """Every point at which the loss was taken in 300 steps of no length, from unit vertices."""
    seen = []

    def loss_fn(params, batch):
        jax.debug.callback(lambda x: seen.append(jax.tree.map(np.array, x)), params)
        return 0 * sum(jnp.sum(x) for x in jax.tree.leaves(params)) + 0 * jnp.sum(batch)

    start = simplex.single(UNITS)
    simplex.fit(
        loss_fn, start, jnp.zeros(1), optax.sgd(0.0), 300, key=KEY, num_samples=2,
        samples=samples, layerwise=layerwise, progress=False,
    )  # fmt: skip
    jax.effects_barrier()
    return seen


@pytest.mark.parametrize("samples", ["sequential", "vmap"])
def test_training_draws_them_so_and_without_it_all_layers_share(samples):
    seen = seen_points(samples, True)
    assert len(seen) == 600
    first, second = (np.stack([x[n]["kernel"] for x in seen]) for n in "ab")
    np.testing.assert_allclose(first.sum(1), 1, atol=1e-6)
    assert all(np.array_equal(x["a"]["kernel"], x["a"]["bias"]) for x in seen)
    assert abs(np.corrcoef(first[:, 0], second[:, 0])[0, 1]) < 0.15
    shared = seen_points(samples, False)
    assert all(np.array_equal(x["a"]["kernel"], x["b"]["kernel"]) for x in shared)


def test_the_gradient_of_each_vertex_is_that_of_the_point_times_the_coefficient_of_the_layer():
    rng = np.random.default_rng(1)
    points = {n: {"w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)} for n in "ab"}
    seen = []

    def loss_fn(params, batch):
        jax.debug.callback(lambda x: seen.append(jax.tree.map(np.array, x)), params)
        return jnp.sum(jnp.sin(params["a"]["w"]) * params["b"]["w"]) + 0 * jnp.sum(batch)

    found = simplex.fit(
        loss_fn, simplex.single(points), jnp.zeros(1), optax.sgd(1.0), 1, key=KEY, free=range(3),
        num_samples=1, layerwise=True, progress=False,
    )  # fmt: skip
    jax.effects_barrier()
    (point,) = seen
    a, b = point["a"]["w"], point["b"]["w"]
    slopes = {"a": np.cos(a) * b, "b": np.sin(a)}
    for name in "ab":
        vertices = np.asarray(points[name]["w"])
        # The coefficients that made this leaf of the point, from its four numbers.
        system = np.concatenate([vertices.T, np.ones((1, 3))])
        c = np.linalg.lstsq(system, np.append(point[name]["w"], 1), rcond=None)[0]
        moved = vertices - np.asarray(found.complex.vertices[name]["w"])
        np.testing.assert_allclose(moved, c[:, None] * slopes[name], atol=1e-5)


def test_a_growing_vertex_and_its_volume_go_with_it():
    rng = np.random.default_rng(2)
    make = lambda num: {n: {"w": jnp.asarray(rng.normal(size=(num, 4)), jnp.float32)} for n in "ab"}  # noqa: E731, E501
    start = simplex.star(make(2), make(1))
    loss_fn = lambda p, batch: (  # noqa: E731
        jnp.sum(p["a"]["w"] ** 2) + jnp.sum(p["b"]["w"] ** 2) + 0 * jnp.sum(batch)
    )
    options = {"key": KEY, "volume_weight": 0.3, "layerwise": True, "progress": False}
    found = simplex.fit(loss_fn, start, jnp.zeros(1), optax.sgd(0.05), 100, **options)
    for before, after in zip(*map(jax.tree.leaves, (start, found.complex)), strict=True):
        assert np.array_equal(before[:2], after[:2])
    assert found.history["data_loss"][-20:].mean() < found.history["data_loss"][:20].mean()
    assert np.isfinite(found.history["log_volume"]).all()


@pytest.mark.parametrize("place", ["data", "vertices"])
def test_sharded_data_and_sharded_vertices_train_as_on_one_device(mesh, place):
    rng = np.random.default_rng(3)
    vertices = {n: {"w": jnp.asarray(rng.normal(size=(3, 4, 4)), jnp.float32)} for n in "ab"}
    data = rng.normal(size=(32, 4)).astype(np.float32)
    options = {"key": KEY, "num_samples": 2, "layerwise": True, "progress": False}
    alone = simplex.fit(layered, simplex.single(vertices), data, optax.sgd(0.1), 5, **options)
    with jax.set_mesh(mesh):
        start = vertices
        if place == "vertices":
            spec = NamedSharding(mesh, PartitionSpec(None, None, "model"))
            start = jax.device_put(vertices, spec)
        else:
            options["mesh"] = mesh
            data = [jax.device_put(data, NamedSharding(mesh, PartitionSpec("data", None)))]
        found = simplex.fit(layered, simplex.single(start), data, optax.sgd(0.1), 5, **options)
    for x, y in zip(*map(jax.tree.leaves, (alone.complex, found.complex)), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=2e-6)


def layered(params, batch):
    hidden = jnp.tanh(batch @ params["a"]["w"])
    return jnp.mean(jnp.square(hidden @ params["b"]["w"] - 1))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: simplex.layer_numbers({"a": 1.0, "b": 2.0}), "all of one layer"),
        (lambda: simplex.layer_numbers(UNITS, "kernel"), "expected True, or a function"),
        (lambda: simplex.sample_layer_weights(KEY, two_triangles(), -1), "at least 0"),
        (lambda: tree.combine_leaves(UNITS, {"a": jnp.ones(4)}), "have the structure"),
        (
            lambda: tree.combine_leaves(UNITS, jax.tree.map(lambda _: jnp.ones(3), UNITS)),
            r"weights\['a'\]\['bias'\] has shape \(3,\)",
        ),
        (
            lambda: simplex.fit(
                lambda p, b: jnp.sum(p["a"]), simplex.single({"a": jnp.eye(2)}), jnp.zeros(1),
                optax.sgd(0.1), 1, key=KEY, layerwise=True,
            ),
            "all of one layer",
        ),
    ],
)  # fmt: skip
def test_bad_input_says_what_was_expected(call, says):
    with pytest.raises(ValueError, match=says):
        call()
