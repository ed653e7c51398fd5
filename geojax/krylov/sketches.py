"""Traces and diagonals from a sketch of the range: Hutch++, XTrace, XNysTrace and XDiag.

The sketch is a stacked pytree, made orthonormal row by row; everything else is small host algebra
in float64. `estimators` is the front door.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from geojax import fit as fit_
from geojax import tree
from geojax.krylov import probes as probes_
from geojax.krylov._leave_one_out import (
    jackknife,
    leave_one_out,
    xnystrace_estimates,
    xtrace_estimates,
)
from geojax.krylov.operators import Operator

__all__ = ["Plan", "trace_samples", "xdiag"]

PyTree = Any

# How this differs from the papers' MATLAB:
# - the QR decomposition is two classical Gram-Schmidt passes for each vector as it comes, which
#   needs no second copy of the sketch and stays orthonormal where the spectrum decays to rounding,
#   as a Cholesky factor of the Gram matrix does not;
# - a rank below the number of probes is found there and handled: the probes that added nothing to
#   the sketch estimate what it left out, which is rounding;
# - probes are made again from their keys, not kept.


class Plan(NamedTuple):
    """What is to be estimated, and how the run is to be driven."""

    operator: Operator
    key: jax.Array
    num_matvecs: int
    distribution: Any
    block_size: int
    record: dict[str, Any]
    checkpoint: fit_.Checkpointer | None
    progress: bool | None

    def probes(self, start: int, stop: int) -> PyTree:
        """The probes number `start` to `stop`."""
        return probes_.probes(self.operator, self.key, start, stop, self.distribution)

    def products(self, vectors: PyTree) -> PyTree:
        """Their products, in the dtype of the vectors."""
        images = probes_.products(self.operator, vectors)
        return jax.tree.map(lambda w, v: w.astype(v.dtype), images, vectors)

    def run(self, total: int, begin, advance, finished=None) -> Any:
        """The last state of a resumable run."""
        return probes_.drive(
            total, begin, advance, record=self.record, checkpoint=self.checkpoint,
            progress=self.progress, finished=finished,
        )[0]  # fmt: skip


# ------------------------------------------------------------------------- kernels on tall sketches


def _zeros(how: Any, rows: int) -> PyTree:
    """Zero vectors, stacked."""
    return _repeated(probes_.zeros(how.operator, stacked=True), rows=rows)


@functools.partial(jax.jit, static_argnames="rows")
def _repeated(vectors: PyTree, *, rows: int) -> PyTree:
    # Of the ways tried this alone keeps the sharding under Explicit and Auto meshes.
    return jax.tree.map(lambda x: jnp.broadcast_to(x * 0, (rows, *x.shape[1:])), vectors)


def _into_row(basis: PyTree, index: jax.Array, y: PyTree, largest: jax.Array):
    """Put y into row `index`, orthonormal to the rows before; zero where it depends on them.

    Returns the basis, the coefficients of y in it (a column of R), and the largest norm of a y so
    far, of which a remainder below 64 eps is rounding.
    """
    before = jnp.arange(tree.num_points(basis), dtype=jnp.int32) < index
    first = jnp.where(before, tree.inner_products(basis, y), 0)
    w = tree.axpy(-1.0, tree.combine(basis, first), y)
    second = jnp.where(before, tree.inner_products(basis, w), 0)
    w = tree.axpy(-1.0, tree.combine(basis, second), w)
    rest = tree.norm(w)
    largest = jnp.maximum(largest, tree.norm(y))
    # A NaN is no dependence: it must stay to be seen.
    kept = ~(rest <= 64 * jnp.finfo(rest.dtype).eps * largest)
    q = tree.scale(jnp.where(kept, 1 / jnp.where(kept, rest, 1), 0), w)
    basis = jax.tree.map(
        lambda rows, x: lax.dynamic_update_index_in_dim(rows, x.astype(rows.dtype), index, 0),
        basis,
        q,
    )
    return basis, (first + second).at[index].set(jnp.where(kept, rest, 0)), largest


@functools.partial(jax.jit, donate_argnums=0)
def _orthonormalize(
    basis: PyTree, start: jax.Array, vectors: PyTree | None, largest: jax.Array
) -> tuple[PyTree, jax.Array, jax.Array]:
    """Put vectors, or without any the rows themselves, into the basis from row `start` on.

    Returns the basis, the columns of R as rows, and the largest norm.
    """
    count = tree.num_points(basis if vectors is None else vectors)

    def body(i, carry):
        basis, columns, largest = carry
        i = i.astype(jnp.int32)
        y = probes_.row(basis, start + i) if vectors is None else probes_.row(vectors, i)
        basis, column, largest = _into_row(basis, start + i, y, largest)
        return basis, columns.at[i].set(column), largest

    columns = jnp.zeros((count, tree.num_points(basis)), largest.dtype)
    return lax.fori_loop(0, count, body, (basis, columns, largest))


@jax.jit
def _pick(vectors: PyTree, indices: jax.Array) -> PyTree:
    """Some rows, stacked."""
    chosen = [probes_.row(vectors, indices[i]) for i in range(len(indices))]
    return jax.tree.map(lambda *x: jnp.stack(x), *chosen)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: PyTree, start: jax.Array, block: PyTree) -> PyTree:
    """A block of rows in its place."""
    return jax.tree.map(
        lambda x, y: lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), start, 0), stack, block
    )


_dots = jax.jit(jax.vmap(tree.vdot))
_combine = jax.jit(tree.combine)


@functools.partial(jax.jit, donate_argnums=1)
def _off(basis: PyTree, vectors: PyTree) -> PyTree:
    """Stacked vectors on the orthogonal complement of a basis."""

    def one(v):
        return tree.axpy(-1.0, tree.combine(basis, tree.inner_products(basis, v)), v)

    return jax.vmap(one)(vectors)


@jax.jit
def _inner_rows(basis: PyTree, vectors: PyTree) -> jax.Array:
    return lax.map(lambda v: tree.inner_products(basis, v), vectors)


def _coefficients(basis: PyTree, vectors: PyTree) -> np.ndarray:
    """Inner products with stacked vectors, a column for each."""
    return np.asarray(_inner_rows(basis, vectors)).T


# -------------------------------------------------------------------------------------- the sketch


class _Sketch(NamedTuple):
    """What a checkpoint of a sketched estimate holds; the small arrays are NumPy's."""

    basis: PyTree  # orthonormal rows, zero where a probe added nothing
    images: PyTree | None  # their products, where all are needed
    largest: jax.Array
    triangle: np.ndarray  # R: row i of Omega^T A is R[:, i]^T Q
    forms: np.ndarray  # omega_i^T A omega_i
    small: np.ndarray  # H = Q^T A Q, column by column
    samples: np.ndarray  # of the remainder


