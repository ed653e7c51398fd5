"""Claims: cheap exact products, and the top 20 eigenpairs twice as fast as hessian-eigenthings.

Both sides run interleaved in one run, one thread each, on the same weights and data: ours here, the
peers in an environment of their own (`.bench-venv`, made on the first run) behind a pipe. Times are
CPU seconds, minima over the rounds; compilation is printed apart. One table at the end says what
was claimed, what was measured, and whether it holds; the exit code is 1 where something is missed.

  python benchmarks/hessian.py            # everything
  python benchmarks/hessian.py --quick    # the same kinds of numbers, smaller
  python benchmarks/hessian.py --no-peers
  python benchmarks/hessian.py --only density --only scaling   # parts whose name has one of these

Real data are read below GEOJAX_DATA_DIR; without it, digits and the standard library's sources.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import tempfile
import time

# One thread on both sides, which jax settles when it is imported. Its flags alone leave a second
# thread to elementwise work; one core for this process and those it starts leaves none.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from hessian_peers import flat, jax_loss, jax_network, timed  # noqa: E402
from scipy import stats  # noqa: E402

from geojax import batches, datasets, fit, hessian, krylov, report, tree  # noqa: E402
from geojax.hessian import output_losses  # noqa: E402
from geojax.krylov import lanczos  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
WHEELS = ["torch==2.13.0", "hessian-eigenthings==1.0.0a5", "curvlinops-for-pytorch", "matfree"]
TOL = 1e-3
START = time.monotonic()


# --------------------------------------------------------------------------------- the two sides


class Peers:
    """The other libraries, in a process of an environment of their own; call it with a request."""

    def __init__(self, folder):
        self.folder = folder
        self.process = subprocess.Popen(
            [self.install(), str(ROOT / "benchmarks" / "hessian_peers.py"), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
        )
        self.versions = self("versions")
        for name, version in self.versions.items():
            print(f"  {name} {version}")

    @staticmethod
    def install():
        folder = ROOT / ".bench-venv"
        python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        if not python.exists():
            print(f"  making {folder.name}, once")
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        purelib = pathlib.Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        for wheel in (*WHEELS, f"jax=={jax.__version__}"):  # matfree's jax is ours
            if any(purelib.glob(f"{wheel.split('==')[0].replace('-', '_')}-*.dist-info")):
                continue
            # The pins stay while others are installed: some would bring another torch.
            pins = [pin for pin in WHEELS if "==" in pin]
            done = subprocess.run([*pip, *{wheel, *pins}], capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                print(f"  {wheel} cannot be installed here: {reason}")
        return str(python)

    def has(self, name):
        return not self.versions.get(name, "not usable").startswith("not usable")

    def __call__(self, what, **arguments):
        print(json.dumps({"what": what, **arguments}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peers' process ended while asked for {what}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"the peers failed at {what} {arguments}: {answer['error']}")
        return answer["result"]

    def product(self, problem, who, dtype="float32"):
        """A product itself, of a problem's vector."""
        self("product", name=problem.name, who=who, dtype=dtype, save="out.npy")
        return np.load(self.folder / "out.npy")

    def close(self):
        self.process.stdin.close()
        self.process.wait(20)


def ours(fn, *args):
    """A function that runs `fn` once and gives its CPU seconds."""
    return lambda: timed(lambda: jax.block_until_ready(fn(*args)))[0]


def interleaved(runs, rounds, warm=1):
    """The fewest seconds of each run over the rounds, after those that compile."""
    best = dict.fromkeys(runs, float("inf"))
    for i in range(rounds + warm):
        for label, run in runs.items():
            seconds = run()
            if i >= warm:
                best[label] = min(best[label], seconds)
    return best


class Table:
    """Claims with what was measured. The figure that is printed is the one that is judged."""

    def __init__(self):
        self.rows = []

    def _add(self, claim, target, value, holds):
        verdict = "" if holds is None else "met" if holds else "MISSED"
        self.rows.append((claim, target, value, verdict))
        print("  " + "   ".join(x for x in (f"{claim}: {value}", target, verdict) if x), flush=True)

    def tell(self, claim, value):
        """What is not claimed."""
        self._add(claim, "", _figure(value), None)

    def at_most(self, claim, value, limit):
        self._add(claim, f"<= {limit:g}", _figure(value), float(_figure(value)) <= limit)

    def at_least(self, claim, value, limit):
        self._add(claim, f">= {limit:g}", _figure(value), float(_figure(value)) >= limit)

    def show(self):
        names = ("claim", "target", "measured", "verdict")
        print(report.text_table([dict(zip(names, row, strict=True)) for row in self.rows]))
        missed = [row[0] for row in self.rows if row[3] == "MISSED"]
        print("".join(f"\n{line}" for line in (f"{len(missed)} missed", *missed)))
        return not missed


def _figure(value):
    return str(value) if isinstance(value, (int, str)) else f"{value:.3g}"


class Another(Exception):
    """A part that was not asked for."""


ONLY: list[str] = []


def heading(text):
    if ONLY and not any(part.lower() in text.lower() for part in ONLY):
        raise Another
    print(f"\n[{time.monotonic() - START:.0f} s] {text}", flush=True)


# -------------------------------------------------------------------------- data and the networks


