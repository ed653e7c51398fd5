"""Stacked pytrees as tall matrices: Gram matrices, mixtures, orthonormal rows.

The pytrees stay on their devices; matrices with a few rows are worked on by the host in float64.
Also what the solvers share: refusals, the rule for convergence, the result, Lanczos and MINRES.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from geojax import tree
from geojax.krylov.operators import Operator
from geojax.krylov.results import Eigenpairs, angle_bounds, fix_signs

PyTree = Any
Blocks = tuple[PyTree, ...]

_inner_many = jax.vmap(tree.inner_products, in_axes=(None, 0))
stack = jax.jit(lambda vectors: tree.stack(list(vectors)))


@jax.jit
def _gram(left: Blocks, right: Blocks) -> jax.Array:
    rows = [jnp.concatenate([_inner_many(b, a) for b in right], axis=1) for a in left]
    return jnp.concatenate(rows, axis=0)


def gram(left: Blocks, right: Blocks) -> np.ndarray:
    """The inner products of all rows of the left blocks with all rows of the right ones."""
    return np.asarray(_gram(left, right), np.float64)


def _mixture(blocks: Blocks, weights: jax.Array) -> PyTree:
    ends = np.cumsum([tree.num_points(block) for block in blocks])[:-1].tolist()
    parts = [
        tree.combine(block, part)
        for block, part in zip(blocks, jnp.split(weights, ends, axis=1), strict=True)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = jax.tree.map(jnp.add, total, part)
    return total


@jax.jit
def _mix(blocks: Blocks, weights: tuple[jax.Array, ...]) -> Blocks:
    return tuple(_mixture(blocks, w) for w in weights)


def mix(blocks: Blocks, *weights: np.ndarray) -> Blocks:
    """For each matrix of weights `(r, rows of all blocks)` the block of r combinations."""
    dtype = row_dtype(blocks[0])
    # Copied: on the CPU the device may read the host's own array, after the caller changed it.
    return _mix(blocks, tuple(np.array(w, dtype) for w in weights))


def row_dtype(block: PyTree) -> Any:
    """The dtype of a block's scalars, as NumPy has it."""
    return np.dtype(tree.accumulation_dtype(*jax.tree.leaves(block)))


def _rows_times(block: PyTree, factors: jax.Array) -> PyTree:
    return jax.tree.map(
        lambda x: x * factors.astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1)), block
    )


_norms = jax.vmap(tree.norm)
norms = jax.jit(_norms)


@jax.jit
def unit_rows(block: PyTree) -> tuple[PyTree, jax.Array]:
    """The rows at unit length (zero rows stay), and their lengths."""
    lengths = _norms(block)
    # Divided, not multiplied by the inverse, which overflows for the shortest rows.
    safe = jnp.where(lengths > 0, lengths, jnp.ones_like(lengths))
    return jax.tree.map(
        lambda x: x / safe.astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1)), block
    ), lengths


@jax.jit
def remove(block: PyTree, blocks: Blocks, weights: jax.Array) -> PyTree:
    return jax.tree.map(jnp.subtract, block, _mixture(blocks, weights))


@jax.jit
def defects(products: PyTree, images: PyTree, values: jax.Array) -> tuple[PyTree, jax.Array]:
    """The rows A x - value M x from A x and M x, and their norms."""
    out = jax.tree.map(jnp.subtract, products, _rows_times(images, values))
    return out, _norms(out)


def take(block: PyTree, rows: Any) -> PyTree:
    """Some rows of a block, bit for bit, in any sharding."""
    weights = np.zeros((len(rows), tree.num_points(block)))
    weights[np.arange(len(rows)), rows] = 1
    return mix((block,), weights)[0]


def products(operator: Operator, block: PyTree) -> PyTree:
    """A times each row, in the dtype of the rows."""
    return _in_dtype(operator.matmat(block), operator.dtype)


def product(operator: Operator, v: PyTree) -> PyTree:
    """A times a vector, in the operator's dtype."""
    return _in_dtype(operator.matvec(v), operator.dtype)


def _in_dtype(out: PyTree, dtype: Any) -> PyTree:
    wrong = any(jnp.result_type(x) != dtype for x in jax.tree.leaves(out))
    return tree.cast(out, dtype) if wrong else out


def random_rows(operator: Operator, key: jax.Array, num: int) -> PyTree:
    """Independent standard normal rows."""
    return stack(tuple(operator.random(jax.random.fold_in(key, i)) for i in range(num)))


