"""Curves measured, chains of networks, ensembles of one run and of many, as a person makes them."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil
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
    ensemble,
    fit,
    models,
    objectives,
    permute,
    statistics,
    surface,
    symmetry,
    tree,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent
OPTIONS = {"widths": [16], "num_classes": 10, "norm": "batch"}
NUM = 300
SCRIPTS = ("eval_curve", "chain", "fge", "ensemble")
FGE = {
    "epochs": 4, "cycle_epochs": 2, "batch_size": 100, "num_examples": NUM, "lr_1": 0.2,
    "lr_2": 0.01, "seed": 5,
}  # fmt: skip


class Killed(BaseException):
    """The process ends here, with no chance to save anything."""


@pytest.fixture(scope="module")
def scripts():
    found = {}
    for name in SCRIPTS:
        path = ROOT / "scripts" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"script_{name}", path)
        found[name] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = found[name]
        spec.loader.exec_module(found[name])
    return found


@pytest.fixture(scope="module")
def parts():
    data = datasets.load("digits")
    return {
        part: jax.tree.map(lambda x: x[:NUM], getattr(data, part))
        for part in ("train", "validation", "test")
    }


@pytest.fixture(scope="module")
def model():
    return models.build("mlp", **OPTIONS)


def save(path, params, state, **metadata):
    checkpoint.save_network(
        path, params, state, model="mlp", options=OPTIONS, dataset="digits", metadata=metadata
    )
    return path


@pytest.fixture(scope="module")
def networks(model, parts, tmp_path_factory):
    """Three networks; their saved statistics are initial ones, so that only fresh ones are right.

    The training of the first one is checkpointed half way.
    """
    folder = tmp_path_factory.mktemp("networks")
    source = batches.split(parts["train"], 100)
    _, state = model.init(jax.random.key(0), parts["train"].inputs[:2])
    loss_fn, optimizer = objectives.loss(model.apply, state), optax.sgd(0.2)
    for seed, name in enumerate("abc"):
        params, _ = model.init(jax.random.key(seed), parts["train"].inputs[:2])
        keeper = checkpoint.Checkpointer(folder / "run" / "checkpoints", every=30)
        params = fit.fit(
            loss_fn, params, source, optimizer, 60, key=jax.random.key(9),
            checkpoint=keeper if name == "a" else None,
        ).params  # fmt: skip
        save(folder / name / "network", params, state)
    return folder


@pytest.fixture(scope="module")
def pair(networks):
    return tuple(networks / name / "network" for name in "ab")


def bent(path, networks, kind, around):
    """A curve through a point beside the segment, as scripts/connect.py saves it."""
    first, last = (checkpoint.load_network(networks / name / "network") for name in "ab")
    noise = tree.random_like(jax.random.key(3), first.params)
    middle = tree.combine(
        tree.stack([first.params, last.params, noise]), jnp.array([1 - around, around, 0.05])
    )
    points = tree.stack([first.params, middle, last.params])
    save(path / "curve", points, first.state, basis=kind, num_points=3)
    return path


@pytest.fixture(scope="module")
def curve(networks, tmp_path_factory):
    return bent(tmp_path_factory.mktemp("curve") / "connected", networks, "bezier", 0.5)


@pytest.fixture(scope="module")
def evaluated(scripts, curve, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    options = {"curve": curve, "num_eval": 7, "ensemble_points": 5, "num_examples": NUM}
    scripts["eval_curve"].main(scripts["eval_curve"].Options(**options, out=folder))
    return folder, options


@pytest.fixture(scope="module")
def collected(scripts, pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("collected") / "run"
    scripts["fge"].main(scripts["fge"].Options(network=pair[0], out=folder, **FGE))
    return folder


def result(folder):
    return json.loads((folder / "result.json").read_text())


def equal(first, second):
    same = jax.tree.map(np.array_equal, jax.device_get(first), jax.device_get(second))
    return jax.tree.all(same)


def at_its_own(model, parts, params, state, part):
    """Loss and error with the statistics of these very weights."""
    fresh = statistics.refresh(model.apply, params, state, parts["train"])
    return objectives.metrics(model.apply, fresh)(params, parts[part])


def probabilities(model, parts, path, part="test"):
    """What the network at a path predicts, by its own saved statistics."""
    network = checkpoint.load_network(path)
    outputs, _ = model.apply(network.params, network.state, parts[part].inputs, False)
    return np.asarray(jax.nn.softmax(outputs), np.float64)


def nll(probs, labels):
    return float(-np.log(probs[np.arange(len(labels)), labels]).mean())


def forbidden(*args, **kwargs):
    raise AssertionError("this was computed before")


def stops_after(number, fn, error=KeyboardInterrupt):
    """The function, and the calls that it has seen; one call more stops the program."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == number + 1:
            raise error
        return fn(*args, **kwargs)

    return counted, calls


