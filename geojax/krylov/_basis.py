"""The stored Krylov basis: orthonormal rows in chunks, extended and rotated in place.

A basis is a tuple of stacked pytrees of at most 16 rows each; a small one is of one piece. The
kernels work on whole chunks and leave out those that hold no row yet, so one compiled program
serves every length.
"""

import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from geojax import tree

PyTree = Any
CHUNK = 16
# A basis of so many bytes is rounded up to a multiple of so many rows, in one chunk: programs that
# compile fast, and that bases of other sizes share.
_SMALL, _ROUND = 1 << 20, 32
# Entries of a leaf that are rotated at a time, so that no second basis is made.
_COLUMNS = 1 << 13


def allocate(vector: PyTree, num_rows: int) -> tuple[PyTree, ...]:
    """Zero rows like a vector, as many or more, which keep its sharding on every kind of mesh."""
    rounded = -(-num_rows // _ROUND) * _ROUND
    if rounded * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(vector)) <= _SMALL:
        return (_zeros(vector, rounded),)
    sizes = [CHUNK] * (num_rows // CHUNK)
    sizes += [num_rows % CHUNK] if num_rows % CHUNK else []
    return tuple(_zeros(vector, size) for size in sizes)


@functools.partial(jax.jit, static_argnums=1)
def _zeros(vector: PyTree, size: int) -> PyTree:
    # Of the ways tried, this one alone keeps the sharding under Explicit and Auto axes.
    return jax.tree.map(lambda x: jnp.broadcast_to(x[None] * 0, (size, *x.shape)), vector)


def num_rows(rows: tuple[PyTree, ...]) -> int:
    """How many rows there is room for."""
    return sum(tree.num_points(chunk) for chunk in rows)


class Taken(NamedTuple):
    """A vector on its way into the basis.

    Attributes:
        w: The vector over `unit`, less its parts along the nearest rows if these were given.
        near: `(2,)`, the coefficients of those parts, of the last row and of the one before.
        unit: A power of two.
        length: The norm of the vector over `unit`, as it came.
    """

    w: PyTree
    near: jax.Array
    unit: jax.Array
    length: jax.Array


class Appended(NamedTuple):
    """A basis with one row more.

    Attributes:
        rows: The basis.
        column: `(num_rows,)`, the coefficients that were taken out of the vector.
        beta: The norm of what was left, 0 after a breakdown.
        scale: The largest norm of a vector so far: a lower bound on the operator's norm.
        row: The new row, in the memory of the vector that was given.
    """

    rows: tuple[PyTree, ...]
    column: jax.Array
    beta: jax.Array
    scale: jax.Array
    row: PyTree


def _length(w: PyTree) -> jax.Array:
    # Without the guards of `tree.norm`, which cost two more reads: the entries are of order one.
    return jnp.sqrt(tree.vdot(w, w))


@jax.jit
def take(w: PyTree) -> Taken:
    """A vector in the dtype of the sums, over a power of two near its largest entry.

    The scaling is exact, and keeps the squares of a tiny vector from vanishing.
    """
    dtype = tree.accumulation_dtype(*jax.tree.leaves(w))
    w = jax.tree.map(lambda x: x.astype(dtype), w)
    largest = functools.reduce(
        jnp.maximum, [jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(w)]
    )
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones((), dtype))
    unit = jnp.ldexp(jnp.ones((), dtype), jnp.frexp(unit)[1])
    w = jax.tree.map(lambda x: x / unit, w)
    return Taken(w, jnp.zeros(2, dtype), unit, _length(w))


@functools.partial(jax.jit, donate_argnums=1)
def take_near(w: PyTree, last: PyTree, before: PyTree) -> Taken:
    """The same, less its parts along two rows; the memory of the first of them is reused."""
    taken = take(w)
    # Both at once, which needs no memory besides.
    a, b = (tree.vdot(q, taken.w) for q in (last, before))
    w = jax.tree.map(lambda x, p, q: x - a * p - b * q, taken.w, last, before)
    return taken._replace(w=w, near=jnp.stack([a, b]))


def _coefficients(rows, w, count, skip):
    """Inner products of the first `count` rows with w; 0 for the others."""
    out, start = [], 0
    for chunk in rows:
        size = tree.num_points(chunk)
        if skip:
            zeros = jnp.zeros(size, tree.accumulation_dtype(*jax.tree.leaves(w)))
            found = lax.cond(
                start < count, tree.inner_products, lambda *_, zeros=zeros: zeros, chunk, w
            )
        else:
            found = tree.inner_products(chunk, w)
        out.append(jnp.where(start + np.arange(size, dtype=np.int32) < count, found, 0))
        start += size
    return out


