"""Doubly stochastic matrices in the place of permutations: how they are made, and how they act.

`sinkhorn` makes them from any logits, with the derivative of the fixed point; `apply_soft` mixes
the units of a network by them.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from geojax import tree as trees
from geojax.symmetry.spec import PermutationSpec, SpecError, blocks, positions, segments

__all__ = ["apply_soft", "sinkhorn"]

PyTree = Any
# After the alternating iterations; each is quadratically convergent or falls back to one of them.
_NEWTON_STEPS = 20


def sinkhorn(
    logits: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    num_iterations: int = 200,
    tolerance: float = 5e-6,
) -> jax.Array:
    r"""The doubly stochastic matrix :math:`\mathrm{diag}(e^u)\, e^{L/\tau}\, \mathrm{diag}(e^v)`.

    It maximizes :math:`\langle L, P \rangle + \tau H(P)` over doubly stochastic P. Rows and columns
    are normalised in turn, on logarithms, until the row sums are 1 within `tolerance` (the columns'
    are then 1 to rounding). At low temperatures that takes ever more iterations: where
    `num_iterations` are not enough, Newton steps on u follow, each n^3 like the derivative.
    Logits that differ by a hundred temperatures may defeat both: the row sums tell.

    The derivative is that of the fixed point and not of the iterations: the backward pass solves
    the linear system of the two marginals, as the reference does; here one of its two blocks is
    eliminated, and the other written as a graph Laplacian, whose diagonal is a sum of its
    off-diagonal entries, so that nothing cancels where P is close to a permutation.

    Args:
        logits: `(..., n, n)`, floating.
        temperature: tau, positive; the lower, the closer to a permutation.
        num_iterations: The most iterations before the Newton steps.
        tolerance: The deviation of a row sum from 1 at which both end.

    Returns:
        `(..., n, n)` in the dtype of `logits`, float32 or wider. Works under `jit`, `vmap` and
        reverse-mode derivatives. Cost: some n^2 for each iteration; n^3 for the derivative.

    Raises:
        ValueError: If the matrices are not square.
        TypeError: If they are not floating.

    Example:
        >>> sinkhorn(jnp.array([[0.0, 1.0], [0.0, 1.0]])).tolist()
        [[0.5, 0.5], [0.5, 0.5]]

    Reference:
        Cuturi, Sinkhorn Distances, 2013. Peña, Medeiros, Dubail, Aminbeidokhti, Granger and
        Pedersoli, Re-basin via implicit Sinkhorn differentiation, 2023, section 3.
    """
    logits = jnp.asarray(logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"sinkhorn: logits are {logits.dtype}; expected a floating dtype.")
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"sinkhorn: logits have shape {logits.shape}; expected (..., n, n).")
    dtype = trees.accumulation_dtype(logits)
    scores = logits.astype(dtype) / jnp.asarray(temperature).astype(dtype)
    return _balanced(scores, num_iterations, tolerance)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _balanced(scores: jax.Array, num_iterations: int, tolerance: float) -> jax.Array:
    def error(x):
        return jnp.max(jnp.abs(jnp.expm1(jax.nn.logsumexp(x, axis=-1))))

    def columns(x):
        return x - jax.nn.logsumexp(x, axis=-2, keepdims=True)

    def alternate(x):
        return columns(x - jax.nn.logsumexp(x, axis=-1, keepdims=True))

    def newton(x):
        p = jnp.exp(x)
        rows = p.sum(-1, keepdims=True)
        v = _solve_laplacian(p, rows, -_product(jnp.swapaxes(p, -1, -2), 1 / rows - 1))
        return columns(x + (1 - rows - _product(p, v)) / rows)

    def step_alternating(carry):
        count, x, _ = carry
        x = alternate(x)
        return count + 1, x, error(x)

    def step_newton(carry):
        count, x, before = carry
        new, plain = newton(x), alternate(x)
        x = jnp.where(error(new) < before, new, plain)
        return count + 1, x, error(x)

    def until(most):
        return lambda carry: (carry[0] < most) & (carry[2] > tolerance)

    x = alternate(scores)
    carry = jax.lax.while_loop(until(num_iterations), step_alternating, (1, x, error(x)))
    carry = jax.lax.while_loop(until(_NEWTON_STEPS), step_newton, (0, *carry[1:]))
    return jnp.exp(carry[1])


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _solve_laplacian(p: jax.Array, rows: jax.Array, right: jax.Array) -> jax.Array:
    """The column part of the linear system of both marginals, `(..., n, 1)`, up to a constant.

    The row part is eliminated: what is left, diag(c) - P^T diag(1/r) P, is the Laplacian of a graph
    between columns. Its diagonal is the sum of its links, so that nothing cancels where P is close
    to a permutation.
    """
    eye = jnp.broadcast_to(jnp.eye(p.shape[-1], dtype=p.dtype), p.shape)
    links = _product(jnp.swapaxes(p, -1, -2), p / rows) * (1 - eye)
    degrees = links.sum(-1, keepdims=True)
    size = degrees.mean(-2, keepdims=True) + jnp.finfo(p.dtype).tiny
    laplacian = (degrees * eye - links) / size
    # The constant vector is in the null space, and a few more where P falls into blocks.
    regular = laplacian + 1 / p.shape[-1] + jnp.finfo(p.dtype).eps * eye
    return jnp.linalg.solve(regular, right / size)


def _balanced_forward(scores, num_iterations, tolerance):
    p = _balanced(scores, num_iterations, tolerance)
    return p, p


def _balanced_backward(num_iterations, tolerance, p, cotangent):
    del num_iterations, tolerance
    rows = p.sum(-1, keepdims=True)
    # What is constant along a row has no effect; without it the right-hand side is small where it
    # should be.
    centered = cotangent - (p * cotangent).sum(-1, keepdims=True) / rows
    right = (p * centered).sum(-2)[..., None]
    column = _solve_laplacian(p, rows, right)
    row = -_product(p, column) / rows
    return (p * (centered - jnp.swapaxes(column, -1, -2) - row),)


_balanced.defvjp(_balanced_forward, _balanced_backward)


def apply_soft(spec: PermutationSpec, matrices: Mapping[str, jax.Array], tree: PyTree) -> PyTree:
    """Mix units by matrices, as `permute.apply_permutation` moves them by permutations.

    The new unit i is the sum of old units j with weight `matrices[group][..., i, j]`. Matrices of
    permutations (`to_matrices`) give what the permutations give; those in between give the layers
    in between, whose function is that of no permuted network.

    Args:
        spec: The symmetry; all of its groups of kind 'permutation'.
        matrices: One `(*index_sizes, n, n)` array for each group.
        tree: Parameters under the paths of the spec, all of them or a part.

    Returns:
        A new tree; each leaf keeps its dtype and, outside `jit`, its sharding (a leaf sharded on an
        Explicit mesh is gathered for it). It can be differentiated in both.

    Raises:
        SpecError: If a leaf or a group is unknown, a shape differs, or a group has another kind.
    """
    for group in spec.groups:
        if group.kind != "permutation":
            raise SpecError(
                f"apply_soft: group {group.name!r} is of kind {group.kind!r}; a doubly stochastic "
                "matrix stands for a permutation alone."
            )
    names = {group.name for group in spec.groups}
    if names != set(matrices):
        raise SpecError(
            f"apply_soft: got matrices for {sorted(matrices)}; expected {sorted(names)}."
        )
    for group in spec.groups:
        expected = (*group.shape, group.size)
        if jnp.shape(matrices[group.name]) != expected:
            raise SpecError(
                f"apply_soft: the matrix of group {group.name!r} has shape "
                f"{jnp.shape(matrices[group.name])}; expected {expected}."
            )
    leaves, treedef = jax.tree.flatten(tree)
    out = []
    for path, value in zip(trees.paths(tree), leaves, strict=True):
        leaf = spec.by_path.get(path)
        if leaf is None or leaf.shape != jnp.shape(value):
            raise SpecError(
                f"apply_soft: leaf {path} of shape {jnp.shape(value)} has no place in the spec, "
                f"which has {'no such leaf' if leaf is None else leaf.shape} there."
            )
        moves = any(name in names for name in leaf.groups())
        mixed = _mixed(spec, leaf, matrices, value) if moves else value
        out.append(trees.placed_like(mixed, value) if moves else value)
    return jax.tree.unflatten(treedef, out)


def _mixed(spec: PermutationSpec, leaf: Any, matrices: Mapping[str, Any], value: Any) -> jax.Array:
    value = jnp.asarray(value)
    explicit = trees.explicit_sharding(value)
    if explicit is not None:  # a product over a sharded axis has no sharding type of its own
        value = jax.sharding.reshard(value, jax.P())
    dtype = trees.accumulation_dtype(value)
    parts = []
    for factors, block in blocks(leaf, value):
        block = block.astype(dtype)
        names = [factor.name for factor in factors]
        moving = [axis for axis, name in enumerate(names) if name in matrices]
        # What others are indexed by moves first: the index is the new position.
        for axis in sorted(moving, key=lambda x: len(spec[names[x]].index)):
            outer = [names.index(index) for index in spec[names[axis]].index]
            labels = list(range(block.ndim))
            block = jnp.einsum(
                block,
                labels,
                jnp.asarray(matrices[names[axis]]).astype(dtype),
                [*outer, block.ndim, axis],
                [block.ndim if x == axis else x for x in labels],
                precision=jax.lax.Precision.HIGHEST,
            )
        parts.append(block)
    if len(parts) == 1:
        return parts[0].reshape(leaf.shape).astype(value.dtype)
    out = jnp.zeros(leaf.shape, dtype)
    places = [positions(layout) for layout in leaf.axes]
    chosen = itertools.product(*(range(len(segments(layout))) for layout in leaf.axes))
    for part, choice in zip(parts, chosen, strict=True):
        where = np.ix_(*(axis[i] for axis, i in zip(places, choice, strict=True)))
        out = out.at[where].set(part.reshape([x.size for x in where]))
    return out.astype(value.dtype)