# ------------------------------------------------------------------------------- a curve, measured


def test_a_curve_is_measured_with_the_statistics_of_each_point(evaluated, model, parts, curve):
    found = result(evaluated[0])
    network = checkpoint.load_network(curve / "curve")
    basis, ends = curves.bezier(3), tree.unstack(network.params)
    for part in ("train", "test"):
        values = found["along"][part]
        assert list(values) == ["loss", "loss + decay", "error"]
        for i, end in ((0, ends[0]), (-1, ends[-1])):
            mine = at_its_own(model, parts, end, network.state, part)
            assert values["loss"][i] == pytest.approx(float(mine["loss"]), rel=1e-4)
            assert values["error"][i] == pytest.approx(float(mine["error"]), abs=1e-6)
        middle = curves.point(basis, network.params, found["ts"][2])
        mine = at_its_own(model, parts, middle, network.state, part)
        assert values["loss"][2] == pytest.approx(float(mine["loss"]), rel=1e-4)
        decay = 0.5 * 5e-4 * float(tree.vdot(middle, middle))
        rise = values["loss + decay"][2] - values["loss"][2]
        assert rise == pytest.approx(decay, rel=1e-4)
    row = next(x for x in found["rows"] if (x["part"], x["metric"]) == ("test", "loss"))
    values = np.array(found["along"]["test"]["loss"])
    assert row["highest"] == values.max()
    assert row["mean"] == pytest.approx(values.mean())
    assert row["integral"] == pytest.approx(
        np.trapezoid(values, found["lengths"]) / found["lengths"][-1]
    )
    assert found["length"] == pytest.approx(curves.length(basis, network.params))
    assert found["chord"] == pytest.approx(float(tree.norm(tree.axpy(-1.0, ends[0], ends[-1]))))
    for name in ("along", "ensembles"):
        assert (evaluated[0] / f"{name}.png").exists()
    with np.load(evaluated[0] / "along.npz") as data:
        np.testing.assert_array_equal(data["test_loss"], values)


def test_the_ensemble_along_a_curve_is_the_average_of_its_networks(evaluated, model, parts, curve):
    found = result(evaluated[0])
    network, labels = checkpoint.load_network(curve / "curve"), parts["test"].labels
    ts = curves.arc_length_ts(curves.bezier(3), network.params, 5)
    probs = []
    for t in ts:
        params = curves.point(curves.bezier(3), network.params, float(t))
        state = statistics.refresh(model.apply, params, network.state, parts["train"])
        outputs, _ = model.apply(params, state, parts["test"].inputs, False)
        probs.append(np.asarray(jax.nn.softmax(outputs), np.float64))
    first, last, mean, ends, everything = (row["NLL"] for row in found["ensembles"])
    assert first == pytest.approx(nll(probs[0], labels), rel=1e-4)
    assert last == pytest.approx(nll(probs[-1], labels), rel=1e-4)
    assert mean == pytest.approx(np.mean([nll(x, labels) for x in probs]), rel=1e-4)
    assert ends == pytest.approx(nll((probs[0] + probs[-1]) / 2, labels), rel=1e-4)
    assert everything == pytest.approx(nll(np.mean(probs, 0), labels), rel=1e-4)
    assert everything <= mean
    along = found["with t=0"]
    differ = [float(np.mean(x.argmax(1) != probs[0].argmax(1))) for x in probs]
    np.testing.assert_allclose(along["disagreement with t=0"], differ, atol=1e-9)
    assert along["NLL with t=0"][0] == pytest.approx(first)


