"""Steps over batches: checkpoints, a log, a stop where numbers are not finite, progress."""

import base64
import json
import math
import pathlib
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from geojax import batches as batches_
from geojax import progress as progress_
from geojax.fit.steps import FitState, compiled, frozen_masks, init

__all__ = ["Checkpointer", "FitResult", "NonFiniteError", "fit"]

PyTree = Any


class FitResult(NamedTuple):
    """The end of a run.

    Attributes:
        params: The trained pytree.
        state: The whole final `FitState`.
        history: NumPy arrays, one entry for each step made by this call: 'step', 'loss',
            'gradient_norm', and whatever else the step measured.
        evaluations: What `evaluate` returned, with 'step', each time it was called.
        start: The step at which this call began; above 0 when it resumed from a checkpoint.
        remembered: NumPy arrays of the metrics in `remember`, one entry for each step of the whole
            run; NaN for steps before a checkpoint that did not keep them.
    """

    params: PyTree
    state: FitState
    history: dict[str, np.ndarray]
    evaluations: list[dict[str, float]]
    start: int
    remembered: dict[str, np.ndarray]


class NonFiniteError(FloatingPointError):
    """The loss, its gradient or the weights became NaN or infinite.

    Attributes:
        step: The first step whose loss or gradient was not finite.
        checkpoint: The last good checkpoint, as (folder, step), or None.
    """

    def __init__(self, message: str, step: int, checkpoint: tuple[str, int] | None):
        super().__init__(message)
        self.step = step
        self.checkpoint = checkpoint


class Checkpointer(Protocol):
    """What `fit` asks of `geojax.checkpoint.Checkpointer`."""

    every: int

    @property
    def location(self) -> str:
        """Where the checkpoints are."""
        ...

    def latest(self) -> int | None:
        """The newest step that can be restored."""
        ...

    def save(self, step: int, state: PyTree, metadata: dict | None = None) -> Any:
        """Save the state of a step, whole or not at all."""
        ...

    def restore(self, like: PyTree, step: int | None = None) -> tuple[PyTree, dict]:
        """The state of a step and its metadata."""
        ...


