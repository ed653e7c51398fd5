"""Posteriors against Gaussians in closed form; priors against what they should be uniform in."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import integrate

from geojax import batches, curves, simplex

KEY = jax.random.key(0)
# A likelihood N(z; MEAN, NOISE) with the prior N(0, 1) has this posterior.
MEAN, NOISE = np.array([1.0, -0.5]), np.array([[0.5, 0.2], [0.2, 0.8]])
COVARIANCE = np.linalg.inv(np.eye(2) + np.linalg.inv(NOISE))
CENTER = COVARIANCE @ np.linalg.solve(NOISE, MEAN)
PRECISION = np.linalg.inv(NOISE)


def gaussian(z):
    return -0.5 * (z - MEAN) @ PRECISION @ (z - MEAN)


def agree(samples, rtol=0.05):
    np.testing.assert_allclose(samples.mean(0), CENTER, atol=rtol * np.abs(CENTER).max())
    np.testing.assert_allclose(np.cov(samples.T), COVARIANCE, atol=rtol * COVARIANCE.max())


def test_elliptical_slices_have_the_mean_and_covariance_of_a_gaussian_posterior():
    state = simplex.elliptical_init(gaussian, np.zeros(2))
    rows = []
    for key in jax.random.split(KEY, 12_000):
        state = simplex.elliptical_step(gaussian, key, state)
        rows.append(state.position)
    rows = np.stack(rows[100:])
    assert (simplex.effective_sizes(rows) > 2000).all()
    agree(rows)
    assert abs(CENTER).min() > 0.2


# The data have mean 0, so that the mean loss is that of the Gaussian up to a constant.
NOISY = np.random.default_rng(0).normal(size=(30, 2))
DATA = (NOISY - NOISY.mean(0)).astype(np.float32)
ORIGIN = {"w": jnp.array([10.0, 20.0, 30.0])}
DIRECTIONS = {"w": jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])}
PLANE = simplex.affine_subspace(ORIGIN, DIRECTIONS)


def loss(params, batch):
    """N times it is minus the Gaussian's logarithm: 30 examples, at temperature 1."""
    z = (params["w"] - ORIGIN["w"])[jnp.array([0, 2])] / jnp.array([2.0, 3.0])
    away = z[None] - jnp.asarray(MEAN, jnp.float32)[None] - batch
    inner = jnp.einsum("bi,ij,bj->b", away, jnp.asarray(PRECISION, jnp.float32), away)
    return 0.5 * jnp.mean(inner) / 30


@pytest.fixture(scope="module")
def drawn():
    return simplex.sample_posterior(loss, PLANE, DATA, 1500, key=KEY, num_warmup=20)


def test_the_front_door_draws_that_posterior_of_a_plane(drawn):
    error = np.sqrt(np.diag(COVARIANCE) / drawn.effective_sizes)
    assert (np.abs(drawn.coordinates.mean(0) - CENTER) < 4 * error).all()
    np.testing.assert_allclose(np.cov(drawn.coordinates.T), COVARIANCE, atol=0.15)
    np.testing.assert_allclose(drawn.weights[:, 1:], drawn.coordinates, rtol=1e-6)
    assert (drawn.weights[:, 0] == 1).all()
    assert drawn.num_evaluations > 1520
    gaps = drawn.log_likelihoods - np.array([gaussian(z) for z in drawn.coordinates])
    np.testing.assert_allclose(gaps, gaps[0], atol=1e-3)


def test_the_same_key_gives_the_same_draws_however_the_data_are_cut(drawn):
    short = simplex.sample_posterior(loss, PLANE, DATA, 20, key=KEY, num_warmup=20)
    np.testing.assert_array_equal(short.coordinates, drawn.coordinates[:20])
    cut = simplex.sample_posterior(loss, PLANE, batches.split(DATA, 7), 20, key=KEY, num_warmup=20)
    np.testing.assert_allclose(cut.coordinates, short.coordinates, atol=1e-3)


