"""Running statistics of normalisation layers, exact ones for any model, from a data set.

A network with BatchNorm is wrong at a new point until its running statistics are those of that
point. They are computed here, not tracked along a training run.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.sharding import AxisType, Mesh, NamedSharding

from geojax import batches as batches_
from geojax import tree
from geojax.statistics._program import (
    Constant,
    Instruction,
    Program,
    ancestors,
    descendants,
    evaluate,
    inline,
)

__all__ = ["refresh", "refresh_points", "statistic_paths"]

PyTree = Any
Method = Literal["exact", "batchwise", "mean_of_batches"]
_METHODS = ("exact", "batchwise", "mean_of_batches")

# How this differs from the original code (Garipov et al. 2018, `update_bn`, and torch's of the same
# name), which averages what a train-mode pass leaves in the running averages:
# - the variance is the total one, within plus between batches; theirs leaves out the variance of
#   the batch means, which is most of it where batches are sorted by class;
# - in a network with several such layers a train-mode pass feeds each layer with activations that
#   were normalised batch by batch. Here the pass is repeated with the statistics found so far in
#   their place until they reproduce themselves, so the result is that of the whole data set in one
#   batch, whatever the batches;
# - momentum never enters: the batch statistic is read where the running average reads it, in the
#   model's jaxpr.


class _Layer(NamedTuple):
    """A normalisation layer: where its batch statistics are, and the state leaves they feed."""

    mean_leaf: int
    var_leaf: int | None
    mean: int
    var: int | None
    own: frozenset[int]  # variables between the mean and the variance, which read the batch's own
    count: int | None  # elements of a batch in one statistic


_PEELED = {
    "convert_element_type",
    "stop_gradient",
    "copy",
    "reshape",
    "broadcast_in_dim",
    "squeeze",
}
_AVERAGING = {"add", "add_any", "sub", "mul", "div", "neg", "select_n"} | _PEELED


def _batch_statistic(
    producers: dict[int, Instruction], out: Any, from_state: set[int], from_data: set[int]
) -> int | str:
    """The variable that a running average reads from the batch, or what stands in the way."""
    found: set[int] = set()
    stack, seen = [out], set()
    while stack:
        x = stack.pop()
        if not isinstance(x, int) or x in seen or x not in from_data:
            continue
        seen.add(x)
        instruction = producers[x]
        name = instruction.eqn.primitive.name
        if x in from_state:
            if name not in _AVERAGING:
                return f"it goes through `{name}`"
            stack += instruction.inputs
            continue
        scaled = [y for y in instruction.inputs if isinstance(y, int) and y in from_data]
        alone = [y for y in instruction.inputs if y not in scaled]
        constant = all(isinstance(y, Constant) for y in alone)
        if name in ("mul", "neg") and len(scaled) == 1 and constant and _same_size(instruction):
            stack += scaled  # the weight 1 - momentum
        elif name in _PEELED and _same_size(instruction):
            stack += scaled
        else:
            found.add(x)
    if len(found) != 1:
        return f"it reads {len(found)} statistics of the batch"
    return found.pop()


def _same_size(instruction: Instruction) -> bool:
    sizes = [v.aval.size for v in instruction.eqn.invars if not isinstance(v, jex.Literal)]
    return all(size == instruction.eqn.outvars[0].aval.size for size in sizes)


def _elements(producers: dict[int, Instruction], x: int) -> int | None:
    """How many elements the nearest reduction behind a statistic takes together."""
    while x in producers:
        instruction = producers[x]
        if instruction.eqn.primitive.name == "reduce_sum":
            return instruction.eqn.invars[0].aval.size // max(
                instruction.eqn.outvars[0].aval.size, 1
            )
        before = [y for y in instruction.inputs if isinstance(y, int)]
        if len(before) != 1:
            return None
        x = before[0]
    return None


def _partner(path: str) -> list[str]:
    """What the variance beside a mean may be called."""
    head, _, tail = path.rpartition("mean")
    return [head + name + tail for name in ("var", "variance")]


class _Reading(NamedTuple):
    program: Program
    layers: list[_Layer]


def _read(apply_fn: Callable, params: PyTree, state: PyTree, inputs: PyTree) -> _Reading:
    """Trace the model in train mode and find its normalisation layers, in order."""

    def train(params, state, inputs):
        new_state = apply_fn(params, state, inputs, True)[1]
        tree.check_same(state, new_state, names=("state", "the state that apply_fn returned"))
        return jax.tree.leaves(new_state)

    program = inline(jax.make_jaxpr(train)(params, state, inputs))
    paths = tree.paths(state)
    num_params, num_state = len(jax.tree.leaves(params)), len(paths)
    state_numbers = program.inputs[num_params : num_params + num_state]
    producers = {y: i for i in program.instructions for y in i.outputs}
    from_data = descendants(program, set(program.inputs[num_params + num_state :]))
    from_state = descendants(program, set(state_numbers))
    position = {y: k for k, i in enumerate(program.instructions) for y in i.outputs}

    statistics: dict[str, tuple[int, int]] = {}
    for leaf, (path, out) in enumerate(zip(paths, program.outputs, strict=True)):
        if not isinstance(out, int) or out not in from_data:
            continue
        statistic = _batch_statistic(producers, out, from_state, from_data)
        if isinstance(statistic, str):
            raise ValueError(
                f"statistics: state leaf {path} depends on the data in train mode, but is no "
                f"running average of a mean or variance over the batch: {statistic}. Statistics "
                "inside a scanned stack of layers cannot be read; unroll the stack, and keep other "
                "state out of `state`."
            )
        statistics[path] = (leaf, statistic)

    layers = []
    claimed = set()
    for path, (leaf, statistic) in statistics.items():
        if "mean" not in path:
            continue
        var = next((statistics[p] for p in _partner(path) if p in statistics), None)
        claimed |= {path} | {p for p in _partner(path) if p in statistics}
        own = frozenset()
        if var is not None:
            after_mean = descendants(program, {statistic})
            own = frozenset(after_mean & ancestors(producers, var[1]))
        layers.append(
            _Layer(
                leaf,
                None if var is None else var[0],
                statistic,
                None if var is None else var[1],
                own,
                _elements(producers, statistic),
            )
        )
    stray = [path for path in statistics if path not in claimed]
    if stray:
        raise ValueError(
            f"statistics: state leaf {stray[0]} is a running average of the data, but neither "
            "named 'mean' nor the 'var' beside one; name the leaves of a normalisation layer so."
        )
    return _Reading(program, sorted(layers, key=lambda layer: position[layer.mean]))


def _run(
    reading: _Reading, arguments: list[Any], replaced: dict[int, Any]
) -> list[tuple[jax.Array, jax.Array | None]]:
    """The batch's own (mean, variance) of each layer, with `replaced` in their place downstream."""
    program, layers = reading
    own = {layer.mean: layer.own for layer in layers}
    wanted = {x for layer in layers for x in (layer.mean, layer.var) if x is not None}

    def read(x, value, outputs):
        if x in replaced and not (x in own and any(y in own[x] for y in outputs)):
            return replaced[x](value)
        return value

    values = evaluate(program, arguments, wanted, read)
    return [(values[x.mean], None if x.var is None else values[x.var]) for x in layers]


