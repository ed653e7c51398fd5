"""Grow a volume of low loss between trained networks, one connecting vertex at a time (SPRO).

The networks are ones that scripts/train.py saved (or `checkpoint.save_network`), of one model. Each
connector is trained with everything else as it is, so that the loss is low in all simplices that it
makes with the networks and the connectors before it. Then loss and error are measured at points
drawn from the complex, with normalisation statistics of each point's own, and its worst point is
sought. The folder gets a report, the complex as a checkpoint, figures with their data, all numbers
as JSON, and a log of the training as JSON lines, where stage 0 is the first vertex added. Stop it
at any time and call it again with the same options: it goes on from its last checkpoint.

  python scripts/train.py --seed 0 --out out/a
  python scripts/train.py --seed 1 --out out/b
  python scripts/complex.py --networks out/a/network out/b/network
  python scripts/complex.py --networks out/a/network out/b/network --align --num-connectors 3
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
import time
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tyro

import geojax
from geojax import (
    batches,
    checkpoint,
    datasets,
    fit,
    objectives,
    permute,
    plot,
    report,
    simplex,
    statistics,
    surface,
    symmetry,
    tree,
)

# Triangles in the mosaic: all of a tetrahedron.
NUM_FACES = 4


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the complex."""

    networks: tuple[pathlib.Path, ...] = ()
    """The folders of the networks."""
    num_connectors: int = 2
    """Vertices to add; each of the networks makes a simplex with all of them."""
    volume_weight: float = 1e-2
    """What a unit of log volume is worth in units of the loss; 0 for none."""
    num_samples: int = 5
    """Points drawn from the complex in a step; each costs a gradient."""
    dataset: str | None = None
    """The data set; by default the one that the first network was trained on."""
    data_dir: pathlib.Path | None = None
    """Where archives and prepared folders lie; by default GEOJAX_DATA_DIR."""
    num_examples: int | None = None
    """The first examples of each part, for training as for measuring; by default all."""
    epochs: int = 100
    """Passes over the training part for each new vertex."""
    batch_size: int = 128
    """Examples in a step; what is left over at the end of an epoch is left out of it."""
    learning_rate: float = 0.03
    """The rate of SGD with momentum 0.9, which falls to zero by a cosine for each new vertex."""
    weight_decay: float = 0.0
    """The factor of half the squared norm of the points drawn, added to their loss."""
    align: bool = False
    """Whether to permute the units of the other networks to those of the first before."""
    max_loss: float | None = None
    """Growth stops at the first vertex with which a loss above this is found on the training part;
    that vertex is taken back."""
    num_eval: int = 100
    """Points at which each stage's complex and the last one are measured."""
    faces: bool = True
    """Whether to draw the loss on the planes of the first four triangles."""
    num: int = 15
    """Positions along each side of those planes."""
    seed: int = 0
    """The seed of draws, order, dropout and the matching."""
    out: pathlib.Path = pathlib.Path("out/complex")
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


def check(options: Any) -> None:
    """What growing a simplex and growing a complex ask of their options."""
    for flag, least in (
        ("num_samples", 1), ("epochs", 1), ("batch_size", 1), ("num_eval", 1),
        ("volume_weight", 0.0), ("weight_decay", 0.0),
    ):  # fmt: skip
        value = getattr(options, flag)
        if not value >= least:
            raise ValueError(f"--{flag.replace('_', '-')} is {value}; expected at least {least:g}.")
    if not options.learning_rate > 0:
        raise ValueError(f"--learning-rate is {options.learning_rate}; expected more than 0.")


def load(options: Options, fewest: int, most: int | None) -> list[checkpoint.Network]:
    found = len(options.networks)
    if found < fewest or (most is not None and found > most):
        expected = (
            f"{fewest}: --networks out/a/network"
            if most == fewest
            else f"{fewest} or more: --networks out/a/network out/b/network"
        )
        raise ValueError(f"got {found} networks; expected {expected}.")
    check(options)
    if options.num_connectors < 1:
        raise ValueError(f"--num-connectors is {options.num_connectors}; expected at least 1.")
    if options.faces and options.num < 2:
        raise ValueError(f"--num is {options.num}; expected at least 2.")
    if options.align and found < 2:
        raise ValueError("--align is for two networks or more.")
    return read(options.networks)


