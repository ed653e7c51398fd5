"""On which axes the permutation of another axis may depend: heads, scanned layers, channel blocks.

The permutation of k may be a different one at each position of h if every array that has k also has
h, once, and no operation brings entries of different h together while k is there.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from geojax.symmetry.atoms import Atom, Axis, alternatives, atoms

__all__ = ["Array", "Sum", "dependence"]


class Array(NamedTuple):
    """An array: its axes, whether it is constant along each, and the scans that it is inside of."""

    axes: tuple[Axis, ...]
    uniform: tuple[bool, ...]
    context: tuple[Axis, ...]


class Sum(NamedTuple):
    """A sum of products of two arrays.

    Attributes:
        pairs: The axes summed over; and whether an array is constant along them, so that they are
            summed over in the other one alone.
        free: For each array, the axes that the other one has not.
    """

    pairs: tuple[tuple[Axis, bool], ...]
    free: tuple[tuple[Axis, ...], ...]


def dependence(
    groups: Sequence[Atom],
    placed: Sequence[Atom],
    arrays: Sequence[Array],
    sums: Sequence[Sum],
    leaves: Sequence[tuple[Axis, ...]],
) -> dict[Atom, tuple[Atom, ...]]:
    """For each group, the atoms that its permutation may depend on, outermost first.

    Args:
        groups: The atoms that are permuted.
        placed: All atoms of leaves, in order of their first place.
        arrays: Every array of the computation, leaves included.
        sums: Every sum of products.
        leaves: The axes of each leaf.
    """
    keys = set(groups)
    # Entries met or moved along a mixed atom: what is at one of its positions is not apart.
    indices = {atom for atom in placed if not atom.mixed}
    allowed: dict[Atom, set[Atom]] = {atom: indices - {atom} for atom in groups}
    seen = set()
    for array in arrays:
        axes = tuple(tuple(alternatives(axis)) for axis in (*array.axes, *array.context))
        uniform = (*array.uniform, *(True for _ in array.context))
        if (axes, uniform) in seen:
            continue
        seen.add((axes, uniform))
        _narrow(axes, uniform, keys, allowed)
    for one in sums:
        summed = {atom for axis, _ in one.pairs for atom in atoms(axis)}
        free = [{atom for axis in axes for atom in atoms(axis)} for axes in one.free]
        for axis, uniform in one.pairs:
            for atom in () if uniform else atoms(axis):
                if atom in keys:
                    allowed[atom] -= free[0] | free[1]
        for atom in (free[0] | free[1]) & keys:
            allowed[atom] -= summed
    for axes in leaves:
        _writable(axes, keys, allowed)
    rank = {atom: i for i, atom in enumerate(placed)}
    for atom in groups:
        # Two that always come together could each depend on the other; the first one leads.
        allowed[atom] = {
            h for h in allowed[atom] if rank[h] < rank[atom] or atom not in allowed.get(h, ())
        }
    for axes in leaves:
        _break_circles(axes, allowed)
    return {
        atom: tuple(sorted(allowed[atom], key=lambda h: (len(allowed.get(h, ())), rank[h])))
        for atom in groups
    }


def _narrow(
    axes: Sequence[Sequence[tuple[Atom, ...]]],
    uniform: Sequence[bool],
    keys: set[Atom],
    allowed: dict[Atom, set[Atom]],
) -> None:
    """Keep for each atom of an array what accompanies it exactly once, wherever it is."""
    if not any(atom in keys for axis in axes for one in axis for atom in one):
        return
    counts = [[Counter(one) for one in axis] for axis in axes]
    for i, axis in enumerate(counts):
        if uniform[i]:
            continue
        others = [counts[j] for j in range(len(counts)) if j != i]
        for own in axis:
            for atom in own.keys() & keys:
                allowed[atom] = {h for h in allowed[atom] if _number(h, own, others) == 1}


def _number(atom: Atom, own: Counter[Atom], others: list[list[Counter[Atom]]]) -> int:
    """How often an atom occurs beside one alternative of an axis; -1 if that varies."""
    total = own[atom]
    for alternative in others:
        found = {one[atom] for one in alternative}
        if len(found) > 1:
            return -1
        total += found.pop()
    return total


def _writable(axes: tuple[Axis, ...], keys: set[Atom], allowed: dict[Atom, set[Atom]]) -> None:
    """Drop what a spec cannot say: an index spread over the parts of another axis."""
    spread = []
    for axis in axes:
        found = alternatives(axis)
        spread.append({atom for one in found for atom in one} if len(found) > 1 else set())
    for i, axis in enumerate(axes):
        elsewhere = set().union(*(spread[j] for j in range(len(axes)) if j != i))
        for atom in atoms(axis):
            if atom in keys:
                allowed[atom] -= elsewhere


def _break_circles(axes: tuple[Axis, ...], allowed: dict[Atom, set[Atom]]) -> None:
    """Drop dependences until the axes of a leaf can be moved one after the other."""
    names = [set(atoms(axis)) for axis in axes]
    waiting = list(range(len(axes)))
    while waiting:
        for axis in waiting:
            others = set().union(*(names[i] for i in waiting if i != axis)) - names[axis]
            if not any(allowed.get(atom, set()) & others for atom in names[axis]):
                break
        else:
            axis = waiting[-1]
            others = set().union(*(names[i] for i in waiting if i != axis)) - names[axis]
            for atom in names[axis] & allowed.keys():
                allowed[atom] -= others
        waiting.remove(axis)
