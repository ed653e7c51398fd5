"""Permutations that are learned with the loss: straight-through, Sinkhorn, and the gradient's.

Weight matching looks at the weights alone. These look at the loss as well, and ask weight matching
(or an assignment) for the permutation at each step.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from geojax import assignment, fit
from geojax import batches as batches_
from geojax import progress as progress_
from geojax import tree as trees
from geojax.permute import evaluation
from geojax.permute.matching import MatchingResult, Method, weight_matching
from geojax.permute.relaxed import apply_soft, sinkhorn
from geojax.symmetry import action
from geojax.symmetry.spec import PermutationSpec, SpecError

__all__ = [
    "GradientMatchingResult",
    "SinkhornResult",
    "StraightThroughResult",
    "gradient_matching",
    "midpoint",
    "sinkhorn_matching",
    "straight_through_matching",
]

PyTree = Any
Permutation = dict[str, Any]
SinkhornLoss = Literal["weights", "midpoint", "random_point"]
# Where a candidate of the random-point loss is measured: the middles of five equal parts.
_POINTS = (0.1, 0.3, 0.5, 0.7, 0.9)


class StraightThroughResult(NamedTuple):
    """A permutation found with the loss of the midpoint.

    Attributes:
        permutation: The candidate with the lowest loss: one int32 array for each group, a copy.
        objective: Its inner product of the weights, over the leaves that are matched.
        best_loss: Its loss at the midpoint, the mean over the evaluation batches. Measuring
            `midpoint(spec, permutation, params_a, params_b)` again gives the same number.
        best_step: The step whose projection it is; -1 for the start.
        start_loss: The loss at the midpoint with the permutation of weight matching.
        endpoint_loss: The mean loss of the two networks, the constant that the paper subtracts.
        losses: `(num_steps,)`, at the midpoint of each step, on its batch alone.
        candidates: Each distinct permutation that was evaluated, as (step, loss), in order.
        num_moves: At how many steps the projection was another than the step before.
        converged: Whether every projection reached a fixed point of its matching.
    """

    permutation: Permutation
    objective: float
    best_loss: float
    best_step: int
    start_loss: float
    endpoint_loss: float
    losses: np.ndarray
    candidates: list[tuple[int, float]]
    num_moves: int
    converged: bool


class SinkhornResult(NamedTuple):
    """A permutation found by descent on doubly stochastic matrices.

    Attributes:
        permutation: The rounded candidate with the lowest loss: one int32 array for each group.
        objective: Its inner product of the weights, over the leaves that are matched.
        best_loss: Its loss: that which was minimized, at the permutation instead of the matrices.
        best_step: The number of steps after which it was found; -1 for a given start.
        losses: `(num_steps,)`, the minimized loss at the matrices of each step, on its batch.
        candidates: Each distinct permutation that was evaluated, as (step, loss), in order.
        matrices: The last doubly stochastic matrices, `(*index_sizes, n, n)` for each group.
        marginal_error: The largest deviation of one of their row or column sums from 1.
        rounding_distance: The largest difference of one of their entries from its rounding. Near 0
            the matrices are permutations, and the last loss is that of the last candidate.
    """

    permutation: Permutation
    objective: float
    best_loss: float
    best_step: int
    losses: np.ndarray
    candidates: list[tuple[int, float]]
    matrices: dict[str, np.ndarray]
    marginal_error: float
    rounding_distance: float


class GradientMatchingResult(NamedTuple):
    """The permutation towards which the loss falls fastest.

    Attributes:
        permutation: One int32 array for each group.
        slope: The slope of the loss at A towards the permuted B, over the leaves that are matched;
            measured at the permuted weights, not summed up along the way.
        slope_identity: The slope towards B as it is; never below `slope`.
        objective: What the matching maximized: the inner product of the negative gradient with the
            permuted B.
        converged: Whether the matching reached a fixed point.
    """

    permutation: Permutation
    slope: float
    slope_identity: float
    objective: float
    converged: bool


# ------------------------------------------------------------------------------------ in common


def _check_kinds(spec: PermutationSpec, what: str) -> None:
    if not spec.groups:
        raise SpecError(f"{what}: the spec has no groups, so there is nothing to permute.")
    for group in spec.groups:
        if group.kind != "permutation":
            raise SpecError(
                f"{what}: group {group.name!r} is of kind {group.kind!r}; only permutations can be "
                "learned. Use weight_matching, or a spec whose groups are of kind 'permutation'."
            )


def _check_points(params_a: PyTree, params_b: PyTree) -> None:
    trees.check_floating(params_a, "params_a")
    trees.check_same(params_a, params_b, names=("params_a", "params_b"))


def _check_steps(what: str, num_steps: int, evaluate_every: int) -> None:
    if num_steps < 1 or evaluate_every < 1:
        raise ValueError(
            f"{what}: num_steps is {num_steps} and evaluate_every {evaluate_every}; expected "
            "positive numbers."
        )


_apply = functools.partial(jax.jit, static_argnums=0)(action.apply)


def _matched(spec: PermutationSpec, tree: PyTree) -> list[Any]:
    """The leaves that a matching looks at: moved by a group, and no running statistics."""
    chosen = {leaf.path for leaf in spec.leaves if leaf.groups() and not leaf.statistic}
    pairs = zip(trees.paths(tree), jax.tree.leaves(tree), strict=True)
    return [leaf for path, leaf in pairs if path in chosen]


@functools.partial(jax.jit, static_argnums=0)
def _inner(spec: PermutationSpec, a: PyTree, b: PyTree) -> jax.Array:
    return trees.vdot(_matched(spec, a), _matched(spec, b))


@functools.partial(jax.jit, static_argnums=0)
def _slope(spec: PermutationSpec, gradient: PyTree, start: PyTree, end: PyTree) -> jax.Array:
    step = trees.axpy(-1.0, _matched(spec, start), _matched(spec, end))
    return trees.vdot(_matched(spec, gradient), step)


@functools.partial(jax.jit, static_argnums=0)
def _distance(spec: PermutationSpec, a: PyTree, b: PyTree) -> jax.Array:
    """The squared distance of the matched leaves, as a fraction of the square of A's."""
    left, right = _matched(spec, a), _matched(spec, b)
    apart = trees.axpy(-1.0, left, right)
    return trees.vdot(apart, apart) / trees.vdot(left, left)


