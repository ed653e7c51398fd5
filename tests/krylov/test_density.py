"""Lanczos quadrature and spectral densities: exact, with honest bands, resumed, on meshes."""

import functools
import io
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import checkpoint, krylov, plot, tree
from geojax.krylov import probes, quadrature
from geojax.krylov._smoothing import trapezoids
from geojax.krylov.results import Eigenpairs

KEY = jax.random.key(0)


def matrix_of(values, seed=0):
    """A symmetric float64 matrix with these eigenvalues, and its eigenvectors as rows."""
    r = np.random.default_rng(seed)
    q, _ = np.linalg.qr(r.normal(size=(len(values), len(values))))
    return (q * values) @ q.T, q.T


multiply = jax.jit(lambda d, v: d * v)
multiply_many = jax.jit(lambda d, vs: d[None] * vs)


def operator_of(values):
    """A diagonal operator: to probes without a preferred direction it is like any other."""
    d = jnp.asarray(values, jnp.float32)
    return krylov.Operator(
        lambda v: multiply(d, v), d, matmat=lambda vs: multiply_many(d, vs), psd=bool(d.min() >= 0)
    )


def kernel_density(grid, values, width):
    """The exact smoothed density of a spectrum."""
    z = (grid[:, None] - values[None]) / width
    return np.exp(-0.5 * z**2).mean(1) / (width * np.sqrt(2 * np.pi))


@functools.cache
def density_of(name, **options):
    return quadrature.spectral_density(OPERATORS[name](), **(STANDARD | options))


STANDARD = {"key": KEY, "num_probes": 20, "num_steps": 60, "block_size": 20}
VALUES = {
    "uniform": np.linspace(0, 1, 1000),
    "clusters": np.r_[np.random.default_rng(1).normal(-1, 0.05, 500),
                      np.random.default_rng(2).normal(1, 0.05, 500)],
    "low rank": np.r_[np.zeros(980), np.linspace(1, 2, 20)],
    "two points": np.r_[-np.ones(300), np.ones(700)],
}  # fmt: skip
OPERATORS = {
    name: functools.cache(functools.partial(operator_of, values)) for name, values in VALUES.items()
}


@jax.jit
def couple(diagonal, v):
    """A symmetric product on any pytree: a diagonal, and a rank one that ties the leaves."""
    return tree.axpy(tree.vdot(diagonal, v), diagonal, jax.tree.map(jnp.multiply, diagonal, v))


couple_many = jax.jit(jax.vmap(couple, in_axes=(None, 0)))


def two_leaves(dtype=np.float32):
    r = np.random.default_rng(0)
    return {
        "kernel": r.uniform(0.1, 1, size=(8, 6)).astype(dtype),
        "bias": r.uniform(0.1, 1, size=4).astype(dtype),
    }


def coupled(diagonal):
    return krylov.Operator(
        lambda v: couple(diagonal, v), diagonal, matmat=lambda vs: couple_many(diagonal, vs)
    )


# ---------------------------------------------------------------------------- the density itself


def test_a_uniform_spectrum_gives_a_flat_density_that_integrates_to_one():
    found = density_of("uniform")
    curve = found.curve
    assert curve.integral == pytest.approx(1, abs=0.01)
    inside = (curve.grid > 0.1) & (curve.grid < 0.9)
    assert curve.values[inside].min() > 0.7 * curve.values[inside].max()
    np.testing.assert_allclose(found.weights.sum(1), 1, atol=1e-12)
    assert found.weight_error < 1e-12
    assert found.asymmetry < 1e-5
    assert found.num_matvecs == 20 * 60


def test_two_clusters_have_half_of_the_mass_each():
    found = density_of("clusters")
    assert found.mass(-2, 0).estimate == pytest.approx(0.5, abs=0.05)
    curve = found.curve
    left = curve.grid < 0
    mass = trapezoids(curve.values[left], curve.grid[left])
    assert mass == pytest.approx(0.5, abs=0.05)
    assert abs(curve.grid[left][np.argmax(curve.values[left])] + 1) < 0.05


def test_as_many_steps_as_rows_give_the_exact_moments_of_the_probe():
    with jax.enable_x64(True):
        a, _ = matrix_of(np.random.default_rng(3).normal(size=12))
        operator = krylov.from_matrix(a)
        found = quadrature.spectral_density(operator, key=KEY, num_probes=1, num_steps=12)
        v = np.asarray(probes.probes(operator, KEY, 0, 1, "normal"))[0]
        v = v / np.linalg.norm(v)
        for p, moment in enumerate(found.moments(5)):
            exact = v @ np.linalg.matrix_power(a, p) @ v
            assert moment.estimate == pytest.approx(exact, rel=1e-6, abs=1e-6)
            assert np.isnan(moment.standard_error)  # one probe tells no error
            assert moment.interval == (-np.inf, np.inf)
    assert np.isinf(found.curve.upper).all()


