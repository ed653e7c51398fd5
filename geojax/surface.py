"""Loss and other metrics along lines through weight space, and directions to walk in.

A direction is a pytree like the parameters: an eigenvector, a random one, a difference of points.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from geojax import batches as batches_
from geojax import progress as progress_
from geojax import tree

__all__ = [
    "Barrier",
    "Line",
    "Scope",
    "along",
    "barrier",
    "filter_normalize",
    "line",
    "random_direction",
]

PyTree = Any
Scope = Literal["filter", "leaf", "layer", "network"]


class Line(NamedTuple):
    """Metrics along the straight line through two points, or through one along a direction.

    Attributes:
        ts: `(n,)`, positions: 0 is the first point, 1 the second (for `along`, the point one
            direction further).
        values: Dict of `(n,)` arrays, one for each metric.
        distance: Euclidean distance between the two points: a position times this is a distance.
    """

    ts: np.ndarray
    values: dict[str, np.ndarray]
    distance: float


class Barrier(NamedTuple):
    r"""How far a metric rises above the chord between the two ends.

    Attributes:
        height: :math:`\max_t L(t) - ((1 - t) L(0) + t L(1))`, at least 0 where the ends are on the
            grid.
        t: Where that maximum is.
        start: The metric at the first end.
        end: The metric at the second end.
        highest: The largest value on the grid.
    """

    height: float
    t: float
    start: float
    end: float
    highest: float


def barrier(ts: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray) -> Barrier:
    """The barrier of one metric along a path from t=0 to t=1.

    Args:
        ts: `(n,)`, ascending, from 0 to 1.
        values: `(n,)`, the metric there.

    Raises:
        ValueError: If the shapes differ, the ends are missing or a value is not finite: the height
            would be that of another path.

    Example:
        >>> barrier([0.0, 0.5, 1.0], [1.0, 3.0, 2.0]).height
        1.5

    Reference:
        Entezari et al., The Role of Permutation Invariance in Linear Mode Connectivity of Neural
        Networks, 2022, definition 2. Garipov et al. and Ainsworth et al. subtract the mean of the
        ends instead: `highest - (start + end) / 2`.
    """
    ts, values = np.asarray(ts, np.float64), np.asarray(values, np.float64)
    if ts.ndim != 1 or ts.shape != values.shape:
        raise ValueError(
            f"barrier: ts have shape {ts.shape} and values {values.shape}; expected (n,)."
        )
    if len(ts) < 2 or ts[0] != 0 or ts[-1] != 1 or (np.diff(ts) <= 0).any():
        raise ValueError("barrier: ts must ascend from 0 to 1, both ends included.")
    if not np.isfinite(values).all():
        where = ts[~np.isfinite(values)][0]
        raise ValueError(f"barrier: the value at t={where} is not finite.")
    above = values - ((1 - ts) * values[0] + ts * values[-1])
    top = int(np.argmax(above))
    return Barrier(
        float(above[top]), float(ts[top]), float(values[0]), float(values[-1]), float(values.max())
    )


def line(
    metrics_fn: Callable[..., dict[str, jax.Array]],
    params_a: PyTree,
    params_b: PyTree,
    batches: Any,
    ts: Sequence[float] | np.ndarray | jax.Array,
    *,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    progress: bool | None = None,
) -> Line:
    """Metrics along the straight segment (1 - t) a + t b.

    Args:
        metrics_fn: `(params, batch)` to a dict of scalars that are means over the batch; with
            `state_fn`, `(params, state, batch)`.
        params_a: The point at t=0.
        params_b: The point at t=1, of the same structure.
        batches: One batch or a re-iterable.
        ts: `(n,)` positions; values outside [0, 1] extrapolate.
        state_fn: From the parameters at a position to the state there. A network with BatchNorm
            needs it: `lambda params: statistics.refresh(apply_fn, params, state, batches)`.
        weight_fn: Weight of a batch; by default its number of examples.
        mesh: Split each batch over this mesh's first axis.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        A `Line` in the order of `ts`. Cost: n passes over the data; memory: three points.

    Raises:
        ValueError: If the two points differ in structure or shapes, naming the leaf; if `ts` is
            empty or not one-dimensional.
        TypeError: If a leaf is not floating.
    """
    ts = _positions("line", "ts", ts)
    points = tree.stack([params_a, params_b])
    distance = tree.norm(tree.axpy(-1.0, params_a, params_b))
    at = jax.jit(tree.combine)
    values = _walk(
        "line",
        lambda t: at(points, jnp.array([1.0 - t, t], jnp.float32)),
        ts,
        batches_.mean(metrics_fn, batches, weight_fn=weight_fn, mesh=mesh),
        state_fn,
        progress,
    )
    return Line(ts, values, float(distance))


def along(
    metrics_fn: Callable[..., dict[str, jax.Array]],
    params: PyTree,
    direction: PyTree,
    distances: Sequence[float] | np.ndarray | jax.Array,
    batches: Any,
    *,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    progress: bool | None = None,
) -> Line:
    r"""Metrics along a direction from one point: at :math:`\theta + a d` for distances a.

    Along a unit eigenvector of the Hessian with eigenvalue :math:`\lambda`, the loss is
    :math:`L(\theta) + \tfrac12 \lambda a^2` from a stationary point, to third order in a. The
    direction is taken at the length that it has: a is a distance where that is 1, as for the rows
    of `tree.unstack(pairs.eigenvectors)`, and a multiple of the weights' own scale after
    `filter_normalize`.

    Args:
        metrics_fn: As for `line`.
        params: The point at a = 0.
        direction: A pytree like `params`, in any floating dtype. Leaves that are None, as in the
            eigenvectors of some selected parameters, stay where they are.
        distances: `(n,)`, signed.
        batches: One batch or a re-iterable.
        state_fn: As for `line`.
        weight_fn: As for `line`.
        mesh: As for `line`.
        progress: As for `line`.

    Returns:
        A `Line` in the order of `distances`, which are its `ts`; its `distance` is the direction's
        length. Each point is rounded to the dtypes of `params`, so steps below their spacing go
        nowhere. Cost: n passes over the data, one program; memory: three points.

    Raises:
        ValueError: If the direction is of another structure or shape, naming the leaf, or its
            length is zero or not finite; if `distances` is empty or not one-dimensional.
        TypeError: If a leaf is not floating.

    Example:
        >>> loss = lambda params, batch: {"loss": jnp.mean((batch["x"] @ params["w"]) ** 2)}
        >>> params, direction = {"w": jnp.zeros(2)}, {"w": jnp.array([0.0, 1.0])}
        >>> data = {"x": jnp.array([[1.0, 2.0]])}
        >>> along(loss, params, direction, [-1.0, 0.0, 0.5], data).values["loss"].tolist()
        [4.0, 0.0, 1.0]
    """
    distances = _positions("along", "distances", distances)
    tree.check_floating(params, "params")
    _check_direction("along", direction, params)
    length = float(tree.norm(direction))
    if not (np.isfinite(length) and length > 0):
        raise ValueError(f"along: the length of the direction is {length}; expected one to follow.")
    values = _walk(
        "along",
        lambda a: _moved(params, direction, a),
        distances,
        batches_.mean(metrics_fn, batches, weight_fn=weight_fn, mesh=mesh),
        state_fn,
        progress,
    )
    return Line(distances, values, length)


@jax.jit
def _moved(params: PyTree, direction: PyTree, a: Any) -> PyTree:
    return jax.tree.map(
        lambda d, p: p if d is None else tree.axpy(a, d, p), direction, params, is_leaf=_is_none
    )


def _is_none(x: Any) -> bool:
    return x is None


def _positions(what: str, name: str, given: Any) -> np.ndarray:
    out = np.asarray(given, np.float64)
    if out.ndim != 1 or not len(out):
        raise ValueError(
            f"{what}: {name} have shape {out.shape}; expected (n,), at least one position."
        )
    return out


def _check_direction(what: str, direction: PyTree, params: PyTree) -> None:
    """Raise unless a direction is like the parameters, where it is not None."""
    tree.check_floating(direction, f"{what}: the direction")
    whole = jax.tree.structure(params)
    if jax.tree.structure(direction, is_leaf=_is_none) == whole:
        params = jax.tree.map(
            lambda d, p: None if d is None else p, direction, params, is_leaf=_is_none
        )
    tree.check_same(params, direction, names=("params", "the direction"), dtype=False)


def _walk(what, at, positions, averaged, state_fn, progress) -> dict[str, np.ndarray]:
    """The metrics at each position, fetched at the end; the host runs one point ahead."""
    rows = []
    with progress_.bar(len(positions), what, show=progress) as bar:
        for i, t in enumerate(positions):
            params = at(t)
            extra = () if state_fn is None else (state_fn(params),)
            rows.append(averaged(params, *extra))
            if i:
                jax.block_until_ready(rows[i - 1])
            bar(i + 1)
    fetched = jax.device_get(rows)
    if not isinstance(fetched[0], dict) or any(np.ndim(x) for x in fetched[0].values()):
        raise TypeError(f"{what}: metrics_fn must return a dict of scalars.")
    return {name: np.array([row[name] for row in fetched], np.float64) for name in fetched[0]}


def filter_normalize(
    direction: PyTree,
    params: PyTree,
    *,
    scope: Scope = "filter",
    vectors: Literal["zero", "scale"] = "zero",
    filter_axis: int = -1,
) -> PyTree:
    r"""A direction on the scale of the weights: each group as long as the weights it would move.

    :math:`d_g \leftarrow \|\theta_g\|\, d_g / \|d_g\|` for each group g. A network whose layers are
    followed by normalisation, or by rectifiers that the next layer can undo, computes the same when
    a filter is scaled; without this, the same step is long for small filters and short for large
    ones, and sharpness along random directions says little.

    It differs from the original code in that nothing is added to the norms they are divided by (a
    group whose direction is zero stays zero), in the axis of the filters (flax keeps outputs last,
    PyTorch first), and in that vectors that are kept are scaled rather than replaced by the weights
    themselves. Its scope 'layer' is 'leaf' here.

    Args:
        direction: A pytree like `params`; leaves may be None.
        params: The point it starts from.
        scope: What a group is. 'filter': the weights into one unit or channel, a slice of a leaf
            along `filter_axis`; 'leaf': a whole array; 'layer': the leaves whose paths differ in
            the last key alone, as kernel and bias; 'network': all together.
        vectors: What happens to biases and normalisation parameters, the leaves of fewer than two
            axes: 'zero' leaves them where they are and out of the groups' norms; 'scale' makes each
            as long as its weights (or joins it to its group, for 'layer' and 'network').
        filter_axis: The axis over the outputs: -1 for flax kernels, 0 for weights from PyTorch.

    Returns:
        The direction, in its own dtypes. Pure: it works under `jit` and `vmap`.

    Raises:
        ValueError: If structures or shapes differ, naming the leaf; for an unknown option.
        TypeError: If a leaf is not floating.

    Example:
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]]), "bias": jnp.ones(2)}
        >>> direction = {"kernel": jnp.array([[1.0, 2.0], [0.0, 0.0]]), "bias": jnp.ones(2)}
        >>> out = filter_normalize(direction, params)
        >>> out["kernel"].tolist(), out["bias"].tolist()
        ([[5.0, 1.0], [0.0, 0.0]], [0.0, 0.0])

    Reference:
        Li, Xu, Taylor, Studer and Goldstein, Visualizing the Loss Landscape of Neural Nets, 2018,
        section 4.
    """
    if scope not in get_args(Scope):
        raise ValueError(f"scope is {scope!r}; expected one of {', '.join(get_args(Scope))}.")
    if vectors not in ("zero", "scale"):
        raise ValueError(f"vectors is {vectors!r}; expected 'zero' or 'scale'.")
    _check_direction("filter_normalize", direction, params)
    if scope == "filter":
        for path, leaf in zip(tree.paths(direction), jax.tree.leaves(direction), strict=True):
            if jnp.ndim(leaf) > 1 and not -jnp.ndim(leaf) <= filter_axis < jnp.ndim(leaf):
                raise ValueError(
                    f"filter_axis is {filter_axis}, and leaf {path} has {jnp.ndim(leaf)} axes."
                )
    return _normalized(direction, params, scope, vectors, filter_axis)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _normalized(direction, params, scope, vectors, filter_axis):
    leaves, treedef = jax.tree_util.tree_flatten_with_path(direction)
    kept = jax.tree.map(lambda d, p: None if d is None else p, direction, params, is_leaf=_is_none)
    groups: dict[Any, list] = {}
    out: list[Any] = [None] * len(leaves)
    for i, ((path, d), p) in enumerate(zip(leaves, jax.tree.leaves(kept), strict=True)):
        d, p = jnp.asarray(d), jnp.asarray(p)
        if d.ndim < 2 and vectors == "zero":
            out[i] = jnp.zeros_like(d)
        elif scope == "filter" and d.ndim >= 2:
            axes = tuple(a for a in range(d.ndim) if a != filter_axis % d.ndim)
            out[i] = _resized(d, _norm_over(d, axes), _norm_over(p, axes))
        else:
            group = {"layer": path[:-1] or path, "network": ()}.get(scope, path)
            groups.setdefault(group, []).append((i, d, p))
    for members in groups.values():
        now, wanted = tree.norm([d for _, d, _ in members]), tree.norm([p for *_, p in members])
        for i, d, _ in members:
            out[i] = _resized(d, now, wanted)
    return jax.tree.unflatten(treedef, out)


def _norm_over(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Norms over some axes, which are kept; of scaled entries, so that no square vanishes."""
    x = x.astype(tree.accumulation_dtype(x))
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    unit = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    return unit * jnp.sqrt(jnp.sum(jnp.square(x / unit), axis=axes, keepdims=True))


