"""All sources of a data set agree, what is damaged is named, and augmentation is pure."""

import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import jax.sharding as jsh
import numpy as np
import pytest

from geojax import batches, datasets
from geojax.datasets import archives, augment, cache, prepared, tables

REAL = os.environ.get("GEOJAX_DATA_DIR")
EPSILON = float(np.finfo(np.float32).eps)
NUM_TRAIN, NUM_TEST = 20, 8


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No folder of this machine is looked at, and none is written."""
    monkeypatch.delenv("GEOJAX_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "user-cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds-home"))


# ---------------------------------------------------------------------------- tiny archives


def md5(data):
    return hashlib.md5(data).hexdigest()


def publish(monkeypatch, name, files):
    """Declare these bytes to be the published archives."""
    known = archives.MD5[name] | {file: md5(data) for file, data in files.items()}
    monkeypatch.setitem(archives.MD5, name, known)


@pytest.fixture
def tiny(monkeypatch):
    """A function that makes a small data set, and declares it the published one."""

    def make(name, seed=0):
        rng = np.random.default_rng([seed, *name.encode()])
        spec = tables.SPECS[name]
        arrays = {}
        for part, count in (("train", NUM_TRAIN), ("test", NUM_TEST)):
            arrays[f"{part}_images"] = rng.integers(0, 256, (count, *spec.image_shape), np.uint8)
            arrays[f"{part}_labels"] = rng.integers(0, spec.num_classes, count, dtype=np.uint8)
            if spec.coarse_class_names:
                arrays[f"{part}_coarse_labels"] = rng.integers(0, 20, count, dtype=np.uint8)
        small = spec._replace(
            num_train=NUM_TRAIN, num_test=NUM_TEST, content_md5=tables.content_md5(arrays)
        )
        monkeypatch.setitem(tables.SPECS, name, small)
        return arrays

    return make


def idx_files(arrays):
    out = {}
    for key, file in archives._IDX_FILES.items():
        values = arrays[key][..., 0] if key.endswith("images") else arrays[key]
        head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
        out[file] = gzip.compress(head + values.tobytes(), mtime=0)
    return out


def cifar_parts(name, arrays):
    """Batch name -> (rows of color planes, labels, coarse labels or None)."""
    out = {}
    for part, files in archives._BATCHES[name].items():
        rows = arrays[f"{part}_images"].transpose(0, 3, 1, 2).reshape(-1, 3072)
        labels, coarse = arrays[f"{part}_labels"], arrays.get(f"{part}_coarse_labels")
        for i, file in enumerate(files):
            take = slice(i * len(rows) // len(files), (i + 1) * len(rows) // len(files))
            out[file] = (rows[take], labels[take], None if coarse is None else coarse[take])
    return out


def binary_files(name, arrays):
    return {
        f"{file}.bin": np.concatenate(
            [x[:, None] for x in (coarse, labels) if x is not None] + [rows], axis=1
        ).tobytes()
        for file, (rows, labels, coarse) in cifar_parts(name, arrays).items()
    }


def python_files(name, arrays):
    out = {}
    for file, (rows, labels, coarse) in cifar_parts(name, arrays).items():
        keys = {b"labels": labels} if coarse is None else {b"fine_labels": labels}
        if coarse is not None:
            keys[b"coarse_labels"] = coarse
        out[file] = python2_pickle({b"batch_label": b"a batch", **keys, b"data": rows})
    return out


def python2_pickle(batch):
    """The bytes in which Python 2 and an old NumPy pickled such a dictionary, by hand."""

    def text(x):
        return b"U" + bytes([len(x)]) + x if len(x) < 256 else b"T" + struct.pack("<i", len(x)) + x

    def integer(x):
        return b"J" + struct.pack("<i", x)

    def value(x):
        if isinstance(x, bytes):
            return text(x)
        if x.ndim == 1:
            return b"](" + b"".join(integer(int(i)) for i in x) + b"e"
        array = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n"
        array += integer(0) + b"\x85" + text(b"b") + b"\x87R"
        dtype = b"cnumpy\ndtype\n" + text(b"u1") + integer(0) + integer(1) + b"\x87R"
        dtype += b"(" + integer(3) + text(b"|") + b"NNN" + integer(-1) * 2 + integer(0) + b"tb"
        shape = integer(x.shape[0]) + integer(x.shape[1]) + b"\x86"
        return array + b"(" + integer(1) + shape + dtype + b"\x89" + text(x.tobytes()) + b"tb"

    items = b"".join(text(key) + value(x) for key, x in batch.items())
    return b"\x80\x02}(" + items + b"u."


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        (folder / file).write_bytes(data)


def tar(path, folder, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for file, data in {"readme.html": b"<html>", **files}.items():
            member = tarfile.TarInfo(f"{folder}/{file}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def sheets(folder, arrays):
    """CIFAR-10's batches as sheets of two rows of pictures."""
    pillow = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True, exist_ok=True)
    labels = {}
    for file, (rows, batch_labels, _) in cifar_parts("cifar10", arrays).items():
        columns = len(rows) // 2
        grid = rows.reshape(2, columns, 3, 32, 32).transpose(0, 3, 1, 4, 2)
        sheet = pillow.fromarray(grid.reshape(64, columns * 32, 3))
        sheet.save(folder / f"{file}.webp", lossless=True)
        labels[file] = batch_labels
    np.savez(folder / "labels.npz", **labels)


@pytest.fixture
def place(tiny, monkeypatch):
    """A function that writes a tiny published data set in one of its forms below a folder."""

    def make(name, kind, root):
        arrays = tiny(name)
        number = name.removeprefix("cifar")
        if kind == "idx":
            files = idx_files(arrays)
            write(root / name, files)
        elif kind == "torchvision idx":
            files = idx_files(arrays)
            write(root / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name] / "raw", files)
        elif kind.startswith("binary"):
            files = binary_files(name, arrays)
            folder = "cifar-10-batches-bin" if name == "cifar10" else "cifar-100-binary"
            if kind.endswith("tar"):
                path = root / f"cifar-{number}-binary.tar.gz"
                tar(path, folder, files)
                files = {path.name: path.read_bytes()}
            else:
                write(root / folder, files)
        elif kind.startswith("python"):
            files = python_files(name, arrays)
            folder = "cifar-10-batches-py" if name == "cifar10" else "cifar-100-python"
            if kind.endswith("tar"):
                path = root / name / f"cifar-{number}-python.tar.gz"
                tar(path, folder, files)
                files = {path.name: path.read_bytes()}
            else:
                write(root / folder, files)
        else:
            files = binary_files(name, arrays)
            sheets(root / name, arrays)
        publish(monkeypatch, name, files)
        return arrays

    return make


