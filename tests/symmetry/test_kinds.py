"""Which units may change sign or scale, and with which power at each place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import networks
import pytest
from jax import lax

from geojax.symmetry import Factor, SpecError, check, permutation_spec, with_kinds
from geojax.symmetry.spec import factors

KEY = jax.random.key(0)


def carried(apply_fn, params, *inputs):
    spec = permutation_spec(apply_fn, params, *inputs)
    return with_kinds(spec, apply_fn, params, *inputs)


def powers(spec, name):
    """Leaf path -> the powers of a group at its places there, in order of axes."""
    out = {}
    for leaf in spec.leaves:
        for layout in leaf.axes:
            for factor in factors(layout):
                if factor.name == name:
                    out.setdefault(leaf.path, []).append(factor.power)
    return out


@functools.cache
def small(activation):
    def apply_fn(p, x):
        return activation(x @ p["a"] + p["c"][None]) @ p["b"]

    return networks.plain(apply_fn, networks.shapes(a=(3, 6), c=(6,), b=(6, 2)), (5, 3))


def through_bottleneck(x):
    return x * 0.5


KINDS = [
    (jnp.tanh, "signed"),
    (jnp.sin, "signed"),
    (lax.erf, "signed"),
    (lambda h: h**3, "signed_scaled"),
    (jax.nn.relu, "scaled"),
    (jax.nn.leaky_relu, "scaled"),
    (lambda h: jnp.maximum(h, 0.5 * h), "scaled"),
    (jnp.abs, "scaled"),  # a sign too, but not with the powers of the scale
    (through_bottleneck, "signed_scaled"),
    (jax.nn.gelu, "permutation"),
    (jax.nn.silu, "permutation"),
    (jax.nn.sigmoid, "permutation"),
    (lambda h: jnp.maximum(h, 0.1), "permutation"),
    (lambda h: jax.nn.relu(h) + 1, "permutation"),
    (lambda h: jnp.cos(h) * h, "signed"),
    (lambda h: h / jnp.sqrt(jnp.square(h) + 1), "signed"),
    (jnp.round, "permutation"),
    (lambda h: jnp.maximum(h, jnp.zeros_like(h)), "scaled"),
    (lambda h: jnp.maximum(h, 1 / (1 + jnp.zeros_like(h))), "permutation"),
    (lambda h: jnp.maximum(h, lax.rsqrt(jnp.zeros_like(h) + 2)), "permutation"),
    (
        lambda h: h + jnp.pad(jnp.zeros(h[:-1].shape), ((0, 1), (0, 0)), constant_values=1.0),
        "permutation",
    ),
]


@pytest.mark.parametrize(("activation", "kind"), KINDS)
def test_an_activation_decides_the_kind_of_its_units(activation, kind):
    network = small(activation)
    spec = carried(network.apply_fn, network.params, *network.inputs)
    (group,) = spec.groups
    assert group.kind == kind
    report = check(spec, network.apply_fn, network.params, *network.inputs, key=KEY)
    assert report.joint <= 1e-5


def test_what_makes_the_units_is_multiplied_and_what_reads_them_divided():
    network = small(jax.nn.relu)
    spec = carried(network.apply_fn, network.params, *network.inputs)
    assert powers(spec, spec.groups[0].name) == {"['a']": [1], "['b']": [-1], "['c']": [1]}
    cubed = small(KINDS[3][0])
    spec = carried(cubed.apply_fn, cubed.params, *cubed.inputs)
    assert powers(spec, spec.groups[0].name) == {"['a']": [1], "['b']": [-3], "['c']": [1]}


@pytest.mark.parametrize(
    ("activation", "wrong"),
    [(jnp.tanh, "scaled"), (jax.nn.relu, "signed"), (jax.nn.gelu, "scaled")],
)
def test_a_kind_that_the_units_do_not_have_is_rejected(activation, wrong):
    network = small(activation)
    spec = carried(network.apply_fn, network.params, *network.inputs)
    name = spec.groups[0].name
    signs = {"['a']": 1, "['b']": -1, "['c']": 1}
    leaves = tuple(
        dataclasses.replace(
            leaf,
            axes=tuple(
                Factor(name, 6, signs[leaf.path]) if getattr(x, "name", "") == name else x
                for x in leaf.axes
            ),
        )
        for leaf in spec.leaves
    )
    groups = (dataclasses.replace(spec.groups[0], kind=wrong),)
    spec = dataclasses.replace(spec, leaves=leaves, groups=groups)
    with pytest.raises(SpecError, match="is no symmetry"):
        check(spec, network.apply_fn, network.params, *network.inputs, key=KEY)


def kinds_by_size(network):
    spec = carried(network.apply_fn, network.params, *network.inputs)
    check(spec, network.apply_fn, network.params, *network.inputs, key=KEY)
    return spec, {group.size: group.kind for group in spec.groups}


def test_every_hidden_layer_of_vgg_can_be_scaled():
    _, kinds = kinds_by_size(networks.vgg())
    assert set(kinds.values()) == {"scaled"}


def test_layer_norm_holds_the_stream_and_attention_is_bilinear():
    spec, kinds = kinds_by_size(networks.gpt())
    assert kinds[12] == "permutation"
    assert kinds[7] == "permutation"  # behind a GELU
    value = "['params']['block_0']['attention']['value']['kernel']"
    name = spec.by_path[value].axes[2].name
    found = powers(spec, name)
    assert found[value] == [1]
    assert found["['params']['block_0']['attention']['out']['kernel']"] == [-1]


def test_a_stream_under_rms_norm_changes_sign_and_the_gate_carries_no_scale():
    spec, kinds = kinds_by_size(networks.llama())
    assert kinds[24] == "signed"
    (hidden,) = (group for group in spec.groups if group.size == 10)
    assert hidden.kind == "signed_scaled"
    at = "['params']['block_0']['mlp']['{}']['kernel']"
    found = powers(spec, hidden.name)
    assert [found[at.format(name)] for name in ("gate", "up", "down")] == [[0], [1], [-1]]


def test_group_norm_and_layer_norm_hold_the_scale_of_a_resnet():
    _, kinds = kinds_by_size(networks.resnet("layer"))
    assert set(kinds.values()) == {"permutation"}


def test_running_statistics_take_part_with_their_own_powers():
    spec, _ = kinds_by_size(networks.resnet("batch"))
    name = spec.by_path["['params']['conv1']['kernel']"].axes[3].name
    found = powers(spec, name)
    kernel = found["['params']['conv1']['kernel']"]
    assert found["['state']['batch_stats']['norm1']['mean']"] == kernel == [1]
    # The variance has a constant added, and so no power.
    assert found["['state']['batch_stats']['norm1']['var']"] == [0]
    assert found["['params']['norm1']['scale']"] == [-1]


def test_units_in_loops_and_parts_of_axes_keep_their_kind():
    for make in (networks.lstm, networks.elman, networks.scanned_layers, networks.dense_net):
        spec, kinds = kinds_by_size(make())
        assert set(kinds.values()) == {"permutation"}


def test_groups_that_are_not_as_derived_keep_their_kind():
    network = networks.mlp()
    spec = permutation_spec(network.apply_fn, network.params, *network.inputs)
    first, second = spec.groups
    edited = spec.pin(first.name).rename({second.name: "second"})
    spec = with_kinds(edited, network.apply_fn, network.params, *network.inputs)
    assert [(group.name, group.kind) for group in spec.groups] == [("second", "scaled")]
    assert with_kinds(
        edited.split("second", [2, 4]), network.apply_fn, network.params, *network.inputs
    ) == edited.split("second", [2, 4])
