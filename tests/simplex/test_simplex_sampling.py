"""Draws from complexes are uniform where they say so, and the same everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import stats

from geojax import simplex, tree

KEY = jax.random.key(0)
TWO = simplex.SimplicialComplex(  # areas 4.5 and 0.5, which share an edge
    {"w": jnp.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, -1.0 / 3.0]])},
    [(0, 1, 2), (0, 1, 3)],
)


def test_coefficients_have_the_moments_of_the_flat_dirichlet():
    n = 3
    drawn = np.asarray(simplex.dirichlet(KEY, 100_000, n), np.float64)
    np.testing.assert_allclose(drawn.mean(0), 1 / n, atol=0.01)
    covariance = np.cov(drawn.T)
    off = covariance[~np.eye(n, dtype=bool)]
    np.testing.assert_allclose(off, -1 / (n**2 * (n + 1)), rtol=0.05)
    np.testing.assert_allclose(drawn.sum(1), 1, atol=1e-6)
    assert (drawn >= 0).all()


def cell(c, parts=4):
    """Which of the parts^2 triangles of equal area a barycentric triple lies in."""
    scaled = np.asarray(c, np.float64)[:, :2] * parts
    whole = np.minimum(scaled.astype(int), parts - 1)
    upper = (scaled - whole).sum(1) > 1
    return whole[:, 0] * 100 + whole[:, 1] * 2 + upper


def test_equal_areas_get_equal_numbers_of_points_whatever_the_shape():
    counts = np.unique(cell(simplex.dirichlet(KEY, 100_000, 3)), return_counts=True)[1]
    assert len(counts) == 16
    assert stats.chisquare(counts).pvalue > 1e-3
    # Another shape of the simplex has the same coefficients.
    stretched = tree.combine(TWO.vertices, jnp.diag(jnp.array([1.0, 100.0, 1.0, 1.0])))
    one, other = (
        simplex.sample_weights(KEY, simplex.SimplicialComplex(x, [(0, 1, 2)]), 1000)
        for x in (TWO.vertices, stretched)
    )
    assert (one[:, 3] == 0).all()
    np.testing.assert_array_equal(one, other)


def test_points_are_uniform_over_the_union_by_volume():
    drawn = simplex.sample_with_simplices(KEY, TWO, 100_000)
    share = np.asarray(drawn.simplices == 0).mean()
    assert abs(share - 0.9) < 0.01
    uniform = simplex.sample_with_simplices(KEY, TWO, 100_000, choose="uniform")
    assert abs(np.asarray(uniform.simplices == 0).mean() - 0.5) < 0.01
    mine = simplex.sample_with_simplices(KEY, TWO, 100_000, choose=[1, 3])
    assert abs(np.asarray(mine.simplices == 0).mean() - 0.25) < 0.01


def test_nothing_lies_outside_the_simplex_that_was_drawn():
    weights, chosen = simplex.sample_with_simplices(KEY, TWO, 500)
    for row, s in zip(np.asarray(weights), np.asarray(chosen), strict=True):
        outside = [i for i in range(4) if i not in TWO.simplices[s]]
        assert (row[outside] == 0).all()
        assert (np.delete(row, outside) > 0).all()
    np.testing.assert_allclose(np.asarray(weights).sum(1), 1, atol=1e-6)
    only = simplex.sample_with_simplices(KEY, TWO, 500, choose=[0, 1])
    assert (only.simplices == 1).all()


def test_stratified_draws_share_the_simplices_out_to_within_one():
    for num in (7, 100):
        for seed in range(5):
            drawn = simplex.sample_with_simplices(
                jax.random.key(seed), TWO, num, choose=[0.3, 0.7], stratified=True
            )
            first = int((drawn.simplices == 0).sum())
            assert abs(first - 0.3 * num) < 1
    mean = np.mean([
        int((simplex.sample_with_simplices(
            jax.random.key(s), TWO, 3, choose=[0.3, 0.7], stratified=True).simplices == 0).sum())
        for s in range(400)
    ])  # fmt: skip
    assert abs(mean - 0.9) < 5 * 0.5 / np.sqrt(400)


def test_mixed_dimensions_need_probabilities():
    mixed = simplex.SimplicialComplex(TWO.vertices, [(0, 1, 2), (0, 3)])
    with pytest.raises(ValueError, match="lengths are no areas"):
        simplex.sample_weights(KEY, mixed, 10)
    given = simplex.sample_with_simplices(KEY, mixed, 10_000, choose=[0.2, 0.8])
    assert abs(np.asarray(given.simplices == 1).mean() - 0.8) < 0.02
    assert simplex.sample_weights(KEY, mixed, 10, choose="uniform").shape == (10, 4)
    points = simplex.SimplicialComplex(TWO.vertices, [(0,), (3,)])
    assert simplex.probabilities(points).tolist() == [0.5, 0.5]


def test_choices_that_cannot_be_are_refused():
    for choose, words in [
        ("area", "expected 'volume'"),
        ([1, 2, 3], r"expected \(2,\)"),
        ([1, -1], "nonnegative"),
        ([0, 0], "not all zero"),
        ([1, np.nan], "nonnegative"),
    ]:
        with pytest.raises(ValueError, match=words):
            simplex.sample_weights(KEY, TWO, 3, choose=choose)
    with pytest.raises(ValueError, match="num_samples is -1"):
        simplex.sample_weights(KEY, TWO, -1)
    flat = simplex.SimplicialComplex({"w": jnp.zeros((4, 2))}, TWO.simplices)
    with pytest.raises(ValueError, match="every simplex has volume 0"):
        simplex.sample_weights(KEY, flat, 3)
    broken = simplex.SimplicialComplex(
        {"w": TWO.vertices["w"].at[3, 0].set(jnp.nan)}, TWO.simplices
    )
    with pytest.raises(ValueError, match="a vertex holds NaN"):
        simplex.sample_weights(KEY, broken, 3)
    # Within a trace nothing can be raised, and no point is made up.
    drawn = jax.jit(lambda c: simplex.sample_weights(KEY, c, 3))(flat)
    assert np.isnan(drawn).all()


def test_coefficients_are_finite_where_the_uniform_draw_is_zero(monkeypatch):
    def zeros(key, shape=(), dtype=float, minval=0.0, maxval=1.0):
        return jnp.full(shape, minval, jnp.float32)

    monkeypatch.setattr(jax.random, "uniform", zeros)
    jax.clear_caches()
    drawn = simplex.dirichlet(KEY, 2, 3)
    jax.clear_caches()
    np.testing.assert_allclose(drawn, 1 / 3, rtol=1e-6)
    monkeypatch.undo()
    many = np.asarray(simplex.dirichlet(KEY, 2_000_000, 1))
    assert (many == 1).all()


def test_jit_and_devices_do_not_change_a_draw(mesh):
    plain = simplex.sample_with_simplices(KEY, TWO, 300)
    jitted = jax.jit(lambda key, c: simplex.sample_with_simplices(key, c, 300))(KEY, TWO)
    sharding = NamedSharding(mesh, P(None, "model"))
    there = simplex.SimplicialComplex(jax.device_put(TWO.vertices, sharding), TWO.simplices)
    with jax.set_mesh(mesh):
        onmesh = simplex.sample_with_simplices(KEY, there, 300)
        traced = jax.jit(lambda key, c: simplex.sample_with_simplices(key, c, 300))(KEY, there)
    for other in (jitted, onmesh, traced):
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    coefficients = jax.jit(simplex.dirichlet, static_argnums=(1, 2))(KEY, 50, 4)
    np.testing.assert_array_equal(coefficients, simplex.dirichlet(KEY, 50, 4))