def read(paths: tuple[pathlib.Path, ...]) -> list[checkpoint.Network]:
    """Networks of one model, each of them another one."""
    networks = [checkpoint.load_network(path) for path in paths]
    first = networks[0]
    seen: dict[str, pathlib.Path] = {}
    for path, network in zip(paths, networks, strict=True):
        digest = contents(network.params)
        if (network.model, network.options) != (first.model, first.options):
            raise ValueError(
                f"{path} is {network.model} {network.options}, and {paths[0]} is {first.model} "
                f"{first.options}; expected one model."
            )
        if "simplices" in network.metadata or "basis" in network.metadata:
            raise ValueError(f"{path} holds several points; expected a network.")
        if digest in seen:
            raise ValueError(f"{seen[digest]} and {path} have the same weights.")
        seen[digest] = path
    return networks


def contents(params: Any) -> str:
    """What tells a network from another one that was saved to the same path later."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()[:16]


def load_data(options: Any, network: checkpoint.Network) -> tuple[str, datasets.Dataset]:
    name = options.dataset or network.metadata["dataset"]
    if name is None:
        raise ValueError(
            "the first network does not say what it was trained on; give it by --dataset."
        )
    return name, datasets.load(name, options.data_dir)


def make_setup(options: Any, network: checkpoint.Network, data: datasets.Dataset) -> Setup:
    model = network.build()
    state = {} if network.state is None else network.state
    task = "regression" if data.num_classes is None else "classification"
    examples = {
        part: jax.tree.map(lambda x: x[: options.num_examples], getattr(data, part))
        for part in ("train", "test")
    }
    parts = {part: batches.split(examples[part], 1000) for part in examples}
    train = batches.split(
        examples["train"],
        min(options.batch_size, len(examples["train"].labels)),
        key=jax.random.fold_in(jax.random.key(options.seed), 1),
        drop_remainder=True,
    )
    if not jax.tree.leaves(state):
        metrics_fn = objectives.metrics(model.apply, {}, task)
        return Setup(model, state, task, train, parts, metrics_fn, None)

    def fresh(params):
        return statistics.refresh(model.apply, params, state, parts["train"])

    metrics_fn = objectives.metrics_with_state(model.apply, task)
    return Setup(model, state, task, train, parts, metrics_fn, fresh)


def kept(folder: pathlib.Path, name: str, make: Any) -> Any:
    """What `make` measures, read from the folder where it was measured before."""
    path = folder / "state" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".partial")
        whole.write_text(json.dumps(make()) + "\n")
        os.replace(whole, path)
    return json.loads(path.read_text())


def finite(value: Any) -> Any:
    """With null for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def align(options: Options, setup: Setup, networks: list[Any]) -> tuple[list[Any], list[dict]]:
    """All networks in the units of the first; each matching is found once."""

    def outputs(variables, inputs):
        return setup.model.apply(variables["params"], variables["state"], inputs, False)[0]

    first = networks[0].params
    variables = {"params": first, "state": setup.state}
    inputs = setup.parts["train"].arrays.inputs[:2]
    spec = symmetry.permutation_spec(outputs, variables, inputs)
    symmetry.check(spec, outputs, variables, inputs, key=jax.random.key(options.seed))
    ours = spec.at("params")
    aligned, rows = [first], []
    for i, network in enumerate(networks[1:], 1):

        def make(i=i, network=network):
            key = jax.random.fold_in(jax.random.key(options.seed), i)
            matching = permute.weight_matching(ours, first, network.params, key=key)
            row = {
                "network": str(options.networks[i]),
                "inner product before": matching.initial,
                "after": matching.objective,
                "bound": matching.bound,
                "fixed point": matching.converged,
            }
            orders = {name: np.asarray(x).tolist() for name, x in matching.permutation.items()}
            return {"permutation": orders, "row": row}

        found = kept(options.out, f"matching-{i}", make)
        order = {name: np.asarray(x, np.int32) for name, x in found["permutation"].items()}
        aligned.append(permute.apply_permutation(ours, order, network.params))
        rows.append(found["row"])
    return aligned, rows


