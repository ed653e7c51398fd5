"""Figures of lines: what is written on them can be read."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from geojax import plot


@pytest.mark.parametrize(
    "labels",
    [
        ("train", "test"),
        ("before alignment", "after alignment"),
        ("one network, three times as long", "deep ensemble", "FGE"),
    ],
)
def test_a_legend_over_the_axes_lies_in_the_figure_and_leaves_the_axes_their_width(labels):
    x = np.linspace(0, 1, 5)
    lines = {label: (x, x + i) for i, label in enumerate(labels)}
    panel = {"x": "t", "y": "train loss (nats)", "legend": "above", "lines": lines}
    figure = plot.curves([panel, panel])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        legend = axes.get_legend()
        box = legend.get_window_extent(canvas.get_renderer())
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        # Half of the figure each, less the labels of the y axis.
        assert axes.bbox.width > 0.7 * figure.bbox.width / 2
        assert [text.get_text() for text in legend.get_texts()] == list(labels)
