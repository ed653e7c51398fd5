"""A tree as one `.npz` or `.safetensors` file, for NumPy, PyTorch and whoever reads those.

Arrays lie under slash-joined names; the description of a checkpoint lies beside them as text.
"""

import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from geojax.checkpoint import _files
from geojax.checkpoint._description import (
    DTYPES,
    NUMPY_DTYPES,
    Wanted,
    assemble,
    describe_tree,
    metadata_of,
    seal,
    unique_names,
    unseal,
)
from geojax.checkpoint._files import CheckpointError, Path, first_line

PyTree = Any

_TEXT = "__geojax__"
_SAFETENSORS_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
# Not every release of safetensors that we take can write the youngest of them.
_WRITTEN = set(_SAFETENSORS_DTYPES.values()) - {"float8_e4m3fn", "float8_e5m2", "complex64"}


def export_npz(
    path: Path, tree: PyTree, *, kind: str = "pytree", metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a pytree to one `.npz` file, which NumPy reads without geojax.

    Each array lies under its path joined by slashes, `params/dense/kernel`. Python numbers, strings
    and None lie in the text entry `__geojax__` with structure and metadata. Dtypes that the format
    lacks are stored as unsigned integers of their size, bfloat16 as uint16. Nothing is pickled.

    Args:
        path: The file, suffix included; replaced in one rename.
        tree: As `save` takes it, held by this process.
        kind: As in `save`.
        metadata: As in `save`.

    Raises:
        CheckpointError: If two arrays would have one name, or an array is spread over processes.
        TypeError: As `save`.

    Example:
        >>> import tempfile
        >>> file = tempfile.mkdtemp() + "/point.npz"
        >>> export_npz(file, {"dense": {"kernel": np.ones((2, 3))}})
        >>> sorted(np.load(file))
        ['__geojax__', 'dense/kernel']
    """
    file = _files.absolute(path)
    text, arrays = _export(file, tree, kind, metadata, NUMPY_DTYPES)

    def write(temporary: pathlib.Path) -> None:
        # np.savez cannot write an array whose name is "file", an argument of its own.
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, array in {**arrays, _TEXT: np.asarray(text)}.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, array, allow_pickle=False)

    _files.replace(file, write)


def import_npz(path: Path, like: PyTree = None) -> tuple[PyTree, dict[str, Any]]:
    """Read an `.npz` file, one that `export_npz` wrote or one of other making.

    What `export_npz` wrote comes back as `load` would give it, verified. Of another file come the
    arrays, as NumPy's, in a flat dict with the names unchanged; with `like`, the slash-joined paths
    of `like` must be those names.

    Args:
        path: The file.
        like: As in `load`.

    Returns:
        `(tree, metadata)`; for a file of other making the metadata is `{"kind": "foreign"}`.

    Raises:
        FileNotFoundError: If there is no file.
        CheckpointError: If it is no such file, is damaged, holds pickled objects, or does not match
            `like`.
    """
    file = _existing(path)
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                with archive.open(name) as entry:
                    array = np.lib.format.read_array(entry, allow_pickle=False)
                arrays[name.removesuffix(".npy")] = array
    except Exception as error:
        raise CheckpointError(
            f"{file} could not be read as an .npz file of plain arrays ({first_line(error)})."
        ) from error
    text = arrays.pop(_TEXT, None)
    return _import(file, None if text is None else str(text), {}, arrays, like)


def export_safetensors(
    path: Path, tree: PyTree, *, kind: str = "pytree", metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a pytree to one `.safetensors` file, which PyTorch reads with `safetensors.torch`.

    Names are as in `export_npz`; the description lies in the file's metadata under `geojax`.
    bfloat16 is bfloat16; float8, int4, complex64 and the like are stored as unsigned integers.

    Args:
        path: The file, suffix included; replaced in one rename.
        tree: As `save` takes it, held by this process.
        kind: As in `save`.
        metadata: As in `save`.

    Raises:
        CheckpointError: If two arrays would have one name, or an array is spread over processes.
        TypeError: As `save`, and for complex128, which the format lacks.
        ImportError: Without safetensors.
    """
    library = _safetensors()
    file = _files.absolute(path)
    text, arrays = _export(file, tree, kind, metadata, _WRITTEN)
    _files.replace(file, lambda aside: library.numpy.save_file(arrays, aside, {"geojax": text}))


def import_safetensors(path: Path, like: PyTree = None) -> tuple[PyTree, dict[str, Any]]:
    """Read a `.safetensors` file, one that `export_safetensors` wrote or one from PyTorch.

    Args:
        path: The file.
        like: As in `import_npz`.

    Returns:
        As `import_npz`; with the metadata of a file of other making come that file's own entries.

    Raises:
        FileNotFoundError: If there is no file.
        CheckpointError: If it is no such file, is damaged, or does not match `like`.
        ImportError: Without safetensors.
    """
    library = _safetensors()
    file = _existing(path)
    try:
        with library.safe_open(file, "np") as handle:
            about = dict(handle.metadata() or {})
        arrays = {
            name: np.frombuffer(part["data"], _SAFETENSORS_DTYPES[part["dtype"]]).reshape(
                part["shape"]
            )
            for name, part in library.deserialize(file.read_bytes())
        }
    except Exception as error:
        raise CheckpointError(
            f"{file} could not be read as a .safetensors file ({first_line(error)})."
        ) from error
    return _import(file, about.pop("geojax", None), about, arrays, like)


def _export(
    file: pathlib.Path,
    tree: PyTree,
    kind: str,
    metadata: Mapping[str, Any] | None,
    native: set[str],
) -> tuple[str, dict[str, np.ndarray]]:
    """The sealed description, and the arrays in dtypes that the file can hold."""
    document, values = describe_tree(tree, kind, metadata)
    stored = [
        (record, value)
        for record, value in zip(document["leaves"], values, strict=True)
        if value is not None
    ]
    names = unique_names([record["name"] for record, _ in stored], f"{file} cannot be written")
    arrays = {}
    for name, (record, value) in zip(names, stored, strict=True):
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            raise CheckpointError(
                f"leaf {record['path']} is spread over several processes; write a checkpoint with "
                "`save`, load it in one process and export there."
            )
        # In C order, which np.ascontiguousarray would give to a 0-d array as a 1-d one.
        array = np.array(value, order="C")
        if array.dtype.name not in native:
            if array.dtype.itemsize > 8:
                raise TypeError(
                    f"leaf {record['path']} is {array.dtype}, which a {file.suffix} file cannot "
                    "hold; use `export_npz` or `save`."
                )
            array = array.view(f"u{array.dtype.itemsize}")
        arrays[name] = array
    return seal(document), arrays


def _import(
    file: pathlib.Path,
    text: str | None,
    about: dict[str, Any],
    arrays: dict[str, np.ndarray],
    like: PyTree,
) -> tuple[PyTree, dict[str, Any]]:
    if text is None:
        return _import_foreign(file, about, arrays, like)
    document = unseal(text, str(file))

    def fetch(wanted: Wanted) -> dict[int, np.ndarray]:
        found = {}
        for i, (record, _) in wanted.items():
            array = arrays.get(record["name"])
            if array is None:
                raise CheckpointError(f"{file} is damaged: it lacks the array {record['name']}.")
            dtype = np.dtype(record["stored"]["dtype"])
            as_words = array.dtype == np.dtype(f"u{min(dtype.itemsize, 8)}")
            found[i] = array.view(dtype) if as_words and dtype.itemsize <= 8 else array
        return found

    return assemble(document, like, str(file), fetch), metadata_of(document)


def _import_foreign(
    file: pathlib.Path, about: dict[str, Any], arrays: dict[str, np.ndarray], like: PyTree
) -> tuple[PyTree, dict[str, Any]]:
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise CheckpointError(
                f"{file} holds the array {name!r} of {array.dtype}; expected numbers or booleans."
            )
    document, values = describe_tree(arrays, "foreign", None)
    tree = assemble(
        document, like, str(file), lambda wanted: {i: values[i] for i in wanted}, by="name"
    )
    return tree, {**about, "kind": "foreign"}


def _existing(path: Path) -> pathlib.Path:
    file = _files.absolute(path)
    if not file.exists():
        raise FileNotFoundError(f"no file at {file}.")
    if file.is_dir():
        raise CheckpointError(f"{file} is a folder, not a file; `load` reads checkpoint folders.")
    return file


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "safetensors files need the package of that name; install it with "
            '`pip install "geojax[examples]"`.'
        ) from error
    return safetensors
