"""Quadratures of tridiagonal matrices, axes, kernels and their widths: the parts of a density."""

from typing import Any, Literal, NamedTuple

import numpy as np

Axis = Literal["linear", "log", "symlog"]


class View(NamedTuple):
    """The measure in the coordinate of an axis."""

    nodes: np.ndarray
    residuals: np.ndarray
    deflated: np.ndarray
    noise: float  # nodes this close are the same to rounding
    width: float
    axis: Axis
    epsilon: float


class Quadratures(NamedTuple):
    """The Gauss quadratures of R tridiagonal matrices.

    Attributes:
        nodes: `(R, m)`, ascending. Those past a breakdown repeat the first diagonal entry, which is
            never outside the spectrum.
        weights: `(R, m)`, zero past a breakdown.
        residuals: `(R, m)`: an eigenvalue lies within this of each node.
    """

    nodes: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray


def quadratures(alphas: np.ndarray, betas: np.ndarray, counts: np.ndarray) -> Quadratures:
    """The quadratures, in float64.

    Args:
        alphas: `(R, m)`, the diagonals.
        betas: `(R, m)`, the off-diagonals, and last the norm that was left over.
        counts: `(R,)`, the order of the part of each that counts.
    """
    from scipy import linalg

    nodes = np.repeat(np.asarray(alphas, np.float64)[:, :1], alphas.shape[1], axis=1)
    weights, residuals = np.zeros_like(nodes), np.zeros_like(nodes)
    for r, count in enumerate(counts):
        found, vectors = linalg.eigh_tridiagonal(alphas[r, :count], betas[r, : count - 1])
        nodes[r, :count], weights[r, :count] = found, vectors[0] ** 2
        residuals[r, :count] = betas[r, count - 1] * np.abs(vectors[-1])
    order = np.argsort(nodes, axis=1, kind="stable")
    return Quadratures(*(np.take_along_axis(x, order, 1) for x in (nodes, weights, residuals)))


# --------------------------------------------------------------------------- axes and kernels


def to_axis(values: Any, axis: Axis, epsilon: float) -> np.ndarray:
    """Where eigenvalues are on an axis."""
    values = np.asarray(values, np.float64)
    if axis == "log":
        return np.log(np.abs(values) + epsilon)
    if axis == "symlog":
        return np.sign(values) * np.log1p(np.abs(values) / epsilon)
    return values


def position(places: np.ndarray, axis: Axis, epsilon: float) -> np.ndarray:
    """The grid positions of coordinates."""
    if axis == "log":
        return np.exp(places)
    if axis == "symlog":
        return np.sign(places) * epsilon * np.expm1(np.abs(places))
    return places


def gauss(distance: np.ndarray, width: float) -> np.ndarray:
    if width == 0:
        raise ValueError("density: width is 0; a density needs a kernel of positive width.")
    return np.exp(-0.5 * (distance / width) ** 2) / (width * np.sqrt(2 * np.pi))


def step(distance: np.ndarray, width: float) -> np.ndarray:
    from scipy import special

    if width == 0:
        return (np.sign(distance) + 1) / 2
    return special.ndtr(distance / width)


def trapezoids(values: np.ndarray, places: np.ndarray) -> float:
    return float(np.sum((values[1:] + values[:-1]) / 2 * np.diff(places)))


def quantiles(values: np.ndarray, weights: np.ndarray, levels: Any) -> np.ndarray:
    """Quantiles of a weighted sample."""
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    index = np.searchsorted(cumulative, np.asarray(levels) * cumulative[-1])
    return values[order][np.minimum(index, len(values) - 1)]


def default_width(view: View, weights: np.ndarray) -> float:
    """The larger of 2/m of the interquartile range of the mass, and what m steps resolve.

    The resolution is seen in the spacings of the nodes that have not converged to an eigenvalue,
    0.65 of a large one: not exceeded by three quarters of them, or around 95 % of the mass. With a
    narrower kernel the curve would be a comb of nodes. Neither scale knows of outliers: these have
    no mass, and are among the first nodes to converge.
    """
    nodes = view.nodes
    if not nodes.size:
        extent = float(np.ptp(view.deflated)) if len(view.deflated) else 0.0
        return extent / 100 or 1e-3 * float(np.abs(view.deflated).max(initial=0.0)) or 1e-3
    width = 2 * spread(nodes.ravel(), weights.ravel(), view.noise) / nodes.shape[1]
    spacings, masses = [np.zeros(0)], [np.zeros(0)]
    for row, mass, residual in zip(nodes, weights, view.residuals, strict=True):
        real = mass > 0
        if real.sum() > 2:
            gaps = np.diff(row[real])
            nearest = np.minimum(np.append(gaps, gaps[-1]), np.insert(gaps, 0, gaps[0]))
            moving = residual[real] > 0.01 * nearest
            spacings.append(nearest[moving])
            masses.append(mass[real][moving])
    every, mass = np.concatenate(spacings), np.concatenate(masses)
    if len(every):
        large = max(np.quantile(every, 0.75), quantiles(every, mass, [0.95])[0])
        width = max(width, 0.65 * float(large))
    # All mass in one place: any width shows it.
    largest = float(np.abs(nodes).max())
    return float(width) if width > max(view.noise, 1e-12 * largest) else 1e-3 * largest or 1e-3


def spread(values: np.ndarray, weights: np.ndarray, noise: float) -> float:
    """The interquartile range; of the rest, where most of the mass is in one place."""
    low, middle, high = quantiles(values, weights, [0.25, 0.5, 0.75])
    place = max(high - low, noise)
    rest = (np.abs(values - middle) > place) & (weights > 0)
    if rest.any():
        first, last = quantiles(values[rest], weights[rest], [0.25, 0.75])
        if place < 0.01 * (last - first):
            return last - first
    return high - low


def default_places(view: View, weights: np.ndarray) -> np.ndarray:
    """A lattice of a quarter of the width around every node, and a coarse one over the gaps."""
    if view.width == 0:
        raise ValueError("width is 0; give the grid of the staircase.")
    pitch = view.width / 4
    marks = np.unique(np.concatenate([view.nodes[weights > 0].ravel(), view.deflated]))
    low, high = marks[0] - 5 * view.width, marks[-1] + 5 * view.width
    near = np.unique(np.rint(marks / pitch)[:, None] + np.arange(-20.0, 21.0)[None])
    places = np.unique(np.concatenate([near * pitch, np.linspace(low, high, 257)]))
    return places[(places >= low) & (places <= high)]
