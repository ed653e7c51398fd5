"""Complexes, simplexes and their ensembles from checkpoints, as a person grows them."""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from geojax import (
    batches,
    checkpoint,
    datasets,
    ensemble,
    fit,
    models,
    objectives,
    simplex,
    statistics,
    surface,
    tree,
)
from geojax.simplex import growing
from geojax.surface import planes

ROOT = pathlib.Path(__file__).resolve().parent.parent
OPTIONS = {"widths": [8], "num_classes": 10, "norm": "batch"}
COMMON = {
    "epochs": 4, "batch_size": 50, "num_examples": 200, "num_samples": 2, "num_eval": 5,
    "checkpoint_every": 2.0,
}  # fmt: skip
SMALL = COMMON | {"num": 3}
SPRO = SMALL | {"volume_weight": 0.05}
ESPRO = COMMON | {"num_members": 3, "learning_rate": 0.05}
SPIRALS = {
    "num_per_class": 10, "noise": 0.1, "depth": 3, "width": 8, "base_steps": 40, "steps": 10,
    "num_samples": 2, "num_eval": 5, "num_members": 3, "num": 3, "grid": 9,
    "num_connectors": 2,
    "near": 4.0,
}  # fmt: skip


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scripts():
    """All of them, the imported ones before those that import them."""
    return {n: script(n) for n in ("complex", "ensemble", "simplex", "espro", "spirals")}


def forbidden(*args, **kwargs):
    raise AssertionError("this was done again")


def save(path, params, state, options=OPTIONS):
    checkpoint.save_network(
        path / "network", params, state, model="mlp", options=options, dataset="digits"
    )
    return path / "network"


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Two networks with BatchNorm of their own seeds, saved with the statistics of their start."""
    folder = tmp_path_factory.mktemp("networks")
    model = models.build("mlp", **OPTIONS)
    train = jax.tree.map(lambda x: x[: COMMON["num_examples"]], datasets.load("digits").train)
    source = batches.split(train, 50)
    _, state = model.init(jax.random.key(0), train.inputs[:2])
    loss_fn, optimizer = objectives.loss(model.apply, state), optax.sgd(0.2)
    found = []
    for seed, name in enumerate("ab"):
        params, _ = model.init(jax.random.key(seed), train.inputs[:2])
        params = fit.fit(loss_fn, params, source, optimizer, 80, key=jax.random.key(9)).params
        found.append(save(folder / name, params, state))
    return tuple(found)


@pytest.fixture(scope="module")
def grown(scripts, networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("complex") / "run"
    script = scripts["complex"]
    script.main(script.Options(networks=networks, out=folder, **SPRO))
    return folder


@pytest.fixture(scope="module")
def averaged(scripts, networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("espro") / "run"
    script = scripts["espro"]
    script.main(script.Options(networks=networks, out=folder, **ESPRO))
    return folder


def result(folder):
    return json.loads((folder / "result.json").read_text())


def log_of(folder):
    """The lines of the log, but for the time that they took."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name != "seconds"} for line in lines]


def parts():
    data = datasets.load("digits")
    return {
        name: jax.tree.map(lambda x: x[: COMMON["num_examples"]], getattr(data, name))
        for name in ("train", "validation", "test")
    }


def own_loss(params, part, path):
    """What a network scores with the statistics of its own weights."""
    network, given = checkpoint.load_network(path), parts()
    model = network.build()
    state = statistics.refresh(model.apply, params, network.state, given["train"])
    return float(objectives.metrics(model.apply, state)(params, given[part])["loss"])


def equal(first, second):
    same = jax.tree.map(np.array_equal, jax.device_get(first), jax.device_get(second))
    return jax.tree.all(same)


# --------------------------------------------------------------------------------- a complex


