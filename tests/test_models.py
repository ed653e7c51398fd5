"""The networks: published sizes, modes, options; and the adapters on modules of other people."""

import functools
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import geojax.models
from geojax import models, tree
from geojax.models import layers, transformer

# Compiling is what these tests spend their time on. This generator compiles fast, and so does XLA
# with these options (eight times as fast); where a version does not know them, it does without.
KEY, OTHER_KEY = (jax.random.key(seed, impl="unsafe_rbg") for seed in (0, 1))
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
try:
    jax.jit(lambda x: x, compiler_options=QUICK)(0.0)
except jax.errors.JaxRuntimeError:
    QUICK = {}
CIFAR = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
IMAGENET = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
PRODUCTS = ("dot_general", "conv_general_dilated")
TOKENS = jax.ShapeDtypeStruct((1, 8), jnp.int32)


def images(size, channels=3, batch=4):
    r = np.random.default_rng(1)
    return jnp.asarray(r.normal(size=(batch, size, size, channels)), jnp.float32)


def tokens(length=8, vocab_size=11, batch=2):
    r = np.random.default_rng(1)
    return jnp.asarray(r.integers(vocab_size, size=(batch, length)), jnp.int32)


def shapes_of(model, inputs):
    return jax.eval_shape(model.init, KEY, inputs)


def filled(model, inputs, seed=0, shapes=None):
    """Parameters and state of a model, drawn by NumPy: jax's own draws compile once per shape."""
    r = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if "scale" in name or "var" in name:
            return jnp.asarray(r.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        fan_in = leaf.shape[-1] if "embedding" in name else math.prod(leaf.shape[:-1]) or 1
        return jnp.asarray(r.normal(size=leaf.shape) / math.sqrt(fan_in), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes or shapes_of(model, inputs))


def jaxpr_of(model, inputs, train, key=None, shapes=None):
    params, state = shapes or shapes_of(model, inputs)
    return jax.make_jaxpr(lambda p, s, x, k: model.apply(p, s, x, train, k))(
        params, state, inputs, key
    )


def compiled(model):
    return jax.jit(model.apply, static_argnums=3, compiler_options=QUICK)


def initialized(model, inputs, key=KEY):
    return jax.jit(lambda key: model.init(key, inputs), compiler_options=QUICK)(key)


def primitives(jaxpr):
    """The name of every primitive of a jaxpr, those inside nested ones included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def assert_close(a, b, rtol=1e-5, atol=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


# ---------------------------------------------------------------------------------- the package


def test_the_package_loads_without_flax_and_says_how_to_get_it():
    program = """
import sys
import geojax.models
assert not any(name.partition(".")[0] == "flax" for name in sys.modules), "flax was loaded"
sys.modules["flax"] = None
try:
    geojax.models.build
except ImportError as error:
    assert 'pip install "geojax[examples]"' in str(error), error
else:
    raise AssertionError("no ImportError")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_no_other():
    assert set(geojax.models._HOMES) == set(geojax.models.__all__) <= set(dir(geojax.models))
    for name in geojax.models.__all__:
        assert getattr(geojax.models, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = geojax.models.nothing


# ------------------------------------------------------------------------------- published sizes


def preresnet_size(depth, classes=10):
    """By hand: bottlenecks w -> w -> 4w with a norm before each convolution."""
    n = (depth - 2) // 9
    total, channels = 27 * 16, 16
    for w in (16, 32, 64):
        for i in range(n):
            norms = 2 * channels + 2 * w + 2 * w
            total += norms + channels * w + 9 * w * w + 4 * w * w
            total += channels * 4 * w if i == 0 else 0  # every stage begins with a new shape
            channels = 4 * w
    return total + 2 * channels + channels * classes + classes


def resnet_size(depth, shortcut_kernel, classes=10):
    """By hand: basic blocks of two 3x3 convolutions, each with a norm."""
    n = (depth - 2) // 6
    total, channels = 27 * 16 + 2 * 16, 16
    for w in (16, 32, 64):
        for _ in range(n):
            total += 9 * channels * w + 9 * w * w + 4 * w
            if channels != w and shortcut_kernel:
                total += shortcut_kernel**2 * channels * w + 2 * w
            channels = w
    return total + channels * classes + classes


SIZES = [
    ("vgg16", {}, CIFAR, 15_245_130),
    ("vgg16", {"norm": "batch"}, CIFAR, 15_253_578),
    ("vgg19", {}, CIFAR, 20_554_826),
    ("wide_resnet28x10", {}, CIFAR, 36_479_194),
    ("wide_resnet28x10", {"conv_bias": True}, CIFAR, 36_489_290),
    ("resnet50", {}, IMAGENET, 25_557_032),
    ("resnet20", {"shortcut": "pad"}, CIFAR, 269_722),
    ("resnet20", {"shortcut": "1x1"}, CIFAR, resnet_size(20, 1)),
    ("resnet20", {}, CIFAR, resnet_size(20, 3)),
    ("cifar_resnet", {"depth": 32}, CIFAR, resnet_size(32, 3)),
    ("preresnet110", {}, CIFAR, preresnet_size(110)),
    ("preresnet164", {}, CIFAR, preresnet_size(164)),
    ("lenet", {}, jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32), 61_706),
    ("convfc", {}, CIFAR, 2_432 + 51_264 + 204_928 + 1_153_000 + 1_001_000 + 10_010),
    ("mlp", {}, jax.ShapeDtypeStruct((1, 28, 28), jnp.float32), 401_920 + 2 * 262_656 + 5_130),
    ("vit_b16", {}, IMAGENET, 86_567_656),
    ("gpt2_small", {}, TOKENS, 124_439_808),
    ("llama_7b", {}, TOKENS, 6_738_415_616),
    ("tinyllama", {}, TOKENS, 1_100_048_384),
]


@pytest.mark.parametrize(
    ("name", "options", "inputs", "expected"),
    SIZES,
    ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o, _, _ in SIZES],
)
def test_the_number_of_parameters_is_the_published_one(name, options, inputs, expected):
    params, _ = shapes_of(models.build(name, **options), inputs)
    assert tree.size(params) == expected
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_the_hand_formula_agrees_with_the_published_resnet20():
    assert resnet_size(20, 0) == 269_722


