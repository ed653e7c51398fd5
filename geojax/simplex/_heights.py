"""The height of one free vertex over frozen faces, and with it the volume and its gradient.

With the other vertices frozen, V = V(base) h / m, so that log V moves with log h alone. A step then
costs two reads of the frozen vertices, whatever the dimension, and no volume is ever formed in
float32 from a determinant.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import tree

__all__ = ["Bases", "Faces", "bases", "gram", "log_volumes"]

PyTree = Any
# Heights below this many units in the last place of the vertex are no heights.
_ULPS = 4


class Faces(NamedTuple):
    """The faces below a free vertex, as indices of frozen vertices; hashable, known to a trace.

    Attributes:
        members: For each simplex its frozen vertices; the first is the reference.
        passes: Projections: one, and more where the faces are so flat that one is not exact.
    """

    members: tuple[tuple[int, ...], ...]
    passes: int


class Bases(NamedTuple):
    """The arrays that belong to `Faces`.

    Attributes:
        axes: `(s, m, f)`, the coefficients of an orthonormal basis of each face's span; rows sum to
            zero, and are zero where a face has fewer than m dimensions.
        log_volume: `(s,)`, the log volume of each face.
    """

    axes: jax.Array
    log_volume: jax.Array


def gram(points: PyTree) -> np.ndarray:
    """Inner products of w_i - w_0 in float64, `(n - 1, n - 1)`, of differences in float64.

    The parameters stay where they are and no second copy of them is made: products are summed as
    they are formed.
    """
    num = tree.num_points(points)
    if num == 1:
        return np.zeros((0, 0))
    with jax.enable_x64(True):
        return np.asarray(_gram(points))


@jax.jit
def _gram(points: PyTree) -> jax.Array:
    # Reductions of elementwise products, which XLA forms on the fly.
    members = [[leaf.astype(jnp.float64) for leaf in jax.tree.leaves(x)] for x in _rows(points)]
    first, others = members[0], members[1:]
    edges = [[a - b for a, b in zip(x, first, strict=True)] for x in others]
    size = len(edges)
    values: dict[tuple[int, int], jax.Array] = {}
    for i in range(size):
        for j in range(i, size):
            parts = [jnp.sum(a * b) for a, b in zip(edges[i], edges[j], strict=True)]
            values[i, j] = values[j, i] = sum(parts, start=jnp.zeros((), jnp.float64))
    return jnp.stack([jnp.stack([values[i, j] for j in range(size)]) for i in range(size)])


def _rows(points: PyTree) -> list[PyTree]:
    return tree.unstack(points)


def bases(frozen: PyTree, members: tuple[tuple[int, ...], ...]) -> tuple[Faces, Bases]:
    """What `log_volumes` needs of the frozen vertices, computed once in float64.

    Args:
        frozen: Stacked, leaves `(f, ...)`.
        members: For each simplex with the free vertex the indices of its frozen vertices.

    Raises:
        ValueError: If a face has no volume, naming it: the volume above it is zero wherever the
            free vertex is.
    """
    num = tree.num_points(frozen)
    counts = np.bincount([i for face in members for i in face], minlength=num)
    # A reference that many simplices share is read once.
    ordered = tuple(tuple(sorted(face, key=lambda i: (-counts[i], i))) for face in members)
    products = gram(frozen)
    whole = np.zeros((num, num))
    whole[1:, 1:] = products
    axes = np.zeros((len(members), max(len(face) for face in members) - 1, num))
    log_volume = np.zeros(len(members))
    flatness = 1.0
    for s, face in enumerate(ordered):
        size = len(face) - 1
        if size == 0:
            continue
        edges = np.zeros((size, num))
        edges[np.arange(size), list(face[1:])] = 1
        edges[:, face[0]] = -1
        inner = edges @ whole @ edges.T
        values, vectors = np.linalg.eigh(inner)
        if values[0] <= size * np.finfo(np.float64).eps * values[-1]:
            raise ValueError(
                f"the vertices {face} are affinely dependent, so that every simplex on them has "
                "volume 0; move one of them (jitter) or train without a volume."
            )
        axes[s, :size] = (vectors / np.sqrt(values)).T @ edges
        log_volume[s] = 0.5 * np.log(values).sum() - math.lgamma(size + 1)
        flatness = max(flatness, np.sqrt(values[-1] / values[0]))
    # A projection leaves about flatness * eps of the vector inside the face, and so does the next.
    passes = 1 if flatness < 30 else 2 if flatness < 1e3 else 3
    return Faces(ordered, passes), Bases(
        jnp.asarray(axes, jnp.float32), jnp.asarray(log_volume, jnp.float32)
    )


def _wide_tree(point: PyTree) -> PyTree:
    return jax.tree.map(_wide, point)


def _wide(x: Any) -> jax.Array:
    return jnp.asarray(x).astype(tree.accumulation_dtype(x))


def _minus(x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: _wide(a) - _wide(b), x, y)


def log_volumes(free: PyTree, frozen: PyTree, faces: Faces, bases: Bases) -> jax.Array:
    r"""The log volume of each simplex of the free vertex, differentiable in the free vertex.

    .. math:: \log V = \log V(\mathrm{base}) + \log \|h\| - \log m, \qquad
        \nabla_\theta \log V = h / \|h\|^2

    Args:
        free: The free vertex.
        frozen: Stacked, leaves `(f, ...)`; no gradient goes to them.
        faces: From `bases`.
        bases: From `bases`.

    Returns:
        `(s,)`; -inf with gradient zero where the height is lost in the rounding of the vertices, as
        it is at their centroid.
    """
    frozen = jax.tree.map(lambda x: jax.lax.stop_gradient(_wide(x)), frozen)
    members = tree.unstack(frozen)
    references = sorted({face[0] for face in faces.members})
    away = {r: _minus(free, members[r]) for r in references}
    rest = [away[face[0]] for face in faces.members]
    if max(len(face) for face in faces.members) > 1:
        for _ in range(faces.passes):
            # A vector that several simplices share is multiplied once.
            distinct = {id(x): jax.lax.stop_gradient(x) for x in rest}
            products = {i: tree.inner_products(frozen, x) for i, x in distinct.items()}
            inner = jnp.stack([products[id(x)] for x in rest])
            exact = jax.lax.Precision.HIGHEST
            along = jnp.einsum("smf,sf->sm", bases.axes, inner, precision=exact)
            inside = jnp.einsum("smf,sm->sf", bases.axes, along, precision=exact)
            held = tree.unstack(tree.combine(frozen, inside))
            rest = [_minus(x, y) for x, y in zip(rest, held, strict=True)]
    dimension = np.array([len(face) for face in faces.members], np.float32)
    squares = jnp.stack([_square(x) for x in rest])
    least = _ULPS * jnp.finfo(squares.dtype).eps
    positive = squares > jnp.square(least) * _square(jax.lax.stop_gradient(_wide_tree(free)))
    height = jnp.where(positive, 0.5 * jnp.log(jnp.where(positive, squares, 1)), -jnp.inf)
    return bases.log_volume.astype(height.dtype) + height - np.log(dimension)


def _square(x: PyTree) -> jax.Array:
    return sum(
        (jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(x)),
        start=jnp.zeros((), tree.accumulation_dtype(*jax.tree.leaves(x))),
    )