def test_a_complex_keeps_its_networks_and_says_what_it_is(grown, networks):
    found = checkpoint.load_network(grown / "complex")
    assert found.metadata["simplices"] == [[0, 2, 3], [1, 2, 3]]
    assert found.metadata["num_networks"] == 2
    for i, path in enumerate(networks):
        network = checkpoint.load_network(path)
        assert equal(tree.unstack(found.params)[i], network.params)
    stages = result(grown)["stages"]
    assert [stage["vertices"] for stage in stages] == [3, 4]
    last = simplex.SimplicialComplex(found.params, found.metadata["simplices"])
    volume = float(simplex.log_total_volume(last))
    assert stages[-1]["log volume"] == pytest.approx(volume, rel=1e-5, abs=1e-5)


def test_what_is_measured_inside_has_statistics_of_its_own(grown, networks):
    vertices = checkpoint.load_network(grown / "complex").params
    for part, inside in result(grown)["inside"].items():
        loss = inside["metrics"]["loss"]
        for i in (0, 3):
            mine = own_loss(tree.unstack(vertices)[i], part, networks[0])
            assert loss["vertices"][i] == pytest.approx(mine, rel=1e-4)
        point = tree.combine(vertices, np.asarray(inside["weights"][2], np.float32))
        assert loss["values"][2] == pytest.approx(own_loss(point, part, networks[0]), rel=1e-4)
    worst = result(grown)["inside"]["train"]["worst"]
    assert worst["loss"] >= max(result(grown)["inside"]["train"]["metrics"]["loss"]["values"])
    point = tree.combine(vertices, np.asarray(worst["weights"], np.float32))
    assert worst["loss"] == pytest.approx(own_loss(point, "train", networks[0]), rel=1e-4)
    middle = simplex.centroid(vertices, [0, 1])
    mine = own_loss(middle, "test", networks[0])
    assert result(grown)["centroid"]["test loss"] == pytest.approx(mine, rel=1e-4)


def test_its_figures_have_their_data(grown):
    with np.load(grown / "faces.npz") as data:
        # The face of the two connectors is shared; it has no third vertex of its own.
        assert data["triangles"].tolist() == [[0, 2, 3], [1, 2, 3]]
        assert data["loss_1"].shape == (3, 3)
    vertices = checkpoint.load_network(grown / "complex").params
    with np.load(grown / "projection.npz") as data:
        wanted = surface.principal_directions(vertices, 3)
        np.testing.assert_allclose(data["coordinates"], wanted.coordinates, rtol=1e-3, atol=1e-3)
        assert data["points"].shape == (5, 3)
    assert (grown / "stages.png").exists()
    assert (grown / "report.html").exists()


def counted_positions(monkeypatch):
    """The positions of planes that are measured from now on, as they come."""
    calls, measure = [], planes._measure

    def counted(found, places, *args):
        calls.extend(places)
        return measure(found, places, *args)

    monkeypatch.setattr(planes, "_measure", counted)
    return calls


def test_a_second_call_trains_nothing_and_measures_one_position_of_each_face(
    scripts, grown, networks, tmp_path, monkeypatch
):
    folder = tmp_path / "copy"
    shutil.copytree(grown, folder)
    for name in ("spro", "evaluate", "worst_point"):
        monkeypatch.setattr(simplex, name, forbidden)
    again = counted_positions(monkeypatch)
    passes, mean = [], batches.mean

    def counted(metrics_fn, *args, **kwargs):
        averaged = mean(metrics_fn, *args, **kwargs)

        def once(*point):
            passes.append(metrics_fn.__name__)
            return averaged(*point)

        return once

    monkeypatch.setattr(batches, "mean", counted)
    script = scripts["complex"]
    script.main(script.Options(networks=networks, out=folder, **SPRO))
    with np.load(grown / "faces.npz") as data:
        assert len(again) == len(data["triangles"]) > 1
    # The other passes are for the statistics at these positions.
    assert passes.count("metrics_fn") == len(again)
    assert set(passes) == {"metrics_fn", "moments"}
    assert result(folder) == result(grown)