# --------------------------------------------------------------------------- moments over data


class _Moments(NamedTuple):
    """What one pass averages for a layer, about a reference mean that prevents cancellation."""

    shift: jax.Array  # batch mean - reference
    square: jax.Array  # (batch mean - reference)^2
    within: jax.Array | None  # variance within the batch


def first_input(batch: PyTree) -> PyTree:
    """The model's inputs in a batch: the first of a tuple, the entry "inputs", or the batch."""
    if isinstance(batch, (tuple, list)):
        return batch[0]
    return batch["inputs"] if isinstance(batch, dict) and "inputs" in batch else batch


@functools.lru_cache(maxsize=64)
def _moments_fn(apply_fn: Callable, inputs_fn: Callable, unbiased: bool, mapped: bool) -> Callable:
    """The per-batch function of a pass; cached so that it is compiled once for a model."""

    def moments(params, state, estimate, use, batch):
        inputs = inputs_fn(batch)
        reading = _read(apply_fn, params, state, inputs)
        replaced = {}
        for layer, (mean, var) in zip(reading.layers, estimate, strict=True):
            replaced[layer.mean] = functools.partial(_choose, use, mean)
            if layer.var is not None:
                replaced[layer.var] = functools.partial(_choose, use, var)
        out = []
        arguments = jax.tree.leaves((params, state, inputs))
        found = _run(reading, arguments, replaced)
        for layer, (mean, var), (reference, _) in zip(reading.layers, found, estimate, strict=True):
            shift = mean.astype(reference.dtype).reshape(reference.shape) - reference
            if var is not None:
                var = var.astype(reference.dtype).reshape(reference.shape)
                if unbiased:
                    if layer.count is None or layer.count < 2:
                        raise ValueError(
                            "statistics: the unbiased variance within a batch needs a plain sum "
                            "over two or more elements; use method='exact' for this model."
                        )
                    var = var * (layer.count / (layer.count - 1))
            out.append(_Moments(shift, jnp.square(shift), var))
        return out

    if not mapped:
        return moments
    return jax.vmap(moments, in_axes=(0, None, 0, None, None))


