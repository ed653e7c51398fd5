"""Traces, diagonals and norms: exact identities, honest errors, adaptive stops, resume, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import checkpoint, krylov, tree
from geojax.krylov import estimators, probes
from geojax.krylov._leave_one_out import jackknife, xnystrace_estimates, xtrace_estimates

KEY = jax.random.key(0)
METHODS = ("hutchinson", "hutch++", "xtrace", "xnystrace")
# Counts with sketches of eight rows, so that most tests share their compiled kernels.
COUNTS = {"xtrace": 16, "xdiag": 16, "xnystrace": 8}
MANY = {"key": KEY, "num_matvecs": 4000, "block_size": 2000}


def few(method="hutchinson", **options):
    return {"key": KEY, "num_matvecs": COUNTS.get(method, 24), "block_size": 8} | options


def matrix_of(values, seed=0):
    r = np.random.default_rng(seed)
    q, _ = np.linalg.qr(r.normal(size=(len(values), len(values))))
    return (q * values) @ q.T


def like():
    return {"kernel": jnp.zeros((8, 6)), "bias": jnp.zeros(4)}


def unflatten(x):
    """Flat rows in the order of the leaves, as stacked pytrees: the bias comes first."""
    return {"bias": x[..., :4], "kernel": x[..., 4:].reshape(*x.shape[:-1], 8, 6)}


def flatten(v):
    lead = v["bias"].shape[:-1]
    return jnp.concatenate([v["bias"], v["kernel"].reshape(*lead, 48)], axis=-1)


@jax.jit
def products(a, vs):
    return unflatten(jnp.matmul(flatten(vs), a, precision="highest"))


def on_leaves(a, **marks):
    """The operator of a symmetric (52, 52) matrix on two leaves of different shapes."""
    a = jnp.asarray(a, jnp.float32)
    return krylov.Operator(
        lambda v: products(a, v), like(), matmat=lambda vs: products(a, vs), **marks
    )


DECAYING = matrix_of(0.8 ** np.arange(52))
INDEFINITE = matrix_of(np.r_[10, -6, np.linspace(-1, 1, 50)], seed=1)


# ------------------------------------------------------------------------------- closed identities


@functools.cache
def sketch_case():
    """A small operator, and NumPy's products with the probes that the estimators draw."""
    with jax.enable_x64(True):
        a = matrix_of(0.8 ** np.arange(30))
        operator = krylov.from_matrix(a, psd=True)
        omega = {
            kind: np.asarray(probes.probes(operator, KEY, 0, 8, kind)).T
            for kind in ("sphere", "rademacher")
        }
    return a, operator, omega


def left_out(a, omega, i, dropped, method):
    """The estimate of probe i with the sketch of all but `dropped`, from the definition."""
    n = len(a)
    rest = np.delete(omega, dropped, axis=1)
    v = omega[:, i]
    if method == "xtrace":
        q, _ = np.linalg.qr(a @ rest)
        left = v - q @ (q.T @ v)
        radius = (n - rest.shape[1]) / (left @ left)
        return np.trace(q.T @ a @ q) + radius * (left @ a @ left)
    if method == "xnystrace":
        y = a @ rest
        nystrom = y @ np.linalg.solve(rest.T @ y, y.T)
        left = v - rest @ np.linalg.lstsq(rest, v)[0]
        radius = (n - rest.shape[1]) / (left @ left)
        return np.trace(nystrom) + radius * (v @ (a - nystrom) @ v)
    q, _ = np.linalg.qr(a @ rest)
    image = a @ v
    return np.einsum("ij,ij->i", q, a @ q) + v * (image - q @ (q.T @ image))