def test_positions_can_be_equally_spaced_in_arc_length(scripts, networks, tmp_path):
    lopsided = bent(tmp_path / "chain", networks, "polychain", 0.1)
    options = {"curve": lopsided, "num_eval": 5, "num_examples": 50, "ensemble_points": 0}
    for spacing in ("t", "arc_length"):
        folder = tmp_path / spacing
        scripts["eval_curve"].main(
            scripts["eval_curve"].Options(**options, spacing=spacing, out=folder)
        )
        found = result(folder)
        pieces = np.diff(found["lengths"]) / found["length"]
        if spacing == "t":
            assert pieces.max() > 3 * pieces.min()
            np.testing.assert_array_equal(found["ts"], np.linspace(0, 1, 5))
        else:
            np.testing.assert_allclose(pieces, 0.25, rtol=1e-6)
        assert "ensembles" not in found


def test_a_stopped_evaluation_measures_no_position_twice(scripts, evaluated, tmp_path, monkeypatch):
    script, (first, given) = scripts["eval_curve"], evaluated
    options = script.Options(**given, out=tmp_path / "run")
    counted, calls = stops_after(9, statistics.refresh)
    monkeypatch.setattr(script.statistics, "refresh", counted)
    with pytest.raises(KeyboardInterrupt):
        script.main(options)
    script.main(options)
    # Seven positions and five networks of the ensemble, and the one that was stopped.
    assert len(calls) == 7 + 5 + 1
    again = result(tmp_path / "run")
    assert again == result(first)
    monkeypatch.setattr(script.statistics, "refresh", forbidden)
    script.main(options)
    assert result(tmp_path / "run") == again


# ------------------------------------------------------------------------------ the straight path


def test_each_segment_of_a_chain_has_the_barrier_of_the_line_between_its_networks(
    scripts, model, parts, networks, tmp_path, monkeypatch
):
    script = scripts["chain"]
    paths = tuple(networks / name / "network" for name in "abc")
    options = script.Options(networks=paths, num_eval=5, num_examples=NUM, out=tmp_path / "run")
    counted, calls = stops_after(6, statistics.refresh)
    monkeypatch.setattr(script.statistics, "refresh", counted)
    with pytest.raises(KeyboardInterrupt):
        script.main(options)
    script.main(options)
    # The network that two segments share is measured once.
    assert len(calls) == 9 + 1
    monkeypatch.undo()
    found = result(tmp_path / "run")
    points = [checkpoint.load_network(path) for path in paths]
    ts = np.linspace(0, 1, 5)
    for i in range(2):

        def fresh(params):
            return statistics.refresh(model.apply, params, points[0].state, parts["train"])

        line = surface.line(
            objectives.metrics_with_state(model.apply), points[i].params, points[i + 1].params,
            parts["test"], ts, state_fn=fresh,
        )  # fmt: skip
        assert found["lengths"][i] == pytest.approx(line.distance, rel=1e-5)
        for metric in ("loss", "error"):
            row = next(
                row
                for row in found["segments"]
                if row["segment"] == f"{'abc'[i]} to {'abc'[i + 1]}"
                and (row["part"], row["metric"]) == ("test", metric)
            )
            barrier = surface.barrier(ts, line.values[metric])
            assert row["barrier"] == pytest.approx(barrier.height, rel=1e-3, abs=1e-5)
            assert (row["at"], row["start"]) == pytest.approx((barrier.t, barrier.start), rel=1e-4)
    assert len(found["along"]) == 9
    monkeypatch.setattr(script.statistics, "refresh", forbidden)
    script.main(options)
    assert result(tmp_path / "run") == found


