"""Measure loss and error on the straight path through two or more trained networks, in order.

The networks are ones that scripts/train.py saved (or `checkpoint.save_network`), of one model. The
path goes straight from each to the next; normalisation statistics are those of each point of it.
Each segment gets its barrier: how far the loss rises above the straight line between the values at
its ends. The folder gets a report, a figure with its data, and all numbers as JSON. Stop it at any
time and call it again with the same options: it goes on from the position where it was.

  python scripts/train.py --seed 0 --out out/a
  python scripts/train.py --seed 1 --out out/b
  python scripts/train.py --seed 2 --out out/c
  python scripts/chain.py --networks out/a/network out/b/network out/c/network
  python scripts/chain.py --networks out/a/network out/b/network --align --out out/chain-aligned
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

import geojax
from geojax import (
    batches,
    checkpoint,
    datasets,
    objectives,
    permute,
    plot,
    progress,
    report,
    statistics,
    surface,
    symmetry,
    tree,
)

METRICS = ("loss", "loss + decay", "error")
at = jax.jit(tree.combine)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the chain."""

    networks: tuple[pathlib.Path, ...] = ()
    """The folders of the networks, in order; one may come again, to close the path."""
    num_eval: int = 21
    """Positions on each segment, both ends counted."""
    align: bool = False
    """Whether to permute the units of each network to those of the one before."""
    dataset: str | None = None
    """The data set; by default the one that the first network was trained on."""
    data_dir: pathlib.Path | None = None
    """Where archives and prepared folders lie; by default GEOJAX_DATA_DIR."""
    num_examples: int | None = None
    """The first examples of each part; by default all."""
    weight_decay: float = 5e-4
    """The factor of half the squared norm of the weights in 'loss + decay'."""
    seed: int = 0
    """The seed of the matching."""
    out: pathlib.Path = pathlib.Path("out/chain")
    """The folder of the results."""


class Setup(NamedTuple):
    """The model and its data."""

    model: Any
    state: Any
    parts: dict[str, Any]
    averaged: dict[str, Any]


def load(options: Options) -> list[checkpoint.Network]:
    if len(options.networks) < 2:
        sys.exit(
            f"chain: got {len(options.networks)} networks; expected two or more: --networks "
            "out/a/network out/b/network."
        )
    if options.num_eval < 2:
        sys.exit(f"chain: --num-eval is {options.num_eval}; expected at least 2.")
    networks = [checkpoint.load_network(path) for path in options.networks]
    first = networks[0]
    for path, network in zip(options.networks, networks, strict=True):
        if (network.model, network.options) != (first.model, first.options):
            sys.exit(
                f"chain: {path} is {network.model} {network.options}, and {options.networks[0]} "
                f"is {first.model} {first.options}; expected one model."
            )
    for i in range(1, len(networks)):
        if contents(networks[i]) == contents(networks[i - 1]):
            sys.exit(
                f"chain: {options.networks[i - 1]} and {options.networks[i]} have the same "
                "weights; there is no way between them to measure."
            )
    return networks


