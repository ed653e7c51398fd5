"""Curvature of the loss: Hessians, Gauss-Newton and Fisher matrices as operators on parameters."""

from geojax.hessian import output_losses
from geojax.hessian.front import eigenthings, probe
from geojax.hessian.gauss_newton import empirical_fisher, fisher, ggn
from geojax.hessian.heads import chunked_head
from geojax.hessian.operators import (
    hessian,
    layer_blocks,
    off_diagonal_block,
    relative_difference,
)
from geojax.hessian.products import Mode, hvp
from geojax.hessian.selection import Selection, layers, select
from geojax.hessian.trajectory import (
    GradientCurvature,
    Momentum,
    Snapshot,
    Stability,
    Trajectory,
    gradient_curvature,
    gradient_mass,
    principal_angles,
    snapshot,
    stability,
    stability_threshold,
    subspace_overlap,
    track,
)

__all__ = [
    "GradientCurvature",
    "Mode",
    "Momentum",
    "Selection",
    "Snapshot",
    "Stability",
    "Trajectory",
    "chunked_head",
    "eigenthings",
    "empirical_fisher",
    "fisher",
    "ggn",
    "gradient_curvature",
    "gradient_mass",
    "hessian",
    "hvp",
    "layer_blocks",
    "layers",
    "off_diagonal_block",
    "output_losses",
    "principal_angles",
    "probe",
    "relative_difference",
    "select",
    "snapshot",
    "stability",
    "stability_threshold",
    "subspace_overlap",
    "track",
]
