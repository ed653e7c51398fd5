"""Figures from result objects. matplotlib lives here alone, without a display and without LaTeX."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
    "boundaries",
    "complex",
    "curves",
    "density",
    "faces",
    "levels",
    "plane",
    "png",
    "reliability",
]

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), "-.")
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}


def _matplotlib() -> tuple[Any, Any]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'figures need matplotlib; install it with `pip install "geojax[plot]"`.'
        ) from error
    return matplotlib, Figure


def curves(
    panels: Sequence[Mapping[str, Any]],
    *,
    size: tuple[float, float] = (3.4, 2.6),
) -> Any:
    """Panels of lines side by side.

    Args:
        panels: One mapping for each panel: 'x' and 'y' labels of the axes; 'lines', a dict from
            label to (x values, y values) or (x values, y values, half width of a band); and
            optionally 'title', 'log' (a logarithmic y axis), 'percent' (y values are fractions,
            shown in %), 'marks' (a dict from label to (x, y) of single points), 'legend' ("above"
            the axes instead of inside), 'integers' (x counts something).
        size: Width and height of a panel in inches.

    Returns:
        A `matplotlib.figure.Figure`; write it with `png` or its own `savefig`.

    Raises:
        ImportError: Without matplotlib.
    """
    matplotlib, Figure = _matplotlib()  # noqa: N806
    from matplotlib.ticker import PercentFormatter

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(size[0] * len(panels), size[1]))
        for i, panel in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), i + 1)
            for j, (label, line) in enumerate(panel["lines"].items()):
                color = _COLORS[j % len(_COLORS)]
                x, y = np.asarray(line[0]), np.asarray(line[1])
                axes.plot(x, y, color=color, linestyle=_DASHES[j % len(_DASHES)], label=label)
                if len(line) == 3:
                    axes.fill_between(x, y - line[2], y + line[2], color=color, alpha=0.2, lw=0)
            for j, (label, (x, y)) in enumerate(panel.get("marks", {}).items()):
                look = {"color": "#444444", "ms": 4, "ls": "", "clip_on": False}
                axes.plot(x, y, "o" if j == 0 else "s", label=label, **look)
            axes.set_xlabel(panel["x"])
            axes.set_ylabel(panel["y"])
            if panel.get("title"):
                axes.set_title(panel["title"], loc="left")
            if panel.get("log"):
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if panel.get("percent") else None)
            if panel.get("percent"):
                axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, symbol=" %"))
            if panel.get("integers"):
                axes.xaxis.get_major_locator().set_params(integer=True)
            if len(panel["lines"]) + len(panel.get("marks", {})) > 1:
                # Over the axes, in two columns, where many lines would run behind it.
                above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2}
                axes.legend(**(above if panel.get("legend") == "above" else {}))
        return figure


def density(
    panels: Any,
    *,
    size: tuple[float, float] = (3.4, 2.6),
) -> Any:
    """Spectral densities with their bands, on a logarithmic y axis.

    Deflated eigenvalues are stems, as high as the kernel makes one eigenvalue; the curve is that of
    the others. The y axis ends a decade below that height: there is less than an eigenvalue there.

    Args:
        panels: One `krylov.density.SpectralDensity` or `Curve`, or one mapping for each panel:
            'lines', a dict from label to such a result; and optionally 'title', 'x' and 'y', the
            labels of the axes. The x axis is that of the curves: 'linear', 'log' or 'symlog'.
        size: Width and height of a panel in inches.

    Returns:
        A `matplotlib.figure.Figure`; write it with `png` or its own `savefig`.

    Raises:
        ImportError: Without matplotlib.
        ValueError: If the curves of a panel have different axes, or there are none.
    """
    matplotlib, Figure = _matplotlib()  # noqa: N806
    if hasattr(panels, "curve") or hasattr(panels, "coordinate"):
        panels = [{"lines": {"": panels}}]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(size[0] * len(panels), size[1]))
        for i, panel in enumerate(panels):
            lines = {k: getattr(v, "curve", v) for k, v in panel["lines"].items()}
            kinds = {
                (curve.axis, curve.axis == "symlog" and curve.epsilon) for curve in lines.values()
            }
            if len(kinds) != 1:
                raise ValueError(
                    f"panel {i}: expected curves on one axis (and one epsilon), got {len(kinds)}; "
                    "give `axis` and `epsilon` to `density` of each result."
                )
            axes = figure.add_subplot(1, len(panels), i + 1)
            single = [1 / (c.size * c.width * np.sqrt(2 * np.pi)) for c in lines.values()]
            bottom, top = 0.1 * min(single), max(single)
            for j, (label, curve) in enumerate(lines.items()):
                color = _COLORS[j % len(_COLORS)]
                x = curve.grid if curve.axis == "log" else curve.coordinate
                y, low, high = (
                    np.maximum(part - curve.spikes, 1e-3 * bottom)
                    for part in (curve.values, curve.lower, curve.upper)
                )
                axes.plot(x, y, color=color, linestyle=_DASHES[j % len(_DASHES)], label=label)
                if np.isfinite(high).all():
                    axes.fill_between(x, low, high, color=color, alpha=0.25, lw=0)
                top = max(top, float(y.max()))
                if len(curve.deflated):
                    _stems(axes, curve, single[j], bottom, color if len(lines) > 1 else "#444444")
            _eigenvalue_axis(axes, next(iter(lines.values())))
            axes.set_yscale("log")
            # Room for the legend, which would else lie on the stems.
            named = sum(map(bool, lines)) if len(lines) > 1 else 0
            axes.set_ylim(bottom, 3 * top * (top / bottom) ** (0.14 * named))
            kind = next(iter(kinds))[0]
            labels = {
                "linear": ("eigenvalue", "density"),
                "log": ("magnitude of eigenvalue", "density of log |eigenvalue|"),
                "symlog": ("eigenvalue", "density, symlog scale"),
            }[kind]
            axes.set_xlabel(panel.get("x", labels[0]))
            axes.set_ylabel(panel.get("y", labels[1]))
            if panel.get("title"):
                axes.set_title(panel["title"], loc="left")
            if named:
                axes.legend(loc="upper right")
        return figure


def _stems(axes: Any, curve: Any, height: float, bottom: float, color: str) -> None:
    """The deflated eigenvalues of a curve."""
    values = curve.deflated
    if curve.axis == "log":
        values = np.abs(values) + curve.epsilon
    elif curve.axis == "symlog":
        values = np.sign(values) * np.log1p(np.abs(values) / curve.epsilon)
    ends = curve.grid if curve.axis == "log" else curve.coordinate
    values = values[(values >= ends[0]) & (values <= ends[-1])]
    axes.vlines(values, bottom, height, color=color, lw=1.0)
    axes.plot(values, np.full(len(values), height), "o", color=color, ms=3)


def _eigenvalue_axis(axes: Any, curve: Any) -> None:
    """The x axis of a curve: positions are coordinates, labels eigenvalues."""
    if curve.axis == "log":
        axes.set_xscale("log")
    if curve.axis != "symlog":
        return
    low, high = curve.grid[0], curve.grid[-1]
    most = int(np.floor(np.log10(max(-low, high))))
    powers = 10.0 ** np.arange(most, np.floor(np.log10(curve.epsilon)) - 1, -1)
    chosen = {0.0: 0.0}
    for tick in (sign * power for power in powers for sign in (1, -1)):
        place = np.sign(tick) * np.log1p(abs(tick) / curve.epsilon)
        far = min(abs(place - other) for other in chosen.values()) > 0.16 * np.ptp(curve.coordinate)
        if low <= tick <= high and far:
            chosen[tick] = place

    def name(tick: float) -> str:
        if tick == 0:
            return "0"
        sign = "-" if tick < 0 else ""
        return f"${sign}10^{{{round(np.log10(abs(tick)))}}}$"

    axes.set_xticks(list(chosen.values()), [name(tick) for tick in chosen])


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
    matplotlib, Figure = _matplotlib()  # noqa: N806
    if metric not in result.values:
        raise ValueError(f"metric is {metric!r}; the plane has {', '.join(result.values)}.")
    places = _places(marks, result)
    x, y = result.coordinates[..., 0], result.coordinates[..., 1]
    z = np.asarray(result.values[metric], np.float64)
    at, drawn, look = _bands(z, num_levels, top, log_offset)
    z = _capped(z, at)
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
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
    matplotlib, _ = _matplotlib()
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
            *line.T, color="black", linestyle=_DASHES[i % len(_DASHES)], lw=1.3, label=name or None,
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
    matplotlib, Figure = _matplotlib()  # noqa: N806
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
    style = {**_STYLE, "axes.grid": False, "figure.constrained_layout.use": False}
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
    matplotlib, Figure = _matplotlib()  # noqa: N806
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
    with matplotlib.rc_context({**_STYLE, "axes.grid": depth == 3}):
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
    look = {"facecolors": _COLORS[5], "edgecolors": "none", "alpha": 0.16, "zorder": 1}
    if at.shape[1] == 3:
        from mpl_toolkits.mplot3d.art3d import Poly3DCollection

        axes.add_collection3d(Poly3DCollection(parts(3), **look))
    else:
        axes.add_collection(PolyCollection(parts(3), **look))


def _vertices(axes: Any, at: np.ndarray, modes: set[int], names: Any) -> None:
    from matplotlib.patheffects import withStroke

    other = "connector" if len(modes) > 1 else "added vertex" if modes else "vertex"
    kinds = (
        ("network", "o", _COLORS[1], [i for i in range(len(at)) if i in modes]),
        (other, "s", _COLORS[0], [i for i in range(len(at)) if i not in modes]),
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
    matplotlib, Figure = _matplotlib()  # noqa: N806
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
    style = {**_STYLE, "axes.grid": False, "figure.constrained_layout.use": False}
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


def reliability(
    calibration: Any,
    *,
    title: str | None = None,
    size: tuple[float, float] = (3.4, 3.8),
) -> Any:
    """Reliability diagrams: accuracy against confidence, and how many examples are in each bin.

    Bars are Wilson's 95 % intervals of the accuracy, wide where a bin holds few examples. The bins
    of 'classwise' are pooled over the classes.

    Args:
        calibration: An `ensemble.Calibration`, or a dict from label to such.
        title: Above the figure.
        size: Width and height in inches.

    Returns:
        A `matplotlib.figure.Figure`; write it with `png` or its own `savefig`.

    Raises:
        ImportError: Without matplotlib.
    """
    matplotlib, Figure = _matplotlib()  # noqa: N806
    from matplotlib.ticker import PercentFormatter

    given = calibration if isinstance(calibration, Mapping) else {"": calibration}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot([0, 1], [0, 1], color="#888888", lw=1.0, zorder=1)
        low = 1.0
        for j, (label, found) in enumerate(given.items()):
            color = _COLORS[j % len(_COLORS)]
            counts, confidence, accuracy = _pooled(found.bins)
            known = counts > 0
            ece = f"ECE {100 * found.ece.value:.1f} ± {100 * found.ece.standard_error:.1f} %"
            above.errorbar(
                confidence[known], accuracy[known], _wilson(accuracy[known], counts[known]),
                color=color, linestyle=_DASHES[j % len(_DASHES)], marker="o", ms=3.5,
                elinewidth=1.0, label=f"{label}: {ece}" if label else ece, zorder=3 + j,
            )  # fmt: skip
            below.stairs(
                counts / counts.sum(), found.bins.edges, color=color, lw=1.3, fill=len(given) == 1,
                linestyle=_DASHES[j % len(_DASHES)],
            )  # fmt: skip
            low = min(low, found.bins.edges[:-1][known].min())
        above.set_xlim(low - 0.015 * (1 - low), 1 + 0.015 * (1 - low))
        above.set_ylim(-0.02, 1.02)
        above.set_ylabel("accuracy")
        # Above the diagram: within it there is no corner that every curve avoids.
        above.legend(loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, handlelength=2.2)
        below.set_ylabel("examples")
        below.set_xlabel("confidence")
        below.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, symbol=" %", decimals=0))
        if title:
            figure.suptitle(title, x=0.02, ha="left", fontsize=10)
        figure.align_ylabels([above, below])
        return figure


def _pooled(bins: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, confidence and accuracy of each bin, over all classes."""
    if bins.counts.ndim == 1:
        return bins.counts, bins.confidence, bins.accuracy
    counts = bins.counts.sum(0)
    with np.errstate(invalid="ignore"):
        confidence, accuracy = (
            np.nansum(bins.counts * part, axis=0) / counts
            for part in (bins.confidence, bins.accuracy)
        )
    return counts, confidence, accuracy


def _wilson(share: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How far the 95 % interval of a share reaches below and above it, `(2, n)`."""
    z = 1.96**2 / counts
    center = (share + z / 2) / (1 + z)
    half = np.sqrt(z * share * (1 - share) + z * z / 4) / (1 + z)
    return np.maximum(np.stack([share - center + half, center + half - share]), 0)


def png(figure: Any) -> bytes:
    """The figure as the bytes of a PNG at 200 dots an inch, with no date in it."""
    import io

    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
