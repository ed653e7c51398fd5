"""Paths whose highest loss is low: nudged elastic band, the string method, AutoNEB.

A curve from `fit` has a low mean loss along it; a path from here is relaxed pivot by pivot, across
itself, towards a minimum-energy path, whose highest point is a saddle of the loss.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import fit as fit_
from geojax import tree
from geojax._families import Guarded, HeldFixed, Split, parts_of, split_of, whole
from geojax.curves.bases import chords_passed, initialize, polychain
from geojax.curves.evaluation import measure

__all__ = ["Cycle", "Path", "autoneb", "measure_path", "neb"]

PyTree = Any

# How this differs from Draxler et al.'s code:
# - the tangent is Henkelman and Jonsson's improved one, which does not jump where the higher
#   neighbour changes sides;
# - pivots keep the shares of the length at which they were inserted, after every step;
# - losses between pivots are measured on the whole data set, and a result says where it is highest.


class Cycle(NamedTuple):
    """One cycle of `autoneb`.

    Attributes:
        num_pivots: Both ends counted.
        highest: The highest loss on the grid after the cycle.
        t_highest: Where.
        num_gradients: Gradients of a step's data in the cycle.
    """

    num_pivots: int
    highest: float
    t_highest: float
    num_gradients: int


class Path(NamedTuple):
    """A chain of straight segments through pivots, and the loss along it.

    Attributes:
        points: Stacked pivots, leaves `(n, ...)`; the first and the last are the ends to the bit.
        pivot_losses: `(n,)` on the whole data set.
        ts: `(m,)` positions of the grid, those of `polychain(n)`: pivot j is at j / (n - 1).
        losses: `(m,)` on the whole data set.
        highest: The largest of `losses`: a lower bound of the largest on the segments, as the grid
            is finite.
        t_highest: Where that is: `point(polychain(n), points, t_highest)`.
        num_gradients: Gradients of a step's data that the path cost: steps times free pivots.
        history: Per step of this call: 'loss', the highest of the pivots' losses on the batch,
            'mean_loss', and 'gradient_norm', that of all forces.
        start: The step at which this call began; more than 0 after a resume.
        cycles: Of `autoneb`.
    """

    points: PyTree
    pivot_losses: np.ndarray
    ts: np.ndarray
    losses: np.ndarray
    highest: float
    t_highest: float
    num_gradients: int
    history: dict[str, np.ndarray]
    start: int
    cycles: tuple[Cycle, ...]

    @property
    def excess(self) -> np.ndarray:
        """`(n - 1, m)` how far the loss within each segment lies above the line of its pivots."""
        num = len(self.pivot_losses) - 1
        fractions = np.linspace(0, 1, (len(self.ts) - 1) // num + 1)[None, 1:-1]
        before, after = self.pivot_losses[:-1, None], self.pivot_losses[1:, None]
        inside = self.losses[:-1].reshape(num, -1)[:, 1:]
        return inside - ((1 - fractions) * before + fractions * after)


@functools.lru_cache(maxsize=32)
def _as_metrics(loss_fn: Callable) -> Callable:
    return lambda *args: {"loss": loss_fn(*args)}


def measured_by(loss_fn: Callable, measure_fn: Callable | None) -> Callable:
    """The loss by which a path is judged; raises where a loss with a key has none beside it."""
    if measure_fn is None and fit_.takes_key(loss_fn):
        raise ValueError(
            "loss_fn takes a key: give measure_fn, the loss without noise by which paths are "
            "judged, such as `objectives.evaluation_loss(apply_fn, state)`; for a network with "
            "BatchNorm one of (params, state, batch), and `state_fn`, since statistics belong to "
            "one point."
        )
    return measure_fn or loss_fn


def measure_path(
    loss_fn: Callable[..., Any],
    points: PyTree,
    batches: Any,
    *,
    num_between: int = 9,
    **options: Any,
) -> Path:
    """The loss along the straight segments through pivots, on the whole data set.

    Args:
        loss_fn: `(params, batch)` to the mean loss of the batch; with `state_fn`,
            `(params, state, batch)`.
        points: Stacked pivots, two or more.
        batches: One batch or a re-iterable.
        num_between: Positions within each segment.
        **options: `state_fn`, `states_fn`, `num_at_once`, `weight_fn`, `mesh`, `checkpoint` and
            `progress` of `curves.evaluate`.

    Returns:
        A `Path`. Cost: (n - 1) (num_between + 1) + 1 passes over the data.

    Raises:
        ValueError: If there is one pivot, `num_between` is less than 1, or a loss is not finite.

    Example:
        >>> hill = lambda params, batch: jnp.mean(batch) * (1 - params["x"] ** 2)
        >>> found = measure_path(hill, {"x": jnp.array([-1.0, 1.0])}, jnp.ones(2))
        >>> found.highest, found.t_highest
        (1.0, 0.5)
    """
    tree.check_floating(points, "points")
    num = tree.num_points(points)
    if num < 2 or not isinstance(num_between, (int, np.integer)) or num_between < 1:
        raise ValueError(
            f"{num} pivots and num_between {num_between!r}; expected at least 2 pivots and 1 "
            "position between them."
        )
    if options.get("state_fn") is None and options.get("states_fn") is None:
        measured_by(loss_fn, None)
    pieces = int(num_between) + 1
    places = np.arange((num - 1) * pieces + 1) / pieces
    losses = measure(
        _as_metrics(loss_fn), points, _weights(num, places), batches, label="path", **options
    )["loss"]
    if not np.isfinite(losses).all():
        raise ValueError(
            f"the loss at t={places[~np.isfinite(losses)][0] / (num - 1):.4g} of the path is not "
            "finite; lower the learning rate, or look at that point."
        )
    ts, top = places / (num - 1), int(losses.argmax())
    return Path(
        points, losses[::pieces], ts, losses, float(losses[top]), float(ts[top]), 0, {}, 0, ()
    )


def _weights(num: int, places: np.ndarray) -> np.ndarray:
    """Coefficients of pivots at places from 0 to num - 1: at a pivot exactly its unit vector."""
    away = np.abs(np.asarray(places, np.float64)[:, None] - np.arange(num)[None])
    return np.maximum(1 - away, 0).astype(np.float32)


# ------------------------------------------------------------------------------------- one step


@jax.custom_vjp
def _with_forces(points: PyTree, forces: PyTree, value: jax.Array) -> jax.Array:
    """`value`, whose gradient by the points is `forces`: the force of a band is no gradient."""
    return value


def _forward(points, forces, value):
    return value, forces


def _backward(forces, cotangent):
    moved = jax.tree.map(lambda x: x * cotangent.astype(x.dtype), forces)
    return moved, jax.tree.map(jnp.zeros_like, forces), jnp.zeros_like(cotangent)


_with_forces.defvjp(_forward, _backward)


def _edges(chain: PyTree) -> PyTree:
    """From each pivot to the next, `(n - 1, ...)`."""
    wide = jax.tree.map(lambda x: x.astype(tree.accumulation_dtype(x)), chain)
    return jax.tree.map(lambda x: x[1:] - x[:-1], wide)


@jax.jit
def _lengths(points: PyTree) -> jax.Array:
    return jax.vmap(tree.norm)(_edges(points))


def _upwind(losses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights of the edges after and before each inner pivot in its tangent."""
    before, here, after = losses[:-2], losses[1:-1], losses[2:]
    rise, fall = jnp.abs(after - here), jnp.abs(before - here)
    large, small = jnp.maximum(rise, fall), jnp.minimum(rise, fall)
    up, down = (after > here) & (here > before), (after < here) & (here < before)
    forward = jnp.where(after > before, large, small)
    backward = jnp.where(after > before, small, large)
    level = large == 0
    forward = jnp.where(level | up, 1, jnp.where(down, 0, forward))
    backward = jnp.where(level | down, 1, jnp.where(up, 0, backward))
    return forward, backward


