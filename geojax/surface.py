"""Loss and other metrics along lines through weight space."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from geojax import batches as batches_
from geojax import progress as progress_
from geojax import tree

__all__ = ["Barrier", "Line", "barrier", "line"]

PyTree = Any


class Line(NamedTuple):
    """Metrics along the segment between two points.

    Attributes:
        ts: `(n,)`, positions: 0 is the first point, 1 the second.
        values: Dict of `(n,)` arrays, one for each metric.
        distance: Euclidean distance between the two points.
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
    ts = np.asarray(ts, np.float64)
    if ts.ndim != 1 or not len(ts):
        raise ValueError(f"line: ts have shape {ts.shape}; expected (n,), at least one position.")
    points = tree.stack([params_a, params_b])
    distance = tree.norm(tree.axpy(-1.0, params_a, params_b))
    at = jax.jit(tree.combine)
    averaged = batches_.mean(metrics_fn, batches, weight_fn=weight_fn, mesh=mesh)
    rows = []
    with progress_.bar(len(ts), "line", show=progress) as bar:
        for i, t in enumerate(ts):
            params = at(points, jnp.array([1.0 - t, t], jnp.float32))
            extra = () if state_fn is None else (state_fn(params),)
            rows.append(averaged(params, *extra))
            if i:
                jax.block_until_ready(rows[i - 1])
            bar(i + 1)
    fetched = jax.device_get(rows)
    if not isinstance(fetched[0], dict) or any(np.ndim(x) for x in fetched[0].values()):
        raise TypeError("line: metrics_fn must return a dict of scalars.")
    values = {name: np.array([row[name] for row in fetched], np.float64) for name in fetched[0]}
    return Line(ts, values, float(distance))