@pytest.mark.parametrize("method", ["xtrace", "xnystrace", "xdiag"])
def test_the_leave_one_out_estimates_and_their_jackknife_are_those_of_the_definition(method):
    a, operator, omega = sketch_case()
    kind = omega["rademacher" if method == "xdiag" else "sphere"]
    m = kind.shape[1]
    one = np.array([left_out(a, kind, i, [i], method) for i in range(m)])
    without = [
        np.mean([left_out(a, kind, i, [i, j], method) for i in range(m) if i != j], axis=0)
        for j in range(m)
    ]
    error = np.sqrt(np.sum((without - np.mean(without, axis=0)) ** 2, axis=0))
    with jax.enable_x64(True):
        if method == "xdiag":
            found = estimators.diagonal(operator, key=KEY, method="xdiag", num_matvecs=16,
                                        block_size=3)  # fmt: skip
        else:
            found = estimators.trace(
                operator, key=KEY, method=method, num_matvecs=16 if method == "xtrace" else 8,
                block_size=3,
            )  # fmt: skip
            np.testing.assert_allclose(found.samples, one, rtol=1e-9)
        np.testing.assert_allclose(found.estimate, one.mean(0), rtol=1e-9)
        np.testing.assert_allclose(found.standard_error, error, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_no_number_has_to_divide_the_products(method):
    asked = {"hutch++": 26, "xtrace": 17}.get(method, 25)
    options = few(num_matvecs=asked)
    found = estimators.trace(on_leaves(DECAYING, psd=True), method=method, **options)
    exact = np.trace(DECAYING)
    assert found.num_matvecs == (16 if method == "xtrace" else asked)
    assert abs(found.estimate - exact) < 4 * found.standard_error
    assert found.samples.mean() == pytest.approx(found.estimate)
    assert found.interval[0] < found.estimate < found.interval[1]
    assert found.converged
    assert "±" in repr(found)


def test_with_as_many_products_as_rows_the_sketches_are_exact():
    operator = on_leaves(DECAYING, psd=True)
    for method in METHODS[1:]:
        found = estimators.trace(operator, key=KEY, method=method, num_matvecs=60, block_size=52)
        assert found.method == "exact"
        assert found.num_matvecs == 52
        assert found.estimate == pytest.approx(np.trace(DECAYING), rel=1e-6)
        assert found.standard_error < 1e-6
    whole = estimators.diagonal(operator, key=KEY, method="xdiag", num_matvecs=52, block_size=52)
    np.testing.assert_allclose(flatten(whole.estimate), np.diag(DECAYING), atol=1e-6)
    assert whole.method == "exact"


# -------------------------------------------------------------------------------------- the errors


def test_three_standard_errors_of_hutchinson_cover_the_trace():
    # Two hundred runs of fifty probes, drawn in one.
    operator = on_leaves(INDEFINITE)
    found = estimators.trace(operator, key=KEY, num_matvecs=10_000, block_size=2000)
    exact = np.trace(INDEFINITE)
    runs = [probes.mean_estimate(x, 0.95, 50) for x in found.samples.reshape(200, 50)]
    z = np.array([(run.estimate - exact) / run.standard_error for run in runs])
    assert np.mean(np.abs(z) < 3) >= 0.99
    assert 0.8 < z.std() < 1.2
    inside = [run.interval[0] <= exact <= run.interval[1] for run in runs]
    assert 0.9 <= np.mean(inside) <= 0.99
    # And their spread is the one of theory: twice the squared off-diagonal entries.
    theory = np.sqrt(2 * (np.sum(INDEFINITE**2) - np.sum(np.diag(INDEFINITE) ** 2)))
    assert found.samples.std() == pytest.approx(theory, rel=0.05)


def test_three_standard_errors_of_the_sketches_cover_the_trace():
    # The estimators' own algebra, fed by NumPy: two hundred seeds each.
    values = 0.9 ** np.arange(120)
    n, m = len(values), 12
    z = {"xtrace": [], "xnystrace": [], "as the papers": []}
    for seed in range(200):
        omega = np.random.default_rng(seed).normal(size=(n, m))
        omega *= np.sqrt(n) / np.linalg.norm(omega, axis=0)
        y = values[:, None] * omega
        q, r = np.linalg.qr(y)
        q, r = q * np.sign(np.diag(r)), r * np.sign(np.diag(r))[:, None]
        h = q.T @ (values[:, None] * q)
        one, pairs = xtrace_estimates(n, r, h, q.T @ omega, np.sum(omega * y, 0))
        error = one.mean() - values.sum()
        z["xtrace"].append(error / jackknife(pairs))
        z["as the papers"].append(error / (one.std(ddof=1) / np.sqrt(m)))
        upper = np.linalg.cholesky(omega.T @ y).T
        one, pairs, _ = xnystrace_estimates(n, upper, r, omega.T @ omega)
        z["xnystrace"].append((one.mean() - values.sum()) / jackknife(pairs))
    covered = {name: np.mean(np.abs(x) < 3) for name, x in z.items()}
    assert covered["xtrace"] >= 0.99
    assert covered["xnystrace"] >= 0.99
    assert covered["as the papers"] < 0.97  # why it is not their error that we give


def test_three_standard_errors_of_hutch_plus_plus_cover_and_it_beats_hutchinson():
    values = np.r_[10, 8, 6, 5, 4, np.linspace(0.5, 1, 195)]
    operator = krylov.from_matrix(matrix_of(values).astype(np.float32))
    z, gaps = [], {"hutch++": [], "hutchinson": []}
    for seed in range(200):
        for method, errors in gaps.items():
            if method == "hutch++" or seed < 30:
                found = estimators.trace(
                    operator, key=jax.random.key(seed), method=method, num_matvecs=104,
                    block_size=36,
                )  # fmt: skip
                errors.append(found.estimate - values.sum())
                if method == "hutch++":
                    z.append(errors[-1] / found.standard_error)
    assert np.mean(np.abs(z) < 3) >= 0.99
    assert 0.8 < np.std(z) < 1.2
    sizes = {method: np.mean(np.abs(errors[:30])) for method, errors in gaps.items()}
    assert sizes["hutch++"] < 0.7 * sizes["hutchinson"]


def test_xtrace_is_precise_where_the_spectrum_decays():
    values = 0.7 ** np.arange(1000.0)
    with jax.enable_x64(True):
        d = jnp.asarray(values)
        operator = krylov.Operator(
            functools.partial(multiply, d), d, matmat=functools.partial(multiply_many, d), psd=True
        )
        gaps = []
        for seed in range(5):
            found = estimators.trace(operator, key=jax.random.key(seed), method="xtrace",
                                     num_matvecs=70, block_size=35)  # fmt: skip
            gaps.append(abs(found.estimate - values.sum()) / values.sum())
            assert abs(found.estimate - values.sum()) < 3 * found.standard_error
    assert np.mean(gaps) < 1e-5


multiply = jax.jit(lambda d, v: d * v)
multiply_many = jax.jit(lambda d, vs: d[None] * vs)


def diagonal_operator(values, **marks):
    d = jnp.asarray(values, jnp.float32)
    return krylov.Operator(
        lambda v: multiply(d, v), d, matmat=lambda vs: multiply_many(d, vs), **marks
    )


# ---------------------------------------------------------------------------------- layer by layer


def test_one_set_of_probes_gives_the_trace_of_every_layer():
    found = estimators.trace(on_leaves(INDEFINITE), **MANY,
                             per_leaf=True)  # fmt: skip
    diagonal = np.diag(INDEFINITE)
    exact = {"['bias']": diagonal[:4].sum(), "['kernel']": diagonal[4:].sum()}
    assert set(found.groups) == set(exact)
    for path, layer in found.groups.items():
        assert abs(layer.estimate - exact[path]) < 3 * layer.standard_error
        assert layer.interval[0] < exact[path] < layer.interval[1]
    assert sum(x.estimate for x in found.groups.values()) == pytest.approx(found.estimate)
    assert found.num_matvecs == 4000
    named = estimators.trace(
        on_leaves(INDEFINITE), **MANY,
        groups=lambda path: "all biases" if "bias" in path else None,
    )  # fmt: skip
    assert list(named.groups) == ["all biases"]
    assert named.groups["all biases"].estimate == found.groups["['bias']"].estimate
    assert named.table()[0]["group"] == "all biases"
    with pytest.raises(ValueError, match=r"no leaf is in a group; the paths are \['bias'\]"):
        estimators.trace(on_leaves(INDEFINITE), key=KEY, groups=lambda path: None)


# ----------------------------------------------------------------------------------- adaptive stop


def test_the_half_width_asked_for_is_met_where_pyhessians_rule_is_wrong():
    values = np.r_[np.linspace(0, 1, 48), 5, 4.9, 4.8, -4.95]
    a = matrix_of(values, seed=3)
    exact = values.sum()
    operator = on_leaves(a)
    rtol, runs, met, theirs, used = 0.05, 120, [], [], []
    for seed in range(runs):
        found = estimators.trace(
            operator, key=jax.random.key(seed), rtol=rtol, num_matvecs=2000, block_size=48
        )
        assert found.converged
        half = (found.interval[1] - found.interval[0]) / 2
        assert half <= rtol * abs(found.estimate)
        met.append(abs(found.estimate - exact) <= rtol * exact)
        used.append(found.num_matvecs)
        # PyHessian stops once the running mean moves by less than its tolerance.
        means = np.cumsum(found.samples) / np.arange(1, len(found.samples) + 1)
        moved = np.abs(np.diff(means)) / (np.abs(means[:-1]) + 1e-6) < 1e-3
        stop = int(np.argmax(moved)) + 1 if moved.any() else len(means) - 1
        theirs.append(abs(means[stop] - exact) <= rtol * exact)
    assert np.mean(met) >= 0.95
    assert np.mean(theirs) < 0.8  # and it asked for a fiftieth of this tolerance
    # Not by wasting products: what a known variance would have needed, and a good half more.
    spread = np.sqrt(2 * (np.sum(a**2) - np.sum(np.diag(a) ** 2)))
    needed = (1.96 * spread / (rtol * exact)) ** 2
    assert np.mean(used) < 1.6 * needed + 48


def test_a_tolerance_out_of_reach_is_told():
    operator = on_leaves(INDEFINITE)
    with pytest.warns(UserWarning, match="after 64 products, and ± 0.001 was asked for"):
        found = estimators.trace(operator, key=KEY, atol=1e-3, num_matvecs=64, block_size=8)
    assert not found.converged
    assert found.num_matvecs == 64
    assert "tolerance not met" in repr(found)
    easy = estimators.trace(operator, key=KEY, atol=1e3, num_matvecs=64, block_size=8)
    assert easy.converged
    assert easy.num_matvecs == 24  # the least that tells its spread


# ------------------------------------------------------------------------------ diagonal and norms


def test_the_diagonal_comes_with_its_errors():
    r = np.random.default_rng(0)
    a = np.diag(r.uniform(1, 2, 52)) + 0.1 * matrix_of(np.linspace(-1, 1, 52))
    found = estimators.diagonal(on_leaves(a), **MANY)
    exact = np.diag(a)
    gap = np.abs(flatten(found.estimate) - exact)
    assert gap.max() < 2e-2 * exact.max()
    error = np.asarray(flatten(found.standard_error))
    assert (gap < 4 * error).all()
    off = np.sqrt(np.sum(a**2, axis=1) - exact**2)
    np.testing.assert_allclose(error, off / np.sqrt(4000), rtol=0.1)
    steep = matrix_of(0.6 ** np.arange(52))
    sketched = estimators.diagonal(on_leaves(steep), method="xdiag", **few(num_matvecs=32))
    gap = np.abs(flatten(sketched.estimate) - np.diag(steep))
    assert gap.max() < 3e-2 * np.diag(steep).max()
    assert (gap < 4 * np.asarray(flatten(sketched.standard_error)) + 1e-6).all()
    assert sketched.num_matvecs == 32
    plain = estimators.diagonal(on_leaves(steep), **few(num_matvecs=32))
    assert np.abs(flatten(plain.estimate) - np.diag(steep)).max() > 5 * gap.max()


def test_norms_and_effective_rank_come_with_their_errors():
    operator, a = on_leaves(INDEFINITE), INDEFINITE
    norm = estimators.frobenius_norm(operator, key=KEY, num_matvecs=10_000, block_size=2000)
    exact = np.linalg.norm(a)
    assert norm.estimate == pytest.approx(exact, rel=0.01)
    assert abs(norm.estimate - exact) < 3 * norm.standard_error
    assert norm.interval[0] < norm.estimate < norm.interval[1]
    rank = estimators.effective_rank(operator, key=KEY, num_matvecs=10_000, block_size=2000)
    exact = np.trace(a) ** 2 / np.sum(a**2)
    assert abs(rank.estimate - exact) < 3 * rank.standard_error
    # Small samples: the ratio's bias is the jackknife's to remove, and its error is honest.
    projection = matrix_of(np.r_[np.ones(7), np.zeros(45)])
    few = [
        estimators.effective_rank(
            on_leaves(projection), key=jax.random.key(s), num_matvecs=48, block_size=48
        )
        for s in range(40)
    ]
    z = np.array([(x.estimate - 7) / x.standard_error for x in few])
    assert abs(z.mean()) < 0.6
    assert np.mean(np.abs(z) < 3) >= 0.95
    rows = estimators.row_norms(operator, **MANY)
    gap = np.abs(flatten(rows.estimate) - np.linalg.norm(a, axis=1))
    assert (gap < 4 * np.asarray(flatten(rows.standard_error))).all()
    assert gap.max() < 0.05 * np.linalg.norm(a, axis=1).max()


# ---------------------------------------------------------------------------------- hard operators


@pytest.mark.parametrize("method", METHODS)
def test_deficient_zero_and_tiny_operators_give_finite_truthful_numbers(method):
    low = matrix_of(np.r_[3.0, 2.0, np.zeros(50)])
    for scale in (1.0, 1e-14):
        found = estimators.trace(on_leaves(scale * low, psd=True), method=method, **few(method))
        assert np.isfinite(found.standard_error)
        assert abs(found.estimate - 5 * scale) < 4 * found.standard_error
        if method != "hutchinson":
            assert found.estimate == pytest.approx(5 * scale, rel=2e-5)
            assert found.standard_error < 1e-3 * scale
    zero = estimators.trace(on_leaves(np.zeros((52, 52)), psd=True), method=method, **few(method))
    assert zero.estimate == 0
    assert zero.standard_error == 0
    single = estimators.trace(diagonal_operator([3.0], psd=True), key=KEY, method=method,
                              num_matvecs=8, block_size=8)  # fmt: skip
    assert single.estimate == pytest.approx(3, rel=1e-6)


def test_the_other_estimators_on_deficient_zero_and_tiny_operators():
    low = matrix_of(np.r_[3.0, 2.0, np.zeros(50)])
    exact = np.diag(low)
    for scale in (1.0, 1e-14, 1e-25):
        operator = on_leaves(scale * low)
        found = estimators.diagonal(operator, method="xdiag", **few("xdiag"))  # fmt: skip
        gap = np.abs(flatten(found.estimate) / scale - exact)
        assert gap.max() < 1e-5
        assert (np.asarray(flatten(found.standard_error)) / scale < 1e-3).all()
        norm = estimators.frobenius_norm(operator, **few())
        assert norm.estimate / scale == pytest.approx(np.sqrt(13), rel=0.5)
        rows = estimators.row_norms(operator, **few())
        sizes = np.asarray(flatten(rows.estimate)) / scale
        np.testing.assert_allclose(sizes, np.linalg.norm(low, axis=1), atol=0.8)
        assert sizes.max() > 0.3
        plain = estimators.diagonal(operator, **few())
        error = np.asarray(flatten(plain.standard_error)) / scale
        assert error.min() > 1e-4
    nothing = on_leaves(np.zeros((52, 52)))
    assert estimators.frobenius_norm(nothing, **few()).estimate == 0
    assert not flatten(estimators.row_norms(nothing, **few()).estimate).any()
    with pytest.raises(ValueError, match="all products of operator are zero"):
        estimators.effective_rank(nothing, **few())


def test_half_precision_parameters_and_stochastic_operators():
    a = jnp.asarray(INDEFINITE, jnp.float32)
    half = krylov.Operator(
        lambda v: products(a, v), tree.cast(like(), jnp.bfloat16), matmat=lambda v: products(a, v)
    )
    options = few()
    found = estimators.trace(half, **options)
    assert found.estimate == pytest.approx(estimators.trace(on_leaves(a), **options).estimate)
    assert estimators.diagonal(half, **options).estimate["bias"].dtype == jnp.float32
    r = np.random.default_rng(0)

    def noisy(vs):
        return products(a + jnp.asarray(r.normal(size=(52, 52)), jnp.float32), vs)

    fresh = krylov.Operator(noisy, like(), matmat=noisy, stochastic=True, name="fresh")
    exact = np.trace(INDEFINITE)
    found = estimators.trace(fresh, key=KEY, num_matvecs=400, block_size=8)
    assert abs(found.estimate - exact) < 4 * found.standard_error
    for call in (
        functools.partial(estimators.trace, method="hutch++"),
        functools.partial(estimators.trace, method="xtrace"),
        estimators.diagonal,
        estimators.frobenius_norm,
        estimators.effective_rank,
        estimators.row_norms,
    ):
        with pytest.raises(ValueError, match="fresh is stochastic; expected the same operator"):
            call(fresh, key=KEY)


# ------------------------------------------------------------------------------- resume and meshes


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


RESUMED = {
    **{m: functools.partial(estimators.trace, method=m) for m in METHODS},
    "adaptive": functools.partial(estimators.trace, atol=6.0),
    "bekas": estimators.diagonal,
    "xdiag": functools.partial(estimators.diagonal, method="xdiag"),
    "frobenius": estimators.frobenius_norm,
    "row norms": estimators.row_norms,
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_stopped_and_resumed_has_the_bits_of_the_uninterrupted_one(name):
    calls = []
    base = on_leaves(DECAYING if "nys" in name else INDEFINITE, psd="nys" in name)

    def counted(vs):
        calls.append(1)
        return base.matmat(vs)

    operator = krylov.Operator(base.matvec, base.like, matmat=counted, psd=base.psd)
    options = few(name, block_size=4) | ({"num_matvecs": 120} if name == "adaptive" else {})
    whole = RESUMED[name](operator, **options)
    made = len(calls)
    for stop in (4,) if name == "xnystrace" else (8, 12, 16):
        calls.clear()
        memory = Memory(every=4, stop=stop)
        with pytest.raises(KeyboardInterrupt):
            RESUMED[name](operator, checkpoint=memory, **options)
        again = RESUMED[name](operator, checkpoint=memory, **options)
        assert len(calls) == made
        for a, b in zip(
            jax.tree.leaves((whole.estimate, whole.standard_error)),
            jax.tree.leaves((again.estimate, again.standard_error)),
            strict=True,
        ):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert again.num_matvecs == whole.num_matvecs
    with pytest.raises(ValueError, match="of another run: its key is"):
        RESUMED[name](operator, checkpoint=memory, **options | {"key": jax.random.key(1)})


def test_a_sketch_resumes_from_checkpoints_on_disk(tmp_path):
    calls = []
    base = on_leaves(INDEFINITE)

    def failing(vs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the machine went away")
        return base.matmat(vs)

    options = few("xtrace", block_size=4) | {"method": "xtrace"}
    whole = estimators.trace(base, **options)
    saves = checkpoint.Checkpointer(tmp_path, every=4)
    broken = krylov.Operator(base.matvec, base.like, matmat=failing)
    with pytest.raises(RuntimeError, match="went away"):
        estimators.trace(broken, checkpoint=saves, **options)
    again = estimators.trace(base, checkpoint=saves, **options)
    assert again.samples.tobytes() == whole.samples.tobytes()


@jax.jit
def couple(diagonal, v):
    return tree.axpy(tree.vdot(diagonal, v), diagonal, jax.tree.map(jnp.multiply, diagonal, v))


couple_many = jax.jit(jax.vmap(couple, in_axes=(None, 0)))


def coupled(diagonal):
    return krylov.Operator(
        lambda v: couple(diagonal, v), diagonal, matmat=lambda vs: couple_many(diagonal, vs),
        psd=True,
    )  # fmt: skip


def two_leaves():
    r = np.random.default_rng(0)
    return {
        "kernel": r.uniform(0.1, 1, size=(8, 6)).astype(np.float32),
        "bias": r.uniform(0.1, 1, size=4).astype(np.float32),
    }


def test_sharded_parameters_give_the_numbers_of_one_device(mesh):
    host = two_leaves()
    specs = {"kernel": P("data", "model"), "bias": P("model")}
    params = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), host, specs)
    with jax.set_mesh(mesh):
        found = numbers(coupled(params))
    placed = found["xdiag"][0]
    for name, value in on_one_device().items():
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(value), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
    for name, spec in specs.items():
        sharding = NamedSharding(mesh, spec)
        assert placed[name].sharding.is_equivalent_to(sharding, placed[name].ndim)


def numbers(operator):
    found = {
        m: estimators.trace(operator, method=m, **few(m, block_size=4)).estimate for m in METHODS
    }
    for name in ("bekas", "xdiag"):
        result = estimators.diagonal(operator, method=name, **few(name, block_size=4))
        found[name] = (result.estimate, result.standard_error)
    found["frobenius"] = estimators.frobenius_norm(operator, **few(block_size=4)).estimate
    return found


@functools.cache
def on_one_device():
    return numbers(coupled(two_leaves()))


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"method": "hutch"}, ValueError, "method is 'hutch'; expected 'hutchinson'"),
        ({"key": 3}, TypeError, "expected one typed key"),
        ({"num_matvecs": 0}, ValueError, "num_matvecs is 0; expected an integer of at least 1"),
        ({"num_matvecs": 5, "method": "xtrace"}, ValueError, "expected at least 8"),
        ({"num_matvecs": 3, "method": "hutch++"}, ValueError, "expected at least 4"),
        ({"block_size": 0}, ValueError, "block_size is 0"),
        ({"rtol": 0.0}, ValueError, "rtol is 0.0; expected a positive number"),
        ({"confidence": 1.0}, ValueError, "confidence is 1.0"),
        ({"rtol": 0.1, "method": "xtrace"}, ValueError, "need method='hutchinson'"),
        ({"per_leaf": True, "groups": str}, ValueError, "were both given"),
        ({"distribution": "cauchy"}, ValueError, "distribution is 'cauchy'"),
        ({"distribution": "normal", "method": "xtrace"}, ValueError, "expects 'sphere'"),
        ({"method": "xnystrace"}, ValueError, "needs a positive semidefinite operator"),
        ({"method": "xtrace", "symmetric": False}, ValueError, "matrix is not symmetric"),
        ({"method": "xnystrace", "psd": True}, ValueError, "said to be positive semidefinite"),
    ],
)
def test_what_cannot_be_estimated_is_refused_in_a_sentence(change, kind, says):
    base = on_leaves(INDEFINITE)
    marks = {k: change.pop(k) for k in ("symmetric", "psd") if k in change}
    operator = krylov.Operator(base.matvec, base.like, matmat=base.matmat, name="matrix", **marks)
    with pytest.raises(kind, match=says):
        estimators.trace(operator, **few() | change)


def test_products_that_are_not_finite_are_refused():
    broken = krylov.Operator(lambda v: jax.tree.map(lambda x: x * np.float32(np.inf), v), like(),
                             name="broken", psd=True)  # fmt: skip
    for method in METHODS:
        with pytest.raises(FloatingPointError, match="a product of broken is NaN or infinite"):
            estimators.trace(broken, method=method, **few(method))
    for call in (estimators.diagonal, estimators.frobenius_norm, estimators.row_norms):
        with pytest.raises(FloatingPointError, match="a product of broken is NaN or infinite"):
            call(broken, **few())
