"""The one loop over data: weighted means of any per-batch pytree, on one device or a mesh.

Loss, gradient, Hessian product, normalisation moments, metrics: each is a pytree computed on one
batch and averaged here with weights that count examples. No other module loops over data for that.
"""

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from geojax.tree import accumulation_dtype

__all__ = [
    "Batches",
    "as_batches",
    "mean",
    "num_examples",
    "place",
    "prefetch",
    "split",
    "take",
    "weighted_mean",
]

PyTree = Any
Progress = Callable[[int, int | None], None]


def num_examples(batch: PyTree) -> int:
    """The number of examples in a batch: the leading axis that all its leaves share.

    Raises:
        ValueError: If the batch has no array, a leaf has no leading axis, or two leaves disagree.
    """
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError("batch: expected a pytree of arrays, got one without leaves.")
    sizes = []
    for path, leaf in leaves:
        shape = np.shape(leaf)
        if not shape:
            raise ValueError(
                f"batch: leaf {_name(path)} has no axes; every leaf of a batch has a leading axis "
                "over the examples (repeat a constant along it, or close over it in the function)."
            )
        sizes.append(shape[0])
    for (path, _), size in zip(leaves, sizes, strict=True):
        if size != sizes[0]:
            raise ValueError(
                f"batch: leaf {_name(leaves[0][0])} holds {sizes[0]} examples and leaf "
                f"{_name(path)} {size}; the leading axes must agree."
            )
    return sizes[0]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "(root)"


