"""Figures from result objects. matplotlib lives here alone, without a display and without LaTeX."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["curves", "png"]

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
            shown in %), 'marks' (a dict from label to (x, y) of single points).
        size: Width and height of a panel in inches.

    Returns:
        A `matplotlib.figure.Figure`; write it with `png` or its own `savefig`.

    Raises:
        ImportError: Without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise ImportError(
            'figures need matplotlib; install it with `pip install "geojax[plot]"`.'
        ) from error
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
                axes.plot(x, y, "o" if j == 0 else "s", color="#444444", ms=4, ls="", label=label)
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
            if len(panel["lines"]) + len(panel.get("marks", {})) > 1:
                axes.legend()
        return figure


def png(figure: Any) -> bytes:
    """The figure as the bytes of a PNG at 200 dots an inch, with no date in it."""
    import io

    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