def test_the_temperature_and_the_number_of_data_scale_the_likelihood(drawn):
    one = simplex.sample_posterior(loss, PLANE, DATA, 3, key=KEY, num_warmup=0, temperature=4.0)
    other = simplex.sample_posterior(loss, PLANE, DATA, 3, key=KEY, num_warmup=0, num_data=7.5)
    np.testing.assert_array_equal(one.coordinates, other.coordinates)
    hot = simplex.sample_posterior(loss, PLANE, DATA, 400, key=KEY, temperature=1e6)
    # At infinite temperature the prior is left.
    assert (np.abs(hot.coordinates.mean(0)) < 4 / np.sqrt(400)).all()
    np.testing.assert_allclose(np.cov(hot.coordinates.T), np.eye(2), atol=0.3)


def normals(num, d):
    return np.random.default_rng(1).normal(size=(num, d)).astype(np.float32)


def test_the_prior_of_a_simplex_is_uniform_over_it():
    n = 4
    space = simplex.simplex_subspace(simplex.single({"w": jnp.eye(n)}))
    assert space.num_coordinates == 3
    assert space.smooth
    weights = np.asarray(jax.vmap(space.weights_fn)(normals(40_000, 3)), np.float64)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.mean(0), 1 / n, atol=0.005)
    want = (np.eye(n) * n - 1) / (n**2 * (n + 1))
    np.testing.assert_allclose(np.cov(weights.T), want, atol=0.05 * want.max())
    far = space.weights_fn(jnp.array([30.0, -30.0, 9.0]))
    assert np.isfinite(far).all()
    slopes = jax.jacobian(space.weights_fn)(jnp.array([1.0, -6.0, 7.0]))
    assert np.isfinite(slopes).all()


def test_the_prior_of_a_complex_is_uniform_by_volume():
    vertices = {"w": jnp.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, -1.0 / 3.0]])}
    two = simplex.SimplicialComplex(vertices, [(0, 1, 2), (0, 1, 3)])
    space = simplex.simplex_subspace(two)
    assert space.num_coordinates == 3
    assert not space.smooth
    weights = np.asarray(jax.vmap(space.weights_fn)(normals(20_000, 3)))
    first = weights[:, 2] > 0
    assert (first ^ (weights[:, 3] > 0)).all()
    assert abs(first.mean() - 0.9) < 0.01
    mixed = simplex.SimplicialComplex(vertices, [(0, 1, 2), (0, 3)])
    weights = np.asarray(
        jax.vmap(simplex.simplex_subspace(mixed, [1, 3]).weights_fn)(normals(20_000, 3))
    )
    edge = weights[:, 3] > 0
    assert abs(edge.mean() - 0.75) < 0.015
    np.testing.assert_allclose(weights[edge].mean(0), [0.5, 0, 0, 0.5], atol=0.01)


def test_the_prior_of_a_curve_accounts_for_its_speed():
    chain = {"w": jnp.array([[0.0, 0.0], [1.0, 0.0], [1.0, 3.0]])}
    space = simplex.curve_subspace(curves.polychain(3), chain)
    weights = np.asarray(jax.vmap(space.weights_fn)(normals(40_000, 1)))
    first = weights[:, 0] > 0
    assert abs(first.mean() - 0.25) < 0.01  # half of the t, a quarter of the length
    # Within a segment the prior is uniform.
    levels = [0.25, 0.5, 0.75]
    np.testing.assert_allclose(np.quantile(weights[first, 0], levels), levels, atol=0.02)
    flat = simplex.sample_posterior(
        lambda p, b: 0 * jnp.sum(p["w"]) + 0 * jnp.mean(b), space, DATA, 1500, key=KEY
    )
    share = (flat.weights[:, 0] > 0).mean()
    assert abs(share - 0.25) < 4 * np.sqrt(0.1875 / flat.effective_sizes[0])