class Problem:
    """A network at a point, with its data: what both sides are given."""

    def __init__(self, name, kind, params, x, labels, batch_size):
        self.name, self.kind = name, kind
        self.params = {n: jnp.asarray(p) for n, p in params.items()}
        self.names = list(params)  # in torch's order, which jax's sorted dicts lose
        self.data = {"x": np.asarray(x), "labels": np.asarray(labels, np.int32)}
        self.batch_size = batch_size
        self.source = batches.split(self.data, batch_size)
        self.loss, self.logits = losses(kind)
        self.n = tree.size(self.params)
        self.v = tree.random_like(jax.random.key(7), self.params)

    @functools.cached_property
    def hessian(self):
        return hessian.hessian(self.loss, self.params, self.source)

    def ggn(self, params):
        model = functools.partial(_on_inputs, self.logits)
        return hessian.ggn(model, output_losses.softmax_cross_entropy(_labels), params, self.source)

    def save(self, folder):
        arrays = {"p:" + n: np.asarray(self.params[n]) for n in self.names}
        np.savez(
            folder / f"{self.name}.npz", kind=self.kind, names=self.names,
            batch_size=self.batch_size, **self.data, **arrays,
        )  # fmt: skip
        np.save(folder / f"{self.name}-vector.npy", flat(self.v, self.names))

    def first(self):
        """The first batch, on the device."""
        return jax.tree.map(jnp.asarray, next(iter(self.source)))


@functools.cache
def losses(kind):
    return jax_loss(kind), jax_network(kind)


def _on_inputs(logits, params, batch):
    return logits(params, batch["x"])


def _labels(batch):
    return batch["labels"].reshape(-1)


def dense(rng, m, n):
    return (rng.normal(size=(m, n)) / np.sqrt(m)).astype(np.float32)


def mlp_params(sizes, seed=0):
    rng = np.random.default_rng(seed)
    params = {}
    for i, (m, n) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        params[f"{2 * i}.weight"] = dense(rng, m, n)
        params[f"{2 * i}.bias"] = np.zeros(n, np.float32)
    return params


def cnn_params(channels=(3, 32, 64, 128), side=4, hidden=96):
    rng = np.random.default_rng(1)
    params = {}
    for i, (m, n) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
        params[f"conv{i}.weight"] = dense(rng, 9 * m, n).reshape(3, 3, m, n)
        params[f"conv{i}.bias"] = np.zeros(n, np.float32)
    for name, m, n in (("hidden", side * side * channels[-1], hidden), ("out", hidden, 10)):
        params[f"{name}.weight"], params[f"{name}.bias"] = dense(rng, m, n), np.zeros(n, np.float32)
    return params


def lm_params(vocabulary=1024, width=128, length=64, depth=3):
    rng = np.random.default_rng(2)
    params = {
        "embed.weight": dense(rng, vocabulary, width) * 3,
        "position.weight": dense(rng, length, width),
    }
    for i in range(depth):
        params |= {
            f"blocks.{i}.norm1.weight": np.ones(width, np.float32),
            f"blocks.{i}.qkv.weight": dense(rng, width, 3 * width),
            f"blocks.{i}.proj.weight": dense(rng, width, width),
            f"blocks.{i}.norm2.weight": np.ones(width, np.float32),
            f"blocks.{i}.up.weight": dense(rng, width, 4 * width),
            f"blocks.{i}.down.weight": dense(rng, 4 * width, width),
        }
    return params | {"head.weight": dense(rng, width, vocabulary)}


@functools.cache
def images(name):
    """Pictures `(n, side, side, channels)` with mean 0 and deviation 1, and labels."""
    for source in (name, "digits"):
        try:
            found = datasets.load(source, raw=source != "digits", cache=False, progress=False)
        except (FileNotFoundError, ImportError) as error:
            print(f"  {source} is not here ({str(error).splitlines()[0][:100]})")
            continue
        x = np.asarray(found.train.inputs[:8192], np.float32)
        if source != name:
            print(f"  digits, enlarged, stand in for {name}; set GEOJAX_DATA_DIR for the real ones")
            side, channels = (32, 3) if name == "cifar10" else (28, 1)
            x = np.kron(x, np.ones((1, 4, 4, channels), np.float32))
            cut = (32 - side) // 2
            x = x[:, cut : 32 - cut, cut : 32 - cut]
            x = np.resize(x, (2048, *x.shape[1:]))
            return (x - x.mean()) / x.std(), np.resize(found.train.labels, 2048)
        return (x - x.mean()) / x.std(), np.asarray(found.train.labels[:8192])
    print(f"  noise stands in for {name}")
    rng = np.random.default_rng(0)
    shape = (2048, 32, 32, 3) if name == "cifar10" else (2048, 28, 28, 1)
    return rng.normal(size=shape).astype(np.float32), rng.integers(10, size=2048)


@functools.cache
def tokens(count, vocabulary=1024):
    """Text as numbers: bytes, and the commonest pairs of bytes as words of their own."""
    places = ("text/tinyshakespeare.txt", "tinyshakespeare.txt", "tiny_shakespeare.txt")
    folder = pathlib.Path(os.environ.get("GEOJAX_DATA_DIR", "/nowhere"))
    found = [folder / place for place in places if (folder / place).is_file()]
    if found:
        text = found[0].read_bytes()
    else:
        print("  tiny Shakespeare is not here; the standard library's sources stand in for it")
        sources = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
        text = b"".join(path.read_bytes() for path in sources)[:1_000_000]
    raw = np.frombuffer(text, np.uint8).astype(np.int64)
    pairs = raw[:-1] * 256 + raw[1:]
    common = np.argsort(-np.bincount(pairs, minlength=65536), kind="stable")[: vocabulary - 256]
    words = {int(pair): 256 + i for i, pair in enumerate(common)}
    out, i = [], 0
    while len(out) < count:
        word = words.get(int(pairs[i]))
        out.append(int(raw[i]) if word is None else word)
        i += 1 if word is None else 2
    return np.array(out, np.int32)


def text_batch(num, length=64):
    stream = tokens(num * length + 1)
    return stream[:-1].reshape(num, length), stream[1:].reshape(num, length)


