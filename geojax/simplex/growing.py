"""SPRO and ESPRO: complexes that grow one vertex at a time, between modes or from single ones."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from geojax import fit as fit_
from geojax import tree
from geojax.simplex import evaluation, volume
from geojax.simplex.complexes import SimplicialComplex, add_vertex, single, star
from geojax.simplex.training import ComplexFit, fit

__all__ = ["CollapsedWarning", "EsproResult", "SproResult", "Stage", "espro", "spro"]

PyTree = Any
# Below this share of the distance of the modes an edge is called collapsed.
_COLLAPSED = 1e-2


class CollapsedWarning(UserWarning):
    """A new vertex ended so close to its simplex that the volume is one in name only."""


class Stage(NamedTuple):
    """The training of one vertex, of one complex.

    Attributes:
        num_vertices: Of the complex after it.
        log_volume: The log of the sum of the simplices' volumes afterwards; NaN where dimensions
            are mixed.
        shortest_edge: From the new vertex to another of its simplices.
        edge_share: The same over the mean distance of the modes; of a single mode, over its norm.
        volume_share: See `ComplexFit`.
        mean_loss: Over points drawn in the complex; NaN where it was not measured.
        highest_loss: The highest of these and of the vertices; NaN where it was not measured.
        accepted: Whether the vertex was kept.
        history: Per step, see `ComplexFit`.
    """

    num_vertices: int
    log_volume: float
    shortest_edge: float
    edge_share: float
    volume_share: float
    mean_loss: float
    highest_loss: float
    accepted: bool
    history: dict[str, np.ndarray]

    def row(self) -> dict[str, Any]:
        """The stage without its history, for `geojax.report`."""
        return {
            "vertices": self.num_vertices, "log volume": self.log_volume,
            "shortest edge": self.shortest_edge, "edge / mode distance": self.edge_share,
            "volume share of gradient": self.volume_share, "mean loss": self.mean_loss,
            "highest loss": self.highest_loss, "kept": self.accepted,
        }  # fmt: skip


class SproResult(NamedTuple):
    """A grown complex.

    Attributes:
        complex: The largest whose stages were all accepted.
        stages: One for each vertex that was trained, the rejected last one included.
    """

    complex: SimplicialComplex
    stages: tuple[Stage, ...]


class EsproResult(NamedTuple):
    """An ensemble of simplexes.

    Attributes:
        complexes: One simplex for each mode.
        stages: For each vertex that was trained a tuple with one stage for each simplex.
    """

    complexes: tuple[SimplicialComplex, ...]
    stages: tuple[tuple[Stage, ...], ...]


def _steps(num_steps: int | Sequence[int], stages: int) -> list[int]:
    found = [num_steps] * stages if isinstance(num_steps, (int, np.integer)) else list(num_steps)
    if len(found) != stages or any(
        isinstance(x, bool) or not isinstance(x, (int, np.integer)) or x < 1 for x in found
    ):
        raise ValueError(
            f"num_steps is {num_steps!r}; expected an integer of at least 1, or one for each of "
            f"the {stages} vertices to train."
        )
    return [int(x) for x in found]


def _optimizer(optimizer: Any, stage: int) -> Any:
    return optimizer if hasattr(optimizer, "update") else optimizer(stage)


def _mode_distance(modes: PyTree) -> float:
    between = volume.distances(modes)
    if len(between) == 1:
        return float(tree.norm(tree.unstack(modes)[0]))
    same = np.argwhere(np.triu(between == 0, 1))
    if len(same):
        raise ValueError(
            f"modes {same[0][0]} and {same[0][1]} are the same network; leave one out."
        )
    return float(between[np.triu_indices(len(between), 1)].mean())


def _stage(
    result: ComplexFit, complex: SimplicialComplex, scale: float, measured: Any, limit: float | None
) -> Stage:
    last = complex.num_vertices - 1
    around = sorted({i for s in complex.simplices if last in s for i in s} - {last})
    between = volume.distances(complex.vertices)
    shortest = float(between[last, around].min())
    even = len(set(complex.dimensions)) == 1
    log_volume = float(volume.log_total_volume(complex)) if even else float("nan")
    mean, highest = (float("nan"), float("nan")) if measured is None else measured
    return Stage(
        complex.num_vertices, log_volume, shortest, shortest / scale, result.volume_share, mean,
        highest, limit is None or highest <= limit, result.history,
    )  # fmt: skip


def _warn(stages: Sequence[Stage]) -> None:
    low = [stage for stage in stages if stage.edge_share < _COLLAPSED]
    if low:
        warnings.warn(
            f"vertex {low[0].num_vertices - 1} ended {low[0].edge_share:.1e} of the modes' "
            "distance from another vertex of its simplex (below 1e-2): its networks are one "
            "network. Raise volume_weight, or train longer at a higher rate.",
            CollapsedWarning,
            stacklevel=3,
        )


@functools.lru_cache(maxsize=32)
def _as_metrics(loss_fn: Callable) -> Callable:
    return lambda params, batch: {"loss": loss_fn(params, batch)}


def _measure(loss_fn, metrics_fn, state_fn, num_points: int, batches: Any, key, options: dict):
    """From a complex to its mean and its highest loss, or None where nothing was asked for."""
    if not num_points:
        return lambda complex, stage: None
    if metrics_fn is None:
        if state_fn is not None or fit_.takes_key(loss_fn):
            raise ValueError(
                "num_eval: the loss takes a key or a state, so that it is not a function of the "
                "parameters alone; give metrics_fn, to a dict with 'loss'."
            )

        metrics_fn = _as_metrics(loss_fn)

    def measure(complex, stage):
        found = evaluation.evaluate(
            metrics_fn, complex, batches, num_points, key=jax.random.fold_in(key, stage),
            choose="volume" if len(set(complex.dimensions)) == 1 else "uniform", state_fn=state_fn,
            mesh=options.get("mesh"), weight_fn=options.get("weight_fn"), progress=False,
        )  # fmt: skip
        return found.metrics["loss"].mean, found.metrics["loss"].highest

    return measure


def spro(
    loss_fn: Callable[..., Any],
    modes: PyTree,
    batches: Any,
    optimizer: Any,
    num_steps: int | Sequence[int],
    *,
    key: jax.Array,
    num_connectors: int = 1,
    at: Literal["joined", "centroid"] = "joined",
    jitter: float = 0.01,
    max_loss: float | None = None,
    num_eval: int = 0,
    metrics_fn: Callable[..., dict[str, jax.Array]] | None = None,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    eval_batches: Any = None,
    checkpoints: Callable[[int], Any] | None = None,
    **options: Any,
) -> SproResult:
    """Grow a volume of low loss between modes, one connecting vertex at a time (SPRO).

    Each connector joins the simplices of all modes, is trained with everything else frozen, and
    then stays: k modes and c connectors make k simplices of c + 1 vertices that share a face. With
    one mode it is a simplex that grows from that network; with one connector, a star whose centre
    is linearly connected to all modes.

    Args:
        loss_fn: As for `simplex.fit`.
        modes: Stacked trained networks, leaves `(k, ...)`.
        batches: One batch or a re-iterable.
        optimizer: An optax transformation, made anew for each vertex, or a function of the number
            of the stage to one.
        num_steps: Steps for each vertex, or a number for each.
        key: Stage s uses `fold_in(key, s)`.
        num_connectors: Vertices to add.
        at: Where a new vertex starts: at the centroid of the simplices that it joins or of all.
        jitter: How far from there, relative to the distances; at 0 a new vertex starts with volume
            zero, where the volume has no gradient.
        max_loss: Growth stops at the first vertex with which the highest loss found exceeds this;
            that vertex is taken back. Needs `num_eval`.
        num_eval: Points at which the loss of each stage's complex is measured; 0 for none.
        metrics_fn: `(params, batch)` to a dict with 'loss', for a loss that takes a key; with
            `state_fn`, `(params, state, batch)`.
        state_fn: As for `simplex.evaluate`, for networks with BatchNorm.
        eval_batches: The data of that; by default `batches`.
        checkpoints: From the number of the stage to its `Checkpointer`; the same call then goes on
            where it was stopped.
        **options: Of `simplex.fit`: `num_samples`, `volume_weight` and so on. Every line of a `log`
            names its 'stage', from 0.

    Returns:
        An `SproResult`.

    Raises:
        ValueError: For options that do not go together; as `simplex.fit`.

    Warns:
        InertVolumeWarning: See `simplex.fit`.
        CollapsedWarning: If an edge of a new vertex is below 1e-2 of the modes' distance.

    Reference:
        Benton, Maddox, Lotfi and Wilson, "Loss Surface Simplexes for Mode Connecting Volumes and
        Fast Ensembling", ICML 2021, section 4.
    """
    _reserved(options)
    if not isinstance(num_connectors, (int, np.integer)) or num_connectors < 1:
        raise ValueError(
            f"num_connectors is {num_connectors!r}; expected an integer of at least 1."
        )
    if max_loss is not None and not num_eval:
        raise ValueError("max_loss needs num_eval, the number of points to measure the loss at.")
    complex = star(modes)
    steps = _steps(num_steps, int(num_connectors))
    data = batches if eval_batches is None else eval_batches
    measure = _measure(
        loss_fn, metrics_fn, state_fn, num_eval, data, jax.random.fold_in(key, 2**31), options
    )
    scale = _mode_distance(modes)
    stages: list[Stage] = []
    for s, count in enumerate(steps):
        stage_key = jax.random.fold_in(key, s)
        grown = add_vertex(
            complex,
            "all",
            at,
            jitter=jitter,
            key=jax.random.fold_in(stage_key, 0) if jitter else None,
        )
        result = fit(
            loss_fn, grown, batches, _optimizer(optimizer, s), count,
            key=jax.random.fold_in(stage_key, 1), free=(-1,),
            checkpoint=None if checkpoints is None else checkpoints(s), **_logged(options, s),
        )  # fmt: skip
        found = _stage(result, result.complex, scale, measure(result.complex, s), max_loss)
        stages.append(found)
        _warn([found])
        if not found.accepted:
            break
        complex = result.complex
    return SproResult(complex, tuple(stages))


def espro(
    loss_fn: Callable[..., Any],
    modes: PyTree,
    batches: Any,
    optimizer: Any,
    num_steps: int | Sequence[int],
    *,
    key: jax.Array,
    num_vertices: int = 3,
    from_scratch: bool = False,
    jitter: float = 0.01,
    num_eval: int = 0,
    metrics_fn: Callable[..., dict[str, jax.Array]] | None = None,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    eval_batches: Any = None,
    checkpoints: Callable[[int], Any] | None = None,
    **options: Any,
) -> EsproResult:
    """Grow a simplex of low loss from each of several networks: an ensemble of simplexes (ESPRO).

    The simplexes grow side by side, each as if alone. `simplex.predict` averages over them.

    Args:
        loss_fn: As for `simplex.fit`.
        modes: Stacked networks, leaves `(k, ...)`: trained ones, or initial values to be trained as
            the first vertices with `from_scratch`.
        batches: One batch or a re-iterable; all simplexes see the same order of the data.
        optimizer: An optax transformation, made anew for each vertex and simplex, or a function of
            the number of the stage to one.
        num_steps: Steps for each vertex, or a number for each stage.
        key: Stage s uses `fold_in(key, s)`, and of that simplex i `fold_in` with i.
        num_vertices: Of each simplex in the end.
        from_scratch: Whether the modes are trained as well, in a stage before the others.
        jitter: As for `spro`.
        num_eval: As for `spro`.
        metrics_fn: As for `spro`.
        state_fn: As for `spro`.
        eval_batches: As for `spro`.
        checkpoints: As for `spro`.
        **options: As for `spro`; with `from_scratch` the modes are stage 0.

    Returns:
        An `EsproResult`.

    Raises:
        ValueError: As `spro`.

    Warns:
        InertVolumeWarning: See `simplex.fit`.
        CollapsedWarning: If an edge of a new vertex is below 1e-2 of the modes' mean norm or
            distance.

    Reference:
        Benton et al., 2021, section 5.
    """
    _reserved(options)
    if not isinstance(num_vertices, (int, np.integer)) or num_vertices < 2:
        raise ValueError(f"num_vertices is {num_vertices!r}; expected an integer of at least 2.")
    _mode_distance(modes)  # refuses a mode given twice
    members = tree.unstack(modes)
    complexes = [single(tree.stack([x])) for x in members]
    first = 0 if from_scratch else 1
    steps = _steps(num_steps, int(num_vertices) - first)
    data = batches if eval_batches is None else eval_batches
    measure = _measure(
        loss_fn, metrics_fn, state_fn, num_eval, data, jax.random.fold_in(key, 2**31), options
    )
    stages: list[tuple[Stage, ...]] = []
    for s, count in enumerate(steps):
        stage_key = jax.random.fold_in(key, s)
        base = from_scratch and s == 0
        plain = {"volume_weight": 0.0, "num_samples": 1} if base else {}
        if not base:
            keys = [jax.random.fold_in(jax.random.fold_in(stage_key, 0), i)
                    for i in range(len(members))]  # fmt: skip
            complexes = [
                add_vertex(x, "all", "joined", jitter=jitter, key=keys[i] if jitter else None)
                for i, x in enumerate(complexes)
            ]
        result = fit(
            loss_fn, complexes, batches, _optimizer(optimizer, s), count,
            key=jax.random.fold_in(stage_key, 1), free=(-1,),
            checkpoint=None if checkpoints is None else checkpoints(s),
            **(_logged(options, s) | plain),
        )  # fmt: skip
        complexes = list(result.complex)
        if base:
            continue
        scale = _mode_distance(tree.stack([tree.unstack(x.vertices)[0] for x in complexes]))
        found = tuple(_stage(result, x, scale, measure(x, s), None) for x in complexes)
        stages.append(found)
        _warn(found)
    return EsproResult(tuple(complexes), tuple(stages))


def _logged(options: dict[str, Any], stage: int) -> dict[str, Any]:
    """With the number of the stage in each line of the log, which all stages share."""
    if options.get("log") is None:
        return options
    return options | {"log_fields": {**(options.get("log_fields") or {}), "stage": stage}}


def _reserved(options: dict[str, Any]) -> None:
    for name in ("free", "checkpoint"):
        if name in options:
            instead = "the last vertex trains" if name == "free" else "give `checkpoints`"
            raise ValueError(f"{name} is set for each stage: {instead}.")
