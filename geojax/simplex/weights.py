"""What the volume is worth: the original's rules for its weight, and a target instead of one."""

import math
from typing import NamedTuple

import numpy as np

from geojax.simplex import volume
from geojax.simplex.complexes import SimplicialComplex

__all__ = ["Target", "normalized_weight", "original_weight", "random_log_square_volume"]


class Target(NamedTuple):
    """A volume to reach instead of a weight.

    The term of the loss is `weight / 2 * max(0, log_volume - log V)^2`: the weight in force is
    `weight` times what is missing, and nothing once the target is reached.

    Attributes:
        log_volume: The natural log of the volume to reach.
        weight: The weight in force for each unit of log volume that is missing.
    """

    log_volume: float
    weight: float = 1e-2


def random_log_square_volume(square_distance: float, num_vertices: int) -> float:
    """The log squared volume of a simplex whose vertices all have this squared distance.

    Independent random networks are nearly that, since in high dimension all distances agree.

    Args:
        square_distance: E|w - w'|^2 of two random initialisations; 3509 for VGG-16 by uniform
            initialisation.
        num_vertices: From 1 on.

    Example:
        >>> round(random_log_square_volume(3509, 3), 2)
        14.65
    """
    if not square_distance > 0 or num_vertices < 1:
        raise ValueError(
            f"square_distance is {square_distance} and num_vertices {num_vertices}; expected more "
            "than 0 and at least 1."
        )
    m = num_vertices - 1
    return (
        math.log(m + 1) - m * math.log(2) - 2 * math.lgamma(m + 1) + m * math.log(square_distance)
    )


def original_weight(scale: float, log_square_volume: float, floor: float = 1e-8) -> float:
    """The weight of log(V^2 + 1e-4) by the rule of Benton et al.'s code.

    `max(scale / log(V_random^2 + 1e-4), floor)`. It is for `volumes="original"`; of log V, twice
    as much. With the code's scales, 1e-10 and 1e-6, the floor or hardly more comes out, and the
    volume does nothing. Where the random volume is below 1 the rule is negative, so that the floor
    comes out without a word; slightly above 1 it explodes.

    Args:
        scale: The code's option; 0.1 in one of its scripts, 1e-6 and 1e-10 in others.
        log_square_volume: Of a random simplex as large, see `random_log_square_volume`.
        floor: The least weight.

    Example:
        >>> round(original_weight(0.1, random_log_square_volume(3509, 3)), 4)
        0.0068
    """
    if log_square_volume > 600:
        value = log_square_volume
    else:
        value = math.log(math.exp(log_square_volume) + 1e-4)
    with np.errstate(divide="ignore"):
        weight = float(np.float64(scale) / np.float64(value))
    return max(weight, floor)


def normalized_weight(scale: float, complex: SimplicialComplex) -> float:
    """A weight in units of the log volume of a random complex, as Benton et al. state theirs.

    Args:
        scale: The weight per log volume of the random complex; what suits one network and one
            number of vertices is meant to suit others. The paper's 1e-8 does nothing.
        complex: A complex of the same simplices whose vertices are fresh initialisations.

    Returns:
        `scale` over the log of the complex's total volume.

    Raises:
        ValueError: If that volume is not more than 1, where the rule turns its sign.

    Example:
        >>> import jax.numpy as jnp
        >>> from geojax.simplex import single
        >>> round(normalized_weight(0.1, single({"w": 100 * jnp.eye(3)})), 4)
        0.011

    Reference:
        Benton et al., 2021, section 4: the weight is scaled by a random complex's volume.
    """
    log_volume = float(volume.log_total_volume(complex))
    if not log_volume > 0:
        raise ValueError(
            f"the random complex has a log volume of {log_volume:.4g}; expected more than 0. Give "
            "volume_weight itself, 1e-3 to 1e-2 of the loss."
        )
    return scale / log_volume