def _resized(d: jax.Array, now: jax.Array, wanted: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(now.dtype, wanted.dtype)
    safe = jnp.where(now > 0, now, jnp.ones_like(now)).astype(dtype)
    return (d.astype(dtype) / safe * wanted.astype(dtype)).astype(d.dtype)


def random_direction(
    key: jax.Array,
    params: PyTree,
    *,
    scope: Scope | None = "filter",
    vectors: Literal["zero", "scale"] = "zero",
    filter_axis: int = -1,
) -> PyTree:
    """A random direction to walk in, on the scale of the weights or of unit length.

    Args:
        key: A typed key. The numbers depend on it and on the leaves' paths, not on the sharding.
        params: The point it starts from.
        scope: As for `filter_normalize`; None for a uniformly random direction of length 1, to
            compare with an eigenvector.
        vectors: As for `filter_normalize`; without a scope all leaves take part.
        filter_axis: As for `filter_normalize`.

    Returns:
        A pytree like `params`.

    Raises:
        TypeError: If a leaf is not floating, naming it.
        ValueError: For an unknown option.

    Example:
        >>> direction = random_direction(jax.random.key(0), {"w": jnp.ones((3, 2))}, scope=None)
        >>> round(float(tree.norm(direction)), 6)
        1.0
    """
    direction = tree.random_like(key, params)
    if scope is None:
        return _unit(direction)
    return filter_normalize(
        direction, params, scope=scope, vectors=vectors, filter_axis=filter_axis
    )


@jax.jit
def _unit(direction: PyTree) -> PyTree:
    length = tree.norm(direction)
    return jax.tree.map(
        lambda d: _resized(d, length, jnp.ones_like(length)) if d.size else d, direction
    )