def test_an_aligned_chain_takes_a_permuted_copy_back(scripts, model, networks, tmp_path):
    network = checkpoint.load_network(networks / "a" / "network")
    spec = symmetry.permutation_spec(
        lambda v, x: model.apply(v["params"], v["state"], x, False)[0],
        {"params": network.params, "state": network.state}, jnp.zeros((2, 8, 8, 1)),
    ).at("params")  # fmt: skip
    order = permute.random_permutation(jax.random.key(3), spec)
    moved = permute.apply_permutation(spec, order, network.params)
    moved = tree.axpy(0.01, tree.random_like(jax.random.key(4), moved), moved)
    twin = save(tmp_path / "twin" / "network", moved, network.state)
    both = (networks / "a" / "network", twin)
    for align in (False, True):
        scripts["chain"].main(
            scripts["chain"].Options(
                networks=both, num_eval=3, align=align, num_examples=NUM,
                out=tmp_path / f"run-{align}",
            )
        )  # fmt: skip
    apart, together = (result(tmp_path / f"run-{align}") for align in (False, True))
    # What is left of the distance is the disturbance.
    size = tree.size(network.params)
    assert together["lengths"][0] == pytest.approx(0.01 * np.sqrt(size), rel=0.1)
    assert apart["lengths"][0] > 5 * together["lengths"][0]
    assert max(row["barrier"] for row in together["segments"]) < 0.02
    assert max(row["barrier"] for row in apart["segments"]) > 0.1
    assert together["matchings"][0]["after"] > together["matchings"][0]["inner product before"]


# ------------------------------------------------------------------------- an ensemble of one run


def test_members_of_fge_are_those_of_the_library(collected, model, parts, networks):
    network = checkpoint.load_network(networks / "a" / "network")
    source = batches.split(
        parts["train"], 100, key=jax.random.fold_in(jax.random.key(5), 1), drop_remainder=True
    )
    mine = curves.fge(
        objectives.loss(model.apply, network.state), network.params, source,
        lambda rate: optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, 0.9)),
        high=0.2, low=0.01, cycle_steps=6, num_members=2,
        key=jax.random.fold_in(jax.random.key(5), 2),
    )  # fmt: skip
    rows = result(collected)["members"]
    assert [row["step"] for row in rows] == [3, 9] == mine.steps.tolist()
    assert rows[1]["from the last"] == pytest.approx(mine.distances[0], rel=1e-5)
    labels, probs = parts["test"].labels, []
    for i, params in enumerate(tree.unstack(mine.members)):
        member = checkpoint.load_network(collected / "members" / f"{i:02d}")
        assert equal(member.params, params)
        away = float(tree.norm(tree.axpy(-1.0, network.params, params)))
        assert rows[i]["from the start"] == pytest.approx(away, rel=1e-5)
        own = at_its_own(model, parts, params, network.state, "test")
        assert rows[i]["NLL"] == pytest.approx(float(own["loss"]), rel=1e-4)
        assert rows[i]["error"] == pytest.approx(float(own["error"]), abs=1e-6)
        probs.append(probabilities(model, parts, collected / "members" / f"{i:02d}"))
        together = ensemble.calibration(np.mean(probs, 0), labels)
        assert rows[i]["ensemble NLL"] == pytest.approx(together.nll.value, rel=1e-4)
        assert rows[i]["ensemble ECE"] == pytest.approx(together.ece.value, rel=1e-3)
        assert rows[i]["ensemble error"] == pytest.approx(1 - together.accuracy.value)
    start = result(collected)["compared"][0]
    own = at_its_own(model, parts, network.params, network.state, "test")
    assert start["NLL"] == pytest.approx(float(own["loss"]), rel=1e-4)
    for name in ("running", "reliability"):
        assert (collected / f"{name}.png").exists()