def assert_parts(dataset, arrays, validation):
    """A raw data set holds exactly these arrays, the last training images for validation."""
    cut = NUM_TRAIN - validation
    np.testing.assert_array_equal(dataset.train.inputs, arrays["train_images"][:cut])
    np.testing.assert_array_equal(dataset.train.labels, arrays["train_labels"][:cut])
    np.testing.assert_array_equal(dataset.validation.inputs, arrays["train_images"][cut:])
    np.testing.assert_array_equal(dataset.validation.labels, arrays["train_labels"][cut:])
    np.testing.assert_array_equal(dataset.test.inputs, arrays["test_images"])
    np.testing.assert_array_equal(dataset.test.labels, arrays["test_labels"])


FORMS = [
    ("mnist", "idx"),
    ("mnist", "torchvision idx"),
    ("fashion_mnist", "idx"),
    ("cifar10", "binary"),
    ("cifar10", "binary tar"),
    ("cifar10", "python"),
    ("cifar10", "python tar"),
    ("cifar10", "sheets"),
    ("cifar100", "binary"),
    ("cifar100", "binary tar"),
    ("cifar100", "python"),
    ("cifar100", "python tar"),
]


# ---------------------------------------------------------------------------- sets without files


def test_digits_without_validation_are_the_calibration_split():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    train, test = bunch.data[order[:898]] / 16, bunch.data[order[898:]] / 16
    dataset = datasets.load("digits", validation=0)
    mean = train.mean(axis=0)
    for part, pixels in ((dataset.train, train), (dataset.test, test)):
        np.testing.assert_allclose(part.inputs.reshape(-1, 64), pixels - mean, atol=2 * EPSILON)
    np.testing.assert_array_equal(dataset.train.labels, bunch.target[order[:898]])
    np.testing.assert_array_equal(dataset.test.labels, bunch.target[order[898:]])
    assert dataset.validation.inputs.shape == (0, 8, 8, 1)


def test_digits_parts_together_are_all_digits_once():
    whole = datasets.load("digits", validation=0, raw=True)
    dataset = datasets.load(raw=True)
    assert [len(part.labels) for part in dataset[:3]] == [768, 130, 899]
    joined = np.concatenate([dataset.train.inputs, dataset.validation.inputs])
    np.testing.assert_array_equal(joined, whole.train.inputs)
    np.testing.assert_array_equal(dataset.test.inputs, whole.test.inputs)


def test_digits_mean_is_that_of_the_training_part_alone():
    dataset = datasets.load("digits", validation=300)
    np.testing.assert_allclose(dataset.train.inputs.mean(axis=0), 0, atol=1e3 * EPSILON)
    assert np.abs(dataset.validation.inputs.mean(axis=0)).max() > 1e-3


@pytest.mark.parametrize("name", ["digits", "two_spirals", "regression_1d"])
def test_each_offline_set_has_float_inputs_and_slices_into_batches(name):
    dataset = datasets.load(name)
    assert dataset.name == name
    for part in dataset[:3]:
        assert part.inputs.dtype == np.float32
        assert part.labels.dtype == (np.float32 if name == "regression_1d" else np.int32)
        again = list(batches.split(part, 50))
        assert isinstance(again[0], datasets.Examples)
        joined = jax.tree.map(lambda *x: np.concatenate(x), *again)
        np.testing.assert_array_equal(joined.inputs, part.inputs)
        np.testing.assert_array_equal(joined.labels, part.labels)
    if dataset.num_classes is not None:
        assert len(dataset.class_names) == dataset.num_classes
        assert set(dataset.train.labels.tolist()) == set(range(dataset.num_classes))


def test_spirals_without_noise_lie_on_the_curves():
    part = datasets.two_spirals(num_per_class=40, noise=0.0).train
    x = part.inputs.astype(np.float64) * (1 - 2 * part.labels[:, None])
    angle = np.linalg.norm(x, axis=1) / 1.5
    curve = 1.5 * angle[:, None] * np.stack([-np.cos(angle), np.sin(angle)], axis=1)
    np.testing.assert_allclose(x, curve, atol=1e3 * EPSILON)
    assert angle.max() <= 10 * np.pi / 3 * (1 + EPSILON)


def test_spirals_have_the_asked_number_of_points_of_each_class_in_mixed_order():
    dataset = datasets.load("two_spirals", num_per_class=50, num_test_per_class=7, validation=9)
    assert np.bincount(dataset.train.labels).tolist() == [50, 50]
    assert np.bincount(dataset.test.labels).tolist() == [7, 7]
    assert len(dataset.validation.labels) == 9
    assert 0 < dataset.train.labels[:50].sum() < 50


@pytest.mark.parametrize("name", ["two_spirals", "regression_1d"])
def test_the_seed_of_a_synthetic_set_is_used_and_parts_differ(name):
    one, same, other = (datasets.load(name, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.train.inputs, same.train.inputs)
    assert not np.isin(one.train.inputs, other.train.inputs).any()
    parts = [part.inputs for part in one[:3]]
    assert not np.isin(parts[0], parts[1]).any()
    assert not np.isin(parts[2], np.concatenate(parts[:2])).any()


def test_regression_points_lie_in_two_clusters_around_the_curve():
    dataset = datasets.regression_1d(num_train=60, noise=0.0)
    x, y = dataset.train
    left, right = (x >= -1) & (x <= -0.7), (x >= 0.5) & (x <= 1)
    assert (int(left.sum()), int(right.sum())) == (30, 30)
    np.testing.assert_allclose(y, np.cos(4 * x + np.float32(0.8)), atol=10 * EPSILON)
    noisy = datasets.regression_1d(num_train=4000, noise=0.1).train
    residual = noisy.labels - np.cos(4 * noisy.inputs + np.float32(0.8))
    assert abs(residual.std() - 0.1) < 4 * 0.1 / np.sqrt(2 * 4000)
    assert dataset.num_classes is None


@pytest.mark.parametrize(
    "options",
    [{"num_per_class": 0}, {"noise": -1.0}, {"validation": -1}, {"num_test_per_class": -1}],
)
def test_impossible_synthetic_sizes_are_refused(options):
    with pytest.raises(ValueError, match="at least one training point and no negative"):
        datasets.two_spirals(**options)


# ---------------------------------------------------------------------------- arguments of load


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown data set 'cifar'; expected one of digits, two_sp"
    ):
        datasets.load("cifar")