def contents(network: checkpoint.Network) -> str:
    """What tells a network from another one that was saved to the same path later."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(network.params):
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()[:16]


def names_of(paths: tuple[pathlib.Path, ...]) -> list[str]:
    """The shortest parts of the paths that tell them apart: out/a/network is a."""
    parts = [path.parts for path in paths]
    while len({p[-1:] for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[:-1] for p in parts]
    for length in range(1, 1 + max(map(len, parts))):
        if len({p[-length:] for p in parts}) == len(set(parts)):
            return ["/".join(p[-length:]) for p in parts]
    return [str(path) for path in paths]


def kept(folder: pathlib.Path, name: str, make: Any) -> Any:
    """What `make` measures, read from the folder where it was measured before."""
    path = folder / "state" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".partial")
        whole.write_text(json.dumps(make()) + "\n")
        os.replace(whole, path)
    return json.loads(path.read_text())


def make_setup(options: Options, network: checkpoint.Network, data: datasets.Dataset) -> Setup:
    model = network.build()
    task = "regression" if data.num_classes is None else "classification"
    parts = {
        part: batches.split(
            jax.tree.map(lambda x: x[: options.num_examples], getattr(data, part)), 1000
        )
        for part in ("train", "test")
    }
    with_state = objectives.metrics_with_state(model.apply, task)

    def metrics_fn(params, state, batch):
        found = with_state(params, state, batch)
        penalty = 0.5 * options.weight_decay * tree.vdot(params, params)
        return found | {"loss + decay": found["loss"] + penalty.astype(found["loss"].dtype)}

    averaged = {part: batches.mean(metrics_fn, source) for part, source in parts.items()}
    return Setup(model, {} if network.state is None else network.state, parts, averaged)


def align(options: Options, setup: Setup, points: list[Any]) -> tuple[list[Any], list[dict]]:
    """Each network in the units of the one before; every matching is found once."""

    def outputs(variables, inputs):
        return setup.model.apply(variables["params"], variables["state"], inputs, False)[0]

    variables = {"params": points[0], "state": setup.state}
    inputs = setup.parts["train"].arrays.inputs[:2]
    spec = symmetry.permutation_spec(outputs, variables, inputs)
    symmetry.check(spec, outputs, variables, inputs, key=jax.random.key(options.seed))
    ours = spec.at("params")
    aligned, rows = [points[0]], []
    for i in range(1, len(points)):

        def make(i=i):
            matching = permute.weight_matching(
                ours, aligned[-1], points[i], key=jax.random.key(options.seed)
            )
            orders = {name: np.asarray(x).tolist() for name, x in matching.permutation.items()}
            row = {
                "inner product before": matching.initial,
                "after": matching.objective,
                "bound": matching.bound,
                "fixed point": matching.converged,
            }
            return {"permutation": orders, "row": row}

        found = kept(options.out, f"matching-{i}", make)
        order = {name: np.asarray(x, np.int32) for name, x in found["permutation"].items()}
        aligned.append(permute.apply_permutation(ours, order, points[i]))
        rows.append(found["row"])
    return aligned, rows


def measure(options: Options, setup: Setup, points: list[Any]) -> list[dict[str, Any]]:
    """Metrics of both parts at each position, which are measured once each."""
    num, inner = len(points) - 1, options.num_eval - 1
    has_state = bool(jax.tree.leaves(setup.state))
    found = []
    with progress.bar(num * inner + 1, "chain") as update:
        for i in range(num * inner + 1):
            # An end that two segments share belongs to the second.
            segment, step = (num - 1, inner) if i == num * inner else divmod(i, inner)
            t = step / inner

            def make(segment=segment, t=t):
                pair = tree.stack(points[segment : segment + 2])
                params = at(pair, np.array([1 - t, t], np.float32))
                state = setup.state
                if has_state:
                    state = statistics.refresh(
                        setup.model.apply, params, state, setup.parts["train"]
                    )
                return {
                    part: {name: float(x) for name, x in mean(params, state).items()}
                    for part, mean in setup.averaged.items()
                }

            found.append(kept(options.out, f"{options.num_eval}-positions/{i:04d}", make))
            update(i + 1)
    return found


def rows_of(
    options: Options, names: list[str], lengths: list[float], found: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The barrier of each segment."""
    inner = options.num_eval - 1
    ts = np.linspace(0, 1, options.num_eval)
    rows = []
    for i, length in enumerate(lengths):
        for part in found[0]:
            for metric in METRICS:
                if metric not in found[0][part]:
                    continue
                values = [x[part][metric] for x in found[i * inner : (i + 1) * inner + 1]]
                barrier = surface.barrier(ts, values)
                rows.append(
                    {
                        "segment": f"{names[i]} to {names[i + 1]}",
                        "part": part,
                        "metric": metric,
                        "length": length,
                        "start": barrier.start,
                        "end": barrier.end,
                        "highest": barrier.highest,
                        "barrier": barrier.height,
                        "at": barrier.t,
                    }
                )
    return rows


