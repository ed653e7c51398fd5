"""Figures from result objects. matplotlib lives here alone, without a display and without LaTeX."""

from geojax.plot._style import png
from geojax.plot.complexes import complex
from geojax.plot.decisions import bands, boundaries
from geojax.plot.lines import curves, density
from geojax.plot.planes import faces, levels, plane
from geojax.plot.reliability import reliability

__all__ = [
    "bands",
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
