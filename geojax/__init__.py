"""geojax: the geometry of neural-network loss surfaces, for any parameter pytree.

A network is a point, a point is a pytree, and everything here is a function over such points.
Importing this package starts no backend and loads no optional dependency; each module is loaded
when it is first used.
"""

import importlib
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geojax import (
        assignment,
        batches,
        checkpoint,
        curves,
        datasets,
        ensemble,
        fit,
        hessian,
        krylov,
        models,
        objectives,
        permute,
        plot,
        progress,
        report,
        simplex,
        statistics,
        surface,
        symmetry,
        tree,
    )

__version__ = _version("geojax")
__all__ = [
    "__version__",
    "assignment",
    "batches",
    "checkpoint",
    "curves",
    "datasets",
    "ensemble",
    "fit",
    "hessian",
    "krylov",
    "models",
    "objectives",
    "permute",
    "plot",
    "progress",
    "report",
    "simplex",
    "statistics",
    "surface",
    "symmetry",
    "tree",
]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"geojax.{name}")
    raise AttributeError(f"module 'geojax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
