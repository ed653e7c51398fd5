"""Learning rates by step: as functions, for optax."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = ["cyclic", "three_phase", "warmup_cosine"]

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def warmup_cosine(
    peak: float, num_steps: int, *, warmup_steps: int = 0, start: float = 0.0, end: float = 0.0
) -> Schedule:
    """A linear warm-up from `start` to `peak`, then half a cosine down to `end` at `num_steps`.

    Raises:
        ValueError: If the warm-up does not end before the run.
    """
    import optax

    if not 0 <= warmup_steps < num_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps} of {num_steps} steps; expected at least 0 and fewer "
            "than num_steps."
        )
    if warmup_steps == 0:
        schedule = optax.cosine_decay_schedule(peak, num_steps, alpha=end / peak)
    else:
        schedule = optax.warmup_cosine_decay_schedule(start, peak, warmup_steps, num_steps, end)
    # optax mixes the integer step with floats, which strict dtype promotion refuses.
    return lambda step: jnp.asarray(schedule(jnp.asarray(step, jnp.float32)))


def three_phase(peak: float, num_steps: int, *, final: float = 0.01) -> Schedule:
    """Constant for the first half, linear down to `final * peak` at nine tenths, constant again.

    Args:
        peak: The learning rate of the first half.
        num_steps: The length of the run; the schedule is a function of step / num_steps.
        final: The last phase as a fraction of `peak`.

    Reference:
        Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, 2018: the
        schedule of its code. There it is constant within an epoch; here it moves every step.
    """

    def schedule(step):
        fraction = jnp.asarray(step, jnp.float32) / num_steps
        left = jnp.clip((0.9 - fraction) / 0.4, 0.0, 1.0)
        return peak * (final + (1.0 - final) * left)

    return schedule


def cyclic(high: float, low: float, cycle_steps: int) -> Schedule:
    """Triangular cycles: `high` at the ends of each cycle, `low` in its middle.

    Reference:
        Garipov et al. 2018, section 4 (fast geometric ensembling): networks are collected where the
        rate is lowest, after cycle_steps / 2, 3 cycle_steps / 2, and so on.

    Raises:
        ValueError: If `cycle_steps` is odd, since then no step lies in the middle.
    """
    if cycle_steps < 2 or cycle_steps % 2:
        raise ValueError(f"cycle_steps is {cycle_steps}; expected an even number of steps.")

    def schedule(step):
        within = jnp.mod(jnp.asarray(step, jnp.float32), cycle_steps) / cycle_steps
        towards = jnp.abs(2.0 * within - 1.0)
        return low + (high - low) * towards

    return schedule
