"""Curves are combinations of points: exact at their ends, trained and measured as any point."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from geojax import batches, checkpoint, curves, datasets, fit, models, objectives, statistics, tree

TINY = 16 * np.finfo(np.float32).eps
TS = np.linspace(0, 1, 101)


def draw(seed, num=3, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"a": (num, 4, 3), "b": [(num, 3), (num,)]}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def equal(a, b) -> bool:
    return all(
        bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# ------------------------------------------------------------------------------- bases


@pytest.mark.parametrize("num", range(2, 11))
def test_bezier_coefficients_are_bernsteins(num):
    found = np.asarray(curves.coefficients(curves.bezier(num), TS))
    expected = stats.binom.pmf(np.arange(num)[None, :], num - 1, TS[:, None])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(found[::-1, ::-1], found, atol=1e-6)
    np.testing.assert_array_equal(found[[0, -1]], np.eye(num)[[0, -1]])


def test_bezier_points_are_de_casteljaus():
    w = draw(0, 5)
    for t in (0.0, 0.2, 0.7, 1.0):
        members = tree.unstack(w)
        while len(members) > 1:
            members = [
                jax.tree.map(lambda x, y, t=t: (1 - t) * x + t * y, p, q)
                for p, q in zip(members, members[1:], strict=False)
            ]
        found = curves.point(curves.bezier(5), w, t)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(members[0]), strict=True):
            np.testing.assert_allclose(x, y, atol=TINY * 4)


def test_the_derivative_of_a_bezier_at_its_ends_is_finite_and_right():
    basis = curves.bezier(4)
    for t, expected in ((0.0, [-3, 3, 0, 0]), (1.0, [0, 0, -3, 3])):
        np.testing.assert_allclose(jax.jacobian(basis)(jnp.asarray(t)), expected, atol=1e-6)


@pytest.mark.parametrize("num", [2, 3, 6])
def test_a_polychain_passes_through_every_control_point(num):
    found = np.asarray(curves.coefficients(curves.polychain(num), np.linspace(0, 1, num)))
    np.testing.assert_allclose(found, np.eye(num), atol=1e-6)
    along = np.asarray(curves.coefficients(curves.polychain(num), TS))
    assert ((along > 0).sum(1) <= 2).all()
    np.testing.assert_allclose(along.sum(1), 1, atol=1e-6)


def test_line_chain_and_bezier_of_two_points_are_one_curve():
    w = draw(1, 2)
    lines = [
        curves.points(b, w, TS) for b in (curves.segment(), curves.polychain(2), curves.bezier(2))
    ]
    for other in lines[1:]:
        for x, y in zip(jax.tree.leaves(lines[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)


def test_pieces_of_a_bezier_join_and_are_beziers():
    basis = curves.piecewise_bezier(3, 2)
    assert basis.num_points == 7
    at = np.asarray(curves.coefficients(basis, np.array([0, 1 / 3, 2 / 3, 1], np.float32)))
    np.testing.assert_allclose(at, np.eye(7)[[0, 2, 4, 6]], atol=1e-5)
    inside = np.asarray(curves.coefficients(basis, np.array([0.5])))[0]
    np.testing.assert_allclose(inside[2:5], [0.25, 0.5, 0.25], atol=1e-6)
    close = np.asarray(curves.coefficients(basis, np.array([1 / 3 - 1e-6, 1 / 3 + 1e-6])))
    np.testing.assert_allclose(close[0], close[1], atol=1e-4)


def circle(t):
    """A curve of one's own: three points, a cosine."""
    c = 0.5 - 0.5 * jnp.cos(jnp.pi * t)
    return jnp.stack([(1 - c) ** 2, 2 * c * (1 - c), c**2])


def test_a_curve_of_ones_own_evaluates_and_trains():
    w = draw(2)
    assert equal(curves.point(circle, w, 0.0), tree.unstack(w)[0])
    loss = lambda p, batch: jnp.mean(jnp.square(p["a"])) + 0 * jnp.sum(batch)  # noqa: E731
    found = curves.fit(
        loss, circle, w, jnp.ones(2), optax.sgd(0.5), 20, key=jax.random.key(0)
    ).control_points
    assert float(jnp.sum(jnp.square(found["a"][1]))) != float(jnp.sum(jnp.square(w["a"][1])))


