"""Grow a simplex of low loss from each of several networks, and average networks drawn from them.

The networks are ones that scripts/train.py saved (or `checkpoint.save_network`), of one model and
one data set. The simplexes grow side by side (ESPRO); then networks are drawn from each, with
normalisation statistics of their own, and their predictions averaged, first within a simplex and
then over simplexes. Beside it stands the plain ensemble of the networks. All is measured on the
test part; the temperature is fitted on the validation part, which neither training nor test has
seen. With --complexes nothing is grown: the folders are ones that scripts/simplex.py or
scripts/complex.py wrote. The folder gets a report, the simplexes as checkpoints, figures with their
data, all numbers as JSON, and a log of the training as JSON lines, where stage 0 is the first
vertex added to each. Stop it at any time and call it again with the same options: it goes on from
its last checkpoint.

There is no --align: a simplex that grows from one network in other units holds the same functions,
so that predictions would not gain. Complexes of aligned networks are averaged as they are.

  python scripts/train.py --seed 0 --out out/a
  python scripts/train.py --seed 1 --out out/b
  python scripts/espro.py --networks out/a/network out/b/network
  python scripts/espro.py --complexes out/complex
"""

import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

import complex as growing
import ensemble as averaging
import jax
import numpy as np
import tyro

import geojax
from geojax import checkpoint, ensemble, objectives, plot, report, simplex, tree


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the ensemble of simplexes."""

    networks: tuple[pathlib.Path, ...] = ()
    """The folders of the networks, from each of which a simplex grows."""
    complexes: tuple[pathlib.Path, ...] = ()
    """Instead of networks: folders of scripts/simplex.py or scripts/complex.py."""
    num_vertices: int = 3
    """Of each simplex, the network counted."""
    num_members: int = 25
    """Networks drawn from each simplex for the predictions."""
    volume_weight: float = 1e-2
    """What a unit of log volume is worth in units of the loss; 0 for none."""
    num_samples: int = 5
    """Points drawn from each simplex in a step; each costs a gradient."""
    dataset: str | None = None
    """The data set; by default the one that the first network was trained on."""
    data_dir: pathlib.Path | None = None
    """Where archives and prepared folders lie; by default GEOJAX_DATA_DIR."""
    num_examples: int | None = None
    """The first examples of each part, for training as for measuring; by default all."""
    epochs: int = 20
    """Passes over the training part for each new vertex."""
    batch_size: int = 128
    """Examples in a step; what is left over at the end of an epoch is left out of it."""
    learning_rate: float = 0.01
    """The rate of SGD with momentum 0.9, which falls to zero by a cosine for each new vertex."""
    weight_decay: float = 0.0
    """The factor of half the squared norm of the points drawn, added to their loss."""
    num_eval: int = 25
    """Points at which the loss of each stage's simplexes is measured."""
    num_bins: int = 15
    """Bins of equal width of the reliability diagram and of the calibration error."""
    seed: int = 0
    """The seed of draws, order and dropout."""
    out: pathlib.Path = pathlib.Path("out/espro")
    """The folder of the results."""
    checkpoint_every: float = 10.0
    """Epochs between checkpoints."""


class Subject(NamedTuple):
    """What is averaged: one entry for each simplex or complex, and the networks by themselves."""

    names: list[str]
    complexes: list[simplex.SimplicialComplex] | None
    networks: dict[str, Any]
    first: checkpoint.Network


