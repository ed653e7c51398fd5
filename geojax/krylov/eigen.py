"""Eigenpairs of a symmetric operator by thick-restart Lanczos with bounded memory."""

import json
import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import progress as progress_
from geojax import tree
from geojax.fit import Checkpointer
from geojax.krylov import _basis
from geojax.krylov.lanczos import (
    LanczosState,
    Ritz,
    init,
    restart,
    ritz,
    settle,
    start_anew,
    step,
)
from geojax.krylov.operators import Operator
from geojax.krylov.results import (
    Eigenpairs,
    Which,
    angle_bounds,
    check_which,
    fix_signs_in_place,
    wanted,
)

__all__ = ["eigsh"]

PyTree = Any
# A search for missed copies: the fewest products, and by how much a copy of the size that a random
# vector has of it must have grown past the rest before it counts as absent.
_LEAST_SEARCH = 5
_SEARCH_POWER = 100.0

_off_by = jax.jit(lambda product, value, x: tree.norm(tree.axpy(-value, x, product)))


@jax.jit
def _mixture(vectors: PyTree, noise: PyTree) -> PyTree:
    """Equal parts of unit vectors and a tenth of a random one, of length one each."""
    n = tree.num_points(vectors)
    mixed = tree.combine(vectors, np.full(n, n**-0.5, np.float32))
    noise = jax.tree.map(lambda a, b: a.astype(b.dtype), noise, mixed)
    return tree.axpy(0.1 / tree.norm(noise), noise, tree.scale(1 / tree.norm(mixed), mixed))


class _Verdict(NamedTuple):
    """The wanted Ritz pairs and how good they are."""

    order: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray
    stuck: np.ndarray
    floor: float


def _floor(found: Ritz, noise: float, epsilon: float) -> float:
    return max(2 * epsilon * found.norm, noise)


def _accept(values, residuals, norm, floor, tol, epsilon):
    """Whether each residual is small enough for its value.

    Relative to the value; relative to eps^(2/3) of the norm for small ones, as ARPACK has it; and a
    value that the products cannot tell from zero is as good as it can be.
    """
    reference = np.maximum(np.abs(values), epsilon ** (2 / 3) * norm)
    null = (np.abs(values) <= 4 * floor) & (residuals <= 4 * floor)
    return (residuals <= tol * reference) | null


def _judge(found: Ritz, k, which, tol, noise, epsilon) -> _Verdict:
    order = wanted(found.values, k, which)
    floor = _floor(found, noise, epsilon)
    estimates = found.residuals[order]
    residuals = np.maximum(estimates, floor)
    converged = _accept(found.values[order], residuals, found.norm, floor, tol, epsilon)
    return _Verdict(order, residuals, converged, ~converged & (estimates <= floor), floor)


