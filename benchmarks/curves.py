"""Claims: curves cost what networks cost, reproduce Garipov et al.; FGE beside equal budgets.

Each part prints its targets beside what was measured; the exit code is 1 where one is missed.
Ratios of costs are of process CPU time, the two sides interleaved, the least of several rounds.

  step       a step of a curve's training against a step of `fit`
  evaluate   61 points of a curve against 61 evaluations of a network
  plane      21 x 21 positions of the digits network
  digits     the straight segment, a chain and a Bezier curve between three pairs of networks
  fge        fast geometric ensembling against baselines of the same budget, over five seeds: on few
             digits, and on a part of Fashion-MNIST. No target: it says who wins
  cnn        the table of the original's README, for a small network of our size

  python benchmarks/curves.py                    # everything; about twenty minutes on one core
  python benchmarks/curves.py --only step,evaluate
  python benchmarks/curves.py --quick            # fewer rounds, pairs, seeds and epochs

Fashion-MNIST is read below GEOJAX_DATA_DIR and left out without it. Trained networks are kept below
--out, so that a second run trains nothing.
"""

import argparse
import os
import pathlib
import platform
import time

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
    report,
    statistics,
    surface,
    tree,
)

# -------------------------------------------------------------------------------------- the costs

# Name, options, the shape of an image and steps in a timed run.
SIZES = {
    "MLP 784-512-512-10": ("mlp", {"widths": [512, 512], "initializer": "he"}, (28, 28, 1), 40),
    "CNN 16-32": ("cnn", {"widths": [16, 32], "norm": None}, (28, 28, 1), 20),
}


def problem(name, num_examples):
    kind, options, shape, num_steps = SIZES[name]
    model = models.build(kind, num_classes=10, **options)
    rng = np.random.default_rng(0)
    data = datasets.Examples(
        rng.standard_normal((num_examples, *shape), np.float32),
        rng.integers(10, size=num_examples).astype(np.int32),
    )
    ends = [model.init(jax.random.key(seed), data.inputs[:1])[0] for seed in (0, 1)]
    return model, ends, data, num_steps


def flops(run):
    """Of the very program of a step that a run of `fit` compiles."""
    lowered, compile_steps = [], fit.loop.compiled

    def noting(*args):
        steps = compile_steps(*args)

        def whole(state, batch):
            lowered.append(steps.whole.lower(state, batch))
            return steps.whole(state, batch)

        return steps._replace(whole=whole)

    fit.loop.compiled = noting
    try:
        run(1)
    finally:
        fit.loop.compiled = compile_steps
    return lowered[0].compile().cost_analysis()["flops"]


def step_part(table, options):
    heading("A step of a curve's training and a step of `fit`, SGD with momentum, batches of 128")
    rounds = 3 if options.quick else 9
    for name in SIZES:
        model, ends, data, num_steps = problem(name, 1280)
        source = batches.split(data, 128)
        loss_fn, optimizer = objectives.loss(model.apply, {}), optax.sgd(0.01, 0.9)
        basis = curves.bezier(3)
        points = curves.initialize(basis, *ends)
        key = jax.random.key(0)

        def plain(steps, args=(loss_fn, ends[0], source, optimizer), key=key):
            return fit.fit(*args, steps, key=key, progress=False).params

        def curve(steps, args=(loss_fn, basis, points, source, optimizer), key=key):
            return curves.fit(*args, steps, key=key, progress=False).control_points

        # What a call costs whatever its length is no cost of a step.
        best = least(
            {
                (kind, steps): lambda run=run, steps=steps: run(steps)
                for kind, run in (("plain", plain), ("curve", curve))
                for steps in (1, 1 + num_steps)
            },
            rounds,
        )
        each = {
            kind: (best[kind, 1 + num_steps] - best[kind, 1]) / num_steps
            for kind in ("plain", "curve")
        }
        print(f"  {name}: {1e3 * each['plain']:.2f} ms and {1e3 * each['curve']:.2f} ms of CPU")
        table.add(f"step: {name}, CPU time", "<=", 1.15, each["curve"] / each["plain"])
        counts = flops(plain), flops(curve)
        table.add(f"step: {name}, FLOPs by XLA", "<=", 1.15, counts[1] / counts[0])


