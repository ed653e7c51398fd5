"""geojax: the geometry of neural-network loss surfaces, for any parameter pytree.

A network is a point, a point is a pytree, and everything here is a function over such points.
Importing this package starts no backend and loads no optional dependency.
"""

from importlib.metadata import version as _version

from geojax import (
    batches,
    checkpoint,
    datasets,
    fit,
    hessian,
    krylov,
    models,
    objectives,
    plot,
    progress,
    report,
    statistics,
    surface,
    tree,
)

__version__ = _version("geojax")
__all__ = [
    "__version__",
    "batches",
    "checkpoint",
    "datasets",
    "fit",
    "hessian",
    "krylov",
    "models",
    "objectives",
    "plot",
    "progress",
    "report",
    "statistics",
    "surface",
    "tree",
]
