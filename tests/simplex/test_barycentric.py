"""Weights are found again, and nearest points against scipy's optimiser and the optimality test."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import optimize

from geojax import simplex

EPS = float(np.finfo(np.float32).eps)


def stacked(points):
    points = np.asarray(points, np.float32)
    return {"w": jnp.asarray(points[:, :-1]), "b": jnp.asarray(points[:, -1])}


def one(point):
    point = np.asarray(point, np.float32)
    return {"w": jnp.asarray(point[:-1]), "b": jnp.asarray(point[-1])}


@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_the_weights_of_a_combination_are_found_again(rng, scale):
    corners = (scale * rng.normal(size=(8, 5000)) + rng.normal(size=5000)).astype(np.float32)
    weights = rng.dirichlet(np.ones(8))
    found = simplex.project(stacked(corners), one(weights @ corners.astype(np.float64)))
    np.testing.assert_allclose(found.weights, weights, atol=1e-6 if scale == 1 else 1e-4)
    assert found.inside
    assert found.distance < found.resolution
    assert simplex.contains(stacked(corners), one(weights @ corners.astype(np.float64)))


def test_a_thin_simplex_gives_the_weights_back(rng):
    corners = rng.normal(size=(4, 5000)).astype(np.float32)
    corners[3] = corners[:3].mean(0) + 1e-2 * rng.normal(size=5000)
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    found = simplex.project(stacked(corners), one(weights @ corners.astype(np.float64)))
    np.testing.assert_allclose(found.weights, weights, atol=1e-4)


def test_a_point_off_the_hull_has_its_distance_and_its_foot(rng):
    corners = rng.normal(size=(4, 30))
    point = 3 * rng.normal(size=30)
    found = simplex.project(stacked(corners), one(point))
    edges = (corners[1:] - corners[0]).T
    c, rest, *_ = np.linalg.lstsq(edges, point - corners[0], rcond=None)
    np.testing.assert_allclose(found.weights, [1 - c.sum(), *c], atol=1e-5)
    np.testing.assert_allclose(found.distance, math.sqrt(rest[0]), rtol=1e-5)
    assert found.inside == (min(1 - c.sum(), *c) >= 0)
    outside = simplex.project(stacked(corners), one(2 * corners[0] - corners[1]))
    np.testing.assert_allclose(outside.weights, [2, -1, 0, 0], atol=1e-5)
    assert not outside.inside
    assert not simplex.contains(stacked(corners), one(2 * corners[0] - corners[1]))


def by_optimizer(corners, point):
    found = optimize.minimize(
        lambda c: np.sum((c @ corners - point) ** 2),
        np.full(len(corners), 1 / len(corners)),
        jac=lambda c: 2 * corners @ (c @ corners - point),
        bounds=[(0, 1)] * len(corners),
        constraints={"type": "eq", "fun": lambda c: c.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.x, math.sqrt(found.fun)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_nearest_point_is_the_optimizers(n, rng):
    for _ in range(5):
        corners = rng.normal(size=(n, 10)).astype(np.float32).astype(np.float64)
        point = 1.5 * rng.normal(size=10).astype(np.float32).astype(np.float64)
        found = simplex.nearest(stacked(corners), one(point))
        weights, distance = by_optimizer(corners, point)
        np.testing.assert_allclose(found.distance, distance, rtol=1e-5)
        np.testing.assert_allclose(found.weights, weights, atol=1e-4)
        assert (found.weights >= 0).all()
        assert abs(found.weights.sum() - 1) < 1e-12
        # No direction within the simplex leads nearer.
        here = found.weights @ corners - point
        assert (corners @ here >= (found.weights @ corners) @ here - 1e-4).all()


def test_flat_simplices_have_nearest_points_but_no_unique_weights():
    inline = stacked([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="affinely dependent"):
        simplex.project(inline, one([1.0, 1.0, 0.0]))
    found = simplex.nearest(inline, one([1.5, 1.0, 0.0]))
    np.testing.assert_allclose(found.weights @ [0, 2, 1], 1.5, atol=1e-5)
    np.testing.assert_allclose(found.distance, 1, rtol=1e-5)
    assert simplex.contains(inline, one([0.5, 0.0, 0.0]))
    assert not simplex.contains(inline, one([2.5, 0.0, 0.0]))
    same = simplex.nearest(stacked(np.ones((3, 4))), one(np.ones(4)))
    assert same.distance == 0


def test_points_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"leaf \['w'\] has shape"):
        simplex.project(stacked(np.eye(4)), one(np.ones(5)))


def test_one_vertex_is_its_own_projection():
    found = simplex.project(stacked(np.zeros((1, 4))), one(np.ones(4)))
    assert found.weights.tolist() == [1.0]
    np.testing.assert_allclose(found.distance, 2, rtol=1e-6)


def test_sharded_vertices_give_the_same_weights(mesh, rng):
    corners, point = rng.normal(size=(3, 17)), rng.normal(size=17)
    want = simplex.project(stacked(corners), one(point))
    there = stacked(corners), one(point)
    for tree, spec in zip(there, (P(None, "data"), P("data")), strict=True):
        tree["w"] = jax.device_put(tree["w"], NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        found = simplex.project(*there)
    np.testing.assert_allclose(found.weights, want.weights, atol=1e-5)
    np.testing.assert_allclose(found.distance, want.distance, rtol=1e-5)


@pytest.mark.parametrize(("n", "resolution"), [(1, 3), (2, 4), (3, 5), (4, 3)])
def test_a_grid_holds_each_lattice_point_once(n, resolution):
    found = simplex.grid(n, resolution)
    assert len(found) == math.comb(resolution + n - 1, n - 1)
    assert len(np.unique(found, axis=0)) == len(found)
    np.testing.assert_allclose(found.sum(1), 1, atol=n * EPS)
    np.testing.assert_allclose(found * resolution, np.round(found * resolution), atol=1e-5)
    with pytest.raises(ValueError, match="at most a million"):
        simplex.grid(12, 30)


def test_the_nearest_weights_are_the_nearest(rng):
    for _ in range(20):
        values = rng.normal(size=5)
        found = simplex.nearest_weights(values)
        np.testing.assert_allclose(found, by_optimizer(np.eye(5), values)[0], atol=1e-5)
