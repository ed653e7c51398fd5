"""Whether a product is that of one symmetric matrix: three cheap probes before long work."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import tree
from geojax.krylov.operators import Operator

__all__ = ["Checks", "OperatorError", "check"]

PyTree = Any
_distance = jax.jit(lambda x, y: tree.norm(tree.axpy(-1.0, y, x)))
_norm = jax.jit(tree.norm)
_vdot = jax.jit(tree.vdot)
_sum = jax.jit(lambda u, v: tree.axpy(2.0, v, u))


class OperatorError(ValueError):
    """A product is not that of one symmetric matrix.

    Attributes:
        property: What it lacks: 'determinism', 'linearity' or 'symmetry'.
    """

    def __init__(self, message: str, property: str):
        super().__init__(message)
        self.property = property


class Checks(NamedTuple):
    """What the probes measured, each relative to the size of the products.

    Attributes:
        determinism: The difference of two products with one vector.
        linearity: The difference of A(u + 2v) from A u + 2 A v.
        symmetry: The difference of <u, A v> from <v, A u>, over the size that such a product of
            random vectors has.
        num_matvecs: The products spent.
    """

    determinism: float
    linearity: float
    symmetry: float
    num_matvecs: int


def check(operator: Operator, *, key: jax.Array) -> Checks:
    r"""Probe an operator with random vectors, and raise if it is not one symmetric matrix.

    Lanczos on anything else returns numbers that mean nothing. The thresholds leave room for the
    rounding of the parameters' dtype and of inner products of n terms: 1e-3, or more where
    20 epsilon of the dtype or :math:`30 \epsilon_{32} \sqrt n` is more.

    Args:
        operator: The operator.
        key: A typed key for the two vectors.

    Returns:
        `Checks`. Four products.

    Raises:
        OperatorError: Saying which property fails, by how much, and what is likely to blame.
        FloatingPointError: If a product is not finite.

    Example:
        >>> from geojax import krylov
        >>> found = check(krylov.from_matrix(np.eye(3, dtype=np.float32)), key=jax.random.key(0))
        >>> found.determinism, found.num_matvecs
        (0.0, 4)
    """
    u = operator.random(jax.random.fold_in(key, 0), "rademacher")
    v = operator.random(jax.random.fold_in(key, 1), "rademacher")
    product_u, product_v = operator.matvec(u), operator.matvec(v)
    size_u, size_v = float(_norm(product_u)), float(_norm(product_v))
    if not (np.isfinite(size_u) and np.isfinite(size_v)):
        raise FloatingPointError(
            f"{operator.name}: its product with a random vector is not finite; check the loss and "
            "its derivatives at these parameters."
        )
    size = max(size_u, size_v)
    if size == 0:
        return Checks(0.0, 0.0, 0.0, 2)
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(operator.like)]
    rounding = 20 * max(float(jnp.finfo(d).eps) for d in dtypes)
    tolerance = max(1e-3, rounding)
    again = float(_distance(operator.matvec(v), product_v)) / size
    if again > tolerance:
        raise OperatorError(
            f"{operator.name}: two products with the same vector differ by {again:.2g} of their "
            "size, so it is not one matrix. The loss or the data change between passes: fix the "
            "key of dropout, and give a loader that reads the same examples every time (no "
            "augmentation, no shuffling with a dropped remainder).",
            "determinism",
        )
    combined = _sum(product_u, product_v)
    straight = float(_distance(operator.matvec(_sum(u, v)), combined)) / (3 * size)
    if straight > tolerance:
        raise OperatorError(
            f"{operator.name}: A(u + 2v) differs from A u + 2 A v by {straight:.2g} of its size, "
            "so the product is not linear in the vector. Compute it by automatic differentiation, "
            "or with a smaller step if it is a finite difference.",
            "linearity",
        )
    # <u, A v> of random signs is of the size of |A v|: |u| |A v| over sqrt(n), and |u| = sqrt(n).
    symmetry = abs(float(_vdot(u, product_v)) - float(_vdot(v, product_u))) / size
    room = max(tolerance, 30 * float(np.finfo(np.float32).eps) * np.sqrt(operator.size))
    if symmetry > room:
        raise OperatorError(
            f"{operator.name}: <u, A v> and <v, A u> differ by {symmetry:.2g} of their usual size, "
            "so the matrix is not symmetric and has no real spectrum. The likely cause is a "
            "custom derivative rule (`custom_vjp`, a straight-through estimator) in the loss: what "
            "it gives is not the gradient of any function. Differentiate the loss without it, or "
            "leave the parameters in front of it out.",
            "symmetry",
        )
    return Checks(again, straight, symmetry, 4)
