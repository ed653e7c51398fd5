"""Small networks as plain functions, each with parameters and inputs, for the tests of symmetry."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from geojax import models


class Network(NamedTuple):
    apply_fn: Any
    params: Any
    inputs: tuple


def filled(shapes, seed=0):
    """Generic concrete values for a pytree of shapes; positive where a name says scale or var."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        x = rng.standard_normal(leaf.shape)
        if "var" in name or "scale" in name:
            x = np.exp(0.3 * x)
        elif len(leaf.shape) > 1:
            x = x / np.sqrt(np.prod(leaf.shape[:-1]))
        return x.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def shapes(**named):
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in named.items()}


def plain(apply_fn, named, *inputs):
    rng = np.random.default_rng(1)
    arrays = tuple(rng.standard_normal(shape).astype(np.float32) for shape in inputs)
    return Network(apply_fn, filled(named), arrays)


@functools.cache
def model(name, inputs, **options):
    """A network of the registry, of parameters and state together."""
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    made = models.build(name, **options)
    rng = np.random.default_rng(1)
    if name == "gpt":
        x = rng.integers(0, options["vocab_size"], inputs).astype(np.int32)
    else:
        x = rng.standard_normal(inputs).astype(np.float32)
    params, state = jax.eval_shape(made.init, jax.random.key(0), x)

    def apply_fn(variables, x):
        return made.apply(variables["params"], variables["state"], x, False)[0]

    return Network(apply_fn, filled({"params": params, "state": state}), (x,))


def conv(x, kernel, stride=1, **options):
    strides = (stride,) * (x.ndim - 2)
    spatial = "DHW"[-(x.ndim - 2) :]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    return lax.conv_general_dilated(
        x, kernel, strides, "SAME", dimension_numbers=numbers, **options
    )


@functools.cache
def lstm():
    def apply_fn(p, xs):
        def step(carry, x):
            h, c = carry
            gates = x @ p["wi"] + h @ p["wh"] + p["b"][None]
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        start = jnp.zeros((xs.shape[1], p["wh"].shape[0]), xs.dtype)
        _, hs = lax.scan(step, (start, start), xs)
        return hs @ p["out"]

    named = shapes(wi=(3, 24), wh=(6, 24), b=(24,), out=(6, 2))
    return plain(apply_fn, named, (4, 2, 3))


@functools.cache
def gru():
    def apply_fn(p, xs):
        def step(h, x):
            r, z = jnp.split(jax.nn.sigmoid(x @ p["wg"] + h @ p["ug"]), 2, axis=-1)
            new = jnp.tanh(x @ p["wn"] + r * (h @ p["un"]) + p["b"][None])
            return z * h + (1 - z) * new, None

        h, _ = lax.scan(step, jnp.zeros((xs.shape[1], 5), xs.dtype), xs)
        return h @ p["out"]

    named = shapes(wg=(3, 10), ug=(5, 10), wn=(3, 5), un=(5, 5), b=(5,), out=(5, 2))
    return plain(apply_fn, named, (4, 2, 3))


@functools.cache
def elman():
    def apply_fn(p, xs):
        start = jnp.zeros((xs.shape[1], 6), xs.dtype)
        h, _ = lax.scan(
            lambda h, x: (jnp.tanh(x @ p["wi"] + h @ p["wh"] + p["b"][None]), None), start, xs
        )
        return h @ p["out"]

    return plain(apply_fn, shapes(wi=(3, 6), wh=(6, 6), b=(6,), out=(6, 2)), (4, 2, 3))


@functools.cache
def loops():
    """A while loop and a branch."""

    def apply_fn(p, x):
        h = jnp.tanh(x @ p["w"])
        h = lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["m"]) + h, h)
        h = lax.cond(x.sum() > 0, lambda h: h * p["s"][None], lambda h: h - p["t"][None], h)
        return h @ p["v"]

    return plain(apply_fn, shapes(w=(3, 5), m=(5, 5), s=(5,), t=(5,), v=(5, 2)), (4, 3))