@pytest.mark.parametrize("basis", [curves.bezier(3), curves.polychain(3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_ends_are_the_end_points_to_the_bit(basis, dtype):
    w = draw(3, dtype=dtype)
    members = tree.unstack(w)
    assert equal(curves.point(basis, w, 0.0), members[0])
    assert equal(curves.point(basis, w, 1.0), members[-1])


def test_initial_points_lie_on_the_line():
    a, b = tree.unstack(draw(4, 2))
    w = curves.initialize(curves.bezier(5), a, b)
    for j, member in enumerate(tree.unstack(w)):
        for x, y, z in zip(*(jax.tree.leaves(p) for p in (member, a, b)), strict=True):
            np.testing.assert_allclose(x, y + (z - y) * j / 4, atol=1e-6)
    assert equal(tree.unstack(w)[0], a)
    assert equal(tree.unstack(w)[-1], b)
    with pytest.raises(ValueError, match="give num_points"):
        curves.initialize(circle, a, b)


# ------------------------------------------------------------------------------- length


def test_lengths_of_a_chain_and_of_a_quarter_parabola():
    chain = {"w": jnp.array([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])}
    assert curves.length(curves.polychain(3), chain) == pytest.approx(7, rel=1e-6)
    # w(t) = (2 t (1 - t) + t^2, t^2) has the closed length of a parabola.
    bend = {"w": jnp.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])}
    exact = np.sqrt(0.5) * np.arcsinh(1.0) + 1
    assert curves.length(curves.bezier(3), bend) == pytest.approx(exact, rel=1e-5)


def test_equal_lengths_are_equal():
    chain = {"w": jnp.array([[0.0], [1.0], [4.0]])}
    ts = curves.arc_length_ts(curves.polychain(3), chain, 5)
    np.testing.assert_allclose(ts, [0, 0.5, 2 / 3, 5 / 6, 1], atol=1e-6)


def test_lengths_far_from_the_origin_are_exact():
    rng = np.random.default_rng(0)
    base = 100 + rng.normal(size=5000)
    w = {"w": jnp.asarray(np.stack([base, base + 1e-2 * rng.normal(size=5000)]), jnp.float32)}
    exact = np.linalg.norm(np.diff(np.asarray(w["w"], np.float64), axis=0))
    assert curves.length(curves.segment(), w) == pytest.approx(exact, rel=1e-5)


# ------------------------------------------------------------------------------- sampling


def test_arc_length_draws_follow_the_length_and_others_follow_t():
    chain = {"w": jnp.array([[0.0], [1.0], [4.0]])}
    keys = jax.random.split(jax.random.key(0), 1000)
    for sampler, share in (("uniform", 0.5), ("stratified", 0.5), ("arc_length", 0.25)):
        ts = jax.vmap(
            lambda k, s=sampler: curves.sample_ts(
                k, 10, s, basis=curves.polychain(3), control_points=chain
            )
        )(keys)
        assert ((ts >= 0) & (ts <= 1)).all()
        assert float((ts < 0.5).mean()) == pytest.approx(share, abs=0.01)


def test_stratified_draws_fall_in_their_strata_and_antithetic_ones_mirror():
    ts = np.sort(curves.sample_ts(jax.random.key(0), 8, "stratified"))
    assert (np.floor(ts * 8) == np.arange(8)).all()
    ts = np.asarray(curves.sample_ts(jax.random.key(0), 6, "antithetic"))
    np.testing.assert_allclose(ts[:3] + ts[3:], 1, atol=1e-6)
    with pytest.raises(ValueError, match="5 is odd"):
        curves.sample_ts(jax.random.key(0), 5, "antithetic")
    with pytest.raises(ValueError, match="sampler is 'sobol'"):
        curves.sample_ts(jax.random.key(0), 5, "sobol")


def test_stratified_gradients_vary_less():
    a, b = tree.unstack(draw(5, 2))
    w = curves.initialize(curves.bezier(3), a, b)

    def gradient(key, sampler):
        def loss(points):
            ts = curves.sample_ts(key, 5, sampler)
            at = curves.points(curves.bezier(3), points, ts)
            return sum(jnp.mean(jnp.tanh(3 * x) ** 2) for x in jax.tree.leaves(at))

        return jax.grad(loss)(w)["a"][1]

    keys = jax.random.split(jax.random.key(0), 200)
    spread = {
        s: float(jnp.var(jax.vmap(functools.partial(gradient, sampler=s))(keys), axis=0).sum())
        for s in ("uniform", "stratified")
    }
    assert spread["stratified"] < 0.5 * spread["uniform"]


# ------------------------------------------------------------------------------- training


def quadratic(p, batch):
    """A loss with a known gradient: half the squared distance of one leaf from a target."""
    return 0.5 * jnp.mean(jnp.sum(jnp.square(p["w"][None] - batch), axis=1))


def middle(key, num):
    """Always t = 1/2."""
    return jnp.full(num, 0.5)


def test_one_step_is_the_hand_written_gradient_with_decay_at_the_sampled_point():
    w = {"w": jnp.array([[0.0, 0.0], [1.0, 3.0], [2.0, 0.0]])}
    batch = jnp.array([[1.0, 1.0], [3.0, 1.0]])
    rate, decay = 0.1, 0.3
    found = curves.fit(
        quadratic, curves.bezier(3), w, batch, optax.sgd(rate), 1, key=jax.random.key(0),
        sampler=middle, weight_decay=decay,
    )  # fmt: skip
    at = np.array([0.25, 0.5, 0.25]) @ np.asarray(w["w"])
    gradient = 0.5 * (at - np.asarray(batch).mean(0) + decay * at)
    np.testing.assert_allclose(found.control_points["w"][1], w["w"][1] - rate * gradient, rtol=1e-5)
    data = 0.5 * np.square(at - np.asarray(batch)).sum(1).mean()
    np.testing.assert_allclose(found.history["data_loss"], data, rtol=1e-5)
    penalty = 0.5 * decay * np.square(at).sum()
    np.testing.assert_allclose(found.history["penalty"], penalty, rtol=1e-5)
    np.testing.assert_allclose(found.history["loss"], data + penalty, rtol=1e-5)


@pytest.mark.parametrize("fixed", [(0, -1), (0,), (), (1, 2, 3)])
def test_fixed_points_stay_to_the_bit_under_momentum_and_decay(fixed):
    w = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)}
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, momentum=0.9))
    found = curves.fit(
        quadratic, curves.bezier(4), w, jnp.ones((3, 5)), optimizer, 50, key=jax.random.key(0),
        fixed=fixed, num_draws=2, weight_decay=0.01,
    ).control_points["w"]  # fmt: skip
    held = {i % 4 for i in fixed}
    for i in range(4):
        assert bool((found[i] == w["w"][i]).all()) == (i in held)


