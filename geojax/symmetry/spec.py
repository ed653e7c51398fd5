"""What may be permuted: which axes of which leaves move together, and how an axis is built.

An axis is a *layout*: one factor, a row-major product of layouts (heads times head width, height
times width times channels), or a concatenation of layouts (the four gates of an LSTM, the inputs of
a DenseNet layer). A factor carries the name of the group that permutes it, or none.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np

from geojax.report import text_table

__all__ = [
    "KINDS",
    "Concatenation",
    "Factor",
    "Group",
    "Kind",
    "Layout",
    "Leaf",
    "PermutationSpec",
    "Product",
    "SpecError",
    "blocks",
    "factors",
    "layout_size",
    "positions",
    "segments",
    "short",
]

PyTree = Any
Kind = Literal["permutation", "signed", "scaled", "signed_scaled"]
KINDS: tuple[Kind, ...] = ("permutation", "signed", "scaled", "signed_scaled")


class SpecError(ValueError):
    """A permutation spec that contradicts itself, the parameters or the function."""


@dataclasses.dataclass(frozen=True)
class Factor:
    """An indivisible part of an axis.

    Attributes:
        name: The group that permutes it, or the index that groups refer to; "" for a fixed factor.
        size: The number of positions.
        power: Where the group carries a scale s per unit: entries here are multiplied by s^power.
    """

    name: str
    size: int
    power: int = 0


@dataclasses.dataclass(frozen=True)
class Product:
    """Row-major nesting: the last part runs fastest, as `reshape` has it."""

    parts: tuple["Layout", ...]


@dataclasses.dataclass(frozen=True)
class Concatenation:
    """Parts one after the other along the axis."""

    parts: tuple["Layout", ...]


Layout = Factor | Product | Concatenation


def layout_size(layout: Layout) -> int:
    """The length of an axis with this layout.

    Example:
        >>> layout_size(Product((Factor("heads", 4), Factor("", 8))))
        32
    """
    if isinstance(layout, Factor):
        return layout.size
    sizes = [layout_size(part) for part in layout.parts]
    return math.prod(sizes) if isinstance(layout, Product) else sum(sizes)


def factors(layout: Layout) -> Iterator[Factor]:
    """Every factor of a layout, in order; one that occurs twice comes twice."""
    if isinstance(layout, Factor):
        yield layout
    else:
        for part in layout.parts:
            yield from factors(part)


def _replace(layout: Layout, change: Callable[[Factor], Layout]) -> Layout:
    if isinstance(layout, Factor):
        return change(layout)
    return type(layout)(tuple(_replace(part, change) for part in layout.parts))


def _spell(layout: Layout) -> str:
    if isinstance(layout, Factor):
        return layout.name or str(layout.size)
    sign = "*" if isinstance(layout, Product) else "+"
    return "(" + sign.join(_spell(part) for part in layout.parts) + ")"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How one leaf is permuted.

    Attributes:
        path: Its path in the parameters, as `tree.paths` writes it.
        shape: Its shape.
        axes: One layout per axis.
        statistic: Whether it is a running statistic: permuted with the rest, never matched on.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[Layout, ...]
    statistic: bool = False

    def groups(self) -> list[str]:
        """The names in its layouts, in order of axes, with repetitions."""
        return [f.name for layout in self.axes for f in factors(layout) if f.name]


@dataclasses.dataclass(frozen=True)
class Group:
    """One symmetry of the network: every place with its name is permuted alike.

    Attributes:
        name: Unique; for a derived spec the first leaf that carries it, and the axis.
        size: The number of units.
        index: Names of factors on which the permutation depends: the head, for the inner dimension
            of attention; the layer, in parameters that `lax.scan` runs over.
        index_sizes: Their sizes. The permutation array has shape `(*index_sizes, size)`.
        kind: "permutation"; "signed" where units may also change sign; "scaled" by positive
            factors; "signed_scaled".
        free: Whether nothing but symmetric reductions reads the units, so that the permutation
            cannot matter to any weight after it.
    """

    name: str
    size: int
    index: tuple[str, ...] = ()
    index_sizes: tuple[int, ...] = ()
    kind: Kind = "permutation"
    free: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its permutation array."""
        return (*self.index_sizes, self.size)


