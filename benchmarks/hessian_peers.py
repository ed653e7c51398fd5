"""The other side of `hessian.py`: PyTorch and matfree, in an environment of their own.

The benchmark starts this file there and asks it, by JSON lines, for one timed product or one
answer at a time, so that both sides run interleaved. Every network is written twice below, for
`jax.numpy` and for torch, with the same names and the same order of parameters.
"""

import json
import math
import os
import sys
import time

import numpy as np

HEADS = 4


def timed(fn):
    """CPU seconds of all threads, and what `fn` returned."""
    start = time.process_time()
    out = fn()
    return time.process_time() - start, out


def to_torch(name, array):
    """A leaf, or stacked ones of one axis more, in torch's layout."""
    dense = name.endswith(".weight") and not name.startswith(("embed", "position", "norm"))
    if "conv" in name and dense:
        return np.moveaxis(array, (-1, -2), (-4, -3))
    if dense and ".norm" not in name:
        return np.swapaxes(array, -1, -2)
    return array


def flat(tree, names):
    """The vector that torch's parameters make, one after another."""
    return np.concatenate([to_torch(n, np.asarray(tree[n])).ravel() for n in names])


# ------------------------------------------------------------------------ the networks, in jax


def jax_network(kind):
    """`logits(params, x)`, for parameters in a flat dict."""
    import jax
    import jax.numpy as jnp

    def mlp(params, x):
        last = max(int(name.split(".")[0]) for name in params)
        for i in range(0, last + 1, 2):
            x = x @ params[f"{i}.weight"] + params[f"{i}.bias"]
            x = jnp.tanh(x) if i < last else x
        return x

    def cnn(params, x):
        for i in range(3):
            x = jax.lax.conv_general_dilated(
                x,
                params[f"conv{i}.weight"],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.gelu(x + params[f"conv{i}.bias"])
            n, h, w, c = x.shape
            x = x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
        x = x.reshape(len(x), -1)
        x = jax.nn.gelu(x @ params["hidden.weight"] + params["hidden.bias"])
        return x @ params["out.weight"] + params["out.bias"]

    def norm(x, scale):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    def lm(params, tokens):
        batch, length = tokens.shape
        x = params["embed.weight"][tokens] + params["position.weight"]
        seen = np.tril(np.ones((length, length), bool))
        for i in range(sum(name.endswith("qkv.weight") for name in params)):
            p = {n.removeprefix(f"blocks.{i}."): w for n, w in params.items()}
            h = norm(x, p["norm1.weight"]) @ p["qkv.weight"]
            q, k, v = jnp.split(h.reshape(batch, length, HEADS, -1), 3, axis=-1)
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
            weights = jax.nn.softmax(jnp.where(seen, scores, -1e9))
            mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
            x = x + mixed @ p["proj.weight"]
            h = jax.nn.gelu(norm(x, p["norm2.weight"]) @ p["up.weight"])
            x = x + h @ p["down.weight"]
        return (x @ params["head.weight"]).reshape(batch * length, -1)

    return {"mlp": mlp, "cnn": cnn, "lm": lm}[kind]


def jax_loss(kind):
    """`loss(params, batch)`: the mean cross-entropy in nats."""
    import jax
    import jax.numpy as jnp

    logits = jax_network(kind)

    def loss(params, batch):
        out = jax.nn.log_softmax(logits(params, batch["x"]))
        return -jnp.take_along_axis(out, batch["labels"].reshape(-1, 1), 1).mean()

    return loss


# ---------------------------------------------------------------------- the networks, in torch


def torch_network(kind, shapes):
    """The same network as a module; `shapes` are those of the jax parameters."""
    import torch
    from torch import nn
    from torch.nn import functional

    if kind == "mlp":
        last = max(int(name.split(".")[0]) for name in shapes)
        layers = []
        for i in range(0, last + 1, 2):
            layers += [nn.Linear(*shapes[f"{i}.weight"]), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    class CNN(nn.Module):
        def __init__(self):
            super().__init__()
            for i in range(3):
                _, _, m, n = shapes[f"conv{i}.weight"]
                setattr(self, f"conv{i}", nn.Conv2d(m, n, 3, padding=1))
            self.hidden = nn.Linear(*shapes["hidden.weight"])
            self.out = nn.Linear(*shapes["out.weight"])

        def forward(self, x):
            for i in range(3):
                x = functional.gelu(getattr(self, f"conv{i}")(x), approximate="tanh")
                x = functional.avg_pool2d(x, 2)
            x = x.permute(0, 2, 3, 1).flatten(1)
            return self.out(functional.gelu(self.hidden(x), approximate="tanh"))

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm1 = nn.LayerNorm(width, bias=False)
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.proj = nn.Linear(width, width, bias=False)
            self.norm2 = nn.LayerNorm(width, bias=False)
            self.up = nn.Linear(width, 4 * width, bias=False)
            self.down = nn.Linear(4 * width, width, bias=False)

        def forward(self, x, unseen):
            batch, length, _ = x.shape
            h = self.qkv(self.norm1(x)).reshape(batch, length, HEADS, -1)
            q, k, v = h.chunk(3, dim=-1)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            mixed = torch.softmax(scores.masked_fill(unseen, -1e9), -1) @ v
            x = x + self.proj(mixed.transpose(1, 2).reshape(x.shape))
            return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class LM(nn.Module):
        def __init__(self):
            super().__init__()
            vocabulary, width = shapes["embed.weight"]
            length = shapes["position.weight"][0]
            depth = sum(name.endswith("qkv.weight") for name in shapes)
            self.embed = nn.Embedding(vocabulary, width)
            self.position = nn.Embedding(length, width)
            self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
            self.head = nn.Linear(width, vocabulary, bias=False)
            mask = torch.ones(length, length, dtype=torch.bool).triu(1)
            self.register_buffer("unseen", mask, persistent=False)

        def forward(self, tokens):
            x = self.embed(tokens) + self.position.weight
            for block in self.blocks:
                x = block(x, self.unseen)
            return self.head(x).flatten(0, 1)

    return {"cnn": CNN, "lm": LM}[kind]()


# ------------------------------------------------------------------------------------ the worker


class Problem:
    """A network with its data, in torch, and the peers' operators on it."""

    def __init__(self, path, dtype):
        import torch

        stored = dict(np.load(path))
        self.kind = str(stored["kind"])
        self.names = [str(n) for n in stored["names"]]
        self.params = {n: stored["p:" + n] for n in self.names}
        self.size = int(stored["batch_size"])
        self.x, self.labels = stored["x"], stored["labels"]
        dtype = {"float32": torch.float32, "float64": torch.float64}[dtype]
        self.model = torch_network(self.kind, {n: p.shape for n, p in self.params.items()})
        state = {n: torch.tensor(to_torch(n, p)) for n, p in self.params.items()}
        self.model.load_state_dict(state)
        self.model.to(dtype).eval()
        if [n for n, _ in self.model.named_parameters()] != self.names:
            raise ValueError(f"{path}: the parameters are not in torch's order")
        self.parameters = list(self.model.parameters())
        self.criterion = torch.nn.CrossEntropyLoss()
        self.data = []
        for i in range(0, len(self.x), self.size):
            x = torch.tensor(self.x[i : i + self.size])
            x = x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x
            x = x.to(dtype) if x.is_floating_point() else x.long()
            self.data.append((x, torch.tensor(self.labels[i : i + self.size]).long().flatten()))
        self.n = sum(p.numel() for p in self.parameters)
        self.dtype = dtype
        self.operators = {}

    def gradient(self):
        import torch

        for x, y in self.data:
            torch.autograd.grad(self.criterion(self.model(x), y), self.parameters)

    def operator(self, who):
        if who not in self.operators:
            self.operators[who] = self._operator(who)
        return self.operators[who]

    def _operator(self, who):
        if who == "hessian-eigenthings":
            import hessian_eigenthings as he

            return he.HessianOperator(self.model, self.data, he.supervised_loss(self.criterion))
        if who == "hessian-eigenthings GGN":
            import hessian_eigenthings as he

            loss = he.supervised_loss_of_output(self.criterion)
            return he.GGNOperator(self.model, self.data, he.supervised_forward, loss)
        import curvlinops

        operator = {
            "curvlinops": curvlinops.HessianLinearOperator,
            "curvlinops GGN": curvlinops.GGNLinearOperator,
        }[who]
        return operator(
            self.model, self.criterion, self.parameters, self.data, check_deterministic=False
        )

    def product(self, who, v):
        if who == "finite-difference GGN":
            return self.difference_product(v)
        return self.operator(who) @ v

    def difference_product(self, v):
        """The default Gauss-Newton product of hessian-eigenthings 1.0.0a6, which is on no registry.

        Two forward passes for J v by a central difference, the closed form, one backward pass.
        """
        import torch

        length = v.norm().clamp_min(1e-8)
        eps = 6e-6 if self.dtype == torch.float64 else 5e-3
        total = torch.zeros_like(v)
        pieces = [x.reshape(p.shape) for x, p in zip(
            (v / length).split([p.numel() for p in self.parameters]), self.parameters, strict=True
        )]  # fmt: skip
        for x, _ in self.data:
            with torch.no_grad():
                torch._foreach_add_(self.parameters, pieces, alpha=eps)
                above = self.model(x)
                torch._foreach_add_(self.parameters, pieces, alpha=-2 * eps)
                below = self.model(x)
                torch._foreach_add_(self.parameters, pieces, alpha=eps)
                u = (above - below) / (2 * eps)
            out = self.model(x)
            p = torch.softmax(out.detach(), -1)
            h = p * (u - (p * u).sum(-1, keepdim=True)) / len(u)
            found = torch.autograd.grad(out, self.parameters, h)
            total += torch.cat([g.flatten() for g in found])
        return total * length / len(self.data)


class Worker:
    """Each public method answers one request."""

    def __init__(self, folder):
        import torch

        torch.set_num_threads(1)
        self.torch = torch
        self.folder = folder
        self.problems = {}
        self.matrices = {}
        self.vectors = {}
        self.compiled = {}

    def versions(self):
        from importlib import metadata

        found = {}
        for name in ("torch", "hessian-eigenthings", "curvlinops-for-pytorch", "matfree"):
            try:
                module = name.replace("-for-pytorch", "").replace("-", "_")
                __import__(module)
                found[name] = metadata.version(name)
            except Exception as error:
                found[name] = f"not usable: {type(error).__name__}: {error}"
        return found

    def _problem(self, name, dtype="float32"):
        if (name, dtype) not in self.problems:
            path = os.path.join(self.folder, f"{name}.npz")
            self.problems[name, dtype] = Problem(path, dtype)
        return self.problems[name, dtype]

    def _vector(self, name, dtype="float32"):
        if (name, dtype) not in self.vectors:
            v = np.load(os.path.join(self.folder, f"{name}-vector.npy"))
            problem = self._problem(name, dtype)
            self.vectors[name, dtype] = self.torch.tensor(v).to(problem.dtype)
        return self.vectors[name, dtype]

    def forget(self, name):
        for table in (self.problems, self.vectors):
            for key in [k for k in table if k[0] == name]:
                del table[key]
        return True

    def gradient(self, name):
        return timed(self._problem(name).gradient)[0]

    def product(self, name, who, dtype="float32", save=None):
        problem, v = self._problem(name, dtype), self._vector(name, dtype)
        seconds, out = timed(lambda: problem.product(who, v))
        if save:
            np.save(os.path.join(self.folder, save), out.detach().numpy())
        return seconds

    # ---- eigenpairs

    def scout(self, name, k, tol, most, seed):
        """The fewest steps after which the recurrence says that all k values have converged."""
        import hessian_eigenthings as he

        operator = self._problem(name).operator("hessian-eigenthings")
        start = self.torch.randn(
            operator.size, dtype=operator.dtype, generator=self.torch.Generator().manual_seed(seed)
        )
        found = he.lanczos_tridiagonal(operator, start, most, reorthogonalize=True)
        a, b = found.alphas.double().numpy(), found.betas.double().numpy()
        for m in range(k + 1, len(a)):
            values, vectors = np.linalg.eigh(
                np.diag(a[:m]) + np.diag(b[: m - 1], 1) + np.diag(b[: m - 1], -1)
            )
            order = np.argsort(-np.abs(values))[:k]
            residuals = b[m - 1] * np.abs(vectors[-1, order])
            if (residuals <= tol * np.abs(values[order])).all():
                return m
        return None

    def lanczos(self, name, k, steps, reorthogonalize, seed, check=False):
        """Seconds; and, if asked, the values and the measured relative residuals."""
        import hessian_eigenthings as he

        operator = self._problem(name).operator("hessian-eigenthings")
        seconds, found = timed(
            lambda: he.lanczos(
                operator, k=k, max_iter=steps, tol=1e-3, reorthogonalize=reorthogonalize, seed=seed
            )
        )
        if not check:
            return {"seconds": seconds}
        return {"seconds": seconds} | self._residuals(
            operator, found.eigenvalues, found.eigenvectors
        )

    def _residuals(self, operator, values, vectors):
        residuals = []
        for value, x in zip(values, vectors, strict=True):
            x = x / x.norm()
            residuals.append(float((operator @ x - value * x).norm() / abs(value)))
        return {"values": [float(v) for v in values], "residuals": residuals}

    def arpack(self, name, k, tol, check=False):
        """SciPy's eigsh on the operator of curvlinops."""
        from scipy.sparse import linalg

        operator = self._problem(name).operator("curvlinops")
        scipy_operator = operator.to_scipy(dtype=np.float32)
        count = [0]

        def product(v):
            count[0] += 1
            return scipy_operator @ v

        counted = linalg.LinearOperator(scipy_operator.shape, matvec=product, dtype=np.float32)
        start = np.random.default_rng(0).normal(size=operator.shape[0]).astype(np.float32)
        seconds, (values, vectors) = timed(
            lambda: linalg.eigsh(counted, k, which="LM", tol=tol, v0=start)
        )
        out = {"seconds": seconds, "products": count[0]}
        if check:
            v = self.torch.tensor(np.ascontiguousarray(vectors.T))
            out |= self._residuals(operator, self.torch.tensor(values), v)
        return out

    def matfree(self, name, k, steps, check=False):
        """The partial eigendecomposition of matfree; the first call compiles."""
        import jax
        import jax.numpy as jnp
        from matfree import decomp, eig

        key = (name, steps)
        problem = self._problem(name)
        if key not in self.compiled:
            loss = jax_loss(problem.kind)
            params = {n: jnp.asarray(p) for n, p in problem.params.items()}
            shape = (len(problem.x) // problem.size, problem.size)
            data = {
                "x": jnp.asarray(problem.x.reshape(shape + problem.x.shape[1:])),
                "labels": jnp.asarray(problem.labels.reshape(shape)),
            }

            def product(v, params, data):
                def add(total, batch):
                    gradient = jax.grad(lambda p: loss(p, batch))
                    out = jax.jvp(gradient, (params,), (v,))[1]
                    return jax.tree.map(jnp.add, total, out), None

                total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, v), data)
                return jax.tree.map(lambda t: t / len(data["x"]), total)

            solve = jax.jit(eig.eigh_partial(decomp.tridiag_sym(steps)), static_argnums=0)
            rng = np.random.default_rng(0)
            start = {n: rng.normal(size=p.shape).astype(np.float32) for n, p in params.items()}
            compile_seconds, _ = timed(
                lambda: jax.block_until_ready(solve(product, start, params, data))
            )
            self.compiled[key] = (solve, product, start, params, data, compile_seconds)
        solve, product, start, params, data, compile_seconds = self.compiled[key]
        seconds, (values, vectors) = timed(
            lambda: jax.block_until_ready(solve(product, start, params, data))
        )
        out = {"seconds": seconds, "compile": compile_seconds - seconds}
        if check:
            order = np.argsort(-np.abs(np.asarray(values)))[:k]
            apply = jax.jit(product)
            residuals = []
            for i in order:
                x = {n: w[i] for n, w in vectors.items()}
                image = apply(x, params, data)
                gap = sum(float(jnp.sum((image[n] - values[i] * x[n]) ** 2)) for n in x)
                residuals.append(math.sqrt(gap) / abs(float(values[i])))
            out |= {"values": [float(values[i]) for i in order], "residuals": residuals}
        return out

    # ---- densities and traces

    def density(self, name, runs, steps, seed):
        import hessian_eigenthings as he

        operator = self._problem(name).operator("hessian-eigenthings")
        return timed(
            lambda: he.spectral_density(operator, num_runs=runs, lanczos_steps=steps, seed=seed)
        )[0]

    def _matrix(self, name):
        import hessian_eigenthings as he

        if name not in self.matrices:
            stored = np.load(os.path.join(self.folder, f"{name}.npy"))
            a = self.torch.tensor(stored.astype(np.float32))
            self.matrices[name] = a, he.LambdaOperator(lambda v: a @ v, len(a))
        return self.matrices[name]

    def quadrature(self, name, runs, steps, seed):
        """Nodes and weights of the density of a stored matrix."""
        import hessian_eigenthings as he

        found = he.spectral_density(
            self._matrix(name)[1], num_runs=runs, lanczos_steps=steps, seed=seed
        )
        nodes = np.nan_to_num(found.raw_eigenvalues.numpy())
        return {"nodes": nodes.tolist(), "weights": found.raw_weights.tolist()}

    def traces(self, name, who, products, trials):
        """Estimates of the trace of a stored matrix, one for each trial."""
        import hessian_eigenthings as he

        matrix, operator = self._matrix(name)
        if who == "curvlinops xtrace":
            from curvlinops import xtrace

            self.torch.manual_seed(0)
            return [float(xtrace(matrix, products)) for _ in range(trials)]
        method = who.split()[-1]
        return [
            he.trace(operator, num_matvecs=products, method=method, seed=1000 * i).estimate
            for i in range(trials)
        ]

    # ---- the closed form of the loss, and the basis

    def cross_entropy(self, num, classes, how):
        torch = self.torch
        z = torch.randn(num, classes, generator=torch.Generator().manual_seed(0))
        u = torch.randn(num, classes, generator=torch.Generator().manual_seed(1))
        labels = torch.arange(num)
        if how == "closed form":

            def run():
                p = torch.softmax(z, -1)
                return p * (u - (p * u).sum(-1, keepdim=True)) / num
        else:
            import hessian_eigenthings as he

            loss = he.supervised_loss_of_output(torch.nn.CrossEntropyLoss())

            def run():
                leaf = z.requires_grad_(True)
                g = torch.autograd.grad(loss(leaf, (None, labels)), leaf, create_graph=True)[0]
                return torch.autograd.grad(g, leaf, grad_outputs=u)[0]

        return timed(run)[0]

    def orthogonalize(self, n, steps):
        """Seconds of a recurrence on a diagonal matrix, of its products, and the basis's error."""
        import hessian_eigenthings as he

        torch = self.torch
        d = torch.linspace(-1, 1, n) ** 3
        operator = he.LambdaOperator(lambda v: d * v, n)
        start = torch.randn(n, generator=torch.Generator().manual_seed(0))
        seconds, found = timed(
            lambda: he.lanczos_tridiagonal(operator, start, steps, reorthogonalize=True)
        )
        products, _ = timed(lambda: [d * v for v in found.basis])
        q = torch.stack(found.basis).double()
        error = float((q @ q.T - torch.eye(len(q), dtype=q.dtype)).abs().max())
        return {"seconds": seconds - products, "error": error}


def main():
    # What the libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(worker, request.pop("what"))(**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
