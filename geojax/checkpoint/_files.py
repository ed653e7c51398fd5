"""Paths, files replaced in one rename, and steps that only one of several processes takes."""

import os
import pathlib
import secrets
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

Path = str | os.PathLike[str]


class CheckpointError(ValueError):
    """What was found is not a whole checkpoint, or is not the one that was asked for."""


def absolute(path: Path) -> pathlib.Path:
    """The absolute path, `~` expanded; orbax takes no other."""
    text = os.fspath(path)
    if "://" in text:
        raise ValueError(
            f"{text} is a URL; checkpoints are written to mounted file systems only. Save to a "
            "local or network folder and copy it with the store's own tools."
        )
    return pathlib.Path(os.path.abspath(os.path.expanduser(text)))


def replace(file: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Write a file aside, bring it to the disk, and rename it into its place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")
    write(temporary)
    flush(temporary)
    temporary.replace(file)
    _flush_one(file.parent)


def flush(path: pathlib.Path) -> None:
    """Bring a file, or a folder and all in it, from the system's memory to the disk."""
    for entry in (path, *path.rglob("*")) if path.is_dir() else (path,):
        _flush_one(entry)


def _flush_one(path: pathlib.Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def on_first_process(action: Callable[[], Any]) -> None:
    """Act on process 0 while the others wait."""
    if jax.process_index() == 0:
        action()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("geojax.checkpoint")


def shared_token() -> str:
    """Sixteen random hexadecimal digits, the same on every process."""
    token = secrets.token_bytes(8)
    if jax.process_count() > 1:
        octets = multihost_utils.broadcast_one_to_all(np.frombuffer(token, np.uint8))
        token = np.asarray(octets).tobytes()
    return token.hex()


def first_line(error: BaseException) -> str:
    """An error of another library in one line, to be quoted in ours: that which began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"
