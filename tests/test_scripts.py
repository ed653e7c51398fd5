"""The programs as a person runs them: help, a run, a kill and going on, errors, the tour."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from geojax import batches, checkpoint, datasets, objectives

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAIN = [sys.executable, str(ROOT / "scripts" / "train.py")]


def run(arguments, **options):
    return subprocess.run(arguments, capture_output=True, text=True, **options)


def script(name):
    """A script as a module, so that its runs share this process and its compiled functions."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def kernels(network):
    return {name: np.asarray(layer["kernel"]) for name, layer in network.params.items()}


def test_a_killed_run_goes_on_with_the_same_command_and_ends_with_the_same_bits(tmp_path, capsys):
    train = script("train")
    small = {
        "model_options": '{"widths": [16], "dropout": 0.1}', "epochs": 20, "checkpoint_every": 2.0
    }  # fmt: skip
    process = subprocess.Popen(
        [*TRAIN, "--model-options", small["model_options"], "--epochs", "20"]
        + ["--checkpoint-every", "2", "--out", str(tmp_path / "killed")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    train.main(train.Options(**small, out=tmp_path / "whole"))
    log = tmp_path / "killed" / "log.jsonl"
    for _ in range(1200):
        written = log.read_text().count("validation_loss") if log.exists() else 0
        if written >= 3 or process.poll() is not None:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train.main(train.Options(**small, out=tmp_path / "killed"))
    assert "went on from step" in capsys.readouterr().out

    whole, killed = (checkpoint.load_network(tmp_path / n / "network") for n in ("whole", "killed"))
    for name, kernel in kernels(whole).items():
        assert kernel.tobytes() == kernels(killed)[name].tobytes()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(120))
    # The checkpoint rebuilds the model, and the result is that of the model on its data.
    test = datasets.load("digits").test
    metrics_fn = objectives.metrics(whole.build().apply, whole.state)
    found = batches.mean(metrics_fn, test)(whole.params)
    (*_, result) = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["part"] == "test"
    assert float(found["error"]) == pytest.approx(result["error"], abs=1e-6)
    assert result["error"] < 0.1
    with pytest.raises(ValueError, match="seed is 0 there and 5 here"):
        train.main(train.Options(**small, seed=5, out=tmp_path / "killed"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dataset": "mnst"}, "mnst"),
        ({"model": "mlpp"}, "there is no model 'mlpp'"),
        ({"model_options": '{"width": 3}'}, "has no option 'width'"),
        ({"model_options": "{width"}, "no JSON object"),
        ({"dataset": "two_spirals", "augment": "affine"}, "is for images"),
    ],
)
def test_a_mistake_is_answered_before_anything_is_written(options, says, tmp_path):
    train = script("train")
    with pytest.raises((ValueError, SystemExit), match=says):
        train.main(train.Options(**options, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_missing_data_are_answered_in_a_sentence(tmp_path):
    nowhere = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    arguments = ["--dataset", "mnist", "--data-dir", "/nowhere", "--out", str(tmp_path / "out")]
    found = run([*TRAIN, *arguments], env=nowhere)
    assert found.returncode == 1
    assert "/nowhere" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("dataset", ["two_spirals", "regression_1d"])
def test_every_kind_of_task_trains(dataset, tmp_path):
    train = script("train")
    train.main(
        train.Options(
            dataset=dataset, model_options='{"widths": [8], "norm": "batch"}', epochs=2,
            batch_size=32, out=tmp_path,
        )
    )  # fmt: skip
    (*_, test) = json.loads((tmp_path / "result.json").read_text())
    assert np.isfinite(test["loss"])
    assert ("error" in test) == (dataset == "two_spirals")


def test_help_gives_every_option_and_its_default():
    found = run([*TRAIN, "--help"])
    assert found.returncode == 0
    text = " ".join(found.stdout.split())
    for option, default in (("--batch-size", "128"), ("--learning-rate", "0.05"), ("--seed", "0")):
        assert option in text
        assert f"(default: {default})" in text


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A small network on two spirals, as scripts/train.py saves it."""
    folder = tmp_path_factory.mktemp("spirals")
    train = script("train")
    train.main(
        train.Options(
            dataset="two_spirals",
            model_options='{"widths": [8, 8]}',
            epochs=5,
            batch_size=32,
            out=folder,
        )
    )
    return folder / "network"


def test_eigenthings_goes_on_after_a_kill_and_ends_with_the_same_numbers(
    network, tmp_path, monkeypatch, capsys
):
    eigenthings = script("eigenthings")
    small = {
        "network": network, "k": 4, "num_probes": 3, "num_steps": 20, "trace_matvecs": 40,
        "checkpoint_every": 5,
    }  # fmt: skip
    eigenthings.main(eigenthings.Options(**small, out=tmp_path / "whole"))
    shown = capsys.readouterr().out
    for heading in ("Eigenvalues", "converged", "Traces"):
        assert heading in shown

    class Killed(BaseException):
        pass

    # The process dies once in each of the three computations.
    save = checkpoint.Checkpointer.save
    for what in ("eigsh", "density", "trace"):

        def dies(self, *arguments, what=what, **options):
            save(self, *arguments, **options)
            if self.location.endswith(what):
                raise Killed

        monkeypatch.setattr(checkpoint.Checkpointer, "save", dies)
        with pytest.raises(Killed):
            eigenthings.main(eigenthings.Options(**small, out=tmp_path / "killed"))
        monkeypatch.setattr(checkpoint.Checkpointer, "save", save)
    eigenthings.main(eigenthings.Options(**small, out=tmp_path / "killed"))
    whole, killed = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")
    )
    assert whole == killed
    assert all(whole["converged"])
    for name in ("whole", "killed"):
        page = (tmp_path / name / "report.html").read_text()
        assert page.count("data:image/png;base64,") == 1
    pairs = checkpoint.load(tmp_path / "whole" / "eigenpairs")[0]
    assert pairs["eigenvalues"].tolist() == whole["eigenvalues"]
    with pytest.raises(ValueError, match="k is 4 there and 5 here"):
        eigenthings.main(eigenthings.Options(**(small | {"k": 5}), out=tmp_path / "killed"))


def test_eigenthings_answers_for_a_network_that_is_not_there(tmp_path):
    found = run(
        [sys.executable, str(ROOT / "scripts" / "eigenthings.py")]
        + ["--network", str(tmp_path / "no"), "--out", str(tmp_path / "out")]
    )
    assert found.returncode == 1
    assert str(tmp_path / "no") in found.stderr
    assert "Traceback" not in found.stderr


def arrays(path):
    with np.load(path) as file:
        return dict(file)


def test_the_tour_writes_a_page_with_its_figures_and_their_data(tmp_path):
    tour = script("tour")
    # As a person runs it: without the strict promotion rules of these tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        tour.main(tour.Options(out=tmp_path))
    page = (tmp_path / "report.html").read_text()
    figures = (
        "training", "line", "alignment", "curve", "plane", "calibration", "simplex",
        "normalisation", "density", "eigenvector",
    )  # fmt: skip
    for name in figures:
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"{name}.npz" in page
    assert page.count("data:image/png;base64,") == len(figures)
    assert "http://" not in page
    assert "https://" not in page
    line = arrays(tmp_path / "line.npz")
    assert line["train_loss"].max() > 0.4  # the segment of two digits networks has a barrier
    assert line["test_error"][[0, -1]].max() < 0.04
    # Most of that hill was the order of the units.
    aligned = arrays(tmp_path / "alignment.npz")
    np.testing.assert_allclose(aligned["train_before_loss"], line["train_loss"], atol=1e-4)
    assert aligned["train_after_loss"].max() < 0.3 * line["train_loss"].max()
    # The curve goes around the hill, and so does the inside of the triangles.
    curve = arrays(tmp_path / "curve.npz")
    np.testing.assert_allclose(curve["segment_train_loss"], line["train_loss"], atol=1e-4)
    assert curve["bezier_train_loss"].max() < 0.3 * line["train_loss"].max()
    triangle = arrays(tmp_path / "simplex.npz")
    assert triangle["corners"].shape == (4, 2)
    assert triangle["loss"].min() < 0.05 < triangle["loss"].max()
    # Ten classes: about nine outliers, and eigenvalues whose error is far below their size.
    spectrum = arrays(tmp_path / "density.npz")
    assert (np.diff(spectrum["eigenvalues"]) < 0).all()
    assert (spectrum["residuals"] <= 1e-3 * spectrum["eigenvalues"]).all()
    assert (spectrum["lower"] <= spectrum["density"]).all()
    assert (spectrum["density"] <= spectrum["upper"]).all()
    bend = arrays(tmp_path / "eigenvector.npz")
    near = np.abs(bend["distance"]) < 0.11
    np.testing.assert_allclose(bend["loss"][near], bend["parabola"][near], rtol=2e-2)
    # Row N6: at t=1/2 and t=1 the statistics of t=0 are 3 points or more worse than refreshed ones.
    norm = arrays(tmp_path / "normalisation.npz")
    for i in (5, 10):
        assert norm["stale_error"][i] - norm["refreshed_error"][i] >= 0.03
    assert norm["stale_error"][0] == norm["refreshed_error"][0]
