"""Patches: exact at their corners, coefficients of one, and lower than the flat triangle."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from geojax import batches, checkpoint, curves, datasets, fit, models, objectives, tree

EPS = float(np.finfo(np.float32).eps)
PATCHES = [curves.triangle(d) for d in (1, 2, 3, 5)] + [curves.square(1), curves.square(2, 3)]
KEY = jax.random.key(0)


def draw(num, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"a": (num, 4, 2), "b": (num,)}
    return {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in shapes.items()}


@pytest.mark.parametrize("patch", PATCHES, ids=repr)
def test_coefficients_are_nonnegative_and_sum_to_one(patch):
    at = np.asarray(curves.sample_patch(KEY, patch, 64))
    found = np.asarray(jax.vmap(patch)(at))
    assert found.shape == (64, patch.num_points)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(1), 1, atol=8 * patch.num_points * EPS)


def test_triangular_coefficients_are_bernsteins_and_edges_are_bezier_curves():
    patch = curves.triangle(4)
    u = np.array([0.2, 0.3, 0.5])
    expected = [
        math.factorial(4) / math.prod(map(math.factorial, e)) * np.prod(u ** np.array(e))
        for e in patch.exponents
    ]
    np.testing.assert_allclose(patch(jnp.asarray(u, jnp.float32)), expected, rtol=16 * EPS)
    edge = [i for i, e in enumerate(patch.exponents) if e[2] == 0]
    along = np.asarray(patch(jnp.array([0.75, 0.25, 0.0])))
    np.testing.assert_allclose(along[edge], curves.bezier(5)(jnp.asarray(0.25)), rtol=16 * EPS)
    assert not np.delete(along, edge).any()
    assert set(edge) < set(patch.boundary)
    assert len(patch.boundary) == 12


@pytest.mark.parametrize("patch", PATCHES, ids=repr)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_corners_are_the_modes_to_the_bit(patch, dtype):
    num = len(patch.corners)
    modes = draw(num, dtype=dtype)
    w = curves.patch_initialize(patch, modes)
    places = np.eye(3) if num == 3 else np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    for i, corner in enumerate(places):
        for found in (curves.patch_point(patch, w, corner), tree.unstack(w)[patch.corners[i]]):
            for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(modes), strict=True):
                assert bool((x == y[i]).all())


@pytest.mark.parametrize("patch", PATCHES, ids=repr)
def test_initial_control_points_make_a_flat_patch(patch):
    modes = draw(len(patch.corners))
    at = np.asarray(curves.sample_patch(KEY, patch, 16))
    simple = curves.triangle(1) if len(patch.corners) == 3 else curves.square(1)
    found = curves.patch_points(patch, curves.patch_initialize(patch, modes), at)
    expected = curves.patch_points(simple, curves.patch_initialize(simple, modes), at)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=64 * EPS)


@pytest.mark.parametrize("sampler", ["uniform", "stratified"])
def test_draws_are_uniform_on_the_triangle(sampler):
    keys = jax.random.split(KEY, 500)
    at = np.asarray(
        jax.vmap(lambda k: curves.sample_patch(k, curves.triangle(2), 40, sampler))(keys)
    ).reshape(-1, 3)
    assert (at >= 0).all()
    np.testing.assert_allclose(at.sum(1), 1, atol=4 * EPS)
    np.testing.assert_allclose(at.mean(0), 1 / 3, atol=0.01)
    covariance = np.where(np.eye(3) > 0, 2, -1) / 36
    np.testing.assert_allclose(np.cov(at.T), covariance, atol=0.05 / 18)


def test_stratified_draws_fall_in_strips():
    at = np.asarray(curves.sample_patch(KEY, curves.square(2), 8, "stratified"))
    for axis in (0, 1):
        assert sorted(np.floor(at[:, axis] * 8)) == list(range(8))


def quadratic(p, batch):
    return 0.5 * jnp.mean(jnp.sum(jnp.square(p["w"][None] - batch), axis=1))


def middle(key, num):
    return jnp.full((num, 3), 1 / 3)


def test_one_step_is_the_hand_written_gradient():
    w = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    patch, rate = curves.triangle(2), 0.3
    found = curves.patch_fit(
        quadratic, patch, {"w": jnp.asarray(w)}, jnp.ones((1, 2)), optax.sgd(rate), 1, key=KEY,
        sampler=middle,
    )  # fmt: skip
    coefficients = np.array([1, 2, 2, 1, 2, 1]) / 9
    gradient = coefficients @ w - 1
    expected = w - rate * coefficients[:, None] * gradient
    expected[list(patch.corners)] = w[list(patch.corners)]
    np.testing.assert_allclose(found.control_points["w"], expected, atol=16 * EPS)
    for i in patch.corners:
        assert bool((found.control_points["w"][i] == w[i]).all())


def test_the_mean_over_a_patch_is_exact_for_a_linear_metric():
    def metrics_fn(params, batch):
        return {"loss": jnp.mean(batch) * params["w"]}

    for patch, corners in ((curves.triangle(2), [1.0, 2, 6]), (curves.square(2), [0.0, 1, 2, 5])):
        w = curves.patch_initialize(patch, {"w": jnp.array(corners)})
        found = curves.patch_evaluate(metrics_fn, patch, w, jnp.ones(2), 4).metrics["loss"]
        np.testing.assert_allclose(found.mean, np.mean(corners), rtol=1e-6)
        np.testing.assert_array_equal(found.corners, corners)
        assert found.highest == max(corners)


@functools.cache
def three_networks():
    data = datasets.load("digits", validation=0)
    model = models.build("mlp", widths=[32], num_classes=10)
    source = batches.split(data.train, 128, drop_remainder=True)
    starts = [model.init(jax.random.key(s), data.train.inputs[:1]) for s in range(3)]
    loss_fn = objectives.loss(model.apply, starts[0][1])
    modes = [
        fit.fit(
            loss_fn, params, source, optax.sgd(0.1, momentum=0.9), 120, key=jax.random.key(9)
        ).params
        for params, _ in starts
    ]  # fmt: skip
    return data, source, loss_fn, objectives.metrics(model.apply, starts[0][1]), tree.stack(modes)


def test_a_trained_patch_is_lower_than_the_flat_triangle():
    data, source, loss_fn, metrics_fn, modes = three_networks()
    patch = curves.triangle(3)
    w = curves.patch_initialize(patch, modes)
    found = curves.patch_fit(
        loss_fn, patch, w, source, optax.sgd(0.1, momentum=0.9), 250, key=KEY
    ).control_points
    flat, bent = (
        curves.patch_evaluate(metrics_fn, patch, x, data.train, 6).metrics["loss"]
        for x in (w, found)
    )
    assert flat.highest > 0.3
    assert bent.highest < 0.5 * flat.highest
    np.testing.assert_array_equal(bent.corners, flat.corners)


def test_a_stopped_patch_goes_on_to_the_same_bits(tmp_path):
    w = curves.patch_initialize(curves.triangle(2), {"w": jnp.eye(3)})

    class Stopped(Exception):
        pass

    def stop(points, step):
        if step == 8:
            raise Stopped
        return {}

    run = functools.partial(
        curves.patch_fit, quadratic, curves.triangle(2), w, jnp.ones((2, 3)), optax.sgd(0.1), 12,
        key=KEY,
    )  # fmt: skip
    saved = checkpoint.Checkpointer(tmp_path, every=4)
    with pytest.raises(Stopped):
        run(checkpoint=saved, evaluate=stop, evaluate_every=4)
    resumed = run(checkpoint=saved)
    assert resumed.start == 4
    assert resumed.control_points["w"].tobytes() == run().control_points["w"].tobytes()


def test_sharded_data_and_control_points_train_as_on_one_device(mesh):
    rng = np.random.default_rng(0)
    patch = curves.square(2)
    w = curves.patch_initialize(patch, {"w": jnp.asarray(rng.normal(size=(4, 16)), jnp.float32)})
    rows = rng.normal(size=(16, 16)).astype(np.float32)
    run = functools.partial(
        curves.patch_fit, quadratic, patch, optimizer=optax.sgd(0.1), num_steps=5, key=KEY,
        sampler="stratified", num_draws=2, weight_decay=0.1,
    )  # fmt: skip
    expected = run(w, rows).control_points["w"]
    measure = functools.partial(curves.patch_evaluate, quadratic_metrics, patch, resolution=2)
    reference = measure(w, rows).metrics["loss"].values
    with jax.set_mesh(mesh):
        placed = {"w": jax.device_put(w["w"], NamedSharding(mesh, PartitionSpec(None, "model")))}
        data = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("data")))
        found = run(placed, data).control_points["w"]
        measured = measure(placed, data).metrics["loss"].values
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(measured, reference, rtol=1e-5)


def quadratic_metrics(p, batch):
    return {"loss": quadratic(p, batch)}


def test_what_does_not_fit_is_refused_in_a_sentence():
    w = {"w": jnp.ones((6, 2))}
    run = functools.partial(
        curves.patch_fit, quadratic, batches=jnp.ones((2, 2)), optimizer=optax.sgd(0.1),
        num_steps=1, key=KEY,
    )  # fmt: skip
    with pytest.raises(ValueError, match="has 10 coefficients and there are 6"):
        run(curves.triangle(3), w)
    with pytest.raises(ValueError, match="sampler is 'sobol'"):
        run(curves.triangle(2), w, sampler="sobol")
    with pytest.raises(ValueError, match="nothing to train"):
        run(curves.triangle(2), w, fixed=range(6))
    with pytest.raises(ValueError, match="there are 6 modes; expected 3"):
        curves.patch_initialize(curves.triangle(2), w)
    with pytest.raises(ValueError, match="degree is 0"):
        curves.triangle(0)
