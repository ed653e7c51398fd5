"""Krylov methods for any symmetric operator on pytrees: eigenpairs, spectra and traces."""

from geojax.krylov.eigen import eigsh
from geojax.krylov.operators import (
    Operator,
    congruence,
    deflate,
    dense,
    from_matrix,
    identity,
    project,
    restrict,
    shift,
)
from geojax.krylov.results import Eigenpairs

__all__ = [
    "Eigenpairs",
    "Operator",
    "congruence",
    "deflate",
    "dense",
    "eigsh",
    "from_matrix",
    "identity",
    "project",
    "restrict",
    "shift",
]
