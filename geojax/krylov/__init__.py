"""Krylov methods for any symmetric operator on pytrees: eigenpairs, spectra and traces."""

from geojax.krylov.checks import Checks, OperatorError, check
from geojax.krylov.density import Curve, SpectralDensity
from geojax.krylov.eigen import eigsh
from geojax.krylov.estimators import (
    Estimate,
    TraceEstimate,
    VectorEstimate,
    diagonal,
    effective_rank,
    frobenius_norm,
    row_norms,
    trace,
)
from geojax.krylov.interior import eigsh_interior
from geojax.krylov.lobpcg import lobpcg
from geojax.krylov.minres import Solution, minres
from geojax.krylov.nystrom import Nystrom, nystrom
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
from geojax.krylov.power import (
    StochasticEigenpair,
    power_iteration,
    stochastic_power_iteration,
)
from geojax.krylov.quadrature import quadratic_form, spectral_density, tridiagonalize
from geojax.krylov.results import Eigenpairs, Which
from geojax.krylov.smallest import SmallestEigenvalue, smallest_eigenvalue

__all__ = [
    "Checks",
    "Curve",
    "Eigenpairs",
    "Estimate",
    "Nystrom",
    "Operator",
    "OperatorError",
    "SmallestEigenvalue",
    "Solution",
    "SpectralDensity",
    "StochasticEigenpair",
    "TraceEstimate",
    "VectorEstimate",
    "Which",
    "check",
    "congruence",
    "deflate",
    "dense",
    "diagonal",
    "effective_rank",
    "eigsh",
    "eigsh_interior",
    "frobenius_norm",
    "from_matrix",
    "identity",
    "lobpcg",
    "minres",
    "nystrom",
    "power_iteration",
    "project",
    "quadratic_form",
    "restrict",
    "row_norms",
    "shift",
    "smallest_eigenvalue",
    "spectral_density",
    "stochastic_power_iteration",
    "trace",
    "tridiagonalize",
]