def check_killed(script, options, whole, monkeypatch):
    """A run that is killed and called again goes on, to the members of the whole one."""
    # A checkpoint after each epoch, and a member after the first and the third; the end with both.
    counted, calls = stops_after(3, checkpoint.Checkpointer.save, Killed)
    monkeypatch.setattr(checkpoint.Checkpointer, "save", counted)
    with pytest.raises(Killed):
        script.main(options)
    assert len(calls) == 4
    monkeypatch.undo()
    script.main(options)
    assert result(options.out)["start"] > 0
    for name in ("members/00", "members/01"):
        first, again = (checkpoint.load_network(x / name) for x in (whole, options.out))
        assert equal((first.params, first.state), (again.params, again.state))


def test_a_killed_run_of_fge_ends_with_the_same_bits(
    scripts, collected, pair, tmp_path, monkeypatch, capsys
):
    script = scripts["fge"]
    options = script.Options(network=pair[0], out=tmp_path / "run", **FGE)
    check_killed(script, options, collected, monkeypatch)
    assert "went on from step" in capsys.readouterr().out
    assert result(tmp_path / "run")["members"] == result(collected)["members"]
    monkeypatch.setattr(script.statistics, "refresh", forbidden)
    monkeypatch.setattr(script.ensemble, "log_probabilities", forbidden)
    script.main(options)
    assert result(tmp_path / "run")["start"] == result(tmp_path / "run")["steps"]


def test_the_start_can_be_a_checkpoint_of_training_and_a_member(scripts, networks, pair, tmp_path):
    half = networks / "run" / "checkpoints" / "step_00000030"
    options = FGE | {"method": "snapshot", "epochs": 1, "cycle_epochs": 1, "include_start": True}
    scripts["fge"].main(
        scripts["fge"].Options(network=pair[0], start=half, out=tmp_path / "run", **options)
    )
    start = checkpoint.load(half)[0]["params"]
    assert not equal(start, checkpoint.load_network(pair[0]).params)
    assert equal(checkpoint.load_network(tmp_path / "run" / "members" / "00").params, start)
    rows = result(tmp_path / "run")["members"]
    assert [row["step"] for row in rows] == [0, 3]
    assert rows[0]["from the start"] == 0


def test_weights_are_averaged_and_drawn_with_statistics_of_their_own(
    scripts, model, parts, pair, tmp_path
):
    options = FGE | {"method": "swag", "epochs": 3, "cycle_epochs": 1, "num_samples": 2}
    scripts["fge"].main(scripts["fge"].Options(network=pair[0], out=tmp_path / "run", **options))
    members, samples = (
        [checkpoint.load_network(path) for path in sorted((tmp_path / "run" / name).iterdir())]
        for name in ("members", "samples")
    )
    average = checkpoint.load_network(tmp_path / "run" / "average")
    stacked = tree.stack([network.params for network in members])
    assert len(members) == 3
    for mine, given in zip(jax.tree.leaves(average.params), jax.tree.leaves(stacked), strict=True):
        np.testing.assert_allclose(mine, np.mean(given, 0), rtol=1e-5, atol=1e-6)
    assert not equal(average.state, members[-1].state)
    gaussian = curves.swag(stacked, 20)
    for i, sample in enumerate(samples):
        drawn = gaussian.sample(jax.random.fold_in(jax.random.key(5), 3 + i))
        assert equal(sample.params, drawn)
    labels = parts["test"].labels
    compared = {row["prediction"]: row["NLL"] for row in result(tmp_path / "run")["compared"]}
    own = at_its_own(model, parts, average.params, average.state, "test")
    assert compared["mean of the weights"] == pytest.approx(float(own["loss"]), rel=1e-4)
    probs = [
        probabilities(model, parts, tmp_path / "run" / "samples" / f"{i:02d}") for i in range(2)
    ]
    assert compared["2 draws of SWAG"] == pytest.approx(nll(np.mean(probs, 0), labels), rel=1e-4)