def test_the_log_density_of_a_heavy_tailed_spectrum_is_near_the_exact_one():
    r = np.random.default_rng(0)
    z = r.pareto(1.0, size=(600, 200))
    wishart = z.T @ z / 600
    values = np.linalg.eigvalsh(wishart)
    assert values[-1] / values[0] > 1e5
    with jax.enable_x64(True):
        operator = krylov.from_matrix(wishart)
        found = quadrature.spectral_density(
            operator, key=KEY, num_probes=24, num_steps=120, block_size=24, axis="log"
        )
    # The first Wasserstein distance, as the area between the two distributions.
    logs = np.log(np.abs(found.nodes)).ravel()
    places = np.sort(np.r_[logs, np.log(values)])
    weights = found.weights.ravel()[np.argsort(logs)] / len(found.weights)
    seen = np.r_[0, np.cumsum(weights)][np.searchsorted(np.sort(logs), places, "right")]
    exact = np.searchsorted(np.log(values), places, "right") / len(values)
    assert np.sum(np.abs(seen - exact)[:-1] * np.diff(places)) < 0.05
    # And so is the smoothed curve, whose coordinate is the logarithm.
    curve = found.curve
    np.testing.assert_allclose(curve.coordinate, np.log(curve.grid))
    assert curve.integral == pytest.approx(1, abs=0.01)
    exact = kernel_density(curve.coordinate, np.log(values), curve.width)
    gap = trapezoids(np.abs(curve.values - exact), curve.coordinate)
    assert gap < 0.1


def test_a_density_on_another_axis_is_the_same_measure_by_the_jacobian():
    found = density_of("uniform")
    linear = found.density(np.linspace(-0.1, 1.1, 600), width=0.03)
    where = (linear.grid > 0.45) & (linear.grid < 0.9)
    for axis, epsilon in (("log", 1e-6), ("symlog", 0.2)):
        curve = found.density(axis=axis, epsilon=epsilon, width=0.04)
        assert curve.integral == pytest.approx(1, abs=0.01)
        step = np.gradient(curve.coordinate, curve.grid)
        middle = (curve.grid > 0.3) & (curve.grid < 0.95)
        np.testing.assert_allclose(curve.jacobian[middle], step[middle], rtol=0.01)
        by_eigenvalue = np.interp(linear.grid, curve.grid, curve.values * curve.jacobian)
        np.testing.assert_allclose(by_eigenvalue[where], linear.values[where], rtol=0.1)


def test_one_outlier_does_not_stretch_the_kernel():
    r = np.random.default_rng(5)
    bulk = r.normal(size=999)
    plain = quadrature.spectral_density(operator_of(np.r_[bulk, 0.5]), **STANDARD).curve
    far = quadrature.spectral_density(operator_of(np.r_[bulk, 500.0]), **STANDARD).curve
    assert far.width < 1.2 * plain.width  # range / m would be eighty times it
    assert far.integral == pytest.approx(1, abs=0.01)


def test_most_of_the_mass_in_one_place_leaves_a_width_for_the_rest():
    r = np.random.default_rng(2)
    values = np.r_[np.zeros(900), r.exponential(0.05, 95), [1, 2, 3, 5, 10]]
    found = quadrature.spectral_density(operator_of(values), **STANDARD)
    assert 2e-4 < found.curve.width < 5e-3
    assert found.curve.integral == pytest.approx(1, abs=0.01)
    assert found.zero_mass(1e-5).estimate == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("deflated", [0, 4])
def test_the_band_covers_the_smoothed_truth(deflated):
    r = np.random.default_rng(0)
    x = r.normal(size=(300, 150))
    values = np.linalg.eigvalsh(x.T @ x / 300)[::-1]
    known = (values[:deflated], jnp.eye(deflated, 150)) if deflated else None
    operator = operator_of(values)
    grid = np.linspace(values.min() - 0.05, values.max() + 0.05, 200)
    truth = kernel_density(grid, values, 0.05)
    inside, resampled = [], []
    for seed in range(50):
        found = quadrature.spectral_density(
            operator, key=jax.random.key(seed), num_probes=10, num_steps=40, block_size=10,
            deflate=known, grid=grid, width=0.05,
        )  # fmt: skip
        curve = found.curve
        inside.append((curve.lower <= truth) & (truth <= curve.upper))
        if seed < 10:
            low, high = found.bootstrap(jax.random.key(seed), num_resamples=400)
            resampled.append((low <= truth) & (truth <= high))
    assert np.mean(inside) >= 0.9
    assert np.mean(resampled) >= 0.9
    # And it is no wider than it has to be.
    assert np.mean(inside) < 0.97