def load(options: Options) -> Subject:
    if bool(options.networks) == bool(options.complexes):
        raise ValueError(
            "expected --networks out/a/network out/b/network or --complexes out/simplex, got "
            f"{'both' if options.networks else 'neither'}."
        )
    growing.check(options)
    for flag, least in (("num_vertices", 2), ("num_members", 1), ("num_bins", 1)):
        value = getattr(options, flag)
        if value < least:
            raise ValueError(f"--{flag.replace('_', '-')} is {value}; expected at least {least}.")
    paths = options.networks or options.complexes
    if len(set(paths)) < len(paths):
        raise ValueError(f"a folder is given twice: {', '.join(map(str, paths))}.")
    names = averaging.labels_of(list(paths)) if len(paths) > 1 else [paths[0].name]
    if options.networks:
        networks = growing.read(paths)
        params = {name: one.params for name, one in zip(names, networks, strict=True)}
        return Subject(names, None, params, networks[0])
    found = [growing.load_complex(path) for path in paths]
    first, modes = found[0][1], {}
    for path, name, (one, network) in zip(paths, names, found, strict=True):
        if (network.model, network.options) != (first.model, first.options):
            raise ValueError(
                f"{path} is of {network.model} {network.options}, and {paths[0]} of {first.model} "
                f"{first.options}; expected one model."
            )
        for i in range(network.metadata["num_networks"]):
            modes[f"{name} w{i}"] = simplex.vertex(one, i)
    return Subject(names, [one for one, _ in found], modes, first)


def grow(options: Options, setup: Any, name: str, subject: Subject) -> tuple[list[Any], Any]:
    """The simplexes and the facts of their stages; once they are there, nothing is trained."""
    modes = list(subject.networks.values())
    folders = [options.out / "simplexes" / str(i) for i in range(len(modes))]

    def make():
        with growing.Heard() as notes:
            found = simplex.espro(
                objectives.loss(setup.model.apply, setup.state, setup.task),
                tree.stack(modes),
                setup.train,
                num_vertices=options.num_vertices,
                **growing.growth(options, setup, options.out),
            )
        for folder, one in zip(folders, found.complexes, strict=True):
            growing.save_complex(
                folder, one, subject.first, dataset=name, seed=options.seed, num_networks=1
            )
        rows = [
            {"simplex": label} | stage.row()
            for stages in found.stages
            for label, stage in zip(subject.names, stages, strict=True)
        ]
        return {
            "stages": growing.finite(json.loads(json.dumps(rows, default=float))),
            "notes": notes,
        }

    grown = growing.kept(options.out, "stages", make)
    complexes = [growing.load_complex(folder)[0] for folder in folders]
    for folder, one, mode in zip(folders, complexes, modes, strict=True):
        if growing.contents(simplex.vertex(one, 0)) != growing.contents(mode):
            raise ValueError(f"{folder} grew from another network; choose another folder (--out).")
    return complexes, grown


def predicted(options: Options, setup: Any, parts: dict[str, Any], complexes: list[Any]) -> Any:
    """The log-probabilities by part, averaged within each simplex; kept once computed."""

    def model_fn(params, *rest):
        state = rest[0] if len(rest) == 2 else {}
        return setup.model.apply(params, state, rest[-1].inputs, False)[0]

    key = jax.random.fold_in(jax.random.key(options.seed), 4)
    folder = options.out / "state"
    folder.mkdir(parents=True, exist_ok=True)
    found, growth = [], []
    for i, one in enumerate(complexes):
        made = {}
        for part in ("validation", "test"):
            if part not in parts:
                continue
            path = folder / f"{part}-{i}.npz"
            if not path.exists():
                running = simplex.running(
                    model_fn, one, parts[part], key=jax.random.fold_in(key, i),
                    num_samples=options.num_members, state_fn=setup.state_fn,
                )  # fmt: skip
                with open(path.with_suffix(".partial"), "wb") as file:
                    np.savez(file, log_probs=running.log_probs, **running.ensemble)
                os.replace(path.with_suffix(".partial"), path)
            with np.load(path) as saved:
                made[part] = saved["log_probs"]
                if part == "test":
                    growth.append({m: saved[m] for m in ("loss", "error", "brier", "ece")})
        found.append(made)
    return found, growth


