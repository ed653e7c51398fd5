"""Top eigenpairs of a positive semidefinite operator in one or two passes over the data.

A randomised Nystrom approximation, with an error estimate from probes that ride along in the last
pass, and the probability with which it holds.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import progress as progress_
from geojax import tree
from geojax.krylov import _dense
from geojax.krylov.operators import Operator
from geojax.krylov.results import Eigenpairs

__all__ = ["Nystrom", "nystrom"]

PyTree = Any


class Nystrom(NamedTuple):
    r"""A low-rank approximation of an operator, and how far from it the operator is.

    Attributes:
        pairs: `Eigenpairs`, the k largest. Without verification its `residuals` are `error_bound`,
            which bounds each of them, and its `intervals` reach that far: both hold with
            probability `1 - failure_probability`.
        error: An estimate of :math:`\|A - \hat A\|_F`, where :math:`\hat A` has `rank` eigenpairs,
            of which the first k are returned.
        error_bound: A bound on :math:`\|A - \hat A\|_F` that holds with probability
            `1 - failure_probability` over the probes.
        failure_probability: As asked for.
        norm: An estimate of :math:`\|A\|_F`, from the same probes.
        rank: k plus the oversampling.
        num_passes: Products with a block, each of which shares one pass over the data.
    """

    pairs: Eigenpairs
    error: float
    error_bound: float
    failure_probability: float
    norm: float
    rank: int
    num_passes: int


def nystrom(
    operator: Operator,
    k: int,
    *,
    key: jax.Array,
    oversampling: int = 10,
    passes: int = 2,
    num_probes: int = 10,
    tol: float = 1e-2,
    failure_probability: float = 1e-2,
    verify: bool = False,
    force: bool = False,
    progress: bool | None = None,
) -> Nystrom:
    r"""The k largest eigenpairs of a positive semidefinite A, in a given number of data passes.

    .. math:: \hat A = (A \Omega) (\Omega^T A \Omega)^+ (A \Omega)^T

    with :math:`\Omega` k + `oversampling` random orthonormal vectors, to which all passes but the
    last apply A (subspace iteration). It is never above A, so no value is too large. A shift of the
    size of rounding keeps the inner matrix positive (Tropp et al. 2017, algorithm 3). Rows are made
    orthonormal in stages, so that float32 resolves directions down to its own precision and not to
    its square root; the small matrices are float64 on the host.

    The error is estimated by q = `num_probes` Gaussian probes in the last pass:
    :math:`\hat e^2 = \frac1q \sum_i \|(A - \hat A) \omega_i\|^2` is unbiased for the squared
    Frobenius norm :math:`e^2`, and

    .. math:: P(\hat e^2 \le (1 - \epsilon) e^2) \le (e^\epsilon (1 - \epsilon))^{q / 2}, \quad
              P(\hat e^2 \ge (1 + \epsilon) e^2) \le ((1 + \epsilon) e^{-\epsilon})^{q / 2},

    of which the first gives `error_bound`.

    Args:
        operator: A, symmetric and the same at each product; it must say that it is `psd`.
        k: How many pairs.
        key: A typed key.
        oversampling: Vectors beside the k.
        passes: Products with a block. Two are right for most spectra; one is enough where
            eigenvalues fall fast, more where they fall slowly.
        num_probes: q.
        tol: The relative residual at which a pair counts as converged.
        failure_probability: How often `error_bound` may be too small.
        verify: Measure each residual, by one pass more.
        force: Take an operator that is not known to be semidefinite. The approximation is then
            :math:`Q Q^T A Q Q^T` (Halko et al. 2011, algorithm 5.3), the pairs are those of largest
            magnitude, and at least two passes are needed.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        `Nystrom`. All products are blocks of k + `oversampling` + `num_probes` vectors. Memory: six
        such blocks.

    Raises:
        ValueError: For an operator that is not known to be semidefinite, or shows that it is not;
            for a stochastic or asymmetric one, or arguments out of range.
        FloatingPointError: If a product is NaN or infinite.

    Example:
        >>> from geojax import krylov
        >>> matrix = np.diag(0.5 ** np.arange(40.0, dtype=np.float32))
        >>> result = nystrom(krylov.from_matrix(matrix, psd=True), 2, key=jax.random.key(0))
        >>> np.round(result.pairs.eigenvalues, 4).tolist(), result.error_bound < 1e-3
        ([1.0, 0.5], True)

    Reference:
        Tropp, Yurtsever, Udell and Cevher, Fixed-rank approximation of a positive-semidefinite
        matrix from streaming data, 2017, algorithm 3; the same, Streaming low-rank matrix
        approximation with an application to scientific simulation, 2019, section 6 (the error);
        Halko, Martinsson and Tropp, Finding structure with randomness, 2011.
    """
    _check(operator, k, oversampling, passes, num_probes, tol, failure_probability, force)
    k, n = int(k), operator.size
    rank = min(k + oversampling, n)
    keys = jax.random.split(key, 4)
    run = _Passes(operator, passes + verify, progress)
    with run:
        # The probes make up the width of the first pass too, so one program is compiled for all.
        width = rank + num_probes if passes > 1 else rank
        block = _dense.random_rows(operator, keys[0], min(width, n))
        block, _, found = _dense.orthonormal(block)
        block = _dense.complete(block, found, operator, keys[3])
        for turn in range(passes - 1):
            block, found = _span(run.multiply(block))
            block = _dense.complete(block, found, operator, jax.random.fold_in(keys[1], turn))
        probes = _dense.random_rows(operator, keys[2], num_probes)
        block = _dense.take(block, range(rank))
        joined = _dense.mix((block, probes), np.eye(rank + num_probes))[0]
        products = run.multiply(joined)
        sketch = _dense.take(products, range(rank))
        images = _dense.take(products, range(rank, rank + num_probes))
        if force:
            vectors, values, floor = _rayleigh_ritz(block, sketch, run.epsilon)
        else:
            vectors, values, floor = _approximate(operator, block, sketch, run.epsilon, keys[3])
        weights = _dense.gram((probes,), (vectors,)) * values[None]
        errors = np.asarray(_dense.norms(_dense.remove(images, (vectors,), weights)), np.float64)
        lengths = np.asarray(_dense.norms(images), np.float64)
        error, norm = (float(np.sqrt(np.mean(np.square(x)))) for x in (errors, lengths))
        ratio = _least_ratio(num_probes, failure_probability)
        bound = max(error / math.sqrt(1 - ratio), floor)
        vectors, values = _dense.take(vectors, range(k)), values[:k]
        residuals = np.full(k, bound)
        low = bound if force else floor
        intervals = np.stack([values - low, values + bound], 1)
        if verify:
            _, sizes = _dense.defects(
                run.multiply(vectors), vectors, np.asarray(values, operator.dtype)
            )
            residuals = np.asarray(sizes, np.float64)
            intervals = None
    largest = float(np.abs(values).max())
    converged = _dense.accepted(values, residuals, largest, floor, tol, run.epsilon)
    missing = (
        "the residual is above tol: take another pass, or more oversampling"
        if verify
        else "the error bound is above tol: verify=True measures the residual itself"
    )
    pairs = _dense.pairs(
        values=values,
        vectors=vectors,
        residuals=residuals,
        converged=converged,
        reasons=["converged" if done else missing for done in converged],
        num_matvecs=run.num_matvecs,
        floor=floor,
        history=[(run.num_matvecs, values, residuals)],
        intervals=intervals,
        verified=verify,
    )
    return Nystrom(pairs, error, bound, failure_probability, norm, rank, run.num_passes)


class _Passes:
    """Block products, counted, checked and shown."""

    def __init__(self, operator: Operator, total: int, progress: bool | None):
        self.operator = operator
        self.total = total
        self.bar = progress_.bar(total, "nystrom", show=progress)
        self.epsilon = float(jnp.finfo(operator.dtype).eps)
        self.num_matvecs, self.num_passes = 0, 0

    def __enter__(self):
        self.update = self.bar.__enter__()
        return self

    def __exit__(self, *error):
        return self.bar.__exit__(*error)

    def multiply(self, block: PyTree) -> PyTree:
        num = tree.num_points(block)
        out = _dense.products(self.operator, block)
        self.num_matvecs += num
        self.num_passes += 1
        _dense.check_finite("nystrom", _dense.norms(out), self.operator, self.num_matvecs, num)
        self.update(self.num_passes)
        return out


def _span(block: PyTree) -> tuple[PyTree, int]:
    """An orthonormal basis of the rows, leading directions first, and how many there are.

    A Gram matrix shows directions down to the root of the precision alone, so what it shows is
    taken out of the rows, and the rest is looked at again.
    """
    num = tree.num_points(block)
    epsilon = float(np.finfo(_dense.row_dtype(block)).eps)
    size = float(np.asarray(_dense.norms(block)).max())
    (basis,) = _dense.mix((block,), np.zeros((num, num)))
    rest, rank = block, 0
    for _ in range(4):
        lengths = np.asarray(_dense.norms(rest), np.float64)
        live = lengths > 20 * epsilon * size
        if rank == num or not live.any():
            break
        (kept,) = _dense.mix((rest,), np.diag(live.astype(float)))
        more, _, found = _dense.orthonormal(kept, against=(basis,))
        found = min(found, num - rank)
        if found == 0:
            break
        weights = np.zeros((num, 2 * num))
        weights[np.arange(rank), np.arange(rank)] = 1
        weights[rank + np.arange(found), num + np.arange(found)] = 1
        (basis,) = _dense.mix((basis, more), weights)
        rank += found
        for _ in range(2):
            rest = _dense.remove(rest, (basis,), _dense.gram((rest,), (basis,)))
    if rank == 0:
        return basis, 0
    # By falling singular value, so that the first rows are the ones to keep.
    _, _, right = np.linalg.svd(_dense.gram((block,), (basis,))[:, :rank] / size)
    turn = np.zeros((num, num))
    turn[:rank, :rank] = right
    return _dense.mix((basis,), turn)[0], rank


def _approximate(operator, block, sketch, epsilon, key):
    """The eigenpairs of the Nystrom approximation, largest first."""
    num = tree.num_points(block)
    inner = _dense.gram((block,), (sketch,))
    size = float(np.asarray(_dense.norms(sketch), np.float64).max())
    noise = max(float(np.abs(inner - inner.T).max()), 4 * epsilon * size)
    inner = (inner + inner.T) / 2
    least = float(np.linalg.eigvalsh(inner)[0])
    if least < -10 * math.sqrt(num) * noise:
        raise ValueError(
            f"nystrom: {operator.name} is not positive semidefinite: a Rayleigh quotient is "
            f"{least:.3g}. Use `eigsh` or `lobpcg`, or force=True."
        )
    if size == 0:
        return block, np.zeros(num), 0.0
    shift = max(math.sqrt(num) * noise, -2 * least)
    (shifted,) = _dense.mix((sketch, block), np.hstack([np.eye(num), shift * np.eye(num)]))
    factor = np.linalg.cholesky(inner + shift * np.eye(num))
    basis, found = _span(shifted)
    basis = _dense.complete(basis, found, operator, key)
    small = np.linalg.solve(factor, _dense.gram((shifted,), (basis,)))
    _, singular, right = np.linalg.svd(small)
    values = np.maximum(singular**2 - shift, 0.0)
    return _dense.mix((basis,), right)[0], values, shift


def _rayleigh_ritz(block, sketch, epsilon):
    """The eigenpairs of A compressed to the block, largest magnitude first."""
    projected = _dense.gram((block,), (sketch,))
    size = float(np.asarray(_dense.norms(sketch), np.float64).max())
    floor = max(float(np.abs(projected - projected.T).max()), 4 * epsilon * size)
    values, vectors = np.linalg.eigh((projected + projected.T) / 2)
    order = np.argsort(-np.abs(values), kind="stable")
    return _dense.mix((block,), vectors[:, order].T)[0], values[order], floor


def _least_ratio(q: int, failure: float) -> float:
    """The epsilon in (0, 1) for which (e^epsilon (1 - epsilon))^(q / 2) is `failure`."""
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if q / 2 * (middle + math.log1p(-middle)) > math.log(failure):
            low = middle
        else:
            high = middle
    return high if high < 1 else low


def _check(operator, k, oversampling, passes, num_probes, tol, failure_probability, force):
    _dense.check_operator("nystrom", operator, k)
    _dense.check_tol("nystrom", tol)
    _dense.check_positive("nystrom", passes=passes, num_probes=num_probes)
    if not isinstance(oversampling, (int, np.integer)) or oversampling < 0:
        raise ValueError(
            f"nystrom: oversampling is {oversampling!r}; expected a nonnegative integer."
        )
    if not 0 < failure_probability < 1:
        raise ValueError(
            f"nystrom: failure_probability is {failure_probability}; expected a number between 0 "
            "and 1."
        )
    if not operator.psd and not force:
        raise ValueError(
            f"nystrom: {operator.name} is not known to be positive semidefinite; expected an "
            "operator that says `psd`, as a GGN or a Fisher matrix does. For others use `eigsh` or "
            "`lobpcg`, or force=True."
        )
    if force and passes < 2:
        raise ValueError(f"nystrom: force=True needs at least 2 passes, got passes={passes}.")