@functools.cache
def scanned_layers():
    def apply_fn(p, x):
        x = x @ p["in"]

        def layer(x, q):
            return x + jnp.tanh(x @ q["w1"] + q["b1"][None]) @ q["w2"], None

        x, _ = lax.scan(layer, x, p["layers"])
        return x @ p["out"]

    layers = shapes(w1=(3, 4, 6), b1=(3, 6), w2=(3, 6, 4))
    named = {"in": shapes(w=(3, 4))["w"], "layers": layers, "out": shapes(w=(4, 2))["w"]}
    return plain(apply_fn, named, (5, 3))


@functools.cache
def scanned_heads():
    """Heads in scanned layers: a group that depends on another and on the layer."""

    def apply_fn(p, x):
        x = x @ p["in"]

        def layer(x, q):
            query, key, value = (jnp.einsum("btd,dhk->bthk", x, q[n]) for n in "qkv")
            w = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key))
            mixed = jnp.einsum("bhqk,bkhd->bqhd", w, value)
            return x + jnp.einsum("bqhd,hdm->bqm", mixed, q["o"]), None

        x, _ = lax.scan(layer, x, p["layers"])
        return x @ p["out"]

    layers = shapes(q=(2, 4, 3, 5), k=(2, 4, 3, 5), v=(2, 4, 3, 6), o=(2, 3, 6, 4))
    named = {"in": shapes(w=(3, 4))["w"], "layers": layers, "out": shapes(w=(4, 2))["w"]}
    return plain(apply_fn, named, (2, 4, 3))


@functools.cache
def fused_attention():
    """Queries, keys and values in one kernel."""

    def apply_fn(p, x):
        x = x @ p["in"]
        batch, length, _ = x.shape
        q, k, v = (y.reshape(batch, length, 2, 4) for y in jnp.split(x @ p["qkv"], 3, axis=-1))
        w = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", w, v).reshape(batch, length, 8)
        return mixed @ p["o"] @ p["out"]

    named = shapes(qkv=(6, 24), o=(8, 6), out=(6, 2)) | {"in": shapes(w=(3, 6))["w"]}
    return plain(apply_fn, named, (2, 4, 3))


@functools.cache
def fused_glu():
    def apply_fn(p, x):
        gate, up = jnp.split(x @ p["w"] + p["b"][None], 2, axis=-1)
        return (jax.nn.silu(gate) * up) @ p["v"]

    return plain(apply_fn, shapes(w=(3, 12), b=(12,), v=(6, 2)), (4, 3))


@functools.cache
def experts():
    """A dense mixture: softmax router, every expert on every token."""

    def apply_fn(p, x):
        x = x @ p["in"]
        gates = jax.nn.softmax(x @ p["router"])
        h = jnp.tanh(jnp.einsum("bd,edf->bef", x, p["w1"]) + p["b1"][None])
        y = jnp.einsum("bef,efd->bed", h, p["w2"])
        return (x + jnp.einsum("be,bed->bd", gates, y)) @ p["out"]

    named = shapes(router=(4, 5), w1=(5, 4, 6), b1=(5, 6), w2=(5, 6, 4), out=(4, 2))
    return plain(apply_fn, named | {"in": shapes(w=(3, 4))["w"]}, (5, 3))


@functools.cache
def dense_net():
    def apply_fn(p, x):
        x = conv(x, p["c0"])
        for i in range(3):
            y = conv(jax.nn.relu(x * p[f"scale{i}"].reshape(1, 1, 1, -1)), p[f"c{i + 1}"])
            x = jnp.concatenate([x, y], axis=-1)
        return x.mean((1, 2)) @ p["out"]

    named = shapes(
        c0=(3, 3, 3, 4), c1=(3, 3, 4, 3), c2=(3, 3, 7, 3), c3=(3, 3, 10, 3), out=(13, 2)
    ) | shapes(scale0=(4,), scale1=(7,), scale2=(10,))
    return plain(apply_fn, named, (2, 4, 4, 3))