def _choose(use: jax.Array, given: jax.Array, own: jax.Array) -> jax.Array:
    given = given.astype(own.dtype).reshape(own.shape)
    sharding = getattr(jax.typeof(own), "sharding", None)
    if sharding is not None and AxisType.Explicit in sharding.mesh.axis_types:
        given = jax.sharding.reshard(given, sharding)
    return jnp.where(use, given, own)


def _layers_of(apply_fn, params, state, batch, inputs_fn) -> tuple[_Layer, ...]:
    leaves, structure = jax.tree.flatten((params, state, inputs_fn(batch)))
    return _layers_for(apply_fn, structure, tuple((x.shape, x.dtype) for x in leaves))


@functools.lru_cache(maxsize=64)
def _layers_for(apply_fn: Callable, structure: Any, shapes: tuple) -> tuple[_Layer, ...]:
    """Traced once for a model and its shapes, not at every position of a curve."""
    given = structure.unflatten(jax.ShapeDtypeStruct(*x) for x in shapes)
    return tuple(_read(apply_fn, *given).layers)


def statistic_paths(
    apply_fn: Callable[..., Any],
    params: PyTree,
    state: PyTree,
    batch: PyTree,
    *,
    inputs_fn: Callable[[PyTree], PyTree] | None = None,
) -> list[tuple[str, str | None]]:
    """The state leaves that `refresh` computes, as (mean, variance) paths in the model's order.

    Nothing is computed: the model is traced on the shapes of its arguments.
    """
    paths = tree.paths(state)
    layers = _layers_of(apply_fn, params, state, batch, inputs_fn or first_input)
    return [(paths[x.mean_leaf], None if x.var_leaf is None else paths[x.var_leaf]) for x in layers]


def refresh(
    apply_fn: Callable[..., Any],
    params: PyTree,
    state: PyTree,
    batches: Any,
    *,
    method: Method = "exact",
    inputs_fn: Callable[[PyTree], PyTree] | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    rtol: float = 1e-5,
    progress: Callable[[int, int | None], None] | None = None,
) -> PyTree:
    r"""The state with the normalisation statistics of these parameters on this data.

    'exact' gives what one train-mode pass over the whole data set as a single batch would leave:
    the mean :math:`\mu = \sum_b n_b \mu_b / n` and the total variance
    :math:`\sum_b n_b (\sigma_b^2 + (\mu_b - \mu)^2) / n` of each layer's input, where that input
    itself was normalised with the statistics returned here. It does not depend on how the data are
    cut or ordered.

    Args:
        apply_fn: `apply_fn(params, state, inputs, train) -> (outputs, new_state)`. In train mode
            each layer must normalise with its batch and return a running average, of any momentum,
            in leaves whose paths differ by 'mean' and 'var'. No key is passed: no dropout.
        params: The point at which statistics are wanted.
        state: The network's state. Leaves that are no such statistics come back as they are, and a
            state without any comes back itself, with no data read.
        batches: One batch or a re-iterable, without augmentation; a subset by `batches.take`.
        method: 'exact'. 'batchwise': one pass, the total variance of activations as they are in
            train mode; equal to 'exact' for a single layer or a single batch, and else off by
            the order of one over the batch size if batches are random, by anything if they are
            sorted. 'mean_of_batches': the recipe of Garipov et al., one pass, means of the batch
            means and of the unbiased variances within batches.
        inputs_fn: From a batch to the model's inputs; by default the first entry of a tuple, the
            entry 'inputs' of a dict that has one, or else the batch itself.
        weight_fn: Weight of a batch; by default its number of examples.
        mesh: Split each batch over this mesh's first axis.
        rtol: 'exact' stops when a pass moves no mean by more than `rtol` standard deviations and no
            variance by more than that fraction (root mean square over a layer's channels).
        progress: Called as `progress(passes_done, None)`.

    Returns:
        A new state; the caller's is untouched. Cost: one train-mode forward pass over the data for
        one layer; else up to one more than there are layers, and at this `rtol` as a rule all of
        them. 'batchwise' and 'mean_of_batches' take one.

    Raises:
        ValueError: For state that depends on the data but is no running mean or variance, naming
            the leaf; for a model whose statistics are updated inside a scan.

    Reference:
        Ioffe and Szegedy, Batch Normalization, 2015, algorithm 2, for the population statistics;
        Chan, Golub and LeVeque 1979 for pooling variances.
    """
    return _refresh(
        apply_fn,
        params,
        state,
        batches,
        mapped=False,
        method=method,
        inputs_fn=inputs_fn,
        weight_fn=weight_fn,
        mesh=mesh,
        rtol=rtol,
        progress=progress,
    )


