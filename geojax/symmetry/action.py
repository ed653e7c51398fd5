"""How permutations act on trees, and their algebra.

A permutation is a dictionary from group name to an index array `(*index_sizes, size)`: the new unit
i is the old unit `p[i]`. Where a group carries a sign or a scale per unit, its entry is a
`Monomial`. Every function here is pure, and works under `jit`, `vmap` and `grad`.
"""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from geojax import tree as trees
from geojax.symmetry.spec import (
    Group,
    Leaf,
    PermutationSpec,
    SpecError,
    factors,
    positions,
    segments,
)

__all__ = [
    "Monomial",
    "Permutation",
    "apply",
    "check_permutation",
    "compose",
    "distance",
    "from_matrices",
    "identity",
    "inverse",
    "num_fixed_points",
    "random",
    "select",
    "to_matrices",
]

PyTree = Any


class Monomial(NamedTuple):
    """A permutation whose units are also multiplied: by -1 or 1, or by positive factors.

    The new unit i is `scale[i]` times the old unit `permutation[i]`; a leaf that reads the units is
    divided by it (`Factor.power` says which power of the scale each place takes).
    """

    permutation: jax.Array
    scale: jax.Array


Permutation = Mapping[str, jax.Array | np.ndarray | Monomial]


def identity(spec: PermutationSpec) -> dict[str, np.ndarray]:
    """The permutation that moves nothing.

    Example:
        >>> from geojax.symmetry import Factor
        >>> spec = PermutationSpec((Leaf("['w']", (3,), (Factor("h", 3),)),), (Group("h", 3),))
        >>> identity(spec)["h"].tolist()
        [0, 1, 2]
    """
    return {
        group.name: np.broadcast_to(np.arange(group.size, dtype=np.int32), group.shape).copy()
        for group in spec.groups
    }


def random(key: jax.Array, spec: PermutationSpec) -> dict[str, Any]:
    """A uniformly random element of the symmetry group.

    Signs are fair coins; positive scales are log-normal with unit deviation. The draw of a group
    depends on the key and the group's name alone.

    Args:
        key: A typed key, `jax.random.key(seed)`.
        spec: The symmetry.
    """
    out: dict[str, Any] = {}
    for group in spec.groups:
        own = jax.random.fold_in(key, zlib.crc32(group.name.encode()))
        order_key, sign_key, scale_key = jax.random.split(own, 3)
        order = jax.random.uniform(order_key, group.shape).argsort(-1).astype(jnp.int32)
        if group.kind == "permutation":
            out[group.name] = order
            continue
        scale = jnp.ones(group.shape, jnp.float32)
        if group.kind in ("signed", "signed_scaled"):
            scale = scale * jax.random.rademacher(sign_key, group.shape, jnp.float32)
        if group.kind in ("scaled", "signed_scaled"):
            scale = scale * jnp.exp(jax.random.normal(scale_key, group.shape, jnp.float32))
        out[group.name] = Monomial(order, scale)
    return out


def _order(entry: Any) -> Any:
    return entry.permutation if isinstance(entry, Monomial) else entry


def check_permutation(spec: PermutationSpec, permutation: Permutation) -> None:
    """Raise where a permutation does not fit the spec or is no bijection.

    Under `jit` only names and shapes are looked at.

    Raises:
        SpecError: The sentence names the group, what was expected, and what came.
    """
    missing = [g.name for g in spec.groups if g.name not in permutation]
    extra = [name for name in permutation if name not in {g.name for g in spec.groups}]
    if missing or extra:
        raise SpecError(
            f"the permutation lacks the groups {missing} and has the unknown groups {extra}; "
            "expected one entry per group of the spec."
        )
    for group in spec.groups:
        entry = permutation[group.name]
        order = _order(entry)
        if isinstance(entry, Monomial):
            if group.kind == "permutation":
                raise SpecError(
                    f"group {group.name!r} may only be permuted, but its entry has a scale."
                )
            if jnp.shape(entry.scale) != group.shape:
                raise SpecError(
                    f"the scale of group {group.name!r} has shape {jnp.shape(entry.scale)}; "
                    f"expected {group.shape}."
                )
        if jnp.shape(order) != group.shape or not jnp.issubdtype(order.dtype, jnp.integer):
            raise SpecError(
                f"the entry of group {group.name!r} is {order.dtype}{list(jnp.shape(order))}; "
                f"expected integers of shape {list(group.shape)}."
            )
        if isinstance(order, Tracer):
            continue
        if (np.sort(np.asarray(order), axis=-1) != np.arange(group.size)).any():
            raise SpecError(
                f"the entry of group {group.name!r} is no permutation of 0..{group.size - 1}."
            )


# --------------------------------------------------------------------------- acting on leaves


