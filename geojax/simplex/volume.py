"""Volumes of simplices, right where they are flat, tiny or of many vertices; and their shape.

All are logarithms. The square of a volume spans hundreds of orders of magnitude, and a determinant
in float32 is noise where a new vertex begins: on the face that it is to leave.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from geojax import tree
from geojax.simplex.complexes import SimplicialComplex, faces

__all__ = [
    "angles",
    "distances",
    "edge_lengths",
    "heights",
    "log_total_volume",
    "log_volume",
    "log_volumes",
    "original_log_volume",
    "square_volume",
    "widths",
]

PyTree = Any
# Heights below this many units in the last place of the numbers stored are no heights.
_ULPS = 4


class _Factors(NamedTuple):
    """What Gram-Schmidt leaves of the edges e_i = (w_i - w_0) / unit, for m edges.

    Attributes:
        coefficients: `(m, m)`, lower triangular, ones on the diagonal: row k makes of the edges
            the height h_k of edge k over the edges before it.
        squares: `(m,)` the squares |h_k|^2.
        unit: The largest entry of an edge.
        flat: Whether a height is lost in the rounding of the vertices.
    """

    coefficients: jax.Array
    squares: jax.Array
    unit: jax.Array
    flat: jax.Array


# Entries of a leaf in a piece, 1 MiB for each vertex: of the sizes tried this was the fastest.
_CHUNK = 1 << 18


def log_volume(vertices: PyTree, *, chunk_size: int | None = None) -> jax.Array:
    r"""The natural logarithm of the m-volume of a simplex of n = m + 1 vertices.

    :math:`\log V = \sum_k \log |h_k| - \log m!`, with h_k the height of vertex k over the face of
    the vertices before it. Its gradient is in closed form: at vertex i it is H_i / |H_i|^2, with
    H_i the height of that vertex over the face of all others.

    A volume of zero is -inf, and its gradient is zero: the height has no direction there. Zero is
    where a height is less than 4 units in the last place of the numbers stored (`float32` or
    better), as at the mean of other vertices; `add_vertex` with `jitter` leaves such a place.

    Compared with the original, which takes a float32 determinant of squared distances
    (`square_volume`): that one reports large volumes where there is none, and overflows at about
    twelve vertices.

    Args:
        vertices: Stacked points, leaves `(n, ...)`, in any sharding. One point has volume 1.
        chunk_size: Read leaves in pieces of so many entries of each vertex, to save memory, where
            no leaf is sharded. By default 2^18 for arrays on one device outside of `jit`, and
            within where there is but one device; else all at once, as nothing is known of the
            sharding.

    Returns:
        A scalar in float32 or better. It may be traced, mapped and differentiated once (reverse).
        Cost: about n^2 reads of the vertices; memory: in pieces the gradient and no more than n
        pieces, else n times the parameters, and as much again for the gradient. Nothing is
        gathered.

    Raises:
        TypeError: If a leaf is not floating, naming it.
        ValueError: If the leaves do not share a leading axis, naming one.

    Example:
        >>> unit = {"w": jnp.concatenate([jnp.zeros((1, 3)), jnp.eye(3)])}
        >>> round(float(jnp.exp(log_volume(unit))) * 6, 5)
        1.0
    """
    tree.check_floating(vertices, "vertices")
    tree.num_points(vertices)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected at least 1.")
    vertices = jax.tree.map(jnp.asarray, vertices)
    return _log_volume(chunk_size or _default_chunk(vertices), vertices)


def _default_chunk(vertices: PyTree) -> int | None:
    leaves = jax.tree.leaves(vertices)
    # An axis that a type says to be sharded can't be cut, be the mesh of one device.
    typed = [tree.explicit_sharding(x) for x in leaves]
    if any(found is not None and any(found.spec) for found in typed):
        return None
    alone = jax.device_count() == 1 or all(
        not isinstance(x, Tracer) and len(x.sharding.device_set) == 1 for x in leaves
    )
    return _CHUNK if alone else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_heights(chunk_size: int | None, vertices: PyTree) -> jax.Array:
    return _forward(chunk_size, vertices)[0]


def _forward(
    chunk_size: int | None, vertices: PyTree
) -> tuple[jax.Array, tuple[PyTree, _Factors | None]]:
    m = tree.num_points(vertices) - 1
    if m == 0:
        dtype = tree.accumulation_dtype(*jax.tree.leaves(vertices))
        return jnp.zeros((), dtype), (vertices, None)
    found = _factors(vertices, chunk_size)
    squares = jnp.where(found.flat, jnp.ones_like(found.squares), found.squares)
    log = 0.5 * jnp.sum(jnp.log(squares)) + m * jnp.log(found.unit) - math.lgamma(m + 1)
    return jnp.where(found.flat, -jnp.inf, log), (vertices, found)


def _backward(
    chunk_size: int | None, saved: tuple[PyTree, _Factors | None], cotangent: jax.Array
) -> tuple[PyTree]:
    vertices, found = saved
    if found is None:
        return (jax.tree.map(jnp.zeros_like, vertices),)
    weights = jnp.where(found.flat, jnp.zeros_like(found.coefficients), _inverse(found))
    weights = weights * (cotangent / found.unit)
    weights = jnp.concatenate([-jnp.sum(weights, axis=0, keepdims=True), weights])

    def one(leaf: jax.Array) -> jax.Array:
        """Combinations of the edges, in the leaf's own dtype and sharding."""
        rows = _Leaf(_member_axis_replicated(leaf), chunk_size)
        if rows.whole:
            return tree.placed_like(_combined(rows.stacked, weights, found.unit), leaf)

        def put(c: Any, out: jax.Array) -> jax.Array:
            piece = lax.dynamic_slice_in_dim(rows.stacked, c * rows.chunk, rows.chunk, axis=1)
            piece = _combined(piece, weights, found.unit)
            return lax.dynamic_update_slice_in_dim(out, piece, c * rows.chunk, axis=1)

        # The last piece begins where it fits, and writes some entries again: an update after the
        # loop would be one in a copy of them all.
        number = rows.num_chunks + (rows.rest > 0)
        return lax.fori_loop(0, number, put, jnp.zeros_like(rows.stacked)).reshape(leaf.shape)

    return (jax.tree.map(one, vertices),)