def _check(operator, k, which, tol, basis_size, memory_bytes, block_size, confirm, budgets):
    n = operator.size
    if operator.stochastic:
        raise ValueError(
            f"eigsh: {operator.name} gives another product each time; Lanczos needs one matrix. "
            "Freeze the sample (`batches.take` or one batch; a fixed key for dropout), or use "
            "`stochastic_power_iteration`."
        )
    if not operator.symmetric:
        raise ValueError(f"eigsh: {operator.name} is not symmetric; Lanczos needs a symmetric one.")
    if not isinstance(k, (int, np.integer)) or not 1 <= k <= n:
        raise ValueError(f"eigsh: k is {k!r}; expected an integer from 1 to n = {n}.")
    check_which(which)
    if not 0 < tol < 1:
        raise ValueError(f"eigsh: tol is {tol}; expected a relative residual between 0 and 1.")
    if not isinstance(block_size, (int, np.integer)) or block_size < 1:
        raise ValueError(f"eigsh: block_size is {block_size!r}; expected a positive integer.")
    if confirm < 0:
        raise ValueError(f"eigsh: confirm is {confirm}; expected 0 or a number of products.")
    for name, value in budgets.items():
        if value is not None and not value > 0:
            raise ValueError(f"eigsh: {name} is {value}; expected a positive number or None.")
    bytes_each = n * np.dtype(operator.dtype).itemsize
    if memory_bytes is not None:
        if basis_size is not None:
            raise ValueError("eigsh: give either basis_size or memory_bytes, not both.")
        # Besides the basis: the pending rows, twice more and their products, the temporaries of a
        # step, and what malloc keeps of both. At the end, `gather` holds the first chunks and k
        # times a leaf.
        total, others = int(memory_bytes // bytes_each), 3 * block_size + 8
        largest = max(int(np.prod(jnp.shape(x))) for x in jax.tree.leaves(operator.like))
        leaf = math.ceil(k * largest / n)
        result = math.ceil(k / _basis.CHUNK) * _basis.CHUNK + leaf
        least = min(n, k + 2) + block_size
        basis_size = total - block_size - (others if result <= total else max(others, leaf))
        least = max(least + others, min(result, least + leaf))
        if basis_size < min(n, k + 2):
            raise ValueError(
                f"eigsh: memory_bytes={memory_bytes:.3g} is too little for {k} eigenpairs of "
                f"{n} parameters; expected at least {least * bytes_each:.3g}."
            )
    if basis_size is None:
        basis_size = max(2 * k + 10, 20)
    if not isinstance(basis_size, (int, np.integer)) or basis_size < min(n, k + 2):
        raise ValueError(
            f"eigsh: basis_size is {basis_size!r}; expected at least k + 2 = {k + 2} vectors."
        )
    # A basis that all but fills the space may as well fill it: the result is then exact.
    return n if basis_size + block_size >= n else int(basis_size)


def eigsh(
    operator: Operator,
    k: int,
    *,
    key: jax.Array,
    which: Which = "LM",
    tol: float = 1e-3,
    basis_size: int | None = None,
    memory_bytes: float | None = None,
    block_size: int = 1,
    initial: PyTree = None,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    confirm: int = 15,
    verify: bool = True,
    check_every: int = 5,
    checkpoint: Checkpointer | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    progress: bool | None = None,
) -> Eigenpairs:
    r"""The k eigenpairs at an end of the spectrum, each with a bound on its error.

    Lanczos with full orthogonalization (the parts along the last two rows first, then a pass of
    classical Gram-Schmidt against all rows, and another where that took more than half), all
    coefficients of each product kept, and thick restart (Wu and Simon 2000): when the basis is full
    it is rotated, in place, to its best Ritz vectors. A breakdown (relative to the norm of A)
    continues with a random vector, so invariant subspaces and zero eigenvalues are found. Once all
    pairs have converged, `confirm` products from a fresh random vector look for a copy that one
    starting vector cannot see (a multiple eigenvalue), and the search goes on if they find one.

    It differs from ARPACK in that nothing is locked or purged by shifts, that residuals are
    measured at the end rather than trusted, and that a tolerance below what the arithmetic allows
    is reported instead of iterated on.

    Args:
        operator: A symmetric `Operator` that gives the same product each time.
        k: How many pairs.
        key: A typed key, for the starting vector.
        which: 'LM' largest magnitude, 'LA' largest, 'SA' smallest, 'BE' half from each end.
        tol: The relative residual at which a pair counts as converged:
            :math:`\|A x - \lambda x\| \le` `tol` :math:`|\lambda|`. The eigenvalue's own error is
            of the order of the residual's square over the gap.
        basis_size: Vectors whose products are kept before a restart; by default 2 k + 10, at least
            20. More means fewer products.
        memory_bytes: Instead of `basis_size`: what all vectors together may take.
        block_size: Products taken in one pass over the data. With b starting vectors, eigenvalues
            of multiplicity up to b are found in one sweep.
        initial: A vector to start from, or k' stacked ones such as the eigenvectors of an earlier
            checkpoint, whose mixture with a tenth of a random one is started from.
        max_matvecs: The budget of products, verification apart; by default 30 times `basis_size`.
        max_seconds: The budget of wall time, kept within one product.
        confirm: The most products spent on looking for missed copies, as far as `basis_size` has
            room beside k; 0 for none. Five are always made; the more the closer the unwanted part
            of the spectrum comes, until a copy that a random vector holds at all would have shown.
            A search by chance: of 120 problems with five copies of an eigenvalue and the next a
            fifth below, five products alone missed a copy in two, this rule in none.
        verify: Measure the residual of each returned pair, by k more products.
        check_every: Products between looks at the spectrum.
        checkpoint: A `checkpoint.Checkpointer`; its `every` counts products. The same call resumes,
            with the same result to the last bit.
        callback: Called at each look with a dict: 'num_matvecs', 'seconds', 'eigenvalues',
            'residuals', 'converged'. What it raises ends the run; the last checkpoint stands.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        `Eigenpairs`, k of them unless the budget ended before k products. Memory: `basis_size` +
        4 `block_size` + 8 vectors, or where that is more, k vectors rounded up to a multiple of 16
        and k times the largest leaf; besides what a product needs.

    Raises:
        ValueError: For a stochastic or asymmetric operator, or arguments out of range.
        FloatingPointError: If a product is NaN or infinite.

    Example:
        >>> from geojax import krylov
        >>> matrix = np.diag(np.array([3.0, -5.0, 1.0, 0.5], np.float32))
        >>> pairs = eigsh(krylov.from_matrix(matrix), 2, key=jax.random.key(0))
        >>> np.round(pairs.eigenvalues, 4).tolist()
        [-5.0, 3.0]

    Reference:
        Wu and Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, 2000;
        Daniel et al., 1976 (when to take another pass); Parlett, The symmetric eigenvalue problem,
        1998, theorem 4.5.1 (the intervals) and section 11.7 (the angles).
    """
    budgets = {"max_matvecs": max_matvecs, "max_seconds": max_seconds, "check_every": check_every}
    basis_size = _check(
        operator, k, which, tol, basis_size, memory_bytes, block_size, confirm, budgets
    )
    k, tol = int(k), float(tol)
    confirm = max(0, min(confirm, basis_size - k - 1))
    max_matvecs = 30 * basis_size if max_matvecs is None else max_matvecs
    if initial is not None:
        initial = _start(operator, initial, jax.random.fold_in(key, 0))
    epsilon = float(jnp.finfo(operator.dtype).eps)
    key_start, key_run, key_confirm = jax.random.split(key, 3)
    seed = _basis.seed_of(key_run)
    # Room for the rows whose products are pending.
    room = basis_size + block_size
    state = init(operator, key=key_start, num_rows=room, initial=initial, block_size=block_size)
    run = _Run(operator, key, checkpoint, k, which, basis_size, block_size, confirm, initial)
    state = run.resume(state)
    clock = _Clock(run.seconds, max_seconds)
    with progress_.bar(max_matvecs, "eigsh", show=progress) as bar:
        while True:
            goal = state.num_matvecs // check_every * check_every + check_every
            goal = min(goal if run.confirm_end is None else run.confirm_end, max_matvecs)
            columns: list = []
            while state.num_matvecs < goal and state.front and not clock.over():
                width = min(
                    block_size,
                    goal - state.num_matvecs,
                    len(state.front),
                    _room(operator, state, basis_size),
                )
                if not width:
                    break
                state, new = step(operator, state, seed=seed, block_size=width)
                columns += new
                clock.wait(new)
            state = settle(state, columns, operator.name)
            found = ritz(state)
            verdict = _judge(found, k, which, tol, state.noise, epsilon)
            run.look(state, found, verdict, clock.seconds(), callback, bar)
            enough = len(verdict.order) == k and bool((verdict.converged | verdict.stuck).all())
            confirmed = (
                confirm == 0 or state.count >= operator.size or run.unchanged(found, verdict)
            )
            if not state.front:
                stop = "exact"
            elif enough and confirmed:
                stop = "converged"
            elif state.num_matvecs >= max_matvecs:
                stop = f"stopped at max_matvecs={max_matvecs}"
            elif clock.over():
                stop = f"stopped at max_seconds={max_seconds:g}"
            else:
                stop = ""
            if stop:
                break
            keep = _kept(k, verdict, basis_size, len(found.values))
            if enough and run.goes_on:
                run.save(state, clock.seconds())
                continue
            run.confirm_end = None
            if enough:
                fresh = jax.random.fold_in(key_confirm, state.num_matvecs)
                state = start_anew(operator, state, found, verdict.order, key=fresh)
                run.confirm_start = state.num_matvecs
                run.confirm_end = state.num_matvecs + min(_LEAST_SEARCH, confirm)
                run.confirm_values = found.values[verdict.order].tolist()
            elif not _room(operator, state, basis_size):
                state = restart(state, found, wanted(found.values, keep, which))
            run.save(state, clock.seconds())
    return _finish(operator, state, found, verdict, run, stop, tol, epsilon, verify)


def _search_degree(values: np.ndarray, order: np.ndarray, which: str, size: int) -> int:
    """Products after which a random vector shows a missed copy of a wanted eigenvalue.

    The part of the vector along the copy is about 1 / sqrt(size) of it, and c products let it grow
    by the Chebyshev polynomial T_c against all that lies between the unwanted Ritz values.
    """
    rest = np.delete(values, order)
    least = _LEAST_SEARCH
    if len(rest) < 2 or rest.min() == rest.max():
        return least
    kept = values[order]
    if which == "LM":
        ends = [np.abs(kept).min(), -np.abs(kept).min()]
    elif which == "BE":
        ends = [x[0] for x in (np.sort(kept[kept > rest.max()]), -np.sort(-kept[kept < rest.min()]))
                if len(x)]  # fmt: skip
    else:
        ends = [kept.min() if which == "LA" else kept.max()]
    middle, half = (rest.max() + rest.min()) / 2, (rest.max() - rest.min()) / 2
    place = min((abs(end - middle) / half for end in ends), default=1.0)
    if place <= 1:
        return np.iinfo(np.int32).max
    return max(least, math.ceil(np.arccosh(_SEARCH_POWER * math.sqrt(size)) / np.arccosh(place)))


def _room(operator: Operator, state: LanczosState, basis_size: int) -> int:
    """How many products the basis can take before a restart."""
    rows = len(state.projected)
    left = basis_size - int(state.known.sum())
    return left if rows == operator.size else min(left, rows - state.count)


def _kept(k: int, verdict: _Verdict, basis_size: int, available: int) -> int:
    """How many Ritz vectors survive a restart: more of them as pairs converge."""
    more = min(int(verdict.converged.sum()), (basis_size - k) // 2)
    return min(k + more, basis_size - 1, available)


def _finish(operator, state, found, verdict, run, stop, tol, epsilon, verify) -> Eigenpairs:
    order = verdict.order
    values = found.values[order]
    vectors = fix_signs_in_place(_basis.gather(state.rows, found.weights[:, order].T))
    residuals, num_matvecs = verdict.residuals, state.num_matvecs
    converged, stuck = verdict.converged, verdict.stuck
    del state
    if verify:
        residuals = np.zeros(len(order))
        for i, value in enumerate(values):
            x = _basis._index(vectors, i)
            residuals[i] = _off_by(operator.matvec(x), np.asarray(value, operator.dtype), x)
        num_matvecs += len(order)
        converged = _accept(values, residuals, found.norm, verdict.floor, tol, epsilon)
        stuck = ~converged & (verdict.converged | verdict.stuck)
    floor = f"noise floor: products are accurate to {verdict.floor:.1e}, tol asks for more"
    reasons = tuple(
        "converged" if done else floor if low else stop
        for done, low in zip(converged, stuck, strict=True)
    )
    if stuck.any():
        warnings.warn(
            f"eigsh: {int(stuck.sum())} of {len(order)} pairs cannot reach tol={tol:g}: products "
            f"with {operator.name} are accurate to about {verdict.floor:.2g} (norm "
            f"{found.norm:.3g}). Their residuals say how good they are; ask for a larger tol, or "
            "compute the products in a higher precision.",
            stacklevel=3,
        )
    # What is measured carries the rounding of the products that measure it.
    radius = residuals + verdict.floor if verify else residuals
    history = {
        "num_matvecs": np.array([row["num_matvecs"] for row in run.history]),
        **{
            name: np.array([row[name] + [np.nan] * (run.k - len(row[name])) for row in run.history])
            for name in ("eigenvalues", "residuals")
        },
    }
    return Eigenpairs(
        eigenvalues=values,
        eigenvectors=vectors,
        residuals=residuals,
        intervals=np.stack([values - radius, values + radius], 1),
        angles=angle_bounds(values, residuals, found.values),
        converged=converged,
        reasons=reasons,
        num_matvecs=num_matvecs,
        verified=verify,
        noise_floor=verdict.floor,
        history=history,
    )


def _start(operator: Operator, initial: PyTree, key: jax.Array) -> PyTree:
    """One vector to start from, out of one or several.

    Several have a random one mixed in: what they do not couple to would never be found.
    """
    lead = {
        jnp.ndim(x) - jnp.ndim(y)
        for x, y in zip(jax.tree.leaves(initial), jax.tree.leaves(operator.like), strict=False)
    }
    if lead == {1}:
        operator._check(_basis._index(initial, 0), "initial")
        initial = _mixture(initial, operator.random(key))
    operator._check(initial, "initial")
    length = float(tree.norm(initial))
    if not (np.isfinite(length) and length > 0):
        raise ValueError(
            f"eigsh: the norm of initial is {length}; expected a vector that is not 0."
        )
    return initial


class _Run:
    """History, budgets and checkpoints of one call."""

    def __init__(
        self, operator, key, checkpoint, k, which, basis_size, block_size, confirm, initial
    ):
        self.checkpoint = checkpoint
        self.k = k
        self.seconds = 0.0
        self.confirm, self.which, self.block_size = confirm, which, block_size
        self.confirm_start = 0
        self.confirm_end: int | None = None
        self.confirm_values: list[float] = []
        self.goes_on = False
        self.history: list[dict[str, Any]] = []
        self.record = {
            "operator": operator.name, "size": operator.size, "k": k, "which": which,
            "basis_size": basis_size, "block_size": block_size, "confirm": confirm,
            "initial": initial is not None, "key": jax.random.key_data(key).tolist(),
        }  # fmt: skip
        self.saved_at = 0

    def look(self, state, found, verdict, seconds, callback, bar):
        row = {
            "num_matvecs": state.num_matvecs,
            "eigenvalues": found.values[verdict.order].tolist(),
            "residuals": verdict.residuals.tolist(),
        }
        self.history.append(row)
        bar(
            state.num_matvecs,
            converged=f"{int(verdict.converged.sum())}/{self.k}",
            worst=f"{float(verdict.residuals.max(initial=0.0)):.1e}",
        )
        if callback is not None:
            callback(row | {"seconds": seconds, "converged": verdict.converged.tolist()})

    def unchanged(self, found: Ritz, verdict: _Verdict) -> bool:
        """Whether a confirmation has ended and left the wanted values as they were.

        One that left them so far and is not strong enough yet is prolonged: `goes_on`.
        """
        self.goes_on = False
        if self.confirm_end is None or len(verdict.order) < len(self.confirm_values):
            return False
        moved = np.abs(np.sort(found.values[verdict.order]) - np.sort(self.confirm_values))
        if not (moved <= 2 * verdict.residuals.max()).all():
            return False
        needed = _search_degree(found.values, verdict.order, self.which, self.record["size"])
        end = self.confirm_start + min(self.confirm, needed * self.block_size)
        self.goes_on = end > self.confirm_end
        self.confirm_end = max(end, self.confirm_end)
        return not self.goes_on

    def _arrays(self, state: LanczosState) -> PyTree:
        return {
            "rows": state.rows,
            "projected": state.projected,
            "known": state.known,
            "dropped": state.dropped,
            "scale": state.scale,
        }

    def save(self, state: LanczosState, seconds: float) -> None:
        if self.checkpoint is None or state.num_matvecs - self.saved_at < self.checkpoint.every:
            return
        self.saved_at = state.num_matvecs
        place = {
            "count": state.count,
            "front": list(state.front),
            "mirrored": state.mirrored,
            "num_restarts": state.num_restarts,
            "noise": state.noise,
            "first": state.first,
            "confirm_start": self.confirm_start,
            "confirm_end": self.confirm_end,
            "confirm_values": self.confirm_values,
            "seconds": seconds,
            "history": self.history,
        }
        self.checkpoint.save(state.num_matvecs, self._arrays(state), self.record | place)

    def resume(self, state: LanczosState) -> LanczosState:
        step = None if self.checkpoint is None else self.checkpoint.latest()
        if self.checkpoint is None or step is None:
            return state
        arrays, facts = self.checkpoint.restore(self._arrays(state))
        for name, value in json.loads(json.dumps(self.record)).items():
            if facts.get(name) != value:
                raise ValueError(
                    f"eigsh: the checkpoint in {self.checkpoint.location} is of another run: its "
                    f"{name} is {facts.get(name)} and this run's is {value}. Use the same "
                    "arguments to resume, or another folder."
                )
        self.history, self.confirm_end = facts["history"], facts["confirm_end"]
        self.confirm_start = facts["confirm_start"]
        self.confirm_values = facts["confirm_values"]
        self.seconds, self.saved_at = facts["seconds"], step
        return LanczosState(
            rows=tuple(arrays["rows"]),
            projected=np.array(arrays["projected"], np.float64),
            known=np.array(arrays["known"], bool),
            count=facts["count"],
            front=tuple(facts["front"]),
            dropped=np.array(arrays["dropped"], np.float64),
            mirrored=facts["mirrored"],
            num_matvecs=step,
            num_restarts=facts["num_restarts"],
            scale=arrays["scale"],
            noise=facts["noise"],
            first=facts["first"],
        )


class _Clock:
    """Wall time against a budget."""

    def __init__(self, spent: float, budget: float | None):
        self.began = time.perf_counter() - spent
        self.budget = budget

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def over(self) -> bool:
        return self.budget is not None and self.seconds() > self.budget

    def wait(self, arrays: Any) -> None:
        # Without a budget the host may run ahead of the device.
        if self.budget is not None:
            jax.block_until_ready(arrays)