def orthonormal(
    block: PyTree,
    *,
    against: Blocks = (),
    images: Blocks | None = None,
    mass: Callable[[PyTree], PyTree] | None = None,
) -> tuple[PyTree, PyTree, int]:
    """Rows that span what a block adds to the span of orthonormal rows.

    Two rounds of projection and whitening with the eigenvectors of the Gram matrix (Stathopoulos
    and Wu 2002), which a float64 host does for float32 rows as well. What is dependent up to
    rounding becomes a zero row, so that shapes stay as they are.

    Args:
        block: The rows.
        against: Blocks whose rows are orthonormal (in the inner product of M) or zero.
        images: M times those blocks; by default the blocks.
        mass: From a block to M times it; by default the identity.

    Returns:
        `(rows, images, rank)`: the rows, M times them, and how many are not zero.
    """
    images = against if images is None else images
    epsilon = float(np.finfo(row_dtype(block)).eps)
    num = tree.num_points(block)
    block, _ = unit_rows(block)
    image, rank = block, 0
    for attempt in range(2):
        if against:
            # In the second round only what rounding left is taken out.
            block = remove(block, against, _gram((block,), images))
            block, lengths = unit_rows(block)
            lengths = np.asarray(lengths, np.float64)
        else:
            lengths = np.ones(num)
        image = block if mass is None else mass(block)
        overlaps = gram((block,), (image,))
        if not np.isfinite(overlaps).all():
            break
        live = (lengths > 100 * epsilon) & (np.diag(overlaps) > 0)
        scaling = np.where(live, np.diag(overlaps), 1.0) ** -0.5 * live
        overlaps = scaling[:, None] * (overlaps + overlaps.T) / 2 * scaling[None]
        values, vectors = np.linalg.eigh(overlaps)
        # In the first round a direction is worth keeping while the second can still mend it.
        keep = values > (10 * num * epsilon if attempt == 0 else 0.1)
        rank = int(keep.sum())
        weights = np.zeros((num, num))
        weights[:rank] = (vectors[:, keep] / np.sqrt(values[keep])).T * scaling[None]
        if mass is None:
            (block,) = mix((block,), weights)
            image = block
        else:
            (block,), (image,) = mix((block,), weights), mix((image,), weights)
    return block, image, rank


def complete(block: PyTree, rank: int, operator: Operator, key: jax.Array) -> PyTree:
    """Orthonormal rows with random ones, orthogonal to them, in place of those after `rank`."""
    num = tree.num_points(block)
    for attempt in range(3):
        if rank == num:
            break
        more = random_rows(operator, jax.random.fold_in(key, attempt), num - rank)
        more, _, found = orthonormal(more, against=(block,))
        weights = np.zeros((num, num + num - rank))
        weights[np.arange(rank), np.arange(rank)] = 1
        weights[rank + np.arange(found), num + np.arange(found)] = 1
        (block,) = mix((block, more), weights)
        rank += found
    return block


def check_operator(caller: str, operator: Operator, k: int) -> None:
    """Raise for an operator that is no fixed symmetric matrix, or a k out of range."""
    if operator.stochastic:
        raise ValueError(
            f"{caller}: {operator.name} gives another product each time, and this method needs one "
            "matrix. Freeze the sample (one batch, or `batches.take`; a fixed key for dropout), or "
            "use `stochastic_power_iteration`."
        )
    if not operator.symmetric:
        raise ValueError(
            f"{caller}: {operator.name} is not symmetric; expected a symmetric operator."
        )
    if not isinstance(k, (int, np.integer)) or not 1 <= k <= operator.size:
        raise ValueError(
            f"{caller}: k is {k!r}; expected an integer from 1 to n = {operator.size}."
        )


def check_tol(caller: str, tol: float) -> None:
    """Raise for a tolerance that is no relative residual."""
    if not 0 < tol < 1:
        raise ValueError(f"{caller}: tol is {tol}; expected a relative residual between 0 and 1.")


def check_positive(caller: str, **counts: Any) -> None:
    """Raise for a count that is neither None nor a positive integer."""
    for name, value in counts.items():
        if value is not None and not (isinstance(value, (int, np.integer)) and value > 0):
            raise ValueError(f"{caller}: {name} is {value!r}; expected a positive integer.")


def check_rows(caller: str, operator: Operator, block: PyTree, most: int) -> PyTree:
    """The first rows of stacked vectors given by a user, in the operator's dtype."""
    num = tree.num_points(block)
    expected = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((num, *jnp.shape(x)), jnp.result_type(x)), operator.like
    )
    tree.check_same(expected, block, names=(operator.name, "initial"), dtype=False)
    tree.check_floating(block, "initial")
    block = tree.cast(block, operator.dtype)
    block = take(block, range(min(num, most)))
    lengths = np.asarray(norms(block))
    if not (np.isfinite(lengths).all() and (lengths > 0).any()):
        raise ValueError(
            f"{caller}: initial has rows of norm {lengths.tolist()}; expected finite vectors that "
            "are not all 0."
        )
    return block