def test_deflated_eigenvalues_are_exact_and_the_bulk_is_better():
    n, k = 300, 10
    values = np.r_[np.linspace(200, 100, k), np.cos(np.pi * (np.arange(n - k) + 0.5) / (n - k))]
    operator = operator_of(values)
    known = (values[:k], jnp.eye(k, n))
    grid = np.linspace(-1.2, 1.2, 200)
    truth = kernel_density(grid, values, 0.05)
    bulk, curves, traces = {}, {}, {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lie off the grid")
        for name, deflate in (("plain", None), ("deflated", known)):
            runs = [
                quadrature.spectral_density(
                    operator, key=jax.random.key(s), num_probes=10, num_steps=20, block_size=10,
                    deflate=deflate, grid=grid, width=0.05,
                )
                for s in range(8)
            ]  # fmt: skip
            bulk[name] = np.std([run.mass(-2, 2).estimate for run in runs])
            traces[name] = np.std([run.functional(lambda x: x).estimate for run in runs])
            curves[name] = np.sqrt(np.mean([(r.curve.values - truth) ** 2 for r in runs]))
    for value in values[:k]:
        spike = runs[0].mass(value - 1e-9, value + 1e-9)
        assert spike.estimate == pytest.approx(1 / n, rel=1e-12)
        assert spike.standard_error < 1e-15
    assert runs[0].num_matvecs == 10 * 20 + k  # the pairs were verified
    np.testing.assert_allclose(
        runs[0].curve.spikes, 0, atol=1e-30
    )  # a hundred widths from the grid
    assert bulk["deflated"] <= 0.5 * bulk["plain"]
    assert traces["deflated"] <= 0.5 * traces["plain"]
    assert curves["deflated"] <= 0.5 * curves["plain"]  # the steps are left for the bulk
    for run in runs:
        assert run.nodes.max() < 1.01
        assert run.moments(0)[0].estimate == pytest.approx(1, abs=1e-12)
        trace = run.functional(lambda x: x)
        assert abs(trace.estimate - values.sum()) < 5 * trace.standard_error


def test_all_eigenvalues_deflated_leave_nothing_to_estimate():
    values = np.array([3.0, 1.0, -2.0])
    a, vectors = matrix_of(values)
    found = quadrature.spectral_density(
        krylov.from_matrix(a.astype(np.float32)), key=KEY,
        deflate=(values, jnp.asarray(vectors, jnp.float32)),
    )  # fmt: skip
    assert found.functional(np.square).estimate == pytest.approx(14)
    assert found.functional(np.square).standard_error == 0
    assert found.curve.integral == pytest.approx(1, abs=0.01)
    assert found.num_matvecs == 3


def test_functionals_moments_and_distribution_agree_with_the_spectrum():
    found, values = density_of("uniform"), VALUES["uniform"]
    for f, exact in ((lambda x: np.exp(-3 * x), np.exp(-3 * values).sum()),
                     (np.square, (values**2).sum())):  # fmt: skip
        estimate = found.functional(f)
        assert abs(estimate.estimate - exact) < 4 * estimate.standard_error
        assert estimate.interval[0] < estimate.estimate < estimate.interval[1]
    for p, moment in enumerate(found.moments(4)):
        gap = abs(moment.estimate - (values**p).mean())
        assert gap < 4 * moment.standard_error + 1e-12
    cdf = found.cdf(np.linspace(-0.2, 1.2, 50))
    assert (np.diff(cdf.values) >= 0).all()
    assert cdf.values[0] == pytest.approx(0, abs=1e-9)
    assert cdf.values[-1] == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(cdf.values, np.clip(cdf.grid, 0, 1), atol=0.05)
    stairs = found.cdf(np.array([-1.0, 0.5, 2.0]), width=0)
    # The ends are sums of weights.
    np.testing.assert_allclose(stairs.values[[0, 2]], [0, 1], atol=4 * np.finfo(float).eps)
    assert found.mass(0.25, 0.75).estimate == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match="element by element"):
        found.functional(np.sum)


def test_fewer_steps_and_probes_can_be_looked_at_without_a_new_run():
    few = quadrature.spectral_density(OPERATORS["uniform"](), **STANDARD | {"num_steps": 15})
    seen = density_of("uniform").truncate(num_steps=15)
    np.testing.assert_allclose(seen.nodes, few.nodes, atol=1e-5)
    np.testing.assert_allclose(seen.weights, few.weights, atol=1e-5)
    assert seen.num_matvecs == few.num_matvecs
    assert density_of("uniform").truncate(num_probes=3).nodes.shape == (3, 60)
    with pytest.raises(ValueError, match="there are 20 of 60"):
        seen = density_of("uniform").truncate(num_probes=21)


# ----------------------------------------------------------------------- breakdowns and precision


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("name", ["low rank", "two points"])
def test_no_node_lies_outside_the_spectrum_after_a_breakdown(name, reorthogonalize):
    found = density_of(name, reorthogonalize=reorthogonalize)
    values = VALUES[name]
    slack = 1e-5 * np.abs(values).max()
    assert found.nodes.min() > values.min() - slack
    assert found.nodes.max() < values.max() + slack
    np.testing.assert_allclose(found.weights.sum(1), 1, atol=1e-12)
    for i, count in enumerate(found.num_steps):
        assert (found.weights[i] > 0).sum() <= count
    # v^T A^p v is that of the probe, to rounding.
    start = np.asarray(probes.probes(OPERATORS[name](), KEY, 0, 20, "normal"), np.float64)
    start /= np.linalg.norm(start, axis=1, keepdims=True)
    for p in (1, 2, 3):
        exact = start**2 @ values**p
        seen = np.sum(found.weights * found.nodes**p, axis=1)
        np.testing.assert_allclose(seen, exact, atol=2e-6)
    if name == "two points":
        assert (found.num_steps == 2).all()
        assert found.exhausted.all()
        assert found.num_matvecs <= 20 * 8  # not all sixty


def test_the_scale_of_the_operator_does_not_matter():
    small = operator_of(1e-14 * VALUES["low rank"])
    one, other = density_of("low rank"), quadrature.spectral_density(small, **STANDARD)
    np.testing.assert_array_equal(one.num_steps, other.num_steps)
    np.testing.assert_allclose(other.nodes * 1e14, one.nodes, atol=1e-4)
    assert other.zero_mass().estimate == pytest.approx(one.zero_mass().estimate, abs=1e-5)
    assert other.zero_mass().estimate == pytest.approx(0.98, abs=0.01)
    assert other.curve.width == pytest.approx(1e-14 * one.curve.width, rel=1e-3)


def test_zero_operators_and_operators_of_one_row():
    zero = quadrature.spectral_density(
        krylov.from_matrix(np.zeros((5, 5), np.float32)), key=KEY, num_probes=3
    )
    assert not zero.nodes.any()
    assert zero.zero_mass().estimate == 1
    assert zero.curve.integral == pytest.approx(1, abs=0.01)
    single = quadrature.spectral_density(
        krylov.from_matrix(np.full((1, 1), 3, np.float32)), key=KEY, num_probes=2, num_steps=9
    )
    np.testing.assert_array_equal(single.nodes, 3)
    assert single.functional(np.log).estimate == pytest.approx(np.log(3))


def test_without_a_basis_the_moments_are_the_same():
    # A hundred steps on outliers and a bulk: orthogonality is lost, and nodes appear twice.
    values = np.r_[10, 9, 8, np.linspace(0, 1, 997)]
    operator = operator_of(values)
    options = STANDARD | {"num_steps": 100, "num_probes": 4, "block_size": 4}
    kept = quadrature.spectral_density(operator, reorthogonalize=True, **options)
    free = quadrature.spectral_density(operator, reorthogonalize=False, **options)
    assert not free.reorthogonalized
    assert (
        (np.abs(free.nodes[0] - 10) < 1e-4).sum() > 1 == (np.abs(kept.nodes[0] - 10) < 1e-4).sum()
    )
    for p in range(1, 5):
        a, b = kept.moments(4)[p].estimate, free.moments(4)[p].estimate
        assert abs(a - b) < 1e-4 * abs(a)


def test_without_a_basis_few_vectors_are_alive():
    n, m, peak = 200_000, 100, 0
    diagonal = jnp.linspace(0, 1, n)

    def product(v):
        nonlocal peak
        alive = [x.nbytes for x in jax.live_arrays() if x.size >= n]
        peak = max(peak, sum(alive) - before)
        return multiply(diagonal, v)

    multiply = jax.jit(lambda d, v: d * v)
    operator = krylov.Operator(product, diagonal)
    jax.block_until_ready(diagonal)
    before = sum(x.nbytes for x in jax.live_arrays() if x.size >= n)
    quadrature.spectral_density(
        operator, key=KEY, num_probes=1, num_steps=m, reorthogonalize=False
    )  # fmt: skip
    # Between steps the two vectors of the recurrence; the one before may still wait for its end.
    assert peak <= 3 * 4 * n
    # Within a step: these, the product, and what the compiled step takes besides.
    state = quadrature._init_one(jnp.ones(n), num_steps=m, reorthogonalize=False)
    rest = state._replace(previous=None, current=None, basis=None)
    args = (state.previous, state.current, None, rest, diagonal)
    cost = quadrature._step_one.lower(*args).compile().memory_analysis()
    step = cost.argument_size_in_bytes + cost.output_size_in_bytes - cost.alias_size_in_bytes
    step += cost.temp_size_in_bytes
    waiting = 4 * n  # the next product may be under way
    assert step + waiting < 6 * 4 * n
    # And to draw and to normalise the start vector.
    like = (jax.tree.structure(0), ((n,),), np.dtype(np.float32))
    draw = probes._draw.lower(KEY, np.uint32(0), distribution="normal", like=like).compile()
    draw = draw.memory_analysis()
    assert draw.output_size_in_bytes + draw.temp_size_in_bytes < 6 * 4 * n


def test_with_a_basis_a_step_makes_no_other():
    n, m = 100_000, 40
    vector = {"a": jnp.ones((200, 300)), "b": jnp.ones(n - 60_000)}
    state = quadrature._init_one(jax.tree.map(jnp.copy, vector), num_steps=m, reorthogonalize=True)
    rest = state._replace(previous=None, current=None, basis=None)
    args = (state.previous, state.current, state.basis, rest, vector)
    cost = quadrature._step_one.lower(*args).compile().memory_analysis()
    assert cost.alias_size_in_bytes >= (m + 2) * 4 * n
    assert cost.temp_size_in_bytes <= 6 * 4 * n


