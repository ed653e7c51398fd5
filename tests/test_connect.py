"""Curves between checkpoints, and the planes through them, as a person makes them."""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geojax import (
    batches,
    checkpoint,
    curves,
    datasets,
    fit,
    models,
    objectives,
    permute,
    statistics,
    symmetry,
    tree,
)
from geojax.surface import planes

ROOT = pathlib.Path(__file__).resolve().parent.parent
OPTIONS = {"widths": [16], "num_classes": 10, "norm": "batch"}
SMALL = {
    "epochs": 30, "batch_size": 100, "num_examples": 400, "num_eval": 7, "checkpoint_every": 15.0,
    "learning_rate": 0.1, "sampler": "stratified", "num_draws": 2,
}  # fmt: skip


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def connect():
    return script("connect")


@pytest.fixture(scope="module")
def plane():
    return script("plane")


def save(path, params, state, options=OPTIONS):
    checkpoint.save_network(
        path / "network", params, state, model="mlp", options=options, dataset="digits"
    )
    return path / "network"


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Two networks with BatchNorm of their own seeds, and a disturbed permuted copy of the first.

    Their saved statistics are those of the initial weights, so that only fresh ones can be right.
    """
    folder = tmp_path_factory.mktemp("networks")
    model = models.build("mlp", **OPTIONS)
    train = jax.tree.map(lambda x: x[: SMALL["num_examples"]], datasets.load("digits").train)
    inputs = train.inputs[:2]
    source = batches.split(train, 100)
    _, state = model.init(jax.random.key(0), inputs)
    loss_fn, optimizer = objectives.loss(model.apply, state), optax.sgd(0.2)
    found = []
    for seed in range(2):
        params, _ = model.init(jax.random.key(seed), inputs)
        key = jax.random.key(9)
        found.append(fit.fit(loss_fn, params, source, optimizer, 150, key=key).params)
    spec = symmetry.permutation_spec(
        lambda v, x: model.apply(v["params"], v["state"], x, False)[0],
        {"params": found[0], "state": state}, inputs,
    ).at("params")  # fmt: skip
    order = permute.random_permutation(jax.random.key(3), spec)
    moved = permute.apply_permutation(spec, order, found[0])
    noise = tree.random_like(jax.random.key(4), moved)
    found.append(tree.axpy(0.01, noise, moved))
    return [
        save(folder / name, params, state)
        for name, params in zip(("a", "b", "twin"), found, strict=True)
    ]


@pytest.fixture(scope="module")
def connected(connect, networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("connected") / "run"
    connect.main(connect.Options(networks=tuple(networks[:2]), out=folder, **SMALL))
    return folder


def result(folder):
    return json.loads((folder / "result.json").read_text())


def own_metrics(path, part):
    """What a network scores with the statistics of its own weights."""
    network = checkpoint.load_network(path)
    model, data = network.build(), datasets.load("digits")
    train, test = (
        jax.tree.map(lambda x: x[: SMALL["num_examples"]], x) for x in (data.train, data.test)
    )
    state = statistics.refresh(model.apply, network.params, network.state, train)
    metrics_fn = objectives.metrics(model.apply, state)
    return metrics_fn(network.params, {"train": train, "test": test}[part])


def equal(first, second):
    same = jax.tree.map(np.array_equal, jax.device_get(first), jax.device_get(second))
    return jax.tree.all(same)


def test_the_curve_runs_below_the_segment_and_leaves_the_networks_as_they_are(connected, networks):
    along = result(connected)["along"]
    assert set(along) == {"segment-train", "segment-test", "curve-train", "curve-test"}
    segment, curve = (along[f"{x}-train"]["metrics"]["loss"] for x in ("segment", "curve"))
    assert curve["highest"] < 0.5 * segment["highest"]
    assert along["segment-train"]["length"] == pytest.approx(along["segment-train"]["chord"])
    assert along["curve-train"]["length"] > along["curve-train"]["chord"]
    found = checkpoint.load_network(connected / "curve")
    assert (found.metadata["basis"], found.metadata["num_points"]) == ("bezier", 3)
    for path, i in zip(networks[:2], (0, -1), strict=True):
        ends = jax.tree.map(lambda x, i=i: x[i], found.params)
        assert equal(ends, checkpoint.load_network(path).params)
    assert (connected / "along.png").exists()
    with np.load(connected / "along.npz") as data:
        np.testing.assert_array_equal(data["curve_train_loss"], curve["values"])
        assert {"ts", "segment_lengths", "curve_test_error"} <= set(data)


def test_statistics_are_those_of_each_point(connected, networks):
    for part in ("train", "test"):
        for path, end in zip(networks[:2], ("start", "end"), strict=True):
            mine = own_metrics(path, part)
            for line in ("segment", "curve"):
                found = result(connected)["along"][f"{line}-{part}"]["metrics"]
                assert found["loss"][end] == pytest.approx(float(mine["loss"]), rel=1e-4)
                assert found["error"][end] == pytest.approx(float(mine["error"]), abs=1e-6)


def test_the_decay_is_half_the_squared_norm_of_the_point(connected):
    found = result(connected)["along"]["curve-train"]["metrics"]
    points = checkpoint.load_network(connected / "curve").params
    ts = result(connected)["along"]["curve-train"]["ts"]
    squares = [
        float(tree.norm(curves.point(curves.bezier(3), points, t))) ** 2 for t in (ts[0], ts[2])
    ]
    rise = np.array(found["loss + decay"]["values"]) - found["loss"]["values"]
    np.testing.assert_allclose(rise[[0, 2]], 0.5 * 5e-4 * np.array(squares), rtol=1e-4)


def test_a_second_call_trains_and_measures_nothing_anew(
    connect, connected, networks, tmp_path, monkeypatch
):
    first = result(connected)

    def forbidden(*args, **kwargs):
        raise AssertionError("a curve was measured again")

    folder = tmp_path / "copy"
    shutil.copytree(connected, folder)
    monkeypatch.setattr(curves, "evaluate", forbidden)
    connect.main(connect.Options(networks=tuple(networks[:2]), out=folder, **SMALL))
    again = result(folder)
    assert again["along"] == first["along"]
    assert (first["start"], again["start"]) == (0, first["steps"])


def test_a_stopped_training_ends_with_the_same_bits(connect, connected, networks, tmp_path, capsys):
    folder = tmp_path / "stopped"
    shutil.copytree(connected, folder)
    shutil.rmtree(folder / "curve")
    half, whole = sorted((folder / "checkpoints").iterdir())
    shutil.rmtree(whole)
    connect.main(connect.Options(networks=tuple(networks[:2]), out=folder, **SMALL))
    assert result(folder)["start"] == int(half.name.split("_")[1]) == result(folder)["steps"] // 2
    assert "went on from step" in capsys.readouterr().out
    first, again = (checkpoint.load_network(x / "curve").params for x in (connected, folder))
    assert equal(first, again)


def test_a_stopped_measuring_goes_on_from_its_position(
    connect, connected, networks, tmp_path, monkeypatch
):
    folder = tmp_path / "stopped"
    shutil.copytree(connected, folder)
    name = f"curve-train-{SMALL['num_eval']}-points"
    (folder / "state" / f"{name}.json").unlink()
    shutil.rmtree(folder / "measured" / name)
    calls, refresh = [], statistics.refresh

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return refresh(*args, **kwargs)

    monkeypatch.setattr(statistics, "refresh", stopping)
    options = connect.Options(networks=tuple(networks[:2]), out=folder, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        connect.main(options)
    connect.main(options)
    # Four of seven positions were kept; the last of them and the other three were measured then.
    assert len(calls) == 6 + 1 + 3
    assert result(folder)["along"] == result(connected)["along"]


def test_alignment_takes_a_permuted_copy_back(connect, networks, tmp_path):
    small = SMALL | {"epochs": 1, "num_eval": 3, "curve": "polychain", "num_points": 4}
    pair = (networks[0], networks[2])
    connect.main(connect.Options(networks=pair, out=tmp_path / "run", align=True, **small))
    found = result(tmp_path / "run")
    line = found["along"]["segment-train"]
    loss = line["metrics"]["loss"]
    assert loss["highest"] - min(loss["start"], loss["end"]) < 0.02
    # What is left of the distance is the disturbance.
    ours, theirs = (checkpoint.load_network(path).params for path in pair)
    assert line["chord"] == pytest.approx(0.01 * np.sqrt(tree.size(ours)), rel=0.1)
    assert float(tree.norm(tree.axpy(-1.0, theirs, ours))) > 5 * line["chord"]
    assert found["matching"]["after"] > found["matching"]["inner product before"]
    curve = checkpoint.load_network(tmp_path / "run" / "curve")
    assert tree.num_points(curve.params) == 4
    assert curve.metadata["aligned"]


def test_a_plane_through_a_curve_shows_its_control_points(plane, connected, tmp_path, monkeypatch):
    options = plane.Options(
        curve=connected, num=3, margin=0.0, num_examples=SMALL["num_examples"], out=tmp_path / "p"
    )
    calls, measure = [], planes._measure

    def stopping(*args):
        calls.append(args[1])
        if len(calls) == 6:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(planes, "_measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        plane.main(options)
    plane.main(options)
    # Of 9 positions in each part none but the last three before the stop was measured again: one
    # was stopped, one awaited, and one tells that it is the same plane.
    assert len(calls) == 2 * 9 + 3
    first = result(tmp_path / "p")
    rows = {row["point"]: row for row in first["points"]}
    assert list(rows) == ["t=0", "bend", "t=1"]
    chord = result(connected)["along"]["curve-train"]["chord"]
    assert rows["t=1"]["x"] == pytest.approx(chord, rel=1e-5)
    along = result(connected)["along"]["curve-test"]["metrics"]["loss"]
    assert rows["t=1"]["test loss"] == pytest.approx(along["end"], rel=1e-4)
    with np.load(tmp_path / "p" / "train-loss.npz") as data:
        assert data["coordinates"].shape == (3, 3, 2)
        assert data["curve_off_plane"].max() < 1e-4 * chord
        np.testing.assert_allclose(data["curve"][-1], [chord, 0], atol=1e-4 * chord)
        middle = data["curve"][len(data["curve"]) // 2]
        np.testing.assert_allclose(middle, data["marks"].T @ [0.25, 0.5, 0.25], atol=1e-4 * chord)
    assert (tmp_path / "p" / "test-error.png").exists()

    def counted(fn):
        def calling(*args, **kwargs):
            again.append(fn.__name__)
            return fn(*args, **kwargs)

        return calling

    again = []
    monkeypatch.setattr(planes, "_measure", counted(measure))
    monkeypatch.setattr(plane.statistics, "refresh", counted(plane.statistics.refresh))
    plane.main(options)
    # One position of each part, to know that it is the same plane.
    assert sorted(again) == ["_measure"] * 2 + ["refresh"] * 2
    assert result(tmp_path / "p") == first


def test_a_plane_through_three_networks_has_their_own_losses_at_its_corners(
    plane, networks, tmp_path
):
    plane.main(
        plane.Options(
            networks=tuple(networks), num=2, margin=0.0, metric="error", out=tmp_path,
            num_examples=SMALL["num_examples"],
        )
    )  # fmt: skip
    rows = {row["point"]: row for row in result(tmp_path)["points"]}
    assert list(rows) == ["a", "b", "twin"]
    assert 0 < rows["twin"]["x"] < rows["b"]["x"]  # so that b is a corner of the box
    with (
        np.load(tmp_path / "train-error.npz") as train,
        np.load(tmp_path / "test-error.npz") as test,
    ):
        for data, part in ((train, "train"), (test, "test")):
            for j, (name, path) in enumerate(zip("ab", networks[:2], strict=True)):
                mine = float(own_metrics(path, part)["loss"])
                assert data["loss"][0, j] == pytest.approx(mine, rel=1e-3)
                assert rows[name][f"{part} loss"] == pytest.approx(mine, rel=1e-4)


def test_what_does_not_fit_is_refused_in_a_sentence(connect, plane, connected, networks, tmp_path):
    model = models.build("mlp", widths=[8], num_classes=10)
    params, _ = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    other = save(tmp_path / "other", params, {}, {"widths": [8], "num_classes": 10})
    pair = tuple(networks[:2])
    for given, words in (
        ({"networks": pair[:1]}, "expected two"),
        ({"networks": (pair[0], other)}, "expected one model"),
        ({"networks": (pair[0], pair[0])}, "same weights"),
        ({"networks": pair, "num_points": 2}, "at least 3"),
        ({"networks": pair, "epochs": 0}, "at least"),
        ({"networks": pair, "sampler": "antithetic"}, "even number"),
    ):
        with pytest.raises(SystemExit, match=words):
            connect.main(connect.Options(**given, out=tmp_path / "none"))
    changed = connect.Options(networks=pair, out=connected, **(SMALL | {"epochs": 20}))
    with pytest.raises(ValueError, match="epochs is 30 there and 20 here"):
        connect.main(changed)
    for given, words in (
        ({}, "expected three, or a curve"),
        ({"networks": tuple(networks), "num": 1}, "at least 2"),
        ({"networks": tuple(networks), "curve": connected}, "got both"),
        ({"networks": (*pair, other)}, "expected one model"),
        ({"networks": (*pair, pair[0])}, "given twice"),
        ({"curve": networks[0]}, "is no curve"),
    ):
        with pytest.raises(SystemExit, match=words):
            plane.main(plane.Options(**given, out=tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        plane.main(plane.Options(curve=tmp_path / "missing", out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["connect", "plane"])
def test_help_says_what_it_does(name):
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{name}.py"), "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--networks" in run.stdout
    assert "goes on from its last checkpoint" in " ".join(run.stdout.replace("│", " ").split())