def check_finite(caller: str, numbers: Any, operator: Operator, num: int, last: int) -> None:
    """Raise if what came of the last products is not finite."""
    if not np.isfinite(np.asarray(numbers)).all():
        where = f"product {num}" if last == 1 else f"one of products {num - last + 1} to {num}"
        raise FloatingPointError(
            f"{caller}: {where} with {operator.name} is not finite. Check that the loss and its "
            "second derivative are finite at these parameters (log or sqrt at 0, overflow in half "
            "precision)."
        )


def accepted(values, residuals, norm, floor, tol, epsilon, lengths: Any = 1.0) -> np.ndarray:
    """Whether each residual is small enough for its value.

    Relative to the value; relative to eps^(2/3) of the norm for small ones, as in ARPACK; and a
    value that the products cannot tell from zero is as good as it can be.
    """
    reference = np.maximum(np.abs(values), epsilon ** (2 / 3) * norm) * lengths
    null = (np.abs(values) <= 4 * floor) & (residuals <= 4 * floor * lengths)
    return (residuals <= tol * reference) | null


def floor_reason(floor: float) -> str:
    """Why a pair that cannot get better is not converged."""
    return f"noise floor: products are accurate to {floor:.1e}, tol asks for more"


def warn_stuck(caller: str, operator: Operator, stuck, tol: float, floor: float, norm: float):
    """Warn that the tolerance is below what the products allow."""
    if np.any(stuck):
        warnings.warn(
            f"{caller}: {int(np.sum(stuck))} of {len(stuck)} pairs cannot reach tol={tol:g}: the "
            f"products with {operator.name} are accurate to about {floor:.2g} (norm {norm:.3g}). "
            "Their residuals say how good they are; ask for a larger tol, or compute the products "
            "in a higher precision.",
            stacklevel=4,
        )


def pairs(
    *, values, vectors, residuals, converged, reasons, num_matvecs, floor, history, others=None,
    intervals=None, verified=True,
) -> Eigenpairs:  # fmt: skip
    """The result, from what a solver found."""
    values = np.asarray(values, np.float64)
    residuals = np.asarray(residuals, np.float64)
    if intervals is None:
        # A measured residual has the error of the products it was measured with.
        radius = residuals + float(floor) * verified
        intervals = np.stack([values - radius, values + radius], 1)
    k = len(values)
    rows = {"num_matvecs": np.array([row[0] for row in history], int)}
    for i, name in ((1, "eigenvalues"), (2, "residuals")):
        rows[name] = np.full((len(history), k), np.nan)
        for at, row in enumerate(history):
            found = np.asarray(row[i], np.float64)[:k]
            rows[name][at, : len(found)] = found
    return Eigenpairs(
        eigenvalues=values,
        eigenvectors=fix_signs(vectors),
        residuals=residuals,
        intervals=intervals,
        angles=angle_bounds(values, residuals, values if others is None else others),
        converged=np.asarray(converged, bool),
        reasons=tuple(reasons),
        num_matvecs=int(num_matvecs),
        verified=verified,
        noise_floor=float(floor),
        history=rows,
    )


class Ritz(NamedTuple):
    """What a Krylov basis says about the spectrum.

    Attributes:
        values: `(m,)`, float64, rising.
        weights: `(rows, m)`, the Ritz vectors in terms of the rows.
        residuals: `(m,)`, the norm of A x - theta x that the recurrence implies.
        norm: The largest magnitude seen: a lower bound on the norm of A.
    """

    values: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray
    norm: float


@functools.partial(jax.jit, donate_argnums=0)
def _append(rows: PyTree, w: PyTree, key: jax.Array, count: jax.Array, scale: jax.Array):
    """Orthogonalise w, twice, against the first rows and write what is left as the next one.

    Where rounding alone is left, a random vector takes its place.
    """
    num = tree.num_points(rows)
    filled = np.arange(num, dtype=np.int32) < count

    def off(w):
        total = jnp.zeros(num, scale.dtype)
        for _ in range(2):
            c = jnp.where(filled, tree.inner_products(rows, w), 0)
            w = jax.tree.map(jnp.subtract, w, tree.combine(rows, c))
            total = total + c
        return w, total

    length = tree.norm(w)
    scale = jnp.maximum(scale, length)
    # At unit norm, so that the squares of a tiny vector do not vanish.
    w, column = off(_over(w, length))
    beta = tree.norm(w)
    broke = beta * length <= 64 * jnp.finfo(scale.dtype).eps * scale
    w = lax.cond(broke, lambda w: off(tree.random_like(key, w))[0], lambda w: w, w)
    w = _over(w, tree.norm(w))
    at = jnp.minimum(count, num - 1)

    def write(x, q):
        old = lax.dynamic_index_in_dim(x, at, 0, keepdims=True)
        new = jnp.where(count < num, q[None], old)
        return lax.dynamic_update_slice_in_dim(x, new, at, 0)

    beta = jnp.where(broke, jnp.zeros_like(beta), beta * length)
    return jax.tree.map(write, rows, w), w, column * length, beta, scale