def test_a_growth_that_was_stopped_ends_with_the_same_bits(
    scripts, grown, networks, tmp_path, monkeypatch
):
    starts, train = [], growing.fit

    def stopping(*args, **kwargs):
        if len(starts) == 1:
            starts.append(None)
            raise KeyboardInterrupt
        found = train(*args, **kwargs)
        starts.append(found.start)
        return found

    monkeypatch.setattr(growing, "fit", stopping)
    script = scripts["complex"]
    options = script.Options(networks=networks, out=tmp_path, **(SPRO | {"faces": False}))
    with pytest.raises(KeyboardInterrupt):
        script.main(options)
    script.main(options)
    num_steps = 4 * 4
    # The first vertex was trained and the second stopped; then the second alone was trained.
    assert starts == [0, None, num_steps, 0]
    first, again = (checkpoint.load_network(x / "complex").params for x in (grown, tmp_path))
    assert equal(first, again)
    steps = [(stage, step) for stage in range(2) for step in range(num_steps)]
    assert [(line["stage"], line["step"]) for line in log_of(grown)] == steps
    assert log_of(tmp_path) == log_of(grown)
    assert not (tmp_path / "faces.npz").exists()


def test_growth_stops_where_the_loss_is_too_high(scripts, networks, tmp_path):
    script = scripts["complex"]
    script.main(script.Options(networks=networks, out=tmp_path, max_loss=1e-6, **SMALL))
    stages = result(tmp_path)["stages"]
    assert [stage["kept"] for stage in stages] == [False]
    # What is left are the networks by themselves.
    assert result(tmp_path)["simplices"] == [[0], [1]]
    assert not (tmp_path / "projection.npz").exists()


def test_a_volume_without_weight_is_noted_in_the_report(scripts, networks, tmp_path):
    script = scripts["complex"]
    small = SMALL | {"volume_weight": 1e-9, "faces": False, "num_connectors": 1}
    script.main(script.Options(networks=networks, out=tmp_path, **small))
    (note,) = result(tmp_path)["notes"]
    assert "the volume did nothing" in note
    assert "the volume did nothing" in (tmp_path / "report.html").read_text()


def test_alignment_brings_the_networks_closer(scripts, grown, networks, tmp_path):
    script = scripts["complex"]
    small = SMALL | {"epochs": 1, "num_connectors": 1, "faces": False}
    script.main(script.Options(networks=networks, out=tmp_path, align=True, **small))
    (row,) = result(tmp_path)["matchings"]
    assert row["after"] > row["inner product before"]
    plain, aligned = (checkpoint.load_network(x / "complex").params for x in (grown, tmp_path))
    assert simplex.distances(aligned)[0, 1] < simplex.distances(plain)[0, 1]
    assert checkpoint.load_network(tmp_path / "complex").metadata["aligned"]
    # The same function in other units.
    loss = result(tmp_path)["inside"]["test"]["metrics"]["loss"]["vertices"][1]
    second = checkpoint.load_network(networks[1]).params
    assert loss == pytest.approx(own_loss(second, "test", networks[0]), rel=1e-4)


# --------------------------------------------------------------------------------- a simplex


def test_a_simplex_grows_from_one_network(scripts, networks, tmp_path):
    script = scripts["simplex"]
    small = SMALL | {"epochs": 1, "num_connectors": 3}
    script.main(script.Options(networks=networks[:1], out=tmp_path, **small))
    assert result(tmp_path)["simplices"] == [[0, 1, 2, 3]]
    with np.load(tmp_path / "faces.npz") as data:
        assert len(data["triangles"]) == 4
    assert "centroid" not in result(tmp_path)
    with pytest.raises(ValueError, match="got 2 networks; expected 1"):
        script.main(script.Options(networks=networks, out=tmp_path / "none"))


# ---------------------------------------------------------------------- an ensemble of simplexes


