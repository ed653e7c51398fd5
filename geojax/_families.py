"""What families of points share: some points of a stack train, and the others stay to the bit.

A curve, a patch and a complex are families: a point of each is a combination of stacked points.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import tree

__all__ = [
    "Guarded",
    "HeldFixed",
    "Split",
    "combined",
    "each",
    "masked",
    "parts_of",
    "split_of",
    "whole",
    "wide",
]

PyTree = Any


class Split(NamedTuple):
    """Which control points train."""

    free: tuple[int, ...]
    fixed: tuple[int, ...]


def split_of(fixed: Sequence[int], num: int) -> Split:
    """The split that holds these indices fixed; raises for others than those of `num` points."""
    given = list(fixed)
    if any(not isinstance(i, (int, np.integer)) or not -num <= i < num for i in given):
        raise ValueError(f"fixed is {fixed}; expected indices of the {num} control points.")
    held = {int(i) % num for i in given}
    free = tuple(i for i in range(num) if i not in held)
    if not free:
        raise ValueError("every control point is fixed; there is nothing to train.")
    return Split(free, tuple(sorted(held)))


def parts_of(control_points: PyTree, split: Split) -> dict[str, PyTree]:
    """The free and the fixed points, apart, in their sharding."""
    members = tree.unstack(control_points)
    parts = {"free": tree.stack([members[i] for i in split.free])}
    if split.fixed:
        parts["fixed"] = tree.stack([members[i] for i in split.fixed])
    return parts


def whole(parts: dict[str, PyTree], split: Split) -> PyTree:
    """All control points in order, from the two stacks."""
    members = dict(zip(split.free, tree.unstack(parts["free"]), strict=True))
    if split.fixed:
        members |= dict(zip(split.fixed, tree.unstack(parts["fixed"]), strict=True))
    return tree.stack([members[i] for i in range(len(members))])


def combined(parts: dict[str, PyTree], split: Split, weights: PyTree) -> PyTree:
    """The points with these coefficients, `(..., n)`; no gradient goes to the fixed part.

    `weights` is one array, or one for every leaf.
    """

    def total_of(points, chosen):
        if isinstance(weights, jax.Array):
            return tree.combine(points, weights[..., np.array(chosen)])
        return tree.combine_leaves(
            points, jax.tree.map(lambda x: x[..., np.array(chosen)], weights)
        )

    total = total_of(wide(parts["free"]), split.free)
    if split.fixed:
        held = total_of(jax.lax.stop_gradient(wide(parts["fixed"])), split.fixed)
        total = jax.tree.map(jnp.add, total, held)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), total, parts["free"])


def wide(points: PyTree) -> PyTree:
    """The leaves in the dtype in which sums are kept."""
    return jax.tree.map(lambda x: x.astype(tree.accumulation_dtype(x)), points)


@functools.lru_cache(maxsize=32)
def each(optimizer: Any) -> Any:
    """The optimizer mapped over a leading axis: what couples leaves stays within a member."""
    import optax

    def update(updates, state, params=None):
        return jax.vmap(optimizer.update)(updates, state, params)

    return optax.GradientTransformation(jax.vmap(optimizer.init), update)


class Guarded:
    """A checkpointer that goes on only with the points that this run holds fixed."""

    def __init__(self, inner: Any, parts: dict[str, PyTree]):
        self.inner = inner
        self.held = {name: x for name, x in parts.items() if name != "free"}

    @property
    def every(self) -> int:
        """Steps between checkpoints."""
        return self.inner.every

    @property
    def location(self) -> str:
        """Where they are."""
        return self.inner.location

    def latest(self) -> int | None:
        """The newest step."""
        return self.inner.latest()

    def save(self, step: int, state: PyTree, metadata: dict | None = None) -> Any:
        """As the inner one."""
        return self.inner.save(step, state, metadata)

    def restore(self, like: PyTree, step: int | None = None) -> tuple[PyTree, dict]:
        """As the inner one, for a run of these very fixed points."""
        state, metadata = self.inner.restore(like, step=step)
        found = {name: state.params[name] for name in self.held}
        if not all(jax.tree.leaves(_equal(self.held, found))):
            raise ValueError(
                f"the checkpoint in {self.location} is of other fixed points than those "
                "given; use the same ends to resume, or another folder."
            )
        return state, metadata


@jax.jit
def _equal(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.all(x == y), a, b)


class HeldFixed:
    """Whether a leaf does not train; equal to its like, so that steps are reused."""

    def __call__(self, path: str) -> bool:
        return not path.startswith("['free']")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeldFixed)

    def __hash__(self) -> int:
        return hash(HeldFixed)


@functools.lru_cache(maxsize=32)
def masked(optimizer: Any, labels: tuple[tuple[str, bool], ...]) -> Any:
    """The optimizer without a state for what is fixed; one object per optimizer."""
    import optax

    return optax.masked(optimizer, dict(labels))