class Batches:
    """Re-iterable batches of arrays in memory; made by `split`.

    Iterating gives epoch 0, always the same; `epoch(i)` gives the order of epoch i, which differs
    from epoch to epoch only if `split` was given a key.

    Attributes:
        arrays: The pytree of arrays, leaves `(num_examples, ...)`.
        batch_size: Examples in a batch; the last batch may be smaller.
        key: The key of the shuffling order, or None for the order of the arrays.
        drop_remainder: Whether a smaller last batch is left out.
        num_examples: The leading axis of `arrays`.
    """

    def __init__(
        self, arrays: PyTree, batch_size: int, key: jax.Array | None, drop_remainder: bool
    ):
        self.arrays = arrays
        self.batch_size = batch_size
        self.key = key
        self.drop_remainder = drop_remainder
        self.num_examples = num_examples(arrays)

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        whole, rest = divmod(self.num_examples, self.batch_size)
        return whole + (rest > 0 and not self.drop_remainder)

    def __iter__(self) -> Iterator[PyTree]:
        """Epoch 0."""
        return self.epoch(0)

    def epoch(self, index: int, start: int = 0) -> Iterator[PyTree]:
        """The batches of one epoch, from batch `start` on, without computing the earlier ones."""
        order = None
        if self.key is not None:
            order = np.asarray(
                jax.random.permutation(jax.random.fold_in(self.key, index), self.num_examples)
            )
        for i in range(start, len(self)):
            first = i * self.batch_size
            last = min(first + self.batch_size, self.num_examples)
            rows = slice(first, last) if order is None else order[first:last]
            yield jax.tree.map(functools.partial(_rows, rows=rows), self.arrays)

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must find again: sizes and order, JSON-able."""
        return {
            "num_examples": self.num_examples,
            "batch_size": self.batch_size,
            "drop_remainder": self.drop_remainder,
            "key": None if self.key is None else jax.random.key_data(self.key).tolist(),
        }


def _rows(leaf: Any, rows: slice | np.ndarray) -> Any:
    if not isinstance(leaf, jax.Array):
        return leaf[rows]
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return leaf[rows]
    # Rows of an array sharded over its examples are gathered by index, since slicing a sharded axis
    # has no rule on an Explicit mesh; the batch keeps the sharding where its size divides.
    index = np.arange(leaf.shape[0], dtype=np.int32)[rows]
    spec = tuple(sharding.spec) + (None,) * (leaf.ndim - len(sharding.spec))
    parts = _num_parts(sharding.mesh, spec[0])
    out = NamedSharding(
        sharding.mesh, PartitionSpec(None if index.size % parts else spec[0], *spec[1:])
    )
    if AxisType.Explicit in sharding.mesh.axis_types:
        gather = jax.jit(lambda x, i: x.at[i].get(out_sharding=out))
    else:
        gather = jax.jit(lambda x, i: x[i], out_shardings=out)
    with jax.set_mesh(sharding.mesh):  # pyright: ignore[reportArgumentType]
        return gather(leaf, index)


def _num_parts(mesh: Any, axes: Any) -> int:
    if axes is None:
        return 1
    names = axes if isinstance(axes, tuple) else (axes,)
    return int(np.prod([mesh.shape[name] for name in names]))


def split(
    arrays: PyTree,
    batch_size: int,
    *,
    key: jax.Array | None = None,
    drop_remainder: bool = False,
) -> Batches:
    """Cut arrays into batches along their leading axis.

    Args:
        arrays: Pytree of NumPy or JAX arrays, leaves `(num_examples, ...)`. Nothing is copied until
            a batch is asked for; JAX arrays stay on their device.
        batch_size: Examples in a batch; the last batch holds what is left.
        key: A typed key; with it `fit` sees a new order each epoch. Iterating plainly always gives
            the order of epoch 0.
        drop_remainder: Leave a smaller last batch out.

    Returns:
        A re-iterable of batches of the same structure as `arrays`.

    Raises:
        ValueError: If leaves disagree on the leading axis, there are no examples, or the batch size
            is not positive.

    Example:
        >>> [b["x"].tolist() for b in split({"x": np.arange(5)}, 2)]
        [[0, 1], [2, 3], [4]]
    """
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; expected a positive integer.")
    out = Batches(arrays, int(batch_size), key, drop_remainder)
    if out.num_examples == 0:
        raise ValueError("split: the arrays hold no examples (their leading axis is 0).")
    if len(out) == 0:
        raise ValueError(
            f"split: {out.num_examples} examples make no batch of {batch_size} when the remainder "
            "is dropped; use a smaller batch_size or drop_remainder=False."
        )
    return out


class _Stream:
    """Any other re-iterable of batches, checked as it is read."""

    def __init__(self, source: Iterable[PyTree]):
        self.source = source
        self.passes: int | None = None  # how many batches the first whole pass gave

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[PyTree]:
        first = None
        count = 0
        for batch in self.source:
            # torch tensors and the like become NumPy arrays, which share their memory.
            batch = jax.tree.map(
                lambda x: x if isinstance(x, (jax.Array, np.ndarray)) else np.asarray(x), batch
            )
            kind = jax.tree.map(lambda x: (x.ndim, str(x.dtype)), batch)
            first = kind if first is None else first
            if kind != first:
                raise ValueError(
                    f"batches: batch 0 holds (axes, dtype) {first} and batch {count} holds {kind}; "
                    "all batches must be alike. If this list is one batch, pass it as a tuple or a "
                    "dict: a list is read as a sequence of batches."
                )
            if num_examples(batch) == 0:
                raise ValueError(f"batches: batch {count} holds no examples; leave it out.")
            count += 1
            yield batch
        if count == 0 or (self.passes is not None and count != self.passes):
            raise ValueError(
                f"batches: this pass gave {count} batches"
                + (f" and an earlier one {self.passes}" if self.passes else "")
                + "; expected a re-iterable that gives the same batches on every pass, such as "
                "`batches.split(arrays, batch_size)`, a list, or a DataLoader."
            )
        self.passes = count


def as_batches(batches: Any) -> Any:
    """Read what a user passes as `batches`: one batch, or a re-iterable of batches.

    An array, dict, tuple, namedtuple or registered pytree of arrays is one batch. A list, the
    result of `split`, or any other object that can be iterated many times is a sequence of batches.

    Returns:
        A re-iterable whose batches are checked as they are read.

    Raises:
        TypeError: For a generator or other one-shot iterator, or what is no batch at all.
        ValueError: For no batches, or a batch whose leaves disagree.
    """
    if isinstance(batches, (Batches, _Stream)):
        return batches
    if hasattr(batches, "__next__"):
        raise TypeError(
            f"batches: got a one-shot {type(batches).__name__}, which can be read only once; "
            "expected a re-iterable: `batches.split(arrays, batch_size)`, a list, a DataLoader, or "
            "an object whose __iter__ starts anew."
        )
    if isinstance(batches, list):
        if not batches:
            raise ValueError("batches: expected at least one batch, got an empty list.")
        return _Stream(batches)
    is_leaf = jax.tree_util.all_leaves([batches])
    if not is_leaf or isinstance(batches, (jax.Array, np.ndarray)):
        size = num_examples(batches)
        if size == 0:
            raise ValueError("batches: the one batch given holds no examples.")
        return Batches(batches, size, None, False)
    if hasattr(batches, "__iter__"):
        return _Stream(batches)
    raise TypeError(
        f"batches: got {type(batches).__name__}; expected one batch (a pytree of arrays) or a "
        "re-iterable of batches."
    )


class _First:
    """The first batches of a re-iterable."""

    def __init__(self, source: Any, num_batches: int):
        self.source, self.num_batches = source, num_batches

    def __iter__(self) -> Iterator[PyTree]:
        return itertools.islice(iter(self.source), self.num_batches)


def take(batches: Any, num_batches: int) -> Any:
    """The first `num_batches` batches, re-iterable: a subset for statistics or a quick look."""
    if not isinstance(num_batches, (int, np.integer)) or num_batches < 1:
        raise ValueError(f"num_batches is {num_batches!r}; expected a positive integer.")
    return _Stream(_First(as_batches(batches), int(num_batches)))


def place(batch: PyTree, mesh: Mesh | NamedSharding | None) -> list[PyTree]:
    """Put a batch on the devices, its leading axis split over the mesh's data axis.

    Where the number of examples does not divide by the number of parts, the few left over come as
    a second, replicated batch, so that nothing is padded and every weighted mean stays exact.

    Args:
        batch: Pytree of arrays. With several processes, each passes its own share.
        mesh: A mesh, whose first axis is the data axis; or a `NamedSharding` whose spec names the
            axis or axes over which examples are split; or None to leave the batch where it is.

    Returns:
        One or two batches that together hold the examples.
    """
    if mesh is None:
        return [batch]
    if isinstance(mesh, NamedSharding):
        axes, mesh = (mesh.spec[0] if mesh.spec else None), mesh.mesh  # type: ignore[assignment]
    else:
        axes = mesh.axis_names[0]
    parts = _num_parts(mesh, axes)
    if all(
        isinstance(x, jax.Array) and len(x.sharding.device_set) > 1 for x in jax.tree.leaves(batch)
    ):
        return [batch]

    def put(tree, spec):
        sharding = NamedSharding(mesh, spec)  # type: ignore[arg-type]
        if jax.process_count() > 1:
            return jax.tree.map(
                lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
            )
        return jax.device_put(tree, sharding)

    if jax.process_count() > 1:
        local = parts // jax.process_count()
        if num_examples(batch) % max(local, 1):
            raise ValueError(
                f"batches: this process holds {num_examples(batch)} examples of a batch, which do "
                f"not divide over its {local} parts of the data axis; with several processes "
                "choose batch sizes that divide (`drop_remainder=True`, or pad and use weight_fn)."
            )
        return [put(batch, PartitionSpec(axes))]
    even = num_examples(batch) // parts * parts
    out = []
    if even:
        out.append(put(jax.tree.map(lambda x: x[:even], batch), PartitionSpec(axes)))
    if even < num_examples(batch):
        out.append(put(jax.tree.map(lambda x: x[even:], batch), PartitionSpec()))
    return out


def prefetch(
    batches: Iterable[PyTree], mesh: Mesh | NamedSharding | None = None
) -> Iterator[list[PyTree]]:
    """Give each batch once the next one has been read and sent to its devices.

    The device computes on one batch while the host reads the next; never more than one waits.

    Yields:
        What `place` makes of each batch: a list of one or two batches on the devices.
    """
    waiting = None
    for batch in batches:
        # On the CPU there is nowhere to send it, and a jitted function takes host arrays faster.
        if mesh is None:
            ready = [batch if jax.default_backend() == "cpu" else jax.device_put(batch)]
        else:
            ready = place(batch, mesh)
        if waiting is not None:
            yield waiting
        waiting = ready
    if waiting is not None:
        yield waiting


def mean(
    fn: Callable[..., PyTree],
    batches: Any,
    *,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    loop: Literal["auto", "host", "scan"] = "auto",
    progress: Progress | None = None,
) -> Callable[..., PyTree]:
    r"""The weighted mean of a per-batch function over a data set.

    For batches b of weight :math:`n_b` it is :math:`\sum_b n_b f(\ldots, b) / \sum_b n_b`: where f
    is itself a mean over the examples of its batch, this is the mean over all examples, exactly,
    whatever the batch sizes.

    `fn` is compiled once per batch shape, however often the mean is made or called. The sum runs in
    float32 or better. On the CPU the batches are looped over from the host (convolutions are 7 to
    32 times slower inside `lax.scan` there); on an accelerator, data that already lies on the
    device is scanned over, and any other data is streamed with one batch prefetched.

    Args:
        fn: `fn(*args, batch)`, returning a pytree of arrays that are means over the batch.
        batches: One batch or a re-iterable of batches; see `as_batches`.
        weight_fn: `weight_fn(batch)`, a nonnegative scalar, such as the number of unmasked tokens.
            By default the leading axis of the batch. A batch of weight zero counts for nothing,
            even if its value is NaN.
        mesh: Split each batch over this mesh's first axis (or as a `NamedSharding` says).
        loop: 'host' or 'scan' to insist; 'scan' needs unshuffled `split` arrays.
        progress: Called as `progress(batches_done, num_batches or None)`.

    Returns:
        `averaged(*args)`: the pytree of means, in float32 or better. It can be differentiated and
        traced; under `jit` the batches in memory become constants of the program. Memory: two
        copies of the result and of a batch, beyond what `fn` needs.

    Raises:
        TypeError: For a one-shot generator.
        ValueError: For an empty data set, a batch whose leaves disagree, or weights that sum to 0.

    Example:
        >>> data = split({"x": np.arange(5.0, dtype=np.float32)}, 2)
        >>> float(mean(lambda batch: jnp.mean(batch["x"]), data)())
        2.0
    """
    source = as_batches(batches)
    if loop not in ("auto", "host", "scan"):
        raise ValueError(f"loop is {loop!r}; expected 'auto', 'host' or 'scan'.")
    if loop == "scan" and (not isinstance(source, Batches) or source.key is not None or mesh):
        raise ValueError(
            "loop='scan' needs arrays from `batches.split` without a key and no mesh; use "
            "loop='host' for other batches."
        )

    @functools.wraps(fn)
    def averaged(*args: Any) -> PyTree:
        use_scan = loop == "scan" or (loop == "auto" and mesh is None and _scannable(source, args))
        return (_scan_mean if use_scan else _host_mean)(fn, source, weight_fn, mesh, progress, args)

    return averaged


def _scannable(source: Any, args: Any) -> bool:
    if jax.default_backend() == "cpu" or not isinstance(source, Batches) or source.key is not None:
        return False
    return all(
        isinstance(x, jax.Array) and not isinstance(x, Tracer) and len(x.sharding.device_set) == 1
        for x in jax.tree.leaves(source.arrays)
    ) and all(
        not isinstance(x, jax.Array) or isinstance(x, Tracer) or len(x.sharding.device_set) == 1
        for x in jax.tree.leaves(args)
    )


def _weigh(value: PyTree, weight: Any) -> PyTree:
    """`weight * value` in the accumulator's dtype; nothing where the weight is zero."""

    def one(v):
        v = v.astype(accumulation_dtype(v))
        return jnp.where(weight != 0, v * jnp.asarray(weight).astype(v.dtype), jnp.zeros_like(v))

    return jax.tree.map(one, value)


