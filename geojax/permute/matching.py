"""Weight matching: the permutation of B's units that brings its weights nearest to A's.

The objective <a, pi(b)> is maximised, which minimises |a - pi(b)|; over all groups jointly that is
NP-hard. How this differs from Git Re-Basin's Algorithm 1, coordinate descent from the identity:
unknown permutations begin at the barycentre, where their units contribute the mean instead of
noise, and coordinate descent only polishes. See `weight_matching`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from geojax import progress as bars
from geojax.permute import scales
from geojax.permute._problem import (
    State,
    host_leaves,
    make_problem,
    to_permutation,
    to_state,
)
from geojax.permute._solvers import (
    OPTIMAL,
    ORDERS,
    Order,
    Run,
    Step,
    Stopped,
    solve,
)
from geojax.symmetry import action
from geojax.symmetry.spec import PermutationSpec, SpecError

__all__ = ["Candidate", "MatchingResult", "Method", "Order", "Step", "weight_matching"]

PyTree = Any
Method = Literal["best", "progressive", "frank_wolfe", "coordinate_descent"]
METHODS: tuple[Method, ...] = ("best", "progressive", "frank_wolfe", "coordinate_descent")


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
    best: tuple[str, Run] | None = None
    tried: list[tuple[str, Run]] = []
    spread = []
    with bars.bar(None, "weight matching", show=progress) as update:

        def report(step: Step) -> None:
            update(step.index, objective=step.objective, method=step.method)
            if callback is not None:
                callback(step)

        for own in keys:
            try:
                runs = solve(
                    problem, method, own, order, init, init_state, max_sweeps, max_steps, report
                )
                stopped = False
            except Stopped as stop:
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
        optimal=bool(run.objective >= problem.bound - OPTIMAL * scale)
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