def evaluate_part(table, options):
    heading("61 points of a curve and 61 evaluations of a network, 1280 examples")
    rounds = 2 if options.quick else 5
    for name in SIZES:
        model, ends, data, _ = problem(name, 1280)
        source = batches.split(data, 640)
        metrics_fn = objectives.metrics(model.apply, {})
        averaged = batches.mean(metrics_fn, source)
        basis = curves.bezier(3)
        points = curves.initialize(basis, *ends)

        def plain(averaged=averaged, params=ends[0]):
            return [averaged(params) for _ in range(61)]

        def curve(args=(metrics_fn, basis, points, source)):
            return curves.evaluate(*args, 61, progress=False).length

        best = least({"plain": plain, "curve": curve}, rounds)
        print(f"  {name}: {best['plain']:.3f} s and {best['curve']:.3f} s of CPU")
        table.add(f"evaluate: {name}, CPU time", "<=", 1.1, best["curve"] / best["plain"])


# -------------------------------------------------------------------------------------- on digits

MLP = {"num_classes": 10, "widths": [64, 64], "initializer": "he"}


def digits_networks(options, seeds):
    data = datasets.load("digits", validation=0)
    model = models.build("mlp", **MLP)
    source = batches.split(data.train, 128, key=jax.random.key(9), drop_remainder=True)
    epochs = 20 if options.quick else 100
    steps = epochs * len(source)

    def train(seed):
        params, _ = model.init(jax.random.key(seed), data.train.inputs[:1])
        optimizer = decayed(fit.warmup_cosine(0.05, steps), 5e-4)
        key = jax.random.key(seed)
        return fit.fit(
            objectives.loss(model.apply, {}), params, source, optimizer, steps, key=key
        ).params

    kept = options.out / f"digits-{epochs}-epochs"
    found = [stored(kept / f"network-{seed}", lambda s=seed: train(s)) for seed in seeds]
    return model, data, source, found, kept


def plane_part(table, options):
    heading("A plane of 21 x 21 positions, the digits MLP, training and test part")
    model, data, _, corners, _ = digits_networks(options, range(3))
    metrics_fn = objectives.metrics(model.apply, {})
    parts = [batches.split(part, 1000) for part in (data.train, data.test)]
    frame = surface.frame(corners)
    for part in parts:
        surface.plane(metrics_fn, frame, part, num=2, progress=False)
    start = time.perf_counter()
    for part in parts:
        surface.plane(metrics_fn, frame, part, num=21, progress=False)
    table.add("plane: seconds of the clock", "<=", 10, time.perf_counter() - start)


def digits_part(table, options):
    num_pairs = 1 if options.quick else 3
    heading(f"Digits, MLP 64-64-64-10, {num_pairs} pair(s) of networks: 61 positions")
    model, data, source, networks, kept = digits_networks(options, range(2 * num_pairs))
    loss_fn, metrics_fn = objectives.loss(model.apply, {}), objectives.metrics(model.apply, {})
    epochs = 40 if options.quick else 200
    steps = epochs * len(source)
    lines = {
        "segment": (curves.segment(), "segment's", ">=", 0.5),
        "chain": (curves.polychain(3), "chain's", "<=", 0.06),
        "Bezier": (curves.bezier(3), "Bezier curve's", "<=", 0.12),
    }
    rows, worst = [], {name: [] for name in lines}
    for i in range(num_pairs):
        ends = networks[2 * i : 2 * i + 2]
        for name, (basis, *_) in lines.items():

            def train(basis=basis, ends=ends, i=i):
                return curves.fit(
                    loss_fn, basis, curves.initialize(basis, *ends), source,
                    optax.sgd(fit.three_phase(0.03, steps), 0.9), steps, key=jax.random.key(i),
                    weight_decay=5e-4,
                ).control_points  # fmt: skip

            if name == "segment":
                points = tree.stack(ends)
            else:
                points = stored(kept / f"{name}-{i}-{epochs}-epochs", train)
            on_train, on_test = (
                curves.evaluate(metrics_fn, basis, points, part, 61, progress=False)
                for part in (data.train, data.test)
            )
            worst[name].append(on_train.metrics["loss"].highest)
            error = on_test.metrics["error"]
            rows.append(
                {
                    "pair": i, "path": name, "worst train NLL": worst[name][-1],
                    "mean": on_train.metrics["loss"].mean,
                    "test error %, ends": f"{100 * error.start:.2f} {100 * error.end:.2f}",
                    "worst": f"{100 * error.highest:.2f}", "mean error": f"{100 * error.mean:.2f}",
                    "length / chord": on_train.length / on_train.chord,
                }
            )  # fmt: skip
    print(report.text_table(rows))
    for name, (_, whose, sign, limit) in lines.items():
        value = min(worst[name]) if sign == ">=" else max(worst[name])
        table.add(f"digits: the {whose} worst train NLL, over the pairs", sign, limit, value)


