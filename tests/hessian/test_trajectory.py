"""Curvature along a run: subspaces, gradients in them, tracked pairs, the edge of stability."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import batches, checkpoint, hessian, krylov, tree
from geojax.hessian import trajectory

KEY = jax.random.key(0)
EPS = float(np.finfo(np.float32).eps)
TRACES = []
# One chunk of the basis, one structure and one k nearly throughout: compiling is most of the time.
SMALL = {"basis_size": 14}
track = functools.partial(trajectory.track, key=KEY, probes=False, options=SMALL)


def network(params, x):
    h = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"][None])
    return h @ params["out"]["kernel"] + params["out"]["bias"][None]


def loss(params, batch):
    TRACES.append(batch["x"].shape)
    z = network(params, batch["x"])
    here = batch["labels"][:, None] == jnp.arange(z.shape[1], dtype=jnp.int32)[None]
    return jnp.mean(jax.nn.logsumexp(z, axis=1) - jnp.sum(jnp.where(here, z, 0), axis=1))


@functools.cache
def problem():
    """Checkpoints of a small network in training, and its data: classes, in uneven batches."""
    r = np.random.default_rng(0)
    labels = np.arange(40) % 4
    x = r.normal(size=(40, 6)) + 2 * r.normal(size=(4, 6))[labels]
    data = {"x": x.astype(np.float32), "labels": labels.astype(np.int32)}
    params = {
        "in": {"kernel": r.normal(size=(6, 12)) / 2, "bias": np.zeros(12)},
        "out": {"kernel": r.normal(size=(12, 4)) / 3, "bias": np.zeros(4)},
    }
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    run = []
    for step in range(41):
        if step % 10 == 0:
            run.append((step, params))
        params = tree.axpy(-0.1, value_and_gradient(params, data)[1], params)
    return run, batches.split(data, 24)


value_and_gradient = jax.jit(jax.value_and_grad(loss))


@jax.jit
def _dense(params, data):
    vector, unravel = ravel_pytree(params)
    return jax.hessian(lambda p: loss(unravel(p), data))(vector)


def spectrum(params, first=0):
    """The eigenvalues of the dense Hessian, or of its block from a row on, by falling magnitude."""
    matrix = np.asarray(_dense(params, problem()[1].arrays), np.float64)[first:, first:]
    values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    return values[np.argsort(-np.abs(values))]


def rows(matrix):
    """A matrix as stacked vectors of two leaves."""
    matrix = np.asarray(matrix, np.float32)
    return {"a": jnp.asarray(matrix[:, :6].reshape(-1, 2, 3)), "b": jnp.asarray(matrix[:, 6:])}


def row(vector):
    return tree.unstack(rows(np.asarray(vector)[None]))[0]


def frame(k, n, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, k)))[0].T


# ------------------------------------------------------------------------------------- subspaces


def test_the_overlap_is_one_for_the_same_span_in_any_basis():
    u = frame(5, 300)
    turn = frame(5, 5, seed=1)
    assert trajectory.subspace_overlap(rows(u), rows(u)) == pytest.approx(1, abs=10 * EPS)
    assert trajectory.subspace_overlap(rows(u), rows(turn @ u)) == pytest.approx(1, abs=10 * EPS)
    # Lengths and angles within a basis do not matter either.
    skew = rows((turn + 3 * np.eye(5)) @ u)
    assert trajectory.subspace_overlap(rows(u), skew) == pytest.approx(1, abs=100 * EPS)
    assert trajectory.subspace_overlap(rows(u[:3]), rows(u)) == pytest.approx(1, abs=10 * EPS)


def test_the_overlap_is_the_squared_frobenius_norm_over_k():
    for other in (4, 2):
        u, v = frame(4, 30), frame(other, 30, seed=1)
        want = np.sum((u @ v.T) ** 2) / other
        assert trajectory.subspace_overlap(rows(u), rows(v)) == pytest.approx(want, rel=1e-5)
    assert trajectory.subspace_overlap(rows(np.eye(9)[:2]), rows(np.eye(9)[2:5])) == 0


def test_random_subspaces_overlap_by_k_over_n():
    n, k, num = 400, 10, 40
    found = [
        trajectory.subspace_overlap(rows(frame(k, n, i)), rows(frame(k, n, 100 + i)))
        for i in range(num)
    ]
    # The entries of U^T V have variance 1/n, so the overlap's relative deviation is sqrt(2)/k.
    deviation = np.sqrt(2) / k * (k / n) / np.sqrt(num)
    assert abs(np.mean(found) - k / n) < 4 * deviation


def test_principal_angles_are_right_however_small():
    want = np.array([1e-6, 1e-3, 0.5, np.pi / 2 - 1e-4])
    basis = frame(8, 200)
    u = basis[:4]
    v = np.cos(want)[:, None] * basis[:4] + np.sin(want)[:, None] * basis[4:]
    v = frame(4, 4, seed=2) @ v
    found = trajectory.principal_angles(rows(u), rows(v))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=4 * EPS)
    np.testing.assert_allclose(trajectory.principal_angles(rows(v), rows(u)), found, atol=4 * EPS)
    three = trajectory.principal_angles(rows(u), rows(u[1:] * 7))
    np.testing.assert_allclose(three, np.zeros(3), atol=10 * EPS)


def test_gradient_mass_is_the_share_of_the_squared_norm():
    basis = frame(4, 50)
    g = 3 * basis[0] + 4 * basis[3]
    assert trajectory.gradient_mass(row(g), rows(basis[:3])) == pytest.approx(9 / 25, rel=1e-5)
    assert trajectory.gradient_mass(row(g), rows(basis)) == pytest.approx(1, abs=10 * EPS)
    assert trajectory.gradient_mass(row(g), rows(basis[1:3])) < 1e-12
    # Squares of these entries vanish in float32.
    tiny = trajectory.gradient_mass(row(g * 1e-30), rows(basis[:3]))
    assert tiny == pytest.approx(9 / 25, rel=1e-5)
    assert np.isnan(trajectory.gradient_mass(row(0 * g), rows(basis)))


def test_vectors_of_other_spaces_or_dependent_ones_are_refused():
    u = rows(frame(3, 20))
    twice = tree.stack([tree.unstack(u)[i] for i in (0, 1, 0)])
    with pytest.raises(ValueError, match=r"b: the rows are dependent"):
        trajectory.subspace_overlap(u, twice)
    with pytest.raises(ValueError, match="zero or not finite"):
        trajectory.subspace_overlap(u, tree.scale(0.0, u))
    with pytest.raises(ValueError, match=r"\['b'\] has shape \(14,\) in a row of a and \(9,\)"):
        trajectory.subspace_overlap(u, rows(frame(3, 15)))
    with pytest.raises(ValueError, match=r"\['b'\] has shape \(9,\) in the gradient"):
        trajectory.gradient_mass(row(np.ones(15)), u)
    with pytest.raises(ValueError, match="norm of the gradient is nan"):
        trajectory.gradient_mass(row(np.full(20, np.nan)), u)


# ------------------------------------------------------------------------------------- sharpness


def test_gradient_curvature_is_the_rayleigh_quotient_with_its_residual():
    r = np.random.default_rng(0)
    matrix = r.normal(size=(9, 9)).astype(np.float32)
    matrix, g = matrix + matrix.T, r.normal(size=9).astype(np.float32)
    operator = krylov.from_matrix(matrix)
    for scale in (1.0, 1e-30):
        found = trajectory.gradient_curvature(operator, jnp.asarray(np.float32(g * scale)))
        want = g @ matrix @ g / (g @ g)
        assert found.curvature == pytest.approx(want, rel=1e-5)
        off = np.linalg.norm(matrix @ g - want * g) / np.linalg.norm(g)
        assert found.residual == pytest.approx(off, rel=1e-5)
        assert found.gradient_norm == pytest.approx(np.linalg.norm(g) * scale, rel=1e-5)
    gap = np.abs(np.linalg.eigvalsh(matrix) - found.curvature).min()
    assert gap <= found.residual
    vector = np.linalg.eigh(matrix)[1][:, -1]
    assert trajectory.gradient_curvature(operator, jnp.asarray(vector)).residual < 100 * EPS
    with pytest.raises(ValueError, match="finite and not zero"):
        trajectory.gradient_curvature(operator, jnp.zeros(9))


def test_gradient_curvature_predicts_the_change_of_the_loss():
    def wavy(params, batch):
        return jnp.sum(batch * jnp.cos(params * batch))

    with jax.enable_x64(True):
        params, data = jnp.linspace(0.1, 1, 7), jnp.linspace(1, 2, 7)
        g = jax.grad(wavy)(params, data)
        found = trajectory.gradient_curvature(hessian.hessian(wavy, params, data), g)
        rate = 1e-5
        change = float(wavy(params - rate * g, data) - wavy(params, data))
        first = -rate * found.gradient_norm**2
        second = first * -rate * found.curvature / 2
        # What is left is of third order, and the second order is well above it.
        assert abs(change - first - second) < 1e-3 * abs(second)


def descend(optimizer, curvature, num_steps=60):
    """How far plain steps on a one-dimensional quadratic get from the origin."""
    x, state = jnp.ones(()), optimizer.init(jnp.ones(()))

    @jax.jit
    def step(x, state):
        updates, state = optimizer.update(curvature * x, state)
        return x + updates, state

    for _ in range(num_steps):
        x, state = step(x, state)
    return abs(float(x))


@pytest.mark.parametrize(
    ("form", "momentum"),
    [("heavy_ball", 0.0), ("heavy_ball", 0.9), ("nesterov", 0.6), ("ema", 0.5)],
)
def test_gradient_descent_diverges_just_above_the_threshold(form, momentum):
    rate = 0.1
    if form == "ema":
        optimizer = optax.chain(optax.ema(momentum, debias=False), optax.scale(-rate))
    else:
        optimizer = optax.sgd(rate, momentum=momentum, nesterov=form == "nesterov")
    edge = trajectory.stability_threshold(rate, momentum, form=form)
    below = trajectory.stability(0.97 * edge, rate, momentum, form=form)
    above = trajectory.stability(1.03 * edge, rate, momentum, form=form)
    assert below.stable
    assert descend(optimizer, 0.97 * edge) < 0.5
    assert above.stable is False
    assert descend(optimizer, 1.03 * edge) > 2
    assert above.ratio == pytest.approx(1.03)


def test_adam_diverges_where_the_preconditioned_sharpness_passes_its_threshold():
    # The recipe of the docstring, against Adam's step with its second moments held fixed.
    r = np.random.default_rng(0)
    matrix = r.normal(size=(6, 6))
    matrix = (matrix @ matrix.T).astype(np.float32)
    nu = jnp.asarray(r.uniform(0.1, 10, 6).astype(np.float32))
    b1, b2, epsilon, count = 0.9, 0.999, 1e-8, 50
    p = (1 - b1**count) * (jnp.sqrt(nu / (1 - b2**count)) + epsilon)
    operator = krylov.congruence(krylov.from_matrix(matrix), 1 / jnp.sqrt(p))
    pairs = krylov.eigsh(operator, 1, key=KEY, which="LA")
    edge = (2 + 2 * b1) / ((1 - b1) * pairs.eigenvalues[0])
    for factor, stable in ((0.98, True), (1.02, False)):
        rate = factor * edge
        found = trajectory.stability(pairs, rate, b1, form="ema")
        assert found.stable is stable
        assert found.ratio == pytest.approx(factor)
        x, m = np.ones(6), np.zeros(6)
        for _ in range(3000):
            m = b1 * m + (1 - b1) * matrix @ x
            x = x - rate * m / np.asarray(p, np.float64)
        assert bool(np.abs(x).max() < 1) is stable


def pairs_of(values, residual=0.0, converged=True, which="LA"):
    values = np.asarray(values, np.float64)
    operator = krylov.from_matrix(np.diag(np.array([3.0, 1.0, -5.0], np.float32)))
    like = krylov.eigsh(operator, 1, key=KEY, which=which)
    return like._replace(
        eigenvalues=values,
        residuals=np.full(len(values), residual),
        converged=np.full(len(values), converged),
        noise_floor=0.0,
    )


def test_a_verdict_is_given_only_where_the_pair_is_accurate_enough():
    def verdict(*args, **kwargs):
        return trajectory.stability(pairs_of(*args, **kwargs), 0.1).stable

    assert verdict([19.0, 3.0]) is True
    assert verdict([19.0, 3.0], residual=2.0) is None
    assert verdict([19.0, 3.0], converged=False) is None
    # A Rayleigh quotient never exceeds the largest eigenvalue.
    assert verdict([21.0, 3.0], residual=5.0, converged=False) is False
    assert verdict([-30.0, 21.0, 3.0]) is False
    found = trajectory.stability(pairs_of([-30.0, 16.0, 3.0], residual=0.5), 0.1)
    assert found == trajectory.Stability(16.0, 0.5, 20.0, 0.8, True)


def test_pairs_that_may_lack_the_largest_eigenvalue_and_bad_arguments_are_refused():
    for values in ([-5.0], [-5.0, -2.0, 1.0]):
        with pytest.raises(ValueError, match="which='LA'"):
            trajectory.stability(pairs_of(values), 0.1)
    with pytest.raises(ValueError, match="learning_rate is 0"):
        trajectory.stability(1.0, 0)
    with pytest.raises(ValueError, match="momentum is 1"):
        trajectory.stability(1.0, 0.1, 1)
    with pytest.raises(ValueError, match="form is 'polyak'"):
        trajectory.stability_threshold(0.1, form="polyak")
    with pytest.raises(ValueError, match="sharpness is nan"):
        trajectory.stability(float("nan"), 0.1)
    schedule = trajectory.stability_threshold(np.array([0.1, 0.2]), 0.5)
    np.testing.assert_allclose(schedule, [30, 15])


# -------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def tracked():
    """The run tracked, each snapshot with its vectors, and the traces of the loss by then."""
    run, data = problem()
    seen, traces = [], []

    def callback(found):
        seen.append(found)
        traces.append(len(TRACES))

    found = track(loss, run, data, 3, callback=callback)
    return found, seen, traces


def test_tracking_reproduces_the_cold_run_and_the_dense_spectrum(tracked):
    found, seen, _ = tracked
    run, data = problem()
    assert found.steps.tolist() == [0, 10, 20, 30, 40]
    assert found.converged.all()
    for i, (_, params) in enumerate(run):
        operator = hessian.hessian(loss, params, data)
        cold = krylov.eigsh(operator, 3, key=jax.random.key(1), **SMALL)
        np.testing.assert_allclose(found.eigenvalues[i], cold.eigenvalues, rtol=1e-4)
        overlap = trajectory.subspace_overlap(seen[i].pairs.eigenvectors, cold.eigenvectors)
        assert overlap == pytest.approx(1, abs=1e-4)
        np.testing.assert_allclose(found.eigenvalues[i], spectrum(params)[:3], rtol=1e-4)
        value, g = value_and_gradient(params, data.arrays)
        assert found.losses[i] == pytest.approx(float(value), rel=1e-5)
        assert found.gradient_norms[i] == pytest.approx(float(tree.norm(g)), rel=1e-4)
        mass = trajectory.gradient_mass(g, cold.eigenvectors)
        assert found.gradient_mass[i] == pytest.approx(mass, abs=1e-3)
    assert (found.residuals <= 1e-3 * np.abs(found.eigenvalues)).all()


def test_overlaps_are_with_the_checkpoint_before(tracked):
    found, seen, _ = tracked
    assert np.isnan(found.overlaps[0])
    for before, after, value in zip(seen, seen[1:], found.overlaps[1:], strict=False):
        want = trajectory.subspace_overlap(before.pairs.eigenvectors, after.pairs.eigenvectors)
        assert value == want
        assert 0 < value < 1
    for a, b in zip(*map(jax.tree.leaves, (found.eigenvectors, seen[-1].pairs[1])), strict=True):
        np.testing.assert_array_equal(a, b)
    table = found.table()
    assert table[1]["overlap"] == found.overlaps[1]
    assert table[0]["converged"] == "3/3"


def test_the_loss_is_compiled_for_the_first_checkpoint_only(tracked):
    traces = tracked[2]
    assert traces[0] > 0
    assert set(traces) == {traces[0]}


def test_warm_starts_take_fewer_products_than_cold_ones():
    # Weights that move by a thousandth; the search alone, without verification.
    run, data = problem()
    params = run[-1][1]
    noise = tree.random_like(jax.random.key(3), params)
    near = [jax.tree.map(lambda w, e, i=i: w * (1 + 1e-3 * i * e), params, noise) for i in range(3)]
    options = SMALL | {"verify": False, "confirm": 0, "check_every": 1}
    found = track(loss, near, data, 3, options=options)
    cold = [
        krylov.eigsh(hessian.hessian(loss, p, data), 3, key=jax.random.key(i), **options)
        for i, p in enumerate(near)
    ]
    assert (found.num_matvecs[1:] < [c.num_matvecs for c in cold[1:]]).all()
    np.testing.assert_allclose(found.eigenvalues, [c.eigenvalues for c in cold], rtol=1e-4)


def quartic(params, batch):
    """Its Hessian is diagonal: what is zero in a start vector stays zero in its products."""
    return jnp.mean(batch) * sum(jnp.sum(x**4) for x in jax.tree.leaves(params)) / 12


def with_hessian(diagonal):
    """The point in the space of the network's parameters where `quartic` has this Hessian."""
    vector, unravel = ravel_pytree(problem()[0][0][1])
    assert vector.shape == diagonal.shape
    return unravel(jnp.asarray(np.sqrt(diagonal), jnp.float32))


