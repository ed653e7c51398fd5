"""Training a curve: the expected loss over its points, by gradients of the free control points.

How it differs from Garipov et al.'s code: no model is rewritten, since a curve is a combination of
whole parameter pytrees; the fixed points take no gradient and no optimizer memory; t may be drawn
stratified, antithetic or uniformly in arc length, several times a step; weight decay acts on the
sampled point, as in the paper, unless another penalty is asked for.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from geojax import tree
from geojax._families import split_of
from geojax.curves.bases import Basis, check_basis, chords_passed, coefficients, gram
from geojax.curves.families import (
    CurveFit,
    Penalty,
    per_curve,
    settings_of,
    train,
)

__all__ = ["Sampler", "fit", "fit_many", "per_epoch", "sample_ts"]

PyTree = Any
Sampler = Literal["uniform", "stratified", "antithetic", "arc_length"]
SAMPLERS: tuple[Sampler, ...] = ("uniform", "stratified", "antithetic", "arc_length")
# Chords by which arc length is measured within a step.
_CHORDS = 128


def sample_ts(
    key: jax.Array,
    num: int,
    sampler: Sampler | Callable[[jax.Array, int], jax.Array] = "uniform",
    *,
    basis: Basis | None = None,
    control_points: PyTree = None,
) -> jax.Array:
    """Positions on a curve.

    - "uniform": independent, uniform in t: what the original and its paper's experiments do.
    - "stratified": one in each of `num` equal parts of [0, 1].
    - "antithetic": t and 1 - t, for an even `num`.
    - "arc_length": stratified, uniform in the length of the curve as it is: the loss that the
      paper starts from, which does not depend on how the curve is parametrized.

    Args:
        key: A typed key.
        num: How many.
        sampler: See above, or a function of (key, num).
        basis: For "arc_length".
        control_points: For "arc_length".

    Returns:
        `(num,)`, float32, in [0, 1].

    Raises:
        ValueError: If the sampler is unknown, or does not go with `num`.
    """
    if callable(sampler):
        return sampler(key, num)
    if sampler == "uniform":
        return jax.random.uniform(key, (num,))
    if sampler == "antithetic":
        if num % 2:
            raise ValueError(f"antithetic positions come in pairs; {num} is odd.")
        half = jax.random.uniform(key, (num // 2,))
        return jnp.concatenate([half, 1 - half])
    even = (jnp.arange(num, dtype=jnp.float32) + jax.random.uniform(key, (num,))) / num
    if sampler == "stratified":
        return even
    if sampler != "arc_length":
        raise ValueError(f"sampler is {sampler!r}; expected one of {SAMPLERS} or a function.")
    if basis is None:
        raise ValueError("arc_length needs the basis and the control points.")
    at = jnp.linspace(0, 1, _CHORDS + 1)
    weights = coefficients(basis, at)
    lengths = _lengths(jnp.diff(weights, axis=0), jax.lax.stop_gradient(control_points))
    ts = chords_passed(lengths, even) / _CHORDS
    return jnp.where(jnp.sum(lengths) > 0, ts, even)


def _lengths(steps: jax.Array, control_points: PyTree) -> jax.Array:
    inner = gram(control_points).astype(jnp.float32)
    squares = jnp.einsum(
        "mi,ij,mj->m", steps[:, 1:], inner, steps[:, 1:], precision=jax.lax.Precision.HIGHEST
    )
    return jnp.sqrt(jnp.maximum(squares, 0))


@dataclasses.dataclass(frozen=True)
class _CurveDraw:
    """Draws of t; equal to its like, so that programs are reused."""

    sampler: Any
    basis: Basis

    @property
    def reads_points(self) -> bool:
        return self.sampler == "arc_length"

    def __call__(self, key: jax.Array, num: int, points: PyTree) -> jax.Array:
        return sample_ts(key, num, self.sampler, basis=self.basis, control_points=points)


def fit(
    loss_fn: Callable[..., Any],
    basis: Basis,
    control_points: PyTree,
    batches: Any,
    optimizer: Any,
    num_steps: int,
    *,
    key: jax.Array,
    fixed: Sequence[int] = (0, -1),
    sampler: Sampler | Callable[[jax.Array, int], jax.Array] = "uniform",
    num_draws: int = 1,
    draws: Literal["sequential", "vmap"] = "sequential",
    weight_decay: float = 0.0,
    penalty: Penalty = "squares",
    index: int | None = None,
    evaluate: Callable[[PyTree, int], dict[str, Any]] | None = None,
    evaluate_every: int | None = None,
    **options: Any,
) -> CurveFit:
    r"""Train the free control points of a curve so that the loss is low along all of it.

    .. math:: \min_\theta \; E_{t} \Big[ L\big(\textstyle\sum_i c_i(t) w_i\big)
        + \tfrac{\lambda}{2} \big\|\sum_i c_i(t) w_i\big\|^2 \Big]

    A step costs one ordinary gradient per draw of t, however many control points are fixed.

    Args:
        loss_fn: `(params, batch)` or `(params, batch, key)` to the mean loss, a scalar. Draws of t
            within a step share the key: dropout then is the same at all of them.
        basis: From t to `(n,)` coefficients: `bezier(n)`, `polychain(n)`, or a function.
        control_points: Stacked points, leaves `(n, ...)`; `initialize` puts them on the line.
        batches: One batch or a re-iterable.
        optimizer: An optax transformation; it sees the free points alone, stacked. Leave its own
            weight decay off: it would pull the control points, not the curve.
        num_steps: Optimizer steps.
        key: For t, dropout and augmentation.
        fixed: Indices of the control points that stay, both ends by default.
        sampler: How t is drawn, see `sample_ts`.
        num_draws: Draws of t per step, whose losses are averaged.
        draws: "sequential", or "vmap" for all draws at once: faster on accelerators for dense
            models, `num_draws` times the memory.
        weight_decay: Lambda above.
        penalty: What it weighs. "squares" is right, and what the original trains: half the squared
            norm of the sampled point. "norms": the sum of the leaves' norms, which the original's
            plane and chain scripts report; see `l2_penalty`. "control_points": half the squared
            norm of the free control points, what an optimizer's weight decay does; it pulls them
            also where the curve does not go.
        index: The draws of curve `index` of `fit_many` with this key; by default those of the key.
        evaluate: `(control_points, step) -> dict of numbers`, every `evaluate_every` steps.
        evaluate_every: Steps between evaluations.
        **options: Further options of `geojax.fit.fit`: `transform`, `mesh`, `checkpoint` (with
            which it resumes to the bit), `log`, `accumulate`, `progress` and so on.

    Returns:
        A `CurveFit`.

    Raises:
        ValueError: If basis and control points do not fit, or an option is unknown.
        NonFiniteError: As `geojax.fit.fit`.

    Example:
        >>> import optax
        >>> from geojax.curves import bezier, initialize
        >>> loss = lambda p, batch: jnp.mean((jnp.sum(p["w"] ** 2) - batch) ** 2)
        >>> ends = {"w": jnp.array([-1.0, 0.0])}, {"w": jnp.array([1.0, 0.0])}
        >>> start = initialize(bezier(3), *ends)
        >>> start["w"] = start["w"].at[1, 1].set(0.1)
        >>> found = fit(loss, bezier(3), start, jnp.ones(1), optax.sgd(0.1), 200,
        ...             key=jax.random.key(0))
        >>> bool(found.control_points["w"][1, 1] > 1)  # the curve goes around the circle
        True

    Reference:
        Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", NeurIPS
        2018, section 3.
    """
    tree.check_floating(control_points, "control_points")
    settings = settings_of(num_draws, draws, weight_decay, penalty)
    if index is not None and (not isinstance(index, (int, np.integer)) or index < 0):
        raise ValueError(f"index is {index!r}; expected the number of a curve, at least 0.")
    num = check_basis(basis, control_points)
    sample_ts(key, int(num_draws), sampler, basis=basis, control_points=control_points)
    return train(
        loss_fn,
        basis,
        _CurveDraw(sampler, basis),
        control_points,
        batches,
        optimizer,
        num_steps,
        key=key,
        split=split_of(fixed, num),
        settings=settings,
        index=None if index is None else jnp.asarray(index, jnp.float32),
        over=None,
        evaluate=evaluate,
        options=options | {"evaluate_every": evaluate_every},
    )


def fit_many(
    loss_fn: Callable[..., Any],
    basis: Basis,
    control_points: PyTree,
    batches: Any,
    optimizer: Any,
    num_steps: int,
    *,
    key: jax.Array,
    fixed: Sequence[int] = (0, -1),
    sampler: Sampler | Callable[[jax.Array, int], jax.Array] = "uniform",
    num_draws: int = 1,
    draws: Literal["sequential", "vmap"] = "sequential",
    weight_decay: float = 0.0,
    penalty: Penalty = "squares",
    over: Literal["vmap", "sequential"] = "vmap",
    evaluate: Callable[[PyTree, int], dict[str, Any]] | None = None,
    evaluate_every: int | None = None,
    **options: Any,
) -> CurveFit:
    """Train several curves at once: between several pairs, or of several seeds.

    All curves see the same batches, transformed once, and each has its own draws and an optimizer
    state of its own: the optimizer is mapped over the curves, so that clipping by the global norm
    and the like act within a curve. Curve i is the one that
    `fit(..., tree.unstack(control_points)[i], key=key, index=i)` trains, up to rounding.

    Args:
        loss_fn: As for `fit`.
        basis: As for `fit`; one for all curves.
        control_points: Leaves `(c, n, ...)`: `tree.stack` of the control points of c curves.
        batches: As for `fit`.
        optimizer: An optax transformation, as for `fit`.
        num_steps: Optimizer steps.
        key: At each step, curve i uses `fold_in(k, i)` where `fit` uses the step's key k, for t
            and dropout; `transform` takes the step's key itself.
        fixed: Indices of the control points that stay in every curve.
        sampler: As for `fit`.
        num_draws: As for `fit`, for each curve.
        draws: As for `fit`.
        weight_decay: As for `fit`.
        penalty: As for `fit`.
        over: "vmap" for all curves in one program; "sequential" takes them in turn within the
            step, which is faster for convolutions on a CPU and compiles c copies.
        evaluate: `(control_points, step) -> dict of numbers`, with all c curves.
        evaluate_every: Steps between evaluations.
        **options: Further options of `geojax.fit.fit`; with `checkpoint` it resumes to the bit.

    Returns:
        A `CurveFit` with control points `(c, n, ...)`; its history's 'loss', 'data_loss' and
        'penalty' are `(steps, c)`, 'gradient_norm' is that of all curves together. Cost per step:
        c gradients per draw; memory: c times that of `fit`.

    Raises:
        ValueError: As `fit`; if the leaves lack the axis over curves.
        NonFiniteError: If one of the curves diverges: all stop.

    Example:
        >>> import optax
        >>> from geojax.curves import polychain
        >>> loss = lambda p, batch: jnp.mean((jnp.sum(p["w"] ** 2) - batch) ** 2)
        >>> one = jnp.array([[-1.0, 0.0], [0.0, 0.1], [1.0, 0.0]])
        >>> both = {"w": jnp.stack([one, -one])}
        >>> found = fit_many(loss, polychain(3), both, jnp.ones(1), optax.sgd(0.1), 50,
        ...                  key=jax.random.key(0))
        >>> [bool(x > 1) for x in jnp.abs(found.control_points["w"][:, 1, 1])]
        [True, True]
    """
    tree.check_floating(control_points, "control_points")
    num_curves = tree.num_points(control_points)
    for path, leaf in zip(tree.paths(control_points), jax.tree.leaves(control_points), strict=True):
        if jnp.ndim(leaf) < 2:
            raise ValueError(
                f"control_points: leaf {path} has shape {jnp.shape(leaf)}; expected (curves, "
                "control points, ...): `tree.stack` the control points of the curves."
            )
    if over not in ("vmap", "sequential"):
        raise ValueError(f"over is {over!r}; expected 'vmap' or 'sequential'.")
    settings = settings_of(num_draws, draws, weight_decay, penalty)
    first = tree.unstack(control_points)[0]
    num = check_basis(basis, first)
    sample_ts(key, int(num_draws), sampler, basis=basis, control_points=first)
    found = train(
        loss_fn,
        basis,
        _CurveDraw(sampler, basis),
        control_points,
        batches,
        optimizer,
        num_steps,
        key=key,
        split=split_of(fixed, num),
        settings=settings,
        index=_numbers(control_points, num_curves),
        over=over,
        evaluate=evaluate,
        options=options | {"evaluate_every": evaluate_every},
    )
    return found._replace(history=per_curve(found.history, num_curves))


def per_epoch(schedule: Callable[[Any], jax.Array], steps_per_epoch: int) -> Callable:
    """A schedule that is read once an epoch, as the original's training scripts do.

    There the three-phase schedule is a function of the epoch, counted from 1, and constant within
    it; that is what this reproduces. `geojax.fit.three_phase` over steps is the better default: it
    has no jumps, and does not start one epoch ahead.

    Args:
        schedule: From an epoch, counted from 1, to a rate: `fit.three_phase(peak, num_epochs)`.
        steps_per_epoch: Optimizer steps in an epoch.

    Returns:
        A schedule over steps, for an optax transformation.

    Example:
        >>> from geojax.fit import three_phase
        >>> rate = per_epoch(three_phase(1.0, 10), 5)
        >>> [round(float(rate(step)), 4) for step in (0, 24, 25, 34, 35, 40, 49)]
        [1.0, 1.0, 0.7525, 0.505, 0.2575, 0.01, 0.01]
    """
    if not isinstance(steps_per_epoch, (int, np.integer)) or steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch is {steps_per_epoch!r}; expected at least 1.")
    return lambda step: schedule(jnp.asarray(step, jnp.int32) // int(steps_per_epoch) + 1)


def _numbers(control_points: PyTree, num: int) -> jax.Array:
    """0 to num - 1, over the devices as the curves are."""
    numbers = jnp.arange(num, dtype=jnp.float32)
    sharding = getattr(jax.tree.leaves(control_points)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding) or not sharding.spec:
        return numbers
    return jax.device_put(numbers, NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0])))
