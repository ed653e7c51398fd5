"""Claims: a simplex costs what its samples cost, stays low in loss, and has a volume that is one.

Each part prints its targets beside what was measured; the exit code is 1 where one is missed.
Ratios of costs are of process CPU time, the sides interleaved, the least of several rounds.

  step       a step of a simplex's training with eight vertices against two, and against `fit`
  memory     what a step holds, in multiples of the parameters, for two to eight vertices
  digits     volumes between two and four modes; the effect of the volume's weight
  dimension  one connector after another: heights, volume and worst loss, with a figure
  scratch    lines and triangles trained from scratch, with shared and layer-wise coefficients:
             their midpoints against their vertices, over five seeds
  soup       centroids of simplexes between networks and within one's surroundings, against their
             vertices
  ensembles  ESPRO, a deep ensemble, FGE and SWAG on Fashion-MNIST at equal numbers of gradients,
             with rates chosen on validation data, over five seeds. No target: it says who wins

  python benchmarks/simplex.py
  python benchmarks/simplex.py --only step,memory
  python benchmarks/simplex.py --quick

Fashion-MNIST is read below GEOJAX_DATA_DIR and left out without it. Trained networks are kept below
--out, so that a second run trains nothing.
"""

import argparse
import json
import os
import pathlib
import platform
import time
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from common import Table, decayed, heading, least, spread, stored  # noqa: E402

from geojax import (  # noqa: E402
    batches,
    curves,
    datasets,
    ensemble,
    fit,
    models,
    objectives,
    plot,
    report,
    simplex,
    tree,
)
from geojax.simplex import training  # noqa: E402

# As the digits of the tour.
MLP = {"widths": [64, 64], "initializer": "he"}


# -------------------------------------------------------------------------------------- the costs

SIZES = {
    "MLP of 0.1 M": ([128, 128], 40),
    "MLP of 1.1 M": ([612, 612, 612], 10),
}


def problem(widths):
    model = models.build("mlp", num_classes=10, widths=widths, initializer="he")
    rng = np.random.default_rng(0)
    data = datasets.Examples(
        rng.standard_normal((1280, 28, 28, 1), np.float32),
        rng.integers(10, size=1280).astype(np.int32),
    )
    ends = [model.init(jax.random.key(seed), data.inputs[:1])[0] for seed in range(8)]
    return model, ends, batches.split(data, 128)


def compiled(made, batch):
    """The compiled step of what `simplex.fit` prepares, and a state to begin with."""
    step = fit.make_step(
        made.loss, made.optimizer, has_metrics=True, regularizer=made.regularizer,
        frozen=made.frozen,
    )  # fmt: skip
    state = fit.init(made.parts, made.optimizer, key=jax.random.key(0))
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile(), state


def prepared(loss_fn, vertices, optimizer, **options):
    options = {"num_samples": 5, "samples": "sequential"} | options
    return training._prepare(
        loss_fn, simplex.single(tree.stack(vertices)), optimizer, free=(-1,), together="vmap",
        volume_weight=1e-3, reduction="mean", choose="volume", weight_decay=0.0, decay="point",
        stochastic="shared", volumes="all", similarity_weight=0.0, layerwise=False, **options,
    )  # fmt: skip


def stepping(step, state, batch, num_steps):
    """A run of steps in the same buffers."""
    kept = [state]

    def run():
        for _ in range(num_steps):
            kept[0], _ = step(kept[0], batch)
        return kept[0].params

    return run


def step_part(table, options):
    heading("A step of a simplex, SGD with momentum, batches of 128, weight of the volume on")
    rounds = 3 if options.quick else 9
    for name, (widths, num_steps) in SIZES.items():
        model, ends, source = problem(widths)
        loss_fn, optimizer = objectives.loss(model.apply, {}), optax.sgd(0.01, 0.9)
        batch = next(iter(source))
        state = fit.init(ends[0], optimizer, key=jax.random.key(0))
        plain = jax.jit(fit.make_step(loss_fn, optimizer), donate_argnums=0)
        runs = {"plain": stepping(plain.lower(state, batch).compile(), state, batch, num_steps)}
        for num in (2, 8):
            for samples in (1, 5):
                made = prepared(loss_fn, ends[:num], optimizer, num_samples=samples)
                step = compiled(made, batch)
                runs[f"{num} vertices, {samples} samples"] = stepping(*step, batch, num_steps)
        spent = least(runs, rounds)
        for label, seconds in spent.items():
            print(f"  {name}, {label}: {1e3 * seconds / num_steps:.2f} ms of CPU a step")
        two, eight = (spent[f"{n} vertices, 5 samples"] for n in (2, 8))
        table.add(f"{name}: a step with 8 vertices over one with 2, 5 samples", "<=", 1.3,
                  eight / two)  # fmt: skip
        for n, seconds in ((2, two), (8, eight)):
            table.add(f"{name}: {n} vertices, per sample over a plain step", "<=", 1.2,
                      seconds / 5 / spent["plain"])  # fmt: skip


