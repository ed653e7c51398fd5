r"""Training a complex: the expected loss over its simplices, less the log of their volume.

.. math:: \min_\theta \; E_{s, c} \Big[ L\big(\textstyle\sum_i c_i w_i\big) \Big]
    - \lambda \log \sum_s V_s

How it differs from Benton et al.'s code: the volume is a volume, of all simplices, in its height
form; losses of several draws are averaged; simplices are drawn by volume; the model is left alone;
and a weight of the volume that does nothing is reported.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from geojax import fit as fit_
from geojax import tree
from geojax._families import (
    Guarded,
    HeldFixed,
    Split,
    each,
    masked,
    parts_of,
    whole,
)
from geojax.simplex import _heights, sampling
from geojax.simplex._objective import Settings, Shape, complex_loss, regularizer_of
from geojax.simplex.complexes import SimplicialComplex
from geojax.simplex.weights import Target

__all__ = ["ComplexFit", "InertVolumeWarning", "fit"]

PyTree = Any
Choose = Literal["volume", "uniform"]
# Below this share of the gradient the volume is called inert.
_INERT = 1e-3
# What the share is made of, at every step.
_NORMS = ("gradient_norm", "volume_gradient_norm", "volume_weight")


class InertVolumeWarning(UserWarning):
    """The weight of the volume is so small that training ignored it."""


class ComplexFit(NamedTuple):
    """A trained complex.

    Attributes:
        complex: Its frozen vertices are as they were, to the bit.
        history: Per step of this call: 'loss', 'data_loss', 'gradient_norm', and with a weight of
            the volume 'volume_term', 'volume_weight', 'log_volume' (of all simplices that train)
            and 'volume_gradient_norm'; with weight decay 'penalty'. Of several complexes: sums of
            the losses, means of the rest, and 'data_loss_0', 'log_volume_0' and so on of each.
        evaluations: What `evaluate` returned, with the steps.
        start: The step at which this call began; more than 0 after a resume.
        state: The state of the training loop.
        volume_share: The median over steps of the norm of the volume's gradient over that of the
            whole; NaN without a weight of the volume. Below 1e-3 the volume did nothing. It is of
            all steps of the run, those before a resume included: checkpoints keep both norms. Of
            several complexes it is the mean volume's over the root mean square of the whole ones,
            so that their number does not matter.
    """

    complex: Any
    history: dict[str, np.ndarray]
    evaluations: Any
    start: int
    state: Any
    volume_share: float


def _shape(complexes: Sequence[SimplicialComplex], free: Sequence[int], stacked: bool) -> Shape:
    first = complexes[0]
    num = first.num_vertices
    given = list(free)
    if any(
        isinstance(i, bool) or not isinstance(i, (int, np.integer)) or not -num <= i < num
        for i in given
    ):
        raise ValueError(f"free is {free}; expected indices of the {num} vertices.")
    chosen = tuple(sorted({int(i) % num for i in given}))
    if not chosen:
        raise ValueError("free is empty; there is nothing to train.")
    touched = tuple(s for s in first.simplices if set(s) & set(chosen))
    for i in chosen:
        if not any(i in s for s in touched):
            raise ValueError(f"vertex {i} is free and belongs to no simplex.")
    fixed = tuple(i for i in range(num) if i not in chosen)
    return Shape(num, Split(chosen, fixed), touched, len(complexes) if stacked else 0)


# -------------------------------------------------------------------------------- the run


def _settings(shape: Shape, **given: Any) -> Settings:
    for name, least in (("num_samples", 1),):
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}.")
    for name, known in (
        ("samples", ("sequential", "vmap")),
        ("reduction", ("mean", "sum")),
        ("decay", ("point", "vertices")),
        ("stochastic", ("shared", "independent")),
        ("volumes", ("all", "first", "each", "original")),
    ):
        if given[name] not in known:
            raise ValueError(f"{name} is {given[name]!r}; expected one of {known}.")
    for name in ("weight_decay", "similarity_weight"):
        if not given[name] >= 0:
            raise ValueError(f"{name} is {given[name]!r}; expected at least 0.")
        given[name] = float(given[name])
    choose = given["choose"]
    dimensions = {len(s) for s in shape.simplices}
    if isinstance(choose, str):
        if choose not in ("volume", "uniform"):
            raise ValueError(
                f"choose is {choose!r}; expected 'volume', 'uniform' or a probability for each of "
                f"the {len(shape.simplices)} simplices with a free vertex."
            )
        if choose == "volume" and len(dimensions) > 1:
            raise ValueError(
                "choose='volume' compares volumes of different dimensions, of simplices with "
                f"{sorted(dimensions)} vertices; give a probability for each, or 'uniform'."
            )
    else:
        shares = np.asarray(choose, np.float64)
        if shares.shape != (len(shape.simplices),) or (shares < 0).any() or not shares.sum() > 0:
            raise ValueError(
                f"choose has shape {shares.shape}; expected {len(shape.simplices)} nonnegative "
                "probabilities, one for each simplex with a free vertex."
            )
        given["choose"] = tuple((shares / shares.sum()).tolist())
    given["num_samples"] = int(given["num_samples"])
    return Settings(**given)


def _check_weight(weight: Any, settings: Settings, shape: Shape) -> None:
    if isinstance(weight, Target) or callable(weight):
        pass
    elif isinstance(weight, bool) or not isinstance(weight, (int, float, np.number)) or weight < 0:
        raise ValueError(
            f"volume_weight is {weight!r}; expected a number of at least 0, a function of the "
            "step, or a simplex.Target."
        )
    if (callable(weight) or weight != 0) and settings.volumes == "all":
        dimensions = {len(s) for s in shape.simplices}
        if len(dimensions) > 1:
            raise ValueError(
                "volumes='all' adds volumes of different dimensions, of simplices with "
                f"{sorted(dimensions)} vertices; 'each' adds their logarithms."
            )


class _Prepared(NamedTuple):
    """What a run hands to `geojax.fit`."""

    loss: Callable
    parts: dict[str, PyTree]
    optimizer: Any
    regularizer: Callable | None
    frozen: Any
    shape: Shape


def _prepare(
    loss_fn, complex, optimizer, *, free, together, volume_weight, layerwise, **given
) -> _Prepared:
    """The loss, the parts and the optimizer of a run, checked."""
    stacked = not isinstance(complex, SimplicialComplex)
    complexes = _checked_complexes(complex) if stacked else [complex]
    if together not in ("vmap", "sequential"):
        raise ValueError(f"together is {together!r}; expected 'vmap' or 'sequential'.")
    shape = _shape(complexes, free, stacked)
    layers = None
    if layerwise is not False:
        layers = sampling.layer_numbers(complexes[0].vertices, layerwise)
    settings = _settings(shape, layers=layers, **given)
    _check_weight(volume_weight, settings, shape)
    parts = [parts_of(one.vertices, shape.split) for one in complexes]
    faces = None
    weighted = callable(volume_weight) or volume_weight != 0
    by_volume = settings.choose == "volume" and len(shape.simplices) > 1
    if shape.one_each and (by_volume or (weighted and settings.volumes != "original")):
        at = {i: place for place, i in enumerate(shape.split.fixed)}
        below = tuple(tuple(at[i] for i in s if i in at) for s in shape.simplices)
        made = [_heights.bases(one["fixed"], below) for one in parts]
        faces = made[0][0]._replace(passes=max(found.passes for found, _ in made))
        parts = [one | {"bases": arrays} for one, (_, arrays) in zip(parts, made, strict=True)]
    stacks = tree.stack(parts) if stacked else parts[0]
    labels = tuple((name, name == "free") for name in stacks)
    rule = masked(optimizer, labels)
    return _Prepared(
        complex_loss(loss_fn, shape, settings, faces, together),
        stacks,
        each(rule) if stacked else rule,
        regularizer_of(shape, settings, faces, volume_weight, together),
        HeldFixed() if len(stacks) > 1 else None,
        shape,
    )


def fit(
    loss_fn: Callable[..., Any],
    complex: SimplicialComplex | Sequence[SimplicialComplex],
    batches: Any,
    optimizer: Any,
    num_steps: int,
    *,
    key: jax.Array,
    free: Sequence[int] = (-1,),
    num_samples: int = 5,
    samples: Literal["sequential", "vmap"] = "sequential",
    reduction: Literal["mean", "sum"] = "mean",
    choose: Choose | Sequence[float] = "volume",
    volume_weight: float | Callable[[jax.Array], jax.Array] | Target = 0.0,
    volumes: Literal["all", "first", "each", "original"] = "all",
    weight_decay: float = 0.0,
    decay: Literal["point", "vertices"] = "point",
    similarity_weight: float = 0.0,
    layerwise: bool | Callable[[str], Any] = False,
    stochastic: Literal["shared", "independent"] = "shared",
    together: Literal["vmap", "sequential"] = "vmap",
    evaluate: Callable[[Any, int], dict[str, Any]] | None = None,
    evaluate_every: int | None = None,
    **options: Any,
) -> ComplexFit:
    """Train some vertices of a complex so that the loss is low within its simplices.

    A step draws `num_samples` points, each uniform within a simplex that has a free vertex, and
    costs as many ordinary gradients; with one free vertex its cost beyond them is a few reads of
    the frozen vertices, whatever their number.

    Args:
        loss_fn: `(params, batch)` or `(params, batch, key)` to the mean loss, a scalar.
        complex: The complex; or several of the same simplices, trained side by side, each as if
            alone, but for the order of the data that they share.
        batches: One batch or a re-iterable.
        optimizer: An optax transformation; it sees the free vertices alone, stacked `(f, ...)`. Of
            several complexes each has a state of its own.
        num_steps: Optimizer steps.
        key: For the draws, dropout and augmentation; complex i of several uses `fold_in` with i.
        free: The vertices that train: by default the last, as when a simplex grows. All of them,
            `range(n)`, trains a subspace from scratch.
        num_samples: Points drawn in a step.
        samples: "sequential", or "vmap" for all points at once: faster on accelerators for dense
            models, with more memory.
        reduction: "mean" of the losses; "sum" as in the original's code, which multiplies the
            learning rate by `num_samples` and divides the weight of the volume by it.
        choose: How a simplex is drawn: by its "volume" as it is at that step, "uniform" as in the
            original's code, or by given probabilities.
        volume_weight: Lambda: what a unit of log volume is worth in units of the loss; a number, a
            function of the step, or a `Target`. See `simplex.weights` for the original's. What
            works is 1e-3 to 1e-2 of a loss of about 1; what does nothing raises a warning.
        volumes: "all": the log of the sum of the volumes that a free vertex belongs to. "each": the
            sum of their logs, which also goes for mixed dimensions. "first": of the first simplex
            alone. "original": log(V^2 + 1e-4) of the first simplex by Cayley-Menger determinant in
            float32, as the original's code has it; about twice log V, and wrong where flat.
        weight_decay: The factor of half the squared norm that is added to the loss.
        decay: Of which norm: the "point" that was drawn, as in Garipov et al.; or the free
            "vertices", as in the original's code.
        similarity_weight: The factor of the mean squared cosine between vertices, for subspaces
            from scratch (Wortsman et al. 2021).
        layerwise: Draw coefficients for every layer apart, within one simplex for all: points then
            fill a larger set, of which the simplex is the diagonal. A layer is all leaves of one
            parent, as a kernel and its bias; or a function of a leaf's path names its layer.
        stochastic: Whether the points of a step share the key of dropout, or have their own.
        together: Several complexes under "vmap", or one after another within a step, which is
            faster for convolutions on a CPU.
        evaluate: `(complex, step) -> dict of numbers`, every `evaluate_every` steps.
        evaluate_every: Steps between evaluations.
        **options: Further options of `geojax.fit.fit`: `transform`, `mesh`, `checkpoint` (with
            which it resumes to the bit), `log`, `accumulate`, `progress` and so on.

    Returns:
        A `ComplexFit`; its `complex` is a tuple where several were given. Memory: the vertices, and
        of the free ones an optimizer state and a gradient.

    Raises:
        ValueError: If an option is unknown or does not go with the complex; for a volume on frozen
            vertices that are affinely dependent.
        NonFiniteError: As `geojax.fit.fit`.

    Warns:
        InertVolumeWarning: If the volume's gradient was below 1e-3 of the whole, the median over
            all steps of the run, those before a resume included.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from geojax.simplex import single
        >>> loss = lambda p, batch: jnp.sum(jnp.square(p["w"][1] - batch))
        >>> start = single({"w": jnp.array([[0.0, 0.0], [0.5, 0.5]])})
        >>> found = fit(loss, start, jnp.zeros(1), optax.sgd(0.1), 200, key=jax.random.key(0),
        ...             volume_weight=0.01)
        >>> ends = found.complex.vertices["w"]
        >>> bool(abs(ends[1, 1]) < 0.1), bool(abs(ends[1, 0]) > 0.5)  # longer, where that is free
        (True, True)

    Reference:
        Benton, Maddox, Lotfi and Wilson, "Loss Surface Simplexes for Mode Connecting Volumes and
        Fast Ensembling", ICML 2021, equation 2.
    """
    made = _prepare(
        loss_fn, complex, optimizer, free=free, together=together, volume_weight=volume_weight,
        num_samples=num_samples, samples=samples, reduction=reduction, choose=choose,
        weight_decay=weight_decay, decay=decay, stochastic=stochastic, volumes=volumes,
        similarity_weight=similarity_weight, layerwise=layerwise,
    )  # fmt: skip
    for name in ("frozen", "has_metrics", "regularizer", "remember"):
        if name in options:
            raise ValueError(f"{name} is set by simplex.fit; use `free` or `volume_weight`.")
    shape, stacked = made.shape, made.shape.num_components > 0
    simplices = (complex if isinstance(complex, SimplicialComplex) else complex[0]).simplices

    def out(parts: dict[str, PyTree]) -> Any:
        if not stacked:
            return SimplicialComplex(whole(parts, shape.split), simplices)
        each = [dict(zip(parts, x, strict=True)) for x in zip(*map(tree.unstack, parts.values()),
                                                              strict=True)]  # fmt: skip
        return tuple(SimplicialComplex(whole(x, shape.split), simplices) for x in each)

    def hook(parts: dict[str, PyTree], step: int) -> dict[str, Any]:
        assert evaluate is not None
        return evaluate(out(parts), step)

    if options.get("checkpoint") is not None:
        options = options | {"checkpoint": Guarded(options["checkpoint"], made.parts)}
    result = fit_.fit(
        made.loss, made.parts, batches, made.optimizer, num_steps, key=key, has_metrics=True,
        regularizer=made.regularizer, frozen=made.frozen,
        remember=_NORMS if volume_weight != 0 else (),
        evaluate=None if evaluate is None else hook, evaluate_every=evaluate_every, **options,
    )  # fmt: skip
    history = dict(result.history)
    if not weight_decay:
        history.pop("penalty", None)
    share = _share(result.remembered, max(shape.num_components, 1))
    if share < _INERT:
        last = result.remembered["volume_weight"][-1]
        warnings.warn(
            f"simplex.fit: the volume's gradient was {share:.1e} of the whole (the median over "
            f"the steps): the volume did nothing. Raise volume_weight (it was {last:.1e}); "
            "1e-3 to 1e-2 of the loss is where it acts.",
            InertVolumeWarning,
            stacklevel=2,
        )
    trained = out(result.params)
    return ComplexFit(
        trained, history, result.evaluations, result.start, result.state, float(share)
    )


def _checked_complexes(given: Sequence[SimplicialComplex]) -> list[SimplicialComplex]:
    found = list(given)
    if not found or not all(isinstance(x, SimplicialComplex) for x in found):
        raise TypeError("complex: expected a SimplicialComplex or a sequence of them.")
    for place, other in enumerate(found[1:], 1):
        if other.simplices != found[0].simplices:
            raise ValueError(
                f"complex {place} has the simplices {other.simplices} and complex 0 "
                f"{found[0].simplices}; complexes that train together must agree."
            )
        tree.check_same(found[0].vertices, other.vertices, names=("complex 0", f"complex {place}"))
    return found


def _share(remembered: dict[str, np.ndarray], num: int) -> float:
    """The median share of the volume in the gradient, over the steps where it is known."""
    if not remembered:
        return float("nan")
    # The gradients of several complexes are one vector to `fit`.
    whole = np.maximum(remembered["gradient_norm"] / np.sqrt(num), np.finfo(np.float32).tiny)
    shares = remembered["volume_gradient_norm"] / whole
    known = shares[~np.isnan(shares)]
    return float(np.median(known)) if len(known) else float("nan")
