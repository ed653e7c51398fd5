"""Barycentric coordinates: of a given network, of the nearest point of a simplex, and of a grid."""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import tree
from geojax.simplex import volume

__all__ = ["Projection", "contains", "grid", "nearest", "nearest_weights", "project"]

PyTree = Any


class Projection(NamedTuple):
    """A point as a combination of vertices.

    Attributes:
        weights: `(n,)` float64, summing to 1: `tree.combine(vertices, weights)` is the nearest
            point of the affine hull (`project`) or of the simplex (`nearest`).
        distance: From the point to that one.
        inside: Whether no weight is less than -1e-5: the nearest point lies in the simplex.
        resolution: Roughly how far rounding reaches in the distance.
    """

    weights: np.ndarray
    distance: float
    inside: bool
    resolution: float


def project(vertices: PyTree, point: PyTree) -> Projection:
    """The nearest point of the affine hull of a simplex.

    The equations are those of the heights (Gram-Schmidt in two passes), solved in float64 and
    refined twice by what is left of the point.

    Args:
        vertices: Stacked points, leaves `(n, ...)`, which may not be flat.
        point: A pytree like one vertex.

    Returns:
        A `Projection`. Cost: that of `log_volume` and three reads of the vertices.

    Raises:
        ValueError: If the vertices are affinely dependent, so that the weights are not unique (see
            `nearest`); if the point differs from them, naming the leaf.

    Example:
        >>> corners = {"w": jnp.array([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])}
        >>> found = project(corners, {"w": jnp.array([0.5, 0.5, 3.0])})
        >>> found.weights.round(6).tolist(), round(found.distance, 5), found.inside
        ([0.5, 0.25, 0.25], 3.0, True)
    """
    local = _Local.of(vertices, point)
    if local.flat:
        raise ValueError(
            "project: the vertices are affinely dependent (the simplex has volume 0), so that a "
            "point has many weights; use `nearest`, or leave a vertex out."
        )
    weights, distance = local.solve()
    return Projection(weights, distance, bool((weights >= -1e-5).all()), local.resolution)


def contains(vertices: PyTree, point: PyTree, *, rtol: float = 1e-4) -> bool:
    """Whether a point lies in a simplex, up to rounding.

    Args:
        vertices: Stacked points, leaves `(n, ...)`; they may be flat.
        point: A pytree like one vertex.
        rtol: How far it may lie outside, relative to the longest edge. A point that is as near as
            the vertices are known (see `Projection.resolution`) always lies in.

    Example:
        >>> corners = {"w": jnp.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])}
        >>> contains(corners, {"w": jnp.array([1.0, 1.0])})
        True
        >>> contains(corners, {"w": jnp.array([1.1, 1.0])})
        False
    """
    found = nearest(vertices, point)
    return bool(found.distance <= max(rtol * volume.distances(vertices).max(), found.resolution))


def nearest(vertices: PyTree, point: PyTree) -> Projection:
    """The nearest point of a simplex.

    In coordinates of the simplex's own, in float64: an active-set method, exact after finitely many
    steps.

    Args:
        vertices: Stacked points, leaves `(n, ...)`. Where they are affinely dependent the point is
            unique and its weights are one choice of many.
        point: A pytree like one vertex.

    Returns:
        A `Projection` whose weights are nonnegative.

    Raises:
        ValueError: If the point differs from the vertices, naming the leaf.

    Example:
        >>> corners = {"w": jnp.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])}
        >>> found = nearest(corners, {"w": jnp.array([3.0, -1.0])})
        >>> found.weights.round(6).tolist(), round(found.distance, 5)
        ([0.0, 1.0, 0.0], 1.41421)

    Reference:
        Wolfe, "Finding the Nearest Point in a Polytope", Mathematical Programming 11, 1976.
    """
    local = _Local.of(vertices, point)
    weights = _nearest_to_origin(local.corners - local.target)
    return Projection(weights, local.distance(weights), True, local.resolution)


class _Local:
    """A simplex and a point in orthonormal coordinates of the simplex's affine hull."""

    def __init__(self, vertices: PyTree, point: PyTree):
        self.vertices, self.point = vertices, point
        num = tree.num_points(vertices)
        found = volume.factors(vertices)
        self.coefficients, self.lengths, self.flat = found
        size = float(_largest_norm(vertices, point))
        dtype = tree.accumulation_dtype(*jax.tree.leaves(vertices))
        self.resolution = 4 * float(jnp.finfo(dtype).eps) * size
        edges = np.linalg.solve(self.coefficients, np.diag(self.lengths))
        self.corners = np.concatenate([np.zeros((1, num - 1)), edges])
        self.target = self._coordinates(np.eye(num)[0])

    @classmethod
    def of(cls, vertices: PyTree, point: PyTree) -> "_Local":
        tree.check_floating(vertices, "vertices")
        tree.num_points(vertices)
        tree.check_same(tree.unstack(vertices)[0], point, names=("a vertex", "point"), dtype=False)
        return cls(jax.tree.map(jnp.asarray, vertices), jax.tree.map(jnp.asarray, point))

    def _coordinates(self, weights: np.ndarray) -> np.ndarray:
        """Those of the point, less those of the combination with these weights."""
        along, _ = _residual(self.vertices, self.point, weights.astype(np.float32))
        inner = self.coefficients @ np.asarray(along, np.float64)
        known = self.lengths > 0
        return np.where(known, inner / np.where(known, self.lengths, 1), 0)

    def distance(self, weights: np.ndarray) -> float:
        """From the point to the combination with these weights."""
        return float(_residual(self.vertices, self.point, weights.astype(np.float32))[1])

    def solve(self) -> tuple[np.ndarray, float]:
        """The weights of the nearest point of the hull, refined."""
        total = np.eye(len(self.corners))[0]
        if len(total) > 1:
            inner = self.target
            for i in range(3):
                inner = self._coordinates(total) if i else inner
                # Edge weights c of coordinates y: c^T (inverse(A) L) = y^T.
                change = self.coefficients.T @ (inner / self.lengths)
                total = total + np.concatenate([[-change.sum()], change])
        return total, self.distance(total)