# ----------------------------------------------------------------------- ensembles of one budget


class Setting:
    """A data set, a network and its rates of learning."""

    def __init__(self, name, train, test, *, widths, batch_size, epochs, single, fge, swa):
        self.name, self.test, self.epochs = name, test, epochs
        self.single, self.fge, self.swa = single, fge, swa
        self.model = models.build("mlp", num_classes=10, widths=widths, initializer="he")
        self.inputs, self.num_examples = train.inputs[:1], len(train.labels)
        self.source = batches.split(train, batch_size, key=jax.random.key(9), drop_remainder=True)
        self.loss_fn = objectives.loss(self.model.apply, {})

    def start(self, seed):
        return self.model.init(jax.random.key(seed), self.inputs)[0]

    def optimizer(self, rate):
        return decayed(rate, 5e-4)


def fge_settings(options, held_out=False):
    """The rates are those with the lowest NLL of a few.

    On digits three were tried for one network and about ten for FGE and SWA, on Fashion-MNIST two
    and three; Snapshot takes the rate of the one network. That was on examples that neither side
    here uses, which are the test part with `held_out`, and on other seeds.
    """
    digits = datasets.load("digits", validation=0)
    few, rest = (
        jax.tree.map(lambda x, at=at: x[at], digits.train) for at in (slice(300), slice(300, None))
    )
    yield Setting(
        "digits", few, rest if held_out else digits.test, widths=[64, 64], batch_size=50,
        epochs=20 if options.quick else 100, single=0.05, fge=(0.8, 0.001), swa=0.6,
    )  # fmt: skip
    try:
        data = datasets.load("fashion_mnist")
    except FileNotFoundError as error:
        print(f"Fashion-MNIST is left out: {str(error).splitlines()[0]}")
        return
    part = jax.tree.map(lambda x: x[:30_000], data.train)
    yield Setting(
        "fashion-mnist", part, data.validation if held_out else data.test, widths=[128, 128],
        batch_size=100, epochs=2 if options.quick else 10, single=0.05, fge=(0.05, 0.0005),
        swa=0.05,
    )  # fmt: skip


# Members of FGE and of Snapshot, networks of the deep ensemble, points in SWA's mean.
NUM_MEMBERS, NUM_NETWORKS, NUM_POINTS = 5, 3, 20
SINGLE, FGE, SNAPSHOT, SWA = "one network", "FGE", "Snapshot", "SWA"
THIRDS, WHOLES, FGE_RUNS = "3 networks of a third", "3 networks", "FGE, 3 runs"
# Those of one budget, then those of three.
METHODS = (SINGLE, FGE, SNAPSHOT, SWA, THIRDS, WHOLES, FGE_RUNS)


