"""The loss barrier between two networks, before and after their units are aligned.

Three studies of Git Re-Basin. `epochs`: the barrier between two networks along their training.
`widths`: the barrier between trained networks of growing width. `split`: two networks trained on
halves of the data with different classes, merged into one, against their ensemble and a network
trained on all of it.

Stop it at any time and call it again with the same options: it goes on from its last checkpoint and
skips what is measured already. The folder gets a report page, each figure with its data, one file
of numbers for each pair of networks, and all numbers as JSON.

  python scripts/barrier_study.py
  python scripts/barrier_study.py --study widths --pairs 3 --out out/widths
  python scripts/barrier_study.py --study split --dataset cifar10 --model vgg16 --out out/split
"""

import dataclasses
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
from geojax import batches, checkpoint, datasets, fit, models, objectives, plot, report, statistics
from geojax.datasets.splits import class_skewed_split
from geojax.permute import evaluation, weight_matching
from geojax.symmetry import permutation_spec


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the study."""

    study: Literal["epochs", "widths", "split"] = "epochs"
    """Along training, over widths, or of networks from two halves of the data."""
    dataset: str = "digits"
    """The data set: digits, mnist, fashion_mnist, cifar10, cifar100."""
    data_dir: pathlib.Path | None = None
    """Where archives and prepared folders lie; by default GEOJAX_DATA_DIR."""
    download: bool = False
    """Whether tensorflow-datasets may fetch the data set."""
    model: str = "mlp"
    """The model, by its name in `geojax.models.NAMES`."""
    model_options: str | None = None
    """The model's options as JSON; the number of classes is filled in. By default the mlp has three
    hidden layers of 128 units."""
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    """For the study of widths: units of each hidden layer of the mlp, or width multipliers."""
    epochs: int = 40
    """Passes over the training data."""
    batch_size: int = 128
    """Examples in a step; what is left over at the end of an epoch is left out of it."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam, or SGD with momentum 0.9; the rate is constant."""
    learning_rate: float = 1e-3
    """The learning rate."""
    pairs: int = 1
    """Pairs of networks, from seeds of their own; their mean is shown."""
    num_epochs: int = 10
    """For the study of epochs: how many of them are measured; the first is 0, before training."""
    fraction: float = 0.2
    """For the study of halves: the share of the scarce classes that a half gets."""
    method: Literal["best", "progressive", "frank_wolfe", "coordinate_descent"] = "best"
    """How weights are matched."""
    num_points: int = 25
    """Positions on the line between two networks."""
    seed: int = 0
    """The seed of initial weights, the order of the data and the visits of the matching."""
    out: pathlib.Path = pathlib.Path("out/barrier")
    """The folder of the results."""
    checkpoint_every: float = 10.0
    """Epochs between checkpoints."""


class Setup(NamedTuple):
    """A model with its data."""

    options: Options
    data: datasets.Dataset
    model: models.Model
    chosen: dict[str, Any]
    state: Any
    loss_fn: Any
    optimizer: Any
    metrics_fn: Any
    parts: dict[str, Any]


def make_setup(options: Options, data: datasets.Dataset, width: int | None = None) -> Setup:
    given = options.model_options
    if given is None:
        given = '{"widths": [128, 128, 128]}' if options.model == "mlp" else "{}"
    chosen = {"num_classes": data.num_classes} | json.loads(given)
    if width is not None and options.model == "mlp":
        depth = len(chosen.get("widths", models.options("mlp")["widths"]))
        chosen["widths"] = [width] * depth
    elif width is not None:
        chosen["width_multiplier"] = width
    model = models.build(options.model, **chosen)
    _, state = model.init(jax.random.key(0), data.train.inputs[:1])
    rate = options.learning_rate
    rule = optax.adam(rate) if options.optimizer == "adam" else optax.sgd(rate, 0.9)
    if jax.tree.leaves(state):
        metrics_fn = objectives.metrics_with_state(model.apply)
    else:
        metrics_fn = objectives.metrics(model.apply, state)
    return Setup(
        options, data, model, chosen, state, objectives.loss(model.apply, state), rule, metrics_fn,
        {part: batches.split(getattr(data, part), 1000) for part in ("train", "test")},
    )  # fmt: skip


def state_fn(setup: Setup):
    """Statistics at each point of a line, for networks that have them."""
    if not jax.tree.leaves(setup.state):
        return None
    return lambda params: statistics.refresh(
        setup.model.apply, params, setup.state, setup.parts["train"]
    )


def make_spec(setup: Setup):
    # Normalised by its batch, a network reads no running statistics, which would fix their axes.
    train = bool(jax.tree.leaves(setup.state))
    params, _ = setup.model.init(jax.random.key(0), setup.data.train.inputs[:1])

    def outputs(params, inputs):
        return setup.model.apply(params, setup.state, inputs, train, jax.random.key(0))[0]

    return permutation_spec(outputs, params, setup.data.train.inputs[:2])


