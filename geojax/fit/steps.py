"""The pure parts of training: a state, and a step that takes a batch and gives the next state."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import tree

__all__ = ["FitState", "compiled", "frozen_masks", "init", "make_step", "takes_key"]

PyTree = Any


class FitState(NamedTuple):
    """All that training needs to go on: checkpointing this and restoring it is exact.

    Attributes:
        params: The pytree being trained.
        opt_state: The optimiser's state.
        key: The key of the run; step s draws from `fold_in(key, s)`.
        step: How many steps have been made, int32.
        epoch: The pass over the data, int32.
        batch: How many batches of that pass have been used, int32.
    """

    params: PyTree
    opt_state: PyTree
    key: jax.Array
    step: jax.Array
    epoch: jax.Array
    batch: jax.Array


def init(params: PyTree, optimizer: Any, *, key: jax.Array) -> FitState:
    """The state before the first step. The parameters are copied, never donated.

    Raises:
        TypeError: If a leaf of `params` is not floating, naming it.
    """
    tree.check_floating(params, "params")
    # Copies throughout: the steps of `fit` donate the state, so no two buffers may be one.
    params = jax.tree.map(jnp.array, params)
    opt_state = jax.tree.map(jnp.array, optimizer.init(params))
    step, epoch, batch = (jnp.array(0, jnp.int32) for _ in range(3))
    return FitState(params, opt_state, jax.random.clone(key), step, epoch, batch)


def takes_key(loss_fn: Callable) -> bool:
    """Whether a loss is called as (params, batch, key); told from its required parameters.

    Raises:
        TypeError: If it takes neither two nor three.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except (TypeError, ValueError):
        return False
    names = [p.name for p in parameters if p.kind in kinds]
    required = [p for p in parameters if p.kind in kinds and p.default is p.empty]
    if len(required) not in (2, 3) and "key" not in names[2:3]:
        raise TypeError(
            f"loss_fn takes {len(required)} positional arguments; expected (params, batch) or "
            "(params, batch, key)."
        )
    return len(required) == 3 or "key" in names[2:3]


def _takes_step(regularizer: Callable) -> bool:
    """Whether a regularizer is called as (params, step)."""
    try:
        parameters = inspect.signature(regularizer).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len([p for p in parameters if p.kind in kinds and p.default is p.empty]) == 2


def frozen_masks(frozen: Any, params: PyTree) -> PyTree | None:
    """A boolean array for every leaf of `params`, True where it must not move."""
    if frozen is None:
        return None
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    if callable(frozen):
        values = [frozen(jax.tree_util.keystr(path)) for path, _ in leaves]
    else:
        try:
            full = jax.tree.map(
                lambda mask, part: jax.tree.map(lambda _: np.asarray(mask), part), frozen, params
            )
        except ValueError as error:
            raise ValueError(
                "frozen: expected booleans in the structure of params or of its top levels: "
                f"{error}"
            ) from error
        values = jax.tree.leaves(full)
    masks = []
    for (path, leaf), value in zip(leaves, values, strict=True):
        mask = np.asarray(value)
        if mask.dtype != bool or mask.shape != np.shape(leaf)[: mask.ndim]:
            raise ValueError(
                f"frozen: leaf {jax.tree_util.keystr(path)} of shape {np.shape(leaf)} has a mask "
                f"of {mask.dtype} and shape {mask.shape}; expected one boolean, or booleans for "
                "its leading axes (rows)."
            )
        masks.append(mask.reshape(mask.shape + (1,) * (np.ndim(leaf) - mask.ndim)))
    return jax.tree.unflatten(treedef, masks)


def _keep(masks: PyTree | None, frozen: PyTree, free: PyTree) -> PyTree:
    """`frozen` where the masks hold, `free` elsewhere; bit for bit."""
    if masks is None:
        return free

    def one(mask, a, b):
        # Whole leaves need no select, which keeps them out of the compiled step.
        if mask.all():
            return a
        return jnp.where(jnp.broadcast_to(mask, b.shape), a, b) if mask.any() else b

    return jax.tree.map(one, masks, frozen, free)


class _Parts(NamedTuple):
    """The two halves of a step: the gradient on one batch, and the update by a mean gradient."""

    gradient: Callable
    update: Callable


class _Compiled(NamedTuple):
    """The jitted steps of a run."""

    whole: Callable  # one batch: gradient and update in one program
    gradient: Callable  # of one of several batches
    update: Callable  # by their mean


