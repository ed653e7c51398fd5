"""Statistics of activations at any point of weight space: the exact ones, for any model.

Running statistics of normalisation layers are computed from a data set (`refresh`), and so are the
corrections that give the units of a merged network the statistics of its endpoints (`repair`).
"""

from geojax.statistics.running import refresh, refresh_points, statistic_paths
from geojax.statistics.units import RepairResult, UnitMoments, repair, unit_paths

__all__ = [
    "RepairResult",
    "UnitMoments",
    "refresh",
    "refresh_points",
    "repair",
    "statistic_paths",
    "unit_paths",
]
