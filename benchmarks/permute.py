"""Claims: alignment of networks ten times as fast as Git Re-Basin's code, and at lower barriers.

Each problem is two networks of random weights, biases and norm scales: planted (one is the other,
permuted) or independent. Cold times are the first call in a fresh process, after the imports of
jax, NumPy, SciPy and geojax.permute (whose time is told apart), JAX's backend not yet started and
its compilation cache on disk off. Warm times are the least of five further calls. No time is told
without its objective. One table at the end says what was claimed, what was measured, and whether it
holds; the exit code is 1 where something is missed.

  python benchmarks/permute.py                 # everything; half an hour and more
  python benchmarks/permute.py --quick         # the same kinds of numbers, smaller
  python benchmarks/permute.py --only W1,W2,lap,restarts,many,derive,digits,mnist

"Original" is the code of Git Re-Basin (with two imports repaired, float32, on the CPU), as it was
measured once on a machine of two cores; it is not run here. Neither is `rebasin` from PyPI, which
needs torch and graphviz. MNIST and Fashion-MNIST are read below GEOJAX_DATA_DIR, and left out
without it; trained networks are kept below --out, so that a second run trains nothing. Limits
are on seconds of the clock; a machine with other work to do misses some that it meets alone, and
the CPU seconds (of all threads) are told beside them.
"""

import time

_BEGIN = time.perf_counter()

import os  # noqa: E402

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}

import argparse  # noqa: E402
import contextlib  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import pathlib  # noqa: E402
import resource  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from scipy.optimize import linear_sum_assignment  # noqa: E402

from geojax import permute  # noqa: E402

IMPORTS = time.perf_counter() - _BEGIN

from geojax import assignment, report  # noqa: E402
from geojax.symmetry import PermutationSpec, check, permutation_spec  # noqa: E402
from geojax.symmetry.spec import blocks, factors, short  # noqa: E402

CD, PROGRESSIVE, FW, BEST = "coordinate_descent", "progressive", "frank_wolfe", "best"
IMAGE = (1, 32, 32, 3)
# What a process may take before it is stopped, and told as such.
PATIENCE = 180


# --------------------------------------------------------------------------------- the two tables


class Table:
    """Claims with what was measured. The figure that is printed is the one that is judged."""

    def __init__(self):
        self.rows = []

    def _add(self, claim, target, value, holds, beside=""):
        verdict = "" if holds is None else "met" if holds else "MISSED"
        text = "   ".join(x for x in (_figure(value), beside) if x)
        self.rows.append((claim, target, text, verdict))
        print("  " + "   ".join(x for x in (f"{claim}: {text}", target, verdict) if x), flush=True)

    def tell(self, claim, value, beside=""):
        """What is not claimed."""
        self._add(claim, "", value, None, beside)

    def at_most(self, claim, value, limit, beside=""):
        self._add(claim, f"<= {limit:g}", value, float(_figure(value)) <= limit, beside)

    def at_least(self, claim, value, limit, beside=""):
        holds = float(_figure(value)) >= float(_figure(limit))
        self._add(claim, f">= {_figure(limit)}", value, holds, beside)

    def true(self, claim, holds, beside=""):
        self._add(claim, "yes", "yes" if holds else "no", bool(holds), beside)

    def show(self):
        names = ("claim", "target", "measured", "verdict")
        print(report.text_table([dict(zip(names, row, strict=True)) for row in self.rows]))
        missed = [row[0] for row in self.rows if row[3] == "MISSED"]
        print("".join(f"\n{line}" for line in (f"{len(missed)} missed", *missed)))
        return not missed


def _figure(value):
    return str(value) if isinstance(value, (int, str)) else f"{value:.4g}"


def heading(text):
    print(f"\n[{time.perf_counter() - _BEGIN:.0f} s] {text}", flush=True)


def resident(which="VmRSS"):
    """Bytes in memory, now or at most; getrusage tells a peak that Linux lets processes inherit."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return 1024 * int(lines[which].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def seconds(fn):
    start = time.perf_counter()
    out = fn()
    return time.perf_counter() - start, out


def fewest(runs, rounds):
    """The least seconds of each run, interleaved."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            best[name] = min(best[name], seconds(run)[0])
    return best


# ----------------------------------------------------------------------------------- the problems


def network(name, inputs, **options):
    """A function of parameters, their shapes, and the inputs' shape; inputs of two axes are tokens.

    No parameters are made.
    """
    from geojax import models

    model = models.build(name, **options)
    x = jax.ShapeDtypeStruct(inputs, np.int32 if len(inputs) == 2 else np.float32)
    params, state = jax.eval_shape(model.init, jax.random.key(0), x)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)

    def apply_fn(params, x):  # in training, batch norms read no running statistics
        return model.apply(params, state, x, bool(jax.tree.leaves(state)), jax.random.key(0))[0]

    return apply_fn, params, x


def filled(shapes, seed):
    """Weights scaled by their fan-in; random biases and norm scales."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = short(jax.tree_util.keystr(path))
        x = rng.standard_normal(leaf.shape, np.float32)
        if name.endswith("scale"):
            return np.exp(np.float32(0.3) * x)
        if name in ("embedding", "positions") or len(leaf.shape) < 2:
            return x * np.float32(0.1)
        return x / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))

    return jax.tree_util.tree_map_with_path(fill, shapes)


def nested(spec):
    """The shapes of a spec's leaves, in nested dictionaries."""
    out = {}
    for leaf in spec.leaves:
        *above, name = short(leaf.path).split("/")
        inside = out
        for part in above:
            inside = inside.setdefault(part, {})
        inside[name] = jax.ShapeDtypeStruct(leaf.shape, np.float32)
    return out


