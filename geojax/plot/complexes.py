"""Complexes projected, and what networks decide in the plane of their inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from geojax.plot._style import COLORS, STYLE, matplotlib_and_figure

__all__ = ["boundaries", "complex"]


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


def boundaries(
    panels: Mapping[str, Any],
    coordinates: Any,
    *,
    inputs: Any = None,
    labels: Any = None,
    columns: int = 3,
    size: float = 2.1,
) -> Any:
    """What networks of two classes say of a plane of inputs: probabilities and decision boundaries.

    The black line is where both classes are equally likely.

    Args:
        panels: From a title to `(num_y, num_x)` probabilities of class 1, such as those of samples
            from a simplex and of their ensemble.
        coordinates: `(num_y, num_x, 2)`: the inputs, entry [i, j] is (x_j, y_i).
        inputs: `(n, 2)`: examples to mark.
        labels: `(n,)`: their classes, 0 or 1.
        columns: Panels side by side.
        size: Width and height of a panel in inches.

    Returns:
        A `matplotlib.figure.Figure`; write it with `png` or its own `savefig`.

    Raises:
        ImportError: Without matplotlib.
        ValueError: For shapes that do not fit together, values outside of [0, 1], or no panel.
    """
    matplotlib, Figure = matplotlib_and_figure()  # noqa: N806
    places = np.asarray(coordinates, np.float64)
    if places.ndim != 3 or places.shape[-1] != 2 or not panels:
        raise ValueError(
            f"boundaries: coordinates have shape {places.shape} and there are {len(panels)} "
            "panels; expected (num_y, num_x, 2) and at least one."
        )
    for title, found in panels.items():
        found = np.asarray(found)
        if found.shape != places.shape[:2] or not ((found >= 0) & (found <= 1)).all():
            raise ValueError(
                f"boundaries: panel {title!r} has shape {found.shape}; expected probabilities "
                f"{places.shape[:2]}, from 0 to 1."
            )
    if (inputs is None) != (labels is None) or np.shape(labels) != np.shape(inputs)[:1]:
        raise ValueError("boundaries: expected inputs (n, 2) and labels (n,), or neither.")
    x, y = places[..., 0], places[..., 1]
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    style = {**STYLE, "axes.grid": False, "figure.constrained_layout.use": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(size * columns + 0.8, (size + 0.25) * rows), layout="compressed")
        all_axes = np.ravel(figure.subplots(rows, columns, squeeze=False))
        for axes, (title, found) in zip(all_axes, panels.items(), strict=False):
            found = np.asarray(found, np.float64)
            filled = axes.contourf(x, y, found, levels=np.linspace(0, 1, 11), cmap="PuOr_r")
            if found.min() < 0.5 < found.max():
                axes.contour(x, y, found, levels=[0.5], colors="black", linewidths=1.1)
            for which, (marker, color) in enumerate((("o", "#CDBFE3"), ("^", "#FFD58A"))):
                if inputs is not None:
                    chosen = np.asarray(inputs)[np.asarray(labels) == which]
                    axes.plot(*chosen.T, marker, color=color, mec="black", mew=0.5, ms=3.6)
            axes.set_aspect("equal")
            axes.set_xlim(x.min(), x.max())
            axes.set_ylim(y.min(), y.max())
            axes.set_title(title, loc="left", fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
        for axes in all_axes[len(panels) :]:
            axes.set_axis_off()
        bar = figure.colorbar(
            filled, ax=all_axes.tolist(), ticks=[0, 0.5, 1], aspect=14 * rows, pad=0.02  # pyright: ignore[reportPossiblyUnboundVariable]
        )  # fmt: skip
        bar.outline.set_visible(False)
        bar.set_label("probability of class 1")
        return figure
