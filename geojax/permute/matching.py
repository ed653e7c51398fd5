"""Weight matching: the permutation of B's units that brings its weights nearest to A's.

The objective <a, pi(b)> is maximised, which minimises |a - pi(b)|; over all groups jointly that is
NP-hard. How this differs from Git Re-Basin's Algorithm 1, coordinate descent from the identity:
unknown permutations begin at the barycentre, where their units contribute the mean instead of
noise, and coordinate descent only polishes. See `weight_matching`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from geojax import assignment
from geojax import progress as bars
from geojax.permute import scales
from geojax.permute._problem import (
    Dense,
    Hard,
    Key,
    Problem,
    State,
    host_leaves,
    inner,
    make_problem,
    to_permutation,
    to_state,
)
from geojax.symmetry import action
from geojax.symmetry.spec import PermutationSpec, SpecError

__all__ = ["Candidate", "MatchingResult", "Method", "Order", "Step", "weight_matching"]

PyTree = Any
Method = Literal["best", "progressive", "frank_wolfe", "coordinate_descent"]
Order = Literal["random", "forward", "backward", "alternate", "greedy"]
METHODS: tuple[Method, ...] = ("best", "progressive", "frank_wolfe", "coordinate_descent")
ORDERS: tuple[Order, ...] = ("random", "forward", "backward", "alternate", "greedy")

# A change is accepted above this share of the objective's bound: ties keep what stands.
_TOLERANCE = 1e-12
# A matching within this share of the bound is optimal, and no other method is tried.
_OPTIMAL = 1e-6
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


class Candidate(NamedTuple):
    """One method's matching among those tried.

    Attributes:
        method: Its name.
        permutation: What it found.
        objective: <a, pi(b)>.
        converged: Whether no group alone can improve it.
    """

    method: str
    permutation: dict[str, Any]
    objective: float
    converged: bool


class MatchingResult(NamedTuple):
    """A matching, and how good it is.

    Attributes:
        permutation: For `apply_permutation(spec, permutation, params_b)`; new arrays.
        objective: <a, pi(b)> over all leaves that a group acts on, in float64 (weighted as asked).
        initial: The same at the start (`init`, or the identity).
        bound: No permutation gives more (Cauchy-Schwarz, leaf by leaf); equal to the objective for
            a planted permutation.
        converged: Whether the matching is a fixed point: no group alone can improve it. The global
            optimum is proved only where `optimal` says so.
        optimal: Whether the objective is within 1e-6 of the bound, or the problem has one group.
        method: The method that found it.
        history: `(num_accepted + 1,)` objectives from the method's start, never falling.
        num_sweeps: Sweeps of coordinate descent.
        num_solves: Assignment problems solved, by all methods tried.
        gap: Frank-Wolfe's duality gap where it stopped, of the relaxed problem; NaN without it.
        candidates: All that was tried, to choose among by data.
        spread: `(num_restarts,)` the objectives of the restarts.
    """

    permutation: dict[str, Any]
    objective: float
    initial: float
    bound: float
    converged: bool
    optimal: bool
    method: str
    history: np.ndarray
    num_sweeps: int
    num_solves: int
    gap: float
    candidates: tuple[Candidate, ...]
    spread: np.ndarray


class _Run(NamedTuple):
    """Where a method ended."""

    state: State
    objective: float
    converged: bool
    history: list[float]
    num_sweeps: int
    gap: float = np.nan


class _Stopped(Exception):
    """A callback asked to stop; carries what was reached."""

    def __init__(self, run: _Run):
        self.run = run


Report = Callable[[Step], None]


def weight_matching(
    spec: PermutationSpec,
    params_a: PyTree,
    params_b: PyTree,
    *,
    key: jax.Array | None = None,
    method: Method = "best",
    init: action.Permutation | None = None,
    order: Order | None = None,
    num_restarts: int = 1,
    leaf_weights: Literal["equal", "norm"] | Mapping[str, float] = "equal",
    importance: PyTree = None,
    score: Literal["inner", "cosine"] = "inner",
    spec_b: PermutationSpec | None = None,
    max_sweeps: int = 100,
    max_steps: int = 200,
    callback: Callable[[Step], None] | None = None,
    progress: bool | None = None,
) -> MatchingResult:
    """Find the permutation of B's hidden units that brings B's weights nearest to A's.

    maximise <a, pi(b)>, which is to minimise |a - pi(b)|^2, over all groups of the spec.

    - "progressive": every unknown group stands at the barycentre, that is, its units contribute
      their mean. The group whose best assignment stands out most from the noise of its scores is
      fixed, then the next; coordinate descent polishes.
    - "frank_wolfe": all groups move together through the doubly stochastic matrices, from the
      barycentre, by Frank-Wolfe steps with the exact step length (the objective along a step is a
      polynomial); then rounding, and coordinate descent.
    - "coordinate_descent": Git Re-Basin's: from `init` or the identity, one group at a time is
      solved exactly with the others fixed, until none improves.
    - "best": progressive, then Frank-Wolfe unless progressive already reached the bound; the
      higher objective wins and both stay in `candidates`. The objective does not order loss
      barriers perfectly: choose among the candidates by data where that matters.

    Groups with positive scales: both networks come to their balanced gauge first (`balance`),
    the objective is that of the balanced networks, and the permutation carries the scales that
    bring B to A's own gauge. Groups with signs: the best sign of each pair is part of its score.

    The work is done on the host (BLAS and SciPy) from copies; sharded parameters are gathered
    leaf by leaf. In processes that share arrays every process solves the same problem.
    Cost: "progressive" is about one sweep of coordinate descent; a sweep multiplies each
    leaf by itself once per group; Frank-Wolfe takes 10 to 60 times as much, and n^2 memory a group.

    Args:
        spec: The symmetry, as `symmetry.permutation_spec` derives it. Statistics are permuted with
            the rest later, and never enter the objective.
        params_a: The parameters that stay.
        params_b: The parameters to permute.
        key: For random visiting orders and restarts; without it groups are visited in order.
        method: See above.
        init: A start for coordinate descent and Frank-Wolfe; never changed.
        order: The order of visits of coordinate descent: "random" (the default with a key),
            "forward" (the default without), "backward", "alternate", or "greedy" by gain.
        num_restarts: Runs of the method, each with its own split of the key; the best is kept.
        leaf_weights: Factors of leaves in the objective: "equal", "norm" for one over the product
            of the two leaves' norms, or a dictionary from glob patterns (paths with slashes) to
            factors, one for what no pattern names.
        importance: A pytree like `params_a`, such as its diagonal Fisher information f: then
            sum f (a - pi(b))^2 is minimised.
        score: "inner", or "cosine" of the units' weight vectors, leaf by leaf; then a group's own
            score decides, with no joint objective, and only by coordinate descent or progressive.
        spec_b: The spec of B where its groups have more units than A's; each unit of A is matched
            with one of B. The permutation then is a selection: see `select_units`.
        max_sweeps: The most sweeps of coordinate descent.
        max_steps: The most Frank-Wolfe steps.
        callback: Sees a `Step` after every sweep or step; may raise StopIteration to end with the
            best so far, which is not converged.
        progress: Whether to show a progress bar.

    Returns:
        A `MatchingResult`.

    Raises:
        SpecError: If parameters and spec do not fit, or a leaf is not finite.
        ValueError: If an option is unknown or does not go with the method.

    Example:
        >>> from geojax.symmetry import Factor, Group, Leaf
        >>> spec = PermutationSpec((Leaf("['w']", (3,), (Factor("h", 3),)),), (Group("h", 3),))
        >>> a, b = {"w": np.array([1.0, 2.0, 3.0])}, {"w": np.array([3.0, 1.0, 2.0])}
        >>> result = weight_matching(spec, a, b)
        >>> result.permutation["h"].tolist(), result.objective, result.optimal
        ([1, 2, 0], 14.0, True)

    Reference:
        Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation
        Symmetries", 2023, Algorithm 1. Crisostomi et al., "C2M3: Cycle-Consistent Multi-Model
        Merging", 2024, Algorithm 1 (Frank-Wolfe). Jaggi, "Revisiting Frank-Wolfe", 2013.
    """
    _check_options(method, order, num_restarts, score, key)
    if scales.has_scales(spec):
        if importance is not None or spec_b is not None:
            raise ValueError("importance and spec_b do not go with a spec that has scales.")
        gauge_a, gauge_b = scales.balance(spec, params_a), scales.balance(spec, params_b)
        params_a, params_b = gauge_a.params, gauge_b.params
    pairs = _pairs(spec, spec_b, params_a, params_b, leaf_weights, importance)
    problem = make_problem(spec, pairs, score)
    if init is not None:
        if spec_b is None:
            action.check_permutation(spec, init)
        init_state = to_state(spec, problem, init)
    else:
        init_state = problem.identity()
    initial = problem.value(init_state)
    order = order or ("forward" if key is None else "random")
    keys = [key] if num_restarts == 1 else list(jax.random.split(key, num_restarts))  # type: ignore[arg-type]
    best: tuple[str, _Run] | None = None
    tried: list[tuple[str, _Run]] = []
    spread = []
    with bars.bar(None, "weight matching", show=progress) as update:

        def report(step: Step) -> None:
            update(step.index, objective=step.objective, method=step.method)
            if callback is not None:
                callback(step)

        for own in keys:
            try:
                runs = _solve(
                    problem, method, own, order, init, init_state, max_sweeps, max_steps, report
                )
                stopped = False
            except _Stopped as stop:
                runs, stopped = [(method, stop.run)], True
            name, run = max(runs, key=lambda x: x[1].objective)
            spread.append(run.objective)
            if best is None or run.objective > best[1].objective:
                best, tried = (name, run), runs
            if stopped:
                break
    assert best is not None
    name, run = best

    def finished(state: State) -> dict[str, Any]:
        permutation = to_permutation(spec, problem, state)
        if not scales.has_scales(spec):
            return permutation
        # B to its balanced gauge, then to A's units, then out of A's balanced gauge.
        moved = action.compose(spec, permutation, gauge_b.scale)
        return action.compose(spec, action.inverse(spec, gauge_a.scale), moved)

    scale = max(abs(problem.bound), np.finfo(np.float64).tiny)
    one = len(problem.roots) == 1 and problem.roots == problem.plain and score == "inner"
    return MatchingResult(
        permutation=finished(run.state),
        objective=run.objective,
        initial=initial,
        bound=problem.bound,
        converged=run.converged,
        optimal=bool(run.objective >= problem.bound - _OPTIMAL * scale)
        or (one and run.converged and len(problem.places[problem.roots[0]]) == len(problem.terms)),
        method=name,
        history=np.asarray(run.history),
        num_sweeps=run.num_sweeps,
        num_solves=problem.num_solves,
        gap=max((r.gap for _, r in tried), key=lambda x: -np.inf if np.isnan(x) else x),
        candidates=tuple(
            Candidate(n, finished(r.state), r.objective, r.converged) for n, r in tried
        ),
        spread=np.asarray(spread),
    )


def check_method(method: str) -> None:
    """Refuse the name of a method that there is not."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {METHODS}.")


