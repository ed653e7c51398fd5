"""Permutation symmetries of networks: which axes of which leaves may be permuted together.

A spec is read off the model's own jaxpr, or written by hand; either way it can be proved.
"""

from geojax.symmetry.spec import (
    Concatenation,
    Factor,
    Group,
    Leaf,
    PermutationSpec,
    Product,
    SpecError,
)

__all__ = [
    "Concatenation",
    "Factor",
    "Group",
    "Leaf",
    "PermutationSpec",
    "Product",
    "SpecError",
]
