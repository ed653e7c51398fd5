"""The sum of bilinear assignment problems that weight matching is, on the host.

Every leaf is cut into blocks with one axis per group; a block is a term <a, pi(b)> of the
objective. All else (scores, gains, relaxations) is written for terms, whatever the layer was.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from geojax import assignment
from geojax.symmetry.action import Monomial
from geojax.symmetry.spec import Leaf, PermutationSpec, SpecError, blocks

__all__ = [
    "Dense",
    "Hard",
    "Key",
    "Problem",
    "Term",
    "host_leaves",
    "inner",
    "make_problem",
    "products",
]

PyTree = Any
# A group's name, and the positions of the fixed indices (scan layers) that it depends on.
Key = tuple[str, tuple[int, ...]]
# Above this many leading slices a copy in one piece beats a loop of products.
_MAX_SLICES = 32
# Assignments of so many units, whose neighbours have changed by no more than this, start from the
# last duals; else a solve from nothing is faster.
_MIN_WARM = 256
_MAX_DRIFT = 0.3


@dataclasses.dataclass(frozen=True)
class Hard:
    """A permutation: unit i of A goes with unit `order[i]` of B, times `sign[i]`."""

    order: np.ndarray
    sign: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Dense:
    """A relaxed permutation: a matrix, rows of A by columns of B."""

    matrix: np.ndarray


# None is the barycentre: every permutation at once, at equal weights.
State = dict[Key, Hard | Dense | None]


@dataclasses.dataclass(frozen=True)
class Term:
    """<a, pi(b)> for one block; an axis without a key is moved by nothing."""

    path: str
    a: np.ndarray
    b: np.ndarray
    keys: tuple[Key | None, ...]
    odd: tuple[bool, ...]  # whether an axis takes the sign of its group

    @property
    def bound(self) -> float:
        """No permutation gives more (Cauchy-Schwarz)."""
        return float(np.sqrt(inner(self.a, self.a)) * np.sqrt(inner(self.b, self.b)))


class Problem:
    """Terms, the groups that move them, and the scores of one group given the others.

    Attributes:
        terms: The blocks with at least one group.
        parents: For each group the groups on which its permutation depends, outermost first.
        sizes: The number of units in A and in B.
        constant: The inner product of all that no group moves.
        signed: The groups that may also change signs.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        parents: Mapping[Key, tuple[Key, ...]],
        constant: float = 0.0,
        signed: Iterable[Key] = (),
        score: str = "inner",
        sizes: Mapping[Key, int] | None = None,
    ):
        self.terms = tuple(terms)
        self.parents = dict(parents)
        self.constant = constant
        self.signed = frozenset(signed)
        self.score = score
        self.places: dict[Key, list[tuple[int, int]]] = {key: [] for key in self.parents}
        self.sizes: dict[Key, tuple[int, int]] = {k: (n, n) for k, n in (sizes or {}).items()}
        for t, term in enumerate(self.terms):
            for axis, key in enumerate(term.keys):
                if key is not None:
                    self.places[key].append((t, axis))
                    self.sizes[key] = (term.a.shape[axis], term.b.shape[axis])
        # What acts on running statistics alone is matched by nothing, and stays.
        self.roots = [key for key, above in self.parents.items() if not above and self.places[key]]
        self.family = {
            root: [key for key, above in self.parents.items() if root in above]
            for root in self.roots
        }
        self.plain = [key for key in self.roots if not self.family[key]]
        self.bound = constant + sum(term.bound for term in self.terms)
        self.version = dict.fromkeys(self.parents, 0)
        self.num_solves = 0
        # How many units of each group have changed partner, in all and as shares; and for each
        # group where that stood when it was last solved, with the duals of that solution.
        self._drift = dict.fromkeys(self.parents, 0.0)
        self._duals: dict[Key, tuple[float, assignment.WarmStart | None]] = {}
        self._scores: dict[tuple[int, int], tuple[Any, np.ndarray]] = {}

    # ------------------------------------------------------------------ states

    def identity(self) -> State:
        """Every unit of A with the unit of B in its place."""
        state: State = {}
        for key, above in self.parents.items():
            shape = tuple(self.sizes[parent][0] for parent in above)
            n = self.sizes[key][0]
            state[key] = Hard(np.broadcast_to(np.arange(n), (*shape, n)).copy())
        return state

    def unknown(self) -> State:
        """Every group at the barycentre, but those that no parameter has."""
        held = {key for root in self.roots for key in (root, *self.family[root])}
        return {key: None if key in held else x for key, x in self.identity().items()}

    def touch(self, keys: Iterable[Key], share: float = 1.0) -> None:
        """Say that these groups have changed, by this share, so that their scores are stale."""
        for key in keys:
            self.version[key] += 1
            self._drift[key] += share

    def repeated(self, root: Key) -> bool:
        """Whether some leaf has the group on two axes, so that its scores depend on itself."""
        terms = [t for t, _ in self.places[root]]
        return len(set(terms)) < len(terms)

    def neighbors(self, root: Key) -> set[Key]:
        """The groups on which the scores of a root and its family depend."""
        own = {root, *self.family[root]}
        found = {k for t, _ in self.places[root] for k in self.terms[t].keys if k is not None}
        return found - own

    # ------------------------------------------------------------------ moving b

    def moved(self, term: Term, state: State, skip: Sequence[int] = ()) -> np.ndarray:
        """`b` with every axis moved but those of `skip`; a barycentre leaves one mean entry."""
        b = term.b
        # Outer axes first: what depends on them is indexed by the new position.
        axes = [x for x, key in enumerate(term.keys) if key is not None and x not in skip]
        for axis in sorted(axes, key=lambda x: len(self.parents[term.keys[x]])):  # type: ignore[index]
            key = term.keys[axis]
            assert key is not None
            entry = state[key]
            if entry is None:
                b = b.mean(axis, keepdims=True, dtype=b.dtype)
                if term.odd[axis] and key in self.signed:
                    b = np.zeros_like(b)  # the mean over both signs
                continue
            if isinstance(entry, Dense):
                b = np.moveaxis(np.tensordot(entry.matrix, b, (1, axis)), 0, axis)
                continue
            above = self.parents[key]
            if not above:
                b = b.take(entry.order, axis)
            else:
                where = [term.keys.index(parent) for parent in above]
                shape = [1] * b.ndim
                for x in (*where, axis):
                    shape[x] = -1
                order = np.moveaxis(
                    entry.order, range(len(above) + 1), np.argsort(np.argsort([*where, axis]))
                )
                full = [entry.order.shape[[*where, axis].index(x)] if x in (*where, axis) else 1
                        for x in range(b.ndim)]  # fmt: skip
                b = np.take_along_axis(b, order.reshape(full), axis)
            if entry.sign is not None and term.odd[axis]:
                b = b * entry.sign.reshape([-1 if x == axis else 1 for x in range(b.ndim)])
        return b

    def value(self, state: State, terms: Iterable[int] | None = None) -> float:
        """The objective in float64; with `terms`, of those alone."""
        chosen = range(len(self.terms)) if terms is None else terms
        total = self.constant if terms is None else 0.0
        for t in chosen:
            term = self.terms[t]
            total += inner(term.a, self.moved(term, state))
        return float(total)

    # ------------------------------------------------------------------ scores

    def place_scores(self, t: int, axis: int, state: State) -> np.ndarray:
        """d<a, pi(b)> / d(matrix of the group at one axis), with all else at `state`."""
        term = self.terms[t]
        others = [k for x, k in enumerate(term.keys) if k is not None and x != axis]
        stamp = tuple(self.version[k] for k in others)
        cached = self._scores.get((t, axis))
        if cached is not None and cached[0] == stamp:
            return cached[1]
        a = term.a
        for x, k in enumerate(term.keys):
            if k is not None and x != axis and state[k] is None:
                a = a.sum(x, keepdims=True)
        b = self.moved(term, state, skip=(axis,))
        scores = products(a, b, axis)
        if self.score == "cosine":
            rows, columns = (
                np.sqrt(np.square(x, dtype=np.float64).sum(tuple(set(range(x.ndim)) - {axis})))
                for x in (a, b)
            )
            scale = rows[:, None] * columns[None, :]
            scores = np.where(scale > 0, scores / np.where(scale > 0, scale, 1), 0)
        self._scores[t, axis] = (stamp, scores)
        return scores

    def scores(self, key: Key, state: State) -> tuple[np.ndarray, np.ndarray | None]:
        """The score of each pair of units of a group; and its part that changes sign with them."""
        even = odd = None
        for t, axis in self.places[key]:
            part = self.place_scores(t, axis, state)
            if key in self.signed and self.terms[t].odd[axis]:
                odd = part if odd is None else odd + part
            else:
                even = part if even is None else even + part
        if even is None:
            assert odd is not None
            even = np.zeros_like(odd)
        return even, odd

    def solve(self, key: Key, state: State, warm: bool = False) -> tuple[Hard, np.ndarray]:
        """The best permutation of a group without dependents, given all others; and its scores."""
        even, odd = self.scores(key, state)
        total = even if odd is None else even + np.abs(odd)
        self.num_solves += 1
        order = self._assigned(key, total, state[key]) if warm else assignment.solve(total).columns
        sign = None
        if odd is not None:
            sign = np.where(odd[np.arange(len(order)), order] < 0, -1, 1).astype(odd.dtype)
        return Hard(order, sign), total

    def _assigned(self, key: Key, scores: np.ndarray, entry: Any) -> np.ndarray:
        """The assignment of a group; from its last duals where little has changed since."""
        previous = entry.order if isinstance(entry, Hard) else None
        n, m = scores.shape
        drift = sum(self._drift[k] for k in self.neighbors(key))
        at, duals = self._duals.get(key, (-np.inf, None))
        if n != m or n < _MIN_WARM or drift - at > _MAX_DRIFT:
            self._duals[key] = (drift, None)
            return assignment.solve(scores, previous=previous).columns
        found, duals = assignment.resolve(
            scores, duals if duals is not None else assignment.start(n)
        )
        self._duals[key] = (drift, duals)
        return found.columns

    def gain(self, key: Key, state: State, new: Hard) -> float:
        """By how much the objective rises in float64 when one group without dependents changes."""
        old = state[key]
        assert isinstance(old, Hard)
        places = self.places[key]
        if key in self.signed or len({t for t, _ in places}) < len(places):
            terms = sorted({t for t, _ in places})
            return self.value({**state, key: new}, terms) - self.value(state, terms)
        changed = np.flatnonzero(old.order != new.order)
        total = 0.0
        for t, axis in places if len(changed) else ():
            term = self.terms[t]
            b = self.moved(term, state, skip=(axis,))
            a = term.a.take(changed, axis)
            total += inner(a, b.take(new.order[changed], axis))
            total -= inner(a, b.take(old.order[changed], axis))
        return total

    # ------------------------------------------------------------------ groups within groups

    def solve_family(self, root: Key, state: State) -> dict[Key, Hard]:
        """The best joint permutation of a group and all that depends on it, given the others.

        Two levels: the best inner permutations for every pair of outer units, then the outer
        assignment of those scores. Exact where no term holds two dependent groups; otherwise the
        inner problems are solved as any other, by the progressive method and coordinate descent.
        """
        below = self.family[root]
        if not below:
            return {root: self.solve(root, state)[0]}
        size_a, size_b = self.sizes[root]
        terms = sorted({t for t, _ in self.places[root]})
        simple = all(self.parents[key] == (root,) for key in below) and all(
            sum(key in below for key in self.terms[t].keys) <= 1 for t in terms
        )
        if simple:
            total = np.zeros((size_a, size_b))
            inner: dict[Key, np.ndarray] = {}
            by_key: dict[Key | None, list[int]] = {}
            for t in terms:
                found = next((key for key in self.terms[t].keys if key in below), None)
                by_key.setdefault(found, []).append(t)
            for key, members in by_key.items():
                if key is None:
                    for t in members:
                        total += self.place_scores(t, self.terms[t].keys.index(root), state)
                    continue
                pairs = sum(self._pair_scores(t, root, key, state) for t in members)
                self.num_solves += size_a * size_b
                best = assignment.solve(pairs)
                inner[key] = best.columns
                total += best.value
            outer = assignment.solve(total).columns
            out = {key: Hard(x[np.arange(size_a), outer]) for key, x in inner.items()}
            return {root: Hard(outer), **out}
        return self._solve_nested(root, state, terms)

    def _pair_scores(self, t: int, root: Key, key: Key, state: State) -> np.ndarray:
        """Scores (outer of A, outer of B, inner of A, inner of B) of one term."""
        term = self.terms[t]
        h, k = term.keys.index(root), term.keys.index(key)
        b = self.moved(term, state, skip=(h, k))
        a = term.a
        for x, other in enumerate(term.keys):
            if other is not None and x not in (h, k) and state[other] is None:
                a = a.sum(x, keepdims=True)
        (na, ka), (nb, kb) = ((x.shape[h], x.shape[k]) for x in (a, b))
        left, right = (np.moveaxis(x, (h, k), (0, 1)).reshape(n * m, -1) for x, n, m in (
            (a, na, ka), (b, nb, kb)))  # fmt: skip
        return (left @ right.T).reshape(na, ka, nb, kb).transpose(0, 2, 1, 3)

    def _solve_nested(self, root: Key, state: State, terms: Sequence[int]) -> dict[Key, Hard]:
        from geojax.permute._solvers import solve_from_scratch

        below = self.family[root]
        size_a, size_b = self.sizes[root]
        moved = []
        for t in terms:
            term = self.terms[t]
            own = [x for x, key in enumerate(term.keys) if key == root or key in below]
            b = self.moved(term, state, skip=own)
            keys = tuple(key if x in own else None for x, key in enumerate(term.keys))
            a = term.a
            for x, key in enumerate(term.keys):
                if key is not None and x not in own and state[key] is None:
                    a = a.sum(x, keepdims=True)
            moved.append((dataclasses.replace(term, a=a, b=b, keys=keys), keys.index(root)))
        parents = {key: tuple(p for p in self.parents[key] if p != root) for key in below}
        total = np.zeros((size_a, size_b))
        found: dict[tuple[int, int], dict[Key, Hard]] = {}
        for i, j in itertools.product(range(size_a), range(size_b)):
            inside, constant = [], 0.0
            for term, axis in moved:
                a, b = term.a.take(i, axis), term.b.take(j, axis)
                keys = term.keys[:axis] + term.keys[axis + 1 :]
                odd = term.odd[:axis] + term.odd[axis + 1 :]
                if any(key is not None for key in keys):
                    inside.append(Term(term.path, a, b, keys, odd))
                else:
                    constant += inner(a, b)
            problem = Problem(inside, parents, constant)
            found[i, j], total[i, j] = solve_from_scratch(problem)
            self.num_solves += problem.num_solves
        outer = assignment.solve(total).columns
        out: dict[Key, Hard] = {root: Hard(outer)}
        for key in below:
            # The outer position becomes one more leading index, in its place among the parents.
            place = self.parents[key].index(root)
            rows = [found[i, int(outer[i])][key].order for i in range(size_a)]
            out[key] = Hard(np.stack(rows, place))
        return out


