"""What the original code does, by hand: penalties, schedules, integrals and statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geojax import batches, curves, fit, statistics

KEY = jax.random.key(0)
EPS = float(np.finfo(np.float32).eps)
# Two parameters in two leaves, three control points, and t = 1/4 on a Bezier curve.
W = {"a": jnp.array([1.0, 2.0, -3.0]), "b": jnp.array([[0.5], [-1.0], [2.0]])}
COEFFICIENTS = np.array([9, 6, 1]) / 16
A, B = COEFFICIENTS @ [1, 2, -3], COEFFICIENTS @ [0.5, -1, 2]


def quarter(key, num):
    return jnp.full(num, 0.25)


def linear(p, batch):
    return jnp.mean(batch) * (p["a"] + 2 * jnp.sum(p["b"]))


@pytest.mark.parametrize(
    ("penalty", "value", "pull"),
    [
        # half lambda |w(t)|^2, through the middle point's coefficient
        ("squares", (A**2 + B**2) / 2, (COEFFICIENTS[1] * A, COEFFICIENTS[1] * B)),
        # half lambda times the sum of the leaves' norms
        (
            "norms", (abs(A) + abs(B)) / 2,
            (COEFFICIENTS[1] * np.sign(A) / 2, COEFFICIENTS[1] * np.sign(B) / 2),
        ),
        # half lambda |theta|^2 of the one free control point
        ("control_points", (2**2 + 1**2) / 2, (2.0, -1.0)),
    ],
)  # fmt: skip
def test_each_penalty_has_its_value_and_its_pull(penalty, value, pull):
    rate, decay = 0.1, 0.3
    found = curves.fit(
        linear, curves.bezier(3), W, jnp.ones(2), optax.sgd(rate), 1, key=KEY, sampler=quarter,
        weight_decay=decay, penalty=penalty,
    )  # fmt: skip
    np.testing.assert_allclose(found.history["penalty"], decay * value, rtol=8 * EPS)
    np.testing.assert_allclose(found.history["data_loss"], A + 2 * B, rtol=8 * EPS)
    slope = COEFFICIENTS[1] * np.array([1, 2])
    expected = np.array([2.0, -1.0]) - rate * (slope + decay * np.array(pull))
    moved = found.control_points
    np.testing.assert_allclose([moved["a"][1], moved["b"][1, 0]], expected, rtol=8 * EPS)


def test_the_penalty_of_a_point_is_that_of_training():
    point = curves.point(curves.bezier(3), W, 0.25)
    np.testing.assert_allclose(curves.l2_penalty(point, 0.3), 0.15 * (A**2 + B**2), rtol=8 * EPS)
    np.testing.assert_allclose(
        curves.l2_penalty(point, 0.3, "norms"), 0.15 * (abs(A) + abs(B)), rtol=8 * EPS
    )
    with pytest.raises(ValueError, match="kind is 'l1'"):
        curves.l2_penalty(point, 0.3, "l1")


def test_the_three_phases_move_once_an_epoch():
    epochs, steps = 20, 7
    rate = curves.per_epoch(fit.three_phase(0.1, epochs), steps)
    for step in range(epochs * steps):
        alpha = (step // steps + 1) / epochs
        if alpha <= 0.5:
            factor = 1.0
        elif alpha <= 0.9:
            factor = 1 - 0.99 * (alpha - 0.5) / 0.4
        else:
            factor = 0.01
        assert float(rate(step)) == pytest.approx(0.1 * factor, rel=1e-5)
    with pytest.raises(ValueError, match="steps_per_epoch is 0"):
        curves.per_epoch(rate, 0)


def test_the_cycle_of_rates_is_the_originals_at_every_iteration():
    cycle, iterations, high, low = 4, 5, 0.05, 0.001
    rate = fit.cyclic(high, low, cycle * iterations)
    for epoch in range(2 * cycle):
        for i in range(iterations):
            tau = ((epoch % cycle) + i / iterations) / cycle
            if tau < 0.5:
                expected = high * (1 - 2 * tau) + low * 2 * tau
            else:
                expected = high * (2 * tau - 1) + low * (2 - 2 * tau)
            assert float(rate(epoch * iterations + i)) == pytest.approx(expected, rel=1e-5)


def test_the_integral_is_the_trapezoid_over_length_and_the_mean_is_over_t():
    values, steps = np.array([1.0, 3.0, 2.0, 5.0]), np.array([0, 1.0, 3.0, 0.5])
    lengths = np.cumsum(steps)
    found = curves.summarize(np.array([0, 0.3, 0.8, 1]), lengths, values)
    by_hand = sum((values[i - 1] + values[i]) / 2 * steps[i] for i in (1, 2, 3)) / steps.sum()
    assert found.integral == pytest.approx(by_hand, rel=1e-12)
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)


def test_draws_in_t_and_in_length_differ_by_the_speed():
    chain = {"a": jnp.array([0.0, 1.0, 4.0])}
    draws = functools.partial(
        curves.sample_ts, KEY, 4000, basis=curves.polychain(3), control_points=chain
    )
    assert float((draws("uniform") < 0.5).mean()) == pytest.approx(0.5, abs=0.03)
    assert float((draws("arc_length") < 0.5).mean()) == pytest.approx(0.25, abs=0.001)
    still = {"a": jnp.ones(3)}
    ts = curves.sample_ts(KEY, 8, "arc_length", basis=curves.polychain(3), control_points=still)
    assert (np.floor(np.sort(ts) * 8) == np.arange(8)).all()


def normed(params, state, inputs, train):
    """One normalisation layer over two features."""
    mean, var = (inputs.mean(0), inputs.var(0)) if train else (state["mean"], state["var"])
    if train:
        state = {"mean": 0.9 * state["mean"] + 0.1 * mean, "var": 0.9 * state["var"] + 0.1 * var}
    out = (inputs - mean[None]) / jnp.sqrt(var + 1e-5)[None]
    return out * params["scale"][None], state


def test_the_originals_statistics_average_batches_and_the_default_ones_are_exact():
    rows = np.random.default_rng(0).normal(size=(10, 2)).astype(np.float32)
    rows = rows[np.argsort(rows[:, 0])]  # sorted, so that the means of the batches differ
    state = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
    refresh = functools.partial(
        statistics.refresh, normed, {"scale": jnp.ones(2)}, state, batches.split(rows, 4)
    )
    pieces = [rows[a:b].astype(np.float64) for a, b in ((0, 4), (4, 8), (8, 10))]
    original, exact = refresh(method="mean_of_batches"), refresh()
    np.testing.assert_allclose(original["mean"], rows.mean(0), atol=8 * EPS)
    within = sum(len(x) / 10 * x.var(0, ddof=1) for x in pieces)
    np.testing.assert_allclose(original["var"], within, rtol=32 * EPS)
    np.testing.assert_allclose(exact["var"], rows.astype(np.float64).var(0), rtol=32 * EPS)
    assert original["var"][0] < 0.5 * exact["var"][0]


@pytest.mark.parametrize("sampler", ["stratified", "arc_length"])
def test_draws_in_turn_and_at_once_have_the_same_gradient(sampler):
    rng = np.random.default_rng(0)
    w = {"w": jnp.asarray(rng.normal(size=(4, 6, 3)), jnp.float32)}
    rows = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)

    def loss(p, batch, key):
        keep = jax.random.bernoulli(key, 0.8, batch.shape).astype(batch.dtype)
        return jnp.mean(jnp.square(jnp.tanh((batch * keep) @ p["w"])))

    moved = [
        curves.fit(
            loss, curves.bezier(4), w, rows, optax.sgd(1.0), 1, key=KEY, sampler=sampler,
            num_draws=4, draws=draws, weight_decay=0.1, fixed=(),
        ).control_points["w"]
        for draws in ("sequential", "vmap")
    ]  # fmt: skip
    np.testing.assert_allclose(moved[0], moved[1], atol=1e-6)
    assert float(jnp.abs(moved[0] - w["w"]).max()) > 1e-2


def test_gradients_of_four_parts_of_a_batch_are_that_of_the_whole():
    rng = np.random.default_rng(1)
    w = {"w": jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)}
    rows = rng.normal(size=(8, 6)).astype(np.float32)

    def loss(p, batch):
        return jnp.mean(jnp.square(jnp.tanh(batch @ p["w"])))

    run = functools.partial(
        curves.fit, loss, curves.bezier(3), w, optimizer=optax.sgd(0.5), num_steps=1, key=KEY,
        sampler=quarter, weight_decay=0.3,
    )  # fmt: skip
    whole = run(batches=rows)
    parts = run(batches=batches.split(rows, 2), accumulate=4)
    np.testing.assert_allclose(parts.control_points["w"], whole.control_points["w"], atol=16 * EPS)
    np.testing.assert_allclose(parts.history["loss"], whole.history["loss"], rtol=16 * EPS)