def figure(names: list[str], lengths: list[float], found: list[dict[str, Any]]):
    """Loss and error along the whole path, over the distance."""
    inner = (len(found) - 1) // len(lengths)
    ends = np.concatenate([[0.0], np.cumsum(lengths)])
    distance = np.interp(np.arange(len(found)) / inner, np.arange(len(ends)), ends)
    metrics = [metric for metric in ("loss", "error") if metric in found[0]["train"]]
    along = {
        part: {metric: [x[part][metric] for x in found] for metric in found[0][part]}
        for part in found[0]
    }
    panels = [
        {
            "x": "distance along the path",
            "y": "loss (nats)" if metric == "loss" and "error" in metrics else metric,
            "percent": metric == "error",
            "legend": "above",
            "lines": {part: (distance, along[part][metric]) for part in along},
            "marks": {"networks": (ends, along["train"][metric][::inner])},
        }
        for metric in metrics
    ]
    data = {"distance": distance, "ends": ends, "names": names} | {
        f"{part}_{metric.replace(' + ', '_with_')}": values
        for part, given in along.items()
        for metric, values in given.items()
    }
    return plot.png(plot.curves(panels, size=(3.9, 2.9))), data


def main(options: Options) -> None:
    start = time.perf_counter()
    networks = load(options)
    first = networks[0]
    name = options.dataset or first.metadata["dataset"]
    if name is None:
        sys.exit("chain: the first network does not say what it was trained on; give --dataset.")
    data = datasets.load(name, options.data_dir)
    setup = make_setup(options, first, data)
    # A folder is claimed once the options are known to be good.
    report.claim(
        options.out,
        dataclasses.asdict(options) | {"contents": [contents(x) for x in networks]},
        may_differ=("data_dir", "out", "num_eval", "networks"),
    )
    facts = (
        f"geojax {geojax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}; "
        f"{first.model}, {tree.size(first.params):,} weights; {name}; {len(networks)} networks, "
        f"{options.num_eval} positions on each segment"
    )
    print(facts)
    names = names_of(options.networks)
    page = report.Report(options.out, "The straight path through networks", facts)
    page.chapter(
        "The path",
        f"It goes through {', '.join(names)}"
        + (", each with its units permuted to those of the one before." if options.align else "."),
    )
    points = [network.params for network in networks]
    numbers: dict[str, Any] = {"facts": facts}
    if options.align:
        points, matchings = align(options, setup, points)
        matchings = [
            {"network": label, "to": before} | row
            for label, before, row in zip(names[1:], names, matchings, strict=False)
        ]
        numbers["matchings"] = matchings
        page.text("The matchings, by weights:")
        page.table(matchings)
        print(f"\nMatchings by weights\n{report.text_table(matchings)}")
    lengths = [
        float(tree.norm(tree.axpy(-1.0, a, b))) for a, b in zip(points, points[1:], strict=False)
    ]
    found = measure(options, setup, points)
    rows = rows_of(options, names, lengths, found)
    page.text(
        "The barrier is the largest rise above the straight line between the values at the two "
        "ends of a segment, and 'at' says where between them, from 0 to 1. Lengths are Euclidean, "
        "in weight space. The table gives errors as fractions."
        + (
            " The statistics of the network's normalisation are those of each point, from the "
            "training part."
            if jax.tree.leaves(setup.state)
            else ""
        )
    )
    page.table(rows)
    print(f"\nThe segments\n{report.text_table(rows)}")
    image, arrays = figure(names, lengths, found)
    page.figure(
        "chain",
        image,
        f"Along the path through {', '.join(names)}; dots are the networks, on the training part.",
        arrays,
    )
    numbers |= {"segments": rows, "lengths": lengths, "along": found}
    (options.out / "result.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"\n{page.write().resolve()}  ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        sys.exit(f"chain: {error}")
    except KeyboardInterrupt:
        sys.exit("chain: stopped; the same command goes on from the position where it was.")
