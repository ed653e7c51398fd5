"""The losses and metrics of a network on a batch of examples, from its `apply_fn` alone."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

__all__ = ["evaluation_loss", "loss", "metrics", "metrics_with_state", "outputs"]

PyTree = Any
Task = Literal["classification", "regression"]


def _examples(batch: PyTree) -> tuple[PyTree, jax.Array]:
    if isinstance(batch, dict) and {"inputs", "labels"} <= set(batch):
        return batch["inputs"], batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise ValueError(
        "objectives: expected batches (inputs, labels) or dicts with these two entries, got "
        f"{jax.tree.structure(batch)}."
    )


def _per_example(outputs: jax.Array, labels: jax.Array, task: Task) -> jax.Array:
    import optax

    outputs = outputs.astype(jnp.float32)
    if task == "classification":
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    labels = labels.reshape(outputs.shape).astype(jnp.float32)
    return jnp.sum(jnp.square(outputs - labels).reshape(len(outputs), -1), axis=1)


def _check(task: str) -> None:
    if task not in ("classification", "regression"):
        raise ValueError(f"task is {task!r}; expected 'classification' or 'regression'.")


def loss(
    apply_fn: Callable[..., Any], state: PyTree, task: Task = "classification"
) -> Callable[[PyTree, PyTree, jax.Array], jax.Array]:
    """The training loss of a network, as `fit` takes it: `(params, batch, key) -> scalar`.

    The model runs in train mode: normalised by its batch, with dropout drawn from `key`. Running
    statistics are not tracked along the way; `statistics.refresh` computes them at the end.

    Args:
        apply_fn: `apply_fn(params, state, inputs, train, key) -> (outputs, new_state)`.
        state: A state of the network; only its shapes matter in train mode.
        task: 'classification': softmax cross-entropy in nats, with integer labels `(n, ...)` and
            outputs `(n, ..., classes)`. 'regression': squared error summed over an example's
            outputs.

    Returns:
        The loss function; the mean over the batch.
    """
    _check(task)

    def loss_fn(params: PyTree, batch: PyTree, key: jax.Array) -> jax.Array:
        inputs, labels = _examples(batch)
        outputs, _ = apply_fn(params, state, inputs, True, key)
        return jnp.mean(_per_example(outputs, labels, task))

    return loss_fn


def evaluation_loss(
    apply_fn: Callable[..., Any], state: PyTree, task: Task = "classification"
) -> Callable[[PyTree, PyTree], jax.Array]:
    """The loss of a network in evaluation mode: `(params, batch) -> scalar`.

    This is the loss whose curvature `hessian` is asked for: running statistics and no dropout, so
    that the loss of an example depends on that example alone.

    Args:
        apply_fn: `apply_fn(params, state, inputs, train) -> (outputs, state)`.
        state: The state to evaluate with, `{}` for a network without.
        task: As for `loss`.

    Returns:
        The loss function; the mean over the batch.
    """
    _check(task)

    def loss_fn(params: PyTree, batch: PyTree) -> jax.Array:
        inputs, labels = _examples(batch)
        found, _ = apply_fn(params, state, inputs, False)
        return jnp.mean(_per_example(found, labels, task))

    return loss_fn


def outputs(apply_fn: Callable[..., Any], state: PyTree) -> Callable[[PyTree, PyTree], jax.Array]:
    """The outputs of a network in evaluation mode: `(params, batch) -> outputs`, as `ggn` asks.

    Args:
        apply_fn: `apply_fn(params, state, inputs, train) -> (outputs, state)`.
        state: The state to evaluate with, `{}` for a network without.
    """

    def model_fn(params: PyTree, batch: PyTree) -> jax.Array:
        return apply_fn(params, state, _examples(batch)[0], False)[0]

    return model_fn


def metrics(
    apply_fn: Callable[..., Any], state: PyTree, task: Task = "classification"
) -> Callable[[PyTree, PyTree], dict[str, jax.Array]]:
    """What to measure of a network in evaluation mode: `(params, batch) -> dict`.

    Args:
        apply_fn: `apply_fn(params, state, inputs, train) -> (outputs, state)`.
        state: The state to evaluate with, `{}` for a network without. With normalisation statistics
            it belongs to one point: elsewhere use `metrics_with_state`.
        task: As for `loss`.

    Returns:
        A function for `batches.mean` and `surface.line`, giving means over the batch: 'loss', and
        for classification 'error', the fraction of wrong labels.
    """
    with_state = metrics_with_state(apply_fn, task)
    return lambda params, batch: with_state(params, state, batch)


def metrics_with_state(
    apply_fn: Callable[..., Any], task: Task = "classification"
) -> Callable[[PyTree, PyTree, PyTree], dict[str, jax.Array]]:
    """`metrics` at points that have a state each: `(params, state, batch) -> dict`."""
    _check(task)

    def metrics_fn(params: PyTree, state: PyTree, batch: PyTree) -> dict[str, jax.Array]:
        inputs, labels = _examples(batch)
        outputs, _ = apply_fn(params, state, inputs, False)
        found = {"loss": jnp.mean(_per_example(outputs, labels, task))}
        if task == "classification":
            wrong = jnp.argmax(outputs, axis=-1).astype(labels.dtype) != labels
            found["error"] = jnp.mean(wrong.astype(jnp.float32))
        return found

    return metrics_fn