def midpoint(
    spec: PermutationSpec, permutation: action.Permutation, params_a: PyTree, params_b: PyTree
) -> PyTree:
    """The parameters halfway between A and the permuted B.

    Raises:
        SpecError: If the permutation does not fit the spec.

    Example:
        >>> from geojax.symmetry import Factor, Group, Leaf
        >>> spec = PermutationSpec((Leaf("['w']", (2,), (Factor("h", 2),)),), (Group("h", 2),))
        >>> a, b = {"w": jnp.array([1.0, 5.0])}, {"w": jnp.array([5.0, 3.0])}
        >>> midpoint(spec, {"h": np.array([1, 0])}, a, b)["w"].tolist()
        [2.0, 5.0]
    """
    action.check_permutation(spec, permutation)
    return _point(spec, dict(permutation), params_a, params_b, 0.5)


def _point(spec: PermutationSpec, permutation: Permutation, a: PyTree, b: PyTree, t: float) -> Any:
    return evaluation._between(a, _apply(spec, permutation, b), np.float64(t))


def _endless(source: Any) -> Iterator[PyTree]:
    """The batches of one epoch after another, in the order in which `fit` takes them."""
    for epoch in itertools.count():
        if isinstance(source, batches_.Batches):
            yield from source.epoch(epoch)
        else:
            yield from source


def _copy(permutation: Mapping[str, Any]) -> Permutation:
    return {name: np.array(order, np.int32) for name, order in permutation.items()}


class _Candidates:
    """Permutations with their losses on the same data; the best is a copy of its own."""

    def __init__(self, loss: Callable[[Permutation], Any]):
        self._loss = loss
        self._known: set[bytes] = set()
        self.rows: list[tuple[int, float]] = []
        self.best: Permutation = {}
        self.loss, self.step = np.inf, -1

    def try_(self, step: int, permutation: Mapping[str, Any]) -> None:
        name = b"".join(np.asarray(permutation[k], np.int32).tobytes() for k in sorted(permutation))
        if name in self._known:
            return
        self._known.add(name)
        loss = float(self._loss(_copy(permutation)))
        self.rows.append((step, loss))
        if loss < self.loss:
            self.best, self.loss, self.step = _copy(permutation), loss, step

    def check(self, what: str) -> None:
        if not self.best:
            raise FloatingPointError(
                f"{what}: none of the {len(self.rows)} candidates has a finite loss."
            )


