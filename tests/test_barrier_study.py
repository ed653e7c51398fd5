"""The study of barriers as a person runs it, what it skips when called again, and its halves."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from geojax.datasets.splits import class_skewed_split

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATH = ROOT / "scripts" / "barrier_study.py"
SMALL = {
    "model_options": '{"widths": [16, 16]}', "optimizer": "sgd", "learning_rate": 0.05, "epochs": 4,
    "num_points": 5, "num_epochs": 4, "method": "progressive",
}  # fmt: skip


@pytest.fixture(scope="module")
def study():
    """The script as a module, so that its runs share this process and its compiled functions."""
    spec = importlib.util.spec_from_file_location("barrier_study", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["barrier_study"] = module
    spec.loader.exec_module(module)
    return module


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory):
    """A study along training that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    study.main(study.Options(**SMALL, out=folder))
    return folder


def test_a_study_along_training_measures_each_epoch_and_shows_it(whole):
    found = result(whole)
    assert [row["epoch"] for row in found["rows"]] == [0, 1, 2, 4]
    last = json.loads((whole / "points" / "epoch_4_pair_0.json").read_text())
    loss = last["test"]["aligned"]["loss"]
    assert found["rows"][-1]["aligned test loss"] == loss["height"]
    chord = np.linspace(loss["start"], loss["end"], 5)
    assert loss["height"] == pytest.approx((np.array(loss["values"]) - chord).max(), abs=1e-12)
    naive = last["test"]["naive"]["loss"]
    assert loss["start"] == naive["start"]  # the permuted network is the same function
    assert loss["end"] == pytest.approx(naive["end"], rel=1e-5)
    assert loss["height"] < naive["height"]
    untrained = json.loads((whole / "points" / "epoch_0_pair_0.json").read_text())
    assert naive["end"] < untrained["test"]["naive"]["loss"]["end"] - 0.3
    with np.load(whole / "barrier.npz") as figure:
        assert figure["loss barrier y: aligned, test"][-1] == loss["height"]
    page = (whole / "report.html").read_text()
    assert page.count("<figure>") == 2
    assert (whole / "barrier.png").stat().st_size > 10_000


def test_a_stopped_study_goes_on_and_ends_with_the_same_numbers(
    study, whole, tmp_path, monkeypatch
):
    calls = []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return matching(*args, **options)

    matching = study.weight_matching
    monkeypatch.setattr(study, "weight_matching", stopping)
    with pytest.raises(KeyboardInterrupt):
        study.main(study.Options(**SMALL, out=tmp_path))
    assert not (tmp_path / "result.json").exists()
    study.main(study.Options(**SMALL, out=tmp_path))
    assert len(calls) == 3 + 2  # the two points that were there are not measured again
    assert result(tmp_path)["rows"] == result(whole)["rows"]
    study.main(study.Options(**SMALL, out=tmp_path))
    assert len(calls) == 5
    with pytest.raises(ValueError, match="seed is 0 there and 4 here"):
        study.main(study.Options(**SMALL, seed=4, out=tmp_path))


def test_a_study_of_widths_ranks_the_barriers(study, tmp_path):
    options = SMALL | {"epochs": 1, "widths": (4, 8, 16), "model_options": '{"widths": [1]}'}
    study.main(study.Options(study="widths", **options, out=tmp_path))
    found = result(tmp_path)
    heights = [row["aligned train loss"] for row in found["rows"]]
    ranks = np.argsort(np.argsort(heights))
    assert [row["width"] for row in found["rows"]] == [4, 8, 16]
    assert found["spearman"]["train"] == pytest.approx(np.corrcoef([0, 1, 2], ranks)[0, 1])


def test_a_study_of_halves_compares_merged_networks_with_ensembles(study, tmp_path):
    study.main(study.Options(study="split", **SMALL, out=tmp_path))
    found = result(tmp_path)
    point = json.loads((tmp_path / "points" / "pair_0.json").read_text())
    low, high = (np.array(half) for half in found["examples"])
    assert (low[:5] < high[:5]).all()
    assert (low[5:] > high[5:]).all()
    assert low.sum() + high.sum() == 768
    rows = {row["network"]: row for row in found["rows"]}
    # At its ends the ensemble is one network or the other.
    for i, name in ((0, "A"), (-1, "B")):
        assert point["ensemble"]["loss"][i] == pytest.approx(rows[name]["test loss"], rel=1e-5)
        assert point["ensemble"]["error"][i] == pytest.approx(rows[name]["test error"], abs=1e-6)
    assert rows["trained on both"]["test error"] < min(rows[k]["test error"] for k in "AB")


def test_help_gives_every_option_and_its_default():
    found = subprocess.run([sys.executable, str(PATH), "--help"], capture_output=True, text=True)
    assert found.returncode == 0
    text = " ".join(found.stdout.split())
    for option, default in (("--study", "epochs"), ("--num-points", "25"), ("--seed", "0")):
        assert option in text
        assert f"(default: {default})" in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dataset": "mnst"}, "mnst"),
        ({"model_options": "{width"}, "no JSON object"),
        ({"model_options": '{"width": 3}'}, "has no option 'width'"),
        ({"model": "mlpp"}, "there is no model 'mlpp'"),
        ({"pairs": 0}, "at least 1 pair"),
    ],
)
def test_a_mistake_is_answered_before_anything_is_written(study, options, says, tmp_path):
    with pytest.raises((ValueError, SystemExit), match=says):
        study.main(study.Options(**options, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ the halves


def test_halves_are_disjoint_complete_and_exact_in_each_class():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 50))
    first, second = class_skewed_split(labels, key=jax.random.key(0))
    assert np.bincount(labels[first]).tolist() == [10] * 5 + [40] * 5
    assert np.bincount(labels[second]).tolist() == [40] * 5 + [10] * 5
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(500))


def test_halves_depend_on_the_key_alone():
    labels = np.random.default_rng(0).integers(0, 4, 200)
    one, again, other = (class_skewed_split(labels, key=jax.random.key(i)) for i in (0, 0, 1))
    for half in range(2):
        np.testing.assert_array_equal(one[half], again[half])
        assert set(one[half]) != set(other[half])
    scarce = one[0][labels[one[0]] < 2]
    assert scarce.tolist() == [
        3, 5, 7, 24, 34, 38, 41, 51, 90, 93, 123, 129, 154, 170, 177, 193, 196
    ]  # fmt: skip


def test_what_cannot_be_split_is_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="expected integer classes"):
        class_skewed_split(np.ones(3), key=key)
    with pytest.raises(ValueError, match=r"fraction is 1\.5"):
        class_skewed_split(np.zeros(3, int), key=key, fraction=1.5)
    with pytest.raises(ValueError, match="range from 0 to 3"):
        class_skewed_split(np.arange(4), key=key, num_classes=3)