def _check_options(method: str, order: Any, num_restarts: int, score: str, key: Any) -> None:
    check_method(method)
    if order is not None and order not in ORDERS:
        raise ValueError(f"order is {order!r}; expected one of {ORDERS}.")
    if score not in ("inner", "cosine"):
        raise ValueError(f"score is {score!r}; expected 'inner' or 'cosine'.")
    if score == "cosine" and method in ("best", "frank_wolfe"):
        raise ValueError(
            "score='cosine' has no joint objective to follow; use method='progressive' or "
            "method='coordinate_descent'."
        )
    if num_restarts < 1:
        raise ValueError(f"num_restarts is {num_restarts}; expected at least 1.")
    if key is None and (num_restarts > 1 or order == "random"):
        raise ValueError("random orders and restarts need a key: pass key=jax.random.key(seed).")


def _pairs(spec, spec_b, params_a, params_b, leaf_weights, importance):
    """Leaves of A, weighted, and of B; with an importance, two pairs."""
    b_spec = spec if spec_b is None else spec_b
    a = host_leaves(spec, params_a, "params_a")
    b = host_leaves(b_spec, params_b, "params_b")
    if spec_b is not None:
        _check_widths(spec, spec_b)
    if leaf_weights == "norm":
        weights = {}
        for path, x in a.items():
            norms = float(np.linalg.norm(x)) * float(np.linalg.norm(b[path]))
            weights[path] = 1 / norms if norms > 0 else 0.0
    elif leaf_weights == "equal":
        weights = None
    elif isinstance(leaf_weights, str):
        raise ValueError(
            f"leaf_weights is {leaf_weights!r}; expected 'equal', 'norm' or a dictionary from glob "
            "patterns to factors."
        )
    else:
        weights = dict.fromkeys(a, 1.0)
        for pattern, factor in leaf_weights.items():
            if not factor >= 0:
                raise ValueError(f"leaf_weights gives {pattern!r} {factor}; expected at least 0.")
            for path in spec.matching(pattern, "leaf_weights"):
                if path in weights:
                    weights[path] = float(factor)
    if weights is not None:
        a = {path: x * x.dtype.type(weights[path]) for path, x in a.items()}
    if importance is None:
        return [(b_spec, a, b)]
    f = host_leaves(spec, importance, "importance")
    for path, x in f.items():
        if (x < 0).any():
            raise SpecError(f"importance has negative entries in leaf {path}; expected none.")
    if weights is not None:
        f = {path: x * x.dtype.type(weights[path]) for path, x in f.items()}
    # -f (a - b)^2 = 2 f a b - f b^2 and a constant.
    plain = host_leaves(spec, params_a, "params_a")
    twice = {path: 2 * f[path] * x for path, x in plain.items()}
    less = {path: -x for path, x in f.items()}
    return [(b_spec, twice, b), (b_spec, less, {path: x * x for path, x in b.items()})]


