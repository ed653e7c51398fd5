"""Connect two trained networks by a curve of low loss (mode connectivity), whatever the model.

The networks are ones that scripts/train.py saved (or `checkpoint.save_network`), of one model. A
Bezier curve or a chain of straight segments from one to the other is trained, with both ends as
they are; then loss and error are measured along it and along the straight segment between them,
with normalisation statistics of their own at each point. The folder gets a report, the control
points as a checkpoint that scripts/plane.py draws, a log of the training, and all numbers as JSON.
Stop it at any time and call it again with the same options: it goes on from its last checkpoint, of
the training or of the measuring.

  python scripts/train.py --seed 0 --out out/a
  python scripts/train.py --seed 1 --out out/b
  python scripts/connect.py --networks out/a/network out/b/network
  python scripts/connect.py --networks out/a/network out/b/network --align --curve polychain
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
import optax
import tyro

import geojax
from geojax import (
    batches,
    checkpoint,
    curves,
    datasets,
    fit,
    objectives,
    permute,
    plot,
    report,
    statistics,
    symmetry,
    tree,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the curve."""

    networks: tuple[pathlib.Path, ...] = ()
    """The folders of the two networks."""
    curve: Literal["bezier", "polychain"] = "bezier"
    """A Bezier curve, or straight segments through the control points."""
    num_points: int = 3
    """Control points, both ends counted."""
    dataset: str | None = None
    """The data set; by default the one that the first network was trained on."""
    data_dir: pathlib.Path | None = None
    """Where archives and prepared folders lie; by default GEOJAX_DATA_DIR."""
    num_examples: int | None = None
    """The first examples of each part, for training as for measuring; by default all."""
    epochs: int = 100
    """Passes over the training part."""
    batch_size: int = 128
    """Examples in a step; what is left over at the end of an epoch is left out of it."""
    learning_rate: float = 0.03
    """The rate of SGD with momentum 0.9; after half the epochs it falls to a hundredth."""
    weight_decay: float = 5e-4
    """The factor of half the squared norm of the point drawn on the curve, added to its loss."""
    sampler: Literal["uniform", "stratified", "antithetic", "arc_length"] = "uniform"
    """How positions on the curve are drawn; all but uniform are for several draws in a step."""
    num_draws: int = 1
    """Positions drawn in a step; each costs a gradient."""
    align: bool = False
    """Whether to permute the units of the second network to those of the first before."""
    num_eval: int = 61
    """Positions at which the curve and the segment are measured."""
    seed: int = 0
    """The seed of positions, order, dropout and the matching."""
    out: pathlib.Path = pathlib.Path("out/connect")
    """The folder of the results."""
    checkpoint_every: float = 10.0
    """Epochs between checkpoints."""


class Setup(NamedTuple):
    """The model and its data."""

    model: Any
    state: Any
    task: objectives.Task
    train: Any
    parts: dict[str, Any]
    metrics_fn: Any
    state_fn: Any


def load(options: Options) -> list[checkpoint.Network]:
    if len(options.networks) != 2:
        sys.exit(
            f"connect: got {len(options.networks)} networks; expected two: "
            "--networks out/a/network out/b/network."
        )
    if options.num_points < 3:
        sys.exit(
            f"connect: --num-points is {options.num_points}; expected at least 3, since both ends "
            "stay as they are."
        )
    if options.num_eval < 2 or options.epochs < 1:
        sys.exit(
            f"connect: --num-eval is {options.num_eval} and --epochs {options.epochs}; expected at "
            "least 2 and 1."
        )
    if options.num_draws < 1 or (options.sampler == "antithetic" and options.num_draws % 2):
        sys.exit(
            f"connect: --num-draws is {options.num_draws}; expected at least 1, and an even number "
            "for --sampler antithetic."
        )
    first, second = (checkpoint.load_network(path) for path in options.networks)
    if (first.model, first.options) != (second.model, second.options):
        sys.exit(
            f"connect: {options.networks[1]} is {second.model} {second.options}, and "
            f"{options.networks[0]} is {first.model} {first.options}; expected one model."
        )
    if contents(first) == contents(second):
        sys.exit(f"connect: {' and '.join(map(str, options.networks))} have the same weights.")
    return [first, second]


