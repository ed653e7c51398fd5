"""The Lanczos recurrence, a pure `init` and `step`, and what runs it inside jit."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from geojax import tree
from geojax.krylov.probes import check_count

__all__ = [
    "LanczosState",
    "Tridiagonal",
    "init",
    "quadratic_form",
    "step",
    "tridiagonalize",
]

PyTree = Any

# How this differs from the papers' codes (Ghorbani et al. 2019, PyHessian, matfree):
# - a breakdown is relative to the norm of T, 64 eps |T|, never absolute, and what comes after it
#   has no weight and no node of its own: matfree's Ritz values after a breakdown lie outside the
#   spectrum;
# - orthogonalisation is two classical passes, or none at all with three vectors of memory;
# - <q_{j-1}, A q_j> is compared with the coupling b_{j-1} at each step. They differ where A is not
#   symmetric or not the same in each product, and then the quadrature means nothing.


class LanczosState(NamedTuple):
    """Lanczos in the middle of its way: `step` takes it one product further.

    Attributes:
        previous: The vector before `current`.
        current: The vector that the next product is taken of; zero after a breakdown.
        basis: All vectors, leaves `(m, *leaf.shape)`, rows after `index` zero; or None.
        alphas: `(m,)`, the diagonal so far.
        betas: `(m,)`, the couplings so far: entry j is between vectors j and j + 1, the last one
            the norm of what the final step left over.
        norm: The norm of the vector that the recurrence began with.
        alive: Whether there has been no breakdown.
        count: How many vectors there are before a breakdown.
        scale: The largest entry of T so far.
        asymmetry: The largest difference so far between <q_{j-1}, A q_j> and its coupling.
        index: The number of products so far.
    """

    previous: PyTree
    current: PyTree
    basis: PyTree | None
    alphas: jax.Array
    betas: jax.Array
    norm: jax.Array
    alive: jax.Array
    count: jax.Array
    scale: jax.Array
    asymmetry: jax.Array
    index: jax.Array


class Tridiagonal(NamedTuple):
    r"""A Q = Q T + r e_m^T with orthonormal Q and tridiagonal T.

    Attributes:
        alphas: `(m,)`, the diagonal of T. After a breakdown it repeats its first entry, the
            Rayleigh quotient of the start vector, so that T has no eigenvalue outside the spectrum.
        betas: `(m - 1,)`, the off-diagonal; zero from a breakdown on.
        vectors: The rows of Q^T, leaves `(m, *leaf.shape)`, zero after a breakdown; or None.
        residual: The norm of r; zero after a breakdown.
        num_steps: The order of the part of T that counts: m, or less after a breakdown, where the
            start vector lies in an invariant subspace and the quadrature is exact.
        norm: The norm of the start vector.
        asymmetry: The largest :math:`|\langle q_{j-1}, A q_j\rangle - b_{j-1}|` over the largest
            entry of T: rounding for a symmetric A.
    """

    alphas: jax.Array
    betas: jax.Array
    vectors: PyTree | None
    residual: jax.Array
    num_steps: jax.Array
    norm: jax.Array
    asymmetry: jax.Array


def init(v0: PyTree, num_steps: int, *, reorthogonalize: bool = True) -> LanczosState:
    """The state before the first product.

    Args:
        v0: The start vector, any pytree of floating arrays in float32 or better.
        num_steps: How many steps there will be.
        reorthogonalize: Whether to keep all vectors and orthogonalise against them.
    """
    num_steps = check_count("num_steps", num_steps, 1)
    tree.check_floating(v0, "v0")
    v0 = jax.tree.map(lambda x: jnp.asarray(x).astype(tree.accumulation_dtype(x)), v0)
    dtype = tree.accumulation_dtype(*jax.tree.leaves(v0))
    norm = tree.norm(v0)
    alive = norm > 0
    current = tree.scale(jnp.where(alive, 1 / jnp.where(alive, norm, 1), 0), v0)
    basis = None
    if reorthogonalize:
        # Of the ways tried this alone keeps the sharding under Explicit and Auto meshes.
        basis = jax.tree.map(
            lambda x: jnp.broadcast_to(x[None] * 0, (num_steps, *x.shape)), current
        )
        basis = jax.tree.map(lambda rows, q: rows.at[0].set(q), basis, current)
    zero = jnp.zeros((), dtype)
    return LanczosState(
        previous=jax.tree.map(jnp.zeros_like, current),
        current=current,
        basis=basis,
        alphas=jnp.zeros(num_steps, dtype),
        betas=jnp.zeros(num_steps, dtype),
        norm=norm,
        alive=alive,
        count=jnp.zeros((), jnp.int32),
        scale=zero,
        asymmetry=zero,
        index=jnp.zeros((), jnp.int32),
    )


def step(state: LanczosState, product: PyTree) -> LanczosState:
    """One step of Lanczos, given the product of the operator with `state.current`.

    Pure: it may be jitted, scanned, vmapped over states and differentiated. Cost: with a basis, two
    passes of classical Gram-Schmidt over its m rows; without, five reads of a vector.
    """
    return _step(state, product, lambda again, w, more: more(w))


def sparing_step(state: LanczosState, product: PyTree) -> LanczosState:
    """The same, where the second pass is left out when the first has found but rounding.

    For use outside vmap and grad, which would take both ways.
    """
    return _step(state, product, lambda again, w, more: lax.cond(again, more, _nothing, w))


def _nothing(w):
    return w, jnp.zeros((), tree.accumulation_dtype(*jax.tree.leaves(w)))


def _step(state: LanczosState, product: PyTree, second: Callable) -> LanczosState:
    j = state.index
    dtype = state.alphas.dtype
    product = jax.tree.map(lambda w, q: w.astype(q.dtype), product, state.current)
    before = jnp.where(j > 0, state.betas[jnp.maximum(j - 1, 0)], 0).astype(dtype)
    basis = state.basis
    # The product has parts along two vectors; all others are rounding.
    backward = tree.vdot(state.previous, product)
    taken = before if basis is None else backward
    w = tree.axpy(-taken, state.previous, product)
    alpha = tree.vdot(state.current, w)
    w = tree.axpy(-alpha, state.current, w)
    if basis is not None:

        def against_all(w):
            found = tree.inner_products(basis, w)
            return tree.axpy(-1.0, tree.combine(basis, found), w), found[j]

        length = tree.norm(w)
        w, first = against_all(w)
        # Where a pass takes half, its own rounding counts (Daniel et al. 1976).
        w, last = second(~(tree.norm(w) >= length / 2), w, against_all)
        alpha = alpha + first + last
    beta = tree.norm(w)
    scale = jnp.maximum(state.scale, lax.stop_gradient(jnp.maximum(jnp.abs(alpha), before)))
    # A NaN is no breakdown: it must stay to be seen.
    broken = beta <= 64 * jnp.finfo(dtype).eps * scale
    alive = state.alive & ~broken
    gap = lax.stop_gradient(jnp.abs(backward - before))
    factor = jnp.where(alive, 1 / jnp.where(alive, beta, 1), 0)
    current = tree.scale(factor, w)
    if basis is not None:
        # Written when all reads of the basis are done, or XLA copies it.
        basis = jax.tree.map(lambda rows, q: _written(rows, q, j + 1), basis, current)
    return LanczosState(
        previous=state.current,
        current=current,
        basis=basis,
        alphas=state.alphas.at[j].set(jnp.where(state.alive, alpha, state.alphas[0])),
        betas=state.betas.at[j].set(jnp.where(alive, beta, 0)),
        norm=state.norm,
        alive=alive,
        count=state.count + state.alive.astype(jnp.int32),
        scale=jnp.where(state.alive, scale, state.scale),
        asymmetry=jnp.where(state.alive, jnp.maximum(state.asymmetry, gap), state.asymmetry),
        index=j + 1,
    )


def _written(rows: jax.Array, row: jax.Array, index: jax.Array) -> jax.Array:
    """The rows with one in its place; past the end they stay as they are."""
    last = rows.shape[0] - 1
    at = jnp.minimum(index, last)
    old = lax.dynamic_index_in_dim(rows, at, 0, keepdims=False)
    row = jnp.where(index <= last, row, old)
    return lax.dynamic_update_index_in_dim(rows, row, at, 0)


def _finish(state: LanczosState) -> Tridiagonal:
    scale = jnp.where(state.scale > 0, state.scale, 1)
    return Tridiagonal(
        alphas=state.alphas,
        betas=state.betas[:-1],
        vectors=state.basis,
        residual=state.betas[-1],
        num_steps=state.count,
        norm=state.norm,
        asymmetry=state.asymmetry / scale,
    )


def tridiagonalize(
    matvec: Callable[[PyTree], PyTree],
    v0: PyTree,
    num_steps: int,
    *,
    reorthogonalize: bool = True,
) -> Tridiagonal:
    """Lanczos with a fixed number of steps, for use inside jit, vmap and grad.

    A convolution's gradient inside a scan is many times slower than outside on XLA's CPU backend:
    for such a model on a CPU use `spectral_density`, which drives the same steps from the host.

    Args:
        matvec: From a vector to A times it; A symmetric. It is traced once, inside `lax.scan`.
        v0: The start vector, any pytree of floating arrays in any sharding; it is normalised.
        num_steps: m, the number of products. It may exceed the size: the recurrence breaks down
            before, and `num_steps` of the result says where.
        reorthogonalize: Keep all vectors (memory m + 3 vectors) and orthogonalise twice against
            them. Without, three vectors of memory; eigenvalues then appear more than once, and
            share their weight, so the quadrature stays accurate.

    Returns:
        A `Tridiagonal`. Reverse-mode differentiation stores the state of each step, m bases.

    Raises:
        ValueError: If `num_steps` is not positive.

    Example:
        >>> d = jnp.array([1.0, 2.0, 3.0, 3.0])
        >>> t = tridiagonalize(lambda v: d * v, jnp.ones(4), 4)
        >>> int(t.num_steps), [round(float(a), 3) for a in t.alphas[:2]]
        (3, [2.25, 1.841])

    Reference:
        Paige, Accuracy and effectiveness of the Lanczos algorithm, 1980; Giraud et al., Rounding
        error analysis of the classical Gram-Schmidt process, 2005, for the two passes.
    """
    state = init(v0, num_steps, reorthogonalize=reorthogonalize)

    def body(state, _):
        return step(state, matvec(state.current)), None

    return _finish(lax.scan(body, state, length=num_steps)[0])


def quadratic_form(
    f: Callable[[jax.Array], jax.Array],
    matvec: Callable[[PyTree], PyTree],
    v0: PyTree,
    num_steps: int,
    *,
    reorthogonalize: bool = True,
) -> jax.Array:
    r"""The scalar :math:`v^\top f(A) v`, by Gauss quadrature with m nodes; differentiable.

    Exact for polynomials of degree 2m - 1. The derivative is that of the computed value, also where
    nodes coincide; it goes to whatever `matvec`, `f` and `v0` depend on.

    Args:
        f: From eigenvalues `(m,)` to values `(m,)`, element by element.
        matvec: From a vector to A times it.
        v0: v; its norm counts.
        num_steps: m.
        reorthogonalize: As in `tridiagonalize`.

    Returns:
        A scalar.

    Example:
        >>> d = jnp.array([1.0, 2.0, 4.0])
        >>> value = lambda d: quadratic_form(jnp.log2, lambda v: d * v, jnp.ones(3), 3)
        >>> round(float(value(d)), 4), [round(float(g), 3) for g in jax.grad(value)(d)]
        (3.0, [1.443, 0.721, 0.361])

    Reference:
        Golub and Meurant, Matrices, Moments and Quadrature with Applications, 2010.
    """
    t = tridiagonalize(matvec, v0, num_steps, reorthogonalize=reorthogonalize)
    converted, constants = jax.closure_convert(f, t.alphas)
    return t.norm**2 * _first_entry(converted, t.alphas, t.betas, tuple(constants))


def _matrix(alphas: jax.Array, betas: jax.Array) -> jax.Array:
    return jnp.diag(alphas) + jnp.diag(betas, 1) + jnp.diag(betas, -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _first_entry(f: Callable, alphas: jax.Array, betas: jax.Array, constants: tuple) -> jax.Array:
    """The entry (1, 1) of f(T). The derivative of `eigh` itself is NaN where nodes coincide."""
    nodes, vectors = jnp.linalg.eigh(_matrix(alphas, betas))
    return jnp.sum(vectors[0] ** 2 * f(nodes, *constants))


@_first_entry.defjvp
def _first_entry_jvp(f, primals, tangents):
    alphas, betas, constants = primals
    nodes, vectors = jnp.linalg.eigh(_matrix(alphas, betas))
    values, slopes = jax.jvp(lambda x: f(x, *constants), (nodes,), (jnp.ones_like(nodes),))
    # The first divided differences of f (Daleckii and Krein); where two nodes are too close for a
    # difference, the mean slope.
    gaps = nodes[:, None] - nodes[None]
    close = jnp.abs(gaps) <= jnp.sqrt(jnp.finfo(nodes.dtype).eps) * jnp.max(jnp.abs(nodes))
    differences = (values[:, None] - values[None]) / jnp.where(close, 1, gaps)
    divided = jnp.where(close, (slopes[:, None] + slopes[None]) / 2, differences)
    change = vectors.T @ _matrix(tangents[0], tangents[1]) @ vectors
    first = vectors[0]
    tangent = jnp.sum(first[:, None] * first[None] * divided * change)
    if constants:
        by_f = jax.jvp(lambda *c: jnp.sum(first**2 * f(nodes, *c)), constants, tangents[2])[1]
        tangent = tangent + by_f
    return jnp.sum(first**2 * values), tangent
