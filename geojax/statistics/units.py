"""REPAIR: give the units of a merged network the means and deviations of its endpoints'.

The layers are found in the model's jaxpr: a contraction with a kernel that a bias is added to.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from geojax import batches as batches_
from geojax import progress as progress_
from geojax import tree
from geojax.statistics._program import evaluate
from geojax.statistics._sites import Site, read, read_shapes
from geojax.statistics.running import first_input

__all__ = ["RepairResult", "UnitMoments", "repair", "unit_paths"]

PyTree = Any
What = Literal["both", "scale", "shift"]
Method = Literal["sequential", "closed_form"]
_WHATS = ("both", "scale", "shift")
_METHODS = ("sequential", "closed_form")

# How this differs from the paper's notebooks (Jordan et al. 2023), which wrap each layer in a
# BatchNorm, re-estimate all of them in one train-mode pass and fold them into the layers:
# - there a layer sees inputs that were normalised batch by batch, so what the folded network has on
#   the data is not quite what was asked for. Here a layer is measured after all layers before it
#   were corrected, and meets its targets; the price is one pass for each layer in a chain;
# - the layers need not be wrapped by hand, nor belong to one architecture;
# - the means and variances are those of the whole data set, however it is cut into batches.


class UnitMoments(NamedTuple):
    """Statistics of a layer's pre-activations over examples (and positions), for each unit.

    Attributes:
        mean: In the shape of the layer's bias, float64.
        std: The same for the standard deviation.
    """

    mean: np.ndarray
    std: np.ndarray


class RepairResult(NamedTuple):
    """The result of `repair`; the tuples run over the layers in the order of the model.

    Attributes:
        params: The corrected network.
        layers: The paths of the layers' kernels.
        targets: What the moments ought to be: those of the endpoints, interpolated. With 'scale'
            only the deviations are aimed at, with 'shift' only the means.
        before: The moments in the merged network as it was given.
        after: The moments in `params`, measured in a pass of their own.
        num_dead: How many units of each layer did not vary in the merged network; with nothing to
            rescale, only their means were corrected.
        num_passes: Forward passes over the data, those of the endpoints included.
    """

    params: PyTree
    layers: tuple[str, ...]
    targets: tuple[UnitMoments, ...]
    before: tuple[UnitMoments, ...]
    after: tuple[UnitMoments, ...]
    num_dead: tuple[int, ...]
    num_passes: int


def unit_paths(
    apply_fn: Callable[..., Any],
    params: PyTree,
    batch: PyTree,
    *,
    state: PyTree | None = None,
    inputs_fn: Callable[[PyTree], PyTree] | None = None,
) -> list[tuple[str, str]]:
    """The layers that `repair` can correct, as (kernel, bias) paths in the model's order.

    Nothing is computed: the model is traced on the shapes of its arguments.
    """
    params = jax.tree.map(jnp.asarray, params)
    paths = tree.paths(params)
    sites = read_shapes(apply_fn, params, state, batch, inputs_fn or first_input).sites
    return [(paths[site.kernel], paths[site.bias]) for site in sites]


# --------------------------------------------------------------------------------- moments of units


def _units(apply_fn, with_state, params, state, inputs) -> list[tuple[jax.Array, tuple[int, ...]]]:
    """The pre-activations of all layers, the units' axes last, and the shapes of their biases."""
    reading = read(apply_fn, with_state, params, state, inputs)
    leaves = jax.tree.leaves(params)
    values = evaluate(
        reading.program,
        jax.tree.leaves((params, state, inputs)),
        {site.output for site in reading.sites},
    )
    out = []
    for site in reading.sites:
        z = values[site.output]
        kept = [axis for axis in site.unit_axes if axis is not None]
        order = [i for i in range(z.ndim) if i not in kept] + kept
        z = jnp.transpose(z.astype(tree.accumulation_dtype(z)), order)
        out.append((z, jnp.shape(leaves[site.bias])))
    return out


def _terms(z: jax.Array, shape: tuple[int, ...], reference: jax.Array) -> tuple[jax.Array, ...]:
    """What a pass averages for a layer: the batch's mean less the reference, square, variance."""
    over = tuple(range(z.ndim - sum(size != 1 for size in shape)))
    mean = jnp.mean(z, axis=over)
    # A second time about the first, or a long sum of equal numbers seems to vary.
    mean = mean + jnp.mean(z - mean[(None,) * len(over)], axis=over)
    within = jnp.mean(jnp.square(z - mean[(None,) * len(over)]), axis=over)
    shift = mean.reshape(shape) - reference
    return shift, jnp.square(shift), within.reshape(shape)