def model_fn(path):
    model = checkpoint.load_network(path).build()
    return lambda params, state, batch: model.apply(params, state, batch.inputs, False)[0]


def test_predictions_are_averages_over_networks_drawn_from_the_simplexes(averaged, networks):
    network, given = checkpoint.load_network(networks[0]), parts()
    model = network.build()

    def fresh(params):
        return statistics.refresh(model.apply, params, network.state, given["train"])

    logs = {"validation": [], "test": []}
    for i in range(2):
        found = checkpoint.load_network(averaged / "simplexes" / str(i))
        one = simplex.SimplicialComplex(found.params, found.metadata["simplices"])
        assert one.simplices == ((0, 1, 2),)
        assert equal(simplex.vertex(one, 0), checkpoint.load_network(networks[i]).params)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 4), i)
        for part in logs:
            logs[part].append(
                simplex.predict(
                    model_fn(networks[0]), one, given[part], key=key, num_samples=3, state_fn=fresh
                )
            )
    together = {part: ensemble.average(found) for part, found in logs.items()}
    wanted = ensemble.calibration(together["test"], given["test"].labels)
    row = result(averaged)["predictions"][-1]
    assert row["prediction"] == "all simplexes (2)"
    assert row["NLL"] == pytest.approx(wanted.nll.value, rel=1e-4)
    assert row["Brier"] == pytest.approx(wanted.brier.value, rel=1e-4)
    assert row["ECE"] == pytest.approx(wanted.ece.value, rel=1e-3)
    # The temperature is that of the validation part alone.
    heat = ensemble.fit_temperature(together["validation"], given["validation"].labels).value
    assert row["temperature"] == pytest.approx(heat, rel=1e-3)
    after = ensemble.calibration(ensemble.tempered(together["test"], heat), given["test"].labels)
    assert row["NLL after"] == pytest.approx(after.nll.value, rel=1e-3)
    assert row["ECE after"] == pytest.approx(after.ece.value, rel=1e-2)


def test_the_plain_ensemble_of_the_networks_stands_beside(averaged, networks):
    given = parts()
    found = []
    for path in networks:
        network = checkpoint.load_network(path)
        apply = network.build().apply
        state = statistics.refresh(apply, network.params, network.state, given["train"])
        logits = apply(network.params, state, given["test"].inputs, False)[0]
        found.append(np.asarray(logits, np.float64))
    rows = {row["prediction"]: row for row in result(averaged)["predictions"]}
    assert list(rows) == [
        "network a", "network b", "simplex a", "simplex b", "all networks (2)", "all simplexes (2)",
    ]  # fmt: skip
    nll = -np.log(
        np.mean([np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in found], axis=0)[
            np.arange(200), given["test"].labels
        ]
    ).mean()
    assert rows["all networks (2)"]["NLL"] == pytest.approx(nll, rel=1e-4)
    running = result(averaged)["running"]
    assert running["networks"][0]["NLL"] == rows["network a"]["NLL"]
    assert running["simplexes"][1] == {
        name: value for name, value in rows["all simplexes (2)"].items() if name != "prediction"
    }
    within = result(averaged)["within"]
    assert within[0]["loss"][-1] == pytest.approx(rows["simplex a"]["NLL"], rel=1e-6)
    assert len(within[1]["error"]) == 3
    for name in ("running", "reliability"):
        assert (averaged / f"{name}.png").exists()


def test_predictions_that_were_stopped_go_on_at_the_next_simplex(
    scripts, averaged, networks, tmp_path, monkeypatch
):
    folder = tmp_path / "copy"
    shutil.copytree(averaged, folder)
    for name in ("test-1.npz", "network-1-test.npy"):
        (folder / "state" / name).unlink()
    calls, running, alone = [], simplex.running, ensemble.log_probabilities

    def counted(name, fn):
        def call(*args, **kwargs):
            calls.append(name)
            return fn(*args, **kwargs)

        return call

    monkeypatch.setattr(simplex, "espro", forbidden)
    monkeypatch.setattr(simplex, "running", counted("simplex", running))
    monkeypatch.setattr(ensemble, "log_probabilities", counted("network", alone))
    script = scripts["espro"]
    script.main(script.Options(networks=networks, out=folder, **ESPRO))
    assert calls == ["simplex", "network"]
    assert result(folder) == result(averaged)