def random_permutation(spec, seed):
    rng = np.random.default_rng(seed)
    return {
        g.name: rng.permuted(np.broadcast_to(np.arange(g.size), g.shape), axis=-1)
        for g in spec.groups
    }


def permuted(spec, permutation, params):
    """What `apply_permutation` does, in NumPy, so that JAX is not started."""

    def move(path, value):
        leaf = spec.by_path[jax.tree_util.keystr(path)]
        ((dims, out),) = blocks(leaf, value)
        names = [factor.name for factor in dims]
        moving = [i for i, name in enumerate(names) if name in permutation]
        for i in sorted(moving, key=lambda i: len(spec[names[i]].index)):
            order = np.asarray(permutation[names[i]])
            where = [names.index(name) for name in spec[names[i]].index] + [i]
            if len(where) == 1:
                out = out.take(order, i)
                continue
            shape = [order.shape[where.index(x)] if x in where else 1 for x in range(out.ndim)]
            order = order.transpose(np.argsort(where)).reshape(shape)
            out = np.take_along_axis(out, order, i)
        return out.reshape(value.shape)

    return jax.tree_util.tree_map_with_path(move, params)


def match_child(spec, mode, runs, warm, profile, seed=0):
    """Match a pair by each of `runs`, in order; only the first is the process's first call."""
    spec = PermutationSpec.from_json(pathlib.Path(spec).read_text())
    a = filled(nested(spec), seed)
    if mode == "planted":
        b = permuted(spec, random_permutation(spec, seed + 1), a)
    else:
        b = filled(nested(spec), seed + 1)
    size = sum(x.nbytes for x in jax.tree.leaves(a))
    out = {"imports": IMPORTS, "bytes": size, "runs": {}}
    for label, options in runs.items():

        def solve(options=options):
            return permute.weight_matching(
                spec, a, b, key=jax.random.key(0), progress=False, **options
            )

        cpu = time.process_time()
        cold, found = seconds(solve)
        cpu = time.process_time() - cpu
        moved = permuted(spec, found.permutation, b)
        equal = jax.tree.map(np.array_equal, moved, a)
        out["runs"][label] = {
            "cold": cold,
            "cold cpu": cpu,
            "warm": min([seconds(solve)[0] for _ in range(warm if cold < 20 else 0)], default=None),
            "objective": found.objective / found.bound,
            "sweeps": found.num_sweeps,
            "solves": found.num_solves,
            "method": found.method,
            "converged": found.converged,
            "exact": all(jax.tree.leaves(equal)),
        }
        if profile:
            out["runs"][label]["where"] = where_time_goes(solve)
    out["peak"] = resident("VmHWM")
    return out


def where_time_goes(run):
    """The seconds of one more call in assignments, products, gathers and inner products."""
    from geojax.permute import _problem, matching

    spent = {}

    @contextlib.contextmanager
    def watched(owner, name, label):
        original = getattr(owner, name)

        def timed(*args, **options):
            start = time.perf_counter()
            try:
                return original(*args, **options)
            finally:
                entry = spent.setdefault(label, [0, 0.0])
                entry[0] += 1
                entry[1] += time.perf_counter() - start

        setattr(owner, name, timed)
        yield
        setattr(owner, name, original)

    with contextlib.ExitStack() as stack:
        for owner, name, label in (
            (assignment, "solve", "assignments"),
            (_problem, "products", "products"),
            (_problem.Problem, "moved", "gathers"),
            (_problem, "inner", "inner products"),
            (matching, "inner", "inner products"),
            (matching, "make_problem", "blocks"),
            (matching, "_pairs", "copies and checks"),
        ):
            stack.enter_context(watched(owner, name, label))
        spent["all"] = [1, seconds(run)[0]]
    return spent


def child(what, timeout=None, **arguments):
    """Run one of this file's functions in a fresh process; None if it takes too long."""
    request = json.dumps({"what": what, **arguments})
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--child", request],
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout,
            check=True,
        )
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------- 1. weight matching


ORIGINAL = {
    "W1 planted": "4-7 s cold, 0.45 s warm",
    "W2 independent": "4-6 s cold, 2.0 s warm",
    "W3 planted": "9-12 s cold, 0.3 s warm",
    "W3 independent": "15-24 s cold, 0.4-0.8 s warm",
    "W4 planted": "12-22 s cold, 1.1-2 s warm",
    "W4 independent": "20-29 s cold, 4-7.5 s warm",
    "W5 planted": "60 s cold, 53 s warm",
    "W6 planted": "23-25 s cold, 8-11 s warm",
    "W6 independent": "not completed; 89 s in plain NumPy",
    "W7 planted": "53 s cold, 15 s warm",
    "W8 planted": "not possible",
}


