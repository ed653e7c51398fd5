"""Surfaces of low loss between three or four networks: Bezier patches.

A patch is to two coordinates what a curve is to t: coefficients over a stack of control points,
whose corners are the networks. It is trained by the same steps as a curve.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import tree
from geojax._families import split_of
from geojax.curves.bases import Bezier
from geojax.curves.evaluation import measure
from geojax.curves.families import CurveFit, Penalty, settings_of, train

__all__ = [
    "MetricOnPatch",
    "Patch",
    "PatchEvaluation",
    "Square",
    "Triangle",
    "patch_evaluate",
    "patch_fit",
    "patch_initialize",
    "patch_point",
    "patch_points",
    "sample_patch",
    "square",
    "triangle",
]

PyTree = Any
PatchSampler = Literal["uniform", "stratified"]


@dataclasses.dataclass(frozen=True)
class Triangle:
    """B_ijk(u, v, w) = d! / (i! j! k!) u^i v^j w^k over i + j + k = d; its corners are points.

    The control points are in the order of `exponents`: i falls first, then j.
    """

    degree: int

    @property
    def exponents(self) -> tuple[tuple[int, ...], ...]:
        """(i, j, k) of each control point."""
        d = self.degree
        return tuple((i, j, d - i - j) for i in range(d, -1, -1) for j in range(d - i, -1, -1))

    @property
    def num_points(self) -> int:
        """How many control points there are, (d + 1)(d + 2) / 2."""
        return len(self.exponents)

    @property
    def corners(self) -> tuple[int, ...]:
        """The control points that are on the patch for sure, in the order of the coordinates."""
        d = self.degree
        return tuple(self.exponents.index(x) for x in ((d, 0, 0), (0, d, 0), (0, 0, d)))

    @property
    def boundary(self) -> tuple[int, ...]:
        """The control points of the three edges, which are Bezier curves."""
        return tuple(i for i, x in enumerate(self.exponents) if 0 in x)

    def __call__(self, at: Any) -> jax.Array:
        """The coefficients at barycentric coordinates `(3,)`: `(n,)`."""
        at = jnp.asarray(at, jnp.float32) if not hasattr(at, "dtype") else at
        # Powers by products: 0^0 is 1, and so is its derivative where it should be 0.
        powers = [[jnp.ones_like(at[0])] for _ in range(3)]
        for axis, known in enumerate(powers):
            for _ in range(self.degree):
                known.append(known[-1] * at[axis])
        whole = math.factorial(self.degree)
        return jnp.stack(
            [
                (whole // (math.factorial(i) * math.factorial(j) * math.factorial(k)))
                * (powers[0][i] * powers[1][j] * powers[2][k])
                for i, j, k in self.exponents
            ]
        )

    def flat(self) -> np.ndarray:
        """Weights of the corners, `(n, 3)`, for control points in the plane through them."""
        return np.asarray(self.exponents, np.float32) / np.float32(self.degree)

    def grid(self, resolution: int) -> tuple[np.ndarray, np.ndarray]:
        """A lattice of the triangle, `(m, 3)`, and the share of the area of each of its points."""
        lattice = np.asarray(Triangle(resolution).exponents)
        # A vertex belongs to six small triangles inside, to three on an edge, to one at a corner.
        share = np.choose((lattice == 0).sum(1), [6.0, 3.0, 1.0])
        return lattice / resolution, share / share.sum()

    def from_unit_square(self, unit: jax.Array) -> jax.Array:
        """`(..., 2)` uniform in the unit square to `(..., 3)` uniform in the triangle."""
        root = jnp.sqrt(unit[..., 0])
        return jnp.stack([1 - root, root * (1 - unit[..., 1]), root * unit[..., 1]], axis=-1)


@dataclasses.dataclass(frozen=True)
class Square:
    """B_i(x) B_j(y), the products of two Bezier bases; its corners are points.

    Control point (i, j) has the index i (degree_y + 1) + j.
    """

    degree_x: int
    degree_y: int

    @property
    def num_points(self) -> int:
        """How many control points there are."""
        return (self.degree_x + 1) * (self.degree_y + 1)

    @property
    def corners(self) -> tuple[int, ...]:
        """The control points at (0, 0), (0, 1), (1, 0) and (1, 1)."""
        last = self.degree_x * (self.degree_y + 1)
        return (0, self.degree_y, last, last + self.degree_y)

    @property
    def boundary(self) -> tuple[int, ...]:
        """The control points of the four edges, which are Bezier curves."""
        return tuple(
            i * (self.degree_y + 1) + j
            for i in range(self.degree_x + 1)
            for j in range(self.degree_y + 1)
            if i in (0, self.degree_x) or j in (0, self.degree_y)
        )

    def __call__(self, at: Any) -> jax.Array:
        """The coefficients at `(2,)` coordinates in the unit square: `(n,)`."""
        at = jnp.asarray(at, jnp.float32) if not hasattr(at, "dtype") else at
        along_x, along_y = Bezier(self.degree_x + 1)(at[0]), Bezier(self.degree_y + 1)(at[1])
        return (along_x[:, None] * along_y[None, :]).reshape(-1)

    def flat(self) -> np.ndarray:
        """Weights of the corners that make the patch bilinear, `(n, 4)`."""
        x = np.repeat(np.linspace(0, 1, self.degree_x + 1), self.degree_y + 1)
        y = np.tile(np.linspace(0, 1, self.degree_y + 1), self.degree_x + 1)
        weights = [(1 - x) * (1 - y), (1 - x) * y, x * (1 - y), x * y]
        return np.stack(weights, axis=1).astype(np.float32)

    def grid(self, resolution: int) -> tuple[np.ndarray, np.ndarray]:
        """A grid of the square, `(m, 2)`, and the share of the area of each of its points."""
        at = np.linspace(0, 1, resolution + 1)
        share = np.ones(resolution + 1)
        share[[0, -1]] = 0.5
        both = np.outer(share, share).reshape(-1)
        return np.stack(np.meshgrid(at, at, indexing="ij"), -1).reshape(-1, 2), both / both.sum()

    def from_unit_square(self, unit: jax.Array) -> jax.Array:
        """The coordinates themselves."""
        return unit


Patch = Triangle | Square


def _degree(name: str, value: Any) -> int:
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least 1.")
    return int(value)


def triangle(degree: int) -> Triangle:
    """The triangular patch of a degree, over (d + 1)(d + 2) / 2 control points.

    Degree 1 is the flat triangle, 2 has a free control point for each edge, and 3 is the first
    with one inside.

    Example:
        >>> triangle(2)(jnp.array([0.5, 0.5, 0.0])).tolist()
        [0.25, 0.5, 0.0, 0.25, 0.0, 0.0]

    Reference:
        Farin, "Triangular Bernstein-Bezier patches", 1986, section 1.
    """
    return Triangle(_degree("degree", degree))


def square(degree: int, degree_y: int | None = None) -> Square:
    """The tensor-product patch of two degrees, the second like the first by default.

    Example:
        >>> square(1)(jnp.array([0.25, 0.5])).tolist()
        [0.375, 0.375, 0.125, 0.125]
    """
    degree = _degree("degree", degree)
    return Square(degree, degree if degree_y is None else _degree("degree_y", degree_y))


def _check(patch: Patch, control_points: PyTree) -> int:
    num = tree.num_points(control_points)
    if patch.num_points != num:
        raise ValueError(
            f"the patch has {patch.num_points} coefficients and there are {num} control points; "
            "expected one coefficient for each."
        )
    return num


def patch_initialize(patch: Patch, modes: PyTree) -> PyTree:
    """Control points of the flat triangle, or the bilinear square, through given networks.

    Args:
        patch: From `triangle` or `square`.
        modes: Stacked: the three corners of a triangle, or those of a square at (0, 0), (0, 1),
            (1, 0) and (1, 1).

    Returns:
        Stacked points, leaves `(n, ...)`; those at `patch.corners` are the modes to the bit.

    Raises:
        ValueError: If there are more or fewer modes than corners.

    Example:
        >>> patch_initialize(triangle(2), {"w": jnp.array([0.0, 2.0, 4.0])})["w"].tolist()
        [0.0, 1.0, 2.0, 2.0, 3.0, 4.0]
    """
    tree.check_floating(modes, "modes")
    given, wanted = tree.num_points(modes), len(patch.corners)
    if given != wanted:
        raise ValueError(f"there are {given} modes; expected {wanted}, one for each corner.")
    return tree.combine(modes, patch.flat())


@functools.partial(jax.jit, static_argnums=0)
def _coefficients(patch: Patch, at: Any) -> jax.Array:
    return jax.vmap(patch)(at)


def patch_point(patch: Patch, control_points: PyTree, at: Any) -> PyTree:
    """The point of a patch at coordinates `(3,)` or `(2,)`; at a corner the mode to the bit.

    Example:
        >>> flat = patch_initialize(square(1), {"w": jnp.array([0.0, 1.0, 2.0, 3.0])})
        >>> float(patch_point(square(1), flat, [1.0, 0.5])["w"])
        2.5
    """
    _check(patch, control_points)
    return tree.combine(control_points, patch(jnp.asarray(at, jnp.float32)))


def patch_points(patch: Patch, control_points: PyTree, at: Any) -> PyTree:
    """The points of a patch at several coordinates, `(m, 3)` or `(m, 2)`: leaves `(m, ...)`."""
    _check(patch, control_points)
    return tree.combine(control_points, _coefficients(patch, jnp.asarray(at, jnp.float32)))


def sample_patch(key: jax.Array, patch: Patch, num: int, sampler: str = "uniform") -> jax.Array:
    """Positions on a patch, uniform in its coordinates.

    Args:
        key: A typed key.
        patch: From `triangle` or `square`.
        num: How many.
        sampler: "uniform": independent. "stratified": a Latin hypercube, which has one position in
            each of `num` strips of equal area, in two directions.

    Returns:
        `(num, 3)` barycentric coordinates, or `(num, 2)`.

    Raises:
        ValueError: If the sampler is unknown.
    """
    if sampler == "uniform":
        unit = jax.random.uniform(key, (num, 2))
    elif sampler == "stratified":
        key_unit, key_order = jax.random.split(key)
        strip = jnp.arange(num, dtype=jnp.float32)
        strips = jnp.stack([strip, jax.random.permutation(key_order, strip)], axis=1)
        unit = (strips + jax.random.uniform(key_unit, (num, 2))) / num
    else:
        raise ValueError(f"sampler is {sampler!r}; expected 'uniform' or 'stratified'.")
    return patch.from_unit_square(unit)


@dataclasses.dataclass(frozen=True)
class _PatchDraw:
    """Draws of coordinates; equal to its like, so that programs are reused."""

    sampler: Any
    patch: Patch
    reads_points = False

    def __call__(self, key: jax.Array, num: int, points: PyTree) -> jax.Array:
        if isinstance(self.sampler, str):
            return sample_patch(key, self.patch, num, self.sampler)
        return self.sampler(key, num)


def patch_fit(
    loss_fn: Callable[..., Any],
    patch: Patch,
    control_points: PyTree,
    batches: Any,
    optimizer: Any,
    num_steps: int,
    *,
    key: jax.Array,
    fixed: Sequence[int] | None = None,
    sampler: PatchSampler | Callable[[jax.Array, int], jax.Array] = "uniform",
    num_draws: int = 1,
    draws: Literal["sequential", "vmap"] = "sequential",
    weight_decay: float = 0.0,
    penalty: Penalty = "squares",
    evaluate: Callable[[PyTree, int], dict[str, Any]] | None = None,
    evaluate_every: int | None = None,
    **options: Any,
) -> CurveFit:
    r"""Train the free control points of a patch so that the loss is low on all of it.

    .. math:: \min_\theta \; E_x \Big[ L\big(\textstyle\sum_i c_i(x) w_i\big)
        + \tfrac{\lambda}{2} \big\|\sum_i c_i(x) w_i\big\|^2 \Big],

    with x uniform over the coordinates of the triangle or the square, not over the surface's area.
    A step costs one ordinary gradient per draw of x.

    Args:
        loss_fn: As for `curves.fit`.
        patch: From `triangle` or `square`.
        control_points: Stacked points, leaves `(n, ...)`; `patch_initialize` makes them.
        batches: As for `curves.fit`.
        optimizer: As for `curves.fit`.
        num_steps: Optimizer steps.
        key: For x, dropout and augmentation.
        fixed: Indices of the control points that stay; by default `patch.corners`. With
            `patch.boundary` the edges stay as well.
        sampler: How x is drawn, see `sample_patch`; or a function of (key, num) to coordinates.
        num_draws: Draws of x per step, whose losses are averaged.
        draws: As for `curves.fit`.
        weight_decay: Lambda above.
        penalty: As for `curves.fit`.
        evaluate: `(control_points, step) -> dict of numbers`, every `evaluate_every` steps.
        evaluate_every: Steps between evaluations.
        **options: Further options of `geojax.fit.fit`; with `checkpoint` it resumes to the bit.

    Returns:
        A `CurveFit`.

    Raises:
        ValueError: If patch and control points do not fit, or an option is unknown.
        NonFiniteError: As `geojax.fit.fit`.

    Example:
        >>> import optax
        >>> loss = lambda p, batch: jnp.mean((jnp.sum(p["w"] ** 2) - batch) ** 2)
        >>> flat = patch_initialize(triangle(2), {"w": jnp.eye(3)})
        >>> found = patch_fit(loss, triangle(2), flat, jnp.ones(1), optax.sgd(0.1), 200,
        ...                   key=jax.random.key(0), num_draws=4)
        >>> middle = patch_point(triangle(2), found.control_points, [1 / 3, 1 / 3, 1 / 3])
        >>> bool(jnp.sum(middle["w"] ** 2) > 0.9)  # out of the plane, on to the sphere
        True
    """
    tree.check_floating(control_points, "control_points")
    settings = settings_of(num_draws, draws, weight_decay, penalty)
    num = _check(patch, control_points)
    draw = _PatchDraw(sampler, patch)
    found = jax.eval_shape(lambda: _coefficients(patch, draw(key, int(num_draws), None)))
    if found.shape != (num_draws, num):
        raise ValueError(
            f"the sampler's positions have coefficients of shape {found.shape}; expected "
            f"({num_draws}, {num})."
        )
    return train(
        loss_fn,
        patch,
        draw,
        control_points,
        batches,
        optimizer,
        num_steps,
        key=key,
        split=split_of(patch.corners if fixed is None else fixed, num),
        settings=settings,
        index=None,
        over=None,
        evaluate=evaluate,
        options=options | {"evaluate_every": evaluate_every},
    )


class MetricOnPatch(NamedTuple):
    """One metric on a patch.

    Attributes:
        values: `(m,)`.
        corners: Its values at the corners.
        lowest: The least value on the grid.
        highest: The largest.
        mean: The mean over the coordinates, by linear interpolation between grid points.
        at_highest: The coordinates of the largest.
    """

    values: np.ndarray
    corners: np.ndarray
    lowest: float
    highest: float
    mean: float
    at_highest: np.ndarray


class PatchEvaluation(NamedTuple):
    """Metrics on a grid over a patch.

    Attributes:
        at: `(m, 3)` barycentric coordinates, or `(m, 2)`.
        metrics: One `MetricOnPatch` for each metric.
    """

    at: np.ndarray
    metrics: dict[str, MetricOnPatch]


def patch_evaluate(
    metrics_fn: Callable[..., dict[str, jax.Array]],
    patch: Patch,
    control_points: PyTree,
    batches: Any,
    resolution: int = 10,
    **options: Any,
) -> PatchEvaluation:
    """Measure metrics on a grid over a patch, on fixed data in a fixed order.

    Args:
        metrics_fn: As for `curves.evaluate`.
        patch: From `triangle` or `square`.
        control_points: Stacked points.
        batches: One batch or a re-iterable.
        resolution: Grid steps along an edge: (r + 1)(r + 2) / 2 points of a triangle, (r + 1)^2 of
            a square, the corners among them.
        **options: `state_fn`, `states_fn`, `num_at_once`, `weight_fn`, `mesh`, `checkpoint` and
            `progress` of `curves.evaluate`.

    Returns:
        A `PatchEvaluation`. Cost: one pass over the data per grid point; the highest value is that
        of the grid, a lower bound of the patch's.

    Raises:
        ValueError: If patch and control points do not fit, or the resolution is less than 1.

    Example:
        >>> flat = patch_initialize(triangle(1), {"w": jnp.array([0.0, 1.0, 5.0])})
        >>> metrics_fn = lambda params, batch: {"loss": jnp.mean(params["w"] * batch)}
        >>> loss = patch_evaluate(metrics_fn, triangle(1), flat, jnp.ones(2), 4).metrics["loss"]
        >>> round(loss.mean, 5), loss.at_highest.tolist()
        (2.0, [0.0, 0.0, 1.0])
    """
    _check(patch, control_points)
    at, share = patch.grid(_degree("resolution", resolution))
    weights = _coefficients(patch, jnp.asarray(at, jnp.float32))
    found = measure(metrics_fn, control_points, weights, batches, label="patch", **options)
    # A corner of the grid is where one coefficient of the flat patch is one.
    flat = type(patch)(1) if isinstance(patch, Triangle) else Square(1, 1)
    ends = np.asarray(_coefficients(flat, jnp.asarray(at, jnp.float32)))
    corners = [int(ends[:, i].argmax()) for i in range(ends.shape[1])]
    return PatchEvaluation(
        at,
        {
            name: MetricOnPatch(
                values,
                values[corners],
                float(values.min()),
                float(values.max()),
                float(share @ values),
                at[int(values.argmax())],
            )
            for name, values in found.items()
        },
    )
