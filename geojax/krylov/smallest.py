"""The smallest eigenvalue: negative curvature proven, or how probable it is that there is none."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import progress as progress_
from geojax import tree
from geojax.krylov import _dense
from geojax.krylov.operators import Operator
from geojax.krylov.results import fix_signs, wanted

__all__ = ["SmallestEigenvalue", "smallest_eigenvalue"]

PyTree = Any
_LOOK_EVERY = 5


class SmallestEigenvalue(NamedTuple):
    r"""The smallest eigenvalue, with what is proven about it and what is probable.

    Attributes:
        eigenvalue: The Rayleigh quotient of `eigenvector`, float64.
        eigenvector: A pytree of unit norm; the entry of largest magnitude is positive.
        residual: :math:`\|A x - \lambda x\|`, measured with one more product.
        interval: `(2,)`: the eigenvalue give or take the residual and the noise floor; for certain
            an eigenvalue of A lies in it.
        upper_bound: No Rayleigh quotient lies below the smallest eigenvalue, so this one plus the
            noise of the products bounds it from above, for certain.
        lower_bound: A bound from below that holds with probability `1 - failure_probability` over
            the random starting vector. Products alone can prove no such bound.
        failure_probability: As asked for.
        negative: Whether `upper_bound` is below 0: negative curvature is proven.
        verdict: A sentence that says which.
        converged: Whether the residual is within the tolerance.
        reason: 'converged', or why not.
        num_matvecs: Products.
        noise_floor: The smallest residual that the arithmetic of the products allows.
        size: n.
        recurrence: `(2, m)`: diagonal and off-diagonal of the m by m tridiagonal matrix that
            `lower_bound` comes from; the last entry is the coupling to what was not looked at.
    """

    eigenvalue: float
    eigenvector: PyTree
    residual: float
    interval: np.ndarray
    upper_bound: float
    lower_bound: float
    failure_probability: float
    negative: bool
    verdict: str
    converged: bool
    reason: str
    num_matvecs: int
    noise_floor: float
    size: int
    recurrence: np.ndarray

    def probability_below(self, value: float) -> float:
        """A bound on the chance that such a start misses an eigenvalue below `value`, if A has one.

        It is 1 where the start was bound to see nothing, and speaks of the first, uninterrupted
        sweep alone.
        """
        return _miss_probability(_log_polynomial(self.recurrence, value), self.size)

    def __repr__(self) -> str:
        return (
            f"SmallestEigenvalue({self.eigenvalue:.6g} ± {self.residual:.1g}; {self.verdict}; "
            f"{self.num_matvecs} products, {self.reason})"
        )

    __str__ = __repr__


def _log_polynomial(recurrence: np.ndarray, t: float) -> float:
    """The log of |p_m(t)|, the Lanczos polynomial, for t below all Ritz values; else -inf."""
    total, ratio, coupling = 0.0, np.inf, 0.0
    for alpha, beta in recurrence.T:
        top = t - alpha - coupling / ratio
        # Below the Ritz values of every leading block the polynomials alternate in sign.
        if top >= 0:
            return -np.inf
        ratio, coupling = top / beta, beta
        total += math.log(-ratio)
    return total


def _miss_probability(log_polynomial: float, n: int) -> float:
    """P(|gamma| <= 1 / |p_m(t)|) for a component gamma of a random unit vector."""
    from scipy.special import betainc

    if n == 1 or log_polynomial <= 0:
        return 0.0 if n == 1 and log_polynomial > 0 else 1.0
    return float(betainc(0.5, (n - 1) / 2, math.exp(-2 * log_polynomial)))


def _probable_bound(recurrence: np.ndarray, theta: float, spread: float, n: int, failure: float):
    """The largest t whose chance of a missed eigenvalue below it is at most `failure`."""
    step = max(spread, abs(theta), np.finfo(float).tiny)
    low = theta - step
    while _miss_probability(_log_polynomial(recurrence, low), n) > failure:
        step *= 2
        low = theta - step
        if not np.isfinite(low):
            return -np.inf
    high = theta
    for _ in range(100):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if _miss_probability(_log_polynomial(recurrence, middle), n) <= failure:
            low = middle
        else:
            high = middle
    return low


def smallest_eigenvalue(
    operator: Operator,
    *,
    key: jax.Array,
    tol: float = 1e-2,
    epsilon: float | None = None,
    basis_size: int = 60,
    failure_probability: float = 1e-3,
    max_matvecs: int | None = None,
    progress: bool | None = None,
) -> SmallestEigenvalue:
    r"""The smallest eigenvalue and whether it is negative: a test for saddle points.

    Lanczos from a Gaussian vector, with thick restart when the basis is full. What is found is of
    two kinds. A negative Rayleigh quotient *proves* negative curvature, whatever the residual. That
    there is none can only be said with a probability over the starting vector: the Lanczos vector
    :math:`p_m(A) v` has norm 1, so an eigenvector with eigenvalue :math:`t` has a component in v of
    at most :math:`1 / |p_m(t)|`, and the component of a random unit vector has a known
    distribution. Solving for t gives `lower_bound`. This uses the computed coefficients, as van
    Dorsselaer et al. do, and is sharper than the bound of Kuczynski and Wozniakowski, which holds
    for every matrix: missing :math:`\lambda_{min}` by :math:`\varepsilon (\lambda_{max} -
    \lambda_{min})` has a probability of at most :math:`1.648 \sqrt n \, e^{-\sqrt\varepsilon
    (2 m - 1)}`. Both are statements of exact arithmetic. It speaks of the first `basis_size`
    products, so a larger basis means a better bound.

    Args:
        operator: A, symmetric, the same at each product.
        key: A typed key, for the starting vector.
        tol: The relative residual at which it stops.
        epsilon: Negative curvature weaker than this is of no interest: stop as well as soon as
            `lower_bound` is above -epsilon.
        basis_size: Vectors kept.
        failure_probability: How often `lower_bound` may be wrong.
        max_matvecs: The budget of products; by default 10 times `basis_size`.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        `SmallestEigenvalue`. Memory: `basis_size` + 8 vectors, twice as many at a
        restart.

    Raises:
        ValueError: For a stochastic or asymmetric operator, or arguments out of range.
        FloatingPointError: If a product is NaN or infinite.

    Example:
        >>> from geojax import krylov
        >>> saddle = krylov.from_matrix(np.diag(np.array([3.0, 1.0, -0.5], np.float32)))
        >>> result = smallest_eigenvalue(saddle, key=jax.random.key(0))
        >>> result.negative, round(result.eigenvalue, 4)
        (True, -0.5)

    Reference:
        Kuczynski and Wozniakowski, Estimating the largest eigenvalue by the power and Lanczos
        algorithms with a random start, 1992, theorem 4.2; van Dorsselaer, Hochstenbach and van der
        Vorst, Computing probabilistic bounds for extreme eigenvalues of symmetric matrices with the
        Lanczos method, 2001, section 3.
    """
    name = "smallest_eigenvalue"
    _dense.check_operator(name, operator, 1)
    _dense.check_tol(name, tol)
    _dense.check_positive(name, basis_size=basis_size, max_matvecs=max_matvecs)
    if basis_size < min(4, operator.size):
        raise ValueError(f"{name}: basis_size is {basis_size}; expected at least 4.")
    if not 0 < failure_probability < 1:
        raise ValueError(
            f"{name}: failure_probability is {failure_probability}; expected a number between 0 "
            "and 1."
        )
    if epsilon is not None and not epsilon > 0:
        raise ValueError(f"{name}: epsilon is {epsilon}; expected a positive number or None.")
    n = operator.size
    budget = 10 * basis_size if max_matvecs is None else int(max_matvecs)
    eps = float(jnp.finfo(operator.dtype).eps)
    basis_size = n if basis_size + 1 >= n else basis_size
    basis = _dense.Krylov(name, operator, key=key, num_products=basis_size)
    recurrence, lower = np.zeros((2, 0)), -np.inf
    with progress_.bar(budget, name, show=progress) as bar:
        while True:
            basis.extend(min(_LOOK_EVERY, budget - basis.num_products))
            found = basis.ritz()
            theta, rho = float(found.values[0]), float(found.residuals[0])
            floor = max(2 * eps * found.norm, basis.noise)
            if basis.num_restarts == 0:
                # One event, a small component in the start, spoils this bound at every length of
                # the sweep: looking at each of them costs no probability.
                recurrence = _recurrence(basis, 64 * eps * found.norm)
                spread = float(found.values[-1] - found.values[0])
                lower = _probable_bound(recurrence, theta, spread, n, failure_probability)
            whole = basis.whole
            lower = theta if whole else min(lower, theta - rho)
            bar(basis.num_products, smallest=f"{theta:.4g}", residual=f"{rho:.1e}")
            done = _dense.accepted(theta, max(rho, floor), found.norm, floor, tol, eps)
            if whole or done or (epsilon is not None and lower - floor >= -epsilon):
                break
            if basis.num_products >= budget:
                break
            if basis.full:
                basis.restart(found, wanted(found.values, max(1, basis_size // 2), "SA"))
    vector = tree.unstack(fix_signs(_dense.unit_rows(basis.vectors(found, [0]))[0]))[0]
    num_matvecs = basis.num_products + 1
    rows, products = _dense.stack((vector,)), _dense.stack((_dense.product(operator, vector),))
    theta = float(_dense.gram((rows,), (products,))[0, 0])
    _dense.check_finite(name, theta, operator, num_matvecs, 1)
    _, sizes = _dense.defects(products, rows, np.asarray([theta], operator.dtype))
    residual = float(np.asarray(sizes)[0])
    upper = theta + floor
    lower = min(lower, theta - residual) - floor
    converged = bool(_dense.accepted(theta, residual, found.norm, floor, tol, eps))
    if converged:
        reason = "converged"
    elif epsilon is not None and lower >= -epsilon:
        reason = "stopped: the lower bound is above -epsilon"
    elif whole:
        reason = _dense.floor_reason(floor)
    else:
        reason = f"stopped at max_matvecs={budget}"
    if upper < 0:
        verdict = (
            "negative curvature: proven (the Rayleigh quotient is negative: an upper bound on the "
            "smallest eigenvalue)"
        )
    elif whole:
        verdict = "no negative curvature: the whole spectrum was found"
    else:
        verdict = (
            f"no negative curvature found: no eigenvalue is below {lower:.3g} with probability at "
            f"least {1 - failure_probability:g} over the starting vector"
        )
    return SmallestEigenvalue(
        eigenvalue=theta,
        eigenvector=vector,
        residual=residual,
        interval=theta + (residual + floor) * np.array([-1.0, 1.0]),
        upper_bound=upper,
        lower_bound=lower,
        failure_probability=failure_probability,
        negative=upper < 0,
        verdict=verdict,
        converged=converged,
        reason=reason,
        num_matvecs=num_matvecs,
        noise_floor=floor,
        size=n,
        recurrence=recurrence,
    )


def _recurrence(basis: _dense.Krylov, least: float) -> np.ndarray:
    """The tridiagonal matrix of an uninterrupted sweep, up to its first breakdown."""
    m = basis.num_known
    diagonal = np.diag(basis.projected)[:m]
    # A basis of the whole space has nothing beyond its last row.
    beyond = np.append(np.diag(basis.projected, -1), 0.0)[:m]
    broken = np.flatnonzero(beyond <= least)
    if len(broken):
        m = int(broken[0]) + 1
        beyond[m - 1] = max(least, np.finfo(float).tiny)
    return np.stack([diagonal[:m], beyond[:m]])