def memory_part(table, options):
    del options
    heading("Memory of a compiled step, in multiples of the parameters (XLA's own account)")
    model, ends, source = problem([612, 612, 612])
    batch = next(iter(source))
    size = 4 * tree.size(ends[0])
    loss_fn, optimizer = objectives.loss(model.apply, {}), optax.sgd(0.01, 0.9)
    rows, arguments = [], []
    for samples in ("sequential", "vmap"):
        for num in (2, 4, 8):
            made = prepared(loss_fn, ends[:num], optimizer, samples=samples)
            found = compiled(made, batch)[0].memory_analysis()
            rows.append({
                "samples": samples, "vertices": num,
                "arguments": f"{found.argument_size_in_bytes / size:.2f}",
                "temporary": f"{found.temp_size_in_bytes / size:.2f}",
            })  # fmt: skip
            if samples == "sequential":
                arguments.append(found.argument_size_in_bytes / size)
    print("  " + report.text_table(rows).replace("\n", "\n  "))
    table.add("copies of the parameters for each frozen vertex", "<=", 1.01,
              (arguments[2] - arguments[1]) / 4)  # fmt: skip


# ------------------------------------------------------------------------------------- the digits


class Digits:
    """The networks and the loss of the digits, and complexes grown between them."""

    def __init__(self, options, seeds):
        self.data = datasets.load("digits", validation=0)
        self.model = models.build("mlp", **MLP)
        self.source = batches.split(self.data.train, 128, key=jax.random.key(9),
                                    drop_remainder=True)  # fmt: skip
        self.loss = objectives.loss(self.model.apply, {})
        self.epochs = 20 if options.quick else 100
        self.kept = options.out / f"digits-{self.epochs}-epochs"
        self.modes = [stored(self.kept / f"network-{s}", lambda s=s: self.train(s)) for s in seeds]

    def train(self, seed):
        params, _ = self.model.init(jax.random.key(seed), self.data.train.inputs[:1])
        steps = self.epochs * len(self.source)
        return fit.fit(
            self.loss, params, self.source, decayed(fit.warmup_cosine(0.05, steps)), steps,
            key=jax.random.key(seed), progress=False,
        ).params  # fmt: skip

    def grow(self, num_modes, num_connectors, weight, epochs=None):
        steps = (self.epochs if epochs is None else epochs) * len(self.source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return simplex.spro(
                self.loss, tree.stack(self.modes[:num_modes]), self.source,
                optax.sgd(fit.three_phase(0.03, steps), 0.9), steps, key=jax.random.key(5),
                num_connectors=num_connectors, volume_weight=weight, num_eval=400,
                metrics_fn=objectives.metrics(self.model.apply, {}),
                eval_batches=self.data.train, weight_decay=5e-4, progress=False,
            )  # fmt: skip


def digits_part(table, options):
    heading("Digits: connectors between modes; the worst training NLL of 400 points and vertices")
    digits = Digits(options, range(4))
    rows = []
    settings = [
        (2, 1, 1e-8, 0.06), (2, 3, 1e-8, 0.12), (4, 1, 1e-8, 0.13), (2, 3, 1e-3, None),
        (2, 3, 1e-2, 0.15),
    ]  # fmt: skip
    found = {}
    for modes, connectors, weight, limit in settings:
        result = digits.grow(modes, connectors, weight)
        found[modes, connectors, weight] = last = result.stages[-1]
        rows.append({"modes": modes, "weight": f"{weight:g}"} | last.row())
        if limit is not None:
            table.add(
                f"{modes} modes, {connectors} connector(s), weight {weight:g}: worst NLL", "<=",
                limit, last.highest_loss,
            )  # fmt: skip
    more = 2 * (found[2, 3, 1e-2].log_volume - found[2, 3, 1e-8].log_volume)
    table.add("log squared volume at weight 1e-2 less that at 1e-8", ">=", 4, more)
    centre = tree.combine(tree.stack(digits.modes), np.full(4, 0.25, np.float32))
    at = batches.mean(objectives.metrics(digits.model.apply, {}), digits.data.train)(centre)
    table.add("4 modes: NLL at their centroid, where the connector starts", ">=", 1,
              float(at["loss"]))  # fmt: skip
    print("  " + report.text_table(rows).replace("\n", "\n  "))


def dimension_part(table, options):
    del table
    number = 4 if options.quick else 14
    heading(f"Digits: {number} connectors between two modes, one after another")
    digits = Digits(options, range(2))
    panels = {"height": {}, "volume": {}, "worst": {}}
    data = {}
    for weight in (1e-8, 1e-3, 1e-2):
        result = digits.grow(2, number, weight)
        rows = []
        vertices = tree.unstack(result.complex.vertices)
        for stage in result.stages:
            face = tree.stack([vertices[0], *vertices[2 : stage.num_vertices]])
            safe = float(simplex.log_volume(face))
            with np.errstate(all="ignore"):
                original = float(simplex.original_log_volume(face))
            height = float(simplex.heights(face)[-1])
            rows.append({
                "connectors": stage.num_vertices - 2, "height of the last": height,
                "log V^2": 2 * safe, "float32 Cayley-Menger": original,
                "mean NLL": stage.mean_loss, "worst NLL": stage.highest_loss,
                "volume's share of the gradient": stage.volume_share,
            })  # fmt: skip
        print(f"\n  weight {weight:g}, distance of the modes "
              f"{float(simplex.distances(tree.stack(digits.modes))[0, 1]):.1f}")  # fmt: skip
        print("  " + report.text_table(rows).replace("\n", "\n  "), flush=True)
        at = [row["connectors"] for row in rows]
        label = f"weight {weight:g}"
        panels["height"][label] = at, [row["height of the last"] for row in rows]
        panels["volume"][label] = at, [row["log V^2"] for row in rows]
        panels["worst"][label] = at, [row["worst NLL"] for row in rows]
        for name, key in (
            ("height", "height of the last"), ("log_square_volume", "log V^2"),
            ("worst", "worst NLL"), ("float32", "float32 Cayley-Menger"),
        ):  # fmt: skip
            data[f"{name}_{weight:g}"] = np.array([row[key] for row in rows])
    image = plot.curves(
        [
            {"x": "connectors", "y": "height of the newest vertex", "log": True, "integers": True,
             "legend": "above", "lines": panels["height"]},
            {"x": "connectors", "y": "log of the squared volume", "integers": True,
             "legend": "above", "lines": panels["volume"]},
            {"x": "connectors", "y": "worst training loss (nats)", "integers": True,
             "legend": "above", "lines": panels["worst"]},
        ],
        size=(3.6, 2.9),
    )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "dimension.png").write_bytes(plot.png(image))
    np.savez(options.out / "dimension.npz", **data)
    print(f"\n  {options.out / 'dimension.png'}")


