"""Linear assignment: who goes with whom, at the best total score, exactly and deterministically.

SciPy's solver runs on the host, from eager code or through a callback inside `jit` and `vmap`. A
sequence of similar problems is solved by updating the certificate of the one before.
"""

import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from geojax import tree

__all__ = ["Assignment", "WarmStart", "bottleneck", "greedy", "resolve", "solve", "start"]

# Threads cost more than they save on less than this many matrix entries in all.
_MIN_THREADED = 2**15
# Below this size SciPy's whole solve takes less time than NumPy's overhead in updating duals.
_MIN_WARM = 256
# Candidate edges per row of a warm solve, before violated edges are added.
_EDGES_PER_ROW = 14
_CERTIFY_ROUNDS = 4
_PRICING_ROUNDS = 6
_BLOCK = 64


class Assignment(NamedTuple):
    """A matching of rows to columns.

    Attributes:
        columns: `(..., n)` int32; row i goes with `columns[i]`, or with none where that is -1.
        value: `(...)`; the sum of the matched scores, float64 from the host and the accumulation
            dtype (float32) inside `jit`. NaN there if the scores were not finite.
    """

    columns: Any
    value: Any


class WarmStart(NamedTuple):
    """What one solve leaves to the next, similar one; see `resolve`.

    Attributes:
        columns: `(n,)` int32, the last assignment; -1 before the first.
        potentials: `(n,)` float64, the dual prices of the columns for costs to be minimised.
        num_certified: How many calls kept the assignment without a solve.
        num_warm: How many calls solved a sparse problem reduced by the potentials.
        num_cold: How many calls solved the dense problem.
    """

    columns: np.ndarray
    potentials: np.ndarray
    num_certified: int = 0
    num_warm: int = 0
    num_cold: int = 0


# ------------------------------------------------------------------------------------- one solve


def solve(scores: Any, *, maximize: bool = True, previous: Any = None) -> Assignment:
    r"""The assignment :math:`\sigma` with the best total :math:`\sum_i s_{i\sigma(i)}`.

    All arithmetic on the host is in float64, so the optimum of integer scores is exact (up to
    2**53). Works eagerly and under `jit`, `vmap`, `scan` and `grad`: the derivative of the value is
    one at the matched entries and zero elsewhere.

    Args:
        scores: `(..., n, m)`, real. The smaller side is matched completely.
        maximize: Whether the best total is the largest or the smallest.
        previous: `(..., n)` columns of an earlier assignment, which is returned again if it is
            still optimal to rounding (`4 eps min(n, m) max|scores|`), so that ties do not drift.
            Entries of -1, as in a start or after a failure, make it a full solve.

    Returns:
        NumPy arrays from eager code, JAX arrays where `scores` is traced. Batch elements are
        solved on as many threads as there are cores (SciPy releases the interpreter lock).

    Raises:
        ValueError: For fewer than two axes; outside `jit` for scores that are not finite, naming
            the first entry. Inside `jit` that is flagged instead: columns of -1 and a value of NaN
            for the batch elements concerned, and no others.
        TypeError: For complex scores.

    Example:
        >>> found = solve(np.array([[1.0, 5.0], [2.0, 3.0]]))
        >>> found.columns.tolist(), float(found.value)
        ([1, 0], 7.0)

    Reference:
        Crouse, On implementing 2D rectangular assignment algorithms, 2016 (SciPy's algorithm).
    """
    shape = _check_shape(scores, "solve")
    if previous is not None and jnp.shape(previous) != shape[:-1]:
        raise ValueError(
            f"solve: previous has shape {jnp.shape(previous)}; expected {shape[:-1]}, one column "
            "for each row."
        )
    if isinstance(scores, Tracer) or isinstance(previous, Tracer):
        return _solve_traced(jnp.asarray(scores), previous, maximize)
    matrix = _on_host(scores, "solve")
    _check_finite(matrix)
    columns = _solve_host(matrix, None if previous is None else np.asarray(previous), maximize)
    return Assignment(columns, _value(matrix, columns))


def _check_shape(scores: Any, name: str) -> tuple[int, ...]:
    shape = jnp.shape(scores)
    if len(shape) < 2:
        raise ValueError(f"{name}: scores have shape {shape}; expected (..., rows, columns).")
    if jnp.issubdtype(jnp.result_type(scores), jnp.complexfloating):
        raise TypeError(f"{name}: scores are {jnp.result_type(scores)}; expected real numbers.")
    return shape


