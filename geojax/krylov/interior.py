"""Eigenvalues next to a value, seen through a filter or an inverse.

A Chebyshev polynomial of A magnifies them, or the inverse of A - sigma I, solved for by MINRES.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import progress as progress_
from geojax import tree
from geojax.krylov import _dense
from geojax.krylov.minres import minres
from geojax.krylov.operators import Operator
from geojax.krylov.results import Eigenpairs, wanted

__all__ = ["eigsh_interior"]

PyTree = Any
_LOOK_EVERY = 5
_NARROW = 0.02
_CONFIRM = 10


@jax.jit
def _chebyshev_start(v: PyTree, product: PyTree, center, radius, c0, c1):
    """T_0 and T_1 of the scaled operator applied to v, and the first two terms of the filter."""
    t1 = tree.scale(1 / radius, tree.axpy(-center, v, product))
    return t1, tree.axpy(c1, t1, tree.scale(c0, v))


@jax.jit
def _chebyshev_step(t, t_old, product, total, center, radius, c):
    """T_{j+1} = 2 (A - center) / radius T_j - T_{j-1}."""
    new = tree.axpy(-1.0, t_old, tree.scale(2 / radius, tree.axpy(-center, t, product)))
    return new, tree.axpy(c, new, total)


class _Filter(NamedTuple):
    """A polynomial with a bump of height one at a value, on an interval that holds the spectrum."""

    coefficients: np.ndarray
    center: float
    radius: float

    def __call__(self, x: Any) -> np.ndarray:
        return np.polynomial.chebyshev.chebval(
            (np.asarray(x) - self.center) / self.radius, self.coefficients
        )

    @property
    def degree(self) -> int:
        return len(self.coefficients) - 1


def _make_filter(sigma: float, low: float, high: float, degree: int) -> _Filter:
    """The Chebyshev expansion of a delta at sigma, damped as Jackson did."""
    center, radius = (low + high) / 2, (high - low) / 2
    s = float(np.clip((sigma - center) / radius, -1, 1))
    j = np.arange(degree + 1)
    q = math.pi / (degree + 2)
    damping = (1 - j / (degree + 2)) * np.cos(j * q) + np.sin(j * q) / ((degree + 2) * np.tan(q))
    c = damping * np.cos(j * math.acos(s)) * np.where(j == 0, 1, 2)
    return _Filter(c / np.polynomial.chebyshev.chebval(s, c), center, radius)


class _Seen:
    """A as the Lanczos process sees it, and the products of A that this takes."""

    def __init__(self, operator: Operator):
        self.operator = operator
        self.num_matvecs = 0
        self.inner_residuals: list[float] = []

    def multiply(self, v: PyTree) -> PyTree:
        self.num_matvecs += 1
        return _dense.product(self.operator, v)

    def plain(self) -> Operator:
        return Operator(self.multiply, self.operator.like, name=self.operator.name)

    def filtered(self, polynomial: _Filter) -> Operator:
        dtype = np.dtype(self.operator.dtype)
        center, radius = (np.asarray(x, dtype) for x in polynomial[1:])
        c = polynomial.coefficients.astype(dtype)

        def matvec(v):
            old = v
            t, total = _chebyshev_start(v, self.multiply(v), center, radius, c[0], c[1])
            for j in range(2, len(c)):
                new, total = _chebyshev_step(t, old, self.multiply(t), total, center, radius, c[j])
                t, old = new, t
            return total

        return Operator(matvec, self.operator.like, name=f"a filter of {self.operator.name}")

    def inverted(self, sigma: float, tol: float, max_inner: int | None) -> Operator:
        def matvec(v):
            out = minres(self.operator, v, shift=sigma, tol=tol, max_matvecs=max_inner)
            self.num_matvecs += out.num_matvecs
            self.inner_residuals.append(out.residual)
            return out.solution

        return Operator(matvec, self.operator.like, name=f"the inverse of {self.operator.name}")


def eigsh_interior(
    operator: Operator,
    k: int,
    sigma: float,
    *,
    key: jax.Array,
    method: Literal["chebyshev", "shift_invert"] = "chebyshev",
    tol: float = 1e-3,
    degree: int | None = None,
    inner_tol: float | None = None,
    basis_size: int | None = None,
    max_matvecs: int | None = None,
    progress: bool | None = None,
) -> Eigenpairs:
    r"""The k eigenpairs whose eigenvalues are nearest to sigma.

    Lanczos with thick restart on a function of A that is largest at sigma, then a Rayleigh-Ritz
    step with A itself in the space of its leading vectors, which gives values and residuals of A.

    'chebyshev': a polynomial of A, the Chebyshev expansion of a delta at sigma with Jackson's
    damping. The spectrum's ends and density come from a few Lanczos steps. Each step costs `degree`
    products, and no system is solved. An eigenvalue as near as those returned and missed would have
    a filter value that the Lanczos process had found first; this is checked, and the degree is
    lowered if the bump is too narrow to tell.

    'shift_invert': :math:`(A - \sigma I)^{-1}` by `minres`; the number of products of each solve
    grows with the norm of A over the distance of sigma to the nearest eigenvalue. Keep sigma off
    the eigenvalues themselves. Inner residuals are in `history['inner_residuals']`.

    Once the pairs are good, ten steps from a fresh random vector, orthogonal to what was found,
    look for copies of multiple eigenvalues, and the search goes on if they show any.

    Both are dear, as interior eigenvalues are without a factorization; a basis that holds all n
    vectors makes the result exact for n products.

    Args:
        operator: A, symmetric, the same at each product.
        k: How many pairs.
        sigma: The value.
        key: A typed key, for the starting vector.
        method: 'chebyshev' or 'shift_invert'.
        tol: The relative residual, :math:`\|A x - \lambda x\| \le` `tol` :math:`|\lambda|`.
        degree: Of the filter; by default from the density of the spectrum at sigma.
        inner_tol: The relative residual of the inner solves; by default a hundredth of `tol`.
        basis_size: Vectors kept; by default 4 k + 20, or all n of them up to n = 500.
        max_matvecs: The budget of products with A, kept to within one filter or solve; by default
            500 times `basis_size`.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        `Eigenpairs` by growing distance from sigma. `history` has, beside the usual,
        'inner_residuals' (the largest so far) and 'degree', one for each look. Memory: `basis_size`
        + 2 k + 20 vectors, and `basis_size` more at a restart.

    Raises:
        ValueError: For a stochastic or asymmetric operator, or arguments out of range.
        FloatingPointError: If a product is NaN or infinite.

    Example:
        >>> from geojax import krylov
        >>> operator = krylov.from_matrix(np.diag(np.arange(1.0, 21.0, dtype=np.float32)))
        >>> pairs = eigsh_interior(operator, 2, 7.2, key=jax.random.key(0))
        >>> np.round(pairs.eigenvalues, 3).tolist()
        [7.0, 8.0]

    Reference:
        Fang and Saad, A filtered Lanczos procedure for extreme and interior eigenvalue problems,
        2012; Weisse, Wellein, Alvermann and Fehske, The kernel polynomial method, 2006, equation 71
        (the damping); Ericsson and Ruhe, 1980 (shift and invert).
    """
    k, basis_size, budget = _check_interior(
        operator, k, sigma, method, tol, degree, inner_tol, basis_size, max_matvecs
    )
    seen = _Seen(operator)
    run = _Interior(operator, seen, k, float(sigma), float(tol), basis_size, budget)
    keys = jax.random.split(key, 12)
    with progress_.bar(budget, "eigsh_interior", show=progress) as bar:
        if basis_size >= operator.size:
            run.search(seen.plain(), keys[0], bar, "near")
        elif method == "shift_invert":
            inner = max(tol / 100, 8 * run.epsilon) if inner_tol is None else inner_tol
            run.search(seen.inverted(float(sigma), inner, None), keys[0], bar, "LM")
        else:
            low, high, guess = run.survey(keys[0])
            degree = guess if degree is None else degree
            for key_round in keys[1:]:
                if not low < sigma < high:
                    # All of the spectrum is on one side: its end is what is nearest.
                    run.search(seen.plain(), key_round, bar, "LA" if sigma >= high else "SA")
                    break
                polynomial = _make_filter(float(sigma), low, high, degree)
                verdict = run.search(seen.filtered(polynomial), key_round, bar, "LA", polynomial)
                if verdict == "outside":
                    # An eigenvalue beyond the surveyed ends, where the polynomial explodes.
                    width = high - low
                    low, high = low - 0.2 * width, high + 0.2 * width
                elif verdict == "narrow" and degree > 2:
                    degree = max(2, degree // 2)
                else:
                    break
    return run.finish()


class _Interior:
    """One call: the best pairs so far, and what they cost."""

    def __init__(self, operator, seen: _Seen, k, sigma, tol, basis_size, budget):
        self.operator, self.seen, self.k, self.sigma, self.tol = operator, seen, k, sigma, tol
        self.basis_size, self.budget = basis_size, budget
        self.guard = min(operator.size - k, max(2, k // 2))
        self.epsilon = float(jnp.finfo(operator.dtype).eps)
        self.norm, self.noise, self.degree = 0.0, 0.0, 0
        self.history: list = []
        self.extra: list = []
        self.stop = ""
        self.vectors: PyTree = None
        self.values = np.zeros(0)
        self.residuals = np.zeros(0)
        self.complete = True

    @property
    def floor(self) -> float:
        return max(2 * self.epsilon * self.norm, self.noise)

    def survey(self, key: jax.Array) -> tuple[float, float, int]:
        """Ends of the spectrum and a degree, from a few Lanczos steps."""
        m = min(self.operator.size, 30)
        plain = self.seen.plain()
        basis = _dense.Krylov("eigsh_interior", plain, key=key, num_products=m)
        basis.extend(m)
        found = basis.ritz()
        reach = max(float(found.residuals.max()), 1e-3 * float(np.ptp(found.values)))
        reach = max(reach, 64 * self.epsilon * found.norm, np.finfo(float).tiny)
        low, high = float(found.values[0]) - reach, float(found.values[-1]) + reach
        self.norm = max(found.norm, abs(low), abs(high))
        # How many eigenvalues lie below a value, from the quadrature of the first vector.
        mass = found.weights[0] ** 2
        middle = (np.cumsum(mass) - mass / 2) / mass.sum() * self.operator.size
        nodes = np.concatenate([[low], found.values, [high]])
        counts = np.concatenate([[0.0], middle, [float(self.operator.size)]])

        def below(x):
            return float(np.interp(x, nodes, counts))

        near, far = 1e-4 * (high - low), high - low
        for _ in range(60):
            h = (near + far) / 2
            enough = below(self.sigma + h) - below(self.sigma - h) >= self.k + self.guard
            near, far = (near, h) if enough else (h, far)
        t = far / ((high - low) / 2)
        s = np.clip((self.sigma - (low + high) / 2) / ((high - low) / 2), -1, 1)
        # The bump's standard deviation is pi sqrt(1 - s^2) / degree, and near an end its square.
        width = math.pi * max(math.sqrt(1 - s * s), math.sqrt(t))
        return low, high, int(np.clip(math.ceil(width / t), 4, 4000))

    def search(
        self, function: Operator, key: jax.Array, bar, which: str, polynomial: _Filter | None = None
    ) -> str:
        """Lanczos on a function of A, until the pairs of A that it leads to are good."""
        self.degree = polynomial.degree if polynomial else 0
        size = self.basis_size
        basis = _dense.Krylov("eigsh_interior", function, key=key, num_products=size)
        num, tol = self.k + self.guard, min(1e-2, self.tol)
        confirm_end, confirmed = 0, np.zeros(0)
        while True:
            basis.extend(_LOOK_EVERY, lambda: self.seen.num_matvecs < self.budget)
            if not basis.num_known:
                raise ValueError(
                    f"eigsh_interior: max_matvecs={self.budget} is spent before the first step; "
                    f"{self.seen.num_matvecs} products were needed to get there. Raise it."
                )
            found = basis.ritz()
            if polynomial and not found.norm < 1.5:
                return "outside"
            whole, spent = basis.whole, self.seen.num_matvecs >= self.budget
            leading = wanted(found.values, num, which)
            if which == "near":
                leading = np.argsort(np.abs(found.values - self.sigma), kind="stable")[:num]
            worst = float(
                (found.residuals[leading] / np.maximum(np.abs(found.values[leading]), 1e-300)).max()
            )
            bar(self.seen.num_matvecs, residual=f"{worst:.1e}")
            ready = len(leading) == num and worst <= tol and which != "near"
            if ready and len(confirmed) == num and basis.num_products >= confirm_end:
                moved = np.abs(found.values[leading] - confirmed).max()
                if moved <= 2 * worst * np.abs(confirmed).max() + 64 * self.epsilon * found.norm:
                    return "done"
            # Not while a fresh start has had no time to see anything.
            ready = ready and basis.num_products >= confirm_end
            if ready or whole or spent:
                self.look(basis, found, leading)
                good = len(self.values) >= self.k and bool(self.good().all())
                least, bump = float(found.values[leading].min()), self.bump(polynomial)
                self.complete = whole or (ready and least < bump)
                if good and whole:
                    return "done"
                if spent:
                    # Without a second look, a copy of a multiple eigenvalue may be missing.
                    self.complete, self.stop = False, f"stopped at max_matvecs={self.budget}"
                    return "done"
                # Where the filter is as small as this, vectors drown in the rounding of others.
                if polynomial and polynomial.degree > 2 and min(least, bump) < _NARROW:
                    return "narrow"
                if whole or (not good and tol <= 10 * self.epsilon):
                    self.stop = "stopped without progress"
                    return "done"
                if good and self.complete:
                    # A copy of a multiple eigenvalue shows itself to another start alone.
                    confirmed = found.values[leading]
                    confirm_end = basis.num_products + _CONFIRM
                    basis.restart(found, leading, anew=True)
                    continue
                if good:
                    # More of the leading vectors, until none as near can be missing.
                    num += max(2, self.k)
                    if num > size - 4:
                        return "narrow"
                else:
                    tol /= 10
            if basis.full:
                basis.restart(found, wanted(found.values, min(size - 2, (num + size) // 2), which))

    def bump(self, polynomial: _Filter | None) -> float:
        """The least filter value that an eigenvalue as near as those found can have."""
        if polynomial is None or not len(self.values):
            return np.inf
        reach = float(np.abs(self.values[: self.k] - self.sigma).max())
        grid = self.sigma + reach * np.linspace(-1, 1, 1001)
        inside = np.abs(grid - polynomial.center) <= polynomial.radius
        return float(polynomial(grid[inside]).min(initial=np.inf))

    def good(self) -> np.ndarray:
        """Which of the pairs found so far, k at the most, are within the tolerance."""
        values, residuals = self.values[: self.k], self.residuals[: self.k]
        return _dense.accepted(values, residuals, self.norm, self.floor, self.tol, self.epsilon)

    def look(self, basis: _dense.Krylov, found: _dense.Ritz, order: np.ndarray) -> None:
        """Rayleigh-Ritz with A in the span of the leading vectors."""
        rows, _, rank = _dense.orthonormal(basis.vectors(found, order))
        self.seen.num_matvecs += len(order)
        products = _dense.products(self.operator, rows)
        projected = _dense.gram((rows,), (products,))
        _dense.check_finite(
            "eigsh_interior", projected, self.operator, self.seen.num_matvecs, len(order)
        )
        self.noise = max(self.noise, float(np.abs(projected - projected.T).max()))
        values, vectors = np.linalg.eigh((projected + projected.T)[:rank, :rank] / 2)
        self.norm = max(self.norm, float(np.abs(values).max()))
        near = np.argsort(np.abs(values - self.sigma), kind="stable")
        rotate = np.zeros((rank, len(order)))
        rotate[:, :rank] = vectors[:, near].T
        (self.vectors,), (images,) = _dense.mix((rows,), rotate), _dense.mix((products,), rotate)
        self.values = values[near]
        _, sizes = _dense.defects(
            images, self.vectors, np.asarray(self.values, self.operator.dtype)
        )
        self.residuals = np.asarray(sizes, np.float64)
        self.history.append((self.seen.num_matvecs, self.values, self.residuals))
        self.extra.append((max(self.seen.inner_residuals, default=0.0), self.degree))

    def finish(self) -> Eigenpairs:
        if self.vectors is None:
            raise RuntimeError(
                f"eigsh_interior: no interval holds the spectrum of {self.operator.name}: a "
                "polynomial of it keeps growing. Is the operator symmetric, linear and the same at "
                "each product?"
            )
        num = min(self.k, len(self.values))
        good = self.good()
        converged = good & self.complete
        near = self.residuals[:num] <= 100 * self.floor
        stuck = ~good & near & ("max_matvecs" not in self.stop)
        missing = "an eigenvalue as near may be missing"
        reasons = [
            "converged" if done else _dense.floor_reason(self.floor) if low else
            self.stop if self.complete or "max" in self.stop else missing
            for done, low in zip(converged, stuck, strict=True)
        ]  # fmt: skip
        _dense.warn_stuck("eigsh_interior", self.operator, stuck, self.tol, self.floor, self.norm)
        result = _dense.pairs(
            values=self.values[:num],
            vectors=_dense.take(self.vectors, range(num)),
            residuals=self.residuals[:num],
            converged=converged,
            reasons=reasons,
            num_matvecs=self.seen.num_matvecs,
            floor=self.floor,
            history=self.history,
            others=self.values,
        )
        extra = np.array(self.extra, float).reshape(-1, 2)
        result.history.update(inner_residuals=extra[:, 0], degree=extra[:, 1].astype(int))
        return result


def _check_interior(
    operator, k, sigma, method, tol, degree, inner_tol, basis_size, max_matvecs
) -> tuple[int, int, int]:
    name = "eigsh_interior"
    _dense.check_operator(name, operator, k)
    _dense.check_tol(name, tol)
    if inner_tol is not None:
        _dense.check_tol(name, inner_tol)
    _dense.check_positive(name, degree=degree, basis_size=basis_size, max_matvecs=max_matvecs)
    if method not in ("chebyshev", "shift_invert"):
        raise ValueError(f"{name}: method is {method!r}; expected 'chebyshev' or 'shift_invert'.")
    if not np.isfinite(sigma):
        raise ValueError(f"{name}: sigma is {sigma}; expected a finite number.")
    if degree is not None and degree < 2:
        raise ValueError(f"{name}: degree is {degree}; expected at least 2.")
    few = n if (n := operator.size) <= 500 else 4 * int(k) + 20
    size = few if basis_size is None else int(basis_size)
    least = int(k) + max(2, int(k) // 2) + 4
    if size < min(least, operator.size):
        raise ValueError(f"{name}: basis_size is {size}; expected at least {least}.")
    size = operator.size if size + 1 >= operator.size else size
    return int(k), size, 500 * size if max_matvecs is None else int(max_matvecs)
