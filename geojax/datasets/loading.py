"""`load`: one name, the places where it may be found, and three disjoint parts."""

import operator
import os
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from geojax.datasets import archives, augment, prepared, synthetic
from geojax.datasets import cache as cache_
from geojax.datasets.tables import (
    NORMALIZATIONS,
    SPECS,
    Arrays,
    Dataset,
    Examples,
    Normalization,
    check_arrays,
    normalize,
)

__all__ = ["NAMES", "Augmentation", "Augmented", "load", "load_augmented", "prepare"]

_SYNTHETIC = {"two_spirals": synthetic.two_spirals, "regression_1d": synthetic.regression_1d}

NAMES: tuple[str, ...] = ("digits", *_SYNTHETIC, *SPECS)
"""What `load` knows."""

Augmentation = Literal["none", "pad_crop_flip", "affine"]
"""What `load_augmented` knows."""

_DIGITS_VALIDATION = 130  # leaves 768 training images: six batches of 128
_VALIDATION = 5000


def load(
    name: str = "digits",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    download: bool = False,
    validation: int | None = None,
    raw: bool = False,
    normalization: str | Normalization | None = None,
    cache: bool | str | os.PathLike[str] = True,
    verify: bool = True,
    progress: bool | None = None,
    **options: Any,
) -> Dataset:
    """Load a data set by name, as NumPy arrays in disjoint training, validation and test parts.

    `digits`, `two_spirals` and `regression_1d` need no files. The images of `mnist`,
    `fashion_mnist`, `cifar10` and `cifar100` are looked for, in this order, in this package's
    cache; in a prepared tensorflow-datasets folder (`array_record`) below `data_dir` or in
    tensorflow-datasets' own place; among the published archives below `data_dir`; and, only if
    `download` is true, at the place where they are published. The first source that is there is
    used; if it is damaged, that is an error, and no other one is tried. All of them give the same
    arrays in the same order.

    Args:
        name: One of `NAMES`.
        data_dir: The folder with archives and prepared folders; by default the environment variable
            GEOJAX_DATA_DIR, else a `geojax` folder in the user's cache folder. Synthetic data and
            digits use none.
        download: Whether tensorflow-datasets may fetch the archives, into `data_dir`.
        validation: How many examples to hold out. For images they are the last ones of the
            training part, 5000 by default and 130 of the 898 for digits; with 0 the part is empty.
            Synthetic data draw as many more.
        raw: Whether to return images as uint8, as augmentation wants them; `normalize` with the
            result's `normalization` gives what `raw=False` would have.
        normalization: A name in `NORMALIZATIONS`, or constants. By default each data set's own: for
            digits the mean of each pixel over the training part that is returned, for the MNISTs
            their mean and deviation, for both CIFARs "ResNet".
        cache: Whether arrays read from archives or a prepared folder are kept as one npz file in
            the user's cache folder, and looked for there; or another folder for that.
        verify: Whether the images must be the published ones, by checksum. Without it nothing is
            cached, and the cache is not read.
        progress: True or False for a bar; by default one appears on what takes long.
        **options: Of `two_spirals` or `regression_1d`.

    Returns:
        The data set. A part is a pytree for `batches.split`. Float images take 4 bytes for each
        channel of a pixel, 737 MB for a CIFAR; raw ones a quarter.

    Raises:
        FileNotFoundError: If a data set is nowhere, listing all places looked at.
        ValueError: For an unknown name, a source that is damaged or another data set, or a
            validation part that leaves no training example.
        ConnectionError: If it should be downloaded and nobody answers.
        ImportError: If an optional dependency is missing.

    Example:
        >>> digits = load("digits", validation=98)
        >>> [part.inputs.shape for part in (digits.train, digits.validation, digits.test)]
        [(800, 8, 8, 1), (98, 8, 8, 1), (899, 8, 8, 1)]
    """
    _check_name(name)
    if name in _SYNTHETIC:
        if raw or normalization is not None:
            raise TypeError(f"load({name!r}): raw and normalization are for images.")
        return _SYNTHETIC[name](validation=validation, **options)
    if options:
        raise TypeError(
            f"load({name!r}): got the option {next(iter(options))}; options are for "
            f"{' and '.join(_SYNTHETIC)}."
        )
    if name == "digits":
        arrays = synthetic.digits_arrays()
        source, names, default = "scikit-learn", tuple("0123456789"), _DIGITS_VALIDATION
    else:
        arrays, source = _find(
            name, _data_dir(data_dir), download, _cache_dir(cache), verify, progress
        )
        names, default = SPECS[name].class_names, _VALIDATION
    num_train = len(arrays["train_images"])
    num_fit = num_train - _validation(
        name, default if validation is None else validation, num_train
    )
    constants = _normalization(name, normalization, arrays["train_images"][:num_fit])

    def part(which: str, rows: slice) -> Examples:
        images, labels = arrays[f"{which}_images"][rows], arrays[f"{which}_labels"][rows]
        inputs = images if raw else normalize(images, constants)
        return Examples(inputs, labels.astype(np.int32))

    return Dataset(
        train=part("train", slice(num_fit)),
        validation=part("train", slice(num_fit, None)),
        test=part("test", slice(None)),
        name=name,
        num_classes=len(names),
        class_names=names,
        normalization=constants,
        source=source,
    )


