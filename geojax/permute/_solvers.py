"""The methods of weight matching, on a problem that stands: no options are checked here."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from geojax import assignment
from geojax.permute._problem import Dense, Hard, Key, Problem, State, inner

__all__ = [
    "OPTIMAL",
    "ORDERS",
    "Order",
    "Report",
    "Run",
    "Step",
    "Stopped",
    "objective_of",
    "solve",
]

Order = Literal["random", "forward", "backward", "alternate", "greedy"]
ORDERS: tuple[Order, ...] = ("random", "forward", "backward", "alternate", "greedy")

# A change is accepted above this share of the objective's bound: ties keep what stands.
_TOLERANCE = 1e-12
# A matching within this share of the bound is optimal, and no other method is tried.
OPTIMAL = 1e-6
# Frank-Wolfe stops when its gains fall below this share of the objective, thrice.
_SMALL_STEP = 1e-4
_PATIENCE = 3


class Step(NamedTuple):
    """What a callback sees after each sweep or step.

    Attributes:
        method: What is running.
        index: How many sweeps or steps it has made.
        objective: Where it stands.
        accepted: How many groups have changed in this sweep; -1 where all move at once.
    """

    method: str
    index: int
    objective: float
    accepted: int


class Run(NamedTuple):
    """Where a method ended."""

    state: State
    objective: float
    converged: bool
    history: list[float]
    num_sweeps: int
    gap: float = np.nan


class Stopped(Exception):
    """A callback asked to stop; carries what was reached."""

    def __init__(self, run: Run):
        self.run = run


Report = Callable[[Step], None]


def solve(
    problem: Problem,
    method: str,
    key: jax.Array | None,
    order: Order,
    init: Any,
    start: State,
    max_sweeps: int,
    max_steps: int,
    report: Report,
) -> list[tuple[str, Run]]:
    """Run a method; all candidates that it tried."""
    seed = [0] if key is None else np.asarray(jax.random.key_data(key)).tolist()
    polish = functools.partial(
        _coordinate_descent, problem, order=order, max_sweeps=max_sweeps, report=report
    )
    if method == "coordinate_descent":
        return [(method, polish(start, rng=np.random.default_rng(seed)))]
    runs = []
    if method in ("best", "progressive"):
        state = _progressive(problem, problem.unknown())
        runs.append(("progressive", polish(state, rng=np.random.default_rng(seed))))
    if method == "best" and runs[0][1].objective >= problem.bound * (1 - OPTIMAL):
        return runs
    if method in ("best", "frank_wolfe"):
        begin = problem.unknown() if init is None else start
        try:
            state, gap = _frank_wolfe(problem, begin, max_steps, report)
            run = polish(state, rng=np.random.default_rng(seed))
        except Stopped as stop:
            raise Stopped(max([stop.run, *(r for _, r in runs)], key=objective_of)) from None
        runs.append(("frank_wolfe", run._replace(gap=gap)))
    return runs


def objective_of(run: Run) -> float:
    return run.objective


def run_method(
    problem: Problem, method: str, start: State, rng: np.random.Generator
) -> tuple[State, float]:
    """Solve a problem by a method, for callers that hold the problem; the best state and value."""

    def ignore(step: Step) -> None:
        del step

    seed = jax.random.key(int(rng.integers(2**31)))
    runs = solve(problem, method, seed, "random", None, start, 100, 200, ignore)
    run = max((r for _, r in runs), key=objective_of)
    return run.state, run.objective


def solve_from_scratch(problem: Problem) -> tuple[dict[Key, Any], float]:
    """A small problem by the progressive method, polished."""
    state = _progressive(problem, problem.unknown())
    run = _coordinate_descent(
        problem, state, rng=np.random.default_rng(0), order="forward", max_sweeps=100,
        report=lambda step: None,
    )  # fmt: skip
    return run.state, run.objective


def _coordinate_descent(
    problem: Problem,
    state: State,
    *,
    rng: np.random.Generator,
    order: Order,
    max_sweeps: int,
    report: Report,
) -> Run:
    """Solve one group at a time with the others fixed, until none improves."""
    state = dict(state)
    problem.touch(state)
    objective = problem.value(state)
    history = [objective]
    slack = _TOLERANCE * max(abs(problem.bound), np.finfo(np.float64).tiny)
    seen: dict[Key, tuple[int, ...]] = {}
    sweep, accepted = 0, -1
    while sweep < max_sweeps and accepted:
        sweep += 1
        accepted = 0
        for root in _visits(problem, state, order, sweep, rng, seen):
            stamp = _stamp(problem, root)
            if seen.get(root) == stamp:
                continue  # nothing that its scores depend on has changed
            seen[root] = stamp
            change, gain = _improvement(problem, root, state)
            if gain > slack:
                share = _share(state, change)
                state |= change
                problem.touch(change, share)
                # A group that stands twice in one leaf sees itself change.
                seen[root] = _stamp(problem, root)
                if problem.repeated(root):
                    del seen[root]
                objective += gain
                history.append(objective)
                accepted += 1
        run = Run(state, objective, not accepted, history, sweep)
        try:
            report(Step("coordinate_descent", sweep, objective, accepted))
        except StopIteration:
            run = run._replace(objective=problem.value(state), converged=False)
            raise Stopped(run) from None
    # The sum of the gains has its own rounding; what is returned is measured anew.
    return Run(state, problem.value(state), not accepted, history, sweep)


def _share(state: State, change: Mapping[Key, Hard]) -> float:
    """The largest share of a group's units that a change gives another partner."""
    found = []
    for key, new in change.items():
        old = state[key]
        found.append(float((old.order != new.order).mean()) if isinstance(old, Hard) else 1.0)
    return max(found)


