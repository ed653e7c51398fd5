"""Curves as coefficients: a basis maps t in [0, 1] to the weights of the control points.

The point of a curve is `tree.combine(control_points, basis(t))`, whatever the basis. A basis of
your own is any function from t to `(n,)` coefficients that sum to one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import tree

__all__ = [
    "Basis",
    "Bezier",
    "PiecewiseBezier",
    "Polychain",
    "Speed",
    "arc_length_ts",
    "bezier",
    "coefficients",
    "initialize",
    "length",
    "piecewise_bezier",
    "point",
    "points",
    "polychain",
    "segment",
    "speed",
]

PyTree = Any
# From t, a scalar, to the weights of the control points, `(n,)`.
Basis = Callable[[Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Bezier:
    """B_j(t) = C(n-1, j) t^j (1-t)^(n-1-j). Touches the first and the last control point alone."""

    num_points: int

    def __call__(self, t: Any) -> jax.Array:
        """The coefficients at t, `(n,)`."""
        t = jnp.asarray(t, jnp.float32) if not hasattr(t, "dtype") else t
        degree = self.num_points - 1
        # Powers by products: 0^0 is 1, and so is its derivative where it should be 0.
        ones = jnp.ones_like(t)
        up, down = [ones], [ones]
        for _ in range(degree):
            up.append(up[-1] * t)
            down.append(down[-1] * (1 - t))
        return jnp.stack(
            [math.comb(degree, j) * up[j] * down[degree - j] for j in range(self.num_points)]
        )


@dataclasses.dataclass(frozen=True)
class Polychain:
    """Straight segments through the control points, equally long in t."""

    num_points: int

    def __call__(self, t: Any) -> jax.Array:
        """The coefficients at t, `(n,)`; at most two are not zero."""
        t = jnp.asarray(t, jnp.float32) if not hasattr(t, "dtype") else t
        place = t * (self.num_points - 1)
        knots = jnp.arange(self.num_points, dtype=t.dtype)
        return jnp.maximum(1 - jnp.abs(place - knots), 0)


@dataclasses.dataclass(frozen=True)
class PiecewiseBezier:
    """Bezier curves of one degree, end to end; pieces share their joints.

    Control points: 0 to degree are the first piece, degree to 2 degree the second, and so on.
    """

    num_pieces: int
    degree: int

    @property
    def num_points(self) -> int:
        """How many control points there are."""
        return self.num_pieces * self.degree + 1

    def __call__(self, t: Any) -> jax.Array:
        """The coefficients at t, `(n,)`."""
        t = jnp.asarray(t, jnp.float32) if not hasattr(t, "dtype") else t
        place = t * self.num_pieces
        piece = jnp.clip(jnp.floor(place), 0, self.num_pieces - 1)
        within = Bezier(self.degree + 1)(place - piece)
        index = jnp.arange(self.num_points) - piece.astype(jnp.int32) * self.degree
        inside = (index >= 0) & (index <= self.degree)
        return jnp.where(inside, within[jnp.clip(index, 0, self.degree)], 0)


def _count(name: str, value: Any, least: int) -> int:
    if not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}.")
    return int(value)


def bezier(num_points: int) -> Bezier:
    """The Bezier basis of `num_points` control points, both ends counted.

    Example:
        >>> bezier(3)(0.5).tolist()
        [0.25, 0.5, 0.25]

    Reference:
        Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", 2018,
        equation 4.
    """
    return Bezier(_count("num_points", num_points, 2))


def polychain(num_points: int) -> Polychain:
    """The polygonal chain through `num_points` control points, both ends counted.

    Example:
        >>> polychain(3)(0.75).tolist()
        [0.0, 0.5, 0.5]

    Reference:
        Garipov et al., 2018, equation 3.
    """
    return Polychain(_count("num_points", num_points, 2))


def segment() -> Polychain:
    """The straight line between two points; `bezier(2)` and `polychain(2)` are the same curve."""
    return Polychain(2)


def piecewise_bezier(num_pieces: int, degree: int = 3) -> PiecewiseBezier:
    """Bezier curves end to end, with `num_pieces * degree + 1` control points.

    Example:
        >>> piecewise_bezier(2, 2)(0.5).tolist()
        [0.0, 0.0, 1.0, 0.0, 0.0]
    """
    return PiecewiseBezier(_count("num_pieces", num_pieces, 1), _count("degree", degree, 1))


def check_basis(basis: Basis, control_points: PyTree) -> int:
    """The number of control points; raises where the basis has another.

    Raises:
        ValueError: If the coefficients do not fit the stack or do not sum to one.
    """
    num = tree.num_points(control_points)
    at = np.asarray([0.0, 0.3, 1.0], np.float32)
    found = np.asarray(jnp.stack([basis(jnp.asarray(t)) for t in at]))
    if found.shape != (3, num):
        raise ValueError(
            f"the basis gives {found.shape[1:]} coefficients and there are {num} control points; "
            "expected one coefficient for each."
        )
    if (np.abs(found.sum(1) - 1) > 1e-4).any():
        raise ValueError(
            f"the basis's coefficients at t={at.tolist()} sum to {found.sum(1).tolist()}; expected "
            "1 everywhere."
        )
    return num


@functools.partial(jax.jit, static_argnums=0)
def coefficients(basis: Basis, ts: Any) -> jax.Array:
    """The coefficients at several t: `(m,)` to `(m, n)`."""
    return jax.vmap(basis)(jnp.asarray(ts))


def point(basis: Basis, control_points: PyTree, t: Any) -> PyTree:
    """The point of a curve at t.

    Args:
        basis: From t to `(n,)` coefficients.
        control_points: Stacked points, leaves `(n, ...)`.
        t: A scalar in [0, 1].

    Returns:
        A pytree like one control point; at t=0 and t=1 of `bezier` and `polychain` the first and
        the last to the bit.

    Example:
        >>> point(bezier(2), {"w": jnp.array([[0.0], [4.0]])}, 0.25)
        {'w': Array([1.], dtype=float32)}
    """
    return tree.combine(control_points, basis(jnp.asarray(t, jnp.float32)))


def points(basis: Basis, control_points: PyTree, ts: Any) -> PyTree:
    """The points of a curve at several t, stacked: leaves `(m, ...)`."""
    return tree.combine(control_points, coefficients(basis, jnp.asarray(ts, jnp.float32)))


def initialize(basis: Basis, start: PyTree, end: PyTree, num_points: int | None = None) -> PyTree:
    """Control points on the straight line from `start` to `end`, at equal distances.

    Args:
        basis: Its `num_points` is the number of control points.
        start: The first control point.
        end: The last one.
        num_points: For a basis of your own, which has no such attribute.

    Returns:
        Stacked points; the first and the last are the given ones to the bit.

    Raises:
        ValueError: If the two differ in structure or shapes, naming the leaf; without a number.
    """
    num = getattr(basis, "num_points", None) if num_points is None else num_points
    if num is None:
        raise ValueError("the basis does not say its number of control points; give num_points.")
    tree.check_floating(start, "start")
    tree.check_same(start, end, names=("start", "end"))
    at = jnp.linspace(0, 1, num)
    return tree.combine(tree.stack([start, end]), jnp.stack([1 - at, at], axis=1))


# --------------------------------------------------------------------------- length


class Speed(NamedTuple):
    """How fast a curve runs.

    Attributes:
        ts: `(m + 1,)` from 0 to 1.
        lengths: `(m + 1,)` the length of the curve from 0 to each t, by chords.
    """

    ts: np.ndarray
    lengths: np.ndarray

    def to_t(self, fractions: Any) -> np.ndarray:
        """The t at which these fractions of the whole length are reached."""
        total = self.lengths[-1]
        if total == 0:
            return np.asarray(fractions, np.float64)
        return np.interp(np.asarray(fractions) * total, self.lengths, self.ts)


def speed(basis: Basis, control_points: PyTree, num_steps: int = 1000) -> Speed:
    """The arc length of a curve as a function of t.

    With G the Gram matrix of the control points and d the difference of two coefficient vectors a
    chord has the length sqrt(d^T G d), so the parameters are read once, whatever `num_steps`.

    Args:
        basis: From t to `(n,)` coefficients.
        control_points: Stacked points.
        num_steps: Chords; a polygonal chain is exact where its joints fall on the grid.

    Returns:
        A `Speed`.
    """
    check_basis(basis, control_points)
    inner = gram_of_differences(control_points)
    ts = np.linspace(0, 1, num_steps + 1)
    at = np.asarray(coefficients(basis, ts.astype(np.float32)), np.float64)
    return Speed(ts, chord_lengths(inner, at))


@jax.jit
def gram(control_points: PyTree) -> jax.Array:
    """Inner products of w_i - w_0, `(n - 1, n - 1)`, under `jit`; see `gram_of_differences`."""
    num = tree.num_points(control_points)
    one = jnp.eye(num)
    # Relative to the first point: coefficients of a difference sum to zero.
    moved = [tree.combine(control_points, one[i] - one[0]) for i in range(1, num)]
    rows = [jnp.stack([tree.vdot(a, b) for b in moved]) for a in moved]
    return jnp.stack(rows)


def gram_of_differences(control_points: PyTree) -> np.ndarray:
    """Inner products of w_i - w_0, `(n - 1, n - 1)` in float64, from float32 sums or better."""
    return np.asarray(gram(control_points), np.float64)


def chord_lengths(inner: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The length of the polygon through points with these coefficients, up to each: `(m,)`.

    Args:
        inner: From `gram_of_differences`.
        weights: `(m, n)` coefficients.
    """
    steps = np.diff(np.asarray(weights, np.float64), axis=0)[:, 1:]
    squares = np.einsum("mi,ij,mj->m", steps, inner, steps)
    return np.concatenate([[0.0], np.cumsum(np.sqrt(np.maximum(squares, 0)))])


