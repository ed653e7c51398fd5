"""Curves measured: metrics along the whole of a curve, their integral over length, the barrier."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from geojax import batches as batches_
from geojax import progress as bars
from geojax import surface, tree
from geojax._checksums import checksums
from geojax._measured import Measured, about_data
from geojax.curves.bases import (
    Basis,
    check_basis,
    chord_lengths,
    coefficients,
    gram_of_differences,
)
from geojax.fit import Checkpointer

__all__ = ["CurveEvaluation", "MetricOnCurve", "evaluate", "summarize"]

PyTree = Any


class MetricOnCurve(NamedTuple):
    """One metric along a curve.

    Attributes:
        values: `(m,)`.
        start: At the first position.
        end: At the last.
        lowest: The least value on the grid.
        highest: The largest.
        mean: The plain mean over the positions, which depends on where these are.
        integral: The mean over arc length, by the trapezoidal rule on chords: the right one of the
            two; the original reports both.
        barrier: The largest rise above the straight line between the two end values, with t as
            the abscissa; for a curve, as for a segment.
        t_highest: Where the value is largest.
    """

    values: np.ndarray
    start: float
    end: float
    lowest: float
    highest: float
    mean: float
    integral: float
    barrier: float
    t_highest: float


class CurveEvaluation(NamedTuple):
    """Metrics along a curve, and its shape.

    Attributes:
        ts: `(m,)`, positions.
        metrics: One `MetricOnCurve` for each metric.
        lengths: `(m,)` the length of the polygon through the points, up to each.
        length: The whole.
        chord: The distance between the first and the last point.
    """

    ts: np.ndarray
    metrics: dict[str, MetricOnCurve]
    lengths: np.ndarray
    length: float
    chord: float

    def table(self) -> list[dict[str, Any]]:
        """One row for each metric, for `geojax.report`."""
        return [
            {
                "metric": name, "start": x.start, "end": x.end, "lowest": x.lowest,
                "highest": x.highest, "mean": x.mean, "integral": x.integral,
                "barrier": x.barrier, "at t": x.t_highest,
            }
            for name, x in self.metrics.items()
        ]  # fmt: skip


def summarize(ts: np.ndarray, lengths: np.ndarray, values: np.ndarray) -> MetricOnCurve:
    """The summary of a metric that was measured at `ts`, where the curve had run `lengths`.

    Args:
        ts: `(m,)`, ascending from 0 to 1.
        lengths: `(m,)`, not falling, from 0.
        values: `(m,)`.

    Example:
        >>> found = summarize(np.array([0, 0.5, 1]), np.array([0, 1, 4.0]), np.array([0, 1, 1.0]))
        >>> round(found.mean, 3), found.integral
        (0.667, 0.875)
    """
    ts, lengths, values = (np.asarray(x, np.float64) for x in (ts, lengths, values))
    total = lengths[-1] - lengths[0]
    integral = np.trapezoid(values, lengths) / total if total > 0 else values.mean()
    barrier = surface.barrier(ts, values)
    return MetricOnCurve(
        values=values,
        start=float(values[0]),
        end=float(values[-1]),
        lowest=float(values.min()),
        highest=float(values.max()),
        mean=float(values.mean()),
        integral=float(integral),
        barrier=barrier.height,
        t_highest=float(ts[int(values.argmax())]),
    )


def evaluate(
    metrics_fn: Callable[..., dict[str, jax.Array]],
    basis: Basis,
    control_points: PyTree,
    batches: Any,
    ts: int | Sequence[float] | np.ndarray = 61,
    *,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    states_fn: Callable[[PyTree], PyTree] | None = None,
    num_at_once: int = 8,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    checkpoint: Checkpointer | None = None,
    progress: bool | None = None,
) -> CurveEvaluation:
    """Measure metrics at points along a curve, on fixed data in a fixed order.

    Args:
        metrics_fn: `(params, batch)` to a dict of scalars that are means over the batch; with
            `state_fn`, `(params, state, batch)`.
        basis: From t to `(n,)` coefficients.
        control_points: Stacked points.
        batches: One batch or a re-iterable.
        ts: Positions, ascending from 0 to 1, or how many at equal distances in t (see
            `arc_length_ts` for equal lengths).
        state_fn: From the parameters at a position to the state there. A network with BatchNorm
            needs it: `lambda params: statistics.refresh(apply_fn, params, state, batches)`.
        states_fn: Instead of `state_fn`, from stacked parameters at several positions to their
            stacked states, so that they share the passes over the data: `lambda points:
            statistics.refresh_points(apply_fn, points, state, batches, num_at_once=8)`.
        num_at_once: How many positions `states_fn` is given; the last time it may be fewer.
        weight_fn: Weight of a batch; by default its number of examples.
        mesh: Split each batch over this mesh's first axis.
        checkpoint: A `geojax.checkpoint.Checkpointer`: the values so far are saved every
            `checkpoint.every` positions, at the end and on an interrupt; the same call goes on from
            there, to the bits of one that was not interrupted. It first measures the last position
            again, and refuses to go on where other metrics, states or data show there. Arrays in
            memory must be the same to the bit.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        A `CurveEvaluation`. Cost: one pass over the data per position; memory: one more point, or
        `num_at_once` with `states_fn`.

    Raises:
        ValueError: If basis and control points do not fit, or `ts` does not ascend from 0 to 1; for
            a checkpoint of another curve, of other positions or metrics.
        TypeError: If `metrics_fn` returns no dict of scalars.

    Reference:
        Garipov et al., 2018, section 4: minimum, maximum, mean over t, integral over length.
    """
    check_basis(basis, control_points)
    if isinstance(ts, (int, np.integer)):
        if ts < 2:
            raise ValueError(f"ts is {ts}; expected at least 2 positions.")
        ts = np.linspace(0, 1, int(ts))
    ts = np.asarray(ts, np.float64)
    if ts.ndim != 1 or len(ts) < 2 or ts[0] != 0 or ts[-1] != 1 or (np.diff(ts) <= 0).any():
        raise ValueError("evaluate: ts must ascend from 0 to 1, both ends included.")
    weights = coefficients(basis, jnp.asarray(ts, jnp.float32))
    found = measure(
        metrics_fn,
        control_points,
        weights,
        batches,
        label="curve",
        state_fn=state_fn,
        states_fn=states_fn,
        num_at_once=num_at_once,
        weight_fn=weight_fn,
        mesh=mesh,
        checkpoint=checkpoint,
        progress=progress,
    )
    inner = gram_of_differences(control_points)
    lengths = chord_lengths(inner, weights)
    chord = float(chord_lengths(inner, weights[np.array([0, -1])])[-1])
    return CurveEvaluation(
        ts,
        {name: summarize(ts, lengths, values) for name, values in found.items()},
        lengths,
        float(lengths[-1]),
        chord,
    )


def measure(
    metrics_fn: Callable[..., dict[str, jax.Array]],
    control_points: PyTree,
    weights: Any,
    batches: Any,
    *,
    label: str,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    states_fn: Callable[[PyTree], PyTree] | None = None,
    num_at_once: int = 8,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    checkpoint: Checkpointer | None = None,
    progress: bool | None = None,
) -> dict[str, np.ndarray]:
    """Metrics at the points with these coefficients, `(m, n)`: float64 arrays `(m,)`."""
    if state_fn is not None and states_fn is not None:
        raise ValueError("state_fn and states_fn: expected one of them.")
    if not isinstance(num_at_once, (int, np.integer)) or num_at_once < 1:
        raise ValueError(f"num_at_once is {num_at_once!r}; expected an integer of at least 1.")
    weights = jnp.asarray(weights, jnp.float32)
    source = batches_.as_batches(batches)
    averaged = batches_.mean(metrics_fn, source, weight_fn=weight_fn, mesh=mesh)
    record = {} if checkpoint is None else _record(control_points, source)
    run = Measured(label, np.asarray(weights), checkpoint, record, rtol=1e-6)
    # What was measured last is measured again, to know that it is the same.
    begin = max(run.done - 1, 0)

    def points() -> Iterator[tuple[PyTree, tuple[PyTree, ...]]]:
        if states_fn is None:
            for i in range(begin, len(weights)):
                params = _at(control_points, weights[i])
                yield params, () if state_fn is None else (state_fn(params),)
            return
        # The same positions share a pass, wherever a run goes on: their number may change bits.
        for first in range(begin - begin % num_at_once, len(weights), num_at_once):
            some = _at(control_points, weights[first : first + num_at_once])
            states = tree.unstack(states_fn(some))
            group = list(zip(tree.unstack(some), ((state,) for state in states), strict=True))
            yield from group[max(begin - first, 0) :]

    def values() -> Iterator[Any]:
        for i, (params, extra) in enumerate(points(), begin):
            value = averaged(params, *extra)
            if i < run.done:
                run.compare(value, run.done)
            else:
                yield value

    with bars.bar(len(weights), label, show=progress) as update:
        run.follow(values(), update)
    return run.values


def _record(control_points: PyTree, source: Any) -> dict[str, Any]:
    """What tells one curve and its data from others, JSON-able."""
    return {
        "control points": checksums(jax.tree.leaves(control_points)),
        **about_data(source),
    }


@jax.jit
def _at(control_points: PyTree, weights: jax.Array) -> PyTree:
    return tree.combine(control_points, weights)
