"""Checksums of arrays that do not depend on how an array is sharded.

They travel in a checkpoint's description and are compared with what a load has read, or with the
points of the run that asks to go on.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def checksums(arrays: Sequence[Any]) -> list[int]:
    """For each array the sum of its 32-bit words, each times an odd weight, modulo 2^64.

    A word's weight is the product of one factor per axis, a hash of axis and position. Such a sum
    over blocks is the same in any sharding, so that an array saved by many processes is verified by
    one, and the other way round; a cyclic redundancy check of the bytes has no such property.

    Args:
        arrays: NumPy or JAX arrays, of any numeric dtype. Those that are spread over processes are
            summed over all of them, which every process must then call for the same arrays.
    """
    sums = [_checksum(array) for array in arrays]
    spread = [
        i
        for i, array in enumerate(arrays)
        if isinstance(array, jax.Array) and not array.is_fully_addressable
    ]
    if spread:
        halves = [(sums[i] & 0xFFFFFFFF, sums[i] >> 32) for i in spread]
        gathered = np.asarray(multihost_utils.process_allgather(np.array(halves, np.uint32)))
        for i, parts in zip(spread, np.swapaxes(gathered, 0, 1), strict=True):
            sums[i] = sum(int(low) + (int(high) << 32) for low, high in parts) % 2**64
    return sums


def _checksum(array: Any) -> int:
    """The sum over the blocks of an array that this process holds, each counted once."""
    total = 0
    for block, starts in _blocks(array):
        if not block.size:
            continue
        word = min(block.dtype.itemsize, 4)
        words = np.asarray(block[..., None], order="C").view(f"u{word}")
        if words.shape[-1] == 1:
            words = words[..., 0]
        for axis in reversed(range(words.ndim)):
            start = starts[axis] if axis < len(starts) else 0
            words = np.einsum("...i,i->...", words, _weights(axis, start, words.shape[axis]))
        total += int(words)
    return total % 2**64


def _blocks(array: Any) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """Blocks and where each starts along every axis."""
    if not isinstance(array, jax.Array):
        yield np.asarray(array), (0,) * np.ndim(array)
        return
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            yield np.asarray(shard.data), tuple(index.start or 0 for index in shard.index)


def _weights(axis: int, start: int, size: int) -> np.ndarray:
    """Odd 64-bit factors for `size` positions along an axis: the finalizer of SplitMix64."""
    x = np.arange(start + 1, start + size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(axis * 0xD1342543DE82EF95 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)