@jax.jit
def _first(value: PyTree, weight: Any) -> PyTree:
    return _weigh(value, weight), jnp.asarray(weight, jnp.float32)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: PyTree, value: PyTree, weight: Any) -> PyTree:
    return jax.tree.map(jnp.add, total, _first(value, weight))


@functools.partial(jax.jit, donate_argnums=0)
def _divide(sums: PyTree, weight: jax.Array) -> PyTree:
    return jax.tree.map(lambda s: s / weight.astype(s.dtype), sums)


def _nonzero(weight: Any) -> None:
    if not isinstance(weight, Tracer) and not float(weight) > 0:
        raise ValueError(
            f"batches: the weights of all batches sum to {float(weight)}; expected a positive "
            "number (is every token masked?)."
        )


def weighted_mean(terms: Iterable[tuple[PyTree, Any]]) -> PyTree:
    """The mean of pytrees with weights, read one after another.

    Args:
        terms: Pairs (value, weight); a value is a pytree of arrays, a weight a nonnegative scalar.

    Returns:
        The weighted mean in float32 or better; for a single pair its value, to the last bit.

    Raises:
        ValueError: For no terms, or weights that sum to zero.
    """
    total, waiting = None, None
    for term in terms:
        if waiting is not None:
            total = _first(*waiting) if total is None else _add(total, *waiting)
        waiting = term
    if waiting is None:
        raise ValueError("weighted_mean: expected at least one (value, weight), got none.")
    if total is None:
        value, weight = waiting
        _nonzero(weight)
        return jax.tree.map(lambda v: v.astype(accumulation_dtype(v)), value)
    sums, weight = _add(total, *waiting)
    if not isinstance(waiting[1], int):
        _nonzero(weight)
    return _divide(sums, weight)