def test_draws_in_turn_and_at_once_are_the_same_step():
    w = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)}
    run = functools.partial(
        curves.fit, quadratic, curves.bezier(3), w, jnp.ones((3, 5)), optax.sgd(0.1), 10,
        key=jax.random.key(0), num_draws=4, sampler="stratified",
    )  # fmt: skip
    one, other = run(draws="sequential"), run(draws="vmap")
    np.testing.assert_allclose(one.control_points["w"], other.control_points["w"], rtol=1e-5)


def test_a_killed_fit_goes_on_to_the_same_bits(tmp_path):
    w = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)}
    data = batches.split(np.random.default_rng(1).normal(size=(12, 5)).astype(np.float32), 4)

    class Killed(Exception):
        pass

    def kill(points, step):
        if step == 30:
            raise Killed
        return {}

    run = functools.partial(
        curves.fit, quadratic, curves.bezier(3), w, data, optax.sgd(0.1, momentum=0.9), 60,
        key=jax.random.key(0),
    )  # fmt: skip
    whole = run()
    every = checkpoint.Checkpointer(tmp_path / "run", every=10)
    with pytest.raises(Killed):
        run(checkpoint=every, evaluate=kill, evaluate_every=10)
    resumed = run(checkpoint=every)
    assert resumed.start > 0
    assert equal(resumed.control_points, whole.control_points)


