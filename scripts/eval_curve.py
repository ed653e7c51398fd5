"""Measure a trained curve finely, and the ensembles of networks along it.

The curve is one that scripts/connect.py trained. At each position, equally spaced in t or in arc
length, the loss and the error on both parts are measured with normalisation statistics of the
position's own. Then the predictions of networks along the curve, at equal distances in arc length,
are averaged, all of them and each with that of t=0. The folder gets a report, figures with their
data, and all numbers as JSON. Stop it at any time and call it again with the same options: it goes
on from the position where it was.

  python scripts/train.py --seed 0 --out out/a
  python scripts/train.py --seed 1 --out out/b
  python scripts/connect.py --networks out/a/network out/b/network
  python scripts/eval_curve.py --curve out/connect
  python scripts/eval_curve.py --curve out/connect --num-eval 241 --spacing arc_length
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
import time
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro

import geojax
from geojax import (
    batches,
    checkpoint,
    curves,
    datasets,
    ensemble,
    objectives,
    plot,
    progress,
    report,
    statistics,
    tree,
)

METRICS = ("loss", "loss + decay", "error")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the evaluation."""

    curve: pathlib.Path | None = None
    """The folder that scripts/connect.py wrote."""
    num_eval: int = 61
    """Positions at which loss and error are measured."""
    spacing: Literal["t", "arc_length"] = "t"
    """Whether the positions are equally spaced in t or in arc length."""
    ensemble_points: int = 20
    """Networks along the curve whose predictions are averaged; 0 for none."""
    dataset: str | None = None
    """The data set; by default the one that the curve was trained on."""
    data_dir: pathlib.Path | None = None
    """Where archives and prepared folders lie; by default GEOJAX_DATA_DIR."""
    num_examples: int | None = None
    """The first examples of each part; by default all."""
    weight_decay: float = 5e-4
    """The factor of half the squared norm of the point in 'loss + decay'."""
    out: pathlib.Path = pathlib.Path("out/eval_curve")
    """The folder of the results."""


class Curve(NamedTuple):
    """A trained curve and its data."""

    network: checkpoint.Network
    basis: Any
    points: Any
    model: Any
    state: Any
    parts: dict[str, Any]
    averaged: dict[str, Any]
    labels: Any


def load(options: Options) -> tuple[checkpoint.Network, Any]:
    if options.curve is None:
        sys.exit("eval_curve: expected a curve: --curve out/connect.")
    if options.num_eval < 2 or options.ensemble_points in (1, 2) or options.ensemble_points < 0:
        sys.exit(
            f"eval_curve: --num-eval is {options.num_eval} and --ensemble-points "
            f"{options.ensemble_points}; expected at least 2, and at least 3 or none."
        )
    folder = options.curve
    found = checkpoint.load_network(folder / "curve" if (folder / "curve").is_dir() else folder)
    kind = found.metadata.get("basis")
    if kind not in ("bezier", "polychain"):
        sys.exit(
            f"eval_curve: {folder} is no curve; expected the folder that scripts/connect.py wrote."
        )
    return found, getattr(curves, kind)(found.metadata["num_points"])