_by_heights.defvjp(_forward, _backward)
_log_volume = jax.jit(_by_heights, static_argnums=0)


def _combined(stacked: jax.Array, weights: jax.Array, unit: jax.Array) -> jax.Array:
    """Combinations of the edges from the first row over the unit."""
    first, *others = [_wide(stacked[i]) for i in range(len(stacked))]
    edges = jnp.stack([(other - first) / unit.astype(first.dtype) for other in others])
    return tree.combine(edges, weights).astype(stacked.dtype)


def _member_axis_replicated(leaf: jax.Array) -> jax.Array:
    """The leaf, with the axis of the vertices whole on every device where types say so."""
    sharding = tree.explicit_sharding(leaf)
    if sharding is None or not sharding.spec or sharding.spec[0] is None:
        return leaf
    spec = PartitionSpec(None, *sharding.spec[1:])
    return jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, spec))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(tree.accumulation_dtype(x))


def _inverse(found: _Factors) -> jax.Array:
    """The inverse of the Gram matrix of the edges: its rows make the gradients of the edges."""
    scaled = found.coefficients / found.squares[:, None]
    return jnp.matmul(found.coefficients.T, scaled, precision=lax.Precision.HIGHEST)


class _Leaf:
    """The rows of one leaf, read whole or, where it is large, in pieces that fit a cache."""

    def __init__(self, stacked: jax.Array, chunk_size: int | None):
        num = stacked.shape[0]
        size = stacked[0].size
        self.chunk = size if chunk_size is None else min(chunk_size, size)
        self.whole = self.chunk == size
        self.num_chunks, self.rest = (1, 0) if self.whole else divmod(size, self.chunk)
        # Leaves that are read whole keep their shape, and with it their sharding.
        self.stacked = stacked if self.whole else stacked.reshape(num, -1)

    def _rows(self, start: Any, size: int) -> list[jax.Array]:
        """A piece of each row, in float32 or better."""
        piece = self.stacked
        if not self.whole:
            piece = lax.dynamic_slice_in_dim(piece, start, size, axis=1)
        return [_wide(piece[i]) for i in range(len(piece))]

    def fold(self, one: Any, join: Any, total: jax.Array) -> jax.Array:
        """`join` of `one(rows)` over the pieces."""
        if self.whole:
            return join(total, one(self._rows(0, self.chunk)))
        total = lax.fori_loop(
            0,
            self.num_chunks,
            lambda c, t: join(t, one(self._rows(c * self.chunk, self.chunk))),
            total,
        )
        if self.rest:
            tail = self.stacked[:, -self.rest :]
            total = join(total, one([_wide(tail[i]) for i in range(len(tail))]))
        return total


