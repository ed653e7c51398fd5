"""Directions to walk in from a point: random ones, and any on the scale of the weights."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from geojax import tree

__all__ = ["Scope", "filter_normalize", "random_direction"]

PyTree = Any
Scope = Literal["filter", "leaf", "layer", "network"]


def is_none(x: Any) -> bool:
    """Whether a place in a direction is left out."""
    return x is None


def check_direction(what: str, direction: PyTree, params: PyTree) -> None:
    """Raise unless a direction is like the parameters, where it is not None."""
    tree.check_floating(direction, f"{what}: the direction")
    whole = jax.tree.structure(params)
    if jax.tree.structure(direction, is_leaf=is_none) == whole:
        params = jax.tree.map(
            lambda d, p: None if d is None else p, direction, params, is_leaf=is_none
        )
    tree.check_same(params, direction, names=("params", "the direction"), dtype=False)


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
    check_direction("filter_normalize", direction, params)
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
    kept = jax.tree.map(lambda d, p: None if d is None else p, direction, params, is_leaf=is_none)
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