@dataclasses.dataclass(frozen=True)
class PermutationSpec:
    """The permutation symmetries of a network's parameters; static, hashable, comparable.

    Attributes:
        leaves: One entry per leaf, in flattening order.
        groups: The groups, in order of their first place.
        unused: Paths of leaves that the function never reads.
        notes: What was fixed for want of a rule, and where; empty for a complete derivation.

    Raises:
        SpecError: If sizes, names or shapes contradict each other; the sentence names the leaf.

    Example:
        >>> spec = PermutationSpec(
        ...     leaves=(
        ...         Leaf("['w']", (3, 4), (Factor("", 3), Factor("h", 4))),
        ...         Leaf("['v']", (4,), (Factor("h", 4),)),
        ...     ),
        ...     groups=(Group("h", 4),),
        ... )
        >>> spec.members("h")
        [("['w']", 1), ("['v']", 0)]
    """

    leaves: tuple[Leaf, ...]
    groups: tuple[Group, ...]
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self)

    # ------------------------------------------------------------------ reading

    def __getitem__(self, name: str) -> Group:
        try:
            return self._groups[name]
        except KeyError:
            known = ", ".join(self._groups) or "none"
            raise SpecError(f"there is no group {name!r}; the groups are: {known}.") from None

    @functools.cached_property
    def _groups(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    @functools.cached_property
    def by_path(self) -> dict[str, Leaf]:
        """The leaves by their paths."""
        return {leaf.path: leaf for leaf in self.leaves}

    def members(self, name: str) -> list[tuple[str, int]]:
        """Where a group acts: (leaf path, axis) pairs, one per place."""
        return [
            (leaf.path, axis)
            for leaf in self.leaves
            for axis, layout in enumerate(leaf.axes)
            for factor in factors(layout)
            if factor.name == name
        ]

    def axes_to_groups(self) -> dict[str, tuple[str | None, ...]]:
        """Git Re-Basin's dictionary: leaf path -> group or None for each axis.

        Raises:
            SpecError: If an axis is made of several factors, which that format cannot say.
        """
        out = {}
        for leaf in self.leaves:
            axes = []
            for layout in leaf.axes:
                if not isinstance(layout, Factor):
                    raise SpecError(
                        f"axis layout {_spell(layout)} of leaf {leaf.path} has several factors; "
                        "the dictionary format has one group per axis. Use to_json instead."
                    )
                axes.append(layout.name or None)
            out[leaf.path] = tuple(axes)
        return out

    def table(self) -> str:
        """Every leaf once, with its shape and the layout of each axis; then the groups."""
        leaves = [
            {
                "leaf": short(leaf.path) + (" (statistic)" if leaf.statistic else ""),
                "shape": " x ".join(map(str, leaf.shape)) or "scalar",
                "axes": ", ".join(_spell(layout) for layout in leaf.axes)
                + (" (unused)" if leaf.path in self.unused else ""),
            }
            for leaf in self.leaves
        ]
        groups = [
            {
                "group": group.name,
                "units": group.size,
                "depends on": ", ".join(group.index) or "-",
                "kind": group.kind + (", free" if group.free else ""),
                "places": len(self.members(group.name)),
            }
            for group in self.groups
        ]
        lines = [text_table(leaves)]
        if groups:
            lines.append(text_table(groups))
        return "\n\n".join([*lines, *self.notes])

    # ------------------------------------------------------------------ editing

    def pin(self, *names: str) -> "PermutationSpec":
        """The spec with these groups fixed at the identity."""
        for name in names:
            self[name]
        return self._without(set(names))

    def subset(
        self,
        include: str | Sequence[str] | Callable[[str], bool] = "*",
        exclude: str | Sequence[str] | Callable[[str], bool] = (),
    ) -> "PermutationSpec":
        """The spec with every group fixed that would move a leaf outside the selection.

        Args:
            include: Glob patterns over paths written with slashes ("encoder/*"), or a predicate.
            exclude: The same, of leaves to leave alone.

        Raises:
            SpecError: If a pattern matches no leaf.
        """
        chosen, left_out = self._select(include, "include"), self._select(exclude, "exclude")
        fixed = {
            name
            for leaf in self.leaves
            if leaf.path not in chosen or leaf.path in left_out
            for name in leaf.groups()
            if name in self._groups
        }
        return self._without(fixed)

    def _select(self, patterns: Any, which: str) -> set[str]:
        if callable(patterns):
            return {leaf.path for leaf in self.leaves if patterns(leaf.path)}
        chosen = [patterns] if isinstance(patterns, str) else patterns
        return {path for pattern in chosen for path in self.matching(pattern, which)}

    def matching(self, pattern: str, which: str = "the") -> list[str]:
        """The paths of the leaves that a glob pattern over slash paths names.

        Raises:
            SpecError: If there is none.
        """
        hits = [leaf.path for leaf in self.leaves if fnmatchcase(short(leaf.path), pattern)]
        if not hits:
            paths = ", ".join(short(leaf.path) for leaf in self.leaves[:6])
            raise SpecError(f"{which} pattern {pattern!r} matches no leaf; paths are {paths} ...")
        return hits

    def _without(self, names: set[str]) -> "PermutationSpec":
        # A group that depends on a fixed one goes on depending on it, as on an index.
        indices = {i for g in self.groups if g.name not in names for i in g.index}

        def fix(factor: Factor) -> Factor:
            if factor.name not in names and (factor.name in self._groups or factor.name in indices):
                return factor
            return Factor(factor.name if factor.name in indices else "", factor.size)

        groups = tuple(group for group in self.groups if group.name not in names)
        return self._changed(fix, groups)

    def _changed(
        self, change: Callable[[Factor], Layout], groups: tuple[Group, ...]
    ) -> "PermutationSpec":
        leaves = tuple(
            dataclasses.replace(leaf, axes=tuple(_replace(axis, change) for axis in leaf.axes))
            for leaf in self.leaves
        )
        return dataclasses.replace(self, leaves=leaves, groups=groups)

    def at(self, key: str) -> "PermutationSpec":
        """The spec of one entry of the tree, such as "params" of a network's variables.

        Raises:
            SpecError: If there is no such entry.

        Example:
            >>> leaf = Leaf("['params']['w']", (3,), (Factor("h", 3),))
            >>> PermutationSpec((leaf,), (Group("h", 3),)).at("params").members("h")
            [("['w']", 0)]
        """
        prefix = f"['{key}']"
        leaves = [leaf for leaf in self.leaves if leaf.path.startswith(prefix)]
        if not leaves:
            first = sorted({leaf.path.split("]")[0] + "]" for leaf in self.leaves})
            raise SpecError(f"the spec has no entry {prefix}; its entries are {', '.join(first)}.")
        cut = tuple(dataclasses.replace(x, path=x.path[len(prefix) :]) for x in leaves)
        held = {name for leaf in cut for name in leaf.groups()}
        return PermutationSpec(
            cut,
            tuple(group for group in self.groups if group.name in held),
            tuple(path[len(prefix) :] for path in self.unused if path.startswith(prefix)),
            self.notes,
        )

    def rename(self, names: Mapping[str, str]) -> "PermutationSpec":
        """The spec with groups called otherwise; `names` maps old to new."""
        for old in names:
            self[old]
        new = [names.get(group.name, group.name) for group in self.groups]
        if len(set(new)) < len(new):
            raise SpecError(
                f"renaming {dict(names)} gives two groups one name; use merge for that."
            )
        groups = tuple(
            dataclasses.replace(
                group,
                name=names.get(group.name, group.name),
                index=tuple(names.get(i, i) for i in group.index),
            )
            for group in self.groups
        )
        return self._changed(
            lambda f: dataclasses.replace(f, name=names.get(f.name, f.name)), groups
        )

    def merge(self, first: str, *others: str) -> "PermutationSpec":
        """The spec with several groups bound to one permutation, under the first one's name."""
        kept = self[first]
        for name in others:
            if self[name].shape != kept.shape or self[name].index != kept.index:
                raise SpecError(
                    f"groups {first!r} {kept.shape} and {name!r} {self[name].shape} cannot be one: "
                    "their sizes and indices must be equal."
                )
        if any(name in group.index for group in self.groups for name in others):
            raise SpecError(f"one of {others} indexes another group; merge into that one instead.")
        kind = kept.kind if all(self[n].kind == kept.kind for n in others) else "permutation"
        merged = dataclasses.replace(
            kept, kind=kind, free=kept.free and all(self[n].free for n in others)
        )
        groups = tuple(
            merged if g.name == first else g for g in self.groups if g.name not in others
        )
        return self._changed(
            lambda f: dataclasses.replace(f, name=first) if f.name in others else f, groups
        )

    def split(self, name: str, sizes: Sequence[int]) -> "PermutationSpec":
        """The spec with a group restricted to permutations within consecutive blocks of units."""
        group = self[name]
        if sum(sizes) != group.size or any(size < 1 for size in sizes):
            raise SpecError(f"{list(sizes)} does not add up to the {group.size} units of {name!r}.")
        if any(name in other.index for other in self.groups):
            raise SpecError(f"group {name!r} indexes another group and cannot be split.")
        parts = tuple(
            dataclasses.replace(group, name=f"{name}[{i}]", size=size)
            for i, size in enumerate(sizes)
        )

        def change(factor: Factor) -> Layout:
            if factor.name != name:
                return factor
            return Concatenation(tuple(Factor(p.name, p.size, factor.power) for p in parts))

        groups = tuple(p for g in self.groups for p in (parts if g.name == name else (g,)))
        return self._changed(change, groups)

    # ------------------------------------------------------------------ writing

    def to_json(self) -> str:
        """The spec as JSON text; `from_json` reads it back, equal."""
        return json.dumps(
            {
                "format": "geojax permutation spec 1",
                "groups": [dataclasses.asdict(group) for group in self.groups],
                "leaves": [
                    {
                        "path": leaf.path,
                        "shape": list(leaf.shape),
                        "axes": [_to_json(layout) for layout in leaf.axes],
                        "statistic": leaf.statistic,
                    }
                    for leaf in self.leaves
                ],
                "unused": list(self.unused),
                "notes": list(self.notes),
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> "PermutationSpec":
        """The spec that `to_json` wrote.

        Raises:
            SpecError: If the text is not such a spec.
        """
        try:
            document = json.loads(text)
            if document.pop("format") != "geojax permutation spec 1":
                raise KeyError("format")
            return cls(
                leaves=tuple(
                    Leaf(
                        x["path"],
                        tuple(x["shape"]),
                        tuple(_from_json(y) for y in x["axes"]),
                        x["statistic"],
                    )
                    for x in document["leaves"]
                ),
                groups=tuple(
                    Group(
                        g["name"],
                        g["size"],
                        tuple(g["index"]),
                        tuple(g["index_sizes"]),
                        g["kind"],
                        g["free"],
                    )
                    for g in document["groups"]
                ),
                unused=tuple(document["unused"]),
                notes=tuple(document["notes"]),
            )
        except SpecError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(f"this is not a permutation spec in JSON: {error!r}.") from error


def short(path: str) -> str:
    """A path written with slashes: "['params']['Dense_0']['kernel']" is "params/Dense_0/kernel"."""
    return (
        path.replace("']['", "/")
        .replace("['", "/")
        .replace("']", "")
        .replace("][", "/")
        .replace("[", "/")
        .replace("]", "")
        .replace(".", "/")
        .strip("/")
    )


def _to_json(layout: Layout) -> Any:
    if isinstance(layout, Factor):
        return {"name": layout.name, "size": layout.size, "power": layout.power}
    key = "product" if isinstance(layout, Product) else "concatenation"
    return {key: [_to_json(part) for part in layout.parts]}


def _from_json(value: Any) -> Layout:
    if "product" in value:
        return Product(tuple(_from_json(part) for part in value["product"]))
    if "concatenation" in value:
        return Concatenation(tuple(_from_json(part) for part in value["concatenation"]))
    return Factor(value["name"], value["size"], value["power"])


def _check(spec: PermutationSpec) -> None:
    groups = {group.name: group for group in spec.groups}
    if len(groups) < len(spec.groups):
        raise SpecError("two groups have the same name.")
    indices: dict[str, int] = {}
    for group in spec.groups:
        if group.kind not in KINDS:
            raise SpecError(f"group {group.name!r} is of kind {group.kind!r}; expected {KINDS}.")
        if len(group.index) != len(group.index_sizes):
            raise SpecError(f"group {group.name!r} has an index without a size.")
        indices |= dict(zip(group.index, group.index_sizes, strict=True))
    placed: set[str] = set()
    for leaf in spec.leaves:
        if len(leaf.axes) != len(leaf.shape):
            raise SpecError(
                f"leaf {leaf.path} has {len(leaf.shape)} axes {leaf.shape}; the spec gives "
                f"{len(leaf.axes)} layouts."
            )
        for axis, (size, layout) in enumerate(zip(leaf.shape, leaf.axes, strict=True)):
            if layout_size(layout) != size:
                raise SpecError(
                    f"axis {axis} of leaf {leaf.path} has size {size}; its layout "
                    f"{_spell(layout)} has {layout_size(layout)}."
                )
            for factor in factors(layout):
                if not factor.name:
                    continue
                if factor.name not in groups and factor.name not in indices:
                    raise SpecError(
                        f"axis {axis} of leaf {leaf.path} names the unknown group {factor.name!r}."
                    )
                expected = (
                    groups[factor.name].size if factor.name in groups else indices[factor.name]
                )
                if factor.size != expected:
                    raise SpecError(
                        f"axis {axis} of leaf {leaf.path} has {factor.size} units for group "
                        f"{factor.name!r}, which has {expected}."
                    )
                placed.add(factor.name)
        _check_indices(leaf, groups)
    for name in groups.keys() - placed:
        raise SpecError(f"group {name!r} acts on no leaf.")


def _check_indices(leaf: Leaf, groups: Mapping[str, Group]) -> None:
    """Each dependent factor must see each of its indices once: beside it, or on another axis."""
    cut_axes = [segments(layout) for layout in leaf.axes]
    for axis, alternatives in enumerate(cut_axes):
        for segment in alternatives:
            inside = [f.name for f in segment]
            outside = [
                f.name
                for other, found in enumerate(cut_axes)
                if other != axis and len(found) == 1
                for f in found[0]
            ]
            for factor in segment:
                for index in groups[factor.name].index if factor.name in groups else ():
                    if inside.count(index) + outside.count(index) != 1:
                        raise SpecError(
                            f"group {factor.name!r} depends on {index!r}, which occurs "
                            f"{inside.count(index) + outside.count(index)} times beside it in leaf "
                            f"{leaf.path}; expected once."
                        )


def blocks(leaf: Leaf, array: Any) -> list[tuple[tuple[Factor, ...], Any]]:
    """A leaf as arrays with one axis per factor: concatenations cut, products reshaped.

    Example:
        >>> leaf = Leaf("w", (5,), (Concatenation((Factor("a", 2), Factor("b", 3))),))
        >>> [(d[0].name, x.shape) for d, x in blocks(leaf, np.arange(5))]
        [('a', (2,)), ('b', (3,))]
    """
    cut_axes = [segments(layout) for layout in leaf.axes]
    out = []
    for choice in itertools.product(*(range(len(alternatives)) for alternatives in cut_axes)):
        chosen = [alternatives[i] for alternatives, i in zip(cut_axes, choice, strict=True)]
        cut = array
        for axis, (layout, i) in enumerate(zip(leaf.axes, choice, strict=True)):
            if len(cut_axes[axis]) > 1:
                cut = _rows(cut, axis, positions(layout)[i])
        dims = tuple(factor for segment in chosen for factor in segment)
        out.append((dims, cut.reshape([factor.size for factor in dims])))
    return out


def _rows(array: Any, axis: int, where: np.ndarray) -> Any:
    start, stop = int(where[0]), int(where[-1]) + 1
    if stop - start == len(where):  # a view, where it is one run
        return array[(slice(None),) * axis + (slice(start, stop),)]
    return array.take(where, axis)


def segments(layout: Layout) -> list[tuple[Factor, ...]]:
    """The alternatives of a layout: each a product of factors."""
    if isinstance(layout, Factor):
        return [(layout,)]
    parts = [segments(part) for part in layout.parts]
    if isinstance(layout, Concatenation):
        return [segment for part in parts for segment in part]
    return [tuple(f for s in choice for f in s) for choice in itertools.product(*parts)]


def positions(layout: Layout) -> list[np.ndarray]:
    """For each alternative of `_segments`, its positions along the axis."""
    if isinstance(layout, Factor):
        return [np.arange(layout.size)]
    parts = [positions(part) for part in layout.parts]
    sizes = [layout_size(part) for part in layout.parts]
    if isinstance(layout, Concatenation):
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        return [o + x for o, part in zip(offsets, parts, strict=True) for x in part]
    out = []
    for choice in itertools.product(*parts):
        total = np.zeros(1, np.int64)
        for size, x in zip(sizes, choice, strict=True):
            total = (total[:, None] * size + x[None, :]).reshape(-1)
        out.append(total)
    return out
