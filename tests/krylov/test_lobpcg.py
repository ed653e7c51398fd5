"""LOBPCG: its own stopping rule, preconditioners, a mass matrix, warm starts, awkward spectra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import krylov
from geojax.krylov.lobpcg import lobpcg

EPS = float(np.finfo(np.float32).eps)
KEY = jax.random.key(0)
N = 60


def matrix(values, seed=0):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    a = (q * np.asarray(values, np.float64)) @ q.T
    return (a + a.T) / 2


def operator(a, dtype=np.float32, **options):
    return krylov.from_matrix(np.asarray(a, dtype), **options)


def with_outliers(*values, n=N):
    return np.concatenate([values, np.random.default_rng(1).normal(size=n - len(values))])


def check(pairs, a, values, rtol):
    """Values, vectors, residuals and intervals against the dense matrix."""
    assert pairs.converged.all(), pairs.reasons
    norm = np.abs(np.linalg.eigvalsh(a)).max()
    np.testing.assert_allclose(pairs.eigenvalues, values, atol=rtol * norm)
    x = np.asarray(pairs.eigenvectors, np.float64)
    eps = np.finfo(pairs.eigenvectors.dtype).eps
    np.testing.assert_allclose(x @ x.T, np.eye(len(x)), atol=64 * eps)
    true = np.linalg.norm(x @ a - pairs.eigenvalues[:, None] * x, axis=1)
    np.testing.assert_allclose(pairs.residuals, true, rtol=1e-2, atol=32 * eps * norm)
    dense = np.linalg.eigvalsh(a)
    for low, high in pairs.intervals:
        slack = 32 * eps * norm
        assert ((dense >= low - slack) & (dense <= high + slack)).any()


@pytest.mark.parametrize(("which", "sign"), [("LA", 1), ("SA", -1)])
@pytest.mark.parametrize(("x64", "tol", "rtol"), [(False, 1e-4, 32 * EPS), (True, 1e-6, 1e-12)])
def test_either_end_of_the_spectrum_against_dense(which, sign, x64, tol, rtol):
    a = sign * matrix(with_outliers(10, 8, 6))
    values = sign * np.sort(sign * np.linalg.eigvalsh(a))[::-1][:3]
    with jax.enable_x64(x64):
        dtype = np.float64 if x64 else np.float32
        pairs = lobpcg(operator(a, dtype), 3, key=KEY, which=which, tol=tol)
        check(pairs, a, values, rtol)
    assert (pairs.residuals <= tol * np.abs(values)).all()
    assert pairs.verified
    assert pairs.history["num_matvecs"][-1] == pairs.num_matvecs


def test_float32_gets_down_to_near_its_floor():
    a = matrix(with_outliers(10, 8, 6))
    pairs = lobpcg(operator(a), 3, key=KEY, tol=3e-6)
    assert pairs.converged.all()
    assert pairs.residuals.max() < 20 * EPS * 10


def test_a_tolerance_below_the_noise_is_reported_with_the_floor():
    with pytest.warns(UserWarning, match="pairs cannot reach tol=1e-09"):
        pairs = lobpcg(operator(matrix(with_outliers(10, 8, 6))), 3, key=KEY, tol=1e-9)
    assert not pairs.converged.any()
    assert all("noise floor" in reason for reason in pairs.reasons)
    assert pairs.residuals.max() < 20 * EPS * 10
    np.testing.assert_allclose(pairs.eigenvalues, [10, 8, 6], atol=16 * EPS * 10)


def test_the_relative_residual_holds_for_many_parameters():
    # A stopping rule that scales with n ends this with residuals of several percent.
    n = 200_000
    r = np.random.default_rng(0)
    scales = r.uniform(-1, 1, n).astype(np.float32)
    directions = (r.normal(size=(4, n)) / np.sqrt(n)).astype(np.float32)
    strengths = np.array([3, 2.5, 2, 1.5], np.float32)

    @jax.jit
    def products(scales, directions, strengths, vs):
        inner = jnp.matmul(vs, directions.T, precision="highest") * strengths[None]
        return vs * scales[None] + jnp.matmul(inner, directions, precision="highest")

    a = krylov.Operator(
        lambda v: products(scales, directions, strengths, v[None])[0],
        jax.ShapeDtypeStruct((n,), np.float32),
        matmat=lambda vs: products(scales, directions, strengths, vs),
    )
    pairs = lobpcg(a, 3, key=KEY, tol=9e-5)
    assert pairs.converged.all()
    x = np.asarray(pairs.eigenvectors, np.float64)
    ax = x * scales + (x @ directions.T.astype(np.float64) * strengths) @ directions
    true = np.linalg.norm(ax - pairs.eigenvalues[:, None] * x, axis=1)
    assert (true < 1e-4 * pairs.eigenvalues).all()


def dominant():
    r = np.random.default_rng(2).normal(size=(N, N)) / 10
    return np.diag(np.linspace(1.0, 200.0, N)) + (r + r.T) / 2


@pytest.mark.parametrize("kind", ["diagonal", "operator", "function"])
def test_a_preconditioner_halves_the_products_at_least(kind):
    a = dominant()
    inverse = jnp.asarray(1 / np.diag(a), jnp.float32)
    preconditioner = {
        "diagonal": inverse,
        "operator": operator(np.diag(1 / np.diag(a))),
        "function": lambda residuals: residuals * inverse[None],
    }[kind]
    plain = lobpcg(operator(a), 3, key=KEY, which="SA")
    better = lobpcg(operator(a), 3, key=KEY, which="SA", preconditioner=preconditioner)
    for pairs in (plain, better):
        check(pairs, a, np.linalg.eigvalsh(a)[:3], 32 * EPS)
    assert 2 * better.num_matvecs <= plain.num_matvecs


def pencil():
    r = np.random.default_rng(3)
    a, s = r.normal(size=(N, N)), r.normal(size=(N, 90))
    return a + a.T, s @ s.T / 90 + 0.1 * np.eye(N)


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_the_generalized_problem_equals_scipys(which):
    a, m = pencil()
    values = scipy.linalg.eigh(a, m, eigvals_only=True)
    wanted = values[::-1][:3] if which == "LA" else values[:3]
    with jax.enable_x64(True):
        mass = operator(m, np.float64, psd=True)
        pairs = lobpcg(
            operator(a, np.float64), 3, key=KEY, which=which, mass=mass, mass_floor=0.1, tol=1e-6
        )
        x = np.asarray(pairs.eigenvectors)
    assert pairs.converged.all()
    np.testing.assert_allclose(pairs.eigenvalues, wanted, rtol=1e-8)
    np.testing.assert_allclose(x @ m @ x.T, np.eye(3), atol=1e-10)
    true = np.linalg.norm(x @ a - pairs.eigenvalues[:, None] * (x @ m), axis=1)
    np.testing.assert_allclose(pairs.residuals, true, rtol=1e-3)
    assert (pairs.intervals[:, 0] <= wanted).all()
    assert (wanted <= pairs.intervals[:, 1]).all()


def test_without_a_floor_for_the_mass_the_intervals_promise_nothing():
    a, m = pencil()
    pairs = lobpcg(operator(a), 3, key=KEY, mass=operator(m, psd=True))
    assert np.isinf(pairs.intervals).all()
    assert pairs.converged.all()


def test_sharpness_as_adam_sees_it_by_a_mass_or_by_congruence():
    # A quadratic loss with Hessian H and Adam's denominators P: the eigenvalues of P^-1/2 H P^-1/2.
    a, _ = pencil()
    p = np.random.default_rng(4).uniform(0.01, 3, N)
    root = 1 / np.sqrt(p)
    wanted = np.linalg.eigvalsh(root[:, None] * a * root[None])[::-1][:3]
    with jax.enable_x64(True):
        h = operator(a, np.float64)
        by_mass = lobpcg(h, 3, key=KEY, mass=jnp.asarray(p), tol=1e-6)
        by_congruence = lobpcg(krylov.congruence(h, jnp.asarray(root)), 3, key=KEY, tol=1e-6)
    for pairs in (by_mass, by_congruence):
        assert pairs.converged.all()
        np.testing.assert_allclose(pairs.eigenvalues, wanted, rtol=1e-8)
        assert (pairs.intervals[:, 0] <= wanted * (1 + 1e-12)).all()
        assert (wanted * (1 - 1e-12) <= pairs.intervals[:, 1]).all()
        assert np.ptp(pairs.intervals, axis=1).max() < 1e-3


def test_a_warm_start_needs_at_most_three_fifths_of_the_products():
    a = matrix(with_outliers(10, 8, 6))
    e = np.random.default_rng(5).normal(size=a.shape)
    e = (e + e.T) * 0.01 * np.linalg.norm(a, 2) / np.linalg.norm(e + e.T, 2)
    before = lobpcg(operator(a), 3, key=KEY)
    cold = lobpcg(operator(a + e), 3, key=KEY)
    warm = lobpcg(operator(a + e), 3, key=KEY, initial=before.eigenvectors)
    assert warm.converged.all()
    assert warm.num_matvecs <= 0.6 * cold.num_matvecs
    np.testing.assert_allclose(warm.eigenvalues, cold.eigenvalues, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "k"),
    [
        (np.concatenate([[5] * 3, np.linspace(0, 4, N - 3)]), 3),
        (np.concatenate([[5, 5 - 1e-3, 5 - 2e-3], np.linspace(0, 4, N - 3)]), 3),
        (np.concatenate([[2, 1], np.zeros(N - 2)]), 3),
        (np.zeros(N), 3),
        ([3.0, 2.0, -1.0], 3),
        ([3.0, 2.0, -1.0, -2.0, -5.0], 2),
        ([-2.0], 1),
    ],
    ids=["multiple", "cluster", "rank 2", "zero", "k = n", "n = 5", "n = 1"],
)
def test_awkward_spectra(values, k):
    a = matrix(values)
    pairs = lobpcg(operator(a), k, key=KEY)
    assert pairs.converged.all(), pairs.reasons
    wanted = np.sort(values)[::-1][:k]
    np.testing.assert_allclose(pairs.eigenvalues, wanted, atol=2e-5)
    x = np.asarray(pairs.eigenvectors, np.float64)
    np.testing.assert_allclose(x @ x.T, np.eye(k), atol=64 * EPS)


def test_scaling_the_operator_scales_the_result_and_nothing_else():
    a = matrix(with_outliers(10, 8, 6))
    one = lobpcg(operator(a), 3, key=KEY)
    tiny = lobpcg(operator(1e-14 * a), 3, key=KEY)
    assert one.num_matvecs == tiny.num_matvecs
    assert tiny.converged.all()
    np.testing.assert_allclose(1e14 * tiny.eigenvalues, one.eigenvalues, rtol=64 * EPS)
    np.testing.assert_allclose(tiny.eigenvectors, one.eigenvectors, atol=1e-4)


def test_a_spent_budget_is_the_reason_and_the_residuals_are_measured_all_the_same():
    a = matrix(np.linspace(-1, 1, N))
    pairs = lobpcg(operator(a), 3, key=KEY, max_matvecs=20)
    assert pairs.num_matvecs <= 20
    assert not pairs.converged.all()
    assert "stopped at max_matvecs=20" in pairs.reasons
    x = np.asarray(pairs.eigenvectors, np.float64)
    true = np.linalg.norm(x @ a - pairs.eigenvalues[:, None] * x, axis=1)
    np.testing.assert_allclose(pairs.residuals, true, rtol=1e-4)


def test_products_are_counted_and_compiled_for_a_few_widths():
    a = jnp.asarray(matrix(with_outliers(10, 9, 8, 7, 6, 5)), jnp.float32)
    traces, columns = [], []

    @jax.jit
    def products(vs):
        traces.append(vs.shape)
        return vs @ a

    def matmat(vs):
        columns.append(len(vs))
        return products(vs)

    counted = krylov.Operator(
        lambda v: products(v[None])[0], jax.ShapeDtypeStruct((N,), np.float32), matmat=matmat
    )
    pairs = lobpcg(counted, 6, key=KEY)
    assert pairs.converged.all()
    assert sum(columns) == pairs.num_matvecs
    # A block of 8 shrinks to 4 at the least while spare vectors remain, never through 7, 6, 5.
    assert set(columns) <= {8, 4, 2, 1}
    assert len(traces) == len(set(traces)) <= 4


def test_vectors_keep_the_structure_of_the_parameters():
    a = jnp.asarray(matrix(with_outliers(10, 8)), jnp.float32)
    like = {"b": jax.ShapeDtypeStruct((10,), np.float32), "w": jnp.zeros((10, 5))}

    @jax.jit
    def matvec(v):
        flat = a @ jnp.concatenate([v["b"], v["w"].reshape(-1)])
        return {"b": flat[:10], "w": flat[10:].reshape(10, 5)}

    pairs = lobpcg(krylov.Operator(matvec, like), 2, key=KEY)
    assert jax.tree.map(jnp.shape, pairs.eigenvectors) == {"b": (2, 10), "w": (2, 10, 5)}
    np.testing.assert_allclose(pairs.eigenvalues, [10, 8], rtol=1e-5)


def test_sharded_vectors_keep_their_sharding_and_their_numbers(mesh):
    scales = {
        "b": np.linspace(0, 1, 8, dtype=np.float32),
        "w": np.linspace(-1, 3, 64, dtype=np.float32).reshape(8, 8),
    }
    spec = {"b": P("model"), "w": P("data", "model")}
    put = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), scales, spec)

    @jax.jit
    def product(scales, v):
        total = sum(jnp.sum(x) for x in jax.tree.leaves(v))
        return jax.tree.map(lambda d, x: d * x + total / 8, scales, v)

    flat = np.concatenate([x.reshape(-1) for x in scales.values()])
    dense = np.diag(flat) + np.ones((72, 72)) / 8
    with jax.set_mesh(mesh):
        a = krylov.Operator(lambda v: product(put, v), put)
        mass = jax.tree.map(lambda x: x + 2.0, put)
        pairs = lobpcg(a, 2, key=KEY, tol=1e-4, mass=mass)
    assert pairs.converged.all()
    for name, leaf in pairs.eigenvectors.items():
        want = NamedSharding(mesh, P(None, *put[name].sharding.spec))
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim)
    wanted = scipy.linalg.eigh(dense, np.diag(flat + 2), eigvals_only=True)[::-1][:2]
    np.testing.assert_allclose(pairs.eigenvalues, wanted, rtol=1e-5)


like = jax.ShapeDtypeStruct((N,), np.float32)
random = krylov.Operator(lambda v: v, like, stochastic=True, name="minibatch")
skewed = krylov.Operator(lambda v: v, like, symmetric=False, name="skewed")
plain = krylov.Operator(lambda v: v, like, name="plain")
short = krylov.Operator(lambda v: v, jax.ShapeDtypeStruct((3,), np.float32), name="short")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: lobpcg(random, 1, key=KEY), "minibatch gives another product.*Freeze"),
        (lambda: lobpcg(skewed, 1, key=KEY), "skewed is not symmetric"),
        (lambda: lobpcg(plain, 0, key=KEY), f"k is 0; expected .* n = {N}"),
        (lambda: lobpcg(plain, 1, key=KEY, which="LM"), "which is 'LM'.*use `eigsh`"),
        (lambda: lobpcg(plain, 1, key=KEY, tol=2.0), "tol is 2.0"),
        (lambda: lobpcg(plain, 3, key=KEY, block_size=2), "block_size is 2; expected at least"),
        (lambda: lobpcg(plain, 3, key=KEY, max_matvecs=2), "max_matvecs is 2; expected at least"),
        (lambda: lobpcg(plain, 1, key=KEY, mass=jnp.zeros(N)), "positive diagonal"),
        (lambda: lobpcg(plain, 1, key=KEY, mass=jnp.ones(3)), r"shape .* in the mass matrix"),
        (lambda: lobpcg(plain, 1, key=KEY, mass=short), r"shape .* in the mass matrix"),
        (lambda: lobpcg(plain, 1, key=KEY, mass=random), "minibatch must be one symmetric"),
        (lambda: lobpcg(plain, 1, key=KEY, mass=plain, mass_floor=0.0), "mass_floor is 0.0"),
        (lambda: lobpcg(plain, 1, key=KEY, mass=0.0 * plain), "not positive definite"),
        (lambda: lobpcg(plain, 1, key=KEY, preconditioner=jnp.ones(3)), "the preconditioner"),
        (lambda: lobpcg(plain, 1, key=KEY, initial=jnp.ones((1, 3))), "initial"),
    ],
)
def test_misuse_is_refused_with_what_was_expected(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "one of products .* with loss is not finite"),
        ({"mass": "bad"}, "the mass matrix is not finite"),
        ({"preconditioner": "bad"}, "the preconditioner's result is not finite"),
    ],
)
def test_what_is_not_finite_is_named(options, says):
    bad = krylov.Operator(lambda v: v * jnp.nan, like, name="loss")
    good = operator(matrix(with_outliers(10, 8)))
    options = {name: bad for name in options}
    with pytest.raises(FloatingPointError, match=says):
        lobpcg(good if options else bad, 3, key=KEY, **options)