def _stamp(problem: Problem, root: Key) -> tuple[int, ...]:
    return tuple(problem.version[key] for key in sorted(problem.neighbors(root)))


def _visits(problem, state, order, sweep, rng, seen) -> Sequence[Key]:
    roots = problem.roots
    if order == "random":
        return [roots[i] for i in rng.permutation(len(roots))]
    if order == "greedy":
        # The largest gain first; one group a sweep, for each change alters the others' gains.
        gains = {root: _improvement(problem, root, state)[1] for root in roots}
        seen.clear()
        return [max(roots, key=lambda root: gains[root])]
    if order == "backward" or (order == "alternate" and sweep % 2 == 0):
        return list(reversed(roots))
    return list(roots)


def _improvement(problem: Problem, root: Key, state: State) -> tuple[dict[Key, Any], float]:
    """The best change of one root with its family, and by how much the objective rises."""
    if problem.family[root]:
        change = problem.solve_family(root, state)
        terms = sorted({t for t, _ in problem.places[root]})
        return change, problem.value({**state, **change}, terms) - problem.value(state, terms)
    new, scores = problem.solve(root, state, warm=True)
    if problem.score == "cosine":
        rows = np.arange(len(new.order))
        old = state[root]
        assert isinstance(old, Hard)
        return {root: new}, float(scores[rows, new.order].sum() - scores[rows, old.order].sum())
    return {root: new}, problem.gain(root, state, new)


def _progressive(problem: Problem, state: State) -> State:
    """Fix one unknown group after the other, the most significant assignment first."""
    state = dict(state)
    problem.touch(state)
    waiting = [key for key in problem.plain if state[key] is None]
    # Per group, for the scores as they are: what its significance cannot exceed, and what it is.
    limits: dict[Key, tuple[tuple[int, ...], float]] = {}
    exact: dict[Key, tuple[tuple[int, ...], float, Hard]] = {}
    while waiting:
        stamps = {key: _stamp(problem, key) for key in waiting}
        for key in waiting:
            if key not in limits or limits[key][0] != stamps[key]:
                limits[key] = (stamps[key], _largest_significance(problem, key, state))
        best, chosen = -np.inf, waiting[0]
        # An assignment is dear, above all for scores full of noise: only those that may win.
        for key in sorted(waiting, key=lambda k: -limits[k][1]):
            if limits[key][1] < best:
                break
            if key not in exact or exact[key][0] != stamps[key]:
                new, scores = problem.solve(key, state)
                exact[key] = (stamps[key], _significance(scores, new.order), new)
            if exact[key][1] > best:
                best, chosen = exact[key][1], key
        if best == -np.inf:  # scores without any difference: whatever the assignment is
            new, _ = problem.solve(chosen, state)
            exact[chosen] = (stamps[chosen], best, new)
        state[chosen] = exact[chosen][2]
        problem.touch([chosen])
        waiting.remove(chosen)
    for root in problem.roots:
        if state[root] is None:
            change = problem.solve_family(root, state)
            state |= change
            problem.touch(change)
    return state


def _largest_significance(problem: Problem, key: Key, state: State) -> float:
    """The significance that each row's own best partner would give, which no assignment exceeds."""
    even, odd = problem.scores(key, state)
    scores = even if odd is None else even + np.abs(odd)
    return _significance(scores, scores.argmax(1))


def _significance(scores: np.ndarray, order: np.ndarray) -> float:
    """How far matched scores stand out, in deviations, against what chance would pick.

    The largest of n independent normal scores is near sqrt(2 log n) deviations; a true match that
    is buried in noise does not exceed it.
    """
    deviation = float(scores.std(dtype=np.float64))
    if deviation == 0:
        return -np.inf
    matched = float(scores[np.arange(len(order)), order].mean(dtype=np.float64))
    chance = np.sqrt(2 * np.log(max(scores.shape[1], 2)))
    return (matched - float(scores.mean(dtype=np.float64))) / deviation / chance


