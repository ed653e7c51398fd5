"""tensorflow-datasets without TensorFlow: read prepared folders, and prepare them from archives.

tensorflow-datasets shuffles records when it prepares them. The order is a function of the record's
index alone, so it is undone here: every source of a data set gives the same arrays.
"""

import contextlib
import hashlib
import json
import pathlib
import re
import shutil
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from geojax import progress as progress_
from geojax.datasets.archives import MD5, URLS, Candidate
from geojax.datasets.archives import read as read_archives
from geojax.datasets.tables import SPECS, Arrays, needed

__all__ = ["download", "find", "prepare", "read", "record_order"]

_CHUNK = 1000


def find(name: str, root: pathlib.Path) -> tuple[pathlib.Path | None, str]:
    """The newest prepared folder of a data set below a tensorflow-datasets folder.

    Returns:
        `ROOT/NAME/VERSION` if it is whole and readable here, else None; and what was looked for,
        with the reason why a folder was passed over.

    Raises:
        ValueError: If the folder's description is damaged, or names another data set.
    """
    looked = str(root / name / "VERSION" / "dataset_info.json")
    # A folder that is being written, or was left by a killed writer, has another name.
    versions = [p for p in (root / name).glob("*") if re.fullmatch(r"\d+\.\d+\.\d+", p.name)]
    for path in sorted(
        versions, key=lambda p: tuple(int(n) for n in p.name.split(".")), reverse=True
    ):
        if not (path / "dataset_info.json").is_file():
            continue
        try:
            info = json.loads((path / "dataset_info.json").read_text())
        except ValueError as error:
            raise ValueError(
                f"{path / 'dataset_info.json'}: expected JSON, found a file that cannot be read "
                f"({error}); delete {path} and prepare {name} again."
            ) from error
        if info.get("name") != name:
            raise ValueError(
                f"{path}: expected the prepared data set {name}, found {info.get('name')}; each "
                "data set has a folder of its own name."
            )
        if info.get("fileFormat") == "array_record":
            return path, looked
        looked += (
            f" ({path.name} is there as {info.get('fileFormat', 'tfrecord')}, which only "
            "TensorFlow reads; array_record is needed)"
        )
    return None, looked


def record_order(split: str, num_records: int) -> np.ndarray:
    """The index that each record had before tensorflow-datasets shuffled a split.

    Records are sorted by the md5 of the split's name and the record's key, which for the four
    image sets is its index.

    Args:
        split: The split's name, the salt of the hash.
        num_records: Records in the split.

    Returns:
        `(num_records,)`: record j of the prepared split is example `order[j]` of the archive.
    """
    salt = hashlib.md5(split.encode(), usedforsecurity=False)

    def digest(index: int) -> bytes:
        out = salt.copy()
        out.update(str(index).encode())
        return out.digest()

    return np.array(sorted(range(num_records), key=digest), np.int64)


def read(name: str, path: pathlib.Path, *, progress: bool | None = None) -> Arrays:
    """Read a prepared folder into arrays, in the order of the published archives.

    Args:
        name: A key of `SPECS`.
        path: What `find` gave.
        progress: As `show` of `geojax.progress.bar`.

    Raises:
        ImportError: Without tensorflow-datasets and what it needs to read.
        ValueError: If the folder cannot be read, naming it.
    """
    tfds = _tfds(f"Reading {path}")
    spec = SPECS[name]
    out: Arrays = {}
    try:
        builder = tfds.builder_from_directory(path)
        sizes = {part: builder.info.splits[part].num_examples for part in ("train", "test")}
        done = 0
        with progress_.bar(sum(sizes.values()), f"read {name}", show=progress) as update:
            for part, size in sizes.items():
                records = builder.as_data_source(part)
                order = record_order(part, size)
                images = np.empty((size, *spec.image_shape), np.uint8)
                labels = np.empty(size, np.uint8)
                coarse = np.empty(size, np.uint8) if spec.coarse_class_names else None
                for first in range(0, size, _CHUNK):
                    rows = range(first, min(first + _CHUNK, size))
                    for row, record in zip(rows, records.__getitems__(list(rows)), strict=True):
                        images[order[row]] = record["image"]
                        labels[order[row]] = record["label"]
                        if coarse is not None:
                            coarse[order[row]] = record["coarse_label"]
                    done += len(rows)
                    update(done)
                out[f"{part}_images"], out[f"{part}_labels"] = images, labels
                if coarse is not None:
                    out[f"{part}_coarse_labels"] = coarse
    except Exception as error:  # tensorflow-datasets and array_record raise kinds of their own
        raise ValueError(
            f"{path}: expected a whole tensorflow-datasets folder of {name}, found one that cannot "
            f"be read ({type(error).__name__}: {error}); delete it and prepare it again."
        ) from error
    return out