def _remove(rows, coefficients, w, count, skip):
    start = 0
    for chunk, c in zip(rows, coefficients, strict=True):
        # A loop of one turn or none works in place, where a branch would copy. What did not depend
        # on the turn, XLA would take out of the loop and do in any case.
        def subtract(i, w, chunk=chunk, c=c):
            c = c * (1 - i).astype(c.dtype)
            return jax.tree.map(jnp.subtract, w, tree.combine(chunk, c))

        w = lax.fori_loop(0, (start < count).astype(jnp.int32), subtract, w) if skip else (
            subtract(jnp.zeros((), jnp.int32), w)
        )  # fmt: skip
        start += tree.num_points(chunk)
    return w


def _scattered(seed: jax.Array, like: PyTree) -> PyTree:
    """A vector with entries spread over [-1, 1) by a hash of the leaf's path and the place in it.

    jax's own generators take more time to compile, for every leaf, than the rest of a step
    together. This one need only lead away from the rows that there are.
    """
    leaves, treedef = jax.tree.flatten(like)
    out = []
    for path, leaf in zip(tree.paths(like), leaves, strict=True):
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            along = lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            place = place * np.uint32(size) + along
        h = place * np.uint32(0x9E3779B1) + (seed ^ np.uint32(zlib.crc32(path.encode())))
        # The finalizer of MurmurHash3 (Appleby), which spreads each bit over all.
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
        h = h ^ (h >> np.uint32(16))
        values = (h >> np.uint32(8)).astype(leaf.dtype) * 2.0**-23 - 1
        out.append(tree.placed_like(values, leaf))
    return jax.tree.unflatten(treedef, out)


def seed_of(key: jax.Array) -> int:
    """A seed on the host for a typed key."""
    return zlib.crc32(np.asarray(jax.random.key_data(key)).tobytes())


@functools.partial(jax.jit, donate_argnums=(0, 1), static_argnames="skip")
def append(rows, w, near, unit, length, count, local, seed, scale, *, skip: bool) -> Appended:
    """Orthogonalise a vector against the first `count` rows and write it as the next one.

    Where nothing but rounding is left of it, a random row orthogonal to the others is written in
    its place and beta is zero: the space found so far is invariant, and the search goes on outside.

    Args:
        rows: The basis; donated.
        w: The vector as `take` or `take_near` has it; donated.
        near: What they took out of it.
        unit: What they divided it by.
        length: Its norm before.
        count: How many rows are filled. At the end of the basis nothing is written.
        local: The row that `near` speaks of first (the row before it comes second) where all other
            parts of the vector are rounding; else -1.
        seed: uint32, for the random row.
        scale: The largest norm so far.
        skip: Leave chunks without rows out by a branch (good on the CPU).
    """
    dtype = tree.accumulation_dtype(*jax.tree.leaves(rows[0]))
    scale = jnp.maximum(scale, length * unit)
    threshold = 64 * float(jnp.finfo(dtype).eps) * scale / unit
    place = np.arange(num_rows(rows), dtype=np.int32)
    column = jnp.where(place == local, near[0], jnp.where(place == local - 1, near[1], 0))
    column = jnp.where(local >= 0, column, jnp.zeros_like(column))

    def fresh(i, w):
        return _scattered(seed ^ i.astype(jnp.uint32), w)

    # A pass against all rows takes out what the one before it left: the first another such pass,
    # or the two parts that are not rounding. A third follows where the second took so much that
    # its own rounding counts (Daniel et al. 1976). After a breakdown all begins again.
    def one_pass(carry):
        i, w, column, beta, length, broke = carry
        found = _coefficients(rows, w, count, skip)
        w = _remove(rows, found, w, count, skip)
        before, length = length, _length(w)
        column = jnp.where(broke, column, column + jnp.concatenate(found))
        beta = jnp.where(broke, beta, length)
        again = (i < 1) | ((i < 2) & (length < before / 2))
        breaks = ~again & ~broke & (length <= threshold)
        w = lax.fori_loop(0, breaks.astype(jnp.int32), fresh, w)
        i = jnp.where(breaks, 0, jnp.where(again, i + 1, 3))
        return i, w, column, beta, length, broke | breaks

    begin = jnp.where(local >= 0, 1, 0).astype(jnp.int32)
    carry = (begin, w, column, jnp.zeros((), dtype), _length(w), jnp.zeros((), bool))
    _, direction, column, beta, length, broke = lax.while_loop(
        lambda carry: carry[0] < 3, one_pass, carry
    )
    length = jnp.where(length > 0, length, jnp.ones_like(length))
    row = jax.tree.map(lambda x: x / length, direction)
    out, start = [], 0
    for chunk in rows:
        size = tree.num_points(chunk)
        inside = (start <= count) & (count < start + size)
        at = jnp.clip(count - start, 0, size - 1)

        def write(x, q, inside=inside, at=at):
            old = lax.dynamic_index_in_dim(x, at, 0, keepdims=True)
            return lax.dynamic_update_slice_in_dim(x, jnp.where(inside, q[None], old), at, 0)

        out.append(jax.tree.map(write, chunk, row))
        start += size
    beta = jnp.where(broke, jnp.zeros_like(beta), beta * unit)
    return Appended(tuple(out), column * unit, beta, scale, row)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="whole")