def _on_host(scores: Any, name: str) -> np.ndarray:
    if isinstance(scores, jax.Array) and not (
        scores.is_fully_addressable or scores.is_fully_replicated
    ):
        raise ValueError(
            f"{name}: the scores are spread over several processes; replicate them first, so that "
            "every process solves the same problem."
        )
    return np.asarray(scores).astype(np.float64, copy=False)


def _check_finite(matrix: np.ndarray) -> None:
    if matrix.size == 0 or np.isfinite(matrix.min() + matrix.max()):
        return
    bad = np.argwhere(~np.isfinite(matrix))
    if not len(bad):
        return  # the two extremes are finite and their sum overflows
    *batch, row, column = (int(i) for i in bad[0])
    where = f" of batch element {tuple(batch)}" if batch else ""
    raise ValueError(
        f"assignment: the score at row {row}, column {column}{where} is "
        f"{matrix[tuple(bad[0])]}; expected finite numbers. Forbid a pair with a score that is "
        "finite and worse than any sum of the others."
    )


def _solve_host(matrix: np.ndarray, previous: np.ndarray | None, maximize: bool) -> np.ndarray:
    """Columns for finite batch elements, -1 for the others; `matrix` is float64."""
    *batch, n, m = matrix.shape
    num = math.prod(batch)
    flat = matrix.reshape((num, n, m))
    before = None if previous is None else previous.reshape((num, n))
    out = np.full((num, n), -1, np.int32)

    def one(i: int) -> None:
        if np.isfinite(flat[i]).all():
            out[i] = _solve_one(flat[i], None if before is None else before[i], maximize)

    threads = min(os.cpu_count() or 1, num)
    if threads > 1 and flat.size >= _MIN_THREADED:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, range(num)))
    else:
        for i in range(num):
            one(i)
    return out.reshape((*batch, n))


def _solve_one(matrix: np.ndarray, previous: np.ndarray | None, maximize: bool) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    rows, found = linear_sum_assignment(matrix, maximize=maximize)
    columns = np.full(len(matrix), -1, np.int32)
    columns[rows] = found
    if previous is None or not _is_assignment(previous, matrix.shape):
        return columns
    gain = float(_value(matrix, columns) - _value(matrix, previous))
    keep = (gain if maximize else -gain) <= _tolerance(matrix)
    return previous.astype(np.int32) if keep else columns


def _is_assignment(columns: np.ndarray, shape: tuple[int, ...]) -> bool:
    used = columns[columns >= 0]
    return (
        len(used) == min(shape)
        and len(np.unique(used)) == len(used)
        and bool((columns < shape[1]).all() and (columns >= -1).all())
    )


def _tolerance(matrix: np.ndarray) -> float:
    """What rounding may do to the value of an assignment."""
    return _rounding(min(matrix.shape), _scale(matrix)) if matrix.size else 0.0


def _rounding(n: int, scale: float) -> float:
    return 4 * np.finfo(np.float64).eps * n * scale


def _scale(matrix: np.ndarray) -> float:
    return max(abs(float(matrix.max())), abs(float(matrix.min())))


def _value(matrix: np.ndarray, columns: np.ndarray) -> Any:
    if 0 in matrix.shape[-2:]:
        return np.zeros(matrix.shape[:-2])[()]
    entries = np.take_along_axis(matrix, np.maximum(columns, 0)[..., None], axis=-1)[..., 0]
    return np.where(columns >= 0, entries, 0.0).sum(axis=-1)


def _callback(maximize: bool, scores: Any, *previous: Any) -> np.ndarray:
    before = np.asarray(previous[0]) if previous else None
    return _solve_host(np.asarray(scores).astype(np.float64), before, maximize)


def _replicated(array: jax.Array) -> jax.Array:
    """The array on every device, where its type says that it is not."""
    sharding = getattr(jax.typeof(array), "sharding", None)
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return array
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec()))


