"""Lines over an axis: curves of any kind, and spectral densities."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from geojax.plot._style import COLORS, DASHES, STYLE, matplotlib_and_figure

__all__ = ["curves", "density"]


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
    matplotlib, Figure = matplotlib_and_figure()  # noqa: N806
    from matplotlib.ticker import PercentFormatter

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size[0] * len(panels), size[1]))
        for i, panel in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), i + 1)
            for j, (label, line) in enumerate(panel["lines"].items()):
                color = COLORS[j % len(COLORS)]
                x, y = np.asarray(line[0]), np.asarray(line[1])
                axes.plot(x, y, color=color, linestyle=DASHES[j % len(DASHES)], label=label)
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
                # Over the axes where many lines would run behind it.
                axes.legend(**(_above(axes, size[0]) if panel.get("legend") == "above" else {}))
        return figure


def _above(axes: Any, width: float) -> dict[str, Any]:
    """Options of a legend over the axes, in two columns where a panel that wide has room."""
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    look = {"handlelength": 1.6, "handletextpad": 0.6, "columnspacing": 1.2, "borderpad": 0.0}
    em = FontProperties(size=rcParams["legend.fontsize"]).get_size_in_points()
    labels = axes.get_legend_handles_labels()[1]
    wide = [TextPath((0, 0), label, size=em).get_extents().width for label in labels]
    half = -(-len(wide) // 2)
    columns = max(wide[:half]) + max(wide[half:])
    around = 2 * (look["handlelength"] + look["handletextpad"]) + look["columnspacing"]
    # The y axis with its labels, and what is around it, take about 0.8 inches of the panel.
    fits = columns + around * em <= 72 * (width - 0.8)
    return look | {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2 if fits else 1}


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
    matplotlib, Figure = matplotlib_and_figure()  # noqa: N806
    if hasattr(panels, "curve") or hasattr(panels, "coordinate"):
        panels = [{"lines": {"": panels}}]
    with matplotlib.rc_context(STYLE):
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
                color = COLORS[j % len(COLORS)]
                x = curve.grid if curve.axis == "log" else curve.coordinate
                y, low, high = (
                    np.maximum(part - curve.spikes, 1e-3 * bottom)
                    for part in (curve.values, curve.lower, curve.upper)
                )
                axes.plot(x, y, color=color, linestyle=DASHES[j % len(DASHES)], label=label)
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
