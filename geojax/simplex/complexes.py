"""Simplicial complexes: vertices in one stacked pytree, simplices as tuples of their indices.

A complex is a pytree like any other: jit, vmap and checkpoints take it as it is. Whatever changes
one returns a new one; old vertices stay as they are, to the bit.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from geojax import tree

__all__ = [
    "SimplicialComplex",
    "add_vertex",
    "centroid",
    "chain",
    "faces",
    "replace_vertex",
    "single",
    "star",
    "vertex",
]

PyTree = Any
Simplices = tuple[tuple[int, ...], ...]


@jax.tree_util.register_pytree_with_keys_class
class SimplicialComplex:
    """Vertices and the simplices between them.

    Args:
        vertices: Stacked points, leaves `(n, ...)`, floating.
        simplices: For each simplex the indices of its vertices: one for a point, two for an edge,
            three for a triangle. Dimensions may be mixed and faces shared.

    Attributes:
        vertices: As given.
        simplices: As tuples of Python integers, in the order given.

    Raises:
        ValueError: If a simplex is empty, repeats a vertex, names one that does not exist or is
            given twice; if there is no simplex.
        TypeError: If an index is not an integer, or a leaf of the vertices is not floating.

    Example:
        >>> triangle = SimplicialComplex({"w": jnp.eye(3)}, [(0, 1, 2)])
        >>> triangle.num_vertices, triangle.dimensions
        (3, (2,))
    """

    vertices: PyTree
    simplices: Simplices

    def __init__(self, vertices: PyTree, simplices: Iterable[Sequence[int]]):
        tree.check_floating(vertices, "vertices")
        self.vertices = vertices
        self.simplices = _checked(simplices, tree.num_points(vertices))

    @property
    def num_vertices(self) -> int:
        """How many vertices there are, in a simplex or not."""
        return tree.num_points(self.vertices)

    @property
    def dimensions(self) -> tuple[int, ...]:
        """The dimension of each simplex: one less than its number of vertices."""
        return tuple(len(simplex) - 1 for simplex in self.simplices)

    def __repr__(self) -> str:
        return f"SimplicialComplex({len(self.simplices)} simplices: {self.simplices})"

    def tree_flatten_with_keys(self):
        """The vertices are the children, the simplices the structure."""
        return ((jax.tree_util.GetAttrKey("vertices"), self.vertices),), self.simplices

    @classmethod
    def tree_unflatten(cls, simplices: Simplices, children: tuple[PyTree]) -> "SimplicialComplex":
        """Without checks, since the leaves may be anything here."""
        made = object.__new__(cls)
        made.vertices, made.simplices = children[0], simplices
        return made


def _checked(simplices: Iterable[Sequence[int]], num: int) -> Simplices:
    found = []
    for place, simplex in enumerate(simplices):
        if isinstance(simplex, (int, np.integer)):
            raise TypeError(
                f"simplex {place} is {simplex!r}; expected a tuple of indices, such as "
                f"({simplex},) for a point."
            )
        for i in simplex:
            if isinstance(i, bool) or not isinstance(i, (int, np.integer)):
                raise TypeError(f"simplex {place} holds {i!r}; expected an integer index.")
            if not 0 <= i < num:
                raise ValueError(
                    f"simplex {place} names vertex {i}; the vertices are 0 to {num - 1}."
                )
        one = tuple(int(i) for i in simplex)
        if not one:
            raise ValueError(f"simplex {place} is empty; expected at least one vertex.")
        if len(set(one)) < len(one):
            raise ValueError(f"simplex {place} is {one}; expected each vertex once.")
        found.append(one)
    if not found:
        raise ValueError("a complex needs at least one simplex.")
    seen: dict[tuple[int, ...], int] = {}
    for place, one in enumerate(found):
        earlier = seen.setdefault(tuple(sorted(one)), place)
        if earlier != place:
            raise ValueError(f"simplices {earlier} and {place} are the same: {one}.")
    return tuple(found)


# --------------------------------------------------------------------------------- builders


def single(vertices: PyTree) -> SimplicialComplex:
    """One simplex between all of these points.

    Args:
        vertices: Stacked points, leaves `(n, ...)`; one point is a simplex of dimension 0.
    """
    return SimplicialComplex(vertices, [range(tree.num_points(vertices))])


def chain(vertices: PyTree) -> SimplicialComplex:
    """The edges from each point to the next: a polygonal chain as a complex.

    Raises:
        ValueError: For fewer than two points.
    """
    num = tree.num_points(vertices)
    if num < 2:
        raise ValueError(f"chain: got {num} points; expected at least two.")
    return SimplicialComplex(vertices, [(i, i + 1) for i in range(num - 1)])


def star(modes: PyTree, connectors: PyTree | None = None) -> SimplicialComplex:
    """The mode-connecting complex: each mode makes a simplex with all connectors.

    Args:
        modes: Stacked points `(k, ...)`, the vertices 0 to k - 1.
        connectors: Stacked points `(c, ...)`, the vertices from k on, or none: then the complex is
            k points, to which `add_vertex` adds connectors.

    Returns:
        k simplices of c + 1 vertices, which share the face of all connectors.

    Reference:
        Benton et al., "Loss Surface Simplexes for Mode Connecting Volumes and Fast Ensembling",
        ICML 2021, section 4.
    """
    k = tree.num_points(modes)
    if connectors is None:
        return SimplicialComplex(modes, [(i,) for i in range(k)])
    others = tree.unstack(connectors)
    vertices = tree.stack([*tree.unstack(modes), *others])
    shared = range(k, k + len(others))
    return SimplicialComplex(vertices, [(i, *shared) for i in range(k)])


# ---------------------------------------------------------------------------------- changes


def _check_index(complex: SimplicialComplex, index: int) -> int:
    num = complex.num_vertices
    if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
        raise TypeError(f"vertex {index!r}: expected an integer index.")
    if not -num <= index < num:
        raise ValueError(f"vertex {index}: the vertices are 0 to {num - 1}.")
    return int(index) % num


def vertex(complex: SimplicialComplex, index: int) -> PyTree:
    """The parameters at a vertex, a plain network, to the bit."""
    index = _check_index(complex, index)
    return tree.unstack(complex.vertices)[index]


def replace_vertex(complex: SimplicialComplex, index: int, params: PyTree) -> SimplicialComplex:
    """The complex with a plain network at one vertex; the others stay to the bit.

    Raises:
        ValueError, TypeError: If `params` differs from a vertex, naming the leaf.
    """
    index = _check_index(complex, index)
    members = tree.unstack(complex.vertices)
    tree.check_same(members[index], params, names=(f"vertex {index}", "params"))
    members[index] = params
    return SimplicialComplex(tree.stack(members), complex.simplices)


def centroid(points: PyTree, members: Sequence[int] | None = None) -> PyTree:
    """The mean of stacked points, or of some of them, accumulated in float32 or better.

    Args:
        points: Stacked, leaves `(n, ...)`.
        members: Which to average, by their numbers; one named twice counts twice.

    Raises:
        ValueError: If `members` is empty or names a point that does not exist.
    """
    num = tree.num_points(points)
    chosen = np.arange(num) if members is None else np.asarray(members)
    if not len(chosen) or chosen.min() < 0 or chosen.max() >= num:
        raise ValueError(f"members is {members!r}; expected numbers of points, 0 to {num - 1}.")
    weights = np.bincount(chosen, minlength=num) / len(chosen)
    return tree.combine(points, weights.astype(np.float32))


def add_vertex(
    complex: SimplicialComplex,
    joins: Literal["all"] | Sequence[int] = "all",
    at: Literal["centroid", "joined"] | PyTree = "joined",
    *,
    jitter: float = 0.0,
    key: jax.Array | None = None,
) -> SimplicialComplex:
    """A complex with one vertex more, as the last, joined to chosen simplices.

    A simplex that is joined grows by one dimension. At the centroid of a simplex that it joins a
    vertex adds no volume, and the gradient of the volume there has no direction: give it `jitter`
    where a volume is to be trained.

    Args:
        complex: It is left as it is.
        joins: The numbers of the simplices to join, or "all".
        at: "joined", the centroid of the vertices of the joined simplices; "centroid", that of all
            vertices; or the parameters of the new vertex.
        jitter: The length of a random displacement, as a fraction of the mean distance of the
            vertices from where the new one starts (of the norm of the start, where that is 0).
        key: A typed key, for `jitter`.

    Returns:
        A complex whose vertices 0 to n - 1 are those of `complex`, to the bit.

    Raises:
        ValueError: If `joins` names no simplex, or one that does not exist; for jitter without key.

    Example:
        >>> path = chain({"w": jnp.array([[0.0], [2.0], [4.0]])})
        >>> grown = add_vertex(path, joins=[1])
        >>> grown.simplices, grown.vertices["w"][-1].tolist()
        (((0, 1), (1, 2, 3)), [3.0])
    """
    number = len(complex.simplices)
    chosen = list(range(number)) if isinstance(joins, str) and joins == "all" else list(joins)
    if not chosen or any(
        isinstance(s, (bool, str)) or not isinstance(s, (int, np.integer)) or not 0 <= s < number
        for s in chosen
    ):
        raise ValueError(
            f"joins is {joins!r}; expected 'all' or numbers of simplices, 0 to {number - 1}."
        )
    if not jitter >= 0 or (jitter > 0 and key is None):
        raise ValueError(f"jitter is {jitter!r}; expected at least 0, and a key where it is more.")
    members = tree.unstack(complex.vertices)
    touched = sorted({i for s in chosen for i in complex.simplices[s]})
    if isinstance(at, str):
        if at not in ("centroid", "joined"):
            raise ValueError(f"at is {at!r}; expected 'joined', 'centroid' or parameters.")
        start = centroid(complex.vertices, touched if at == "joined" else None)
    else:
        tree.check_same(members[0], at, names=("vertex 0", "at"))
        start = at
    if jitter > 0:
        start = _moved(start, tree.stack([members[i] for i in touched]), jitter, key)
    simplices = [
        (*simplex, len(members)) if s in chosen else simplex
        for s, simplex in enumerate(complex.simplices)
    ]
    return SimplicialComplex(tree.stack([*members, start]), simplices)


@jax.jit
def _moved(start: PyTree, around: PyTree, jitter: Any, key: jax.Array) -> PyTree:
    """The start, displaced by a random vector of a length relative to the distances around it."""
    members = tree.unstack(around)
    away = [tree.norm(jax.tree.map(lambda a, b: _wide(a) - _wide(b), x, start)) for x in members]
    length = jnp.mean(jnp.stack(away))
    length = jnp.where(length > 0, length, tree.norm(start)) * jnp.asarray(jitter, length.dtype)
    noise = tree.random_like(key, start)
    size = tree.norm(noise)
    return jax.tree.map(
        lambda x, z: (_wide(x) + _wide(z) * (length / size).astype(_wide(z).dtype)).astype(x.dtype),
        start,
        noise,
    )


def _wide(x: jax.Array) -> jax.Array:
    return jnp.asarray(x).astype(tree.accumulation_dtype(x))


def faces(complex: SimplicialComplex, dimension: int) -> Simplices:
    """All faces of one dimension, each once, in ascending order: edges for 1, triangles for 2.

    Example:
        >>> faces(single({"w": jnp.eye(3)}), 1)
        ((0, 1), (0, 2), (1, 2))
    """
    if not isinstance(dimension, (int, np.integer)) or dimension < 0:
        raise ValueError(f"dimension is {dimension!r}; expected an integer of at least 0.")
    found = {
        face
        for simplex in complex.simplices
        for face in itertools.combinations(sorted(simplex), dimension + 1)
    }
    return tuple(sorted(found))