def _solve_traced(scores: jax.Array, previous: Any, maximize: bool) -> Assignment:
    scores = _replicated(scores)
    given = () if previous is None else (_replicated(jnp.asarray(previous, jnp.int32)),)
    columns = jax.pure_callback(
        functools.partial(_callback, maximize),
        jax.ShapeDtypeStruct(scores.shape[:-1], jnp.int32),
        lax.stop_gradient(scores),
        *given,
        vmap_method="broadcast_all",
    )
    dtype = tree.accumulation_dtype(scores)
    if 0 in scores.shape[-2:]:
        return Assignment(columns, jnp.zeros(scores.shape[:-2], dtype))
    entries = jnp.take_along_axis(scores, jnp.maximum(columns, 0)[..., None], axis=-1)[..., 0]
    matched = columns >= 0
    value = jnp.sum(jnp.where(matched, entries.astype(dtype), 0.0), axis=-1)
    return Assignment(columns, jnp.where(jnp.any(matched, axis=-1), value, jnp.nan))


# ------------------------------------------------------------------------- a sequence of problems

# How a warm solve works. Costs c (negated scores) with potentials v of the columns leave reduced
# costs r = c - u - v >= 0, where u is the row minimum of c - v. Prices v' of r with
# v'_j <= v'_sigma(i) + r_ij - r_isigma(i) for all i, j prove an assignment sigma optimal; they are
# shortest paths, found by Bellman-Ford. Only entries of small reduced cost matter, so both the
# assignment and the paths are computed on a sparse graph of them. One dense pass measures the
# duality gap of the result; entries that violate it join the graph and it is solved again. What
# is returned has passed that dense test, or comes from the dense solver.


def start(n: int) -> WarmStart:
    """The state with which a sequence of n by n problems begins; see `resolve`."""
    return WarmStart(np.full(n, -1, np.int32), np.zeros(n))


def resolve(
    scores: Any, state: WarmStart, *, maximize: bool = True
) -> tuple[Assignment, WarmStart]:
    """Solve a square problem that resembles the last one, with its dual prices.

    The result is optimal: the assignment before is kept if a certificate (complementary slackness,
    to a duality gap of `4 eps n max|scores|`) shows that it still is, and else a problem that is
    sparse in the reduced costs is solved, checked against the same certificate. Where that cannot
    be had, and below 256 rows, where it would cost more, it is `solve`. Runs on the host only.

    Time against `solve` on 512 x 512 Gaussian scores (two cores, one shared machine): 0.4 of it
    where 0.5 % of the rows change from call to call, 0.5 where 5 % do, 0.1 where nothing does; at
    1024 rows 0.25 and 0.35. Where a third of the rows or more change, or where ties abound, it is
    up to twice the time of `solve`: use that.

    Args:
        scores: `(n, n)`, real and finite.
        state: From `start(n)` or the last call. It is not changed.
        maximize: As for `solve`; the same in all calls of a sequence.

    Returns:
        The assignment, NumPy arrays as from `solve`, and the state for the next call. Ties keep the
        assignment before.

    Raises:
        ValueError: For scores that are not finite, not square or of another size than the state.
        TypeError: Inside `jit`.

    Example:
        >>> scores = np.eye(3)
        >>> first, state = resolve(scores, start(3))
        >>> again, state = resolve(scores + 0.1, state)
        >>> again.columns.tolist()
        [0, 1, 2]

    Reference:
        Jonker and Volgenant, A shortest augmenting path algorithm for dense and sparse linear
        assignment problems, 1987, for duals and reduced costs.
    """
    if isinstance(scores, Tracer):
        raise TypeError("resolve: runs on the host only; inside `jit` use `solve`.")
    shape = _check_shape(scores, "resolve")
    n = len(state.columns)
    if shape != (n, n):
        raise ValueError(
            f"resolve: scores have shape {shape}; expected {(n, n)}, as `start({n})` was given. "
            "Rectangular or batched problems go to `solve`."
        )
    matrix = _on_host(scores, "resolve")
    _check_finite(matrix)
    warm = None
    known = n > 0 and bool((state.columns >= 0).all())
    if known and n >= _MIN_WARM:
        warm = _resolve_warm(matrix, state, maximize)
    if warm is not None:
        columns, potentials, certified = warm
        counts = (state.num_certified + certified, state.num_warm + (not certified), state.num_cold)
    else:
        columns = _solve_one(matrix, state.columns if known else None, maximize)
        potentials = np.zeros(n)
        if n >= _MIN_WARM:
            potentials = _potentials(-matrix if maximize else matrix, columns)
        counts = (state.num_certified, state.num_warm, state.num_cold + 1)
    return Assignment(columns, _value(matrix, columns)), WarmStart(columns, potentials, *counts)