def trained(kind, params, x, labels, steps):
    data = {"x": x, "labels": labels.astype(np.int32)}
    source = batches.split(data, 128, key=jax.random.key(0), drop_remainder=True)
    optimizer = optax.sgd(0.05, momentum=0.9)
    params = {n: jnp.asarray(p) for n, p in params.items()}
    found = fit.fit(
        losses(kind)[0], params, source, optimizer, steps, key=jax.random.key(1), progress=False
    )
    return {n: np.asarray(found.params[n]) for n in params}


def mnist_mlp(name, sizes, steps, num, pool=1):
    """An MLP after some steps on MNIST, with the first `num` pictures in batches of 128."""
    x, labels = images("mnist")
    if pool > 1:
        x = x.reshape(len(x), 28 // pool, pool, 28 // pool, pool, 1).mean((2, 4))
    x = x.reshape(len(x), -1)
    params = mlp_params(sizes)
    order = list(params)
    params = trained("mlp", params, x, labels, steps)
    return Problem(name, "mlp", {n: params[n] for n in order}, x[:num], labels[:num], 128)


# ------------------------------------------------------------------------------------- products


def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def one_batch_products(table, problem, peers, rounds, cost, faster, count, count_of_4):
    """Time and FLOPs of a product on one batch in gradients, and its value next to torch's."""
    name, params, batch, v = problem.name, problem.params, problem.first(), problem.v
    heading(f"{name}: n = {problem.n}, one batch of {problem.batch_size}")
    vs = tree.stack([tree.random_like(jax.random.key(i), params) for i in range(4)])

    def product(params, batch, v):
        return hessian.hvp(problem.loss, params, batch, v)

    def block(params, vs):
        return hessian.hessian(problem.loss, params, problem.source).matmat(vs)

    gradient, compiled = jax.jit(jax.grad(problem.loss)), jax.jit(product)
    runs = {
        "gradient": ours(gradient, params, batch),
        "hvp": ours(compiled, params, batch, v),
        "operator": ours(problem.hessian.matvec, v),
        "block of 4": ours(problem.hessian.matmat, vs),
    }
    whose = []
    if peers:
        whose = ["hessian-eigenthings"] + ["curvlinops"] * peers.has("curvlinops-for-pytorch")
        runs["torch gradient"] = lambda: peers("gradient", name=name)
        runs |= {w: lambda w=w: peers("product", name=name, who=w) for w in whose}
    best = interleaved(runs, rounds)
    best["block of 4"] /= 4
    for label, seconds in best.items():
        base = best["torch gradient" if label in [*whose, "torch gradient"] else "gradient"]
        print(f"  {label:20} {1e3 * seconds:8.2f} ms a vector, {seconds / base:5.2f} gradients")
    table.at_most(f"{name}: product, in gradients", best["hvp"] / best["gradient"], cost)
    table.tell(
        f"{name}: product in a block of 4, in gradients", best["block of 4"] / best["gradient"]
    )
    for who in whose:
        ratio = best[who] / best["operator"]
        if who == "hessian-eigenthings":
            table.at_least(f"{name}: product, times as fast as {who}", ratio, faster)
        else:
            table.tell(f"{name}: product, times as fast as {who}", ratio)
    if peers:
        theirs = peers.product(problem, "hessian-eigenthings")
        gap = relative(flat(compiled(params, batch, v), problem.names), theirs)
        table.at_most(f"{name}: difference from torch in float32", gap, 5e-6)
    base = flops(jax.grad(problem.loss), params, batch)
    table.at_most(
        f"{name}: FLOPs of a product, in gradients", flops(product, params, batch, v) / base, count
    )
    table.at_most(
        f"{name}: FLOPs in a block of 4, in gradients",
        flops(block, params, vs) / 4 / base,
        count_of_4,
    )


def relative(found, true):
    return np.linalg.norm(found - true) / np.linalg.norm(true)


def full_data_product(table, problem, peers, rounds):
    """One product with all batches."""
    name = f"{problem.name}, {len(problem.source)} batches of 128"
    heading(f"{name}: n = {problem.n}")
    gradient = batches.mean(jax.grad(problem.loss), problem.source)
    runs = {
        "gradient": ours(gradient, problem.params),
        "operator": ours(problem.hessian.matvec, problem.v),
    }
    if peers:
        asked = {"name": problem.name, "who": "hessian-eigenthings"}
        runs["torch gradient"] = lambda: peers("gradient", name=problem.name)
        runs["hessian-eigenthings"] = lambda: peers("product", **asked)
    best = interleaved(runs, rounds)
    print("  " + ", ".join(f"{label} {1e3 * seconds:.1f} ms" for label, seconds in best.items()))
    table.at_most(f"{name}: product, in gradients", best["operator"] / best["gradient"], 2.3)
    table.at_most(f"{name}: product, CPU ms", 1e3 * best["operator"], 24)
    if peers:
        ratio = best["hessian-eigenthings"] / best["operator"]
        table.at_least(f"{name}: product, times as fast as hessian-eigenthings", ratio, 2)


def gauss_newton(table, problem, peers, rounds):
    """The product's error against float64, its FLOPs and its time."""
    name, v = f"{problem.name}: Gauss-Newton", problem.v
    heading(name)
    operator = problem.ggn(problem.params)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (problem.params, v))
        exact = flat(problem.ggn(wide[0]).matvec(wide[1]), problem.names)
    table.at_most(
        f"{name}: error in float32", relative(flat(operator.matvec(v), problem.names), exact), 1e-6
    )
    runs = {"ours": ours(operator.matvec, v)}
    if peers:
        gap = relative(peers.product(problem, "hessian-eigenthings GGN", "float64"), exact)
        print(f"  hessian-eigenthings in float64 is {gap:.1e} off ours in float64")
        whose = ["hessian-eigenthings GGN", "finite-difference GGN"]
        whose += ["curvlinops GGN"] * peers.has("curvlinops-for-pytorch")
        runs |= {w: lambda w=w: peers("product", name=problem.name, who=w) for w in whose}
    best = interleaved(runs, rounds)
    for who in list(best)[1:]:
        table.tell(f"{name}: error of {who}", relative(peers.product(problem, who), exact))
        table.tell(f"{name}: times as fast as {who}", best[who] / best["ours"])
    batch = problem.first()
    difference = 2 * flops(lambda p: problem.logits(p, batch["x"]), problem.params)
    difference += flops(jax.grad(problem.loss), problem.params, batch)
    mine = flops(lambda params, v: problem.ggn(params).matvec(v), problem.params, v)
    table.at_most(f"{name}: FLOPs, in finite differences", mine / difference, 1.1)