def test_half_precision_parameters_have_vectors_in_float32():
    like = tree.cast(jax.tree.map(jnp.asarray, two_leaves()), jnp.bfloat16)
    exact = tree.cast(like, jnp.float32)
    operator = krylov.Operator(lambda v: couple(exact, v), like)
    options = {"key": KEY, "num_probes": 2, "num_steps": 8}
    found = quadrature.spectral_density(operator, **options)
    plain = quadrature.spectral_density(coupled(exact), **options)
    np.testing.assert_allclose(found.nodes, plain.nodes, atol=1e-5)


# ------------------------------------------------------------------------------ inside jit and grad


def flat(stacked):
    return np.concatenate(
        [np.asarray(x, np.float64).reshape(len(x), -1) for x in jax.tree.leaves(stacked)], axis=1
    )


def test_the_tridiagonal_matrix_is_that_of_an_orthonormal_basis():
    d = two_leaves()
    v = jax.tree.map(lambda x: np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape), d)
    t = jax.jit(lambda d, v: quadrature.tridiagonalize(lambda u: couple(d, u), v, 12))(d, v)
    entries = flat(jax.tree.map(lambda x: x[None], d))[0]
    a = np.diag(entries) + np.outer(entries, entries)
    q, exact = flat(t.vectors), np.diag(t.alphas) + np.diag(t.betas, 1) + np.diag(t.betas, -1)
    eps, scale = float(jnp.finfo(jnp.float32).eps), np.abs(exact).max()
    np.testing.assert_allclose(q @ q.T, np.eye(12), atol=20 * eps)
    np.testing.assert_allclose(q @ a @ q.T, exact, atol=100 * eps * scale)
    rest = np.linalg.norm(q @ a - exact @ q, axis=1)
    np.testing.assert_allclose(rest[:-1], 0, atol=100 * eps * scale)
    assert rest[-1] == pytest.approx(float(t.residual), rel=1e-3)
    assert int(t.num_steps) == 12
    assert float(t.norm) == pytest.approx(np.linalg.norm(flat(tree.stack([v]))), rel=1e-6)
    assert float(t.asymmetry) < 100 * eps


def smooth_matrix(theta):
    b = jnp.sin(jnp.arange(36, dtype=theta["x"].dtype).reshape(6, 6) ** 2 * theta["x"])
    return b @ b.T + theta["y"] * jnp.eye(6, dtype=theta["x"].dtype)


def dense_form(theta, scale, v):
    values, vectors = jnp.linalg.eigh(smooth_matrix(theta))
    return jnp.sum((vectors.T @ v) ** 2 * jnp.log(scale * values))


def lanczos_form(theta, scale, v, reorthogonalize=True, num_steps=6):
    a = smooth_matrix(theta)
    return quadrature.quadratic_form(
        lambda x: jnp.log(scale * x), lambda u: a @ u, v, num_steps,
        reorthogonalize=reorthogonalize,
    )  # fmt: skip


def test_the_gradient_of_a_quadratic_form_is_the_dense_one():
    dtype = jnp.float64
    with jax.enable_x64(True):
        theta = {"x": jnp.asarray(0.7, dtype), "y": jnp.asarray(0.5, dtype)}
        args = (theta, jnp.asarray(1.5, dtype), jnp.arange(1, 7, dtype=dtype))
        exact = jax.value_and_grad(dense_form, argnums=(0, 1, 2))(*args)
        ours = jax.jit(jax.value_and_grad(lanczos_form, argnums=(0, 1, 2)))(*args)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4)


def test_the_gradient_is_finite_where_eigenvalues_coincide_and_after_a_breakdown():
    d = jnp.array([1.0, 2.0, 2.0, 3.0])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def value(d):
        t = quadrature.tridiagonalize(lambda v: d * v, jnp.ones(4), 6)
        return quadrature.quadratic_form(jnp.log, lambda v: d * v, jnp.ones(4), 6), t

    (found, t), gradient = value(d)
    assert int(t.num_steps) == 3
    nodes = np.linalg.eigvalsh(np.diag(t.alphas) + np.diag(t.betas, 1) + np.diag(t.betas, -1))
    assert nodes.min() > 1 - 1e-5
    assert nodes.max() < 3 + 1e-5  # also those that have no weight
    np.testing.assert_allclose(found, jnp.sum(jnp.log(d)), rtol=1e-5)
    np.testing.assert_allclose(gradient, 1 / d, rtol=1e-4)