def scratch_part(table, options):
    heading("Digits: subspaces from scratch; test error in points, five seeds")
    digits = Digits(options, ())
    errors = batches.mean(objectives.metrics(digits.model.apply, {}), digits.data.test)
    steps = digits.epochs * len(digits.source)
    rows = []
    for name, num in (("line", 2), ("triangle", 3)):
        for layerwise in (False, True):
            found = []
            for seed in range(2 if options.quick else 5):
                keys = jax.random.split(jax.random.key(50 + seed), num)
                start = [digits.model.init(k, digits.data.train.inputs[:1])[0] for k in keys]
                trained = simplex.fit(
                    digits.loss, simplex.single(tree.stack(start)), digits.source,
                    decayed(fit.warmup_cosine(0.05, steps), 0.0), steps, key=jax.random.key(seed),
                    free=range(num), num_samples=1, weight_decay=5e-4, similarity_weight=1.0,
                    layerwise=layerwise, progress=False,
                ).complex.vertices  # fmt: skip
                ends = [100 * float(errors(x)["error"]) for x in tree.unstack(trained)]
                middle = 100 * float(errors(simplex.centroid(trained))["error"])
                found.append((middle, min(ends), float(simplex.distances(trained)[0, 1])))
            middle, best, apart = np.array(found).T
            kind = f"{name}, {'layer-wise' if layerwise else 'shared'}"
            rows.append({"subspace": kind, "midpoint": spread(middle, 2),
                         "best vertex": spread(best, 2), "less": spread(middle - best, 2),
                         "distance of vertices": spread(apart, 1)})  # fmt: skip
            table.add(f"{kind} coefficients: midpoint less best vertex, points", "<=", 0.5,
                      (middle - best).mean())  # fmt: skip
    print("  " + report.text_table(rows).replace("\n", "\n  "))


