"""Krylov methods for any symmetric operator on pytrees: eigenpairs, spectra and traces."""

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

__all__ = [
    "Operator",
    "congruence",
    "deflate",
    "dense",
    "from_matrix",
    "identity",
    "project",
    "restrict",
    "shift",
]