@functools.cache
def u_net():
    def apply_fn(p, x):
        top = jax.nn.relu(conv(x, p["c0"]))
        low = jax.nn.relu(conv(top, p["c1"], 2))
        up = lax.conv_transpose(low, p["up"], (2, 2), "SAME")
        x = jnp.concatenate([top, jax.nn.relu(up)], axis=-1)
        x = jax.nn.relu(conv(x, p["c2"]))
        # What was joined is cut apart again, elsewhere.
        return conv(x[..., :2] * x[..., 3:5], p["out"])

    named = shapes(
        c0=(3, 3, 3, 4), c1=(3, 3, 4, 5), up=(2, 2, 5, 3), c2=(3, 3, 7, 6), out=(1, 1, 2, 2)
    )
    return plain(apply_fn, named, (2, 4, 4, 3))


@functools.cache
def flattened():
    """Depthwise convolution, pooling, then 4x4 positions flattened into a dense layer."""

    def apply_fn(p, x):
        x = jax.nn.relu(conv(x, p["c0"]))
        x = jax.nn.relu(conv(x, p["depthwise"], feature_group_count=4))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return x.reshape(x.shape[0], -1) @ p["out"]

    named = shapes(c0=(3, 3, 3, 4), depthwise=(3, 3, 1, 4), out=(64, 2))
    return plain(apply_fn, named, (2, 8, 8, 3))


@functools.cache
def grouped():
    def apply_fn(p, x):
        x = jax.nn.relu(conv(x, p["c0"]))
        x = jax.nn.relu(conv(x, p["g"], feature_group_count=4))
        return conv(x, p["c1"]).mean((1, 2))

    named = shapes(c0=(3, 3, 3, 8), g=(3, 3, 2, 12), c1=(1, 1, 12, 2))
    return plain(apply_fn, named, (2, 4, 4, 3))


@functools.cache
def other_convs():
    """Transposed, dilated, one- and three-dimensional."""

    def apply_fn(p, x, y, z):
        x = lax.conv_transpose(jax.nn.relu(conv(x, p["a0"])), p["a1"], (2, 2), "SAME")
        x = conv(jnp.tanh(x), p["a2"], rhs_dilation=(2, 2))
        y = conv(jnp.tanh(conv(y, p["b0"])), p["b1"])
        z = conv(jnp.tanh(conv(z, p["c0"])), p["c1"])
        return x, y, z

    named = shapes(a0=(3, 3, 3, 4), a1=(2, 2, 4, 5), a2=(3, 3, 5, 2)) | shapes(
        b0=(3, 2, 4), b1=(3, 4, 2), c0=(2, 2, 2, 2, 3), c1=(2, 2, 2, 3, 2)
    )
    return plain(apply_fn, named, (2, 4, 4, 3), (2, 6, 2), (2, 3, 3, 3, 2))


@functools.cache
def shuffled():
    """Two grouped convolutions with a channel shuffle between."""

    def apply_fn(p, x):
        x = jax.nn.relu(conv(x, p["c0"]))
        x = conv(x, p["g"], feature_group_count=2)
        n, h, w, _ = x.shape
        x = x.reshape(n, h, w, 2, 4).swapaxes(3, 4).reshape(n, h, w, 8)
        x = jax.nn.relu(conv(x, p["g2"], feature_group_count=2))
        return conv(x, p["c1"]).mean((1, 2))

    named = shapes(c0=(3, 3, 3, 8), g=(3, 3, 4, 8), g2=(3, 3, 4, 8), c1=(1, 1, 8, 2))
    return plain(apply_fn, named, (2, 4, 4, 3))