class Matching:
    """Weight matching on one kind of network."""

    def __init__(self, table, options, folder, case, name, inputs, **model):
        self.table, self.options, self.case = table, options, case
        apply_fn, params, x = network(name, inputs, **model)
        spent, spec = seconds(lambda: permutation_spec(apply_fn, params, x))
        self.size = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
        self.file = pathlib.Path(folder) / f"{case}.json"
        self.file.write_text(spec.to_json())
        heading(
            f"{case}: {name} {model or ''}, {self.size / 1e6:.2f} M parameters, "
            f"{len(spec.groups)} groups, derived in {spent:.2f} s"
        )

    def __call__(self, mode, runs, warm=5, timeout=None):
        """Each run in a process of its own (with --quick all in one), and what it said."""
        claim = f"{self.case} {mode}"
        print(f"  original, as measured elsewhere: {ORIGINAL.get(claim, 'not measured')}")
        runs = {label: {"method": label} if run is None else run for label, run in runs.items()}
        found = {}
        parts = [runs] if self.options.quick else [{label: run} for label, run in runs.items()]
        for part in parts:
            got = child(
                "match_child", timeout=timeout, spec=str(self.file), mode=mode, runs=part,
                warm=min(warm, 1) if self.options.quick else warm, profile=self.options.profile,
            )  # fmt: skip
            if got is None:
                self.table.tell(f"{claim}, {', '.join(part)}", f"stopped after {timeout} s")
                continue
            for label, run in got["runs"].items():
                found[label] = run | {"imports": got["imports"], "peak": got["peak"]}
                line = {k: v for k, v in run.items() if k != "where"}
                print(f"  {mode}, {label}: " + ", ".join(f"{k} {_figure(v)}" if v is not None
                      else f"{k} -" for k, v in line.items()), flush=True)  # fmt: skip
                for part_of, (count, spent) in run.get("where", {}).items():
                    print(f"      {part_of:18} {count:7} calls {spent:8.3f} s")
            print(f"  imports {got['imports']:.2f} s, peak {got['peak'] / 2**20:.0f} MiB resident, "
                  f"of which two networks {2 * got['bytes'] / 2**20:.0f}")  # fmt: skip
        return found

    def apart(self, mode):
        """Coordinate descent, and the default for as long as patience lasts."""
        if self.options.quick:
            return self(mode, {CD: None, BEST: None})
        return self(mode, {CD: None}, warm=1) | self(mode, {BEST: None}, warm=0, timeout=PATIENCE)

    def time(self, mode, label, run, cold=None, warm=None):
        """Judge a run's times."""
        if run is None:
            return
        beside = f"s   objective {run['objective']:.4f} of the bound"
        if run["method"] not in label:
            beside += f" by {run['method']}"
        beside += f"; CPU {run['cold cpu']:.2f} s"
        for name, limit in (("cold", cold), ("warm", warm)):
            claim = f"{self.case} {mode}, {label}, {name}"
            if name == "warm":
                beside = beside.partition("; CPU")[0]
            if run[name] is not None and limit is not None:
                self.table.at_most(claim, run[name], limit, beside)
            elif run[name] is not None:
                self.table.tell(claim, run[name], beside)

    def exact(self, mode, label, run):
        if run is not None:
            self.table.true(f"{self.case} {mode}, {label}: recovered exactly", run["exact"])

    def no_worse(self, mode, label, run, other_label, other):
        if run is not None and other is not None:
            claim = f"{self.case} {mode}: objective of {label} over that of {other_label}"
            self.table.at_least(claim, run["objective"] / other["objective"], 1.0)

    def peak(self, mode, found):
        for label, run in found.items():
            networks = 8 * self.size / 2**20
            self.table.tell(
                f"{self.case} {mode}, {label}: peak resident", f"{run['peak'] / 2**20:.0f} MiB",
                f"two networks are {networks:.0f}",
            )  # fmt: skip


def matching_w1(table, options, folder):
    case = Matching(table, options, folder, "W1", "mlp", (1, 28, 28, 1))
    got = case("planted", {CD: None, PROGRESSIVE: None, FW: None, BEST: None})
    for label, cold, warm in ((CD, 0.5, 0.15), (PROGRESSIVE, 1, None), (FW, 7, None)):
        case.time("planted", label, got.get(label), cold, warm)
        case.exact("planted", label, got.get(label))
    case.time("planted", BEST, got.get(BEST))


def matching_w2(table, options, folder):
    widths = [128 if options.quick else 512] * 3
    case = Matching(table, options, folder, "W2", "mlp", (1, 28, 28, 1), widths=widths)
    ten = "best of 10 " + CD
    runs = {CD: None, BEST: None, ten: {"method": CD, "num_restarts": 10}, PROGRESSIVE: None}
    got = case("independent", runs, warm=5)
    case.time("independent", CD, got.get(CD), 1.5, 1)
    for label in (PROGRESSIVE, BEST, ten):
        case.time("independent", label, got.get(label))
    case.no_worse("independent", BEST, got.get(BEST), ten, got.get(ten))


def residual(table, options, folder, case, width, limits, warm, default):
    case = Matching(table, options, folder, case, "resnet20", IMAGE, width_multiplier=float(width))
    for mode, limit in limits.items():
        got = case(mode, {CD: None, BEST: None}, warm=warm, timeout=None)
        case.time(mode, CD, got.get(CD), limit, 0.2 if case.case == "W3" else None)
        case.time(mode, BEST, got.get(BEST), default)
        if mode == "planted":
            case.exact(mode, CD, got.get(CD))
            case.exact(mode, BEST, got.get(BEST))
        else:
            case.no_worse(mode, BEST, got.get(BEST), CD, got.get(CD))
        if case.case == "W5":
            case.peak(mode, got)


