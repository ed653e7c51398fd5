"""Training a curve: the expected loss over its points, by gradients of the free control points.

How it differs from Garipov et al.'s code: no model is rewritten, since a curve is a combination of
whole parameter pytrees; the fixed points take no gradient and no optimizer memory; t may be drawn
stratified, antithetic or uniformly in arc length, several times a step; weight decay acts on the
sampled point, as in the paper, in every entry point alike.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import fit as fit_
from geojax import tree
from geojax.curves.bases import Basis, check_basis, coefficients, gram

__all__ = ["CurveFit", "Sampler", "fit", "sample_ts"]

PyTree = Any
Sampler = Literal["uniform", "stratified", "antithetic", "arc_length"]
SAMPLERS: tuple[Sampler, ...] = ("uniform", "stratified", "antithetic", "arc_length")
# Chords by which arc length is measured within a step.
_CHORDS = 128


class CurveFit(NamedTuple):
    """A trained curve.

    Attributes:
        control_points: Stacked, leaves `(n, ...)`; the fixed ones are as they were, to the bit.
        history: Per step: 'loss' with the weight decay, 'data_loss' without, 'gradient_norm'.
        evaluations: What `evaluate` returned, with the steps.
        start: The step at which this call began; more than 0 after a resume.
        state: The state of the training loop.
    """

    control_points: PyTree
    history: dict[str, np.ndarray]
    evaluations: Any
    start: int
    state: Any


def sample_ts(
    key: jax.Array,
    num: int,
    sampler: Sampler | Callable[[jax.Array, int], jax.Array] = "uniform",
    *,
    basis: Basis | None = None,
    control_points: PyTree = None,
) -> jax.Array:
    """Positions on a curve.

    - "uniform": independent, uniform in t.
    - "stratified": one in each of `num` equal parts of [0, 1].
    - "antithetic": t and 1 - t, for an even `num`.
    - "arc_length": stratified, uniform in the length of the curve as it is.

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
    total = jnp.concatenate([jnp.zeros(1), jnp.cumsum(lengths)])
    return jnp.interp(even * total[-1], total, at)


def _lengths(steps: jax.Array, control_points: PyTree) -> jax.Array:
    inner = gram(control_points).astype(jnp.float32)
    squares = jnp.einsum(
        "mi,ij,mj->m", steps[:, 1:], inner, steps[:, 1:], precision=jax.lax.Precision.HIGHEST
    )
    return jnp.sqrt(jnp.maximum(squares, 0))


class _Split(NamedTuple):
    """Which control points train."""

    free: tuple[int, ...]
    fixed: tuple[int, ...]


def _split(fixed: Sequence[int], num: int) -> _Split:
    given = list(fixed)
    if any(not isinstance(i, (int, np.integer)) or not -num <= i < num for i in given):
        raise ValueError(f"fixed is {fixed}; expected indices of the {num} control points.")
    held = {int(i) % num for i in given}
    free = tuple(i for i in range(num) if i not in held)
    if not free:
        raise ValueError("every control point is fixed; there is nothing to train.")
    return _Split(free, tuple(sorted(held)))


def _parts(control_points: PyTree, split: _Split) -> dict[str, PyTree]:
    """The free and the fixed points, apart, in their sharding."""
    members = tree.unstack(control_points)
    parts = {"free": tree.stack([members[i] for i in split.free])}
    if split.fixed:
        parts["fixed"] = tree.stack([members[i] for i in split.fixed])
    return parts


def _whole(parts: dict[str, PyTree], split: _Split) -> PyTree:
    """All control points in order, from the two stacks."""
    members = dict(zip(split.free, tree.unstack(parts["free"]), strict=True))
    if split.fixed:
        members |= dict(zip(split.fixed, tree.unstack(parts["fixed"]), strict=True))
    return tree.stack([members[i] for i in range(len(members))])