def chords_passed(lengths: jax.Array, fractions: jax.Array) -> jax.Array:
    """How many chords lie before these fractions of a polygon's length: `(num,)`, with decimals.

    Args:
        lengths: `(m,)` of the chords.
        fractions: `(num,)` in [0, 1].
    """
    lengths = lengths[None]
    # How much of each chord lies before a position: a sum, where a search has no sharding rule.
    past = (fractions * jnp.sum(lengths))[:, None] - (jnp.cumsum(lengths, axis=1) - lengths)
    full = (past >= 0).astype(past.dtype)
    share = jnp.where(lengths > 0, past / jnp.where(lengths > 0, lengths, 1), full)
    return jnp.sum(jnp.clip(share, 0, 1), axis=1)


def length(basis: Basis, control_points: PyTree, num_steps: int = 1000) -> float:
    """The length of a curve in parameter space.

    Args:
        basis: From t to `(n,)` coefficients.
        control_points: Stacked points.
        num_steps: Chords of the approximation, which lies below the length by O(1 / num_steps^2).

    Example:
        >>> length(polychain(3), {"w": jnp.array([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])})
        7.0
    """
    return float(speed(basis, control_points, num_steps).lengths[-1])


def arc_length_ts(basis: Basis, control_points: PyTree, num: int) -> np.ndarray:
    """`num` positions from 0 to 1 at equal distances along the curve."""
    return speed(basis, control_points).to_t(np.linspace(0, 1, _count("num", num, 2)))