def test_a_direction_that_the_old_vectors_do_not_couple_to_is_found():
    values = np.linspace(0.1, 1, 136)
    values[[20, 60, 100]] = 3, 4, 5
    sharp = values.copy()
    sharp[5] = 6
    run = [with_hessian(values), with_hessian(sharp)]
    options = SMALL | {"confirm": 0, "check_every": 1}
    found = track(quartic, run, jnp.ones(1), 3, options=options)
    np.testing.assert_allclose(found.eigenvalues, [[5, 4, 3], [6, 5, 4]], rtol=1e-5)
    assert found.overlaps[1] == pytest.approx(2 / 3, abs=1e-3)
    # What eigsh makes of their sum alone, to show that this operator can tell.
    operator = hessian.hessian(quartic, run[1], jnp.ones(1))
    old = track(quartic, run[:1], jnp.ones(1), 3).eigenvectors
    alone = jax.tree.map(lambda x: x.sum(0), clean(old))
    blind = krylov.eigsh(operator, 3, key=KEY, initial=alone, **options)
    assert blind.eigenvalues[0] < 5.5
    # Given several vectors, it mixes a random one in.
    seeing = krylov.eigsh(operator, 3, key=KEY, initial=clean(old), **options)
    np.testing.assert_allclose(seeing.eigenvalues, [6, 5, 4], rtol=1e-5)