def test_a_posterior_on_a_bent_curve_weighs_by_length_and_likelihood():
    bend, basis = {"w": jnp.array([[0.0, 0.0], [0.2, 0.0], [3.0, 1.0]])}, curves.bezier(3)
    space = simplex.curve_subspace(basis, bend)

    def slope(params, batch):
        return 0.1 * jnp.sum(params["w"] * jnp.array([1.0, 0.0])) + 0 * jnp.mean(batch)

    found = simplex.sample_posterior(slope, space, DATA, 1500, key=KEY)
    x = (found.weights @ np.asarray(bend["w"]))[:, 0]

    def density(t):
        speed = np.hypot(0.4 * (1 - t) + 2 * t * 2.8, 2 * t)
        at = 0.4 * t * (1 - t) + 3 * t * t
        return speed * np.exp(-3 * at), at

    mass = integrate.quad(lambda t: density(t)[0], 0, 1)[0]
    mean = integrate.quad(lambda t: np.prod(density(t)), 0, 1)[0] / mass
    square = integrate.quad(lambda t: density(t)[0] * density(t)[1] ** 2, 0, 1)[0] / mass
    error = np.sqrt((square - mean**2) / simplex.effective_sizes(x[:, None])[0])
    assert abs(x.mean() - mean) < 4 * error
    in_t = integrate.quad(lambda t: np.exp(-3 * density(t)[1]), 0, 1)[0]
    wrong = integrate.quad(lambda t: np.exp(-3 * density(t)[1]) * density(t)[1], 0, 1)[0] / in_t
    assert abs(wrong - mean) > 5 * error  # without the speed it would be seen


def test_effective_sizes_are_those_of_an_autoregressive_chain(rng):
    noise = rng.normal(size=(40_000, 2))
    noise[:, 0] *= 1.0
    chain = np.zeros_like(noise)
    for i in range(1, len(noise)):
        chain[i] = [0.0, 0.8] * chain[i - 1] + noise[i]
    found = simplex.effective_sizes(chain)
    # For x' = a x + noise it is n (1 - a) / (1 + a).
    np.testing.assert_allclose(found, [40_000, 40_000 / 9], rtol=0.1)
    assert np.isnan(simplex.effective_sizes(np.ones((10, 1)))).all()


def test_sharded_data_and_parameters_give_the_same(mesh):
    want = simplex.sample_posterior(quadratic, _space(None), DATA[:28], 8, key=KEY, num_warmup=2)
    with jax.set_mesh(mesh):
        found = simplex.sample_posterior(
            quadratic, _space(mesh), DATA[:28], 8, key=KEY, num_warmup=2, mesh=mesh
        )
    np.testing.assert_allclose(found.weights, want.weights, atol=1e-4)


def quadratic(params, batch):
    return jnp.sum(jnp.square(params["w"])) / 28 + 0 * jnp.mean(batch)


def _space(mesh):
    vertices = {"w": jnp.asarray(np.random.default_rng(2).normal(size=(3, 4)), jnp.float32)}
    if mesh is not None:
        vertices = jax.device_put(vertices, NamedSharding(mesh, P(None, "model")))
    return simplex.simplex_subspace(simplex.single(vertices))


def test_what_cannot_be_sampled_is_refused(monkeypatch):
    for options, words in [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"sampler": "gibbs"}, "'elliptical' or 'nuts'"),
        ({"start": [1.0]}, r"expected \(2,\)"),
        ({"sampler": "nuts", "state_fn": lambda p: p}, "use 'elliptical'"),
        ({"start": [np.nan, 0.0]}, "log-likelihood is nan"),
    ]:
        with pytest.raises(ValueError, match=words):
            simplex.sample_posterior(loss, PLANE, DATA, **{"num_samples": 2, "key": KEY, **options})
    with pytest.raises(ValueError, match="one point is no subspace"):
        simplex.simplex_subspace(simplex.single({"w": jnp.ones((1, 2))}))
    with pytest.raises(ValueError, match="has no length"):
        simplex.curve_subspace(curves.bezier(2), {"w": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match="gives 3 coefficients"):
        simplex.curve_subspace(curves.bezier(3), {"w": jnp.eye(2)})
    monkeypatch.setitem(sys.modules, "blackjax", None)
    with pytest.raises(ImportError, match="pip install blackjax"):
        simplex.sample_posterior(loss, PLANE, DATA, 2, key=KEY, sampler="nuts")


def test_nuts_draws_the_same_posterior():
    pytest.importorskip("blackjax")
    found = simplex.sample_posterior(
        loss, PLANE, batches.split(DATA, 16), 6000, key=KEY, num_warmup=500, sampler="nuts"
    )
    agree(found.coordinates)
    assert found.num_divergent == 0
    gaps = found.log_likelihoods - np.array([gaussian(z) for z in found.coordinates])
    np.testing.assert_allclose(gaps, gaps[0], atol=1e-3)