def test_sharded_data_and_control_points_train_as_on_one_device(mesh):
    rng = np.random.default_rng(0)
    w = {"w": jnp.asarray(rng.normal(size=(3, 16)), jnp.float32)}
    rows = rng.normal(size=(16, 16)).astype(np.float32)
    run = functools.partial(
        curves.fit, quadratic, curves.bezier(3), optimizer=optax.sgd(0.1), num_steps=5,
        key=jax.random.key(0), sampler="arc_length", num_draws=2, weight_decay=0.1,
    )  # fmt: skip
    expected = run(w, rows).control_points["w"]
    metrics = {"loss": quadratic}
    ref = curves.evaluate(
        lambda p, b: {"loss": metrics["loss"](p, b)}, curves.bezier(3), w, rows, 5
    )
    with jax.set_mesh(mesh):
        placed = {"w": jax.device_put(w["w"], NamedSharding(mesh, PartitionSpec(None, "model")))}
        data = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("data")))
        found = run(placed, data).control_points["w"]
        measured = curves.evaluate(
            lambda p, b: {"loss": metrics["loss"](p, b)}, curves.bezier(3), placed, data, 5
        )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        measured.metrics["loss"].values, ref.metrics["loss"].values, rtol=1e-5
    )
    assert measured.length == pytest.approx(ref.length, rel=1e-5)


def test_what_does_not_fit_is_refused_in_a_sentence():
    w = {"w": jnp.ones((3, 5))}
    run = functools.partial(
        curves.fit, quadratic, batches=jnp.ones((3, 5)), optimizer=optax.sgd(0.1), num_steps=1,
        key=jax.random.key(0),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"gives \(4,\) coefficients and there are 3"):
        run(curves.bezier(4), w)
    with pytest.raises(ValueError, match="nothing to train"):
        run(curves.bezier(3), w, fixed=(0, 1, 2))
    with pytest.raises(ValueError, match="expected indices of the 3"):
        run(curves.bezier(3), w, fixed=(5,))
    with pytest.raises(ValueError, match="use `fixed`"):
        run(curves.bezier(3), w, frozen=None)
    with pytest.raises(ValueError, match="expected 1 everywhere"):
        run(lambda t: jnp.stack([t, t, t]), w)
    with pytest.raises(ValueError, match="at least 2"):
        curves.bezier(1)


# ------------------------------------------------------------------------------- evaluation


def test_a_linear_loss_on_a_line_has_one_mean():
    w = {"w": jnp.array([[1.0, 0.0], [3.0, 0.0]])}
    found = curves.evaluate(
        lambda p, batch: {"loss": jnp.mean(batch) * p["w"][0]}, curves.segment(), w, jnp.ones(4), 11
    )
    loss = found.metrics["loss"]
    np.testing.assert_allclose([loss.mean, loss.integral, loss.start, loss.end], [2, 2, 1, 3])
    assert loss.barrier == pytest.approx(0, abs=1e-6)
    assert found.length == pytest.approx(2, rel=1e-6)
    assert found.chord == pytest.approx(2, rel=1e-6)


def test_an_uneven_chain_has_another_integral_than_mean():
    w = {"w": jnp.array([[0.0], [1.0], [4.0]])}
    found = curves.evaluate(
        lambda p, batch: {"loss": jnp.mean(batch) * p["w"][0]},
        curves.polychain(3),
        w,
        jnp.ones(4),
        3,
    ).metrics["loss"]
    assert found.mean == pytest.approx(5 / 3, rel=1e-6)
    assert found.integral == pytest.approx((0.5 * 1 + 2.5 * 3) / 4, rel=1e-6)