def _empty(how: Plan, rows: int, *, images: bool = False, samples: int = 0) -> _Sketch:
    dtype = how.operator.dtype
    return _Sketch(
        _zeros(how, rows),
        _zeros(how, rows) if images else None,
        jnp.zeros((), dtype),
        np.zeros((rows, rows), dtype),
        np.zeros(rows, dtype),
        np.zeros((rows, rows), dtype),
        np.zeros(samples, dtype),
    )


def _host(sketch: _Sketch) -> _Sketch:
    """The small arrays as NumPy's own, whatever a checkpointer made of them."""
    return sketch._replace(
        triangle=np.array(sketch.triangle), forms=np.array(sketch.forms),
        small=np.array(sketch.small), samples=np.array(sketch.samples),
    )  # fmt: skip


def _add_probes(how: Plan, sketch: _Sketch, done: int, rows: int) -> tuple[_Sketch, int]:
    """The products of the next probes, orthonormalised into the basis."""
    end = min(done + how.block_size, rows)
    probes = how.probes(done, end)
    images = how.products(probes)
    sketch = _host(sketch)
    sketch.forms[done:end] = _dots(probes, images)
    basis, columns, largest = _orthonormalize(sketch.basis, jnp.int32(done), images, sketch.largest)
    sketch.triangle[:, done:end] = np.asarray(columns).T
    probes_.check_products(sketch.triangle[:, done:end], how.record["algorithm"], how.operator)
    return sketch._replace(basis=basis, largest=largest), end


def _kept(sketch: _Sketch) -> np.ndarray:
    """The rows of the basis that are not zero."""
    return np.flatnonzero(np.diag(sketch.triangle) > 0)


