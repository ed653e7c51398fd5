"""A simplex of networks that all separate two spirals, and what they say where there are no data.

A small network is trained on two interleaved spirals, and three more vertices are grown from it, so
that the loss is low in the whole tetrahedron. Then the loss is drawn on its four faces, and the
decision boundaries of networks drawn from it beside that of their ensemble: they agree where there
are data, and differ where there are none. Three claims are checked, and the exit code is 1 where
one is missed. The folder gets a report, the simplex as a checkpoint, figures with their data, all
numbers as JSON, and a log of the training as JSON lines, where stage 0 is the first vertex added.
Stop it at any time and call it again with the same options: it goes on from its last checkpoint.

  python scripts/spirals.py
  python scripts/spirals.py --volume-weight 0 --out out/spirals-without-volume
"""

import dataclasses
import json
import math
import pathlib
import sys
import time
from typing import Any

import complex as growing
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import geojax
from geojax import batches, checkpoint, datasets, ensemble, fit, models, plot, report, simplex, tree

# Panels of single networks beside the one of the ensemble.
NUM_SHOWN = 5
# Steps, of which each sees all training points, between lines of the log.
LOG_EVERY = 10


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the experiment."""

    num_per_class: int = 50
    """Training points of each spiral."""
    noise: float = 1.0
    """The standard deviation of each coordinate of a point."""
    depth: int = 8
    """Dense layers of the network."""
    width: int = 25
    """Units of each hidden layer."""
    base_steps: int = 1000
    """Steps of Adam for the first network, on all training points at once."""
    num_connectors: int = 3
    """Vertices to add; three make a tetrahedron."""
    steps: int = 200
    """Steps for each vertex that is added."""
    num_samples: int = 5
    """Points drawn from the simplex in a step; each costs a gradient."""
    learning_rate: float = 0.01
    """The rate of Adam for the first network, which falls to zero by a cosine; likewise for each
    vertex."""
    weight_decay: float = 1e-4
    """The factor of half the squared norm of what is trained, added to the loss."""
    volume_weight: float = 1e-2
    """What a unit of log volume is worth in units of the loss; 0 for none."""
    num_eval: int = 100
    """Points drawn from the simplex at which it is measured."""
    num_members: int = 100
    """Networks drawn from the simplex for the ensemble."""
    num: int = 15
    """Positions along each side of a face's plane."""
    grid: int = 81
    """Positions along each side of the plane of inputs."""
    near: float = 1.0
    """Inputs within this distance of a training point count as those where there are data."""
    seed: int = 0
    """The seed of the data, the weights and the draws."""
    out: pathlib.Path = pathlib.Path("out/spirals")
    """The folder of the results."""


def check(options: Options) -> None:
    for flag, least in (
        ("num_per_class", 1), ("depth", 2), ("width", 1), ("base_steps", 1), ("num_connectors", 1),
        ("steps", 1), ("num_samples", 1), ("num_eval", 1), ("num_members", 2), ("num", 2),
        ("grid", 2), ("noise", 0.0), ("weight_decay", 0.0), ("volume_weight", 0.0),
    ):  # fmt: skip
        value = getattr(options, flag)
        if not value >= least:
            raise ValueError(f"--{flag.replace('_', '-')} is {value}; expected at least {least:g}.")
    if not options.learning_rate > 0:
        raise ValueError(f"--learning-rate is {options.learning_rate}; expected more than 0.")


def make_setup(options: Options, model: Any, data: datasets.Dataset) -> growing.Setup:
    def logits(params, batch):
        return model.apply(params, {}, batch.inputs, False)[0][..., 0]

    def metrics_fn(params, batch):
        found = logits(params, batch)
        losses = optax.sigmoid_binary_cross_entropy(found, batch.labels.astype(found.dtype))
        wrong = (found > 0) != (batch.labels > 0)
        return {"loss": jnp.mean(losses), "error": jnp.mean(wrong.astype(found.dtype))}

    parts = {part: batches.split(x, len(x.labels))
             for part, x in (("train", data.train), ("test", data.test))}  # fmt: skip
    return growing.Setup(model, {}, "classification", parts["train"], parts, metrics_fn, None)