def cross_entropy(table, peers, num, classes=50257):
    """Temporaries of the closed form at a language model's size, and its time."""
    heading("softmax cross-entropy: the Hessian of the outputs times a vector")
    loss = output_losses.softmax_cross_entropy()
    product = jax.jit(lambda z, labels, u: loss.hessian_product(z, {"labels": labels}, u))
    shape = jax.ShapeDtypeStruct((4096, classes), jnp.float32)
    large = product.lower(shape, jax.ShapeDtypeStruct((4096,), jnp.int32), shape).compile()
    share = large.memory_analysis().temp_size_in_bytes / (4 * shape.size)
    table.at_most(f"cross-entropy: temporaries over outputs, 4096 x {classes}", share, 0.05)
    z, u = (jax.random.normal(jax.random.key(i), (num, classes)) for i in range(2))
    runs = {"ours": ours(product, z, jnp.arange(num), u)}
    for how in ("double backward", "closed form") if peers else ():
        asked = {"num": num, "classes": classes, "how": how}
        runs[f"torch, {how}"] = lambda asked=asked: peers("cross_entropy", **asked)
    best = interleaved(runs, 3)
    for who in list(best)[1:]:
        claim = f"cross-entropy, {num} x {classes}: times as fast as {who}"
        (table.tell if "closed" in who else functools.partial(table.at_least, limit=2))(
            claim, best[who] / best["ours"]
        )


# ------------------------------------------------------------------------------------ eigenpairs


def eigenpairs(table, problem, peers, k, rounds):
    """The top k pairs, every one of them converged, after compilation."""
    name = f"{problem.name}: top {k}"
    heading(f"{name} at {TOL} relative residual")
    solve = functools.partial(
        krylov.eigsh, problem.hessian, k, key=jax.random.key(3), progress=False
    )
    first, found = timed(lambda: solve(tol=TOL))
    close = solve(tol=1e-4, basis_size=8 * k + 60)
    truth = np.sort(np.abs(close.eigenvalues))
    residuals = found.residuals / np.abs(found.eigenvalues)
    told = {}
    runs = {
        "ours": ours(lambda: solve(tol=TOL).eigenvectors),
        "ours, unchecked": ours(lambda: solve(tol=TOL, confirm=0, verify=False).eigenvectors),
    }
    if peers:
        runs |= peer_solvers(problem, peers, k, truth, told)
    best = interleaved(runs, rounds, warm=1)
    for label, seconds in best.items():
        print(f"  {label:34} {seconds:6.2f} s CPU  {told.get(label, '')}")
    right = (residuals <= TOL) & found.converged
    right &= np.sort(np.abs(np.abs(found.eigenvalues) / truth[::-1] - 1)) < 1e-3
    table.at_least(
        f"{name}: pairs that converged, measured, and are the top ones", int(right.sum()), k
    )
    if k == 5:
        table.at_most(f"{name}: products, checks included", found.num_matvecs, 60)
        table.at_most(f"{name}: CPU s after compilation", best["ours"], 1.5)
    else:
        table.tell(f"{name}: products, checks included", found.num_matvecs)
        table.tell(f"{name}: CPU s after compilation", best["ours"])
    table.tell(f"{name}: compilation, CPU s", first - best["ours"])
    for who in list(best)[1:]:
        ratio = best[who] / best["ours"]
        if who == "hessian-eigenthings":
            table.at_least(f"{name}: times as fast as {who}", ratio, 2)
        else:
            table.tell(f"{name}: times as fast as {who}", ratio)


def off(values, truth):
    """How far the magnitudes of some values are from the true ones, ascending, relatively."""
    return float(np.abs(np.sort(np.abs(values)) / truth - 1).max())