def matching_w3(table, options, folder):
    residual(table, options, folder, "W3", 1, {"planted": 1, "independent": 1}, 5, 3)


def matching_w4(table, options, folder):
    width = 1.5 if options.quick else 4
    residual(table, options, folder, "W4", width, {"planted": 2, "independent": 4}, 5, None)


def matching_w5(table, options, folder):
    width = 2 if options.quick else 16
    residual(table, options, folder, "W5", width, {"planted": 25}, 1, None)


def matching_w6(table, options, folder):
    width = 0.125 if options.quick else 1.0
    case = Matching(
        table, options, folder, "W6", "vgg16", IMAGE, norm="layer", width_multiplier=width
    )
    for mode, limit in (("planted", 5), ("independent", 45)):
        got = case.apart(mode)
        case.time(mode, CD, got.get(CD), limit)
        case.time(mode, BEST, got.get(BEST))
        if mode == "planted":
            case.exact(mode, CD, got.get(CD))
            case.exact(mode, BEST, got.get(BEST))
        else:
            case.no_worse(mode, BEST, got.get(BEST), CD, got.get(CD))


def matching_w7(table, options, folder):
    width = 0.25 if options.quick else 1.0
    case = Matching(
        table, options, folder, "W7", "resnet50", (1, 64, 64, 3), width_multiplier=width
    )
    got = case.apart("planted")
    case.time("planted", CD, got.get(CD), 15, 10)
    case.time("planted", BEST, got.get(BEST))
    for label, run in got.items():
        case.exact("planted", label, run)
    case.peak("planted", got)


def matching_w8(table, options, folder):
    sizes = {"vocab_size": 8192, "max_length": 256, "width": 768, "num_layers": 12,
             "num_heads": 12, "mlp_width": 3072}  # fmt: skip
    if options.quick:
        sizes |= {"vocab_size": 512, "width": 96, "num_layers": 2, "num_heads": 4, "mlp_width": 384}
    case = Matching(table, options, folder, "W8", "gpt", (1, 8), **sizes)
    got = case("planted", {CD: None}, warm=0) | case("planted", {BEST: None}, warm=0, timeout=600)
    for label, run in got.items():
        case.time("planted", label, run, 120)
        case.exact("planted", label, run)
    case.peak("planted", got)


# ------------------------------------------------------------------------- 2. assignment, restarts


def scores_of(kind, n, rng):
    width = min(n, 512)
    a, noise = rng.standard_normal((2, n, width))
    if kind == "integer ties":
        return rng.integers(0, 10, (n, n)).astype(np.float64)
    share = {"planted": 1.0, "noisy": 0.5, "independent": 0.0}[kind]
    b = share * a + np.sqrt(1 - share**2) * noise
    return a @ b[rng.permutation(n)].T


def lap(table, options, folder):
    """One problem and batches of them, against SciPy's solver and optax's."""
    import optax

    heading("assignment: the least seconds of each solver")
    del folder
    rng = np.random.default_rng(0)
    in_jit = jax.jit(lambda x: assignment.solve(x).columns)
    hungarian = jax.jit(lambda x: optax.assignment.hungarian_algorithm(-x))
    rows, worst = [], ("", 0.0)
    kinds = ("planted", "noisy", "independent", "integer ties")
    for n, kind in itertools.product((64, 256, 512) if options.quick else
                                     (64, 128, 256, 512, 1024, 2048, 4096), kinds):  # fmt: skip
        matrix = scores_of(kind, n, rng)
        single = matrix.astype(np.float32)
        runs = {
            "SciPy": lambda x=matrix: linear_sum_assignment(x, maximize=True),
            "solve": lambda x=matrix: assignment.solve(x),
            "solve in jit": lambda x=single: jax.block_until_ready(in_jit(x)),
        }
        if n <= 1024:
            runs["optax in jit"] = lambda x=single: jax.block_until_ready(hungarian(x))
        expected = matrix[runs["SciPy"]()].sum()
        value = float(runs["solve"]().value)
        if abs(value - expected) > 1e-12 * n * np.abs(matrix).max():
            table.true(f"assignment n={n}, {kind}: SciPy's value", holds=False)
        for run in runs.values():
            run()
        best = fewest(runs, 9 if n <= 256 else 3 if n <= 1024 else 1)
        rows.append({"n": n, "scores": kind} | {
            name: f"{1e3 * best[name]:.2f} ms" if name in best else "-"
            for name in ("SciPy", "solve", "solve in jit", "optax in jit")
        })  # fmt: skip
        ratio = best["solve"] / best["SciPy"]
        worst = max(worst, (f"n={n}, {kind}", ratio), key=lambda x: x[1])
    print(report.text_table(rows))
    table.at_most(f"assignment: solve over SciPy, worst cell ({worst[0]})", worst[1], 1.2)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for count, n in ((8, 256), (64, 64)) if options.quick else ((8, 256), (8, 512), (64, 64),
                                                                (144, 64), (512, 64)):  # fmt: skip
        stack = np.stack([scores_of("independent", n, rng) for _ in range(count)])
        single = stack.astype(np.float32)
        runs = {
            "SciPy": lambda: [linear_sum_assignment(x, maximize=True) for x in stack],  # noqa: B023
            "solve": lambda: assignment.solve(stack),  # noqa: B023
            "solve in jit": lambda: jax.block_until_ready(in_jit(single)),  # noqa: B023
        }
        for run in runs.values():
            run()
        best = fewest(runs, 5)
        claim = f"assignment, {count} of {n}: "
        beside = f"{1e3 * best['SciPy']:.1f} ms in a loop of SciPy"
        table.at_most(
            claim + "solve over a loop of SciPy", best["solve"] / best["SciPy"], 1.3, beside
        )
        if cores and cores > 1 and n > 64:
            ratio = best["SciPy"] / best["solve"]
            table.at_least(claim + f"times as fast on {cores} cores", ratio, 1.5)
        limit = best["solve in jit"] / best["SciPy"]
        table.at_most(claim + "in jit over a loop of SciPy", limit, 1.5)
    for n in (512,) if options.quick else (512, 1024):
        warm, cold, equal = sequence(n, 12, 0.005, rng)
        table.tell(f"assignment n={n}, 0.5 % of rows change: resolve over solve", warm / cold,
                   f"equal values: {equal}")  # fmt: skip