def compiled(loss_fn, optimizer, has_metrics, regularizer, transform, frozen) -> _Compiled:
    """The steps for these functions; made once, so that another run does not compile again.

    The last sixteen are kept, and with them what their functions close over.
    """
    try:
        return _cached(loss_fn, optimizer, has_metrics, regularizer, transform, frozen)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
    return _cached.__wrapped__(loss_fn, optimizer, has_metrics, regularizer, transform, frozen)


@functools.lru_cache(maxsize=16)
def _cached(loss_fn, optimizer, has_metrics, regularizer, transform, frozen) -> _Compiled:
    parts = _make_parts(loss_fn, optimizer, has_metrics, regularizer, transform, frozen)

    def gradient(state, batch, index):
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), index)
        return parts.gradient(state.params, batch, key)

    def whole(state, batch):
        return parts.update(state, gradient(state, batch, 0))

    return _Compiled(
        jax.jit(whole, donate_argnums=0), jax.jit(gradient), jax.jit(parts.update, donate_argnums=0)
    )


def _make_parts(loss_fn, optimizer, has_metrics, regularizer, transform, frozen) -> _Parts:
    import optax

    with_key = takes_key(loss_fn)

    def data_loss(params, batch, key):
        out = loss_fn(params, batch, key) if with_key else loss_fn(params, batch)
        if has_metrics != isinstance(out, tuple):
            raise TypeError(
                f"loss_fn returned {type(out).__name__}; expected "
                + ("(loss, dict of metrics)." if has_metrics else "a scalar, or has_metrics=True.")
            )
        loss, metrics = out if has_metrics else (out, {})
        if jnp.shape(loss):
            raise ValueError(
                f"loss_fn returned an array of shape {jnp.shape(loss)}; expected a scalar, the "
                "mean over the batch."
            )
        return loss, metrics

    def gradient(params, batch, key):
        key_transform, key_loss = jax.random.split(key)
        if transform is not None:
            batch = transform(key_transform, batch)
        (loss, metrics), grads = jax.value_and_grad(data_loss, has_aux=True)(
            params, batch, key_loss
        )
        return {"loss": loss, "metrics": metrics, "grads": grads}

    with_step = regularizer is not None and _takes_step(regularizer)

    def penalty(params, step):
        assert regularizer is not None
        parts = regularizer(params, step) if with_step else regularizer(params)
        parts, measured = parts if isinstance(parts, tuple) else (parts, {})
        parts = parts if isinstance(parts, dict) else {"regularizer": parts}
        parts = {name: jnp.asarray(part).astype(jnp.float32) for name, part in parts.items()}
        return sum(parts.values(), start=jnp.zeros((), jnp.float32)), parts | measured

    def update(state: FitState, means: PyTree) -> tuple[FitState, dict[str, jax.Array]]:
        params = state.params
        masks = frozen_masks(frozen, params)
        loss = means["loss"].astype(tree.accumulation_dtype(means["loss"]))
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), means["grads"], params)
        metrics = {"loss": loss} | means["metrics"]
        if regularizer is not None:
            (total, parts), extra = jax.value_and_grad(penalty, has_aux=True)(params, state.step)
            grads = jax.tree.map(jnp.add, grads, extra)
            metrics = {"loss": loss + total, "data_loss": loss} | parts | means["metrics"]
        grads = _keep(masks, jax.tree.map(jnp.zeros_like, grads), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        moved = _keep(masks, params, optax.apply_updates(params, updates))
        metrics["gradient_norm"] = tree.norm(grads)
        return state._replace(params=moved, opt_state=opt_state, step=state.step + 1), metrics

    return _Parts(gradient, update)


def make_step(
    loss_fn: Callable[..., Any],
    optimizer: Any,
    *,
    has_metrics: bool = False,
    regularizer: Callable[..., Any] | None = None,
    transform: Callable[[jax.Array, PyTree], PyTree] | None = None,
    frozen: Any = None,
) -> Callable[[FitState, PyTree], tuple[FitState, dict[str, jax.Array]]]:
    """One training step as a pure function, `step(state, batch) -> (state, metrics)`.

    It can be jitted, vmapped over stacked states, or scanned. The arguments are those of `fit`. Its
    cost is one gradient, one optimiser update and, with `regularizer`, that gradient.
    """
    parts = _make_parts(loss_fn, optimizer, has_metrics, regularizer, transform, frozen)

    def step(state: FitState, batch: PyTree) -> tuple[FitState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0)
        return parts.update(state, parts.gradient(state.params, batch, key))

    return step