def peer_solvers(problem, peers, k, truth, told):
    """The peers' runs: hessian-eigenthings in the fewest steps in which all k pairs converge."""
    name, runs = problem.name, {}
    setting = {"name": name, "k": k, "seed": 0}

    def lanczos_run(label, steps, reorthogonalize):
        asked = {**setting, "steps": steps, "reorthogonalize": reorthogonalize}
        got = peers("lanczos", **asked, check=True)
        fine = max(got["residuals"]) <= TOL and off(got["values"], truth) < 1e-3
        if label:
            told[label] = f"{steps} steps; " + (
                f"worst residual {max(got['residuals']):.1e}" if fine else "NOT the top values"
            )
            runs[label] = lambda: peers("lanczos", **asked)["seconds"]
        return fine

    steps = peers("scout", **setting, tol=TOL, most=300)
    while steps is not None and not lanczos_run(None, steps, True):
        steps = steps + 1 if steps < 330 else None
    if steps is None:
        print(f"  hessian-eigenthings: {k} pairs do not converge within 300 steps")
        return runs
    lanczos_run("hessian-eigenthings", steps, True)
    if steps > 50:  # where it leaves reorthogonalization out by default
        lanczos_run("hessian-eigenthings by default", steps, None)
    # Its user does not know the steps: double them, from its default, until its flags say so.
    tried = [2 * k]
    while tried[-1] < steps:
        tried.append(2 * tried[-1])
    label = "hessian-eigenthings, steps doubled"
    told[label] = f"{' + '.join(map(str, tried))} steps"
    runs[label] = lambda: sum(
        peers("lanczos", **setting, steps=m, reorthogonalize=True)["seconds"] for m in tried
    )
    if peers.has("curvlinops-for-pytorch"):
        got = peers("arpack", name=name, k=k, tol=TOL, check=True)
        label = "curvlinops and ARPACK"
        told[label] = f"{got['products']} products; worst residual {max(got['residuals']):.1e}"
        runs[label] = lambda: peers("arpack", name=name, k=k, tol=TOL)["seconds"]
    if peers.has("matfree"):
        got = peers("matfree", name=name, k=k, steps=steps, check=True)
        told["matfree"] = (
            f"{steps} steps; worst residual {max(got['residuals']):.1e}; compiled in "
            f"{got['compile']:.1f} s CPU"
        )
        runs["matfree"] = lambda: peers("matfree", name=name, k=k, steps=steps)["seconds"]
    return runs


def diagonal_operator(n):
    diagonal = jnp.linspace(-1, 1, n) ** 3
    return krylov.Operator(functools.partial(jax.jit(jnp.multiply), diagonal), diagonal)


def orthogonalization(table, peers, n, steps):
    """What a recurrence costs besides its products, and how orthogonal its basis is."""
    name = f"basis of {steps} x {n}"
    heading(f"{name}: the recurrence on a diagonal matrix, less its products")
    operator = diagonal_operator(n)

    def recurrence():
        state = lanczos.init(operator, key=jax.random.key(0), num_rows=steps)
        for _ in range(steps):
            state, _ = lanczos.step(operator, state, seed=0)
        return state.rows

    v = operator.random(jax.random.key(1))
    products = ours(lambda: [operator.matvec(v) for _ in range(steps)])
    runs = {"ours": ours(recurrence), "products": products}
    if peers:
        runs["theirs"] = lambda: peers("orthogonalize", n=n, steps=steps)["seconds"]
    best = interleaved(runs, 3)
    q = np.concatenate([np.asarray(chunk, np.float64) for chunk in recurrence()])
    seconds = best["ours"] - best["products"]
    if (n, steps) == (400_000, 60):
        table.at_most(f"{name}: CPU s", seconds, 1.0)
    table.at_most(f"{name}: |Q Q^T - I|", np.abs(q @ q.T - np.eye(len(q))).max(), 5e-6)
    if peers:
        error = peers("orthogonalize", n=n, steps=steps)["error"]
        table.tell(f"{name}: |Q Q^T - I| of hessian-eigenthings", error)
        table.tell(f"{name}: times as fast as hessian-eigenthings", best["theirs"] / seconds)


# -------------------------------------------------------------------------- densities and traces


def density_time(table, problem, peers, runs, steps):
    """Stochastic Lanczos quadrature over all data."""
    name = f"{problem.name}: density, {runs} probes of {steps} steps"
    heading(name)

    def solve(num_probes):
        found = krylov.spectral_density(
            problem.hessian, key=jax.random.key(5), num_probes=num_probes, num_steps=steps,
            progress=False,
        )  # fmt: skip
        return found.curve.values

    solve(2)
    sides = {"ours": ours(solve, runs)}
    if peers:
        asked = {"name": problem.name, "runs": runs, "steps": steps, "seed": 0}
        sides["theirs"] = lambda: peers("density", **asked)
    best = interleaved(sides, 1, warm=0)
    table.tell(f"{name}: CPU s", best["ours"])
    if peers:
        ratio = best["theirs"] / best["ours"]
        table.at_least(f"{name}: times as fast as hessian-eigenthings", ratio, 1.8)


def small_matrix(problem, folder):
    """The whole Hessian of a small network, in float64, and its eigenvalues."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), problem.params)
        matrix = krylov.dense(hessian.hessian(problem.loss, params, problem.source))
    matrix = (matrix + matrix.T) / 2
    np.save(folder / "matrix.npy", matrix)
    return matrix, np.linalg.eigvalsh(matrix)


def density_error(table, matrix, values, peers, trials):
    """The distance from the exact spectrum, at 800 products a trial on both sides."""
    heading(f"density of a dense Hessian of {len(values)}, 800 products, {trials} trials")
    operator = krylov.from_matrix(matrix.astype(np.float32))
    top = krylov.eigsh(operator, 10, key=jax.random.key(0), progress=False)
    paid = -(-top.num_matvecs // 80)

    def distance(nodes, weights):
        return stats.wasserstein_distance(values, np.ravel(nodes), None, np.ravel(weights))

    def mine(seed, deflate):
        found = krylov.spectral_density(
            operator, key=jax.random.key(seed), num_probes=10 if deflate is None else 10 - paid,
            num_steps=80, deflate=deflate, progress=False,
        )  # fmt: skip
        spikes = len(found.deflated)
        bulk = found.weights * (1 - spikes / found.size) / len(found.weights)
        nodes = np.concatenate([found.nodes.ravel(), found.deflated])
        return distance(nodes, np.concatenate([bulk.ravel(), np.full(spikes, 1 / found.size)]))

    plain = np.mean([mine(i, None) for i in range(trials)])
    deflated = np.mean([mine(i, top) for i in range(trials)])
    table.tell("density: W1 distance from the spectrum", plain)
    if peers:
        asked = {"name": "matrix", "runs": 10, "steps": 80}
        found = [peers("quadrature", **asked, seed=100 * i) for i in range(trials)]
        theirs = np.mean([distance(f["nodes"], f["weights"]) for f in found])
        table.tell("density: W1 distance, in hessian-eigenthings'", plain / theirs)
        claim = "density: W1 distance with 10 pairs deflated, in hessian-eigenthings'"
        table.at_most(claim, deflated / theirs, 1)


def decaying_matrix(folder, n=1000):
    """Eigenvalues 1, 1/4, 1/9, ..., as the paper of XTrace has them, in a random basis."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))
    matrix = basis * (1 + np.arange(n)) ** -2.0 @ basis.T
    np.save(folder / "decaying.npy", matrix)
    return matrix