class Augmented(NamedTuple):
    """A data set, and how to train on random changes of its images.

    Attributes:
        data: The data set as `load` gives it: what to measure on.
        train: What to train on: raw pixels of the training part, or the part itself without
            augmentation.
        transform: `(key, batch) -> batch`, from raw pixels to changed inputs, as `fit.fit` takes
            it; None without augmentation.
    """

    data: Dataset
    train: Examples
    transform: Callable[[jax.Array, Examples], Examples] | None


def load_augmented(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    augmentation: Augmentation = "none",
    **options: Any,
) -> Augmented:
    """Load a data set by name for training with an augmentation by name.

    Args:
        name: As for `load`.
        data_dir: As for `load`.
        augmentation: A function of `datasets.augment` with its defaults, applied to raw pixels and
            before normalization; or "none".
        **options: Further options of `load`.

    Returns:
        The data set, its training part and the transform.

    Raises:
        ValueError: For an unknown augmentation, or one of data that are no images.
        FileNotFoundError: And others, as `load`.

    Example:
        >>> found = load_augmented("digits", augmentation="pad_crop_flip")
        >>> batch = found.transform(jax.random.key(0), Examples(*(x[:5] for x in found.train)))
        >>> found.train.inputs.dtype.name, batch.inputs.dtype.name, batch.inputs.shape
        ('uint8', 'float32', (5, 8, 8, 1))
    """
    _check_name(name)
    if augmentation not in get_args(Augmentation):
        raise ValueError(
            f"unknown augmentation {augmentation!r}; expected one of "
            f"{', '.join(get_args(Augmentation))}."
        )
    if augmentation == "none":
        data = load(name, data_dir, **options)
        return Augmented(data, data.train, None)
    if name in _SYNTHETIC:
        raise ValueError(f"the augmentation {augmentation!r} is for images, and {name} has none.")
    raw = load(name, data_dir, raw=True, **options)
    change, constants = getattr(augment, augmentation), raw.normalization
    assert constants is not None

    def inputs(part: Examples) -> Examples:
        return part._replace(inputs=normalize(part.inputs, constants))

    def transform(key: jax.Array, batch: Examples) -> Examples:
        return inputs(batch._replace(inputs=change(key, batch.inputs)))

    data = raw._replace(
        train=inputs(raw.train), validation=inputs(raw.validation), test=inputs(raw.test)
    )
    return Augmented(data, raw.train, transform)


def prepare(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    out_dir: str | os.PathLike[str],
    *,
    verify: bool = True,
    progress: bool | None = None,
) -> pathlib.Path:
    """Write a tensorflow-datasets folder from the published archives, without TensorFlow.

    The folder is what `tfds.data_source(name, data_dir=out_dir)` reads, with the names, features
    and order of records that tensorflow-datasets itself gives them. It appears whole or not at all.

    Args:
        name: "mnist", "fashion_mnist", "cifar10" or "cifar100".
        data_dir: The folder with the archives; None as in `load`.
        out_dir: The tensorflow-datasets folder to write below.
        verify: Whether the archives must be the published ones, by checksum.
        progress: True or False for a bar; by default one appears on a terminal.

    Returns:
        The folder `OUT_DIR/NAME/VERSION`.

    Raises:
        FileNotFoundError: If there are no archives, listing the places looked at.
        FileExistsError: If the folder is there already.
        ValueError: For another name, or archives that are damaged or another data set's.
        ImportError: Without tensorflow-datasets or Pillow.
    """
    _check_name(name)
    if name not in SPECS:
        raise ValueError(f"prepare: {name!r} has no archives; expected one of {', '.join(SPECS)}.")
    root = _data_dir(data_dir)
    places = archives.candidates(name, root)
    found = next((place for place in places if place.present()), None)
    if found is None:
        raise FileNotFoundError(_nowhere(name, root, [str(place) for place in places]))
    arrays, _ = archives.read(name, found, verify=verify, progress=progress)
    check_arrays(name, arrays, str(found), verify=verify)
    return prepared.prepare(
        name, lambda _: arrays, pathlib.Path(out_dir).expanduser().absolute(), progress=progress
    )


