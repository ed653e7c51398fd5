"""Members are what the run was at their steps, however often it was stopped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geojax import batches, checkpoint, curves, tree

DATA = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
START = {"w": jnp.zeros(5)}


def loss(p, batch):
    return 0.5 * jnp.mean(jnp.sum(jnp.square(p["w"][None] - batch), axis=1))


def sgd(rate):
    return optax.sgd(rate, momentum=0.9)


def source():
    return batches.split(DATA, 4)


def by_hand(rate, steps):
    """The run, step by step, in NumPy, over the same batches."""
    w, velocity, kept, feed, step = np.zeros(5), np.zeros(5), [], source(), 0
    while step < max(steps):
        for batch in feed:
            velocity = 0.9 * velocity + (w - np.asarray(batch).mean(0))
            w = w - float(rate(step)) * velocity
            step += 1
            if step in steps:
                kept.append(w)
            if step == max(steps):
                break
    return np.stack(kept)


def test_members_are_kept_where_the_rate_is_lowest():
    run = curves.fge(
        loss, START, source(), sgd, high=0.2, low=0.01, cycle_steps=6, num_members=3,
        key=jax.random.key(0),
    )  # fmt: skip
    assert run.steps.tolist() == [3, 9, 15]
    rate = lambda s: 0.01 + 0.19 * abs(2 * (s % 6) / 6 - 1)  # noqa: E731
    assert rate(3) == 0.01
    np.testing.assert_allclose(run.members["w"], by_hand(rate, [3, 9, 15]), rtol=1e-5, atol=1e-6)
    gaps = np.linalg.norm(np.diff(np.asarray(run.members["w"]), axis=0), axis=1)
    np.testing.assert_allclose(run.distances, gaps, rtol=1e-5)


def test_snapshots_are_kept_where_each_cosine_ends():
    run = curves.snapshots(
        loss, START, source(), sgd, high=0.2, cycle_steps=5, num_members=2, key=jax.random.key(0)
    )
    assert run.steps.tolist() == [5, 10]
    rate = lambda s: 0.1 * (1 + np.cos(np.pi * (s % 5) / 5))  # noqa: E731
    np.testing.assert_allclose(run.members["w"], by_hand(rate, [5, 10]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kill_at", [3, 9])
def test_a_stopped_run_goes_on_with_all_its_members(tmp_path, kill_at):
    run = functools.partial(
        curves.fge, loss, START, optimizer=sgd, high=0.2, low=0.01, cycle_steps=6, num_members=3,
        key=jax.random.key(0),
    )  # fmt: skip
    whole = run(batches=source())

    class Stopped(Exception):
        pass

    class Breaking(checkpoint.Checkpointer):
        """Keeps members, and is interrupted right after one."""

        def save(self, step, state, metadata=None):
            super().save(step, state, metadata)
            if step == kill_at:
                raise Stopped

    state = checkpoint.Checkpointer(tmp_path / "run", every=2)
    with pytest.raises(Stopped):
        run(
            batches=source(), checkpoint=state,
            store=Breaking(tmp_path / "members", every=1, keep=None),
        )  # fmt: skip
    store = checkpoint.Checkpointer(tmp_path / "members", every=1, keep=None)
    assert store.latest() == kill_at
    resumed = run(batches=source(), checkpoint=state, store=store)
    assert 0 < resumed.start < 15
    assert resumed.members["w"].tobytes() == whole.members["w"].tobytes()
    empty = checkpoint.Checkpointer(tmp_path / "other", every=1, keep=None)
    with pytest.raises(ValueError, match="are not in the store"):
        run(batches=source(), checkpoint=state, store=empty)


def test_options_that_cannot_be_are_refused_in_a_sentence(tmp_path):
    run = functools.partial(
        curves.fge, loss, START, source(), sgd, high=0.2, low=0.01, key=jax.random.key(0)
    )
    with pytest.raises(ValueError, match="expected an even number"):
        run(cycle_steps=5, num_members=2)
    with pytest.raises(ValueError, match="num_members is 0"):
        run(cycle_steps=4, num_members=0)
    store = checkpoint.Checkpointer(tmp_path, every=2, keep=None)
    with pytest.raises(ValueError, match="both or neither"):
        run(cycle_steps=4, num_members=1, checkpoint=store)
    with pytest.raises(ValueError, match="evaluate the members"):
        run(cycle_steps=4, num_members=1, evaluate=print)


def test_the_average_is_the_mean():
    members = {"w": jnp.arange(12.0).reshape(4, 3)}
    np.testing.assert_allclose(curves.swa(members)["w"], [4.5, 5.5, 6.5])


def test_swag_draws_have_the_stated_mean_and_covariance():
    rng = np.random.default_rng(0)
    members = {"w": jnp.asarray(rng.normal(size=(30, 4)) @ rng.normal(size=(4, 4)), jnp.float32)}
    gaussian = curves.swag(members, rank=20)
    keys = jax.random.split(jax.random.key(0), 40_000)
    draws = np.asarray(jax.vmap(gaussian.sample)(keys)["w"], np.float64)
    x = np.asarray(members["w"], np.float64)
    centred = x - x.mean(0)
    last = centred[-20:]
    covariance = 0.5 * np.diag(centred.var(0)) + 0.5 * last.T @ last / 19
    error = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)) / 40_000)
    assert (np.abs(draws.mean(0) - x.mean(0)) < 5 * np.sqrt(np.diag(covariance) / 40_000)).all()
    assert (np.abs(np.cov(draws.T) - covariance) < 8 * error).all()
    with pytest.raises(ValueError, match="1 members"):
        curves.swag(tree.stack(tree.unstack(members)[:1]))