def traces(table, name, matrix, peers, counts, trials, limit=None):
    """Errors at equal products, and how often the interval holds the trace."""
    heading(f"trace of {name}, {trials} trials")
    operator = krylov.from_matrix(matrix.astype(np.float32))
    true, methods = np.trace(matrix), ("hutchinson", "hutch++", "xtrace")

    def error(estimates):
        return float(np.sqrt(np.mean((np.asarray(estimates) / true - 1) ** 2)))

    errors, inside = {}, {}
    for products in counts:
        for method in methods:
            found = [
                krylov.trace(
                    operator, key=jax.random.key(i), method=method, num_matvecs=products,
                    progress=False,
                )
                for i in range(trials)
            ]  # fmt: skip
            errors[method, products] = error([t.estimate for t in found])
            held = [t.interval[0] <= true <= t.interval[1] for t in found]
            inside[method] = inside.get(method, []) + held
        told = ", ".join(f"{m} {errors[m, products]:.1e}" for m in methods)
        print(f"  {products:3} products: errors (root mean square) {told}", flush=True)
    enough = [str(m) for method, m in errors if method == "xtrace" and errors[method, m] <= 0.01]
    claim = f"trace of {name}: products of xtrace for an error of 1 %"
    if limit and enough:
        table.at_most(claim, int(enough[0]), limit)
    else:
        table.tell(claim, (enough or [f"over {counts[-1]}"])[0])
    for method in methods:
        # The trials of one method are independent at one number of products, not between them.
        least = round(0.95 - 2 * np.sqrt(0.95 * 0.05 / trials), 3)
        share = np.mean(inside[method])
        table.at_least(f"trace of {name}: 95 % intervals of {method} that hold it", share, least)
    if not peers:
        return
    theirs = {}
    whose = ["hessian-eigenthings hutchinson", "hessian-eigenthings hutch++"]
    whose += ["curvlinops xtrace"] * peers.has("curvlinops-for-pytorch")
    for who in whose:
        asked = {"name": name, "who": who, "products": 60, "trials": trials}
        theirs[who] = error(peers("traces", **asked))
        ratio = errors[who.split()[-1], 60] / theirs[who]
        table.tell(f"trace of {name}, 60 products: our error, in {who}'s", ratio)
    best = errors["xtrace", 60] / theirs["hessian-eigenthings hutch++"]
    claim = f"trace of {name}, 60 products: error of xtrace, in hessian-eigenthings hutch++'s"
    table.at_most(claim, best, 1)


# ------------------------------------------------- what needs a process of its own: memory, starts


# glibc keeps freed blocks of up to 32 MiB; with this it gives them back, and what is resident is
# what is in use.
NOTHING_KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


def child(what, env=None, **options):
    """The answer of a fresh process that does one thing."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps({"what": what, **options})],
        stdout=subprocess.PIPE, text=True, env=os.environ | (env or {}), check=True,
    )  # fmt: skip
    return json.loads(done.stdout.strip().splitlines()[-1])


def growth(fn):
    """By how much the resident set grew at most while `fn` ran, in bytes, and what it gave."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = resident("VmRSS:")
    out = jax.block_until_ready(fn())
    return resident("VmHWM:") - before, out


