"""The curvature of a trained network: top eigenvalues, spectral density, trace and layer traces.

The network is one that scripts/train.py saved (or `checkpoint.save_network`); the curvature is that
of its loss in evaluation mode on a part of its data. Stop it at any time and call it again with the
same options: it goes on from its last product and ends with the same numbers. The folder gets a
report page, each figure with its data, the eigenvectors, and all numbers as JSON.

  python scripts/train.py
  python scripts/eigenthings.py
  python scripts/eigenthings.py --network out/mnist/network --num-examples 10000 --k 20
  python scripts/eigenthings.py --matrix ggn --memory 2 --max-seconds 3600
"""

import dataclasses
import json
import pathlib
import sys
import time
from typing import Literal

import jax
import numpy as np
import tyro

import geojax
from geojax import batches, checkpoint, datasets, hessian, krylov, objectives, plot, report


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the analysis."""

    network: pathlib.Path = pathlib.Path("out/train/network")
    """The folder of the network."""
    dataset: str | None = None
    """The data set; by default the one that the network was trained on."""
    data_dir: pathlib.Path | None = None
    """Where archives and prepared folders lie; by default GEOJAX_DATA_DIR."""
    part: Literal["train", "validation", "test"] = "train"
    """The part of the data."""
    num_examples: int | None = None
    """The first examples of that part; by default all."""
    batch_size: int = 1000
    """Examples computed at once."""
    matrix: Literal["hessian", "ggn"] = "hessian"
    """The Hessian, or the generalized Gauss-Newton matrix."""
    select: str | None = None
    """A glob for the parameters, such as 'layer*/kernel'; by default all."""
    k: int = 10
    """Eigenpairs."""
    which: Literal["LM", "LA", "SA", "BE"] = "LM"
    """Largest magnitude, largest, smallest, or both ends."""
    tol: float = 1e-3
    """Relative residual of a converged pair."""
    memory: float | None = None
    """GiB for the vectors of the eigensolver; by default 2 k + 10 vectors."""
    max_matvecs: int | None = None
    """The most products for the eigenpairs; by default 30 for each vector of the basis."""
    max_seconds: float | None = None
    """The most seconds for the eigenpairs."""
    num_probes: int = 10
    """Random starts of the density."""
    num_steps: int = 60
    """Lanczos steps of each."""
    axis: Literal["linear", "log", "symlog"] = "linear"
    """The axis of the density; 'log' is that of the magnitude."""
    trace_matvecs: int = 100
    """Products for the traces."""
    seed: int = 0
    """The seed of all random vectors."""
    out: pathlib.Path = pathlib.Path("out/eigenthings")
    """The folder of the results."""
    checkpoint_every: int = 100
    """Products between checkpoints."""


def make_operator(options: Options, network, examples, task: str) -> krylov.Operator:
    model = network.build()
    source = batches.split(examples, options.batch_size)
    if options.matrix == "ggn":
        losses = hessian.output_losses
        loss = losses.softmax_cross_entropy() if task == "classification" else losses.mse()
        model_fn = objectives.outputs(model.apply, network.state)
        return hessian.ggn(model_fn, loss, network.params, source, select=options.select)
    loss_fn = objectives.evaluation_loss(model.apply, network.state, task)
    hessian.probe(loss_fn, network.params, source, key=jax.random.key(options.seed))
    return hessian.hessian(loss_fn, network.params, source, select=options.select)


def layer(path: str) -> str:
    """The group of a leaf: its path without the last name."""
    names = path.strip("[]'").split("']['")
    return "/".join(names[:-1]) or names[-1]


def main(options: Options) -> None:
    start = time.perf_counter()
    network = checkpoint.load_network(options.network)
    name = options.dataset or network.metadata["dataset"]
    if name is None:
        sys.exit("eigenthings: the network does not say what it was trained on; give --dataset.")
    # The synthetic sets are made, not read, and have no folder.
    synthetic = name in ("two_spirals", "regression_1d")
    data = datasets.load(name) if synthetic else datasets.load(name, options.data_dir)
    examples = jax.tree.map(lambda x: x[: options.num_examples], getattr(data, options.part))
    num = len(examples.labels)
    if not num:
        sys.exit(f"eigenthings: the {options.part} part of {name} is empty; choose another --part.")
    task = "regression" if data.num_classes is None else "classification"
    report.claim(
        options.out,
        dataclasses.asdict(options),
        may_differ=("data_dir", "out", "checkpoint_every", "max_seconds"),
    )
    operator = make_operator(options, network, examples, task)
    facts = (
        f"geojax {geojax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}; "
        f"{options.matrix} of {network.model}, {operator.size:,} parameters, on {num:,} "
        f"{options.part} examples of {name}; seed {options.seed}"
    )
    print(facts)
    page = report.Report(options.out, "Curvature", facts)
    keys = jax.random.split(jax.random.key(options.seed), 3)

    def state(what):
        return checkpoint.Checkpointer(
            options.out / "state" / what, every=options.checkpoint_every, keep=1
        )

    pairs = krylov.eigsh(
        operator,
        min(options.k, operator.size),
        key=keys[0],
        which=options.which,
        tol=options.tol,
        memory_bytes=None if options.memory is None else options.memory * 2**30,
        max_matvecs=options.max_matvecs,
        max_seconds=options.max_seconds,
        checkpoint=state("eigsh"),
        progress=True,
    )
    print(f"\nEigenvalues, {pairs.num_matvecs} products\n{report.text_table(pairs.table())}")
    page.chapter(
        "Eigenvalues",
        "Each eigenvalue with the measured norm of A x - lambda x; an eigenvalue lies within it. "
        f"{pairs.num_matvecs} products.",
    )
    page.table(pairs.table())

    trusted = np.flatnonzero(pairs.converged)
    known = None
    if len(trusted):
        kept = jax.tree.map(lambda x: x[trusted], pairs.eigenvectors)
        known = (pairs.eigenvalues[trusted], kept)
    density = krylov.spectral_density(
        operator,
        key=keys[1],
        num_probes=options.num_probes,
        num_steps=min(options.num_steps, operator.size),
        deflate=known,
        axis=options.axis,
        checkpoint=state("density"),
        progress=True,
    )
    page.chapter(
        "Spectral density",
        f"Stochastic Lanczos quadrature: {options.num_probes} random starts of "
        f"{density.nodes.shape[1]} steps, the {len(trusted)} converged eigenvalues taken out and "
        "shown as stems; the band is the pointwise 95 % interval over the starts.",
    )
    curve = density.curve
    page.figure(
        "density",
        plot.png(plot.density(density, size=(5.6, 3.2))),
        "Density of the eigenvalues with its 95 % band; stems are single, converged eigenvalues.",
        {
            "grid": curve.grid, "density": curve.values, "lower": curve.lower, "upper": curve.upper,
            "nodes": density.nodes, "weights": density.weights, "deflated": density.deflated,
        },
    )  # fmt: skip

    trace = krylov.trace(
        operator,
        key=keys[2],
        num_matvecs=options.trace_matvecs,
        groups=layer,
        checkpoint=state("trace"),
        progress=True,
    )
    rows = [
        {"layer": "all", "trace": trace.estimate, "standard error": trace.standard_error},
        *(
            {"layer": found["group"]} | {key: found[key] for key in ("trace", "standard error")}
            for found in trace.table()
        ),
    ]
    print(f"\nTraces, {trace.num_matvecs} products\n{report.text_table(rows)}")
    page.chapter(
        "Traces",
        f"Hutchinson's estimate of the trace and of the trace of each layer's diagonal block, all "
        f"from the same {trace.num_matvecs} products.",
    )
    page.table(rows)

    checkpoint.save(options.out / "eigenpairs", pairs)
    numbers = {
        "facts": facts,
        "eigenvalues": pairs.eigenvalues.tolist(),
        "residuals": pairs.residuals.tolist(),
        "converged": pairs.converged.tolist(),
        "num_matvecs": pairs.num_matvecs + density.num_matvecs + trace.num_matvecs,
        "traces": rows,
    }
    (options.out / "result.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"\n{page.write().resolve()}  ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        sys.exit(f"eigenthings: {error}")
    except KeyboardInterrupt:
        sys.exit("eigenthings: stopped; the same command goes on from the last checkpoint.")
