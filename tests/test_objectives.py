"""Losses and metrics of a network on a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geojax import objectives


def apply(params, state, inputs, train, key=None):
    scale = 1.0 if key is None else jax.random.uniform(key)
    return inputs @ params * (2.0 if train else 1.0) * scale, state


R = np.random.default_rng(0)
X = R.normal(size=(7, 3)).astype(np.float32)
W = R.normal(size=(3, 4)).astype(np.float32)
LABELS = R.integers(4, size=7).astype(np.int32)
KEY = jax.random.key(0)


def cross_entropy(logits):
    logits = logits.astype(np.float64)
    return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(7), LABELS])


def test_classification_is_cross_entropy_in_nats_and_the_fraction_of_wrong_labels():
    found = objectives.metrics(apply, {})(W, (X, LABELS))
    np.testing.assert_allclose(found["loss"], cross_entropy(X @ W), rtol=1e-5)
    np.testing.assert_allclose(found["error"], np.mean((X @ W).argmax(1) != LABELS), rtol=1e-6)
    scale = float(jax.random.uniform(KEY))
    loss = objectives.loss(apply, {})(W, {"inputs": X, "labels": LABELS}, KEY)
    np.testing.assert_allclose(loss, cross_entropy(2 * scale * (X @ W)), rtol=1e-5)


def test_regression_is_the_squared_error_summed_over_an_examples_outputs():
    targets = R.normal(size=(7, 4)).astype(np.float32)
    found = objectives.metrics(apply, {}, "regression")(W, (X, targets))
    np.testing.assert_allclose(found["loss"], np.sum((X @ W - targets) ** 2) / 7, rtol=1e-5)
    assert set(found) == {"loss"}


def test_low_precision_outputs_are_measured_in_float32():
    def low(params, state, inputs, train, key=None):
        return apply(params, state, inputs, train)[0].astype(jnp.bfloat16), state

    found = objectives.metrics(low, {})(W, (X, LABELS))
    assert found["loss"].dtype == jnp.float32


def test_other_batches_and_tasks_are_refused():
    with pytest.raises(ValueError, match=r"expected batches \(inputs, labels\)"):
        objectives.metrics(apply, {})(W, {"x": X})
    with pytest.raises(ValueError, match="task is 'ranking'"):
        objectives.loss(apply, {}, "ranking")
