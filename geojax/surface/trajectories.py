"""The directions in which a trajectory of points varies most."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from geojax import tree

__all__ = ["Center", "PrincipalDirections", "principal_directions"]

PyTree = Any
Center = Literal["mean", "first", "last"]


class PrincipalDirections(NamedTuple):
    """The principal components of a set of points.

    Attributes:
        origin: The centre, in the dtypes of the points.
        directions: Stacked pytree, leaves `(num, *leaf)`, orthonormal, in float32 or better.
        coordinates: `(n, num)`: of each point, in units of distance from the centre. The largest of
            each direction is positive.
        explained: `(num,)`: the share of the squared distances from the centre in each direction.
        residuals: `(n,)`: the distance of each point from the span of the directions.
    """

    origin: PyTree
    directions: PyTree
    coordinates: np.ndarray
    explained: np.ndarray
    residuals: np.ndarray

    def __repr__(self) -> str:
        shares = ", ".join(f"{100 * share:.1f} %" for share in self.explained)
        return f"PrincipalDirections({len(self.coordinates)} points, explained {shares})"

    __str__ = __repr__

    def extent(self, margin: float = 0.1) -> tuple[tuple[float, float], tuple[float, float]]:
        """The box around the points in the first two directions, as `surface.plane` takes it.

        Args:
            margin: What is added on each side, as a part of its width and height.
        """
        low, high = self.coordinates[:, :2].min(0), self.coordinates[:, :2].max(0)
        wider = margin * (high - low)
        low, high = low - wider, high + wider
        return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


def principal_directions(
    points: Any, num: int = 2, *, center: Center = "mean"
) -> PrincipalDirections:
    """The orthonormal directions that explain most of how points differ, by their Gram matrix.

    Args:
        points: A list of n points, such as a training run's checkpoints, or a stacked pytree.
        num: How many directions; fewer than n.
        center: What the points are compared with: their mean, as in PCA, or the last of them, as in
            the paper's trajectories, or the first.

    Returns:
        A `PrincipalDirections`; `surface.plane(metrics_fn, out.origin, batches,
        directions=out.directions, extent=out.extent())` is the plane of the first two. Cost: some
        3 (n + num) reads of all points; memory: twice the points in float32 or better.

    Raises:
        ValueError: If the points span fewer directions than asked for, as far as rounding tells;
            for structures that differ.
        TypeError: If a leaf is not floating.

    Example:
        >>> points = {"w": jnp.array([[0.0, 0.0, 1.0], [2.0, 0.0, 1.0], [1.0, 0.5, 1.0]])}
        >>> out = principal_directions(points)
        >>> out.explained.round(3).tolist()
        [0.923, 0.077]

    Reference:
        Li, Xu, Taylor, Studer and Goldstein, Visualizing the Loss Landscape of Neural Nets, 2018,
        section 7.2.
    """
    if center not in get_args(Center):
        raise ValueError(f"center is {center!r}; expected one of {', '.join(get_args(Center))}.")
    if isinstance(points, list):
        points = tree.stack(points)
    tree.check_floating(points, "points")
    n = tree.num_points(points)
    if not isinstance(num, (int, np.integer)) or not 1 <= num < n:
        raise ValueError(f"num is {num!r} and there are {n} points; expected 1 <= num < n.")
    at = {"mean": np.full(n, 1 / n), "first": np.eye(n)[0], "last": np.eye(n)[-1]}[center]
    origin, away, length = _centered(points, at)
    rows = [_row(away, one) for one in np.eye(n)]
    gram = np.array(jax.device_get(rows))
    # What the rounding of the sums, and of the points themselves, makes of nothing.
    noise = 8 * np.finfo(gram.dtype).eps
    gram = (gram + gram.T).astype(np.float64) / 2
    if not np.isfinite(gram).all():
        raise ValueError("principal_directions: a point is not finite, or too far for its dtype.")
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    eps = max(float(jnp.finfo(jnp.result_type(x)).eps) for x in jax.tree.leaves(points))
    least = max(noise * np.trace(gram), (eps * float(length)) ** 2)
    rank = int((values > least).sum())
    if rank < num:
        raise ValueError(
            f"principal_directions: {n} points span {rank} directions, as far as rounding tells, "
            f"and {num} were asked for."
        )
    found: list[PyTree] = []
    for k in range(num):
        weights = vectors[:, k] / np.sqrt(values[k])
        found.append(_orthogonal(away, weights, found))
    coordinates = np.stack([np.asarray(_along(away, u), np.float64) for u in found], axis=-1)
    signs = np.sign(coordinates[np.abs(coordinates).argmax(0), np.arange(num)])
    directions = tree.stack([tree.scale(sign, u) for sign, u in zip(signs, found, strict=True)])
    coordinates = coordinates * signs
    left = [_rest(away, directions, *row) for row in zip(np.eye(n), coordinates, strict=True)]
    return PrincipalDirections(
        origin=origin,
        directions=directions,
        coordinates=coordinates,
        explained=np.square(coordinates).sum(0) / np.trace(gram),
        residuals=np.array(jax.device_get(left), np.float64),
    )


@jax.jit
def _centered(points: PyTree, at: Any) -> tuple[PyTree, PyTree, jax.Array]:
    wide = jax.tree.map(lambda x: jnp.asarray(x).astype(tree.accumulation_dtype(x)), points)
    at = jnp.asarray(at).astype(tree.accumulation_dtype(*jax.tree.leaves(wide)))
    origin = tree.combine(wide, at)
    away = jax.tree.map(lambda x, o: x - o[None], wide, origin)
    narrow = jax.tree.map(lambda o, x: o.astype(jnp.result_type(x)), origin, points)
    return narrow, away, tree.norm(origin)


@jax.jit
def _row(away: PyTree, one: Any) -> jax.Array:
    return _along(away, tree.combine(away, one))


@jax.jit
def _along(away: PyTree, direction: PyTree) -> jax.Array:
    return tree.inner_products(away, direction)


@jax.jit
def _rest(away: PyTree, directions: PyTree, one: Any, coordinates: Any) -> jax.Array:
    # Not from the Gram matrix, where a small distance is a difference of large squares.
    in_span = tree.combine(directions, coordinates)
    return tree.norm(tree.axpy(-1.0, in_span, tree.combine(away, one)))


@jax.jit
def _orthogonal(away: PyTree, weights: Any, others: list[PyTree]) -> PyTree:
    """A combination of points, of length 1 and orthogonal to the directions before it."""
    out = tree.combine(away, weights)
    for _ in range(2):
        for other in others:
            out = tree.axpy(-tree.vdot(other, out), other, out)
    return tree.scale(1.0 / tree.norm(out), out)
