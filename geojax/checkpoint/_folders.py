"""A checkpoint as a folder, a network in one, and a directory of them to resume from.

`geojax.json` is the commit point: its rename into place makes the arrays it names a checkpoint.
"""

import contextlib
import logging
import operator
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from geojax.checkpoint import _files
from geojax.checkpoint._description import (
    Record,
    Wanted,
    assemble,
    describe_tree,
    metadata_of,
    seal,
    spell_record,
    unseal,
)
from geojax.checkpoint._files import CheckpointError, Path, first_line

PyTree = Any

_DESCRIPTION = "geojax.json"
# What a save that was killed can leave in a checkpoint's folder.
_LEFTOVER = re.compile(r"arrays-[0-9a-f]{16}(\..+)?|geojax\.json\.tmp")
_STEP = re.compile(r"step_(\d{8,})")


# ---------------------------------------------------------------------------------- one checkpoint


def save(
    path: Path, tree: PyTree, *, kind: str = "pytree", metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a pytree to a checkpoint folder, whole or not at all.

    An existing checkpoint at `path` is replaced in one rename, once the new one is whole on disk:
    whenever the process dies, the folder holds the old checkpoint or the new one. What a killed
    save leaves is ignored by `load` and removed by the next save. The call returns when it is done.

    Args:
        path: The folder, relative to the working directory or with `~`; parents are made.
        tree: Any pytree whose leaves are JAX or NumPy arrays (0-d, empty, sharded, of any dtype
            from int2 to complex128), typed PRNG keys, Python numbers, strings or None. Dictionary
            keys are strings or numbers.
        kind: One word for what this is, such as "network" or "state".
        metadata: JSON values under string keys. Tuples come back as lists, NumPy and JAX scalars as
            numbers. The names `kind`, `created`, `format_version` and `versions` are written
            afresh, so that the metadata of one checkpoint can be given to another.

    Raises:
        CheckpointError: If `path` holds something that is not a checkpoint of this module, or the
            arrays could not be written.
        TypeError: For a leaf, a key or a metadata value that cannot be stored, naming it.
        ImportError: Without orbax.

    Cost: orbax's write, and one pass over the arrays for the checksums.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp() + "/point"
        >>> save(folder, {"w": np.ones(2)}, metadata={"seed": 0})
        >>> tree, metadata = load(folder)
        >>> tree["w"].tolist(), metadata["seed"]
        ([1.0, 1.0], 0)
    """
    ocp = _orbax()
    folder = _files.absolute(path)
    _check_free(folder)
    document, values = describe_tree(tree, kind, metadata)
    arrays = {
        str(i): _for_orbax(value)
        for i, value in enumerate(values)
        if value is not None and value.size
    }
    _files.on_first_process(lambda: folder.mkdir(parents=True, exist_ok=True))
    if arrays:
        document["arrays"] = f"arrays-{_files.shared_token()}"
        try:
            with _quiet():
                ocp.save_checkpointables(folder / document["arrays"], {"arrays": arrays})
        except Exception as error:
            raise CheckpointError(
                f"the arrays could not be written to {folder} ({first_line(error)}); what was "
                "there before is untouched."
            ) from error
    _files.on_first_process(lambda: _commit(folder, document))


def load(path: Path, like: PyTree = None) -> tuple[PyTree, dict[str, Any]]:
    """Read a checkpoint, in its own structure or in that of `like`, and verify every leaf.

    Without `like`, dicts, lists and tuples come back as such and other containers as plain ones: a
    NamedTuple (every optax state is one) or a registered class as the dict of its fields, and a
    registered class with unnamed children as their list. Arrays come back with their dtype and bits
    on the default device, 64-bit ones too where x64 is off; NumPy arrays and scalars as NumPy's,
    keys as typed keys.

    With `like`, the containers are those of `like`, and each array is placed as its leaf there: in
    the same sharding, uncommitted if that is, as a NumPy array if that is one. The paths, dtypes
    and shapes of all leaves must agree.

    Args:
        path: The folder that `save` wrote.
        like: None, or a pytree of arrays or `jax.ShapeDtypeStruct` (`jax.eval_shape` makes one).

    Returns:
        `(tree, metadata)`; the metadata is what was given to `save` and what it wrote about itself:
        `kind`, `created`, `format_version`, `versions`.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        CheckpointError: If what is there is foreign, incomplete or damaged, or does not match
            `like`, naming the leaf with the expected and the found dtype and shape.
        ImportError: Without orbax.

    Cost: orbax's read, and one pass over the arrays for the checksums.
    """
    ocp = _orbax()
    folder = _files.absolute(path)
    document = _read(folder)

    def fetch(wanted: Wanted) -> dict[int, Any]:
        source = folder / str(document["arrays"])
        for name, size in document["files"].items():
            found = (source / name).stat().st_size if (source / name).is_file() else None
            if found != size:
                raise CheckpointError(
                    f"checkpoint {folder} is damaged: {source.name}/{name} should have {size} "
                    f"bytes and {'is missing' if found is None else f'has {found}'}; load another "
                    "checkpoint."
                )
        abstract = {str(i): _for_restore(record, at) for i, (record, at) in wanted.items()}
        try:
            with _quiet():
                loaded = ocp.load_checkpointables(source, {"arrays": abstract})["arrays"]
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {folder} is damaged: its arrays could not be read "
                f"({first_line(error)}); load another checkpoint."
            ) from error
        return {int(i): value for i, value in loaded.items()}

    tree = assemble(document, like, f"checkpoint {folder}", fetch)
    return tree, metadata_of(document)


def describe(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, without reading its arrays and without orbax.

    Returns:
        The metadata that `load` gives, and `leaves`: a dict from the path of each leaf to its dtype
        and shape, such as `"float32[3,4]"`.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        CheckpointError: If what is there is no checkpoint.
    """
    document = _read(_files.absolute(path))
    leaves = {record["path"]: spell_record(record) for record in document["leaves"]}
    return {**metadata_of(document), "leaves": leaves}


def _for_orbax(array: Any) -> Any:
    # orbax refuses a JAX array that one of several processes has to itself; NumPy arrays it takes
    # from the first process.
    if isinstance(array, jax.Array) and array.is_fully_addressable and jax.process_count() > 1:
        return np.asarray(array)
    return array


def _for_restore(record: Record, sharding: Sharding | None) -> Any:
    shape, dtype = tuple(record["stored"]["shape"]), np.dtype(record["stored"]["dtype"])
    # orbax's threads do not see a local jax.enable_x64 and would truncate: read these on the host.
    wide = dtype.name in ("int64", "uint64", "float64", "complex128")
    if sharding is None or (wide and sharding.is_fully_addressable):
        return np.empty(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _check_free(folder: pathlib.Path) -> None:
    """Refuse to write a checkpoint among files that are none of ours."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint is a folder, choose another path.")
    if folder.exists() and not _is_committed(folder) and not _is_leftover(folder):
        raise CheckpointError(
            f"{folder} holds other files than a checkpoint's; choose another path, such as "
            f"{folder / 'checkpoint'}."
        )


def _read(folder: pathlib.Path) -> dict[str, Any]:
    """The description of the checkpoint in a folder, or the reason why there is none."""
    if not folder.exists():
        raise FileNotFoundError(f"no checkpoint at {folder}; expected a folder that `save` wrote.")
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is a file; expected a checkpoint folder. Exports are read by `import_npz` "
            "and `import_safetensors`."
        )
    if not _is_committed(folder):
        names = sorted(entry.name for entry in folder.iterdir())
        if any(_STEP.fullmatch(name) for name in names):
            found = "the checkpoints of a run, which `Checkpointer(...).restore` reads"
        elif names and _is_leftover(folder):
            found = "only what a save left that was stopped before its end"
        elif {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"} & set(names):
            found = "an orbax checkpoint of other making, which orbax itself reads"
        else:
            found = f"{len(names)} other entries ({', '.join(names[:3])})" if names else "nothing"
        raise CheckpointError(
            f"{folder} is no checkpoint: it lacks {_DESCRIPTION} and holds {found}."
        )
    text = (folder / _DESCRIPTION).read_text(encoding="utf-8", errors="replace")
    return unseal(text, f"checkpoint {folder}")


def _commit(folder: pathlib.Path, document: dict[str, Any]) -> None:
    """Rename the description into place, then remove all arrays but those that it names."""
    if document["arrays"] is not None:
        source = folder / document["arrays"]
        _files.flush(source)
        # The sizes that one process sees of files of others may be out of date on a network disk.
        if jax.process_count() == 1:
            files = [file for file in sorted(source.rglob("*")) if file.is_file()]
            document["files"] = {f.relative_to(source).as_posix(): f.stat().st_size for f in files}
    _files.replace(
        folder / _DESCRIPTION,
        lambda temporary: temporary.write_text(seal(document), encoding="utf-8"),
    )
    for entry in folder.iterdir():
        if _LEFTOVER.fullmatch(entry.name) and entry.name != document["arrays"]:
            # A file that another program holds open may stay until the next save.
            shutil.rmtree(entry, ignore_errors=True)


def _is_committed(folder: pathlib.Path) -> bool:
    return (folder / _DESCRIPTION).is_file()


def _is_leftover(folder: pathlib.Path) -> bool:
    """Whether a folder is empty or holds only what a killed save leaves."""
    return all(_LEFTOVER.fullmatch(entry.name) for entry in folder.iterdir())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the logs where orbax's threads repeat as tracebacks what is raised anyway."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _orbax() -> Any:
    try:
        from orbax.checkpoint import v1
    except ImportError as error:
        raise ImportError(
            'checkpoints need orbax; install it with `pip install "geojax[examples]"`.'
        ) from error
    return v1


# ---------------------------------------------------------------------------------------- networks


class Network(NamedTuple):
    """A network from a checkpoint: `params`, `state`, and the `metadata` that says which it is."""

    params: PyTree
    state: PyTree
    metadata: dict[str, Any]

    @property
    def model(self) -> str:
        """The name of the model, as `geojax.models.build` knows it."""
        return self.metadata["model"]

    @property
    def options(self) -> dict[str, Any]:
        """The model's options, as JSON values."""
        return self.metadata["options"]

    def build(self) -> Any:
        """The model itself: `geojax.models.build(model, **options)`."""
        from geojax import models

        return models.build(self.model, **self.options)


def save_network(
    path: Path,
    params: PyTree,
    state: PyTree = None,
    *,
    model: str,
    options: Mapping[str, Any] | None = None,
    dataset: str | None = None,
    seed: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a network so that it can be rebuilt from the checkpoint alone.

    Args:
        path: The folder, as in `save`.
        params: The parameters, or a stacked pytree of points.
        state: The model's state, such as normalisation statistics, or None.
        model: The name of the model for `geojax.models.build`, or one of your own.
        options: The keyword arguments of that model, JSON values; `geojax.models.options(model)`
            has the defaults, should they ever change.
        dataset: The name of the data that it was trained on.
        seed: The seed of the run.
        metadata: Further JSON values; `model`, `options`, `dataset` and `seed` come from above.

    Raises:
        CheckpointError: As `save`.
        TypeError: As `save`.
    """
    about = {"model": model, "options": dict(options or {}), "dataset": dataset, "seed": seed}
    tree = {"params": params, "state": state}
    save(path, tree, kind="network", metadata={**(metadata or {}), **about})


def load_network(path: Path, like: tuple[PyTree, PyTree] | None = None) -> Network:
    """Read what `save_network` wrote.

    Args:
        path: The folder.
        like: None, or `(params, state)`, each as `load` takes it.

    Returns:
        The network; `network.build()` makes its model.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        CheckpointError: As `load`, and for a checkpoint of another kind.
    """
    kind = _read(_files.absolute(path))["kind"]
    if kind != "network":
        raise CheckpointError(
            f"checkpoint {_files.absolute(path)} is a {kind!r}; expected a 'network', which "
            "`save_network` writes. Read it with `load`."
        )
    tree, metadata = load(path, None if like is None else {"params": like[0], "state": like[1]})
    return Network(tree["params"], tree["state"], metadata)


# ----------------------------------------------------------------------- a directory of checkpoints


class Checkpointer:
    """The checkpoints of one long computation: one folder `step_00000037` each, the newest kept.

    A save is synchronous and never skipped: when it returns, the step is on disk. (orbax's own
    asynchronous checkpointer drops a step that comes while it still writes.) One run writes to one
    directory at a time.

    Args:
        directory: The folder; made at the first save.
        every: How many steps lie between two saves, for the loop that saves, such as `fit.fit`.
        keep: How many checkpoints to keep, or None for all.

    Raises:
        ValueError: If `every` or `keep` is not positive.

    Example:
        >>> import tempfile
        >>> run = Checkpointer(tempfile.mkdtemp(), every=10)
        >>> for step in (10, 20, 30):
        ...     run.save(step, {"w": np.full(2, step)})
        >>> run.steps(), run.restore()[0]["w"].tolist()
        ([20, 30], [30, 30])
    """

    def __init__(self, directory: Path, *, every: int, keep: int | None = 2):
        if every < 1 or (keep is not None and keep < 1):
            raise ValueError(f"every is {every} and keep is {keep}; expected positive integers.")
        self.every = operator.index(every)
        self.keep = keep
        self._directory = _files.absolute(directory)

    @property
    def location(self) -> str:
        """The absolute path of the directory."""
        return str(self._directory)

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, in ascending order."""
        return sorted(step for step, folder in self._folders() if _is_committed(folder))

    def latest(self) -> int | None:
        """The last step that has a whole checkpoint, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the state of a step, then drop old checkpoints and what a killed save left.

        Args:
            step: The number of steps taken; an older checkpoint of this step is replaced.
            state: Any pytree that `geojax.checkpoint.save` takes.
            metadata: JSON values; `step` is added.

        Raises:
            ValueError: If `step` is negative, or before the last checkpoint: the directory would
                then mix two histories.
            CheckpointError: As `geojax.checkpoint.save`.
            TypeError: As `geojax.checkpoint.save`.
        """
        step = operator.index(step)
        latest = self.latest()
        if step < 0 or (latest is not None and step < latest):
            raise ValueError(
                f"step {step} cannot be saved to {self._directory}, where the last is {latest}; "
                "steps grow from 0. Use a fresh directory, or delete the later checkpoints first."
            )
        save(self._folder(step), state, kind="state", metadata={**(metadata or {}), "step": step})
        _files.on_first_process(self._prune)

    def restore(
        self, like: PyTree = None, step: int | None = None
    ) -> tuple[PyTree, dict[str, Any]]:
        """Read the state of the last step, or of another one.

        Args:
            like: As `geojax.checkpoint.load` takes it; a state fresh from `init` will do.
            step: One of `steps()`; by default the last.

        Returns:
            `(state, metadata)`; `metadata["step"]` is the step.

        Raises:
            FileNotFoundError: If there is no such checkpoint.
            CheckpointError: As `geojax.checkpoint.load`.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise FileNotFoundError(
                f"no {wanted} in {self._directory}; the whole ones there are of steps {steps}."
            )
        return load(self._folder(steps[-1] if step is None else step), like)

    def _folder(self, step: int) -> pathlib.Path:
        return self._directory / f"step_{step:08d}"

    def _folders(self) -> list[tuple[int, pathlib.Path]]:
        if not self._directory.is_dir():
            return []
        entries = [entry for entry in self._directory.iterdir() if entry.is_dir()]
        found = [(_STEP.fullmatch(entry.name), entry) for entry in entries]
        return [(int(match[1]), entry) for match, entry in found if match]

    def _prune(self) -> None:
        steps = self.steps()
        kept = steps if self.keep is None else steps[-self.keep :]
        for step, folder in self._folders():
            if step not in kept and (_is_committed(folder) or _is_leftover(folder)):
                # First the description: without it this is no checkpoint, however far a kill lets
                # the removal get.
                (folder / _DESCRIPTION).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