def apply(spec: PermutationSpec, permutation: Permutation, tree: PyTree) -> PyTree:
    """Permute parameters, or anything that is shaped like them.

    A leaf belongs to the spec's leaf of the same path and shape, or whose path ends its own: so
    gradients, averages, batch statistics, and the states of optax optimizers (`[0].mu['w']`) are
    permuted too. Scalars and keys are passed on; any other leaf without a place in the spec is an
    error, never a silent skip.

    Args:
        spec: The symmetry.
        permutation: One entry per group.
        tree: A pytree whose leaves are named by the spec, all of them or a part.

    Returns:
        A new tree; each leaf keeps its dtype and, on a mesh, its sharding.

    Raises:
        SpecError: If a leaf has no place in the spec or another shape, or the permutation does not
            fit.

    Example:
        >>> from geojax.symmetry import Factor
        >>> spec = PermutationSpec((Leaf("['w']", (3,), (Factor("h", 3),)),), (Group("h", 3),))
        >>> apply(spec, {"h": np.array([2, 0, 1])}, {"w": jnp.array([1.0, 2.0, 3.0])})
        {'w': Array([3., 1., 2.], dtype=float32)}
    """
    check_permutation(spec, permutation)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    out = []
    for path, value in leaves:
        where = jax.tree_util.keystr(path) or "(root)"
        leaf = _leaf_of(spec, where, value)
        if leaf is not None and any(name in permutation for name in leaf.groups()):
            value = trees.placed_like(_permuted(spec, leaf, permutation, value), value)
        out.append(value)
    return jax.tree.unflatten(treedef, out)


def _leaf_of(spec: PermutationSpec, path: str, value: Any) -> Leaf | None:
    leaf = spec.by_path.get(path)
    if leaf is None:
        ends = [x for x in spec.leaves if path.endswith(x.path) or x.path.endswith(path)]
        fitting = [x for x in ends if x.shape == jnp.shape(value)]
        if len({x.axes for x in fitting}) == 1:
            return fitting[0]
        if jnp.ndim(value) == 0 and not fitting:
            return None
        if len(fitting) > 1:
            raise SpecError(
                f"leaf {path} may be any of {[x.path for x in fitting]}; pass the tree under the "
                "paths that the spec has."
            )
        if not ends:
            raise SpecError(
                f"leaf {path} has no place in the spec, whose leaves are "
                f"{', '.join(x.path for x in spec.leaves[:4])} ..."
            )
        leaf = ends[0]
    if leaf.shape != jnp.shape(value):
        raise SpecError(
            f"leaf {path} has shape {jnp.shape(value)}; the spec was made for {leaf.shape}."
        )
    return leaf


def select(
    spec: PermutationSpec, wide: PermutationSpec, permutation: Permutation, tree: PyTree
) -> PyTree:
    """The part of a wider network that a matching with a narrower one has chosen.

    Args:
        spec: The symmetry of the narrower network.
        wide: That of the wider one: the same groups, with at least as many units each.
        permutation: For each group of `spec` the units of the wider network to keep, in their new
            order: each at most once.
        tree: The wider network's parameters, under the paths of `wide`.

    Returns:
        A tree in the narrower network's shapes. It is another function than the wide network,
        which has lost units, and nothing is rescaled.

    Raises:
        SpecError: If the specs do not fit each other, or a unit is chosen twice.
    """
    for group in spec.groups:
        order = np.asarray(_order(permutation[group.name]))
        rows = np.sort(order, axis=-1)
        limit = wide[group.name].size
        if order.shape != group.shape or rows.min() < 0 or rows.max() >= limit:
            raise SpecError(
                f"the entry of group {group.name!r} has shape {order.shape} and values "
                f"{rows.min()}..{rows.max()}; expected {group.shape} below {limit}."
            )
        if (rows[..., 1:] == rows[..., :-1]).any():
            raise SpecError(f"the entry of group {group.name!r} chooses a unit twice.")
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    out = []
    for path, value in leaves:
        where = jax.tree_util.keystr(path) or "(root)"
        source = _leaf_of(wide, where, value)
        if source is None:
            out.append(value)
            continue
        leaf = spec.by_path[source.path]
        out.append(_permuted(spec, leaf, permutation, value, source))
    return jax.tree.unflatten(treedef, out)