def fit(
    loss_fn: Callable[..., Any],
    params: PyTree,
    batches: Any,
    optimizer: Any,
    num_steps: int,
    *,
    key: jax.Array,
    has_metrics: bool = False,
    regularizer: Callable[..., Any] | None = None,
    transform: Callable[[jax.Array, PyTree], PyTree] | None = None,
    frozen: Any = None,
    accumulate: int = 1,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    evaluate: Callable[[PyTree, int], dict[str, Any]] | None = None,
    evaluate_every: int | None = None,
    checkpoint: Checkpointer | None = None,
    log: str | pathlib.Path | None = None,
    log_every: int = 1,
    log_fields: Mapping[str, Any] | None = None,
    remember: Sequence[str] = (),
    progress: bool | None = None,
) -> FitResult:
    """Train a pytree by gradient steps.

    The run is a function of its arguments: the same key gives the same bits, and a run that was
    stopped and is called again with the same `checkpoint` ends with the bits of one that was not.

    Args:
        loss_fn: `(params, batch)` or `(params, batch, key)` to the mean loss of the batch, a
            scalar; with `has_metrics`, to (loss, dict of scalars), which are logged.
        params: Pytree of floating arrays, in any sharding, which is kept.
        batches: One batch or a re-iterable; `batches.split(arrays, size, key=...)` reshuffles each
            epoch. Other sources must give the same batches on each pass for an exact resume.
        optimizer: An optax gradient transformation.
        num_steps: Optimiser steps in the whole run, those before a resume included.
        key: A typed key for dropout and augmentation; step s uses `fold_in(key, s)`.
        has_metrics: Whether `loss_fn` returns metrics as well.
        regularizer: `params -> scalar` or dict of named scalars, added to the loss once per step
            and logged apart from it; or `(params, step)` to the same. A pair of such a dict and a
            dict of measurements logs the latter as well, without adding them.
        transform: `(key, batch) -> batch`, such as an augmentation; compiled into the step.
        frozen: What must stay as it is, bit for bit, also under momentum and weight decay: booleans
            in the structure of `params` or its top levels, boolean arrays for leading axes (rows,
            such as the points of a stack), or a function of the leaf's path.
        accumulate: Batches in one step. Their gradients are averaged by weight, and what is left at
            the end of an epoch makes a step of its own.
        weight_fn: Weight of a batch in that average; by default its number of examples.
        mesh: Split each batch over this mesh's first axis, see `batches.place`.
        evaluate: `(params, step) -> dict of numbers`, called after every `evaluate_every` steps and
            at the end; goes to the log as a line of its own.
        evaluate_every: Steps between evaluations.
        checkpoint: A `geojax.checkpoint.Checkpointer`: the state is saved every `checkpoint.every`
            steps, at the end, and on an interrupt; a run that finds one there goes on from it.
        log: A file of JSON lines, one every `log_every` steps; a resume cuts what came after its
            checkpoint.
        log_every: Steps between lines.
        log_fields: JSON values by name, written into every line. Several runs can then share a
            file: lines with other values of these are left as they are.
        remember: Metrics whose value at every step is kept with the checkpoints, so that a resumed
            run has those of all its steps; eleven bytes each.
        progress: True or False for a bar; by default one appears on runs that take long.

    Returns:
        A `FitResult`. Memory: parameters, optimiser state and one gradient, and once more the
        parameters while the copy at the start is made.

    Raises:
        NonFiniteError: If the loss or its gradient is NaN or infinite, naming the step and the last
            good checkpoint; nothing after it is saved.
        TypeError, ValueError: For arguments of the wrong kind, before any step; for a checkpoint of
            another run (another key, batch size or data size).

    Example:
        >>> import optax
        >>> x = np.linspace(-1, 1, 32, dtype=np.float32)
        >>> loss = lambda params, batch: jnp.mean((params["a"] * batch["x"] - batch["y"]) ** 2)
        >>> out = fit(loss, {"a": jnp.zeros(())}, {"x": x, "y": 2 * x}, optax.sgd(1.0), 30,
        ...           key=jax.random.key(0))
        >>> round(float(out.params["a"]), 3)
        2.0
    """
    for name, value, least in (
        ("num_steps", num_steps, 0),
        ("accumulate", accumulate, 1),
        ("log_every", log_every, 1),
    ):
        if not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}.")
    if (evaluate is None) != (evaluate_every is None):
        raise ValueError("evaluate and evaluate_every: expected both or neither.")
    if not jnp.issubdtype(getattr(key, "dtype", np.int32), jax.dtypes.prng_key):
        raise TypeError("key: expected a typed key, `jax.random.key(seed)`.")
    source = batches_.as_batches(batches)
    state = init(params, optimizer, key=key)
    frozen_masks(frozen, params)
    steps = compiled(loss_fn, optimizer, has_metrics, regularizer, transform, frozen)
    record = {"source": source.fingerprint()} if isinstance(source, batches_.Batches) else {}
    record |= {"key": jax.random.key_data(key).tolist(), "accumulate": int(accumulate)}
    kept: dict[str, str] = {}
    if checkpoint is not None and checkpoint.latest() is not None:
        state, kept = _resume(checkpoint, state, record, num_steps)
    start = int(state.step)
    run = _Run(steps, checkpoint, record, log, log_every, log_fields, start)
    run.remembered = {name: _unpack(kept.get(name), start) for name in remember}
    feed = _feed(source, int(state.epoch), int(state.batch), accumulate, mesh)
    position = (start, int(state.epoch), int(state.batch))
    with progress_.bar(num_steps, "fit", show=progress) as bar:
        try:
            for step in range(start, num_steps):
                pieces, epoch, batch = next(feed)
                state, metrics = run.step(state, pieces, weight_fn)
                run.waiting.append((step, epoch, metrics))
                position = (step + 1, epoch, batch)
                run.hold_back()
                last = step + 1 == num_steps
                if evaluate is not None and (last or (step + 1) % (evaluate_every or 1) == 0):
                    run.evaluated(step, evaluate(state.params, step + 1))
                if checkpoint is not None and (last or (step + 1) % checkpoint.every == 0):
                    run.save(_at(state, position))
                if run.due():
                    bar(step + 1, loss=f"{run.flush():.4g}")
            run.flush()
        except KeyboardInterrupt:
            # Leave the run where it can go on, unless the interrupt came in the middle of a step.
            whole = not any(x.is_deleted() for x in jax.tree.leaves(state))
            if checkpoint is not None and whole and int(state.step) == position[0]:
                run.save(_at(state, position))
            raise
    return FitResult(
        state.params, _at(state, position), run.history(), run.evaluations, start,
        {name: np.array(values) for name, values in run.remembered.items()},
    )  # fmt: skip