def sequence(n, length, share, rng):
    """A sequence of similar problems, with the last one's prices and without."""
    matrix = rng.standard_normal((n, n))
    _, state = assignment.resolve(matrix, assignment.start(n))
    warm = cold = 0.0
    equal = True
    for _ in range(length):
        matrix = matrix.copy()
        rows = rng.integers(0, n, max(1, int(share * n)))
        matrix[rows] = rng.standard_normal((len(rows), n))
        spent, (found, state) = seconds(lambda: assignment.resolve(matrix, state))  # noqa: B023
        warm += spent
        spent, other = seconds(lambda: assignment.solve(matrix))  # noqa: B023
        cold += spent
        equal &= bool(abs(found.value - other.value) <= 1e-9 * abs(other.value))
    return warm, cold, equal


def restarts(table, options, folder):
    """Many runs of coordinate descent from one call, against as many calls."""
    del folder
    cases = {"MLP-512": ("mlp", (1, 28, 28, 1), 2.0), "ResNet20": ("resnet20", IMAGE, 0.4)}
    for label, (name, inputs, original) in cases.items():
        heading(f"restarts: {label}, independent; original {original} s a run, measured elsewhere")
        apply_fn, shapes, x = network(name, inputs)
        spec = permutation_spec(apply_fn, shapes, x)
        a, b = filled(shapes, 0), filled(shapes, 1)
        options_of = {"method": CD, "progress": False}
        for k in (1, 4) if options.quick else (1, 4, 16, 64):
            key = jax.random.key(k)
            together, found = seconds(
                lambda: permute.weight_matching(spec, a, b, key=key, num_restarts=k, **options_of)  # noqa: B023
            )
            keys = [key] if k == 1 else jax.random.split(key, k)
            loop, single = seconds(
                lambda: [permute.weight_matching(spec, a, b, key=x, **options_of) for x in keys]  # noqa: B023
            )
            best = max(x.objective for x in single)
            beside = f"s   best objective {found.objective / found.bound:.4f} of the bound"
            claim = f"restarts {label}, {k} of them: "
            table.tell(claim + "seconds each", together / k, beside)
            table.tell(claim + "a loop of calls over one call", loop / together)
            table.true(claim + "the same best objective as the loop", best == found.objective)
            if k == 16 and label == "ResNet20":
                table.at_least(claim + "times as fast as the original", original * k / together, 2)


# ------------------------------------------------------------------------------- 3. many networks


def many(table, options, folder):
    """Several networks in one frame: time and objective over their number."""
    del folder
    width = 128 if options.quick else 512
    apply_fn, shapes, x = network("mlp", (1, 28, 28, 1), widths=[width] * 3)
    spec = permutation_spec(apply_fn, shapes, x)
    heading(f"many networks: MLP-{width}, half of each weight shared, permuted")
    common = filled(shapes, 100)
    steps = {}
    for num in (2, 3, 5, 10) if options.quick else (2, 3, 5, 10, 32):
        networks = []
        for i in range(num):
            own = filled(shapes, i)
            mixed = jax.tree.map(lambda x, y: np.sqrt(np.float32(0.5)) * (x + y), common, own)
            networks.append(permuted(spec, random_permutation(spec, 200 + i), mixed))
        ticks = []

        def watch(step):
            if step.method == "universe":
                ticks.append(time.perf_counter())  # noqa: B023

        runs = {
            "merge_many": lambda: permute.merge_many(
                spec, networks, key=jax.random.key(0), progress=False  # noqa: B023
            ),
            "star": lambda: permute.cycle_consistent_matching(
                spec, networks, key=jax.random.key(0), reference=0, method=PROGRESSIVE,  # noqa: B023
                refine=False, progress=False,
            ),
            "star and Frank-Wolfe": lambda: permute.cycle_consistent_matching(
                spec, networks, key=jax.random.key(0), reference=0, method=PROGRESSIVE,  # noqa: B023
                max_steps=6, callback=watch, progress=False,  # noqa: B023
            ),
        }  # fmt: skip
        for label, run in runs.items():
            spent, found = seconds(run)
            table.tell(
                f"many, {num} networks: {label}", spent,
                f"s   objective {found.objective / found.bound:.4f} of the bound",
            )  # fmt: skip
        if len(ticks) > 1:
            steps[num] = float(np.median(np.diff(ticks)))
            print(f"  one Frank-Wolfe step on {num} networks: {steps[num]:.3f} s")
    counts, spent = np.array(list(steps)), np.array(list(steps.values()))
    if len(counts) > 2:
        line = np.polyfit(counts, spent, 1)
        rest = spent - np.polyval(line, counts)
        r2 = 1 - float((rest**2).sum() / ((spent - spent.mean()) ** 2).sum())
        table.at_least("many: R^2 of a step's time as linear in the number", r2, 0.98)
    if {2, 10} <= steps.keys():
        # One of two networks moves, and nine of ten.
        table.tell("many: a step on 10 networks over one on 2", steps[10] / steps[2])