def _check_finite(what: str, step: int, loss: float) -> None:
    if not np.isfinite(loss):
        raise fit.NonFiniteError(
            f"{what}: step {step} gave the loss {loss}. Lower the learning rate.", step, None
        )


# ------------------------------------------------------------------------------ straight-through


def straight_through_matching(
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    spec: PermutationSpec,
    params_a: PyTree,
    params_b: PyTree,
    batches: Any,
    optimizer: Any,
    num_steps: int,
    *,
    key: jax.Array,
    init: action.Permutation | None = None,
    eval_batches: Any = None,
    evaluate_every: int = 10,
    progress: bool | None = None,
) -> StraightThroughResult:
    r"""Align B to A by descent on the loss of the midpoint, with a straight-through estimator.

    Free weights :math:`\tilde\Theta` start at A. Each step projects them on the orbit of B,
    :math:`\pi = \arg\max \langle \tilde\Theta, \pi(\Theta_B)\rangle`, by coordinate descent from
    the last :math:`\pi`, and moves them by the gradient of the loss at
    :math:`\tfrac12 (\Theta_A + \pi(\Theta_B))`, as though the projection were the identity.

    It differs from the paper and its code in three ways. The forward pass adds
    :math:`\tilde\Theta - \mathrm{sg}(\tilde\Theta)`, which is zero to the last bit, so the loss is
    that of the midpoint exactly. The best permutation is a copy, chosen on data that are the same
    for all candidates and not by the loss of one batch. And the permutation of weight matching is
    always a candidate, so the result is never worse than that.

    Args:
        loss_fn: `(params, batch)` to the mean loss of the batch; without noise.
        spec: The symmetry of the network.
        params_a: The network that stays.
        params_b: The network to permute.
        batches: One batch or a re-iterable; `batches.split(arrays, size, key=...)` reshuffles each
            epoch, as for `fit`.
        optimizer: An optax gradient transformation of the free weights. The paper's is SGD with
            momentum 0.9 and rate 0.01.
        num_steps: Projections and steps.
        key: A typed key, for the order in which groups are visited.
        init: The permutation that the first projection starts from, and another candidate; by
            default that of weight matching.
        eval_batches: The data on which candidates are compared, at each evaluation all of them; by
            default all of `batches`.
        evaluate_every: Steps between evaluations. A permutation is evaluated once.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        A `StraightThroughResult`. Cost: the default weight matching; for each step a coordinate
        descent and one gradient; for each evaluation a pass over `eval_batches`. Memory: six times
        the parameters, and the optimizer's state.

    Raises:
        SpecError: If a group is of another kind than 'permutation', or `init` does not fit.
        ValueError: If the two networks differ in structure or shapes.
        NonFiniteError: If the loss of a step is not finite.

    Reference:
        Ainsworth, Hayase and Srinivasa, Git Re-Basin: Merging Models modulo Permutation Symmetries,
        2023, section 3.3 and algorithm 2.
    """
    what = "straight_through_matching"
    _check_kinds(spec, what)
    _check_points(params_a, params_b)
    _check_steps(what, num_steps, evaluate_every)
    if init is not None:
        action.check_permutation(spec, init)
    source = batches_.as_batches(batches)
    averaged = batches_.mean(loss_fn, source if eval_batches is None else eval_batches)
    candidates = _Candidates(lambda p: averaged(midpoint(spec, p, params_a, params_b)))
    endpoint_loss = (float(averaged(params_a)) + float(averaged(params_b))) / 2

    key_start, key_steps = jax.random.split(key)
    matched = weight_matching(spec, params_a, params_b, key=key_start, progress=False)
    candidates.try_(-1, matched.permutation)
    (_, start_loss) = candidates.rows[0]
    if init is not None:
        candidates.try_(-1, init)
    current = _copy(matched.permutation if init is None else init)
    state = fit.init(params_a, optimizer, key=key_steps)
    step_fn = _straight_through_step(loss_fn, optimizer)
    losses, num_moves, converged = [], 0, True

    def project(step: int) -> Permutation:
        nonlocal num_moves, converged
        found = weight_matching(
            spec,
            state.params,
            params_b,
            key=jax.random.fold_in(key_steps, step),
            method="coordinate_descent",
            init=_copy(current),
            progress=False,
        )
        new = _copy(found.permutation)
        num_moves += any((new[name] != current[name]).any() for name in new)
        converged = converged and bool(found.converged)
        return new

    with progress_.bar(num_steps, what, show=progress) as bar:
        for step, batch in enumerate(itertools.islice(_endless(source), num_steps)):
            current = project(step)
            if step % evaluate_every == 0:
                candidates.try_(step, current)
            middle = midpoint(spec, current, params_a, params_b)
            state, metrics = step_fn(state, (batch, middle))
            losses.append(float(metrics["loss"]))
            _check_finite(what, step, losses[-1])
            bar(step + 1, loss=f"{losses[-1]:.4g}", best=f"{candidates.loss:.4g}")
        candidates.try_(num_steps, project(num_steps))
    candidates.check(what)
    moved = _apply(spec, candidates.best, params_b)
    return StraightThroughResult(
        permutation=candidates.best,
        objective=float(_inner(spec, params_a, moved)),
        best_loss=candidates.loss,
        best_step=candidates.step,
        start_loss=start_loss,
        endpoint_loss=endpoint_loss,
        losses=np.array(losses),
        candidates=candidates.rows,
        num_moves=num_moves,
        converged=converged,
    )