# Compiled programs of a function, dropped with it: its term in a running sum, and its scans.
_PROGRAMS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _sum_programs(fn: Callable) -> tuple[Callable, Callable]:
    """`zero(args, batch)` and `add(total, weight, args, batch) -> (total, token)` for a function.

    The sum shares the program of the gradient, which spares a pass over memory for each batch. The
    token tells when the step is done, as `total` itself is donated to the next.
    """
    programs = _PROGRAMS.setdefault(fn, {})
    if "sum" not in programs:
        ref = weakref.ref(fn)

        def term(weight, args, batch):
            return _first(jax.jit(ref())(*args, batch), weight)  # type: ignore[arg-type]

        @jax.jit
        def zero(args, batch):
            shapes = jax.eval_shape(lambda: term(1, args, batch))
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        @functools.partial(jax.jit, donate_argnums=0)
        def add(total, weight, args, batch):
            total = jax.tree.map(jnp.add, total, term(weight, args, batch))
            return total, jnp.asarray(weight) + 0

        programs["sum"] = zero, add
    return programs["sum"]


def _on_one_device(*trees: PyTree) -> bool:
    return not any(
        isinstance(x, Tracer) or (isinstance(x, jax.Array) and len(x.sharding.device_set) > 1)
        for x in jax.tree.leaves(trees)
    )