# The per-batch functions of a pass are cached so that they are compiled once for a model.
@functools.lru_cache(maxsize=64)
def _moments_fn(apply_fn: Callable, with_state: bool, inputs_fn: Callable) -> Callable:
    def moments(params, state, references, batch):
        units = _units(apply_fn, with_state, params, state, inputs_fn(batch))
        return [_terms(*unit, ref) for unit, ref in zip(units, references, strict=True)]

    return moments


@functools.lru_cache(maxsize=64)
def _mixture_fn(apply_fn: Callable, with_state: bool, inputs_fn: Callable) -> Callable:
    """Moments of the mean of several networks' pre-activations."""

    def moments(networks, states_and_shares, references, batch):
        states, shares = states_and_shares
        inputs = inputs_fn(batch)
        every = [
            _units(apply_fn, with_state, params, state, inputs)
            for params, state in zip(networks, states, strict=True)
        ]
        out = []
        for units, reference in zip(zip(*every, strict=True), references, strict=True):
            z = sum(shares[i].astype(z.dtype) * z for i, (z, _) in enumerate(units))
            out.append(_terms(jnp.asarray(z), units[0][1], reference))
        return out

    return moments


class _Passes:
    """Forward passes over one data set, counted."""

    def __init__(self, moments: Callable, source: Any, mesh: Any, names: list[str]):
        first = next(iter(source))
        self.probe = batches_.mean(moments, [first], mesh=mesh)
        self.whole = batches_.mean(moments, source, mesh=mesh)
        # One batch in memory is its own reference.
        self.single = isinstance(source, batches_.Batches) and len(source) == 1
        self.names = names
        self.count = 0

    def __call__(self, params: PyTree, state: PyTree, zeros: list) -> list[UnitMoments]:
        """The moments of all layers, about those of the first batch to prevent cancellation."""
        found = self.probe(params, state, zeros)
        references = zeros
        if not self.single:
            references = [shift for shift, _, _ in found]
            found = self.whole(params, state, references)
        self.count += 1
        out = []
        for name, terms, reference in zip(self.names, found, references, strict=True):
            shift, square, within = (np.asarray(x).astype(np.float64) for x in terms)
            between = 0.0 if self.single else np.maximum(square - shift**2, 0)
            mean = np.asarray(reference).astype(np.float64) + shift
            moment = UnitMoments(mean, np.sqrt(within + between))
            if not (np.isfinite(moment.mean).all() and np.isfinite(moment.std).all()):
                raise ValueError(
                    f"repair: the pre-activations of the layer with kernel {name} are not finite "
                    "on these data; look for NaN in the parameters or the inputs."
                )
            out.append(moment)
        return out


# --------------------------------------------------------------------------------------- correction


@functools.partial(jax.jit, static_argnames="axes")
def _correct(kernel, bias, factor, mean, target, *, axes):
    """Kernel and bias with units scaled by `factor` about `mean`, which moves to `target`."""
    kept = [axis for axis in axes if axis is not None]
    order = sorted(range(len(kept)), key=lambda i: kept[i])
    per_unit = jnp.transpose(factor.reshape([kernel.shape[axis] for axis in kept]), order)
    shape = [size if i in kept else 1 for i, size in enumerate(kernel.shape)]
    dtype = factor.dtype
    new_kernel = kernel.astype(dtype) * per_unit.reshape(shape)
    new_bias = target + factor * (bias.astype(dtype) - mean)
    return new_kernel.astype(kernel.dtype), new_bias.astype(bias.dtype)