def rotate(rows, matrix, *, whole: bool):
    """Replace the rows by `matrix @ rows`, in place.

    Args:
        rows: The basis; donated.
        matrix: `(num_rows, num_rows)`.
        whole: Take each leaf at once, as sharded leaves need; else a block of columns at a time.
    """
    sizes = [tree.num_points(chunk) for chunk in rows]
    ends = np.cumsum(sizes)[:-1].tolist()
    leaves = [jax.tree.leaves(chunk) for chunk in rows]
    treedef = jax.tree.structure(rows[0])

    def product(parts):
        # The dot of each chunk is added up, so the chunks are never joined.
        total = None
        for columns, part in zip(jnp.split(matrix, ends, axis=1), parts, strict=True):
            term = lax.dot_general(
                columns, part, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST
            )
            total = term if total is None else total + term
        assert total is not None
        return tuple(jnp.split(total, ends, axis=0))

    def one(parts):
        shape = parts[0].shape[1:]
        n = int(np.prod(shape))
        if whole or n <= _COLUMNS:
            return product(parts)
        flat = tuple(x.reshape(x.shape[0], n) for x in parts)

        def body(i, flat):
            block = product([lax.dynamic_slice_in_dim(x, i * _COLUMNS, _COLUMNS, 1) for x in flat])
            return tuple(
                lax.dynamic_update_slice_in_dim(x, new, i * _COLUMNS, 1)
                for x, new in zip(flat, block, strict=True)
            )

        done = n // _COLUMNS
        flat = lax.fori_loop(0, done, body, flat)
        if n % _COLUMNS:
            tail = product([x[:, done * _COLUMNS :] for x in flat])
            flat = tuple(
                lax.dynamic_update_slice_in_dim(x, new, done * _COLUMNS, 1)
                for x, new in zip(flat, tail, strict=True)
            )
        return tuple(x.reshape(x.shape[0], *shape) for x in flat)

    rotated = [one(list(parts)) for parts in zip(*leaves, strict=True)]
    return tuple(jax.tree.unflatten(treedef, parts) for parts in zip(*rotated, strict=True))


def turn(rows: tuple[PyTree, ...], matrix: np.ndarray) -> tuple[PyTree, ...]:
    """The basis whose first rows are `matrix @ rows`, for a matrix of fewer rows and columns."""
    size = num_rows(rows)
    padded = np.zeros((size, size), jax.tree.leaves(rows[0])[0].dtype)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return rotate(rows, jnp.asarray(padded), whole=spread(rows[0]))


@functools.partial(jax.jit, static_argnums=1)
def _joined(parts, k):
    return jnp.concatenate(parts)[:k]


def gather(rows: tuple[PyTree, ...], weights: np.ndarray) -> PyTree:
    """The k combinations of the rows with weights `(k, num_rows)`: a stacked pytree.

    The rows are consumed: the basis is rotated in place, the chunks beyond k are freed, and then
    each leaf of the others once it is copied, so that basis and result are never held both.
    """
    k = len(weights)
    rows = turn(rows, weights)
    ends = np.cumsum([tree.num_points(chunk) for chunk in rows])
    used = int(np.searchsorted(ends, k)) + 1
    for leaf in jax.tree.leaves(rows[used:]):
        leaf.delete()
    rows = rows[:used]
    treedef = jax.tree.structure(rows[0])
    out = []
    for parts in zip(*(jax.tree.leaves(chunk) for chunk in rows), strict=True):
        out.append(jax.block_until_ready(_joined(parts, k)))
        for part in parts:
            part.delete()
    return jax.tree.unflatten(treedef, out)


_index = jax.jit(
    lambda chunk, i: jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 0, False), chunk)
)


def row(rows: tuple[PyTree, ...], index: int) -> PyTree:
    """One row of a basis."""
    # All chunks but the last are of one size.
    size = tree.num_points(rows[0])
    return _index(rows[index // size], index % size)


def spread(vector: PyTree) -> bool:
    """Whether a leaf lies on more than one device."""
    return any(
        isinstance(x, jax.Array) and len(x.sharding.device_set) > 1 for x in jax.tree.leaves(vector)
    )
