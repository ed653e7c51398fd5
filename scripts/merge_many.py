"""Train many networks on halves of the data, bring them to one frame, and merge them into one.

The experiment of Git Re-Basin's section 5.4: each network sees a random half of the training data
of its own. All are aligned, and the mean of their weights is set against the networks themselves,
the mean without alignment, the best of a greedy soup, and the ensemble of all, which costs n times
as much to run. The folder gets a report page with reliability diagrams, the merged network, and all
numbers as JSON. Stop it at any time: the same command goes on from its last checkpoint.

  python scripts/merge_many.py
  python scripts/merge_many.py --dataset mnist --num-networks 32 --epochs 100 --out out/many
"""

import dataclasses
import json
import pathlib
import sys
import time
from typing import Any, Literal

import jax
import numpy as np
import optax
import tyro

import geojax
from geojax import (
    batches,
    checkpoint,
    datasets,
    ensemble,
    fit,
    models,
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
    """Options of the experiment."""

    num_networks: int = 8
    """How many networks."""
    fraction: float = 0.5
    """The share of the training data that each one sees, drawn for itself."""
    dataset: str = "digits"
    """The data set: digits, mnist, fashion_mnist, cifar10, cifar100."""
    data_dir: pathlib.Path | None = None
    """Where archives and prepared folders lie; by default GEOJAX_DATA_DIR."""
    model: str = "mlp"
    """The model, by its name in `geojax.models.NAMES`."""
    model_options: str = '{"widths": [256, 256]}'
    """The model's options as JSON; the number of classes is filled in."""
    epochs: int = 40
    """Passes of each network over its half."""
    batch_size: int = 64
    """Examples in a step; what is left over at the end of an epoch is left out of it."""
    learning_rate: float = 1e-3
    """The constant learning rate of Adam."""
    method: Literal["cycle_consistent", "merge_many"] = "cycle_consistent"
    """Frank-Wolfe on all networks from a star, or the original's algorithm."""
    repair: bool = False
    """Whether to correct the merged network's activations too (REPAIR)."""
    seed: int = 0
    """The seed of initial weights, halves, orders and visits."""
    out: pathlib.Path = pathlib.Path("out/merge_many")
    """The folder of the results."""
    checkpoint_every: float = 10.0
    """Epochs between checkpoints."""


def train(options: Options, model: Any, chosen: dict, state: Any, data: Any) -> list[Any]:
    """The networks, each trained on its own half; read back where they are finished."""
    loss_fn = objectives.loss(model.apply, state)
    optimizer = optax.adam(options.learning_rate)
    num = round(options.fraction * len(data.train.labels))
    found = []
    for i in range(options.num_networks):
        folder = options.out / "networks" / str(i)
        if folder.exists():
            found.append(checkpoint.load_network(folder).params)
            continue
        keys = jax.random.split(jax.random.fold_in(jax.random.key(options.seed), i), 4)
        half = np.asarray(jax.random.permutation(keys[0], len(data.train.labels)))[:num]
        examples = jax.tree.map(lambda x, half=half: x[half], data.train)
        params, _ = model.init(keys[1], examples.inputs[:1])
        size = min(options.batch_size, num)
        order = batches.split(examples, size, key=keys[2], drop_remainder=True)
        every = max(1, round(options.checkpoint_every * len(order)))
        params = fit.fit(
            loss_fn, params, order, optimizer, options.epochs * len(order), key=keys[3],
            checkpoint=checkpoint.Checkpointer(options.out / "state" / str(i), every=every, keep=1),
        ).params  # fmt: skip
        checkpoint.save_network(
            folder, params, state if jax.tree.leaves(state) else None, model=options.model,
            options=chosen, dataset=data.name, seed=i,
        )  # fmt: skip
        print(f"network {i} trained", flush=True)
        found.append(params)
    return found


def main(options: Options) -> None:
    start = time.perf_counter()
    if options.num_networks < 2 or not 0 < options.fraction <= 1:
        sys.exit("merge_many: expected at least two networks, and a fraction in (0, 1].")
    data = datasets.load(options.dataset, options.data_dir, validation=None)
    chosen = {"num_classes": data.num_classes} | json.loads(options.model_options)
    model = models.build(options.model, **chosen)
    report.claim(options.out, dataclasses.asdict(options), may_differ=("data_dir", "out"))
    _, state = model.init(jax.random.key(0), data.train.inputs[:1])
    has_state = bool(jax.tree.leaves(state))
    facts = (
        f"geojax {geojax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}; "
        f"{options.num_networks} networks {options.model} on {options.fraction:.0%} of "
        f"{options.dataset} each; seed {options.seed}"
    )
    print(facts)
    page = report.Report(options.out, "Many networks merged into one", facts)
    networks = train(options, model, chosen, state, data)

    parts = {p: batches.split(getattr(data, p), 1000) for p in ("train", "validation", "test")}

    def fresh(params):
        if not has_state:
            return state
        return statistics.refresh(model.apply, params, state, parts["train"])

    def model_fn(params, state, batch):
        return model.apply(params, state, batch.inputs, False)[0]

    # In training mode a network reads no running statistics, whose axes would otherwise be fixed.
    spec = symmetry.permutation_spec(
        lambda p, x: model.apply(p, state, x, has_state, jax.random.key(0))[0],
        networks[0], data.train.inputs[:2],
    )  # fmt: skip
    before = time.perf_counter()
    align = (
        permute.merge_many if options.method == "merge_many" else permute.cycle_consistent_matching
    )
    found = align(spec, networks, key=jax.random.key(options.seed), progress=True)
    seconds = time.perf_counter() - before
    moved = [
        permute.apply_permutation(spec, p, x)
        for p, x in zip(found.permutations, networks, strict=True)
    ]
    rows = [
        {
            "method": options.method,
            "inner products of all pairs, before": found.initial,
            "after": found.objective,
            "bound": found.bound,
            "fixed point": found.converged,
            "seconds": seconds,
        }
    ]
    page.chapter(
        "Alignment",
        "All networks were brought to one frame, so that going around any cycle of them is the "
        "identity. The sum over pairs of the inner products of their weights rises as their "
        "squared distances fall.",
    )
    page.table(rows)
    print(f"\nAlignment\n{report.text_table(rows)}")

    metrics_fn = objectives.metrics_with_state(model.apply)
    measure = {name: batches.mean(metrics_fn, part) for name, part in parts.items()}

    def score(params):
        return -float(measure["validation"](params, fresh(params))["loss"])

    # Members are chosen on validation data; the test data are read once, for the table.
    soup = permute.greedy_soup(tree.stack(moved), score)
    merged = {
        "mean, not aligned": permute.uniform_soup(tree.stack(networks)),
        "mean, aligned": found.params,
        f"greedy soup of {len(soup.members)}, aligned": soup.params,
    }
    if options.repair:
        merged["mean, aligned, REPAIR"] = statistics.repair(
            model.apply, found.params, tree.stack(moved), parts["train"], state=state
        ).params
    labels = np.asarray(data.test.labels)
    predictions = {
        name: ensemble.predict(model_fn, [params], parts["test"], state_fn=fresh)
        for name, params in [("network 0", networks[0]), *merged.items()]
    }
    predictions["ensemble of all"] = ensemble.predict(
        model_fn, networks, parts["test"], state_fn=fresh, progress=True
    )
    table = []
    singles = [
        {f"{p} {k}": float(v) for p, fn in measure.items() for k, v in fn(x, fresh(x)).items()}
        for x in networks
    ]
    calibrations = {name: ensemble.calibration(x, labels) for name, x in predictions.items()}
    for name, found_one in calibrations.items():
        table.append(
            {
                "network": name,
                "test error": 1 - float(found_one.accuracy.value),
                "test NLL": float(found_one.nll.value),
                "Brier": float(found_one.brier.value),
                "ECE": float(found_one.ece.value),
            }
        )
    spread = [x["test error"] for x in singles]
    page.chapter(
        "The merged network",
        f"Test data: {len(labels)} examples. The {len(networks)} networks themselves have test "
        f"errors from {min(spread):.2%} to {max(spread):.2%}, mean {np.mean(spread):.2%}, and a "
        f"mean test loss of {np.mean([x['test loss'] for x in singles]):.4f}. The ensemble "
        "averages probabilities.",
    )
    page.table(table)
    print(f"\nMerged; the networks' mean test error is {np.mean(spread):.2%}")
    print(report.text_table(table))
    shown = {
        k: v for k, v in calibrations.items() if k != f"greedy soup of {len(soup.members)}, aligned"
    }
    page.figure(
        "reliability",
        plot.png(plot.reliability(shown)),
        "Accuracy against confidence on the test data, with the number of examples in each bin.",
        {name: np.exp(x) for name, x in predictions.items()} | {"labels": labels},
    )
    if not (options.out / "merged").exists():
        best = merged.get("mean, aligned, REPAIR", found.params)
        checkpoint.save_network(
            options.out / "merged", best, fresh(best) if has_state else None,
            model=options.model, options=chosen, dataset=data.name,
        )  # fmt: skip
    numbers = {"facts": facts, "alignment": rows, "networks": singles, "merged": table}
    (options.out / "result.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"\n{page.write().resolve()}  ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        sys.exit(f"merge_many: {error}")
    except KeyboardInterrupt:
        sys.exit("merge_many: stopped; the same command goes on from the last checkpoint.")