@pytest.mark.parametrize(("validation", "error"), [(-1, ValueError), (898, ValueError)])
def test_a_validation_part_that_leaves_no_training_is_refused(validation, error):
    with pytest.raises(error, match=f"validation is {validation}; expected 0 to 897"):
        datasets.load("digits", validation=validation)


@pytest.mark.parametrize("validation", [True, 0.5, "10"])
def test_a_validation_size_that_is_no_count_is_refused(validation):
    with pytest.raises(TypeError):
        datasets.load("digits", validation=validation)


def test_options_of_other_sets_are_refused():
    with pytest.raises(TypeError, match="got the option seed; options are for two_spirals"):
        datasets.load("digits", seed=1)
    with pytest.raises(TypeError, match="raw and normalization are for images"):
        datasets.load("two_spirals", raw=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'points'"):
        datasets.load("two_spirals", points=1)


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_raw_pixels_normalized_are_the_float_pixels(as_array):
    raw, done = datasets.load("digits", raw=True), datasets.load("digits")
    assert raw.train.inputs.dtype == np.uint8
    out = datasets.normalize(as_array(raw.test.inputs), raw.normalization)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, done.test.inputs, atol=2 * EPSILON)


def test_named_normalizations_are_the_constants_of_the_papers(place, tmp_path):
    arrays = place("cifar10", "binary", tmp_path)
    constants = {
        "VGG": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "ResNet": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    }
    for name, (mean, std) in constants.items():
        dataset = datasets.load("cifar10", tmp_path, validation=0, normalization=name)
        expected = (arrays["train_images"] / 255 - np.array(mean)) / np.array(std)
        np.testing.assert_allclose(dataset.train.inputs, expected, atol=20 * EPSILON)
    default = datasets.load("cifar10", tmp_path, validation=0)
    assert default.normalization == datasets.NORMALIZATIONS["ResNet"]


def test_digits_scale_by_sixteen_under_a_named_normalization():
    assert datasets.load("digits", normalization="none").train.inputs.max() == 1.0


def test_a_normalization_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="unknown normalization 'vgg'; expected one of none, VGG"):
        datasets.load("digits", normalization="vgg")
    with pytest.raises(ValueError, match=r"mean has shape \(3,\), which does not broadcast"):
        datasets.load("digits", normalization="VGG")


# ---------------------------------------------------------------------------- archives


@pytest.mark.parametrize(("name", "kind"), FORMS)
def test_each_form_of_the_archives_gives_the_published_arrays(name, kind, place, tmp_path):
    arrays = place(name, kind, tmp_path)
    dataset = datasets.load(name, tmp_path, validation=6, raw=True, cache=False)
    assert_parts(dataset, arrays, 6)
    assert dataset.train.labels.dtype == np.int32
    assert dataset.num_classes == (100 if name == "cifar100" else 10)
    assert str(tmp_path) in dataset.source


def test_superclasses_of_cifar100_are_not_taken_for_classes(place, tmp_path):
    arrays = place("cifar100", "binary", tmp_path)
    read, _ = archives.read("cifar100", archives.candidates("cifar100", tmp_path)[0])
    np.testing.assert_array_equal(read["test_coarse_labels"], arrays["test_coarse_labels"])
    np.testing.assert_array_equal(read["test_labels"], arrays["test_labels"])


def test_the_environment_names_the_data_folder(place, tmp_path, monkeypatch):
    arrays = place("mnist", "idx", tmp_path / "there")
    monkeypatch.setenv("GEOJAX_DATA_DIR", str(tmp_path / "there"))
    assert_parts(datasets.load("mnist", validation=1, raw=True), arrays, 1)


def test_nothing_found_lists_every_place_at_once(tmp_path):
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError) as caught:
        datasets.load("cifar10", tmp_path)
    assert time.perf_counter() - start < 2
    message = str(caught.value)
    for part in (
        "user-cache/geojax/cifar10-1.npz",
        "cifar10/VERSION/dataset_info.json",
        "tfds-home/cifar10/VERSION/dataset_info.json",
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        "*_batch*.webp",
        "GEOJAX_DATA_DIR",
        "download=True",
    ):
        assert part in message
    assert "does not exist" not in message


def test_a_missing_data_folder_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        datasets.load("mnist", tmp_path / "nowhere")


def test_idx_files_outside_a_folder_of_their_own_are_pointed_at(place, tmp_path):
    arrays = place("mnist", "idx", tmp_path / "elsewhere")
    write(tmp_path, idx_files(arrays))
    with pytest.raises(FileNotFoundError, match="itself holds idx files.*folder of its own"):
        datasets.load("mnist", tmp_path)


def test_fashion_archives_in_the_mnist_folder_are_recognized(place, tmp_path):
    place("mnist", "idx", tmp_path)
    place("fashion_mnist", "idx", tmp_path)
    shutil.copytree(tmp_path / "fashion_mnist", tmp_path / "mnist", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"mnist.*train-images.*it is a file of fashion_mnist"):
        datasets.load("mnist", tmp_path)


def test_an_altered_archive_is_named_with_both_checksums(place, tmp_path):
    place("cifar10", "binary", tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    expected, data = md5(path.read_bytes()), path.read_bytes()[:-1] + b"\x00"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="data_batch_3.bin") as caught:
        datasets.load("cifar10", tmp_path)
    assert expected in str(caught.value)
    assert md5(data) in str(caught.value)
    assert datasets.load(
        "cifar10", tmp_path, validation=0, raw=True, verify=False
    ).train.inputs.any()


