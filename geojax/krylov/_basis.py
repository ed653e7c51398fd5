"""The stored Krylov basis: orthonormal rows in chunks, extended and rotated in place.

A basis is a tuple of stacked pytrees of at most 16 rows each. The kernels work on whole chunks and
leave out those that hold no row yet, so one compiled program serves every length.
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
# Entries of a leaf that are rotated at a time, so that no second basis is made.
_COLUMNS = 1 << 13


def allocate(vector: PyTree, num_rows: int) -> tuple[PyTree, ...]:
    """Zero rows like a vector, which keep its sharding on every kind of mesh."""
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


class Appended(NamedTuple):
    """A basis with one row more.

    Attributes:
        rows: The basis.
        column: `(num_rows,)`, the coefficients that were taken out of the vector.
        beta: The norm of what was left, 0 after a breakdown.
        scale: The largest norm of a vector so far: a lower bound on the operator's norm.
    """

    rows: tuple[PyTree, ...]
    column: jax.Array
    beta: jax.Array
    scale: jax.Array


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

        def subtract(chunk, c, w):
            return jax.tree.map(jnp.subtract, w, tree.combine(chunk, c))

        w = lax.cond(start < count, subtract, lambda _, c, w: w, chunk, c, w) if skip else (
            subtract(chunk, c, w)
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


@functools.partial(jax.jit, donate_argnums=0, static_argnames="skip")
def append(rows, w, count, seed, scale, *, skip: bool) -> Appended:
    """Orthogonalise a vector against the first `count` rows and write it as the next one.

    Where nothing but rounding is left of it, a random row orthogonal to the others is written in
    its place and beta is zero: the space found so far is invariant, and the search goes on outside.

    Args:
        rows: The basis; donated.
        w: The vector.
        count: How many rows are filled. At the end of the basis nothing is written.
        seed: uint32, for the random row.
        scale: The largest norm so far.
        skip: Leave chunks without rows out by a branch (good on the CPU).
    """
    dtype = tree.accumulation_dtype(*jax.tree.leaves(rows[0]))
    w = jax.tree.map(lambda x: x.astype(dtype), w)
    largest = functools.reduce(
        jnp.maximum, [jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(w)]
    )
    # Scaling by a power of two is exact, and keeps the squares of a tiny vector from vanishing.
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones((), dtype))
    unit = jnp.ldexp(jnp.ones((), dtype), jnp.frexp(unit)[1])
    w = jax.tree.map(lambda x: x / unit, w)
    scale = jnp.maximum(scale, tree.norm(w) * unit)
    threshold = 64 * float(jnp.finfo(dtype).eps) * scale / unit

    def fresh(w):
        return _scattered(seed, w)

    # One pass is compiled and run twice: the second takes out what rounding left of the first. Only
    # after a breakdown it runs twice more, on a random vector.
    def one_pass(carry):
        i, w, column, beta, _ = carry
        found = _coefficients(rows, w, count, skip)
        w = _remove(rows, found, w, count, skip)
        length = tree.norm(w)
        column = jnp.where(i < 2, column + jnp.concatenate(found), column)
        beta = jnp.where(i == 1, length, beta)
        w = lax.cond((i == 1) & (length <= threshold), fresh, lambda w: w, w)
        return i + 1, w, column, beta, length

    def unfinished(carry):
        i, _, _, beta, _ = carry
        return (i < 2) | ((i < 4) & (beta <= threshold))

    zero = jnp.zeros((), dtype)
    carry = (jnp.zeros((), jnp.int32), w, jnp.zeros(num_rows(rows), dtype), zero, zero)
    _, direction, column, beta, length = lax.while_loop(unfinished, one_pass, carry)
    broke = beta <= threshold
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
    return Appended(
        tuple(out), column * unit, jnp.where(broke, jnp.zeros_like(beta), beta * unit), scale
    )


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


@jax.jit
def _gather_leaf(parts, weights):
    ends = np.cumsum([x.shape[0] for x in parts])[:-1].tolist()
    terms = [
        tree.combine(part, columns)
        for part, columns in zip(parts, jnp.split(weights, ends, axis=1), strict=True)
    ]
    return functools.reduce(jnp.add, terms)


def gather(rows: tuple[PyTree, ...], weights: jax.Array) -> PyTree:
    """The k combinations of the rows with weights `(k, num_rows)`: a stacked pytree.

    The rows are consumed: each leaf of the basis is freed once its part of the result is made, so
    that basis and result are never held both.
    """
    treedef = jax.tree.structure(rows[0])
    leaves = [list(jax.tree.leaves(chunk)) for chunk in rows]
    out = []
    for i in range(treedef.num_leaves):
        parts = [chunk[i] for chunk in leaves]
        out.append(jax.block_until_ready(_gather_leaf(parts, weights)))
        for part in parts:
            part.delete()
    return jax.tree.unflatten(treedef, out)


_index = jax.jit(
    lambda chunk, i: jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 0, False), chunk)
)


def row(rows: tuple[PyTree, ...], index: int) -> PyTree:
    """One row of a basis."""
    return _index(rows[index // CHUNK], index % CHUNK)


def spread(vector: PyTree) -> bool:
    """Whether a leaf lies on more than one device."""
    return any(
        isinstance(x, jax.Array) and len(x.sharding.device_set) > 1 for x in jax.tree.leaves(vector)
    )