def refresh_points(
    apply_fn: Callable[..., Any],
    points: PyTree,
    state: PyTree,
    batches: Any,
    *,
    num_at_once: int | None = None,
    **options: Any,
) -> PyTree:
    """`refresh` at each of n stacked points.

    Args:
        apply_fn: As for `refresh`.
        points: Stacked parameters, leaves `(n, ...)`.
        state: The state of one network; shared by all points as the start.
        batches: As for `refresh`.
        num_at_once: How many points share a pass, by vmap; by default one on the CPU, where a
            vmapped convolution is slower than a loop, and all elsewhere.
        **options: The keywords of `refresh`.

    Returns:
        Stacked states, leaves `(n, ...)`.
    """
    n = tree.num_points(points)
    if num_at_once is None:
        num_at_once = 1 if jax.default_backend() == "cpu" else n
    if num_at_once < 1:
        raise ValueError(f"num_at_once is {num_at_once}; expected at least 1.")
    states: list[PyTree] = []
    for first in range(0, n, num_at_once):
        some = jax.tree.map(lambda x, i=first: x[i : i + num_at_once], points)
        if num_at_once == 1:
            (one,) = tree.unstack(some)
            states.append(_refresh(apply_fn, one, state, batches, mapped=False, **options))
        else:
            made = _refresh(apply_fn, some, state, batches, mapped=True, **options)
            states += tree.unstack(made)
    return tree.stack(states)


def _refresh(
    apply_fn,
    params,
    state,
    batches,
    *,
    mapped,
    method="exact",
    inputs_fn=None,
    weight_fn=None,
    mesh=None,
    rtol=1e-5,
    progress=None,
):
    if method not in _METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(_METHODS)}.")
    source = batches_.as_batches(batches)
    inputs_fn = inputs_fn or first_input
    num = tree.num_points(params) if mapped else None
    leaves, treedef = jax.tree.flatten(state)

    def stacked(state):
        if not mapped:
            return state
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (num, *jnp.shape(x))), state)

    if not leaves:
        return stacked(state)
    first = next(iter(source))
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
    layers = _layers_of(apply_fn, one if mapped else params, state, first, inputs_fn)
    if not layers:
        return stacked(state)

    # Statistics in float32 or better, about the batch means of the first batch as a reference.
    estimate = []
    for layer in layers:
        leaf = jnp.asarray(leaves[layer.mean_leaf])
        zero = jnp.zeros(
            (num, *leaf.shape) if mapped else leaf.shape, tree.accumulation_dtype(leaf)
        )
        estimate.append((zero, None if layer.var_leaf is None else jnp.ones_like(zero)))
    moments = _moments_fn(apply_fn, inputs_fn, method == "mean_of_batches", mapped)
    off, on = jnp.array(False), jnp.array(True)
    probe = batches_.mean(moments, [first], weight_fn=lambda batch: jnp.ones(()), mesh=mesh)
    estimate = _pooled(probe(params, state, estimate, off), estimate, "batchwise")
    over_data = batches_.mean(moments, source, weight_fn=weight_fn, mesh=mesh)

    for done in range(len(layers) + 1):
        found = over_data(params, state, estimate, on if done else off)
        new = _pooled(found, estimate, method)
        moved, estimate = _moved(new, estimate), new
        if progress is not None:
            progress(done + 1, None)
        # The first pass is exact for the first layer, and each later one for one layer more.
        if method != "exact" or len(layers) == 1 or (done and moved <= rtol):
            break

    out = list(jax.tree.leaves(stacked(state)))
    for layer, (mean, var) in zip(layers, estimate, strict=True):
        out[layer.mean_leaf] = mean.astype(out[layer.mean_leaf].dtype)
        if layer.var_leaf is not None and var is not None:
            out[layer.var_leaf] = var.astype(out[layer.var_leaf].dtype)
    return jax.tree.unflatten(treedef, out)


def _pooled(found: list[_Moments], reference: list, method: str) -> list:
    out = []
    for moments, (mean, _) in zip(found, reference, strict=True):
        var = moments.within
        if var is not None and method != "mean_of_batches":
            between = jnp.maximum(moments.square - jnp.square(moments.shift), 0.0)
            var = var + between
        out.append((mean + moments.shift, var))
    return out


def _moved(new: list, old: list) -> float:
    """The largest change of a layer's statistics, relative to its spread."""
    worst = 0.0
    for (mean, var), (mean_before, var_before) in zip(new, old, strict=True):
        means = np.asarray(mean - mean_before, np.float64)
        if var is None:
            spread = max(float(np.mean(np.square(np.asarray(mean, np.float64)))), 1e-60)
        else:
            spread = max(float(np.mean(np.asarray(var, np.float64))), 1e-60)
            vars_ = np.asarray(var - var_before, np.float64)
            worst = max(worst, float(np.sqrt(np.mean(vars_**2))) / spread)
        worst = max(worst, float(np.sqrt(np.mean(means**2) / spread)))
    return worst
