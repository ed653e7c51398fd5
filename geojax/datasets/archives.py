"""The published archives of the MNISTs and the CIFARs, parsed with NumPy after a checksum.

One reader for each form in which they are found on disks: idx files, CIFAR's binary and Python
batches (unpacked or in their tar), and CIFAR-10 as lossless sheets of pictures.
"""

import gzip
import hashlib
import io
import pathlib
import pickle
import tarfile
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from geojax import progress as progress_
from geojax.datasets.tables import SPECS, Arrays, needed

__all__ = ["MD5", "URLS", "Candidate", "candidates", "file_md5", "read"]

_Content = Callable[[str], bytes]
Kind = Literal["idx", "binary", "binary tar", "python", "python tar", "sheets"]

_IDX_FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}
_BATCHES = {
    "cifar10": {
        "train": [f"data_batch_{i}" for i in range(1, 6)],
        "test": ["test_batch"],
    },
    "cifar100": {"train": ["train"], "test": ["test"]},
}

MD5: dict[str, dict[str, str]] = {
    "mnist": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    "cifar10": {
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
        "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
    # No checksum of the unpacked train.bin and test.bin is published; `check_arrays` looks inside.
    "cifar100": {
        "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
        "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    },
}

URLS: dict[str, str] = {
    "mnist": "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "cifar10": "https://www.cs.toronto.edu/~kriz/",
    "cifar100": "https://www.cs.toronto.edu/~kriz/",
}
"""Where tensorflow-datasets fetches them (and where their owners publish them)."""


class Candidate(NamedTuple):
    """A place where the archives of a data set may lie.

    Attributes:
        kind: How what lies there is read.
        path: A folder of files, or one tar archive.
    """

    kind: Kind
    path: pathlib.Path

    def present(self) -> bool:
        """Whether any part of the archives is there."""
        if self.kind.endswith("tar"):
            return self.path.is_file()
        if self.kind == "idx":
            return any((self.path / file).is_file() for file in _IDX_FILES.values())
        if self.kind == "sheets":
            return self.path.is_dir() and any(self.path.glob("*_batch*.webp"))
        return self.path.is_dir()

    def __str__(self) -> str:
        """As errors print it."""
        if self.kind == "idx":
            return f"{self.path / '*-ubyte.gz'} (four files)"
        if self.kind == "sheets":
            return f"{self.path / '*_batch*.webp'} (lossless sheets, with labels.npz)"
        return str(self.path)


def candidates(name: str, root: pathlib.Path) -> list[Candidate]:
    """Where the archives of a data set are looked for below a folder, in order.

    Besides the folder named like the data set these are the places where torchvision puts them.
    """
    if name in ("mnist", "fashion_mnist"):
        torchvision = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name]
        return [Candidate("idx", root / name), Candidate("idx", root / torchvision / "raw")]
    number = name.removeprefix("cifar")
    binary = "cifar-10-batches-bin" if name == "cifar10" else "cifar-100-binary"
    python = "cifar-10-batches-py" if name == "cifar10" else "cifar-100-python"
    out = [
        candidate
        for folder in (root, root / name)
        for candidate in (
            Candidate("binary", folder / binary),
            Candidate("binary tar", folder / f"cifar-{number}-binary.tar.gz"),
            Candidate("python tar", folder / f"cifar-{number}-python.tar.gz"),
            Candidate("python", folder / python),
        )
    ]
    if name == "cifar10":
        out.append(Candidate("sheets", root / name))
    return out


def read(
    name: str, candidate: Candidate, *, verify: bool = True, progress: bool | None = None
) -> tuple[Arrays, dict[str, str]]:
    """Read the archives at one place.

    Args:
        name: A key of `SPECS`.
        candidate: A present one of `candidates`.
        verify: Whether the published checksums must hold.
        progress: As `show` of `geojax.progress.bar`.

    Returns:
        The arrays, and the md5 of each file that was read.

    Raises:
        FileNotFoundError: If one of several files is missing, naming it.
        ValueError: If a file is another one, truncated or malformed, naming it.
    """
    checksums: dict[str, str] = {}

    def checked(path: pathlib.Path) -> bytes:
        data = _bytes(path)
        checksums[path.name] = _check(name, path, _md5(data), len(data), verify)
        return data

    if candidate.kind == "idx":
        arrays = {
            key: _idx(candidate.path / file, checked(candidate.path / file), name)
            for key, file in _IDX_FILES.items()
        }
        return arrays, checksums
    if candidate.kind.endswith("tar"):
        path = candidate.path
        found, size = file_md5(path)
        checksums[path.name] = _check(name, path, found, size, verify)
        return _cifar(name, candidate, _tar(path), progress), checksums
    if candidate.kind != "sheets":
        return (
            _cifar(name, candidate, lambda file: checked(candidate.path / file), progress),
            checksums,
        )
    labels = _labels(candidate.path / "labels.npz")

    def batch(file: str) -> bytes:
        path = candidate.path / f"{file}.webp"
        data = _sheet(path, labels.get(file), candidate.path / "labels.npz")
        known = path.with_suffix(".bin")  # a sheet unpacks to the published binary batch
        checksums[known.name] = _check(name, known, _md5(data), len(data), verify, shown=path)
        return data

    return _cifar(name, candidate, batch, progress), checksums


def _cifar(name: str, candidate: Candidate, content: _Content, progress: bool | None) -> Arrays:
    """Put batches together; `content` gives the bytes of a batch file by name."""
    parse = _python_batch if candidate.kind.startswith("python") else _binary_batch
    suffix = ".bin" if candidate.kind.startswith("binary") else ""
    batches = _BATCHES[name]
    out: Arrays = {}
    with progress_.bar(sum(map(len, batches.values())), f"read {name}", show=progress) as update:
        done = 0
        for part, files in batches.items():
            parsed = []
            for file in files:
                where = f"{candidate.path}: {file}{suffix}"
                parsed.append(parse(name, content(file + suffix), where))
                done += 1
                update(done)
            out[f"{part}_images"] = np.concatenate([batch[0] for batch in parsed])
            out[f"{part}_labels"] = np.concatenate([batch[1] for batch in parsed])
            if name == "cifar100":
                out[f"{part}_coarse_labels"] = np.concatenate([batch[2] for batch in parsed])
    return out


# ---------------------------------------------------------------------------- files and checksums


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def file_md5(path: pathlib.Path) -> tuple[str, int]:
    """The md5 and the size of a file, read in pieces."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False))
        return digest.hexdigest(), stream.tell()


def _bytes(path: pathlib.Path) -> bytes:
    if not path.is_file():
        others = sorted(other.name for other in path.parent.iterdir() if other.is_file())
        raise FileNotFoundError(
            f"{path} is missing; the folder holds {', '.join(others[:8]) or 'no files'}. All files "
            "of the published archive belong there under their published names."
        )
    return path.read_bytes()


def _check(
    name: str,
    path: pathlib.Path,
    found: str,
    size: int,
    verify: bool,
    *,
    shown: pathlib.Path | None = None,
) -> str:
    """Compare a file's md5 with the published one; returns the md5 found."""
    expected = MD5[name].get(path.name)
    if not verify or expected is None or found == expected:
        return found
    owner = [other for other, files in MD5.items() if found in files.values()]
    reason = (
        f"it is a file of {owner[0]}: give each data set its own folder"
        if owner
        else "it is truncated or altered: fetch it again, or pass verify=False to read it as it is"
    )
    raise ValueError(
        f"{shown or path}: expected {name}'s {path.name} with md5 {expected}, found md5 {found} "
        f"({size} bytes); {reason}."
    )


def _tar(path: pathlib.Path) -> _Content:
    """A reader of a tar's members by their last name; nothing is unpacked to the disk."""
    members: dict[str, bytes] = {}

    def content(file: str) -> bytes:
        if not members:  # the stream is compressed, so one pass reads all
            try:
                with tarfile.open(path, "r:gz") as archive:
                    for member in archive:
                        stream = archive.extractfile(member) if member.isfile() else None
                        if stream is not None:
                            members[pathlib.PurePosixPath(member.name).name] = stream.read()
            except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
                raise ValueError(
                    f"{path}: expected a whole tar.gz archive, found one that cannot be read "
                    f"({error}); fetch it again."
                ) from error
        if file not in members:
            raise ValueError(
                f"{path}: expected a member {file}, found {', '.join(sorted(members)[:8])}."
            )
        return members[file]

    return content


# ---------------------------------------------------------------------------- formats


def _idx(path: pathlib.Path, data: bytes, name: str) -> np.ndarray:
    """Images `(n, 28, 28, 1)` or labels `(n,)` of an idx file in gzip."""
    try:
        data = gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a whole gzip file, found one that cannot be read ({error}); fetch "
            "it again."
        ) from error
    ndim = 3 if "idx3" in path.name else 1
    header = 4 * (ndim + 1)
    if len(data) < header or data[:4] != bytes([0, 0, 8, ndim]):
        raise ValueError(
            f"{path}: expected an idx file of uint8 with {ndim} axes, which begins with "
            f"0000080{ndim}, found {data[:4].hex() or 'nothing'}."
        )
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", count=ndim, offset=4))
    if len(data) - header != int(np.prod(shape)):
        raise ValueError(
            f"{path}: expected {int(np.prod(shape))} values of shape {shape}, found "
            f"{len(data) - header}; fetch it again."
        )
    values = np.frombuffer(data, np.uint8, offset=header).reshape(shape)
    if ndim == 1:
        return values
    if shape[1:] != SPECS[name].image_shape[:2]:
        raise ValueError(
            f"{path}: expected {name}'s pictures of {SPECS[name].image_shape[:2]}, found "
            f"{shape[1:]}."
        )
    return values[..., None]