def _at(state: FitState, position: tuple[int, int, int]) -> FitState:
    """The state with its place in the data filled in."""
    _, epoch, batch = position
    return state._replace(epoch=jnp.array(epoch, jnp.int32), batch=jnp.array(batch, jnp.int32))


def _resume(
    checkpoint: Checkpointer, state: FitState, record: dict[str, Any], num_steps: int
) -> tuple[FitState, dict[str, str]]:
    state, found = checkpoint.restore(state)
    for name, value in json.loads(json.dumps(record)).items():
        if found.get(name) != value:
            raise ValueError(
                f"fit: the checkpoint in {checkpoint.location} is of another run: its {name} is "
                f"{found.get(name)} and this run's is {value}. Use the same arguments to resume, "
                "or another folder."
            )
    if int(state.step) > num_steps:
        raise ValueError(
            f"fit: the checkpoint in {checkpoint.location} is at step {int(state.step)}, past "
            f"num_steps={num_steps}."
        )
    return state, found.get("remembered", {})


def _pack(values: array) -> str:
    """Doubles as a string that JSON takes."""
    return base64.b64encode(np.asarray(values, "<f8").tobytes()).decode()


def _unpack(text: str | None, num: int) -> array:
    if text is None:
        return array("d", [math.nan] * num)
    return array("d", np.frombuffer(base64.b64decode(text), "<f8"))


def _feed(
    source: Any, epoch: int, start: int, accumulate: int, mesh: Any
) -> Iterator[tuple[list[PyTree], int, int]]:
    """The batches of one step after another, with the position in the data after that step."""
    while True:
        if isinstance(source, batches_.Batches):
            rest = source.epoch(epoch, start)
        else:
            rest = iter(source)
            for _ in range(start):
                next(rest)
        group: list[PyTree] = []
        used, in_group = start, 0
        for pieces in batches_.prefetch(rest, mesh):
            group += pieces
            used, in_group = used + 1, in_group + 1
            if in_group == accumulate:
                yield group, epoch, used
                group, in_group = [], 0
        if group:
            yield group, epoch, used
        epoch, start = epoch + 1, 0