def _force(after, before, forward, backward, gradient, spring):
    """The gradient of one pivot across the path, and the spring along it."""
    tangent = tree.axpy(forward, after, tree.scale(backward, before))
    size = tree.norm(tangent)
    unit = tree.scale(jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0), tangent)
    along = tree.vdot(gradient, unit)
    if spring:
        along = along + spring * (tree.norm(after) - tree.norm(before))
    return tree.axpy(-along, unit, gradient)


@functools.lru_cache(maxsize=32)
def _band_loss(loss_fn: Callable, split: Split, spring: float | None, over: str) -> Callable:
    with_key = fit_.takes_key(loss_fn)

    def loss(parts, batch, key):
        held = jax.lax.stop_gradient(parts)

        def one(params):
            value = loss_fn(params, batch, key) if with_key else loss_fn(params, batch)
            return value.astype(tree.accumulation_dtype(value))

        def every(fn, points):
            if over == "vmap":
                return jax.vmap(fn)(points)
            rows = [fn(x) for x in tree.unstack(points)]
            return jax.tree.map(lambda *x: jnp.stack(x), *rows)

        inner, gradients = every(jax.value_and_grad(one), held["free"])
        ends = every(one, held["fixed"])
        losses = jnp.concatenate([ends[:1], inner, ends[1:]])
        edges = _edges(whole(held, split))
        forward, backward = _upwind(losses)
        forces = jax.vmap(functools.partial(_force, spring=spring))(
            jax.tree.map(lambda x: x[1:], edges),
            jax.tree.map(lambda x: x[:-1], edges),
            forward,
            backward,
            gradients,
        )
        value = _with_forces(parts["free"], forces, jnp.max(losses))
        return value, {"mean_loss": jnp.mean(losses)}

    return loss