def resident(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def can_measure_memory():
    here = pathlib.Path("/proc/self/clear_refs").exists()
    if not here:
        print("  the resident set is read from /proc, which is not here")
    return here


def memory_child(vectors, sizes, k):
    x, labels = images("mnist")
    x = x[:64].reshape(64, -1)
    problem = Problem("memory", "mlp", mlp_params(sizes), x, labels[:64], 64)
    operator, bytes_each = problem.hessian, 4 * problem.n
    operator.matvec(problem.v)
    product, _ = growth(lambda: operator.matvec(problem.v))
    solve = functools.partial(krylov.eigsh, operator, k, key=jax.random.key(0), progress=False)

    def within():
        found = solve(memory_bytes=vectors * bytes_each)
        return found.eigenvectors, found

    within()  # compiles
    used, (_, found) = growth(within)
    wide = solve(basis_size=8 * k)
    return {
        "n": problem.n,
        "used": used / bytes_each,
        "product": product / bytes_each,
        "products": found.num_matvecs,
        "converged": int(found.converged.sum()),
        "off": off(found.eigenvalues, np.sort(np.abs(wide.eigenvalues))),
    }


def memory(table, vectors, sizes, k):
    """The resident set of the solver under a budget of bytes."""
    name = f"top {k} within {vectors} vectors"
    heading(f"{name}: an MLP {sizes}")
    if not can_measure_memory():
        return
    got = child("memory_child", vectors=vectors, sizes=sizes, k=k)
    print(f"  n = {got['n']}: {got['products']} products, {got['converged']} converged; a product "
          f"alone takes {got['product']:.1f} vectors")  # fmt: skip
    table.at_most(
        f"{name}: peak in vectors, less a product's", got["used"] - got["product"], vectors
    )
    table.at_most(f"{name}: values off those of a basis of {8 * k}", got["off"], 1e-4)


def scaling_child(sizes, steps):
    out = []
    for n in sizes:
        operator = diagonal_operator(n)

        def solve(operator=operator):
            return krylov.eigsh(
                operator, 1, key=jax.random.key(0), tol=1e-6, basis_size=steps, confirm=0,
                max_matvecs=steps, verify=False, progress=False,
            ).eigenvectors  # fmt: skip

        jax.block_until_ready(solve())
        used, _ = growth(solve)
        out.append(
            {"n": n, "vectors": used / (4 * n), "seconds": min(ours(solve)() for _ in range(3))}
        )
    return out


def scaling(table, sizes, steps=20):
    """Time and memory over two decades of n."""
    heading(f"scaling: {steps} steps on diagonal matrices")
    if not can_measure_memory():
        return
    got = child("scaling_child", sizes=sizes, steps=steps)
    for row in got:
        print(f"  n = {row['n']:9}: {row['seconds']:6.2f} s CPU, {row['vectors']:.1f} vectors")
    logs = np.log([[row["n"], row["seconds"]] for row in got])
    slope = np.polyfit(logs[:, 0], logs[:, 1], 1)[0]
    table.at_most("scaling: |slope of log time in log n - 1|", abs(slope - 1), 0.1)
    claim = f"scaling: peak in vectors, {steps} steps, n = {sizes[-1]}"
    table.tell(f"{claim}, with what malloc keeps", got[-1]["vectors"])
    got = child("scaling_child", NOTHING_KEPT, sizes=sizes[-1:], steps=steps)
    table.at_most(claim, got[-1]["vectors"], steps + 4)


RESNET18 = {"conv1": (3, 3, 3, 64), "out": (512, 10)} | {
    f"stage{i}.{j}.conv{c}": (3, 3, 64 * 2 ** max(0, i - ((i > 0) & (j + c == 0))), 64 * 2**i)
    for i in range(4) for j in range(2) for c in range(2)
} | {
    f"stage{i}.short": (1, 1, 32 * 2**i, 64 * 2**i) for i in range(1, 4)
}  # fmt: skip


def resnet18_params():
    """The shapes of a ResNet-18 for CIFAR, with a scale and a shift after each convolution."""
    rng = np.random.default_rng(3)
    params = {}
    for name, shape in RESNET18.items():
        params[f"{name}.weight"] = dense(rng, int(np.prod(shape[:-1])), shape[-1]).reshape(shape)
        params[f"{name}.scale"] = np.ones(shape[-1], np.float32)
        params[f"{name}.shift"] = np.zeros(shape[-1], np.float32)
    return {name: jnp.asarray(p) for name, p in params.items()}


def resnet18_loss(params, batch):
    """The mean cross-entropy; each channel is normalised over the pixels of its picture."""

    def conv(name, x, stride=1):
        x = jax.lax.conv_general_dilated(
            x, params[f"{name}.weight"], (stride, stride), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        x = x - x.mean((1, 2), keepdims=True)
        x = x * jax.lax.rsqrt((x**2).mean((1, 2), keepdims=True) + 1e-5)
        return x * params[f"{name}.scale"] + params[f"{name}.shift"]

    x = jax.nn.gelu(conv("conv1", batch["x"]))
    for i in range(4):
        for j in range(2):
            stride = 2 if i and not j else 1
            h = jax.nn.gelu(conv(f"stage{i}.{j}.conv0", x, stride))
            h = conv(f"stage{i}.{j}.conv1", h)
            x = jax.nn.gelu(h + (conv(f"stage{i}.short", x, 2) if stride == 2 else x))
    z = x.mean((1, 2)) @ params["out.weight"] * params["out.scale"] + params["out.shift"]
    return -jnp.take_along_axis(jax.nn.log_softmax(z), batch["labels"][:, None], 1).mean()


def resnet_child(memory_bytes, k, true):
    params = resnet18_params()
    n = tree.size(params)
    if true:
        rng = np.random.default_rng(0)
        data = {
            "x": rng.normal(size=(4, 32, 32, 3)).astype(np.float32),
            "labels": rng.integers(10, size=4).astype(np.int32),
        }
        operator = hessian.hessian(resnet18_loss, params, batches.split(data, 4))
        rest = {"max_matvecs": 2 * k + 10}
    else:
        # Thirty outliers, each nine tenths of the one before, over a bulk.
        spread = np.random.default_rng(1).uniform(-1, 1, n).astype(np.float32) ** 3
        spread[:: n // 30][:30] = 20 * 0.9 ** np.arange(len(spread[:: n // 30][:30]))
        ends = np.cumsum([p.size for p in jax.tree.leaves(params)])[:-1]
        parts = zip(np.split(spread, ends), jax.tree.leaves(params), strict=True)
        leaves = [jnp.asarray(part.reshape(p.shape)) for part, p in parts]
        diagonal = jax.tree.unflatten(jax.tree.structure(params), leaves)
        times = jax.jit(functools.partial(jax.tree.map, jnp.multiply))
        operator = krylov.Operator(functools.partial(times, diagonal), diagonal)
        rest = {}
    start = operator.random(jax.random.key(1))
    jax.block_until_ready(operator.matvec(start))
    product, _ = growth(functools.partial(operator.matvec, start))
    del start

    def solve(**options):
        found = krylov.eigsh(
            operator, k, key=jax.random.key(0), memory_bytes=memory_bytes, progress=False, **options
        )
        return found.eigenvectors, found

    solve(max_matvecs=k, confirm=0, verify=False)  # compiles
    used, (_, found) = growth(functools.partial(solve, **rest))
    return {
        "n": n, "used": used, "product": product, "products": found.num_matvecs,
        "converged": int(found.converged.sum()),
    }  # fmt: skip


def resnet(table, memory_bytes, k):
    """The top pairs of what has the shapes of a ResNet-18, by restarts within some memory."""
    name = f"ResNet-18: top {k} within {memory_bytes / 1e9:g} GB"
    heading(name)
    if not can_measure_memory():
        return
    for what, true in (("a diagonal in its shapes", False), ("its Hessian on 4 pictures", True)):
        got = child("resnet_child", NOTHING_KEPT, memory_bytes=memory_bytes, k=k, true=true)
        print(f"  {what}: n = {got['n']}, {got['products']} products, {got['converged']} "
              f"converged; a product alone takes {got['product'] / 1e9:.2f} GB")  # fmt: skip
        table.at_most(
            f"{name}: {what}: peak in GB, less a product's",
            (got["used"] - got["product"]) / 1e9,
            memory_bytes / 1e9,
        )


def start_child(folder, name):
    stored = dict(np.load(pathlib.Path(folder) / f"{name}.npz"))
    params = {str(n): stored[f"p:{n}"] for n in stored["names"]}
    problem = Problem(name, str(stored["kind"]), params, stored["x"], stored["labels"],
                      int(stored["batch_size"]))  # fmt: skip
    run = ours(
        lambda: (
            krylov.eigsh(
                problem.hessian, 5, key=jax.random.key(0), max_matvecs=20, progress=False
            ).eigenvectors
        )
    )
    return run() - run()


def starts(table, problem, folder, limit):
    """What compiling the first solve costs, and in a second process with jax's cache on disk."""
    name = f"{problem.name}: first solve"
    heading(name)
    with tempfile.TemporaryDirectory() as cache:
        env = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        cold, warm = (
            child("start_child", env, folder=str(folder), name=problem.name) for _ in range(2)
        )
    table.at_most(f"{name}: compilation, CPU s", cold, limit)
    table.at_most(f"{name}: the same with a cache on disk", warm, 3)


# ----------------------------------------------------------------------------------- the program


def machine():
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "a CPU")
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{name}, {os.cpu_count()} cores{load}"


def measure(table, folder, peers, rounds, quick):
    pictures, labels = images("mnist")
    wide = Problem("MLP-670k", "mlp", mlp_params([784, 512, 512, 10]),
                   pictures[:128].reshape(128, -1), labels[:128], 128)  # fmt: skip
    lm = Problem("LM-861k", "lm", lm_params(), *text_batch(4), 4)
    few = mnist_mlp("MLP-86k", [784, 100, 64, 10], 300, 1024)
    sizes = [49, 16, 12, 10] if quick else [49, 30, 14, 10]
    small = mnist_mlp("MLP-small", sizes, 600, 1024, pool=4)
    pictures, labels = images("cifar10")
    cnn = Problem("CNN-291k", "cnn", cnn_params(), pictures[:8], labels[:8], 8)
    for problem in (wide, lm, few, cnn):
        problem.save(folder)

    def part(measure, *args, **options):
        with contextlib.suppress(Another):
            measure(table, *args, **options)

    part(one_batch_products, wide, peers, rounds, cost=2.3, faster=1.15, count=2.1, count_of_4=1.7)
    part(one_batch_products, lm, peers, rounds, cost=3.0, faster=1.15, count=2.7, count_of_4=2.2)
    if not quick:
        part(
            one_batch_products, cnn, peers, rounds,
            cost=2.5, faster=1.6, count=2.7, count_of_4=2.2,
        )  # fmt: skip
    part(full_data_product, few, peers, rounds)
    part(gauss_newton, lm, peers, rounds)
    part(cross_entropy, peers, 64 if quick else 512)
    for k in (5,) if quick else (5, 20):
        part(eigenpairs, few, peers, k, 2 if quick else max(3, rounds // 2))
    if quick:
        part(orthogonalization, peers, 100_000, 30)
        part(density_time, few, peers, 2, 20)
        part(memory, 50, [784, 512, 512, 10], 5)
    else:
        part(orthogonalization, peers, 400_000, 60)
        part(density_time, few, peers, 10, 80)
        part(memory, 67, [784, 1024, 1024, 10], 20)
        part(scaling, [100_000, 400_000, 1_600_000, 6_400_000])
        part(resnet, 2e9, 20)
        part(starts, few, folder, 8)
        part(starts, cnn, folder, 25)
    matrix, values = small_matrix(small, folder)
    part(density_error, matrix, values, peers, 2 if quick else 5)
    counts, trials = ((24, 40, 60), 20) if quick else ((24, 40, 60, 99), 50)
    part(traces, "matrix", matrix, peers, counts, trials)
    part(traces, "decaying", decaying_matrix(folder), peers, counts, trials, limit=40)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less of it, and smaller")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True,
                        help="measure the other libraries beside ours")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME",
                        help="the parts whose heading has this in it")  # fmt: skip
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        request = json.loads(options.child)
        print(json.dumps(globals()[request.pop("what")](**request)))
        return
    print(
        f"jax {jax.__version__}, Python {sys.version.split()[0]}, {machine()}; one core, one thread"
    )
    ONLY.extend(options.only)
    table, peers = Table(), None
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if options.peers:
            peers = Peers(folder)
            if not (peers.has("torch") and peers.has("hessian-eigenthings")):
                print("  without torch and hessian-eigenthings: our side alone")
                peers.close()
                peers = None
        rounds = min(options.rounds, 5) if options.quick else options.rounds
        measure(table, folder, peers, rounds, options.quick)
        if peers:
            peers.close()
    ONLY.clear()
    heading(f"all of it, on {machine()}")
    raise SystemExit(0 if table.show() else 1)


if __name__ == "__main__":
    main()