@pytest.mark.parametrize(("name", "kind"), [("mnist", "idx"), ("cifar10", "binary tar")])
def test_a_truncated_archive_is_named_even_without_checksums(name, kind, place, tmp_path):
    place(name, kind, tmp_path)
    path = next(p for p in sorted(tmp_path.rglob("*.gz")) if "labels" not in p.name)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match=f"{path.name}.*truncated or altered"):
        datasets.load(name, tmp_path)
    with pytest.raises(ValueError, match=f"{path.name}: expected a whole .*cannot be read"):
        datasets.load(name, tmp_path, verify=False)


def test_one_missing_file_is_named(place, tmp_path):
    place("mnist", "idx", tmp_path)
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        FileNotFoundError, match="t10k-labels-idx1-ubyte.gz is missing; the folder h"
    ):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda raw: b"\x00\x00\x0d\x03" + raw[4:], "begins with 00000803, found 00000d03"),
        (lambda raw: raw[:-1], r"expected 15680 values of shape \(20, 28, 28\), found 15679"),
        (lambda raw: b"", "found nothing"),
        (
            lambda raw: raw[:8] + struct.pack(">2I", 14, 56) + raw[16:],
            r"expected mnist's pictures of \(28, 28\), found \(14, 56\)",
        ),
    ],
)
def test_a_malformed_idx_file_is_named(change, match, place, tmp_path):
    place("mnist", "idx", tmp_path)
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))
    with pytest.raises(ValueError, match=f"{path.name}.*{match}"):
        datasets.load("mnist", tmp_path, verify=False)


def test_labels_beyond_the_classes_are_refused(place, tmp_path):
    arrays = place("mnist", "idx", tmp_path)
    arrays["test_labels"][3] = 10
    write(tmp_path / "mnist", idx_files(arrays))
    with pytest.raises(ValueError, match="found the test label 10; mnist has the classes 0 to 9"):
        datasets.load("mnist", tmp_path, verify=False)


def test_images_without_their_labels_are_refused(place, tmp_path):
    arrays = place("mnist", "idx", tmp_path)
    write(tmp_path / "mnist", idx_files(arrays | {"test_labels": arrays["test_labels"][:-1]}))
    with pytest.raises(ValueError, match=r"8 test images and labels of shape \(7,\)"):
        datasets.load("mnist", tmp_path, verify=False)


def test_a_binary_batch_of_broken_records_is_named(place, tmp_path):
    place("cifar100", "binary", tmp_path)
    (tmp_path / "cifar-100-binary" / "test.bin").write_bytes(b"\x00" * 3073)
    with pytest.raises(ValueError, match="test.bin: expected records of 3074 bytes, found 3073"):
        datasets.load("cifar100", tmp_path, verify=False)


