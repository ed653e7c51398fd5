"""The shape of a curve: distances, angles, and how much longer it is than the straight line."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import tree
from geojax.curves.bases import Basis, check_basis, coefficients, length

__all__ = ["CurveShape", "shape"]

PyTree = Any


class CurveShape(NamedTuple):
    """How a curve and its control points lie.

    Attributes:
        distances: `(n, n)` Euclidean distances between control points.
        angles: `(n - 2,)` by how much the polygon of the control points turns at each inner one,
            in radians: 0 goes straight on, pi turns back. NaN where two neighbours coincide.
        polygon: The length of that polygon.
        length: The length of the curve.
        chord: The distance between its two ends.
        ratio: `length / chord`, 1 for a straight curve; NaN for a closed one.
    """

    distances: np.ndarray
    angles: np.ndarray
    polygon: float
    length: float
    chord: float
    ratio: float


@jax.jit
def _between(a: PyTree, b: PyTree) -> PyTree:
    return tree.axpy(-1.0, _wide(a), _wide(b))


def _wide(x: PyTree) -> PyTree:
    """Leaves in the dtype in which sums are kept."""
    return jax.tree.map(lambda leaf: leaf.astype(tree.accumulation_dtype(leaf)), x)


@jax.jit
def _norm(x: PyTree) -> jax.Array:
    return tree.norm(x)


@jax.jit
def _turn(a: PyTree, b: PyTree) -> jax.Array:
    # The arc tangent of half-sums is exact for small angles, where the arc cosine is not.
    a, b = tree.scale(1 / tree.norm(a), a), tree.scale(1 / tree.norm(b), b)
    apart, together = tree.norm(tree.axpy(-1.0, a, b)), tree.norm(tree.axpy(1.0, a, b))
    return 2 * jnp.arctan2(apart, together)


def shape(basis: Basis, control_points: PyTree, num_steps: int = 1000) -> CurveShape:
    """Distances, angles and the ratio of lengths of a curve.

    Args:
        basis: From t to `(n,)` coefficients.
        control_points: Stacked points.
        num_steps: Chords by which the length is measured, see `length`.

    Returns:
        A `CurveShape`. Cost: n (n - 1) / 2 differences; memory: three points beyond the stack.

    Example:
        >>> from geojax.curves import polychain
        >>> found = shape(polychain(3), {"w": jnp.array([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])})
        >>> found.length, found.chord, round(found.ratio, 3), round(float(found.angles[0]), 3)
        (7.0, 5.0, 1.4, 1.571)
    """
    tree.check_floating(control_points, "control_points")
    num = check_basis(basis, control_points)
    members = tree.unstack(control_points)
    distances = np.zeros((num, num))
    for i in range(num):
        for j in range(i + 1, num):
            distances[i, j] = distances[j, i] = float(_norm(_between(members[i], members[j])))
    steps = np.diagonal(distances, 1)
    angles = np.full(max(num - 2, 0), np.nan)
    for i in range(num - 2):
        if steps[i] > 0 and steps[i + 1] > 0:
            angles[i] = _turn(
                _between(members[i], members[i + 1]), _between(members[i + 1], members[i + 2])
            )
    ends = coefficients(basis, jnp.array([0.0, 1.0]))
    first, last = tree.unstack(tree.combine(control_points, ends))
    chord = float(_norm(_between(first, last)))
    whole = length(basis, control_points, num_steps)
    return CurveShape(
        distances, angles, float(steps.sum()), whole, chord, whole / chord if chord else np.nan
    )
