"""Several curves in one call are the curves of separate calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from geojax import batches, checkpoint, curves, models, objectives, tree

R = np.random.default_rng(0)
ROWS = R.normal(size=(12, 8)).astype(np.float32)
KEY = jax.random.key(3)
EPS = float(np.finfo(np.float32).eps)


def loss_fn(p, batch, key):
    """A loss with curvature and noise, so that draws and keys matter."""
    scale = 1 + 0.1 * jax.random.normal(key)
    return jnp.mean(jnp.square(jnp.tanh(batch @ p["w"] * scale) - p["b"][None]))


def control_points(num_curves):
    rng = np.random.default_rng(1)
    shapes = {"w": (num_curves, 4, 8, 3), "b": (num_curves, 4, 3)}
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def source():
    return batches.split(ROWS, 4, key=jax.random.key(7))


OPTIMIZERS = {
    "momentum": optax.sgd(0.05, momentum=0.9),
    "rms": optax.chain(optax.scale_by_rms(), optax.scale(-0.01)),
    "clipped": optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.3, momentum=0.9)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("over", ["vmap", "sequential"])
def test_five_curves_in_one_call_are_those_of_five_calls(name, over):
    w, basis, optimizer = control_points(5), curves.bezier(4), OPTIMIZERS[name]
    options = {
        "num_steps": 12, "key": KEY, "num_draws": 2, "sampler": "stratified", "weight_decay": 0.1,
    }  # fmt: skip
    found = curves.fit_many(loss_fn, basis, w, source(), optimizer, over=over, **options)
    assert found.history["loss"].shape == (12, 5)
    for i, one in enumerate(tree.unstack(w)):
        alone = curves.fit(loss_fn, basis, one, source(), optimizer, index=i, **options)
        for x, y in zip(
            jax.tree.leaves(tree.unstack(found.control_points)[i]),
            jax.tree.leaves(alone.control_points),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, atol=16 * EPS)
        for measure in ("loss", "data_loss", "penalty"):
            np.testing.assert_allclose(
                found.history[measure][:, i], alone.history[measure], rtol=32 * EPS
            )
    for x, y in zip(jax.tree.leaves(found.control_points), jax.tree.leaves(w), strict=True):
        assert bool((x[:, 0] == y[:, 0]).all())
        assert bool((x[:, -1] == y[:, -1]).all())
        assert not bool((x[:, 1] == y[:, 1]).any())


@pytest.mark.parametrize("over", ["vmap", "sequential"])
def test_convolutional_curves_are_each_normalised_by_batches_of_their_own(over):
    model = models.build("cnn", widths=[4], num_classes=3)
    data = R.normal(size=(24, 6, 6, 1)).astype(np.float32), np.arange(24, dtype=np.int32) % 3
    made = [model.init(jax.random.key(i), data[0][:1]) for i in range(4)]
    train = objectives.loss(model.apply, made[0][1])
    nets, basis = [params for params, _ in made], curves.bezier(3)
    pairs = [curves.initialize(basis, *nets[:2]), curves.initialize(basis, *nets[2:])]
    options = {"num_steps": 4, "key": KEY}
    args = batches.split(data, 12), optax.sgd(0.3)
    found = curves.fit_many(train, basis, tree.stack(pairs), *args, over=over, **options)
    for i, (one, start) in enumerate(zip(tree.unstack(found.control_points), pairs, strict=True)):
        alone = curves.fit(train, basis, start, *args, index=i, **options).control_points
        moved = float(tree.norm(tree.axpy(-1.0, start, alone)))
        assert moved > 0.05
        assert float(tree.norm(tree.axpy(-1.0, one, alone))) < 64 * EPS * moved


def test_curves_have_draws_of_their_own_and_one_trace():
    traces = []

    def counted(p, batch):
        traces.append(1)
        return jnp.mean(jnp.square(batch @ p["w"])) + jnp.sum(p["b"])

    w = jax.tree.map(lambda x: jnp.concatenate([x, x]), control_points(1))
    run = functools.partial(
        curves.fit_many, counted, curves.bezier(4), w, ROWS, OPTIMIZERS["momentum"], 5
    )
    found = run(key=KEY).control_points["w"]
    assert len(traces) == 1
    run(key=jax.random.key(5))
    assert len(traces) == 1
    assert not bool((found[0, 1] == found[1, 1]).all())


def test_a_stopped_call_goes_on_to_the_same_bits(tmp_path):
    run = functools.partial(
        curves.fit_many, loss_fn, curves.bezier(4), control_points(2), source(),
        OPTIMIZERS["momentum"], 12, key=KEY,
    )  # fmt: skip

    class Stopped(Exception):
        pass

    def stop(points, step):
        assert jax.tree.leaves(points)[0].shape[:2] == (2, 4)
        if step == 8:
            raise Stopped
        return {}

    saved = checkpoint.Checkpointer(tmp_path, every=4)
    with pytest.raises(Stopped):
        run(checkpoint=saved, evaluate=stop, evaluate_every=4)
    whole, resumed = run(), run(checkpoint=saved)
    assert resumed.start == 4
    assert resumed.history["loss"].shape == (8, 2)
    for x, y in zip(
        jax.tree.leaves(whole.control_points), jax.tree.leaves(resumed.control_points), strict=True
    ):
        assert x.tobytes() == y.tobytes()
    with pytest.raises(ValueError, match="of other fixed points"):
        curves.fit_many(
            loss_fn, curves.bezier(4), jax.tree.map(lambda x: x + 1, control_points(2)), source(),
            OPTIMIZERS["momentum"], 12, key=KEY, checkpoint=saved,
        )  # fmt: skip


@pytest.mark.parametrize("axis", ["leaf", "curve"])
def test_sharded_curves_and_data_train_as_on_one_device(mesh, axis):
    w = control_points(2)
    run = functools.partial(
        curves.fit_many, loss_fn, curves.bezier(4), optimizer=OPTIMIZERS["clipped"], num_steps=4,
        key=KEY, sampler="arc_length", num_draws=2, weight_decay=0.1,
    )  # fmt: skip
    expected = run(w, ROWS)
    spec = PartitionSpec(None, None, "model") if axis == "leaf" else PartitionSpec("model")
    with jax.set_mesh(mesh):
        placed = {
            "w": jax.device_put(w["w"], NamedSharding(mesh, spec)),
            "b": jax.device_put(
                w["b"], NamedSharding(mesh, spec if axis == "curve" else PartitionSpec())
            ),
        }
        data = jax.device_put(ROWS, NamedSharding(mesh, PartitionSpec("data")))
        found = run(placed, data)
    for x, y in zip(
        jax.tree.leaves(found.control_points), jax.tree.leaves(expected.control_points), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=1e-5)
    if axis == "leaf":
        assert found.control_points["w"].sharding.spec[2] == "model"
    np.testing.assert_allclose(found.history["loss"], expected.history["loss"], rtol=1e-4)


def test_what_is_no_stack_of_curves_is_refused_in_a_sentence():
    run = functools.partial(
        curves.fit_many, loss_fn, curves.bezier(4), batches=ROWS, optimizer=OPTIMIZERS["momentum"],
        num_steps=1, key=KEY,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"expected \(curves, control points"):
        run({"w": jnp.ones(3), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match="over is 'map'"):
        run(control_points(2), over="map")
    with pytest.raises(ValueError, match="penalty is 'l1'"):
        run(control_points(2), penalty="l1")