def repair(
    apply_fn: Callable[..., Any],
    merged: PyTree,
    endpoints: PyTree,
    batches: Any,
    *,
    weights: jax.typing.ArrayLike | None = None,
    what: What = "both",
    method: Method = "sequential",
    select: Callable[[str], bool] | None = None,
    state: PyTree | None = None,
    endpoint_states: PyTree | None = None,
    inputs_fn: Callable[[PyTree], PyTree] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    progress: bool | None = None,
) -> RepairResult:
    r"""Correct a merged network so that its units vary as those of its endpoints do.

    Averaging networks shrinks the variance of their activations, the more so the deeper. For each
    unit with a bias, with pre-activation mean :math:`\hat\mu` and deviation :math:`\hat\sigma` in
    the merged network and :math:`\mu = \sum_i c_i \mu_i`, :math:`\sigma = \sum_i c_i \sigma_i` from
    the endpoints (deviations are averaged, not variances),

    .. math:: w' = \frac{\sigma}{\hat\sigma} w, \qquad
        b' = \mu + \frac{\sigma}{\hat\sigma} (b - \hat\mu).

    'sequential' corrects layers one after another, each measured behind the corrected ones, so
    every one of them meets its targets on these data; layers of which none feeds the other share a
    pass. 'closed_form' takes the merged network's pre-activations to be the weighted means of the
    endpoints', for which :math:`\hat\mu = \mu` and :math:`\hat\sigma^2 = \sum_{ij} c_i c_j \sigma_i
    \sigma_j \rho_{ij}` with the correlations of matched units: exact for the first layers, an
    approximation behind nonlinearities, and its cost does not grow with the depth.

    Args:
        apply_fn: `apply_fn(params, inputs) -> outputs`, or `apply_fn(params, *inputs)` where
            `inputs_fn` gives a tuple; with `state` it is `apply_fn(params, state, inputs, train)
            -> (outputs, new_state)`, called with `train=False`.
        merged: The merged network, such as `permute.merging.weighted_mean(endpoints, weights)`.
        endpoints: The networks that were merged, aligned: stacked, leaves `(n, ...)`.
        batches: One batch or a re-iterable of batches, without augmentation.
        weights: c, `(n,)`, nonnegative, summing to one; by default all equal. For the point at t
            between two networks it is `(1 - t, t)`.
        what: 'both' (REPAIR), 'scale' for the deviations alone, about the means that the merged
            network has (RESCALE), or 'shift' for the means alone (RESHIFT).
        method: 'sequential' or 'closed_form'.
        select: From a kernel's path to whether its layer is corrected; by default all are that
            `unit_paths` names: dense layers and convolutions, the last one included, whose kernel
            and bias serve in one place only. Layers inside a scan are not seen.
        state: The merged network's state, for a stateful model. In a network with BatchNorm its
            running statistics hold for `merged`: call `refresh` after the repair.
        endpoint_states: The endpoints' states, stacked; by default `state` for all of them.
        inputs_fn: From a batch to the model's inputs; by default as for `refresh`.
        mesh: Split each batch over this mesh's first axis.
        progress: True for a progress bar, False for none, None for one on long runs.

    Returns:
        The network, with the moments asked for, found before and reached. Cost in forward passes
        over the data: n for the endpoints, one for each layer in the longest chain, and one to
        measure the result; in closed form 2n + 2. Compiled once.

    Raises:
        ValueError: For a network without such a layer; for weights that do not fit or sum to one;
            for pre-activations that are not finite, naming the layer.
        TypeError: If a leaf of `merged` is not floating, naming it.

    Example:
        >>> def apply_fn(w, x):
        ...     return x @ w["kernel"] + w["bias"][None]
        >>> a = {"kernel": jnp.array([[1.0]]), "bias": jnp.array([0.0])}
        >>> b = {"kernel": jnp.array([[-3.0]]), "bias": jnp.array([2.0])}
        >>> ends = tree.stack([a, b])
        >>> x = jnp.array([[-1.0], [1.0]])
        >>> merged = tree.combine(ends, jnp.array([0.5, 0.5]))  # kernel -1: less than either
        >>> result = repair(apply_fn, merged, ends, x, progress=False)
        >>> result.params["kernel"].tolist(), result.params["bias"].tolist()
        ([[-2.0]], [1.0])

    Reference:
        Jordan, Sedghi, Saukh, Entezari and Neyshabur, REPAIR: REnormalizing Permuted Activations
        for Interpolation Repair, 2023, equations 3 and 4.
    """
    if method not in _METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(_METHODS)}.")
    if what not in _WHATS:
        raise ValueError(f"what is {what!r}; expected one of {', '.join(_WHATS)}.")
    tree.check_floating(merged, "merged")
    n = tree.num_points(endpoints)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), endpoints)
    tree.check_same(merged, one, names=("merged", "one of the endpoints"))
    shares = np.full(n, 1 / n) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (n,) or not (abs(shares.sum() - 1) <= 1e-5 and (shares >= 0).all()):
        raise ValueError(
            f"repair: weights are {shares.tolist()}; expected {n} nonnegative numbers that sum to "
            "1, one for each endpoint."
        )
    inputs_fn = inputs_fn or first_input
    source = batches_.as_batches(batches)
    merged = jax.tree.map(jnp.asarray, merged)
    paths = tree.paths(merged)
    sites = read_shapes(apply_fn, merged, state, next(iter(source)), inputs_fn).sites
    chosen = [i for i, s in enumerate(sites) if select is None or select(paths[s.kernel])]
    if not chosen:
        seen = f" among {', '.join(paths[s.kernel] for s in sites)}" if sites else ""
        raise ValueError(
            f"repair: no layer to correct{seen}; expected a dense layer or convolution in `merged` "
            "with a kernel and a bias that serve in one place only, outside of any scan."
        )
    leaves, treedef = jax.tree.flatten(merged)
    zeros = [
        jnp.zeros(leaves[s.bias].shape, tree.accumulation_dtype(leaves[s.bias])) for s in sites
    ]
    settings = apply_fn, state is not None, inputs_fn
    names = [paths[s.kernel] for s in sites]
    passes = _Passes(_moments_fn(*settings), source, mesh, names)
    levels = sorted({sites[i].level for i in chosen})
    total = n + len(levels) + 1 if method == "sequential" else 2 * n + 2
    own_state = {} if state is None else state
    states = [own_state] * n if endpoint_states is None else tree.unstack(endpoint_states)
    networks = tree.unstack(endpoints)
    num_dead = dict.fromkeys(chosen, 0)
    with progress_.bar(total, "repair", show=progress) as update:

        def measure(params, its_state):
            found = passes(params, its_state, zeros)
            update(passes.count, total)
            return found

        ends = [measure(*one) for one in zip(networks, states, strict=True)]
        targets = [
            UnitMoments(
                np.tensordot(shares, np.stack([m.mean for m in site]), 1),
                np.tensordot(shares, np.stack([m.std for m in site]), 1),
            )
            for site in zip(*ends, strict=True)
        ]
        before = measure(merged, own_state)
        found = before
        if method == "closed_form":
            mixture = _Passes(_mixture_fn(*settings), source, mesh, names)
            found = mixture(tuple(networks), (tuple(states), jnp.asarray(shares)), zeros)
            passes.count += n
        for level in levels:
            if method == "sequential" and level > levels[0]:
                found = measure(treedef.unflatten(leaves), own_state)
            for i in chosen:
                if sites[i].level == level:
                    num_dead[i] = _correct_site(leaves, sites[i], found[i], targets[i], what)
        params = treedef.unflatten(leaves)
        after = measure(params, own_state)

    def of_chosen(moments):
        return tuple(moments[i] for i in chosen)

    return RepairResult(
        params,
        layers=tuple(paths[sites[i].kernel] for i in chosen),
        targets=of_chosen(targets),
        before=of_chosen(before),
        after=of_chosen(after),
        num_dead=of_chosen(num_dead),
        num_passes=passes.count,
    )


def _correct_site(
    leaves: list[jax.Array], site: Site, found: UnitMoments, target: UnitMoments, what: What
) -> int:
    """Correct a layer in the list of leaves, and count its units that do not vary."""
    kernel, bias = leaves[site.kernel], leaves[site.bias]
    # Rounding makes a constant unit seem to vary by about this much.
    noise = 4 * float(jnp.finfo(kernel.dtype).eps) * np.abs(found.mean)
    dead = found.std <= noise
    factor = np.divide(target.std, found.std, out=np.ones_like(found.std), where=~dead)
    if what == "shift":
        factor = np.ones_like(factor)
    mean = found.mean if what == "scale" else target.mean
    dtype = tree.accumulation_dtype(kernel, bias)
    leaves[site.kernel], leaves[site.bias] = _correct(
        kernel,
        bias,
        *(jnp.asarray(x, dtype) for x in (factor, found.mean, mean)),
        axes=site.kernel_axes,
    )
    return int(dead.sum())
