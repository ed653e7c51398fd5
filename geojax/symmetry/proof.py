"""Is a spec true, and is it whole: both asked of the function itself, in numbers.

Fresh networks have zero biases and unit scales, which hide most mistakes; so parameters are made
generic before anything is compared.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import tree
from geojax.symmetry import action
from geojax.symmetry.spec import (
    Layout,
    Leaf,
    PermutationSpec,
    SpecError,
    factors,
    layout_size,
    positions,
    segments,
)
from geojax.symmetry.trace import fixed_places

__all__ = ["CheckReport", "Missed", "check", "completeness"]

PyTree = Any


class CheckReport(NamedTuple):
    """What `check` measured; changes are relative to the largest entry of each output.

    Attributes:
        changes: For each group, how much a random permutation of it alone changes the outputs.
        joint: The same for all groups together.
        controls: For each group, the change when one of its leaves is permuted and the others are
            not: what a mistake would look like. NaN for a group with one leaf. Where a control is
            not well above `rtol` the test had no power over that group.
        rtol: The largest change that was accepted.
    """

    changes: dict[str, float]
    joint: float
    controls: dict[str, float]
    rtol: float


class Missed(NamedTuple):
    """A permutation that leaves the outputs as they are and that the spec does not have.

    Attributes:
        places: The (leaf path, axis) pairs that move together.
        size: The number of units.
        change: The relative change of the outputs.
    """

    places: tuple[tuple[str, int], ...]
    size: int
    change: float


def check(
    spec: PermutationSpec,
    apply_fn: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    key: jax.Array,
    rtol: float = 1e-5,
) -> CheckReport:
    """Prove in numbers that a spec's permutations leave a function's outputs as they are.

    Parameters are perturbed first, so that no bias is zero and no scale is one; then one random
    permutation per group, and one of all groups, is applied. A wrong spec passes with probability
    zero but for what the inputs cannot show (`CheckReport.controls`): a group of two units, whose
    random permutation may be the identity, is always swapped.

    Args:
        spec: The spec, derived or written by hand.
        apply_fn: The function that it is a spec of.
        params: Concrete parameters.
        *inputs: Concrete inputs. Those of floating type whose entries are all equal are drawn anew.
        key: A typed key.
        rtol: The largest accepted change, relative to the largest entry of each output. The default
            suits float32 unless the outputs nearly cancel; 1e-12 suits float64.

    Returns:
        The measured changes.

    Raises:
        SpecError: If the spec and the parameters differ in leaves or shapes; or if a permutation
            changes the outputs: the sentence names the group, its leaves and the change.

    Example:
        >>> from geojax.symmetry import permutation_spec
        >>> def mlp(params, x):
        ...     return jnp.tanh(x @ params["w"]) @ params["v"]
        >>> params = {"w": jnp.ones((3, 8)), "v": jnp.ones((8, 2))}
        >>> x = jnp.ones((5, 3))
        >>> spec = permutation_spec(mlp, params, x)
        >>> report = check(spec, mlp, params, x, key=jax.random.key(0))
        >>> report.joint <= 1e-5 < report.controls["w:1"]
        True
    """
    _check_leaves(spec, params)
    draw_key, input_key, permutation_key = jax.random.split(key, 3)
    params = generic(params, draw_key)
    inputs = _informative(inputs, input_key)
    before = _outputs(apply_fn, params, inputs)
    random = np.random.default_rng(np.asarray(jax.random.key_data(permutation_key)).tolist())
    moved: dict[str, Any] = {}
    for name, entry in action.random(permutation_key, spec).items():
        moved[name] = _orders(random, spec[name].shape)
        if isinstance(entry, action.Monomial):
            moved[name] = action.Monomial(jnp.asarray(moved[name]), entry.scale)
    changes: dict[str, float] = {}
    controls: dict[str, float] = {}
    for group in spec.groups:
        permuted = _applied(spec, {group.name: moved[group.name]}, params)
        changes[group.name] = _change(before, _outputs(apply_fn, permuted, inputs))
        if not changes[group.name] <= rtol:
            places = ", ".join(f"{path} axis {axis}" for path, axis in spec.members(group.name))
            raise SpecError(
                f"group {group.name!r} is no symmetry: permuting it changes the outputs by "
                f"{changes[group.name]:.2g}, more than {rtol:.2g}. It acts on {places}; one of "
                "these is wrong, or a leaf that should move with them is missing."
            )
        paths = list(dict.fromkeys(path for path, _ in spec.members(group.name)))
        controls[group.name] = float("nan")
        if len(paths) > 1:
            partial = _with_leaf(params, permuted, paths[-1])
            controls[group.name] = _change(before, _outputs(apply_fn, partial, inputs))
    joint = _change(before, _outputs(apply_fn, _applied(spec, moved, params), inputs))
    if not joint <= rtol:
        raise SpecError(
            f"each group of the spec passes alone, but permuting all of them changes the outputs "
            f"by {joint:.2g}, more than {rtol:.2g}; groups that share a leaf are at odds."
        )
    return CheckReport(changes, joint, controls, rtol)


def completeness(
    spec: PermutationSpec,
    apply_fn: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    key: jax.Array,
    rtol: float = 1e-5,
) -> list[Missed]:
    """Symmetries that a spec lacks, as far as trying finds them.

    Tried are the parts of axes that the spec leaves in place: each alone; all that the function's
    jaxpr shows to be one axis; and all that are one axis but for an operation that had to fix it,
    such as a primitive without a rule. What moves inputs or outputs is no candidate, nor is what
    the function does not read. Not found are symmetries of a part of an axis, permutations that
    could depend on another axis and do not, and sets of axes that the jaxpr does not connect.

    Args:
        spec: The spec.
        apply_fn: The function that it is a spec of.
        params: Concrete parameters; perturbed as by `check`.
        *inputs: Concrete inputs.
        key: A typed key.
        rtol: The largest change, relative to the largest entry of each output, that counts as none.

    Returns:
        One entry per symmetry found; an empty list for a spec that lacks none of these.
    """
    _check_leaves(spec, params)
    draw_key, input_key = jax.random.split(key)
    params = generic(params, draw_key)
    inputs = _informative(inputs, input_key)
    before = _outputs(apply_fn, params, inputs)
    leaves, treedef = jax.tree.flatten(params)
    number = {path: i for i, path in enumerate(tree.paths(params))}
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    out: list[Missed] = []
    for places in fixed_places(apply_fn, params, *inputs):
        size = next(f.size for f in factors(places[0][2]) if f.name == "#")
        order = _orders(random, (size,))
        sources = [_source(layout, "#", order) for _, _, layout in places]
        if _known(spec, places, sources, order):
            continue
        moved = list(leaves)
        for (path, axis, _), source in zip(places, sources, strict=True):
            moved[number[path]] = np.take(np.asarray(moved[number[path]]), source, axis)
        change = _change(before, _outputs(apply_fn, jax.tree.unflatten(treedef, moved), inputs))
        if change <= rtol:
            out.append(Missed(tuple((path, axis) for path, axis, _ in places), size, change))
    return out


def _known(
    spec: PermutationSpec,
    places: list[tuple[str, int, Layout]],
    sources: list[np.ndarray],
    order: np.ndarray,
) -> bool:
    """Whether a group of the spec makes these moves."""
    for group in spec.groups:
        if group.size == len(order) and all(
            np.array_equal(_source(spec.by_path[path].axes[axis], group.name, order), source)
            for (path, axis, _), source in zip(places, sources, strict=True)
        ):
            return True
    return False


def _source(layout: Layout, name: str, order: np.ndarray) -> np.ndarray:
    """Where each position of an axis comes from if the factors of a name are reordered."""
    source = np.arange(layout_size(layout))
    for segment, where in zip(segments(layout), positions(layout), strict=True):
        grid = where.reshape([factor.size for factor in segment])
        for i, factor in enumerate(segment):
            if factor.name == name:
                grid = grid.take(order, i)
        source[where] = grid.reshape(-1)
    return source


def generic(params: PyTree, key: jax.Array) -> PyTree:
    """Parameters without zeros, ones and ties, of about the same size.

    What is positive everywhere (scales, variances) is multiplied by log-normal factors and stays
    positive; anything else has noise of half its own root mean square added, or of 0.05 if that is
    less. Leaves that are not floating stay.
    """

    def drawn(leaf: Any, noise: np.ndarray) -> np.ndarray:
        leaf = np.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        wide = leaf.astype(np.float64)
        if leaf.size and wide.min() > 0:
            return (wide * np.exp(0.3 * noise)).astype(leaf.dtype)
        spread = max(0.1, float(np.sqrt(np.mean(wide**2))) if leaf.size else 0.0)
        return (wide + 0.5 * spread * noise).astype(leaf.dtype)

    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    leaves, treedef = jax.tree.flatten(params)
    out = []
    for leaf in leaves:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                "the parameters are shapes only; expected concrete arrays, since the function is "
                "evaluated. Any initialization will do."
            )
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            out.append(leaf)
            continue
        out.append(
            tree.placed_like(jnp.asarray(drawn(leaf, random.standard_normal(np.shape(leaf)))), leaf)
        )
    return jax.tree.unflatten(treedef, out)


def _informative(inputs: tuple[Any, ...], key: jax.Array) -> tuple[Any, ...]:
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())

    def informative(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError("the inputs are shapes only; expected concrete arrays.")
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        values = np.asarray(leaf)
        if values.size < 2 or (values != values.flat[0]).any():
            return leaf
        drawn = random.standard_normal(values.shape).astype(values.dtype)
        return tree.placed_like(jnp.asarray(drawn), leaf)

    return jax.tree.map(informative, inputs)


def _orders(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random cycles through all units, so that none stays in its place."""
    out = np.empty((int(np.prod(shape[:-1])), shape[-1]), np.int32)
    for row in out:
        cycle = random.permutation(shape[-1])
        row[cycle] = np.roll(cycle, 1)
    return out.reshape(shape)


