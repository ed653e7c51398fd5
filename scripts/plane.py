"""Draw the loss on the plane through three networks, or through a trained curve.

The networks are ones that scripts/train.py saved (or `checkpoint.save_network`), of one model. With
a folder of scripts/connect.py the plane goes through the ends of the curve and its middle control
point, and the curve and its control points are drawn. At each point of the plane normalisation
statistics are its own. The folder gets a report, contours of the loss on the training part and of
the error on the test part with their data, and all numbers as JSON. Stop it at any time and call it
again with the same options: it goes on from its last checkpoint.

  python scripts/plane.py --networks out/a/network out/b/network out/c/network
  python scripts/connect.py --networks out/a/network out/b/network
  python scripts/plane.py --curve out/connect
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
import tyro

import geojax
from geojax import (
    batches,
    checkpoint,
    curves,
    datasets,
    objectives,
    plot,
    report,
    statistics,
    surface,
    tree,
)

# Positions at which a curve is drawn.
NUM_DRAWN = 201


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the plane."""

    networks: tuple[pathlib.Path, ...] = ()
    """The folders of three networks; the first is the origin, the second lies on the x axis."""
    curve: pathlib.Path | None = None
    """Instead of networks: the folder that scripts/connect.py wrote."""
    num: int = 21
    """Positions along each axis; the loss is measured at its square."""
    margin: float = 0.2
    """What is added around the three points on each side, as a part of their width and height."""
    metric: Literal["loss", "error"] = "loss"
    """What the figure of the training part shows; that of the test part shows the error."""
    top: float | None = None
    """The highest level in the training part's figure; by default the largest value."""
    dataset: str | None = None
    """The data set; by default the one that the first network or the curve was trained on."""
    data_dir: pathlib.Path | None = None
    """Where archives and prepared folders lie; by default GEOJAX_DATA_DIR."""
    num_examples: int | None = None
    """The first examples of each part; by default all."""
    batch_size: int = 1000
    """Examples computed at once."""
    out: pathlib.Path = pathlib.Path("out/plane")
    """The folder of the results."""


class Subject(NamedTuple):
    """What the plane goes through, and what is drawn in it."""

    network: checkpoint.Network
    corners: list[Any]
    points: dict[str, Any]
    curve: Any
    text: str


