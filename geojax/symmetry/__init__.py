"""Permutation symmetries of networks: which axes of which leaves may be permuted together.

A spec is read off the model's own jaxpr, or written by hand; either way it can be proved.
"""

from geojax.symmetry.builders import (
    bottleneck,
    conv,
    dense,
    from_axes,
    norm,
    residual_block,
    shortcut_block,
    validate,
)
from geojax.symmetry.kinds import with_kinds
from geojax.symmetry.proof import CheckReport, Missed, check, completeness
from geojax.symmetry.spec import (
    Concatenation,
    Factor,
    Group,
    Leaf,
    PermutationSpec,
    Product,
    SpecError,
)
from geojax.symmetry.trace import permutation_spec

__all__ = [
    "CheckReport",
    "Concatenation",
    "Factor",
    "Group",
    "Leaf",
    "Missed",
    "PermutationSpec",
    "Product",
    "SpecError",
    "bottleneck",
    "check",
    "completeness",
    "conv",
    "dense",
    "from_axes",
    "norm",
    "permutation_spec",
    "residual_block",
    "shortcut_block",
    "validate",
    "with_kinds",
]
