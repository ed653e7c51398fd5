"""Align trained networks and merge them: Git Re-Basin on checkpoints, whatever the model.

The networks are ones that scripts/train.py saved (or `checkpoint.save_network`), of one model,
trained from different seeds or on different data. Their permutation symmetries are read off the
model and proved; all networks are brought to the units of the first. The folder gets a report with
the line between the networks before and after, the merged network as a checkpoint, each permuted
network, and all numbers as JSON. Finished parts are kept: the same command goes on after a stop.

  python scripts/train.py --seed 0 --out out/a
  python scripts/train.py --seed 1 --out out/b
  python scripts/rebasin.py --networks out/a/network out/b/network
  python scripts/rebasin.py --networks out/?/network --by activations --repair
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from typing import Any, Literal

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
    report,
    statistics,
    symmetry,
    tree,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the alignment."""

    networks: tuple[pathlib.Path, ...] = ()
    """The folders of two or more networks; the first keeps its units."""
    dataset: str | None = None
    """The data set of the curves; by default the one that the first network was trained on."""
    data_dir: pathlib.Path | None = None
    """Where archives and prepared folders lie; by default GEOJAX_DATA_DIR."""
    by: Literal["weights", "activations"] = "weights"
    """What tells which units belong together; activations need a pass over the training data."""
    method: Literal["best", "progressive", "frank_wolfe", "coordinate_descent"] = "best"
    """How weights are matched."""
    num_points: int = 25
    """Positions on each line."""
    num_examples: int | None = None
    """The first examples of each part; by default all."""
    batch_size: int = 1000
    """Examples computed at once."""
    repair: bool = False
    """Whether to correct the merged network's activations too (REPAIR), beside the plain one."""
    seed: int = 0
    """The seed of the proof's random permutations and of the matching."""
    out: pathlib.Path = pathlib.Path("out/rebasin")
    """The folder of the results."""


def load(options: Options) -> list[checkpoint.Network]:
    if len(options.networks) < 2:
        sys.exit("rebasin: give at least two networks: --networks out/a/network out/b/network.")
    networks = [checkpoint.load_network(path) for path in options.networks]
    first = networks[0]
    for path, network in zip(options.networks, networks, strict=True):
        if (network.model, network.options) != (first.model, first.options):
            sys.exit(
                f"rebasin: {path} is {network.model} {network.options}, and {options.networks[0]} "
                f"is {first.model} {first.options}; expected one model."
            )
    return networks


def label(options: Options, i: int) -> str:
    """The shortest end of a network's path that no other one shares."""
    parts = [path.parts for path in options.networks]
    for length in range(1, 1 + max(map(len, parts))):
        ends = ["/".join(p[-length:]) for p in parts]
        if len(set(ends)) == len(ends):
            break
    return ends[i]


def variables(network: Any) -> dict[str, Any]:
    return {"params": network.params, "state": {} if network.state is None else network.state}


def digest(networks: list[checkpoint.Network]) -> str:
    """Which weights these are: lines measured on others at the same paths are not these."""
    found = hashlib.sha256()
    for network in networks:
        for leaf in jax.tree.leaves(variables(network)):
            found.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return found.hexdigest()[:16]


def derive(model: Any, first: dict[str, Any], inputs: Any, seed: int) -> symmetry.PermutationSpec:
    """The spec, proved with random permutations before anything is matched."""

    def outputs(variables, inputs):
        return model.apply(variables["params"], variables["state"], inputs, False)[0]

    spec = symmetry.permutation_spec(outputs, first, inputs)
    symmetry.check(spec, outputs, first, inputs, key=jax.random.key(seed))
    return spec


def align(options: Options, model: Any, spec: Any, networks: list[Any], train: Any):
    """One permutation per network, the first one's the identity; and what to say of them."""
    ours, key = spec.at("params"), jax.random.key(options.seed)
    params = [network.params for network in networks]
    start = time.perf_counter()
    rows = []
    if options.by == "activations":

        def outputs(variables, inputs):
            return model.apply(variables["params"], variables["state"], inputs, False)[0]

        found = [permute.identity_permutation(spec)]
        for i, network in enumerate(networks[1:], 1):
            result = permute.activation_matching(
                spec, outputs, variables(networks[0]), variables(network), train, progress=True
            )
            found.append(result.permutation)
            scores = list(result.group_scores.values())
            rows.append(
                {
                    "network": i,
                    "groups": len(scores),
                    "mean correlation": float(np.mean(scores)),
                    "lowest of a group": float(np.min(scores)),
                    "dead units": sum(result.num_dead.values()),
                }
            )
    elif len(networks) == 2:
        result = permute.weight_matching(
            ours, *params, key=key, method=options.method, progress=True
        )
        found = [permute.identity_permutation(spec), result.permutation]
        rows.append(
            {
                "method": result.method,
                "inner product before": result.initial,
                "after": result.objective,
                "bound": result.bound,
                "fixed point": result.converged,
                "proved optimal": result.optimal,
            }
        )
    else:
        method = "frank_wolfe" if options.method == "best" else options.method
        many = permute.cycle_consistent_matching(
            ours, params, key=key, reference=0, method=method, progress=True
        )
        found = list(many.permutations)
        rows.append(
            {
                "pairs": len(params) * (len(params) - 1) // 2,
                "inner products before": many.initial,
                "after": many.objective,
                "bound": many.bound,
                "fixed point": many.converged,
            }
        )
    return found, rows, time.perf_counter() - start