def _factors(vertices: PyTree, chunk_size: int | None) -> _Factors:
    """Gram-Schmidt in two passes, of which the coefficients alone are kept.

    The heights are made of the edges wherever one is needed, entry by entry: no basis is stored,
    and rounding in one does not reach the next.
    """
    dtype = tree.accumulation_dtype(*jax.tree.leaves(vertices))
    m = tree.num_points(vertices) - 1
    leaves = [
        _Leaf(_member_axis_replicated(leaf), chunk_size)
        for leaf in jax.tree.leaves(vertices)
        if leaf.size
    ]

    def fold(one: Any, join: Any) -> jax.Array:
        total = jnp.zeros((), dtype)
        for leaf in leaves:
            total = leaf.fold(lambda rows: one(rows).astype(dtype), join, total)
        return total

    def largest(rows: list[jax.Array]) -> jax.Array:
        found = jnp.abs(rows[1] - rows[0])
        for row in rows[2:]:
            found = jnp.maximum(found, jnp.abs(row - rows[0]))
        return jnp.max(found)

    unit = fold(largest, jnp.maximum)
    apart = unit != 0  # NaN is not zero, and comes out as NaN
    unit = jnp.where(apart, unit, jnp.ones_like(unit))

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        """The inner product of two combinations of the edges."""

        def one(rows: list[jax.Array]) -> jax.Array:
            edges = [(row - rows[0]) / unit.astype(row.dtype) for row in rows[1:]]
            return jnp.sum(_mixed(edges, a) * _mixed(edges, b))

        return fold(one, jnp.add)

    def step(k: Any, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, squares = found

        def one_pass(_: Any, row: jax.Array) -> jax.Array:
            def one(j: Any, along: jax.Array) -> jax.Array:
                nonzero = squares[j] != 0
                safe = jnp.where(nonzero, squares[j], jnp.ones_like(squares[j]))
                share = jnp.where(nonzero, dot(rows[j], row) / safe, jnp.zeros_like(safe))
                return along.at[j].set(share)

            along = lax.fori_loop(0, k, one, jnp.zeros(m, dtype))
            return row - jnp.matmul(along, rows, precision=lax.Precision.HIGHEST)

        row = lax.fori_loop(0, 2, one_pass, jnp.zeros(m, dtype).at[k].set(1))
        return rows.at[k].set(row), squares.at[k].set(dot(row, row))

    rows, squares = lax.fori_loop(0, m, step, (jnp.zeros((m, m), dtype), jnp.zeros(m, dtype)))

    # A vertex stands where it was rounded to, so that no height is known better than this.
    def stored(rows: list[jax.Array]) -> jax.Array:
        differs, size = rows[1] != rows[0], jnp.maximum(jnp.abs(rows[0]), jnp.abs(rows[1]))
        for row in rows[2:]:
            differs, size = differs | (row != rows[0]), jnp.maximum(size, jnp.abs(row))
        scaled = jnp.where(differs, size / unit.astype(size.dtype), jnp.zeros_like(size))
        return jnp.sum(jnp.square(scaled))

    least = jnp.square(jnp.asarray(_ULPS * jnp.finfo(dtype).eps, dtype)) * fold(stored, jnp.add)
    # The first height is the first edge, which is known to the last bit.
    least = jnp.where(jnp.arange(m) > 0, least, jnp.zeros_like(least))
    return _Factors(rows, squares, unit, ~apart | jnp.any(squares <= least))


def _mixed(edges: Sequence[jax.Array], weights: jax.Array) -> jax.Array:
    weights = weights.astype(edges[0].dtype)
    total = edges[0] * weights[0]
    for i, edge in enumerate(edges[1:], start=1):
        total = total + edge * weights[i]
    return total


# ---------------------------------------------------------------------------------- complexes


def _corners(complex: SimplicialComplex) -> list[PyTree]:
    """The vertices of each simplex, stacked."""
    members = tree.unstack(complex.vertices)
    return [tree.stack([members[i] for i in simplex]) for simplex in complex.simplices]


def log_volumes(complex: SimplicialComplex) -> jax.Array:
    """`log_volume` of each simplex, `(num_simplices,)`; a point has 0.

    Volumes of different dimensions are not comparable: a length is no area.
    """
    return jnp.stack([log_volume(corners) for corners in _corners(complex)])


def log_total_volume(complex: SimplicialComplex) -> jax.Array:
    """The logarithm of the sum of the volumes of all simplices.

    Its gradient reaches every simplex that has a volume.

    Raises:
        ValueError: If the simplices have different dimensions.
    """
    if len(set(complex.dimensions)) > 1:
        raise ValueError(
            f"log_total_volume: the simplices have dimensions {complex.dimensions}; volumes of "
            "different dimensions do not add up. Take `log_volumes`, and weigh them yourself."
        )
    logs = log_volumes(complex)
    # log-sum-exp by hand: where all are -inf, its gradient would be NaN.
    top = lax.stop_gradient(jnp.max(logs))
    shift = jnp.where(jnp.isfinite(top), top, jnp.zeros_like(top))
    some = jnp.any(jnp.isfinite(logs))
    total = jnp.sum(jnp.where(jnp.isfinite(logs), jnp.exp(logs - shift), jnp.zeros_like(logs)))
    safe = jnp.where(some, total, jnp.ones_like(total))
    return jnp.where(some, jnp.log(safe) + shift, -jnp.inf)


# --------------------------------------------------------------------------- the original's


def square_volume(vertices: PyTree) -> jax.Array:
    r"""The square of the volume by the Cayley-Menger determinant, as the original computes it.

    :math:`V^2 = |\det M| / (2^m (m!)^2)`, where M holds the squared distances, bordered by ones. It
    is the squared length of an edge, and 1 for a point. Kept for comparison: in float32 it is noise
    for flat simplices and overflows at about twelve vertices; use `log_volume`.

    Args:
        vertices: Stacked points, leaves `(n, ...)`.

    Returns:
        A scalar in float32 or better.

    Reference:
        Benton et al., 2021, `simplex_helpers.volume_loss` of the released code.
    """
    tree.check_floating(vertices, "vertices")
    m = tree.num_points(vertices) - 1
    squares = _square_distances(jax.tree.map(jnp.asarray, vertices))
    bordered = jnp.pad(squares, ((0, 1), (0, 1)), constant_values=1)
    bordered = bordered.at[m + 1, m + 1].set(0)
    return jnp.abs(jnp.linalg.det(bordered)) / (2.0**m * float(math.factorial(m)) ** 2)


def original_log_volume(vertices: PyTree, floor: float = 1e-4) -> jax.Array:
    """log(V^2 + floor), of which the original subtracts a multiple from its loss.

    About twice `log_volume`; at a volume of zero its gradient is zero up to rounding.

    Args:
        vertices: Stacked points.
        floor: The original's 1e-4.
    """
    return jnp.log(square_volume(vertices) + floor)


@jax.jit
def _square_distances(points: PyTree) -> jax.Array:
    """`(n, n)` sums of squared differences, in float32 or better."""
    members = tree.unstack(points)
    n = len(members)
    dtype = tree.accumulation_dtype(*jax.tree.leaves(points))
    rows = [[jnp.zeros((), dtype)] * n for _ in range(n)]
    for i in range(n):
        for j in range(i):
            away = jax.tree.map(lambda a, b: _wide(a) - _wide(b), members[i], members[j])
            rows[i][j] = rows[j][i] = tree.vdot(away, away).astype(dtype)
    return jnp.stack([jnp.stack(row) for row in rows])


# ---------------------------------------------------------------------------------- geometry


def distances(points: PyTree) -> np.ndarray:
    """The Euclidean distances between stacked points, `(n, n)`, float64 on the host."""
    tree.check_floating(points, "points")
    found = _square_distances(jax.tree.map(jnp.asarray, points))
    return np.sqrt(np.asarray(found, np.float64))


def edge_lengths(complex: SimplicialComplex) -> dict[tuple[int, int], float]:
    """The length of each edge, each once, by the numbers of its two vertices.

    Example:
        >>> from geojax.simplex import chain
        >>> edge_lengths(chain({"w": jnp.array([[0.0], [1.0], [4.0]])}))
        {(0, 1): 1.0, (1, 2): 3.0}
    """
    edges = faces(complex, 1)
    if not edges:
        return {}
    away = distances(complex.vertices)
    return {(i, j): float(away[i, j]) for i, j in edges}


_host_factors = jax.jit(_factors, static_argnums=1)


def factors(vertices: PyTree) -> tuple[np.ndarray, np.ndarray, bool]:
    """Gram-Schmidt of the edges from vertex 0: coefficients, lengths of the heights, and flatness.

    Row k of the coefficients makes of the edges the height of edge k over those before it. In
    float64 on the host, from sums in float32 or better.
    """
    m = tree.num_points(vertices) - 1
    if m == 0:
        return np.zeros((0, 0)), np.zeros(0), False
    vertices = jax.tree.map(jnp.asarray, vertices)
    found = _host_factors(vertices, _default_chunk(vertices))
    lengths = np.sqrt(np.asarray(found.squares, np.float64)) * float(found.unit)
    return np.asarray(found.coefficients, np.float64), lengths, bool(found.flat)


def heights(vertices: PyTree) -> np.ndarray:
    """The height of each vertex over the face of all others, `(n,)`.

    The gradient of `log_volume` at a vertex has the norm 1 / height. A single point has infinity.

    Example:
        >>> heights({"w": jnp.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])}).round(4).tolist()
        [2.4, 3.0, 4.0]
    """
    tree.check_floating(vertices, "vertices")
    if tree.num_points(vertices) == 1:
        return np.array([np.inf])
    coefficients, lengths, _ = factors(vertices)
    if (lengths == 0).any():
        return _flat_heights(vertices)
    rows = np.concatenate([-coefficients.sum(1, keepdims=True), coefficients], axis=1)
    return 1 / np.sqrt(np.square(rows / lengths[:, None]).sum(0))


def _flat_heights(vertices: PyTree) -> np.ndarray:
    """The same with each vertex last, where a zero height is divided by nothing."""
    members = tree.unstack(vertices)
    out = []
    for i in range(len(members)):
        others = [w for j, w in enumerate(members) if j != i]
        out.append(factors(tree.stack([*others, members[i]]))[1][-1])
    return np.array(out)


def widths(vertices: PyTree) -> np.ndarray:
    """The singular values of the vertices less their mean, `(n - 1,)`, descending.

    The square roots of n times the variances along the principal axes of the vertices: how wide the
    simplex is, direction by direction. Their product is n! V / sqrt(n).

    Example:
        >>> widths({"w": jnp.array([[0.0, 0.0], [2.0, 0.0]])}).round(4).tolist()
        [1.4142]
    """
    tree.check_floating(vertices, "vertices")
    n = tree.num_points(vertices)
    if n == 1:
        return np.zeros(0)
    coefficients, lengths, _ = factors(vertices)
    # Edges in an orthonormal basis: E = inverse(coefficients) diag(lengths).
    edges = np.linalg.solve(coefficients, np.diag(lengths))
    corners = np.concatenate([np.zeros((1, n - 1)), edges])
    return np.linalg.svd(corners - corners.mean(0), compute_uv=False)[: n - 1]


def angles(vertices: PyTree) -> np.ndarray:
    """The angles at vertices, `(n, n, n)` in radians: [i, j, k] between the edges i-j and i-k.

    NaN where j or k is i, or an edge has no length.

    Example:
        >>> found = angles({"w": jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])})
        >>> round(float(np.degrees(found[0, 1, 2])), 3), round(float(np.degrees(found[1, 0, 2])), 3)
        (90.0, 45.0)
    """
    tree.check_floating(vertices, "vertices")
    n = tree.num_points(vertices)
    out = np.full((n, n, n), np.nan)
    if n < 2:
        return out
    coefficients, lengths, _ = factors(vertices)
    edges = np.linalg.solve(coefficients, np.diag(lengths))
    corners = np.concatenate([np.zeros((1, n - 1)), edges])
    for i in range(n):
        away = np.delete(corners - corners[i], i, axis=0)
        size = np.linalg.norm(away, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            unit = away / size[:, None]
        # The half-angle form keeps small angles.
        minus = np.linalg.norm(unit[:, None] - unit[None], axis=-1)
        plus = np.linalg.norm(unit[:, None] + unit[None], axis=-1)
        rest = [j for j in range(n) if j != i]
        out[np.ix_([i], rest, rest)] = (2 * np.arctan2(minus, plus))[None]
    return out
