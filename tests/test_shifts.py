"""Corruptions, entropies and tables over seeds."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geojax import batches, datasets, ensemble, fit, models, objectives

KEY = jax.random.key(0)


@functools.cache
def digits_network():
    data = datasets.load("digits", validation=0)
    model = models.build("mlp", widths=[32], num_classes=10)
    params, _ = model.init(jax.random.key(0), data.train.inputs[:1])
    source = batches.split(data.train, 128)
    found = fit.fit(
        objectives.loss(model.apply, {}), params, source, optax.sgd(0.1, 0.9), 200, key=KEY
    )
    return data, objectives.outputs(model.apply, {}), found.params


@pytest.mark.parametrize("kind", ["noise", "blur", "rotation", "contrast"])
def test_predictions_get_worse_with_each_level_of_corruption(kind):
    data, model_fn, params = digits_network()
    losses, entropies = [], []
    for level in range(6):
        images = ensemble.corrupt(data.test.inputs, kind, level, key=KEY)
        assert images.shape == data.test.inputs.shape
        assert images.dtype == data.test.inputs.dtype
        found = ensemble.predict(model_fn, [params], (images, data.test.labels))
        losses.append(ensemble.calibration(found, data.test.labels).nll.value)
        entropies.append(ensemble.predictive_entropy(found).mean())
    assert (np.diff(losses) > 0).all(), losses
    if kind == "noise":
        assert (np.diff(entropies) > 0).all(), entropies
        noisy = ensemble.corrupt(data.test.inputs, kind, 5, key=KEY)
        pair = [
            ensemble.predictive_entropy(ensemble.predict(model_fn, [params], (x, data.test.labels)))
            for x in (data.test.inputs, noisy)
        ]
        found = ensemble.auroc(*pair)
        assert 0.5 + 5 * found.standard_error < found.value < 1
        assert 0 < found.standard_error < 0.03


def test_a_quarter_turn_blur_and_contrast_by_hand():
    image = jnp.zeros((1, 5, 5, 1)).at[0, 0, 2, 0].set(1.0)
    from geojax.ensemble import shifts

    turned = shifts._rotated(image, jnp.array([np.pi / 2]), jnp.zeros((1, 1, 1, 1)))
    assert np.unravel_index(int(jnp.argmax(turned)), turned.shape) in ((0, 2, 0, 0), (0, 2, 4, 0))
    assert float(turned.max()) == pytest.approx(1, abs=1e-5)
    flat = jnp.full((1, 6, 6, 2), 3.0)
    for kind in ("blur", "rotation", "contrast"):
        np.testing.assert_allclose(ensemble.corrupt(flat, kind, 5, key=KEY), 3.0, rtol=1e-5)
    # A Gaussian keeps the sum where nothing leaves the image.
    spot = jnp.zeros((1, 31, 31, 1)).at[0, 15, 15, 0].set(1.0)
    blurred = ensemble.corrupt(spot, "blur", 3, key=KEY)
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)
    row = np.asarray(blurred[0, 15, :, 0])
    assert row[16] / row[15] == pytest.approx(math.exp(-0.5), rel=1e-4)
    pulled = ensemble.corrupt(jnp.array([[0.0, 2.0]]), "contrast", 2, key=KEY)
    np.testing.assert_allclose(pulled, [[0.5, 1.5]])
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(200, 100)), jnp.float32)
    noise = ensemble.corrupt(rows, "noise", 5, key=KEY) - rows
    assert float(noise.std()) == pytest.approx(float(rows.std()), rel=0.02)


def test_auroc_counts_pairs():
    rng = np.random.default_rng(1)
    a, b = rng.integers(6, size=40), rng.integers(9, size=30)
    pairs = (b[None] > a[:, None]) + 0.5 * (b[None] == a[:, None])
    assert ensemble.auroc(a, b).value == pytest.approx(pairs.mean())
    assert ensemble.auroc(a, a).value == pytest.approx(0.5)
    # Hanley and McNeil's error is about that of repetitions.
    areas = [
        ensemble.auroc(rng.exponential(size=60), rng.exponential(size=60) * 2).value
        for _ in range(300)
    ]
    error = ensemble.auroc(rng.exponential(size=60), rng.exponential(size=60) * 2).standard_error
    assert error == pytest.approx(np.std(areas), rel=0.25)


def test_seeds_are_paired_with_the_baseline():
    rng = np.random.default_rng(2)
    base = rng.normal(size=5)
    scores = {"one": {"nll": base}, "two": {"nll": base - 0.1 + 0.01 * rng.normal(size=5)}}
    found = ensemble.compare_seeds(scores, "one", budgets={"one": 100, "two": 104})
    one, two = found.means["one"]["nll"], found.differences["two"]["nll"]
    assert not one.excludes_zero or one.half_width > 0.3
    assert two.excludes_zero
    assert two.half_width < 0.1 * one.half_width
    assert found.lower["two"]["nll"] == 5
    from scipy import stats

    low, high = stats.t.interval(0.95, 4, base.mean(), stats.sem(base))
    assert one.mean == pytest.approx((low + high) / 2)
    assert one.half_width == pytest.approx((high - low) / 2)
    row = found.table()[1]
    assert row["budget"] == "104"
    assert row["lower nll"] == "5 of 5"
    with pytest.raises(ValueError, match="one budget"):
        ensemble.compare_seeds(scores, "one", budgets={"one": 100, "two": 200})
    with pytest.raises(ValueError, match="the same seeds"):
        ensemble.compare_seeds({"one": {"nll": [1.0]}, "two": {"nll": [1.0, 2.0]}}, "one")
    with pytest.raises(ValueError, match="baseline"):
        ensemble.compare_seeds(scores, "three")


@pytest.mark.parametrize(
    ("images", "kind", "level", "message"),
    [
        (np.zeros((2, 3, 3, 1), np.float32), "fog", 1, "expected one of"),
        (np.zeros((2, 3, 3, 1), np.float32), "noise", 6, "0 to 5"),
        (np.zeros((2, 9), np.float32), "blur", 1, "height, width, channels"),
        (np.zeros((2, 3, 3, 1), np.uint8), "noise", 1, "floating"),
    ],
)
def test_what_cannot_be_corrupted_is_refused(images, kind, level, message):
    with pytest.raises(ValueError, match=message):
        ensemble.corrupt(images, kind, level, key=KEY)