def prepare(
    name: str,
    arrays_from: Callable[[Any], Arrays],
    out_dir: pathlib.Path,
    *,
    downloads: pathlib.Path | None = None,
    progress: bool | None = None,
) -> pathlib.Path:
    """Write a prepared `array_record` folder.

    tensorflow-datasets' own builder writes to a folder with `incomplete` in its name and renames it
    at the end, so a killed run leaves nothing that looks whole.

    Args:
        name: A key of `SPECS`.
        arrays_from: Takes tensorflow-datasets' download manager and returns the arrays.
        out_dir: The tensorflow-datasets folder to write below.
        downloads: Where fetched files are kept; by default a temporary folder.
        progress: As `show` of `geojax.progress.bar`.

    Returns:
        `OUT_DIR/NAME/VERSION`.

    Raises:
        FileExistsError: If that folder exists.
    """
    tfds = _tfds(f"Preparing {name} for tensorflow-datasets")
    pillow = needed("PIL.Image", "Encoding pictures")
    spec = SPECS[name]
    parent = tfds.builder_cls(name)
    total = spec.num_train + spec.num_test

    with progress_.bar(total, f"prepare {name}", show=progress) as update:
        # An array it would pass to TensorFlow for encoding; a Pillow picture it encodes itself.
        class Builder(parent, skip_registration=True):  # pyright: ignore
            url_infos = parent.url_infos
            done = 0

            def _info(self):
                info = super()._info()
                # It would look for statistics in the project's bucket, and leave a folder behind.
                info.initialize_from_bucket = lambda: None
                return info

            def _split_generators(self, dl_manager):
                arrays = arrays_from(dl_manager)
                if name.startswith("cifar"):  # the builder reads these names from the archive
                    self.info.features["label"].names = list(spec.class_names)
                if spec.coarse_class_names:
                    self.info.features["coarse_label"].names = list(spec.coarse_class_names)
                return {part: self._generate_examples(part, arrays) for part in ("train", "test")}

            def _generate_examples(self, part, arrays):
                for i, image in enumerate(arrays[f"{part}_images"]):
                    flat = image[..., 0] if image.shape[-1] == 1 else image
                    record: dict[str, Any] = {
                        "image": pillow.fromarray(flat),
                        "label": int(arrays[f"{part}_labels"][i]),
                    }
                    if name.startswith("cifar"):
                        record["id"] = f"{part}_{i:05d}"
                    if spec.coarse_class_names:
                        record["coarse_label"] = int(arrays[f"{part}_coarse_labels"][i])
                    yield i, record
                    Builder.done += 1
                    if Builder.done % _CHUNK == 0:
                        update(Builder.done)

            def _log_download_bytes(self):  # it prints, even where nothing is fetched
                pass

            def _log_download_done(self):
                pass

        Builder.name = name
        builder = Builder(data_dir=str(out_dir))
        target = pathlib.Path(builder.data_dir)
        if target.exists():
            raise FileExistsError(
                f"{target} exists; delete it to prepare {name} again, or name another out_dir."
            )
        with _quiet(), tempfile.TemporaryDirectory() as temporary:
            builder.download_and_prepare(
                download_dir=str(downloads or temporary), file_format="array_record"
            )
    return target


def download(name: str, out_dir: pathlib.Path, *, progress: bool | None = None) -> Arrays:
    """Let tensorflow-datasets fetch the archives, prepare them below a folder, and return them.

    Raises:
        ConnectionError: At once, if the place they are published at does not answer.
        ValueError: If what was fetched is not what was published.
    """
    url = URLS[name]
    files = [f for f in MD5[name] if f.endswith("-ubyte.gz") or f.endswith("-binary.tar.gz")]
    _probe(name, url + files[0])
    fetched: Arrays = {}

    def arrays_from(dl_manager: Any) -> Arrays:
        paths = dl_manager.download({file: url + file for file in files})
        with tempfile.TemporaryDirectory() as temporary:
            # It names files by their checksum; the readers know them by their published names.
            for file, path in paths.items():
                shutil.copyfile(path, pathlib.Path(temporary) / file)
            place = (
                Candidate("binary tar", pathlib.Path(temporary) / files[0])
                if name.startswith("cifar")
                else Candidate("idx", pathlib.Path(temporary))
            )
            fetched.update(read_archives(name, place, progress=progress)[0])
        return fetched

    prepare(name, arrays_from, out_dir, downloads=out_dir / "downloads", progress=progress)
    return fetched


def _probe(name: str, url: str) -> None:
    """Raise unless a server answers: tensorflow-datasets retries for minutes before it fails."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5):
            pass
    except (urllib.error.URLError, OSError) as error:
        raise ConnectionError(
            f"{name}: expected an answer from {url} within 5 s, found none ({error}). Fetch the "
            "archives elsewhere and name their folder as data_dir or GEOJAX_DATA_DIR."
        ) from error


def _tfds(purpose: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside it, met at import
        for module in ("PIL", "importlib_resources", "array_record"):
            needed(module, purpose)
        return needed("tensorflow_datasets", purpose)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """tensorflow-datasets without its own progress bars, in which ours would drown."""
    bars = needed("tensorflow_datasets.core.utils.tqdm_utils", "Preparing")
    before = bars._active
    bars.display_progress_bar(False)
    try:
        yield
    finally:
        bars.display_progress_bar(before)
