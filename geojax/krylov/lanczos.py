"""The Lanczos recurrence with its whole projected matrix: rows, products, restarts.

Products are taken from the host, one compiled program for all; the basis stays on the device, and
the projected matrix, a few hundred rows at most, is diagonalised on the host in float64.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import tree
from geojax.krylov import _basis
from geojax.krylov.operators import Operator

__all__ = ["LanczosState", "Ritz", "init", "restart", "ritz", "settle", "start_anew", "step"]

PyTree = Any
_stack = jax.jit(lambda vectors: tree.stack(list(vectors)))


class LanczosState(NamedTuple):
    """A Krylov basis Q and the part of Q^T A Q that is known: all that a resumed run needs.

    Attributes:
        rows: The basis, as chunks of stacked pytrees. `step` and `restart` reuse its memory.
        projected: `(num_rows, num_rows)`, float64; column j holds Q^T A q_j once it is known.
        known: `(num_rows,)`, bool: whose products have been taken.
        count: How many rows are filled.
        front: The indices of the rows that are next to be multiplied, oldest first.
        dropped: `(num_rows,)`: for each known row, a bound on the part of its product that lay
            outside the basis and was given up by `start_anew`.
        mirrored: How many leading rows take their row of `projected` from the columns of the
            others, because couplings were given up.
        num_matvecs: Products so far.
        num_restarts: Restarts so far.
        scale: The largest norm of a product: a lower bound on the operator's norm.
        noise: The largest asymmetry of `projected`: the error of the products, as they show it.
        first: The row after which each was led to by a product of the one before, so that its own
            product has no part along earlier rows but for rounding.
    """

    rows: tuple[PyTree, ...]
    projected: np.ndarray
    known: np.ndarray
    count: int
    front: tuple[int, ...]
    dropped: np.ndarray
    mirrored: int
    num_matvecs: int
    num_restarts: int
    scale: jax.Array
    noise: float
    first: int


class Ritz(NamedTuple):
    """What a basis says about the spectrum.

    Attributes:
        values: `(m,)`, float64, ascending.
        weights: `(num_rows, m)`, the Ritz vectors in terms of the rows.
        residuals: `(m,)`, the norm of A x - theta x that the recurrence implies.
        norm: The largest magnitude among the values and the coupling: an estimate of the norm of A.
    """

    values: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray
    norm: float


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _append(state: LanczosState, taken: _basis.Taken, seed: int, local: int = -1):
    # A branch costs an accelerator more than a few rows of zeros.
    skip = len(state.rows) > 1 and _on_cpu()
    # Every row has a seed of its own, in a resumed run the same.
    seed = (seed + 0x9E3779B1 * (31 * state.num_matvecs + state.count)) % 2**32
    out = _basis.append(
        state.rows, *taken, np.int32(state.count), np.int32(local), np.uint32(seed), state.scale,
        skip=skip,
    )  # fmt: skip
    return state._replace(rows=out.rows, scale=out.scale), out


def init(
    operator: Operator,
    *,
    key: jax.Array,
    num_rows: int,
    initial: PyTree = None,
    block_size: int = 1,
) -> LanczosState:
    """A basis of one random row (`block_size` of them), or of a given one.

    Args:
        operator: A symmetric operator.
        key: For the random rows.
        num_rows: Rows to make room for: those whose products are taken, and `block_size` more.
        initial: A vector to start from.
        block_size: How many rows to start from.
    """
    first = operator.random(key) if initial is None else initial
    dtype = operator.dtype
    first = jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), first)
    num_rows = min(num_rows, operator.size)
    state = LanczosState(
        _basis.allocate(first, num_rows),
        np.zeros((num_rows, num_rows)),
        np.zeros(num_rows, bool),
        0,
        (),
        np.zeros(num_rows),
        0,
        0,
        0,
        jnp.zeros((), dtype),
        0.0,
        0,
    )
    seed = _basis.seed_of(key)
    taken = _basis.take(first)
    del first
    state = _inject(state, taken, seed)
    for i in range(1, min(block_size, operator.size)):
        taken = _basis.take(operator.random(jax.random.fold_in(key, i)))
        state = _inject(state, taken, seed)
    return state._replace(scale=jnp.zeros((), dtype))


def _inject(state: LanczosState, vector: _basis.Taken, seed: int) -> LanczosState:
    """One row more, which no product led to."""
    state, _ = _append(state, vector, seed)
    return state._replace(count=state.count + 1, front=(*state.front, state.count))


def step(operator: Operator, state: LanczosState, *, seed: int, block_size: int = 1):
    """Multiply the next rows and append what is new in the products.

    Args:
        operator: The operator.
        state: The basis; its memory is reused, so it must not be used again.
        seed: For a random row after a breakdown.
        block_size: How many rows to multiply in one pass over the data.

    Returns:
        `(state, columns)`: the new state, and the new columns of `projected` as `(index, column,
        index of the new row or None, beta)` with arrays still on the device; `settle` writes them.
    """
    b = min(block_size, len(state.front))
    taken, rest = state.front[:b], state.front[b:]
    # In a chain of single rows the product has parts along two of them, all else is rounding.
    local = taken[0] if taken[0] > state.first and len(state.front) == 1 else -1
    vectors = [_basis.row(state.rows, i) for i in taken]
    if b == 1:
        products = [operator.matvec(vectors[0])]
    else:
        products = tree.unstack(operator.matmat(_stack(vectors)))
    del vectors
    if _on_cpu():
        # Where the host runs ahead of the CPU, it allocates ahead too.
        jax.block_until_ready(products)
    state = state._replace(front=rest, num_matvecs=state.num_matvecs + b)
    columns = []
    limit = len(state.projected)
    for index in taken:
        if local < 0:
            vector = _basis.take(products.pop(0))
        else:
            last, before = (_basis.row(state.rows, i) for i in (index, index - 1))
            vector = _basis.take_near(products.pop(0), last, before)
            del last, before
        state, out = _append(state, vector, seed, local)
        del vector
        new = state.count if state.count < limit else None
        columns.append((index, out.column, new, out.beta))
        state.known[index] = True
        if new is not None:
            state = state._replace(count=new + 1, front=(*state.front, new))
    return state, columns


def settle(state: LanczosState, columns: list, what: str) -> LanczosState:
    """Fetch finished columns and write them into `projected`."""
    size = len(state.projected)
    fetched = jax.device_get([(column, beta) for _, column, _, beta in columns])
    for (index, _, new, _), (column, beta) in zip(columns, fetched, strict=True):
        if not (np.isfinite(column).all() and np.isfinite(beta)):
            raise FloatingPointError(
                f"eigsh: a product with {what} is not finite (among the last {len(columns)} of "
                f"{state.num_matvecs}). Check that the loss and its second derivative are finite "
                "at these parameters (log or sqrt at 0, overflow in half precision)."
            )
        column = column[:size]
        state.projected[:, index] = column
        state.projected[index, : state.mirrored] = column[: state.mirrored]
        if new is not None:
            state.projected[new, index] = beta
    known = np.flatnonzero(state.known)
    known = known[known >= state.mirrored]
    block = state.projected[np.ix_(known, known)]
    gap = float(np.abs(block - block.T).max(initial=0.0))
    return state._replace(noise=max(state.noise, gap))


def ritz(state: LanczosState) -> Ritz:
    """Ritz values and residuals of the rows whose products are known."""
    known = np.flatnonzero(state.known)
    block = state.projected[np.ix_(known, known)]
    values, vectors = np.linalg.eigh((block + block.T) / 2)
    unknown = np.flatnonzero(~state.known[: state.count])
    coupling = state.projected[np.ix_(unknown, known)] @ vectors
    weights = np.zeros((len(state.projected), len(known)))
    weights[known] = vectors
    residuals = np.maximum(np.linalg.norm(coupling, axis=0), np.abs(weights).T @ state.dropped)
    norm = float(max(np.abs(values).max(initial=0.0), float(state.scale)))
    return Ritz(values, weights, residuals, norm)


def restart(state: LanczosState, found: Ritz, keep: np.ndarray) -> LanczosState:
    """Compress the basis to some of its Ritz vectors, and the rows not yet multiplied.

    Args:
        state: The basis; its memory is reused.
        found: What `ritz` said of it.
        keep: The indices of the Ritz values to keep.

    Returns:
        A state that satisfies the same relation A Q = Q H with fewer rows.
    """
    unknown = np.flatnonzero(~state.known[: state.count])
    p, size = len(keep), len(state.projected)
    matrix = np.zeros((p + len(unknown), size))
    matrix[:p] = found.weights[:, keep].T
    matrix[p + np.arange(len(unknown)), unknown] = 1
    projected = np.zeros_like(state.projected)
    projected[np.arange(p), np.arange(p)] = found.values[keep]
    projected[p : p + len(unknown), :p] = (
        state.projected[np.ix_(unknown, np.arange(size))] @ found.weights[:, keep]
    )
    known, dropped = np.zeros_like(state.known), np.zeros_like(state.dropped)
    known[:p] = True
    dropped[:p] = np.abs(found.weights[:, keep]).T @ state.dropped
    moved = {int(old): p + i for i, old in enumerate(unknown)}
    return state._replace(
        rows=_basis.turn(state.rows, matrix),
        projected=projected,
        known=known,
        count=p + len(unknown),
        front=tuple(moved[i] for i in state.front),
        dropped=dropped,
        mirrored=p if state.mirrored else 0,
        num_restarts=state.num_restarts + 1,
        first=p + len(unknown) - 1,
    )


def start_anew(
    operator: Operator, state: LanczosState, found: Ritz, keep: np.ndarray, *, key: jax.Array
) -> LanczosState:
    """Keep some Ritz vectors and start again from a random one, orthogonal to nothing but them.

    A new start sees the copies of a multiple eigenvalue that the first could not. The rest of the
    basis is given up, the rows not yet multiplied too: a copy that rounding has begun to bring
    forth lies in those, out of a new start's sight.

    Args:
        operator: The operator.
        state: The basis; its memory is reused.
        found: What `ritz` said of it.
        keep: The indices of the Ritz values to keep, converged ones.
        key: For the random row.
    """
    state = restart(state, found, keep)
    p = len(keep)
    state.projected[p:] = 0
    state.dropped[:p] = found.residuals[keep]
    state = state._replace(count=p, front=(), mirrored=p, first=p)
    return _inject(state, _basis.take(operator.random(key)), _basis.seed_of(key))