def _permuted(
    spec: PermutationSpec,
    leaf: Leaf,
    permutation: Permutation,
    value: Any,
    old: Leaf | None = None,
) -> Any:
    """A leaf moved; `old` is its layout before, where that has more units."""
    value = jnp.asarray(value)
    old = leaf if old is None else old
    moving = [
        [f for f in factors(layout) if f.name in permutation and f.size > 1] for layout in leaf.axes
    ]
    # An axis that another depends on moves first: the dependence is on the new position.
    names = [{f.name for f in factors(layout)} for layout in leaf.axes]
    needs = [
        {
            other
            for f in found
            for i in spec[f.name].index
            for other in range(value.ndim)
            if i not in names[axis] and i in names[other]
        }
        for axis, found in enumerate(moving)
    ]
    waiting = [axis for axis, found in enumerate(moving) if found]
    while waiting:
        axis = next((a for a in waiting if not needs[a] & set(waiting)), None)
        if axis is None:
            raise SpecError(f"the axes of leaf {leaf.path} depend on each other in a circle.")
        waiting.remove(axis)
        outside = {}
        for other in needs[axis]:
            outside |= _coordinates(leaf, other, value.ndim)
        source, scale = _source(spec, leaf, old, axis, permutation, outside)
        value = _taken(value, source, axis)
        if scale is not None:
            value = value * scale.astype(value.dtype)
    return value


def _taken(value: Any, source: Any, axis: int) -> Any:
    """`value` gathered along an axis, in the sharding that it had."""
    explicit = trees.explicit_sharding(value)
    if explicit is not None:  # a gather along a sharded axis has no sharding type of its own
        spec = [*explicit.spec, *[None] * (value.ndim - len(explicit.spec))]
        if source.size > source.shape[axis]:
            spec = [None] * value.ndim
        spec[axis] = None
        whole = NamedSharding(explicit.mesh, PartitionSpec(*spec))
        value = jax.sharding.reshard(value, whole)
    if source.size == source.shape[axis]:  # it depends on no other axis
        moved = value.at[(slice(None),) * axis + (source.reshape(-1),)]
        moved = moved.get(mode="clip", out_sharding=None if explicit is None else whole)
    else:
        moved = jnp.take_along_axis(value, source, axis=axis, mode="clip")
    return moved if explicit is None else jax.sharding.reshard(moved, explicit)


def _coordinates(leaf: Leaf, axis: int, ndim: int) -> dict[str, Any]:
    """The coordinate of each named factor at each position of an axis, shaped to broadcast."""
    (segment,) = segments(leaf.axes[axis])
    where = np.unravel_index(np.arange(leaf.shape[axis]), [f.size for f in segment])
    shape = [-1 if a == axis else 1 for a in range(ndim)]
    return {f.name: x.reshape(shape) for f, x in zip(segment, where, strict=True) if f.name}


def _source(
    spec: PermutationSpec,
    leaf: Leaf,
    old: Leaf,
    axis: int,
    permutation: Permutation,
    outside: dict[str, Any],
) -> tuple[Any, Any]:
    """Where each position of an axis comes from, and its factor; over the axes it depends on."""
    ndim = len(leaf.shape)
    shape = [-1 if a == axis else 1 for a in range(ndim)]
    sources, scales, scaled = [], [], False
    places = positions(leaf.axes[axis])
    for segment, place, segment_old, place_old in zip(
        segments(leaf.axes[axis]),
        places,
        segments(old.axes[axis]),
        positions(old.axes[axis]),
        strict=True,
    ):
        sizes = [f.size for f in segment]
        here = np.unravel_index(np.arange(len(place)), sizes)
        inside = outside | {
            f.name: x.reshape(shape) for f, x in zip(segment, here, strict=True) if f.name
        }
        total, scale = 0, jnp.ones((1,) * ndim, jnp.float32)
        for factor, factor_old, own in zip(segment, segment_old, here, strict=True):
            own = own.reshape(shape)
            if factor.name in permutation:
                entry = permutation[factor.name]
                at = (*(inside[i] for i in spec[factor.name].index), own)
                own = jnp.asarray(_order(entry))[at]
                if isinstance(entry, Monomial) and factor.power:
                    scale = scale * jnp.asarray(entry.scale)[at] ** factor.power
                    scaled = True
            total = total * factor_old.size + own
        sources.append(jnp.asarray(place_old, jnp.int32)[total])
        scales.append(scale)
    if len(sources) == 1:
        return sources[0], scales[0] if scaled else None
    back = np.argsort(np.concatenate(places))
    joined = [_joined(x, axis, places, back) for x in (sources, scales)]
    return joined[0], joined[1] if scaled else None


def _joined(parts: list[Any], axis: int, places: list[np.ndarray], back: np.ndarray) -> Any:
    shape = np.broadcast_shapes(
        *(tuple(1 if a == axis else n for a, n in enumerate(part.shape)) for part in parts)
    )
    full = [
        jnp.broadcast_to(part, (*shape[:axis], len(place), *shape[axis + 1 :]))
        for part, place in zip(parts, places, strict=True)
    ]
    return jnp.take(jnp.concatenate(full, axis), back, axis=axis)


# --------------------------------------------------------------------------- algebra