def clean(vectors):
    """Unit vectors freed from the last of what rounding and the start left beside them."""
    return jax.tree.map(lambda x: jnp.where(jnp.abs(x) > 0.5, jnp.sign(x), 0), vectors)


def test_checkpoints_stream_and_their_vectors_are_let_go():
    alive = []

    def count():
        gc.collect()
        return sum(x.shape == (3, 12, 4) for x in jax.live_arrays())

    def checkpoints():
        for i in range(4):
            yield with_hessian((1 + i) * np.r_[np.linspace(0.1, 1, 133), 3, 4, 5])

    before = count()
    found = track(
        quartic,
        checkpoints(),
        jnp.ones(1),
        3,
        callback=lambda _: alive.append(count()),
    )
    # Between two checkpoints the vectors of one are left.
    assert max(alive) - before == 1
    assert found.steps.tolist() == [0, 1, 2, 3]
    # The matrix only grows, so the vectors stay.
    np.testing.assert_allclose(found.overlaps[1:], 1, atol=1e-5)


def test_a_run_that_was_stopped_resumes_to_the_same_bits(tmp_path):
    class Stopped(Exception):
        pass

    run, data = problem()
    whole = track(loss, run, data, 3)
    for every, stop in ((1, 30), (2, 40)):
        folder = checkpoint.Checkpointer(tmp_path / str(every), every=every)
        called = []

        def stopping(found, stop=stop):
            if found.step == stop:
                raise Stopped

        with pytest.raises(Stopped):
            track(loss, run, data, 3, checkpoint=folder, callback=stopping)
        again = track(loss, iter(run), data, 3, checkpoint=folder, callback=called.append)
        assert [found.step for found in called] == list(range(stop if every == 1 else 40, 41, 10))
        for name, a, b in zip(whole._fields, whole, again, strict=True):
            for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
                np.testing.assert_array_equal(x, y, err_msg=name)
    # All done: nothing is computed again, and more checkpoints may follow.
    called.clear()
    again = track(loss, run, data, 3, checkpoint=folder, callback=called.append)
    assert not called
    np.testing.assert_array_equal(again.eigenvalues, whole.eigenvalues)
    longer = [*run, (50, run[0][1])]
    more = track(loss, longer, data, 3, checkpoint=folder, callback=called.append)
    assert [found.step for found in called] == [50]
    np.testing.assert_array_equal(more.eigenvalues[:5], whole.eigenvalues)
    with pytest.raises(ValueError, match=r"has the steps \[0, 10, 20, 30, 40, 50\]"):
        track(loss, [p for _, p in longer], data, 3, checkpoint=folder)
    with pytest.raises(ValueError, match="another run: its which is LM and this run's is LA"):
        track(loss, longer, data, 3, checkpoint=folder, which="LA")
    with pytest.raises(ValueError, match="there were 2; expected at least 6"):
        track(loss, run[:2], data, 3, checkpoint=folder)


