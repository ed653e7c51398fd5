"""Loss and other metrics on a plane through weight space, and where other points lie beside it.

The grid is evaluated point by point with one compiled program, can be stopped, and goes on later.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from geojax import batches as batches_
from geojax import progress as progress_
from geojax import tree
from geojax._measured import Measured, about_data
from geojax.fit import Checkpointer
from geojax.surface.directions import check_direction

__all__ = ["Frame", "Plane", "Projection", "frame", "plane"]

PyTree = Any


class Projection(NamedTuple):
    """Points seen from a plane.

    Attributes:
        coordinates: `(n, 2)`, float64: of the nearest points in the plane.
        distances: `(n,)`, float64: how far the points lie off the plane. For points in it this is
            what rounding leaves, some eps of the parameters' norm.
    """

    coordinates: np.ndarray
    distances: np.ndarray


class Frame(NamedTuple):
    r"""A plane with coordinates in units of distance: :math:`\theta(x, y) = A + x e_1 + y e_2`.

    Attributes:
        origin: The point A at (0, 0).
        basis: Stacked pytree of two rows, :math:`e_1` and :math:`e_2`, orthonormal, in float32 or
            better, in the sharding of the parameters.
        points: `(3, 2)`: the coordinates of the three points, or of A and the ends of the two
            directions. The first is (0, 0) and the second on the positive x axis.
        box: `((x low, x high), (y low, y high))`: the smallest box around the three points, or from
            minus to plus the extent of the directions.
    """

    origin: PyTree
    basis: PyTree
    points: np.ndarray
    box: tuple[tuple[float, float], tuple[float, float]]

    def __repr__(self) -> str:
        places = ", ".join(f"({x:.4g}, {y:.4g})" for x, y in self.points)
        return f"Frame(points at {places}; {tree.size(self.origin)} parameters)"

    __str__ = __repr__

    def point(self, coordinates: Any) -> PyTree:
        """The parameters at `(2,)` coordinates, in the dtypes of the origin."""
        coordinates = np.asarray(coordinates, np.float64)
        if coordinates.shape != (2,):
            raise ValueError(f"point: coordinates have shape {coordinates.shape}; expected (2,).")
        return _point(self.origin, self.basis, coordinates)

    def project(self, points: Any) -> Projection:
        """Where points lie: a curve, a trajectory, other networks.

        Args:
            points: One point, a stacked pytree, or a list or iterator of points, one of which is
                held at a time.

        Raises:
            ValueError: If a point is of another structure or shape, naming the leaf.
        """
        rows = []
        for point in _each(points, self.origin):
            tree.check_same(self.origin, point, names=("the origin", "the point"), dtype=False)
            rows.append(_coordinates(self.origin, self.basis, point))
        fetched = [np.append(c, d) for c, d in jax.device_get(rows)]
        out = np.array(fetched, np.float64).reshape(-1, 3)
        return Projection(out[:, :2], out[:, 2])


class Plane(NamedTuple):
    """Metrics on a plane.

    Attributes:
        frame: The plane itself.
        coordinates: `(num_y, num_x, 2)` for a grid: entry [i, j] is (x_j, y_i); `(n, 2)` for
            scattered positions. Distances from the origin along the two basis vectors.
        values: Dict of arrays of shape `coordinates.shape[:-1]`, one for each metric; what is not
            finite there was not finite in the network.
    """

    frame: Frame
    coordinates: np.ndarray
    values: dict[str, np.ndarray]

    def project(self, points: Any) -> Projection:
        """Where points lie, see `Frame.project`."""
        return self.frame.project(points)


# -------------------------------------------------------------------------------------- the frame


def _wide(point: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.asarray(x).astype(tree.accumulation_dtype(x)), point)


@jax.jit
def _difference(origin: PyTree, point: PyTree) -> PyTree:
    return tree.axpy(-1.0, origin, _wide(point))


@jax.jit
def _span(first: PyTree, second: PyTree):
    """An orthonormal basis and the coordinates of both directions; norms to judge them by."""
    first, second = _wide(first), _wide(second)
    x1, length = tree.norm(first), tree.norm(second)
    e1 = tree.scale(1.0 / x1, first)
    x2, rest = jnp.zeros_like(x1), second
    # A second pass removes what rounding left along e1 when the two are nearly parallel.
    for _ in range(2):
        along = tree.vdot(rest, e1)
        x2, rest = x2 + along, tree.axpy(-along, e1, rest)
    y2 = tree.norm(rest)
    return tree.stack([e1, tree.scale(1.0 / y2, rest)]), jnp.stack([x1, x2, y2, length])


@jax.jit
def _point(origin: PyTree, basis: PyTree, coordinates: Any) -> PyTree:
    coordinates = jnp.asarray(coordinates).astype(tree.accumulation_dtype(*jax.tree.leaves(basis)))
    return tree.axpy(1.0, tree.combine(basis, coordinates), origin)


@jax.jit
def _points(origin: PyTree, basis: PyTree, coordinates: Any) -> PyTree:
    return jax.vmap(_point, in_axes=(None, None, 0))(origin, basis, coordinates)


@jax.jit
def _coordinates(origin: PyTree, basis: PyTree, point: PyTree):
    rest = _difference(origin, point)
    found = jnp.zeros(2, tree.accumulation_dtype(*jax.tree.leaves(basis)))
    # Products with the rest mend the rounding of those before.
    for _ in range(3):
        step = tree.inner_products(basis, rest)
        found, rest = found + step, tree.axpy(-1.0, tree.combine(basis, step), rest)
    return found, tree.norm(rest)


def _each(points: Any, like: PyTree) -> Iterable[PyTree]:
    """One point, a stack or a sequence of them, read by the structure of a point."""
    if hasattr(points, "__next__"):
        return points
    if jax.tree.structure(points) == jax.tree.structure(like):
        alike = zip(jax.tree.leaves(points), jax.tree.leaves(like), strict=True)
        if all(jnp.ndim(a) == jnp.ndim(b) for a, b in alike):
            return [points]
        return tree.unstack(points)
    if isinstance(points, (list, tuple)):
        return points
    tree.check_same(like, points, names=("the origin", "the points"), dtype=False)
    return [points]


def frame(points: Any, *, directions: Any = None) -> Frame:
    """The plane through three points, or through one along two directions.

    The first basis vector points from the first point to the second, or along the first direction;
    the second is what Gram-Schmidt leaves of the other. Directions are used for the plane they
    span: coordinates are distances, whatever the lengths and the angle of the directions.

    Args:
        points: A list or tuple of three points, or a stacked pytree of three; with `directions`
            the one point that they start from.
        directions: A list or tuple of two directions or a stacked pytree of two, such as
            `eigsh(...).eigenvectors` or `principal_directions(...).directions`. Leaves that are
            None, as in eigenvectors of selected parameters, stay where they are.

    Returns:
        A `Frame`. Memory: three times the parameters in float32 or better.

    Raises:
        ValueError: If two points are the same or the three lie on a line, as far as the dtypes of
            the parameters can tell; if a direction is zero or the two are parallel; for structures
            that differ, naming the leaf.
        TypeError: If a leaf is not floating.

    Example:
        >>> a, b, c = ({"w": jnp.array(w)} for w in ([0.0, 0.0], [2.0, 0.0], [1.0, 3.0]))
        >>> frame([a, b, c]).points.tolist()
        [[0.0, 0.0], [2.0, 0.0], [1.0, 3.0]]
    """
    if directions is None:
        origin, second, third = _three(points)
        first, other = _difference(origin, second), _difference(origin, third)
        away = float(tree.norm(origin))
    else:
        origin = points
        tree.check_floating(origin, "frame: the point")
        first, other = (_filled(d, origin) for d in _two(directions, origin))
        away = 0.0
    basis, facts = _span(first, other)
    x1, x2, y2, length = (float(x) for x in facts)
    if not np.isfinite([x1, length, away]).all():
        raise ValueError(
            "frame: a point or direction is not finite; expected finite numbers in every leaf."
        )
    # What is no longer than the rounding of the points has no direction of its own. Rounding moves
    # a point by up to half an eps of its norm, and with the second point the line turns.
    eps, kind = _eps(origin if directions is None else basis), directions is None
    if min(x1, length) <= eps * away:
        raise ValueError(
            f"frame: {'two of the points are the same' if kind else 'a direction is zero'}, as far "
            f"as rounding tells (lengths {x1:.3g} and {length:.3g}, rounding {eps * away:.3g}); "
            "expected three different points, or two directions to walk in."
        )
    rounding = eps * (away * (1 + abs(x2) / x1) + 2 * length)
    if not y2 > rounding:
        raise ValueError(
            f"frame: the {'three points lie on a line' if kind else 'two directions are parallel'},"
            f" as far as rounding tells (the last ends {y2:.3g} off the line, rounding is "
            f"{rounding:.3g}); on a line use `surface.line` or `surface.along`."
        )
    places = np.array([[0.0, 0.0], [x1, 0.0], [x2, y2]])
    high = np.abs(places).max(0)
    low = places.min(0) if directions is None else -high
    high = places.max(0) if directions is None else high
    box = (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))
    return Frame(origin, basis, places, box)


def _eps(point: PyTree) -> float:
    return max(float(jnp.finfo(jnp.result_type(x)).eps) for x in jax.tree.leaves(point))


def _three(points: Any) -> tuple[PyTree, PyTree, PyTree]:
    if type(points) not in (list, tuple):
        points = tree.unstack(points)
    if len(points) != 3:
        raise ValueError(
            f"frame: got {len(points)} points; expected three, in a list or stacked, or one point "
            "and `directions`."
        )
    for i, point in enumerate(points):
        tree.check_floating(point, f"frame: point {i}")
        tree.check_same(points[0], point, names=("point 0", f"point {i}"), dtype=False)
    return points[0], points[1], points[2]


def _two(directions: Any, origin: PyTree) -> Sequence[PyTree]:
    def none(x):
        return x is None

    alike = jax.tree.structure(directions, is_leaf=none) == jax.tree.structure(origin)
    if alike or type(directions) not in (list, tuple):
        directions = tree.unstack(directions)
    if len(directions) != 2:
        raise ValueError(f"frame: got {len(directions)} directions; expected two.")
    for direction in directions:
        check_direction("frame", direction, origin)
    return directions


def _filled(direction: PyTree, origin: PyTree) -> PyTree:
    return jax.tree.map(
        lambda d, p: jnp.zeros_like(p) if d is None else d,
        direction,
        origin,
        is_leaf=lambda x: x is None,
    )


# --------------------------------------------------------------------------------- the evaluation


def plane(
    metrics_fn: Callable[..., dict[str, jax.Array]],
    points: Any,
    batches: Any,
    *,
    directions: Any = None,
    num: int | tuple[int, int] = 21,
    extent: Any = None,
    margin: float = 0.2,
    coordinates: Any = None,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    chunk: int = 1,
    checkpoint: Checkpointer | None = None,
    progress: bool | None = None,
) -> Plane:
    """Metrics on a plane through weight space: through three points, or along two directions.

    It differs from the code of Garipov et al. in that the first point need not be an end of a
    curve, degenerate points are refused, and the grid may be interrupted.

    Args:
        metrics_fn: `(params, batch)` to a dict of scalars that are means over the batch; with
            `state_fn`, `(params, state, batch)`.
        points: As for `frame`, or a `Frame`.
        batches: One batch or a re-iterable.
        directions: As for `frame`.
        num: Positions along x and y of the grid, or one number for both; at least 2.
        extent: `((x low, x high), (y low, y high))` in units of distance; by default the frame's
            box and the margin.
        margin: What is added on each side of that box, as a part of its width and height.
        coordinates: `(n, 2)` scattered positions instead of a grid, such as
            `scipy.stats.qmc.Sobol(2, rng=0).random_base2(8) * 3 - 1`.
        state_fn: From the parameters at a position to the state there. A network with BatchNorm
            needs it: `lambda params: statistics.refresh(apply_fn, params, state, batches)`.
        weight_fn: Weight of a batch; by default its number of examples.
        mesh: Split each batch over this mesh's first axis.
        chunk: Positions in one `jax.vmap`; for dense models on an accelerator. Convolutions on a
            CPU are several times slower that way.
        checkpoint: A `geojax.checkpoint.Checkpointer`: the values so far are saved every
            `checkpoint.every` positions, at the end and on an interrupt; the same call goes on from
            there, to the bits of one that was not interrupted. It first measures the last position
            (or chunk) where all metrics were finite again, also of a plane that is done, and
            refuses to go on where other metrics, states or data show there. Arrays in memory must
            be the same to the bit.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        A `Plane`. Each point is rounded to the dtypes of the parameters. Cost: one pass over the
        data for each position or chunk, and one more with a checkpoint that goes on; memory: the
        frame and `chunk` points.

    Raises:
        ValueError: As `frame`; for positions that make no grid; for a checkpoint of another plane
            or of other positions, metrics or data.
        TypeError: If `metrics_fn` returns no dict of scalars.

    Example:
        >>> bowl = lambda p, batch: {"loss": jnp.mean(batch["x"]) + jnp.sum(p["w"] ** 2)}
        >>> a, b, c = ({"w": jnp.array(w)} for w in ([0.0, 0.0], [2.0, 0.0], [0.0, 1.0]))
        >>> found = plane(bowl, [a, b, c], {"x": jnp.ones(3)}, num=3, margin=0.0)
        >>> found.values["loss"].tolist()
        [[1.0, 2.0, 5.0], [1.25, 2.25, 5.25], [2.0, 3.0, 6.0]]

    Reference:
        Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, 2018,
        appendix A.1.
    """
    if not isinstance(chunk, (int, np.integer)) or chunk < 1:
        raise ValueError(f"chunk is {chunk!r}; expected a positive integer.")
    if isinstance(points, Frame):
        if directions is not None:
            raise ValueError("plane: expected a Frame or directions, got both.")
        found = points
    else:
        found = frame(points, directions=directions)
    if coordinates is None:
        places = _grid(found, num, extent, margin)
    else:
        places = np.asarray(coordinates, np.float64)
        if places.ndim != 2 or places.shape[1] != 2 or not len(places):
            raise ValueError(f"coordinates have shape {places.shape}; expected (n, 2).")
    if not np.isfinite(places).all():
        raise ValueError("plane: a position is not finite; expected finite coordinates.")
    source = batches_.as_batches(batches)
    averaged = batches_.mean(
        metrics_fn if chunk == 1 else _many(metrics_fn), source, weight_fn=weight_fn, mesh=mesh
    )
    flat = places.reshape(-1, 2)
    record = {} if checkpoint is None else _record(found, source)
    run = Measured(
        "plane", flat, checkpoint, record, close=("origin", "points"), rtol=1e-4, chunk=chunk
    )

    def measure(places: np.ndarray) -> PyTree:
        return _measure(found, places, chunk, averaged, state_fn)

    with progress_.bar(len(flat), "plane", show=progress) as bar:
        if run.done:
            end = run.known()
            again = flat[max(end - chunk, 0) : end]
            run.compare(measure(again), end, len(again))
        starts = range(run.done, len(flat), chunk)
        run.follow((measure(flat[start : start + chunk]) for start in starts), bar)
    return Plane(found, places, {k: v.reshape(places.shape[:-1]) for k, v in run.values.items()})


def _grid(found: Frame, num: Any, extent: Any, margin: float) -> np.ndarray:
    counts = num if isinstance(num, tuple) else (num, num)
    if len(counts) != 2 or any(not isinstance(n, (int, np.integer)) or n < 2 for n in counts):
        raise ValueError(f"num is {num!r}; expected an integer of at least 2, or two of them.")
    if extent is None:
        if not (np.isfinite(margin) and margin > -0.5):
            raise ValueError(f"margin is {margin}; expected a number above -0.5.")
        extent = [(a - margin * (b - a), b + margin * (b - a)) for a, b in found.box]
    extent = np.asarray(extent, np.float64)
    if extent.shape != (2, 2) or not (extent[:, 0] < extent[:, 1]).all():
        raise ValueError(
            f"extent is {extent.tolist()}; expected ((x low, x high), (y low, y high))."
        )
    xs, ys = (np.linspace(low, high, n) for (low, high), n in zip(extent, counts, strict=True))
    return np.stack(np.meshgrid(xs, ys), axis=-1)


# The function of many points of a function of one, so that both are compiled once.
_MANY: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _many(metrics_fn: Callable) -> Callable:
    if metrics_fn not in _MANY:
        ref = weakref.ref(metrics_fn)

        def many(points, *rest):
            *states, batch = rest
            return jax.vmap(lambda *point: ref()(*point, batch))(points, *states)  # type: ignore[misc]

        _MANY[metrics_fn] = many
    return _MANY[metrics_fn]


def _measure(found: Frame, places: np.ndarray, chunk: int, averaged, state_fn) -> PyTree:
    if chunk == 1:
        params = _point(found.origin, found.basis, places[0])
        return averaged(params, *(() if state_fn is None else (state_fn(params),)))
    # The last chunk is filled up, for the sake of one program.
    places = np.concatenate([places, np.repeat(places[-1:], chunk - len(places), axis=0)])
    params = _points(found.origin, found.basis, places)
    if state_fn is None:
        return averaged(params)
    return averaged(params, tree.stack([state_fn(point) for point in tree.unstack(params)]))


def _record(found: Frame, source: Any) -> dict[str, Any]:
    """What tells one plane from another, JSON-able."""
    leaning = np.asarray(tree.inner_products(found.basis, _wide(found.origin)))
    return {
        "origin": [float(tree.norm(found.origin)), *map(float, leaning)],
        "points": found.points.ravel().tolist(),
        **about_data(source),
    }