@functools.lru_cache(maxsize=16)
def _straight_through_step(loss_fn: Callable, optimizer: Any) -> Callable:
    """A step on the free weights, given a batch and the midpoint of their projection."""

    def at_midpoint(free, batch):
        examples, middle = batch
        through = jax.tree.map(
            lambda m, x: m + 0.5 * (x - jax.lax.stop_gradient(x)).astype(m.dtype), middle, free
        )
        return loss_fn(through, examples)

    return jax.jit(fit.make_step(at_midpoint, optimizer), donate_argnums=0)


# ------------------------------------------------------------------------------------- Sinkhorn


def sinkhorn_matching(
    spec: PermutationSpec,
    params_a: PyTree,
    params_b: PyTree,
    optimizer: Any,
    num_steps: int,
    *,
    key: jax.Array,
    loss: SinkhornLoss = "weights",
    loss_fn: Callable[[PyTree, PyTree], jax.Array] | None = None,
    batches: Any = None,
    eval_batches: Any = None,
    init: action.Permutation | None = None,
    temperature: float | Callable[[int], float] = 1.0,
    num_iterations: int = 200,
    noise: float = 0.01,
    evaluate_every: int = 10,
    progress: bool | None = None,
) -> SinkhornResult:
    r"""Align B to A by descent on the logits of doubly stochastic matrices, then round.

    With P(L) the Sinkhorn matrices of logits L and P(L) B the mixed network, the loss is

    - "weights": :math:`\|A - P(L) B\|^2 / \|A\|^2` over the leaves that are matched;
    - "midpoint": `loss_fn` at :math:`\tfrac12 (A + P(L) B)`;
    - "random_point": `loss_fn` at :math:`(1 - t) A + t P(L) B`, with t drawn anew at each step.

    It differs from the reference in that the assignment is of the matrices and not of the logits,
    in that logits start around zero, where the matrices know nothing, and not at the identity, and
    in that the best of all rounded candidates is returned and not the last one.

    Args:
        spec: The symmetry of the network; groups of kind 'permutation'.
        params_a: The network that stays.
        params_b: The network to permute.
        optimizer: An optax gradient transformation of the logits; they want large steps, such as
            Adam's with a rate of 0.1 to 1.
        num_steps: Steps on the logits.
        key: A typed key, for the noise at the start and the random points.
        loss: Which loss, see above.
        loss_fn: `(params, batch)` to the mean loss of the batch; for the last two.
        batches: One batch or a re-iterable; for the last two.
        eval_batches: The data on which candidates are compared; by default all of `batches`. With
            "random_point" they are compared by the mean over five points of the line.
        init: A permutation to start near to: half of the weight of each unit lies on it. It is then
            a candidate as well.
        temperature: tau, or a function of the step, to lower it along the way.
        num_iterations: The most Sinkhorn iterations in a step.
        noise: The standard deviation of the logits at the start.
        evaluate_every: Steps between candidates. A permutation is evaluated once.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        A `SinkhornResult`. Cost: for each step a gradient of the loss, and the Sinkhorn iterations
        and a linear system for each group. Memory: some n^2 numbers for each group, and six times
        the parameters.

    Raises:
        SpecError: If a group is of another kind than 'permutation', or `init` does not fit.
        ValueError: If `loss` is unknown or lacks its function and data, or the networks differ in
            structure or shapes.
        NonFiniteError: If the loss of a step is not finite.

    Reference:
        Peña et al., Re-basin via implicit Sinkhorn differentiation, 2023, section 4.
    """
    what = "sinkhorn_matching"
    _check_kinds(spec, what)
    _check_points(params_a, params_b)
    _check_steps(what, num_steps, evaluate_every)
    if loss not in get_args(SinkhornLoss):
        raise ValueError(f"{what}: loss is {loss!r}; expected one of {get_args(SinkhornLoss)}.")
    if (loss == "weights") != (loss_fn is None) or (loss == "weights") != (batches is None):
        raise ValueError(
            f"{what}: 'weights' takes neither loss_fn nor batches, the other losses need both; "
            f"got loss={loss!r}, loss_fn {'missing' if loss_fn is None else 'given'} and batches "
            f"{'missing' if batches is None else 'given'}."
        )
    if loss == "weights" and eval_batches is not None:
        raise ValueError(f"{what}: 'weights' compares weights and takes no eval_batches.")
    if init is not None:
        action.check_permutation(spec, init)
    source = None if batches is None else batches_.as_batches(batches)
    candidates = _Candidates(
        _rounded_loss(
            spec,
            params_a,
            params_b,
            loss,
            loss_fn,
            source if eval_batches is None else eval_batches,
        )
    )
    if init is not None:
        candidates.try_(-1, init)
    schedule = temperature if callable(temperature) else lambda step: temperature
    key_noise, key_steps = jax.random.split(key)
    logits = _first_logits(spec, key_noise, noise, init, float(schedule(0)))
    state = fit.init(logits, optimizer, key=key_steps)
    step_fn = _sinkhorn_step(spec, loss, loss_fn, optimizer, num_iterations)
    data = itertools.repeat(()) if source is None else _endless(source)
    losses: list[float] = []
    with progress_.bar(num_steps, what, show=progress) as bar:
        for step, batch in enumerate(itertools.islice(data, num_steps)):
            tau = np.float32(schedule(step))
            if step % evaluate_every == 0:
                candidates.try_(step, _rounded(_matrices(state.params, tau, num_iterations)))
            state, metrics = step_fn(state, (params_a, params_b, batch, tau))
            losses.append(float(metrics["loss"]))
            _check_finite(what, step, losses[-1])
            bar(step + 1, loss=f"{losses[-1]:.4g}", best=f"{candidates.loss:.4g}")
    matrices = _matrices(state.params, np.float32(schedule(num_steps - 1)), num_iterations)
    matrices = {name: np.asarray(x) for name, x in matrices.items()}
    last = _rounded(matrices)
    candidates.try_(num_steps, last)
    candidates.check(what)
    action.check_permutation(spec, candidates.best)
    hard = action.to_matrices(last)
    return SinkhornResult(
        permutation=candidates.best,
        objective=float(_inner(spec, params_a, _apply(spec, candidates.best, params_b))),
        best_loss=candidates.loss,
        best_step=candidates.step,
        losses=np.array(losses),
        candidates=candidates.rows,
        matrices=matrices,
        marginal_error=max(
            float(np.abs(x.sum(axis) - 1).max()) for x in matrices.values() for axis in (-1, -2)
        ),
        rounding_distance=max(
            float(np.abs(matrices[name] - np.asarray(hard[name])).max()) for name in matrices
        ),
    )


