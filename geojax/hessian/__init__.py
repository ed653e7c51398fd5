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

__all__ = [
    "Mode",
    "Selection",
    "chunked_head",
    "eigenthings",
    "empirical_fisher",
    "fisher",
    "ggn",
    "hessian",
    "hvp",
    "layer_blocks",
    "layers",
    "off_diagonal_block",
    "output_losses",
    "relative_difference",
    "probe",
    "select",
]