def test_resnet20_and_vgg16_have_the_parameter_names_of_git_re_basin():
    resnet, _ = shapes_of(models.build("cifar_resnet", depth=8), CIFAR)
    expected = {"['conv1']['kernel']", "['dense']['kernel']", "['dense']['bias']"}
    expected |= {f"['norm1']['{leaf}']" for leaf in ("scale", "bias")}
    for group in range(3):
        block = f"['blockgroups_{group}']['blocks_0']"
        expected |= {f"{block}['conv{i}']['kernel']" for i in (1, 2)}
        norms = ["['norm1']", "['norm2']"]
        if group:
            expected.add(f"{block}['shortcut']['layers_0']['kernel']")
            norms.append("['shortcut']['layers_1']")
        expected |= {f"{block}{norm}['{leaf}']" for norm in norms for leaf in ("scale", "bias")}
    assert set(tree.paths(resnet)) == expected
    vgg, _ = shapes_of(models.build("vgg16", norm="layer"), CIFAR)
    assert set(vgg) == {f"{kind}_{i}" for kind in ("Conv", "LayerNorm") for i in range(13)} | {
        f"Dense_{i}" for i in range(3)
    }


@pytest.mark.parametrize(("depth", "convolutions"), [(16, 13), (19, 16)])
def test_vgg_with_batch_norm_runs_all_its_convolutions_and_norms(depth, convolutions):
    model = models.build("vgg", depth=depth, norm="batch", width_multiplier=1 / 32)
    names = list(primitives(jaxpr_of(model, CIFAR, train=False).jaxpr))
    assert names.count("conv_general_dilated") == convolutions
    assert names.count("rsqrt") == convolutions
    assert names.count("dot_general") == 3


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("vgg", 12),
        ("cifar_resnet", 18),
        ("cifar_resnet", 2),
        ("preresnet", 21),
        ("preresnet", 50),
        ("wide_resnet", 27),
        ("resnet", 34),
    ],
)
def test_a_depth_that_does_not_exist_is_refused(name, depth):
    with pytest.raises(ValueError, match=f"depth is {depth}"):
        models.build(name, depth=depth)


# ---------------------------------------------------------------------------------- initializers


def torch_second_moments(params):
    """For each leaf the expectation of |w - w'|^2 under uniform draws on +-1 / sqrt(fan_in)."""
    return {
        layer: (
            math.prod(leaves["kernel"].shape) * 2 / (3 * math.prod(leaves["kernel"].shape[:-1])),
            leaves["bias"].size * 2 / (3 * math.prod(leaves["kernel"].shape[:-1])),
        )
        for layer, leaves in params.items()
    }


def test_two_torch_draws_of_vgg16_are_as_far_apart_as_the_paper_found():
    model = models.build("vgg16", initializer="torch")
    params, _ = shapes_of(model, CIFAR)
    expected = sum(map(sum, torch_second_moments(params).values()))
    assert expected == pytest.approx(3509, rel=0.01)


def test_torch_draws_have_the_bound_and_the_variance_for_weights_and_biases():
    model = models.build("cnn", widths=[128], norm=None, num_classes=64, initializer="torch")
    inputs = jax.ShapeDtypeStruct((1, 8, 8, 16), jnp.float32)
    a, b = (initialized(model, inputs, key)[0] for key in (KEY, OTHER_KEY))
    for layer, (kernel, bias) in torch_second_moments(a).items():
        for name, expected in (("kernel", kernel), ("bias", bias)):
            bound = 1 / math.sqrt(math.prod(a[layer]["kernel"].shape[:-1]))
            assert 0.9 * bound < np.max(np.abs(a[layer][name])) <= bound
            distance = np.sum((np.asarray(a[layer][name]) - np.asarray(b[layer][name])) ** 2)
            # The squared difference of two uniforms has deviation sqrt(7/5) times its mean.
            error = 5 * math.sqrt(1.4 / a[layer][name].size)
            assert distance == pytest.approx(expected, rel=error)


def test_he_draws_convolutions_by_their_fan_out_and_leaves_biases_zero():
    model = models.build("cnn", widths=[128, 64], norm=None, num_classes=128)
    inputs = jax.ShapeDtypeStruct((1, 8, 8, 64), jnp.float32)
    params, _ = initialized(model, inputs)
    for layer, variance in [
        ("Conv_0", 2 / (9 * 128)),
        ("Conv_1", 2 / (9 * 64)),
        ("Dense_0", 1 / 64),
    ]:
        kernel, bias = np.asarray(params[layer]["kernel"]), np.asarray(params[layer]["bias"])
        error = 5 * math.sqrt(2 / kernel.size)
        assert np.mean(kernel**2) == pytest.approx(variance, rel=error)
        assert not np.any(bias)


