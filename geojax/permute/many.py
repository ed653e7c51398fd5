"""Many networks: brought to one frame together, so that any two of them are aligned.

Each network i has a permutation p_i into a common frame; the alignment of j to i is p_i^-1 p_j, so
that going around any cycle of networks comes back to the identity, exactly.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from geojax import assignment, tree
from geojax import progress as bars
from geojax.permute import _solvers, matching
from geojax.permute._problem import (
    Dense,
    Hard,
    Key,
    Problem,
    State,
    host_leaves,
    inner,
    make_problem,
    products,
    to_permutation,
    to_state,
)
from geojax.symmetry import action
from geojax.symmetry.spec import PermutationSpec, SpecError

__all__ = [
    "ManyResult",
    "cycle_consistent_matching",
    "merge_many",
    "synchronize",
]

PyTree = Any
_TOLERANCE = 1e-12
_SMALL_STEP = 1e-5
_PATIENCE = 3
_REFRESH = 10


class ManyResult(NamedTuple):
    """Networks in one frame.

    Attributes:
        params: The mean of the permuted networks; leaves have the dtype of the first network's.
        permutations: One per network, into the common frame: `apply_permutation(spec, p, params)`.
        objective: The sum over pairs i < j of <p_i(x_i), p_j(x_j)> over all entries that a group
            moves, in float64.
        initial: The same with the networks as they came.
        bound: No permutations give more: the sum over pairs and leaves of |x_i| |x_j|.
        similarity: `(n, n)` inner products of the permuted networks.
        converged: Whether no network alone can be moved nearer to the mean of the others.
        history: Objectives from the start of the refinement on, never falling.
        num_rounds: Rounds over all networks.
    """

    params: PyTree
    permutations: tuple[dict[str, Any], ...]
    objective: float
    initial: float
    bound: float
    similarity: np.ndarray
    converged: bool
    history: np.ndarray
    num_rounds: int

    def pairwise(self, spec: PermutationSpec, i: int, j: int) -> dict[str, Any]:
        """The permutation that brings network j to the frame in which network i came."""
        back = action.inverse(spec, self.permutations[i])
        return action.compose(spec, back, self.permutations[j])


class _Frame:
    """The blocks of all networks, each moved by its own state, and their sum."""

    def __init__(self, spec: PermutationSpec, networks: Sequence[Mapping[str, Any]]):
        self.spec = spec
        self.problems = [make_problem(spec, [(spec, x, x)]) for x in networks]
        if self.problems[0].signed:
            raise SpecError(
                "matching many networks knows permutations alone, and the spec has signed groups; "
                "use the spec without kinds."
            )
        self.states: list[State] = [problem.identity() for problem in self.problems]
        self.moved = [self._move(i, self.states[i]) for i in range(len(networks))]
        self.total = [functools.reduce(np.add, blocks) for blocks in zip(*self.moved, strict=True)]

    def _move(self, i: int, state: State) -> list[np.ndarray]:
        problem = self.problems[i]
        return [problem.moved(term, state) for term in problem.terms]

    def put(self, i: int, state: State) -> None:
        """Give network i another state; the sum follows."""
        new = self._move(i, state)
        for t, (old, x) in enumerate(zip(self.moved[i], new, strict=True)):
            self.total[t] = self.total[t] + (x - old)
        self.states[i], self.moved[i] = state, new

    def refresh(self) -> None:
        """The sum anew, without the rounding of its updates."""
        self.total = [functools.reduce(np.add, x) for x in zip(*self.moved, strict=True)]

    def facing_others(self, i: int) -> Problem:
        """The problem of moving network i towards the sum of all others; O(1) in their number."""
        problem = self.problems[i]
        terms = [
            dataclasses.replace(term, a=total - own)
            for term, total, own in zip(problem.terms, self.total, self.moved[i], strict=True)
        ]
        sizes = {key: n for key, (n, _) in problem.sizes.items()}
        return Problem(terms, problem.parents, sizes=sizes)

    def similarity(self) -> np.ndarray:
        n = len(self.problems)
        out = np.empty((n, n))
        for i, j in itertools.combinations_with_replacement(range(n), 2):
            value = sum(inner(a, b) for a, b in zip(self.moved[i], self.moved[j], strict=True))
            out[i, j] = out[j, i] = value
        return out

    def objective(self) -> float:
        """The sum over pairs of inner products, in float64 and in O(n)."""
        whole = sum(inner(x, x) for x in self.total)
        own = sum(inner(x, x) for blocks in self.moved for x in blocks)
        return (whole - own) / 2


def _networks(spec: PermutationSpec, networks: Any) -> tuple[list[PyTree], list[dict[str, Any]]]:
    trees = list(networks) if isinstance(networks, (list, tuple)) else tree.unstack(networks)
    if len(trees) < 2:
        raise ValueError(f"{len(trees)} network was given; expected at least two.")
    return trees, [host_leaves(spec, x, f"network {i}") for i, x in enumerate(trees)]


def merge_many(
    spec: PermutationSpec,
    networks: Sequence[PyTree] | PyTree,
    *,
    key: jax.Array,
    method: matching.Method = "progressive",
    max_rounds: int = 100,
    callback: Callable[[matching.Step], None] | None = None,
    progress: bool | None = None,
) -> ManyResult:
    """Git Re-Basin's MergeMany: align each network to the mean of the others until none moves.

    In each round the networks are visited in random order. Network i is matched to the mean of all
    others, and moved if that raises the sum of pairwise inner products; each such step lowers the
    sum of squared pairwise distances. How it differs from the original: the sum of all networks is
    kept, so a visit costs O(1) networks; the matching also starts from where the network is, so
    that nothing found is lost; the given list is not changed.

    Args:
        spec: The symmetry.
        networks: A sequence of n parameter pytrees, or stacked points.
        key: For the order of visits.
        method: How a network is matched in its first visit, see `weight_matching`; coordinate
            descent from where it stands is always tried as well.
        max_rounds: The most rounds.
        callback: Sees a `Step` after every visit; may raise StopIteration to end there.
        progress: Whether to show a progress bar.

    Returns:
        A `ManyResult`.

    Raises:
        ValueError: If fewer than two networks are given, or an option is unknown.
        SpecError: If networks and spec do not fit.

    Reference:
        Ainsworth, Hayase and Srinivasa, "Git Re-Basin", 2023, Algorithm 3.
    """
    matching.check_method(method)
    trees, leaves = _networks(spec, networks)
    frame = _Frame(spec, leaves)
    initial = frame.objective()
    history = [initial]
    converged, rounds = _rounds(
        frame, key, method, max_rounds, history, callback, progress, "merging many networks"
    )
    return _result(frame, trees, initial, history, converged, rounds)


def _rounds(
    frame: _Frame,
    key: jax.Array,
    method: matching.Method | None,
    max_rounds: int,
    history: list[float],
    callback: Callable[[matching.Step], None] | None,
    progress: bool | None,
    label: str,
) -> tuple[bool, int]:
    """Visit the networks until none moves; whether that was reached, and the rounds made."""
    num = len(frame.problems)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    with bars.bar(max_rounds * num, label, show=progress) as update:
        for round_ in range(1, max_rounds + 1):
            accepted = 0
            for visit, i in enumerate(rng.permutation(num)):
                problem = frame.facing_others(int(i))
                start = frame.states[i]
                before = problem.value(start)
                methods = ["coordinate_descent"]
                if round_ == 1 and method is not None and method != "coordinate_descent":
                    methods.append(method)
                runs = [_solvers.run_method(problem, m, start, rng) for m in methods]
                state, value = max(runs, key=lambda x: x[1])
                slack = _TOLERANCE * max(abs(problem.bound), np.finfo(np.float64).tiny)
                if value - before > slack:
                    frame.put(int(i), state)
                    history.append(history[-1] + value - before)
                    accepted += 1
                update((round_ - 1) * num + visit + 1, objective=history[-1])
                if callback is not None:
                    step = matching.Step("merge_many", round_, history[-1], accepted)
                    try:
                        callback(step)
                    except StopIteration:
                        return False, round_
            frame.refresh()
            if not accepted:
                return True, round_
    return False, max_rounds


def _result(frame, trees, initial, history, converged, rounds) -> ManyResult:
    permutations = tuple(
        to_permutation(frame.spec, problem, state)
        for problem, state in zip(frame.problems, frame.states, strict=True)
    )
    similarity = frame.similarity()
    norms = np.array(
        [[float(np.linalg.norm(x.b)) for x in problem.terms] for problem in frame.problems]
    )
    bound = float((np.square(norms.sum(0)).sum() - np.square(norms).sum()) / 2)
    weights = np.full(len(trees), 1 / len(trees), np.float32)
    moved = [action.apply(frame.spec, p, x) for p, x in zip(permutations, trees, strict=True)]
    mean = tree.combine(tree.stack(moved), weights)
    upper = np.triu(similarity, 1)
    return ManyResult(
        params=mean,
        permutations=permutations,
        objective=float(upper.sum()),
        initial=float(initial),
        bound=bound,
        similarity=similarity,
        converged=converged,
        history=np.asarray(history),
        num_rounds=rounds,
    )


def cycle_consistent_matching(
    spec: PermutationSpec,
    networks: Sequence[PyTree] | PyTree,
    *,
    key: jax.Array,
    reference: int | None = None,
    method: matching.Method = "frank_wolfe",
    refine: bool = True,
    max_steps: int = 100,
    max_rounds: int = 100,
    callback: Callable[[matching.Step], None] | None = None,
    progress: bool | None = None,
) -> ManyResult:
    """Bring n networks to one frame by maximising all pairwise inner products together.

    Star start: every network is matched to the reference. Then Frank-Wolfe over the permutations of
    all but the reference at once: with u_i = p_i(x_i) and s = sum u_i, the objective is
    (|s|^2 - sum |u_i|^2) / 2, and its gradient in p_i needs s - u_i alone, so a step costs O(n).
    At last the rounds of `merge_many`, which leave a fixed point. How it differs from C2M3: a
    gradient in O(n) instead of O(n^2), the reference held fixed (without that the barycentre is a
    saddle where all networks collapse onto one map), the exact step length, and the star start.

    Args:
        spec: The symmetry.
        networks: A sequence of n parameter pytrees, or stacked points.
        key: For the order of visits in the last rounds.
        reference: The network that keeps its frame; by default the medoid, whose units are most
            alike to the others' after matching.
        method: How a network is matched to the reference.
        refine: Whether to go on from the star.
        max_steps: The most Frank-Wolfe steps.
        max_rounds: The most rounds at the end.
        callback: Sees a `Step` after every step; may raise StopIteration to end there.
        progress: Whether to show a progress bar.

    Returns:
        A `ManyResult`; the reference has the identity permutation.

    Raises:
        ValueError: If fewer than two networks are given, or there is no such reference.
        SpecError: If networks and spec do not fit.

    Reference:
        Crisostomi et al., "C2M3: Cycle-Consistent Multi-Model Merging", NeurIPS 2024, equation 7.
    """
    matching.check_method(method)
    trees, leaves = _networks(spec, networks)
    num = len(trees)
    if reference is not None and not 0 <= reference < num:
        raise ValueError(f"reference is {reference}; there are {num} networks, from 0.")
    frame = _Frame(spec, leaves)
    initial = frame.objective()
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    with bars.bar(num, "matching to the reference", show=progress) as update:
        center = _medoid(frame, rng) if reference is None else reference
        for i in range(num):
            if i != center:
                problem = _towards(frame, center, i)
                frame.put(i, _solvers.run_method(problem, method, problem.identity(), rng)[0])
            update(i + 1)
    frame.refresh()
    history = [frame.objective()]
    converged, rounds = False, 0
    if refine:
        _universe_steps(frame, center, max_steps, history, callback, progress)
        converged, rounds = _rounds(
            frame, key, None, max_rounds, history, callback, progress, "last rounds"
        )
        _fix_frame(frame, center)
    return _result(frame, trees, initial, history, converged, rounds)


def _towards(frame: _Frame, i: int, j: int) -> Problem:
    """The problem of moving network j to network i, both as they came."""
    terms = [
        dataclasses.replace(theirs, a=own.b)
        for own, theirs in zip(frame.problems[i].terms, frame.problems[j].terms, strict=True)
    ]
    sizes = {key: n for key, (n, _) in frame.problems[i].sizes.items()}
    return Problem(terms, frame.problems[i].parents, sizes=sizes)


def _medoid(frame: _Frame, rng: np.random.Generator) -> int:
    """The network with the largest similarity to all others after a cheap matching."""
    num = len(frame.problems)
    if num == 2:
        return 0
    value = np.zeros((num, num))
    for i, j in itertools.combinations(range(num), 2):
        problem = _towards(frame, i, j)
        _, found = _solvers.run_method(problem, "progressive", problem.identity(), rng)
        value[i, j] = value[j, i] = found / max(problem.bound, np.finfo(np.float64).tiny)
    return int(value.sum(1).argmax())


def _fix_frame(frame: _Frame, center: int) -> None:
    """Turn the common frame so that the reference stands as it came."""
    spec = frame.spec
    permutations = [
        to_permutation(spec, problem, state)
        for problem, state in zip(frame.problems, frame.states, strict=True)
    ]
    back = action.inverse(spec, permutations[center])
    for i, p in enumerate(permutations):
        turned = jax.tree.map(np.asarray, action.compose(spec, back, p))
        frame.put(i, to_state(spec, frame.problems[i], turned))
    frame.refresh()


def _universe_steps(
    frame: _Frame,
    center: int,
    max_steps: int,
    history: list[float],
    callback: Callable[[matching.Step], None] | None,
    progress: bool | None,
) -> None:
    """Frank-Wolfe on all networks but one; the states are left rounded, and never worse."""
    best, best_states = history[-1], [dict(state) for state in frame.states]
    movers = [i for i in range(len(frame.problems)) if i != center]
    plain = frame.problems[0].plain
    blocks = [root for root in frame.problems[0].roots if root not in plain]
    if not plain:
        return
    for i in movers:
        state = {
            key: _as_matrix(frame.problems[i], key, x) if key in plain else x
            for key, x in frame.states[i].items()
        }
        frame.put(i, state)
    objective, patience = frame.objective(), _PATIENCE
    with bars.bar(max_steps, "Frank-Wolfe on all networks", show=progress) as update:
        for step in range(1, max_steps + 1):
            before = objective
            paths = {i: _path(frame, i, plain) for i in movers}
            length = _line_search(frame, paths)
            for i, path in paths.items():
                frame.states[i] = _stepped(frame.states[i], path.corners, length)
                frame.moved[i] = [_evaluated(x, length) for x in path.coefficients]
            frame.refresh()
            for i in movers if blocks else ():
                for root in blocks:
                    problem = frame.facing_others(i)
                    change = {**frame.states[i], **problem.solve_family(root, frame.states[i])}
                    if problem.value(change) > problem.value(frame.states[i]):
                        frame.put(i, change)
            if step % _REFRESH == 0:  # what the polynomials' rounding has added up to
                for i in movers:
                    frame.put(i, frame.states[i])
                frame.refresh()
            objective = frame.objective()
            update(step, objective=objective)
            if callback is not None:
                try:
                    callback(matching.Step("universe", step, objective, -1))
                except StopIteration:
                    break
            small = objective - before <= _SMALL_STEP * max(abs(objective), 1e-300)
            patience = patience - 1 if small else _PATIENCE
            if patience == 0:
                break
    for i in movers:
        frame.put(
            i,
            {
                key: Hard(assignment.solve(x.matrix).columns) if isinstance(x, Dense) else x
                for key, x in frame.states[i].items()
            },
        )
    frame.refresh()
    objective = frame.objective()
    if objective > best:
        history.append(objective)
    else:  # rounding lost what the relaxation had gained
        for i, state in enumerate(best_states):
            frame.put(i, state)
        frame.refresh()


def _as_matrix(problem: Problem, key: Key, entry: Any) -> Dense:
    matrix = np.zeros(problem.sizes[key], problem.terms[problem.places[key][0][0]].b.dtype)
    matrix[np.arange(len(entry.order)), entry.order] = 1
    return Dense(matrix)


def _stepped(state: State, corners: Mapping[Key, Hard], t: float) -> State:
    out = dict(state)
    for key, corner in corners.items():
        entry = state[key]
        assert isinstance(entry, Dense)
        matrix = entry.matrix * entry.matrix.dtype.type(1 - t)
        matrix[np.arange(len(corner.order)), corner.order] += matrix.dtype.type(t)
        out[key] = Dense(matrix)
    return out


class _Path(NamedTuple):
    """Where a network would go in a step: its corner, and its blocks as polynomials on the way."""

    corners: dict[Key, Hard]
    coefficients: list[list[np.ndarray]]  # per block, lowest power first


def _path(frame: _Frame, i: int, plain: Sequence[Key]) -> _Path:
    """The best corner for network i against the sum of the others, and the way there.

    A block is linear in each matrix that acts on it. What the scores need, the block with one
    matrix left out, is also what gives the polynomial: all else is gathering by permutations.
    """
    problem, state = frame.facing_others(i), frame.states[i]
    scores: dict[Key, Any] = dict.fromkeys(plain, 0.0)
    partial: dict[tuple[int, int], np.ndarray] = {}
    for t, term in enumerate(problem.terms):
        for axis, key in enumerate(term.keys):
            if key in scores:
                partial[t, axis] = problem.moved(term, state, skip=(axis,))
                scores[key] = scores[key] + products(term.a, partial[t, axis], axis)
    corners = {key: Hard(assignment.solve(x).columns) for key, x in scores.items()}
    coefficients = []
    for t, term in enumerate(problem.terms):
        axes = [axis for axis, key in enumerate(term.keys) if key in corners]
        here = frame.moved[i][t]
        ends = [partial[t, axis].take(corners[term.keys[axis]].order, axis) for axis in axes]  # type: ignore[index]
        if len(axes) == 2:
            far = problem.moved(term, {**state, **corners})
            both = ends[0] + ends[1]
            coefficients.append([here, both - 2 * here, here - both + far])
        elif len(axes) < 2:
            coefficients.append([here, *(end - here for end in ends)])
        else:
            nodes = np.linspace(0, 1, len(axes) + 1)
            values = [here, *(problem.moved(term, _stepped(state, corners, u)) for u in nodes[1:])]
            inverse = np.linalg.inv(np.vander(nodes, increasing=True))
            coefficients.append(
                [
                    functools.reduce(
                        np.add, (x * x.dtype.type(c) for x, c in zip(values, row, strict=True))
                    )
                    for row in inverse
                ]
            )
    return _Path(corners, coefficients)


def _evaluated(coefficients: Sequence[np.ndarray], t: float) -> np.ndarray:
    return functools.reduce(np.add, (x * x.dtype.type(t**k) for k, x in enumerate(coefficients)))


def _line_search(frame: _Frame, paths: Mapping[int, _Path]) -> float:
    """The exact best step: along it every block is a polynomial, and so is the objective."""
    total = np.zeros(1)
    for t in range(len(frame.problems[0].terms)):
        own = [path.coefficients[t] for path in paths.values()]
        degree = max(len(x) for x in own)
        still = [frame.moved[i][t] for i in range(len(frame.problems)) if i not in paths]
        whole = [
            functools.reduce(np.add, [x[k] for x in own if k < len(x)] + (still if k == 0 else []))
            for k in range(degree)
        ]
        found = np.zeros(2 * degree - 1)
        for k in range(degree):
            for m in range(degree):
                found[k + m] += inner(whole[k], whole[m])
                found[k + m] -= sum(inner(x[k], x[m]) for x in own if max(k, m) < len(x))
        found[0] -= sum(inner(x, x) for x in still)
        total = np.pad(total, (0, max(0, len(found) - len(total))))
        total[: len(found)] += found / 2
    return _solvers.highest(total)


def synchronize(
    spec: PermutationSpec,
    pairwise: Mapping[tuple[int, int], Mapping[str, Any]],
    *,
    num_rounds: int = 100,
) -> tuple[dict[str, Any], ...]:
    """Consistent permutations from pairwise ones that contradict each other.

    For each group the block matrix of the pairwise permutations has, if they agree, rank n; its
    leading eigenvectors, rounded by assignment against network 0, are refined by projected power
    steps: p_i becomes the assignment of sum_j P_ij p_j.

    Args:
        spec: The symmetry; its groups may depend on fixed indices, but not on other groups.
        pairwise: `(i, j)` to the permutation that brings network j to network i. One of (i, j) and
            (j, i) is enough; networks are numbered from 0 without gaps.
        num_rounds: The most power steps.

    Returns:
        One permutation per network into the frame of network 0, whose own is the identity.

    Raises:
        SpecError: If a group depends on another, or a permutation does not fit.
        ValueError: If the pairs do not connect the networks.

    Reference:
        Pachauri, Kondor and Singh, "Solving the multi-way matching problem by permutation
        synchronization", NeurIPS 2013. Boumal, "Nonconvex phase synchronization", 2016 (the power
        steps).
    """
    names = {group.name for group in spec.groups}
    dependent = [g.name for g in spec.groups if names & set(g.index)]
    if dependent:
        raise SpecError(
            f"groups {dependent} depend on other groups; synchronize knows none that do."
        )
    num = 1 + max(max(pair) for pair in pairwise)
    for p in pairwise.values():
        action.check_permutation(spec, p)
    links = np.eye(num, dtype=bool)
    for i, j in pairwise:
        links[i, j] = links[j, i] = True
    if (np.linalg.matrix_power(links.astype(float), num) == 0).any():
        raise ValueError("the pairs do not connect all networks; expected at least a tree.")
    out: list[dict[str, Any]] = [{} for _ in range(num)]
    for group in spec.groups:
        found = np.empty((num, *group.shape), np.int32)
        for at in np.ndindex(*group.index_sizes):
            orders = {pair: np.asarray(p[group.name])[at] for pair, p in pairwise.items()}
            found[(slice(None), *at)] = _synchronize_one(orders, num, group.size, num_rounds)
        for i in range(num):
            out[i][group.name] = found[i]
    return tuple(out)


def _synchronize_one(
    orders: Mapping[tuple[int, int], np.ndarray], num: int, n: int, num_rounds: int
) -> np.ndarray:
    whole = np.zeros((num, n, num, n))
    rows = np.arange(n)
    for i in range(num):
        whole[i, rows, i, rows] = 1
    for (i, j), order in orders.items():
        if (j, i) not in orders or i < j:
            whole[i, rows, j, order] = 1
            whole[j, order, i, rows] = 1
    flat = whole.reshape(num * n, num * n)
    vectors = np.linalg.eigh(flat)[1][:, -n:].reshape(num, n, n)
    # Block (i, 0) of the projection is the permutation that brings network 0 to i.
    matrices = np.einsum("iak,bk->iab", vectors, vectors[0])
    columns = assignment.solve(matrices).columns
    for _ in range(num_rounds):
        hot = np.zeros((num, n, n))
        hot[np.arange(num)[:, None], rows[None, :], columns] = 1
        new = assignment.solve(np.einsum("iajb,jbc->iac", whole, hot), previous=columns).columns
        if (new == columns).all():
            break
        columns = new
    # columns[i] brings the frame to network i; wanted is the inverse, turned so that 0 stays.
    back = np.argsort(columns, axis=1)
    return back[:, columns[0]].astype(np.int32)