def lines(options: Options, model: Any, networks: list[Any], moved: list[Any], parts: Any):
    """From the first network to each other one, before and after; kept once measured."""
    state = networks[0].state
    has_state = bool(jax.tree.leaves(state))

    def fresh(params):
        return statistics.refresh(model.apply, params, state, parts["train"])

    make = objectives.metrics_with_state if has_state else objectives.metrics
    metrics_fn = make(model.apply) if has_state else make(model.apply, {})
    found: dict[str, Any] = {}
    for i in range(1, len(networks)):
        for part, data in parts.items():
            for name, end in (("before", networks[i].params), ("after", moved[i]["params"])):

                def measure(end=end, data=data):
                    line = permute.barrier(
                        metrics_fn, networks[0].params, end, data,
                        ts=np.linspace(0, 1, options.num_points),
                        state_fn=fresh if has_state else None, progress=True,
                    )  # fmt: skip
                    return {
                        metric: value._asdict() | {"values": value.values.tolist()}
                        for metric, value in line.naive.items()
                    }

                found[f"{i}-{part}-{name}"] = kept(options.out, f"{i}-{part}-{name}", measure)
    return found


def kept(folder: pathlib.Path, name: str, make: Any) -> Any:
    """What `make` measures, read from the folder where it was measured before."""
    path = folder / "state" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".partial")
        whole.write_text(json.dumps(make()) + "\n")
        os.replace(whole, path)
    return json.loads(path.read_text())


def merged_rows(options: Options, model: Any, networks, moved, parts):
    """The networks themselves, their mean before and after alignment, and its repair."""
    metrics_fn = objectives.metrics_with_state(model.apply)
    measure = {part: batches.mean(metrics_fn, data) for part, data in parts.items()}
    has_state = bool(jax.tree.leaves(networks[0].state))
    weights = np.full(len(networks), 1 / len(networks), np.float32)

    def settle(params, state):
        if not has_state:
            return state
        return statistics.refresh(model.apply, params, state, parts["train"])

    def row(name, params, state):
        found = {"network": name}
        for part, fn in measure.items():
            for metric, value in fn(params, state).items():
                found[f"{part} {metric}"] = float(value)
        return found

    rows = [
        row(label(options, i), network.params, network.state) for i, network in enumerate(networks)
    ]
    state = networks[0].state
    naive = permute.weighted_mean(tree.stack([network.params for network in networks]), weights)
    rows.append(row("mean, not aligned", naive, settle(naive, state)))
    ends = tree.stack([x["params"] for x in moved])
    mean = permute.weighted_mean(ends, weights)
    merged = (mean, settle(mean, state))
    rows.append(row("mean, aligned", *merged))
    if options.repair:
        result = statistics.repair(
            model.apply, mean, ends, parts["train"], state={} if state is None else state,
            endpoint_states=tree.stack([x["state"] for x in moved]) if has_state else None,
        )  # fmt: skip
        merged = (result.params, settle(result.params, state))
        rows.append(row("mean, aligned, REPAIR", *merged))
    return rows, merged


