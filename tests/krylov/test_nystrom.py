"""Randomised Nystrom: few passes, values from below, and an error bound that keeps its promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import krylov
from geojax.krylov.nystrom import _least_ratio, nystrom

EPS = float(np.finfo(np.float32).eps)
KEY = jax.random.key(0)
N = 100


def matrix(values, seed=0):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    a = (q * np.asarray(values, np.float64)) @ q.T
    return (a + a.T) / 2


def operator(a, dtype=np.float32, psd=True):
    return krylov.from_matrix(np.asarray(a, dtype), psd=psd)


POWERS = {
    "halving": 0.5 ** np.arange(N),
    "cubes": (1.0 + np.arange(N)) ** -3,
    "cluster": np.concatenate([[5.0] * 5, 0.5 ** np.arange(N - 5)]),
}


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("spectrum", POWERS)
def test_two_passes_give_ten_values_to_a_thousandth(spectrum, x64):
    values = POWERS[spectrum]
    a = matrix(values)
    with jax.enable_x64(x64):
        dtype = np.float64 if x64 else np.float32
        result = nystrom(operator(a, dtype), 10, key=KEY)
        x = np.asarray(result.pairs.eigenvectors, np.float64)
    pairs = result.pairs
    np.testing.assert_allclose(pairs.eigenvalues, values[:10], rtol=1e-3)
    np.testing.assert_allclose(x @ x.T, np.eye(10), atol=64 * EPS)
    assert result.num_passes == 2
    assert pairs.num_matvecs == 2 * 30
    true = np.linalg.norm(x @ a - pairs.eigenvalues[:, None] * x, axis=1)
    assert (true <= pairs.residuals + 32 * EPS * values[0]).all()
    assert (pairs.intervals[:, 0] <= values[:10]).all()
    assert (values[:10] <= pairs.intervals[:, 1] + 32 * EPS * values[0]).all()
    np.testing.assert_allclose(result.norm, np.linalg.norm(values), rtol=1)


def test_one_pass_serves_a_spectrum_that_falls_fast_and_more_passes_one_that_does_not():
    values = POWERS["halving"]
    one = nystrom(operator(matrix(values)), 5, key=KEY, passes=1)
    np.testing.assert_allclose(one.pairs.eigenvalues, values[:5], rtol=1e-3)
    assert one.num_passes == 1
    slow = np.exp(-np.arange(N) / 10)
    errors = [
        np.abs(
            nystrom(operator(matrix(slow)), 5, key=KEY, passes=p).pairs.eigenvalues / slow[:5] - 1
        ).max()
        for p in (1, 2, 3)
    ]
    assert errors[0] > 10 * errors[1] > 30 * errors[2]


def test_a_verified_pair_carries_its_own_residual():
    slow = np.exp(-np.arange(N) / 10)
    a = matrix(slow)
    bound = nystrom(operator(a), 5, key=KEY, passes=3)
    result = nystrom(operator(a), 5, key=KEY, passes=3, verify=True)
    x = np.asarray(result.pairs.eigenvectors, np.float64)
    true = np.linalg.norm(x @ a - result.pairs.eigenvalues[:, None] * x, axis=1)
    np.testing.assert_allclose(result.pairs.residuals, true, rtol=1e-2, atol=16 * EPS)
    assert result.num_passes == 4
    assert result.pairs.verified
    assert result.pairs.converged.all()
    assert not bound.pairs.verified
    assert not bound.pairs.converged.any()
    assert "verify=True" in bound.pairs.reasons[0]
    np.testing.assert_array_equal(bound.pairs.eigenvalues, result.pairs.eigenvalues)


def test_the_error_bound_fails_no_more_often_than_it_says():
    # Few probes and a large failure probability, so that failures are there to be counted.
    # An error of rank one makes estimates vary most.
    q, failure, runs = 4, 0.3, 60
    a = matrix(np.concatenate([[10.0, 5.0, 1.0], np.zeros(N - 3)]))
    estimates, failures, truths = [], 0, []
    for seed in range(runs):
        result = nystrom(
            operator(a),
            2,
            key=jax.random.key(seed),
            oversampling=0,
            passes=3,
            num_probes=q,
            failure_probability=failure,
        )
        x = np.asarray(result.pairs.eigenvectors, np.float64)
        true = np.linalg.norm(a - (x.T * result.pairs.eigenvalues) @ x)
        truths.append(true)
        estimates.append(result.error)
        failures += true > result.error_bound
    # The estimate is unbiased for the square; its standard deviation is known.
    ratio = np.mean(np.square(estimates) / np.square(truths))
    assert abs(ratio - 1) < 4 * np.sqrt(2 / q / runs)
    assert 0 < failures <= runs * failure + 3 * np.sqrt(runs * failure * (1 - failure))


@pytest.mark.parametrize(("q", "failure"), [(1, 0.1), (10, 0.01), (50, 1e-6)])
def test_the_bound_solves_its_equation_and_covers_the_worst_error(q, failure):
    from scipy.stats import chi2

    epsilon = _least_ratio(q, failure)
    np.testing.assert_allclose((np.exp(epsilon) * (1 - epsilon)) ** (q / 2), failure, rtol=1e-6)
    # For an error of rank one the squared estimate is chi-squared with q degrees of freedom.
    assert chi2.cdf((1 - epsilon) * q, q) <= failure


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    ("values", "k"),
    [
        (np.concatenate([[2, 1], np.zeros(N - 2)]), 5),
        (np.zeros(N), 2),
        (np.ones(6), 6),
        ([2.0], 1),
    ],
    ids=["rank 2", "zero", "k = n", "n = 1"],
)
def test_awkward_spectra(values, k, passes):
    result = nystrom(operator(matrix(values)), k, key=KEY, passes=passes)
    np.testing.assert_allclose(result.pairs.eigenvalues, np.asarray(values)[:k], atol=3e-5)
    x = np.asarray(result.pairs.eigenvectors, np.float64)
    np.testing.assert_allclose(x @ x.T, np.eye(k), atol=64 * EPS)
    assert result.error <= result.error_bound < 1e-3
    if passes == 2:
        assert result.pairs.converged.all()


@pytest.mark.parametrize("spectrum", ["halving", "cluster"])
def test_scaling_the_operator_scales_the_result_and_nothing_else(spectrum):
    a = matrix(POWERS[spectrum])
    one = nystrom(operator(a), 10, key=KEY)
    tiny = nystrom(operator(1e-14 * a), 10, key=KEY)
    top = POWERS[spectrum][0]
    np.testing.assert_allclose(
        1e14 * tiny.pairs.eigenvalues, one.pairs.eigenvalues, atol=64 * EPS * top
    )
    np.testing.assert_allclose(1e14 * tiny.error, one.error, rtol=0.3)


def test_an_operator_that_is_not_semidefinite_is_refused_unless_forced():
    values = np.concatenate([[5, -4, 3], 0.1 * 0.5 ** np.arange(N - 3)])
    a = matrix(values)
    with pytest.raises(ValueError, match="not known to be positive semidefinite.*force=True"):
        nystrom(operator(a, psd=False), 3, key=KEY)
    for passes in (1, 2):
        with pytest.raises(ValueError, match="is not positive semidefinite: a Rayleigh quotient"):
            nystrom(operator(a), 3, key=KEY, passes=passes)
    result = nystrom(operator(a, psd=False), 3, key=KEY, force=True)
    np.testing.assert_allclose(result.pairs.eigenvalues, [5, -4, 3], rtol=1e-4)
    assert (result.pairs.intervals[:, 0] <= [5, -4, 3]).all()
    assert (result.pairs.intervals[:, 1] >= [5, -4, 3]).all()


def test_all_products_are_blocks_of_one_width():
    a = jnp.asarray(matrix(POWERS["halving"]), jnp.float32)
    shapes = []

    @jax.jit
    def products(vs):
        shapes.append(vs.shape)
        return vs @ a

    counted = krylov.Operator(
        lambda v: products(v[None])[0], jax.ShapeDtypeStruct((N,), np.float32), matmat=products,
        psd=True,
    )  # fmt: skip
    nystrom(counted, 10, key=KEY, passes=3)
    assert shapes == [(30, N)]


def test_sharded_vectors_keep_their_structure_their_sharding_and_their_numbers(mesh):
    scales = {
        "b": np.linspace(0.1, 0.2, 8, dtype=np.float32) ** 2,
        "w": np.linspace(0, 2, 32, dtype=np.float32).reshape(8, 4) ** 4,
    }
    spec = {"b": P("model"), "w": P("data", "model")}
    put = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), scales, spec)
    product = jax.jit(lambda d, v: jax.tree.map(jnp.multiply, d, v))
    with jax.set_mesh(mesh):
        a = krylov.Operator(lambda v: product(put, v), put, psd=True)
        result = nystrom(a, 2, key=KEY, passes=3, oversampling=8, num_probes=6)
    want = NamedSharding(mesh, P(None, "data", "model"))
    assert result.pairs.eigenvectors["w"].sharding.is_equivalent_to(want, 3)
    assert result.pairs.eigenvectors["b"].shape == (2, 8)
    values = np.sort(np.concatenate([x.reshape(-1) for x in scales.values()]))[::-1]
    np.testing.assert_allclose(result.pairs.eigenvalues, values[:2], rtol=1e-3)


like = jax.ShapeDtypeStruct((N,), np.float32)
random = krylov.Operator(lambda v: v, like, stochastic=True, psd=True, name="minibatch")
skewed = krylov.Operator(lambda v: v, like, symmetric=False, name="skewed")
plain = krylov.Operator(lambda v: v, like, psd=True, name="plain")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: nystrom(random, 1, key=KEY), "minibatch gives another product"),
        (lambda: nystrom(skewed, 1, key=KEY), "skewed is not symmetric"),
        (lambda: nystrom(plain, 0, key=KEY), "k is 0"),
        (lambda: nystrom(plain, 1, key=KEY, oversampling=-1), "oversampling is -1"),
        (lambda: nystrom(plain, 1, key=KEY, passes=0), "passes is 0"),
        (lambda: nystrom(plain, 1, key=KEY, num_probes=0), "num_probes is 0"),
        (lambda: nystrom(plain, 1, key=KEY, tol=1.0), "tol is 1.0"),
        (lambda: nystrom(plain, 1, key=KEY, failure_probability=0.0), "failure_probability is 0"),
        (lambda: nystrom(plain, 1, key=KEY, passes=1, force=True), "at least 2 passes"),
    ],
)
def test_misuse_is_refused_with_what_was_expected(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_products_that_are_not_finite_are_refused():
    bad = krylov.Operator(lambda v: v * jnp.nan, like, psd=True, name="loss")
    with pytest.raises(FloatingPointError, match="one of products 1 to 21 with loss"):
        nystrom(bad, 1, key=KEY)
