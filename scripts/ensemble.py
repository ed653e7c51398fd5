"""Average the predictions of trained networks, and say what that is worth: error, NLL, calibration.

The networks are ones that scripts/train.py, scripts/fge.py or `checkpoint.save_network` saved, of
one data set; their models may differ. A folder of networks stands for all that are in it. All is
measured on the test part; the temperature is fitted on the validation part, which neither training
nor test has seen. The folder gets a report, a reliability diagram with its data, and all numbers as
JSON. Stop it at any time and call it again with the same options: it goes on from the network where
it was.

  python scripts/train.py --seed 0 --out out/a
  python scripts/train.py --seed 1 --out out/b
  python scripts/ensemble.py --networks out/a/network out/b/network
  python scripts/ensemble.py --networks out/fge/members
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
    datasets,
    ensemble,
    plot,
    report,
    statistics,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the ensemble."""

    networks: tuple[pathlib.Path, ...] = ()
    """The folders of the networks, or folders of such folders."""
    average: Literal["probabilities", "logits", "votes"] = "probabilities"
    """What is averaged as the ensemble grows and in the figures; all three are compared."""
    dataset: str | None = None
    """The data set; by default the one that the first network was trained on."""
    data_dir: pathlib.Path | None = None
    """Where archives and prepared folders lie; by default GEOJAX_DATA_DIR."""
    num_examples: int | None = None
    """The first examples of each part; by default all."""
    refresh: bool = False
    """Whether to measure the statistics of normalisation anew, on the training part."""
    num_bins: int = 15
    """Bins of equal width of the reliability diagram and of the calibration error."""
    out: pathlib.Path = pathlib.Path("out/ensemble")
    """The folder of the results."""


class Member(NamedTuple):
    """One of the networks, which is read again when its turn comes."""

    name: str
    path: pathlib.Path
    contents: str
    metadata: dict[str, Any]


def labels_of(paths: list[pathlib.Path]) -> list[str]:
    """The shortest parts of the paths that tell them apart: out/a/network is a."""
    # A run's folder says more than the "network" in it.
    parts = [p.parts[:-1] if p.parts[1:] and p.name == "network" else p.parts for p in paths]
    while len(parts) > 1 and len({p[-1:] for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[:-1] for p in parts]
    for length in range(1, 1 + max(map(len, parts))):
        ends = ["/".join(p[-length:]) for p in parts]
        if len(set(ends)) == len(ends):
            return ends
    sys.exit(f"ensemble: a network is given twice: {', '.join(map(str, paths))}.")


def is_saved(path: pathlib.Path) -> bool:
    return (path / "geojax.json").exists()


def find(options: Options) -> list[Member]:
    """The networks, whose weights are not kept in memory."""
    if not options.networks:
        sys.exit(
            "ensemble: expected networks: --networks out/a/network out/b/network, or a folder of "
            "them such as out/fge/members."
        )
    if options.num_bins < 1:
        sys.exit(f"ensemble: --num-bins is {options.num_bins}; expected at least 1.")
    paths: list[pathlib.Path] = []
    for path in options.networks:
        inside = [] if is_saved(path) else sorted(x for x in path.glob("*") if is_saved(x))
        paths += inside or [path]
    members: list[Member] = []
    for label, path in zip(labels_of(paths), paths, strict=True):
        network = checkpoint.load_network(path)
        digest = contents((network.params, network.state))
        members.append(Member(label, path, digest, network.metadata))
    return members


def contents(network: Any) -> str:
    """What tells a network from another one that was saved to the same path later."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(network):
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()[:16]


class Outputs:
    """The log-probabilities of networks on parts of the data; kept once computed."""

    def __init__(self, folder: pathlib.Path, parts: dict[str, Any], refresh: bool):
        self.folder, self.parts, self.refresh = folder / "state", parts, refresh
        self.models: dict[str, tuple[Any, Any]] = {}

    def model(self, network: checkpoint.Network) -> tuple[Any, Any]:
        """One function for all networks of a model, so that it is compiled once."""
        key = json.dumps([network.model, network.options], sort_keys=True)
        if key not in self.models:
            model = network.build()

            def model_fn(variables, batch):
                return model.apply(variables[0], variables[1], batch.inputs, False)[0]

            self.models[key] = model, model_fn
        return self.models[key]

    def __call__(self, member: Member) -> dict[str, np.ndarray]:
        """By part."""
        wanted = {
            part: self.folder / f"{member.contents}-{part}.npy"
            for part in self.parts
            if part != "train"
        }
        if not all(path.exists() for path in wanted.values()):
            self.folder.mkdir(parents=True, exist_ok=True)
            network = checkpoint.load_network(member.path)
            model, model_fn = self.model(network)
            state = {} if network.state is None else network.state
            if self.refresh and jax.tree.leaves(state):
                state = statistics.refresh(model.apply, network.params, state, self.parts["train"])
            for part, path in wanted.items():
                if path.exists():
                    continue
                try:
                    found = ensemble.log_probabilities(
                        model_fn, (network.params, state), self.parts[part]
                    )
                except (TypeError, ValueError) as error:
                    sys.exit(f"ensemble: {member.path} on the {part} part: {error}")
                with open(path.with_suffix(".partial"), "wb") as file:
                    np.save(file, found)
                os.replace(path.with_suffix(".partial"), path)
        return {part: np.load(path) for part, path in wanted.items()}


class Scored(NamedTuple):
    """A prediction, before and after its temperature."""

    row: dict[str, Any]
    before: ensemble.Calibration
    after: ensemble.Calibration | None


def score(options: Options, found: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> Scored:
    """What a prediction is worth on the test part; the temperature is that of the validation."""
    before = ensemble.calibration(found["test"], truth["test"], num_bins=options.num_bins)
    row = {
        "error": 1 - before.accuracy.value,
        "NLL": before.nll.value,
        "Brier": before.brier.value,
        "ECE": before.ece.value,
    }
    after = None
    if "validation" in found:
        own = np.take_along_axis(found["validation"], truth["validation"][..., None], -1)
        # Nobody voted for a label: no temperature makes that likely.
        fitted = (
            ensemble.fit_temperature(found["validation"], truth["validation"])
            if np.isfinite(own).all()
            else None
        )
        if fitted is not None and fitted.converged:
            after = ensemble.calibration(
                ensemble.tempered(found["test"], fitted.value), truth["test"],
                num_bins=options.num_bins,
            )  # fmt: skip
        row |= {
            "temperature": math.nan if after is None or fitted is None else fitted.value,
            "NLL after": math.nan if after is None else after.nll.value,
            "ECE after": math.nan if after is None else after.ece.value,
        }
    return Scored(row, before, after)


def figure(growing: list[dict[str, Any]], alone: list[dict[str, Any]]) -> tuple[bytes, dict]:
    number = np.arange(1, 1 + len(growing))
    panels = [
        {
            "x": "networks",
            "y": {"NLL": "test NLL (nats)"}.get(metric, f"test {metric}"),
            "percent": metric != "NLL",
            "legend": "above",
            "integers": True,
            "lines": {"ensemble": (number, [row[metric] for row in growing])},
            "marks": {"alone": (number, [row[metric] for row in alone])},
        }
        for metric in ("NLL", "error", "ECE")
        if np.isfinite([row[metric] for row in growing]).all()
    ]
    data = {
        f"{name}_{metric}": [row[metric] for row in rows]
        for name, rows in (("ensemble", growing), ("alone", alone))
        for metric in ("NLL", "error", "Brier", "ECE")
    }
    return plot.png(plot.curves(panels, size=(2.8, 2.7))), data


def differences(logs: list[np.ndarray], labels: np.ndarray, names: list[str]):
    """How far the networks differ, one by one and together."""
    found = ensemble.diversity(logs, labels)
    others = len(logs) - 1
    rows = [
        {
            "network": name,
            "disagreement": float(found.disagreement[i].sum() / others),
            "KL(other || it)": float(found.kl[:, i].sum() / others),
            "KL(it || other)": float(found.kl[i].sum() / others),
        }
        for i, name in enumerate(names)
    ]
    summary = [
        {
            "score": score,
            "mean of the networks": value.members,
            "ensemble": value.ensemble,
            "gain": value.ambiguity,
        }
        for score, value in (
            ("Brier, probabilities averaged", found.brier),
            ("NLL, logits averaged", found.nll),
        )
    ]
    return found, rows, summary


def finite(value: Any) -> Any:
    """With null for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_parts(options: Options, data: datasets.Dataset) -> tuple[dict[str, Any], dict[str, Any]]:
    examples = {
        part: jax.tree.map(lambda x: x[: options.num_examples], getattr(data, part))
        for part in ("train", "validation", "test")
    }
    parts = {
        part: batches.split(given, 1000) for part, given in examples.items() if len(given.labels)
    }
    truth = {part: np.asarray(given.labels).astype(np.int64) for part, given in examples.items()}
    return parts, truth


def main(options: Options) -> None:
    start = time.perf_counter()
    members = find(options)
    name = options.dataset or members[0].metadata["dataset"]
    if name is None:
        sys.exit("ensemble: the first network does not say what it was trained on; give --dataset.")
    data = datasets.load(name, options.data_dir)
    if data.num_classes is None:
        sys.exit(f"ensemble: {name} has no classes, and predictions are averaged over classes.")
    # A folder is claimed once the options are known to be good.
    report.claim(
        options.out,
        dataclasses.asdict(options) | {"contents": [member.contents for member in members]},
        may_differ=("networks", "average", "num_bins", "data_dir", "out"),
    )
    parts, truth = load_parts(options, data)
    facts = (
        f"geojax {geojax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}; "
        f"{len(members)} networks ({', '.join(sorted({m.metadata['model'] for m in members}))}); "
        f"{name}; {len(truth['test'])} test examples"
    )
    print(facts)
    outputs = Outputs(options.out, parts, options.refresh)
    found = [outputs(member) for member in members]
    shapes = {x["test"].shape for x in found}
    if len(shapes) > 1:
        sys.exit(f"ensemble: the networks' outputs have shapes {sorted(shapes)}; expected one.")

    def averaged(upto: int, mode: Any) -> dict[str, np.ndarray]:
        return {part: ensemble.average([x[part] for x in found[:upto]], mode=mode)
                for part in found[0]}  # fmt: skip

    names = [member.name for member in members]
    alone = [score(options, x, truth) for x in found]
    growing = [score(options, averaged(i + 1, options.average), truth) for i in range(len(members))]
    together = {
        mode: score(options, averaged(len(members), mode), truth)
        for mode in ("probabilities", "logits", "votes")
    }
    rows = [{"network": label} | scored.row for label, scored in zip(names, alone, strict=True)] + [
        {"network": f"average of {mode}"} | x.row for mode, x in together.items()
    ]

    page = report.Report(options.out, "An ensemble of networks", facts)
    page.chapter(
        "The networks and their averages",
        "All on the test part; errors and calibration errors as fractions. "
        + (
            f"Temperatures are fitted on the {len(truth['validation'])} validation examples, and "
            "'after' is with them, on the test part; there is none where the NLL has no minimum, "
            "and where a label of the validation part got no vote at all."
            if "validation" in parts
            else "There is no validation part to fit a temperature on."
        ),
    )
    floor = growing[-1].before.ece_floor
    page.text(
        f"The ECE has {options.num_bins} bins of equal width; perfectly calibrated predictions as "
        f"sure as the ensemble's would have {floor:.2g} from chance alone."
    )
    page.table(rows)
    print(f"\nThe networks and their averages\n{report.text_table(rows)}")

    running = [
        {"networks": i + 1, "the last": label} | scored.row
        for i, (label, scored) in enumerate(zip(names, growing, strict=True))
    ]
    numbers: dict[str, Any] = {"facts": facts, "networks": rows, "running": running}
    if len(members) > 1:
        page.chapter("As it grows", f"The average of {options.average} over the first networks.")
        page.table(running)
        print(f"\nAs it grows\n{report.text_table(running)}")
        image, arrays = figure([x.row for x in growing], [x.row for x in alone])
        page.figure(
            "running", image,
            "Each network alone, in the order given, and the average of all up to it.", arrays,
        )  # fmt: skip
        logs = [x["test"] for x in found]
        diversity, each, gains = differences(logs, truth["test"], names)
        page.chapter(
            "How the networks differ",
            f"Two networks predict different classes for {100 * diversity.mean_disagreement:.3g} % "
            f"of the test examples, on average over pairs. The entropy of the mean prediction is "
            f"{diversity.mutual_information:.3g} nats above the mean entropy of the networks.",
        )
        page.table(each)
        page.text(
            "What averaging gains: the mean score of the networks less that of the ensemble, which "
            "is exactly how far they differ."
        )
        page.table(gains)
        print(f"\nHow the networks differ\n{report.text_table(each)}")
        print(f"\nWhat averaging gains\n{report.text_table(gains)}")
        numbers |= {
            "differences": each,
            "gains": gains,
            "mean disagreement": diversity.mean_disagreement,
            "mutual information": diversity.mutual_information,
            "disagreement": diversity.disagreement.tolist(),
            "KL": diversity.kl.tolist(),
        }
    shown = {names[0]: alone[0].before}
    if len(members) > 1:
        shown["ensemble"] = growing[-1].before
    tempered = growing[-1].after
    if tempered is not None:
        shown["with temperature"] = tempered
    page.chapter("Reliability", "Accuracy against confidence, on the test part.")
    page.figure(
        "reliability", plot.png(plot.reliability(shown)),
        "A calibrated prediction lies on the diagonal; bars are 95 % intervals.",
        {
            f"{label}_{field}".replace(" ", "_").replace("/", "_"): getattr(x.bins, field)
            for label, x in shown.items()
            for field in ("edges", "counts", "confidence", "accuracy", "standard_error")
        },
    )  # fmt: skip
    (options.out / "result.json").write_text(json.dumps(finite(numbers), indent=2) + "\n")
    print(f"\n{page.write().resolve()}  ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        sys.exit(f"ensemble: {error}")
    except KeyboardInterrupt:
        sys.exit("ensemble: stopped; the same command goes on from the network where it was.")