def soup_part(table, options):
    heading("Digits: the NLL of a simplex's centroid over the mean of its vertices'")
    digits = Digits(options, range(3))
    steps = digits.epochs * len(digits.source)
    metrics_fn = objectives.metrics(digits.model.apply, {})
    rows, within = [], []

    def ratios(kind, vertices):
        found = []
        for part in ("train", "test"):
            mean = batches.mean(metrics_fn, getattr(digits.data, part))
            ends = [float(mean(x)["loss"]) for x in tree.unstack(vertices)]
            found.append(float(mean(simplex.centroid(vertices))["loss"]) / np.mean(ends))
        rows.append({"simplex": kind, "train": f"{found[0]:.3f}", "test": f"{found[1]:.3f}"})
        return found

    for seed, mode in enumerate(digits.modes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grown = simplex.espro(
                digits.loss, tree.stack([mode]), digits.source,
                optax.sgd(fit.three_phase(0.03, steps), 0.9), steps, key=jax.random.key(5),
                num_vertices=3, volume_weight=1e-2, weight_decay=5e-4, progress=False,
            ).complexes[0]  # fmt: skip
        within.append(ratios(f"grown from network {seed}", grown.vertices)[1])
    between = digits.grow(2, 3, 1e-2).complex
    for s, members in enumerate(between.simplices):
        chosen = tree.stack([simplex.vertex(between, i) for i in members])
        ratios(f"mode {s} and three connectors", chosen)
    print("  " + report.text_table(rows).replace("\n", "\n  "))
    table.add("simplexes grown from one network: test NLL of the centroid over its vertices'", "<=",
              1.1, max(within))  # fmt: skip


# ---------------------------------------------------------------------------------- the ensembles

NUM_NETWORKS, NUM_MEMBERS, NUM_SAMPLES = 3, 5, 25
LONG, DEEP, FGE, SWAG, ESPRO = (
    "one network, long", "deep ensemble", "FGE", "SWAG", "ESPRO",
)  # fmt: skip
METHODS = (LONG, DEEP, FGE, SWAG, ESPRO)
# What is tried for each method; the least validation NLL of one run takes it.
NETWORK_RATES = (0.05, 0.1, 0.2, 0.4)
FGE_RATES = (0.02, 0.05, 0.1, 0.2)
SWAG_RATES = (0.003, 0.01, 0.03, 0.1)
ESPRO_RATES, ESPRO_WEIGHTS = (0.01, 0.03, 0.1, 0.3), (1e-3, 1e-2, 1e-1)


class Setting:
    """A small CNN on halved Fashion-MNIST images, augmented, and each run's part of the budget."""

    def __init__(self, options):
        data = datasets.load("fashion_mnist", raw=True)
        constants = data.normalization

        def halved(part):
            images = part.inputs.astype(np.float32)
            pairs = images.reshape(len(images), 14, 2, 14, 2, 1).mean((2, 4))
            return part._replace(inputs=np.rint(pairs).astype(np.uint8))

        def plain(part):
            return part._replace(inputs=datasets.normalize(part.inputs, constants))

        def transform(key, batch):
            moved = datasets.augment.pad_crop_flip(key, batch.inputs, padding=1)
            return batch._replace(inputs=datasets.normalize(moved, constants))

        train, validation, test = (
            halved(part) for part in (data.train, data.validation, data.test)
        )
        self.train = jax.tree.map(lambda x: x[: options.examples], train)
        self.validation, self.test = plain(validation), plain(test)
        self.model = models.build("cnn", num_classes=10, widths=[16, 32], norm=None)
        self.outputs = objectives.outputs(self.model.apply, {})
        self.source = batches.split(self.train, 100, key=jax.random.key(3), drop_remainder=True)
        self.options = {"transform": transform, "progress": False}
        self.loss = objectives.loss(self.model.apply, {})
        self.epochs = 2 if options.quick else options.epochs
        self.steps = self.epochs * len(self.source)
        self.begin = 4 * self.steps // 5
        self.rest = self.steps - self.begin
        self.first = plain(jax.tree.map(lambda x: x[:1], train)).inputs

    def run(self, seed, steps, at, rate):
        return tree.unstack(
            curves.collect(
                self.loss, self.model.init(jax.random.key(seed), self.first)[0], self.source,
                decayed(fit.warmup_cosine(rate, steps)), at, key=jax.random.key(seed),
                **self.options,
            ).members
        )  # fmt: skip

    def fge(self, seed, start, rate):
        cycle = 2 * (self.rest // (2 * NUM_MEMBERS))
        return tree.unstack(curves.fge(
            self.loss, start, self.source, decayed, high=rate, low=rate / 100, cycle_steps=cycle,
            num_members=NUM_MEMBERS, key=jax.random.key(seed + 1), **self.options,
        ).members)  # fmt: skip

    def swag(self, seed, start, rate):
        along = curves.collect(
            self.loss, start, self.source, decayed(rate),
            range(self.rest // 20, self.rest + 1, self.rest // 20), key=jax.random.key(seed + 2),
            **self.options,
        )  # fmt: skip
        fitted = curves.swag(along.members)
        keys = [jax.random.fold_in(jax.random.key(seed + 3), i) for i in range(NUM_SAMPLES)]
        return [fitted.sample(key) for key in keys]

    def espro(self, seed, bases, rate, weight):
        """Two more vertices for each network, in the fifth of the budget that the others have."""
        samples = 2
        steps = self.rest // (2 * samples)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grown = simplex.espro(
                self.loss, tree.stack(bases), self.source,
                optax.sgd(fit.warmup_cosine(rate, steps), 0.9), steps, key=jax.random.key(seed),
                num_vertices=3, num_samples=samples, volume_weight=weight, weight_decay=5e-4,
                together="sequential", **self.options,
            )  # fmt: skip
        members = simplex.members(jax.random.key(seed), grown.complexes, NUM_SAMPLES)()
        return list(members), [stage.row() for stage in grown.stages[-1]]

    def probabilities(self, members, part):
        return ensemble.predict(self.outputs, members, batches.split(part, 1000), progress=False)

    def held_out(self, members):
        found = self.probabilities(members, self.validation)
        return float(ensemble.calibration(found, self.validation.labels).nll.value)

    def choose(self):
        """The rates, and the weight of the volume, with the least validation NLL of one run."""

        def best(name, tried):
            for setting, value in tried.items():
                print(f"  {name}, {setting}: validation NLL {value:.4f}", flush=True)
            return min(tried, key=lambda x: tried[x])

        seed = 99_000
        network = best(LONG, {
            rate: self.held_out(self.run(seed, self.steps, [self.steps], rate))
            for rate in NETWORK_RATES
        })  # fmt: skip
        start, _ = self.run(seed, self.steps, [self.begin, self.steps], network)
        (base,) = self.run(seed, self.begin, [self.begin], network)
        return {
            "network": network,
            "fge": best(FGE, {r: self.held_out(self.fge(seed, start, r)) for r in FGE_RATES}),
            "swag": best(SWAG, {r: self.held_out(self.swag(seed, start, r)) for r in SWAG_RATES}),
            "espro": best(ESPRO, {
                (r, w): self.held_out(self.espro(seed, [base], r, w)[0])
                for r in ESPRO_RATES for w in ESPRO_WEIGHTS
            }),
        }  # fmt: skip

    def members(self, seed, chosen):
        """All members of one seed, by method, with the gradients that each method takes."""
        seeds = [1000 * seed + i for i in range(NUM_NETWORKS)]
        rate = chosen["network"]
        runs = [self.run(s, self.steps, [self.begin, self.steps], rate) for s in seeds]
        starts = [(s, start) for s, (start, _) in zip(seeds, runs, strict=True)]
        cycles = [x for given in starts for x in self.fge(*given, chosen["fge"])]
        gaussians = [x for given in starts for x in self.swag(*given, chosen["swag"])]
        bases = [self.run(s, self.begin, [self.begin], rate)[0] for s in seeds]
        drawn, rows = self.espro(seed, bases, *chosen["espro"])
        whole = NUM_NETWORKS * self.steps
        least = NUM_NETWORKS * self.begin
        return {
            LONG: (whole, self.run(seeds[0], whole, [whole], rate)),
            DEEP: (whole, [end for _, end in runs]),
            FGE: (least + NUM_NETWORKS * NUM_MEMBERS * 2 * (self.rest // (2 * NUM_MEMBERS)),
                  cycles),
            SWAG: (whole, gaussians),
            ESPRO: (least + NUM_NETWORKS * 4 * (self.rest // 4), drawn),
        }, rows  # fmt: skip


def ensembles_part(table, options):
    del table
    try:
        setting = Setting(options)
    except FileNotFoundError as error:
        print(f"Fashion-MNIST is left out: {str(error).splitlines()[0]}")
        return
    seeds = range(2 if options.quick else 5)
    heading(
        f"Fashion-MNIST at 14 x 14, {len(setting.train.labels)} examples, augmented, CNN 16-32, "
        f"{NUM_NETWORKS} x {setting.epochs} epochs of batches of 100, {len(seeds)} seeds: mean ± "
        "half a 95 % t-interval"
    )
    begin = time.process_time()
    folder = options.out / f"ensembles-{options.examples}-{setting.epochs}"
    kept = folder / "chosen.json"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(setting.choose()))
    chosen = json.loads(kept.read_text())
    print(f"  chosen on validation data: {chosen}", flush=True)
    scores = {name: [] for name in METHODS}
    budgets = {}
    for seed in seeds:

        def make(seed=seed):
            members, rows = setting.members(seed, chosen)
            print("  " + report.text_table(rows).replace("\n", "\n  "), flush=True)
            return {
                name: {"budget": np.asarray(budget),
                       "probabilities": setting.probabilities(given, setting.test)}
                for name, (budget, given) in members.items()
            }  # fmt: skip

        kept = stored(folder / f"seed-{seed}", make)
        for name in METHODS:
            budgets[name] = int(kept[name]["budget"])
            found = ensemble.calibration(kept[name]["probabilities"], setting.test.labels)
            scores[name].append((found.nll.value, 1 - found.accuracy.value, found.ece.value))
    values = {name: np.array(given) for name, given in scores.items()}
    rows = []
    for name, given in values.items():
        less = given - values[DEEP]
        rows.append({
            "method": name, "gradients": budgets[name], "NLL": spread(given[:, 0], 4),
            "error %": spread(given[:, 1], 2, 100), "ECE %": spread(given[:, 2], 2, 100),
            "NLL - deep ensemble's": "" if name == DEEP else spread(less[:, 0], 4),
            "lower NLL": "" if name == DEEP else f"{int((less[:, 0] < 0).sum())} of {len(less)}",
        })  # fmt: skip
    print(report.text_table(rows))
    for i, metric in enumerate(("NLL", "error", "ECE")):
        order = sorted(values, key=lambda x: values[x][:, i].mean())
        print(f"  lowest {metric}: {order[0]}, then {order[1]}", flush=True)
    print(f"  {(time.process_time() - begin) / 60:.1f} minutes of CPU in this call")


PARTS = {
    "step": step_part,
    "memory": memory_part,
    "digits": digits_part,
    "dimension": dimension_part,
    "scratch": scratch_part,
    "soup": soup_part,
    "ensembles": ensembles_part,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less of it, and smaller")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--epochs", type=int, default=20,
                        help="of each of the three networks, in the ensembles")  # fmt: skip
    parser.add_argument("--examples", type=int, default=10_000,
                        help="that they are trained on")  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/benchmarks/simplex"),
                        help="where trained networks are kept")  # fmt: skip
    options = parser.parse_args()
    chosen = options.only.split(",")
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        parser.error(f"--only has {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    print(f"jax {jax.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, "
          f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
    table = Table()
    for name in chosen:
        PARTS[name](table, options)
    raise SystemExit(0 if table.show() else 1)


if __name__ == "__main__":
    main()
