"""The data of an operator: batches cut smaller, rows numbered so that keys stay fixed.

The loop itself is that of `batches.mean`; these re-iterables only change what it reads.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from geojax import batches as batches_
from geojax import tree
from geojax.hessian.products import batch_key, matmul_precision, takes_key, working

__all__ = ["Numbered"]

PyTree = Any


class Numbered(NamedTuple):
    """A batch whose examples know their place in the data.

    Attributes:
        batch: The batch.
        rows: `(num_examples,)`, uint32: the number of each example, the same on every pass.
    """

    batch: PyTree
    rows: Any


class _Recut:
    """Batches cut into pieces of at most `size` examples, the last of a batch smaller."""

    def __init__(self, source: Any, size: int):
        self.source, self.size = source, size

    def __iter__(self) -> Iterator[PyTree]:
        for batch in self.source:
            if batches_.num_examples(batch) <= self.size:
                yield batch
            else:
                yield from batches_.split(batch, self.size)


class _Counted:
    """Batches with their rows numbered in the order in which they come."""

    def __init__(self, source: Any):
        self.source = source

    def __iter__(self) -> Iterator[Numbered]:
        start = 0
        for batch in self.source:
            num = batches_.num_examples(batch)
            yield Numbered(batch, _rows(start, start + num, batch))
            start += num


def _rows(start: int, stop: int, arrays: PyTree) -> Any:
    """Row numbers, lying where the examples lie."""
    rows = np.arange(start, stop).astype(np.uint32)
    leaves = jax.tree.leaves(arrays)
    if not all(isinstance(x, jax.Array) for x in leaves):
        # Each process reads a share of its own: let no two examples have one number.
        return rows * np.uint32(jax.process_count()) + np.uint32(jax.process_index())
    shardings = [x.sharding for x in leaves]
    if all(isinstance(s, NamedSharding) and len(s.device_set) > 1 for s in shardings):
        axes = shardings[0].spec[0] if shardings[0].spec else None
        return jax.device_put(rows, NamedSharding(shardings[0].mesh, PartitionSpec(axes)))
    return jnp.asarray(rows)  # on the device, so that data there may still be scanned over


def recut(source: Any, size: int) -> Any:
    """The data in pieces of at most `size` examples: less memory, the same weighted mean."""
    if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
        raise ValueError(f"microbatch is {size!r}; expected a positive number of examples.")
    if isinstance(source, batches_.Batches):
        if source.batch_size <= size:
            return source
        if source.key is None and not source.drop_remainder:
            return batches_.Batches(source.arrays, int(size), None, False)
    return batches_.as_batches(_Recut(source, int(size)))


def numbered(source: Any) -> Any:
    """The data with every example numbered, by its place in the arrays or in the stream."""
    if not isinstance(source, batches_.Batches):
        return batches_.as_batches(_Counted(source))
    rows = _rows(0, source.num_examples, source.arrays)
    return batches_.Batches(
        Numbered(source.arrays, rows), source.batch_size, source.key, source.drop_remainder
    )


@functools.lru_cache(maxsize=32)
def unnumbered_weight(weight_fn: Callable) -> Callable:
    """A weight function for numbered batches."""
    return lambda batch: weight_fn(batch.batch)


def total_weight(source: Any, weight_fn: Callable | None, mesh: Any) -> float:
    """The sum of the weights of all batches: one pass over the data, without computing on it."""
    if isinstance(source, batches_.Batches) and weight_fn is None and jax.process_count() == 1:
        left_out = source.num_examples % source.batch_size if source.drop_remainder else 0
        return float(source.num_examples - left_out)
    weigh = batches_.num_examples if weight_fn is None else jax.jit(weight_fn)
    return float(sum(float(weigh(b)) for pieces in batches_.prefetch(source, mesh) for b in pieces))


def check_uncoupled(
    value: Callable, selected: PyTree, frozen: PyTree, key: Any, source: Any, weight_fn: Any
) -> None:
    """Raise if the loss of an example depends on the other examples of its batch.

    With A and B the halves of the first batch and S the loss times its weight, a sum over examples
    has S(A, B) + S(B, A) = S(A, A) + S(B, B). All four batches have one shape, so that one program
    computes them and a fixed key draws the same masks in each.

    Args:
        value: `value(selected, frozen, key, batch)`, the loss.
        selected: The parameters that vary.
        frozen: The others.
        key: The operator's key, or None.
        source: Where the first batch is read.
        weight_fn: As for `batches.mean`.
    """
    first = next(iter(source))
    half = batches_.num_examples(first) // 2
    if not half or not all(
        x.is_fully_addressable for x in jax.tree.leaves(first) if isinstance(x, jax.Array)
    ):
        return
    first = jax.tree.map(np.asarray, first)
    a, b = np.arange(half), np.arange(half, 2 * half)
    sums = []
    for rows in (np.r_[a, b], np.r_[b, a], np.r_[a, a], np.r_[b, b]):
        batch = jax.tree.map(lambda x, rows=rows: x[rows], first)
        if isinstance(first, Numbered):
            batch = batch._replace(rows=first.rows[: 2 * half])
        weight = float((batches_.num_examples if weight_fn is None else weight_fn)(batch))
        loss = value(selected, frozen, key, batch) if weight else np.zeros(())
        sums.append(float(loss) * weight)
        eps = float(jnp.finfo(loss.dtype).eps)
    if not np.isfinite(sums).all():
        raise ValueError("the loss of the first batch is not finite; nothing can be said of it.")
    size = np.abs(sums).mean()
    gap = abs(sums[0] + sums[1] - sums[2] - sums[3]) / 2
    if gap > max(1e-5, 16 * eps) * size:
        raise ValueError(
            f"microbatch: the loss of a batch is not the mean over its examples (relative gap "
            f"{gap / size:.2g}), so cutting it changes the operator. Likely a BatchNorm in "
            "training mode (evaluate it with its running statistics), a contrastive loss, or a "
            "mean over unmasked tokens without `weight_fn`. Leave microbatch out to keep the "
            "batches whole."
        )


@functools.lru_cache(maxsize=32)
def jitted_value(loss_fn: Callable, precision: str | None, upcast: bool) -> Callable:
    """The loss of a batch, as `check_uncoupled` calls it."""
    keyed = takes_key(loss_fn)

    @jax.jit
    def value(selected, frozen, key, batch):
        params = tree.merge(working(selected, upcast), working(frozen, upcast))
        with matmul_precision(precision):
            if keyed:
                return loss_fn(params, batch.batch, batch_key(key, batch))
            return loss_fn(params, batch.batch if isinstance(batch, Numbered) else batch)

    return value
