"""The permutation symmetries of any function of parameters, read off its jaxpr.

One walk over the equations says which axes are one; what is neither an input nor an output nor read
by position is a group. Nothing is computed, and shapes are all that is looked at.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core, source_info_util

from geojax import tree
from geojax.symmetry import control, indexing
from geojax.symmetry.atoms import Atom, Axis, Joined, atoms, fixed, fresh, head, pin
from geojax.symmetry.dependence import Array, Sum, dependence
from geojax.symmetry.rules import RULES, SILENT, Value, constant
from geojax.symmetry.spec import (
    Concatenation,
    Factor,
    Group,
    Layout,
    Leaf,
    PermutationSpec,
    Product,
    SpecError,
    layout_size,
    short,
)

__all__ = ["Analysis", "Naming", "Site", "Walk", "analyze", "permutation_spec", "walked"]

PyTree = Any
_RULES = {**RULES, **indexing.RULES, **control.RULES}
Selection = str | Sequence[str] | Callable[[str], bool]


class Site(NamedTuple):
    """A place in the jaxpr where the units of a group are read.

    Attributes:
        path: Where the equation is: its number in the jaxpr; where the jaxpr is inside another
            equation, that one's number and the number of the jaxpr inside it come before, so that
            `(4, 0, 7)` is equation 7 in the first jaxpr of equation 4. Jaxprs are numbered as
            `control.bodies` lists them.
        operand: Which of the equation's `invars` is read.
        axes: The layout of each axis of that operand; a factor without a name stays in place.
        summed: The axes over which the equation sums or reduces; the group is on one of them.
        context: For an equation inside `lax.scan`, the layout of each leading axis that the
            operand had if the scans were unrolled and stacked, outermost first.
    """

    path: tuple[int, ...]
    operand: int
    axes: tuple[Layout, ...]
    summed: tuple[int, ...]
    context: tuple[Layout, ...]


class Analysis(NamedTuple):
    """What `analyze` found.

    Attributes:
        spec: The symmetries.
        sites: For each group, where its units are read: the operands of `dot_general` and
            `conv_general_dilated` that depend on the inputs and whose summed axes contain the
            group, in order of execution; for a free group, the operands of the symmetric
            reductions over it. An equation in a scan is one site; a site in an equation that runs
            several times (while) too. A group may have no site if it is only read by weights.
        jaxpr: The closed jaxpr that was walked, `apply_fn(params, *inputs)` with all leaves of the
            parameters first, then those of the inputs, both in flattening order.
        num_leaves: How many of the jaxpr's inputs are parameters.
    """

    spec: PermutationSpec
    sites: dict[str, tuple[Site, ...]]
    jaxpr: Any
    num_leaves: int


class _Read(NamedTuple):
    """A read of units by an equation, before the groups have names."""

    path: tuple[int, ...]
    operand: int
    value: Value
    summed: tuple[int, ...]
    context: tuple[Axis, ...]
    product: bool


class Walk:
    """The state of one pass over a jaxpr; `rules.Walker` says what the rules see of it."""

    def __init__(self) -> None:
        self.arrays: dict[Array, None] = {}
        self.sums: list[Sum] = []
        self.reads: list[_Read] = []
        self.notes: list[str] = []
        self.context: tuple[Axis, ...] = ()
        self.path: tuple[int, ...] = ()
        self.lines: tuple[Any, ...] = ()
        self.live = control.Liveness()

    # ------------------------------------------------------------------ what rules call

    def contracted(
        self,
        eqn: Any,
        operands: Sequence[Value],
        summed: Sequence[Sequence[int]],
        pairs: Iterable[tuple[Axis, bool]],
        free: Sequence[Iterable[Axis]],
    ) -> None:
        """Record a sum of products; see `rules.Walker`."""
        self.sums.append(Sum(tuple(pairs), tuple(tuple(axes) for axes in free)))
        for i, value in enumerate(operands):
            self.reads.append(
                _Read(self.path, i, value, tuple(summed[i]), self.context, product=True)
            )

    def reduced(self, eqn: Any, operand: Value, axes: Sequence[int]) -> None:
        """Record that axes of an operand are read without regard to their order."""
        self.reads.append(_Read(self.path, 0, operand, tuple(axes), self.context, product=False))

    # ------------------------------------------------------------------ walking

    def enter(self, leaf: int, value: Value) -> Value:
        """What a leaf is at the start."""
        return value

    def record(self, value: Value) -> Value:
        """Remember an array for the question which permutations may depend on what."""
        self.arrays[Array(value.axes, value.uniform, self.context)] = None
        return value

    def run(
        self,
        jaxpr: Any,
        consts: Sequence[Value],
        args: Sequence[Value],
        used: Sequence[bool] | None = None,
    ) -> list[Value]:
        """Walk a jaxpr; only what its used outputs depend on has a say.

        Args:
            jaxpr: An open jaxpr.
            consts: One value per `constvar`.
            args: One value per `invar`.
            used: Which outputs matter; None for all.
        """
        used = tuple(used) if used is not None else (True,) * len(jaxpr.outvars)
        values: dict[Any, Value] = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
        )

        def read(var: Any) -> Value:
            if isinstance(var, core.Literal):
                return constant(var.val)
            value = values[var]
            if not any(value.uniform):
                return value
            # Nothing on an axis along which an array is constant can matter, and what one reader
            # makes of it binds no other.
            axes = zip(value.axes, value.uniform, strict=True)
            return value._replace(axes=tuple(fresh(axis.size) if u else axis for axis, u in axes))

        outer, lines = self.path, self.lines
        for number in self.live(jaxpr, used)[0]:
            eqn = jaxpr.eqns[number]
            self.path, self.lines = (*outer, number), (*lines, eqn.source_info)
            operands = [read(var) for var in eqn.invars]
            out = self._equation(eqn, operands)
            data = any(value.data for value in operands)
            for var, value in zip(eqn.outvars, out, strict=True):
                shape = getattr(var.aval, "shape", ())
                if tuple(axis.size for axis in value.axes) != tuple(shape):
                    raise AssertionError(
                        f"the rule for {eqn.primitive.name} gave axes of sizes "
                        f"{[axis.size for axis in value.axes]} for an array of shape {shape}"
                    )
                values[var] = self.record(value._replace(data=data or value.data))
        self.path = outer
        return [
            read(var) if use else _absent(var) for var, use in zip(jaxpr.outvars, used, strict=True)
        ]

    def inner(self, number: int, jaxpr: Any, args: Sequence[Value], **options: Any) -> list[Value]:
        """Walk a jaxpr inside the present equation, closed or open."""
        consts = getattr(jaxpr, "consts", ())
        outer, self.path = self.path, (*self.path, number)
        out = self.run(
            getattr(jaxpr, "jaxpr", jaxpr), [constant(c) for c in consts], args, **options
        )
        self.path = outer
        return out

    def _equation(self, eqn: Any, operands: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        rule: Any = _RULES.get(name)
        out = rule(self, eqn, operands) if rule else None
        if out is not None:
            return out
        shapes = [getattr(var.aval, "shape", ()) for var in eqn.outvars]
        for value in operands:
            for axis in value.axes:
                pin(axis, mixed=True)
        touched = [axis for value in operands for axis in value.axes]
        extents = [axis.size for axis in touched] + [n for s in shapes for n in s]
        if name not in SILENT and any(n > 1 for n in extents):
            # Inside a function of JAX's own, the line of the user's code is the caller's.
            found = [source_info_util.summarize(line) for line in reversed(self.lines)]
            where = next((line for line in found if line), "an unknown line")
            note = f"{name} at {where}: there is no rule for it; every axis it touches is fixed."
            if note not in self.notes:
                self.notes.append(note)
        return [Value(tuple(fixed(n, touched) for n in s), (False,) * len(s)) for s in shapes]


def _absent(var: Any) -> Value:
    shape = getattr(var.aval, "shape", ())
    return Value(tuple(fixed(n) for n in shape), (False,) * len(shape))


# --------------------------------------------------------------------------- front doors


def permutation_spec(
    apply_fn: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    statistics: Selection | None = None,
    pinned: Selection = (),
) -> PermutationSpec:
    """The permutation symmetries of `apply_fn(params, *inputs)` in its parameters.

    Every permutation that the spec admits leaves the outputs as they are, for any parameters and
    inputs of these shapes; `check` tests that in numbers. The converse is not promised: what the
    rules cannot follow is fixed.

    Args:
        apply_fn: Any function of parameters and inputs that JAX can trace, in evaluation mode
            (dropout fixes what it touches).
        params: A pytree of arrays or `jax.ShapeDtypeStruct`. Running statistics belong in here.
        *inputs: Example inputs, or their shapes. Their axes stay in place, as do the outputs'.
        statistics: Which leaves are running statistics: glob patterns over paths with slashes, or a
            predicate of the path; by default all below a first key "batch_stats" or "state".
        pinned: Leaves whose axes shall stay in place, selected likewise.

    Returns:
        The spec. Groups are in order of their first place and carry its name.

    Raises:
        SpecError: If a pattern matches no leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> def mlp(params, x):
        ...     return jnp.tanh(x @ params["w1"] + params["b1"][None]) @ params["w2"]
        >>> shapes = {"w1": (3, 8), "b1": (8,), "w2": (8, 2)}
        >>> params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
        >>> spec = permutation_spec(mlp, params, jnp.zeros((5, 3)))
        >>> spec.members("w1:1")
        [("['b1']", 0), ("['w1']", 1), ("['w2']", 0)]

    Reference:
        Ainsworth, Hayase, Srinivasa, Git Re-Basin: Merging models modulo permutation symmetries,
        2023, whose specs are written by hand.
    """
    analysis = analyze(apply_fn, params, *inputs, statistics=statistics, pinned=pinned)
    return analysis.spec


def analyze(
    apply_fn: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    statistics: Selection | None = None,
    pinned: Selection = (),
) -> Analysis:
    """The spec together with the jaxpr that it was read off, and where in it groups are read.

    Args:
        apply_fn: As for `permutation_spec`.
        params: As for `permutation_spec`.
        *inputs: As for `permutation_spec`.
        statistics: As for `permutation_spec`.
        pinned: As for `permutation_spec`.
    """
    naming, closed, unused = walked(apply_fn, params, inputs, statistics, pinned)
    for note in naming.walk.notes:
        warnings.warn(f"permutation_spec: {note}", stacklevel=3)
    spec = naming.spec(unused)
    return Analysis(spec, naming.sites(spec), closed, len(naming.leaves))


def fixed_places(
    apply_fn: Callable[..., Any], params: PyTree, *inputs: Any
) -> list[list[tuple[str, int, Layout]]]:
    """What might be a symmetry beyond those that are proved: candidates for `completeness`.

    Returns:
        For each candidate its (leaf path, axis, layout) triples; what moves is called "#".
    """
    naming, _, _ = walked(apply_fn, params, inputs)
    return naming.candidates()


def walked(
    apply_fn: Callable[..., Any],
    params: PyTree,
    inputs: tuple[Any, ...],
    statistics: Selection | None = None,
    pinned: Selection = (),
    walk: Walk | None = None,
) -> "tuple[Naming, Any, tuple[str, ...]]":
    """The function's groups with names, its closed jaxpr, and the paths of leaves not read."""
    params, inputs = jax.tree.map(_abstract, (params, inputs))
    paths = tree.paths(params)
    leaves = jax.tree.leaves(params)
    closed = jax.make_jaxpr(apply_fn)(params, *inputs)
    walk = Walk() if walk is None else walk
    start = [
        Value(tuple(fresh(n) for n in np.shape(leaf)), (False,) * np.ndim(leaf)) for leaf in leaves
    ]
    given = [
        Value(tuple(fixed(n) for n in v.aval.shape), (False,) * len(v.aval.shape), data=True)
        for v in closed.jaxpr.invars[len(leaves) :]
    ]
    for value in start:
        walk.record(value)
    start = [walk.enter(i, value) for i, value in enumerate(start)]
    out = walk.run(closed.jaxpr, [constant(c) for c in closed.consts], [*start, *given])
    for value in out:
        for axis, uniform in zip(value.axes, value.uniform, strict=True):
            if not uniform:
                pin(axis)
    used = walk.live(closed.jaxpr, (True,) * len(out))[1]
    unused = tuple(path for path, use in zip(paths, used, strict=False) if not use)
    held = _selected(pinned, paths, "pinned") | set(unused)
    for path, value in zip(paths, start, strict=True):
        if path in held:
            for axis in value.axes:
                pin(axis)
    ends = {atom for value in (*given, *out) for axis in value.axes for atom in atoms(axis)}
    naming = Naming(paths, leaves, start, _statistics(statistics, paths), walk, ends)
    return naming, closed, unused


