"""Complexes projected: vertices, edges and triangles in their principal components."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from geojax.plot._style import COLORS, STYLE, matplotlib_and_figure

__all__ = ["complex"]


def complex(
    coordinates: Any,
    simplices: Sequence[Sequence[int]],
    *,
    modes: Sequence[int] = (),
    points: Any = None,
    values: Any = None,
    names: Sequence[str] | None = None,
    explained: Sequence[float] | None = None,
    label: str = "loss",
    percent: bool = False,
    view: tuple[float, float] = (22.0, -62.0),
    size: tuple[float, float] = (5.4, 3.6),
) -> Any:
    """A complex of low loss in two or three dimensions: vertices, edges and translucent triangles.

    Modes are circles, other vertices squares.

    Args:
        coordinates: `(n, 2)` or `(n, 3)`: of the vertices, such as
            `surface.principal_directions(complex.vertices, 3).coordinates`.
        simplices: The indices of the vertices of each.
        modes: The vertices that were given as trained networks.
        points: `(m, 2)` or `(m, 3)`: further points to draw, such as those where a loss was
            measured. A linear projection keeps barycentric weights: `weights @ coordinates`.
        values: `(m,)`: their colours.
        names: Of the vertices.
        explained: The share of the squared distances that each axis explains, for its label.
        label: Of the values, beside their colour bar.
        percent: The values are fractions, shown in %.
        view: Elevation and azimuth of the camera, in degrees.
        size: Width and height in inches.

    Returns:
        A `matplotlib.figure.Figure`; write it with `png` or its own `savefig`.

    Raises:
        ImportError: Without matplotlib.
        ValueError: For shapes that do not fit together, or a simplex that names no vertex.
    """
    matplotlib, Figure = matplotlib_and_figure()  # noqa: N806
    at = np.asarray(coordinates, np.float64)
    if at.ndim != 2 or at.shape[1] not in (2, 3):
        raise ValueError(f"coordinates have shape {at.shape}; expected (n, 2) or (n, 3).")
    n, depth = at.shape
    for name, given in (("simplices", [i for s in simplices for i in s]), ("modes", modes)):
        if any(not 0 <= i < n for i in given):
            raise ValueError(f"{name}: expected indices from 0 to {n - 1}, got {given}.")
    if names is not None and len(names) != n:
        raise ValueError(f"names: got {len(names)}; expected {n}, one for each vertex.")
    drawn = None if points is None else np.asarray(points, np.float64)
    if drawn is not None and (drawn.ndim != 2 or drawn.shape[1] != depth):
        raise ValueError(f"points have shape {drawn.shape}; expected (m, {depth}).")
    if values is not None and (drawn is None or np.shape(values) != (len(drawn),)):
        raise ValueError(f"values have shape {np.shape(values)}; expected one for each point.")
    with matplotlib.rc_context({**STYLE, "axes.grid": depth == 3}):
        figure = Figure(figsize=size, layout="none")
        room = 0.66 if values is not None else 0.86
        if depth == 3:
            axes = figure.add_axes((0.0, 0.03, room, 0.97), projection="3d")
            axes.view_init(*view)
        else:
            axes = figure.add_axes((0.12, 0.13, room - 0.04, 0.8))
        _skeleton(axes, at, simplices)
        if drawn is not None:
            look = {"s": 14, "lw": 0, "zorder": 3}
            if values is None:
                axes.scatter(*drawn.T, color="#777777", **look)
            else:
                shown = axes.scatter(*drawn.T, c=np.asarray(values), cmap="viridis_r", **look)
                beside = figure.add_axes((0.82, 0.2, 0.03, 0.6))
                bar = figure.colorbar(shown, cax=beside)
                if percent:
                    from matplotlib.ticker import PercentFormatter

                    bar.ax.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, symbol=" %"))
                bar.outline.set_visible(False)
                bar.set_label(label)
        _vertices(axes, at, set(modes), names)
        _component_axes(axes, at, explained)
        return figure


def _skeleton(axes: Any, at: np.ndarray, simplices: Sequence[Sequence[int]]) -> None:
    """The edges and the triangles of all simplices, each once."""
    import itertools

    from matplotlib.collections import PolyCollection

    def parts(size: int) -> list[np.ndarray]:
        found = {c for s in simplices for c in itertools.combinations(sorted(s), size)}
        return [at[list(c)] for c in sorted(found)]

    for edge in parts(2):
        axes.plot(*edge.T, color="#333333", lw=1.0, zorder=2)
    look = {"facecolors": COLORS[5], "edgecolors": "none", "alpha": 0.16, "zorder": 1}
    if at.shape[1] == 3:
        from mpl_toolkits.mplot3d.art3d import Poly3DCollection

        axes.add_collection3d(Poly3DCollection(parts(3), **look))
    else:
        axes.add_collection(PolyCollection(parts(3), **look))


def _vertices(axes: Any, at: np.ndarray, modes: set[int], names: Any) -> None:
    from matplotlib.patheffects import withStroke

    other = "connector" if len(modes) > 1 else "added vertex" if modes else "vertex"
    kinds = (
        ("network", "o", COLORS[1], [i for i in range(len(at)) if i in modes]),
        (other, "s", COLORS[0], [i for i in range(len(at)) if i not in modes]),
    )
    for kind, marker, color, chosen in kinds:
        if chosen:
            axes.plot(
                *at[chosen].T, marker, color=color, mec="white", mew=0.8, ms=8, label=kind,
                zorder=6,
            )  # fmt: skip
    reach = 0.04 * np.ptp(at, axis=0)
    for place, name in zip(at, names or [""] * len(at), strict=True):
        halo = withStroke(linewidth=2.5, foreground="white")
        axes.text(*(place + reach), name, zorder=7, path_effects=[halo])
    axes.legend(loc="upper left", handletextpad=0.2)


def _component_axes(axes: Any, at: np.ndarray, explained: Any) -> None:
    for k, which in enumerate("xyz"[: at.shape[1]]):
        share = "" if explained is None else f" ({100 * explained[k]:.2g} %)"
        getattr(axes, f"set_{which}label")(f"PC {k + 1}{share}")
        axes.locator_params(axis=which, nbins=4 if at.shape[1] == 3 else 6)
    if at.shape[1] == 3:
        # One scale, as far as a flat complex can still be seen.
        spread = np.ptp(at, axis=0)
        axes.set_box_aspect(np.maximum(spread, 0.4 * spread.max()), zoom=1.0)
    elif np.ptp(at[:, 1]) > 0.25 * np.ptp(at[:, 0]):
        axes.set_aspect("equal", adjustable="datalim")
