"""How far a loss rises between two networks, before and after alignment.

The straight line from A to B and the one from A to the permuted B, at every metric, with the
barrier by both of its definitions.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from geojax import batches as batches_
from geojax import progress as progress_
from geojax import surface, tree
from geojax.symmetry import action
from geojax.symmetry.spec import PermutationSpec

__all__ = ["MetricBarrier", "PermutedBarrier", "barrier", "barrier_of_values"]

PyTree = Any


class MetricBarrier(NamedTuple):
    r"""One metric on a path from t=0 to t=1, and how far it rises, by both definitions.

    With both ends on the grid, `height` is at least 0, `height_over_mean` is at least half the
    difference of the ends, and the two differ by at most that half. They agree where the ends do.

    Attributes:
        values: `(n,)`, the metric.
        height: :math:`\max_t L(t) - ((1 - t) L(0) + t L(1))`, above the chord.
        t: Where that maximum is.
        height_over_mean: :math:`\max_t L(t) - \tfrac12 (L(0) + L(1))`, the number in the figures of
            Git Re-Basin.
        t_highest: Where the metric is highest.
        area: The area between the metric and the chord, by the trapezoidal rule; negative where the
            metric lies below.
        start: The metric at t=0.
        end: The metric at t=1.
        highest: Its largest value on the grid.
    """

    values: np.ndarray
    height: float
    t: float
    height_over_mean: float
    t_highest: float
    area: float
    start: float
    end: float
    highest: float


class PermutedBarrier(NamedTuple):
    """Metrics from A to B, and from A to the permuted B.

    Attributes:
        ts: `(n,)`, positions from 0 (A) to 1 (B, or the permuted B).
        naive: One `MetricBarrier` for each metric, on the line to B as it is.
        aligned: The same on the line to the permuted B; None without a permutation.
        distance_naive: Euclidean distance from A to B.
        distance_aligned: Euclidean distance from A to the permuted B; None without a permutation.
    """

    ts: np.ndarray
    naive: dict[str, MetricBarrier]
    aligned: dict[str, MetricBarrier] | None
    distance_naive: float
    distance_aligned: float | None

    def table(self) -> list[dict[str, Any]]:
        """One row for each metric and line, for `geojax.report`."""
        lines = {"naive": self.naive, "aligned": self.aligned}
        return [
            {
                "metric": metric,
                "line": line,
                "barrier": found.height,
                "over the mean": found.height_over_mean,
                "area": found.area,
                "at t": found.t,
                "A": found.start,
                "B": found.end,
            }
            for line, metrics in lines.items()
            for metric, found in (metrics or {}).items()
        ]


def barrier_of_values(
    ts: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray
) -> MetricBarrier:
    """The barrier of a metric that was measured along a path from t=0 to t=1.

    Args:
        ts: `(n,)`, ascending, from 0 to 1.
        values: `(n,)`, the metric there; lower is better.

    Raises:
        ValueError: If the shapes differ, the ends are missing or a value is not finite.

    Example:
        >>> found = barrier_of_values([0.0, 0.5, 1.0], [1.0, 3.0, 2.0])
        >>> found.height, found.height_over_mean, found.area
        (1.5, 1.5, 0.75)

    Reference:
        Entezari et al., The Role of Permutation Invariance in Linear Mode Connectivity of Neural
        Networks, 2022, definition 2 (above the chord). Ainsworth et al., Git Re-Basin, 2023,
        definition 2.2 (above the mean of the ends).
    """
    checked = surface.barrier(ts, values)
    ts, values = np.asarray(ts, np.float64), np.asarray(values, np.float64)
    start, end = checked.start, checked.end
    # From the nearer end, so that the chord between equal ends is level to the last bit.
    gap = end - start
    above = values - np.where(ts <= 0.5, start + ts * gap, end - (1 - ts) * gap)
    top = int(np.argmax(above))
    return MetricBarrier(
        values=values,
        height=float(above[top]),
        t=float(ts[top]),
        height_over_mean=checked.highest - (start + end) / 2,
        t_highest=float(ts[np.argmax(values)]),
        area=float(np.trapezoid(above, ts)),
        start=start,
        end=end,
        highest=checked.highest,
    )


def barrier(
    metrics_fn: Callable[..., dict[str, jax.Array]],
    params_a: PyTree,
    params_b: PyTree,
    batches: Any,
    *,
    spec: PermutationSpec | None = None,
    permutation: action.Permutation | None = None,
    ts: Sequence[float] | np.ndarray | None = None,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    progress: bool | None = None,
) -> PermutedBarrier:
    """Metrics on the line between two networks, before and after one of them is permuted.

    Unlike `surface.line`, a point between two equal weights is that weight to the last bit, so the
    barrier between a network and itself is 0 and not a rounding error. One program measures the
    points of both lines, and A is measured once.

    Args:
        metrics_fn: `(params, batch)` to a dict of scalars that are means over the batch, lower for
            better networks, as `objectives.metrics` makes it; with `state_fn`,
            `(params, state, batch)`.
        params_a: The network at t=0.
        params_b: The network at t=1, of the same structure, as it was trained.
        batches: One batch or a re-iterable.
        spec: The symmetry of the network.
        permutation: What aligns B to A: the second line ends at
            `permute.apply_permutation(spec, permutation, params_b)`. Without it there is one line.
        ts: `(n,)` positions, ascending from 0 to 1; by default 25 at equal distances.
        state_fn: From the parameters at a position to the state there. A network with BatchNorm
            needs it, since statistics cannot be interpolated:
            `lambda params: statistics.refresh(apply_fn, params, state, batches)`.
        weight_fn: Weight of a batch; by default its number of examples.
        mesh: Split each batch over this mesh's first axis.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        A `PermutedBarrier`. Cost: 2 n - 1 passes over the data, or n; memory: four points.

    Raises:
        ValueError: If the networks differ in structure or shapes, naming the leaf; if `ts` does not
            ascend from 0 to 1; if one of `spec` and `permutation` comes without the other, or they
            do not fit; if a metric is not finite.
        TypeError: If a leaf is not floating.

    Example:
        >>> metrics_fn = lambda params, batch: {"loss": jnp.mean(batch["x"] * params["w"] ** 2)}
        >>> a, b, data = {"w": jnp.ones(())}, {"w": -jnp.ones(())}, {"x": jnp.ones(3)}
        >>> found = barrier(metrics_fn, a, b, data, ts=[0.0, 0.5, 1.0])
        >>> found.naive["loss"].values.tolist(), found.naive["loss"].height
        ([1.0, 0.0, 1.0], 0.0)

    Reference:
        Ainsworth et al., Git Re-Basin: Merging Models modulo Permutation Symmetries, 2023, sections
        2 and 5.
    """
    ts = np.linspace(0.0, 1.0, 25) if ts is None else np.asarray(ts, np.float64)
    if ts.ndim != 1 or len(ts) < 2 or ts[0] != 0 or ts[-1] != 1 or (np.diff(ts) <= 0).any():
        raise ValueError("barrier: ts must ascend from 0 to 1, both ends included.")
    if (spec is None) != (permutation is None):
        given, lacking = ("spec", "permutation") if permutation is None else ("permutation", "spec")
        raise ValueError(f"barrier: got a {given} without a {lacking}; give both or neither.")
    tree.check_floating(params_a, "params_a")
    tree.check_same(params_a, params_b, names=("params_a", "params_b"))
    ends = [params_b]
    if spec is not None and permutation is not None:
        ends.append(action.apply(spec, permutation, params_b))

    averaged = batches_.mean(metrics_fn, batches, weight_fn=weight_fn, mesh=mesh)
    places = [(params_a, 0.0)] + [(end, float(t)) for end in ends for t in ts[1:]]
    rows = []
    with progress_.bar(len(places), "barrier", show=progress) as bar:
        for i, (end, t) in enumerate(places):
            params = _between(params_a, end, np.float64(t))
            extra = () if state_fn is None else (state_fn(params),)
            rows.append(averaged(params, *extra))
            if i:  # the host runs one point ahead
                jax.block_until_ready(rows[i - 1])
            bar(i + 1)
    rows = jax.device_get(rows)
    if not isinstance(rows[0], dict) or any(np.ndim(x) for x in rows[0].values()):
        raise TypeError("barrier: metrics_fn must return a dict of scalars.")
    steps = len(ts) - 1
    found = []
    for i in range(len(ends)):
        on_line = [rows[0], *rows[1 + i * steps : 1 + (i + 1) * steps]]
        found.append(
            {
                name: barrier_of_values(ts, np.array([row[name] for row in on_line], np.float64))
                for name in rows[0]
            }
        )
    distances = [float(_distance(params_a, end)) for end in ends]
    return PermutedBarrier(
        ts,
        found[0],
        found[1] if len(found) > 1 else None,
        distances[0],
        distances[1] if len(found) > 1 else None,
    )


@jax.jit
def _distance(a: PyTree, b: PyTree) -> jax.Array:
    return tree.norm(tree.axpy(-1.0, a, b))


@jax.jit
def _between(a: PyTree, b: PyTree, t: Any) -> PyTree:
    """The point at t, measured from the nearer end: exact at both ends, and where they agree."""

    def one(x, y):
        dtype = tree.accumulation_dtype(x)
        x, y, at = jnp.asarray(x).astype(dtype), jnp.asarray(y).astype(dtype), t.astype(dtype)
        step = y - x
        return jnp.where(at <= 0.5, x + at * step, y - (1 - at) * step)

    return jax.tree.map(lambda x, y: one(x, y).astype(jnp.result_type(x)), a, b)