@functools.lru_cache(maxsize=32)
def _band_optimizer(optimizer: Any, split: Split, spacing: tuple[float, ...] | None) -> Any:
    """The optimizer on the free pivots, and the pivots back at their shares of the length."""
    import optax

    inner = optax.masked(optimizer, {"free": True, "fixed": False})
    if spacing is None:
        return inner

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, state, params)
        moved: Any = optax.apply_updates(params, updates)
        chain = whole(moved, split)
        passed = chords_passed(_lengths(chain), jnp.asarray(spacing, jnp.float32))
        knots = jnp.arange(len(spacing), dtype=passed.dtype)
        weights = jnp.maximum(1 - jnp.abs(passed[:, None] - knots[None]), 0)
        placed = tree.combine(chain, weights[np.array(split.free)])
        back = jax.tree.map(jnp.subtract, placed, params["free"])
        return {**updates, "free": back}, state

    return optax.GradientTransformation(inner.init, update)


def neb(
    loss_fn: Callable[..., Any],
    points: PyTree,
    batches: Any,
    optimizer: Any,
    num_steps: int,
    *,
    key: jax.Array,
    spring: float | None = None,
    spacing: Sequence[float] | None = None,
    over: Literal["vmap", "sequential"] = "vmap",
    measure_fn: Callable[..., Any] | None = None,
    num_between: int = 9,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    **options: Any,
) -> Path:
    r"""Relax a chain of pivots across itself: the string method, or a nudged elastic band.

    Each free pivot moves by its own gradient without the component along the path,

    .. math:: g_i - (g_i \cdot \tau_i + k (|w_{i+1} - w_i| - |w_i - w_{i-1}|)) \tau_i,

    with the upwind tangent of Henkelman and Jonsson. Without springs (k = 0, the default) the
    pivots are put back at equal distances along the path after every step, the limit of stiff
    springs.

    Args:
        loss_fn: `(params, batch)` or `(params, batch, key)` to the mean loss, a scalar. Pivots
            share the batch and the key. Weight decay belongs into it.
        points: Stacked pivots, three or more; the first and the last stay. `initialize` with
            `polychain(n)` puts them on the line.
        batches: One batch or a re-iterable.
        optimizer: An optax transformation; it sees the free pivots, stacked. A pivot's force has
            the size of one network's gradient, so the learning rate of a network fits.
        num_steps: Optimizer steps.
        key: For dropout and augmentation.
        spring: k above; None for pivots at fixed shares of the length.
        spacing: `(n,)` those shares, ascending from 0 to 1; by default equal steps.
        over: "vmap" for all pivots at once, or "sequential": faster for convolutions on a CPU.
        measure_fn: The loss by which the path is judged at the end; by default `loss_fn`, if that
            takes no key. With `state_fn`, `(params, state, batch)`.
        num_between: Positions within each segment at which it is judged.
        state_fn: As for `curves.evaluate`.
        **options: Further options of `geojax.fit.fit`: `transform`, `mesh`, `checkpoint` (with
            which it resumes to the bit), `log`, `progress` and so on. With `accumulate`, the force
            of each batch has that batch's tangents.

    Returns:
        A `Path`, measured on the whole data set. Cost per step: n - 2 gradients and two losses;
        memory: that of n networks with their optimizer states and, with "vmap", n gradients.

    Raises:
        ValueError: If there are fewer than three pivots, or an option is unknown.
        NonFiniteError: As `geojax.fit.fit`.

    Example:
        >>> import optax
        >>> # Minima at x = -1 and 1; between them a saddle of height 1 at (0, 1).
        >>> def loss(p, batch):
        ...     x, y = p["w"]
        ...     return (1 - x**2) ** 2 + 2 * (y - (1 - x**2)) ** 2 + 0 * jnp.sum(batch)
        >>> chain = {"w": jnp.stack([jnp.linspace(-1, 1, 7), jnp.zeros(7)], axis=1)}
        >>> found = neb(loss, chain, jnp.ones(1), optax.sgd(0.05), 200, key=jax.random.key(0))
        >>> measure_path(loss, chain, jnp.ones(1)).highest, round(found.highest, 2)
        (3.0, 1.0)

    Reference:
        Henkelman and Jonsson, "Improved tangent estimate in the nudged elastic band method for
        finding minimum energy paths and saddle points", 2000, equations 8 to 11; E, Ren and
        Vanden-Eijnden, "Simplified and improved string method", 2007; Draxler et al., "Essentially
        No Barriers in Neural Network Energy Landscape", ICML 2018, section 2.
    """
    tree.check_floating(points, "points")
    num = tree.num_points(points)
    if num < 3:
        raise ValueError(f"there are {num} pivots; expected at least 3, both ends counted.")
    if over not in ("vmap", "sequential"):
        raise ValueError(f"over is {over!r}; expected 'vmap' or 'sequential'.")
    if spring is not None and (not spring > 0 or spacing is not None):
        raise ValueError(
            f"spring is {spring!r}; expected a positive number without spacing, or None."
        )
    for name in ("frozen", "has_metrics", "regularizer"):
        if name in options:
            raise ValueError(f"{name} is set by curves.neb; put a regularizer into loss_fn.")
    measured = measured_by(loss_fn, measure_fn)
    shares = None if spring is not None else _shares(spacing, num)
    split = split_of((0, -1), num)
    parts = parts_of(points, split)
    if options.get("checkpoint") is not None:
        options = options | {"checkpoint": Guarded(options["checkpoint"], parts)}
    result = fit_.fit(
        _band_loss(loss_fn, split, None if spring is None else float(spring), over),
        parts,
        batches,
        _band_optimizer(optimizer, split, shares),
        num_steps,
        key=key,
        has_metrics=True,
        frozen=HeldFixed(),
        **options,
    )
    found = measure_path(
        measured,
        whole(result.params, split),
        batches,
        num_between=num_between,
        state_fn=state_fn,
        weight_fn=options.get("weight_fn"),
        mesh=options.get("mesh"),
        progress=options.get("progress"),
    )
    return found._replace(
        num_gradients=num_steps * (num - 2), history=result.history, start=result.start
    )


