"""Specs written by hand: layers as small dictionaries, joined with `|`, and read with parameters.

Each builder returns leaf path -> group or None per axis, in flax linen's names and layout. What a
jaxpr says (`permutation_spec`) needs none of this; it is for networks that JAX cannot trace, for
specs that come from elsewhere, and to compare.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from geojax import tree
from geojax.symmetry.proof import CheckReport, check
from geojax.symmetry.spec import Factor, Group, Leaf, PermutationSpec, SpecError, short

__all__ = [
    "Axes",
    "bottleneck",
    "conv",
    "dense",
    "from_axes",
    "norm",
    "residual_block",
    "shortcut_block",
    "validate",
]

PyTree = Any
Axes = dict[str, tuple[str | None, ...]]


# --------------------------------------------------------------------------------- layers, blocks


def dense(name: str, before: str | None, after: str | None, *, bias: bool = True) -> Axes:
    """A dense layer: a kernel (in, out) and a bias.

    Args:
        name: Its path, with slashes.
        before: The group of its inputs, or None where they stay in place.
        after: The group of its outputs, or None.
        bias: Whether it has a bias.

    Example:
        >>> dense("Dense_0", None, "h")
        {'Dense_0/kernel': (None, 'h'), 'Dense_0/bias': ('h',)}
    """
    kernel: Axes = {f"{name}/kernel": (before, after)}
    return kernel | {f"{name}/bias": (after,)} if bias else kernel


def conv(
    name: str,
    before: str | None,
    after: str | None,
    *,
    bias: bool = False,
    num_spatial: int = 2,
) -> Axes:
    """A convolution: a kernel (space..., in, out), without a bias unless asked for.

    Args:
        name: Its path, with slashes.
        before: The group of its input channels, or None.
        after: The group of its output channels, or None.
        bias: Whether it has a bias.
        num_spatial: The number of its spatial axes.
    """
    space = (None,) * num_spatial
    kernel: Axes = {f"{name}/kernel": (*space, before, after)}
    return kernel | {f"{name}/bias": (after,)} if bias else kernel


def norm(name: str, group: str | None, *, scale: bool = True, bias: bool = True) -> Axes:
    """A normalisation: one scale and one bias per channel.

    Args:
        name: Its path, with slashes.
        group: The group of the channels, or None.
        scale: Whether it has a scale.
        bias: Whether it has a bias.
    """
    parts = {"scale": scale, "bias": bias}
    return {f"{name}/{part}": (group,) for part, there in parts.items() if there}


def residual_block(name: str, group: str, inner: str) -> Axes:
    """Two convolutions with norms, added to their input: group -> inner -> group.

    Args:
        name: The block's path; its parts are conv1, norm1, conv2, norm2.
        group: The group of the residual stream.
        inner: The group between the convolutions.
    """
    return (
        conv(f"{name}/conv1", group, inner)
        | norm(f"{name}/norm1", inner)
        | conv(f"{name}/conv2", inner, group)
        | norm(f"{name}/norm2", group)
    )


def shortcut_block(name: str, before: str | None, after: str, inner: str) -> Axes:
    """A residual block that changes the channels, with a convolution and a norm on the skip.

    Args:
        name: The block's path; beside those of `residual_block` it has shortcut/layers_0 (the
            convolution) and shortcut/layers_1 (the norm).
        before: The group of the stream before.
        after: The group of the stream after.
        inner: The group between the convolutions.
    """
    return (
        conv(f"{name}/conv1", before, inner)
        | norm(f"{name}/norm1", inner)
        | conv(f"{name}/conv2", inner, after)
        | norm(f"{name}/norm2", after)
        | conv(f"{name}/shortcut/layers_0", before, after)
        | norm(f"{name}/shortcut/layers_1", after)
    )


def bottleneck(
    name: str, before: str | None, after: str, inner: tuple[str, str], *, shortcut: bool = False
) -> Axes:
    """Three convolutions with norms, added to their input: before -> inner[0] -> inner[1] -> after.

    Args:
        name: The block's path; its parts are conv1 to conv3 and norm1 to norm3.
        before: The group of the stream before.
        after: The group of the stream after; the same one where there is no shortcut.
        inner: The groups between the convolutions.
        shortcut: Whether the skip has a convolution and a norm, shortcut_conv and shortcut_norm.

    Raises:
        SpecError: If the stream changes its group without a shortcut.
    """
    if before != after and not shortcut:
        raise SpecError(
            f"bottleneck {name} adds its input, of group {before!r}, to its output, of group "
            f"{after!r}; without a shortcut they are one group."
        )
    out = (
        conv(f"{name}/conv1", before, inner[0])
        | norm(f"{name}/norm1", inner[0])
        | conv(f"{name}/conv2", inner[0], inner[1])
        | norm(f"{name}/norm2", inner[1])
        | conv(f"{name}/conv3", inner[1], after)
        | norm(f"{name}/norm3", after)
    )
    if shortcut:
        out |= conv(f"{name}/shortcut_conv", before, after) | norm(f"{name}/shortcut_norm", after)
    return out


# ----------------------------------------------------------------------------------- to a spec


def from_axes(
    axes: Mapping[str, Iterable[str | None]],
    params: PyTree,
    *,
    groups: Iterable[str] | None = None,
    statistics: Callable[[str], bool] | None = None,
) -> PermutationSpec:
    """A spec from Git Re-Basin's dictionary: leaf path -> group or None for each axis.

    The tuples are in the order of the arrays' own axes, so any layout will do: a dense kernel is
    `(before, after)` in JAX and `(after, before)` in PyTorch, whose convolutions are
    `(after, before, None, None)`.

    Args:
        axes: One entry per leaf of `params`. A path is written with slashes or dots
            ("Dense_0/kernel", "fc.weight") or as `tree.paths` writes it.
        params: The parameters, or their shapes. A flat dictionary of arrays under such paths (a
            PyTorch state dict of arrays) is as good as a nested one.
        groups: The names that there are, to catch one that is misspelt: Git Re-Basin's
            `perm_to_axes` will do.
        statistics: Says of a path with slashes whether the leaf is a running statistic, which is
            permuted and never matched on. By default what is below a first key "batch_stats" or
            "state", and what is called running_mean or running_var.

    Returns:
        The spec, for these very parameters; its groups in order of their first place in `params`.

    Raises:
        SpecError: If a leaf has no entry, or an entry no leaf; if an entry has not one item per
            axis; if two places of a group differ in size; if a group is not among `groups`. The
            sentence names the leaf.

    Example:
        >>> params = {"fc1": {"kernel": np.ones((3, 8))}, "fc2": {"kernel": np.ones((8, 2))}}
        >>> axes = dense("fc1", None, "h", bias=False) | dense("fc2", "h", None, bias=False)
        >>> from_axes(axes, params).members("h")
        [("['fc1']['kernel']", 1), ("['fc2']['kernel']", 0)]

    Reference:
        Ainsworth, Hayase, Srinivasa, Git Re-Basin: Merging models modulo permutation symmetries,
        2023, whose specs these are.
    """
    is_statistic = _is_statistic if statistics is None else statistics
    entries: dict[str, tuple[str, tuple[str | None, ...]]] = {}
    for path, names in axes.items():
        if short(path) in entries:
            raise SpecError(
                f"leaf {short(path)} has two entries: {entries[short(path)][0]}, {path}."
            )
        entries[short(path)] = path, tuple(names)
    known = None if groups is None else set(groups)
    sizes: dict[str, tuple[int, str]] = {}
    leaves = []
    seen: set[str] = set()
    for path, value in zip(tree.paths(params), jax.tree.leaves(params), strict=True):
        name, shape = short(path), np.shape(value)
        if name in seen:
            raise SpecError(f"two leaves of the parameters are called {name} with slashes.")
        seen.add(name)
        if name not in entries:
            raise SpecError(
                f"leaf {path} has no entry; give it one group or None for each axis of {shape}."
            )
        entry = entries[name][1]
        if len(entry) != len(shape):
            raise SpecError(
                f"leaf {path} has {len(shape)} axes {shape}; its entry {entry} has {len(entry)}."
            )
        for axis, (group, size) in enumerate(zip(entry, shape, strict=True)):
            if group is None:
                continue
            if known is not None and group not in known:
                raise SpecError(f"axis {axis} of leaf {path} names the unknown group {group!r}.")
            before, where = sizes.setdefault(group, (size, f"axis {axis} of leaf {path}"))
            if size != before:
                raise SpecError(
                    f"axis {axis} of leaf {path} has {size} units of group {group!r}; {where} has "
                    f"{before}."
                )
        layouts = tuple(Factor(g or "", n) for g, n in zip(entry, shape, strict=True))
        leaves.append(Leaf(path, shape, layouts, is_statistic(name)))
    extra = [path for name, (path, _) in entries.items() if name not in seen]
    if extra:
        raise SpecError(
            f"the entry of leaf {extra[0]} has no leaf in the parameters, whose leaves are "
            f"{', '.join(short(path) for path in tree.paths(params)[:6])} ..."
        )
    return PermutationSpec(
        tuple(leaves), tuple(Group(group, size) for group, (size, _) in sizes.items())
    )


def _is_statistic(name: str) -> bool:
    parts = name.split("/")
    return parts[0] in ("batch_stats", "state") or parts[-1] in ("running_mean", "running_var")


def validate(
    spec: PermutationSpec,
    params: PyTree,
    apply_fn: Callable[..., Any] | None = None,
    *inputs: Any,
    key: jax.Array | None = None,
    rtol: float = 1e-5,
) -> CheckReport | None:
    """Compare a spec with parameters, leaf by leaf; and with the function, where one is given.

    Args:
        spec: The spec, such as one that was read from a file.
        params: Parameters, or their shapes where there is no function.
        apply_fn: The function; then `symmetry.check` looks for permutations that change it, such as
            those of a classifier's outputs.
        *inputs: Concrete inputs of the function.
        key: A typed key, for the function.
        rtol: The largest change of the outputs that counts as none.

    Returns:
        What `check` measured; None without a function.

    Raises:
        SpecError: If a leaf is missing, has no place in the spec, or has another rank or shape than
            the spec says, by path; or as from `check`.
        ValueError: If there is a function and no key.

    Example:
        >>> params = {"fc": {"kernel": np.ones((3, 8))}}
        >>> validate(from_axes(dense("fc", None, "h", bias=False), params), params)
    """
    given = dict(zip(tree.paths(params), map(np.shape, jax.tree.leaves(params)), strict=True))
    for leaf in spec.leaves:
        if leaf.path not in given:
            raise SpecError(f"leaf {leaf.path} of the spec is missing from the parameters.")
        shape = given.pop(leaf.path)
        if len(shape) != len(leaf.shape):
            raise SpecError(
                f"leaf {leaf.path} has {len(shape)} axes {shape}; the spec was made for "
                f"{len(leaf.shape)}, {leaf.shape}."
            )
        if shape != leaf.shape:
            raise SpecError(
                f"leaf {leaf.path} has shape {shape}; the spec was made for {leaf.shape}."
            )
    if given:
        raise SpecError(f"leaf {next(iter(given))} of the parameters has no place in the spec.")
    if apply_fn is None:
        return None
    if key is None:
        raise ValueError("a function is tried at random points; pass key=jax.random.key(seed).")
    return check(spec, apply_fn, params, *inputs, key=key, rtol=rtol)