def labels(paths: tuple[pathlib.Path, ...]) -> list[str]:
    """The shortest parts of the paths that tell them apart: out/a/network is a."""
    parts = [path.parts for path in paths]
    while len({p[-1:] for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[:-1] for p in parts]
    for length in range(1, 1 + max(map(len, parts))):
        ends = ["/".join(p[-length:]) for p in parts]
        if len(set(ends)) == len(ends):
            return ends
    sys.exit(f"plane: a network is given twice: {', '.join(map(str, paths))}.")


def load(options: Options) -> Subject:
    if options.num < 2 or not options.margin > -0.5:
        sys.exit(
            f"plane: --num is {options.num} and --margin {options.margin}; expected at least 2 and "
            "a number above -0.5."
        )
    if options.curve is not None:
        if options.networks:
            sys.exit("plane: expected --networks or --curve, got both.")
        return load_curve(options.curve)
    if len(options.networks) != 3:
        sys.exit(
            f"plane: got {len(options.networks)} networks; expected three, or a curve: --networks "
            "out/a/network out/b/network out/c/network, or --curve out/connect."
        )
    names = labels(options.networks)
    networks = [checkpoint.load_network(path) for path in options.networks]
    first = networks[0]
    for path, network in zip(options.networks, networks, strict=True):
        if (network.model, network.options) != (first.model, first.options):
            sys.exit(
                f"plane: {path} is {network.model} {network.options}, and {options.networks[0]} "
                f"is {first.model} {first.options}; expected one model."
            )
    corners = [network.params for network in networks]
    return Subject(
        first, corners, dict(zip(names, corners, strict=True)), None,
        f"The plane goes through {names[0]}, the origin, {names[1]}, on the x axis, and "
        f"{names[2]}.",
    )  # fmt: skip


def load_curve(folder: pathlib.Path) -> Subject:
    found = checkpoint.load_network(folder / "curve" if (folder / "curve").is_dir() else folder)
    kind = found.metadata.get("basis")
    if kind not in ("bezier", "polychain"):
        sys.exit(f"plane: {folder} is no curve; expected the folder that scripts/connect.py wrote.")
    num = found.metadata["num_points"]
    basis = getattr(curves, kind)(num)
    members = tree.unstack(found.params)
    middle = num // 2
    bends = ["bend" if num == 3 else f"bend {i}" for i in range(1, num - 1)]
    names = ["t=0", *bends, "t=1"]
    line = curves.points(basis, found.params, np.linspace(0, 1, NUM_DRAWN))
    return Subject(
        found, [members[0], members[-1], members[middle]],
        dict(zip(names, members, strict=True)), line,
        f"The plane goes through the ends of the {kind} curve, t=0 at the origin and t=1 on the x "
        f"axis, and through its control point '{names[middle]}'.",
    )  # fmt: skip


def contents(points: dict[str, Any]) -> str:
    """What tells networks from others that were saved to the same paths later."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(list(points.values())):
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


def rows_of(options: Options, subject: Subject, frame, metrics_fn, state_fn, parts) -> list[dict]:
    """The marked points themselves: where they lie, and their own metrics; measured once."""

    def make():
        measured = {part: batches.mean(metrics_fn, source) for part, source in parts.items()}
        places = frame.project(list(subject.points.values()))
        rows = []
        for i, params in enumerate(subject.points.values()):
            x, y = places.coordinates[i]
            row = {"x": x, "y": y, "off the plane": places.distances[i]}
            extra = () if state_fn is None else (state_fn(params),)
            for part, fn in measured.items():
                for metric, value in fn(params, *extra).items():
                    row[f"{part} {metric}"] = float(value)
            rows.append(row)
        return rows

    rows = kept(options.out, "points", make)
    return [{"point": name} | row for name, row in zip(subject.points, rows, strict=True)]


def main(options: Options) -> None:
    start = time.perf_counter()
    subject = load(options)
    network = subject.network
    name = options.dataset or network.metadata["dataset"]
    if name is None:
        sys.exit("plane: the first network does not say what it was trained on; give --dataset.")
    data = datasets.load(name, options.data_dir)
    task = "regression" if data.num_classes is None else "classification"
    if task == "regression" and options.metric == "error":
        sys.exit(f"plane: {name} has no classes; expected --metric loss.")
    frame = surface.frame(subject.corners)
    parts = {
        part: batches.split(
            jax.tree.map(lambda x: x[: options.num_examples], getattr(data, part)),
            options.batch_size,
        )
        for part in ("train", "test")
    }
    # A folder is claimed once the options are known to be good.
    report.claim(
        options.out, dataclasses.asdict(options) | {"contents": contents(subject.points)},
        may_differ=("networks", "curve", "metric", "top", "data_dir", "out"),
    )  # fmt: skip
    model, state = network.build(), network.state
    has_state = bool(jax.tree.leaves(state))
    if has_state:
        metrics_fn = objectives.metrics_with_state(model.apply, task)
    else:
        metrics_fn = objectives.metrics(model.apply, {}, task)

    def fresh(params):
        return statistics.refresh(model.apply, params, state, parts["train"])

    state_fn = fresh if has_state else None
    facts = (
        f"geojax {geojax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}; "
        f"{network.model}, {tree.size(subject.corners[0]):,} weights; {name}; "
        f"{options.num} x {options.num} positions"
    )
    print(facts)
    found = {
        part: surface.plane(
            metrics_fn, frame, source, num=options.num, margin=options.margin, state_fn=state_fn,
            checkpoint=checkpoint.Checkpointer(
                options.out / "checkpoints" / part, every=options.num
            ),
        )
        for part, source in parts.items()
    }  # fmt: skip
    rows = rows_of(options, subject, frame, metrics_fn, state_fn, parts)
    page = report.Report(options.out, "The loss on a plane", facts)
    page.chapter("The points", subject.text)
    page.text(
        "Coordinates are distances in weight space. Each point's loss and error are its own, even "
        "where the point lies off the plane. The table gives errors as fractions."
    )
    page.table(rows)
    print(f"\nThe points\n{report.text_table(rows)}")

    extremes = [
        {
            "part": part,
            "metric": metric,
            "lowest": float(np.nanmin(values)),
            "highest": float(np.nanmax(values)),
            "not finite": int((~np.isfinite(values)).sum()),
        }
        for part, plane in found.items()
        for metric, values in plane.values.items()
    ]
    page.chapter("The plane", "Levels lie closer the lower they are.")
    page.table(extremes)
    print(f"\nOn the plane\n{report.text_table(extremes)}")
    marks = {row["point"]: (row["x"], row["y"]) for row in rows}
    path, arrays = None, {"marks": list(marks.values()), "names": list(marks)}
    if subject.curve is not None:
        projected = frame.project(subject.curve)
        path = {"": projected}
        arrays |= {"curve": projected.coordinates, "curve_off_plane": projected.distances}
        off = float(projected.distances.max())
        page.text(
            "The line is the curve"
            + (
                ", which lies in the plane."
                if len(rows) == 3
                else f" seen from above: it runs up to {off:.3g} off the plane."
            )
        )
    for part, plane in found.items():
        metric = options.metric if part == "train" else "error"
        metric = metric if metric in plane.values else "loss"
        unit = " (nats)" if metric == "loss" and task == "classification" else ""
        image = plot.png(plot.plane(
            plane, metric, marks=marks, path=path, percent=metric == "error",
            top=options.top if part == "train" else None, label=f"{part} {metric}{unit}",
        ))  # fmt: skip
        page.figure(
            f"{part}-{metric}", image,
            f"The {metric} on the {'training' if part == 'train' else 'test'} part.",
            arrays | {"coordinates": plane.coordinates} | plane.values,
        )  # fmt: skip
    numbers = {"facts": facts, "points": rows, "plane": extremes, "box": frame.box}
    (options.out / "result.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"\n{page.write().resolve()}  ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        sys.exit(f"plane: {error}")
    except KeyboardInterrupt:
        sys.exit("plane: stopped; the same command goes on from the last checkpoint.")