def test_a_map_over_checkpoints_equals_a_loop():
    thetas = {"x": jnp.linspace(0.7, 1.1, 5), "y": jnp.linspace(0.4, 0.8, 5)}
    v = jnp.arange(1.0, 7.0)

    def run(theta):
        a = smooth_matrix(theta)
        t = quadrature.tridiagonalize(lambda u: a @ u, v, 4)
        return t.alphas, t.betas

    together = jax.jit(jax.vmap(run))(thetas)
    alone = [jax.jit(run)(theta) for theta in tree.unstack(thetas)]
    for i, one in enumerate(alone):
        for a, b in zip(jax.tree.map(lambda x, i=i: x[i], together), one, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


# ------------------------------------------------------------------- blocks, compiling and resuming


def test_probes_depend_on_their_number_and_key_alone():
    operator = coupled(two_leaves())
    whole = flat(probes.probes(operator, KEY, 0, 20, "sphere"))
    part = flat(probes.probes(operator, KEY, 2, 5, "sphere"))
    np.testing.assert_allclose(whole[2:5], part, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), np.sqrt(52), rtol=1e-6)
    every = [probes.probes(operator, jax.random.key(s), 0, 6, "sphere")["bias"] for s in range(3)]
    rows = np.concatenate(every)
    assert len(np.unique(rows.round(6), axis=0)) == len(rows)


def test_blocks_give_the_same_measure_and_the_product_is_traced_once():
    diagonal = jax.tree.map(jnp.asarray, two_leaves())
    traces = []

    @jax.jit
    def product(d, v):
        traces.append(1)
        return couple(d, v)

    one = krylov.Operator(lambda v: product(diagonal, v), diagonal)
    options = {"key": KEY, "num_probes": 5, "num_steps": 8}
    alone = quadrature.spectral_density(one, **options)
    assert len(traces) == 1
    together = quadrature.spectral_density(coupled(diagonal), block_size=2, **options)
    assert together.num_matvecs == alone.num_matvecs == 40
    np.testing.assert_allclose(together.nodes, alone.nodes, atol=1e-5)
    np.testing.assert_allclose(together.weights, alone.weights, atol=1e-5)


class Memory:
    """A checkpointer on the host, and one that stops the run after a save."""

    location = "memory"

    def __init__(self, every, stop=None):
        self.every, self.stop, self.saved = every, stop, {}

    def latest(self):
        return max(self.saved, default=None)

    def save(self, step, state, metadata=None):
        self.saved[step] = (jax.tree.map(np.array, state), metadata)
        if self.stop is not None and step >= self.stop:
            self.stop = None
            raise KeyboardInterrupt

    def restore(self, like, step=None):
        bits, metadata = self.saved[self.latest() if step is None else step]
        tree.check_same(like, bits, names=("like", "saved"))
        return jax.tree.map(jnp.asarray, bits), metadata


def same_bits(a, b):
    assert a.nodes.tobytes() == b.nodes.tobytes()
    assert a.weights.tobytes() == b.weights.tobytes()
    assert a.num_matvecs == b.num_matvecs
    assert a.curve.values.tobytes() == b.curve.values.tobytes()


@pytest.mark.parametrize("stop", [3, 8, 21, 24])
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_a_run_stopped_and_resumed_has_the_bits_of_the_uninterrupted_one(stop, reorthogonalize):
    operator = coupled(jax.tree.map(jnp.asarray, two_leaves()))
    options = {"key": KEY, "num_probes": 5, "num_steps": 8, "block_size": 2,
               "reorthogonalize": reorthogonalize}  # fmt: skip
    whole = quadrature.spectral_density(operator, **options)
    memory = Memory(every=1, stop=stop)
    with pytest.raises(KeyboardInterrupt):
        quadrature.spectral_density(operator, checkpoint=memory, **options)
    assert memory.latest() == stop
    same_bits(quadrature.spectral_density(operator, checkpoint=memory, **options), whole)
    # A finished run is read back without a product.
    same_bits(quadrature.spectral_density(operator, checkpoint=memory, **options), whole)
    with pytest.raises(ValueError, match="of another run: its key is"):
        quadrature.spectral_density(
            operator, checkpoint=memory, **options | {"key": jax.random.key(7)}
        )
    with pytest.raises(ValueError, match="of another run, or damaged.*Use the same arguments"):
        quadrature.spectral_density(operator, checkpoint=memory, **options | {"num_probes": 6})


def test_a_run_resumes_from_checkpoints_on_disk(tmp_path):
    diagonal = jax.tree.map(jnp.asarray, two_leaves())
    options = {"key": KEY, "num_probes": 3, "num_steps": 8, "block_size": 2}
    whole = quadrature.spectral_density(coupled(diagonal), **options)
    calls = []

    def failing(vs):
        calls.append(1)
        if len(calls) == 7:
            raise RuntimeError("the machine went away")
        return couple_many(diagonal, vs)

    broken = krylov.Operator(lambda v: couple(diagonal, v), diagonal, matmat=failing)
    saves = checkpoint.Checkpointer(tmp_path, every=5)
    with pytest.raises(RuntimeError, match="went away"):
        quadrature.spectral_density(broken, checkpoint=saves, **options)
    assert saves.latest() == 5
    same_bits(quadrature.spectral_density(coupled(diagonal), checkpoint=saves, **options), whole)


