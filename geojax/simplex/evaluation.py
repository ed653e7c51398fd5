"""Complexes measured: metrics at points drawn from one, at its vertices, and its worst point."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from geojax import batches as batches_
from geojax import progress as bars
from geojax import tree
from geojax._checksums import checksums
from geojax._measured import Measured, about_data
from geojax.fit import Checkpointer
from geojax.simplex import barycentric, sampling
from geojax.simplex.complexes import SimplicialComplex

__all__ = ["MetricOnComplex", "SimplexEvaluation", "WorstPoint", "evaluate", "worst_point"]

PyTree = Any
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class MetricOnComplex(NamedTuple):
    """One metric over a complex.

    Attributes:
        values: `(num_points,)` at the points drawn.
        vertices: `(n,)` at the vertices; NaN where they were not measured.
        mean: Over the points drawn.
        standard_error: Of the mean, for points drawn independently.
        quantiles: From a level (0.05, 0.25, 0.5, 0.75, 0.95) to the value below which that share
            of the points lies.
        lowest: The least value seen, at points or vertices.
        highest: The largest value seen, at points or vertices: a lower bound of the maximum, which
            `worst_point` improves.
        at_highest: `(n,)` the weights of the point where it is.
        simplex_means: `(num_simplices,)`, the mean over the points in each; NaN without points.
        simplex_highest: `(num_simplices,)`, likewise, its vertices included.
    """

    values: np.ndarray
    vertices: np.ndarray
    mean: float
    standard_error: float
    quantiles: dict[float, float]
    lowest: float
    highest: float
    at_highest: np.ndarray
    simplex_means: np.ndarray
    simplex_highest: np.ndarray


class SimplexEvaluation(NamedTuple):
    """Metrics at points drawn from a complex.

    Attributes:
        weights: `(num_points, n)`, the points; `tree.combine(complex.vertices, weights[i])`.
        simplices: `(num_points,)`, which simplex each lies in.
        metrics: One `MetricOnComplex` for each metric.
    """

    weights: np.ndarray
    simplices: np.ndarray
    metrics: dict[str, MetricOnComplex]

    def table(self) -> list[dict[str, Any]]:
        """One row for each metric, for `geojax.report`."""
        return [
            {
                "metric": name, "mean": x.mean, "standard error": x.standard_error,
                "median": x.quantiles[0.5], "95 %": x.quantiles[0.95], "lowest": x.lowest,
                "highest": x.highest, "vertices' mean": float(x.vertices.mean()),
            }
            for name, x in self.metrics.items()
        ]  # fmt: skip

    def worst(self, metric: str, num_points: int) -> sampling.Sampled:
        """The points drawn where a metric is largest, as starts for `worst_point`."""
        order = np.argsort(-self.metrics[metric].values, kind="stable")[:num_points]
        return sampling.Sampled(
            jnp.asarray(self.weights[order]), jnp.asarray(self.simplices[order])
        )


def evaluate(
    metrics_fn: Callable[..., dict[str, jax.Array]],
    complex: SimplicialComplex,
    batches: Any,
    num_points: int = 400,
    *,
    key: jax.Array,
    choose: sampling.Choice = "volume",
    state_fn: Callable[[PyTree], PyTree] | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    include_vertices: bool = True,
    checkpoint: Checkpointer | None = None,
    progress: bool | None = None,
) -> SimplexEvaluation:
    """Measure metrics at points drawn from a complex, on fixed data in a fixed order.

    Args:
        metrics_fn: `(params, batch)` to a dict of scalars that are means over the batch; with
            `state_fn`, `(params, state, batch)`.
        complex: Where to measure.
        batches: One batch or a re-iterable.
        num_points: How many points to draw, at least 1.
        key: A typed key; the same key gives the same points and numbers.
        choose: How the simplex of a point is picked: see `probabilities`.
        state_fn: From the parameters at a point to the state there. A network with BatchNorm
            needs it: `lambda params: statistics.refresh(apply_fn, params, state, batches)`.
        weight_fn: Weight of a batch; by default its number of examples.
        mesh: Split each batch over this mesh's first axis.
        include_vertices: Measure the vertices besides; they do not enter means and quantiles.
        checkpoint: A `geojax.checkpoint.Checkpointer`: the values so far are saved every
            `checkpoint.every` points, at the end and on an interrupt; the same call goes on from
            there, to the bits of one that was not interrupted. It first measures the last point
            where all metrics were finite again, also of an evaluation that is done, and refuses to
            go on where other metrics, states or data show there. Arrays in memory must be the same
            to the bit.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        A `SimplexEvaluation`. Cost: a pass over the data for each point and vertex, and one more
        with a checkpoint that goes on; memory: two points besides the complex.

    Raises:
        ValueError: As `probabilities`; if `num_points` is less than 1; if a metric is no scalar;
            for a checkpoint of other vertices, of other points, metrics or data.

    Example:
        >>> from geojax.simplex import single
        >>> edge = single({"w": jnp.array([0.0, 1.0])})
        >>> found = evaluate(
        ...     lambda p, batch: {"loss": p["w"]}, edge, np.zeros((1, 1)), 9, key=jax.random.key(0)
        ... )
        >>> found.metrics["loss"].highest, found.metrics["loss"].vertices.tolist()
        (1.0, [0.0, 1.0])
    """
    if not isinstance(num_points, (int, np.integer)) or num_points < 1:
        raise ValueError(f"num_points is {num_points!r}; expected an integer of at least 1.")
    drawn = sampling.sample_with_simplices(key, complex, num_points, choose=choose)
    weights = np.asarray(drawn.weights)
    places = weights
    if include_vertices:
        places = np.concatenate([weights, np.eye(complex.num_vertices, dtype=np.float32)])
    source = batches_.as_batches(batches)
    averaged = batches_.mean(metrics_fn, source, weight_fn=weight_fn, mesh=mesh)
    record = {} if checkpoint is None else _record(complex, source)
    run = Measured("simplex", places, checkpoint, record, rtol=1e-6)

    def measure(place: np.ndarray) -> Any:
        params = _at(complex.vertices, place)
        row = averaged(params, *(() if state_fn is None else (state_fn(params),)))
        _check_scalars(row)
        return row

    with bars.bar(len(places), "simplex", show=progress) as update:
        if run.done:
            run.compare(measure(places[run.known() - 1]), run.known())
        run.follow(map(measure, places[run.done :]), update)
    simplices = np.asarray(drawn.simplices)
    return SimplexEvaluation(
        weights,
        simplices,
        {
            name: _summary(measured, places, simplices, complex)
            for name, measured in run.values.items()
        },
    )


def _record(complex: SimplicialComplex, source: Any) -> dict[str, Any]:
    """What tells one complex and its data from others, JSON-able."""
    return {
        "vertices": checksums(jax.tree.leaves(complex.vertices)),
        **about_data(source),
    }


@jax.jit
def _at(vertices: PyTree, weights: jax.Array) -> PyTree:
    return tree.combine(vertices, weights)


def _check_scalars(row: Any) -> None:
    if not isinstance(row, dict) or not row:
        raise ValueError(
            f"metrics_fn: returned {jax.tree.structure(row)}; expected a dict of scalars, such as "
            "{'loss': ...}."
        )
    for name, value in row.items():
        if jnp.shape(value) != ():
            raise ValueError(
                f"metrics_fn: {name!r} has shape {jnp.shape(value)}; expected a scalar, the mean "
                "over the batch."
            )


def _summary(
    measured: np.ndarray, places: np.ndarray, simplices: np.ndarray, complex: SimplicialComplex
) -> MetricOnComplex:
    num = len(simplices)
    values, corners = measured[:num], np.full(complex.num_vertices, np.nan)
    if len(measured) > num:
        corners = measured[num:]
    means, highest = [], []
    for s, simplex in enumerate(complex.simplices):
        inside = values[simplices == s]
        means.append(inside.mean() if inside.size else np.nan)
        known = np.concatenate([inside, corners[list(simplex)]])
        known = known[~np.isnan(known)] if len(measured) == num else known
        highest.append(known.max() if known.size else np.nan)
    at = int(measured.argmax())
    return MetricOnComplex(
        values=values,
        vertices=corners,
        mean=float(values.mean()),
        standard_error=float(values.std(ddof=1) / np.sqrt(num)) if num > 1 else float("nan"),
        quantiles={q: float(np.quantile(values, q)) for q in QUANTILES},
        lowest=float(measured.min()),
        highest=float(measured[at]),
        at_highest=places[at],
        simplex_means=np.array(means),
        simplex_highest=np.array(highest),
    )


# ------------------------------------------------------------------------------- the worst point


class WorstPoint(NamedTuple):
    """The largest loss that was found in a complex.

    Attributes:
        value: The loss, no less than at any start.
        weights: `(n,)` where it is.
        simplex: Which simplex the point lies in.
        start_values: `(num_starts,)` the loss at each start.
        values: `(num_starts,)` the largest loss that was seen from each start.
        slopes: `(num_starts,)` by how much a step of one unit of barycentric length would still
            raise the loss, to first order: zero at a maximum of the simplex.
        num_gradients: How many gradients over the data were taken.
    """

    value: float
    weights: np.ndarray
    simplex: int
    start_values: np.ndarray
    values: np.ndarray
    slopes: np.ndarray
    num_gradients: int


def worst_point(
    loss_fn: Callable[..., jax.Array],
    complex: SimplicialComplex,
    batches: Any,
    *,
    key: jax.Array | None = None,
    num_starts: int = 8,
    num_steps: int = 20,
    choose: sampling.Choice = "volume",
    starts: sampling.Sampled | None = None,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    progress: bool | None = None,
) -> WorstPoint:
    """Search a complex for its largest loss, by gradient ascent on barycentric coordinates.

    The gradient with respect to the coefficients of the vertices is their inner product with the
    gradient with respect to the parameters. A step goes along it, back into the simplex by the
    nearest point, and is taken where it raises the loss; else the next one is a quarter as long.

    Args:
        loss_fn: `(params, batch)` to the mean loss; with `state_fn`, `(params, state, batch)`, and
            the state is a constant of the gradient.
        complex: Where to search; an ascent stays in the simplex where it began.
        batches: One batch or a re-iterable.
        key: A typed key, for the starts.
        num_starts: Points drawn to begin at.
        num_steps: Gradients for each start beyond the first.
        choose: How the simplex of a start is picked: see `probabilities`.
        starts: Where to begin instead, as `SimplexEvaluation.worst` gives them.
        state_fn: As for `evaluate`.
        weight_fn: As for `evaluate`.
        mesh: As for `evaluate`.
        progress: As for `evaluate`.

    Returns:
        A `WorstPoint`. It is a lower bound of the maximum, and no less than at any start. Cost:
        at most `num_starts * (num_steps + 1)` gradients.

    Raises:
        ValueError: As `probabilities`; without key and starts; where the loss is NaN.

    Example:
        >>> from geojax.simplex import single
        >>> edge = single({"w": jnp.array([-1.0, 2.0])})
        >>> found = worst_point(
        ...     lambda p, batch: p["w"] ** 2, edge, np.zeros((1, 1)), key=jax.random.key(0)
        ... )
        >>> round(found.value, 4), found.weights.round(4).tolist()
        (4.0, [0.0, 1.0])
    """
    if starts is None:
        if key is None:
            raise ValueError("worst_point: expected a key to draw starts with, or starts.")
        if num_starts < 1:
            raise ValueError(f"num_starts is {num_starts}; expected at least 1.")
        starts = sampling.sample_with_simplices(key, complex, num_starts, choose=choose)
    if num_steps < 0:
        raise ValueError(f"num_steps is {num_steps}; expected at least 0.")
    weights, simplices = np.asarray(starts.weights, np.float64), np.asarray(starts.simplices)
    averaged = batches_.mean(_with_gradient(loss_fn), batches, weight_fn=weight_fn, mesh=mesh)

    def measured(place: np.ndarray) -> tuple[float, np.ndarray]:
        params = _at(complex.vertices, place.astype(np.float32))
        extra = () if state_fn is None else (state_fn(params),)
        value, gradient = averaged(params, *extra)
        if np.isnan(value):
            raise ValueError(f"worst_point: the loss is NaN at the weights {place.tolist()}.")
        return float(value), np.asarray(_slopes(complex.vertices, gradient), np.float64)

    begun, found, count = [], [], 0
    with bars.bar(len(weights), "worst point", show=progress) as update:
        for i, (place, simplex) in enumerate(zip(weights, simplices, strict=True)):
            inside = list(complex.simplices[int(simplex)])
            first, *result, used = _ascend(measured, place, inside, num_steps)
            begun.append(first)
            found.append(result)
            count += used
            update(i + 1)
    best = int(np.argmax([value for value, _, _ in found]))
    value, place, _ = found[best]
    return WorstPoint(
        value, place.astype(np.float32), int(simplices[best]), np.array(begun),
        np.array([x[0] for x in found]), np.array([x[2] for x in found]), count,
    )  # fmt: skip


# A function with its gradient, one for each, so that `batches.mean` compiles it once.
_GRADIENTS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _with_gradient(loss_fn: Callable) -> Callable:
    if loss_fn not in _GRADIENTS:
        ref = weakref.ref(loss_fn)

        def with_gradient(params: PyTree, *rest: Any) -> tuple[jax.Array, PyTree]:
            return jax.value_and_grad(ref())(params, *rest)  # type: ignore[arg-type]

        _GRADIENTS[loss_fn] = with_gradient
    return _GRADIENTS[loss_fn]


@jax.jit
def _slopes(vertices: PyTree, gradient: PyTree) -> jax.Array:
    """The derivative of the loss towards each vertex, up to a constant."""
    # Relative to the first vertex, since what all have in common is no direction.
    first = tree.unstack(vertices)[0]
    return tree.inner_products(vertices, gradient) - tree.vdot(first, gradient)


def _ascend(
    measured: Callable, start: np.ndarray, inside: list[int], num_steps: int
) -> tuple[float, float, np.ndarray, float, int]:
    place, step = start, 0.25
    value, slopes = measured(place)
    first, used = value, 1
    while used <= num_steps:
        slope = slopes[inside] - slopes[inside].mean()
        size = np.linalg.norm(slope)
        if len(inside) == 1 or not np.isfinite(size) or size == 0:
            break
        moved = np.zeros_like(place)
        moved[inside] = barycentric.nearest_weights(place[inside] + step * slope / size)
        if np.abs(moved - place).max() < 1e-6:
            # Held by the faces, or the steps have become too short to tell.
            break
        tried, at_moved = measured(moved)
        used += 1
        if tried > value:
            place, value, slopes, step = moved, tried, at_moved, min(2 * step, 1.0)
        else:
            step /= 4
    return first, value, place, _rise(place[inside], slopes[inside]), used


def _rise(weights: np.ndarray, slopes: np.ndarray) -> float:
    """The length of the gradient projected on the directions that stay within the simplex."""
    reach = 1e-4
    centred = slopes - slopes.mean()
    size = np.linalg.norm(centred)
    if size == 0 or not np.isfinite(size):
        return float(size)
    moved = barycentric.nearest_weights(weights + reach * centred / size)
    return float(centred @ (moved - weights) / reach)