def test_normal_draws_what_writes_to_the_residual_stream_smaller():
    model = models.build("gpt", width=64, num_layers=2, vocab_size=32, max_length=8)
    params, _ = initialized(model, TOKENS)
    block = params["block_0"]
    for kernel, deviation in [
        (params["embedding"], 0.02),
        (block["attention"]["query"]["kernel"], 0.02),
        (block["attention"]["out"]["kernel"], 0.01),
        (block["mlp"]["down"]["kernel"], 0.01),
    ]:
        error = 5 * math.sqrt(2 / kernel.size)
        assert np.mean(np.asarray(kernel) ** 2) == pytest.approx(deviation**2, rel=error)


# ------------------------------------------------------------------- every network, in miniature

TINY = {
    "mlp": ({"widths": [6, 6], "norm": "batch", "dropout": 0.5, "num_classes": 3}, images(4)),
    "mlp-8": ({"widths": [6] * 7, "activation": "tanh", "norm": "layer"}, images(4)),
    "cnn": ({"widths": [4, 4], "norm": "group", "num_groups": 2, "dropout": 0.5}, images(8)),
    "lenet": ({"width_multiplier": 0.25}, images(28, 1)),
    "convfc": ({"width_multiplier": 0.02}, images(32)),
    "vgg": ({"depth": 11, "norm": "batch", "width_multiplier": 1 / 16}, images(32)),
    "cifar_resnet": ({"depth": 8, "width_multiplier": 0.25}, images(16)),
    "preresnet": ({"depth": 8, "width_multiplier": 0.25}, images(16)),
    "wide_resnet": ({"depth": 10, "widen_factor": 0.25, "dropout": 0.5}, images(16)),
    "resnet": ({"depth": 14, "width_multiplier": 1 / 16, "num_classes": 3}, images(32)),
    "vit": ({"width": 8, "num_layers": 1, "num_heads": 2, "dropout": 0.5}, images(8)),
    "gpt": ({"width": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 11}, tokens()),
    "gpt-llama": (
        {"width": 16, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 11}
        | {"positions": "rope", "mlp": "swiglu", "norm": "rms", "bias": False, "tied": False}
        | {"dropout": 0.5},
        tokens(),
    ),
}
MODES = pytest.mark.parametrize("case", TINY)


def tiny(case):
    options, inputs = TINY[case]
    return models.build(case.partition("-")[0], **options), inputs, options


@functools.cache
def tiny_shapes(case):
    return shapes_of(*tiny(case)[:2])


@functools.cache
def traced(case, train, with_key):
    model, inputs, _ = tiny(case)
    return jaxpr_of(model, inputs, train, KEY if with_key else None, tiny_shapes(case))


def num_outputs(options):
    return options.get("vocab_size", options.get("num_classes", 10))


@MODES
def test_a_step_gives_finite_gradients_and_changes_state_only_with_batch_norm(case):
    model, inputs, options = tiny(case)
    params, state = filled(model, inputs, shapes=tiny_shapes(case))
    untouched = jax.tree.map(np.array, state)

    def step(params, state, inputs):
        def loss(params):
            outputs, new_state = model.apply(params, state, inputs, True, KEY)
            return jnp.mean(jnp.square(outputs)), (outputs, new_state)

        return jax.grad(loss, has_aux=True)(params)

    step = jax.jit(step, compiler_options=QUICK)
    gradient, (outputs, new_state) = step(params, state, inputs)
    leading = inputs.shape[: 2 if inputs.dtype == jnp.int32 else 1]
    assert outputs.shape == (*leading, num_outputs(options))
    assert outputs.dtype == jnp.float32
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    gradient, state, new_state = jax.device_get((gradient, state, new_state))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)), path
        if "kernel" in jax.tree_util.keystr(path):
            assert np.any(leaf != 0), path
    has_batch_norm = options.get("norm") == "batch" or case in (
        "preresnet",
        "wide_resnet",
        "resnet",
    )
    assert bool(jax.tree.leaves(state)) == has_batch_norm
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True):
        assert np.any(before != after)
    assert_equal(state, untouched)


@MODES
def test_random_numbers_are_drawn_only_in_training_with_a_key_and_a_rate(case):
    def draws(train, with_key):
        return "random_bits" in set(primitives(traced(case, train, with_key).jaxpr))

    has_dropout = TINY[case][0].get("dropout", 0.5 if case == "vgg" else 0.0) > 0
    assert draws(True, True) == has_dropout
    assert not draws(True, False)
    assert not draws(False, True)


@MODES
def test_without_batch_norm_training_without_a_key_is_evaluation(case):
    same = str(traced(case, True, False)) == str(traced(case, False, False))
    assert same == (not jax.tree.leaves(tiny_shapes(case)[1]))


@pytest.mark.parametrize(("case", "train"), [("mlp", True), ("cnn", False)])
def test_jitted_equals_eager(case, train):
    model, inputs, _ = tiny(case)
    params, state = filled(model, inputs)
    eager = model.apply(params, state, inputs, train)
    assert_close(compiled(model)(params, state, inputs, train), eager)
    assert train or eager[1] is state