def main(options: Options) -> None:
    start = time.perf_counter()
    networks = load(options)
    name = options.dataset or networks[0].metadata["dataset"]
    if name is None:
        sys.exit("rebasin: the first network does not say what it was trained on; give --dataset.")
    data = datasets.load(name, options.data_dir)
    claimed = dataclasses.asdict(options) | {"weights": digest(networks)}
    report.claim(options.out, claimed, may_differ=("data_dir", "out"))
    parts = {
        part: batches.split(
            jax.tree.map(lambda x: x[: options.num_examples], getattr(data, part)),
            options.batch_size,
        )
        for part in ("train", "test")
    }
    model = networks[0].build()
    spec = derive(model, variables(networks[0]), data.train.inputs[:2], options.seed)
    facts = (
        f"geojax {geojax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}; "
        f"{len(networks)} networks {networks[0].model}, {tree.size(networks[0].params):,} weights, "
        f"{len(spec.groups)} groups of units; {name}; seed {options.seed}"
    )
    print(facts)
    page = report.Report(options.out, "Networks modulo permutation", facts)
    (options.out / "spec.json").write_text(spec.to_json() + "\n")

    permutations, rows, seconds = align(options, model, spec, networks, parts["train"])
    moved = [
        permute.apply_permutation(spec, p, variables(network))
        for p, network in zip(permutations, networks, strict=True)
    ]
    page.chapter(
        "Matching",
        f"The symmetries of the model, read off its jaxpr and checked with random permutations: "
        f"{len(spec.groups)} groups. Units were matched by {options.by} in {seconds:.1f} s. The "
        "inner product of the weights rises as their distance falls; its bound is reached only by "
        "copies of one network."
        if options.by == "weights"
        else f"{len(spec.groups)} groups, matched by activations in {seconds:.1f} s.",
    )
    page.table(rows)
    print(f"\nMatching by {options.by}, {seconds:.1f} s\n{report.text_table(rows)}")

    found = lines(options, model, networks, moved, parts)
    metrics = list(found["1-train-before"])
    table = [
        {
            "line to": label(options, int(key.split("-")[0])),
            "part": key.split("-")[1],
            "alignment": key.split("-")[2],
            "metric": metric,
            "at t=0": value["start"],
            "at t=1": value["end"],
            "highest": value["highest"],
            "above the chord": value["height"],
            "above the mean of the ends": value["height_over_mean"],
        }
        for key, line in found.items()
        for metric, value in line.items()
    ]
    page.chapter(
        "The line between the networks",
        "From the first network to each other one, before and after its units were permuted. The "
        "barrier is given above the chord between the ends, and above the mean of the ends.",
    )
    page.table(table)
    print(f"\nThe line between them\n{report.text_table(table)}")
    ts = np.linspace(0, 1, options.num_points)
    for i in range(1, len(networks)):
        panels = [
            {
                "x": "position t on the line",
                "y": "loss (nats)" if metric == "loss" else metric,
                "percent": metric == "error",
                "legend": "above",
                "lines": {
                    f"{part}, {when}": (ts, found[f"{i}-{part}-{when}"][metric]["values"])
                    for when in ("before", "after")
                    for part in parts
                },
            }
            for metric in metrics
        ]
        page.figure(
            f"line-{i}",
            plot.png(plot.curves(panels, size=(3.9, 2.9))),
            f"On the line from {label(options, 0)} (t=0) to {label(options, i)} (t=1), before and "
            "after alignment.",
            {"t": ts}
            | {
                f"{part}_{when}_{metric}": np.asarray(found[f"{i}-{part}-{when}"][metric]["values"])
                for part in parts
                for when in ("before", "after")
                for metric in metrics
            },
        )

    rows, merged = merged_rows(options, model, networks, moved, parts)
    page.chapter("The merged network", "The mean of all networks, before and after alignment.")
    page.table(rows)
    print(f"\nMerged\n{report.text_table(rows)}")
    metadata = {"merged from": [str(path) for path in options.networks], "by": options.by}
    save(options.out / "merged", networks[0], *merged, metadata)
    for i, x in enumerate(moved[1:], 1):
        state = x["state"] if jax.tree.leaves(networks[i].state) else networks[i].state
        save(options.out / f"aligned-{i}", networks[i], x["params"], state, {})
    checkpoint.export_npz(options.out / "permutations.npz", tree_of(permutations))
    numbers = {"facts": facts, "lines": found, "networks": rows}
    (options.out / "result.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"\n{page.write().resolve()}  ({time.perf_counter() - start:.0f} s)")


def save(path: pathlib.Path, network: Any, params: Any, state: Any, metadata: dict) -> None:
    if path.exists():
        return
    checkpoint.save_network(
        path, params, state, model=network.model, options=network.options,
        dataset=network.metadata["dataset"], metadata=metadata,
    )  # fmt: skip


def tree_of(permutations: list[Any]) -> dict[str, Any]:
    return {
        f"{i}:{name}": np.asarray(order)
        for i, permutation in enumerate(permutations)
        for name, order in permutation.items()
    }


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        sys.exit(f"rebasin: {error}")
    except KeyboardInterrupt:
        sys.exit("rebasin: stopped; the same command goes on from what is measured.")