def _pictures(rows: np.ndarray) -> np.ndarray:
    """CIFAR's rows of three color planes as images `(n, 32, 32, 3)`."""
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _binary_batch(name: str, data: bytes, where: str) -> tuple[np.ndarray, ...]:
    """Images and labels (for CIFAR-100 the superclasses as well) of a `.bin` batch."""
    num_labels = 2 if name == "cifar100" else 1
    if not data or len(data) % (num_labels + 3072):
        raise ValueError(
            f"{where}: expected records of {num_labels + 3072} bytes, found {len(data)} bytes."
        )
    rows = np.frombuffer(data, np.uint8).reshape(-1, num_labels + 3072)
    labels = [rows[:, i].copy() for i in reversed(range(num_labels))]  # the file has coarse first
    return (_pictures(rows[:, num_labels:]), *labels)


class _Unpickler(pickle.Unpickler):
    """Reads the arrays, lists and strings of CIFAR's batches, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        ):
            return np.empty(0).__reduce__()[0]
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return _uint8
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _uint8(code: bytes | str, *_: Any) -> np.dtype:
    # NumPy's own constructor warns at the integers that Python 2 wrote for its two flags. A copy,
    # because the pickle goes on to set its state.
    if code not in (b"u1", "u1"):
        raise pickle.UnpicklingError(f"it has an array of dtype {code!r}")
    return np.dtype("u1", False, True)


def _python_batch(name: str, data: bytes, where: str) -> tuple[np.ndarray, ...]:
    """Images and labels of a batch that Python 2 pickled."""
    try:
        batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        rows = np.asarray(batch[b"data"], np.uint8)
        keys = (b"fine_labels", b"coarse_labels") if name == "cifar100" else (b"labels",)
        labels = [np.asarray(batch[key], np.uint8) for key in keys]
        return (_pictures(rows), *labels)
    except Exception as error:  # a damaged pickle may raise anything at all
        raise ValueError(
            f"{where}: expected a Python batch of {name}, found one that cannot be read ({error})."
        ) from error


def _labels(path: pathlib.Path) -> Arrays:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; sheets of pictures need their labels beside.")
    with np.load(path, allow_pickle=False) as content:
        return {key: content[key] for key in content.files}


def _sheet(path: pathlib.Path, labels: np.ndarray | None, beside: pathlib.Path) -> bytes:
    """A square sheet of 32 x 32 pictures and its labels, as the bytes of a `.bin` batch."""
    image = needed("PIL.Image", f"Reading {path}")
    with image.open(io.BytesIO(_bytes(path))) as opened:
        sheet = np.asarray(opened.convert("RGB"))
    rows, columns = sheet.shape[0] // 32, sheet.shape[1] // 32
    if labels is None or labels.shape != (rows * columns,):
        raise ValueError(
            f"{beside}: expected {rows * columns} labels named {path.stem} for {path.name}, found "
            f"{'none' if labels is None else labels.shape}."
        )
    pictures = sheet.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 4, 1, 3)
    flat = pictures.reshape(rows * columns, 3072)
    return np.concatenate([labels[:, None].astype(np.uint8), flat], axis=1).tobytes()