@functools.partial(jax.jit, static_argnums=0)
def _outputs(apply_fn: Callable[..., Any], params: PyTree, inputs: tuple[Any, ...]) -> PyTree:
    # Low-precision products would drown what is to be seen.
    with jax.default_matmul_precision("highest"):
        return apply_fn(params, *inputs)


def _applied(spec: PermutationSpec, permutation: action.Permutation, params: PyTree) -> PyTree:
    """What `action.apply` does, in NumPy: for one use each, compiling the gathers costs more.

    Groups without an entry stay in place.
    """
    leaves, treedef = jax.tree.flatten(params)
    for i, (path, value) in enumerate(zip(tree.paths(params), leaves, strict=True)):
        leaf = spec.by_path[path]
        if any(name in permutation for name in leaf.groups()):
            moved = _moved(spec, leaf, permutation, np.asarray(value))
            leaves[i] = tree.placed_like(jnp.asarray(moved), value)
    return jax.tree.unflatten(treedef, leaves)


def _moved(
    spec: PermutationSpec, leaf: Leaf, permutation: action.Permutation, value: np.ndarray
) -> np.ndarray:
    out = value.copy()
    cuts = [list(zip(segments(layout), positions(layout), strict=True)) for layout in leaf.axes]
    for choice in itertools.product(*cuts):
        where = np.ix_(*(rows for _, rows in choice))
        dims = [factor for segment, _ in choice for factor in segment]
        names = [factor.name for factor in dims]
        block = value[where].reshape([factor.size for factor in dims])
        places = [i for i, name in enumerate(names) if name in permutation]
        # An order depends on the new position of its index, which therefore moves first.
        places.sort(key=lambda i: len(_above(spec, names[i])))
        for i in places:
            entry = permutation[names[i]]
            index = [names.index(name) for name in spec[names[i]].index]
            monomial = isinstance(entry, action.Monomial)
            order = _spread(entry.permutation if monomial else entry, [*index, i], block.ndim)
            block = np.take_along_axis(block, order, i)
            if monomial:
                scale = _spread(entry.scale, [*index, i], block.ndim) ** dims[i].power
                block = (block * scale).astype(value.dtype)
        out[where] = block.reshape(out[where].shape)
    return out


