"""Power iteration: unbiased momentum, honest pairs of opposite sign, Oja for random products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import krylov, tree
from geojax.krylov.power import power_iteration, stochastic_power_iteration

EPS = float(np.finfo(np.float32).eps)
KEY = jax.random.key(0)
N = 48


def matrix(values, seed=0):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    a = (q * np.asarray(values, np.float64)) @ q.T
    return (a + a.T) / 2


def operator(a, dtype=np.float32, **options):
    return krylov.from_matrix(np.asarray(a, dtype), **options)


def with_outliers(*values):
    return np.concatenate([values, np.linspace(0, 1, N - len(values))])


def by_magnitude(values):
    return np.asarray(values)[np.argsort(-np.abs(values), kind="stable")]


THREE = np.concatenate([[3.0], np.linspace(-1, 2.7, N - 1)])
BEST = 2.7**2 / 4


@pytest.mark.parametrize("momentum", [0.25, 0.5, 1.0, BEST])
def test_momentum_leaves_the_eigenvalue_unbiased_and_saves_products(momentum):
    with jax.enable_x64(True):
        a = operator(matrix(THREE), np.float64)
        plain = power_iteration(a, key=KEY, tol=1e-6)
        fast = power_iteration(a, key=KEY, tol=1e-6, momentum=momentum)
    for pairs in (plain, fast):
        assert pairs.converged.all()
        assert abs(pairs.eigenvalues[0] - 3) < 1e-8
    assert fast.num_matvecs < plain.num_matvecs
    if momentum == BEST:
        assert fast.num_matvecs < plain.num_matvecs / 2


@pytest.mark.parametrize("momentum", [0.0, 0.5, BEST])
def test_in_float32_the_eigenvalue_is_right_to_rounding(momentum):
    pairs = power_iteration(operator(matrix(THREE)), key=KEY, tol=1e-4, momentum=momentum)
    assert pairs.converged.all()
    assert abs(pairs.eigenvalues[0] - 3) < 8 * EPS * 3


def test_momentum_above_a_quarter_of_the_square_is_named_as_the_reason():
    pairs = power_iteration(operator(matrix(THREE)), key=KEY, momentum=2.3, max_matvecs=100)
    assert not pairs.converged[0]
    assert "momentum 2.3 is too large" in pairs.reasons[0]


@pytest.mark.parametrize("budget", [5, 20, 60, 150, 3000])
@pytest.mark.parametrize("outliers", [(5, -4.95, 4.9, 4.8), (5, -5, 4.9, 4.8)])
def test_near_and_exact_opposite_pairs_are_right_or_say_that_they_are_not(outliers, budget):
    values = with_outliers(*outliers)
    a = matrix(values)
    pairs = power_iteration(operator(a), 3, key=KEY, max_matvecs=budget)
    wanted = by_magnitude(values)[:3]
    for value, (low, high), done in zip(
        pairs.eigenvalues, pairs.intervals, pairs.converged, strict=True
    ):
        slack = 16 * EPS * 5
        assert ((values >= low - slack) & (values <= high + slack)).any()
        if done:
            assert np.abs(value - wanted).min() < 1e-3
    assert len(pairs.reasons) == len(pairs.eigenvalues) <= 3
    assert pairs.num_matvecs <= budget
    if budget == 3000:
        assert pairs.converged.all()
        np.testing.assert_allclose(np.sort(pairs.eigenvalues), np.sort(wanted), atol=1e-3)
    if budget <= 60:
        assert not pairs.converged.all()


def test_exactly_opposite_eigenvalues_are_both_found_from_two_iterates():
    pairs = power_iteration(operator(matrix(with_outliers(5, -5))), 2, key=KEY)
    np.testing.assert_allclose(np.sort(pairs.eigenvalues), [-5, 5], atol=16 * EPS * 5)
    assert pairs.converged.all()
    assert pairs.num_matvecs <= 15


def test_residuals_are_those_of_the_operator_itself():
    a = matrix(with_outliers(5, 4, 3, 2))
    pairs = power_iteration(operator(a), 3, key=KEY, tol=1e-2)
    x = np.asarray(pairs.eigenvectors, np.float64)
    true = np.linalg.norm(x @ a - pairs.eigenvalues[:, None] * x, axis=1)
    np.testing.assert_allclose(pairs.residuals, true, rtol=1e-2, atol=16 * EPS * 5)
    assert (true <= 1e-2 * pairs.eigenvalues).all()
    np.testing.assert_allclose(x @ x.T, np.eye(3), atol=32 * EPS)


def test_it_stops_on_the_residual_and_not_on_a_quotient_that_barely_moves():
    # The quotient changes by less than 1e-6 a step from early on; the residual falls slowly.
    a = matrix(np.concatenate([np.linspace(1, 0.999, 10), np.zeros(N - 10)]))
    pairs = power_iteration(operator(a), key=KEY, tol=1e-5, max_matvecs=100)
    assert not pairs.converged[0]
    assert pairs.residuals[0] > 1e-5
    moves = np.abs(np.diff(pairs.history["eigenvalues"][:, 0]))
    assert moves[-1] < 1e-5


def test_a_pair_of_unequal_magnitudes_does_not_crowd_out_a_cluster():
    # The plane of two iterates holds -0.994 as well, which is fourth in line.
    values = np.concatenate([[1, 1 - 1e-5, 1 - 2e-5, -0.994], np.linspace(-0.9, 0.9, N - 4)])
    for seed in range(3):
        pairs = power_iteration(operator(matrix(values)), 3, key=jax.random.key(seed))
        assert pairs.converged.all()
        np.testing.assert_allclose(pairs.eigenvalues, 1, atol=1e-4)


def test_the_zero_operator_has_the_eigenvalue_zero():
    pairs = power_iteration(operator(np.zeros((N, N))), 2, key=KEY)
    np.testing.assert_array_equal(pairs.eigenvalues, 0)
    assert pairs.converged.all()
    assert np.isfinite(np.asarray(pairs.eigenvectors)).all()


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    ("outliers", "rest", "k"), [((2, 1), 0.0, 5), ((5, 5, 5, 5), 0.5, 5), ((3, 2, 1), None, 3)]
)
def test_deficient_multiple_and_complete_spectra(outliers, rest, k, x64):
    values = np.array(outliers, float)
    if rest is not None:
        values = np.concatenate([values, np.full(N - len(values), rest)])
    with jax.enable_x64(x64):
        dtype = np.float64 if x64 else np.float32
        pairs = power_iteration(operator(matrix(values), dtype), k, key=KEY)
    np.testing.assert_allclose(pairs.eigenvalues, by_magnitude(values)[:k], atol=1e-5)
    assert pairs.converged.all()
    assert len(pairs.eigenvalues) == k


def test_an_operator_with_one_row():
    pairs = power_iteration(operator([[-2.0]]), key=KEY)
    np.testing.assert_allclose(pairs.eigenvalues, [-2])


def test_scaling_the_operator_scales_the_result_and_nothing_else():
    a = matrix(with_outliers(5, -4, 3))
    one = power_iteration(operator(a), 2, key=KEY)
    tiny = power_iteration(operator(1e-14 * a), 2, key=KEY)
    assert one.num_matvecs == tiny.num_matvecs
    assert one.converged.all()
    assert tiny.converged.all()
    np.testing.assert_allclose(1e14 * tiny.eigenvalues, one.eigenvalues, rtol=64 * EPS)
    np.testing.assert_allclose(tiny.eigenvectors, one.eigenvectors, atol=1e-4)


def test_a_tolerance_below_the_noise_is_reported_with_the_floor():
    with pytest.warns(UserWarning, match="cannot reach tol=1e-08"):
        pairs = power_iteration(operator(matrix(with_outliers(5, 2))), key=KEY, tol=1e-8)
    assert not pairs.converged[0]
    assert "noise floor" in pairs.reasons[0]
    assert pairs.residuals[0] < 100 * pairs.noise_floor < 1e-3


def test_starting_from_the_vectors_of_a_neighbor_saves_products():
    values = with_outliers(5, 4, 3)
    a = matrix(values)
    r = np.random.default_rng(1).normal(size=a.shape)
    b = a + 1e-3 * (r + r.T) / 2
    found = power_iteration(operator(a), 3, key=KEY).eigenvectors
    cold = power_iteration(operator(b), 3, key=KEY)
    warm = power_iteration(operator(b), 3, key=KEY, initial=found)
    assert warm.converged.all()
    assert warm.num_matvecs <= 0.6 * cold.num_matvecs


def blocks(a, dtype=np.float32):
    """The operator of a matrix on vectors with two leaves of different shapes."""
    a = jnp.asarray(a, dtype)
    like = {"b": jax.ShapeDtypeStruct((8,), dtype), "w": jax.ShapeDtypeStruct((8, 5), dtype)}

    @jax.jit
    def matvec(v):
        flat = a @ jnp.concatenate([v["b"], v["w"].reshape(-1)])
        return {"b": flat[:8], "w": flat[8:].reshape(8, 5)}

    return krylov.Operator(matvec, like)


def test_vectors_keep_the_structure_of_the_parameters():
    a = matrix(with_outliers(5, -4))
    pairs = power_iteration(blocks(a), 2, key=KEY)
    assert jax.tree.map(jnp.shape, pairs.eigenvectors) == {"b": (2, 8), "w": (2, 8, 5)}
    np.testing.assert_allclose(pairs.eigenvalues, [5, -4], atol=1e-5)


def sharded(mesh):
    """A diagonal-plus-rank-one operator on sharded vectors, and its dense matrix."""
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

    dense = (
        np.diag(np.concatenate([x.reshape(-1) for x in scales.values()])) + np.ones((72, 72)) / 8
    )
    return krylov.Operator(lambda v: product(put, v), put), put, dense


def test_sharded_vectors_keep_their_sharding_and_their_numbers(mesh):
    with jax.set_mesh(mesh):
        a, put, dense = sharded(mesh)
        pairs = power_iteration(a, 1, key=KEY, momentum=1.0)
    for name, leaf in pairs.eigenvectors.items():
        want = NamedSharding(mesh, P(None, *put[name].sharding.spec))
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim)
    assert pairs.converged.all()
    np.testing.assert_allclose(pairs.eigenvalues, np.linalg.eigvalsh(dense)[-1:], rtol=1e-5)


def test_the_product_is_traced_once():
    a = jnp.asarray(matrix(with_outliers(5, 4)), jnp.float32)
    traces = []

    @jax.jit
    def matvec(v):
        traces.append(v.shape)
        return a @ v

    counted = krylov.Operator(matvec, jax.ShapeDtypeStruct((N,), np.float32))
    power_iteration(counted, 2, key=KEY)
    assert traces == [(N,)]


@pytest.mark.parametrize("at", [1, 7, 10])
def test_a_product_that_is_not_finite_is_named(at):
    calls = []

    def matvec(v):
        calls.append(v)
        return v * jnp.where(len(calls) == at, jnp.nan, 1.0) * jnp.linspace(1, 2, N)

    bad = krylov.Operator(matvec, jax.ShapeDtypeStruct((N,), np.float32), name="loss")
    with pytest.raises(FloatingPointError, match=f"product {at} with loss is not finite"):
        power_iteration(bad, key=KEY, tol=1e-6)


like = jax.ShapeDtypeStruct((N,), np.float32)
random = krylov.Operator(lambda v: v, like, stochastic=True, name="minibatch")
skewed = krylov.Operator(lambda v: v, like, symmetric=False, name="skewed")
plain = krylov.Operator(lambda v: v, like, name="plain")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: power_iteration(random, key=KEY), "minibatch gives another product.*Freeze"),
        (lambda: power_iteration(skewed, key=KEY), "skewed is not symmetric"),
        (lambda: power_iteration(plain, N + 1, key=KEY), f"k is {N + 1}; expected .* n = {N}"),
        (lambda: power_iteration(plain, key=KEY, tol=0.0), "tol is 0.0"),
        (lambda: power_iteration(plain, key=KEY, momentum=-1.0), "momentum is -1.0"),
        (lambda: power_iteration(plain, key=KEY, max_matvecs=0), "max_matvecs is 0"),
        (lambda: power_iteration(plain, key=KEY, initial=jnp.zeros(N)), "norm .*not all 0"),
        (lambda: power_iteration(plain, key=KEY, initial=jnp.ones(3)), r"shape \(1, 48\)"),
        (lambda: stochastic_power_iteration(skewed, key=KEY), "skewed is not symmetric"),
        (lambda: stochastic_power_iteration(random, key=KEY, which="LM"), "which is 'LM'"),
        (lambda: stochastic_power_iteration(random, key=KEY, num_steps=3), "num_steps is 3"),
        (lambda: stochastic_power_iteration(random, key=KEY, step_size=0.0), "step_size is 0.0"),
    ],
)
def test_misuse_is_refused_with_what_was_expected(call, says):
    with pytest.raises(ValueError, match=says):
        call()


DIM = 12


def minibatch(seed, batch=32):
    """The Hessian of a quadratic on a fresh batch at each product, and the mean Hessian."""
    r = np.random.default_rng(seed)
    mix = np.linalg.qr(r.normal(size=(DIM, DIM)))[0] * np.sqrt(np.geomspace(4, 0.05, DIM))
    data = (r.normal(size=(4096, DIM)) @ mix.T).astype(np.float32)

    def matvec(v):
        x = data[r.integers(0, len(data), batch)]
        return jax.tree.map(lambda u: _gauss_newton(x, u), v)

    operator = krylov.Operator(
        matvec, {"w": jax.ShapeDtypeStruct((DIM,), np.float32)}, stochastic=True
    )
    return operator, data.astype(np.float64).T @ data / len(data)


@jax.jit
def _gauss_newton(x, u):
    return x.T @ (x @ u) / len(x)


def test_oja_finds_the_top_eigenvalue_of_the_mean_over_minibatches():
    errors, scores = [], []
    for seed in range(4):
        a, mean = minibatch(seed)
        true = np.linalg.eigvalsh(mean)[-1]
        pair = stochastic_power_iteration(a, key=jax.random.key(seed), num_steps=1500)
        errors.append(pair.eigenvalue / true - 1)
        scores.append((pair.eigenvalue - true) / pair.standard_error)
        assert pair.converged, pair.reason
        assert pair.num_matvecs == 1500 == len(pair.rayleigh_quotients)
        assert pair.variance > 100 * pair.standard_error**2
        x = np.asarray(pair.eigenvector["w"], np.float64)
        assert x @ mean @ x / true > 0.99
        np.testing.assert_allclose(np.linalg.norm(x), 1, rtol=8 * EPS)
    assert np.abs(errors).max() < 0.02
    assert np.abs(scores).max() < 4


def test_one_batchs_own_top_eigenvalue_is_biased_and_ojas_is_not():
    a, mean = minibatch(0)
    true = np.linalg.eigvalsh(mean)[-1]
    r = np.random.default_rng(0)
    root = np.linalg.cholesky(mean)
    own = [
        np.linalg.eigvalsh(x.T @ x / 32)[-1]
        for x in (r.normal(size=(32, DIM)) @ root.T for _ in range(200))
    ]
    assert np.mean(own) > 1.05 * true
    pair = stochastic_power_iteration(a, key=KEY, num_steps=1500)
    assert abs(pair.eigenvalue / true - 1) < 0.02


def test_oja_on_a_fixed_operator_gives_either_end():
    a = operator(matrix(with_outliers(5, -4)))
    for which, value in (("LA", 5), ("SA", -4)):
        pair = stochastic_power_iteration(a, key=KEY, num_steps=300, which=which)
        assert pair.converged
        assert abs(pair.eigenvalue - value) < 1e-3
        assert tree.num_points(pair.eigenvector) == N


def test_oja_says_when_it_has_not_got_there():
    a = operator(matrix(np.linspace(-1, 1, N)))
    pair = stochastic_power_iteration(a, key=KEY, num_steps=40)
    assert not pair.converged
    assert "take more steps" in pair.reason


def test_oja_on_zero_is_zero_and_a_product_that_is_not_finite_is_named():
    pair = stochastic_power_iteration(operator(np.zeros((N, N))), key=KEY, num_steps=40)
    assert pair.eigenvalue == 0
    assert pair.converged
    calls = []

    def matvec(v):
        calls.append(v)
        return v * jnp.where(len(calls) == 31, jnp.inf, 1.0)

    bad = krylov.Operator(matvec, like, name="loss", stochastic=True)
    with pytest.raises(FloatingPointError, match="product 31 with loss"):
        stochastic_power_iteration(bad, key=KEY, num_steps=60)
