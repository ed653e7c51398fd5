"""Random networks of some twenty kinds of layers, some of them hostile to any symmetry."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from networks import conv


def _dense(rng, p, c):
    n = int(rng.integers(2, 7))
    p |= {"w": (c, n), "b": (n,)}
    act = [jnp.tanh, jax.nn.relu, jax.nn.gelu][rng.integers(3)]
    return n, lambda q, x: act(x @ q["w"] + q["b"][None, None])


def _first(rng, p, c):
    n = int(rng.integers(3, 7))
    p |= {"w": (c, n), "b": (n,)}
    return n, lambda q, x: jnp.sin(x @ q["w"] + q["b"][None, None])


def _residual(rng, p, c):
    p |= {"w1": (c, 5), "b1": (5,), "w2": (5, c)}
    return c, lambda q, x: x + jnp.tanh(x @ q["w1"] + q["b1"][None, None]) @ q["w2"]


def _layer_norm(rng, p, c):
    p |= {"scale": (c,), "b": (c,)}

    def apply(q, x):
        x = x - x.mean(-1, keepdims=True)
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 0.1)
        return x * q["scale"][None, None] + q["b"][None, None]

    return c, apply


def _group_norm(rng, p, c):
    groups = next(g for g in (3, 2, 1) if c % g == 0)
    p |= {"scale": (c,)}

    def apply(q, x):
        y = x.reshape(*x.shape[:2], groups, c // groups)
        y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 0.1)
        return y.reshape(x.shape) * q["scale"][None, None]

    return c, apply


def _glu(rng, p, c):
    p |= {"w": (c, 8), "b": (8,)}

    def apply(q, x):
        gate, up = jnp.split(x @ q["w"] + q["b"][None, None], 2, axis=-1)
        return jax.nn.sigmoid(gate) * up

    return 4, apply


def _concatenate(rng, p, c):
    p |= {"w": (c, 3)}
    return c + 3, lambda q, x: jnp.concatenate([x, jnp.tanh(x @ q["w"])], axis=-1)


def _attention(rng, p, c):
    p |= {"q": (c, 2, 3), "k": (c, 2, 3), "v": (c, 2, 3), "o": (2, 3, c)}

    def apply(q, x):
        query, key, value = (jnp.einsum("btc,chd->bthd", x, q[n]) for n in "qkv")
        w = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key))
        return x + jnp.einsum("bhqk,bkhd,hdc->bqc", w, value, q["o"])

    return c, apply


def _conv(rng, p, c):
    p |= {"w": (3, c, 4)}
    return 4, lambda q, x: jnp.tanh(conv(x, q["w"]))


def _grouped_conv(rng, p, c):
    groups = next(g for g in (c, 2, 1)[rng.integers(2) :] if c % g == 0)
    n = groups * int(rng.integers(1, 3))
    p |= {"w": (3, c // groups, n)}
    return n, lambda q, x: jnp.tanh(conv(x, q["w"], feature_group_count=groups))


def _scanned_layers(rng, p, c):
    p |= {"w1": (3, c, 4), "b1": (3, 4), "w2": (3, 4, c)}

    def apply(q, x):
        def layer(x, r):
            return x + jnp.tanh(x @ r["w1"] + r["b1"][None, None]) @ r["w2"], None

        return lax.scan(layer, x, q)[0]

    return c, apply


def _recurrent(rng, p, c):
    p |= {"wi": (c, 4), "wh": (4, 4), "b": (4,)}

    def apply(q, x):
        def step(h, x):
            h = jnp.tanh(x @ q["wi"] + h @ q["wh"] + q["b"][None])
            return h, h

        start = jnp.zeros((x.shape[0], 4), x.dtype)
        return lax.scan(step, start, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return 4, apply


def _experts(rng, p, c):
    p |= {"r": (c, 3), "w1": (3, c, 4), "w2": (3, 4, c)}

    def apply(q, x):
        h = jnp.tanh(jnp.einsum("btc,ecf->btef", x, q["w1"]))
        y = jnp.einsum("btef,efc->btec", h, q["w2"])
        return jnp.einsum("btec,bte->btc", y, jax.nn.softmax(x @ q["r"]))

    return c, apply


def _padded(rng, p, c):
    low, high = (int(n) for n in rng.integers(0, 3, 2))
    return c + low + high, lambda q, x: jnp.pad(x, ((0, 0), (0, 0), (low, high)))


def _sliced(rng, p, c):
    start, stop = sorted(int(n) for n in rng.choice(c + 1, 2, replace=False))
    return stop - start, lambda q, x: x[..., start:stop]


def _halves(rng, p, c):
    half = c // 2
    return half, lambda q, x: x[..., :half] * jnp.tanh(x[..., c - half :])


def _shuffled(rng, p, c):
    k = next(k for k in (3, 2, 1) if c % k == 0)

    def apply(q, x):
        y = x.reshape(*x.shape[:2], k, c // k).swapaxes(2, 3).reshape(x.shape)
        return x + y if rng_add else y

    rng_add = bool(rng.integers(2))
    return c, apply


def _moved(rng, p, c):
    """Channels are read by their position."""
    kind = int(rng.integers(5))

    def apply(q, x):
        if kind == 0:
            return jnp.flip(x, -1)
        if kind == 1:
            return x + jnp.roll(x, 1, -1)
        if kind == 2:
            return jnp.cumsum(x, -1)
        if kind == 3:
            return jnp.sort(x, -1)
        return jnp.take(x, np.arange(c)[::-1].copy(), axis=-1) * x

    return c, apply


def _constant(rng, p, c):
    shape = [(1, 1, c), (1, 4, 1), (1, 4, c)][rng.integers(3)]
    array = rng.standard_normal(shape)
    return c, lambda q, x: jnp.where(jnp.asarray(array > 0), x, jnp.asarray(array, x.dtype))


def _tokens_mixed(rng, p, c):
    p |= {"w": (4, 4)}
    return c, lambda q, x: x + jnp.tanh(jnp.einsum("btc,ts->bsc", x, q["w"]))


def _excited(rng, p, c):
    p |= {"w1": (c, 3), "w2": (3, c)}

    def apply(q, x):
        gate = jax.nn.sigmoid(jax.nn.relu(x.mean(1) @ q["w1"]) @ q["w2"])
        return x * gate[:, None]

    return c, apply


def _table(rng, p, c):
    rows = rng.integers(0, 5, 4)
    p |= {"table": (5, c)}
    return c, lambda q, x: x + jnp.take(q["table"], rows, axis=0)[None]


LAYERS = (
    _dense,
    _dense,
    _residual,
    _layer_norm,
    _group_norm,
    _glu,
    _concatenate,
    _attention,
    _conv,
    _grouped_conv,
    _scanned_layers,
    _recurrent,
    _experts,
    _padded,
    _sliced,
    _halves,
    _shuffled,
    _moved,
    _constant,
    _tokens_mixed,
    _excited,
    _table,
)


def graph(seed):
    """`(shapes, apply)` of a random network on inputs (2, 4, 3)."""
    rng = np.random.default_rng(seed)
    shapes: dict = {}
    c, layers = 3, []

    def add(make, name):
        nonlocal c
        own: dict = {}
        c, apply = make(rng, own, c)
        shapes.update({f"{name}.{k}": v for k, v in own.items()})
        layers.append((list(own), name, apply))

    # The outputs see the first layer too, lest a later one that is dead leave rounding alone.
    add(_first, "first")
    first = c
    for i in range(int(rng.integers(1, 5))):
        make = LAYERS[rng.integers(len(LAYERS))]
        if make in (_sliced, _halves) and c < 3:
            continue
        add(make, f"{i}{make.__name__}")
    shapes |= {"skip": (first, 2), "out": (c, 2)}

    def apply(params, x):
        start = x
        for keys, name, layer in layers:
            x = layer({k: params[f"{name}.{k}"] for k in keys}, x)
            start = x if name == "first" else start
        return x.mean(1) @ params["out"] + jnp.tanh(start).mean(1) @ params["skip"]

    return shapes, apply


def batch(seeds, dtype):
    """Many random networks as one function of `{seed: parameters}`, for one compilation."""
    made = {f"{seed:04d}": graph(seed) for seed in seeds}
    rng = np.random.default_rng(0)
    params = {
        name: {k: (rng.standard_normal(s) / s[0] ** 0.5).astype(dtype) for k, s in shapes.items()}
        for name, (shapes, _) in made.items()
    }

    def apply(params, x):
        return {name: apply(params[name], x) for name, (_, apply) in made.items()}

    return apply, params, rng.standard_normal((2, 4, 3)).astype(dtype)
