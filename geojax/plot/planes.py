"""The loss on planes: contours at levels that lie closer the lower they are."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from geojax.plot._style import DASHES, STYLE, matplotlib_and_figure

__all__ = ["faces", "levels", "plane"]


def levels(
    values: Any, num: int = 8, *, top: float | None = None, log_offset: float | None = None
) -> np.ndarray:
    r"""Levels that lie closer the lower they are, where a loss is flat.

    :math:`l_i = m + \exp(a + \tfrac{i}{N} (\log(M - m) - a))` for i from 1 to N, and
    :math:`l_0 = m`, between the smallest value m and the largest one M.

    Args:
        values: Any array; what is not finite is left out.
        num: N, the number of bands.
        top: M, if smaller than the largest value.
        log_offset: a, the logarithm of how far :math:`l_1` lies above m, but for one step. By
            default a hundredth of the range.

    Returns:
        `(num + 1,)`, ascending.

    Raises:
        ValueError: If there is no finite value, or no value below `top`; for `num` below 1.

    Example:
        >>> levels([0.0, 100.0], 2).round(6).tolist()
        [0.0, 10.0, 100.0]

    Reference:
        The figures of Garipov et al. 2018, with a = -5 for losses and -1 for errors in percent.
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if num < 1 or not len(values) or (top is not None and top <= values.min()):
        raise ValueError(
            f"levels: expected a finite value below top={top} and num={num} of at least 1."
        )
    low = values.min()
    high = values.max() if top is None else min(top, values.max())
    if not high > low:
        # A flat metric is one band.
        return np.array([low, low + max(abs(low), 1.0) * 1e-3])
    span = np.log(high - low)
    start = span - np.log(100) if log_offset is None else log_offset
    if start >= span:
        raise ValueError(
            f"levels: log_offset is {log_offset}; expected less than the logarithm of the range, "
            f"{span:.4g}."
        )
    out = low + np.exp(np.linspace(start, span, num + 1))
    out[0], out[-1] = low, high
    return out


