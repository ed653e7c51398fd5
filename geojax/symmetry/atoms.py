"""Axes as expressions in atoms, and the union-find that decides which atoms are one.

An atom may be bound to an expression later: every array that mentions it then reads the expression,
so a reshape deep in a network refines the axis of a parameter that was read long before.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

__all__ = [
    "UNIT",
    "Atom",
    "Axis",
    "Joined",
    "Nested",
    "alternatives",
    "atoms",
    "cut",
    "fixed",
    "fresh",
    "head",
    "is_pinned",
    "joined",
    "mix",
    "nested",
    "pin",
    "unify",
]

# Past this many pieces an axis is fixed: two shifted copies of a long axis would refine each other
# down to single positions, which leaves nothing to permute anyway.
_MOST_PARTS = 256


class Atom:
    """An axis that is permuted as a whole, or not at all.

    Attributes:
        size: The number of positions, at least 2.
        bound: What it turned out to be: the atom that it was united with, or an expression.
        pinned: Whether it stays in place.
        mixed: Whether an operation carried entries from one of its positions to another, so that no
            permutation may depend on the position.
        origin: Axes of equal size that it stands for on the other side of an operation that had to
            fix both.
    """

    __slots__ = ("bound", "mixed", "origin", "pinned", "size")

    def __init__(self, size: int, pinned: bool = False):
        self.size = size
        self.bound: Axis | None = None
        self.pinned = pinned
        self.mixed = False
        self.origin: tuple[Axis, ...] = ()


class Nested:
    """Row-major product; the last part runs fastest. Without parts, an axis of one position."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: "tuple[Axis, ...]"):
        self.parts = parts
        self.size = math.prod(part.size for part in parts)


class Joined:
    """Parts one after the other."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: "tuple[Axis, ...]"):
        self.parts = parts
        self.size = sum(part.size for part in parts)


Axis = Atom | Nested | Joined
UNIT = Nested(())


def fresh(size: int) -> Axis:
    """An axis of which nothing is known."""
    return UNIT if size == 1 else Atom(size)


def fixed(size: int, origin: Iterable[Axis] = ()) -> Axis:
    """An axis that stays in place, and that is no other axis."""
    if size == 1:
        return UNIT
    atom = Atom(size, pinned=True)
    atom.origin = tuple(axis for axis in origin if axis.size == size)
    return atom


def head(axis: Axis) -> Axis:
    """The axis as it is known now, down to its first level: what is bound is followed.

    A product or concatenation comes back flat, without parts of its own kind.
    """
    if isinstance(axis, Atom):
        bound = axis.bound
        if bound is None:
            return axis
        found = head(bound)
        axis.bound = found  # shorter from now on
        return found
    if isinstance(axis, Nested):
        return nested(axis.parts) if axis.parts else UNIT
    return joined(axis.parts)


def nested(parts: Iterable[Axis]) -> Axis:
    """The row-major product of axes, flat and without axes of one position."""
    flat: list[Axis] = []
    for part in parts:
        part = head(part)
        if isinstance(part, Nested):
            flat += part.parts
        elif part.size > 1:
            flat.append(part)
    return flat[0] if len(flat) == 1 else Nested(tuple(flat)) if flat else UNIT


def joined(parts: Iterable[Axis]) -> Axis:
    """The concatenation of axes, flat."""
    flat: list[Axis] = []
    for part in parts:
        part = head(part)
        if isinstance(part, Joined):
            flat += part.parts
        elif part.size:
            flat.append(part)
    return flat[0] if len(flat) == 1 else Joined(tuple(flat))


def atoms(axis: Axis) -> Iterator[Atom]:
    """The atoms of an axis, as they are known now, with repetitions."""
    axis = head(axis)
    if isinstance(axis, Atom):
        yield axis
    else:
        for part in axis.parts:
            yield from atoms(part)


def alternatives(axis: Axis) -> list[tuple[Atom, ...]]:
    """For each part of the concatenations in an axis, the product of atoms that it is."""
    axis = head(axis)
    if isinstance(axis, Atom):
        return [(axis,)]
    parts = [alternatives(part) for part in axis.parts]
    if isinstance(axis, Joined):
        return [atom for part in parts for atom in part]
    return [tuple(a for one in choice for a in one) for choice in itertools.product(*parts)]


def is_pinned(axis: Axis) -> bool:
    """Whether the whole axis stays in place."""
    return all(atom.pinned for atom in atoms(axis))


def pin(axis: Axis, mixed: bool = False) -> None:
    """Fix an axis; with `mixed`, also forbid that permutations depend on its position."""
    for atom in atoms(axis):
        atom.pinned = True
        atom.mixed |= mixed


def mix(axis: Axis) -> None:
    """Forbid that permutations depend on the position along an axis."""
    for atom in atoms(axis):
        atom.mixed = True


def unify(first: Axis, second: Axis) -> None:
    """Make two axes of equal size one: from here on they are permuted alike.

    Products are aligned row-major and concatenations at their boundaries, cutting atoms where that
    is needed; what cannot be aligned is pinned on both sides.
    """
    first, second = head(first), head(second)
    if first is second or first.size <= 1:
        return
    if isinstance(first, Atom):
        _bind(first, second)
    elif isinstance(second, Atom):
        _bind(second, first)
    elif isinstance(first, Joined) and isinstance(second, Joined):
        _align_joined(first.parts, second.parts)
    else:
        _align_nested(
            first.parts if isinstance(first, Nested) else (first,),
            second.parts if isinstance(second, Nested) else (second,),
        )


def _bind(atom: Atom, axis: Axis) -> None:
    atom.bound = axis
    for part in atoms(axis):
        part.pinned |= atom.pinned
        part.mixed |= atom.mixed
    if isinstance(axis, Atom):
        axis.origin += atom.origin


def _align_nested(first: Sequence[Axis], second: Sequence[Axis]) -> None:
    left, right = list(first), list(second)
    while left and right:
        a, b = head(left.pop()), head(right.pop())
        if isinstance(a, Nested) or isinstance(b, Nested):
            left += a.parts if isinstance(a, Nested) else (a,)
            right += b.parts if isinstance(b, Nested) else (b,)
            continue
        if a.size == b.size:
            unify(a, b)
            continue
        if a.size < b.size:
            a, b, left, right = b, a, right, left
        halves = _split(a, b.size)
        if halves is None:
            return _give_up([*left, *right, a, b])
        unify(halves[1], b)
        left.append(halves[0])
    return None


def _split(axis: Axis, inner_size: int) -> tuple[Axis, Axis] | None:
    """An axis as a product whose fast part has `inner_size` positions; None if it is none."""
    axis = head(axis)
    if axis.size % inner_size:
        return None
    if axis.size == inner_size:
        return UNIT, axis
    if isinstance(axis, Atom):
        outer, inner = fresh(axis.size // inner_size), fresh(inner_size)
        _bind(axis, nested([outer, inner]))
        return outer, inner
    if isinstance(axis, Nested):
        inner: Axis = UNIT
        rest = list(axis.parts)
        while rest and inner.size < inner_size:
            part = rest.pop()
            missing = inner_size // inner.size
            if inner_size % inner.size:
                return None
            if missing % part.size:
                halves = _split(part, missing)
                if halves is None:
                    return None
                rest.append(halves[0])
                part = halves[1]
            inner = nested([part, inner])
        return (nested(rest), inner) if inner.size == inner_size else None
    if any(part.size % inner_size for part in axis.parts):
        return None
    pairs = [_split(part, inner_size) for part in axis.parts]
    found = [pair for pair in pairs if pair is not None]
    if len(found) < len(pairs):
        return None
    for _, inner in found[1:]:
        unify(found[0][1], inner)
    return joined(outer for outer, _ in found), found[0][1]


def _align_joined(first: Sequence[Axis], second: Sequence[Axis]) -> None:
    left, right = list(first)[::-1], list(second)[::-1]
    if all(is_pinned(axis) for axis in (*first, *second)):
        return None  # in place on both sides already; cutting would only make splinters
    steps = 0
    while left and right:
        a, b = head(left.pop()), head(right.pop())
        if isinstance(a, Joined) or isinstance(b, Joined):
            left += a.parts[::-1] if isinstance(a, Joined) else (a,)
            right += b.parts[::-1] if isinstance(b, Joined) else (b,)
            continue
        steps += 1
        if a.size == b.size and steps < _MOST_PARTS:
            unify(a, b)
            continue
        if a.size < b.size:
            a, b, left, right = b, a, right, left
        pieces = cut(a, b.size) if steps < _MOST_PARTS else None
        if pieces is None:
            return _give_up([*left, *right, a, b])
        unify(pieces[0], b)
        left.append(pieces[1])
    return None


def cut(axis: Axis, at: int) -> tuple[Axis, Axis] | None:
    """An axis as the concatenation of its first `at` positions and the others, or None.

    A product is cut where the boundary does not go through its fast parts.
    """
    axis = head(axis)
    if not 0 < at < axis.size:
        raise ValueError(f"cannot cut an axis of {axis.size} positions at {at}.")
    if isinstance(axis, Atom):
        pieces = fresh(at), fresh(axis.size - at)
        _bind(axis, Joined(pieces))
        return pieces
    if isinstance(axis, Joined):
        before: list[Axis] = []
        for i, part in enumerate(axis.parts):
            if at == 0:
                return joined(before), joined(axis.parts[i:])
            if at < part.size:
                pieces = cut(part, at)
                if pieces is None:
                    return None
                return joined([*before, pieces[0]]), joined([pieces[1], *axis.parts[i + 1 :]])
            before.append(part)
            at -= part.size
        return None
    slow, fast = axis.parts[0], axis.parts[1:]
    width = math.prod(part.size for part in fast)
    if at % width:
        return None
    pieces = cut(slow, at // width)
    if pieces is None:
        return None
    return nested([pieces[0], *fast]), nested([pieces[1], *fast])


def _give_up(axes: Iterable[Axis]) -> None:
    for axis in axes:
        pin(axis, mixed=True)