def _point(parts: dict[str, PyTree], split: _Split, weights: jax.Array) -> PyTree:
    """The point with these coefficients; the fixed part is a constant of the gradient."""
    total = tree.combine(_wide(parts["free"]), weights[np.array(split.free)])
    if split.fixed:
        fixed = jax.lax.stop_gradient(_wide(parts["fixed"]))
        held = tree.combine(fixed, weights[np.array(split.fixed)])
        total = jax.tree.map(jnp.add, total, held)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), total, parts["free"])


def _wide(points: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(tree.accumulation_dtype(x)), points)


@functools.lru_cache(maxsize=32)
def _curve_loss(loss_fn, basis, split, sampler, num_draws, weight_decay, draws) -> Callable:
    """The loss of the parts; one function per setting, so that it is compiled once."""
    with_key = fit_.takes_key(loss_fn)

    def at(parts, t, batch, key):
        params = _point(parts, split, basis(t))
        loss = loss_fn(params, batch, key) if with_key else loss_fn(params, batch)
        penalty = jnp.zeros((), jnp.float32)
        if weight_decay:
            squares = [jnp.sum(jnp.square(_wide(x))) for x in jax.tree.leaves(params)]
            penalty = 0.5 * weight_decay * sum(squares)
        return loss, penalty

    def loss(parts, batch, key):
        key_t, key_loss = jax.random.split(key)
        points = _whole(parts, split) if sampler == "arc_length" else None
        ts = sample_ts(key_t, num_draws, sampler, basis=basis, control_points=points)
        if draws == "vmap":
            losses, penalties = jax.vmap(at, in_axes=(None, 0, None, None))(
                parts, ts, batch, key_loss
            )
        else:
            found = [at(parts, ts[i], batch, key_loss) for i in range(num_draws)]
            losses, penalties = (jnp.stack(list(x)) for x in zip(*found, strict=True))
        data, penalty = jnp.mean(losses), jnp.mean(penalties)
        return data + penalty.astype(data.dtype), {"data_loss": data, "penalty": penalty}

    return loss


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
        weight_decay: Lambda above, on the sampled point.
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
    if draws not in ("sequential", "vmap"):
        raise ValueError(f"draws is {draws!r}; expected 'sequential' or 'vmap'.")
    if not isinstance(num_draws, (int, np.integer)) or num_draws < 1:
        raise ValueError(f"num_draws is {num_draws!r}; expected an integer of at least 1.")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay is {weight_decay!r}; expected at least 0.")
    for name in ("frozen", "has_metrics", "regularizer"):
        if name in options:
            raise ValueError(f"{name} is set by curves.fit; use `fixed` or `weight_decay`.")
    tree.check_floating(control_points, "control_points")
    num = check_basis(basis, control_points)
    sample_ts(key, int(num_draws), sampler, basis=basis, control_points=control_points)
    split = _split(fixed, num)
    parts = _parts(control_points, split)
    loss = _curve_loss(loss_fn, basis, split, sampler, int(num_draws), float(weight_decay), draws)
    labels = {name: name == "free" for name in parts}
    frozen = _Frozen() if split.fixed else None

    def hook(parts: dict[str, PyTree], step: int) -> dict[str, Any]:
        assert evaluate is not None
        return evaluate(_whole(parts, split), step)

    result = fit_.fit(
        loss,
        parts,
        batches,
        _masked(optimizer, tuple(labels.items())),
        num_steps,
        key=key,
        has_metrics=True,
        frozen=frozen,
        evaluate=None if evaluate is None else hook,
        evaluate_every=evaluate_every,
        **options,
    )
    return CurveFit(
        _whole(result.params, split),
        result.history,
        result.evaluations,
        result.start,
        result.state,
    )


class _Frozen:
    """Whether a leaf belongs to the fixed points; equal to its like, so that steps are reused."""

    def __call__(self, path: str) -> bool:
        return path.startswith("['fixed']")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen)

    def __hash__(self) -> int:
        return hash(_Frozen)


@functools.lru_cache(maxsize=32)
def _masked(optimizer: Any, labels: tuple[tuple[str, bool], ...]) -> Any:
    """The optimizer without a state for what is fixed; one object per optimizer."""
    import optax

    return optax.masked(optimizer, dict(labels))