def contents(params: Any) -> str:
    """What tells a curve from another one that was saved to the same path later."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()[:16]


def kept(folder: pathlib.Path, name: str, make: Any) -> Any:
    """What `make` measures, read from the folder where it was measured before."""
    path = folder / "state" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".partial")
        whole.write_text(json.dumps(make()) + "\n")
        os.replace(whole, path)
    return json.loads(path.read_text())


def make_curve(
    options: Options, network: checkpoint.Network, basis: Any, data: datasets.Dataset
) -> Curve:
    model = network.build()
    task = "regression" if data.num_classes is None else "classification"
    examples = {
        part: jax.tree.map(lambda x: x[: options.num_examples], getattr(data, part))
        for part in ("train", "test")
    }
    parts = {part: batches.split(given, 1000) for part, given in examples.items()}
    with_state = objectives.metrics_with_state(model.apply, task)

    def metrics_fn(params, state, batch):
        found = with_state(params, state, batch)
        penalty = 0.5 * options.weight_decay * tree.vdot(params, params)
        return found | {"loss + decay": found["loss"] + penalty.astype(found["loss"].dtype)}

    averaged = {part: batches.mean(metrics_fn, source) for part, source in parts.items()}
    labels = np.asarray(examples["test"].labels).astype(np.int64) if data.num_classes else None
    state = {} if network.state is None else network.state
    return Curve(network, basis, network.params, model, state, parts, averaged, labels)


def at(curve: Curve, t: float) -> tuple[Any, Any]:
    """The network at a position, with statistics of its own."""
    params = curves.point(curve.basis, curve.points, t)
    if not jax.tree.leaves(curve.state):
        return params, curve.state
    return params, statistics.refresh(curve.model.apply, params, curve.state, curve.parts["train"])


def measure(options: Options, curve: Curve, ts: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """The metrics of both parts at all positions, each measured once."""
    rows = []
    with progress.bar(len(ts), "curve") as update:
        for i, t in enumerate(ts):

            def make(t=t):
                variables = at(curve, float(t))
                return {
                    part: {name: float(x) for name, x in mean(*variables).items()}
                    for part, mean in curve.averaged.items()
                }

            name = f"{options.num_eval}-in-{options.spacing}/{i:04d}"
            rows.append(kept(options.out, name, make))
            update(i + 1)
    return {
        part: {
            metric: [row[part][metric] for row in rows]
            for metric in METRICS
            if metric in rows[0][part]
        }
        for part in curve.parts
    }


def outputs(options: Options, curve: Curve, ts: np.ndarray) -> list[np.ndarray]:
    """The log-probabilities of the networks at these positions, on the test part."""

    def model_fn(variables, batch):
        return curve.model.apply(variables[0], variables[1], batch.inputs, False)[0]

    found = []
    with progress.bar(len(ts), "ensemble") as update:
        for i, t in enumerate(ts):
            path = options.out / "state" / f"outputs-{len(ts)}" / f"{i:04d}.npy"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                given = ensemble.log_probabilities(
                    model_fn, at(curve, float(t)), curve.parts["test"]
                )
                with open(path.with_suffix(".partial"), "wb") as file:
                    np.save(file, given)
                os.replace(path.with_suffix(".partial"), path)
            found.append(np.load(path))
            update(i + 1)
    return found


def scores(log_probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    found = ensemble.calibration(log_probs, labels)
    return {
        "NLL": found.nll.value,
        "error": 1 - found.accuracy.value,
        "Brier": found.brier.value,
        "ECE": found.ece.value,
    }


def ensembles(logs: list[np.ndarray], labels: np.ndarray, ts: np.ndarray):
    """What averages of networks along the curve are worth; and each position with t=0."""
    alone = [scores(x, labels) for x in logs]
    pairs = [scores(ensemble.average([logs[0], x]), labels) for x in logs]
    num = len(logs)
    rows = [
        {"prediction": name} | value
        for name, value in (
            ("the network at t=0", alone[0]),
            ("the network at t=1", alone[-1]),
            (
                f"mean of the {num} networks' scores",
                {metric: float(np.mean([x[metric] for x in alone])) for metric in alone[0]},
            ),
            ("average of the two ends", pairs[-1]),
            (f"average of the {num} networks", scores(ensemble.average(logs), labels)),
        )
    ]
    first = logs[0].argmax(-1)
    along = {
        "ts": ts.tolist(),
        "error": [x["error"] for x in alone],
        "NLL": [x["NLL"] for x in alone],
        "error with t=0": [x["error"] for x in pairs],
        "NLL with t=0": [x["NLL"] for x in pairs],
        "disagreement with t=0": [float(np.mean(x.argmax(-1) != first)) for x in logs],
    }
    return rows, along


def main(options: Options) -> None:
    start = time.perf_counter()
    network, basis = load(options)
    name = options.dataset or network.metadata["dataset"]
    if name is None:
        sys.exit("eval_curve: the curve does not say what it was trained on; give --dataset.")
    data = datasets.load(name, options.data_dir)
    curve = make_curve(options, network, basis, data)
    # A folder is claimed once the options are known to be good.
    report.claim(
        options.out,
        dataclasses.asdict(options) | {"contents": contents(network.params)},
        may_differ=("data_dir", "out", "num_eval", "spacing", "ensemble_points", "curve"),
    )
    num_points = network.metadata["num_points"]
    facts = (
        f"geojax {geojax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}; "
        f"{network.model}, {tree.size(network.params) // num_points:,} weights; {name}; "
        f"{network.metadata['basis']} with {num_points} control points"
    )
    print(facts)
    speed = curves.speed(basis, network.params)
    spaced = options.spacing == "arc_length"
    ts = np.linspace(0, 1, options.num_eval)
    ts = curves.arc_length_ts(basis, network.params, options.num_eval) if spaced else ts
    lengths = np.interp(ts, speed.ts, speed.lengths)
    ends = tree.unstack(network.params)
    chord = float(tree.norm(tree.axpy(-1.0, ends[0], ends[-1])))
    found = measure(options, curve, ts)
    rows = []
    for part, metrics in found.items():
        for metric, values in metrics.items():
            x = curves.summarize(ts, lengths, np.array(values))
            rows.append(
                {
                    "part": part, "metric": metric, "at t=0": x.start, "at t=1": x.end,
                    "lowest": x.lowest, "highest": x.highest, "at t": x.t_highest, "mean": x.mean,
                    "integral": x.integral, "barrier": x.barrier,
                }
            )  # fmt: skip
    shape = {
        "length": float(speed.lengths[-1]),
        "chord": chord,
        "length / chord": float(speed.lengths[-1]) / chord if chord else math.nan,
    }
    page = report.Report(options.out, "A curve, measured", facts)
    page.chapter(
        "Along the curve",
        f"At {options.num_eval} positions, equally spaced in "
        + ("arc length." if spaced else "t.")
        + f" The curve is {shape['length']:.4g} long and its ends are {chord:.4g} apart: "
        f"{shape['length / chord']:.4g} times the straight way.",
    )
    page.text(
        "Lowest, highest and mean are over the positions measured, the integral is the mean over "
        "arc length, the barrier the largest rise above the straight line between the two end "
        "values, over t. The table gives errors as fractions."
        + (
            " The statistics of the network's normalisation are those of each point, from the "
            "training part."
            if jax.tree.leaves(curve.state)
            else ""
        )
    )
    page.table(rows)
    print(f"\nAlong the curve, at {options.num_eval} positions\n{report.text_table(rows)}")
    print(f"\nlength {shape['length']:.4g}, chord {chord:.4g}: {shape['length / chord']:.4g} times")
    image, arrays = figure(found, ts, lengths, spaced)
    page.figure("along", image, "Loss and error along the curve.", arrays)
    numbers: dict[str, Any] = {"facts": facts, "rows": rows, **shape, "ts": ts.tolist()}
    numbers |= {"lengths": lengths.tolist(), "along": found}
    if options.ensemble_points and curve.labels is not None:
        places = curves.arc_length_ts(basis, network.params, options.ensemble_points)
        logs = outputs(options, curve, places)
        compared, along = ensembles(logs, curve.labels, places)
        numbers |= {"ensembles": compared, "with t=0": along}
        page.chapter(
            "Ensembles along it",
            f"Of {options.ensemble_points} networks at equal distances in arc length, on the test "
            "part; probabilities are averaged.",
        )
        page.table(compared)
        print(f"\nEnsembles along it, on the test part\n{report.text_table(compared)}")
        fractions = np.linspace(0, 1, len(places))
        page.figure(
            "ensembles", plot.png(plot.curves(pair_panels(fractions, along), size=(2.8, 2.7))),
            "The network at a position alone, its prediction averaged with that of the network at "
            "t=0, and how often the two predict different classes.",
            {key.replace(" ", "_").replace("=", ""): x for key, x in along.items()}
            | {"fractions": fractions},
        )  # fmt: skip
    (options.out / "result.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"\n{page.write().resolve()}  ({time.perf_counter() - start:.0f} s)")


def figure(found: dict[str, Any], ts: np.ndarray, lengths: np.ndarray, spaced: bool):
    """Loss and error on both parts."""
    x = lengths if spaced else ts
    metrics = [metric for metric in ("loss", "error") if metric in found["train"]]
    panels = [
        {
            "x": "distance along the curve" if spaced else "position t",
            "y": "loss (nats)" if metric == "loss" and "error" in metrics else metric,
            "percent": metric == "error",
            "legend": "above",
            "lines": {part: (x, values[metric]) for part, values in found.items()},
        }
        for metric in metrics
    ]
    data = {"ts": ts, "lengths": lengths} | {
        f"{part}_{metric.replace(' + ', '_with_')}": values
        for part, given in found.items()
        for metric, values in given.items()
    }
    return plot.png(plot.curves(panels, size=(3.9, 2.7))), data


def pair_panels(x: np.ndarray, along: dict[str, list[float]]) -> list[dict[str, Any]]:
    common = {"x": "part of the length", "legend": "above"}
    return [
        common | {"y": "test NLL (nats)", "lines": {
            "alone": (x, along["NLL"]), "with t=0": (x, along["NLL with t=0"])}},
        common | {"y": "test error", "percent": True, "lines": {
            "alone": (x, along["error"]), "with t=0": (x, along["error with t=0"])}},
        common | {"y": "disagreement with t=0", "percent": True, "lines": {
            "disagreement": (x, along["disagreement with t=0"])}},
    ]  # fmt: skip


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        sys.exit(f"eval_curve: {error}")
    except KeyboardInterrupt:
        sys.exit("eval_curve: stopped; the same command goes on from the position where it was.")