@functools.cache
def digits_networks():
    """Two networks on digits; few steps, enough for a hill between them."""
    data = datasets.load("digits", validation=0)
    model = models.build("mlp", widths=[32, 32], num_classes=10, norm="batch")
    params, state = model.init(jax.random.key(0), data.train.inputs[:1])
    source = batches.split(data.train, 128, drop_remainder=True)
    loss_fn = objectives.loss(model.apply, state)
    found = [
        fit.fit(
            loss_fn, model.init(jax.random.key(s), data.train.inputs[:1])[0], source,
            optax.sgd(0.1, momentum=0.9), 100, key=jax.random.key(9),
        ).params
        for s in (0, 1)
    ]  # fmt: skip
    return data, model, state, source, loss_fn, found


def test_a_trained_curve_goes_around_the_hill_and_keeps_its_ends():
    data, model, state, source, loss_fn, (a, b) = digits_networks()
    fresh = functools.partial(statistics.refresh, model.apply, state=state, batches=data.train)
    metrics_fn = objectives.metrics_with_state(model.apply)
    basis = curves.polychain(3)
    start = curves.initialize(basis, a, b)
    found = curves.fit(
        loss_fn, basis, start, source, optax.sgd(0.05, momentum=0.9), 150, key=jax.random.key(0)
    )
    measure = functools.partial(
        curves.evaluate, metrics_fn, basis, batches=data.train, ts=9, state_fn=lambda p: fresh(p)
    )
    straight, around = measure(start), measure(found.control_points)
    assert straight.metrics["loss"].highest > 0.3
    assert around.metrics["loss"].highest < 0.3 * straight.metrics["loss"].highest
    assert around.metrics["loss"].start == straight.metrics["loss"].start
    assert around.length > around.chord
    own = batches.mean(metrics_fn, data.train)(b, fresh(b))
    assert around.metrics["loss"].end == pytest.approx(float(own["loss"]), abs=1e-6)
    again = measure(found.control_points)
    np.testing.assert_array_equal(again.metrics["loss"].values, around.metrics["loss"].values)


# ------------------------------------------------------------------------------- resuming


class Counted:
    """Batches that count the passes over them, and end one with Ctrl-C."""

    def __init__(self, stop=None, rows=None):
        self.rows = np.random.default_rng(1).normal(size=(10, 5)) if rows is None else rows
        self.stop, self.passes = stop, 0

    def __iter__(self):
        self.passes += 1
        if self.passes == self.stop:
            raise KeyboardInterrupt
        return iter(batches.split(self.rows.astype(np.float32), 4))


def bowl(params, state, batch):
    away = params["w"][None] - batch
    return {"loss": 0.5 * jnp.mean(jnp.sum(away**2, axis=1)) + state, "linear": jnp.mean(away)}


def bent():
    return {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)}


@pytest.mark.parametrize("several", [False, True])
def test_an_interrupted_evaluation_goes_on_to_the_same_bits(several, tmp_path):
    made = []

    def state_fn(params):
        made.append(1)
        return jnp.sum(params["w"] ** 2)

    def states_fn(points):
        made.append(len(points["w"]))
        return jnp.sum(points["w"] ** 2, axis=1)

    how = {"states_fn": states_fn, "num_at_once": 4} if several else {"state_fn": state_fn}
    run = functools.partial(curves.evaluate, bowl, curves.bezier(3), bent(), ts=13, **how)
    whole = run(Counted())
    keep = checkpoint.Checkpointer(tmp_path, every=2, keep=None)
    with pytest.raises(KeyboardInterrupt):
        run(Counted(stop=8), checkpoint=keep)
    # The seventh position was still on its way.
    assert keep.steps() == [2, 4, 6]
    made.clear()
    rest = Counted()
    resumed = run(rest, checkpoint=keep)
    # The last one once more, and the seven that were missing, in groups that are as before.
    assert rest.passes == 1 + 7
    assert made == ([4, 4, 1] if several else [1] * 8)
    for name, metric in whole.metrics.items():
        np.testing.assert_array_equal(resumed.metrics[name].values, metric.values)
    assert resumed.table() == whole.table()
    assert keep.steps() == [2, 4, 6, 8, 10, 12, 13]
    done = Counted()
    assert run(done, checkpoint=keep).table() == whole.table()
    assert done.passes == 1