def contents(network: checkpoint.Network) -> str:
    """What tells a network from another one that was saved to the same path later."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(network.params):
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()[:16]


def make_setup(options: Options, network: checkpoint.Network, data: datasets.Dataset) -> Setup:
    model = network.build()
    state = {} if network.state is None else network.state
    task = "regression" if data.num_classes is None else "classification"
    examples = {
        part: jax.tree.map(lambda x: x[: options.num_examples], getattr(data, part))
        for part in ("train", "test")
    }
    parts = {part: batches.split(examples[part], 1000) for part in examples}
    key = jax.random.fold_in(jax.random.key(options.seed), 1)
    train = batches.split(
        examples["train"],
        min(options.batch_size, len(examples["train"].labels)),
        key=key,
        drop_remainder=True,
    )
    with_state = objectives.metrics_with_state(model.apply, task)

    def metrics_fn(params, *rest):
        found = with_state(params, *(rest if len(rest) == 2 else ({}, *rest)))
        if options.weight_decay:
            penalty = 0.5 * options.weight_decay * tree.vdot(params, params)
            found["loss + decay"] = found["loss"] + penalty.astype(found["loss"].dtype)
        return found

    def fresh(params):
        return statistics.refresh(model.apply, params, state, parts["train"])

    state_fn = fresh if jax.tree.leaves(state) else None
    return Setup(model, state, task, train, parts, metrics_fn, state_fn)


def kept(folder: pathlib.Path, name: str, make: Any) -> Any:
    """What `make` measures, read from the folder where it was measured before."""
    path = folder / "state" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".partial")
        whole.write_text(json.dumps(make()) + "\n")
        os.replace(whole, path)
    return json.loads(path.read_text())


def align(options: Options, setup: Setup, first: Any, second: Any) -> tuple[Any, dict[str, Any]]:
    """The second network in the units of the first; the matching is found once."""

    def outputs(variables, inputs):
        return setup.model.apply(variables["params"], variables["state"], inputs, False)[0]

    def make():
        matching = permute.weight_matching(
            ours, first.params, second.params, key=jax.random.key(options.seed)
        )
        row = {
            "method": matching.method,
            "inner product before": matching.initial,
            "after": matching.objective,
            "bound": matching.bound,
            "fixed point": matching.converged,
        }
        orders = {name: np.asarray(x).tolist() for name, x in matching.permutation.items()}
        return {"permutation": orders, "row": row}

    variables = {"params": first.params, "state": setup.state}
    inputs = setup.parts["train"].arrays.inputs[:2]
    spec = symmetry.permutation_spec(outputs, variables, inputs)
    symmetry.check(spec, outputs, variables, inputs, key=jax.random.key(options.seed))
    ours = spec.at("params")
    found = kept(options.out, "matching", make)
    order = {name: np.asarray(x, np.int32) for name, x in found["permutation"].items()}
    return permute.apply_permutation(ours, order, second.params), found["row"]


def train(options: Options, setup: Setup, basis: Any, ends: tuple[Any, Any]) -> curves.CurveFit:
    """The curve; with a finished checkpoint no step is taken."""
    num_steps = options.epochs * len(setup.train)
    result = curves.fit(
        objectives.loss(setup.model.apply, setup.state, setup.task),
        basis,
        curves.initialize(basis, *ends),
        setup.train,
        optax.sgd(fit.three_phase(options.learning_rate, num_steps), 0.9),
        num_steps,
        key=jax.random.fold_in(jax.random.key(options.seed), 2),
        sampler=options.sampler,
        num_draws=options.num_draws,
        weight_decay=options.weight_decay,
        checkpoint=checkpoint.Checkpointer(
            options.out / "checkpoints",
            every=max(1, round(options.checkpoint_every * len(setup.train))),
        ),
        log=options.out / "log.jsonl",
        log_every=max(1, len(setup.train) // 10),
    )
    for i, end in ((0, ends[0]), (-1, ends[1])):
        same = jax.tree.map(
            lambda x, y, i=i: np.array_equal(x[i], y), jax.device_get(result.control_points), end
        )
        if not jax.tree.all(same):
            raise ValueError(
                f"the checkpoints in {options.out / 'checkpoints'} are of a curve with another "
                "end; choose another folder (--out)."
            )
    return result


def measure(options: Options, setup: Setup, lines: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Metrics along the segment and the curve, on both parts; kept once measured."""
    found = {}
    for name, (basis, points) in lines.items():
        for part, source in setup.parts.items():
            which = f"{name}-{part}-{options.num_eval}-points"

            def make(basis=basis, points=points, source=source, which=which):
                along = curves.evaluate(
                    setup.metrics_fn, basis, points, source, options.num_eval,
                    state_fn=setup.state_fn,
                    checkpoint=checkpoint.Checkpointer(
                        options.out / "measured" / which, every=5, keep=1
                    ),
                )  # fmt: skip
                metrics = {
                    metric: value._asdict() | {"values": value.values.tolist()}
                    for metric, value in along.metrics.items()
                }
                return {
                    "ts": along.ts.tolist(),
                    "lengths": along.lengths.tolist(),
                    "length": along.length,
                    "chord": along.chord,
                    "metrics": metrics,
                }

            found[f"{name}-{part}"] = kept(options.out, which, make)
    return found


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "path": key.split("-")[0],
            "part": key.split("-")[1],
            "metric": metric,
            "at t=0": value["start"],
            "at t=1": value["end"],
            "lowest": value["lowest"],
            "highest": value["highest"],
            "at t": value["t_highest"],
            "mean": value["mean"],
            "integral": value["integral"],
            "barrier": value["barrier"],
            "length / chord": along["length"] / along["chord"] if along["chord"] else math.nan,
        }
        for key, along in found.items()
        for metric, value in along["metrics"].items()
    ]