@pytest.fixture(scope="module")
def augmented(scripts, networks, tmp_path_factory):
    """A network that says it was trained with augmentation, and members that it gave."""
    folder = tmp_path_factory.mktemp("augmented")
    network = checkpoint.load_network(networks / "a" / "network")
    path = save(folder / "a", network.params, network.state, training={"augment": "affine"})
    scripts["fge"].main(scripts["fge"].Options(network=path, out=folder / "run", **FGE))
    return path, folder / "run"


def test_members_are_trained_on_images_changed_as_the_network_was(
    scripts, augmented, collected, model, parts, networks, pair, tmp_path
):
    path, folder = augmented
    network = checkpoint.load_network(path)
    found = datasets.load_augmented("digits", augmentation="affine")
    source = batches.split(
        jax.tree.map(lambda x: x[:NUM], found.train), 100,
        key=jax.random.fold_in(jax.random.key(5), 1), drop_remainder=True,
    )  # fmt: skip
    mine = curves.fge(
        objectives.loss(model.apply, network.state), network.params, source,
        lambda rate: optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, 0.9)),
        high=0.2, low=0.01, cycle_steps=6, num_members=2, transform=found.transform,
        key=jax.random.fold_in(jax.random.key(5), 2),
    )  # fmt: skip
    saved = [checkpoint.load_network(folder / "members" / name) for name in ("00", "01")]
    for member, params in zip(saved, tree.unstack(mine.members), strict=True):
        assert equal(member.params, params)
        # Statistics and scores are of the images as they are.
        fresh = statistics.refresh(model.apply, params, network.state, parts["train"])
        assert equal(member.state, fresh)
        assert member.metadata["training"] == {"augment": "affine"}
    own = at_its_own(model, parts, saved[1].params, network.state, "test")
    assert result(folder)["members"][1]["NLL"] == pytest.approx(float(own["loss"]), rel=1e-4)
    plain = checkpoint.load_network(collected / "members" / "00").params
    assert not equal(saved[0].params, plain)
    # What is asked for goes before what is recorded.
    options = scripts["fge"].Options(network=path, augment="none", out=tmp_path / "run", **FGE)
    scripts["fge"].main(options)
    assert equal(checkpoint.load_network(tmp_path / "run" / "members" / "00").params, plain)
    with pytest.raises(ValueError, match="augment is 'none' there and 'affine' here"):
        scripts["fge"].main(dataclasses.replace(options, augment="as_trained"))
    assert "augmentation affine." in (folder / "report.html").read_text()


def test_a_killed_run_with_augmentation_ends_with_the_same_bits(
    scripts, augmented, tmp_path, monkeypatch
):
    script, (path, folder) = scripts["fge"], augmented
    options = script.Options(network=path, out=tmp_path / "run", **FGE)
    check_killed(script, options, folder, monkeypatch)


# ---------------------------------------------------------------------------- of many networks