def alone(options: Options, setup: Any, parts: dict[str, Any], subject: Subject) -> list[dict]:
    """The log-probabilities of each network by itself; kept once computed."""

    def model_fn(variables, batch):
        return setup.model.apply(*variables, batch.inputs, False)[0]

    folder, found = options.out / "state", []
    folder.mkdir(parents=True, exist_ok=True)
    for i, params in enumerate(subject.networks.values()):
        made = {}
        for part in ("validation", "test"):
            if part not in parts:
                continue
            path = folder / f"network-{i}-{part}.npy"
            if not path.exists():
                state = {} if setup.state_fn is None else setup.state_fn(params)
                outputs = ensemble.log_probabilities(model_fn, (params, state), parts[part])
                with open(path.with_suffix(".partial"), "wb") as file:
                    np.save(file, outputs)
                os.replace(path.with_suffix(".partial"), path)
            made[part] = np.load(path)
        found.append(made)
    return found


def figure(
    counts: dict[str, list[dict[str, Any]]], within: list[dict[str, np.ndarray]], names: list[str]
) -> tuple[bytes, dict[str, Any]]:
    """How both ensembles grow, and how the average within each simplex settles."""
    panels = []
    for metric in ("NLL", "error"):
        lines = {
            kind: (np.arange(1, 1 + len(rows)), [row[metric] for row in rows])
            for kind, rows in counts.items()
        }
        panels.append(
            {
                "x": "simplexes or networks",
                "y": "test NLL (nats)" if metric == "NLL" else f"test {metric}",
                "percent": metric != "NLL",
                "integers": True,
                "legend": "above",
                # A line of one point cannot be seen.
                "lines": {kind: line for kind, line in lines.items() if len(line[0]) > 1},
                "marks": {kind: line for kind, line in lines.items() if len(line[0]) == 1},
            }
        )
    members = np.arange(1, 1 + len(within[0]["loss"]))
    if len(members) > 1:
        panels.append(
            {
                "x": "members of a simplex",
                "y": "test NLL (nats)",
                "integers": True,
                "legend": "above",
                "lines": {
                    name: (members, growth["loss"])
                    for name, growth in zip(names, within, strict=True)
                },
            }
        )
    data = {
        f"{name}_{metric}": [row[metric] for row in rows]
        for name, rows in counts.items()
        for metric in ("NLL", "error", "Brier", "ECE")
    } | {f"members_{m}": np.stack([growth[m] for growth in within]) for m in within[0]}
    return plot.png(plot.curves(panels, size=(2.9, 2.7))), data