def collected(setting, seed):
    """All members of one seed, by method, with the gradients that each method takes."""
    whole = setting.epochs * len(setting.source)
    # FGE's members come after c/2, 3c/2, ... steps: 0.8 of the budget and 5 cycles fill it.
    begin = 4 * whole // 5
    cycle = 2 * ((whole - begin) // (2 * NUM_MEMBERS))
    common = {"progress": False}

    def single(seed, steps, at):
        schedule = fit.warmup_cosine(setting.single, steps)
        return curves.collect(
            setting.loss_fn, setting.start(seed), setting.source, setting.optimizer(schedule), at,
            key=jax.random.key(seed), **common,
        ).members  # fmt: skip

    def geometric(params, seed):
        high, low = setting.fge
        return curves.fge(
            setting.loss_fn, params, setting.source, setting.optimizer, high=high, low=low,
            cycle_steps=cycle, num_members=NUM_MEMBERS, key=jax.random.key(seed + 1), **common,
        ).members  # fmt: skip

    seeds = [1000 * seed + i for i in range(NUM_NETWORKS)]
    runs = [single(s, whole, [begin, whole]) for s in seeds]
    starts, ends = ([tree.unstack(run)[i] for run in runs] for i in (0, 1))
    cycles = [tree.unstack(geometric(p, s)) for p, s in zip(starts, seeds, strict=True)]
    fge_steps = begin + cycle // 2 + (NUM_MEMBERS - 1) * cycle
    short = whole // NUM_NETWORKS
    snapshots = curves.snapshots(
        setting.loss_fn, setting.start(seeds[0]), setting.source, setting.optimizer,
        high=setting.single, cycle_steps=whole // NUM_MEMBERS, num_members=NUM_MEMBERS,
        key=jax.random.key(seeds[0]), **common,
    )  # fmt: skip
    # A constant rate, and the mean of the weights along it.
    apart_by = max(1, (whole - begin) // NUM_POINTS)
    late = curves.collect(
        setting.loss_fn, starts[0], setting.source, setting.optimizer(setting.swa),
        range(apart_by, 1 + whole - begin, apart_by),
        key=jax.random.key(seeds[0] + 1), **common,
    )  # fmt: skip
    return {
        SINGLE: (whole, [ends[0]]),
        FGE: (fge_steps, cycles[0]),
        SNAPSHOT: (
            NUM_MEMBERS * (whole // NUM_MEMBERS), tree.unstack(snapshots.members),
        ),
        SWA: (begin + int(late.steps[-1]), [curves.swa(late.members)]),
        THIRDS: (
            NUM_NETWORKS * short, [tree.unstack(single(s, short, [short]))[0] for s in seeds],
        ),
        WHOLES: (NUM_NETWORKS * whole, ends),
        FGE_RUNS: (NUM_NETWORKS * fge_steps, sum(cycles, [])),
    }  # fmt: skip


def apart(points):
    """The mean distance of consecutive members, in weight space."""
    members = tree.unstack(points)
    return np.mean(
        [
            float(tree.norm(tree.axpy(-1.0, a, b)))
            for a, b in zip(members, members[1:], strict=False)
        ]
    )


def compare(setting, seeds, kept):
    """Rows for the table; the mean NLL, error and ECE of each method; its gradients."""
    model_fn = objectives.outputs(setting.model.apply, {})
    data = batches.split(setting.test, 1000)
    found, distances = ({name: [] for name in METHODS} for _ in range(2))
    budgets = {}
    for seed in seeds:

        def make(seed=seed):
            return {
                name: {"budget": np.asarray(budget), "members": tree.stack(members)}
                for name, (budget, members) in collected(setting, seed).items()
            }

        given = stored(kept / f"seed-{seed}", make)
        for name in METHODS:
            budgets[name] = int(given[name]["budget"])
            members = given[name]["members"]
            probs = ensemble.predict(model_fn, members, data, progress=False)
            scores = ensemble.calibration(probs, setting.test.labels)
            found[name].append((scores.nll.value, 1 - scores.accuracy.value, scores.ece.value))
            if name in (FGE, SNAPSHOT, THIRDS, WHOLES):
                distances[name].append(apart(members))
    scored = {name: np.array(values) for name, values in found.items()}
    rows = []
    for name, values in scored.items():
        less = values - scored[SINGLE]
        rows.append(
            {
                "method": name,
                "gradients": budgets[name],
                "NLL": spread(values[:, 0], 4),
                "error %": spread(values[:, 1], 2, 100),
                "ECE %": spread(values[:, 2], 2, 100),
                "NLL - one's": "" if name == SINGLE else spread(less[:, 0], 4),
                "error % - one's": "" if name == SINGLE else spread(less[:, 1], 2, 100),
                "lower NLL": ""
                if name == SINGLE
                else f"{int((less[:, 0] < 0).sum())} of {len(values)}",
                "apart": f"{np.mean(distances[name]):.3g}" if distances[name] else "",
            }
        )
    return rows, {name: values.mean(0) for name, values in scored.items()}, budgets


def fge_part(table, options):
    del table
    seeds = range(2 if options.quick else 5)
    for setting in fge_settings(options):
        heading(
            f"{setting.name}, {setting.num_examples} examples, {setting.epochs} epochs, "
            f"{len(seeds)} seeds: mean ± half the width of a 95 % t-interval; gradients "
            f"of batches of {setting.source.batch_size}; how far apart members are"
        )
        kept = options.out / f"fge-{setting.name}-{setting.num_examples}-{setting.epochs}"
        rows, means, budgets = compare(setting, seeds, kept)
        print(report.text_table(rows))
        once = [x for x in means if budgets[x] <= budgets[SINGLE]]
        for i, metric in enumerate(("NLL", "error", "ECE")):
            order = sorted(once, key=lambda x: means[x][i])
            print(f"  lowest {metric} at one budget: {order[0]}, then {order[1]}", flush=True)


# ---------------------------------------------------------------------- the original's own table


def cnn_part(table, options):
    del table
    try:
        data = datasets.load("fashion_mnist")
    except FileNotFoundError as error:
        print(f"cnn: left out: {str(error).splitlines()[0]}")
        return
    number, epochs, num_eval = (1000, 2, 5) if options.quick else (5000, 20, 21)
    train, test = (
        jax.tree.map(lambda x, n=n: x[:n], part)
        for part, n in ((data.train, number), (data.test, 2 * number))
    )
    heading(f"A CNN with BatchNorm, Fashion-MNIST, {number} examples, {num_eval} positions")
    model = models.build("cnn", num_classes=10, widths=[8, 16, 32])
    _, state = model.init(jax.random.key(0), train.inputs[:1])
    loss_fn = objectives.loss(model.apply, state)
    source = batches.split(train, 100, key=jax.random.key(9))
    parts = [batches.split(part, 1000) for part in (train, test)]
    kept = options.out / f"cnn-{number}-{epochs}"
    decay = 5e-4

    def network(seed):
        params, _ = model.init(jax.random.key(seed), train.inputs[:1])
        steps = epochs * len(source)
        optimizer = decayed(fit.three_phase(0.1, steps), decay)
        return fit.fit(loss_fn, params, source, optimizer, steps, key=jax.random.key(seed)).params

    ends = [stored(kept / f"network-{seed}", lambda s=seed: network(s)) for seed in (0, 1)]
    with_state = objectives.metrics_with_state(model.apply)

    def metrics_fn(params, state, batch):
        found = with_state(params, state, batch)
        return found | {"penalized": found["loss"] + 0.5 * decay * tree.vdot(params, params)}

    rows = []
    for name in ("segment", "bezier", "polychain"):
        if name == "segment":
            basis, points = curves.segment(), tree.stack(ends)
        else:
            basis = getattr(curves, name)(3)

            def curve(basis=basis):
                steps = 2 * epochs * len(source)
                return curves.fit(
                    loss_fn, basis, curves.initialize(basis, *ends), source,
                    optax.sgd(fit.three_phase(0.03, steps), 0.9), steps, key=jax.random.key(2),
                    weight_decay=decay,
                ).control_points  # fmt: skip

            points = stored(kept / name, curve)
        # Both parts with the statistics of the position, which are measured once.
        states = []

        def fresh(params, states=states):
            states.append(statistics.refresh(model.apply, params, state, parts[0]))
            return states[-1]

        on_train = curves.evaluate(metrics_fn, basis, points, parts[0], num_eval, state_fn=fresh)
        again = iter(states)
        on_test = curves.evaluate(
            metrics_fn, basis, points, parts[1], num_eval, state_fn=lambda _, it=again: next(it)
        )
        loss, error = on_train.metrics["penalized"], on_test.metrics["error"]
        if name == "segment":
            rows.append(_row("ends", loss.start, loss.end, error.start, error.end, ""))
        rows.append(
            _row(name, loss.lowest, loss.highest, error.lowest, error.highest,
                 f"{on_train.length / on_train.chord:.3f}")
        )  # fmt: skip
    print("Lowest / highest along the path; of the ends, both. The loss is with decay.")
    print(report.text_table(rows), flush=True)


def _row(name, *given):
    return {
        "path": name,
        "train loss": f"{given[0]:.3f} / {given[1]:.3f}",
        "test error %": f"{100 * given[2]:.2f} / {100 * given[3]:.2f}",
        "length / chord": given[4],
    }


PARTS = {"step": step_part, "evaluate": evaluate_part, "plane": plane_part, "digits": digits_part,
         "fge": fge_part, "cnn": cnn_part}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less of it, under the same limits")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--out", type=pathlib.Path, help="where trained networks are kept",
                        default=pathlib.Path("out/benchmarks/curves"))  # fmt: skip
    options = parser.parse_args()
    chosen = options.only.split(",")
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        parser.error(f"--only has {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}, "
          f"{os.cpu_count()} cores")  # fmt: skip
    table = Table()
    for name in chosen:
        PARTS[name](table, options)
    heading("all of it")
    raise SystemExit(0 if table.show() else 1)


if __name__ == "__main__":
    main()