def test_a_part_of_the_parameters_is_tracked_and_its_gradient_alone_counts():
    run, data = problem()
    found = track(loss, run[:2], data, 3, select="out")
    for i, (_, params) in enumerate(run[:2]):
        np.testing.assert_allclose(found.eigenvalues[i], spectrum(params, 84)[:3], rtol=1e-4)
        g = value_and_gradient(params, data.arrays)[1]["out"]
        assert found.gradient_norms[i] == pytest.approx(float(tree.norm(g)), rel=1e-5)
    assert found.eigenvectors["in"]["kernel"] is None


def masked(params, batch, key):
    keep = jax.random.bernoulli(key, 0.5, batch["x"].shape)
    return loss(params, {**batch, "x": jnp.where(keep, batch["x"], 0)})


def test_a_loss_with_a_key_has_one_draw_of_masks_at_all_checkpoints():
    run, data = problem()
    loss_key = jax.random.key(7)
    same = [run[1], (11, run[1][1])]
    found = track(masked, same, data, 3, loss_key=loss_key, which="LA")
    np.testing.assert_allclose(found.eigenvalues[0], found.eigenvalues[1], rtol=1e-5)
    assert found.losses[0] == found.losses[1]
    assert found.overlaps[1] == pytest.approx(1, abs=1e-5)
    with pytest.raises(TypeError, match="loss_fn takes a key"):
        track(masked, same, data, 3)