# --------------------------------------------------------------------------------- 4. derivation


def derive_child(name, inputs, model, rounds):
    apply_fn, params, x = network(name, inputs, **model)
    before = resident()
    cold, spec = seconds(lambda: permutation_spec(apply_fn, params, x))
    grown = resident("VmHWM") - before
    warm = []
    for _ in range(rounds):  # a function that JAX has not traced yet
        new = lambda params, x: apply_fn(params, x)  # noqa: E731
        warm.append(seconds(lambda: permutation_spec(new, params, x))[0])  # noqa: B023
    axes = [layout for leaf in spec.leaves for layout in leaf.axes]
    fixed = [f.size > 1 for layout in axes for f in factors(layout) if not f.name]
    return {
        "cold": cold,
        "median": statistics.median(warm),
        "mebibytes": grown / 2**20,
        "groups": len(spec.groups),
        "axes": len(axes),
        "fixed": sum(fixed),
        "notes": len(spec.notes),
        "parameters": sum(int(np.prod(leaf.shape)) for leaf in spec.leaves),
    }


def derive(table, options, folder):
    """Specs read off jaxprs of shapes, and the proof in numbers."""
    del folder
    gpt, vit = ("gpt2_small", (1, 16), {}), ("vit_b16", (1, 224, 224, 3), {})
    cases = {
        "MLP": (("mlp", (1, 28, 28, 1), {}), 0.3),
        "ResNet20": (("resnet20", IMAGE, {}), 0.3),
        "VGG16": (("vgg16", IMAGE, {"norm": "layer"}), 0.3),
        "ResNet50": (("resnet50", (1, 224, 224, 3), {}), 0.3),
        "ViT-B/16": (vit, 3),
        "GPT-2 small": (gpt, 3),
        "TinyLlama, 1.1 G": (("tinyllama", (1, 16), {}), 2),
    }
    if options.quick:
        cases = {name: cases[name] for name in ("MLP", "ResNet20", "GPT-2 small")}
    heading("derivation from shapes; median seconds")
    rounds = 3 if options.quick else 20
    for label, ((name, inputs, model), limit) in cases.items():
        got = child("derive_child", name=name, inputs=inputs, model=model, rounds=rounds)
        beside = (
            f"s   {got['cold']:.2f} s at first; {got['groups']} groups, "
            f"{got['fixed']} fixed factors on {got['axes']} axes, {got['notes']} notes; "
            f"{got['parameters'] / 1e6:.1f} M parameters"
        )
        table.at_most(f"derive {label}", got["median"], limit, beside)
        table.at_most(f"derive {label}: growth of the peak, MiB", got["mebibytes"], 100)
    for label in ("MLP",) if options.quick else ("MLP", "ResNet20", "VGG16"):
        (name, inputs, model), _ = cases[label]
        apply_fn, shapes, x = network(name, inputs, **model)
        spec = permutation_spec(apply_fn, shapes, x)
        data = np.random.default_rng(0).standard_normal((2, *x.shape[1:])).astype(np.float32)
        spent, found = seconds(
            lambda: check(spec, apply_fn, filled(shapes, 0), data, key=jax.random.key(0))  # noqa: B023
        )
        table.tell(f"check {label}", spent, f"s   {found.joint:.1e} change of the outputs")


# ------------------------------------------------------------------------------ 5. trained networks