def _check_widths(spec: PermutationSpec, spec_b: PermutationSpec) -> None:
    if [g.name for g in spec.groups] != [g.name for g in spec_b.groups]:
        raise SpecError("the groups of spec and spec_b differ; expected equal architectures.")
    for one, other in zip(spec.groups, spec_b.groups, strict=True):
        if one.size > other.size:
            raise SpecError(
                f"group {one.name!r} has {one.size} units in A and {other.size} in B; give the "
                "narrower network as A."
            )
        if one.index_sizes != other.index_sizes:
            raise SpecError(f"the index of group {one.name!r} has another size in spec_b.")


# --------------------------------------------------------------------------- methods


def _solve(
    problem: Problem,
    method: str,
    key: jax.Array | None,
    order: Order,
    init: Any,
    start: State,
    max_sweeps: int,
    max_steps: int,
    report: Report,
) -> list[tuple[str, _Run]]:
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
    if method == "best" and runs[0][1].objective >= problem.bound * (1 - _OPTIMAL):
        return runs
    if method in ("best", "frank_wolfe"):
        begin = problem.unknown() if init is None else start
        try:
            state, gap = _frank_wolfe(problem, begin, max_steps, report)
            run = polish(state, rng=np.random.default_rng(seed))
        except _Stopped as stop:
            raise _Stopped(max([stop.run, *(r for _, r in runs)], key=_objective)) from None
        runs.append(("frank_wolfe", run._replace(gap=gap)))
    return runs


def _objective(run: _Run) -> float:
    return run.objective


def run_method(
    problem: Problem, method: str, start: State, rng: np.random.Generator
) -> tuple[State, float]:
    """Solve a problem by a method, for callers that hold the problem; the best state and value."""

    def ignore(step: Step) -> None:
        del step

    seed = jax.random.key(int(rng.integers(2**31)))
    runs = _solve(problem, method, seed, "random", None, start, 100, 200, ignore)
    run = max((r for _, r in runs), key=_objective)
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
) -> _Run:
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
        run = _Run(state, objective, not accepted, history, sweep)
        try:
            report(Step("coordinate_descent", sweep, objective, accepted))
        except StopIteration:
            run = run._replace(objective=problem.value(state), converged=False)
            raise _Stopped(run) from None
    # The sum of the gains has its own rounding; what is returned is measured anew.
    return _Run(state, problem.value(state), not accepted, history, sweep)


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
            raise _Stopped(_Run(state, objective, False, [objective], 0, gap)) from None
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
