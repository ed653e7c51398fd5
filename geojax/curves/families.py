"""Training any family of points: the free points of a stack, by draws of coefficients.

A curve draws t, a patch draws coordinates; what a step does with the coefficients is here, once.
The fixed points take no gradient and no optimizer memory, and a draw costs one ordinary gradient.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import fit as fit_
from geojax import tree
from geojax._families import (
    Guarded,
    HeldFixed,
    Split,
    combined,
    each,
    masked,
    parts_of,
    whole,
    wide,
)

__all__ = ["CurveFit", "Penalty", "l2_penalty"]

PyTree = Any
Penalty = Literal["squares", "norms", "control_points"]
PENALTIES: tuple[Penalty, ...] = ("squares", "norms", "control_points")


class CurveFit(NamedTuple):
    """A trained curve.

    Attributes:
        control_points: Stacked, leaves `(n, ...)`; the fixed ones are as they were, to the bit.
        history: Per step: 'loss' with the penalty, 'data_loss' without, 'penalty' and
            'gradient_norm'.
        evaluations: What `evaluate` returned, with the steps.
        start: The step at which this call began; more than 0 after a resume.
        state: The state of the training loop.
    """

    control_points: PyTree
    history: dict[str, np.ndarray]
    evaluations: Any
    start: int
    state: Any


class Settings(NamedTuple):
    """How the loss of a step is made of the losses at the draws."""

    num_draws: int
    draws: str
    weight_decay: float
    penalty: str


@functools.lru_cache(maxsize=32)
def _family_loss(loss_fn, basis, split, draw, settings) -> Callable:
    """The loss of the parts; one function per setting, so that it is compiled once."""
    with_key = fit_.takes_key(loss_fn)
    num_draws, draws, weight_decay, penalty_kind = settings

    def at(parts, position, batch, key):
        params = combined(parts, split, basis(position))
        loss = loss_fn(params, batch, key) if with_key else loss_fn(params, batch)
        penalty = jnp.zeros((), jnp.float32)
        if weight_decay and penalty_kind != "control_points":
            penalty = l2_penalty(params, weight_decay, penalty_kind)
        return loss, penalty

    def loss(parts, batch, key):
        if "index" in parts:
            key = jax.random.fold_in(key, parts["index"].astype(jnp.uint32))
        key_t, key_loss = jax.random.split(key)
        points = whole(parts, split) if draw.reads_points else None
        positions = draw(key_t, num_draws, points)
        if draws == "vmap":
            losses, penalties = jax.vmap(at, in_axes=(None, 0, None, None))(
                parts, positions, batch, key_loss
            )
        else:
            found = [at(parts, positions[i], batch, key_loss) for i in range(num_draws)]
            losses, penalties = (jnp.stack(list(x)) for x in zip(*found, strict=True))
        data, penalty = jnp.mean(losses), jnp.mean(penalties)
        if weight_decay and penalty_kind == "control_points":
            penalty = l2_penalty(parts["free"], weight_decay)
        return data + penalty.astype(data.dtype), {"data_loss": data, "penalty": penalty}

    return loss


def l2_penalty(params: PyTree, weight_decay: Any, kind: str = "squares") -> jax.Array:
    r"""The L2 penalty of a point, as `fit` adds it to the loss.

    .. math:: \tfrac{\lambda}{2} \sum_p \|p\|^2 \quad\text{or, for "norms",}\quad
        \tfrac{\lambda}{2} \sum_p \|p\|

    Args:
        params: A point.
        weight_decay: Lambda.
        kind: "squares" is right: it is what weight decay descends. "norms", a sum of the leaves'
            norms, is what the original's plane and chain scripts add to the loss that they report
            (not to the one that they train); only for comparing with their numbers.

    Returns:
        A scalar, float32 or better.

    Raises:
        ValueError: For another kind.

    Example:
        >>> params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([2.0])}
        >>> float(l2_penalty(params, 0.1)), float(l2_penalty(params, 2.0, "norms"))
        (1.4500000476837158, 7.0)
    """
    if kind not in ("squares", "norms"):
        raise ValueError(f"kind is {kind!r}; expected 'squares' or 'norms'.")
    leaves = jax.tree.leaves(params)
    if kind == "norms":
        return 0.5 * weight_decay * sum(tree.norm(x) for x in leaves)
    return 0.5 * weight_decay * sum(jnp.sum(jnp.square(wide(x))) for x in leaves)


def train(
    loss_fn: Callable[..., Any],
    basis: Callable,
    draw: Callable,
    control_points: PyTree,
    batches: Any,
    optimizer: Any,
    num_steps: int,
    *,
    key: jax.Array,
    split: Split,
    settings: Settings,
    index: jax.Array | None,
    over: str | None,
    evaluate: Callable[[PyTree, int], dict[str, Any]] | None,
    options: dict[str, Any],
) -> CurveFit:
    """Train the free control points of any family of points: `fit`, `fit_many` and `patch_fit`.

    Args:
        loss_fn: As for `fit`.
        basis: From a position to `(n,)` coefficients.
        draw: `(key, num, control_points)` to positions, hashable; `.reads_points` says whether it
            wants the control points.
        control_points: Stacked; with `over`, one more leading axis over families.
        batches: As for `fit`.
        optimizer: As for `fit`.
        num_steps: As for `fit`.
        key: As for `fit`.
        split: Which control points train.
        settings: See there.
        index: What is folded into the key of each step, a scalar; with `over`, `(c,)`.
        over: None for one family; "vmap" or "sequential" for several.
        evaluate: As for `fit`.
        options: Further options of `geojax.fit.fit`.

    Returns:
        A `CurveFit`, whose history has the names of `_sum_over` where there are several families.
    """
    for name in ("frozen", "has_metrics", "regularizer"):
        if name in options:
            raise ValueError(f"{name} is set by curves.fit; use `fixed` or `weight_decay`.")
    one = functools.partial(parts_of, split=split)
    parts = (jax.vmap(one) if over else one)(control_points)
    if index is not None:
        parts["index"] = index
    loss = _family_loss(loss_fn, basis, split, draw, settings)
    labels = tuple((name, name == "free") for name in parts)
    transformation = masked(optimizer, labels)
    if over:
        loss = _sum_over(loss, tree.num_points(control_points), over)
        transformation = each(transformation)
    join = functools.partial(whole, split=split)
    join = jax.vmap(join) if over else join

    def hook(parts: dict[str, PyTree], step: int) -> dict[str, Any]:
        assert evaluate is not None
        return evaluate(join(parts), step)

    if options.get("checkpoint") is not None:
        options = options | {"checkpoint": Guarded(options["checkpoint"], parts)}
    result = fit_.fit(
        loss,
        parts,
        batches,
        transformation,
        num_steps,
        key=key,
        has_metrics=True,
        frozen=HeldFixed() if len(parts) > 1 else None,
        evaluate=None if evaluate is None else hook,
        **options,
    )
    return CurveFit(
        join(result.params), result.history, result.evaluations, result.start, result.state
    )


def settings_of(num_draws: Any, draws: Any, weight_decay: Any, penalty: Any) -> Settings:
    """The options of a step, checked.

    Raises:
        ValueError: For what is unknown or out of range.
    """
    if draws not in ("sequential", "vmap"):
        raise ValueError(f"draws is {draws!r}; expected 'sequential' or 'vmap'.")
    if not isinstance(num_draws, (int, np.integer)) or num_draws < 1:
        raise ValueError(f"num_draws is {num_draws!r}; expected an integer of at least 1.")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay is {weight_decay!r}; expected at least 0.")
    if penalty not in PENALTIES:
        raise ValueError(f"penalty is {penalty!r}; expected one of {PENALTIES}.")
    return Settings(int(num_draws), draws, float(weight_decay), penalty)


@functools.lru_cache(maxsize=32)
def _sum_over(loss: Callable, num: int, over: str) -> Callable:
    """The sum of the losses of several families: each one's gradient is its own."""

    def total(parts, batch, key):
        if over == "vmap":
            losses, metrics = jax.vmap(loss, in_axes=(0, None, None))(parts, batch, key)
            rows = tree.unstack({"loss": losses} | metrics)
        else:
            found = [loss(one, batch, key) for one in tree.unstack(parts)]
            rows = [{"loss": value} | metrics for value, metrics in found]
        named = {f"{name}[{i}]": row[name] for i, row in enumerate(rows) for name in row}
        return sum(row["loss"] for row in rows), named

    return total


def per_curve(history: dict[str, np.ndarray], num: int) -> dict[str, np.ndarray]:
    """The metrics of `_sum_over` as arrays `(steps, num)`; others stay as they are."""
    out = {name: x for name, x in history.items() if "[" not in name}
    for name in ("loss", "data_loss", "penalty"):
        columns = [history.get(f"{name}[{i}]", np.zeros(0)) for i in range(num)]
        out[name] = np.stack(columns, axis=1)
    return out