def _resolve_warm(
    matrix: np.ndarray, state: WarmStart, maximize: bool
) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """Columns, potentials and whether the assignment before was kept unsolved; None if in vain."""
    n = len(matrix)
    each = np.arange(n)
    scale = _scale(matrix)
    tolerance = _rounding(n, scale)
    # Potentials much larger than the scores would drown them in rounding.
    if not np.abs(state.potentials).max() <= 8 * scale:
        return None
    if maximize:
        reduced = np.subtract(-state.potentials[None], matrix)
    else:
        reduced = matrix - state.potentials[None]
    reduced -= reduced.min(axis=1)[:, None]
    before = state.columns.astype(np.intp)
    if reduced[each, before].sum() <= tolerance:
        return state.columns.copy(), state.potentials, True

    sample = reduced[:: max(1, n // 16)].ravel()
    rank = min(sample.size - 1, sample.size * _EDGES_PER_ROW // n)
    threshold = np.partition(sample, rank)[rank]
    chosen = reduced <= threshold
    chosen[each, before] = True  # so that the graph has a perfect matching
    prices = np.zeros(n)
    for attempt in range(_PRICING_ROUNDS):
        if 4 * np.count_nonzero(chosen) > chosen.size:
            return None  # many ties: sparse is no cheaper than dense
        graph = _Edges(chosen, reduced)
        columns, certified = before, False
        # A pair that lost more than the graph's costs reach is not worth the attempt.
        if attempt == 0 and reduced[each, before].max() <= threshold:
            found, certified = graph.prices(before, prices, tolerance / n, _CERTIFY_ROUNDS)
        if certified:
            prices = found
        else:
            columns = graph.solve()
            prices, finished = graph.prices(columns, prices, tolerance / n, n)
            if not finished:
                return None
        # The dense test: the duality gap of `columns` under these prices.
        highest = reduced[each, columns] - prices[columns]
        gap = 0.0
        for first in range(0, n, _BLOCK):  # in blocks, which stay in the cache
            rows = each[first : first + _BLOCK]
            slack = reduced[first : first + _BLOCK] - prices[None]
            excess = highest[rows] - slack.min(axis=1)
            gap += float(excess.sum())
            for i in np.flatnonzero(excess > tolerance / n):
                chosen[rows[i]] |= slack[i] < highest[rows[i]]
        if gap <= tolerance:
            # Of two optimal assignments the one before is kept.
            gain = reduced[each, before].sum() - reduced[each, columns].sum()
            columns = before if gain <= tolerance else columns
            potentials = state.potentials + prices
            return columns.astype(np.int32), potentials - potentials.mean(), certified
    return None


class _Edges:
    """The chosen entries of a cost matrix as a graph from rows to columns."""

    def __init__(self, chosen: np.ndarray, costs: np.ndarray):
        self.size = len(costs)
        self.costs = costs
        flat = np.flatnonzero(chosen)
        self.rows, self.columns = np.divmod(flat, self.size)
        self.weights = costs.ravel()[flat]
        # A stable sort of 16-bit integers is a radix sort.
        keys = self.columns.astype(np.uint16) if self.size <= 2**16 else self.columns
        order = np.argsort(keys, kind="stable")
        self.rows_by_column = self.rows[order]
        self.weights_by_column = self.weights[order]
        self.first = np.searchsorted(self.columns[order], np.arange(self.size))

    def solve(self) -> np.ndarray:
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import min_weight_full_bipartite_matching

        starts = np.searchsorted(self.rows, np.arange(self.size + 1)).astype(np.int32)
        # SciPy reads a weight of zero as no edge. The weights are nonnegative, and adding the same
        # to all changes every perfect matching's cost alike.
        weights = self.weights + max(float(self.weights.max()), 1e-300)
        graph = csr_array(
            (weights, self.columns.astype(np.int32), starts), shape=(self.size, self.size)
        )
        return np.asarray(min_weight_full_bipartite_matching(graph)[1], np.intp)

    def prices(
        self, columns: np.ndarray, start: np.ndarray, tolerance: float, max_rounds: int
    ) -> tuple[np.ndarray, bool]:
        """Prices below `start`, and whether they prove `columns` optimal on this graph."""
        matched = self.costs[np.arange(self.size), columns]
        prices = start
        slack = np.empty_like(self.weights_by_column)
        for _ in range(max_rounds + 1):
            highest = matched - prices[columns]
            np.take(highest, self.rows_by_column, out=slack, mode="clip")  # writes in place
            np.subtract(self.weights_by_column, slack, out=slack)
            new = np.minimum(prices, np.minimum.reduceat(slack, self.first))
            if (prices - new).max() <= tolerance:
                return prices, True
            prices = new
        return prices, False


def _potentials(costs: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Column potentials that prove an assignment optimal, by Bellman-Ford on the dense graph."""
    n = len(costs)
    matched = costs[np.arange(n), columns]
    row_of = np.empty(n, np.intp)
    row_of[columns] = np.arange(n)
    tolerance = _tolerance(costs) / n
    prices = np.zeros(n)
    rows = np.arange(n)
    for _ in range(n + 1):
        highest = matched[rows] - prices[columns[rows]]
        new = np.min(costs[rows] - highest[:, None], axis=0)
        lower = np.flatnonzero(new < prices - tolerance)
        if not lower.size:
            break
        prices[lower] = new[lower]
        rows = row_of[lower]  # only their prices changed
    # Unfinished prices are worse as a start and prove nothing, but mislead nobody: every use of
    # them measures the gap that they leave.
    return prices - prices.mean()


# --------------------------------------------------------------------------------- other objectives


def greedy(scores: Any, *, maximize: bool = True) -> Assignment:
    """Match the best pair, then the best of what is left, and so on.

    For nonnegative scores to be maximised the total is at least half the optimum.

    Args:
        scores: `(n, m)`, real and finite. Of equal scores the first in row order is taken.
        maximize: Whether the best pair has the largest or the smallest score.

    Returns:
        NumPy arrays as from `solve`. Host only; the time is that of sorting the entries.

    Example:
        >>> greedy(np.array([[3.0, 2.9], [2.9, 0.0]])).value
        np.float64(3.0)
    """
    matrix = _one_matrix(scores, "greedy")
    n, m = matrix.shape
    order = np.argsort(-matrix if maximize else matrix, axis=None, kind="stable")
    columns = np.full(n, -1, np.int32)
    free = np.ones(m, bool)
    left = min(n, m)
    for entry in order:
        row, column = divmod(int(entry), m)
        if columns[row] < 0 and free[column]:
            columns[row], free[column] = column, False
            left -= 1
            if not left:
                break
    return Assignment(columns, _value(matrix, columns))


def bottleneck(scores: Any, *, maximize: bool = True) -> Assignment:
    """The assignment whose worst matched score is best.

    Args:
        scores: `(n, m)`, real and finite.
        maximize: Whether to maximise the smallest matched score or to minimise the largest.

    Returns:
        NumPy arrays; `value` is that worst score, not a sum. Host only: a matching of the pairs
        above a threshold for each step of a bisection over the scores.

    Raises:
        ValueError: For an empty matrix, or scores that are not finite.

    Example:
        >>> float(bottleneck(np.array([[9.0, 3.0], [2.0, 0.0]])).value)
        2.0
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    matrix = _one_matrix(scores, "bottleneck")
    if matrix.size == 0:
        raise ValueError(f"bottleneck: scores have shape {matrix.shape}; expected some entries.")
    costs = -matrix if maximize else matrix
    levels = np.unique(costs)
    low, high = 0, len(levels) - 1
    best = np.full(len(costs), -1, np.int32)
    while low <= high:
        middle = (low + high) // 2
        found = maximum_bipartite_matching(csr_array(costs <= levels[middle]), perm_type="column")
        if np.count_nonzero(found >= 0) == min(costs.shape):
            best, high = np.asarray(found, np.int32), middle - 1
        else:
            low = middle + 1
    worst = costs[best >= 0, best[best >= 0]].max()
    return Assignment(best, -worst if maximize else worst)


def _one_matrix(scores: Any, name: str) -> np.ndarray:
    if isinstance(scores, Tracer):
        raise TypeError(f"{name}: runs on the host only; call it outside `jit`.")
    shape = _check_shape(scores, name)
    if len(shape) != 2:
        raise ValueError(f"{name}: scores have shape {shape}; expected (rows, columns).")
    matrix = _on_host(scores, name)
    _check_finite(matrix)
    return matrix
