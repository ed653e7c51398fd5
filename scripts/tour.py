"""The tour: two networks on real digits, the line between them, its geometry, a report page.

Trains on the 1797 handwritten digits that scikit-learn carries, so it needs no download. Everything
that it prints is also in the report, with each figure as PNG and the data behind it as NPZ.
"""

import dataclasses
import pathlib
import time

import jax
import numpy as np
import optax
import tyro

import geojax
from geojax import batches, checkpoint, curves, datasets, ensemble, fit, hessian, krylov, models

from geojax import objectives, permute, plot, report, simplex  # isort: skip
from geojax import statistics, surface, symmetry, tree  # isort: skip

BATCH_SIZE, EPOCHS, RATE, DECAY = 128, 100, 0.05, 5e-4


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the tour."""

    out: pathlib.Path = pathlib.Path("out/tour")
    """The folder for the report, its figures, their data, and the networks."""
    seed: int = 0
    """The seed; the networks are trained from this one and the next."""


def train(model, data, seeds):
    """Networks from several seeds: SGD with momentum, cosine to zero, 100 epochs."""
    _, state = model.init(jax.random.key(0), data.train.inputs[:1])
    num_steps = EPOCHS * (len(data.train.labels) // BATCH_SIZE)
    # One loss and one optimizer, so that all seeds share the compiled step.
    loss_fn = objectives.loss(model.apply, state)
    optimizer = optax.chain(
        optax.add_decayed_weights(DECAY),
        optax.sgd(fit.warmup_cosine(RATE, num_steps), momentum=0.9),
    )
    for seed in seeds:
        key_init, key_order, key_run = jax.random.split(jax.random.key(seed), 3)
        params, _ = model.init(key_init, data.train.inputs[:1])
        # The two digits left over would make a step as large as the others, and all noise.
        source = batches.split(data.train, BATCH_SIZE, key=key_order, drop_remainder=True)
        result = fit.fit(loss_fn, params, source, optimizer, num_steps, key=key_run)
        yield result, statistics.refresh(model.apply, result.params, state, data.train)


def percent(error, count):
    """A fraction of `count` examples in percent, with its binomial standard error."""
    return f"{100 * error:.2f} ± {100 * np.sqrt(error * (1 - error) / count):.2f} %"


def networks(page, data, model, options, seeds):
    """Chapter 1: two networks, trained and measured."""
    page.chapter(
        "Two networks",
        f"Two networks of the same kind, with {' and '.join(map(str, options['widths']))} hidden "
        "units and ReLU between them, are trained from seeds "
        f" {seeds[0]} and {seeds[1]} on {len(data.train.labels)} digits: SGD with "
        f"momentum 0.9, weight decay {DECAY}, learning rate {RATE} falling to zero along a cosine, "
        f"{EPOCHS} epochs in batches of {BATCH_SIZE}. The {len(data.test.labels)} test digits are "
        "used for nothing but the figures below; the ± is the binomial standard error of a test "
        "error.",
    )
    measure = {
        name: batches.mean(objectives.metrics_with_state(model.apply), part)
        for name, part in (("train", data.train), ("test", data.test))
    }
    trained, rows, lines = [], [], {}
    for seed, (result, state) in zip(seeds, train(model, data, seeds), strict=True):
        trained.append(result.params)
        found = {name: fn(result.params, state) for name, fn in measure.items()}
        rows.append(
            {
                "seed": seed,
                "train loss": float(found["train"]["loss"]),
                "test loss": float(found["test"]["loss"]),
                "train error": f"{float(found['train']['error']):.2%}",
                "test error": percent(float(found["test"]["error"]), len(data.test.labels)),
                "weights": f"{sum(x.size for x in jax.tree.leaves(result.params)):,}",
            }
        )
        per_epoch = result.history["loss"].reshape(EPOCHS, -1).mean(1)
        lines[f"seed {seed}"] = (np.arange(1, EPOCHS + 1), per_epoch)
        checkpoint.save_network(
            page.folder / f"network-{seed}", result.params, state, model="mlp", options=options,
            dataset=data.name, seed=seed,
        )  # fmt: skip
    page.table(rows)
    print(f"\nTwo networks\n{report.text_table(rows)}")
    figure = plot.curves(
        [{"x": "epoch", "y": "training loss (nats)", "lines": lines, "log": True}], size=(4.6, 2.8)
    )
    page.figure(
        "training", plot.png(figure), "Training loss, averaged over each epoch.",
        {"epoch": lines[f"seed {seeds[0]}"][0]}
        | {f"loss_seed_{seed}": lines[f"seed {seed}"][1] for seed in seeds},
    )  # fmt: skip
    return trained


def straight_line(page, data, model, trained):
    """Chapter 2: loss and error on the segment between the two."""
    ts = np.linspace(0, 1, 31)
    metrics_fn = objectives.metrics(model.apply, {})
    on = {
        name: surface.line(metrics_fn, *trained, part, ts)
        for name, part in (("train", data.train), ("test", data.test))
    }
    rows = []
    for name, line in on.items():
        for metric in ("loss", "error"):
            found = surface.barrier(line.ts, line.values[metric])
            show = "{:.4f}".format if metric == "loss" else "{:.2%}".format
            rows.append(
                {
                    "on the segment": f"{name} {metric}",
                    "at t=0": show(found.start),
                    "at t=1": show(found.end),
                    "highest": show(found.highest),
                    "barrier": show(found.height),
                    "at t": f"{found.t:.2f}",
                }
            )
    page.chapter(
        "The straight line between them",
        "Loss and error of (1 - t) a + t b. The barrier is the largest rise above the chord "
        f"between the two ends. The networks are {on['train'].distance:.1f} apart. Both solve the "
        "task, and the segment between them does not: they lie in different valleys, or in "
        "different orderings of the same one.",
    )
    page.table(rows)
    print(
        f"\nThe straight line between them, {on['train'].distance:.1f} long\n"
        f"{report.text_table(rows)}"
    )
    panels = [
        {
            "x": "position t on the segment",
            "y": label,
            "percent": metric == "error",
            "lines": {name: (line.ts, line.values[metric]) for name, line in on.items()},
        }
        for metric, label in (("loss", "loss (nats)"), ("error", "error"))
    ]
    page.figure(
        "line",
        plot.png(plot.curves(panels)),
        "Loss (left) and fraction of wrong digits (right) on the segment between two networks.",
        {"t": ts}
        | {
            f"{n}_{metric}": line.values[metric] for n, line in on.items() for metric in line.values
        },
    )


def alignment(page, data, model, trained):
    """Chapter 3: the same line, with the second network's units in the first one's order."""

    def outputs(params, inputs):
        return model.apply(params, {}, inputs, False)[0]

    spec = symmetry.permutation_spec(outputs, trained[0], data.train.inputs[:2])
    proof = symmetry.check(spec, outputs, trained[0], data.train.inputs[:2], key=jax.random.key(0))
    found = permute.weight_matching(spec, *trained)
    metrics_fn = objectives.metrics(model.apply, {})
    rows, panels, values = [], [], {}
    for name, part in (("train", data.train), ("test", data.test)):
        line = permute.barrier(
            metrics_fn, *trained, part, spec=spec, permutation=found.permutation,
            ts=np.linspace(0, 1, 31),
        )  # fmt: skip
        ways = {"before": line.naive, "after": line.aligned}
        for when, measured in ways.items():
            loss, error = measured["loss"], measured["error"]
            rows.append(
                {
                    "on the segment": f"{name}, {when} alignment",
                    "highest loss": f"{loss.highest:.4f}",
                    "loss barrier": f"{loss.height:.4f}",
                    "above the mean of the ends": f"{loss.height_over_mean:.4f}",
                    "highest error": f"{error.highest:.2%}",
                }
            )
            values |= {f"{name}_{when}_loss": loss.values, f"{name}_{when}_error": error.values}
        panels.append(
            {
                "x": "position t on the segment",
                "y": f"{name} loss (nats)",
                "legend": "above",
                "lines": {
                    f"{when} alignment": (line.ts, x["loss"].values) for when, x in ways.items()
                },
            }
        )
    page.chapter(
        "The same line, modulo permutation",
        "Hidden units have no order of their own: permuting them, with their weights, leaves the "
        f"network the same function. The {len(spec.groups)} groups of units were read off the "
        "model's own computation, and random permutations changed its outputs by at most "
        f"{proof.joint:.0e} of their size. Matching the second network's units with the "
        f"first's brings the distance from {line.distance_naive:.1f} to "
        f"{line.distance_aligned:.1f}, and the barrier from {rows[0]['loss barrier']} to "
        f"{rows[1]['loss barrier']} nats on the training digits.",
    )
    page.table(rows)
    print(f"\nThe same line, modulo permutation\n{report.text_table(rows)}")
    page.figure(
        "alignment",
        plot.png(plot.curves(panels)),
        "Loss on the segment between the two networks before and after the units of the second are "
        "permuted, on training digits (left) and test digits (right).",
        {"t": line.ts} | values,
    )


def bezier(page, data, model, trained):
    """Chapter 4: a curve of low loss between the two, and the plane that it lies in."""
    basis = curves.bezier(3)
    source = batches.split(data.train, BATCH_SIZE, key=jax.random.key(5), drop_remainder=True)
    num_steps = EPOCHS * len(source)
    found = curves.fit(
        objectives.loss(model.apply, {}), basis, curves.initialize(basis, *trained), source,
        optax.sgd(fit.three_phase(0.03, num_steps), momentum=0.9), num_steps,
        key=jax.random.key(6), weight_decay=DECAY,
    )  # fmt: skip
    metrics_fn = objectives.metrics(model.apply, {})
    parts = {"train": data.train, "test": data.test}
    paths = {
        "segment": (curves.segment(), tree.stack(trained)),
        "Bezier curve": (basis, found.control_points),
    }
    along = {
        (name, part): curves.evaluate(metrics_fn, *path, source, 31)
        for name, path in paths.items()
        for part, source in parts.items()
    }
    rows = [
        {
            "path": f"{name}, {part}",
            "highest loss": f"{x.metrics['loss'].highest:.4f}",
            "mean loss over its length": f"{x.metrics['loss'].integral:.4f}",
            "highest error": f"{x.metrics['error'].highest:.2%}",
            "length": f"{x.length:.2f}",
        }
        for (name, part), x in along.items()
    ]
    page.chapter(
        "A curve of low loss",
        "A Bezier curve with one control point between the networks, which stay as they are to the "
        f"bit: {num_steps} steps on points drawn along it bend it around the hill of the straight "
        "line.",
    )
    page.table(rows)
    print(f"\nA curve of low loss\n{report.text_table(rows)}")
    panels = [
        {
            "x": "position t on the path",
            "y": f"{part} loss (nats)",
            "legend": "above",
            "lines": {
                name: (x.ts, x.metrics["loss"].values)
                for (name, p), x in along.items()
                if p == part
            },
        }
        for part in parts
    ]
    page.figure(
        "curve",
        plot.png(plot.curves(panels)),
        "Loss on the straight segment and on the Bezier curve, on training digits (left) and test "
        "digits (right).",
        {"t": along["segment", "train"].ts}
        | {
            f"{name.split()[0].lower()}_{part}_loss": x.metrics["loss"].values
            for (name, part), x in along.items()
        },
    )
    ends, bend = trained, tree.unstack(found.control_points)[1]
    frame = surface.frame([ends[0], ends[1], bend])
    plane = surface.plane(metrics_fn, frame, data.train, num=21, margin=0.25)
    line = frame.project(curves.points(basis, found.control_points, np.linspace(0, 1, 41)))
    figure = plot.plane(
        plane, "loss", marks=("network 0", "network 1", "control point"), path={"curve": line},
        label="training loss (nats)",
    )  # fmt: skip
    page.figure(
        "plane",
        plot.png(figure),
        "Training loss on the plane through both networks and the control point, in distances in "
        "weight space; the axes differ in scale. The curve bends towards its control point without "
        "reaching it.",
        {"coordinates": plane.coordinates, "loss": plane.values["loss"],
         "curve": line.coordinates},
    )  # fmt: skip


def fast_ensemble(page, data, model, trained, seed):
    """Chapter 5: an ensemble out of the last fifth of one training run."""
    source = batches.split(data.train, BATCH_SIZE, key=jax.random.key(7), drop_remainder=True)
    loss_fn = objectives.loss(model.apply, {})
    num_steps, begin = EPOCHS * len(source), 4 * EPOCHS * len(source) // 5

    def optimizer(rate):
        return optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(rate, momentum=0.9))

    params, _ = model.init(jax.random.key(seed), data.train.inputs[:1])
    run = curves.collect(
        loss_fn, params, source, optimizer(fit.warmup_cosine(RATE, num_steps)), [begin, num_steps],
        key=jax.random.key(seed),
    )  # fmt: skip
    start, end = tree.unstack(run.members)
    cycle = 2 * ((num_steps - begin) // 10)
    fge = curves.fge(
        loss_fn, start, source, optimizer, high=0.3, low=1e-3, cycle_steps=cycle, num_members=5,
        key=jax.random.key(8),
    )  # fmt: skip
    model_fn = objectives.outputs(model.apply, {})
    test = batches.split(data.test, 300)
    members = {
        "one network, the whole run": [end],
        "5 members from its last fifth (FGE)": fge.members,
        "the 2 networks of chapter 1": list(trained),
    }
    scores = {
        name: ensemble.calibration(ensemble.predict(model_fn, points, test), data.test.labels)
        for name, points in members.items()
    }
    rows = [
        {
            "ensemble": name,
            "test loss": f"{x.nll.value:.4f} ± {x.nll.standard_error:.4f}",
            "test error": percent(1 - x.accuracy.value, len(data.test.labels)),
            "calibration error": f"{x.ece.value:.2%}",
        }
        for name, x in scores.items()
    ]
    apart = float(tree.norm(tree.axpy(-1.0, *trained)))
    page.chapter(
        "An ensemble from one run",
        f"From four fifths of a run on, the learning rate goes up and down in cycles of {cycle} "
        "steps, and a network is kept at each low point. The members are "
        f"{fge.distances.mean():.2f} apart on average, the networks of chapter 1 {apart:.1f}. The "
        "predicted probabilities are averaged. The ± are standard errors over the test digits; "
        "they are larger than most differences here.",
    )
    page.table(rows)
    print(f"\nAn ensemble from one run\n{report.text_table(rows)}")
    name = "5 members from its last fifth (FGE)"
    bins = scores[name].bins
    page.figure(
        "calibration",
        plot.png(plot.reliability(scores[name])),
        "How often the FGE ensemble is right against how sure it is, on test digits.",
        {field: np.asarray(value) for field, value in bins._asdict().items()},
    )


def volume(page, data, model, trained):
    """Chapter 6: triangles of low loss between each network and two connecting vertices."""
    source = batches.split(data.train, BATCH_SIZE, key=jax.random.key(10), drop_remainder=True)
    num_steps = EPOCHS * len(source) // 2
    metrics_fn = objectives.metrics(model.apply, {})
    modes = tree.stack(trained)
    measure = batches.mean(metrics_fn, data.train)
    before = float(measure(simplex.centroid(modes))["loss"])
    grown = simplex.spro(
        objectives.loss(model.apply, {}), modes, source,
        optax.sgd(fit.three_phase(0.03, num_steps), momentum=0.9), num_steps,
        key=jax.random.key(11), num_connectors=2, num_samples=2, volume_weight=3e-2,
        weight_decay=DECAY,
    )  # fmt: skip
    inside = {
        name: simplex.evaluate(metrics_fn, grown.complex, part, 100, key=jax.random.key(12))
        for name, part in (("train", data.train), ("test", data.test))
    }
    worst = simplex.worst_point(
        objectives.evaluation_loss(model.apply, {}), grown.complex, data.train,
        starts=inside["train"].worst("loss", 3), num_steps=15,
    )  # fmt: skip
    rows = [
        {
            "100 points within": name,
            "mean loss": f"{x.metrics['loss'].mean:.4f}",
            "highest loss": f"{x.metrics['loss'].highest:.4f}",
            "highest error": f"{x.metrics['error'].highest:.2%}",
        }
        for name, x in inside.items()
    ]
    corners = [simplex.vertex(grown.complex, i) for i in (0, 2, 3)]
    heights = simplex.heights(tree.stack(corners))
    page.chapter(
        "A volume of low loss",
        "Two more networks, connecting vertices, are trained one after the other such that the "
        "loss is low all over the two triangles that they make with each network of chapter 1. The "
        f"first began at the middle of the segment, where the training loss is {before:.3f}. The "
        "area of the triangles together is "
        f"{np.exp(grown.stages[-1].log_volume):.1f}; the second connecting vertex lies "
        f"{heights[-1]:.1f} above the edge opposite to it. The worst point that gradient ascent "
        f"found in them has a training loss of {float(worst.value):.4f}.",
    )
    page.table(rows)
    print(f"\nA volume of low loss\n{report.text_table(rows)}")
    frame = surface.frame(corners)
    plane = surface.plane(metrics_fn, frame, data.train, num=25, margin=0.6)
    outline = frame.project([*corners, corners[0]]).coordinates
    page.figure(
        "simplex",
        plot.png(
            plot.plane(
                plane, "loss", marks=("network 0", "connector 1", "connector 2"),
                path=outline, label="training loss (nats)",
            )
        ),
        "Training loss on the plane of the first triangle: low within, and rising outside.",
        {"coordinates": plane.coordinates, "loss": plane.values["loss"], "corners": outline},
    )  # fmt: skip


def normalisation(page, data, options, seeds):
    """Chapter 7: a network with BatchNorm is wrong at a new point until refreshed."""
    model = models.build("mlp", **options, norm="batch")
    (first, state), (second, _) = train(model, data, seeds)
    ts = np.linspace(0, 1, 11)
    metrics_fn = objectives.metrics_with_state(model.apply)
    ends = (first.params, second.params)

    def along(state_fn):
        return surface.line(metrics_fn, *ends, data.test, ts, state_fn=state_fn)

    stale = along(lambda params: state)
    fresh = along(lambda params: statistics.refresh(model.apply, params, state, data.train))
    rows = [
        {
            "t": t,
            "statistics of t=0": percent(stale.values["error"][i], len(data.test.labels)),
            "refreshed": percent(fresh.values["error"][i], len(data.test.labels)),
        }
        for i, t in enumerate(np.round(ts, 2).tolist())
        if i in (0, 2, 5, 8, 10)
    ]
    page.chapter(
        "Normalisation statistics belong to a point",
        "The same two seeds with BatchNorm. On the way from one network to the other the running "
        "statistics of the first are wrong, at the second network itself too. Refreshing computes "
        "those of each point exactly, from the training data. Test error along the segment:",
    )
    page.table(rows)
    print(f"\nBatchNorm: test error along the line\n{report.text_table(rows)}")
    panel = {
        "x": "position t on the segment",
        "y": "test error",
        "percent": True,
        "lines": {
            "statistics of t=0": (ts, stale.values["error"]),
            "refreshed": (ts, fresh.values["error"]),
        },
    }
    page.figure(
        "normalisation",
        plot.png(plot.curves([panel], size=(4.6, 2.8))),
        "Test error on the segment between two networks with BatchNorm.",
        {"t": ts, "stale_error": stale.values["error"], "refreshed_error": fresh.values["error"]},
    )


def curvature(page, data, model, params, seed):
    """Chapter 8: the largest eigenvalues of the Hessian, each with its error, and the density."""
    loss_fn = objectives.evaluation_loss(model.apply, {})
    keys = jax.random.split(jax.random.key(seed), 3)
    pairs = hessian.eigenthings(loss_fn, params, data.train, 12, key=keys[0])
    operator = hessian.hessian(loss_fn, params, data.train)
    density = krylov.spectral_density(
        operator, key=keys[1], num_probes=8, num_steps=40, deflate=pairs
    )
    trace = krylov.trace(operator, key=keys[2], num_matvecs=100)
    page.chapter(
        "Curvature",
        f"The Hessian of the training loss at the first network has {operator.size:,} rows and is "
        f"never formed: {pairs.num_matvecs} products gave its largest eigenvalues, each with the "
        "measured norm of H x - lambda x and the interval in which an eigenvalue lies. "
        f"Its trace is {trace.estimate:.2f} ± {trace.standard_error:.2f}, from {trace.num_matvecs} "
        "random products.",
    )
    page.table(pairs.table())
    print(f"\nCurvature: {pairs.num_matvecs} products\n{report.text_table(pairs.table())}")
    print(f"trace {trace.estimate:.3f} ± {trace.standard_error:.3f}")
    page.text(
        f"The density of all eigenvalues, from {density.nodes.shape[0]} random starts of "
        f"{density.nodes.shape[1]} products: nearly all are close to zero, and a few stand apart."
    )
    page.figure(
        "density",
        plot.png(plot.density(density, size=(4.6, 2.8))),
        "Density of the Hessian's eigenvalues with its 95 % band; the stems are the eigenvalues of "
        "the table.",
        {
            "grid": density.curve.grid, "density": density.curve.values,
            "lower": density.curve.lower, "upper": density.curve.upper,
            "eigenvalues": pairs.eigenvalues, "residuals": pairs.residuals,
        },
    )  # fmt: skip
    page.text(
        "An eigenvector is a direction like any other point. Along the first, the loss rises as "
        "half its eigenvalue times the squared distance, as long as the step is small:"
    )
    metrics_fn = objectives.metrics(model.apply, {})
    distances = np.linspace(-0.5, 0.5, 21)
    first = tree.unstack(pairs.eigenvectors)[0]
    line = surface.along(metrics_fn, params, first, distances, data.train)
    here = line.values["loss"][10]
    parabola = here + 0.5 * pairs.eigenvalues[0] * distances**2
    panel = {
        "x": "distance along the first eigenvector",
        "y": "training loss (nats)",
        "lines": {"loss": (distances, line.values["loss"]), "parabola": (distances, parabola)},
    }
    page.figure(
        "eigenvector",
        plot.png(plot.curves([panel], size=(4.6, 2.8))),
        "Training loss along the eigenvector of the largest eigenvalue, and the parabola that the "
        "eigenvalue says.",
        {"distance": distances, "loss": line.values["loss"], "parabola": parabola},
    )


def main(options: Options) -> None:
    start = time.perf_counter()
    device = jax.devices()[0]
    facts = (
        f"geojax {geojax.__version__}, jax {jax.__version__}, {len(jax.devices())} "
        f"{device.platform} device(s) ({device.device_kind}), seed {options.seed}"
    )
    page = report.Report(options.out, "A tour of geojax on handwritten digits", facts)
    print(facts)
    # Section 6 of the calibration: 898 training digits, 899 test digits, nothing held out.
    data = datasets.load("digits", validation=0)
    model_options = {"widths": [64, 64], "num_classes": 10}
    model = models.build("mlp", **model_options)
    seeds = (options.seed, options.seed + 1)
    trained = networks(page, data, model, model_options, seeds)
    straight_line(page, data, model, trained)
    alignment(page, data, model, trained)
    bezier(page, data, model, trained)
    fast_ensemble(page, data, model, trained, options.seed)
    volume(page, data, model, trained)
    normalisation(page, data, model_options, seeds)
    curvature(page, data, model, trained[0], options.seed)
    path = page.write()
    print(f"\n{path.resolve()}  ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