def test_an_ensemble_is_scored_as_numpy_scores_it(
    scripts, model, parts, collected, pair, tmp_path, monkeypatch
):
    script = scripts["ensemble"]
    options = script.Options(
        networks=(collected / "members", pair[1]), num_examples=NUM, out=tmp_path / "run"
    )
    counted, calls = stops_after(3, ensemble.log_probabilities)
    monkeypatch.setattr(script.ensemble, "log_probabilities", counted)
    with pytest.raises(KeyboardInterrupt):
        script.main(options)
    script.main(options)
    # Three networks on two parts, and the one that was stopped.
    assert len(calls) == 6 + 1
    monkeypatch.undo()
    found = result(tmp_path / "run")
    paths = [collected / "members" / "00", collected / "members" / "01", pair[1]]
    labels = parts["test"].labels
    test, validation = (
        [probabilities(model, parts, path, part) for path in paths]
        for part in ("test", "validation")
    )
    rows = found["networks"]
    for probs, row in zip(test, rows, strict=False):
        assert row["NLL"] == pytest.approx(nll(probs, labels), rel=1e-4)
        assert row["error"] == pytest.approx(float(np.mean(probs.argmax(1) != labels)))
    averages = {row["network"]: row for row in rows[3:]}
    mean = np.mean(test, 0)
    geometric = np.exp(np.mean(np.log(test), 0))
    geometric /= geometric.sum(1, keepdims=True)
    votes = np.mean([np.eye(10)[x.argmax(1)] for x in test], 0)
    for name, probs in (("probabilities", mean), ("logits", geometric), ("votes", votes)):
        row = averages[f"average of {name}"]
        assert row["error"] == pytest.approx(float(np.mean(probs.argmax(1) != labels)))
        truth = np.eye(10)[labels]
        assert row["Brier"] == pytest.approx(np.square(probs - truth).sum(1).mean(), rel=1e-4)
        if name != "votes":
            assert row["NLL"] == pytest.approx(nll(probs, labels), rel=1e-4)
    # The temperature has seen the validation part alone.
    fitted = ensemble.fit_temperature(
        np.log(np.mean(validation, 0)), np.asarray(parts["validation"].labels, np.int64)
    )
    row = averages["average of probabilities"]
    assert row["temperature"] == pytest.approx(fitted.value, rel=1e-3)
    after = ensemble.calibration(ensemble.tempered(np.log(mean), fitted.value), labels)
    assert row["NLL after"] == pytest.approx(after.nll.value, rel=1e-3)
    assert row["ECE after"] == pytest.approx(after.ece.value, rel=1e-2)
    assert averages["average of votes"]["NLL after"] is None
    running = found["running"]
    assert running[0]["NLL"] == pytest.approx(rows[0]["NLL"], rel=1e-6)
    assert running[-1]["NLL"] == row["NLL"]
    differ = np.mean(test[0].argmax(1) != test[2].argmax(1))
    assert found["disagreement"][0][2] == pytest.approx(float(differ))
    assert found["gains"][0]["gain"] == pytest.approx(
        np.mean([np.square(x - mean).sum(1).mean() for x in test]), rel=1e-4
    )
    for name in ("running", "reliability"):
        assert (tmp_path / "run" / f"{name}.png").exists()
    monkeypatch.setattr(script.ensemble, "log_probabilities", forbidden)
    script.main(options)
    assert result(tmp_path / "run") == found


def test_refreshed_statistics_are_those_of_the_weights(scripts, model, parts, pair, tmp_path):
    scripts["ensemble"].main(
        scripts["ensemble"].Options(
            networks=pair[:1], num_examples=NUM, refresh=True, out=tmp_path / "run"
        )
    )
    network = checkpoint.load_network(pair[0])
    own = at_its_own(model, parts, network.params, network.state, "test")
    row = result(tmp_path / "run")["networks"][0]
    assert row["NLL"] == pytest.approx(float(own["loss"]), rel=1e-4)
    saved = probabilities(model, parts, pair[0])
    assert row["NLL"] < 0.9 * nll(saved, parts["test"].labels)


# ------------------------------------------------------------------------------------ misuse, help


