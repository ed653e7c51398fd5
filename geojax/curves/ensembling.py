"""Networks collected along one training run: fast geometric ensembling and its relatives.

All collect the parameters at chosen steps of an ordinary run whose learning rate goes up and down;
what is done with the members (predictions averaged, weights averaged, a Gaussian fitted) is apart.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from geojax import fit as fit_
from geojax import tree

__all__ = ["Collected", "Swag", "collect", "fge", "snapshots", "swa", "swag"]

PyTree = Any
Schedule = Callable[[Any], Any]


class _Store(Protocol):
    """What keeps members on disk: a `geojax.checkpoint.Checkpointer` with `keep=None`."""

    def steps(self) -> list[int]: ...
    def save(self, step: int, state: PyTree) -> None: ...
    def restore(self, like: PyTree = None, *, step: int | None = None) -> tuple[PyTree, Any]: ...


class Collected(NamedTuple):
    """Members of one run.

    Attributes:
        members: Stacked, in the order in which they were collected.
        steps: `(n,)` the number of steps after which each was.
        distances: `(n - 1,)` Euclidean distances between consecutive members: far below the
            distance of independent networks means that they hardly differ.
        history: Per step: 'loss', 'gradient_norm' and so on; from the step of a resume on.
        start: The step at which this call began.
    """

    members: PyTree
    steps: np.ndarray
    distances: np.ndarray
    history: dict[str, np.ndarray]
    start: int


def collect(
    loss_fn: Callable[..., Any],
    params: PyTree,
    batches: Any,
    optimizer: Any,
    steps: Sequence[int],
    *,
    key: jax.Array,
    checkpoint: Any = None,
    store: _Store | None = None,
    **options: Any,
) -> Collected:
    """Train, and keep the parameters after some of the steps.

    Args:
        loss_fn: As for `geojax.fit.fit`.
        params: Where the run starts; it is no member.
        batches: As for `geojax.fit.fit`.
        optimizer: An optax transformation, with its schedule.
        steps: After how many steps to keep a member, ascending; the last one ends the run.
        key: For dropout and augmentation.
        checkpoint: A `Checkpointer` for the run, which then resumes to the bit.
        store: A second `Checkpointer`, `keep=None`, for the members; needed with `checkpoint`.
        **options: Further options of `geojax.fit.fit`.

    Raises:
        ValueError: If `steps` does not ascend, or one of checkpoint and store is missing; if the
            store lacks a member that the checkpoint is past.
    """
    steps = [int(step) for step in steps]
    if not steps or steps[0] < 1 or any(b <= a for a, b in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"steps is {steps}; expected ascending numbers of at least 1.")
    if (checkpoint is None) != (store is None):
        raise ValueError("checkpoint and store: expected both or neither, to resume with members.")
    for name in ("evaluate", "evaluate_every"):
        if name in options:
            raise ValueError(f"{name} does not go with collecting; evaluate the members.")
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    found: dict[int, PyTree] = {}
    if store is not None:
        for step in store.steps():
            found[step] = store.restore(like, step=step)[0]
    every = int(np.gcd.reduce(steps))

    def keep(params: PyTree, step: int) -> dict[str, Any]:
        if step in steps:
            # A copy: the run goes on in the buffers of its parameters.
            found[step] = jax.tree.map(jnp.copy, params)
            if store is not None and step not in store.steps():
                store.save(step, found[step])
        return {}

    result = fit_.fit(
        loss_fn, params, batches, optimizer, steps[-1], key=key, evaluate=keep,
        evaluate_every=every, checkpoint=checkpoint, **options,
    )  # fmt: skip
    missing = [step for step in steps if step not in found]
    if missing:
        raise ValueError(
            f"the members of steps {missing} are not in the store, and the run is past them; give "
            "the store of the first call, or a new folder for both."
        )
    members = [found[step] for step in steps]
    distances = [
        float(tree.norm(tree.axpy(-1.0, a, b))) for a, b in zip(members, members[1:], strict=False)
    ]
    return Collected(
        tree.stack(members), np.asarray(steps), np.asarray(distances), result.history, result.start
    )


def fge(
    loss_fn: Callable[..., Any],
    params: PyTree,
    batches: Any,
    optimizer: Callable[[Schedule], Any],
    *,
    high: float,
    low: float,
    cycle_steps: int,
    num_members: int,
    key: jax.Array,
    **options: Any,
) -> Collected:
    """Fast geometric ensembling: members where a triangular learning rate is lowest.

    The rate starts at `high`, falls to `low` at the middle of each cycle and rises again; a member
    is kept at each middle, after c/2, 3c/2, ... steps. Start it at about four fifths of a training
    budget: from a network trained to the end the members hardly differ.

    Args:
        loss_fn: As for `geojax.fit.fit`.
        params: Where to start.
        batches: As for `geojax.fit.fit`.
        optimizer: From a schedule to an optax transformation, such as
            `lambda rate: optax.sgd(rate, momentum=0.9)`: weight decay and momentum are yours.
        high: The rate at the ends of a cycle.
        low: The rate in its middle.
        cycle_steps: Steps in a cycle, an even number.
        num_members: How many to keep.
        key: For dropout and augmentation.
        **options: `checkpoint` and `store` (see `collect`), and options of `geojax.fit.fit`.

    Returns:
        A `Collected`; average their predictions with `geojax.ensemble.predict`. The start is no
        member.

    Raises:
        ValueError: If `cycle_steps` is odd or `num_members` less than 1.

    Reference:
        Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", NeurIPS
        2018, section 4.
    """
    if num_members < 1:
        raise ValueError(f"num_members is {num_members}; expected at least 1.")
    schedule = fit_.cyclic(high, low, cycle_steps)
    steps = [cycle_steps // 2 + i * cycle_steps for i in range(num_members)]
    return collect(loss_fn, params, batches, optimizer(schedule), steps, key=key, **options)


def snapshots(
    loss_fn: Callable[..., Any],
    params: PyTree,
    batches: Any,
    optimizer: Callable[[Schedule], Any],
    *,
    high: float,
    cycle_steps: int,
    num_members: int,
    low: float = 0.0,
    key: jax.Array,
    **options: Any,
) -> Collected:
    """Snapshot ensembling: half a cosine from `high` to `low`, a member, and up again at once.

    Args:
        loss_fn: As for `geojax.fit.fit`.
        params: Where to start.
        batches: As for `geojax.fit.fit`.
        optimizer: From a schedule to an optax transformation.
        high: The rate at the start of a cycle.
        cycle_steps: Steps in a cycle.
        num_members: How many to keep.
        low: The rate at its end.
        key: For dropout and augmentation.
        **options: As for `fge`.

    Reference:
        Huang et al., "Snapshot Ensembles: Train 1, Get M for Free", ICLR 2017, equation 2.
    """
    if num_members < 1 or cycle_steps < 1:
        raise ValueError(
            f"num_members is {num_members} and cycle_steps {cycle_steps}; expected at least 1."
        )

    def schedule(step: Any) -> jax.Array:
        within = jnp.mod(jnp.asarray(step, jnp.float32), cycle_steps) / cycle_steps
        return low + 0.5 * (high - low) * (1 + jnp.cos(jnp.pi * within))

    steps = [(i + 1) * cycle_steps for i in range(num_members)]
    return collect(loss_fn, params, batches, optimizer(schedule), steps, key=key, **options)


# --------------------------------------------------------------------------- of the members


def swa(members: PyTree) -> PyTree:
    """The mean of the members' weights; a network with BatchNorm needs fresh statistics there.

    Reference:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018.
    """
    num = tree.num_points(members)
    return tree.combine(members, jnp.full(num, 1 / num, jnp.float32))


class Swag(NamedTuple):
    """A Gaussian over weights: half a diagonal, half a low rank.

    Attributes:
        mean: Of all members.
        variance: Of each weight over all members, at least 0.
        deviations: Stacked: the last members less the mean.
    """

    mean: PyTree
    variance: PyTree
    deviations: PyTree

    def sample(self, key: jax.Array, scale: float = 1.0) -> PyTree:
        """One draw: mean + sqrt(scale / 2) (sqrt(variance) z_1 + deviations z_2 / sqrt(k - 1))."""
        key_diagonal, key_rank = jax.random.split(key)
        num = tree.num_points(self.deviations)
        noise = tree.random_like(key_diagonal, self.mean)
        z = jax.random.normal(key_rank, (num,)) / np.sqrt(max(num - 1, 1))
        low_rank = tree.combine(self.deviations, z)
        factor = float(np.sqrt(scale / 2))
        return jax.tree.map(
            lambda m, v, e, d: (m + factor * (jnp.sqrt(v) * e + d)).astype(m.dtype),
            self.mean, self.variance, noise, low_rank,
        )  # fmt: skip


def swag(members: PyTree, rank: int = 20) -> Swag:
    """The SWAG Gaussian of collected members; nothing of the size of a covariance is made.

    Args:
        members: Stacked points, two or more.
        rank: How many of the last members span the low-rank part.

    Raises:
        ValueError: If there is one member, or the rank is less than 2.

    Reference:
        Maddox et al., "A Simple Baseline for Bayesian Uncertainty in Deep Learning", NeurIPS 2019,
        equation 1.
    """
    num = tree.num_points(members)
    if num < 2 or rank < 2:
        raise ValueError(f"{num} members and rank {rank}; expected at least 2 of each.")
    mean = swa(members)
    variance = jax.tree.map(lambda x, m: jnp.mean(jnp.square(x - m[None]), axis=0), members, mean)
    last = jax.tree.map(lambda x, m: x[-min(rank, num) :] - m[None], members, mean)
    return Swag(mean, variance, last)