class Trained:
    """MLPs trained by Adam at 1e-3, kept on disk, and the barriers between pairs of them."""

    def __init__(self, folder, name, data, widths, batch_size, epochs):
        import optax

        from geojax import models, objectives

        self.folder, self.name, self.data = folder / "networks", name, data
        self.batch_size, self.epochs = batch_size, epochs
        self.model = models.build("mlp", widths=list(widths))
        self.loss = objectives.loss(self.model.apply, {})
        self.metrics = objectives.metrics(self.model.apply, {})
        self.rule = optax.adam(1e-3)
        x = data["train"].inputs[:1]
        shapes, _ = jax.eval_shape(self.model.init, jax.random.key(0), x)
        self.spec = permutation_spec(lambda p, x: self.model.apply(p, {}, x, False)[0], shapes, x)

    def at(self, seed):
        """The weights after each of `epochs`, trained in one run where they are not kept yet."""
        from geojax import batches, checkpoint, fit

        files = {e: self.folder / f"{self.name}-seed{seed}-epoch{e}.npz" for e in self.epochs}
        if not all(file.exists() for file in files.values()):
            self.folder.mkdir(parents=True, exist_ok=True)
            start, order, run = jax.random.split(jax.random.key(seed), 3)
            params, _ = self.model.init(start, self.data["train"].inputs[:1])
            source = batches.split(
                self.data["train"], self.batch_size, key=order, drop_remainder=True
            )
            per_epoch = len(source)

            def keep(params, step):
                if step // per_epoch in files:
                    file = files[step // per_epoch]
                    checkpoint.export_npz(file.with_suffix(".partial.npz"), params)
                    os.replace(file.with_suffix(".partial.npz"), file)
                return {}

            spent, _ = seconds(
                lambda: fit.fit(
                    self.loss, params, source, self.rule, max(self.epochs) * per_epoch, key=run,
                    evaluate=keep, evaluate_every=per_epoch, progress=False,
                )
            )  # fmt: skip
            print(f"  trained {self.name}, seed {seed}: {spent / max(self.epochs):.2f} s an epoch")
        return {e: checkpoint.import_npz(file)[0] for e, file in files.items()}

    def pair(self, a, b, seed):
        """Barriers of a pair: naive, by coordinate descent, and by the default method."""
        from geojax.permute import evaluation

        lines = {"naive": (b, 0.0, None)}
        for label, method in (("descent", CD), ("default", BEST)):
            spent, found = seconds(
                lambda m=method: permute.weight_matching(
                    self.spec, a, b, key=jax.random.key(seed), method=m, progress=False
                )
            )
            moved = permute.apply_permutation(self.spec, found.permutation, b)
            lines[label] = moved, spent, found
        out = {}
        for label, (end, spent, found) in lines.items():
            one = {"seconds": spent}
            one["objective"] = 0.0 if found is None else found.objective / found.bound
            for part in ("train", "test"):
                source = self.data[f"{part} barrier"]
                line = evaluation.barrier(self.metrics, a, end, source, progress=False).naive
                loss, error = line["loss"], line["error"]
                middle = len(loss.values) // 2
                one |= {
                    part: loss.height_over_mean,
                    f"{part} chord": loss.height,
                    f"{part} loss at half over ends": float(
                        loss.values[middle] - (loss.start + loss.end) / 2
                    ),
                    f"{part} accuracy lost at half": 100
                    * float(error.values[middle] - (error.start + error.end) / 2),
                }
            out[label] = one
        return out


def told(label, found):
    print(f"  {label}")
    rows = []
    for method, one in found.items():
        rows.append({"": method} | {
            name: one[name]
            for name in ("objective", "seconds", "train", "train chord", "test", "test chord",
                         "test loss at half over ends", "test accuracy lost at half")
        })  # fmt: skip
    print("    " + report.text_table(rows).replace("\n", "\n    "), flush=True)


def mean_of(found, method, name):
    return float(np.mean([one[method][name] for one in found]))


def digits(table, options, folder):
    """Pairs on scikit-learn's digits, 1437 for training and 360 for testing."""
    from geojax.datasets import Examples
    from geojax.datasets.synthetic import digits_arrays

    arrays = digits_arrays()
    images, labels = (
        np.concatenate([arrays[f"{part}_{what}"] for part in ("train", "test")])
        for what in ("images", "labels")
    )
    images, labels = images.astype(np.float32) / 16, labels.astype(np.int32)
    parts = {"train": Examples(images[:1437], labels[:1437]),
             "test": Examples(images[1437:], labels[1437:])}  # fmt: skip
    parts |= {f"{part} barrier": value for part, value in parts.items()}
    for width, pairs in ((128, 1),) if options.quick else ((512, 1), (128, 3)):
        heading(f"digits: MLP 64-{width}x3-10, Adam 1e-3, batch 128, 50 epochs; pairs: {pairs}")
        trained = Trained(folder, f"digits-{width}", parts, [width] * 3, 128, [50])
        found = []
        for pair in range(pairs):
            a, b = (trained.at(2 * pair + i)[50] for i in range(2))
            found.append(trained.pair(a, b, pair))
            told(f"pair {pair}", found[-1])
        claim = f"digits, width {width}: train barrier, "
        values = {method: mean_of(found, method, "train") for method in found[0]}
        if width == 512:
            table.at_least(claim + "naive", values["naive"], 0.8)
            table.at_most(claim + "coordinate descent", values["descent"], 0.16)
            table.at_most(claim + "default", values["default"], 0.06)
        else:
            for method in ("naive", "descent"):
                table.tell(claim + f"{method}, mean", values[method])
            table.at_most(claim + "default, mean", values["default"], 0.15)


def mnist(table, options, folder):
    """Barriers between MLPs on MNIST and Fashion-MNIST over training."""
    from geojax import batches, datasets

    if options.quick or "GEOJAX_DATA_DIR" not in os.environ:
        why = "it takes half an hour" if options.quick else "GEOJAX_DATA_DIR names no folder"
        print(f"\nMNIST is left out: {why}.")
        return
    epochs, pairs = [1, 3, 10, 25], 3
    means = {}
    for name in ("mnist", "fashion_mnist"):
        heading(f"{name}: MLP 784-512x3-10, Adam 1e-3, batch 500; {pairs} pair(s)")
        data = datasets.load(name, validation=0, normalization="none")
        parts = {"train": data.train, "test": data.test}
        for part, examples in tuple(parts.items()):
            first = type(examples)(*(x[:10_000] for x in examples))
            parts[f"{part} barrier"] = batches.split(first, 1000)
        trained = Trained(folder, name, parts, [512] * 3, 500, epochs)
        found = {epoch: [] for epoch in epochs}
        for pair in range(pairs):
            a, b = (trained.at(2 * pair + i) for i in range(2))
            for epoch in epochs:
                found[epoch].append(trained.pair(a[epoch], b[epoch], pair))
                told(f"pair {pair} after {epoch} epochs", found[epoch][-1])
        for epoch, method in itertools.product(epochs, ("naive", "descent", "default")):
            one = {key: mean_of(found[epoch], method, key) for key in found[epoch][0][method]}
            means[name, epoch, method] = one
            table.tell(
                f"{name}, {epoch} epochs, {method}: train barrier", one["train"],
                f"chord {one['train chord']:.4f}; test {one['test']:.4f}, chord "
                f"{one['test chord']:.4f}; objective {one['objective']:.4f}, "
                f"{one['seconds']:.2f} s",
            )  # fmt: skip
    first = "mnist", 1
    ratio = means[*first, "default"]["train"] / means[*first, "descent"]["train"]
    table.at_most("mnist, 1 epoch: default's train barrier over descent's", ratio, 0.75)
    default = means["mnist", 10, "default"]
    table.at_least(
        "mnist, 10 epochs: naive train barrier", means["mnist", 10, "naive"]["train"], 0.7
    )
    table.at_most("mnist, 10 epochs: default train barrier", default["train"], 0.03)
    lost = default["test accuracy lost at half"]
    table.at_most("mnist, 10 epochs: points of test accuracy lost at half", lost, 0.6)
    default = means["mnist", 25, "default"]
    table.at_most("mnist, 25 epochs: default train chord", default["train chord"], 0.005)
    above = default["test loss at half over ends"]
    table.at_most("mnist, 25 epochs: test loss at half minus that of the ends", above, 0)
    name = "fashion_mnist"
    table.at_least(
        f"{name}, 10 epochs: naive train barrier", means[name, 10, "naive"]["train"], 0.9
    )
    table.at_most(
        f"{name}, 10 epochs: default train barrier", means[name, 10, "default"]["train"], 0.12
    )
    table.at_most(
        f"{name}, 10 epochs: default test barrier", means[name, 10, "default"]["test"], 0.05
    )
    chord = means[name, 25, "default"]["test chord"]
    table.at_most(f"{name}, 25 epochs: default test chord", chord, 0.01)
    for name, method in itertools.product(("mnist", "fashion_mnist"), ("descent", "default")):
        falling = [means[name, epoch, method]["train"] for epoch in (1, 3, 10)]
        holds = falling[0] > falling[1] > falling[2]
        beside = " > ".join(f"{x:.3f}" for x in falling)
        table.true(f"{name}, {method}: barrier falls over epochs 1, 3, 10", holds, beside)


# ----------------------------------------------------------------------------------- the program


PARTS = {
    "W1": matching_w1,
    "W2": matching_w2,
    "W3": matching_w3,
    "W4": matching_w4,
    "W5": matching_w5,
    "W6": matching_w6,
    "W7": matching_w7,
    "W8": matching_w8,
    "lap": lap,
    "restarts": restarts,
    "many": many,
    "derive": derive,
    "digits": digits,
    "mnist": mnist,
}


def machine():
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "a CPU")
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{name}, {os.cpu_count()} cores{load}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less of it, and smaller")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--profile", action="store_true",
                        help="tell where a matching's time goes, in one more call")  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, help="where trained networks are kept",
                        default=pathlib.Path("out/benchmarks/permute"))  # fmt: skip
    parser.add_argument("--threads", type=int,
                        help="of BLAS, in matchings; by default as many as it takes")  # fmt: skip
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        request = json.loads(options.child)
        print(json.dumps(globals()[request.pop("what")](**request)))
        return
    if options.quick and not options.threads:
        options.threads = 1  # two in a queue for two busy cores take ten times as long as one
    threads = {"OPENBLAS_NUM_THREADS": str(options.threads)}
    if options.threads and not threads.items() <= os.environ.items():
        # It is read when NumPy is imported.
        command = [sys.executable, *sys.argv]
        raise SystemExit(subprocess.run(command, env=os.environ | threads, check=False).returncode)
    chosen = options.only.split(",")
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        parser.error(f"--only has {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    print(f"jax {jax.__version__}, Python {sys.version.split()[0]}, {machine()}; BLAS threads: "
          f"{options.threads or 'as many as it takes'}")  # fmt: skip
    if options.quick:
        print("quick: smaller problems under the limits of the whole ones, methods in one process")
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            kept = options.out if name in ("digits", "mnist") else folder
            PARTS[name](table, options, kept)
    heading(f"all of it, on {machine()}")
    raise SystemExit(0 if table.show() else 1)


if __name__ == "__main__":
    main()