def growth(options: Any, setup: Setup, folder: pathlib.Path) -> dict[str, Any]:
    """The arguments that `simplex.spro` and `simplex.espro` share."""
    num_steps = options.epochs * len(setup.train)
    every = max(1, round(options.checkpoint_every * len(setup.train)))
    return {
        "optimizer": optax.sgd(fit.warmup_cosine(options.learning_rate, num_steps), 0.9),
        "num_steps": num_steps,
        "key": jax.random.fold_in(jax.random.key(options.seed), 2),
        "num_samples": options.num_samples,
        "volume_weight": options.volume_weight,
        "weight_decay": options.weight_decay,
        "num_eval": options.num_eval,
        "metrics_fn": setup.metrics_fn,
        "state_fn": setup.state_fn,
        "eval_batches": setup.parts["train"],
        "checkpoints": lambda s: checkpoint.Checkpointer(
            folder / "checkpoints" / f"vertex-{s + 1}", every=every
        ),
        "log": folder / "log.jsonl",
        "log_every": max(1, len(setup.train) // 10),
    }


class Heard:
    """Growth's own warnings as sentences for the report; all others go their way."""

    def __enter__(self) -> list[str]:
        self._catch = warnings.catch_warnings(record=True)
        self._caught = self._catch.__enter__()
        warnings.simplefilter("always")
        self.sentences: list[str] = []
        return self.sentences

    def __exit__(self, *error: Any) -> None:
        self._catch.__exit__(*error)
        for one in self._caught:
            if issubclass(one.category, (simplex.InertVolumeWarning, simplex.CollapsedWarning)):
                self.sentences.append(str(one.message))
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def save_complex(
    path: pathlib.Path, complex: simplex.SimplicialComplex, network: checkpoint.Network, **about
) -> None:
    """The complex as a checkpoint: its vertices stacked, its simplices in the metadata."""
    checkpoint.save_network(
        path, complex.vertices, network.state, model=network.model, options=network.options,
        dataset=about.pop("dataset"), seed=about.pop("seed"),
        metadata={"simplices": [list(s) for s in complex.simplices], **about},
    )  # fmt: skip


def load_complex(path: pathlib.Path) -> tuple[simplex.SimplicialComplex, checkpoint.Network]:
    """What `save_complex` wrote, there or in the folder "complex" below."""
    inside = path / "complex"
    network = checkpoint.load_network(inside if inside.is_dir() else path)
    if not {"simplices", "num_networks"} <= set(network.metadata):
        raise ValueError(
            f"{path} is no complex; expected a folder that scripts/complex.py or "
            "scripts/simplex.py wrote."
        )
    return simplex.SimplicialComplex(network.params, network.metadata["simplices"]), network


def grow(options: Options, setup: Setup, name: str, first: Any, modes: list[Any]) -> Any:
    """The complex and the facts of its stages; once it is there, nothing is trained."""

    def make():
        with Heard() as notes:
            found = simplex.spro(
                objectives.loss(setup.model.apply, setup.state, setup.task),
                tree.stack(modes),
                setup.train,
                num_connectors=options.num_connectors,
                max_loss=options.max_loss,
                **growth(options, setup, options.out),
            )
        save_complex(
            options.out / "complex", found.complex, first, dataset=name, seed=options.seed,
            num_networks=len(modes), networks=[str(path) for path in options.networks],
            aligned=options.align,
        )  # fmt: skip
        rows = [stage.row() for stage in found.stages]
        return {"stages": finite(json.loads(json.dumps(rows, default=float))), "notes": notes}

    grown = kept(options.out, "stages", make)
    complex, _ = load_complex(options.out / "complex")
    for i, mode in enumerate(modes):
        same = jax.tree.map(
            lambda x, y, i=i: np.array_equal(x[i], y), *jax.device_get((complex.vertices, mode))
        )
        if not jax.tree.all(same):
            raise ValueError(
                f"the complex in {options.out} is of other networks; choose another folder (--out)."
            )
    return complex, grown


def measure(options: Options, setup: Setup, complex: Any) -> dict[str, Any]:
    """Metrics at points of the complex on both parts, and the worst point; kept once measured."""
    key = jax.random.fold_in(jax.random.key(options.seed), 3)
    found = {}
    for part, source in setup.parts.items():

        def make(part=part, source=source):
            inside = simplex.evaluate(
                setup.metrics_fn, complex, source, options.num_eval, key=key,
                state_fn=setup.state_fn,
                checkpoint=checkpoint.Checkpointer(
                    options.out / "measured" / part, every=20, keep=1
                ),
            )  # fmt: skip
            metrics = {
                metric: {
                    "values": x.values.tolist(),
                    "vertices": x.vertices.tolist(),
                    "simplices' means": x.simplex_means.tolist(),
                    "highest": x.highest,
                }
                for metric, x in inside.metrics.items()
            }
            out = {"weights": inside.weights.tolist(), "table": inside.table(), "metrics": metrics}
            if part == "train":

                def loss_fn(params, *rest):
                    return setup.metrics_fn(params, *rest)["loss"]

                worst = simplex.worst_point(
                    loss_fn, complex, source, starts=inside.worst("loss", 4),
                    state_fn=setup.state_fn,
                )  # fmt: skip
                out["worst"] = {
                    "loss": worst.value,
                    "weights": worst.weights.tolist(),
                    "simplex": list(complex.simplices[worst.simplex]),
                    "gradients": worst.num_gradients,
                }
            return finite(json.loads(json.dumps(out, default=float)))

        found[part] = kept(options.out, f"inside-{part}", make)
    return found


def straight(options: Options, setup: Setup, modes: list[Any]) -> dict[str, float]:
    """The metrics at the centroid of the networks, to which nothing was trained."""

    def make():
        middle = simplex.centroid(tree.stack(modes))
        extra = () if setup.state_fn is None else (setup.state_fn(middle),)
        return {
            f"{part} {metric}": float(value)
            for part, source in setup.parts.items()
            for metric, value in batches.mean(setup.metrics_fn, source)(middle, *extra).items()
        }

    return kept(options.out, "centroid", make)


def stages_figure(stages: list[dict[str, Any]]) -> tuple[bytes, dict[str, Any]]:
    """Loss, distance and volume after each vertex that was kept, or after the first."""
    drawn = [stage for stage in stages if stage["kept"]] or stages[:1]
    x = [stage["vertices"] for stage in drawn]
    panels = []
    for label, names in (
        ("training loss", {"highest": "highest loss", "mean": "mean loss"}),
        ("edge / mode distance", {"shortest edge": "edge / mode distance"}),
        ("log volume (nats)", {"log volume": "log volume"}),
    ):
        lines = {name: (x, [stage[column] for stage in drawn]) for name, column in names.items()}
        # A line of one point cannot be seen.
        look = {"lines": lines} if len(x) > 1 else {"lines": {}, "marks": lines}
        panels.append({"x": "vertices", "y": label, "integers": True, "legend": "above"} | look)
    data = {
        column.replace(" / ", "_").replace(" ", "_"): [stage[column] for stage in stages]
        for column in stages[0]
    }
    return plot.png(plot.curves(panels, size=(2.9, 2.6))), data


def draw_faces(
    options: Options, setup: Setup, complex: Any, highest: float, names: list[str], page: Any
) -> None:
    triangles = simplex.faces(complex, 2)[:NUM_FACES]
    if not triangles:
        page.text("There is no triangle to draw: a simplex has two vertices.")
        return
    found = surface.faces(
        setup.metrics_fn, complex.vertices, triangles, setup.parts["train"], num=options.num,
        state_fn=setup.state_fn,
        checkpoints=lambda i: checkpoint.Checkpointer(
            options.out / "checkpoints" / f"face-{options.num}-{i}", every=options.num
        ),
    )  # fmt: skip
    # Far from the complex the loss is of no interest.
    lowest = min(float(np.nanmin(face.plane.values["loss"])) for face in found)
    top = 10 * highest if lowest < 10 * highest else None
    image = plot.png(plot.faces(found, "loss", names=names, top=top, label="training loss"))
    data: dict[str, Any] = {"triangles": [face.triangle for face in found]}
    for i, face in enumerate(found):
        data |= {f"coordinates_{i}": face.plane.coordinates, f"loss_{i}": face.plane.values["loss"],
                 f"corners_{i}": face.plane.frame.points}  # fmt: skip
    page.figure(
        "faces", image,
        "The training loss on the planes through triangles of the complex, drawn in their own "
        "shapes; levels reach to ten times the highest loss found inside.", data,
    )  # fmt: skip


def draw_projection(complex: Any, inside: Any, num_modes: int, names: list[str], page: Any) -> None:
    """The complex in its first principal components, and the losses at the points drawn."""
    depth = min(3, complex.num_vertices - 1)
    if depth < 2:
        return
    found = surface.principal_directions(complex.vertices, depth)
    points = np.asarray(inside["weights"]) @ found.coordinates
    values = inside["metrics"]["loss"]["values"]
    image = plot.png(
        plot.complex(
            found.coordinates, complex.simplices, modes=range(num_modes), points=points,
            values=values, names=names, explained=found.explained, label="training loss",
        )
    )  # fmt: skip
    page.figure(
        "projection", image,
        f"The complex in its first {depth} principal components, which explain "
        f"{100 * found.explained.sum():.0f} % of the squared distances from the vertices' mean; "
        "dots are the points where the loss was measured. The axes may differ in scale.",
        {"coordinates": found.coordinates, "points": points, "loss": values,
         "explained": found.explained},
    )  # fmt: skip


def main(options: Options, *, fewest: int = 2, most: int | None = None) -> None:
    start = time.perf_counter()
    networks = load(options, fewest, most)
    name, data = load_data(options, networks[0])
    setup = make_setup(options, networks[0], data)
    # A folder is claimed once the options are known to be good.
    report.claim(
        options.out,
        dataclasses.asdict(options) | {"contents": [contents(x.params) for x in networks]},
        may_differ=("data_dir", "out", "networks", "checkpoint_every", "faces", "num"),
    )
    first, k = networks[0], len(networks)
    grows = f"{k} network{'s' * (k > 1)} and {options.num_connectors} vertices to add"
    facts = (
        f"geojax {geojax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}; "
        f"{first.model}, {tree.size(first.params):,} weights; {name}; {grows}; seed {options.seed}"
    )
    print(facts)
    title = "A complex between networks" if k > 1 else "A simplex from a network"
    page = report.Report(options.out, title, facts)
    numbers: dict[str, Any] = {"facts": facts}
    page.chapter(
        "The networks",
        "; ".join(f"vertex {i} is {path}" for i, path in enumerate(options.networks)) + ".",
    )
    modes = [network.params for network in networks]
    if options.align:
        modes, rows = align(options, setup, networks)
        numbers["matchings"] = rows
        page.text("The units of the others were permuted to those of the first.")
        page.table(rows)
        print(f"\nMatching by weights\n{report.text_table(rows)}")

    begun = time.perf_counter()
    complex, grown = grow(options, setup, name, first, modes)
    trained = (
        f"{options.epochs} epochs, {options.epochs * len(setup.train)} steps of "
        f"{setup.train.batch_size} examples for each vertex, SGD with momentum 0.9, highest rate "
        f"{options.learning_rate:g}; {options.num_samples} point(s) in a step, weight of the "
        f"volume {options.volume_weight:g}."
    )
    stages = [{n: math.nan if x is None else x for n, x in row.items()} for row in grown["stages"]]
    page.chapter("Growth", trained)
    page.text(
        f"Losses are on the training part, at {options.num_eval} points of the complex and, for "
        "the highest, at its vertices"
        + ("; normalised by the statistics of each batch" if setup.state_fn else "")
        + ". The share is the size of the volume's gradient relative to the whole, the median over "
        "the steps: below 1e-3 the volume did nothing. Log volumes of different dimensions cannot "
        "be compared."
    )
    page.table(stages)
    print(f"\nGrowth: {trained} ({time.perf_counter() - begun:.0f} s)\n{report.text_table(stages)}")
    for note in grown["notes"]:
        page.text(f"Note: {note}")
        print(f"Note: {note}")
    image, arrays = stages_figure(stages)
    page.figure("stages", image, "The complex after each new vertex that was kept.", arrays)
    numbers |= {"stages": grown["stages"], "notes": grown["notes"],
                "simplices": complex.simplices}  # fmt: skip

    found = measure(options, setup, complex)
    rows = [{"part": part} | row for part, inside in found.items() for row in inside["table"]]
    worst = found["train"]["worst"]
    page.chapter("Inside", f"At {options.num_eval} points drawn from the complex, by volume.")
    page.table([{n: math.nan if x is None else x for n, x in row.items()} for row in rows])
    page.text(
        "Lowest and highest include the vertices. The table gives errors as fractions."
        + (
            " The statistics of the network's normalisation are those of each point, from the "
            "training part."
            if setup.state_fn
            else ""
        )
    )
    place = ", ".join(f"{weight:.2f}" for weight in worst["weights"])
    said = (
        f"The highest training loss found by gradient ascent is {worst['loss']:.4g}, in the "
        f"simplex {tuple(worst['simplex'])} at the weights ({place})."
    )
    page.text(said)
    print(f"\nInside\n{report.text_table(rows)}\n{said}")
    numbers["inside"] = found
    if k > 1:
        middle = straight(options, setup, modes)
        numbers["centroid"] = middle
        said = (
            "For comparison, at the centroid of the networks themselves: "
            + ", ".join(f"{metric} {value:.4g}" for metric, value in middle.items())
            + "."
        )
        page.text(said)
        print(said)
    names = [f"w{i}" if i < k else f"c{i - k + 1}" for i in range(complex.num_vertices)]
    page.chapter("Pictures", "Networks are called w, the vertices added to them c.")
    draw_projection(complex, found["train"], k, names, page)
    if options.faces:
        draw_faces(options, setup, complex, worst["loss"], names, page)
    (options.out / "result.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"\n{page.write().resolve()}  ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        sys.exit(f"complex: {error}")
    except KeyboardInterrupt:
        sys.exit("complex: stopped; the same command goes on from the last checkpoint.")