def inner(a: np.ndarray, b: np.ndarray) -> float:
    """<a, b> accumulated in float64, where an axis of length one stands for a constant."""
    if a.shape != b.shape:
        b = np.broadcast_to(b, a.shape)
    letters = list(range(a.ndim))
    return float(np.einsum(a, letters, b, letters, [], dtype=np.float64))


def products(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    """Sum over all other axes of a[.. i ..] b[.. j ..], an (i, j) matrix."""
    before, after = a.shape[:axis], a.shape[axis + 1 :]
    leading, trailing = int(np.prod(before)), int(np.prod(after))
    n, m = a.shape[axis], b.shape[axis]
    if trailing == 1:
        return a.reshape(leading, n).T @ b.reshape(leading, m)
    if leading == 1:
        return a.reshape(n, trailing) @ b.reshape(m, trailing).T
    if leading <= _MAX_SLICES:
        left, right = a.reshape(leading, n, trailing), b.reshape(leading, m, trailing)
        out = left[0] @ right[0].T
        for i in range(1, leading):
            out += left[i] @ right[i].T
        return out
    left, right = (np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for x in (a, b))
    return left @ right.T


# --------------------------------------------------------------------------- from parameters


def host_leaves(spec: PermutationSpec, tree: PyTree, which: str) -> dict[str, np.ndarray]:
    """The leaves that are matched, in host memory, float32 or wider.

    Raises:
        SpecError: If a leaf is missing, has another shape, or is not finite.
        TypeError: If a leaf is not floating.
    """
    out = {}
    leaves = {jax.tree_util.keystr(p) or "(root)": x for p, x in
              jax.tree_util.tree_flatten_with_path(tree)[0]}  # fmt: skip
    for leaf in spec.leaves:
        if leaf.path not in leaves:
            if leaf.statistic:
                continue
            raise SpecError(
                f"leaf {leaf.path} of the spec is missing from {which}; its leaves are "
                f"{', '.join(list(leaves)[:4])} ..."
            )
        value = leaves.pop(leaf.path)
        if leaf.statistic or not leaf.groups():
            continue
        if np.shape(value) != leaf.shape:
            raise SpecError(
                f"leaf {leaf.path} of {which} has shape {np.shape(value)}; the spec was made for "
                f"{leaf.shape}."
            )
        out[leaf.path] = _on_host(value, leaf, which)
    if leaves:
        raise SpecError(
            f"leaf {next(iter(leaves))} of {which} has no place in the spec; derive the spec from "
            "these very parameters."
        )
    return out


def _on_host(value: Any, leaf: Leaf, which: str) -> np.ndarray:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        from jax.experimental import multihost_utils

        value = multihost_utils.process_allgather(value, tiled=True)
    array = np.asarray(value)
    if not jax.numpy.issubdtype(array.dtype, np.floating):
        raise TypeError(
            f"leaf {leaf.path} of {which} is {array.dtype}; expected a floating-point leaf."
        )
    if array.dtype.itemsize < 4:
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise SpecError(
            f"leaf {leaf.path} of {which} has {int((~np.isfinite(array)).sum())} entries that are "
            "not finite; no matching is defined for it."
        )
    return array


def make_problem(
    spec: PermutationSpec,
    pairs: Sequence[tuple[PermutationSpec, Mapping[str, Any], Mapping[str, Any]]],
    score: str = "inner",
) -> Problem:
    """The problem of maximising sum_pairs <a, pi(b)> over the permutations of a spec.

    Args:
        spec: The symmetry; of A.
        pairs: (spec of B, leaves of A, leaves of B), each leaf in host memory.
        score: "inner", or "cosine" per place.
    """
    names = {group.name for group in spec.groups}
    fixed = {i for group in spec.groups for i in group.index if i not in names}
    terms: list[Term] = []
    constant = 0.0
    for spec_b, leaves_a, leaves_b in pairs:
        for leaf in spec.leaves:
            if leaf.path not in leaves_a:
                continue
            left = blocks(leaf, leaves_a[leaf.path])
            right = blocks(spec_b.by_path[leaf.path], leaves_b[leaf.path])
            for (factors, a), (_, b) in zip(left, right, strict=True):
                found = [f.name for f in factors]
                sliced = [
                    axis
                    for axis, name in enumerate(found)
                    if name in fixed and any(name in spec[n].index for n in found if n in names)
                ]
                for at in np.ndindex(*(a.shape[axis] for axis in sliced)):
                    position = dict(zip((found[x] for x in sliced), at, strict=True))
                    take = tuple(
                        at[sliced.index(x)] if x in sliced else slice(None) for x in range(a.ndim)
                    )
                    kept = [x for x in range(a.ndim) if x not in sliced]
                    keys = tuple(
                        _key(spec, found[x], position) if found[x] in names else None for x in kept
                    )
                    odd = tuple(bool(factors[x].power % 2) for x in kept)
                    if any(key is not None for key in keys):
                        terms.append(_term(leaf.path, a[take], b[take], keys, odd))
                    else:
                        constant += inner(a[take], b[take])
    parents: dict[Key, tuple[Key, ...]] = {}
    signed, units = [], {}
    for group in spec.groups:
        own = [i for i in group.index if i not in names]
        sizes = dict(zip(group.index, group.index_sizes, strict=True))
        for at in np.ndindex(*(sizes[i] for i in own)):
            position = dict(zip(own, at, strict=True))
            key = _key(spec, group.name, position)
            parents[key] = tuple(_key(spec, i, position) for i in group.index if i in names)
            units[key] = group.size
            if group.kind in ("signed", "signed_scaled"):
                signed.append(key)
                if group.index:
                    raise SpecError(
                        f"group {group.name!r} is signed and depends on {group.index}; matching "
                        "has no method for that. Use the spec without kinds."
                    )
    return Problem(terms, parents, constant, signed, score, units)


def _key(spec: PermutationSpec, name: str, position: Mapping[str, int]) -> Key:
    names = {group.name for group in spec.groups}
    return name, tuple(int(position[i]) for i in spec[name].index if i not in names)


def _term(
    path: str, a: np.ndarray, b: np.ndarray, keys: tuple[Key | None, ...], odd: tuple[bool, ...]
) -> Term:
    """A term whose unmoved axes are one, in front."""
    free = [x for x, key in enumerate(keys) if key is None]
    held = [x for x, key in enumerate(keys) if key is not None]

    def together(x: np.ndarray) -> np.ndarray:
        x = x.transpose(free + held)
        shape = [x.shape[i] for i in range(len(free), x.ndim)]
        return np.ascontiguousarray(x.reshape([-1, *shape]))

    return Term(
        path,
        together(a),
        together(b),
        (None, *(keys[x] for x in held)),
        (False, *(odd[x] for x in held)),
    )


def to_permutation(spec: PermutationSpec, problem: Problem, state: State) -> dict[str, Any]:
    """A state of the problem as a permutation of the spec: int32 arrays in group order."""
    names = {group.name for group in spec.groups}
    out: dict[str, Any] = {}
    for group in spec.groups:
        order = np.empty(group.shape, np.int32)
        sign: np.ndarray | None = None
        for key in problem.parents:
            if key[0] != group.name:
                continue
            entry = state[key]
            assert isinstance(entry, Hard)
            at = iter(key[1])
            where = tuple(slice(None) if i in names else next(at) for i in group.index)
            order[where] = entry.order
            sign = entry.sign if entry.sign is not None else sign
        if group.kind == "permutation":
            out[group.name] = order
        else:
            scale = np.ones(group.shape, np.float32) if sign is None else sign.astype(np.float32)
            out[group.name] = Monomial(order, scale)  # type: ignore[arg-type]
    return out


def to_state(spec: PermutationSpec, problem: Problem, permutation: Mapping[str, Any]) -> State:
    """A permutation of the spec as a state of the problem; a copy."""
    names = {group.name for group in spec.groups}
    state: State = {}
    for key in problem.parents:
        entry = permutation[key[0]]
        at = iter(key[1])
        where = tuple(slice(None) if i in names else next(at) for i in spec[key[0]].index)
        if isinstance(entry, Monomial):
            scale = np.asarray(entry.scale)
            if (np.abs(scale) != 1).any():
                raise SpecError(
                    f"the initial permutation scales group {key[0]!r}; matching starts from "
                    "permutations and signs alone."
                )
            state[key] = Hard(np.array(entry.permutation)[where], scale.copy())
        else:
            state[key] = Hard(np.array(entry)[where])
    return state