def _frank_wolfe(
    problem: Problem, state: State, max_steps: int, report: Report
) -> tuple[State, float]:
    """Move all groups through the doubly stochastic matrices; then round each to a permutation.

    Groups with dependents (heads) have no small polytope: they stay at the barycentre, or where
    their exact solution given the others has raised the objective.
    """
    state = dict(state)
    moving = [key for key in problem.plain if key not in problem.signed]
    for key in moving:
        na, nb = problem.sizes[key]
        entry, dtype = state[key], problem.terms[problem.places[key][0][0]].a.dtype
        matrix = np.full((na, nb), 1 / nb, dtype)
        if entry is not None:
            assert isinstance(entry, Hard)
            matrix = np.zeros((na, nb), dtype)
            matrix[np.arange(na), entry.order] = 1
        state[key] = Dense(matrix)
    problem.touch(state)
    blocks = [root for root in problem.roots if root not in moving]
    objective = problem.value(state)
    patience, gap = _PATIENCE, np.nan
    for step in range(1, max_steps + 1):
        before = objective
        if moving:
            gap, length, corners = _direction(problem, state, moving)
            if length > 0:
                state = _between(state, corners, length)
                for key in moving:  # the far corner is a permutation, and stays a matrix here
                    state[key] = _dense(problem, state[key], key)
                problem.touch(corners)
        for root in blocks:
            terms = sorted({t for t, _ in problem.places[root]})
            change = problem.solve_family(root, state)
            if problem.value({**state, **change}, terms) > problem.value(state, terms):
                state |= change
                problem.touch(change)
        objective = problem.value(state)
        try:
            report(Step("frank_wolfe", step, objective, -1))
        except StopIteration:
            state = _rounded(problem, state)
            objective = problem.value(state)
            raise Stopped(Run(state, objective, False, [objective], 0, gap)) from None
        small = objective - before <= _SMALL_STEP * max(abs(objective), 1e-300)
        patience = patience - 1 if small else _PATIENCE
        if patience == 0:
            break
    return _rounded(problem, state), float(gap)


def _dense(problem: Problem, entry: Any, key: Key) -> Dense:
    if isinstance(entry, Dense):
        return entry
    matrix = np.zeros(problem.sizes[key], problem.terms[problem.places[key][0][0]].a.dtype)
    matrix[np.arange(len(entry.order)), entry.order] = 1
    return Dense(matrix)


def _rounded(problem: Problem, state: State) -> State:
    """Each matrix to its nearest permutation; what is still at the barycentre, progressively."""
    state = {
        key: Hard(assignment.solve(entry.matrix).columns) if isinstance(entry, Dense) else entry
        for key, entry in state.items()
    }
    return _progressive(problem, state)


def _direction(
    problem: Problem, state: State, moving: Sequence[Key]
) -> tuple[float, float, dict[Key, Hard]]:
    """The Frank-Wolfe gap, the exact step length, and the corner of each group."""
    corners = {key: problem.solve(key, state)[0] for key in moving}
    gap = 0.0
    # Along the step each term is a polynomial, of degree one per axis that moves.
    total = np.zeros(2)
    for t, term in enumerate(problem.terms):
        axes = [x for x, key in enumerate(term.keys) if key in corners]
        if not axes:
            continue
        slope = start = 0.0
        for axis in axes:
            key = term.keys[axis]
            assert key is not None
            scores, entry = problem.place_scores(t, axis, state), state[key]
            assert isinstance(entry, Dense)
            order = corners[key].order
            start = inner(scores, entry.matrix)
            slope += float(scores[np.arange(len(order)), order].sum(dtype=np.float64)) - start
        ts = [i / (len(axes) - 1) for i in range(1, len(axes))]
        values = [inner(term.a, problem.moved(term, _between(state, corners, u))) for u in ts]
        polynomial = _polynomial(start, slope, ts, values)
        total = np.pad(total, (0, max(0, len(polynomial) - len(total))))
        total[: len(polynomial)] += polynomial
        gap += slope
    return gap, highest(total), corners


def _between(state: State, corners: Mapping[Key, Hard], t: float) -> State:
    """The state a share t of the way to the corners."""
    if t == 1:
        return {**state, **corners}
    return {**state, **{key: _step(state[key], corner, t) for key, corner in corners.items()}}


def _step(entry: Any, corner: Hard, t: float) -> Dense:
    matrix = entry.matrix * entry.matrix.dtype.type(1 - t)
    matrix[np.arange(len(corner.order)), corner.order] += matrix.dtype.type(t)
    return Dense(matrix)


def _polynomial(
    start: float, slope: float, ts: Sequence[float], values: Sequence[float]
) -> np.ndarray:
    """Coefficients, lowest first, from the value and slope at 0 and values at `ts`."""
    if not ts:
        return np.array([start, slope])
    t = np.asarray(ts)
    rest = (np.asarray(values) - start - slope * t) / t**2
    return np.concatenate([[start, slope], np.linalg.solve(np.vander(t, increasing=True), rest)])


def highest(coefficients: np.ndarray) -> float:
    """Where on [0, 1] a polynomial is largest."""
    derivative = np.trim_zeros(np.polynomial.polynomial.polyder(coefficients), "b")
    roots = np.polynomial.polynomial.polyroots(derivative) if len(derivative) else []
    inside = [float(r.real) for r in roots if abs(r.imag) < 1e-9 and 0 < r.real < 1]
    return max([0.0, 1.0, *inside], key=lambda t: np.polynomial.polynomial.polyval(t, coefficients))
