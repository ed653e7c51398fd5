"""The stored Krylov basis: orthonormal rows in chunks, extended and rotated in place.

A basis is a tuple of stacked pytrees of at most 16 rows each. The kernels work on whole chunks and
leave out those that hold no row yet, so one compiled program serves every length.
"""

import functools
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


def _twice(rows, w, count, skip):
    """Two passes of classical Gram-Schmidt: the second takes out what rounding left."""
    first = _coefficients(rows, w, count, skip)
    w = _remove(rows, first, w, count, skip)
    second = _coefficients(rows, w, count, skip)
    w = _remove(rows, second, w, count, skip)
    return jnp.concatenate(first) + jnp.concatenate(second), w


@functools.partial(jax.jit, donate_argnums=0, static_argnames="skip")
def append(rows, w, count, key, scale, *, skip: bool) -> Appended:
    """Orthogonalise a vector against the first `count` rows and write it as the next one.

    Where nothing but rounding is left of it, a random row orthogonal to the others is written in
    its place and beta is zero: the space found so far is invariant, and the search goes on outside.

    Args:
        rows: The basis; donated.
        w: The vector.
        count: How many rows are filled. At the end of the basis nothing is written.
        key: For the random row.
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
    before = tree.norm(w)
    column, w = _twice(rows, w, count, skip)
    beta = tree.norm(w)
    scale = jnp.maximum(scale, before * unit)
    epsilon = float(jnp.finfo(dtype).eps)
    broke = beta * unit <= 64 * epsilon * scale

    def fresh(w):
        r = jax.tree.map(
            lambda new, old: new.astype(old.dtype), tree.random_like(key, w, dtype=dtype), w
        )
        _, r = _twice(rows, r, count, skip)
        return r, tree.norm(r)

    direction, length = lax.cond(broke, fresh, lambda w: (w, beta), w)
    row = jax.tree.map(
        lambda x: x / jnp.where(length > 0, length, jnp.ones_like(length)), direction
    )
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
def assemble(rows, weights):
    """The k combinations of the rows with weights `(k, num_rows)`: a stacked pytree."""
    ends = np.cumsum([tree.num_points(chunk) for chunk in rows])[:-1].tolist()
    parts = [
        tree.combine(chunk, part)
        for chunk, part in zip(rows, jnp.split(weights, ends, axis=1), strict=True)
    ]
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)


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