def test_another_operator_can_be_followed():
    run, data = problem()

    def operator_fn(params):
        return krylov.shift(hessian.hessian(loss, params, data), 2.0)

    found = track(loss, run[:2], data, 3, operator_fn=operator_fn)
    for i, (_, params) in enumerate(run[:2]):
        want = np.sort(spectrum(params))[:-4:-1] + 2
        np.testing.assert_allclose(found.eigenvalues[i], want, rtol=1e-4)
    with pytest.raises(ValueError, match="differ in structure"):
        track(loss, run, data, 3, operator_fn=operator_fn, select="out")


def test_what_cannot_be_tracked_is_refused_before_long_work():
    run, data = problem()
    with pytest.raises(ValueError, match="there were 0; expected at least 1"):
        track(loss, [], data, 3)
    with pytest.raises(ValueError, match="options: checkpoint of one solver"):
        track(loss, run, data, 3, options={"checkpoint": None})
    with pytest.raises(ValueError, match="options: initial cannot be set here"):
        track(loss, run, data, 3, options={"initial": None})
    with pytest.raises(ValueError, match=r"\['in'\]\['bias'\] has shape \(12,\) in Hessian and"):
        track(loss, run, data, 3, initial=jax.tree.map(lambda x: jnp.ones((2, 3)), run[0][1]))
    with pytest.raises(RuntimeError, match="step 0: the budget ended after 1 products"):
        track(loss, run, data, 3, options={"max_matvecs": 1, "verify": False})
    bad = [run[0], (10, tree.scale(float("nan"), run[0][1]))]
    with pytest.raises(FloatingPointError, match="step 10: the loss is nan"):
        track(loss, bad, data, 3)
    stopped = lambda params, batch: jnp.sum(jax.lax.stop_gradient(params) * params)  # noqa: E731
    with pytest.raises(krylov.OperatorError, match="stop_gradient"):
        trajectory.track(stopped, [jnp.ones(5)], jnp.ones(1), 1, key=KEY)