def plane(
    result: Any,
    metric: str,
    *,
    marks: Any = None,
    path: Any = None,
    top: float | None = None,
    num_levels: int = 8,
    log_offset: float | None = None,
    percent: bool = False,
    label: str | None = None,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> Any:
    """Filled contours of a metric on a plane, at levels that lie closer the lower they are.

    Both axes are distances in weight space, on one scale; where the plane is more than 2.5 times as
    long as high, or the reverse, each has its own, and the label says so. Scattered positions are
    interpolated linearly on their triangulation. Where the metric is NaN the plane is left white;
    infinity lies above the highest level.

    Args:
        result: A `surface.Plane`.
        metric: The name of one of its metrics.
        marks: Points to mark: names for the frame's three points (None leaves one out), or a dict
            from name to coordinates (x, y).
        path: A line to draw: `(n, 2)` coordinates or a `surface.Projection`, or a dict of such.
        top: The highest level; what lies above is one band, at the open end of the colour bar.
        num_levels: The number of bands below that.
        log_offset: As for `levels`.
        percent: The metric is a fraction, shown in %.
        label: Beside the colour bar; by default the metric's name.
        title: Above the figure.
        size: Width and height in inches; by default 4.2 and what the plane's own shape asks for.

    Returns:
        A `matplotlib.figure.Figure`; write it with `png` or its own `savefig`. The data are
        `result.coordinates` and `result.values`.

    Raises:
        ImportError: Without matplotlib.
        ValueError: For a metric that is not there, or marks without coordinates.
    """
    matplotlib, Figure = matplotlib_and_figure()  # noqa: N806
    if metric not in result.values:
        raise ValueError(f"metric is {metric!r}; the plane has {', '.join(result.values)}.")
    places = _places(marks, result)
    x, y = result.coordinates[..., 0], result.coordinates[..., 1]
    z = np.asarray(result.values[metric], np.float64)
    at, drawn, look = _bands(z, num_levels, top, log_offset)
    z = _capped(z, at)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        # Fixed margins in inches: the automatic layout cuts labels off axes of a fixed aspect.
        left, right, under, over = 0.62, 0.95, 0.5, 0.32 if title else 0.12
        slope = np.ptp(y) / np.ptp(x)
        # A plane that is much longer than high would be a ribbon on one scale.
        stretched = not 0.4 < slope < 2.5
        slope = 0.75 if stretched else slope
        wide, high = 4.2 - left - right, float(np.clip((4.2 - left - right) * slope, 1.3, 5.0))
        if size is None:
            wide = max(min(wide, high / slope), 0.8)
            size = left + wide + right, under + high + over
        wide, high = size[0] - left - right, size[1] - under - over
        figure = Figure(figsize=size, layout="none")
        axes = figure.add_axes(
            (left / size[0], under / size[1], wide / size[0], high / size[1]),
        )
        wide = min(wide, high / slope)
        if z.ndim == 2:
            z = np.ma.masked_invalid(z)
            filled = axes.contourf(x, y, z, **look)
            axes.contour(x, y, z, levels=at[1:-1], colors="white", linewidths=0.5, alpha=0.7)
        else:
            known = np.isfinite(z)
            filled = axes.tricontourf(x[known], y[known], z[known], **look)
            axes.tricontour(
                x[known], y[known], z[known], levels=at[1:-1], colors="white", linewidths=0.5,
                alpha=0.7,
            )  # fmt: skip
        _paths(axes, path)
        axes.set_aspect("auto" if stretched else "equal", anchor="W")
        axes.set_xlim(x.min(), x.max())
        axes.set_ylim(y.min(), y.max())
        _marks(axes, places)
        axes.set_xlabel("distance along $e_1$")
        axes.set_ylabel("distance along $e_2$" + (" (own scale)" if stretched else ""))
        if title:
            axes.set_title(title, loc="left")
        # Beside the plane and as high as it is, whatever its shape.
        beside = axes.inset_axes((1 + 0.08 / wide, 0.0, 0.14 / wide, 1.0))
        bar = figure.colorbar(filled, cax=beside, spacing="uniform", ticks=drawn)
        _dress(bar, at, percent, metric if label is None else label)
        return figure


def _bands(values: np.ndarray, num_levels: int, top: Any, log_offset: Any) -> Any:
    """The levels, the same a hair wider so that both ends are drawn, and how contours look."""
    matplotlib, _ = matplotlib_and_figure()
    from matplotlib.colors import BoundaryNorm

    at = levels(values, num_levels, top=top, log_offset=log_offset)
    above = bool((values[~np.isnan(values)] > at[-1]).any())
    drawn = at.copy()
    # The largest value itself belongs to the highest band.
    drawn[-1] += 0 if above else 1e-9 * (at[-1] - at[0])
    drawn[0] -= 1e-9 * (at[-1] - at[0])
    extend = "max" if above else "neither"
    colors = matplotlib.colormaps["viridis"]
    bands = len(at) - 1 + above
    shades = matplotlib.colors.ListedColormap(colors(np.linspace(1.0, 0.08, max(bands, 2))))
    return at, drawn, {"levels": drawn, "extend": extend, "cmap": shades,
                       "norm": BoundaryNorm(drawn, max(bands, 2), extend=extend)}  # fmt: skip


def _capped(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Infinity as a number above all levels, which contours need."""
    return np.where(values == np.inf, at[-1] + 1e3 * (at[-1] - at[0]), values)


def _dress(bar: Any, at: np.ndarray, percent: bool, label: str) -> None:
    """The labels of a colour bar of levels."""
    bar.ax.set_yticklabels(_names(100 * at if percent else at, " %" if percent else ""))
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    bar.set_label(label)


def _names(values: np.ndarray, unit: str) -> list[str]:
    """Numbers with as few digits as tell neighbours apart."""
    for digits in range(2, 8):
        names = [f"{value:.{digits}g}{unit}" for value in values]
        if len(set(names)) == len(names):
            break
    return names  # pyright: ignore[reportPossiblyUnboundVariable]


def _places(marks: Any, result: Any) -> dict[str, np.ndarray]:
    if marks is None:
        return {}
    if isinstance(marks, Mapping):
        named = {name: np.asarray(place, np.float64) for name, place in marks.items()}
        if any(place.shape != (2,) for place in named.values()):
            raise ValueError("marks: expected coordinates (x, y) for each name.")
        return named
    if isinstance(marks, str) or len(marks) != len(result.frame.points):
        raise ValueError(
            f"marks: got {marks!r}; expected names for the plane's {len(result.frame.points)} "
            "points, or a dict from name to (x, y)."
        )
    pairs = zip(marks, result.frame.points, strict=True)
    return {name: place for name, place in pairs if name is not None}


def _marks(axes: Any, places: Mapping[str, np.ndarray]) -> None:
    """Dots with their names beside them, readable on any colour."""
    from matplotlib.patheffects import withStroke

    ends = np.array([axes.get_xlim(), axes.get_ylim()])
    for name, place in places.items():
        axes.plot(*place, "o", color="black", mec="white", mew=1.0, ms=6, zorder=5)
        # Away from the right and the upper edge; a name is about so wide, in parts of the axis.
        inches = axes.get_position().width * axes.figure.get_figwidth()
        room = 1 - (0.1 + 0.075 * len(name)) / max(inches, 0.5)
        left, under = (place - ends[:, 0]) / np.ptp(ends, axis=1) > (max(room, 0.4), 0.9)
        axes.annotate(
            name, place, xytext=(-6 if left else 6, -5 if under else 5),
            ha="right" if left else "left", va="top" if under else "bottom", zorder=6,
            textcoords="offset points", annotation_clip=True,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip


def _paths(axes: Any, path: Any) -> None:
    from matplotlib.patheffects import withStroke

    if path is None:
        return
    lines = path if isinstance(path, Mapping) else {"": path}
    for i, (name, line) in enumerate(lines.items()):
        line = np.asarray(getattr(line, "coordinates", line), np.float64)
        if line.ndim != 2 or line.shape[1] != 2:
            raise ValueError(f"path: {name!r} has shape {line.shape}; expected (n, 2).")
        axes.plot(
            *line.T, color="black", linestyle=DASHES[i % len(DASHES)], lw=1.3, label=name or None,
            zorder=4, path_effects=[withStroke(linewidth=2.6, foreground="white")],
        )  # fmt: skip
    if any(lines):
        legend = axes.legend(frameon=True, framealpha=0.85, edgecolor="none")
        legend.set_zorder(7)


def faces(
    results: Sequence[Any],
    metric: str,
    *,
    names: Sequence[str] | None = None,
    columns: int = 2,
    top: float | None = None,
    num_levels: int = 8,
    log_offset: float | None = None,
    percent: bool = False,
    label: str | None = None,
    size: float = 2.5,
) -> Any:
    """A mosaic of contour panels on the planes of triangles, in one scale of colours.

    Args:
        results: What `surface.faces` returns.
        metric: The name of one of the metrics.
        names: Of the vertices, by their index; by default the index itself.
        columns: Panels side by side.
        top: The highest level; what lies above is one band, at the open end of the colour bar.
        num_levels: The number of bands below that, which are those of all panels together.
        log_offset: As for `levels`.
        percent: The metric is a fraction, shown in %.
        label: Beside the colour bar; by default the metric's name.
        size: Width and height of a panel in inches.

    Returns:
        A `matplotlib.figure.Figure`; write it with `png` or its own `savefig`.

    Raises:
        ImportError: Without matplotlib.
        ValueError: If there is no face, or a metric that is not there; for names that are too few.
    """
    matplotlib, Figure = matplotlib_and_figure()  # noqa: N806
    from matplotlib.patheffects import withStroke

    if not len(results):
        raise ValueError("faces: expected at least one face, got none.")
    most = max(i for face in results for i in face.triangle)
    if names is not None and len(names) <= most:
        raise ValueError(f"names: got {len(names)}; expected one for each vertex up to {most}.")
    for face in results:
        if metric not in face.plane.values:
            raise ValueError(f"metric is {metric!r}; a face has {', '.join(face.plane.values)}.")
    values = [np.asarray(face.plane.values[metric], np.float64) for face in results]
    pooled = np.concatenate([z.ravel() for z in values])
    at, drawn, look = _bands(pooled, num_levels, top, log_offset)
    called = [str(i) for i in range(most + 1)] if names is None else list(names)
    columns = min(columns, len(results))
    rows = -(-len(results) // columns)
    style = {**STYLE, "axes.grid": False, "figure.constrained_layout.use": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(size * columns + 0.9, size * rows + 0.2), layout="compressed")
        all_axes = np.ravel(figure.subplots(rows, columns, squeeze=False))
        for axes, face, z in zip(all_axes, results, values, strict=False):
            x, y = face.plane.coordinates[..., 0], face.plane.coordinates[..., 1]
            z = np.ma.masked_invalid(_capped(z, at))
            filled = axes.contourf(x, y, z, **look)
            axes.contour(x, y, z, levels=at[1:-1], colors="white", linewidths=0.4, alpha=0.7)
            corners = np.asarray(face.plane.frame.points)
            axes.plot(
                *corners[[0, 1, 2, 0]].T, color="black", lw=1.3, zorder=4,
                path_effects=[withStroke(linewidth=2.6, foreground="white")],
            )  # fmt: skip
            axes.set_aspect("equal")
            axes.set_xlim(x.min(), x.max())
            axes.set_ylim(y.min(), y.max())
            _corner_names(axes, corners, [called[i] for i in face.triangle])
            axes.locator_params(nbins=4)
        for axes in all_axes[len(results) :]:
            axes.set_axis_off()
        bar = figure.colorbar(
            filled, ax=all_axes.tolist(), spacing="uniform", ticks=drawn, aspect=14 * rows,  # pyright: ignore[reportPossiblyUnboundVariable]
            pad=0.02,
        )  # fmt: skip
        _dress(bar, at, percent, metric if label is None else label)
        figure.supxlabel("distance along $e_1$", fontsize=9)
        figure.supylabel("distance along $e_2$", fontsize=9)
        return figure


def _corner_names(axes: Any, corners: np.ndarray, names: Sequence[str]) -> None:
    """Dots at the corners of a triangle, their names outside of it."""
    from matplotlib.patheffects import withStroke

    for corner, name in zip(corners, names, strict=True):
        axes.plot(*corner, "o", color="black", mec="white", mew=1.0, ms=5, zorder=5)
        out = corner - corners.mean(0)
        out = 9 * out / max(float(np.hypot(*out)), 1e-12)
        axes.annotate(
            name, corner, xytext=tuple(out), textcoords="offset points", zorder=6,
            ha="left" if out[0] > 3 else "right" if out[0] < -3 else "center", va="center",
            annotation_clip=True,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip
