"""Collect an ensemble along one more stretch of training (fast geometric ensembling), any model.

It starts from a network that scripts/train.py saved (or `checkpoint.save_network`), or from a
checkpoint of its training: at about four fifths of a training budget, since from a network trained
to the end the members hardly differ. It augments the images as that training did. Members are kept
where the rate is lowest: in the middle of triangular cycles (fge), at the ends of cosines
(snapshot), or at equal distances of a run at a constant rate (swa, whose weights are averaged;
swag, which draws from a Gaussian fitted to them). The folder gets a report, the members as networks
that scripts/ensemble.py reads, a log of the training, and all numbers as JSON. Stop it at any time
and call it again with the same options: it goes on from its last checkpoint.

  python scripts/train.py --epochs 20 --checkpoint-every 16 --out out/a
  python scripts/fge.py --network out/a/network
  python scripts/fge.py --network out/a/network --start out/a/checkpoints/step_00000096
  python scripts/ensemble.py --networks out/fge/members
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
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
    report,
    statistics,
    tree,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the run."""

    network: pathlib.Path | None = None
    """The folder of the network that says which model it is, and where the run starts."""
    start: pathlib.Path | None = None
    """A checkpoint of that network's training to start from instead of its end."""
    method: Literal["fge", "snapshot", "swa", "swag"] = "fge"
    """How members are collected, see above."""
    dataset: str | None = None
    """The data set; by default the one that the network was trained on."""
    data_dir: pathlib.Path | None = None
    """Where archives and prepared folders lie; by default GEOJAX_DATA_DIR."""
    num_examples: int | None = None
    """The first examples of each part; by default all."""
    epochs: int = 20
    """Passes over the training part; the run ends with the last member that they have room for."""
    cycle_epochs: int = 4
    """Epochs in a cycle, an even number for fge; for swa and swag those between two members."""
    batch_size: int = 128
    """Examples in a step; what is left over at the end of an epoch is left out of it."""
    lr_1: float = 0.05
    """The learning rate at the start of a cycle; for swa and swag that of the whole run."""
    lr_2: float = 0.0005
    """The lowest rate, where a member is kept; swa and swag have none."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-4
    """The factor of the weights in the gradient."""
    augment: Literal["as_trained"] | datasets.Augmentation = "as_trained"
    """Random changes of the training images; by default those that the network was trained with if
    its folder says so, else none."""
    include_start: bool = False
    """Whether the network that the run starts from is a member."""
    rank: int = 20
    """For swag: how many of the last members span the low-rank part of the covariance."""
    num_samples: int = 20
    """For swag: networks drawn from the Gaussian."""
    seed: int = 0
    """The seed of order, dropout, augmentation and draws."""
    out: pathlib.Path = pathlib.Path("out/fge")
    """The folder of the results."""
    checkpoint_every: float = 1.0
    """Epochs between checkpoints."""


class Setup(NamedTuple):
    """The model and its data."""

    model: Any
    state: Any
    source: Any
    transform: Any
    train: Any
    test: Any
    labels: np.ndarray
    model_fn: Any


def check(options: Options) -> int:
    """How many members the run collects."""
    if options.network is None:
        sys.exit("fge: expected a network: --network out/a/network.")
    if options.cycle_epochs < 1 or (options.method == "fge" and options.cycle_epochs % 2):
        sys.exit(
            f"fge: --cycle-epochs is {options.cycle_epochs}; expected "
            + (
                "an even number: members are kept in the middle of a cycle."
                if options.method == "fge"
                else "at least 1."
            )
        )
    if not 0 <= options.lr_2 <= options.lr_1 or not options.lr_1 > 0:
        sys.exit(
            f"fge: --lr-1 is {options.lr_1:g} and --lr-2 {options.lr_2:g}; expected a positive "
            "rate, and a lowest one that is not above it."
        )
    middle = options.cycle_epochs // 2 if options.method == "fge" else 0
    num = (options.epochs + middle) // options.cycle_epochs
    least = 2 if options.method == "swag" else 1
    if num < least:
        sys.exit(
            f"fge: --epochs {options.epochs} with --cycle-epochs {options.cycle_epochs} has room "
            f"for {max(num, 0)} member(s); expected at least {least}."
        )
    if options.method == "swag" and (options.rank < 2 or options.num_samples < 1):
        sys.exit(
            f"fge: --rank is {options.rank} and --num-samples {options.num_samples}; expected at "
            "least 2 and 1."
        )
    return num


def load(options: Options) -> tuple[checkpoint.Network, Any]:
    """The network, and the parameters that the run starts from."""
    assert options.network is not None
    network = checkpoint.load_network(options.network)
    if options.start is None:
        return network, network.params
    found, _ = checkpoint.load(options.start)
    start = found.get("params") if isinstance(found, dict) else None
    if start is None:
        sys.exit(
            f"fge: {options.start} has no parameters; expected a checkpoint of training, such as "
            "out/a/checkpoints/step_00000096."
        )
    try:
        tree.check_same(network.params, start, names=("the network", "the start"))
    except ValueError as error:
        sys.exit(f"fge: {options.start} is of another model than {options.network}: {error}")
    return network, start


def contents(params: Any) -> str:
    """What tells a network from another one that was saved to the same path later."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()[:16]


def augmentation(options: Options, network: checkpoint.Network) -> datasets.Augmentation:
    """The one asked for, or the one that is recorded as scripts/train.py records it."""
    if options.augment != "as_trained":
        return options.augment
    training = network.metadata.get("training")
    return training.get("augment", "none") if isinstance(training, dict) else "none"


def make_setup(options: Options, network: checkpoint.Network, loaded: datasets.Augmented) -> Setup:
    model = network.build()

    def first(part):
        return jax.tree.map(lambda x: x[: options.num_examples], part)

    train, test = first(loaded.data.train), first(loaded.data.test)
    source = batches.split(
        first(loaded.train),
        min(options.batch_size, len(train.labels)),
        key=jax.random.fold_in(jax.random.key(options.seed), 1),
        drop_remainder=True,
    )

    def model_fn(variables, batch):
        return model.apply(variables[0], variables[1], batch.inputs, False)[0]

    return Setup(
        model,
        {} if network.state is None else network.state,
        source,
        loaded.transform,
        batches.split(train, 1000),
        batches.split(test, 1000),
        np.asarray(test.labels),
        model_fn,
    )


def collect(options: Options, setup: Setup, start: Any, num: int) -> curves.Collected:
    """The members; with a finished checkpoint no step is taken."""
    length = len(setup.source)
    cycle = options.cycle_epochs * length

    def optimizer(rate):
        rule = optax.sgd(rate, options.momentum)
        return optax.chain(optax.add_decayed_weights(options.weight_decay), rule)

    data = (objectives.loss(setup.model.apply, setup.state), start, setup.source)
    common = {
        "key": jax.random.fold_in(jax.random.key(options.seed), 2),
        "checkpoint": checkpoint.Checkpointer(
            options.out / "checkpoints", every=max(1, round(options.checkpoint_every * length))
        ),
        "store": checkpoint.Checkpointer(options.out / "collected", every=1, keep=None),
        "log": options.out / "log.jsonl",
        "log_every": max(1, length // 10),
        "transform": setup.transform,
    }
    if options.method == "fge":
        return curves.fge(
            *data, optimizer, high=options.lr_1, low=options.lr_2, cycle_steps=cycle,
            num_members=num, **common,
        )  # fmt: skip
    if options.method == "snapshot":
        return curves.snapshots(
            *data, optimizer, high=options.lr_1, low=options.lr_2, cycle_steps=cycle,
            num_members=num, **common,
        )  # fmt: skip
    steps = [(i + 1) * cycle for i in range(num)]
    return curves.collect(*data, optimizer(options.lr_1), steps, **common)


def save(options: Options, setup: Setup, network: checkpoint.Network, name: str, make: Any) -> Any:
    """A network with statistics of its own, as (params, state); made and measured once."""
    path = options.out / name
    if not (path / "geojax.json").exists():
        params = make()
        state = setup.state
        if jax.tree.leaves(state):
            state = statistics.refresh(setup.model.apply, params, state, setup.train)
        checkpoint.save_network(
            path, params, state, model=network.model, options=network.options,
            dataset=options.dataset or network.metadata["dataset"], seed=options.seed,
            metadata={
                "method": options.method,
                "network": str(options.network),
                "training": {"augment": augmentation(options, network)},
            },
        )  # fmt: skip
    found = checkpoint.load_network(path)
    return found.params, {} if found.state is None else found.state


def outputs(options: Options, setup: Setup, name: str, variables: Any) -> np.ndarray:
    """The log-probabilities of a network on the test part; kept once computed."""
    path = options.out / "state" / f"{name.replace('/', '-')}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".partial")
        found = ensemble.log_probabilities(setup.model_fn, variables, setup.test)
        with open(whole, "wb") as file:
            np.save(file, found)
        os.replace(whole, path)
    return np.load(path)


def scores(log_probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    found = ensemble.calibration(log_probs, labels)
    return {
        "NLL": found.nll.value,
        "error": 1 - found.accuracy.value,
        "Brier": found.brier.value,
        "ECE": found.ece.value,
    }


def distance(first: Any, second: Any) -> float:
    return float(tree.norm(tree.axpy(-1.0, first, second)))


def figure(
    rows: list[dict[str, Any]], best: dict[str, dict[str, Any]]
) -> tuple[bytes, dict[str, Any]]:
    """Each member alone and the ensemble up to it."""
    number = np.arange(1, 1 + len(rows))
    panels = [
        {
            "x": "members",
            "y": "test NLL (nats)" if metric == "NLL" else f"test {metric}",
            "percent": metric != "NLL",
            "legend": "above",
            "integers": True,
            "lines": {
                "member": (number, [row[metric] for row in rows]),
                "ensemble": (number, [row[f"ensemble {metric}"] for row in rows]),
                **{
                    name: (number, np.full(len(rows), value[metric]))
                    for name, value in best.items()
                },
            },
        }
        for metric in ("NLL", "error")
    ]
    data = {
        name.replace(" ", "_"): [row[name] for row in rows]
        for name in rows[0]
        if name not in ("member", "step")
    }
    return plot.png(plot.curves(panels, size=(3.7, 2.9))), data


def main(options: Options) -> None:
    begun = time.perf_counter()
    num = check(options)
    network, start = load(options)
    name = options.dataset or network.metadata["dataset"]
    if name is None:
        sys.exit("fge: the network does not say what it was trained on; give --dataset.")
    augment = augmentation(options, network)
    loaded = datasets.load_augmented(name, options.data_dir, augment)
    if loaded.data.num_classes is None:
        sys.exit(f"fge: {name} has no classes, and predictions are averaged over classes.")
    setup = make_setup(options, network, loaded)
    # A folder is claimed once the options are known to be good.
    report.claim(
        options.out,
        dataclasses.asdict(options) | {"contents": contents(start), "augment": augment},
        may_differ=("data_dir", "out", "checkpoint_every", "network", "start"),
    )
    facts = (
        f"geojax {geojax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}; "
        f"{network.model}, {tree.size(start):,} weights; {name}; {options.method}; seed "
        f"{options.seed}"
    )
    print(facts)
    since = time.perf_counter()
    found = collect(options, setup, start, num)
    if found.start:
        print(f"\nwent on from step {found.start} of {found.steps[-1]}")
    rates = {
        "fge": f"triangular cycles of {options.cycle_epochs} epochs from {options.lr_1:g} to "
        f"{options.lr_2:g}",
        "snapshot": f"cosines of {options.cycle_epochs} epochs from {options.lr_1:g} to "
        f"{options.lr_2:g}",
    }.get(options.method, f"a constant rate of {options.lr_1:g}")
    trained = (
        f"{found.steps[-1]} steps of {setup.source.batch_size} examples, SGD with momentum "
        f"{options.momentum:g}, {rates}, decay {options.weight_decay:g}, "
        + ("no augmentation." if augment == "none" else f"augmentation {augment}.")
    )
    print(f"\nTraining: {trained} ({time.perf_counter() - since:.0f} s)")

    members = tree.unstack(found.members)
    steps = [int(step) for step in found.steps]
    if options.include_start:
        members, steps = [start, *members], [0, *steps]
    names = [f"members/{i:02d}" for i in range(len(members))]
    first = save(options, setup, network, "start", lambda: start)
    variables = [
        save(options, setup, network, folder, lambda params=params: params)
        for folder, params in zip(names, members, strict=True)
    ]
    logs = [outputs(options, setup, *pair) for pair in zip(names, variables, strict=True)]
    rows = []
    for i, params in enumerate(members):
        together = scores(ensemble.average(logs[: i + 1]), setup.labels)
        alone = scores(logs[i], setup.labels)
        rows.append(
            {
                "member": names[i].split("/")[1],
                "step": steps[i],
                "from the start": distance(start, params),
                "from the last": distance(members[i - 1] if i else start, params),
                **{metric: alone[metric] for metric in ("NLL", "error", "ECE")},
                **{f"ensemble {metric}": together[metric] for metric in ("NLL", "error", "ECE")},
            }
        )
    differ = ensemble.diversity(logs)

    final = {"the start": outputs(options, setup, "start", first)}
    final["the last member"] = logs[-1]
    final[f"ensemble of {len(logs)} members"] = ensemble.average(logs)
    if options.method in ("swa", "swag"):
        average = save(options, setup, network, "average", lambda: curves.swa(found.members))
        final["mean of the weights"] = outputs(options, setup, "average", average)
    if options.method == "swag":
        drawn = []
        gaussian = curves.swag(found.members, options.rank)
        for i in range(options.num_samples):
            key = jax.random.fold_in(jax.random.key(options.seed), 3 + i)
            path = f"samples/{i:02d}"
            sample = save(options, setup, network, path, lambda key=key: gaussian.sample(key))
            drawn.append(outputs(options, setup, path, sample))
        final[f"{options.num_samples} draws of SWAG"] = ensemble.average(drawn)
    compared = [
        {"prediction": label} | scores(log_probs, setup.labels)
        for label, log_probs in final.items()
    ]

    origin = options.network if options.start is None else options.start
    page = report.Report(options.out, f"An ensemble from one run: {options.method}", facts)
    page.chapter("The members", f"The run starts from {origin}: {trained}")
    page.text(
        "Distances are Euclidean, between weights, from the start and from the member before. All "
        "else is measured on the test part, each member alone and the ensemble of all up to it, "
        "with probabilities averaged. The table gives errors as fractions."
        + (
            " The statistics of the network's normalisation are those of each member."
            if jax.tree.leaves(setup.state)
            else ""
        )
    )
    page.table(rows)
    print(f"\nThe members\n{report.text_table(rows)}")
    if len(logs) > 1:
        page.text(
            f"Two members predict different classes for {100 * differ.mean_disagreement:.3g} % of "
            f"the test examples, on average over pairs; what their predictions say beyond the mean "
            f"prediction is {differ.mutual_information:.3g} nats."
        )
    beside = {
        short: compared[list(final).index(label)]
        for label, short in (
            ("the start", "start"),
            ("mean of the weights", "mean weights"),
            (f"{options.num_samples} draws of SWAG", "draws"),
        )
        if label in final
    }
    if len(logs) > 1:
        image, arrays = figure(rows, beside)
        page.figure(
            "running", image,
            "Each member and the ensemble of all up to it; level lines are for comparison.",
            arrays,
        )  # fmt: skip
    page.chapter("Compared", "On the test part.")
    page.table(compared)
    print(f"\nCompared, on the test part\n{report.text_table(compared)}")
    shown = {"start": final["the start"], "ensemble": list(final.values())[-1]}
    if options.method == "swa":
        shown = {"start": final["the start"], "mean weights": final["mean of the weights"]}
    reliability = {
        label: ensemble.calibration(log_probs, setup.labels) for label, log_probs in shown.items()
    }
    page.figure(
        "reliability", plot.png(plot.reliability(reliability)),
        "Accuracy against confidence, with 95 % intervals.",
        {
            f"{label}_{field}".replace(" ", "_"): getattr(x.bins, field)
            for label, x in reliability.items()
            for field in ("edges", "counts", "confidence", "accuracy")
        },
    )  # fmt: skip
    numbers = {
        "facts": facts,
        "start": found.start,
        "steps": int(found.steps[-1]),
        "members": rows,
        "compared": compared,
        "disagreement": differ.mean_disagreement if len(logs) > 1 else None,
        "mutual information": differ.mutual_information,
    }
    (options.out / "result.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"\n{page.write().resolve()}  ({time.perf_counter() - begun:.0f} s)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        sys.exit(f"fge: {error}")
    except KeyboardInterrupt:
        sys.exit("fge: stopped; the same command goes on from the last checkpoint.")