@functools.cache
def zero_padded():
    """A shortcut that widens by zero channels."""

    def apply_fn(p, x):
        x = conv(x, p["c0"])
        x = x + conv(jax.nn.relu(conv(x, p["a1"])), p["a2"])
        y = conv(jax.nn.relu(conv(x, p["b1"], 2)), p["b2"])
        x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2))) + y
        return jax.nn.relu(x).mean((1, 2)) @ p["out"]

    named = shapes(
        c0=(3, 3, 3, 4), a1=(3, 3, 4, 5), a2=(3, 3, 5, 4), b1=(3, 3, 4, 6), b2=(3, 3, 6, 8)
    ) | shapes(out=(8, 2))
    return plain(apply_fn, named, (2, 4, 4, 3))


@functools.cache
def channel_mean():
    """Nothing but a mean reads the last channels."""

    def apply_fn(p, x):
        return jnp.tanh(conv(jnp.tanh(conv(x, p["a"])), p["b"])).mean((1, 2, 3))

    return plain(apply_fn, shapes(a=(3, 3, 3, 4), b=(3, 3, 4, 5)), (2, 4, 4, 3))


@functools.cache
def norms():
    """Weight, instance and RMS normalization, and batch normalization on its own statistics."""

    def apply_fn(p, x):
        kernel = p["w"] / jnp.sqrt(jnp.square(p["w"]).sum((0, 1, 2), keepdims=True))
        x = conv(x, kernel * p["g"].reshape(1, 1, 1, -1))
        x = x - x.mean((1, 2), keepdims=True)
        x = jax.nn.relu(x * lax.rsqrt(jnp.square(x).mean((1, 2), keepdims=True) + 1e-3))
        x = conv(x, p["v"])
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3)
        x = jax.nn.relu(x * p["rms"].reshape(1, 1, 1, -1))
        x = conv(x, p["u"])
        x = x - x.mean((0, 1, 2), keepdims=True)
        x = jax.nn.relu(x * lax.rsqrt(jnp.square(x).mean((0, 1, 2), keepdims=True) + 1e-3))
        return x.mean((1, 2)) @ p["out"]

    named = shapes(w=(3, 3, 3, 4), g=(4,), v=(3, 3, 4, 5), rms=(5,), u=(3, 3, 5, 6), out=(6, 2))
    return plain(apply_fn, named, (3, 4, 4, 3))


def llama():
    return model(
        "gpt",
        (2, 6),
        vocab_size=11,
        max_length=6,
        width=24,
        num_layers=1,
        num_heads=6,
        num_kv_heads=3,
        mlp_width=10,
        positions="rope",
        mlp="swiglu",
        norm="rms",
        bias=False,
        tied=False,
    )


def gpt():
    return model(
        "gpt", (2, 6), vocab_size=11, max_length=9, width=12, num_layers=2, num_heads=3, mlp_width=7
    )


def vit():
    return model("vit", (2, 8, 8, 3), patch_size=4, width=12, num_layers=1, num_heads=3, pool="cls")


def mlp():
    return model("mlp", (4, 5), widths=(8, 6), num_classes=3)


def vgg():
    return model("vgg16", (2, 32, 32, 3), width_multiplier=1 / 16)


def resnet(norm):
    return model("cifar_resnet", (2, 8, 8, 3), depth=8, norm=norm)


# Each with the sizes of its groups, and of what they depend on.
PLAIN = (
    lstm,
    gru,
    elman,
    loops,
    scanned_layers,
    scanned_heads,
    fused_attention,
    fused_glu,
    experts,
    dense_net,
    u_net,
    flattened,
    grouped,
    other_convs,
    shuffled,
    zero_padded,
    channel_mean,
    norms,
)
MODELS = {
    "mlp": mlp,
    "vgg": vgg,
    "resnet-layer": functools.partial(resnet, "layer"),
    "resnet-batch": functools.partial(resnet, "batch"),
    "resnet-group": functools.partial(resnet, "group"),
    "gpt": gpt,
    "llama": llama,
    "vit": vit,
}
