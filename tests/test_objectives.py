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


def outputs_as_they_are(params, state, inputs, train):
    return inputs, state


def test_the_top_five_of_random_outputs_hold_one_label_in_twenty():
    r = np.random.default_rng(1)
    inputs = r.normal(size=(20_000, 100)).astype(np.float32)
    labels = r.integers(100, size=20_000).astype(np.int32)
    measure = objectives.metrics(outputs_as_they_are, {}, top_k=(1, 5, 100))
    found = jax.jit(measure)({}, (inputs, labels))
    assert set(found) == {"loss", "error", "top1_error", "top5_error", "top100_error"}
    # The label must be among its own row's five: of anyone's five it nearly always is.
    order = np.argsort(-inputs, -1)[:, :5]
    want = np.mean((order != labels[:, None]).all(-1))
    assert float(found["top5_error"]) == pytest.approx(want, rel=1e-6)
    assert 1 - float(found["top5_error"]) == pytest.approx(0.05, abs=0.01)
    assert found["top1_error"] == found["error"]
    assert found["top100_error"] == 0


def test_equal_outputs_are_ranked_by_class_as_argmax_ranks_them():
    inputs = np.array([[1.0, 1.0, 1.0]] * 3 + [[0.0, 2.0, 2.0]] * 3, np.float32)
    labels = np.array([0, 0, 1, 0, 1, 1], np.uint8)
    found = objectives.metrics(outputs_as_they_are, {}, top_k=(1, 2))({}, (inputs, labels))
    # Ranks: 0, 0, 1 and 2, 0, 0.
    assert float(found["top1_error"]) == float(found["error"]) == pytest.approx(2 / 6)
    assert float(found["top2_error"]) == pytest.approx(1 / 6)


def test_outputs_that_are_not_numbers_are_not_among_the_best():
    inputs = np.array([[np.nan, 1.0, 0.0], [0.0, np.nan, 1.0], [-np.inf, 1.0, 0.0]], np.float32)
    labels = np.array([0, 2, 1], np.int32)
    found = objectives.metrics(outputs_as_they_are, {}, top_k=(2,))({}, (inputs, labels))
    assert float(found["top2_error"]) == pytest.approx(2 / 3)


def test_tops_of_sequences_and_of_sharded_examples(mesh):
    inputs = R.normal(size=(8, 5, 6)).astype(np.float32)
    labels = R.integers(6, size=(8, 5)).astype(np.int32)
    measure = objectives.metrics_with_state(outputs_as_they_are, top_k=(3,))
    want = np.mean((np.argsort(-inputs, -1)[..., :3] != labels[..., None]).all(-1))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = jax.device_put((inputs, labels), where)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda batch: measure({}, {}, batch)["top3_error"])(batch)
    assert float(found) == pytest.approx(want, rel=1e-6)


def test_tops_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="expected integers of at least 1"):
        objectives.metrics(apply, {}, top_k=(0,))
    with pytest.raises(ValueError, match="only labels have a rank"):
        objectives.metrics(apply, {}, "regression", top_k=(5,))
    with pytest.raises(ValueError, match="asked for the top 5 of 4 classes"):
        objectives.metrics(apply, {}, top_k=(5,))(W, (X, LABELS))


def test_labels_of_one_byte_are_not_confused_with_classes_past_256():
    outputs = jnp.zeros((1, 300)).at[0, 259].set(1.0)
    metrics_fn = objectives.metrics(lambda params, state, x, train: (outputs, state), {})
    found = metrics_fn({}, (jnp.zeros((1, 2)), jnp.array([3], jnp.uint8)))
    assert float(found["error"]) == 1.0