def _add_images(how: Plan, sketch: _Sketch, start: int) -> tuple[_Sketch, int]:
    """The products of the next rows of the basis, from the `start`-th that is not zero."""
    chosen = _kept(sketch)[start : start + how.block_size]
    vectors = _pick(sketch.basis, jnp.asarray(chosen, jnp.int32))
    images = how.products(vectors)
    sketch = _host(sketch)
    sketch.small[:, chosen] = _coefficients(sketch.basis, images)
    probes_.check_products(sketch.small[:, chosen], how.record["algorithm"], how.operator)
    if sketch.images is not None:
        stack = sketch.images
        for place, i in enumerate(chosen):
            image = _pick(images, jnp.asarray([place], jnp.int32))
            stack = _put(stack, jnp.int32(i), image)
        sketch = sketch._replace(images=stack)
    return sketch, start + len(chosen)


class Found(NamedTuple):
    """What a method found: samples whose mean is the trace, the error of it, the products made."""

    samples: np.ndarray
    standard_error: float
    num_matvecs: int
    method: str


def trace_samples(how: Plan, method: str) -> Found:
    """The trace by one of the methods with a sketch.

    Raises:
        ValueError: For an operator that the method cannot take, or too few products.
    """
    n, budget = how.operator.size, how.num_matvecs
    if method == "xnystrace" and not how.operator.psd:
        raise ValueError(
            f"trace: method='xnystrace' needs a positive semidefinite operator, and "
            f"{how.operator.name} is not known to be one; use 'xtrace', or psd=True if you know."
        )
    if budget >= n:
        return _exact(how)
    least = {"hutch++": 4, "xtrace": 8, "xnystrace": 4}[method]
    if budget < least:
        raise ValueError(
            f"trace: num_matvecs is {budget}; expected at least {least} for method={method!r}."
        )
    return {"hutch++": _hutch_plus_plus, "xtrace": _xtrace, "xnystrace": _xnystrace}[method](how)


def _exact_entries(how: Plan) -> np.ndarray:
    """The diagonal, in the order of the leaves, by unit vectors: n products."""
    n = how.operator.size

    def advance(entries, done):
        end = min(done + how.block_size, n)
        vectors = probes_.unit_vectors(how.operator, done, end)
        entries = np.array(entries)
        entries[done:end] = _dots(vectors, how.products(vectors))
        probes_.check_products(entries, how.record["algorithm"], how.operator)
        return entries, end

    return np.asarray(how.run(n, lambda done: np.zeros(n, how.operator.dtype), advance))


def _exact(how: Plan) -> Found:
    entries = np.asarray(_exact_entries(how), np.float64)
    error = float(np.finfo(how.operator.dtype).eps * np.linalg.norm(entries))
    return Found(np.array([entries.sum()]), error, how.operator.size, "exact")


def _with_rounding(error: float, size: float, dtype: Any) -> float:
    return float(np.hypot(error, float(np.finfo(dtype).eps) * size))


# ----------------------------------------------------------------------------------------- Hutch++


def _hutch_plus_plus(how: Plan) -> Found:
    rows = how.num_matvecs // 3
    rest = how.num_matvecs - 2 * rows

    def advance(sketch, done):
        sketch = _host(sketch)
        if done < rows:
            return _add_probes(how, sketch, done, rows)
        rank = len(_kept(sketch))
        if done < rows + rank:
            sketch, used = _add_images(how, sketch, done - rows)
            return sketch, rows + used
        first = done - rows - rank
        end = min(first + how.block_size, rest)
        left = _off(sketch.basis, how.probes(rows + first, rows + end))
        sketch.samples[first:end] = _dots(left, how.products(left))
        probes_.check_products(sketch.samples, how.record["algorithm"], how.operator)
        return sketch, rows + rank + end

    sketch = how.run(
        how.num_matvecs,
        lambda done: _empty(how, rows, samples=rest),
        advance,
        lambda sketch, done: done >= rows and done >= rows + len(_kept(_host(sketch))) + rest,
    )
    sketch = _host(sketch)
    caught = np.asarray(np.diag(sketch.small), np.float64)
    samples = caught.sum() + np.asarray(sketch.samples, np.float64)
    error = float(samples.std(ddof=1) / np.sqrt(rest))
    error = _with_rounding(error, float(np.abs(caught).sum()), how.operator.dtype)
    return Found(samples, error, rows + len(_kept(sketch)) + rest, "hutch++")


# ------------------------------------------------------------------------------------------ XTrace


def _sketched(how: Plan, rows: int, *, images: bool = False) -> _Sketch:
    """The basis of the products of `rows` probes, and its own products."""

    def advance(sketch, done):
        if done < rows:
            return _add_probes(how, sketch, done, rows)
        sketch, used = _add_images(how, sketch, done - rows)
        return sketch, rows + used

    return _host(
        how.run(
            2 * rows,
            lambda done: _empty(how, rows, images=images),
            advance,
            lambda sketch, done: done >= rows and done >= rows + len(_kept(_host(sketch))),
        )
    )


