"""Norms, effective rank, and numbers for each parameter: the diagonal and the norms of the rows."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import fit as fit_
from geojax import tree
from geojax.krylov import probes as probes_
from geojax.krylov import sketches
from geojax.krylov.operators import Operator
from geojax.krylov.probes import Distribution, Estimate, check_operator

__all__ = ["VectorEstimate", "diagonal", "effective_rank", "frobenius_norm", "row_norms"]

PyTree = Any


class VectorEstimate(NamedTuple):
    """A number for each parameter, with its error.

    Attributes:
        estimate: A pytree like the parameters.
        standard_error: A pytree of the standard errors, sampling only; zero where exact, NaN where
            one sample gives none.
        num_matvecs: Products with the operator.
        method: Which estimator.
    """

    estimate: PyTree
    standard_error: PyTree
    num_matvecs: int
    method: str


@jax.jit
def _norms_and_products(vectors: PyTree, images: PyTree) -> jax.Array:
    # Norms and not their squares, which may underflow.
    return jnp.stack([jax.vmap(tree.norm)(images), jax.vmap(tree.vdot)(vectors, images)])


def _norm_samples(
    what: str, operator, key, num_matvecs, distribution, block_size, checkpoint, progress
) -> np.ndarray:
    """|A v| and v^T A v for each probe, `(2, num_matvecs)`."""
    check_operator(what, operator, key, num_matvecs, block_size)
    if distribution not in ("rademacher", "normal", "sphere"):
        raise ValueError(
            f"distribution is {distribution!r}; expected 'rademacher', 'normal' or 'sphere'."
        )

    def advance(samples, done):
        end = min(done + block_size, num_matvecs)
        probes = probes_.probes(operator, key, done, end, distribution)
        new = np.asarray(_norms_and_products(probes, probes_.products(operator, probes)))
        probes_.check_products(new, what, operator)
        return np.concatenate([np.asarray(samples), new], axis=1), end

    record = {
        "algorithm": what,
        "key": jax.random.key_data(key).tolist(),
        "num_matvecs": num_matvecs,
        "distribution": distribution,
        "block_size": block_size,
    }
    samples, _ = probes_.drive(
        num_matvecs,
        lambda done: np.zeros((2, done), operator.dtype),
        advance,
        record=record,
        checkpoint=checkpoint,
        progress=progress,
    )
    return np.asarray(samples, np.float64)


def frobenius_norm(
    operator: Operator,
    *,
    key: jax.Array,
    num_matvecs: int = 100,
    confidence: float = 0.95,
    distribution: Distribution = "rademacher",
    block_size: int = 1,
    checkpoint: fit_.Checkpointer | None = None,
    progress: bool | None = None,
) -> Estimate:
    r"""The Frobenius norm, from :math:`\|A\|_F^2 = \mathbb{E}\,\|A v\|^2`.

    Args:
        operator: A, symmetric or not.
        key: A typed key.
        num_matvecs: The number of products.
        confidence: The probability of the interval.
        distribution: Of the probes.
        block_size: How many probes are multiplied at once.
        checkpoint: As in `trace`.
        progress: As in `trace`.

    Returns:
        An `Estimate` of the norm; its `samples` are the :math:`\|A v\|`, and its error is that of
        the mean square, by the derivative of the root. Memory: two vectors a probe of a block.

    Raises:
        ValueError: For a stochastic operator, and arguments out of range.

    Example:
        >>> from geojax.krylov import from_matrix
        >>> a = from_matrix(np.diag([3.0, 4.0]).astype(np.float32))
        >>> round(frobenius_norm(a, key=jax.random.key(0), num_matvecs=5).estimate, 4)
        5.0
    """
    probes_.check_confidence(confidence)
    norms = _norm_samples("frobenius_norm", operator, key, num_matvecs, distribution, block_size,
                          checkpoint, progress)[0]  # fmt: skip
    unit = float(norms.max()) or 1.0
    square = probes_.mean_estimate((norms / unit) ** 2, confidence, num_matvecs, operator.dtype)
    root = float(np.sqrt(square.estimate))
    error = square.standard_error / (2 * root) if root else 0.0 * square.standard_error
    half = (square.interval[1] - square.estimate) / (2 * root) if root else 0.0
    interval = (max(0.0, unit * (root - half)), unit * (root + half))
    return Estimate(unit * root, unit * error, interval, norms, num_matvecs, confidence)


def effective_rank(
    operator: Operator,
    *,
    key: jax.Array,
    num_matvecs: int = 100,
    confidence: float = 0.95,
    distribution: Distribution = "rademacher",
    block_size: int = 1,
    checkpoint: fit_.Checkpointer | None = None,
    progress: bool | None = None,
) -> Estimate:
    r"""The effective rank :math:`(\operatorname{tr} A)^2 / \|A\|_F^2`, both from the same products.

    For a projection it is the rank. Bias and standard error of the ratio are the jackknife's.

    Args:
        operator: A.
        key: A typed key.
        num_matvecs: The number of products, at least 3.
        confidence: The probability of the interval.
        distribution: Of the probes.
        block_size: How many probes are multiplied at once.
        checkpoint: As in `trace`.
        progress: As in `trace`.

    Returns:
        An `Estimate`; its `samples` are the jackknife's pseudo-values, whose mean is the estimate.

    Raises:
        ValueError: For a stochastic operator, one that is zero, and arguments out of range.

    Example:
        >>> from geojax.krylov import from_matrix
        >>> a = from_matrix(np.diag([1.0, 1.0, 0.0]).astype(np.float32))
        >>> round(effective_rank(a, key=jax.random.key(0), num_matvecs=5).estimate, 4)
        2.0

    Reference:
        Efron and Stein, The jackknife estimate of variance, 1981.
    """
    probes_.check_confidence(confidence)
    probes_.check_count("num_matvecs", num_matvecs, 3)
    norms, forms = _norm_samples("effective_rank", operator, key, num_matvecs, distribution,
                                 block_size, checkpoint, progress)  # fmt: skip
    unit = norms.max()
    if not unit > 0:
        raise ValueError(
            f"effective_rank: all products of {operator.name} are zero; the rank of a zero "
            "operator is not a ratio."
        )
    squares, forms = (norms / unit) ** 2, forms / unit
    count = len(forms)
    whole = forms.mean() ** 2 / squares.mean()
    without = ((forms.sum() - forms) / (count - 1)) ** 2 * (count - 1) / (squares.sum() - squares)
    return probes_.mean_estimate(
        count * whole - (count - 1) * without, confidence, num_matvecs, operator.dtype
    )


# --------------------------------------------------------------------- a number for each parameter


class _Moments(NamedTuple):
    """The running mean of stacked vectors, the sum of their squared deviations, and their unit."""

    mean: PyTree
    deviations: PyTree
    unit: jax.Array


@jax.jit
def _largest(images: PyTree) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(images) if x.size]
    largest = jnp.stack([jnp.max(jnp.abs(x)).astype(jnp.float32) for x in leaves]).max()
    return jnp.where(largest > 0, largest, 1)


def _add(moments: _Moments, count: Any, values: PyTree) -> _Moments:
    """The moments with b more vectors (Chan, Golub and LeVeque's update)."""

    def one(mean, deviations, x):
        b = x.shape[0]
        before = count.astype(x.dtype)
        middle = jnp.mean(x, axis=0)
        gap = middle - mean
        within = jnp.sum(jnp.square(x - middle[None]), axis=0)
        share = b / (before + b)
        return mean + gap * share, deviations + within + jnp.square(gap) * before * share

    pairs = jax.tree.map(one, moments.mean, moments.deviations, values)
    mean, deviations = jax.tree.transpose(
        jax.tree.structure(moments.mean), jax.tree.structure((0, 0)), pairs
    )
    return moments._replace(mean=mean, deviations=deviations)


@jax.jit
def _add_products(moments: _Moments, count: jax.Array, probes: PyTree, images: PyTree) -> _Moments:
    """The diagonal's samples: probes times images, in units that cannot underflow when squared."""
    return _add(moments, count, jax.tree.map(lambda v, w: v * (w / moments.unit.astype(w.dtype)),
                                             probes, images))  # fmt: skip


@jax.jit
def _add_squares(moments: _Moments, count: jax.Array, probes: PyTree, images: PyTree) -> _Moments:
    """The row norms' samples: squared images."""
    del probes
    squares = jax.tree.map(lambda w: jnp.square(w / moments.unit.astype(w.dtype)), images)
    return _add(moments, count, squares)


@jax.jit
def _spread(moments: _Moments, count: jax.Array) -> tuple[PyTree, PyTree]:
    def error(x):
        n = count.astype(x.dtype)
        return jnp.sqrt(x / (n * (n - 1)))  # NaN for one sample, 0 / 0

    return moments.mean, jax.tree.map(error, moments.deviations)


def _moments(
    what: str, add, operator, key, num_matvecs, block_size, checkpoint, progress
) -> tuple[_Moments, PyTree]:
    """The moments of a sample for each parameter, and the standard errors of their means."""
    record = {
        "algorithm": what,
        "key": jax.random.key_data(key).tolist(),
        "num_matvecs": num_matvecs,
        "block_size": block_size,
    }

    def begin(done):
        zero = probes_.zeros(operator)
        return _Moments(zero, zero, jnp.zeros((), jnp.float32))

    def advance(moments, done):
        end = min(done + block_size, num_matvecs)
        probes = probes_.probes(operator, key, done, end, "rademacher")
        images = probes_.products(operator, probes)
        if not done:
            moments = moments._replace(unit=_largest(images))
        probes_.check_products(np.asarray(_largest(images)), what, operator)
        images = jax.tree.map(lambda w, v: w.astype(v.dtype), images, probes)
        return add(moments, jnp.asarray(done, jnp.int32), probes, images), end

    moments, done = probes_.drive(
        num_matvecs, begin, advance, record=record, checkpoint=checkpoint, progress=progress
    )
    mean, error = _spread(moments, jnp.asarray(done, jnp.int32))
    return moments._replace(mean=mean), error


def diagonal(
    operator: Operator,
    *,
    key: jax.Array,
    num_matvecs: int = 100,
    method: Literal["bekas", "xdiag"] = "bekas",
    block_size: int = 1,
    checkpoint: fit_.Checkpointer | None = None,
    progress: bool | None = None,
) -> VectorEstimate:
    r"""The diagonal of an operator, with a standard error for each entry.

    'bekas' is the mean of :math:`v \odot A v` over Rademacher probes, the error of an entry being
    the norm of the rest of its row over :math:`\sqrt{m}`. 'xdiag' takes the diagonal of a sketch of
    the range exactly and estimates what is left, each probe serving the sketch of the others.

    Args:
        operator: A; symmetric for 'xdiag'.
        key: A typed key.
        num_matvecs: The number of products. From num_matvecs = n on 'xdiag' takes unit vectors and
            is exact.
        method: 'bekas' or 'xdiag'.
        block_size: How many probes are multiplied at once.
        checkpoint: As in `trace`.
        progress: As in `trace`.

    Returns:
        A `VectorEstimate`. Memory: four vectors and three a probe of a block for 'bekas';
        num_matvecs vectors for 'xdiag', and three times that when the errors are taken.

    Raises:
        ValueError: For an operator that is stochastic, or not symmetric with 'xdiag', and for
            arguments out of range.
        FloatingPointError: If a product is not finite.

    Example:
        >>> from geojax.krylov import from_matrix
        >>> a = from_matrix(np.diag([1.0, 2.0]).astype(np.float32))
        >>> diagonal(a, key=jax.random.key(0), num_matvecs=3).estimate.tolist()
        [1.0, 2.0]

    Reference:
        Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix, 2007; Epperly, Tropp
        and Webber, XTrace, 2024 (XDiag); Efron and Stein, 1981, for its errors.
    """
    if method not in ("bekas", "xdiag"):
        raise ValueError(f"method is {method!r}; expected 'bekas' or 'xdiag'.")
    what = f"diagonal (method={method!r})"
    check_operator(what, operator, key, num_matvecs, block_size, symmetric=method == "xdiag")
    if method == "xdiag":
        record = {
            "algorithm": "diagonal, xdiag",
            "key": jax.random.key_data(key).tolist(),
            "num_matvecs": num_matvecs,
            "block_size": block_size,
        }
        how = sketches.Plan(operator, key, num_matvecs, "rademacher", block_size, record,
                            checkpoint, progress)  # fmt: skip
        return VectorEstimate(*sketches.xdiag(how))
    moments, error = _moments("diagonal, bekas", _add_products, operator, key, num_matvecs,
                              block_size, checkpoint, progress)  # fmt: skip
    return VectorEstimate(
        tree.scale(moments.unit, moments.mean),
        tree.scale(moments.unit, error),
        num_matvecs,
        method,
    )


@jax.jit
def _roots(mean: PyTree, error: PyTree, unit: jax.Array) -> tuple[PyTree, PyTree]:
    root = jax.tree.map(jnp.sqrt, mean)

    def by_root(e, r):
        return jnp.where(r > 0, e / (2 * jnp.where(r > 0, r, 1)), 0 * e)

    return tree.scale(unit, root), tree.scale(unit, jax.tree.map(by_root, error, root))


def row_norms(
    operator: Operator,
    *,
    key: jax.Array,
    num_matvecs: int = 100,
    block_size: int = 1,
    checkpoint: fit_.Checkpointer | None = None,
    progress: bool | None = None,
) -> VectorEstimate:
    r"""The norm of each row of A, from :math:`\mathbb{E}\,(A v)_i^2`; one number a parameter.

    Args:
        operator: A, symmetric or not.
        key: A typed key.
        num_matvecs: The number of products.
        block_size: How many probes are multiplied at once.
        checkpoint: As in `trace`.
        progress: As in `trace`.

    Returns:
        A `VectorEstimate`. Memory: four vectors and three a probe of a block.

    Raises:
        ValueError: For a stochastic operator, and arguments out of range.
        FloatingPointError: If a product is not finite.

    Example:
        >>> from geojax.krylov import from_matrix
        >>> a = from_matrix(np.diag([1.0, 2.0]).astype(np.float32))
        >>> row_norms(a, key=jax.random.key(0), num_matvecs=3).estimate.tolist()
        [1.0, 2.0]
    """
    check_operator("row_norms", operator, key, num_matvecs, block_size)
    moments, error = _moments("row_norms", _add_squares, operator, key, num_matvecs, block_size,
                              checkpoint, progress)  # fmt: skip
    norms, errors = _roots(moments.mean, error, moments.unit)
    return VectorEstimate(norms, errors, num_matvecs, "squares")