def _abstract(leaf: Any) -> Any:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return leaf


def _selected(patterns: Selection, paths: list[str], which: str) -> set[str]:
    if callable(patterns):
        return {path for path in paths if patterns(path)}
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {path for path in paths if fnmatchcase(short(path), pattern)}
        if not hits:
            raise SpecError(
                f"the pattern {pattern!r} in {which} matches no leaf; paths are "
                f"{', '.join(short(path) for path in paths[:6])} ..."
            )
        found |= hits
    return found


def _statistics(chosen: Selection | None, paths: list[str]) -> set[str]:
    if chosen is None:
        return {p for p in paths if short(p).split("/")[0] in ("batch_stats", "state")}
    return _selected(chosen, paths, "statistics")


# --------------------------------------------------------------------------- groups and names


class _Place(NamedTuple):
    """A factor of an axis of a leaf; in order of leaves, axes and factors."""

    leaf: int
    axis: int
    factor: int
    last: bool
    statistic: bool


class Naming:
    """Which atoms are groups, what they are called, and layouts in terms of those names."""

    def __init__(
        self,
        paths: list[str],
        leaves: list[Any],
        values: list[Value],
        statistics: set[str],
        walk: Walk,
        ends: set[Atom],
    ):
        self.paths, self.leaves, self.values = paths, leaves, values
        self.statistics, self.walk, self.ends = statistics, walk, ends
        self.places: dict[Atom, list[_Place]] = {}
        self.count: dict[tuple[int, int], int] = {}
        for i, value in enumerate(values):
            for j, axis in enumerate(value.axes):
                found = list(atoms(axis))
                self.count[i, j] = len(found)
                for n, atom in enumerate(found):
                    place = _Place(i, j, n, j == len(value.axes) - 1 > 0, paths[i] in statistics)
                    self.places.setdefault(atom, []).append(place)
        products, reductions = set(), set()
        for read in walk.reads:
            for axis in read.summed:
                (products if read.product else reductions).update(atoms(read.value.axes[axis]))
        self.read = products | reductions
        # What no equation reads was sliced off, for one the rows of a table past the example's
        # length; another input may well read it.
        self.groups = [
            atom
            for atom, places in self.places.items()
            if not atom.pinned
            and atom in self.read
            and any(jax.numpy.issubdtype(leaves[p.leaf].dtype, jax.numpy.inexact) for p in places)
        ]
        self.free = {atom for atom in self.groups if atom not in products}
        self.index = dependence(
            self.groups, list(self.places), list(walk.arrays), walk.sums, [v.axes for v in values]
        )
        self.names: dict[Atom, str] = {}
        for atom in self.groups:
            self._name(atom)
        for atom in [h for found in self.index.values() for h in found]:
            if atom not in self.names:
                self._name(atom)

    def _name(self, atom: Atom) -> None:
        places = [p for p in self.places[atom] if not p.statistic] or self.places[atom]
        first = next((p for p in places if p.last), places[0])
        name = f"{short(self.paths[first.leaf])}:{first.axis}"
        if self.count[first.leaf, first.axis] > 1:
            name += f".{first.factor}"
        while name in self.names.values():
            name += "'"
        self.names[atom] = name

    def layout(self, axis: Axis, names: dict[Atom, str] | None = None) -> Layout:
        """An axis in names; runs of what stays in place become one factor."""
        names = self.names if names is None else names
        axis = head(axis)
        if isinstance(axis, Atom):
            return Factor(names.get(axis, ""), axis.size)
        joined = isinstance(axis, Joined)
        parts: list[Layout] = []
        for layout in (self.layout(part, names) for part in axis.parts):
            last = parts[-1] if parts else None
            if last is not None and _in_place(layout) and _in_place(last):
                sizes = layout_size(last), layout_size(layout)
                parts[-1] = Factor("", sum(sizes) if joined else math.prod(sizes))
            else:
                parts.append(layout)
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Factor("", axis.size)
        return Concatenation(tuple(parts)) if joined else Product(tuple(parts))

    def spec(self, unused: tuple[str, ...]) -> PermutationSpec:
        """The groups as a spec."""
        return PermutationSpec(
            leaves=tuple(
                Leaf(
                    path,
                    tuple(np.shape(leaf)),
                    tuple(self.layout(axis) for axis in value.axes),
                    path in self.statistics,
                )
                for path, leaf, value in zip(self.paths, self.leaves, self.values, strict=True)
            ),
            groups=tuple(
                Group(
                    self.names[atom],
                    atom.size,
                    tuple(self.names[h] for h in self.index[atom]),
                    tuple(h.size for h in self.index[atom]),
                    free=atom in self.free,
                )
                for atom in self.groups
            ),
            unused=unused,
            notes=tuple(self.walk.notes),
        )

    def sites(self, spec: PermutationSpec) -> dict[str, tuple[Site, ...]]:
        """For each group, where it is read; see `Analysis`."""
        found: dict[str, list[Site]] = {group.name: [] for group in spec.groups}
        for read in self.walk.reads:
            if not read.value.data:
                continue
            on = {a for axis in read.summed for a in atoms(read.value.axes[axis])}
            names = [
                self.names[atom]
                for atom in self.groups
                if atom in on and read.product != (atom in self.free)
            ]
            if not names:
                continue
            site = Site(
                read.path,
                read.operand,
                tuple(self.layout(axis) for axis in read.value.axes),
                read.summed,
                tuple(self.layout(axis) for axis in read.context),
            )
            for name in names:
                found[name].append(site)
        return {name: tuple(sites) for name, sites in found.items()}

    def candidates(self) -> list[list[tuple[str, int, Layout]]]:
        """See `fixed_places`."""
        found: dict[tuple[tuple[str, int, Layout], ...], None] = {}

        def add(chosen: set[Atom], only: tuple[int, int] | None = None) -> None:
            places = sorted(
                {(p.leaf, p.axis) for atom in chosen for p in self.places.get(atom, ())}
            )
            names = dict.fromkeys(chosen, "#")
            found[
                tuple(
                    (self.paths[i], j, self.layout(self.values[i].axes[j], names))
                    for i, j in places
                    if only is None or only == (i, j)
                )
            ] = None

        read = [
            atom for atom in self.places if atom in self.read or atom.mixed or atom in self.ends
        ]
        for atom in read:
            if atom.pinned:
                for place in self.places[atom]:
                    add({atom}, (place.leaf, place.axis))
            if atom not in self.ends:
                add({atom})
        kin = {atom: _kin(atom) for atom in read}
        for atom in read:
            others = {a for a in read if a.size == atom.size and kin[a] & kin[atom]}
            if len(others) > 1 and not (kin[atom] | others) & self.ends:
                add(others)
        return [list(places) for places in found]


def _kin(atom: Atom) -> set[Atom]:
    """The atom and what it stands for behind operations that fixed it."""
    out, waiting = set(), [atom]
    while waiting:
        one = waiting.pop()
        if one in out:
            continue
        out.add(one)
        for axis in one.origin:
            found = head(axis)
            if isinstance(found, Atom):
                waiting.append(found)
    return out


def _in_place(layout: Layout) -> bool:
    return isinstance(layout, Factor) and not layout.name