def _above(spec: PermutationSpec, name: str) -> set[str]:
    """The groups whose positions a group's permutation depends on, directly or not."""
    out: set[str] = set()
    waiting = [name]
    while waiting:
        for i in spec[waiting.pop()].index:
            if i not in out and any(group.name == i for group in spec.groups):
                out.add(i)
                waiting.append(i)
    return out


def _spread(array: Any, axes: list[int], ndim: int) -> np.ndarray:
    """An array laid along these axes of a block, in their order, to broadcast over the others."""
    array = np.asarray(array)
    array = array.transpose(np.argsort(axes))
    shape = dict(zip(sorted(axes), array.shape, strict=True))
    return array.reshape([shape.get(axis, 1) for axis in range(ndim)])


def _with_leaf(params: PyTree, other: PyTree, path: str) -> PyTree:
    at = tree.paths(params).index(path)
    leaves, treedef = jax.tree.flatten(params)
    leaves[at] = jax.tree.leaves(other)[at]
    return jax.tree.unflatten(treedef, leaves)


def _change(before: PyTree, after: PyTree) -> float:
    """The largest change of an entry, relative to the largest entry of its output."""
    worst = 0.0
    for path, x, y in zip(
        tree.paths(before), jax.tree.leaves(before), jax.tree.leaves(after), strict=True
    ):
        x, y = np.asarray(x), np.asarray(y)
        if not x.size:
            continue
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            worst = max(worst, float((x != y).any()))
            continue
        wide = np.complex128 if np.iscomplexobj(x) else np.float64
        x, y = x.astype(wide), y.astype(wide)
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise SpecError(
                f"output {path} has entries that are not finite; pass parameters and inputs at "
                "which the function can be evaluated."
            )
        worst = max(worst, float(np.abs(y - x).max() / max(np.abs(x).max(), 1e-30)))
    return worst


def _check_leaves(spec: PermutationSpec, params: PyTree) -> None:
    leaves = dict(zip(tree.paths(params), jax.tree.leaves(params), strict=True))
    for path, leaf in leaves.items():
        if path not in spec.by_path:
            raise SpecError(
                f"leaf {path} of the parameters has no place in the spec; add it, with unnamed "
                "factors if it stays in place."
            )
        if tuple(np.shape(leaf)) != spec.by_path[path].shape:
            raise SpecError(
                f"leaf {path} has shape {np.shape(leaf)}; the spec was made for "
                f"{spec.by_path[path].shape}."
            )
    for path in spec.by_path:
        if path not in leaves:
            raise SpecError(f"the spec names leaf {path}, which the parameters do not have.")
