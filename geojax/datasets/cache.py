"""The package's own copies of data sets: one npz file each, written atomically.

A cache file holds the arrays in published order, their md5, and where they came from with the
checksums of the files read. Nothing in it is pickled.
"""

import contextlib
import json
import os
import pathlib
import sys
import uuid
import warnings
import zipfile
from typing import Any

import numpy as np

from geojax.datasets.tables import Arrays, content_md5

__all__ = ["file", "folder", "read", "write"]

_FORMAT = 1


def folder() -> pathlib.Path:
    """The user's cache folder for this package, by the conventions of the platform."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = os.environ.get("XDG_CACHE_HOME") or "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "geojax"


def file(name: str, where: pathlib.Path) -> pathlib.Path:
    """The cache file of a data set in a folder."""
    return where / f"{name}-{_FORMAT}.npz"


def read(path: pathlib.Path) -> tuple[Arrays, dict[str, Any]]:
    """Read a cache file.

    Returns:
        The arrays, and what `write` was told about them.

    Raises:
        ValueError: If the file is damaged, naming it.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            arrays = {key: content[key] for key in content.files if key != "about"}
            about = json.loads(str(content["about"]))
        found = content_md5(arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: expected a data set cached by geojax, found a file that cannot be read "
            f"({error}); delete it and load again."
        ) from error
    if found != about["md5"]:
        raise ValueError(
            f"{path}: expected arrays with md5 {about['md5']}, found md5 {found}; delete the file "
            "and load again."
        )
    return arrays, about


def write(path: pathlib.Path, arrays: Arrays, *, source: str, checksums: dict[str, str]) -> None:
    """Write a cache file, whole or not at all.

    A folder that cannot be written gives a warning, for the data are at hand all the same.

    Args:
        path: The file.
        arrays: What to keep.
        source: Where they were read.
        checksums: The md5 of each file they were read from.
    """
    about = {"md5": content_md5(arrays), "source": source, "checksums": checksums}
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:
            np.savez(stream, about=np.array(json.dumps(about)), **arrays)  # pyright: ignore[reportArgumentType]
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(
            f"{path} could not be written ({error}), so the next load reads {source} again; name "
            "another folder as cache=FOLDER, or pass cache=False.",
            RuntimeWarning,
            stacklevel=4,
        )
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