def figure(options: Options, found: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Loss and error along both paths, and the data of the figure."""
    measured = next(iter(found.values()))["metrics"]
    metrics = [metric for metric in ("loss", "error") if metric in measured]
    labels = {"curve": "Bezier curve" if options.curve == "bezier" else "polygonal chain"}
    panels = [
        {
            "x": "position t",
            "y": "loss (nats)" if metric == "loss" and "error" in metrics else metric,
            "percent": metric == "error",
            "legend": "above",
            "lines": {
                f"{labels.get(path, path)}, {part}": (
                    found[f"{path}-{part}"]["ts"],
                    found[f"{path}-{part}"]["metrics"][metric]["values"],
                )
                for path in ("segment", "curve")
                for part in ("train", "test")
            },
        }
        for metric in metrics
    ]
    data = {"ts": found["curve-train"]["ts"]} | {
        f"{path}_lengths": found[f"{path}-train"]["lengths"] for path in ("segment", "curve")
    }
    for key, along in found.items():
        for metric, value in along["metrics"].items():
            name = metric.replace(" + ", "_with_")
            data[f"{key.replace('-', '_')}_{name}"] = value["values"]
    return plot.png(plot.curves(panels, size=(3.9, 2.9))), data


def main(options: Options) -> None:
    start = time.perf_counter()
    first, second = load(options)
    name = options.dataset or first.metadata["dataset"]
    if name is None:
        sys.exit("connect: the first network does not say what it was trained on; give --dataset.")
    data = datasets.load(name, options.data_dir)
    # A folder is claimed once the options are known to be good.
    setup = make_setup(options, first, data)
    report.claim(
        options.out,
        dataclasses.asdict(options) | {"contents": [contents(first), contents(second)]},
        may_differ=("data_dir", "out", "num_eval", "checkpoint_every", "networks"),
    )
    basis = getattr(curves, options.curve)(options.num_points)
    facts = (
        f"geojax {geojax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}; "
        f"{first.model}, {tree.size(first.params):,} weights; {name}; {options.curve} with "
        f"{options.num_points} control points; seed {options.seed}"
    )
    print(facts)
    page = report.Report(options.out, "A curve between two networks", facts)
    page.chapter(
        "The networks",
        f"t=0 is {options.networks[0]}, t=1 is {options.networks[1]}"
        + (", its units permuted to those of the first." if options.align else "."),
    )
    numbers: dict[str, Any] = {"facts": facts}
    other = second.params
    if options.align:
        other, row = align(options, setup, first, second)
        numbers["matching"] = row
        page.table([row])
        print(f"\nMatching by weights\n{report.text_table([row])}")

    begun = time.perf_counter()
    result = train(options, setup, basis, (first.params, other))
    num_steps = options.epochs * len(setup.train)
    if result.start:
        print(f"\nwent on from step {result.start} of {num_steps}")
    trained = (
        f"{options.epochs} epochs, {num_steps} steps of {setup.train.batch_size} examples, SGD "
        f"with momentum 0.9, highest rate {options.learning_rate:g}, decay "
        f"{options.weight_decay:g} on the point drawn; {options.num_draws} position(s) t in a "
        f"step, {options.sampler}."
    )
    print(f"\nTraining: {trained} ({time.perf_counter() - begun:.0f} s)")
    checkpoint.save_network(
        options.out / "curve", result.control_points, first.state, model=first.model,
        options=first.options, dataset=name, seed=options.seed,
        metadata={
            "basis": options.curve,
            "num_points": options.num_points,
            "networks": [str(path) for path in options.networks],
            "aligned": options.align,
        },
    )  # fmt: skip

    lines = {
        "segment": (curves.segment(), tree.stack([first.params, other])),
        "curve": (basis, result.control_points),
    }
    found = measure(options, setup, lines)
    rows = rows_of(found)
    page.chapter("Along the curve and the segment", trained)
    page.text(
        "Lowest, highest and mean are over the positions measured, the integral is the mean over "
        "arc length, the barrier the largest rise above the straight line between the two end "
        "values. The table gives errors as fractions."
        + (
            " The statistics of the network's normalisation are those of each point, from the "
            "training part."
            if setup.state_fn
            else ""
        )
    )
    page.table(rows)
    print(f"\nAlong the curve and the segment\n{report.text_table(rows)}")
    image, arrays = figure(options, found)
    page.figure(
        "along", image,
        "Along the straight segment between the networks and along the trained curve.", arrays,
    )  # fmt: skip
    numbers |= {"start": result.start, "steps": num_steps, "along": found}
    (options.out / "result.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"\n{page.write().resolve()}  ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        sys.exit(f"connect: {error}")
    except KeyboardInterrupt:
        sys.exit("connect: stopped; the same command goes on from the last checkpoint.")