def test_only_the_evaluation_that_was_stopped_goes_on(tmp_path):
    def metrics_fn(params, batch):
        return bowl(params, jnp.zeros(()), batch)

    def half(params, batch):
        return {name: 0.5 * x for name, x in metrics_fn(params, batch).items()}

    w, rows = bent(), np.random.default_rng(1).normal(size=(10, 5)).astype(np.float32)
    keep = checkpoint.Checkpointer(tmp_path, every=3)
    given = {
        "metrics_fn": metrics_fn, "basis": curves.bezier(3), "control_points": w,
        "batches": batches.split(rows, 4), "ts": 5, "checkpoint": keep,
    }  # fmt: skip
    found = curves.evaluate(**given)
    # One unit in the last place of one weight.
    other = {"w": w["w"].at[1, 2].set(jnp.nextafter(w["w"][1, 2], jnp.float32(9)))}
    for change, says in (
        ({"control_points": other}, "its control points differ"),
        ({"basis": curves.polychain(3)}, "its positions differ"),
        ({"ts": 6}, "its positions differ"),
        ({"ts": [0, 0.25, 0.5, 0.7501, 1]}, "its positions differ"),
        ({"batches": batches.split(rows, 5)}, "its source differ"),
        # Too close for the metrics to tell.
        ({"batches": batches.split(rows * np.float32(1.001), 4)}, "its data differ"),
        ({"metrics_fn": half}, "at position 4 is .* by another function"),
        (
            {"metrics_fn": lambda p, b: {"loss": metrics_fn(p, b)["loss"]}},
            r"its metrics are \['linear', 'loss'\] and this run's \['loss'\]",
        ),
    ):
        with pytest.raises(ValueError, match=says) as raised:
            curves.evaluate(**(given | change))
        assert "is of another run" in str(raised.value)
        assert str(tmp_path) in str(raised.value)
    assert curves.evaluate(**given).table() == found.table()
    # Of a loader nothing is known but the metrics that it gives.
    keep = checkpoint.Checkpointer(tmp_path / "loader", every=3)
    loaded = given | {"checkpoint": keep, "batches": Counted(rows=rows)}
    curves.evaluate(**loaded)
    with pytest.raises(ValueError, match="at position 4 is .* on other data"):
        curves.evaluate(**(loaded | {"batches": Counted(rows=rows + 1)}))
    with pytest.raises(TypeError, match="curve: metrics_fn must return a dict of scalars"):
        curves.evaluate(lambda p, b: {"w": p["w"]}, curves.bezier(3), w, rows, 3)


def test_an_evaluation_stopped_on_one_device_goes_on_on_eight(mesh, tmp_path):
    w = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 16)), jnp.float32)}
    rows = np.random.default_rng(1).normal(size=(16, 16)).astype(np.float32)
    run = functools.partial(curves.evaluate, lambda p, b: {"loss": quadratic(p, b)}, ts=7)
    whole = run(curves.bezier(3), w, Counted(rows=rows))
    keep = checkpoint.Checkpointer(tmp_path, every=1)
    with pytest.raises(KeyboardInterrupt):
        run(curves.bezier(3), w, Counted(4, rows), checkpoint=keep)
    assert keep.latest() == 2
    placed = {"w": jax.device_put(w["w"], NamedSharding(mesh, PartitionSpec(None, "model")))}
    rest = Counted(rows=rows)
    with jax.set_mesh(mesh):
        found = run(curves.bezier(3), placed, rest, checkpoint=keep, mesh=mesh)
    assert rest.passes == 1 + 5
    np.testing.assert_allclose(
        found.metrics["loss"].values, whole.metrics["loss"].values, rtol=1e-5
    )