def test_unpacked_cifar100_without_a_checksum_must_have_equal_classes(tmp_path, monkeypatch, rng):
    labels = np.arange(200, dtype=np.uint8) % 100
    arrays = {
        "train_images": rng.integers(0, 256, (200, 32, 32, 3), np.uint8),
        "test_images": rng.integers(0, 256, (100, 32, 32, 3), np.uint8),
        **{"train_labels": labels, "test_labels": labels[:100].copy()},
        **{"train_coarse_labels": labels // 5, "test_coarse_labels": labels[:100] // 5},
    }
    spec = tables.SPECS["cifar100"]
    assert spec.content_md5 is None
    monkeypatch.setitem(tables.SPECS, "cifar100", spec._replace(num_train=200, num_test=100))
    write(tmp_path / "cifar-100-binary", binary_files("cifar100", arrays))
    assert len(datasets.load("cifar100", tmp_path, validation=0, cache=False).train.labels) == 200
    arrays["test_labels"][0] = 1
    write(tmp_path / "cifar-100-binary", binary_files("cifar100", arrays))
    with pytest.raises(ValueError, match="expected 1 test images of each class.* from 0 to 2"):
        datasets.load("cifar100", tmp_path, validation=0, cache=False)


def test_a_pickle_that_refers_to_code_is_refused_and_not_run(place, tmp_path, monkeypatch):
    place("cifar10", "python", tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    target = tmp_path / "was-run"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(target).encode() + b"'\ntR.")
    with pytest.raises(ValueError, match="data_batch_1.*md5"):
        datasets.load("cifar10", tmp_path)
    with pytest.raises(ValueError, match=r"data_batch_1: .*it refers to os\.system"):
        datasets.load("cifar10", tmp_path, verify=False)
    assert not target.exists()


def test_a_pickle_with_arrays_of_objects_is_refused(place, tmp_path):
    place("cifar10", "python", tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(path.read_bytes().replace(b"U\x02u1", b"U\x02O8"))
    with pytest.raises(ValueError, match="an array of dtype b'O8'"):
        datasets.load("cifar10", tmp_path, verify=False)


def test_sheets_need_a_label_for_each_picture(place, tmp_path):
    place("cifar10", "sheets", tmp_path)
    np.savez(tmp_path / "cifar10" / "labels.npz", data_batch_1=np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match=r"labels.npz: expected 4 labels named data_batch_1"):
        datasets.load("cifar10", tmp_path)
    (tmp_path / "cifar10" / "labels.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"labels.npz is missing"):
        datasets.load("cifar10", tmp_path)


# ---------------------------------------------------------------------------- the cache


def test_the_cache_alone_gives_the_same_arrays_again(place, tmp_path):
    data_dir = tmp_path / "data"
    arrays = place("cifar10", "binary", data_dir)
    before = sorted(data_dir.rglob("*"))
    first = datasets.load("cifar10", data_dir, validation=6, raw=True)
    assert sorted(data_dir.rglob("*")) == before, "the data folder was written to"
    shutil.rmtree(data_dir)
    again = datasets.load("cifar10", data_dir, validation=6, raw=True)
    assert_parts(again, arrays, 6)
    path = cache.file("cifar10", cache.folder())
    assert again.source == f"{path} (from {first.source})"
    with np.load(path, allow_pickle=False) as content:
        about = json.loads(str(content["about"]))
    assert about["checksums"]["test_batch.bin"] == archives.MD5["cifar10"]["test_batch.bin"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("options", [{"cache": False}, {"verify": False}])
def test_nothing_is_cached_when_turned_off_or_unverified(options, place, tmp_path):
    place("mnist", "idx", tmp_path / "data")
    datasets.load("mnist", tmp_path / "data", validation=0, **options)
    assert not cache.folder().exists()


def test_the_cache_folder_can_be_named(place, tmp_path):
    place("mnist", "idx", tmp_path / "data")
    datasets.load("mnist", tmp_path / "data", validation=0, cache=tmp_path / "mine")
    assert (tmp_path / "mine" / "mnist-1.npz").is_file()
    assert not cache.folder().exists()


def test_a_cache_of_other_images_is_not_believed(place, tiny, tmp_path):
    place("mnist", "idx", tmp_path / "data")
    datasets.load("mnist", tmp_path / "data", validation=0)
    tiny("mnist", seed=1)
    with pytest.raises(ValueError, match=r"mnist-1.npz: expected the published images of mnist"):
        datasets.load("mnist", tmp_path / "data", validation=0)


def test_a_damaged_cache_is_named(place, tmp_path):
    place("mnist", "idx", tmp_path / "data")
    datasets.load("mnist", tmp_path / "data", validation=0)
    path = cache.file("mnist", cache.folder())
    whole = path.read_bytes()
    path.write_bytes(whole[:-300])
    with pytest.raises(ValueError, match=r"mnist-1.npz.*cannot be read.*delete it"):
        datasets.load("mnist", tmp_path / "data", validation=0)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match=r"mnist-1.npz"):
        datasets.load("mnist", tmp_path / "data", validation=0)


def test_a_cache_that_cannot_be_written_warns_and_leaves_nothing(place, tmp_path, monkeypatch):
    arrays = place("mnist", "idx", tmp_path / "data")
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(RuntimeWarning, match=r"mnist-1.npz could not be written") as caught:
        dataset = datasets.load(
            "mnist", tmp_path / "data", validation=0, raw=True, cache=tmp_path / "file"
        )
    assert caught[0].filename == __file__
    assert_parts(dataset, arrays, 0)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="no space left"):
        datasets.load("mnist", tmp_path / "data", validation=0)
    assert list(cache.folder().iterdir()) == []


# ---------------------------------------------------------------------------- tensorflow-datasets


@pytest.fixture
def tfds():
    pytest.importorskip("importlib_resources")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("tensorflow_datasets")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mnist", "idx"), ("fashion_mnist", "idx"), ("cifar10", "binary"), ("cifar100", "binary")],
)
def test_a_prepared_folder_holds_the_originals(name, kind, place, tmp_path, tfds, capfd):
    arrays = place(name, kind, tmp_path)
    out = tmp_path / "prepared"
    folder = datasets.prepare(name, tmp_path, out)
    assert capfd.readouterr().out == ""
    assert sorted(p.name for p in out.iterdir()) == [name]
    assert folder.parent == out / name

    source = tfds.data_source(name, data_dir=str(out))
    for part, count in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        records = [source[part][i] for i in range(len(source[part]))]
        assert len(records) == count
        order = prepared.record_order(part, count)
        assert sorted(order) == list(range(count)) != list(order)
        for record, index in zip(records, order, strict=True):
            np.testing.assert_array_equal(record["image"], arrays[f"{part}_images"][index])
            assert record["label"] == arrays[f"{part}_labels"][index]
            if name.startswith("cifar"):
                assert record["id"] == f"{part}_{index:05d}".encode()
            if name == "cifar100":
                assert record["coarse_label"] == arrays[f"{part}_coarse_labels"][index]
    features = tfds.builder(name, data_dir=str(out)).info.features
    names = tuple(features["label"].names)
    assert names == tables.SPECS[name].class_names
    assert "tensorflow" not in sys.modules

    dataset = datasets.load(name, out, validation=6, raw=True)
    assert dataset.source == str(folder)
    assert_parts(dataset, arrays, 6)
    for key, values in prepared.read(name, folder).items():
        np.testing.assert_array_equal(values, arrays[key])


def test_sources_are_tried_in_order(place, tmp_path, tfds):
    place("mnist", "idx", tmp_path)
    datasets.prepare("mnist", tmp_path, tmp_path)

    def source(**options):
        return datasets.load("mnist", tmp_path, validation=0, **options).source

    assert source() == str(tmp_path / "mnist" / "3.0.1")
    assert source().startswith(str(cache.file("mnist", cache.folder())))
    cache.file("mnist", cache.folder()).unlink()
    shutil.rmtree(tmp_path / "mnist" / "3.0.1")
    assert source() == f"{tmp_path / 'mnist' / '*-ubyte.gz'} (four files)"


def test_a_prepared_folder_in_the_place_of_tensorflow_datasets_is_found(place, tmp_path, tfds):
    arrays = place("mnist", "idx", tmp_path / "data")
    datasets.prepare("mnist", tmp_path / "data", tmp_path / "tfds-home")
    assert_parts(datasets.load("mnist", tmp_path / "none", validation=0, raw=True), arrays, 0)


def test_preparing_twice_is_refused(place, tmp_path, tfds):
    place("mnist", "idx", tmp_path)
    folder = datasets.prepare("mnist", tmp_path, tmp_path / "out")
    with pytest.raises(FileExistsError, match="3.0.1 exists; delete it"):
        datasets.prepare("mnist", tmp_path, tmp_path / "out")
    assert folder.is_dir()


def test_an_interrupted_preparation_leaves_nothing_that_looks_whole(
    place, tmp_path, tfds, monkeypatch
):
    from PIL import Image

    place("mnist", "idx", tmp_path)
    folder = datasets.prepare("mnist", tmp_path, tmp_path / "out")
    # A killed run leaves the folder under the name it is written by.
    folder.rename(folder.with_name("incomplete.A1B2C3_3.0.1"))
    assert prepared.find("mnist", tmp_path / "out")[0] is None

    real, calls = Image.fromarray, []

    def interrupt(picture):
        calls.append(None)
        if len(calls) > NUM_TRAIN + 3:  # the first split is written
            raise KeyboardInterrupt
        return real(picture)

    monkeypatch.setattr(Image, "fromarray", interrupt)
    with pytest.raises(KeyboardInterrupt):
        datasets.prepare("mnist", tmp_path, tmp_path / "other")
    assert not list((tmp_path / "other").glob("mnist/*"))
    assert prepared.find("mnist", tmp_path / "other")[0] is None


def test_records_in_another_order_or_of_other_images_are_refused(
    place, tmp_path, tfds, monkeypatch
):
    place("mnist", "idx", tmp_path)
    folder = datasets.prepare("mnist", tmp_path, tmp_path / "out")
    monkeypatch.setattr(prepared, "record_order", lambda split, size: np.arange(size))
    with pytest.raises(ValueError, match=f"{folder}: expected the published images of mnist"):
        datasets.load("mnist", tmp_path / "out", validation=0)


def test_a_damaged_prepared_folder_is_named(place, tmp_path, tfds):
    place("mnist", "idx", tmp_path)
    folder = datasets.prepare("mnist", tmp_path, tmp_path / "out")
    records = next(folder.glob("mnist-train.array_record*"))
    records.unlink()
    with pytest.raises(ValueError, match=f"{folder}: expected a whole tensorflow-datasets folder"):
        datasets.load("mnist", tmp_path / "out", validation=0)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset_info.json: expected JSON"):
        datasets.load("mnist", tmp_path / "out", validation=0)


def test_a_prepared_folder_of_another_set_is_refused(tmp_path):
    folder = tmp_path / "mnist" / "3.0.1"
    write(folder, {"dataset_info.json": b'{"name": "kmnist", "fileFormat": "array_record"}'})
    with pytest.raises(ValueError, match="expected the prepared data set mnist, found kmnist"):
        datasets.load("mnist", tmp_path)


def test_a_tfrecord_folder_is_passed_over_and_mentioned(place, tmp_path):
    folder = tmp_path / "mnist" / "3.0.1"
    write(folder, {"dataset_info.json": b'{"name": "mnist", "fileFormat": "tfrecord"}'})
    with pytest.raises(
        FileNotFoundError, match=r"3.0.1 is there as tfrecord, which only TensorFlow"
    ):
        datasets.load("mnist", tmp_path)
    arrays = place("mnist", "idx", tmp_path)
    assert_parts(datasets.load("mnist", tmp_path, validation=0, raw=True), arrays, 0)


def test_preparing_needs_archives_of_a_published_set(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mnist/\*-ubyte.gz \(four files\)"):
        datasets.prepare("mnist", tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="'digits' has no archives; expected one of mnist"):
        datasets.prepare("digits", tmp_path, tmp_path / "out")


def test_download_without_a_network_fails_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(archives.URLS, "mnist", "http://127.0.0.1:9/")
    start = time.perf_counter()
    with pytest.raises(
        ConnectionError, match=r"mnist: expected an answer from http://127.0.0.1:9/"
    ):
        datasets.load("mnist", tmp_path, download=True)
    assert time.perf_counter() - start < 6


@pytest.mark.parametrize(("name", "kind"), [("mnist", "idx"), ("cifar100", "binary tar")])
def test_download_fetches_prepares_and_returns_the_published_set(
    name, kind, place, tmp_path, tfds, monkeypatch
):
    arrays = place(name, kind, tmp_path / "server")
    folder = tmp_path / "server" / ("mnist" if name == "mnist" else "")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(folder), **kwargs)

        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setitem(archives.URLS, name, f"http://127.0.0.1:{server.server_port}/")
        dataset = datasets.load(name, tmp_path / "data", download=True, validation=6, raw=True)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert_parts(dataset, arrays, 6)
    offline = datasets.load(name, tmp_path / "data", validation=6, raw=True, cache=False)
    assert offline.source == str(next((tmp_path / "data" / name).iterdir()))
    assert_parts(offline, arrays, 6)


@pytest.mark.parametrize(
    ("module", "act"),
    [
        ("sklearn.datasets", lambda root: datasets.load("digits")),
        ("PIL.Image", lambda root: datasets.load("cifar10", root)),
        ("tensorflow_datasets", lambda root: datasets.prepare("mnist", root, root / "out")),
        ("importlib_resources", lambda root: datasets.prepare("mnist", root, root / "out")),
    ],
)
def test_a_missing_optional_dependency_says_how_to_install_it(
    module, act, place, tmp_path, monkeypatch
):
    place("mnist", "idx", tmp_path)
    place("cifar10", "sheets", tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'needs .*: pip install "geojax\[data\]"'):
        act(tmp_path)


def test_importing_the_package_loads_no_optional_dependency_and_starts_no_backend():
    code = (
        "import sys, geojax.datasets, jax._src.xla_bridge as bridge;"
        "loaded = {'sklearn', 'PIL', 'tqdm', 'tensorflow_datasets', 'flax'} & set(sys.modules);"
        "assert not loaded, loaded; assert not bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------- augmentation

AUGMENTATIONS = [augment.pad_crop_flip, augment.affine]
JITTED = {function: jax.jit(function) for function in AUGMENTATIONS}
WARP = jax.jit(augment.warp)
# A coordinate of up to 20 pixels is known to 20 epsilon times the few operations on it, and a pixel
# of up to 255 changes by 255 per coordinate, in two directions.
RESAMPLED = 255 * 2 * 20 * 8 * EPSILON


def pictures(rng, count=6, height=9, width=7, dtype=np.uint8):
    return jnp.asarray(rng.integers(0, 256, (count, height, width, 3)).astype(dtype))


def test_a_crop_at_the_padding_is_the_image_and_elsewhere_the_shifted_image(rng):
    images = pictures(rng)
    offsets = np.array([[4, 4], [2, 7], [8, 0], [4, 4], [4, 4], [4, 4]], np.int32)
    out = jax.jit(augment.crop)(images, offsets)
    np.testing.assert_array_equal(out[3:], images[3:])
    np.testing.assert_array_equal(out[0], images[0])
    expected = np.zeros((2, 9, 7, 3), np.uint8)
    expected[0, 2:, :-3] = np.asarray(images)[1, :-2, 3:]
    expected[1, :-4, 4:] = np.asarray(images)[2, 4:, :-4]
    np.testing.assert_array_equal(out[1:3], expected)


def test_flip_mirrors_the_chosen_images_left_to_right(rng):
    images = pictures(rng, count=3)
    out = augment.flip(images, jnp.array([True, False, True]))
    np.testing.assert_array_equal(out[1], images[1])
    np.testing.assert_array_equal(out[::2], np.asarray(images)[::2, :, ::-1])


def test_without_padding_half_of_the_images_are_flipped_and_nothing_else_happens(rng):
    images = pictures(rng, count=1000, height=2, width=2)
    function = jax.jit(functools.partial(augment.pad_crop_flip, padding=0))
    out = np.asarray(function(jax.random.key(0), images))
    kept = (out == np.asarray(images)).all(axis=(1, 2, 3))
    mirrored = (out == np.asarray(images)[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (kept | mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(1000)


def test_every_offset_of_the_crop_occurs_equally_often():
    # One bright pixel in the middle of each image shows where its window was.
    images = np.zeros((2000, 9, 9, 1), np.uint8)
    images[:, 4, 4] = 1
    function = jax.jit(functools.partial(augment.pad_crop_flip, padding=2))
    out = np.asarray(function(jax.random.key(1), images))
    assert (out.sum(axis=(1, 2, 3)) == 1).all()
    counts = out.sum(axis=0)[2:7, 2:7, 0]
    assert counts.sum() == 2000
    assert np.abs(counts.astype(float) - 80).max() < 5 * np.sqrt(80)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_warp_by_nothing_is_the_image_bit_for_bit(dtype, rng):
    images = pictures(rng, dtype=dtype)
    out = WARP(images, jnp.ones(6), jnp.zeros(6), jnp.zeros((6, 2)))
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, images)


def test_affine_without_ranges_is_the_image_bit_for_bit(rng):
    images = pictures(rng)
    still = functools.partial(augment.affine, zoom=(1.0, 1.0), angle=0.0, mirror=False)
    np.testing.assert_array_equal(jax.jit(still)(jax.random.key(0), images), images)


def test_a_rotation_by_quarter_turns_is_exact(rng):
    images = jnp.tile(pictures(rng, count=1, height=8, width=8), (3, 1, 1, 1))
    out = WARP(images, jnp.ones(3), jnp.array([90.0, 180.0, 270.0]))
    for quarter in (1, 2, 3):
        np.testing.assert_array_equal(out[quarter - 1], np.rot90(images[0], quarter))


def test_a_warp_agrees_with_a_linear_picture_in_closed_form():
    # Bilinear interpolation is exact on a picture that is a linear function of position.
    size, angle, zoom, shift = 33, 20.0, 1.5, (0.75, -1.25)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    picture = (100 + 2 * y - 3 * x).astype(np.float32)
    theta = np.deg2rad(angle)
    source_y = (np.cos(theta) * y + np.sin(theta) * x) / zoom + shift[0]
    source_x = (np.cos(theta) * x - np.sin(theta) * y) / zoom + shift[1]
    out = WARP(picture[None, ..., None], np.ones(1) * zoom, np.ones(1) * angle, np.array([shift]))
    inside = np.maximum(np.abs(source_y), np.abs(source_x)) <= (size - 1) / 2
    assert 0.5 < inside.mean() <= 1
    expected = 100 + 2 * source_y - 3 * source_x
    np.testing.assert_allclose(out[0, ..., 0][inside], expected[inside], rtol=0, atol=RESAMPLED)


def blobs(count, *centers, size=61, width=3.0):
    """Images `(count, size, size, len(centers))`, each channel a smooth spot at (row, column)."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    spots = [np.exp(-((y - r) ** 2 + (x - c) ** 2) / (2 * width**2)) for r, c in centers]
    return np.tile(np.stack(spots, axis=-1).astype(np.float32), (count, 1, 1, 1))


def moments(images):
    """Mass `(n, channels)` and center `(n, channels, 2)` of each picture, from its middle."""
    images = np.asarray(images, np.float64)
    offset = np.mgrid[: images.shape[1], : images.shape[2]] - (images.shape[1] - 1) / 2
    mass = images.sum(axis=(1, 2))
    return mass, np.einsum("nyxc,dyx->ncd", images, offset) / mass[..., None]


def test_a_rotation_turns_a_spot_counter_clockwise_and_keeps_its_mass():
    images = blobs(1, (0, 12))
    out = WARP(images, np.ones(1), np.full(1, 30.0))
    before, _ = moments(images)
    after, center = moments(out)
    np.testing.assert_allclose(after, before, rtol=1e-3)
    # Up is a negative row.
    expected = 12 * np.array([-np.sin(np.pi / 6), np.cos(np.pi / 6)])
    np.testing.assert_allclose(center[0, 0], expected, atol=0.01)


def test_zoom_scales_areas_by_its_square_and_shift_moves_the_center():
    images = blobs(2, (0, 0))
    shifts = np.array([[3.0, 0.0], [0.0, -2.0]])
    out = WARP(images, np.array([0.8, 1.25]), np.zeros(2), shifts)
    before, _ = moments(images)
    after, center = moments(out)
    np.testing.assert_allclose(after / before, [[0.8**2], [1.25**2]], rtol=1e-3)
    np.testing.assert_allclose(center[:, 0], [[-3 * 0.8, 0], [0, 2 * 1.25]], atol=0.01)


def test_affine_fills_its_ranges_and_does_not_leave_them():
    # The distance of two spots tells the zoom, their direction the angle, their middle the shift.
    count = 300
    images = blobs(count, (0, -12), (0, 12))
    out = jax.jit(functools.partial(augment.affine, mirror=False))(jax.random.key(3), images)
    _, center = moments(out)
    rise, run = -(center[:, 1, 0] - center[:, 0, 0]), center[:, 1, 1] - center[:, 0, 1]
    zoom, angle = np.hypot(rise, run) / 24, np.rad2deg(np.arctan2(rise, run))
    for value, low, high, slack in ((zoom, 0.8, 1.2, 0.01), (angle, -30, 30, 0.5)):
        assert low - slack < value.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < value.max() < high + slack
    assert abs(angle.mean()) < 4 * 60 / np.sqrt(12 * count)
    # What the window leaves of the image, on either side and before the zoom.
    shift = np.linalg.norm(center.mean(axis=1), axis=1) / zoom
    limit = np.abs(1 - 1 / zoom) / 2 * 61
    assert (shift < np.sqrt(2) * limit + 0.1).all()
    assert (shift > 0.3 * limit).mean() > 0.5


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        *itertools.product(AUGMENTATIONS, (np.uint8, np.float32)),
        (augment.affine, jnp.bfloat16),
    ],
)
def test_augmentation_keeps_shape_dtype_and_range(function, dtype, rng):
    images = pictures(rng).astype(dtype)
    out = JITTED[function](jax.random.key(0), images)
    assert (out.shape, out.dtype) == (images.shape, images.dtype)
    out, images = np.asarray(out, np.float32), np.asarray(images, np.float32)
    assert out.min() >= 0
    assert out.max() <= images.max() * (1 + 4 * EPSILON)
    assert (out != images).any(axis=(1, 2, 3)).sum() >= 5


@pytest.mark.parametrize("function", AUGMENTATIONS)
def test_the_same_key_gives_the_same_images_and_another_key_others(function, rng):
    images = pictures(rng)
    one, same, other = (np.asarray(JITTED[function](jax.random.key(s), images)) for s in (5, 5, 6))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.parametrize("function", AUGMENTATIONS)
def test_an_image_depends_on_its_place_and_not_on_the_rest_of_the_batch(function, rng):
    images, key = pictures(rng, count=8, dtype=np.float32), jax.random.key(2)
    part = JITTED[function](key, images[:6])
    np.testing.assert_allclose(part, JITTED[function](key, images)[:6], atol=RESAMPLED)
    copies = np.asarray(JITTED[function](key, np.repeat(images[:1], 8, axis=0)))
    assert len(np.unique(copies.reshape(8, -1), axis=0)) == 8


@pytest.mark.parametrize("function", AUGMENTATIONS)
def test_augmentation_is_the_same_eager_jitted_and_vmapped(function, rng):
    images = pictures(rng, dtype=np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    traces = []

    @jax.jit
    def jitted(key, images):
        traces.append(None)
        return function(key, images)

    expected = np.stack([jitted(key, images) for key in keys])
    assert len(traces) == 1
    np.testing.assert_allclose(function(keys[0], images), expected[0], atol=RESAMPLED)
    both = jax.jit(jax.vmap(function, in_axes=(0, None)))(keys, images)
    np.testing.assert_allclose(both, expected, atol=RESAMPLED)


@pytest.mark.parametrize("function", AUGMENTATIONS)
def test_augmentation_of_a_sharded_batch_is_that_of_the_whole_and_stays_sharded(
    function, mesh, rng
):
    images = pictures(rng, count=8, dtype=np.float32)
    spread = jax.device_put(images, jsh.NamedSharding(mesh, jsh.PartitionSpec("data")))
    constants = datasets.NORMALIZATIONS["VGG"]

    def inputs(key, images):
        return datasets.normalize(function(key, images), constants)

    out = jax.jit(inputs)(jax.random.key(0), spread)
    expected = datasets.normalize(JITTED[function](jax.random.key(0), images), constants)
    np.testing.assert_allclose(out, expected, atol=RESAMPLED / 255 / 0.22)
    assert out.sharding.spec[0] == "data"


def test_normalization_constants_may_be_arguments_of_a_jitted_function(rng):
    images, constants = pictures(rng), datasets.NORMALIZATIONS["ResNet"]
    out = jax.jit(datasets.normalize)(images, constants)
    expected = datasets.normalize(np.asarray(images), constants)
    np.testing.assert_allclose(out, expected, atol=20 * EPSILON)


@pytest.mark.parametrize("function", AUGMENTATIONS)
def test_data_loaded_for_an_augmentation_are_the_plain_ones_and_what_changes_them(function):
    plain, raw = datasets.load("digits"), datasets.load("digits", raw=True)
    found = datasets.load_augmented("digits", augmentation=function.__name__)
    for mine, theirs in zip(jax.tree.leaves(found.data), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for mine, theirs in zip(found.train, raw.train, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    key, batch = jax.random.key(3), datasets.Examples(*(x[:6] for x in raw.train))
    changed = found.transform(key, batch)
    expected = datasets.normalize(function(key, batch.inputs), plain.normalization)
    np.testing.assert_array_equal(changed.inputs, expected)
    np.testing.assert_array_equal(changed.labels, batch.labels)
    assert np.abs(np.asarray(changed.inputs) - plain.train.inputs[:6]).max() > 0.1


def test_without_augmentation_the_training_part_is_itself_and_what_cannot_be_is_refused():
    found = datasets.load_augmented("two_spirals")
    assert found.train is found.data.train
    assert found.transform is None
    with pytest.raises(ValueError, match="'affine' is for images, and two_spirals has none"):
        datasets.load_augmented("two_spirals", augmentation="affine")
    with pytest.raises(ValueError, match="unknown augmentation 'warp'; expected one of none, pad"):
        datasets.load_augmented("digits", augmentation="warp")
    with pytest.raises(ValueError, match="unknown data set 'digit'"):
        datasets.load_augmented("digit")


def test_what_is_no_batch_of_images_is_refused(rng):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"images have shape \(9, 7, 3\); expected \(n, height"):
        augment.affine(key, pictures(rng)[0])
    with pytest.raises(ValueError, match=r"zoom is \(1.2, 0.8\)"):
        augment.affine(key, pictures(rng), zoom=(1.2, 0.8))
    with pytest.raises(ValueError, match="padding is -1"):
        augment.pad_crop_flip(key, pictures(rng), padding=-1)


# ---------------------------------------------------------------------------- the real archives


@pytest.mark.skipif(not REAL, reason="GEOJAX_DATA_DIR names no folder with the real archives")
@pytest.mark.parametrize(
    ("name", "train_counts", "mean", "std"),
    [
        (
            "mnist",
            [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
            [0.1307],
            [0.3081],
        ),
        ("fashion_mnist", [6000] * 10, [0.2860], [0.3530]),
        ("cifar10", [5000] * 10, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    ],
)
def test_the_real_archives_are_the_published_ones(name, train_counts, mean, std):
    root = pathlib.Path(str(REAL))
    if not any(place.present() for place in archives.candidates(name, root)):
        pytest.skip(f"no archives of {name} in the folder that GEOJAX_DATA_DIR names")
    dataset = datasets.load(name, root, raw=True, cache=False)
    assert len(dataset.validation.labels) == 5000
    labels = np.concatenate([dataset.train.labels, dataset.validation.labels])
    assert np.bincount(labels).tolist() == train_counts
    pixels = dataset.train.inputs[::5].astype(np.float32) / 255
    np.testing.assert_allclose(pixels.mean(axis=(0, 1, 2)), mean, atol=2e-3)
    np.testing.assert_allclose(pixels.std(axis=(0, 1, 2)), std, atol=2e-3)
