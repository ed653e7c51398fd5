"""The losses and metrics of a network on a batch of examples, from its `apply_fn` alone."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

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
    apply_fn: Callable[..., Any],
    state: PyTree,
    task: Task = "classification",
    *,
    top_k: Sequence[int] = (),
) -> Callable[[PyTree, PyTree], dict[str, jax.Array]]:
    """What to measure of a network in evaluation mode: `(params, batch) -> dict`.

    Args:
        apply_fn: `apply_fn(params, state, inputs, train) -> (outputs, state)`.
        state: The state to evaluate with, `{}` for a network without. With normalisation statistics
            it belongs to one point: elsewhere use `metrics_with_state`.
        task: As for `loss`.
        top_k: Numbers k, for 'top5_error' and the like: the fraction of labels that are not among
            the k largest outputs of their own example. Of equal outputs the class of the lower
            index comes first, as in `argmax`, so that 'top1_error' is 'error'; an example with a
            NaN among its outputs is wrong.

    Returns:
        A function for `batches.mean` and `surface.line`, giving means over the batch: 'loss', and
        for classification 'error', the fraction of wrong labels, and what `top_k` asks for.

    Raises:
        ValueError: For an unknown task; if a k is not an integer of at least 1, or there is no
            classification; once the outputs are seen, if k exceeds the number of classes.
    """
    with_state = metrics_with_state(apply_fn, task, top_k=top_k)
    return lambda params, batch: with_state(params, state, batch)


def metrics_with_state(
    apply_fn: Callable[..., Any],
    task: Task = "classification",
    *,
    top_k: Sequence[int] = (),
) -> Callable[[PyTree, PyTree, PyTree], dict[str, jax.Array]]:
    """`metrics` at points that have a state each: `(params, state, batch) -> dict`."""
    _check(task)
    for k in top_k:
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"top_k: got {k!r}; expected integers of at least 1.")
    if len(top_k) and task != "classification":
        raise ValueError(f"top_k is {tuple(top_k)} and task {task!r}; only labels have a rank.")

    def metrics_fn(params: PyTree, state: PyTree, batch: PyTree) -> dict[str, jax.Array]:
        inputs, labels = _examples(batch)
        outputs, _ = apply_fn(params, state, inputs, False)
        found = {"loss": jnp.mean(_per_example(outputs, labels, task))}
        if task == "classification":
            # Labels may be narrower than the classes' numbers, as uint8 is.
            wrong = jnp.argmax(outputs, axis=-1).astype(jnp.int32) != labels.astype(jnp.int32)
            found["error"] = jnp.mean(wrong.astype(jnp.float32))
        for k in top_k:
            within = _within_top(outputs, labels, k)
            found[f"top{k}_error"] = jnp.mean((~within).astype(jnp.float32))
        return found

    return metrics_fn


def _within_top(outputs: Any, labels: Any, k: int) -> Any:
    """Whether each label is among the k largest outputs of its row; of JAX or NumPy arrays."""
    num_classes = outputs.shape[-1]
    if not 1 <= k <= num_classes:
        raise ValueError(f"top_k: asked for the top {k} of {num_classes} classes.")
    xp = np if isinstance(outputs, np.ndarray) else jnp
    labels = labels[..., None].astype(np.int32)
    classes = xp.arange(num_classes, dtype=np.int32).reshape((1,) * (labels.ndim - 1) + (-1,))
    own = classes == labels
    # A mask rather than an indexed read, which has no rule where examples are sharded.
    score = xp.max(xp.where(own, outputs, -np.inf), axis=-1, keepdims=True)
    before = (outputs > score) | ((outputs == score) & (classes < labels))
    # Nothing is greater than NaN, nor NaN than anything.
    known = own.any(-1) & ~xp.isnan(outputs).any(-1)
    return (before.sum(-1) < k) & known