class Krylov:
    """An orthonormal basis grown by products with A, and the part of Q^T A Q that is known.

    Lanczos with two passes of Gram-Schmidt and all coefficients kept; a breakdown goes on with a
    random vector, and `restart` keeps some of the Ritz vectors (Wu and Simon 2000).
    """

    def __init__(self, caller: str, operator: Operator, *, key: jax.Array, num_products: int):
        self.caller, self.operator, self.key = caller, operator, key
        self.size = min(num_products + 1, operator.size)
        self.limit = min(num_products, operator.size)
        self.projected = np.zeros((self.size, self.size))
        self.num_known, self.num_restarts, self.num_products = 0, 0, 0
        self.noise = 0.0
        first = operator.random(key)
        (self.rows,) = mix((stack((first,)),), np.zeros((self.size, 1)))
        self.scale = np.zeros((), operator.dtype)
        self.rows, self.next, *_ = _append(self.rows, first, key, np.int32(0), self.scale)

    @property
    def whole(self) -> bool:
        """Whether the basis spans the whole space, and all products are known."""
        return self.num_known == self.operator.size

    @property
    def full(self) -> bool:
        """Whether there is no room for another product."""
        return self.num_known >= self.limit

    def extend(self, num: int, more: Callable[[], bool] = lambda: True) -> int:
        """Take up to `num` products, as long as there is room and `more` says so."""
        columns = []
        while len(columns) < num and self.num_known + len(columns) < self.limit and more():
            at = self.num_known + len(columns)
            self.num_products += 1
            w = product(self.operator, self.next)
            key = jax.random.fold_in(self.key, self.num_products)
            self.rows, self.next, column, beta, self.scale = _append(
                self.rows, w, key, np.int32(at + 1), self.scale
            )
            columns.append((column, beta))
        for column, beta in jax.device_get(columns):
            numbers = np.append(column, beta)
            check_finite(self.caller, numbers, self.operator, self.num_products, len(columns))
            self.projected[:, self.num_known] = column
            if self.num_known + 1 < self.size:
                self.projected[self.num_known + 1, self.num_known] = beta
            self.num_known += 1
        block = self.projected[: self.num_known, : self.num_known]
        self.noise = max(self.noise, float(np.abs(block - block.T).max(initial=0.0)))
        return len(columns)

    def ritz(self) -> Ritz:
        """Ritz values, vectors and residuals."""
        m = self.num_known
        block = self.projected[:m, :m]
        values, vectors = np.linalg.eigh((block + block.T) / 2)
        weights = np.zeros((self.size, m))
        weights[:m] = vectors
        residuals = np.abs(self.projected[m, :m] @ vectors) if m < self.size else np.zeros(m)
        norm = float(max(np.abs(values).max(initial=0.0), float(self.scale)))
        return Ritz(values, weights, residuals, norm)

    def vectors(self, found: Ritz, chosen: Any) -> PyTree:
        """Some of the Ritz vectors."""
        return mix((self.rows,), found.weights[:, chosen].T)[0]

    def restart(self, found: Ritz, keep: np.ndarray, anew: bool = False) -> None:
        """Compress the basis to some of its Ritz vectors and the row not yet multiplied.

        Or, to go on `anew`, to converged Ritz vectors and a random row: it sees copies of multiple
        eigenvalues that the first vector could not.
        """
        m, p = self.num_known, len(keep)
        matrix = np.zeros((self.size, self.size))
        matrix[:p] = found.weights[:, keep].T
        coupling = self.projected[m, :m] @ found.weights[:m, keep]
        self.projected[:] = 0
        self.projected[np.arange(p), np.arange(p)] = found.values[keep]
        if not anew:
            matrix[p, m] = 1
            self.projected[p, :p] = coupling
        (self.rows,) = mix((self.rows,), matrix)
        if anew:
            key = jax.random.fold_in(self.key, (1 << 30) + self.num_products)
            fresh = self.operator.random(key)
            self.rows, self.next, *_ = _append(self.rows, fresh, key, np.int32(p), self.scale * 0)
        self.num_known = p
        self.num_restarts += 1


def _over(x: PyTree, length: jax.Array) -> PyTree:
    safe = jnp.where(length > 0, length, jnp.ones_like(length))
    return jax.tree.map(lambda a: a / safe.astype(a.dtype), x)
