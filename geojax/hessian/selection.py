"""Which parameters a Hessian is of: leaves by path, layers, and copies that should be tied."""

import fnmatch
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from geojax import tree

__all__ = ["Selection", "layers", "select"]

PyTree = Any
Selection = str | re.Pattern[str] | Callable[[str, Any], bool] | Sequence[Any] | None


def _paths(params: PyTree) -> list[str]:
    """The path of every leaf with slashes, in flattening order: 'dense/kernel'."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def select(params: PyTree, spec: Selection) -> tuple[PyTree, PyTree]:
    """Split parameters into those that a Hessian is of, and those that stay as they are.

    A leaf's path is its keys joined by slashes: 'dense/kernel', 'blocks/0/bias'. Matching is
    case-sensitive. A leaf is selected by

    - a string, a pattern in which `*` stands for any characters, slashes too, `?` for one and
      `[abc]` for one of a set, if it matches the path or the path of anything above the leaf:
      'dense', 'dense/*', '*/kernel'. A string beginning with a bracket is a path as `tree.paths`
      prints it, or the beginning of one, and means what it says: "['dense']", "['dense']['bias']";
    - a compiled regular expression, if `search` finds it in the path;
    - a function `(path, leaf) -> bool`, if it is true;
    - a list of these, if one of them selects it.

    Args:
        params: Any pytree.
        spec: What to select, None for all leaves. Leaves that are no floating arrays are passed
            over, unless `spec` is None.

    Returns:
        `(selected, frozen)`, each with None where the other has the leaf; `tree.merge` joins them.

    Raises:
        ValueError: If nothing is selected, listing the paths; or if one of several matches nothing.
        TypeError: If `spec` is of another kind; or with None, if a leaf is not floating.

    Example:
        >>> params = {"dense": {"bias": jnp.zeros(2), "kernel": jnp.ones((2, 2))}}
        >>> selected, frozen = select(params, "dense/kernel")
        >>> selected["dense"]["bias"], frozen["dense"]["kernel"]
        (None, None)
    """
    leaves, treedef = jax.tree.flatten(params)
    if spec is None:
        tree.check_floating(params, "params")
        return params, jax.tree.unflatten(treedef, [None] * len(leaves))
    names, brackets = _paths(params), tree.paths(params)
    specs = list(spec) if isinstance(spec, (list, tuple)) else [spec]
    kept = [False] * len(leaves)
    for one in specs:
        found = [
            _floating(leaf) and _matches(one, name, bracket, leaf)
            for name, bracket, leaf in zip(names, brackets, leaves, strict=True)
        ]
        if not any(found):
            raise ValueError(
                f"select: {_describe(one)} selects no floating leaf; the paths are "
                f"{', '.join(names)} (matching is case-sensitive)."
            )
        kept = [a or b for a, b in zip(kept, found, strict=True)]
    if not any(kept):
        raise ValueError(
            f"select: an empty list selects nothing; the paths are {', '.join(names)}."
        )
    halves = [
        [leaf if keep == side else None for leaf, keep in zip(leaves, kept, strict=True)]
        for side in (True, False)
    ]
    return jax.tree.unflatten(treedef, halves[0]), jax.tree.unflatten(treedef, halves[1])


def _describe(spec: Any) -> str:
    if isinstance(spec, re.Pattern):
        return f"the expression {spec.pattern!r}"
    return repr(spec) if isinstance(spec, str) else "the function given"


def _floating(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _matches(spec: Any, name: str, bracket: str, leaf: Any) -> bool:
    if isinstance(spec, str):
        if spec.startswith(("[", ".")):
            rest = bracket[len(spec) :]
            return bracket.startswith(spec) and (not rest or rest[0] in "[.")
        parts = name.split("/")
        above = ("/".join(parts[: i + 1]) for i in range(len(parts)))
        return any(fnmatch.fnmatchcase(path, spec) for path in above)
    if isinstance(spec, re.Pattern):
        return spec.search(name) is not None
    if callable(spec):
        return bool(spec(name, leaf))
    raise TypeError(
        f"select: got {type(spec).__name__}; expected a pattern such as 'dense/*', a compiled "
        "regular expression, a function (path, leaf) -> bool, or a list of these."
    )


def layers(params: PyTree) -> dict[str, tuple[str, ...]]:
    """The leaves of each layer: those whose paths differ in the last key alone.

    Args:
        params: Any pytree.

    Returns:
        From a layer's path to the paths of its floating leaves, in flattening order. A leaf at the
        root is a layer of its own.

    Example:
        >>> params = {"a": {"bias": jnp.zeros(2), "kernel": jnp.ones(2)}, "scale": jnp.ones(1)}
        >>> layers(params)
        {'a': ('a/bias', 'a/kernel'), 'scale': ('scale',)}
    """
    out: dict[str, tuple[str, ...]] = {}
    with_path = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), name in zip(with_path, _paths(params), strict=True):
        if _floating(leaf):
            parent = jax.tree_util.keystr(path[:-1], simple=True, separator="/") or name
            out[parent] = (*out.get(parent, ()), name)
    return out


def warn_of_copies(params: PyTree, min_size: int = 16) -> None:
    """Warn where two leaves hold the same numbers, as a tied weight that was stored twice does.

    Constant leaves, such as zero biases, and leaves of fewer than `min_size` elements are passed
    over, as are arrays that are being traced.
    """
    groups: dict[tuple, list[tuple[str, Any]]] = {}
    for name, leaf in zip(_paths(params), jax.tree.leaves(params), strict=True):
        if isinstance(leaf, Tracer):
            return
        if _floating(leaf) and isinstance(leaf, (jax.Array, np.ndarray)) and leaf.size >= min_size:
            groups.setdefault((leaf.shape, str(leaf.dtype)), []).append((name, leaf))
    groups = {kind: found for kind, found in groups.items() if len(found) > 1}
    if not groups:
        return
    # Four numbers tell nearly all arrays apart without bringing them to the host.
    marks = jax.device_get(_marks([[leaf for _, leaf in found] for found in groups.values()]))
    for found, group in zip(groups.values(), marks, strict=True):
        seen: dict[tuple, tuple[str, Any]] = {}
        for (name, leaf), mark in zip(found, group, strict=True):
            mark = tuple(float(x) for x in mark)
            if mark[0] == mark[1]:
                continue
            name_before, before = seen.setdefault(mark, (name, leaf))
            if name_before != name and (before is leaf or bool(_equal(before, leaf))):
                warnings.warn(
                    f"params: leaves {name_before} and {name} hold the same numbers. If they are "
                    "one tied weight, the Hessian is not that of the tied model: store it once "
                    "and let the model use it twice.",
                    stacklevel=3,
                )


@jax.jit
def _marks(groups: list[list[jax.Array]]) -> list[list[tuple[jax.Array, ...]]]:
    def mark(x):
        x = x.astype(tree.accumulation_dtype(x))
        return jnp.min(x), jnp.max(x), jnp.sum(x), jnp.sum(x * x)

    return jax.tree.map(mark, groups)


@jax.jit
def _equal(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.all(a == b)