def train(setup: Setup, folder: pathlib.Path, seed: int, epochs: int, examples=None):
    """The weights of a network after some epochs; goes on from the last checkpoint."""
    examples = setup.data.train if examples is None else examples
    key_init, key_order, key_run = jax.random.split(jax.random.key(seed), 3)
    params, _ = setup.model.init(key_init, examples.inputs[:1])
    if not epochs:
        return params
    size = min(setup.options.batch_size, len(examples.labels))
    order = batches.split(examples, size, key=key_order, drop_remainder=True)
    every = max(1, round(setup.options.checkpoint_every * len(order)))
    return fit.fit(
        setup.loss_fn,
        params,
        order,
        setup.optimizer,
        epochs * len(order),
        key=key_run,
        checkpoint=checkpoint.Checkpointer(folder, every=every, keep=1),
    ).params


def measure(setup: Setup, spec: Any, a: Any, b: Any, seed: int) -> dict[str, Any]:
    """Align B to A and measure both lines on both parts of the data."""
    start = time.perf_counter()
    key = jax.random.key(seed)
    found = weight_matching(spec, a, b, key=key, method=setup.options.method)
    out: dict[str, Any] = {
        "objective": found.objective, "initial": found.initial, "bound": found.bound,
        "method": found.method, "converged": bool(found.converged),
        "matching_seconds": time.perf_counter() - start,
        "permutation": {name: np.asarray(x).tolist() for name, x in found.permutation.items()},
    }  # fmt: skip
    for part, data in setup.parts.items():
        lines = evaluation.barrier(
            setup.metrics_fn, a, b, data, spec=spec, permutation=found.permutation,
            ts=np.linspace(0, 1, setup.options.num_points), state_fn=state_fn(setup),
        )  # fmt: skip
        out["ts"] = lines.ts.tolist()
        out[part] = {
            name: {
                metric: value._asdict() | {"values": value.values.tolist()}
                for metric, value in line.items()
            }
            for name, line in (("naive", lines.naive), ("aligned", lines.aligned or {}))
        }
    return out


def point(options: Options, name: str, make) -> dict[str, Any]:
    """What `make` measures, kept in a file of the folder; made only where that is missing."""
    path = options.out / "points" / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    found = json.loads(json.dumps(make()))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".partial")
    whole.write_text(json.dumps(found) + "\n")
    os.replace(whole, path)
    print(name, flush=True)
    return found