@jax.jit
def _residual(vertices: PyTree, point: PyTree, weights: Any) -> tuple[jax.Array, jax.Array]:
    """Inner products with the edges of the point less a combination, and the distance."""
    first, *others = tree.unstack(vertices)
    rest = _minus(point, first)
    edges = [_minus(other, first) for other in others]
    for i, edge in enumerate(edges):
        rest = tree.axpy(-jnp.asarray(weights)[i + 1], edge, rest)
    dtype = tree.accumulation_dtype(*jax.tree.leaves(vertices))
    inner = [tree.vdot(edge, rest) for edge in edges]
    return jnp.stack(inner) if inner else jnp.zeros(0, dtype), tree.norm(rest)


def _minus(x: PyTree, y: PyTree) -> PyTree:
    def one(a, b):
        dtype = tree.accumulation_dtype(a, b)
        return a.astype(dtype) - b.astype(dtype)

    return jax.tree.map(one, x, y)


@jax.jit
def _largest_norm(vertices: PyTree, point: PyTree) -> jax.Array:
    found = [tree.norm(x) for x in [point, *tree.unstack(vertices)]]
    dtype = jnp.result_type(*found)
    return jnp.max(jnp.stack([x.astype(dtype) for x in found]))


def nearest_weights(values: np.ndarray) -> np.ndarray:
    """The nearest nonnegative numbers that sum to one, in the Euclidean distance of the numbers.

    Example:
        >>> nearest_weights(np.array([0.5, 1.5, -3.0])).tolist()
        [0.0, 1.0, 0.0]

    Reference:
        Duchi et al., "Efficient Projections onto the l1-Ball for Learning in High Dimensions",
        2008, figure 1.
    """
    down = np.sort(values)[::-1]
    excess = (np.cumsum(down) - 1) / np.arange(1, len(values) + 1)
    return np.maximum(values - excess[np.flatnonzero(down > excess)[-1]], 0)


def _nearest_to_origin(corners: np.ndarray) -> np.ndarray:
    """Weights of the point of least norm in the convex hull of the rows: Wolfe's algorithm."""
    num = len(corners)
    size = max(float(np.square(corners).sum(1).max()), np.finfo(float).tiny)
    weights = np.zeros(num)
    active = [int(np.square(corners).sum(1).argmin())]
    weights[active] = 1
    for _ in range(50 * num):
        here = weights @ corners
        gains = corners @ here
        enters = int(gains.argmin())
        if gains[enters] >= here @ here - 1e-14 * size or enters in active:
            break
        active.append(enters)
        while True:
            affine = _affine_minimum(corners[active])
            if (affine > 1e-12).all():
                weights[:] = 0
                weights[active] = affine
                break
            # As far towards it as no weight becomes negative; what reaches zero leaves.
            now = weights[active]
            falls = affine <= 1e-12
            with np.errstate(divide="ignore", invalid="ignore"):
                steps = np.where(falls, now / (now - affine), np.inf)
            now = now + min(1.0, np.nanmin(steps)) * (affine - now)
            kept = now > 1e-12
            weights[:] = 0
            weights[np.array(active)[kept]] = now[kept]
            active = [i for i, keep in zip(active, kept, strict=True) if keep]
            weights /= weights.sum()
    return weights


def _affine_minimum(corners: np.ndarray) -> np.ndarray:
    """Weights, of any sign, of the point of least norm in the affine hull of the rows."""
    first, edges = corners[0], corners[1:] - corners[0]
    rest = np.linalg.lstsq(edges.T, -first, rcond=None)[0] if len(edges) else np.zeros(0)
    return np.concatenate([[1 - rest.sum()], rest])


def grid(n: int, resolution: int) -> np.ndarray:
    """Weights on a regular lattice of a simplex, faces included.

    Args:
        n: The number of vertices.
        resolution: Steps along an edge, at least 1; multiples of n have the centroid.

    Returns:
        `(num, n)` float32, rows that sum to 1, with num the binomial coefficient of
        (resolution + n - 1, n - 1); the first row is the last vertex.

    Raises:
        ValueError: For more than a million points.

    Example:
        >>> grid(2, 4)[:, 0].tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if n < 1 or resolution < 1:
        raise ValueError(f"n is {n} and resolution {resolution}; expected at least 1 of each.")
    num = math.comb(resolution + n - 1, n - 1)
    if num > 1_000_000:
        raise ValueError(
            f"grid: {resolution} steps with {n} vertices make {num} points; expected at most a "
            "million. Draw points with `sample_weights` instead."
        )
    # Bars between stars: n - 1 places of resolution + n - 1.
    bars = np.array(list(itertools.combinations(range(resolution + n - 1), n - 1)))
    bars = bars.reshape(num, n - 1)
    ends = np.concatenate(
        [np.full((num, 1), -1), bars, np.full((num, 1), resolution + n - 1)], axis=1
    )
    return ((np.diff(ends, axis=1) - 1) / resolution).astype(np.float32)