@MODES
def test_the_network_computes_in_the_dtype_it_is_told_and_answers_in_float32(case):
    _, inputs, options = tiny(case)
    model = models.build(case.partition("-")[0], **options, dtype="bfloat16")
    jaxpr = jaxpr_of(model, inputs, True, shapes=tiny_shapes(case))
    floats = {x.aval.dtype for x in jaxpr.jaxpr.invars + jaxpr.jaxpr.outvars} - {jnp.dtype("int32")}
    assert floats == {jnp.dtype("float32")}
    products = [e for e in jaxpr.jaxpr.eqns if e.primitive.name in PRODUCTS]
    assert products
    assert all(v.aval.dtype == jnp.bfloat16 for e in products for v in e.invars)


@pytest.mark.parametrize("case", ["mlp", "cnn", "vit", "gpt-llama"])
def test_float64_parameters_give_float64_outputs(case):
    model, inputs, _ = tiny(case)
    with jax.enable_x64(True):
        params, state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float64), tiny_shapes(case)
        )
        if inputs.dtype != jnp.int32:
            inputs = jax.ShapeDtypeStruct(inputs.shape, jnp.float64)
        outputs, _ = jax.eval_shape(
            lambda p, s, x: model.apply(p, s, x, False), params, state, inputs
        )
    assert outputs.dtype == jnp.float64


def test_dropout_depends_on_the_key_and_on_nothing_else():
    model, inputs, _ = tiny("mlp")
    params, state = filled(model, inputs)
    apply = compiled(model)
    first = apply(params, state, inputs, True, KEY)[0]
    np.testing.assert_array_equal(first, apply(params, state, inputs, True, KEY)[0])
    assert jnp.any(first != apply(params, state, inputs, True, OTHER_KEY)[0])
    assert jnp.any(first != apply(params, state, inputs, True)[0])


def test_a_stack_of_networks_is_drawn_and_applied_by_vmap():
    model = models.build("mlp", widths=[4], num_classes=4)
    inputs = images(2, 1)
    draw = jax.jit(jax.vmap(lambda key: model.init(key, inputs)[0]), compiler_options=QUICK)
    points = draw(jax.random.split(KEY, 3))
    outputs = jax.vmap(lambda params: model.apply(params, {}, inputs, False)[0])(points)
    assert outputs.shape == (3, 4, 4)
    for i, params in enumerate(tree.unstack(points)):
        assert_close(model.apply(params, {}, inputs, False)[0], outputs[i])
    assert np.all(np.std(points["Dense_0"]["kernel"], axis=0) > 0)


def test_a_network_survives_a_round_trip_through_a_stack_bit_for_bit():
    model, inputs, _ = tiny("gpt-llama")
    params, other = filled(model, inputs)[0], filled(model, inputs, seed=1)[0]
    points = tree.stack([other, params])
    apply = compiled(model)
    back = tree.combine(points, jnp.array([0.0, 1.0]))
    assert_equal(apply(back, {}, inputs, False), apply(params, {}, inputs, False))
    wider = models.build("mlp", widths=[5])
    narrow = models.build("mlp", widths=[4])
    with pytest.raises(ValueError, match=r"Dense_0.*bias.*\(4,\).*\(5,\)"):
        tree.stack([filled(narrow, images(2))[0], filled(wider, images(2))[0]])


@pytest.mark.parametrize("case", ["vit", "gpt-llama"])
def test_a_sharded_batch_on_an_explicit_mesh_gives_the_same_outputs(case):
    model, inputs, _ = tiny(case)
    inputs = np.concatenate([inputs, inputs])
    params, state = filled(model, inputs, shapes=tiny_shapes(case))
    apply = compiled(model)
    expected = apply(params, state, inputs, True)[0]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data")))
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        outputs = apply(params, state, sharded, True)[0]
    assert jax.typeof(outputs).sharding.spec[0] == "data"
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


def test_a_token_out_of_range_makes_not_a_number():
    table = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(
        layers.look_up(jnp.asarray(table), jnp.array([[2, 3]])), [[[4, 5], [np.nan, np.nan]]]
    )