def _first_logits(
    spec: PermutationSpec, key: jax.Array, noise: float, init: Any, temperature: float
) -> dict[str, jax.Array]:
    like = {
        group.name: jax.ShapeDtypeStruct((*group.shape, group.size), jnp.float32)
        for group in spec.groups
    }
    logits = trees.scale(noise, trees.random_like(key, like))
    if init is not None:
        for name, matrix in action.to_matrices(init).items():
            # As much weight on one entry of a row as on all others together.
            logits[name] += temperature * float(np.log(max(matrix.shape[-1] - 1, 1))) * matrix
    return logits


@functools.partial(jax.jit, static_argnums=2)
def _matrices(logits: Mapping[str, jax.Array], temperature: Any, num_iterations: int) -> Any:
    """The Sinkhorn matrices of each group; those of one size in one program."""
    by_size: dict[int, list[str]] = {}
    for name, x in logits.items():
        by_size.setdefault(x.shape[-1], []).append(name)
    out = {}
    for n, names in by_size.items():
        stacked = jnp.concatenate([logits[name].reshape(-1, n, n) for name in names])
        found = sinkhorn(stacked, temperature=temperature, num_iterations=num_iterations)
        ends = np.cumsum([logits[name].size // n**2 for name in names])
        for name, part in zip(names, jnp.split(found, ends[:-1]), strict=True):
            out[name] = part.reshape(logits[name].shape)
    return out


def _rounded(matrices: Mapping[str, Any]) -> Permutation:
    return {name: np.asarray(assignment.solve(x).columns) for name, x in matrices.items()}


def _rounded_loss(spec, params_a, params_b, loss, loss_fn, data) -> Callable[[Permutation], float]:
    """The loss that is minimized, at a permutation, on the same data each time."""
    if loss == "weights":
        return lambda p: float(_distance(spec, params_a, _apply(spec, p, params_b)))
    averaged = batches_.mean(loss_fn, data)
    ts = (0.5,) if loss == "midpoint" else _POINTS

    def mean_over_points(permutation: Permutation) -> float:
        points = (_point(spec, permutation, params_a, params_b, t) for t in ts)
        return float(np.mean([float(averaged(point)) for point in points]))

    return mean_over_points


@functools.lru_cache(maxsize=16)
def _sinkhorn_step(spec, loss, loss_fn, optimizer, num_iterations) -> Callable:
    def at_matrices(logits, batch, key):
        params_a, params_b, examples, temperature = batch
        mixed = apply_soft(spec, _matrices(logits, temperature, num_iterations), params_b)
        if loss == "weights":
            return _distance(spec, params_a, mixed)
        t = jax.random.uniform(key) if loss == "random_point" else jnp.asarray(0.5, jnp.float32)
        return loss_fn(evaluation._between(params_a, mixed, t), examples)

    return jax.jit(fit.make_step(at_matrices, optimizer), donate_argnums=0)


# ------------------------------------------------------------------------------- by the gradient


def gradient_matching(
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    spec: PermutationSpec,
    params_a: PyTree,
    params_b: PyTree,
    batches: Any,
    *,
    key: jax.Array,
    method: Method = "coordinate_descent",
    progress: bool | None = None,
) -> GradientMatchingResult:
    r"""Permute B to where the loss falls fastest from A.

    The slope :math:`\langle \nabla L(\Theta_A), \pi(\Theta_B) - \Theta_A \rangle` is linear in the
    permuted weights, so its minimum is a weight matching of the negative gradient with B.
    Coordinate descent from the identity is always tried, and only lowers the slope from there.

    The slope is the loss's only close to A, and the permuted B is far: this is the simplest matcher
    that knows the loss, a baseline for the others.

    Args:
        loss_fn: `(params, batch)` to the mean loss of the batch.
        spec: The symmetry of the network; groups of kind 'permutation'.
        params_a: The network at which the loss is linearized.
        params_b: The network to permute.
        batches: One batch or a re-iterable.
        key: A typed key, for the order in which groups are visited.
        method: Another method of `weight_matching` to try besides; the lower slope is returned.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        A `GradientMatchingResult`. Cost: one gradient over the data and the matching.

    Raises:
        SpecError: If a group is of another kind than 'permutation'.
        ValueError: If the two networks differ in structure or shapes.

    Reference:
        The script for steepest descent in the code of Ainsworth et al., Git Re-Basin, 2023; it is
        not in the paper.
    """
    what = "gradient_matching"
    _check_kinds(spec, what)
    _check_points(params_a, params_b)
    averaged = batches_.mean(_gradient_of(loss_fn), batches)
    gradient = averaged(params_a)
    downhill = trees.scale(-1.0, gradient)
    methods: dict[Method, None] = {"coordinate_descent": None, method: None}
    tried: list[tuple[float, MatchingResult]] = []
    for name in methods:  # without a start, coordinate descent begins at the identity
        found = weight_matching(spec, downhill, params_b, key=key, method=name, progress=progress)
        moved = _apply(spec, _copy(found.permutation), params_b)
        tried.append((float(_slope(spec, gradient, params_a, moved)), found))
    slope, found = min(tried, key=lambda pair: pair[0])
    return GradientMatchingResult(
        permutation=_copy(found.permutation),
        slope=slope,
        slope_identity=float(_slope(spec, gradient, params_a, params_b)),
        objective=float(found.objective),
        converged=bool(found.converged),
    )


@functools.lru_cache(maxsize=16)
def _gradient_of(loss_fn: Callable) -> Callable:
    return jax.grad(loss_fn)