def test_what_does_not_fit_is_refused_in_a_sentence(
    scripts, networks, pair, evaluated, curve, tmp_path
):
    params, _ = models.build("mlp", widths=[8], num_classes=10).init(
        jax.random.key(0), jnp.zeros((1, 8, 8, 1))
    )
    other = tmp_path / "other"
    checkpoint.save_network(
        other, params, {}, model="mlp", options={"widths": [8], "num_classes": 10},
        dataset="digits",
    )  # fmt: skip
    wrong = save(tmp_path / "wrong", params, {}, training={"augment": "cutout"})
    spirals = tmp_path / "spirals"
    checkpoint.save_network(spirals, params, {}, model="mlp", dataset="regression_1d")
    for name, given, words in (
        ("eval_curve", {}, "expected a curve"),
        ("eval_curve", {"curve": pair[0]}, "is no curve"),
        ("eval_curve", {"curve": curve, "num_eval": 1}, "at least 2"),
        ("eval_curve", {"curve": curve, "ensemble_points": 2}, "at least 3 or none"),
        ("chain", {"networks": pair[:1]}, "expected two or more"),
        ("chain", {"networks": (pair[0], other)}, "expected one model"),
        ("chain", {"networks": (pair[0], pair[0])}, "same weights"),
        ("chain", {"networks": pair, "num_eval": 1}, "at least 2"),
        ("fge", {}, "expected a network"),
        ("fge", {"network": pair[0], "cycle_epochs": 3}, "an even number"),
        ("fge", {"network": pair[0], "epochs": 1}, "room for 0 member"),
        ("fge", {"network": pair[0], "lr_1": 0.0}, "expected a positive"),
        ("fge", {"network": pair[0], "lr_2": 1.0}, "not above it"),
        ("fge", {"network": pair[0], "method": "swag", "epochs": 4}, "at least 2"),
        ("fge", {"network": pair[0], "method": "swag", "rank": 1}, "--rank is 1"),
        ("fge", {"network": pair[0], "start": other}, "of another model"),
        ("fge", {"network": spirals}, "no classes"),
        ("ensemble", {}, "expected networks"),
        ("ensemble", {"networks": (pair[0], pair[0])}, "given twice"),
        ("ensemble", {"networks": (spirals,)}, "no classes"),
        ("ensemble", {"networks": pair, "num_bins": 0}, "at least 1"),
    ):
        with pytest.raises(SystemExit, match=words):
            scripts[name].main(scripts[name].Options(**given, out=tmp_path / "none"))
    for given, words in (
        ({"network": wrong}, "unknown augmentation 'cutout'; expected one of none,"),
        ({"network": pair[0], "dataset": "two_spirals", "augment": "affine"}, "is for images, and"),
    ):
        with pytest.raises(ValueError, match=words):
            scripts["fge"].main(scripts["fge"].Options(**given, out=tmp_path / "none"))
    for name, given in (
        ("eval_curve", {"curve": tmp_path / "missing"}),
        ("chain", {"networks": (pair[0], tmp_path / "missing")}),
        ("fge", {"network": tmp_path / "missing"}),
        ("ensemble", {"networks": (tmp_path / "missing",)}),
    ):
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            scripts[name].main(scripts[name].Options(**given, out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    changed = scripts["eval_curve"].Options(
        **(evaluated[1] | {"num_examples": 7}), out=evaluated[0]
    )
    with pytest.raises(ValueError, match="num_examples is 300 there and 7 here"):
        scripts["eval_curve"].main(changed)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_the_defaults_of_the_code(scripts, name, capsys):
    script = scripts[name]
    with pytest.raises(SystemExit):
        script.tyro.cli(script.Options, args=["--help"], description=script.__doc__)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Stop it at any time and call it again" in text
    for field in dataclasses.fields(script.Options):
        assert f"--{field.name.replace('_', '-')}" in text
        if not isinstance(field.default, (bool, tuple)):
            assert f"(default: {field.default})" in text


def test_a_new_curve_in_the_same_place_is_another_run(scripts, evaluated, curve, tmp_path):
    folder, given = evaluated
    moved = tmp_path / "moved"
    shutil.copytree(curve, moved)
    network = checkpoint.load_network(moved / "curve")
    shutil.rmtree(moved / "curve")
    other = jax.tree.map(lambda x: x * 1.01, network.params)
    save(moved / "curve", other, network.state, basis="bezier", num_points=3)
    changed = scripts["eval_curve"].Options(**(given | {"curve": moved}), out=folder)
    with pytest.raises(ValueError, match="another folder"):
        scripts["eval_curve"].main(changed)