class _Run:
    """One call of `fit`: its compiled step, its metrics on their way to the host, its log."""

    def __init__(self, steps, checkpoint, record, log, log_every, log_fields, start):
        self.steps = steps
        self.checkpoint, self.record, self.log_every = checkpoint, record, log_every
        self.log = None if log is None else pathlib.Path(log)
        self.fields = json.loads(json.dumps(dict(log_fields or {})))
        self.rows: list[dict[str, float]] = []
        self.remembered: dict[str, array] = {}
        self.waiting: list[tuple[int, int, dict]] = []
        self.evaluations: list[dict[str, float]] = []
        self.began = self.flushed = time.monotonic()
        self.saved: int | None = None if checkpoint is None else checkpoint.latest()
        if self.log is not None:
            _cut_log(self.log, start, self.fields)

    def step(self, state, pieces, weight_fn):
        if len(pieces) == 1:
            return self.steps.whole(state, pieces[0])
        weigh = weight_fn or batches_.num_examples
        return self.steps.update(
            state,
            batches_.weighted_mean(
                (self.steps.gradient(state, piece, i), weigh(piece))
                for i, piece in enumerate(pieces)
            ),
        )

    def hold_back(self):
        if len(self.waiting) > 16:
            # The host runs ahead, but not so far that waiting batches fill the memory.
            jax.block_until_ready(self.waiting[-16][2]["loss"])

    def due(self):
        return time.monotonic() - self.flushed > 0.5

    def evaluated(self, step, values):
        self.flush()
        row = {"step": step + 1} | {name: float(value) for name, value in values.items()}
        self.evaluations.append(row)
        self._write([row | {"seconds": round(time.monotonic() - self.began, 3)}])

    def flush(self):
        """Bring the metrics of the steps since the last flush to the host, check and log them."""
        loss = math.nan
        lines = []
        fetched = jax.device_get([metrics for _, _, metrics in self.waiting])
        for (step, epoch, _), metrics in zip(self.waiting, fetched, strict=True):
            row = {"step": step, "epoch": epoch} | {k: float(v) for k, v in metrics.items()}
            loss = row["loss"]
            bad = not (math.isfinite(loss) and math.isfinite(row["gradient_norm"]))
            self.rows.append(row)
            self._remember(row)
            if bad or (step + 1) % self.log_every == 0:
                lines.append(row | {"seconds": round(time.monotonic() - self.began, 3)})
            if bad:
                self._write(lines)
                self._stop(step, f"loss {loss} and gradient norm {row['gradient_norm']}")
        self._write(lines)
        self.waiting = []
        self.flushed = time.monotonic()
        return loss

    def _remember(self, row):
        for name, values in self.remembered.items():
            if name not in row:
                raise ValueError(f"remember: no metric is {name!r}; a step has {', '.join(row)}.")
            # An interrupt in the middle of a flush lets it begin again.
            if row["step"] == len(values):
                values.append(row[name])

    def _write(self, lines):
        if self.log is None or not lines:
            return
        with self.log.open("a") as file:
            for line in lines:
                # JSON has no NaN: what is not finite is written as null.
                clean = {
                    k: None if isinstance(v, float) and not math.isfinite(v) else v
                    for k, v in line.items()
                }
                file.write(json.dumps(self.fields | clean) + "\n")

    def _stop(self, step, what):
        good = None
        where = "there is no checkpoint"
        if self.checkpoint is not None and self.saved is not None:
            good = (self.checkpoint.location, self.saved)
            where = f"the last good checkpoint is step {self.saved} in {self.checkpoint.location}"
        raise NonFiniteError(
            f"fit: step {step} gave {what}; {where}. Lower the learning rate, clip the gradient "
            "(optax.clip_by_global_norm) or look at that batch.",
            step,
            good,
        )

    def save(self, state):
        self.flush()
        step = int(state.step)
        if not _all_finite(state.params):
            self._stop(step - 1, "weights that are not finite after the update")
        kept = {name: _pack(values) for name, values in self.remembered.items()}
        self.checkpoint.save(step, state, self.record | ({"remembered": kept} if kept else {}))
        self.saved = step

    def history(self):
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        return {name: np.array([row.get(name, math.nan) for row in self.rows]) for name in names}


@jax.jit
def _finite(params):
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]).all()


def _all_finite(params: PyTree) -> bool:
    return not jax.tree.leaves(params) or bool(_finite(params))


def _cut_log(log: pathlib.Path, start: int, fields: dict[str, Any]) -> None:
    """Keep the lines that this run will not write again: other runs', and those before `start`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if (start or fields) and log.exists():
        for line in log.read_text().splitlines():
            try:
                row = json.loads(line)
                ours = all(name in row and row[name] == x for name, x in fields.items())
                # An evaluation counts the steps before it, a step is numbered from zero.
                before = row["step"] < start or (row["step"] == start and "loss" not in row)
                if before or not ours:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                break  # a kill can leave half a line; nothing good comes after it
    log.write_text("".join(kept))
