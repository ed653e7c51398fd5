"""Aligning and merging checkpoints as a person does it."""

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
    datasets,
    fit,
    models,
    objectives,
    permute,
    statistics,
    symmetry,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent
OPTIONS = {"widths": [16, 16], "num_classes": 10, "norm": "batch"}


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rebasin():
    return script("rebasin")


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A network with BatchNorm, and two permuted and disturbed copies of it."""
    folder = tmp_path_factory.mktemp("networks")
    model = models.build("mlp", **OPTIONS)
    train = datasets.load("digits").train
    inputs = train.inputs[:2]
    params, state = model.init(jax.random.key(0), inputs)
    source = batches.split(train, 128, drop_remainder=True)
    params = fit.fit(
        objectives.loss(model.apply, state), params, source, optax.sgd(0.1), 120,
        key=jax.random.key(1),
    ).params  # fmt: skip
    state = statistics.refresh(model.apply, params, state, source)
    rng = np.random.default_rng(0)

    def disturbed(tree, scale):
        return jax.tree.map(
            lambda x: x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), tree
        )

    variables = {"params": params, "state": state}
    spec = symmetry.permutation_spec(
        lambda v, x: model.apply(v["params"], v["state"], x, False)[0], variables, inputs
    )
    paths = []
    for i in range(3):
        moved = permute.apply_permutation(
            spec, permute.random_permutation(jax.random.key(i), spec), variables
        )
        paths.append(folder / f"run-{i}" / "network")
        checkpoint.save_network(
            paths[-1], disturbed(moved["params"], 0.01), moved["state"], model="mlp",
            options=OPTIONS, dataset="digits", seed=i,
        )  # fmt: skip
    return paths


def rows(folder):
    found = json.loads((folder / "result.json").read_text())
    return found, {row["network"]: row for row in found["networks"]}


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_two_checkpoints_are_aligned_and_merged_by_name(rebasin, networks, tmp_path, by):
    options = rebasin.Options(
        networks=tuple(networks[:2]), by=by, num_points=3, num_examples=200, out=tmp_path / by
    )
    rebasin.main(options)
    found, table = rows(tmp_path / by)
    before = found["lines"]["1-test-before"]["loss"]["height"]
    after = found["lines"]["1-test-after"]["loss"]["height"]
    assert before > 0.1
    assert abs(after) < 0.01
    own, naive, mean = (
        table[name]["test loss"] for name in ("run-0/network", "mean, not aligned", "mean, aligned")
    )
    assert abs(mean - own) < 0.05 < naive - own
    merged = checkpoint.load_network(tmp_path / by / "merged")
    assert merged.build().apply is not None
    spec = symmetry.PermutationSpec.from_json((tmp_path / by / "spec.json").read_text())
    assert len(spec.groups) == 2
    assert any(leaf.statistic for leaf in spec.leaves)
    assert "line-1.png" in {path.name for path in (tmp_path / by).rglob("*.png")}


def test_a_second_call_measures_nothing_anew(rebasin, networks, tmp_path, monkeypatch):
    options = rebasin.Options(
        networks=tuple(networks), num_points=3, num_examples=200, repair=True, out=tmp_path / "a"
    )
    rebasin.main(options)
    first, table = rows(tmp_path / "a")
    assert "mean, aligned, REPAIR" in table
    assert set(first["lines"]) == {
        f"{i}-{part}-{when}"
        for i in (1, 2) for part in ("train", "test") for when in ("before", "after")
    }  # fmt: skip

    def forbidden(*args, **kwargs):
        raise AssertionError("a line was measured again")

    monkeypatch.setattr(permute, "barrier", forbidden)
    rebasin.main(options)
    assert rows(tmp_path / "a")[0]["lines"] == first["lines"]


def test_other_weights_at_the_same_path_are_no_second_call(rebasin, networks, tmp_path):
    moving = tmp_path / "b"
    shutil.copytree(networks[1], moving)
    options = rebasin.Options(
        networks=(networks[0], moving), num_points=3, num_examples=100, out=tmp_path / "out"
    )
    rebasin.main(options)
    shutil.rmtree(moving)
    shutil.copytree(networks[2], moving)
    with pytest.raises(ValueError, match="weights is"):
        rebasin.main(options)


def test_one_network_or_two_models_are_refused_in_a_sentence(rebasin, networks, tmp_path):
    with pytest.raises(SystemExit, match="at least two networks"):
        rebasin.main(rebasin.Options(networks=tuple(networks[:1]), out=tmp_path))
    model = models.build("mlp", widths=[8], num_classes=10)
    params, _ = model.init(jax.random.key(0), datasets.load("digits").train.inputs[:2])
    other = tmp_path / "other"
    checkpoint.save_network(
        other, params, None, model="mlp", options={"widths": [8], "num_classes": 10}
    )
    with pytest.raises(SystemExit, match="expected one model"):
        rebasin.main(rebasin.Options(networks=(networks[0], other), out=tmp_path))


def test_help_says_what_it_does():
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "rebasin.py"), "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--networks" in run.stdout
    assert "Git Re-Basin" in run.stdout


def test_many_networks_are_trained_merged_and_set_against_their_ensemble(tmp_path, monkeypatch):
    many = script("merge_many")
    options = many.Options(
        num_networks=3, epochs=6, model_options='{"widths": [24, 24]}', repair=True, out=tmp_path
    )
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes integers and floats
        many.main(options)
    found = json.loads((tmp_path / "result.json").read_text())
    table = {row["network"]: row for row in found["merged"]}
    assert table["mean, aligned"]["test NLL"] < table["mean, not aligned"]["test NLL"]
    singles = np.mean([x["test loss"] for x in found["networks"]])
    assert table["ensemble of all"]["test NLL"] < singles
    assert len(found["networks"]) == 3
    assert checkpoint.load_network(tmp_path / "merged").model == "mlp"

    def forbidden(*args, **kwargs):
        raise AssertionError("a network was trained again")

    monkeypatch.setattr(many.fit, "fit", forbidden)
    many.main(options)
