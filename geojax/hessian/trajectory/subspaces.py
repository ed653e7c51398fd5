"""Subspaces compared: how much of one lies in another, and how much of a gradient in it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from geojax import tree

__all__ = ["gradient_mass", "principal_angles", "subspace_overlap"]

PyTree = Any

_inner_many = jax.jit(jax.vmap(tree.inner_products, in_axes=(None, 0)))
_inner = jax.jit(tree.inner_products)
length_of = jax.jit(tree.norm)


def _gram(left: PyTree, right: PyTree) -> np.ndarray:
    """`(rows of left, rows of right)`, float64: their inner products."""
    return np.asarray(_inner_many(right, left), np.float64)


def _whitening(vectors: PyTree, what: str) -> np.ndarray:
    """The W for which the rows of W @ vectors are orthonormal."""
    overlaps = _gram(vectors, vectors)
    lengths = np.sqrt(np.diag(overlaps))
    if not (np.isfinite(overlaps).all() and (lengths > 0).all()):
        raise ValueError(f"{what}: a row is zero or not finite; expected k independent vectors.")
    values, rotation = np.linalg.eigh(overlaps / np.outer(lengths, lengths))
    # Inner products are accurate to epsilon, so a span of this much is certain to half the digits.
    epsilon = np.finfo(np.dtype(tree.accumulation_dtype(*jax.tree.leaves(vectors)))).eps
    if values[0] < epsilon**0.5:
        raise ValueError(
            f"{what}: the rows are dependent to working precision (the smallest eigenvalue of "
            f"their Gram matrix is {values[0]:.1e}); expected k independent vectors, such as the "
            "`eigenvectors` of `eigsh`."
        )
    return (rotation / np.sqrt(values) @ rotation.T) / lengths[None]


def _row(vectors: PyTree, what: str) -> PyTree:
    """The shape of one of the stacked vectors."""
    tree.check_floating(vectors, what)
    tree.num_points(vectors)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), vectors
    )


def check_rows(vectors: PyTree, like: PyTree, names: tuple[str, str]) -> None:
    """Raise unless each of the stacked vectors is like a pytree; `names` are of both."""
    row = _row(vectors, names[0])
    tree.check_same(like, row, names=(names[1], f"a row of {names[0]}"), dtype=False)


def subspace_overlap(a: PyTree, b: PyTree) -> float:
    r"""How much of one subspace lies in another: :math:`\|U^T V\|_F^2 / k` for orthonormal bases.

    The mean squared cosine of the principal angles: 1 for the same subspace, 0 for orthogonal ones,
    and k / n in the mean for a random one of n dimensions. Any independent rows will do; what
    counts is their span, so neither signs, nor the order, nor rotations among close eigenvalues
    matter.

    Args:
        a: k stacked vectors, leaves `(k, *leaf.shape)`, such as the `eigenvectors` of `eigsh`.
        b: As `a`; the number of rows may differ, and k is then the smaller one: the overlap is 1
            where the smaller subspace lies in the larger.

    Returns:
        A number from 0 to 1. One read of all rows; under a mesh nothing is gathered.

    Raises:
        ValueError: If the structures differ, naming the leaf, or rows are dependent.
        TypeError: If a leaf is not floating.

    Example:
        >>> a, b = jnp.eye(4)[:2], jnp.eye(4)[1:3]
        >>> subspace_overlap(a, b)
        0.5

    Reference:
        Gur-Ari, Roberts and Dyer, Gradient Descent Happens in a Tiny Subspace, 2018.
    """
    check_rows(b, _row(a, "a"), ("b", "a row of a"))
    cosines = _whitening(a, "a") @ _gram(a, b) @ _whitening(b, "b").T
    return float(min(1.0, np.sum(cosines**2) / min(cosines.shape)))


@jax.jit
def _beyond(vectors: PyTree, weights: jax.Array, basis: PyTree, removed: jax.Array) -> PyTree:
    return jax.tree.map(jnp.subtract, tree.combine(vectors, weights), tree.combine(basis, removed))


def principal_angles(a: PyTree, b: PyTree) -> np.ndarray:
    r"""The angles between two subspaces, in radians, ascending.

    The smallest is that between the two closest vectors, one from each; the next that of the
    closest pair orthogonal to those; and so on. The cosines are the singular values of
    :math:`U^T V`. As an angle below :math:`\sqrt\epsilon` has the cosine 1, sines are measured as
    well, on what is left of one basis off the other.

    Args:
        a: As for `subspace_overlap`.
        b: As for `subspace_overlap`.

    Returns:
        `(k,)`, float64, from 0 to pi/2, accurate to rounding near both ends.

    Raises:
        ValueError: If the structures differ, naming the leaf, or rows are dependent.
        TypeError: If a leaf is not floating.

    Example:
        >>> a, b = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[1.0, 1.0, 0.0]])
        >>> np.round(principal_angles(a, b), 4).tolist()
        [0.7854]

    Reference:
        Bjorck and Golub, Numerical methods for computing angles between linear subspaces, 1973.
    """
    check_rows(b, _row(a, "a"), ("b", "a row of a"))
    if tree.num_points(a) < tree.num_points(b):
        a, b = b, a
    white_a, white_b = _whitening(a, "a"), _whitening(b, "b")
    inner = white_b @ _gram(b, a) @ white_a.T
    turn, cosines, _ = np.linalg.svd(inner)
    dtype = np.dtype(tree.accumulation_dtype(*jax.tree.leaves((a, b))))
    # Turned to the principal vectors first, so that small sines do not drown in large ones.
    weights, removed = turn.T @ white_b, turn.T @ inner @ white_a
    beyond = _beyond(b, np.array(weights, dtype), a, np.array(removed, dtype))
    sines = np.sqrt(np.maximum(np.linalg.eigvalsh(_gram(beyond, beyond)), 0))
    return np.arctan2(sines, cosines)


def gradient_mass(gradient: PyTree, vectors: PyTree) -> float:
    r"""The fraction of a squared gradient norm in a subspace: :math:`\|U U^T g\|^2 / \|g\|^2`.

    Near 1 in the top k eigenvectors, with k the number of classes, once a classifier trains; k / n
    for a random subspace.

    Args:
        gradient: A pytree like the parameters (None where the vectors have None).
        vectors: k stacked independent vectors, such as the `eigenvectors` of `eigsh`.

    Returns:
        A number from 0 to 1; NaN for a zero gradient, which has no direction.

    Raises:
        ValueError: If the structures differ, naming the leaf; if rows are dependent; if the
            gradient is not finite.
        TypeError: If a leaf is not floating.

    Example:
        >>> round(gradient_mass(jnp.array([3.0, 4.0, 0.0]), jnp.eye(3)[1:]), 6)
        0.64

    Reference:
        Gur-Ari, Roberts and Dyer, Gradient Descent Happens in a Tiny Subspace, 2018.
    """
    tree.check_floating(gradient, "the gradient")
    check_rows(vectors, gradient, ("vectors", "the gradient"))
    length = float(length_of(gradient))
    if not np.isfinite(length):
        raise ValueError(f"gradient_mass: the norm of the gradient is {length}.")
    if length == 0:
        return float("nan")
    inside = _whitening(vectors, "vectors") @ np.asarray(
        _inner(vectors, over(gradient, length)), np.float64
    )
    return float(min(1.0, np.sum(inside**2)))


@jax.jit
def over(x: PyTree, length: jax.Array) -> PyTree:
    """`x / length` in float32 or better: the inverse of a tiny length would overflow."""

    def one(a):
        a = a.astype(tree.accumulation_dtype(a))
        return a / jnp.asarray(length).astype(a.dtype)

    return jax.tree.map(one, jax.tree.map(jnp.asarray, x))