def _shares(spacing: Sequence[float] | None, num: int) -> tuple[float, ...]:
    shares = np.linspace(0, 1, num) if spacing is None else np.asarray(spacing, np.float64)
    good = shares.shape == (num,) and shares[0] == 0 and shares[-1] == 1
    if not good or (np.diff(shares) <= 0).any():
        raise ValueError(f"spacing: expected {num} shares that ascend from 0 to 1.")
    return tuple(shares.tolist())


# ------------------------------------------------------------------------------------- AutoNEB


def autoneb(
    loss_fn: Callable[..., Any],
    start: PyTree,
    end: PyTree,
    batches: Any,
    optimizer: Any,
    num_steps: int,
    *,
    key: jax.Array,
    num_cycles: int = 4,
    num_pivots: int = 5,
    max_pivots: int = 25,
    threshold: float = 0.2,
    measure_fn: Callable[..., Any] | None = None,
    folder: str | pathlib.Path | None = None,
    save_every: int = 100,
    **options: Any,
) -> Path:
    """A low path between two networks, with pivots where it needs them.

    Each cycle relaxes the chain by `neb`. Then, in every segment in which the measured loss rises
    above the line between its two pivots by more than `threshold` times the range of the loss
    along the path, a pivot is inserted where it rises most.

    Args:
        loss_fn: As for `neb`.
        start: The network at one end.
        end: The network at the other.
        batches: As for `neb`.
        optimizer: An optax transformation, or a list with one for each cycle: Draxler et al. lower
            the learning rate in the last ones.
        num_steps: Optimizer steps in each cycle.
        key: Cycle c uses `fold_in(key, c)`.
        num_cycles: How many.
        num_pivots: Of the first cycle, on the line, both ends counted.
        max_pivots: No more than this are made; where they run out, the largest rises come first.
        threshold: See above.
        measure_fn: As for `neb`.
        folder: Where each cycle keeps its checkpoints. A call with the same folder goes on in the
            cycle that was stopped, and ends with the same bits; it measures the earlier ones anew.
        save_every: Steps between checkpoints.
        **options: Further options of `neb`; `checkpoint` is what `folder` stands for.

    Returns:
        The `Path` of the cycle with the lowest `highest`, with all `cycles` and the gradients of
        all. Highest losses are those of a grid, `num_between` positions in each segment.

    Raises:
        ValueError: As `neb`; if there are not as many optimizers as cycles.

    Example:
        >>> import optax
        >>> def loss(p, batch):
        ...     x, y = p["w"]
        ...     return (1 - x**2) ** 2 + 2 * (y - (1 - x**2)) ** 2 + 0 * jnp.sum(batch)
        >>> ends = {"w": jnp.array([-1.0, 0.0])}, {"w": jnp.array([1.0, 0.0])}
        >>> found = autoneb(loss, *ends, jnp.ones(1), optax.sgd(0.05), 100, num_pivots=3,
        ...                 threshold=0.05, num_cycles=3, key=jax.random.key(0))
        >>> [cycle.num_pivots for cycle in found.cycles], round(found.highest, 2)
        ([3, 5, 7], 1.0)

    Reference:
        Draxler et al., "Essentially No Barriers in Neural Network Energy Landscape", ICML 2018,
        section 2.2 and algorithm 2.
    """
    optimizers = list(optimizer) if isinstance(optimizer, list) else [optimizer] * num_cycles
    if num_cycles < 1 or len(optimizers) != num_cycles:
        raise ValueError(
            f"there are {len(optimizers)} optimizers for {num_cycles} cycles; expected one for "
            "each, and at least one cycle."
        )
    if not 3 <= num_pivots <= max_pivots:
        raise ValueError(
            f"num_pivots is {num_pivots} and max_pivots {max_pivots}; expected at least 3 and no "
            "more than the maximum."
        )
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold!r}; expected a positive number.")
    for name in ("checkpoint", "spacing", "log"):
        if name in options:
            raise ValueError(f"{name} belongs to one cycle; use `folder`, or `neb` itself.")
    points = initialize(polychain(num_pivots), start, end)
    shares = np.linspace(0, 1, num_pivots)
    best: Path | None = None
    cycles: list[Cycle] = []
    for cycle, each in enumerate(optimizers):
        found = neb(
            loss_fn,
            points,
            batches,
            each,
            num_steps,
            key=jax.random.fold_in(key, cycle),
            spacing=None if options.get("spring") else shares.tolist(),
            measure_fn=measure_fn,
            checkpoint=_checkpoint(folder, cycle, save_every),
            **options,
        )
        num = len(found.pivot_losses)
        cycles.append(Cycle(num, found.highest, found.t_highest, found.num_gradients))
        if best is None or found.highest < best.highest:
            best = found
        places = _with_inserted(found, threshold, max_pivots)
        points = tree.combine(found.points, _weights(num, places))
        shares = np.interp(places, np.arange(num), shares)
    assert best is not None
    return best._replace(cycles=tuple(cycles), num_gradients=sum(x.num_gradients for x in cycles))


def _checkpoint(folder: Any, cycle: int, every: int) -> Any:
    if folder is None:
        return None
    from geojax.checkpoint import Checkpointer

    return Checkpointer(pathlib.Path(folder) / f"cycle-{cycle}", every=every)


def _with_inserted(path: Path, threshold: float, max_pivots: int) -> np.ndarray:
    """Places of the pivots, the new ones among them."""
    num, excess = len(path.pivot_losses), path.excess
    spread = path.losses.max() - path.losses.min()
    most = excess.max(axis=1)
    wanted = [i for i in np.argsort(-most, kind="stable") if most[i] > threshold * spread]
    chosen = np.array(wanted[: max(max_pivots - num, 0)], int)
    inside = (excess[chosen].argmax(axis=1) + 1) / (excess.shape[1] + 1)
    return np.sort(np.concatenate([np.arange(num), chosen + inside]))
