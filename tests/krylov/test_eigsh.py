"""Lanczos with thick restart: hard spectra in float32, bounds that hold, memory, resuming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from geojax import checkpoint, krylov, tree
from geojax.krylov import _basis

KEY = jax.random.key(0)
# Most operators below are of this size and most bases of the same room: what is compiled for one
# test serves the others.
N = 4006
EPS = float(np.finfo(np.float32).eps)


@jax.jit
def _times(d, v):
    return jax.tree.map(lambda a, b: a * b, d, v)


def diagonal(values, calls=None):
    """The operator of a diagonal, on a pytree of two leaves; it counts its products."""
    values = np.asarray(values, np.float32)
    half = 2 * (len(values) // 4)
    leaves = {"a": jnp.asarray(values[:half].reshape(2, -1)), "b": jnp.asarray(values[half:])}

    def matvec(v):
        if calls is not None:
            calls.append(1)
        return _times(leaves, v)

    return krylov.Operator(matvec, leaves, name="diagonal")


def flat(vectors):
    return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(vectors)], 1)


def check(pairs, values, expected, rtol):
    """Values, residuals by hand, orthonormality, signs, and intervals that hold the truth."""
    values = np.asarray(values, np.float32).astype(np.float64)
    scale = np.abs(values).max()
    np.testing.assert_allclose(pairs.eigenvalues, expected, atol=rtol * scale, rtol=0)
    x = flat(pairs.eigenvectors).astype(np.float64)
    assert np.abs(x @ x.T - np.eye(len(x))).max() < 20 * EPS
    residuals = np.linalg.norm(x * values - pairs.eigenvalues[:, None] * x, axis=1)
    assert (residuals <= 1.01 * pairs.residuals + 10 * EPS * scale).all()
    distance = np.abs(values[None] - pairs.eigenvalues[:, None]).min(1)
    assert (distance <= pairs.residuals + 4 * EPS * scale).all()
    assert (x[np.arange(len(x)), np.abs(x).argmax(1)] > 0).all()
    assert pairs.eigenvalues.dtype == np.float64


OUTLIERS = np.array([100, 80, 60, 40, 20, 10.0])


@pytest.fixture(scope="module")
def bulk():
    return np.random.default_rng(0).standard_normal(N - 6)


@pytest.fixture(scope="module")
def outliers(bulk):
    return np.concatenate([OUTLIERS, bulk])


def test_six_outliers_take_twenty_products_with_sixteen_vectors(outliers):
    pairs = krylov.eigsh(diagonal(outliers), 6, key=KEY, basis_size=16, tol=1e-4, verify=False)
    check(pairs, outliers, OUTLIERS, 1e-6)
    assert pairs.converged.all()
    assert pairs.num_matvecs <= 20


def test_twenty_pairs_down_into_the_bulk_by_restarts(outliers):
    pairs = krylov.eigsh(diagonal(outliers), 20, key=KEY, basis_size=60, tol=1e-4)
    expected = np.sort(np.abs(outliers.astype(np.float32)))[::-1][:20]
    np.testing.assert_allclose(np.abs(pairs.eigenvalues), expected, rtol=1e-6)
    check(pairs, outliers, pairs.eigenvalues, 1)
    assert pairs.converged.all()
    assert pairs.num_matvecs <= 600


def test_thirty_pairs_at_the_defaults_are_thirty_different_ones(bulk):
    # In a denser bulk the thirtieth may be its neighbor, within the tolerance.
    values = np.concatenate([OUTLIERS, bulk[:1994]])
    pairs = krylov.eigsh(diagonal(values), 30, key=KEY)
    expected = np.sort(np.abs(values.astype(np.float32)))[::-1][:30]
    np.testing.assert_allclose(np.abs(pairs.eigenvalues), expected, rtol=1e-5)
    assert pairs.converged.all()
    check(pairs, values, pairs.eigenvalues, 1)


def test_all_copies_of_a_five_fold_eigenvalue_are_found():
    # With fewer products for the search the last two miss a copy.
    for seed in (*range(16), 43, 56):
        small = np.random.default_rng(seed).uniform(-0.5, 0.5, N - 9)
        values = np.concatenate([[5] * 5, [4, 3, 2, 1], small])
        pairs = krylov.eigsh(diagonal(values), 5, key=jax.random.key(seed))
        check(pairs, values, [5] * 5, 1e-5)
        assert pairs.converged.all()


def test_a_block_of_five_finds_the_five_copies_in_one_sweep():
    small = np.random.default_rng(0).uniform(-0.5, 0.5, N - 5)
    values = np.concatenate([[5] * 5, small])
    pairs = krylov.eigsh(
        diagonal(values), 5, key=KEY, block_size=5, basis_size=30, confirm=0, verify=False
    )
    check(pairs, values, [5] * 5, 1e-5)
    assert pairs.num_matvecs <= 30


def test_nine_eigenvalues_a_thousandth_apart_are_told_apart():
    top = 2 + 1e-3 * np.arange(9)
    values = np.concatenate([top, np.random.default_rng(0).uniform(-1, 1, N - 9)])
    pairs = krylov.eigsh(diagonal(values), 9, key=KEY, tol=1e-5)
    check(pairs, values, top[::-1], 1e-6)


def test_rank_two_has_zeros_for_the_rest():
    values = np.zeros(N)
    values[[3, 1500]] = 2, 1
    pairs = krylov.eigsh(diagonal(values), 5, key=KEY)
    check(pairs, values, [2, 1, 0, 0, 0], 1e-5)
    assert pairs.converged.all()


def test_the_zero_operator_has_zero_eigenvalues():
    pairs = krylov.eigsh(diagonal(np.zeros(N)), 3, key=KEY)
    check(pairs, np.zeros(N), [0, 0, 0], 1e-30)
    assert pairs.converged.all()


def test_pairs_of_opposite_sign_are_told_apart():
    top = np.array([5, -5, -4.95, 4.9])
    values = np.concatenate([top, np.random.default_rng(0).uniform(-1, 1, N - 4)])
    pairs = krylov.eigsh(diagonal(values), 4, key=KEY)
    np.testing.assert_allclose(np.sort(pairs.eigenvalues), np.sort(top), atol=5e-6)
    check(pairs, values, pairs.eigenvalues, 1)
    assert pairs.residuals.max() < 1e-5
    # The spectrum on which power iteration that stops on drift gives 3.87, 4.93 and 4.80.
    values = np.concatenate([[5, -4.95, 4.9, 4.8], np.random.default_rng(0).uniform(0, 1, N - 4)])
    pairs = krylov.eigsh(diagonal(values), 3, key=KEY)
    check(pairs, values, [5, -4.95, 4.9], 1e-6)


def test_the_scale_of_the_operator_does_not_matter(outliers):
    runs = [
        krylov.eigsh(diagonal(outliers * s), 6, key=KEY, basis_size=16, tol=1e-4)
        for s in (1.0, 2.0**-46, 2.0**40)
    ]
    for run, s in zip(runs, (1.0, 2.0**-46, 2.0**40), strict=True):
        # The products are the same to the last bit; LAPACK on the host scales in its own way.
        np.testing.assert_allclose(run.eigenvalues, runs[0].eigenvalues * s, rtol=1e-9)
        assert run.num_matvecs == runs[0].num_matvecs
    run = krylov.eigsh(diagonal(outliers * 1e-14), 6, key=KEY, basis_size=16, tol=1e-4)
    check(run, outliers * 1e-14, OUTLIERS * 1e-14, 1e-6)
    assert run.converged.all()


@pytest.mark.parametrize("k", [1, 3, 11, 12])
def test_small_spaces_are_exact(k):
    values = np.arange(12) - 3.7
    pairs = krylov.eigsh(diagonal(values), k, key=KEY)
    expected = values[np.argsort(-np.abs(values), kind="stable")][:k]
    check(pairs, values, expected, 10 * EPS)
    assert pairs.converged.all()


def test_one_dimension():
    pairs = krylov.eigsh(krylov.from_matrix(np.array([[3.0]], np.float32)), 1, key=KEY)
    assert pairs.eigenvalues.tolist() == [3.0]
    assert pairs.residuals.tolist() == [0.0]


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_wishart_ends_in_float64(which):
    with jax.enable_x64(True):
        g = np.random.default_rng(1).standard_normal((60, 40))
        matrix = g.T @ g / 60 - 0.5 * np.eye(40)
        exact, vectors = np.linalg.eigh(matrix)
        pairs = krylov.eigsh(
            krylov.from_matrix(matrix), 4, key=KEY, which=which, tol=1e-10, basis_size=20
        )
        order = {
            "LM": np.argsort(-np.abs(exact))[:4],
            "LA": [39, 38, 37, 36],
            "SA": [0, 1, 2, 3],
            "BE": [39, 38, 1, 0],
        }[which]
        np.testing.assert_allclose(pairs.eigenvalues, exact[order], rtol=1e-9)
        x = np.asarray(pairs.eigenvectors)
        assert np.abs(x @ x.T - np.eye(4)).max() < 1e-12
        residuals = np.linalg.norm(x @ matrix - pairs.eigenvalues[:, None] * x, axis=1)
        assert residuals.max() < 1e-8
        assert (np.abs((x * vectors.T[order]).sum(1)) > 1 - 1e-8).all()


def test_bounds_hold_on_two_hundred_random_matrices():
    held = 0
    for seed in range(200):
        r = np.random.default_rng(seed)
        values = np.float32(r.standard_normal(60) * r.uniform(0.1, 1, 60) ** 3)
        pairs = krylov.eigsh(
            diagonal(values),
            3,
            key=jax.random.key(seed),
            basis_size=20,
            max_matvecs=10 + seed % 15,
            confirm=0,
            verify=False,
        )
        x = flat(pairs.eigenvectors).astype(np.float64)
        truth = np.linalg.norm(x * values - pairs.eigenvalues[:, None] * x, axis=1)
        clear = truth > 10 * EPS * np.abs(values).max()
        ratio = pairs.residuals[clear] / truth[clear]
        assert ((ratio > 0.5) & (ratio < 2)).all()
        low, high = pairs.intervals.T
        inside = (values[None] >= low[:, None]) & (values[None] <= high[:, None])
        held += bool(inside.any(1).all())
    assert held == 200


def test_angles_bound_the_angle_to_the_true_vector(outliers):
    pairs = krylov.eigsh(diagonal(outliers), 6, key=KEY, basis_size=16, tol=1e-2)
    x = flat(pairs.eigenvectors)
    sine = np.linalg.norm(np.where(np.eye(len(x), x.shape[1]) > 0, 0, x), axis=1)
    assert (np.arcsin(sine) <= pairs.angles + 4 * EPS).all()
    assert pairs.angles.max() < 0.1


def test_a_tolerance_below_the_arithmetic_is_reported(outliers):
    with pytest.warns(UserWarning, match="cannot reach tol=1e-09.*accurate to about"):
        pairs = krylov.eigsh(diagonal(outliers), 6, key=KEY, tol=1e-9)
    assert not pairs.converged.any()
    assert "noise floor" in pairs.reasons[0]
    assert EPS * 100 <= pairs.noise_floor < 100 * EPS * 100
    assert "0 of 6 converged" in repr(pairs)


def test_a_noisy_product_is_seen_in_the_noise_floor(outliers):
    clean = diagonal(outliers)
    rough = krylov.Operator(
        # Ten bits of mantissa, as TF32 has.
        lambda v: jax.tree.map(lambda x: jax.lax.reduce_precision(x, 8, 10), clean.matvec(v)),
        clean.like,
    )
    with pytest.warns(UserWarning, match="cannot reach"):
        pairs = krylov.eigsh(rough, 6, key=KEY, tol=1e-6)
    assert 1e-5 < pairs.noise_floor / 100 < 2e-3


def test_it_stops_early_and_counts_its_products(outliers):
    calls = []
    pairs = krylov.eigsh(diagonal(outliers, calls), 6, key=KEY)
    assert pairs.num_matvecs == len(calls) < 60
    assert pairs.verified
    assert pairs.history["num_matvecs"][-1] == len(calls) - 6


def test_budgets_are_kept_and_the_shortfall_is_told(outliers):
    pairs = krylov.eigsh(diagonal(outliers), 6, key=KEY, max_matvecs=8, verify=False)
    assert pairs.num_matvecs == 8
    assert not pairs.converged.all()
    assert "stopped at max_matvecs=8" in pairs.reasons
    pairs = krylov.eigsh(diagonal(outliers), 6, key=KEY, max_matvecs=4, verify=False)
    assert len(pairs.eigenvalues) == 4
    pairs = krylov.eigsh(diagonal(outliers), 20, key=KEY, max_seconds=1e-9, verify=False)
    assert pairs.num_matvecs <= 1
    assert len(pairs.eigenvalues) == pairs.num_matvecs


def test_a_callback_sees_each_look(outliers):
    seen = []
    pairs = krylov.eigsh(diagonal(outliers), 6, key=KEY, callback=seen.append)
    assert [s["num_matvecs"] for s in seen] == pairs.history["num_matvecs"].tolist()
    assert seen[-1]["converged"] == [True] * 6
    assert seen[-1]["seconds"] > 0


def test_a_warm_start_from_old_vectors_saves_products():
    r = np.random.default_rng(0)
    n = 600
    basis = np.linalg.qr(r.standard_normal((n, n)))[0]
    values = np.concatenate([50 * 0.8 ** np.arange(30), r.uniform(-0.05, 0.05, n - 30)])
    matrix = (basis * values) @ basis.T
    moved = np.diag(1 + 0.01 * r.standard_normal(n))
    first = krylov.from_matrix(np.float32(matrix + matrix.T) / 2)
    matrix = moved @ matrix @ moved
    second = krylov.from_matrix(np.float32(matrix + matrix.T) / 2)
    old = krylov.eigsh(first, 5, key=KEY)
    run = functools.partial(
        krylov.eigsh, second, 5, key=jax.random.key(1), verify=False, confirm=0, check_every=1
    )
    cold, warm = run(), run(initial=old.eigenvectors)
    np.testing.assert_allclose(warm.eigenvalues, cold.eigenvalues, rtol=1e-4)
    assert warm.num_matvecs < cold.num_matvecs


@pytest.mark.parametrize("block_size", [1, 2])
def test_a_run_that_was_killed_resumes_to_the_same_bits(outliers, tmp_path, block_size):
    class Killed(Exception):
        pass

    def kill(facts):
        if facts["num_matvecs"] >= stop:
            raise Killed

    options = {"key": KEY, "basis_size": 34, "tol": 1e-4, "block_size": block_size}
    whole = krylov.eigsh(diagonal(outliers), 12, **options)
    for stop in (15, 45, whole.history["num_matvecs"][-2])[block_size - 1 :]:
        folder = checkpoint.Checkpointer(tmp_path / str(stop), every=10)
        with pytest.raises(Killed):
            krylov.eigsh(diagonal(outliers), 12, **options, checkpoint=folder, callback=kill)
        calls = []
        again = krylov.eigsh(diagonal(outliers, calls), 12, **options, checkpoint=folder)
        assert len(calls) < whole.num_matvecs
        np.testing.assert_array_equal(again.eigenvalues, whole.eigenvalues)
        np.testing.assert_array_equal(flat(again.eigenvectors), flat(whole.eigenvectors))
        np.testing.assert_array_equal(again.residuals, whole.residuals)
        assert again.num_matvecs == whole.num_matvecs
        np.testing.assert_array_equal(again.history["residuals"], whole.history["residuals"])
    with pytest.raises(ValueError, match="of another run: its which is LM and this run's is LA"):
        krylov.eigsh(diagonal(outliers), 12, **options, which="LA", checkpoint=folder)


def test_a_result_survives_a_round_trip(outliers, tmp_path):
    pairs = krylov.eigsh(diagonal(outliers), 3, key=KEY)
    checkpoint.save(tmp_path / "pairs", pairs)
    found = krylov.Eigenpairs(**checkpoint.load(tmp_path / "pairs")[0])
    np.testing.assert_array_equal(found.eigenvalues, pairs.eigenvalues)
    np.testing.assert_array_equal(flat(found.eigenvectors), flat(pairs.eigenvectors))
    assert repr(found) == repr(pairs)
    assert found.eigenvalues.dtype == np.float64
    assert pairs.table()[0]["converged"] == "yes"


def test_bfloat16_parameters_get_float32_vectors():
    clean = diagonal(np.arange(12.0))
    op = krylov.Operator(clean.matvec, tree.cast(clean.like, jnp.bfloat16))
    pairs = krylov.eigsh(op, 2, key=KEY)
    assert pairs.eigenvectors["a"].dtype == jnp.float32
    np.testing.assert_allclose(pairs.eigenvalues, [11, 10], rtol=1e-6)


def test_a_dot_of_a_million_bfloat16_numbers_is_accumulated_in_float32(rng):
    a, b = (jnp.asarray(rng.standard_normal(10**6), jnp.bfloat16) for _ in range(2))
    exact = np.dot(np.asarray(a, np.float64), np.asarray(b, np.float64))
    size = np.linalg.norm(np.asarray(a, np.float64)) * np.linalg.norm(np.asarray(b, np.float64))
    found = float(tree.inner_products({"w": a[None]}, {"w": b})[0])
    assert abs(found - exact) < 1e-7 * size


def test_the_basis_keeps_to_its_memory():
    n = 400_000
    v = {"a": jnp.ones((500, 600)), "b": jnp.ones(100_000)}
    rows = _basis.allocate(v, 40)
    one = jnp.ones(())
    arguments = (jnp.zeros(2), one, one, np.int32(3), np.int32(-1), np.uint32(0), one)
    step = _basis.append.lower(rows, v, *arguments, skip=True).compile().memory_analysis()
    # The basis is extended in place; the temporaries are a few vectors.
    assert step.alias_size_in_bytes >= 41 * 4 * n
    assert step.temp_size_in_bytes <= 3 * 4 * n
    turn = _basis.rotate.lower(rows, jnp.eye(40), whole=False).compile().memory_analysis()
    assert turn.alias_size_in_bytes >= 40 * 4 * n
    assert turn.temp_size_in_bytes <= 6 * 4 * n


def test_memory_bytes_sets_the_basis_and_too_little_is_refused(outliers):
    op = diagonal(outliers)
    vector = 4 * op.size
    pairs = krylov.eigsh(op, 6, key=KEY, memory_bytes=30 * vector)
    assert pairs.converged.all()
    with pytest.raises(ValueError, match="too little for 6 eigenpairs of 4006 parameters"):
        krylov.eigsh(op, 6, key=KEY, memory_bytes=15 * vector)


def test_a_basis_in_chunks_gives_what_one_in_one_piece_gives(outliers, monkeypatch):
    # Enough pairs for restarts, and for a result that lies in two chunks.
    solve = functools.partial(krylov.eigsh, diagonal(outliers), 18, key=KEY, basis_size=40)
    whole = solve()
    monkeypatch.setattr(_basis, "_SMALL", 0)
    cut = solve()
    assert whole.history["num_matvecs"][-1] > 60
    np.testing.assert_allclose(cut.eigenvalues, whole.eigenvalues, rtol=1e-5)
    check(cut, outliers, whole.eigenvalues, 1e-5)
    assert cut.converged.all()


def test_rotation_is_a_matrix_product_whatever_the_leaf_size(rng):
    v = {"a": jnp.zeros((3, 5000)), "b": jnp.zeros(7)}
    rows = tuple(
        jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), chunk)
        for chunk in _basis.allocate(v, 21)
    )
    before = np.concatenate([flat(chunk) for chunk in rows]).astype(np.float64)
    matrix = rng.standard_normal((21, 21))
    after = _basis.rotate(rows, jnp.asarray(matrix, jnp.float32), whole=False)
    after = np.concatenate([flat(chunk) for chunk in after])
    np.testing.assert_allclose(after, np.float32(matrix) @ before, atol=200 * EPS)


def _tree_operator(sharding):
    """A symmetric operator on two leaves, coupled; on a mesh or on one device."""
    r = np.random.default_rng(0)
    d = {
        "a": np.float32(r.uniform(0, 1, (8, 16)) + 5 * (r.uniform(size=(8, 16)) > 0.96)),
        "b": np.float32(r.uniform(0, 1, 32)),
    }
    u = jax.tree.map(lambda x: np.float32(np.cos(np.arange(x.size)).reshape(x.shape)), d)
    d, u = sharding(d), sharding(u)

    @jax.jit
    def product(d, u, v):
        scaled = jax.tree.map(lambda a, b: a * b, d, v)
        return tree.axpy(tree.vdot(u, v) / 10, u, scaled)

    return krylov.Operator(lambda v: product(d, u, v), d)


@pytest.mark.parametrize("block_size", [1, 3])
def test_sharded_vectors_give_the_same_pairs_and_keep_their_sharding(mesh, block_size):
    def spread(x):
        specs = {"a": PartitionSpec("model", "data"), "b": PartitionSpec("data")}
        return {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in x.items()}

    # One room for both: 24 rows.
    options = {"key": KEY, "basis_size": 24 - block_size, "block_size": block_size, "tol": 1e-4}
    one = krylov.eigsh(_tree_operator(lambda x: jax.tree.map(jnp.asarray, x)), 4, **options)
    with jax.set_mesh(mesh):
        op = _tree_operator(spread)
        many = krylov.eigsh(op, 4, **options)
    np.testing.assert_allclose(many.eigenvalues, one.eigenvalues, rtol=1e-5)
    np.testing.assert_allclose(flat(many.eigenvectors), flat(one.eigenvectors), atol=1e-3)
    for leaf, like in zip(
        jax.tree.leaves(many.eigenvectors), jax.tree.leaves(op.like), strict=True
    ):
        assert leaf.sharding.shard_shape(leaf.shape)[1:] == like.sharding.shard_shape(like.shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0; expected an integer from 1 to n = 8"),
        ({"k": 9}, "k is 9"),
        ({"which": "SM"}, "which is 'SM'.*eigsh_interior"),
        ({"which": "top"}, "which is 'top'; expected 'LM'"),
        ({"tol": 0.0}, "tol is 0.0; expected a relative residual"),
        ({"basis_size": 2}, "basis_size is 2; expected at least k \\+ 2 = 4"),
        ({"basis_size": 5, "memory_bytes": 1e9}, "either basis_size or memory_bytes"),
        ({"block_size": 0}, "block_size is 0"),
        ({"confirm": -1}, "confirm is -1"),
        ({"max_matvecs": 0}, "max_matvecs is 0; expected a positive number"),
        ({"initial": {"a": jnp.zeros((2, 2)), "b": jnp.zeros(4)}}, "norm of initial is 0"),
        ({"initial": {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}}, r"leaf \['a'\] has shape"),
    ],
)
def test_bad_arguments_are_refused_before_any_product(change, message):
    calls = []
    arguments = {"k": 2} | change
    with pytest.raises(ValueError, match=message):
        krylov.eigsh(diagonal(np.arange(8.0), calls), key=KEY, **arguments)
    assert not calls


def test_operators_that_are_not_one_symmetric_matrix_are_refused():
    like = jnp.zeros(4)
    noisy = krylov.Operator(lambda v: v, like, name="minibatch Hessian", stochastic=True)
    with pytest.raises(ValueError, match="minibatch Hessian gives another product each time"):
        krylov.eigsh(noisy, 1, key=KEY)
    skew = krylov.Operator(lambda v: v, like, name="J", symmetric=False)
    with pytest.raises(ValueError, match="J is not symmetric"):
        krylov.eigsh(skew, 1, key=KEY)


def test_a_product_that_is_not_finite_stops_the_run():
    values = diagonal(np.arange(12.0)).like
    bad = krylov.Operator(lambda v: jax.tree.map(lambda x: x / 0, v), values, name="H")
    with pytest.raises(FloatingPointError, match="a product with H is not finite"):
        krylov.eigsh(bad, 1, key=KEY)