# ----------------------------------------------------------------------------------------- meshes


def regression(params, batch):
    # Explicit meshes have no product over two sharded axes.
    return jnp.mean((jnp.sum(jnp.tanh(batch["x"] @ params), axis=1) - batch["y"]) ** 2)


def test_sharded_data_and_parameters_give_what_one_device_gives(mesh):
    r = np.random.default_rng(0)
    data = {"x": np.float32(r.normal(size=(8, 6))), "y": np.float32(r.normal(size=8))}
    first = np.float32(r.normal(size=(6, 8)) / 2)
    points = [first, np.float32(1.01) * first]
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, P(None, "model"))
        run = [jax.device_put(params, where) for params in points]
        got = track(
            regression, run, data, 2, which="LA", tol=1e-4, mesh=mesh,
            options={"basis_size": 12},
        )  # fmt: skip
        angles = trajectory.principal_angles(got.eigenvectors, got.eigenvectors)
        g = jax.device_put(first, where)
        curvature, residual, length = trajectory.gradient_curvature(
            hessian.hessian(regression, run[1], data, mesh=mesh), g
        )
    assert got.eigenvectors.sharding.is_equivalent_to(
        NamedSharding(mesh, P(None, None, "model")), 3
    )
    np.testing.assert_allclose(angles, 0, atol=10 * EPS)
    dense = jax.jit(jax.hessian(lambda p: regression(p.reshape(6, 8), data)))
    spans = []
    for i, params in enumerate(points):
        matrix = np.asarray(dense(params.ravel()), np.float64)
        values, vectors = np.linalg.eigh(matrix)
        spans.append(vectors[:, -2:])
        np.testing.assert_allclose(got.eigenvalues[i], values[:-3:-1], rtol=1e-5)
        slope = np.asarray(jax.grad(regression)(params, data), np.float64).ravel()
        mass = np.sum((spans[i].T @ slope) ** 2) / np.sum(slope**2)
        assert got.gradient_mass[i] == pytest.approx(mass, rel=1e-3)
        assert got.gradient_norms[i] == pytest.approx(np.linalg.norm(slope), rel=1e-5)
    overlap = np.sum((spans[0].T @ spans[1]) ** 2) / 2
    assert got.overlaps[1] == pytest.approx(overlap, abs=1e-3)
    unit = first.ravel() / np.linalg.norm(first)
    assert curvature == pytest.approx(unit @ matrix @ unit, rel=1e-4)
    off = np.linalg.norm(matrix @ unit - curvature * unit)
    assert residual == pytest.approx(off, rel=1e-4)
    assert length == pytest.approx(np.linalg.norm(first), rel=1e-5)