def _outer(spec: PermutationSpec, permutation: Permutation, group: Group) -> tuple[Any, ...]:
    """For each position of a group's index, the old position of that index."""
    grid: list[Any] = list(np.indices(group.index_sizes)) if group.index else []
    out = []
    for i, name in enumerate(group.index):
        if name not in permutation:
            out.append(grid[i])
            continue
        own = spec[name]
        at = tuple(grid[group.index.index(j)] for j in own.index)
        out.append(jnp.asarray(_order(permutation[name]))[(*at, grid[i])])
    return tuple(out)


def compose(spec: PermutationSpec, first: Permutation, second: Permutation) -> dict[str, Any]:
    """The permutation that acts as `second`, then `first`.

    `apply(spec, compose(spec, p, q), x)` equals `apply(spec, p, apply(spec, q, x))`.
    """
    check_permutation(spec, first)
    check_permutation(spec, second)
    out: dict[str, Any] = {}
    for group in spec.groups:
        p, q = first[group.name], second[group.name]
        outer = tuple(x[..., None] for x in _outer(spec, first, group))
        order = jnp.asarray(_order(p))
        out[group.name] = jnp.asarray(_order(q))[(*outer, order)]
        if isinstance(p, Monomial) or isinstance(q, Monomial):
            scale = jnp.ones(group.shape, jnp.float32)
            if isinstance(q, Monomial):
                scale = scale * jnp.asarray(q.scale)[(*outer, order)]
            if isinstance(p, Monomial):
                scale = scale * jnp.asarray(p.scale)
            out[group.name] = Monomial(out[group.name], scale)
    return out


def inverse(spec: PermutationSpec, permutation: Permutation) -> dict[str, Any]:
    """The permutation that undoes another."""
    check_permutation(spec, permutation)
    out: dict[str, Any] = {}
    for group in spec.groups:
        entry = permutation[group.name]
        back = jnp.argsort(jnp.asarray(_order(entry)), axis=-1).astype(jnp.int32)
        scale = entry.scale if isinstance(entry, Monomial) else None
        if group.index:
            # Undone at the index position that the forward map moved away.
            outer = _outer(spec, out, group)
            back = back[outer]
            scale = None if scale is None else jnp.asarray(scale)[outer]
        if scale is not None:
            scale = 1 / jnp.take_along_axis(jnp.asarray(scale), back, axis=-1)
        out[group.name] = back if scale is None else Monomial(back, scale)
    return out


def to_matrices(permutation: Permutation) -> dict[str, jax.Array]:
    """Each group as matrices `(*index_sizes, n, n)` with entry (i, p[i]) one, or the scale of i.

    The new units are the matrix times the old.
    """
    out = {}
    for name, entry in permutation.items():
        order = jnp.asarray(_order(entry))
        matrix = jax.nn.one_hot(order, order.shape[-1])
        out[name] = matrix * entry.scale[..., None] if isinstance(entry, Monomial) else matrix
    return out


def from_matrices(spec: PermutationSpec, matrices: Mapping[str, Any]) -> dict[str, Any]:
    """The permutation of matrices `(*index_sizes, n, n)` with one nonzero entry per row.

    Raises:
        SpecError: If a matrix has another entry than one per row and column.
    """
    out: dict[str, Any] = {}
    for group in spec.groups:
        matrix = np.asarray(matrices[group.name])
        nonzero = matrix != 0
        if (nonzero.sum(-1) != 1).any() or (nonzero.sum(-2) != 1).any():
            raise SpecError(
                f"the matrix of group {group.name!r} has rows or columns without exactly one "
                "nonzero entry; round it with geojax.assignment.solve first."
            )
        order = nonzero.argmax(-1).astype(np.int32)
        scale = matrix.sum(-1).astype(np.float32)
        plain = group.kind == "permutation" and (scale == 1).all()
        out[group.name] = order if plain else Monomial(jnp.asarray(order), jnp.asarray(scale))
    check_permutation(spec, out)
    return out


def num_fixed_points(permutation: Permutation) -> dict[str, int]:
    """How many units of each group stay in their place."""
    out = {}
    for name, entry in permutation.items():
        order = np.asarray(_order(entry))
        out[name] = int((order == np.arange(order.shape[-1])).sum())
    return out


def distance(first: Permutation, second: Permutation) -> dict[str, float]:
    """The share of units of each group that two permutations send elsewhere (Hamming).

    Example:
        >>> distance({"h": np.array([0, 1, 2, 3])}, {"h": np.array([0, 1, 3, 2])})
        {'h': 0.5}
    """
    if first.keys() != second.keys():
        raise SpecError(f"the groups differ: {sorted(first)} and {sorted(second)}.")
    return {
        name: float((np.asarray(_order(first[name])) != np.asarray(_order(second[name]))).mean())
        for name in first
    }
