"""Metrics measured at one position after another, and what a run that stopped had of them.

Planes and curves over large data sets are measured for hours. What was measured is kept in the
state of a `Checkpointer`: the number of positions done, all positions, and the values.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from geojax._checksums import checksums
from geojax.batches import Batches
from geojax.fit import Checkpointer

__all__ = ["Measured", "about_data"]

PyTree = Any
# Far above what another device or compiler makes of the same metrics, far below other metrics.
AGAIN = 1e-2


def about_data(source: Any) -> dict[str, Any]:
    """What tells one source of batches from others before it is read, JSON-able.

    Metrics on other data of the same kind may be closer than those of one data set on two devices,
    so arrays in memory are summed: about a second per gigabyte. Of a loader nothing is known.
    """
    if not isinstance(source, Batches):
        return {"source": None}
    leaves = [
        jax.random.key_data(x)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        else x
        for x in jax.tree.leaves(source.arrays)
    ]
    return {"source": source.fingerprint(), "data": checksums(leaves)}


class Measured:
    """The values so far, and their checkpoints.

    Args:
        what: What is measured, as errors call it.
        positions: `(m, ...)`, all positions in their order.
        checkpoint: Where the values are kept, or None.
        record: What tells this run from others besides its positions, JSON-able.
        close: Lists of floats in the record that need only be close.
        rtol: How close, and how close positions must be, relative to the largest: they come from
            sums that other devices make in another order.
        chunk: Positions in one value; each metric is then `(chunk,)`, and a scalar for 1.
    """

    def __init__(
        self,
        what: str,
        positions: np.ndarray,
        checkpoint: Checkpointer | None,
        record: dict[str, Any],
        *,
        rtol: float,
        close: tuple[str, ...] = (),
        chunk: int = 1,
    ):
        self.what, self.positions, self.checkpoint = what, positions, checkpoint
        self.record = json.loads(json.dumps(record))
        self.rtol, self.close = rtol, close
        self.chunk, self.shape = chunk, () if chunk == 1 else (chunk,)
        self.values: dict[str, np.ndarray] = {}
        self.done = self.saved = 0
        if checkpoint is not None and checkpoint.latest() is not None:
            self._resume(checkpoint)

    def _resume(self, checkpoint: Checkpointer) -> None:
        state, about = checkpoint.restore(None)
        for name, mine in self.record.items():
            theirs = about.get(name)
            if not (theirs == mine or (name in self.close and _close(theirs, mine, self.rtol))):
                raise self._of_another(f"its {name} differ from this run's")
        if not _close(state["positions"], self.positions, self.rtol):
            raise self._of_another("its positions differ from this run's")
        self.values = {name: np.array(x) for name, x in state["values"].items()}
        self.done = self.saved = int(state["done"])

    def _of_another(self, how: str) -> ValueError:
        assert self.checkpoint is not None
        return ValueError(
            f"{self.what}: the checkpoint in {self.checkpoint.location} is of another run: {how}. "
            "Use the same arguments to resume, or another folder."
        )

    def follow(self, values: Iterable[PyTree], update: Callable[[int], None]) -> None:
        """Keep values as they come, the host one ahead; an interrupt saves those that were done."""
        try:
            waiting = None
            for value in values:
                if waiting is not None:
                    update(self._take(waiting))
                waiting = value
            if waiting is not None:
                update(self._take(waiting))
        finally:
            self._save()

    def _take(self, value: PyTree) -> int:
        """Keep the metrics of the next position or chunk; returns how many positions are done."""
        value = self._checked(value)
        count = min(self.chunk, len(self.positions) - self.done)
        if not self.values:
            self.values = {name: np.full(len(self.positions), np.nan) for name in value}
        if set(value) != set(self.values):
            raise ValueError(
                f"{self.what}: the metrics are {sorted(value)}, and those before "
                f"{sorted(self.values)}; they must be the same at every position."
            )
        for name, x in value.items():
            self.values[name][self.done : self.done + count] = np.reshape(x, -1)[:count]
        self.done += count
        if self.checkpoint is not None and self.done - self.saved >= self.checkpoint.every:
            self._save()
        return self.done

    def known(self) -> int:
        """The number of positions up to the last one whose metrics are finite, or that are done.

        What is not finite is alike for many functions and data, and tells nothing.
        """
        kept = [np.isfinite(x[: self.done]) for x in self.values.values()]
        finite = np.flatnonzero(np.all(kept, axis=0)) if kept else np.zeros(0, int)
        return int(finite[-1]) + 1 if finite.size else self.done

    def compare(self, value: PyTree, end: int, count: int = 1) -> None:
        """Raise unless the `count` positions before `end`, measured again, have what was kept.

        Neither the function that measures nor its data have a name that a checkpoint could keep;
        only their numbers tell.
        """
        value = self._checked(value)
        if set(value) != set(self.values):
            raise self._of_another(
                f"its metrics are {sorted(self.values)} and this run's {sorted(value)}"
            )
        for name, x in value.items():
            mine = np.asarray(x, np.float64).reshape(-1)[:count]
            kept = self.values[name][end - count : end]
            same = np.isclose(mine, kept, rtol=AGAIN, atol=1e-6, equal_nan=True)
            if not same.all():
                at = int(same.argmin())
                raise self._of_another(
                    f"its {name!r} at position {end - count + at} is {kept[at]:.6g} and this "
                    f"run's {mine[at]:.6g}, by another function or state, or on other data"
                )

    def _checked(self, value: PyTree) -> dict[str, np.ndarray]:
        value = jax.device_get(value)
        if not isinstance(value, dict) or any(np.shape(x) != self.shape for x in value.values()):
            raise TypeError(f"{self.what}: metrics_fn must return a dict of scalars.")
        return value

    def _save(self) -> None:
        """Keep on disk what is new."""
        if self.checkpoint is None or self.done == self.saved:
            return
        state = {"done": np.array(self.done), "positions": self.positions, "values": self.values}
        self.checkpoint.save(self.done, state, self.record)
        self.saved = self.done


def _close(theirs: Any, mine: Any, rtol: float) -> bool:
    """Whether two arrays are the same but for the order of sums, as on other devices."""
    if theirs is None:
        return False
    theirs, mine = np.asarray(theirs, np.float64), np.asarray(mine, np.float64)
    return theirs.shape == mine.shape and bool(
        np.abs(theirs - mine).max() <= rtol * np.abs(mine).max()
    )
