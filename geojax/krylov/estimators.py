"""Traces, diagonals and norms of operators from random probes, each with its standard error.

The trace is here; what gives a number for each parameter, and the norms, in `norms`; the methods
that sketch the range in `sketches`.
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import fit as fit_
from geojax import tree
from geojax.krylov import probes as probes_
from geojax.krylov import sketches
from geojax.krylov.norms import (
    VectorEstimate,
    diagonal,
    effective_rank,
    frobenius_norm,
    row_norms,
)
from geojax.krylov.operators import Operator
from geojax.krylov.probes import Distribution, Estimate, check_operator

__all__ = [
    "Estimate",
    "TraceEstimate",
    "VectorEstimate",
    "diagonal",
    "effective_rank",
    "frobenius_norm",
    "row_norms",
    "trace",
]

PyTree = Any
Method = Literal["hutchinson", "hutch++", "xtrace", "xnystrace"]

# How this differs from the usual code (PyHessian, curvlinops, matfree):
# - PyHessian stops when the running mean changes little, which happens by chance: a mean of k
#   samples moves by 1/k of their spread whether it is right or not. Here a run stops on the
#   half width of a confidence interval, whose standard deviation is itself taken at its upper
#   confidence bound, at few looks;
# - nothing has to divide anything, and probes are made, used and dropped block by block;
# - one set of probes gives the trace of every diagonal block.
_PILOT = 24
_GROWTH = 1.25


class TraceEstimate(NamedTuple):
    """The trace of an operator with its error.

    Attributes:
        estimate: The trace.
        standard_error: Its standard error, rounding included; NaN where one sample gives none.
        interval: `(lower, upper)`. Where the run stopped by itself, its half width is that of the
            stopping rule, a little more than Student's.
        samples: `(num_samples,)`, float64: their mean is the estimate.
        num_matvecs: Products with the operator.
        confidence: The probability that `interval` was made for.
        method: Which estimator; 'exact' where there were products enough for unit vectors.
        converged: Whether the tolerance was met; True where none was asked for.
        groups: From the name of a group of leaves to the `Estimate` of the trace of its diagonal
            block, from the same probes.
    """

    estimate: float
    standard_error: float
    interval: tuple[float, float]
    samples: np.ndarray
    num_matvecs: int
    confidence: float
    method: str
    converged: bool
    groups: dict[str, Estimate]

    def __repr__(self) -> str:
        missed = "" if self.converged else ", tolerance not met"
        return (
            f"TraceEstimate({self.estimate:.6g} ± {self.standard_error:.2g}, {self.method}, "
            f"{self.num_matvecs} products{missed})"
        )

    __str__ = __repr__

    def table(self) -> list[dict[str, Any]]:
        """One row for each group, as `report.text_table` takes them."""
        return [
            {"group": name, "trace": found.estimate, "standard error": found.standard_error}
            for name, found in self.groups.items()
        ]


def trace(
    operator: Operator,
    *,
    key: jax.Array,
    method: Method = "hutchinson",
    num_matvecs: int = 100,
    rtol: float | None = None,
    atol: float | None = None,
    confidence: float = 0.95,
    per_leaf: bool = False,
    groups: Callable[[str], str | None] | None = None,
    distribution: Distribution | None = None,
    block_size: int = 1,
    checkpoint: fit_.Checkpointer | None = None,
    progress: bool | None = None,
) -> TraceEstimate:
    r"""The trace of an operator.

    'hutchinson' is the mean of :math:`v^\top A v` over probes with independent entries of variance
    one: O(n) memory, error like :math:`1/\sqrt{m}`. The others catch the large eigenvalues in a
    sketch first: 'hutch++' and 'xtrace' for any symmetric operator, 'xnystrace' for a positive
    semidefinite one; the faster the spectrum decays, the better.

    Args:
        operator: A. A stochastic operator is taken by 'hutchinson' alone, one that is not symmetric
            by 'hutchinson' and 'hutch++'.
        key: A typed key; probe i draws from `fold_in(key, i)`.
        method: 'hutchinson'; 'hutch++', a third of the products for the sketch, a third for the
            trace on it, the rest for the remainder; 'xtrace', half for the sketch, each probe being
            the remainder's probe for the sketch of the others; 'xnystrace', all for the sketch.
        num_matvecs: The number of products; all are used, but for an odd one of 'xtrace'. With a
            tolerance, the most that may be used. The methods with a sketch become exact from
            num_matvecs = n on, by unit vectors.
        rtol: With 'hutchinson': stop once the half width of the interval is at most `rtol` times
            the estimate.
        atol: The same in absolute terms; with both, either suffices.
        confidence: The probability of the interval, and of meeting the tolerance.
        per_leaf: Whether to give the trace of each leaf's diagonal block as well ('hutchinson').
        groups: From a leaf's path, as `tree.paths` prints it, to the name of its group, or None to
            leave it out: traces of the diagonal blocks of groups ('hutchinson').
        distribution: Of the probes: 'rademacher' (the default; 'sphere' for the two x-methods,
            whose remainder needs it), 'normal' or 'sphere'.
        block_size: How many probes are multiplied at once by `operator.matmat`.
        checkpoint: A `geojax.checkpoint.Checkpointer`: saved every `checkpoint.every` products; a
            run that finds one there goes on from it, to the same bits.
        progress: True or False for a bar; by default one appears on runs that take long.

    Returns:
        A `TraceEstimate`. Memory in vectors, the product's own not counted: 2 `block_size` for
        'hutchinson', and besides num_matvecs / 3 for 'hutch++', num_matvecs / 2 for 'xtrace' and
        2 num_matvecs for 'xnystrace'.

    Raises:
        ValueError: For an operator that the method cannot take, and arguments out of range.
        FloatingPointError: If a product is not finite.

    Warns:
        UserWarning: If the tolerance was not met within `num_matvecs`.

    Example:
        >>> from geojax.krylov import from_matrix
        >>> a = from_matrix(np.diag([1.0, 2.0, 3.0]).astype(np.float32), psd=True)
        >>> round(trace(a, key=jax.random.key(0), num_matvecs=10).estimate, 4)
        6.0

    Reference:
        Hutchinson, A stochastic estimator of the trace of the influence matrix, 1989; Meyer et al.,
        Hutch++: Optimal Stochastic Trace Estimation, 2021, algorithm 1; Epperly, Tropp and Webber,
        XTrace: Making the Most of Every Sample in Stochastic Trace Estimation, 2024 (XTrace and
        XNysTrace, with their rescaled probes); Efron and Stein, The jackknife estimate of variance,
        1981, for the errors of these two.
    """
    if method not in ("hutchinson", "hutch++", "xtrace", "xnystrace"):
        raise ValueError(
            f"method is {method!r}; expected 'hutchinson', 'hutch++', 'xtrace' or 'xnystrace'."
        )
    plain = method == "hutchinson"
    check_operator(
        f"trace (method={method!r})", operator, key, num_matvecs, block_size, stochastic=plain,
        symmetric=method in ("xtrace", "xnystrace"),
    )  # fmt: skip
    probes_.check_confidence(confidence)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}; expected a positive number, or None.")
    if not plain and (rtol is not None or atol is not None or per_leaf or groups is not None):
        raise ValueError(
            f"trace: rtol, atol, per_leaf and groups need method='hutchinson'; {method!r} is one "
            "estimate of the whole trace from a fixed number of products."
        )
    if distribution is None:
        distribution = "rademacher" if method in ("hutchinson", "hutch++") else "sphere"
    elif distribution not in ("rademacher", "normal", "sphere"):
        raise ValueError(
            f"distribution is {distribution!r}; expected 'rademacher', 'normal' or 'sphere'."
        )
    elif method in ("xtrace", "xnystrace") and distribution != "sphere":
        raise ValueError(
            f"distribution is {distribution!r}; {method!r} expects 'sphere': it rescales what is "
            "left of each probe, which is uniform on a sphere for no other."
        )
    names = _group_names(operator, per_leaf, groups)
    record = {
        "algorithm": f"trace, {method}",
        "key": jax.random.key_data(key).tolist(),
        "num_matvecs": num_matvecs,
        "tolerance": [rtol, atol, confidence],
        "distribution": distribution,
        "block_size": block_size,
    }
    how = sketches.Plan(operator, key, num_matvecs, distribution, block_size, record, checkpoint,
                        progress)  # fmt: skip
    if plain:
        return _hutchinson(how, rtol, atol, confidence, names)
    samples, error, used, name = sketches.trace_samples(how, method)
    mean = float(samples.mean())
    if name == "exact":
        half = 2 * error
    else:
        half = float(probes_.t_quantile(confidence, max(len(samples) - 1, 1))) * error
    return TraceEstimate(
        mean, error, (mean - half, mean + half), samples, used, confidence, name, True, {}
    )


def _group_names(operator: Operator, per_leaf: bool, groups: Any) -> list[str | None] | None:
    """The group of each leaf, or None where no groups are asked for."""
    if per_leaf and groups is not None:
        raise ValueError("trace: per_leaf and groups were both given; expected one of them.")
    paths = tree.paths(operator.like)
    if per_leaf:
        return list(paths)
    if groups is None:
        return None
    names = [groups(path) for path in paths]
    if all(name is None for name in names):
        raise ValueError(f"groups: no leaf is in a group; the paths are {', '.join(paths)}.")
    return names


# ----------------------------------------------------------------------------------- Hutchinson


@jax.jit
def _leaf_products(vectors: PyTree, images: PyTree) -> jax.Array:
    """The inner products of stacked pairs of vectors, leaf by leaf, `(leaves, b)`."""
    leaves = [jax.tree.leaves(x) for x in (vectors, images)]
    dtype = tree.accumulation_dtype(*leaves[0], *leaves[1])
    return jnp.stack(
        [
            jnp.sum(a.astype(dtype) * b.astype(dtype), axis=tuple(range(1, a.ndim)))
            for a, b in zip(*leaves, strict=True)
        ]
    )


class _Look(NamedTuple):
    half: float
    met: bool


def _half_width(samples: np.ndarray, confidence: float) -> float:
    """Half of an interval with the standard deviation at its own upper 95 % bound."""
    return _half_of(len(samples), float(samples.std(ddof=1)), confidence)


def _half_of(count: int, deviation: float, confidence: float) -> float:
    from scipy import special

    # The chance that the deviation is above this bound is 5 % for normal samples. Skewed samples,
    # whose low means come with low deviations, need the margin most.
    bound = deviation * np.sqrt((count - 1) / special.chdtri(count - 1, 0.95))
    return float(probes_.t_quantile(confidence, count - 1)) * bound / np.sqrt(count)


def _target(mean: float, rtol: float | None, atol: float | None) -> float:
    return max((rtol or 0.0) * abs(mean), atol or 0.0)


def _next_look(samples: np.ndarray, target: float, confidence: float) -> int:
    """How many samples are needed if these tell their spread."""
    deviation = float(samples.std(ddof=1))
    low = high = len(samples)
    while _half_of(high, deviation, confidence) > target and high < 2**40:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _half_of(middle, deviation, confidence) > target:
            low = middle
        else:
            high = middle
    return max(high, int(np.ceil(_GROWTH * len(samples))))


def _hutchinson(how, rtol, atol, confidence, names) -> TraceEstimate:
    operator, size = how.operator, how.block_size
    adaptive = rtol is not None or atol is not None
    rows = len(jax.tree.leaves(operator.like))

    def advance(samples, done):
        end = min(done + size, how.num_matvecs)
        probes = probes_.probes(operator, how.key, done, end, how.distribution)
        new = np.asarray(_leaf_products(probes, probes_.products(operator, probes)))
        probes_.check_products(new, "trace", operator)
        return np.concatenate([np.asarray(samples), new], axis=1), end

    looks = {}

    def look(samples) -> tuple[int, bool]:
        """The first look that has not been taken, or the one that ended the run."""
        totals = np.asarray(samples, np.float64).sum(0)
        at = min(-(-_PILOT // size) * size, how.num_matvecs)
        while at <= len(totals):
            if at not in looks:
                seen = totals[:at]
                target = _target(seen.mean(), rtol, atol)
                met = len(seen) > 1 and _half_width(seen, confidence) <= target
                following = at
                if not met and at < how.num_matvecs:
                    following = _next_look(seen, target, confidence)
                looks[at] = met, min(-(-following // size) * size, how.num_matvecs)
            met, following = looks[at]
            if met or at == how.num_matvecs:
                return at, True
            at = following
        return at, False

    def finished(samples, done):
        return look(samples)[1] if adaptive else done >= how.num_matvecs

    samples, done = probes_.drive(
        how.num_matvecs,
        lambda done: np.zeros((rows, done), operator.dtype),
        advance,
        record=how.record,
        checkpoint=how.checkpoint,
        progress=how.progress,
        finished=finished,
    )
    leaves = np.asarray(samples, np.float64)
    found = probes_.mean_estimate(leaves.sum(0), confidence, done, operator.dtype)
    interval, converged = found.interval, True
    if adaptive:
        converged = looks[done][0]
        half = _half_width(found.samples, confidence) if done > 1 else np.inf
        interval = (found.estimate - half, found.estimate + half)
        if not converged:
            warnings.warn(
                f"trace: the interval of {operator.name} is {found.estimate:.6g} ± {half:.2g} "
                f"after {done} products, and ± {_target(found.estimate, rtol, atol):.2g} was "
                "asked for. Raise num_matvecs or the tolerance, or try method='xtrace'.",
                stacklevel=3,
            )
    by_group = {}
    for name in dict.fromkeys(n for n in names or [] if n is not None):
        mine = [i for i, other in enumerate(names) if other == name]
        by_group[name] = probes_.mean_estimate(
            leaves[mine].sum(0), confidence, done, operator.dtype
        )
    return TraceEstimate(
        found.estimate, found.standard_error, interval, found.samples, done, confidence,
        "hutchinson", converged, by_group,
    )  # fmt: skip