def test_images_that_are_too_small_or_of_another_shape_are_refused():
    for name, inputs, message in [
        ("vgg16", images(28), "VGG: the images are 28x28; expected at least 32x32"),
        ("lenet", images(8), "LeNet: the images are 8x8"),
        ("convfc", images(8), "smaller than the window"),
        ("vit", images(6), "multiples of patch_size"),
        ("gpt", images(4)[..., 0], "expected integers"),
        ("gpt", tokens(length=300), "max_length is 256"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            shapes_of(models.build(name), inputs)


# -------------------------------------------------------------------------------- the registry


@pytest.mark.parametrize("name", models.NAMES)
def test_options_are_complete_and_survive_json(name):
    options = models.options(name)
    again = json.loads(json.dumps(options))
    assert again == options
    models.build(name, **again)


@pytest.mark.parametrize("case", ["mlp-8", "cnn", "wide_resnet", "vit", "gpt-llama"])
def test_a_network_is_rebuilt_from_its_name_and_options_in_json(case):
    _, inputs, options = tiny(case)
    name = case.partition("-")[0]
    record = json.loads(json.dumps({**models.options(name), **options}))
    again = models.build(name, **record)
    assert str(jaxpr_of(again, inputs, True, KEY)) == str(traced(case, True, True))


def test_unknown_names_options_and_values_are_refused_with_what_exists():
    with pytest.raises(ValueError, match="no model 'alexnet'; the names are mlp, cnn, "):
        models.build("alexnet")
    with pytest.raises(ValueError, match="no model 'alexnet'"):
        models.options("alexnet")
    with pytest.raises(ValueError, match="no option 'width'; the options are num_classes, widths"):
        models.build("mlp", width=3)
    with pytest.raises(ValueError, match=r"no option 'depth' \(its name fixes that\)"):
        models.build("vgg16", depth=19)
    with pytest.raises(TypeError, match="expected a JSON value"):
        models.build("mlp", activation=jnp.tanh)
    with pytest.raises(ValueError, match="activation is 'swish'; expected one of 'relu'"):
        models.build("mlp", activation="swish")
    with pytest.raises(ValueError, match="norm is 'rms'; expected one of None, 'batch'"):
        models.build("vgg", norm="rms")
    with pytest.raises(ValueError, match="dropout is 1.0"):
        models.build("vit", dropout=1.0)
    with pytest.raises(ValueError, match="width_multiplier is 0"):
        models.build("lenet", width_multiplier=0)
    with pytest.raises(ValueError, match="num_heads is 4 and num_kv_heads 3"):
        models.build("gpt", num_kv_heads=3)
    with pytest.raises(ValueError, match="width is 65 and num_heads 4"):
        models.build("vit", width=65)
    with pytest.raises(ValueError, match="6 channels do not divide into 4 groups"):
        shapes_of(models.build("cnn", widths=[6], norm="group", num_groups=4), images(8))


# --------------------------------------------------------------------------------- transformers


rotate = jax.jit(transformer.rotate, compiler_options=QUICK)


def test_rotary_positions_keep_norms_and_the_first_position():
    x = np.random.default_rng(0).normal(size=(2, 9, 3, 8)).astype(np.float32)
    y = np.asarray(rotate(x))
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    assert np.max(np.abs(y[:, 1:] - x[:, 1:])) > 0.1
    with pytest.raises(ValueError, match="the head width is 7"):
        rotate(x[..., :7])


def test_rotated_inner_products_depend_on_the_difference_of_positions():
    r = np.random.default_rng(0)
    query, key = (
        np.asarray(rotate(np.tile(r.normal(size=(1, 1, 1, 8)), (1, 9, 1, 1)).astype(np.float32)))
        for _ in range(2)
    )
    scores = np.einsum("bqhd,bkhd->qk", query, key)
    for difference in range(-8, 9):
        diagonal = np.diagonal(scores, difference)
        np.testing.assert_allclose(diagonal, np.full_like(diagonal, diagonal[0]), atol=1e-5)
    assert np.ptp(scores[0]) > 0.1


def grouped(**options):
    return models.build(
        "gpt", width=16, num_layers=1, num_heads=4, vocab_size=11, positions="rope", **options
    )


def test_grouped_queries_with_as_many_key_value_heads_are_ordinary_attention():
    assert str(jaxpr_of(grouped(num_kv_heads=4), tokens(), False)) == str(
        jaxpr_of(grouped(), tokens(), False)
    )


def test_grouped_queries_are_ordinary_attention_with_repeated_key_value_heads():
    params, _ = filled(grouped(num_kv_heads=2), tokens())
    block = params["block_0"]
    attention = dict(block["attention"])
    for name in ("key", "value"):
        attention[name] = {
            "kernel": np.repeat(attention[name]["kernel"], 2, axis=1),
            "bias": np.repeat(attention[name]["bias"], 2, axis=0),
        }
    repeated = {**params, "block_0": {**block, "attention": attention}}
    few = compiled(grouped(num_kv_heads=2))
    many = compiled(grouped())
    assert_close(
        few(params, {}, tokens(), False)[0], many(repeated, {}, tokens(), False)[0], atol=1e-5
    )


@pytest.mark.parametrize("case", ["gpt", "gpt-llama"])
def test_tokens_do_not_see_the_future(case):
    model, inputs, _ = tiny(case)
    params, state = filled(model, inputs)
    apply = compiled(model)
    changed = np.array(inputs)
    changed[:, 5] = (changed[:, 5] + 1) % 11
    before, after = (np.asarray(apply(params, state, x, False)[0]) for x in (inputs, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.all(np.any(before[:, 5:] != after[:, 5:], axis=-1))


def test_the_vision_transformer_sees_all_patches():
    model, inputs, _ = tiny("vit")
    params, _ = filled(model, inputs)
    apply = jax.jit(lambda x: model.apply(params, {}, x, False)[0], compiler_options=QUICK)
    for row, column in [(0, 0), (0, 7), (7, 0), (7, 7)]:
        changed = np.array(inputs)
        changed[:, row, column] += 1.0
        assert np.any(np.asarray(apply(changed)) != np.asarray(apply(inputs)))


def test_patches_and_a_dense_layer_are_a_convolution_with_the_patch_as_stride():
    x = images(8)
    model = models.build("vit", width=4, num_layers=0, num_heads=1, num_classes=4)
    params = jax.tree.map(np.asarray, filled(model, x)[0])
    kernel = params["embed"]["kernel"].reshape(4, 4, 3, 4)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(4, 4, 4)
    embed, norm, head = params["embed"], params["norm"], params["head"]
    expected = np.asarray(expected) + embed["bias"] + params["positions"]
    centred = expected - expected.mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    expected = (expected * norm["scale"] + norm["bias"]).mean(axis=1)
    expected = expected @ head["kernel"] + head["bias"]
    assert_close(compiled(model)(params, {}, x, False)[0], expected, atol=1e-5)


def test_norms_agree_with_their_formulas():
    r = np.random.default_rng(0)
    x = r.normal(size=(4, 3, 3, 8)) * 3 + 1
    blocks = x.reshape(4, 9, 2, 4)
    mean, var = blocks.mean(axis=(1, 3), keepdims=True), blocks.var(axis=(1, 3), keepdims=True)
    expected = {
        "batch": (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5),
        "layer": (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5),
        "rms": x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5),
        "group": ((blocks - mean) / np.sqrt(var + 1e-5)).reshape(x.shape),
    }

    class Norm(nn.Module):
        kind: str

        @nn.compact
        def __call__(self, x, train):
            return layers.normalize(x, self.kind, train=train, dtype=None, num_groups=2)

    inputs = jnp.asarray(x, jnp.float32)
    for kind, value in expected.items():
        model = models.from_linen(Norm(kind))
        params, state = initialized(model, inputs)
        outputs, new_state = compiled(model)(params, state, inputs, True)
        np.testing.assert_allclose(outputs, value, rtol=1e-4, atol=1e-5)
        if kind == "batch":
            moved = new_state["batch_stats"]["BatchNorm_0"]
            np.testing.assert_allclose(moved["mean"], 0.1 * x.mean((0, 1, 2)), rtol=1e-4)
            np.testing.assert_allclose(moved["var"], 0.9 + 0.1 * x.var((0, 1, 2)), rtol=1e-4)


# ------------------------------------------------------------------------------ linen of others

X = jnp.asarray(np.random.default_rng(2).normal(size=(6, 4)), jnp.float32)


def some_kernel(key, shape, dtype=jnp.float32):
    """A fixed kernel, so that nothing has to be drawn."""
    del key
    return jnp.asarray(np.random.default_rng(3).normal(size=shape), dtype)


def body(x, average, deterministic):
    x = nn.Dense(4, kernel_init=some_kernel)(x)
    x = nn.BatchNorm(use_running_average=average)(x)
    return nn.Dropout(0.5)(x, deterministic=deterministic)


class Train(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return body(x, not train, not train)


class Training(nn.Module):
    @nn.compact
    def __call__(self, x, *, training=False):
        return body(x, not training, not training)


class IsTraining(nn.Module):
    @nn.compact
    def __call__(self, x, is_training: bool = True):
        return body(x, not is_training, not is_training)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        return body(x, deterministic, deterministic)


class Two(nn.Module):
    @nn.compact
    def __call__(self, x, use_running_average, deterministic):
        return body(x, use_running_average, deterministic)


class Field(nn.Module):
    train: bool = True

    @nn.compact
    def __call__(self, x):
        return body(x, not self.train, not self.train)


class Stubborn(nn.Module):
    """Its dropout is always on, as far as it knows."""

    @nn.compact
    def __call__(self, x, train):
        return body(x, not train, False)


class Odd(nn.Module):
    @nn.compact
    def __call__(self, arrays, is_eval):
        return body(arrays["x"], is_eval, is_eval)


def modes(model, inputs):
    params, state = model.init(KEY, inputs)
    return [
        model.apply(params, state, inputs, train, key)
        for train, key in [(False, None), (True, None), (True, KEY), (True, OTHER_KEY)]
    ]


@pytest.mark.parametrize(
    "module", [Training(), IsTraining(), Deterministic(), Two(), Field(), Stubborn()]
)
def test_a_linen_module_is_told_its_mode_by_whatever_name_it_has_for_it(module):
    for given, expected in zip(
        modes(models.from_linen(module), X), modes(models.from_linen(Train()), X), strict=True
    ):
        assert_equal(given, expected)


def test_the_caller_may_say_how_a_linen_module_is_called():
    model = models.from_linen(Odd(), method=lambda m, arrays, train: m(arrays, is_eval=not train))
    for given, expected in zip(
        modes(model, {"x": X}), modes(models.from_linen(Train()), X), strict=True
    ):
        assert_equal(given, expected)


def test_the_modes_of_a_linen_module_are_what_they_should_be():
    evaluation, quiet, first, second = modes(models.from_linen(Train()), X)
    linear = X @ some_kernel(None, (4, 4))
    np.testing.assert_allclose(evaluation[0], linear / np.sqrt(1 + 1e-5), rtol=1e-5)
    centred = (linear - jnp.mean(linear, axis=0)[None]) / jnp.std(linear, axis=0)[None]
    np.testing.assert_allclose(quiet[0], centred, rtol=1e-4, atol=1e-4)
    for outputs, state in (first, second):
        kept = outputs != 0
        np.testing.assert_allclose(outputs[kept], 2 * quiet[0][kept], rtol=1e-5)
        assert 0 < jnp.sum(kept) < kept.size
        assert_equal(state, quiet[1])
    assert jnp.any(first[0] != second[0])
    assert jnp.any(quiet[1]["batch_stats"]["BatchNorm_0"]["mean"] != 0)


def check_purity(apply_fn, params, state):
    """Jitted, differentiated and vmapped, with and without dropout."""
    jitted = jax.jit(apply_fn, static_argnums=3, compiler_options=QUICK)
    for train, key in [(False, None), (True, KEY)]:
        eager = apply_fn(params, state, X, train, key)
        assert_close(jitted(params, state, X, train, key), eager, atol=1e-4)

    def loss(params):
        return jnp.mean(apply_fn(params, state, X, True, KEY)[0] ** 2)

    slope = jax.jit(jax.grad(loss), compiler_options=QUICK)
    gradient = slope(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    points = jax.tree.map(lambda x: np.stack([np.asarray(x), 2 * np.asarray(x)]), params)
    many = jax.jit(
        jax.vmap(lambda params: apply_fn(params, state, X, True, KEY)[0]), compiler_options=QUICK
    )
    np.testing.assert_allclose(many(points)[0], eager[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="expected a Python bool"):
        jax.jit(apply_fn)(params, state, X, True)
    with pytest.raises(TypeError, match="train is 1; expected a Python bool"):
        apply_fn(params, state, X, 1)


def test_an_adapted_linen_module_is_a_pure_function_under_jit_grad_and_vmap():
    model = models.from_linen(Train())
    check_purity(model.apply, *model.init(KEY, jax.ShapeDtypeStruct((1, 4), jnp.float32)))


def test_a_linen_module_without_modes_or_state_works():
    model = models.from_linen(nn.Sequential([nn.Dense(4, kernel_init=some_kernel), nn.relu]))
    params, state = model.init(KEY, X)
    assert state == {}
    for train in (False, True):
        outputs, new_state = model.apply(params, state, X, train, KEY)
        assert new_state == {}
        np.testing.assert_allclose(outputs, nn.relu(X @ params["layers_0"]["kernel"]), rtol=1e-5)


def test_dropout_inside_linen_attention_is_off_without_a_key():
    class Attentive(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.MultiHeadDotProductAttention(
                2, dropout_rate=0.5, deterministic=not train, kernel_init=some_kernel
            )(x)

    model = models.from_linen(Attentive())
    inputs = jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)
    assert "random_bits" in set(primitives(jaxpr_of(model, inputs, True, KEY).jaxpr))
    assert str(jaxpr_of(model, inputs, True)) == str(jaxpr_of(model, inputs, False))


def test_other_random_streams_of_a_linen_module_need_a_key_in_training():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            noise = jax.random.normal(self.make_rng("noise"), x.shape) if train else 0.0
            return x * self.param("scale", nn.initializers.ones, ()) + noise

    model = models.from_linen(Noisy())
    params, state = model.init(KEY, X)
    np.testing.assert_array_equal(model.apply(params, state, X, False)[0], X)
    first, second = (model.apply(params, state, X, True, key)[0] for key in (KEY, OTHER_KEY))
    assert jnp.any(first != second)
    with pytest.raises(ValueError, match="without a key no random numbers may be drawn"):
        model.apply(params, state, X, True)
    silent = models.from_linen(
        Noisy(), method=lambda m, x, train, deterministic: m(x, train and not deterministic)
    )
    np.testing.assert_array_equal(silent.apply(params, state, X, True)[0], X)
    np.testing.assert_array_equal(silent.apply(params, state, X, True, KEY)[0], first)


def test_all_collections_are_state_and_move_in_training_only():
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            calls = self.variable("counts", "calls", lambda: jnp.zeros((), jnp.int32))
            peak = self.variable("peaks", "peak", lambda: jnp.zeros(()))
            if not self.is_initializing():
                calls.value += 1
                peak.value = jnp.max(x)
            self.sow("intermediates", "x", x)
            return x * self.param("scale", nn.initializers.ones, ())

    model = models.from_linen(Counting())
    params, state = model.init(KEY, X)
    assert_equal(state, {"counts": {"calls": jnp.array(0)}, "peaks": {"peak": jnp.array(0.0)}})
    assert model.apply(params, state, X, False)[1] is state
    _, state = model.apply(params, state, X, True)
    _, state = model.apply(params, state, X, True)
    assert_equal(state, {"counts": {"calls": jnp.array(2)}, "peaks": {"peak": jnp.max(X)}})


def test_initial_values_that_depend_on_data_need_data():
    class Centred(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x - self.param("mean", lambda key: jnp.mean(x, axis=0))[None]

    model = models.from_linen(Centred())
    params, _ = model.init(KEY, X)
    np.testing.assert_allclose(params["mean"], jnp.mean(X, axis=0), rtol=1e-6)
    with pytest.raises(ValueError, match="pass an example batch"):
        model.init(KEY, jax.ShapeDtypeStruct((6, 4), jnp.float32))


def test_linen_parameters_that_cannot_be_differentiated_are_refused_by_path():
    class Integers(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x[:, self.param("table", lambda key: jnp.arange(2))]

    with pytest.raises(TypeError, match=r"\['table'\] is int32"):
        models.from_linen(Integers()).init(KEY, X)


# --------------------------------------------------------------------------------- nnx of others


class Mixed(nnx.Module):
    """Two dropouts, batch norm, attention, an integer parameter, a counter, and a list."""

    def __init__(self, rngs):
        self.layers = nnx.List(
            [nnx.Linear(4, 4, kernel_init=some_kernel, rngs=rngs) for _ in range(2)]
        )
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropouts = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])
        self.table = nnx.Param(jnp.array([3, 2, 1, 0]))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        x = self.norm(self.layers[1](self.layers[0](x)[:, self.table[...]]))
        self.latest = nnx.Variable(x)  # a new part of the module: no part of the state
        return self.dropouts[0](x) + self.dropouts[1](x)


def test_an_nnx_module_has_the_modes_of_the_contract_and_is_left_alone():
    module = Mixed(nnx.Rngs(0))
    module.eval()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))))
    apply_fn, params, state = models.from_nnx(module)
    assert tree.paths(params) == [
        "['layers'][0]['bias']",
        "['layers'][0]['kernel']",
        "['layers'][1]['bias']",
        "['layers'][1]['kernel']",
        "['norm']['bias']",
        "['norm']['scale']",
    ]
    assert tree.paths(state) == ["['calls']", "['norm']['mean']", "['norm']['var']", "['table']"]
    linear = (X @ some_kernel(None, (4, 4)))[:, ::-1] @ some_kernel(None, (4, 4))
    centred = (linear - jnp.mean(linear, axis=0)[None]) / jnp.std(linear, axis=0)[None]

    for key in (None, KEY):
        outputs, same = apply_fn(params, state, X, False, key)
        assert same is state
        np.testing.assert_allclose(outputs, 2 * linear / np.sqrt(1 + 1e-5), rtol=1e-4)
    quiet, moved = apply_fn(params, state, X, True)
    np.testing.assert_allclose(quiet, 2 * centred, rtol=1e-3, atol=1e-3)
    assert int(moved["calls"]) == 1
    assert jnp.any(moved["norm"]["mean"] != state["norm"]["mean"])
    assert jax.tree.structure(moved) == jax.tree.structure(state)

    first, again, second = (
        apply_fn(params, state, X, True, key)[0] for key in (KEY, KEY, OTHER_KEY)
    )
    np.testing.assert_array_equal(first, again)
    assert jnp.any(first != second)
    # Each of the two dropouts lets through 0 or twice its half, and they draw masks of their own.
    ratio = np.asarray(first / quiet)
    assert {0.0, 1.0, 2.0} == set(np.round(ratio, 3).ravel().tolist())

    assert_equal(nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))), before)
    assert module.dropouts[0].deterministic
    nnx.update(module, tree.scale(2.0, params))
    np.testing.assert_array_equal(module.layers[0].kernel[...], 2 * params["layers"][0]["kernel"])