def rows_of(name: str, values, points: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each value: the mean of the barriers over the pairs."""
    return [
        {name: value}
        | {
            f"{line} {part} {metric}": float(
                np.mean([found[part][line][metric]["height"] for found in pairs])
            )
            for metric in ("loss", "error")
            for part in ("train", "test")
            for line in ("naive", "aligned")
        }
        for value, pairs in zip(values, points, strict=True)
    ]


def barrier_panels(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    x = [row[name] for row in rows]
    labels = {"loss": "loss barrier", "error": "error barrier"}
    return [
        {
            "x": name,
            "y": labels[metric],
            "percent": metric == "error",
            "lines": {
                f"{line}, {part}": (x, [row[f"{line} {part} {metric}"] for row in rows])
                for line in ("naive", "aligned")
                for part in ("train", "test")
            },
        }
        for metric in ("loss", "error")
    ]


def line_panels(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "x": "position from A (0) to B (1)",
            "y": metric,
            "percent": metric == "error",
            "lines": {
                f"{line}, {part}": (found["ts"], found[part][line][metric]["values"])
                for line in ("naive", "aligned")
                for part in ("train", "test")
            },
        }
        for metric in ("loss", "error")
    ]


def polished(figure, markers=False, ticks=None):
    """One legend above the panels, one color for a line and dashes for its test part.

    With ticks, the x axis is in powers of two.
    """
    colors: dict[str, Any] = {}
    for axes in figure.axes:
        for line in axes.get_lines():
            name, _, part = str(line.get_label()).partition(", ")
            line.set_color(colors.setdefault(name, line.get_color()))
            if part:
                line.set_linestyle((0, (4, 2)) if part == "test" else "-")
            if markers or ticks is not None:
                line.set(marker="o", markersize=3)
        if ticks is not None:
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
        axes.get_legend().remove()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9,
        handlelength=2.5, columnspacing=1.4,
    )  # fmt: skip
    return figure


def figure_data(panels: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {
        f"{panel['y']} {axis}: {label}": np.asarray(values)
        for panel in panels
        for label, line in panel["lines"].items()
        for axis, values in zip("xy", line, strict=True)
    }


def add_figure(page: report.Report, name: str, panels, caption: str, **options) -> None:
    figure = polished(plot.curves(panels, size=(3.4, 2.7)), **options)
    page.figure(name, plot.png(figure), caption, figure_data(panels))


def seeds(options: Options, pair: int) -> tuple[int, int]:
    first = options.seed + 2 * pair
    return first, first + 1


def study_epochs(setup: Setup, page: report.Report) -> dict[str, Any]:
    options = setup.options
    spec = make_spec(setup)
    epochs = [0]
    for epoch in np.geomspace(1, options.epochs, max(1, options.num_epochs - 1)):
        epochs.append(max(round(epoch), epochs[-1] + 1))
    epochs = sorted({min(epoch, options.epochs) for epoch in epochs} | {options.epochs})
    points: list[list[dict[str, Any]]] = [[] for _ in epochs]
    for pair in range(options.pairs):
        for i, epoch in enumerate(epochs):

            def make(pair=pair, epoch=epoch):
                a, b = (
                    train(setup, options.out / "networks" / f"seed_{seed}", seed, epoch)
                    for seed in seeds(options, pair)
                )
                return measure(setup, spec, a, b, options.seed)

            points[i].append(point(options, f"epoch_{epoch}_pair_{pair}", make))
    rows = rows_of("epoch", epochs, points)
    page.chapter(
        "Barrier along training",
        "The height of each metric above the chord between two networks from different seeds, "
        f"after equal numbers of epochs; the mean of {options.pairs} pair(s).",
    )
    page.table(rows)
    panels = barrier_panels("epoch", rows)
    add_figure(page, "barrier", panels, "Barriers along training.", markers=True)
    last = points[-1][0]
    add_figure(page, "lines", line_panels(last), f"The lines after {epochs[-1]} epochs.")
    return {"rows": rows}


def study_widths(setup: Setup, page: report.Report) -> dict[str, Any]:
    from scipy.stats import rankdata

    options = setup.options
    points: list[list[dict[str, Any]]] = []
    for width in options.widths:
        wide = make_setup(options, setup.data, width)
        spec = make_spec(wide)
        points.append([])
        for pair in range(options.pairs):

            def make(wide=wide, spec=spec, width=width, pair=pair):
                folder = options.out / "networks" / f"width_{width}"
                a, b = (
                    train(wide, folder / f"seed_{seed}", seed, options.epochs)
                    for seed in seeds(options, pair)
                )
                return measure(wide, spec, a, b, options.seed)

            points[-1].append(point(options, f"width_{width}_pair_{pair}", make))
    rows = rows_of("width", options.widths, points)
    correlation = {}
    if len(rows) > 2:
        for part in ("train", "test"):
            heights = [row[f"aligned {part} loss"] for row in rows]
            ranks = np.corrcoef(rankdata(options.widths), rankdata(heights))
            correlation[part] = float(ranks[0, 1])
    page.chapter(
        "Barrier against width",
        "The height of each metric above the chord between two trained networks from different "
        f"seeds; the mean of {options.pairs} pair(s). Spearman's rank correlation of width and "
        "aligned loss barrier: "
        + (", ".join(f"{k} {v:.2f}" for k, v in correlation.items()) or "too few widths")
        + ".",
    )
    page.table(rows)
    panels = barrier_panels("width", rows)
    add_figure(page, "barrier", panels, "Barriers against width.", ticks=options.widths)
    widest = points[-1][0]
    add_figure(page, "lines", line_panels(widest), f"The lines at width {options.widths[-1]}.")
    return {"rows": rows, "spearman": correlation}


def ensemble_metrics(setup: Setup):
    """The metrics of the weighted mean of two networks' logits, at a position between them."""
    refresh = state_fn(setup)

    def metrics_fn(a, b, t, batch):
        logits = [
            setup.model.apply(params, state, batch.inputs, False)[0] for params, state in (a, b)
        ]
        mixed = jax.tree.map(lambda x, y: (1 - t) * x + t * y, *logits)
        return objectives.metrics(lambda params, state, inputs, train: (mixed, state), {})(
            {}, batch
        )

    def at(params):
        return params, setup.state if refresh is None else refresh(params)

    averaged = batches.mean(metrics_fn, setup.parts["test"])
    return lambda a, b, ts: [averaged(at(a), at(b), np.float32(t)) for t in ts]


def study_split(setup: Setup, page: report.Report) -> dict[str, Any]:
    options, data = setup.options, setup.data
    spec = make_spec(setup)
    halves = class_skewed_split(
        data.train.labels, key=jax.random.key(options.seed), fraction=options.fraction,
        num_classes=data.num_classes,
    )  # fmt: skip
    points = []
    for pair in range(options.pairs):

        def make(pair=pair):
            folder = options.out / "networks" / f"pair_{pair}"
            first, second = seeds(options, pair)
            a, b = (
                train(setup, folder / name, seed, options.epochs,
                      jax.tree.map(lambda x, rows=rows: x[rows], data.train))
                for name, seed, rows in (("a", first, halves[0]), ("b", second, halves[1]))
            )  # fmt: skip
            union = train(setup, folder / "union", first, options.epochs)
            found = measure(setup, spec, a, b, options.seed)
            refresh = state_fn(setup)
            extra = () if refresh is None else (refresh(union),)
            found["union"] = {
                k: float(v)
                for k, v in batches.mean(setup.metrics_fn, setup.parts["test"])(
                    union, *extra
                ).items()
            }
            mixed = ensemble_metrics(setup)(a, b, found["ts"])
            found["ensemble"] = {k: [float(row[k]) for row in mixed] for k in mixed[0]}
            return found

        points.append(point(options, f"pair_{pair}", make))

    def mean(get):
        return np.mean([get(found) for found in points], axis=0)

    ts = np.asarray(points[0]["ts"])
    lines = {
        metric: {
            "naive": mean(lambda p, m=metric: p["test"]["naive"][m]["values"]),
            "aligned": mean(lambda p, m=metric: p["test"]["aligned"][m]["values"]),
            "ensemble of logits": mean(lambda p, m=metric: p["ensemble"][m]),
            "trained on both": np.full(len(ts), mean(lambda p, m=metric: p["union"][m])),
        }
        for metric in ("loss", "error")
    }
    middle = int(np.argmin(np.abs(ts - 0.5)))
    places = {
        "A": ("naive", 0), "B": ("naive", -1), "naive, middle": ("naive", middle),
        "aligned, middle": ("aligned", middle),
        "aligned, best": ("aligned", int(np.argmin(lines["loss"]["aligned"]))),
        "ensemble, middle": ("ensemble of logits", middle),
        "trained on both": ("trained on both", 0),
    }  # fmt: skip
    rows = [
        {"network": name, "position": float(ts[i])}
        | {f"test {metric}": float(lines[metric][line][i]) for metric in lines}
        for name, (line, i) in places.items()
    ]
    counts = [np.bincount(data.train.labels[half], minlength=10).tolist() for half in halves]
    page.chapter(
        "Networks from two halves of the data",
        f"The halves hold {len(halves[0])} and {len(halves[1])} examples, with "
        f"{options.fraction:.0%} of each class in one half of the classes and the rest of the "
        f"others; on the test part, the mean of {options.pairs} pair(s). Examples of each class: "
        f"{counts[0]} and {counts[1]}.",
    )
    page.table(rows)
    panels = [
        {
            "x": "position from A (0) to B (1)",
            "y": f"test {metric}",
            "percent": metric == "error",
            "lines": {name: (ts, values) for name, values in lines[metric].items()},
        }
        for metric in lines
    ]
    add_figure(page, "split", panels, "Test loss and error between networks of the two halves.")
    return {"rows": rows, "examples": counts}


def main(options: Options) -> None:
    start = time.perf_counter()
    try:
        json.loads(options.model_options or "{}")
    except json.JSONDecodeError as error:
        sys.exit(f"barrier_study: --model-options is no JSON object: {error}.")
    if options.pairs < 1 or options.epochs < 1 or options.num_points < 3:
        sys.exit("barrier_study: expected at least 1 pair, 1 epoch and 3 points.")
    data = datasets.load(options.dataset, options.data_dir, download=options.download)
    setup = make_setup(options, data)
    if options.study == "widths":
        make_setup(options, data, options.widths[0])  # unknown options are an error before work
    report.claim(
        options.out,
        dataclasses.asdict(options),
        may_differ=("data_dir", "out", "download", "checkpoint_every"),
    )
    what = json.dumps(setup.chosen)
    if options.study == "widths":
        what = f"of widths {', '.join(map(str, options.widths))}"
    facts = (
        f"geojax {geojax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}; "
        f"{options.model} {what} on {options.dataset} ({data.source}), "
        f"{options.optimizer} at {options.learning_rate:g}, {options.epochs} epochs; "
        f"seed {options.seed}"
    )
    print(facts)
    page = report.Report(options.out, "Barriers modulo permutations", facts)
    study = {"epochs": study_epochs, "widths": study_widths, "split": study_split}[options.study]
    numbers: dict[str, Any] = {"facts": facts, "study": options.study} | study(setup, page)
    (options.out / "result.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(report.text_table(numbers["rows"]))
    for part, value in numbers.get("spearman", {}).items():
        print(f"rank correlation of width and aligned {part} loss barrier: {value:.2f}")
    print(f"{page.write().resolve()}  ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        sys.exit(f"barrier_study: {error}")
    except KeyboardInterrupt:
        sys.exit("barrier_study: stopped; the same command goes on from the last checkpoint.")