def test_simplexes_that_were_stopped_within_a_vertex_end_with_the_same_bits(
    scripts, averaged, networks, tmp_path, monkeypatch
):
    saved, starts = [], []
    save, train = checkpoint.Checkpointer.save, growing.fit

    def stopping(self, step, *rest):
        save(self, step, *rest)
        saved.append((pathlib.Path(self.location).name, step))
        if saved[-1] == ("vertex-2", 8) and saved.count(saved[-1]) == 1:
            raise KeyboardInterrupt

    def counted(*args, **kwargs):
        found = train(*args, **kwargs)
        starts.append(found.start)
        return found

    monkeypatch.setattr(checkpoint.Checkpointer, "save", stopping)
    monkeypatch.setattr(growing, "fit", counted)
    script = scripts["espro"]
    options = script.Options(networks=networks, out=tmp_path, **ESPRO)
    with pytest.raises(KeyboardInterrupt):
        script.main(options)
    assert not (tmp_path / "simplexes").exists()
    script.main(options)
    # Half of the steps of the second vertex were left.
    assert starts == [0, 16, 8]
    for i in range(2):
        mine, other = (
            checkpoint.load_network(x / "simplexes" / str(i)) for x in (tmp_path, averaged)
        )
        assert equal(mine.params, other.params)
    # Shares of the volume and predictions included.
    assert result(tmp_path) == result(averaged)
    steps = [(stage, step) for stage in range(2) for step in range(16)]
    assert [(line["stage"], line["step"]) for line in log_of(tmp_path)] == steps
    assert log_of(tmp_path) == log_of(averaged)


def test_complexes_that_were_grown_before_are_averaged_as_they_are(
    scripts, grown, tmp_path, monkeypatch
):
    monkeypatch.setattr(simplex, "espro", forbidden)
    script = scripts["espro"]
    script.main(script.Options(complexes=(grown,), out=tmp_path, **ESPRO))
    rows = [row["prediction"] for row in result(tmp_path)["predictions"]]
    assert rows == [
        "network run w0", "network run w1", "simplex run", "all networks (2)", "all simplexes (1)",
    ]  # fmt: skip
    assert "stages" not in result(tmp_path)


# ------------------------------------------------------------------------------- two spirals


@pytest.fixture(scope="module")
def spirals(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spirals") / "run"
    script = scripts["spirals"]
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes integers and floats
        holds = script.main(script.Options(out=folder, **SPIRALS))
    assert isinstance(holds, bool)
    return folder, holds


def test_the_claims_are_those_of_the_numbers(spirals):
    folder, holds = spirals
    found = result(folder)
    error, highest, differ = found["claims"]
    train = found["inside"]["train"]["metrics"]
    assert error["measured"] == train["error"]["vertices"][0]
    assert highest["measured"] == max(train["loss"]["values"])
    assert differ["measured"] == pytest.approx(found["far"] / found["near"])
    wanted = [error["measured"] == 0, highest["measured"] < 0.1, differ["measured"] > 1]
    assert [row["holds"] for row in found["claims"]] == wanted
    assert holds == all(wanted)
    assert {line["stage"] for line in log_of(folder)} == {"base", 0, 1}
    with np.load(folder / "boundaries.npz") as data:
        # Three networks and their ensemble.
        assert data["probabilities"].shape == (4, 9, 9)
        members = data["probabilities"][:3]
        np.testing.assert_allclose(data["probabilities"][3], members.mean(0), rtol=1e-6)


def test_disagreement_is_the_share_of_pairs_that_differ(scripts):
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(6, 4, 2))
    classes = outputs.argmax(-1)
    pairs = [classes[i] != classes[j] for i in range(6) for j in range(i)]
    found = scripts["spirals"].disagreement(outputs)
    np.testing.assert_allclose(found, np.mean(pairs, axis=0), rtol=1e-12)


