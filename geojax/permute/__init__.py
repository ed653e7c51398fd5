"""Networks modulo permutation symmetry: align, interpolate and merge them.

A network is the same function after its hidden units are permuted. Two trained networks that lie
in different valleys of the loss often lie in one, once the units of one are matched with the
other's: then the straight line between them has low loss, and their mean is a network.
"""

from geojax.permute.activations import (
    ActivationMatching,
    activation_matching,
    activation_scores,
)
from geojax.permute.evaluation import (
    MetricBarrier,
    PermutedBarrier,
    barrier,
    barrier_of_values,
)
from geojax.permute.learned import (
    GradientMatchingResult,
    SinkhornResult,
    StraightThroughResult,
    gradient_matching,
    midpoint,
    sinkhorn_matching,
    straight_through_matching,
)
from geojax.permute.many import ManyResult, cycle_consistent_matching, merge_many, synchronize
from geojax.permute.matching import Candidate, MatchingResult, Step, weight_matching
from geojax.permute.merging import (
    GreedySoup,
    RegressionMean,
    add_task_vectors,
    fisher_diagonal,
    fisher_merge,
    greedy_soup,
    lerp,
    regression_mean,
    slerp,
    task_vector,
    uniform_soup,
    weighted_mean,
)
from geojax.permute.relaxed import apply_soft, sinkhorn
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
    "ActivationMatching",
    "Balanced",
    "Candidate",
    "GradientMatchingResult",
    "GreedySoup",
    "ManyResult",
    "MatchingResult",
    "MetricBarrier",
    "Monomial",
    "PermutedBarrier",
    "RegressionMean",
    "SinkhornResult",
    "Step",
    "StraightThroughResult",
    "activation_matching",
    "activation_scores",
    "add_task_vectors",
    "apply_permutation",
    "apply_soft",
    "balance",
    "barrier",
    "barrier_of_values",
    "compose",
    "cycle_consistent_matching",
    "distance",
    "fisher_diagonal",
    "fisher_merge",
    "from_matrices",
    "gradient_matching",
    "greedy_soup",
    "identity_permutation",
    "inverse",
    "lerp",
    "merge_many",
    "midpoint",
    "num_fixed_points",
    "random_permutation",
    "regression_mean",
    "select_units",
    "sinkhorn",
    "sinkhorn_matching",
    "slerp",
    "straight_through_matching",
    "synchronize",
    "task_vector",
    "to_matrices",
    "uniform_soup",
    "weight_matching",
    "weighted_mean",
]
