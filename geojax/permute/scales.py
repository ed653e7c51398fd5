"""Positive scales: the point of least norm among all networks that rescaling makes equal.

A ReLU unit whose incoming weights are multiplied by s and whose outgoing weights are divided by s
computes the same. Along such an orbit the squared norm is convex in log s, so it has one lowest
point, which two rescaled copies of a network share.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from geojax.permute._problem import host_leaves
from geojax.symmetry import action
from geojax.symmetry.spec import Factor, PermutationSpec, SpecError, blocks

__all__ = ["Balanced", "balance", "has_scales"]

PyTree = Any


class Balanced(NamedTuple):
    """A network in its balanced gauge.

    Attributes:
        params: The rescaled parameters, the same function.
        scale: What was applied, for `apply_permutation`: identity orders and positive scales.
        norm: The Euclidean norm of the leaves that rescaling touches, before and after.
        converged: Whether the scales of the last sweep were within `rtol` of one.
        num_sweeps: Sweeps over the groups.
    """

    params: PyTree
    scale: dict[str, Any]
    norm: tuple[float, float]
    converged: bool
    num_sweeps: int


def has_scales(spec: PermutationSpec) -> bool:
    """Whether any group of the spec carries positive scales."""
    return any(group.kind in ("scaled", "signed_scaled") for group in spec.groups)


def balance(
    spec: PermutationSpec, params: PyTree, *, rtol: float = 1e-7, max_sweeps: int = 10_000
) -> Balanced:
    """Rescale the units of every scaled group so that the parameters have the least norm.

    For a unit with power +1 in leaves of squared norm p and -1 in leaves of squared norm m the best
    scale, with all others fixed, is (m / p)^(1/4); sweeps over the groups go on until no scale
    changes. A unit without incoming or without outgoing weights keeps its scale.

    Args:
        spec: A symmetry with groups of kind "scaled" or "signed_scaled".
        params: The parameters.
        rtol: The largest relative change of a scale in the last sweep.
        max_sweeps: The most sweeps; deep narrow networks need many.

    Returns:
        A `Balanced`.

    Raises:
        SpecError: If no group has scales, a power is neither 1 nor -1 nor 0, or params and spec do
            not fit.

    Reference:
        Stock et al., "Equi-normalization of Neural Networks", ICLR 2019, Algorithm 1.
    """
    groups = [group for group in spec.groups if group.kind in ("scaled", "signed_scaled")]
    if not groups:
        raise SpecError(
            "the spec has no group with scales; symmetry.with_kinds finds which groups may have "
            "them."
        )
    names = {group.name for group in groups}
    host = host_leaves(spec, params, "params")
    squares: list[tuple[tuple[Factor, ...], np.ndarray]] = []
    for leaf in spec.leaves:
        if leaf.path not in host or not names & set(leaf.groups()):
            continue
        for factors, x in blocks(leaf, host[leaf.path]):
            if any(f.name in names and f.power for f in factors):
                squares.append((factors, np.square(x, dtype=np.float64)))
    for factors, _ in squares:
        for factor in factors:
            if factor.name in names and factor.power not in (-1, 0, 1):
                raise SpecError(
                    f"group {factor.name!r} has a place with power {factor.power}; balancing knows "
                    "-1, 0 and 1."
                )
    before = float(np.sqrt(sum(x.sum() for _, x in squares)))
    total = {group.name: np.ones(group.shape) for group in groups}
    sweep, change = 0, np.inf
    while sweep < max_sweeps and change > rtol:
        sweep += 1
        change = 0.0
        for group in groups:
            up, down = np.zeros(group.shape), np.zeros(group.shape)
            for factors, x in squares:
                for axis, factor in enumerate(factors):
                    if factor.name == group.name and factor.power:
                        target = up if factor.power > 0 else down
                        target += _sum_to(x, factors, axis, group.index)
            alive = (up > 0) & (down > 0)
            scale = np.where(alive, (down / np.where(alive, up, 1)) ** 0.25, 1.0)
            change = max(change, float(np.abs(scale - 1).max()))
            total[group.name] *= scale
            for factors, x in squares:
                for axis, factor in enumerate(factors):
                    if factor.name == group.name and factor.power:
                        x *= _spread(scale, factors, axis, group.index) ** (2 * factor.power)
    permutation: dict[str, Any] = dict(action.identity(spec))
    for name, scale in total.items():
        permutation[name] = action.Monomial(
            jnp.asarray(permutation[name]), jnp.asarray(scale, jnp.float32)
        )
    after = float(np.sqrt(sum(x.sum() for _, x in squares)))
    return Balanced(
        action.apply(spec, permutation, params),
        permutation,
        (before, after),
        bool(change <= rtol),
        sweep,
    )


def _axes(factors: Sequence[Factor], axis: int, index: Sequence[str]) -> list[int]:
    return [[f.name for f in factors].index(name) for name in index] + [axis]


def _sum_to(
    x: np.ndarray, factors: Sequence[Factor], axis: int, index: Sequence[str]
) -> np.ndarray:
    """Summed over all axes but a group's own and its indices', in the order of its array."""
    return np.einsum(x, list(range(x.ndim)), _axes(factors, axis, index))


def _spread(
    scale: np.ndarray, factors: Sequence[Factor], axis: int, index: Sequence[str]
) -> np.ndarray:
    """An array of a group's shape, placed to broadcast against a block."""
    axes = _axes(factors, axis, index)
    ordered = scale.transpose(np.argsort(axes))
    shape = [1] * len(factors)
    for a in axes:
        shape[a] = factors[a].size
    return ordered.reshape(shape)