def train(options: Options, setup: growing.Setup, loss_fn: Any, start: Any) -> Any:
    """The first network."""
    rule = optax.chain(
        optax.add_decayed_weights(options.weight_decay),
        optax.adam(fit.warmup_cosine(options.learning_rate, options.base_steps)),
    )
    return fit.fit(
        loss_fn, start, setup.train, rule, options.base_steps,
        key=jax.random.fold_in(jax.random.key(options.seed), 1),
        checkpoint=checkpoint.Checkpointer(
            options.out / "checkpoints" / "base", every=max(1, options.base_steps // 4)
        ),
        log=options.out / "log.jsonl", log_every=LOG_EVERY, log_fields={"stage": "base"},
    ).params  # fmt: skip


def grow(options: Options, setup: growing.Setup, loss_fn: Any, network: checkpoint.Network):
    """The simplex and the facts of its stages; once it is there, nothing is trained."""

    def make():
        base = train(options, setup, loss_fn, network.params)
        with growing.Heard() as notes:
            found = simplex.spro(
                loss_fn, tree.stack([base]), setup.train,
                optax.adam(fit.warmup_cosine(options.learning_rate, options.steps)), options.steps,
                key=jax.random.fold_in(jax.random.key(options.seed), 2),
                num_connectors=options.num_connectors, num_samples=options.num_samples,
                volume_weight=options.volume_weight, weight_decay=options.weight_decay,
                decay="vertices", num_eval=options.num_eval,
                log=options.out / "log.jsonl", log_every=LOG_EVERY,
                checkpoints=lambda s: checkpoint.Checkpointer(
                    options.out / "checkpoints" / f"vertex-{s + 1}",
                    every=max(1, options.steps // 2),
                ),
            )  # fmt: skip
        growing.save_complex(
            options.out / "complex", found.complex, network, dataset="two_spirals",
            seed=options.seed, num_networks=1,
        )  # fmt: skip
        rows = [stage.row() for stage in found.stages]
        return {
            "stages": growing.finite(json.loads(json.dumps(rows, default=float))),
            "notes": notes,
        }

    grown = growing.kept(options.out, "stages", make)
    return growing.load_complex(options.out / "complex")[0], grown


def plane_of_inputs(options: Options, data: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """A grid around all points, `(num, num, 2)`, and how far each lies from a training point."""
    points = np.concatenate([data.train.inputs, data.test.inputs])
    half = 1.15 * float(np.abs(points).max())
    line = np.linspace(-half, half, options.grid, dtype=np.float32)
    coordinates = np.stack(np.meshgrid(line, line), axis=-1)
    away = coordinates[:, :, None, :] - data.train.inputs[None, None]
    return coordinates, np.sqrt((away**2).sum(-1).min(-1))


def disagreement(log_probs: np.ndarray) -> np.ndarray:
    """How often two different members name different classes, for each input: `(members, n, 2)`."""
    votes, m = (log_probs[..., 1] > log_probs[..., 0]).sum(0), len(log_probs)
    return 2 * votes * (m - votes) / (m * (m - 1))


def say(
    options: Options, model_fn: Any, complex: Any, data: datasets.Dataset, coordinates: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What each member says of the test points and of the plane of inputs; kept once computed."""
    size = len(data.test.labels)
    inputs = np.concatenate([data.test.inputs, coordinates.reshape(-1, 2)])
    path = options.out / "state" / "members.npy"
    if not path.exists():
        draw = simplex.members(
            jax.random.fold_in(jax.random.key(options.seed), 4), complex, options.num_members
        )
        source = batches.split({"inputs": inputs}, len(inputs))
        found = [ensemble.log_probabilities(model_fn, member, source) for member in draw()]
        with open(path.with_suffix(".partial"), "wb") as file:
            np.save(file, np.stack(found))
        path.with_suffix(".partial").replace(path)
    found = np.load(path)
    return found[:, :size], found[:, size:]


def draw_boundaries(on_grid: np.ndarray, coordinates: np.ndarray, data: Any, page: Any) -> None:
    shape = coordinates.shape[:2]
    together = ensemble.average(list(on_grid))
    panels = {
        f"network {i + 1}": np.exp(on_grid[i, :, 1]).reshape(shape)
        for i in range(min(NUM_SHOWN, len(on_grid)))
    }
    panels[f"average of {len(on_grid)}"] = np.exp(together[:, 1]).reshape(shape)
    panels = {title: np.clip(found, 0, 1) for title, found in panels.items()}
    image = plot.png(
        plot.boundaries(panels, coordinates, inputs=data.train.inputs, labels=data.train.labels)
    )
    page.figure(
        "boundaries", image,
        "The probability of the second spiral over the plane of inputs, by networks drawn from the "
        "simplex and by their ensemble, with the training points.",
        {"coordinates": coordinates, "probabilities": np.stack(list(panels.values())),
         "disagreement": disagreement(on_grid).reshape(shape)},
    )  # fmt: skip


def main(options: Options) -> bool:
    start = time.perf_counter()
    check(options)
    data = datasets.load(
        "two_spirals", num_per_class=options.num_per_class, noise=options.noise, seed=options.seed
    )
    coordinates, away = plane_of_inputs(options, data)
    if not (away <= options.near).any() or not (away > options.near).any():
        raise ValueError(
            f"--near is {options.near:g}, within which lie {int((away <= options.near).sum())} of "
            f"{away.size} inputs; expected some and not all (a finer --grid has more)."
        )
    chosen = {"widths": [options.width] * (options.depth - 1), "num_classes": 1}
    model = models.build("mlp", **chosen)
    params, _ = model.init(jax.random.key(options.seed), data.train.inputs[:1])
    setup = make_setup(options, model, data)
    # A folder is claimed once the options are known to be good.
    report.claim(options.out, dataclasses.asdict(options), may_differ=("out",))
    facts = (
        f"geojax {geojax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}; "
        f"{options.depth} dense layers of width {options.width}, {tree.size(params):,} weights; "
        f"2 x {options.num_per_class} points; seed {options.seed}"
    )
    print(facts)
    page = report.Report(options.out, "Two spirals", facts)

    def loss_fn(params, batch):
        return setup.metrics_fn(params, batch)["loss"]

    def model_fn(params, batch):
        found = model.apply(params, {}, batch["inputs"], False)[0][..., 0]
        return jnp.stack([jnp.zeros_like(found), found], axis=-1)

    network = checkpoint.Network(params, None, {"model": "mlp", "options": chosen})
    complex, grown = grow(options, setup, loss_fn, network)
    stages = [{n: math.nan if x is None else x for n, x in row.items()} for row in grown["stages"]]
    page.chapter(
        "Growth",
        f"The first network took {options.base_steps} steps of Adam, each vertex added to it "
        f"{options.steps} with {options.num_samples} point(s) of the simplex in each; weight of "
        f"the volume {options.volume_weight:g}. Losses are on the training points.",
    )
    page.table(stages)
    print(f"\nGrowth\n{report.text_table(stages)}")
    for note in grown["notes"]:
        page.text(f"Note: {note}")
        print(f"Note: {note}")

    found = growing.measure(options, setup, complex)
    rows = [{"part": part} | row for part, inside in found.items() for row in inside["table"]]
    page.chapter("Inside", f"At {options.num_eval} points drawn from the simplex.")
    page.table([{n: math.nan if x is None else x for n, x in row.items()} for row in rows])
    print(f"\nInside\n{report.text_table(rows)}")
    on_test, on_grid = say(options, model_fn, complex, data, coordinates)
    together = ensemble.calibration(ensemble.average(list(on_test)), data.test.labels)
    differ = disagreement(on_grid).reshape(away.shape)
    near = float(differ[away <= options.near].mean())
    far = float(differ[away > options.near].mean())
    base_error = found["train"]["metrics"]["error"]["vertices"][0]
    highest = max(found["train"]["metrics"]["loss"]["values"])
    claims = [
        {"claim": "training error of the first network", "target": "0", "measured": base_error,
         "holds": base_error == 0},
        {"claim": f"highest training loss at {options.num_eval} points", "target": "< 0.1",
         "measured": highest, "holds": highest < 0.1},
        {"claim": "disagreement off the data over that on them", "target": "> 1",
         "measured": far / near if near else math.inf, "holds": far > near},
    ]  # fmt: skip
    page.chapter(
        "Claims",
        f"Two of {options.num_members} networks drawn from the simplex name different classes at "
        f"{100 * near:.3g} % of the positions within {options.near:g} of a training point, and at "
        f"{100 * far:.3g} % of all others in the plane of inputs drawn below. The ensemble's "
        f"test error is {100 * (1 - together.accuracy.value):.3g} %, its NLL "
        f"{together.nll.value:.3g}.",
    )
    page.table(claims)
    print(f"\nClaims\n{report.text_table(claims)}")
    names = [f"w{i}" for i in range(complex.num_vertices)]
    page.chapter("Pictures", "The first network is w0.")
    growing.draw_faces(options, setup, complex, found["train"]["worst"]["loss"], names, page)
    growing.draw_projection(complex, found["train"], 1, names, page)
    draw_boundaries(on_grid, coordinates, data, page)
    numbers = {
        "facts": facts, "stages": grown["stages"], "notes": grown["notes"], "inside": found,
        "claims": claims, "near": near, "far": far, "test NLL": together.nll.value,
        "test error": 1 - together.accuracy.value,
    }  # fmt: skip
    (options.out / "result.json").write_text(json.dumps(growing.finite(numbers), indent=2) + "\n")
    print(f"\n{page.write().resolve()}  ({time.perf_counter() - start:.0f} s)")
    return all(row["holds"] for row in claims)


if __name__ == "__main__":
    try:
        sys.exit(0 if main(tyro.cli(Options, description=__doc__)) else 1)
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        sys.exit(f"spirals: {error}")
    except KeyboardInterrupt:
        sys.exit("spirals: stopped; the same command goes on from the last checkpoint.")
