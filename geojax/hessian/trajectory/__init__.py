"""Curvature along a training run: eigenpairs that are followed, subspaces that are compared.

Also what they say about training: gradients within the top subspace, and the edge of stability.
"""

from geojax.hessian.trajectory.sharpness import (
    GradientCurvature,
    Momentum,
    Stability,
    gradient_curvature,
    stability,
    stability_threshold,
)
from geojax.hessian.trajectory.subspaces import gradient_mass, principal_angles, subspace_overlap
from geojax.hessian.trajectory.tracking import Snapshot, Trajectory, snapshot, track

__all__ = [
    "GradientCurvature",
    "Momentum",
    "Snapshot",
    "Stability",
    "Trajectory",
    "gradient_curvature",
    "gradient_mass",
    "principal_angles",
    "snapshot",
    "stability",
    "stability_threshold",
    "subspace_overlap",
    "track",
]
