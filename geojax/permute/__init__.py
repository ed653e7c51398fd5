"""Networks modulo permutation symmetry: align, interpolate and merge them.

A network is the same function after its hidden units are permuted. Two trained networks that lie
in different valleys of the loss often lie in one, once the units of one are matched with the
other's: then the straight line between them has low loss, and their mean is a network.
"""

from geojax.permute.many import ManyResult, cycle_consistent_matching, merge_many, synchronize
from geojax.permute.matching import Candidate, MatchingResult, Step, weight_matching
from geojax.permute.scales import Balanced, balance
from geojax.symmetry.action import (
    Monomial,
    compose,
    distance,
    from_matrices,
    inverse,
    num_fixed_points,
    to_matrices,
)
from geojax.symmetry.action import apply as apply_permutation
from geojax.symmetry.action import identity as identity_permutation
from geojax.symmetry.action import random as random_permutation
from geojax.symmetry.action import select as select_units

__all__ = [
    "Balanced",
    "Candidate",
    "ManyResult",
    "MatchingResult",
    "Monomial",
    "Step",
    "apply_permutation",
    "balance",
    "compose",
    "cycle_consistent_matching",
    "distance",
    "from_matrices",
    "identity_permutation",
    "inverse",
    "merge_many",
    "num_fixed_points",
    "random_permutation",
    "select_units",
    "synchronize",
    "to_matrices",
    "weight_matching",
]
