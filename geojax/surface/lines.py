"""Loss and other metrics along straight lines through weight space, and the barrier on one."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from geojax import batches as batches_
from geojax import progress as progress_
from geojax import tree
from geojax.surface.directions import check_direction, is_none

__all__ = ["Barrier", "Line", "along", "barrier", "line"]

PyTree = Any


class Line(NamedTuple):
    """Metrics along the straight line through two points, or through one along a direction.

    Attributes:
        ts: `(n,)`, positions: 0 is the first point, 1 the second (for `along`, the point one
            direction further).
        values: Dict of `(n,)` arrays, one for each metric.
        distance: Euclidean distance between the two points: a position times this is a distance.
    """

    ts: np.ndarray
    values: dict[str, np.ndarray]
    distance: float


class Barrier(NamedTuple):
    r"""How far a metric rises above the chord between the two ends.

    Attributes:
        height: :math:`\max_t L(t) - ((1 - t) L(0) + t L(1))`, at least 0 where the ends are on the
            grid.
        t: Where that maximum is.
        start: The metric at the first end.
        end: The metric at the second end.
        highest: The largest value on the grid.
    """

    height: float
    t: float
    start: float
    end: float
    highest: float


def barrier(ts: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray) -> Barrier:
    """The barrier of one metric along a path from t=0 to t=1.

    Args:
        ts: `(n,)`, ascending, from 0 to 1.
        values: `(n,)`, the metric there.

    Raises:
        ValueError: If the shapes differ, the ends are missing or a value is not finite: the height
            would be that of another path.

    Example:
        >>> barrier([0.0, 0.5, 1.0], [1.0, 3.0, 2.0]).height
        1.5

    Reference:
        Entezari et al., The Role of Permutation Invariance in Linear Mode Connectivity of Neural
        Networks, 2022, definition 2. Garipov et al. and Ainsworth et al. subtract the mean of the
        ends instead: `highest - (start + end) / 2`.
    """
    ts, values = np.asarray(ts, np.float64), np.asarray(values, np.float64)
    if ts.ndim != 1 or ts.shape != values.shape:
        raise ValueError(
            f"barrier: ts have shape {ts.shape} and values {values.shape}; expected (n,)."
        )
    if len(ts) < 2 or ts[0] != 0 or ts[-1] != 1 or (np.diff(ts) <= 0).any():
        raise ValueError("barrier: ts must ascend from 0 to 1, both ends included.")
    if not np.isfinite(values).all():
        where = ts[~np.isfinite(values)][0]
        raise ValueError(f"barrier: the value at t={where} is not finite.")
    above = values - ((1 - ts) * values[0] + ts * values[-1])
    top = int(np.argmax(above))
    return Barrier(
        float(above[top]), float(ts[top]), float(values[0]), float(values[-1]), float(values.max())
    )


def line(
    metrics_fn: Callable[..., dict[str, jax.Array]],
    params_a: PyTree,
    params_b: PyTree,
    batches: Any,
    ts: Sequence[float] | np.ndarray | jax.Array,
    *,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    progress: bool | None = None,
) -> Line:
    """Metrics along the straight segment (1 - t) a + t b.

    Args:
        metrics_fn: `(params, batch)` to a dict of scalars that are means over the batch; with
            `state_fn`, `(params, state, batch)`.
        params_a: The point at t=0.
        params_b: The point at t=1, of the same structure.
        batches: One batch or a re-iterable.
        ts: `(n,)` positions; values outside [0, 1] extrapolate.
        state_fn: From the parameters at a position to the state there. A network with BatchNorm
            needs it: `lambda params: statistics.refresh(apply_fn, params, state, batches)`.
        weight_fn: Weight of a batch; by default its number of examples.
        mesh: Split each batch over this mesh's first axis.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        A `Line` in the order of `ts`. Cost: n passes over the data; memory: three points.

    Raises:
        ValueError: If the two points differ in structure or shapes, naming the leaf; if `ts` is
            empty or not one-dimensional.
        TypeError: If a leaf is not floating.
    """
    ts = _positions("line", "ts", ts)
    points = tree.stack([params_a, params_b])
    distance = tree.norm(tree.axpy(-1.0, params_a, params_b))
    at = jax.jit(tree.combine)
    values = _walk(
        "line",
        lambda t: at(points, jnp.array([1.0 - t, t], jnp.float32)),
        ts,
        batches_.mean(metrics_fn, batches, weight_fn=weight_fn, mesh=mesh),
        state_fn,
        progress,
    )
    return Line(ts, values, float(distance))


def along(
    metrics_fn: Callable[..., dict[str, jax.Array]],
    params: PyTree,
    direction: PyTree,
    distances: Sequence[float] | np.ndarray | jax.Array,
    batches: Any,
    *,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    progress: bool | None = None,
) -> Line:
    r"""Metrics along a direction from one point: at :math:`\theta + a d` for distances a.

    Along a unit eigenvector of the Hessian with eigenvalue :math:`\lambda`, the loss is
    :math:`L(\theta) + \tfrac12 \lambda a^2` from a stationary point, to third order in a. The
    direction is taken at the length that it has: a is a distance where that is 1, as for the rows
    of `tree.unstack(pairs.eigenvectors)`, and a multiple of the weights' own scale after
    `filter_normalize`.

    Args:
        metrics_fn: As for `line`.
        params: The point at a = 0.
        direction: A pytree like `params`, in any floating dtype. Leaves that are None, as in the
            eigenvectors of some selected parameters, stay where they are.
        distances: `(n,)`, signed.
        batches: One batch or a re-iterable.
        state_fn: As for `line`.
        weight_fn: As for `line`.
        mesh: As for `line`.
        progress: As for `line`.

    Returns:
        A `Line` in the order of `distances`, which are its `ts`; its `distance` is the direction's
        length. Each point is rounded to the dtypes of `params`, so steps below their spacing go
        nowhere. Cost: n passes over the data, one program; memory: three points.

    Raises:
        ValueError: If the direction is of another structure or shape, naming the leaf, or its
            length is zero or not finite; if `distances` is empty or not one-dimensional.
        TypeError: If a leaf is not floating.

    Example:
        >>> loss = lambda params, batch: {"loss": jnp.mean((batch["x"] @ params["w"]) ** 2)}
        >>> params, direction = {"w": jnp.zeros(2)}, {"w": jnp.array([0.0, 1.0])}
        >>> data = {"x": jnp.array([[1.0, 2.0]])}
        >>> along(loss, params, direction, [-1.0, 0.0, 0.5], data).values["loss"].tolist()
        [4.0, 0.0, 1.0]
    """
    distances = _positions("along", "distances", distances)
    tree.check_floating(params, "params")
    check_direction("along", direction, params)
    length = float(tree.norm(direction))
    if not (np.isfinite(length) and length > 0):
        raise ValueError(f"along: the length of the direction is {length}; expected one to follow.")
    values = _walk(
        "along",
        lambda a: _moved(params, direction, a),
        distances,
        batches_.mean(metrics_fn, batches, weight_fn=weight_fn, mesh=mesh),
        state_fn,
        progress,
    )
    return Line(distances, values, length)


@jax.jit
def _moved(params: PyTree, direction: PyTree, a: Any) -> PyTree:
    return jax.tree.map(
        lambda d, p: p if d is None else tree.axpy(a, d, p), direction, params, is_leaf=is_none
    )


def _positions(what: str, name: str, given: Any) -> np.ndarray:
    out = np.asarray(given, np.float64)
    if out.ndim != 1 or not len(out):
        raise ValueError(
            f"{what}: {name} have shape {out.shape}; expected (n,), at least one position."
        )
    return out


def _walk(what, at, positions, averaged, state_fn, progress) -> dict[str, np.ndarray]:
    """The metrics at each position, fetched at the end; the host runs one point ahead."""
    rows = []
    with progress_.bar(len(positions), what, show=progress) as bar:
        for i, t in enumerate(positions):
            params = at(t)
            extra = () if state_fn is None else (state_fn(params),)
            rows.append(averaged(params, *extra))
            if i:
                jax.block_until_ready(rows[i - 1])
            bar(i + 1)
    fetched = jax.device_get(rows)
    if not isinstance(fetched[0], dict) or any(np.ndim(x) for x in fetched[0].values()):
        raise TypeError(f"{what}: metrics_fn must return a dict of scalars.")
    return {name: np.array([row[name] for row in fetched], np.float64) for name in fetched[0]}
