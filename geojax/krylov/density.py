"""What a Lanczos quadrature says about a spectrum: densities, their bands, moments and functionals.

Everything here is small host algebra in float64 on nodes and weights; no products are made.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from geojax.krylov import probes as probes_
from geojax.krylov._smoothing import (
    Axis,
    View,
    default_places,
    default_width,
    gauss,
    position,
    quadratures,
    quantiles,
    step,
    to_axis,
    trapezoids,
)

__all__ = ["Axis", "Curve", "SpectralDensity"]

# How the smoothing differs from the usual code (Ghorbani et al. 2019, PyHessian, Papyan 2019):
# - the kernel's width does not know the range of the spectrum, which one outlier can stretch a
#   hundredfold; it comes from the quartiles of the mass and from what the steps resolve;
# - nothing is renormalised: mass that is missing, off the grid or between grid points is a warning;
# - each probe keeps its own curve, so there is a standard error at each position.


class Curve(NamedTuple):
    r"""A function of the eigenvalue that was estimated from several probes.

    Attributes:
        grid: `(num_points,)`: positions, in units of eigenvalues; on a log axis those of
            :math:`|\lambda| + \epsilon`.
        coordinate: `(num_points,)`: where they are on the axis, the same as `grid` on a linear one.
        values: `(num_points,)`: the mean over the probes, deflated eigenvalues included. A density
            is per unit of `coordinate`; times `jacobian` it is per unit of the eigenvalue.
        probes: `(num_probes, num_points)`: the curve of each probe.
        standard_error: `(num_points,)`: of `values`; NaN for one probe.
        lower: `(num_points,)`: the lower end of the pointwise t-interval, at least 0.
        upper: `(num_points,)`: its upper end.
        spikes: `(num_points,)`: the part of `values` that the deflated eigenvalues make.
        deflated: `(k,)`: those eigenvalues.
        jacobian: `(num_points,)`: the derivative of the coordinate by the eigenvalue.
        width: The standard deviation of the kernel, in units of the coordinate.
        axis: 'linear', 'log' or 'symlog'.
        epsilon: The epsilon of the axis; 0 on a linear one.
        confidence: The probability of the intervals.
        integral: The integral of a density over the grid, by trapezoids; 1 if nothing is missing.
            NaN for a cumulative distribution.
        size: The number of eigenvalues, n.
    """

    grid: np.ndarray
    coordinate: np.ndarray
    values: np.ndarray
    probes: np.ndarray
    standard_error: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    spikes: np.ndarray
    deflated: np.ndarray
    jacobian: np.ndarray
    width: float
    axis: Axis
    epsilon: float
    confidence: float
    integral: float
    size: int


class SpectralDensity(NamedTuple):
    r"""The spectral measure of an operator as R probes saw it, and exact spikes.

    For any f, :math:`\operatorname{tr} f(A) \approx \sum_{i \le k} f(\lambda_i) + (n - k)
    \frac1R \sum_r \sum_j w_{rj} f(\theta_{rj})`, with k deflated eigenvalues.

    Attributes:
        nodes: `(R, m)`, float64, ascending. After a breakdown the rest repeats the first Rayleigh
            quotient, with weight zero.
        weights: `(R, m)`, float64, nonnegative; each row sums to 1.
        residuals: `(R, m)`, float64: how far from a node there must be an eigenvalue, where a basis
            was kept.
        deflated: `(k,)`, the eigenvalues that were taken out, each of mass 1/n.
        size: n.
        alphas: `(R, m)`, the diagonals of the tridiagonal matrices.
        betas: `(R, m)`, their off-diagonals, and last the norm of what was left over.
        num_steps: `(R,)`, the order of each matrix before a breakdown.
        exhausted: `(R,)`, whether the recurrence ended in an invariant subspace: the nodes are then
            eigenvalues, and the quadrature is exact for its probe.
        num_matvecs: Products with A.
        reorthogonalized: Whether a basis was kept.
        asymmetry: The largest entry that a symmetric operator would not have given, relative to the
            largest of T; rounding if all is well.
        weight_error: The largest distance of a row sum of the weights from 1.
        eps: The rounding unit of the products.
        curve: The density as it was asked for; `density` makes others.
    """

    nodes: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray
    deflated: np.ndarray
    size: int
    alphas: np.ndarray
    betas: np.ndarray
    num_steps: np.ndarray
    exhausted: np.ndarray
    num_matvecs: int
    reorthogonalized: bool
    asymmetry: float
    weight_error: float
    eps: float
    curve: Curve

    def __repr__(self) -> str:
        probes, steps = self.nodes.shape
        return (
            f"SpectralDensity(size={self.size}, {probes} probes of {steps} steps, "
            f"{len(self.deflated)} deflated, {self.num_matvecs} products)"
        )

    __str__ = __repr__

    @property
    def complement(self) -> float:
        """The share of the eigenvalues that were not deflated, (n - k) / n."""
        return (self.size - len(self.deflated)) / self.size

    def truncate(self, *, num_probes: int | None = None, num_steps: int | None = None):
        """The result that fewer probes or steps would have given, to see whether these are enough.

        Raises:
            ValueError: For more than there are.
        """
        total, most = self.nodes.shape
        r = total if num_probes is None else probes_.check_count("num_probes", num_probes, 1)
        m = most if num_steps is None else probes_.check_count("num_steps", num_steps, 1)
        if r > total or m > most:
            raise ValueError(
                f"truncate: asked for {r} probes of {m} steps; there are {total} of {most}."
            )
        counts = np.minimum(self.num_steps[:r], m)
        alphas, betas = self.alphas[:r, :m], self.betas[:r, :m]
        out = self._replace(
            **quadratures(alphas, betas, counts)._asdict(),
            alphas=alphas,
            betas=betas,
            num_steps=counts,
            exhausted=betas[np.arange(r), counts - 1] == 0,
            num_matvecs=int(counts.sum()),
        )
        shown = self.curve
        return out._replace(
            curve=out.density(axis=shown.axis, epsilon=shown.epsilon, confidence=shown.confidence)
        )

    # ------------------------------------------------------------------------------- curves

    def density(
        self,
        grid: Any = None,
        *,
        width: float | None = None,
        axis: Axis = "linear",
        epsilon: float | None = None,
        confidence: float = 0.95,
    ) -> Curve:
        r"""The density of the eigenvalues, smoothed by a Gaussian kernel.

        Args:
            grid: `(num_points,)`, ascending positions in units of eigenvalues, of
                :math:`|\lambda| + \epsilon` where `axis` is 'log'; None for a grid that covers all
                nodes and resolves the kernel.
            width: The kernel's standard deviation in units of the axis. None takes the larger of
                2/m of the interquartile range of the mass, and what m steps resolve: 0.65 of a
                large spacing of nodes that are no eigenvalues yet.
            axis: 'linear'; 'log' for :math:`y = \log(|\lambda| + \epsilon)`; 'symlog' for
                :math:`y = \operatorname{sign}(\lambda) \log(1 + |\lambda| / \epsilon)`. The result
                is a density in y.
            epsilon: By default, on a log axis the rounding of the largest node, and on a symlog
                axis the median magnitude of the mass, or 1e-6 of the largest node if that is more.
            confidence: The probability of the pointwise intervals.

        Raises:
            ValueError: For a grid that is not ascending, or arguments out of range.

        Warns:
            UserWarning: If nodes lie off the grid, or the grid is too coarse for the kernel.
        """
        probes_.check_confidence(confidence)
        view = self._view(axis, epsilon, width)
        grid, places = self._grid(view, grid)
        given = self._kernels(view, places, gauss)
        curve = self._curve(view, grid, places, *given, confidence)
        curve = curve._replace(integral=trapezoids(curve.values, places))
        self._warn(view, grid, places, curve.integral)
        return curve

    def cdf(
        self,
        grid: Any = None,
        *,
        width: float | None = None,
        axis: Axis = "linear",
        epsilon: float | None = None,
        confidence: float = 0.95,
    ) -> Curve:
        """The share of the eigenvalues (on a log axis, of their magnitudes) up to each position.

        Args:
            grid: As in `density`.
            width: As in `density`, of which this is the integral; 0 for a staircase, at whose steps
                half the node's weight counts.
            axis: As in `density`.
            epsilon: As in `density`.
            confidence: The probability of the pointwise intervals, clipped to [0, 1].
        """
        probes_.check_confidence(confidence)
        view = self._view(axis, epsilon, width)
        grid, places = self._grid(view, grid)
        curve = self._curve(view, grid, places, *self._kernels(view, places, step), confidence)
        return curve._replace(upper=np.minimum(curve.upper, 1.0))

    def bootstrap(
        self,
        key: jax.Array,
        curve: Curve | None = None,
        *,
        num_resamples: int = 1000,
        confidence: float = 0.95,
    ) -> tuple[np.ndarray, np.ndarray]:
        """A pointwise band for a curve from resampled probes, which assumes no normal distribution.

        The resampled quantity is the deviation in units of its own standard error: the plain
        percentiles of so few probes make bands that are much too narrow.

        Args:
            key: A typed key.
            curve: A `density` or `cdf` of this result; by default `self.curve`.
            num_resamples: How many times the probes are drawn with replacement.
            confidence: The probability.

        Returns:
            `(lower, upper)`, each `(num_points,)`, at least 0.

        Raises:
            ValueError: With fewer than five probes, from which no resampling can learn.

        Reference:
            Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 12.5.
        """
        probes_.check_confidence(confidence)
        probes_.check_key(key)
        curve = self.curve if curve is None else curve
        total = len(curve.probes)
        if total < 5:
            raise ValueError(f"bootstrap: there are {total} probes; expected at least 5.")
        seeds = np.asarray(jax.random.key_data(key)).ravel().tolist()
        generator = np.random.default_rng(seeds)
        counts = generator.multinomial(total, np.full(total, 1 / total), num_resamples)
        off = curve.probes - curve.probes.mean(0)
        mean = counts @ off / total
        variance = np.maximum(counts @ off**2 / total - mean**2, 0)
        # Where a resample does not vary at all it says nothing.
        error = np.sqrt(variance / (total - 1))
        known = error > 1e-6 * np.sqrt((off**2).mean(0) / (total - 1))
        ratio = np.where(known, np.abs(mean) / np.where(known, error, 1), 0)
        half = np.quantile(ratio, confidence, axis=0) * off.std(0, ddof=1) / np.sqrt(total)
        return np.maximum(curve.values - half, 0), curve.values + half

    # --------------------------------------------------------------------------- functionals

    def functional(
        self, f: Callable[[np.ndarray], np.ndarray], *, confidence: float = 0.95
    ) -> probes_.Estimate:
        r""":math:`\operatorname{tr} f(A)` with its standard error; f is applied element by element.

        Exact in the deflated eigenvalues. The error is that of the probes; that of the quadrature,
        small for a smooth f, is seen by `truncate`.
        """
        probes_.check_confidence(confidence)
        fixed = float(np.sum(f(self.deflated))) if len(self.deflated) else 0.0
        return self._mean(f(self.nodes), fixed, self.size - len(self.deflated), confidence)

    def moments(self, p: int, *, confidence: float = 0.95) -> list[probes_.Estimate]:
        r"""The moments :math:`\operatorname{tr} A^j / n` for j from 0 to p."""
        probes_.check_confidence(confidence)
        probes_.check_count("p", p, 0)
        return [
            self._mean(
                self.nodes**j,
                float(np.sum(self.deflated**j)) / self.size,
                self.complement,
                confidence,
            )
            for j in range(p + 1)
        ]

    def mass(self, lower: float, upper: float, *, confidence: float = 0.95) -> probes_.Estimate:
        """The share of the eigenvalues in [lower, upper]."""
        probes_.check_confidence(confidence)

        def inside(x):
            return ((x >= lower) & (x <= upper)).astype(float)

        fixed = float(np.sum(inside(self.deflated))) / self.size
        return self._mean(inside(self.nodes), fixed, self.complement, confidence)

    def zero_mass(
        self, threshold: float | None = None, *, confidence: float = 0.95
    ) -> probes_.Estimate:
        """The share of eigenvalues that are zero, as where the rank is bounded by the data.

        Args:
            threshold: The magnitude up to which a node counts as zero; by default what rounding
                makes of zero, 64 eps of the largest node.
            confidence: The probability of the interval.
        """
        if threshold is None:
            threshold = 64 * self.eps * self._largest()
        return self.mass(-threshold, threshold, confidence=confidence)

    # ------------------------------------------------------------------------------ internals

    def _mean(self, values, fixed, share, confidence) -> probes_.Estimate:
        values = np.asarray(values, np.float64)
        if values.shape != self.nodes.shape:
            raise ValueError(
                f"functional: f gave shape {values.shape} for nodes of shape {self.nodes.shape}; "
                "expected a function that works element by element."
            )
        # A node without weight must not count, even where f is infinite there.
        samples = np.sum(np.where(self.weights > 0, self.weights * values, 0), axis=1)
        if not len(samples):
            return probes_.Estimate(
                fixed, 0.0, (fixed, fixed), samples, self.num_matvecs, confidence
            )
        return probes_.mean_estimate(fixed + share * samples, confidence, self.num_matvecs)

    def _largest(self) -> float:
        return float(
            max(np.abs(self.nodes).max(initial=0.0), np.abs(self.deflated).max(initial=0.0))
        )

    def _view(self, axis: Axis, epsilon: float | None, width: float | None) -> View:
        if axis not in ("linear", "log", "symlog"):
            raise ValueError(f"axis is {axis!r}; expected 'linear', 'log' or 'symlog'.")
        if width is not None and not (np.isfinite(width) and width >= 0):
            raise ValueError(f"width is {width}; expected a nonnegative number, or None.")
        if epsilon is not None and axis != "linear" and not (np.isfinite(epsilon) and epsilon > 0):
            raise ValueError(f"epsilon is {epsilon}; expected a positive number, or None.")
        largest = self._largest() or 1.0
        if axis == "linear":
            epsilon = 0.0
        elif epsilon is None and axis == "log":
            epsilon = self.eps * largest
        elif epsilon is None:
            magnitudes, weights = np.abs(self.nodes).ravel(), self.weights.ravel()
            median = quantiles(magnitudes, weights, [0.5])[0] if len(magnitudes) else 0.0
            epsilon = float(max(median, 1e-6 * largest))
        assert epsilon is not None
        slope = 1.0 if axis == "linear" else 1 / (np.abs(self.nodes) + epsilon)
        view = View(
            to_axis(self.nodes, axis, epsilon),
            self.residuals * slope,
            to_axis(self.deflated, axis, epsilon),
            {"linear": 1.0, "log": 0.0, "symlog": 1 / (epsilon or 1.0)}[axis]
            * 64
            * self.eps
            * self._largest(),
            0.0,
            axis,
            float(epsilon),
        )
        return view._replace(
            width=default_width(view, self.weights) if width is None else float(width)
        )

    def _grid(self, view: View, grid: Any) -> tuple[np.ndarray, np.ndarray]:
        if grid is None:
            places = default_places(view, self.weights)
            return position(places, view.axis, view.epsilon), places
        grid = np.asarray(grid, np.float64)
        if grid.ndim != 1 or len(grid) < 2 or not np.all(np.diff(grid) > 0):
            raise ValueError(
                f"grid: expected at least two ascending positions, got shape {grid.shape}."
            )
        if view.axis == "log":
            if grid[0] <= 0:
                raise ValueError(
                    f"grid begins at {grid[0]:.3g}; expected positive magnitudes on a log axis."
                )
            return grid, np.log(grid)
        return grid, to_axis(grid, view.axis, view.epsilon)

    def _kernels(self, view: View, places: np.ndarray, kernel: Callable):
        per_probe = np.stack(
            [
                kernel(places[:, None] - nodes[None], view.width) @ weights
                for nodes, weights in zip(view.nodes, self.weights, strict=True)
            ]
            or [np.zeros_like(places)]
        )
        spikes = kernel(places[:, None] - view.deflated[None], view.width).sum(1) / self.size
        return self.complement * per_probe + spikes, spikes

    def _curve(self, view, grid, places, per_probe, spikes, confidence) -> Curve:
        total = len(per_probe)
        mean = per_probe.mean(0)
        if not len(self.nodes):  # every eigenvalue is known
            error, half = np.zeros_like(mean), np.zeros_like(mean)
        elif total < 2:
            error, half = np.full_like(mean, np.nan), np.full_like(mean, np.inf)
        else:
            error = per_probe.std(0, ddof=1) / np.sqrt(total)
            half = probes_.t_quantile(confidence, total - 1) * error
        jacobian = np.ones_like(grid)
        if view.axis != "linear":
            jacobian = 1 / (np.abs(grid) + (view.epsilon if view.axis == "symlog" else 0.0))
        return Curve(
            grid=grid,
            coordinate=places,
            values=mean,
            probes=per_probe,
            standard_error=error,
            lower=np.maximum(mean - half, 0.0),
            upper=mean + half,
            spikes=spikes,
            deflated=self.deflated,
            jacobian=jacobian,
            width=view.width,
            axis=view.axis,
            epsilon=view.epsilon,
            confidence=confidence,
            integral=float("nan"),
            size=self.size,
        )

    def _warn(self, view: View, grid: np.ndarray, places: np.ndarray, integral: float) -> None:
        low, high = places[0], places[-1]
        nodes = view.nodes[self.weights > 1e-12]
        every = np.concatenate([nodes, view.deflated])
        off = (every < low) | (every > high)
        if off.any():
            where = position(every[off], view.axis, view.epsilon)
            mass = 0.0
            if len(self.nodes):
                outside = (view.nodes < low) | (view.nodes > high)
                mass = self.complement * float(np.sum(self.weights * outside)) / len(self.nodes)
            mass += float(np.sum((view.deflated < low) | (view.deflated > high))) / self.size
            warnings.warn(
                f"density: {int(off.sum())} nodes, {mass:.3g} of the mass, lie off the grid "
                f"[{grid[0]:.4g}, {grid[-1]:.4g}], from {where.min():.4g} to {where.max():.4g}; "
                "the curve does not integrate to 1. Widen the grid to see them.",
                stacklevel=3,
            )
        upper = self._kernels(view, places[-1:], step)[0].mean()
        lower = self._kernels(view, places[:1], step)[0].mean()
        if abs(upper - lower - integral) > 0.01:
            warnings.warn(
                f"density: over the grid the curve integrates to {integral:.4g} and its kernels to "
                f"{upper - lower:.4g}: the grid is too coarse for a width of {view.width:.3g}. "
                "Give more points or a larger width.",
                stacklevel=3,
            )