def _xtrace(how: Plan) -> Found:
    n, rows = how.operator.size, how.num_matvecs // 2
    sketch = _sketched(how, rows)
    triangle, small, forms = (
        np.asarray(x, np.float64) for x in (sketch.triangle, sketch.small, sketch.forms)
    )
    small = (small + small.T) / 2
    probes = np.empty((rows, rows))  # Q^T Omega
    for first, end in probes_.blocks(0, rows, how.block_size):
        probes[:, first:end] = _coefficients(sketch.basis, how.probes(first, end))
    kept = _kept(sketch)
    rounding = float(np.abs(np.diag(small)).sum())
    if len(kept) < rows:
        # These probes had no part in the basis, so they are free to test what it left out.
        free = np.setdiff1d(np.arange(rows), kept)
        w, r = probes[:, free], triangle[:, free]
        remainder = forms[free] - 2 * np.sum(w * r, 0) + np.sum(w * (small @ w), 0)
        error = float(np.sqrt(np.sum(remainder**2)) / len(free))
        samples = np.trace(small) + remainder
        error = _with_rounding(error, rounding, how.operator.dtype)
        return Found(samples, error, rows + len(kept), "xtrace")
    samples, pairs = xtrace_estimates(n, triangle, small, probes, forms)
    error = _with_rounding(jackknife(pairs), rounding, how.operator.dtype)
    return Found(samples, error, 2 * rows, "xtrace")


# --------------------------------------------------------------------------------------- XNysTrace


@functools.partial(jax.jit, donate_argnums=0)
def _shifted(images: PyTree, probes: PyTree, shift: jax.Array) -> PyTree:
    return jax.tree.map(lambda y, v: y + shift.astype(y.dtype) * v.astype(y.dtype), images, probes)


def _xnystrace(how: Plan) -> Found:
    from scipy import linalg

    n, rows, dtype = how.operator.size, how.num_matvecs, how.operator.dtype

    def advance(images, done):
        end = min(done + how.block_size, rows)
        block = how.products(how.probes(done, end))
        probes_.check_products(np.asarray(_dots(block, block)), "trace, xnystrace", how.operator)
        return _put(images, jnp.int32(done), block), end

    images = how.run(rows, lambda done: _zeros(how, rows), advance)
    probes = _zeros(how, rows)
    for first, end in probes_.blocks(0, rows, how.block_size):
        probes = _put(probes, jnp.int32(first), how.probes(first, end))
    gram, form = _coefficients(probes, probes), _coefficients(probes, images)
    gram, form = (np.asarray(x, np.float64) for x in (gram, form))
    gram, form = (gram + gram.T) / 2, (form + form.T) / 2
    norms = np.sqrt(np.asarray(_dots(images, images), np.float64))
    if not norms.any():
        return Found(np.zeros(rows), 0.0, rows, "xnystrace")
    eps = float(np.finfo(dtype).eps)
    # The shift keeps the small eigenvalues of Omega^T A Omega out of its rounding.
    shift = eps * float(np.linalg.norm(norms)) / np.sqrt(n)
    lowest = float(linalg.eigvalsh(form)[0])
    if lowest < -100 * eps * rows * n * float(norms.max()) / np.sqrt(n):
        raise ValueError(
            f"trace: {how.operator.name} is said to be positive semidefinite, but v^T A v is "
            f"{lowest:.3g} for a combination of probes; use method='xtrace'."
        )
    form = form + shift * gram
    while True:
        try:
            upper = linalg.cholesky(form)
            break
        except linalg.LinAlgError:
            shift, form = 10 * shift, form + 9 * shift * gram
    images = _shifted(images, probes, jnp.asarray(shift, dtype))
    del probes
    columns = _orthonormalize(images, jnp.int32(0), None, jnp.zeros((), dtype))[1]
    triangle = np.asarray(columns, np.float64).T
    samples, pairs, size = xnystrace_estimates(n, upper, triangle, gram)
    # What the shift hides of the small eigenvalues is rounding as well.
    error = float(np.hypot(_with_rounding(jackknife(pairs), size, dtype), shift * n))
    return Found(samples - shift * n, error, rows, "xnystrace")