def test_an_adapted_nnx_module_is_a_pure_function_under_jit_grad_and_vmap():
    apply_fn, params, state = models.from_nnx(Mixed(nnx.Rngs(0)))
    check_purity(apply_fn, params, state)
    with pytest.raises(ValueError, match=r"params is not that of the nnx module.*\['norm'\]"):
        apply_fn({"layers": params["layers"]}, state, X, True)


def test_an_nnx_module_that_exists_in_shape_only_is_adapted_too():
    abstract = nnx.eval_shape(lambda: Mixed(nnx.Rngs(0)))
    apply_fn, shapes, _ = models.from_nnx(abstract)
    concrete_fn, params, state = models.from_nnx(Mixed(nnx.Rngs(0)))
    assert_equal(*(jax.tree.map(lambda x: x.shape, t) for t in (shapes, params)))
    assert_equal(apply_fn(params, state, X, True, KEY), concrete_fn(params, state, X, True, KEY))


def test_an_nnx_module_without_modes_or_state_works():
    module = nnx.Linear(4, 2, kernel_init=some_kernel, rngs=nnx.Rngs(0))
    apply_fn, params, state = models.from_nnx(module)
    assert state == {}
    for train in (False, True):
        outputs, new_state = apply_fn(params, state, X, train, KEY)
        assert new_state == {}
        np.testing.assert_allclose(outputs, X @ params["kernel"], rtol=1e-5)