# ------------------------------------------------------------------------------------------ meshes


def known_pairs():
    values, vectors = np.linalg.eigh(krylov.dense(coupled(two_leaves())).astype(np.float64))
    top = {"kernel": vectors[4:, -2:].T.reshape(2, 8, 6), "bias": vectors[:4, -2:].T}
    return values[-2:], jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), top)


ON_MESH = {"key": KEY, "num_probes": 2, "num_steps": 8, "block_size": 2}


@functools.cache
def on_one_device():
    operator = coupled(two_leaves())
    return {
        True: quadrature.spectral_density(operator, deflate=known_pairs(), **ON_MESH),
        False: quadrature.spectral_density(operator, reorthogonalize=False, **ON_MESH),
    }


def test_sharded_parameters_give_the_density_of_one_device(mesh):
    host, (values, top), plain = two_leaves(), known_pairs(), on_one_device()
    specs = {"kernel": P("data", "model"), "bias": P("model")}
    params = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), host, specs)
    placed = jax.tree.map(
        lambda x, s: jax.device_put(x, NamedSharding(mesh, P(None, *s))), top, specs
    )
    with jax.set_mesh(mesh):
        for reorthogonalize, want in plain.items():
            found = quadrature.spectral_density(
                coupled(params), deflate=(values, placed) if reorthogonalize else None,
                reorthogonalize=reorthogonalize, **ON_MESH,
            )  # fmt: skip
            if reorthogonalize:
                np.testing.assert_allclose(found.nodes, want.nodes, atol=1e-5 * values[-1])
                np.testing.assert_allclose(found.weights, want.weights, atol=1e-4)
            # Without a basis rounding decides how an eigenvalue is split; sums are the same.
            for a, b in zip(found.moments(4), want.moments(4), strict=True):
                assert a.estimate == pytest.approx(b.estimate, rel=1e-5)
        run = jax.jit(lambda d: quadrature.tridiagonalize(lambda v: couple(d, v), d, 3).vectors)
        basis = run(params)
    for leaf, spec in zip(jax.tree.leaves(basis), (specs["bias"], specs["kernel"]), strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P(None, *spec)), leaf.ndim)


# ---------------------------------------------------------------------------- warnings and refusals


def test_what_lies_off_the_grid_or_between_its_points_is_a_warning():
    found = density_of("uniform")
    with pytest.warns(UserWarning, match=r"of the mass, lie off the grid \[0, 0.5\]"):
        curve = found.density(np.linspace(0, 0.5, 200))
    assert curve.integral == pytest.approx(0.5, abs=0.05)  # not renormalised
    with pytest.warns(UserWarning, match="too coarse for a width of 0.001"):
        found.density(np.linspace(-0.1, 1.1, 40), width=1e-3)


def test_products_of_no_symmetric_or_constant_matrix_are_noticed():
    r = np.random.default_rng(0)
    a = jnp.asarray(r.normal(size=(40, 40)), jnp.float32)
    operator = krylov.Operator(lambda v: a @ v, jnp.zeros(40), name="one-sided")
    with pytest.warns(UserWarning, match="of one-sided are those of no symmetric matrix"):
        quadrature.spectral_density(
            operator, key=KEY, num_probes=1, num_steps=10, reorthogonalize=False
        )
    symmetric = a + a.T

    def dropped(v):
        return (symmetric * jnp.asarray(r.uniform(size=(40, 40)) < 0.5, jnp.float32)) @ v

    operator = krylov.Operator(dropped, jnp.zeros(40))
    with pytest.warns(UserWarning, match="Is something in it random"):
        quadrature.spectral_density(operator, key=KEY, num_probes=1, num_steps=10)
    nothing = krylov.Operator(lambda v: v * np.float32(np.nan), jnp.zeros(40), name="broken")
    with pytest.raises(FloatingPointError, match="a product of broken is NaN"):
        quadrature.spectral_density(nothing, key=KEY, num_probes=1, num_steps=10)


def pairs(values, vectors, converged):
    k = len(values)
    zeros = np.zeros(k)
    return Eigenpairs(
        values, vectors, zeros, np.zeros((k, 2)), zeros, np.asarray(converged),
        ("converged",) * k, 0, True, 0.0, {},
    )  # fmt: skip