def test_spirals_a_second_time_are_only_drawn_but_for_a_position_of_each_face(
    scripts, spirals, monkeypatch
):
    folder, holds = spirals
    before = result(folder)
    for name in ("spro", "evaluate", "worst_point", "members"):
        monkeypatch.setattr(simplex, name, forbidden)
    again = counted_positions(monkeypatch)
    monkeypatch.setattr(fit, "fit", forbidden)
    script = scripts["spirals"]
    assert script.main(script.Options(out=folder, **SPIRALS)) == holds
    with np.load(folder / "faces.npz") as data:
        assert len(again) == len(data["triangles"])
    assert result(folder) == before


# ------------------------------------------------------------------------------------ misuse


def test_what_does_not_fit_is_refused_in_a_sentence(scripts, grown, networks, tmp_path):
    model = models.build("mlp", widths=[4], num_classes=10)
    params, _ = model.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    other = save(tmp_path / "other", params, {}, {"widths": [4], "num_classes": 10})
    none = tmp_path / "none"
    cases = {
        "complex": (
            ({"networks": networks[:1]}, "expected 2 or more"),
            ({"networks": (networks[0], other)}, "expected one model"),
            ({"networks": (networks[0], networks[0])}, "same weights"),
            ({"networks": (networks[0], grown / "complex")}, "holds several points"),
            ({"networks": networks, "num_connectors": 0}, "--num-connectors is 0"),
            ({"networks": networks, "epochs": 0}, "--epochs is 0"),
            ({"networks": networks, "volume_weight": -1.0}, "--volume-weight is -1"),
            ({"networks": networks, "learning_rate": 0.0}, "more than 0"),
            ({"networks": networks, "num": 1}, "--num is 1"),
        ),
        "simplex": (
            ({}, "got 0 networks; expected 1"),
            ({"networks": networks[:1], "align": True}, "--align is for two"),
        ),
        "espro": (
            ({}, "got neither"),
            ({"networks": networks, "complexes": (grown,)}, "got both"),
            ({"networks": networks, "num_vertices": 1}, "--num-vertices is 1"),
            ({"networks": networks, "num_members": 0}, "--num-members is 0"),
            ({"complexes": networks}, "is no complex"),
            ({"complexes": (grown, grown)}, "given twice"),
        ),
        "spirals": (
            ({"depth": 1}, "--depth is 1"),
            ({"num_members": 1}, "--num-members is 1"),
            ({"near": 1e-6}, "expected some and not all"),
            ({"learning_rate": 0.0}, "more than 0"),
        ),
    }
    for name, given in cases.items():
        for options, words in given:
            with pytest.raises(ValueError, match=words):
                scripts[name].main(scripts[name].Options(**options, out=none))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        scripts["complex"].main(
            scripts["complex"].Options(networks=(tmp_path / "x", tmp_path / "y"), out=none)
        )
    assert not none.exists()
    changed = scripts["complex"].Options(networks=networks, out=grown, **(SPRO | {"epochs": 5}))
    with pytest.raises(ValueError, match="epochs is 4 there and 5 here"):
        scripts["complex"].main(changed)


@pytest.mark.parametrize("name", ["complex", "simplex", "espro", "spirals"])
def test_help_says_what_it_does(name):
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{name}.py"), "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--volume-weight" in run.stdout
    assert "goes on from its last checkpoint" in " ".join(run.stdout.replace("│", " ").split())


def test_a_mistake_on_the_command_line_is_one_sentence(networks):
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "espro.py"), "--networks", str(networks[0]),
         "--num-vertices", "1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.strip() == "espro: --num-vertices is 1; expected at least 2."