def test_dropout_inside_nnx_attention_is_off_without_a_key():
    abstract = nnx.eval_shape(
        lambda: nnx.MultiHeadAttention(2, 4, dropout_rate=0.5, decode=False, rngs=nnx.Rngs(0))
    )
    apply_fn, params, state = models.from_nnx(abstract)
    model = models.Model(lambda key, inputs: (params, state), apply_fn)
    inputs = jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)

    def bits(key):
        return list(primitives(jaxpr_of(model, inputs, True, key).jaxpr)).count("random_bits")

    assert bits(KEY) == bits(None) + 1


def test_an_nnx_call_gets_the_flags_and_the_random_numbers_that_it_names():
    class Functional(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, kernel_init=some_kernel, rngs=rngs)
            self.dropout = nnx.Dropout(0.5)

        def __call__(self, x, *, train, rngs=None):
            return self.dropout(self.linear(x), deterministic=not train, rngs=rngs)

    module = Functional(nnx.Rngs(0))
    for method, inputs in [(None, X), (lambda m, x, **flags: m(x["x"], train=True), {"x": X})]:
        apply_fn, params, state = models.from_nnx(module, method=method)
        assert state == {}
        np.testing.assert_allclose(
            apply_fn(params, state, inputs, True)[0], X @ params["linear"]["kernel"], rtol=1e-5
        )
    apply_fn, params, state = models.from_nnx(module)
    dropped = apply_fn(params, state, X, True, KEY)[0]
    assert 0 < jnp.sum(dropped == 0) < dropped.size