def _host_mean(fn, source, weight_fn, mesh, progress, args):
    # jax.jit finds the compiled function again by the identity of `fn`.
    compiled = jax.jit(fn)
    weigh = num_examples if weight_fn is None else jax.jit(weight_fn)
    num_batches = len(source) if hasattr(getattr(source, "source", source), "__len__") else None

    def weighted_batches():
        for done, pieces in enumerate(prefetch(source, mesh), start=1):
            for batch in pieces:
                yield batch, weigh(batch)
            if progress is not None:
                progress(done, num_batches)

    def terms():
        before = None
        for batch, weight in weighted_batches():
            value = compiled(*args, batch)
            yield value, weight
            # The host runs at most one batch ahead, or a fast reader would fill the memory.
            jax.block_until_ready(before)
            before = [x for x in jax.tree.leaves(value)[:1] if not isinstance(x, Tracer)]

    # A sharded sum takes its sharding from the terms, and one term keeps its value to the last bit.
    if num_batches == 1 or mesh is not None or not _on_one_device(args):
        return weighted_mean(terms())
    zero, add = _sum_programs(fn)
    total, token = None, None
    # Slices of arrays in memory take none, and waiting for each step costs 3 % of a small gradient.
    bounded = not isinstance(source, Batches) or jax.default_backend() != "cpu"
    for batch, weight in weighted_batches():
        if total is None:
            if not _on_one_device(batch):
                return weighted_mean(terms())
            total = zero(args, batch)
        before = token
        total, token = add(total, weight, args, batch)
        if bounded:
            jax.block_until_ready(before)
    assert total is not None
    if weight_fn is not None:
        _nonzero(total[1])
    return _divide(*total)


def _scan_mean(fn, source, weight_fn, mesh, progress, args):
    del mesh
    per_fn = _PROGRAMS.setdefault(fn, {})
    slot = (None if weight_fn is None else weakref.ref(weight_fn), source.batch_size)
    if slot not in per_fn:
        per_fn[slot] = jax.jit(
            functools.partial(_scan, weakref.ref(fn), slot[0], source.batch_size),
            static_argnames="drop_remainder",
        )
    total = per_fn[slot](args, source.arrays, drop_remainder=source.drop_remainder)
    _nonzero(total[1])
    if progress is not None:
        progress(len(source), len(source))
    return _divide(*total)


def _scan(fn_ref, weight_ref, size, args, arrays, *, drop_remainder):
    """The weighted sum over all batches of `arrays`, and the sum of the weights."""
    fn = fn_ref()
    weight_fn = num_examples if weight_ref is None else weight_ref()
    whole, rest = divmod(num_examples(arrays), size)

    def term(batch):
        return _first(fn(*args, batch), weight_fn(batch))

    def body(total, i):
        batch = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * size, size), arrays)
        return jax.tree.map(jnp.add, total, term(batch)), None

    tail = jax.tree.map(lambda x: x[whole * size :], arrays)
    if not whole:
        return term(tail)
    shapes = jax.eval_shape(term, jax.tree.map(lambda x: x[:size], arrays))
    total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = lax.scan(body, total, jnp.arange(whole))
    if rest and not drop_remainder:
        total = jax.tree.map(jnp.add, total, term(tail))
    return total