def test_pairs_that_have_not_converged_are_left_to_the_quadrature():
    values = np.r_[100, 50, np.linspace(0, 1, 38)]
    a, vectors = matrix_of(values)
    operator = krylov.from_matrix(a.astype(np.float32))
    wrong = np.stack([vectors[0], (vectors[1] + vectors[2]) / np.sqrt(2)])
    given = pairs(np.array([100.0, 25.5]), jnp.asarray(wrong, jnp.float32), [True, False])
    with pytest.warns(UserWarning, match="1 of 2 pairs have not converged"):
        found = quadrature.spectral_density(operator, key=KEY, num_probes=8, deflate=given)
    assert found.deflated.tolist() == [100.0]
    assert found.nodes.max() == pytest.approx(50, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"stochastic": True}, ValueError, "matrix is stochastic; Lanczos needs the same operator"),
        ({"symmetric": False}, ValueError, "matrix is not symmetric; expected a symmetric"),
        ({"key": 0}, TypeError, "expected one typed key"),
        ({"num_probes": 0}, ValueError, "num_probes is 0; expected an integer of at least 1"),
        ({"num_steps": 2.5}, ValueError, "num_steps is 2.5"),
        ({"block_size": 0}, ValueError, "block_size is 0"),
        ({"confidence": 95}, ValueError, "confidence is 95; expected a probability"),
        ({"axis": "sqrt"}, ValueError, "axis is 'sqrt'; expected 'linear', 'log' or 'symlog'"),
        ({"width": -1.0}, ValueError, "width is -1.0"),
        ({"width": 0.0}, ValueError, "width is 0"),
        ({"axis": "log", "epsilon": 0.0}, ValueError, "epsilon is 0.0"),
        ({"grid": [1.0, 0.0]}, ValueError, "ascending positions"),
        ({"grid": [-1.0, 1.0], "axis": "log"}, ValueError, "positive magnitudes"),
        ({"deflate": np.ones(3)}, TypeError, "deflate is a ndarray; expected the `Eigenpairs`"),
        ({"deflate": (np.ones(2), np.ones((1, 6), np.float32))}, ValueError, r"expected \(1,\)"),
        ({"deflate": (np.ones(1), np.ones((1, 5), np.float32))}, ValueError, "must agree"),
        ({"deflate": (np.ones(2), np.ones((2, 6), np.float32))}, ValueError, "not orthonormal"),
        ({"deflate": (np.ones(1), np.eye(1, 6, dtype=np.float32))}, ValueError,
         "pair 0 with value 1 is no eigenpair"),
    ],
)  # fmt: skip
def test_what_cannot_be_estimated_is_refused_in_a_sentence(change, kind, says):
    base = krylov.from_matrix(np.diag(np.arange(2.0, 8)).astype(np.float32))
    marks = {k: change[k] for k in ("stochastic", "symmetric") if k in change}
    operator = krylov.Operator(base.matvec, base.like, name="matrix", **marks)
    options = {"key": KEY, "num_probes": 2, "num_steps": 3} | change
    for mark in marks:
        del options[mark]
    with pytest.raises(kind, match=says):
        quadrature.spectral_density(operator, **options)


# ------------------------------------------------------------------------------------------ figures


def test_the_figure_of_a_density_has_its_band_and_its_stems():
    matplotlib = pytest.importorskip("matplotlib")
    n, k = 1000, 3
    values = np.r_[[30.0, 20.0, 10.0], np.linspace(-1, 1, n - k)]
    found = quadrature.spectral_density(
        operator_of(values), **STANDARD, deflate=(values[:k], jnp.eye(k, n))
    )
    figure = plot.density(found)
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    stems = [c for c in axes.collections if isinstance(c, matplotlib.collections.LineCollection)]
    places = sorted(segment[0][0] for segment in stems[0].get_segments())
    np.testing.assert_allclose(places, [10, 20, 30])
    heights = {round(float(segment[1][1]), 9) for segment in stems[0].get_segments()}
    single = 1 / (n * found.curve.width * np.sqrt(2 * np.pi))
    assert heights == {round(single, 9)}
    line = axes.lines[0]
    at_bulk = np.abs(line.get_xdata()) < 0.5
    np.testing.assert_allclose(line.get_ydata()[at_bulk], 0.5 * (1 - k / n), rtol=0.4)
    assert line.get_ydata()[np.abs(line.get_xdata() - 20) < 0.1].max() < 0.01 * single  # no bump
    bands = [c for c in axes.collections if c not in stems]
    assert len(bands) == 1
    both = {axis: found.density(axis=axis) for axis in ("log", "symlog")}
    figure = plot.density([{"lines": {"a": c, "b": c}, "title": t} for t, c in both.items()])
    assert figure.axes[0].get_xscale() == "log"
    assert "0" in [tick.get_text() for tick in figure.axes[1].get_xticklabels()]
    assert figure.axes[0].get_legend() is not None
    picture = plot.png(figure)
    assert picture.startswith(b"\x89PNG")
    assert len(io.BytesIO(picture).getvalue()) > 10_000
    with pytest.raises(ValueError, match="expected curves on one axis"):
        plot.density([{"lines": both}])
    alone = plot.density(found.truncate(num_probes=1))  # no band, no failure
    assert len(alone.axes[0].collections) == 1


def test_results_and_their_parts_say_what_they_are():
    found = density_of("uniform")
    assert repr(found) == (
        "SpectralDensity(size=1000, 20 probes of 60 steps, 0 deflated, 1200 products)"
    )
    assert "±" in repr(found.mass(0, 0.5))
    assert isinstance(quadrature, types.ModuleType)