# ------------------------------------------------------------------------------------------- XDiag


@jax.jit
def _row_products(basis: PyTree, images: PyTree) -> PyTree:
    """The diagonal of Q Q^T A."""
    return jax.tree.map(lambda q, z: jnp.sum(q * z, axis=0), basis, images)


_times = jax.jit(lambda x, y: jax.tree.map(jnp.multiply, x, y))


@jax.jit
def _without(stacks, weights, total, index, state):
    """Welford's update of mean and squared deviations with the estimate without probe `index`."""
    u, z, omega, uz, vu = stacks
    own_u, own_z = probes_.row(u, index), probes_.row(z, index)
    sums = [tree.combine(x, w) for x, w in zip((uz, u, z, vu, omega), weights, strict=True)]
    count = index + 1

    def one(a, b, s_uz, s_u, s_z, s_vu, s_v, mean, deviations):
        value = s_vu - s_uz - total.astype(a.dtype) * a * b + b * s_u + a * s_z - a * s_v
        gap = value - mean
        mean = mean + gap / count.astype(a.dtype)
        return mean, deviations + gap * (value - mean)

    pairs = jax.tree.map(one, own_u, own_z, *sums, *state)
    return jax.tree.transpose(jax.tree.structure(own_u), jax.tree.structure((0, 0)), pairs)


def xdiag(how: Plan) -> tuple[PyTree, PyTree, int, str]:
    """The diagonal by XDiag: estimate, standard errors, products, method."""
    operator, n, budget = how.operator, how.operator.size, how.num_matvecs
    if budget >= n:
        return _exact_diagonal(how)
    if budget < 8:
        raise ValueError(f"diagonal: num_matvecs is {budget}; expected at least 8 for 'xdiag'.")
    rows = budget // 2
    sketch = _sketched(how, rows, images=True)
    kept = _kept(sketch)
    whole = _row_products(sketch.basis, sketch.images)
    used = rows + len(kept)
    if len(kept) < rows:
        # The basis spans the whole range: nothing is left but rounding.
        rounding = float(np.finfo(operator.dtype).eps) * float(np.abs(sketch.small).max())
        return whole, jax.tree.map(lambda x: jnp.full_like(x, rounding), whole), used, "xdiag"
    s, lengths = leave_one_out(np.asarray(sketch.triangle, np.float64))

    def scalars(x):
        return jnp.asarray(x, operator.dtype)

    # Without probe i the sketch loses u_i = Q s_i, whose product is z_i; without j as well, the
    # span of both.
    u, z = _combine(sketch.basis, scalars(s.T)), _combine(sketch.images, scalars(s.T))
    del sketch
    omega = _zeros(how, rows)
    for first, end in probes_.blocks(0, rows, how.block_size):
        omega = _put(omega, jnp.int32(first), how.probes(first, end))
    stacks = (u, z, omega, _times(u, z), _times(omega, u))
    ones = np.full(rows, 1 / rows)
    found = tree.axpy(-1.0, _combine(stacks[3], scalars(ones)), whole)
    found = tree.axpy(1.0, _combine(stacks[4], scalars(lengths * ones)), found)
    cosine = s.T @ s
    np.fill_diagonal(cosine, 0.0)
    share = 1 / (1 - cosine**2)
    np.fill_diagonal(share, 0.0)
    share /= rows - 1
    zero = jax.tree.map(jnp.zeros_like, whole)
    state = (zero, zero)
    for j in range(rows):
        a = share[:, j]
        c = a * cosine[:, j]
        weights = tuple(scalars(x) for x in (a, c, c, a * lengths, c * lengths))
        state = _without(stacks, weights, scalars(a.sum()), jnp.int32(j), state)
    return found, jax.tree.map(jnp.sqrt, state[1]), used, "xdiag"


def _exact_diagonal(how: Plan) -> tuple[PyTree, PyTree, int, str]:
    """The diagonal by unit vectors: n products."""
    samples = _exact_entries(how)
    leaves, treedef = jax.tree.flatten(how.operator.like)
    out, offset = [], 0
    for leaf in leaves:
        count = int(np.prod(jnp.shape(leaf)))
        values = jnp.asarray(samples[offset : offset + count].reshape(jnp.shape(leaf)))
        out.append(probes_.placed(values, leaf))
        offset += count
    found = jax.tree.unflatten(treedef, out)
    return found, jax.tree.map(jnp.zeros_like, found), how.operator.size, "exact"