def main(options: Options) -> None:
    start = time.perf_counter()
    subject = load(options)
    name, data = growing.load_data(options, subject.first)
    if data.num_classes is None:
        raise ValueError(f"{name} has no classes, and predictions are averaged over classes.")
    setup = growing.make_setup(options, subject.first, data)
    parts, truth = averaging.load_parts(options, data)
    digests = [
        [growing.contents(x), getattr(x, "simplices", ())]
        for x in subject.complexes or subject.networks.values()
    ]
    # A folder is claimed once the options are known to be good.
    report.claim(
        options.out,
        dataclasses.asdict(options) | {"contents": digests},
        may_differ=(
            "data_dir", "out", "networks", "complexes", "checkpoint_every", "num_bins"
        ),
    )  # fmt: skip
    size = tree.size(next(iter(subject.networks.values())))
    facts = (
        f"geojax {geojax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}; "
        f"{subject.first.model}, {size:,} weights; {name}; {len(subject.names)} "
        f"{'simplexes' if subject.complexes is None else 'complexes'}, {options.num_members} "
        f"members of each; seed {options.seed}"
    )
    print(facts)
    page = report.Report(options.out, "An ensemble of simplexes", facts)
    numbers: dict[str, Any] = {"facts": facts}
    begun = time.perf_counter()
    if subject.complexes is None:
        complexes, grown = grow(options, setup, name, subject)
        trained = (
            f"{options.epochs} epochs, {options.epochs * len(setup.train)} steps of "
            f"{setup.train.batch_size} examples for each vertex, SGD with momentum 0.9, highest "
            f"rate {options.learning_rate:g}; {options.num_samples} point(s) in a step, weight of "
            f"the volume {options.volume_weight:g}."
        )
        page.chapter("Growth", trained)
        rows = [
            {n: math.nan if x is None else x for n, x in row.items()} for row in grown["stages"]
        ]
        page.table(rows)
        seconds = time.perf_counter() - begun
        print(f"\nGrowth: {trained} ({seconds:.0f} s)\n{report.text_table(rows)}")
        for note in grown["notes"]:
            page.text(f"Note: {note}")
            print(f"Note: {note}")
        numbers |= {"stages": grown["stages"], "notes": grown["notes"]}
    else:
        complexes = subject.complexes
    found, within = predicted(options, setup, parts, complexes)
    single = alone(options, setup, parts, subject)

    def averaged(given: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {part: ensemble.average([x[part] for x in given]) for part in given[0]}

    def scored(given: list[dict[str, np.ndarray]]) -> averaging.Scored:
        return averaging.score(options, averaged(given), truth)  # pyright: ignore

    counts = {
        kind: [scored(given[: i + 1]) for i in range(len(given))]
        for kind, given in (("simplexes", found), ("networks", single))
    }
    rows = [
        {"prediction": f"network {label}"} | scored([one]).row
        for label, one in zip(subject.networks, single, strict=True)
    ]
    rows += [
        {"prediction": f"simplex {label}"} | scored([one]).row
        for label, one in zip(subject.names, found, strict=True)
    ]
    rows += [
        {"prediction": f"all {kind} ({len(given)})"} | given[-1].row
        for kind, given in (("networks", counts["networks"]), ("simplexes", counts["simplexes"]))
    ]
    page.chapter(
        "Predictions",
        f"Probabilities averaged over {options.num_members} networks drawn from each simplex, and "
        "over simplexes; beside it over the networks themselves. All on the test part; errors and "
        "calibration errors as fractions. "
        + (
            f"Temperatures are fitted on the {len(truth['validation'])} validation examples, and "
            "'after' is with them, on the test part."
            if "validation" in parts
            else "There is no validation part to fit a temperature on."
        )
        + (
            " Every member has normalisation statistics of its own, from the training part."
            if setup.state_fn
            else ""
        ),
    )
    page.table(rows)
    print(f"\nPredictions\n{report.text_table(rows)}")
    plain = {kind: [x.row for x in given] for kind, given in counts.items()}
    image, arrays = figure(plain, within, subject.names)
    page.figure(
        "running", image,
        "The average over the first simplexes and over the first networks; and, within each "
        "simplex, over the first members.", arrays,
    )  # fmt: skip
    last = counts["simplexes"][-1]
    shown = {"networks": counts["networks"][-1].before, "simplexes": last.before}
    if last.after is not None:
        shown["with temperature"] = last.after
    page.chapter("Reliability", "Accuracy against confidence, on the test part.")
    page.figure(
        "reliability", plot.png(plot.reliability(shown)),
        "A calibrated prediction lies on the diagonal; bars are 95 % intervals.",
        {
            f"{label}_{field}".replace(" ", "_"): getattr(x.bins, field)
            for label, x in shown.items()
            for field in ("edges", "counts", "confidence", "accuracy", "standard_error")
        },
    )  # fmt: skip
    numbers |= {"predictions": rows, "running": plain, "within": [
        {metric: values.tolist() for metric, values in growth.items()} for growth in within
    ]}  # fmt: skip
    (options.out / "result.json").write_text(json.dumps(growing.finite(numbers), indent=2) + "\n")
    print(f"\n{page.write().resolve()}  ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        sys.exit(f"espro: {error}")
    except KeyboardInterrupt:
        sys.exit("espro: stopped; the same command goes on from the last checkpoint.")