def _find(
    name: str,
    root: pathlib.Path,
    download: bool,
    cache_dir: pathlib.Path | None,
    verify: bool,
    progress: bool | None,
) -> tuple[Arrays, str]:
    """The arrays of a published data set from the first source that is there, and its name."""
    looked = []
    kept = None if cache_dir is None or not verify else cache_.file(name, cache_dir)
    if kept is not None:
        looked.append(str(kept))
        if kept.is_file():
            arrays, about = cache_.read(kept)
            check_arrays(name, arrays, str(kept))
            return arrays, f"{kept} (from {about['source']})"

    arrays, source, checksums = None, "", {}
    for place in _prepared_roots(root):
        folder, where = prepared.find(name, place)
        looked.append(where)
        if folder is not None:
            arrays = prepared.read(name, folder, progress=progress)
            source = str(folder)
            checksums = {"dataset_info.json": archives.file_md5(folder / "dataset_info.json")[0]}
            break
    if arrays is None:
        for place in archives.candidates(name, root):
            looked.append(str(place))
            if place.present():
                arrays, checksums = archives.read(name, place, verify=verify, progress=progress)
                source = str(place)
                break
    if arrays is None:
        if not download:
            raise FileNotFoundError(_nowhere(name, root, looked))
        arrays = prepared.download(name, root, progress=progress)
        source = f"{archives.URLS[name]} (prepared in {root / name})"
    check_arrays(name, arrays, source, verify=verify)
    if kept is not None:
        cache_.write(kept, arrays, source=source, checksums=checksums)
    return arrays, source


def _nowhere(name: str, root: pathlib.Path, looked: list[str]) -> str:
    lines = "\n".join(f"  {place}" for place in looked)
    remarks = "" if root.is_dir() else f" ({root} does not exist.)"
    if name in ("mnist", "fashion_mnist") and any(root.glob("*-idx?-ubyte.gz")):
        remarks = (
            f" ({root} itself holds idx files. MNIST's and Fashion-MNIST's have the same names, so "
            f"each set needs a folder of its own: move them to {root / name} if they are {name}'s.)"
        )
    return (
        f"{name} was not found; looked for\n{lines}\n"
        "Put the published archives there, or name the folder that holds them as data_dir or in "
        "the environment variable GEOJAX_DATA_DIR, or let load fetch them with download=True."
        f"{remarks}"
    )


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(NAMES)}.")


def _data_dir(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    given = data_dir if data_dir is not None else os.environ.get("GEOJAX_DATA_DIR")
    return pathlib.Path(given).expanduser().absolute() if given else cache_.folder()


def _cache_dir(given: bool | str | os.PathLike[str]) -> pathlib.Path | None:
    if given is True:
        return cache_.folder()
    return None if given is False else pathlib.Path(given).expanduser().absolute()


def _prepared_roots(root: pathlib.Path) -> list[pathlib.Path]:
    """Where prepared folders are looked for: the data folder, then tensorflow-datasets' own."""
    own = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return [root, pathlib.Path(own).expanduser().absolute()]


def _validation(name: str, size: Any, num_train: int) -> int:
    if isinstance(size, bool):
        raise TypeError(f"load({name!r}): validation is {size}; expected a number of examples.")
    size = operator.index(size)
    if not 0 <= size < num_train:
        raise ValueError(
            f"load({name!r}): validation is {size}; expected 0 to {num_train - 1}, for it is taken "
            f"from the {num_train} training images."
        )
    return size


def _normalization(
    name: str, given: str | Normalization | None, train_images: np.ndarray
) -> Normalization:
    scale = 16.0 if name == "digits" else 255.0
    if isinstance(given, str):
        if given not in NORMALIZATIONS:
            raise ValueError(
                f"unknown normalization {given!r}; expected one of {', '.join(NORMALIZATIONS)}, or "
                "a Normalization."
            )
        return NORMALIZATIONS[given]._replace(scale=scale)
    if given is not None:
        return given
    if name == "digits":
        mean = train_images.mean(axis=0, dtype=np.float64) / scale
        return Normalization(mean.astype(np.float32), (1.0,), scale)
    return SPECS[name].normalization
