"""The smallest eigenvalue and its certificate, eigenvalues next to a value, and MINRES."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import krylov
from geojax.krylov import eigsh_interior, minres, smallest_eigenvalue

EPS = float(np.finfo(np.float32).eps)
KEY = jax.random.key(0)
N = 100


def matrix(values, seed=0):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    a = (q * np.asarray(values, np.float64)) @ q.T
    return (a + a.T) / 2


def operator(a, dtype=np.float32, **options):
    return krylov.from_matrix(np.asarray(a, dtype), **options)


BULK = np.random.default_rng(1).normal(size=N - 4) ** 2
SADDLE = np.concatenate([[20, 15, 10, -0.5], BULK])


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-14])
def test_a_saddle_has_proven_negative_curvature(scale, x64):
    a = scale * matrix(SADDLE)
    with jax.enable_x64(x64):
        found = smallest_eigenvalue(
            operator(a, np.float64 if x64 else np.float32), key=KEY, basis_size=40
        )
        x = np.asarray(found.eigenvector, np.float64)
    low, high = found.interval
    assert low <= -0.5 * scale <= high < 0
    assert found.lower_bound <= -0.5 * scale
    assert -0.5 * scale <= found.upper_bound < 0
    assert found.negative
    assert "negative curvature: proven (the Rayleigh quotient is negative" in found.verdict
    assert found.converged
    np.testing.assert_allclose(found.eigenvalue, -0.5 * scale, rtol=1e-4)
    # The proof can be repeated by anyone who has the vector.
    assert x @ a @ x / (x @ x) < 0
    true = np.linalg.norm(a @ x - found.eigenvalue * x)
    np.testing.assert_allclose(found.residual, true, rtol=1e-2, atol=32 * EPS * 20 * scale)


def test_a_minimum_is_certified_with_a_probability_only():
    found = smallest_eigenvalue(operator(matrix(SADDLE + 1.0)), key=KEY, basis_size=40)
    assert not found.negative
    assert found.upper_bound >= 0.5
    assert 0 < found.lower_bound <= 0.5
    assert "with probability at least 0.999 over the starting vector" in found.verdict
    assert found.probability_below(found.lower_bound) <= 1e-3
    assert found.probability_below(found.eigenvalue) == 1
    chances = [found.probability_below(t) for t in (0.45, 0.3, 0.0, -1.0, -10.0)]
    assert chances == sorted(chances, reverse=True)
    assert chances[-1] < 1e-12


def test_negative_curvature_weaker_than_epsilon_is_not_waited_for():
    a = operator(matrix(SADDLE + 0.5))  # semidefinite: the relative residual takes long
    patient = smallest_eigenvalue(a, key=KEY, basis_size=40)
    quick = smallest_eigenvalue(a, key=KEY, basis_size=40, epsilon=0.5)
    assert quick.num_matvecs < patient.num_matvecs
    assert quick.lower_bound >= -0.5
    assert "the lower bound is above -epsilon" in quick.reason


def recurrence_of(values, start, m):
    """Lanczos in float64 with full reorthogonalization: the diagonal and the off-diagonal."""
    q, alpha, beta = [start / np.linalg.norm(start)], [], []
    for _ in range(m):
        w = values * q[-1]
        alpha.append(w @ q[-1])
        for _ in range(2):
            w = w - np.array(q).T @ (np.array(q) @ w)
        beta.append(np.linalg.norm(w))
        q.append(w / beta[-1])
    return np.array([alpha, beta])


@pytest.mark.parametrize(("m", "failure"), [(8, 0.3), (16, 0.1)])
def test_the_lower_bound_fails_no_more_often_than_it_says(m, failure):
    from geojax.krylov.smallest import _probable_bound

    values = np.concatenate([np.random.default_rng(2).uniform(0, 1, N - 1), [-0.05]])
    below, above = [], []
    for seed in range(300):
        start = np.random.default_rng(seed).normal(size=N)
        recurrence = recurrence_of(values, start, m)
        alpha, beta = recurrence
        ritz = np.linalg.eigvalsh(np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1))
        spread = ritz[-1] - ritz[0]
        below.append(_probable_bound(recurrence, ritz[0], spread, N, failure))
        # The bound that holds for every matrix, with the true spread.
        epsilon = (np.log(1.648 * np.sqrt(N) / failure) / (2 * m - 1)) ** 2
        above.append(ritz[0] - epsilon * np.ptp(values))
    failures = np.mean(np.array(below) > -0.05)
    assert failures <= failure + 3 * np.sqrt(failure * (1 - failure) / 300)
    assert (np.array(below) < 0).all()
    assert np.mean(below) > np.mean(above)


def test_the_recurrence_behind_the_bound_is_the_lanczos_recurrence():
    values = np.linspace(-1, 2, N)
    with jax.enable_x64(True):
        a = operator(np.diag(values), np.float64)
        found = smallest_eigenvalue(a, key=KEY, basis_size=12, max_matvecs=12)
        start = np.asarray(a.random(KEY))
    assert found.num_matvecs == 13
    np.testing.assert_allclose(found.recurrence, recurrence_of(values, start, 12), rtol=1e-9)


def test_a_full_basis_restarts_and_goes_on():
    a = operator(matrix(np.linspace(-1, 1, N)))
    short = smallest_eigenvalue(a, key=KEY, tol=1e-3, basis_size=10, max_matvecs=300)
    assert short.converged
    assert short.num_matvecs > 20
    assert short.recurrence.shape[1] == 10
    np.testing.assert_allclose(short.eigenvalue, -1, atol=1e-5)
    stopped = smallest_eigenvalue(a, key=KEY, tol=1e-3, basis_size=10, max_matvecs=15)
    assert not stopped.converged
    assert stopped.negative
    assert stopped.reason == "stopped at max_matvecs=15"
    assert stopped.interval[0] <= stopped.interval[1]


@pytest.mark.parametrize(
    ("values", "smallest"),
    [([2.0], 2), ([1, 1, 1, 1, 1], 1), (np.zeros(9), 0), (np.full(N, -1.0), -1)],
    ids=["n = 1", "identity", "zero", "one value"],
)
def test_small_and_degenerate_operators(values, smallest):
    found = smallest_eigenvalue(operator(np.diag(values)), key=KEY)
    np.testing.assert_allclose(found.eigenvalue, smallest, atol=8 * EPS)
    assert found.converged
    assert found.lower_bound <= smallest + 8 * EPS
    assert found.negative == (smallest < 0)
    assert np.isfinite(found.recurrence).all()


SPREAD = np.sort(np.random.default_rng(3).normal(size=N))


@pytest.mark.parametrize("method", ["chebyshev", "shift_invert"])
@pytest.mark.parametrize("sigma", [0.3, -1.2])
def test_the_five_nearest_equal_the_dense_ones(method, sigma):
    a = matrix(SPREAD)
    nearest = SPREAD[np.argsort(np.abs(SPREAD - sigma))][:5]
    with jax.enable_x64(True):
        pairs = eigsh_interior(
            operator(a, np.float64), 5, sigma, key=KEY, method=method, tol=1e-6, basis_size=36
        )
        x = np.asarray(pairs.eigenvectors)
    assert pairs.converged.all(), pairs.reasons
    np.testing.assert_allclose(pairs.eigenvalues, nearest, atol=1e-6)
    np.testing.assert_allclose(x @ x.T, np.eye(5), atol=1e-10)
    true = np.linalg.norm(x @ a - pairs.eigenvalues[:, None] * x, axis=1)
    np.testing.assert_allclose(pairs.residuals, true, atol=1e-12)
    inner, degree = pairs.history["inner_residuals"][-1], pairs.history["degree"][-1]
    if method == "shift_invert":
        assert 0 < inner <= 1e-8
        assert degree == 0
    else:
        assert inner == 0
        assert degree >= 4


@pytest.mark.parametrize("scale", [1.0, 1e-14])
def test_float32_and_any_scale(scale):
    pairs = eigsh_interior(
        operator(scale * matrix(SPREAD)), 3, 1.5 * scale, key=KEY, basis_size=36, tol=1e-4
    )
    assert pairs.converged.all(), pairs.reasons
    nearest = SPREAD[np.argsort(np.abs(SPREAD - 1.5))][:3]
    np.testing.assert_allclose(pairs.eigenvalues / scale, nearest, atol=1e-5)


@pytest.mark.parametrize("method", ["chebyshev", "shift_invert"])
def test_copies_of_a_multiple_eigenvalue_are_found(method):
    values = np.repeat(np.linspace(-1, 1, N // 4), 4)
    nearest = values[np.argsort(np.abs(values - 0.21), kind="stable")][:5]
    with jax.enable_x64(True):
        pairs = eigsh_interior(
            operator(matrix(values), np.float64), 5, 0.21, key=KEY, method=method, basis_size=36
        )
    assert pairs.converged.all(), pairs.reasons
    np.testing.assert_allclose(pairs.eigenvalues, nearest, atol=1e-6)


@pytest.mark.parametrize("sigma", [50.0, -50.0])
def test_beyond_an_end_the_end_is_nearest(sigma):
    pairs = eigsh_interior(operator(matrix(SPREAD)), 3, sigma, key=KEY, basis_size=36)
    ends = SPREAD[::-1][:3] if sigma > 0 else SPREAD[:3]
    assert pairs.converged.all()
    np.testing.assert_allclose(pairs.eigenvalues, ends, atol=1e-4)


@pytest.mark.parametrize("k", [1, 4, 20])
def test_a_basis_that_holds_the_space_is_exact(k):
    values = np.sort(np.random.default_rng(4).normal(size=20))
    pairs = eigsh_interior(operator(matrix(values)), k, 0.1, key=KEY)
    nearest = values[np.argsort(np.abs(values - 0.1), kind="stable")][:k]
    np.testing.assert_allclose(pairs.eigenvalues, nearest, atol=32 * EPS)
    assert pairs.converged.all()
    one = eigsh_interior(operator([[2.0]]), 1, 0.0, key=KEY)
    np.testing.assert_allclose(one.eigenvalues, 2)


@pytest.mark.parametrize("method", ["chebyshev", "shift_invert"])
def test_a_spent_budget_is_not_called_converged(method):
    pairs = eigsh_interior(
        operator(matrix(SPREAD)), 3, 0.0, key=KEY, method=method, basis_size=36, max_matvecs=150
    )
    assert not pairs.converged.all()
    assert any("stopped at max_matvecs=150" in reason for reason in pairs.reasons)


def test_a_filter_with_too_narrow_a_bump_is_made_wider():
    # At degree 60 the bump is too narrow to order eigenvalues as far off as the third.
    values = np.concatenate([[0.0, 0.45, -0.5], np.linspace(1, 2, N - 3)])
    pairs = eigsh_interior(operator(matrix(values)), 3, 0.0, key=KEY, basis_size=30, degree=60)
    assert pairs.converged.all(), pairs.reasons
    np.testing.assert_allclose(pairs.eigenvalues, [0, 0.45, -0.5], atol=1e-5)
    assert pairs.history["degree"][-1] < 60


@pytest.mark.parametrize("x64", [False, True])
def test_minres_solves_indefinite_systems(x64):
    a = matrix(np.concatenate([np.linspace(-2, -0.5, 30), np.linspace(0.5, 3, N - 30)]))
    b = np.random.default_rng(5).normal(size=N)
    tol = 1e-10 if x64 else 1e-4
    with jax.enable_x64(x64):
        dtype = np.float64 if x64 else np.float32
        out = minres(operator(a, dtype), jnp.asarray(b, dtype), shift=0.1, tol=tol)
        x = np.asarray(out.solution, np.float64)
    assert out.converged
    true = np.linalg.norm(a @ x - 0.1 * x - b) / np.linalg.norm(b)
    assert true <= 2 * tol
    np.testing.assert_allclose(out.residual, true, rtol=0.3)
    np.testing.assert_allclose(x, np.linalg.solve(a - 0.1 * np.eye(N), b), atol=100 * tol)


def test_minres_says_when_it_has_not_converged_and_solves_for_zero():
    a = operator(matrix(SPREAD))
    out = minres(a, jnp.ones(N), max_matvecs=5)
    assert not out.converged
    assert out.residual > 1e-2
    assert out.num_matvecs == 6
    zero = minres(a, jnp.zeros(N))
    assert zero.converged
    np.testing.assert_array_equal(zero.solution, 0)
    tiny = minres(1e-14 * a, jnp.full(N, 1e-10), max_matvecs=60, tol=1e-2)
    same = minres(a, jnp.ones(N), max_matvecs=60, tol=1e-2)
    np.testing.assert_allclose(tiny.residual, same.residual, rtol=0.2, atol=1e-3)


def test_vectors_keep_the_structure_and_sharding_of_the_parameters(mesh):
    scales = {
        "b": np.linspace(-1, 1, 8, dtype=np.float32),
        "w": np.linspace(-2, 3, 32, dtype=np.float32).reshape(8, 4),
    }
    spec = {"b": P("model"), "w": P("data", "model")}
    put = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), scales, spec)
    product = jax.jit(lambda d, v: jax.tree.map(jnp.multiply, d, v))
    with jax.set_mesh(mesh):
        a = krylov.Operator(lambda v: product(put, v), put)
        found = smallest_eigenvalue(a, key=KEY, basis_size=12, tol=0.1)
        out = minres(a, jax.tree.map(jnp.ones_like, put), shift=-4.0, tol=1e-2)
    assert found.converged
    np.testing.assert_allclose(found.eigenvalue, -2, atol=0.05)
    assert found.eigenvector["w"].sharding.is_equivalent_to(put["w"].sharding, 2)
    assert out.solution["w"].sharding.is_equivalent_to(put["w"].sharding, 2)
    np.testing.assert_allclose(out.solution["w"], 1 / (scales["w"] + 4), atol=0.03)


like = jax.ShapeDtypeStruct((N,), np.float32)
random = krylov.Operator(lambda v: v, like, stochastic=True, name="minibatch")
skewed = krylov.Operator(lambda v: v, like, symmetric=False, name="skewed")
plain = krylov.Operator(lambda v: v, like, name="plain")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: smallest_eigenvalue(random, key=KEY), "minibatch gives another product"),
        (lambda: smallest_eigenvalue(skewed, key=KEY), "skewed is not symmetric"),
        (lambda: smallest_eigenvalue(plain, key=KEY, tol=0.0), "tol is 0.0"),
        (lambda: smallest_eigenvalue(plain, key=KEY, epsilon=0.0), "epsilon is 0.0"),
        (lambda: smallest_eigenvalue(plain, key=KEY, basis_size=2), "basis_size is 2"),
        (lambda: smallest_eigenvalue(plain, key=KEY, failure_probability=1.0), "is 1.0"),
        (lambda: eigsh_interior(random, 1, 0.0, key=KEY), "minibatch gives another product"),
        (lambda: eigsh_interior(skewed, 1, 0.0, key=KEY), "skewed is not symmetric"),
        (lambda: eigsh_interior(plain, 0, 0.0, key=KEY), "k is 0"),
        (lambda: eigsh_interior(plain, 1, np.nan, key=KEY), "sigma is nan"),
        (lambda: eigsh_interior(plain, 1, 0.0, key=KEY, method="lu"), "method is 'lu'"),
        (lambda: eigsh_interior(plain, 1, 0.0, key=KEY, degree=1), "degree is 1"),
        (lambda: eigsh_interior(plain, 5, 0.0, key=KEY, basis_size=8), "basis_size is 8"),
        (
            lambda: eigsh_interior(plain, 1, 0.0, key=KEY, basis_size=20, max_matvecs=3),
            "max_matvecs=3 is spent before the first step",
        ),
        (lambda: minres(random, jnp.ones(N)), "minibatch gives another product"),
        (lambda: minres(plain, jnp.ones(3)), "the right side"),
        (lambda: minres(plain, jnp.full(N, jnp.inf)), "the right side has norm inf"),
    ],
)
def test_misuse_is_refused_with_what_was_expected(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda bad: smallest_eigenvalue(bad, key=KEY),
        lambda bad: eigsh_interior(bad, 1, 0.0, key=KEY, basis_size=20),
        lambda bad: minres(bad, jnp.ones(N)),
    ],
)
def test_products_that_are_not_finite_are_refused(call):
    bad = krylov.Operator(lambda v: v * jnp.nan, like, name="loss")
    with pytest.raises(FloatingPointError, match="with loss is not finite"):
        call(bad)
