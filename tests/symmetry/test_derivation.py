"""Specs read off a jaxpr: what is found, what is fixed, and how it is named."""

import functools
import warnings

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

from geojax import models
from geojax.symmetry import (
    Concatenation,
    Factor,
    PermutationSpec,
    Product,
    SpecError,
    permutation_spec,
)
from geojax.symmetry.control import bodies
from geojax.symmetry.spec import factors, layout_size
from geojax.symmetry.trace import analyze


def derived(network):
    return permutation_spec(network.apply_fn, network.params, *network.inputs)


def as_sets(spec):
    """The groups as sets of (leaf, axis)."""
    return {frozenset(spec.members(group.name)) for group in spec.groups}


def sizes(spec):
    """The shapes of the permutations, sorted."""
    return sorted(group.shape for group in spec.groups)


def registered(name, shape, dtype=jnp.float32, **options):
    model = models.build(name, **options)
    x = jax.ShapeDtypeStruct(shape, dtype)
    params, state = jax.eval_shape(model.init, jax.random.key(0), x)

    def apply_fn(variables, x):
        return model.apply(variables["params"], variables["state"], x, False)[0]

    return apply_fn, {"params": params, "state": state}, x


def in_styles():
    """One network of two hidden layers, 3-8-6-2, in five ways of writing parameters down."""
    x = jax.ShapeDtypeStruct((4, 3), jnp.float32)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8)(x))
            return nn.Dense(2)(nn.relu(nn.Dense(6)(x)))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List(nnx.Linear(m, n, rngs=rngs) for m, n in ((3, 8), (8, 6), (6, 2)))

        def __call__(self, x):
            for layer in self.layers[:-1]:
                x = nnx.relu(layer(x))
            return self.layers[-1](x)

    linen = Linen()
    yield "linen", linen.apply, jax.eval_shape(linen.init, jax.random.key(0), x), x
    graph, state = nnx.split(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))))
    yield "nnx", lambda state, x: nnx.merge(graph, state)(x), state, x

    def rows_out(layers, x):  # as equinox and PyTorch have it: (out, in)
        for i, (weight, bias) in enumerate(layers):
            x = jnp.einsum("oi,bi->bo", weight, x) + bias[None]
            x = jax.nn.relu(x) if i < 2 else x
        return x

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    widths = ((3, 8), (8, 6), (6, 2))
    yield "tuples", rows_out, tuple((array(n, m), array(n)) for m, n in widths), x

    def modules(params, x):  # as haiku has it: a dictionary of module names
        for i in range(3):
            own = params[f"mlp/~/linear_{i}"]
            x = x @ own["w"] + own["b"]
            x = jax.nn.relu(x) if i < 2 else x
        return x

    named = {
        f"mlp/~/linear_{i}": {"w": array(m, n), "b": array(n)} for i, (m, n) in enumerate(widths)
    }
    with jax.numpy_rank_promotion("allow"):
        yield "modules", modules, named, x
        flat = {f"{k}{i}": v for i, own in enumerate(named.values()) for k, v in own.items()}
        yield "flat", functools.partial(_flat, modules), flat, x


def _flat(modules, params, x):
    return modules({f"mlp/~/linear_{i}": {k: params[f"{k}{i}"] for k in "wb"} for i in range(3)}, x)


def test_one_network_in_five_styles_has_isomorphic_groups():
    found = {}
    for style, apply_fn, params, x in in_styles():
        spec = permutation_spec(apply_fn, params, x)
        found[style] = sorted((g.size, len(spec.members(g.name))) for g in spec.groups)
    assert len(found) == 5
    assert all(one == [(6, 3), (8, 3)] for one in found.values()), found


def test_every_axis_of_an_mlp_is_where_it_belongs():
    spec = derived(networks.mlp())
    assert spec.axes_to_groups() == {
        "['params']['Dense_0']['bias']": ("params/Dense_0/kernel:1",),
        "['params']['Dense_0']['kernel']": (None, "params/Dense_0/kernel:1"),
        "['params']['Dense_1']['bias']": ("params/Dense_1/kernel:1",),
        "['params']['Dense_1']['kernel']": ("params/Dense_0/kernel:1", "params/Dense_1/kernel:1"),
        "['params']['Dense_2']['bias']": (None,),
        "['params']['Dense_2']['kernel']": ("params/Dense_1/kernel:1", None),
    }


def test_vgg16_has_one_group_per_hidden_layer():
    spec = derived(networks.vgg())
    assert len(spec.groups) == 15
    # A bias and the two kernels on either side, whatever stands between them.
    assert {len(spec.members(group.name)) for group in spec.groups} == {3}


def hand_spec_of_resnet20():
    """The groups of ResNet-20 with layer norm, written out from its drawing."""
    groups = {}

    def add(name, path, axis):
        groups.setdefault(name, set()).add(("['params']" + path, axis))

    def kernel(path, source, target):
        if source:
            add(source, path + "['kernel']", 2)
        add(target, path + "['kernel']", 3)

    def norm(path, name):
        add(name, path + "['scale']", 0)
        add(name, path + "['bias']", 0)

    kernel("['conv1']", None, "stream0")
    norm("['norm1']", "stream0")
    for stage in range(3):
        for block in range(3):
            at = f"['blockgroups_{stage}']['blocks_{block}']"
            new = stage > 0 and block == 0
            source, inner = f"stream{stage - new}", f"inner{stage}{block}"
            kernel(at + "['conv1']", source, inner)
            norm(at + "['norm1']", inner)
            kernel(at + "['conv2']", inner, f"stream{stage}")
            norm(at + "['norm2']", f"stream{stage}")
            if new:
                kernel(at + "['shortcut']['layers_0']", source, f"stream{stage}")
                norm(at + "['shortcut']['layers_1']", f"stream{stage}")
    add("stream2", "['dense']['kernel']", 0)
    return {frozenset(places) for places in groups.values()}


def test_resnet20_has_the_twelve_groups_of_its_drawing():
    apply_fn, params, x = registered("resnet20", (2, 32, 32, 3), norm="layer")
    spec = permutation_spec(apply_fn, params, x)
    assert as_sets(spec) == hand_spec_of_resnet20()
    assert len(spec.groups) == 12
    assert spec.notes == spec.unused == ()


def test_running_statistics_move_and_are_marked():
    spec = derived(networks.resnet("batch"))
    marked = {leaf.path for leaf in spec.leaves if leaf.statistic}
    assert marked == {leaf.path for leaf in spec.leaves if leaf.path.startswith("['state']")}
    assert marked
    for leaf in spec.leaves:
        if leaf.path in marked:
            twin = leaf.path.replace("['state']['batch_stats']", "['params']")
            twin = twin.replace("['mean']", "['scale']").replace("['var']", "['scale']")
            assert leaf.groups() == spec.by_path[twin].groups() != []


def test_statistics_and_pinned_leaves_can_be_chosen():
    network = networks.mlp()
    spec = permutation_spec(
        network.apply_fn,
        network.params,
        *network.inputs,
        statistics="params/*/bias",
        pinned=["params/Dense_1/bias"],
    )
    assert sum(leaf.statistic for leaf in spec.leaves) == 3
    assert sizes(spec) == [(8,)]
    with pytest.raises(SpecError, match="'nothing' in pinned matches no leaf"):
        permutation_spec(network.apply_fn, network.params, *network.inputs, pinned="nothing")


def test_resnet50_has_37_groups():
    spec = permutation_spec(*registered("resnet50", (2, 64, 64, 3)))
    assert len(spec.groups) == 37
    assert spec.notes == ()


def test_group_norm_permutes_blocks_and_within_each_block():
    spec = derived(networks.resnet("group"))
    # 16 channels in 8 blocks of 2; the inner permutation is each block's own.
    assert sizes(spec)[0] == (8,)
    assert (8, 2) in sizes(spec)
    scale = spec.by_path["['params']['norm1']['scale']"].axes[0]
    assert isinstance(scale, Product)
    outer, inner = scale.parts
    assert spec[inner.name].index == (outer.name,)


def test_a_transformer_has_one_residual_group_and_four_per_block():
    spec = derived(networks.gpt())
    # Per block: heads, the width of queries and keys per head, that of values, and the MLP.
    assert sizes(spec) == sorted([(12,), *2 * [(3,), (3, 4), (3, 4), (7,)]])
    (stream,) = (group for group in spec.groups if group.size == 12)
    places = spec.members(stream.name)
    for path, axis in (("embedding", 1), ("positions", 1), ("norm']['scale", 0)):
        assert (f"['params']['{path}']", axis) in places
    # The vocabulary, the positions, and the rows of the table that the example did not reach.
    for name in ("embedding", "positions"):
        assert not spec.by_path[f"['params']['{name}']"].axes[0].name


def test_grouped_queries_permute_inside_their_keys_and_rotary_widths_stay():
    spec = derived(networks.llama())
    # Residual stream 24, key heads 3, two queries per key head, value width 4, MLP 10.
    assert sizes(spec) == [(3,), (3, 2), (3, 4), (10,), (24,)]
    kernel = spec.by_path["['params']['block_0']['attention']['query']['kernel']"]
    assert isinstance(kernel.axes[1], Product)
    assert kernel.axes[2] == Factor("", 4)
    # Without rotation the widths of queries and keys are free.
    assert (3, 4) in sizes(derived(networks.vit()))


EXPECTED = {
    "lstm": [(6,)],
    "gru": [(5,)],
    "elman": [(6,)],
    "loops": [(5,)],
    "scanned_layers": [(3, 6), (4,)],
    "scanned_heads": [(2, 3), (2, 3, 5), (2, 3, 6), (4,)],
    "fused_attention": [(2,), (2, 4), (2, 4), (6,), (6,)],
    "fused_glu": [(6,)],
    "experts": [(4,), (5,), (5, 6)],
    "dense_net": [(3,), (3,), (3,), (4,)],
    "u_net": [(2,), (3,), (4,), (5,)],
    "flattened": [(4,)],
    "grouped": [(4,), (4, 2), (4, 3)],
    "other_convs": [(3,), (4,), (4,), (5,)],
    "shuffled": [(2,), (2,), (2, 2, 2), (2, 4), (2, 4)],
    "zero_padded": [(2,), (2,), (4,), (5,), (6,)],
    "channel_mean": [(4,), (5,)],
    "norms": [(4,), (5,), (6,)],
}


@pytest.mark.parametrize("make", networks.PLAIN, ids=lambda make: make.__name__)
def test_each_kind_of_layer_has_its_groups(make):
    spec = derived(make())
    assert sizes(spec) == EXPECTED[make.__name__]
    assert spec.notes == ()
    assert PermutationSpec.from_json(spec.to_json()) == spec


def test_the_gates_of_an_lstm_share_one_group_in_four_segments():
    spec = derived(networks.lstm())
    (group,) = spec.groups
    segments = Concatenation((Factor(group.name, 6),) * 4)
    assert spec.by_path["['wh']"].axes == (Factor(group.name, 6), segments)
    assert spec.by_path["['b']"].axes == (segments,)


def test_a_recurrent_kernel_has_its_group_on_both_axes():
    spec = derived(networks.elman())
    (group,) = spec.groups
    assert spec.by_path["['wh']"].axes == (Factor(group.name, 6), Factor(group.name, 6))


def test_layers_under_scan_have_permutations_of_their_own():
    spec = derived(networks.scanned_layers())
    (inner,) = (group for group in spec.groups if group.index)
    assert inner.shape == (3, 6)
    # The layer is named, for the group to depend on, and is itself no group.
    assert inner.index[0] not in {group.name for group in spec.groups}
    assert spec.by_path["['layers']['b1']"].axes[0] == Factor(inner.index[0], 3)


def test_scanned_layers_have_the_groups_of_the_same_layers_unrolled():
    scanned = networks.scanned_layers()

    def unrolled(p, x):
        x = x @ p["in"]
        for q in p["layers"]:
            x = x + jnp.tanh(x @ q["w1"] + q["b1"][None]) @ q["w2"]
        return x @ p["out"]

    layers = [{k: v[i] for k, v in scanned.params["layers"].items()} for i in range(3)]
    plain = permutation_spec(unrolled, scanned.params | {"layers": layers}, *scanned.inputs)
    stacked = derived(scanned)
    for group in stacked.groups:
        # A leaf of layer i has one axis less, and a group that depends on the layer is one of many.
        for i in range(3):
            places = {
                (path.replace("['layers']", f"['layers'][{i}]"), axis - ("layers" in path))
                for path, axis in stacked.members(group.name)
            }
            if not group.index:
                places |= {
                    (path.replace("['layers']", f"['layers'][{j}]"), axis - 1)
                    for path, axis in stacked.members(group.name)
                    if "layers" in path
                    for j in range(3)
                }
            assert places in as_sets(plain)
    assert len(plain.groups) == 1 + 3


def test_an_index_comes_outermost_first():
    spec = derived(networks.scanned_heads())
    (heads,) = (group for group in spec.groups if group.shape == (2, 3))
    deepest = [group for group in spec.groups if len(group.index) == 2]
    assert len(deepest) == 2
    assert all(group.index == (*heads.index, heads.name) for group in deepest)


def test_flattened_positions_keep_their_channels_together():
    layout = derived(networks.flattened()).by_path["['out']"].axes[0]
    assert isinstance(layout, Product)
    assert layout.parts[0] == Factor("", 16)
    assert layout.parts[1].size == 4


def test_channels_that_only_a_mean_reads_are_free():
    spec = derived(networks.channel_mean())
    assert {group.size: group.free for group in spec.groups} == {4: False, 5: True}


def test_zero_channels_of_a_shortcut_make_groups_of_their_own():
    layout = derived(networks.zero_padded()).by_path["['out']"].axes[0]
    assert isinstance(layout, Concatenation)
    low, stream, high = (part.name for part in layout.parts)
    assert len({low, stream, high}) == 3


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_an_unknown_primitive_fixes_what_it_touches_and_says_where():
    def apply_fn(p, x):
        h = jnp.tanh(x @ p["a"])
        return jnp.real(jnp.fft.fft(h)) @ p["b"] + jnp.tanh(x @ p["c"]) @ p["d"]

    params = {"a": array(3, 6), "b": array(6, 2), "c": array(3, 5), "d": array(5, 2)}
    with pytest.warns(UserWarning, match=r"fft at .*test_derivation\.py:\d+") as caught:
        spec = permutation_spec(apply_fn, params, array(4, 3))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert sizes(spec) == [(5,)]
    (note,) = spec.notes
    assert "fft" in note


def test_a_callback_fixes_what_it_touches():
    def apply_fn(p, x):
        h = x @ p["a"]
        return jax.pure_callback(np.tanh, h, h) @ p["b"]

    with pytest.warns(UserWarning, match="pure_callback"):
        spec = permutation_spec(apply_fn, {"a": array(3, 6), "b": array(6, 2)}, array(4, 3))
    assert spec.groups == ()


def test_dropout_fixes_its_axis():
    def apply_fn(p, x, key):
        h = jnp.tanh(x @ p["a"])
        return jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h, 0.0) @ p["b"]

    with pytest.warns(UserWarning, match="random_bits"):
        spec = permutation_spec(
            apply_fn, {"a": array(3, 6), "b": array(6, 2)}, array(4, 3), jax.random.key(0)
        )
    assert spec.groups == ()


@pytest.mark.parametrize(("shape", "free"), [((1, 6), False), ((4, 1), True), ((4, 6), False)])
def test_a_captured_constant_fixes_the_axes_along_which_it_varies(shape, free):
    table = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    as_jax = jnp.asarray(table)

    def apply_fn(p, x):
        h = jnp.tanh(x @ p["a"]) * table
        return jnp.where(jnp.broadcast_to(as_jax, h.shape) > 0, h, 0.1) @ p["b"]

    spec = permutation_spec(apply_fn, {"a": array(3, 6), "b": array(6, 2)}, array(4, 3))
    assert bool(spec.groups) == free


def test_a_mask_that_two_layers_share_does_not_tie_their_heads():
    spec = permutation_spec(
        *registered("gpt", (2, 6), jnp.int32, vocab_size=7, max_length=6, width=8, num_heads=2)
    )
    heads = [group for group in spec.groups if group.shape == (2,)]
    assert len(heads) == 4


@pytest.mark.parametrize(
    "read",
    [
        lambda h: jnp.flip(h, -1),
        lambda h: jnp.roll(h, 1, -1) + h,
        lambda h: jnp.cumsum(h, -1),
        lambda h: jnp.argsort(h, -1).astype(h.dtype),
        lambda h: lax.top_k(h, 6)[0],
        lambda h: h[:, ::-1] * h,
        lambda h: h * jnp.arange(6.0)[None],
        lambda h: jnp.take(h, np.array([0, 2, 4, 1, 3, 5]), axis=1),
        lambda h: h.at[:, 2].set(0.0),
        lambda h: lax.dynamic_update_slice(h, h[:, :2], (0, 1)),
        lambda h: jax.vmap(lambda r: jnp.convolve(r, jnp.ones(3), "same"))(h),
    ],
)
def test_what_is_read_by_position_stays_in_place(read):
    def apply_fn(p, x):
        return read(x @ p["a"]) @ p["b"]

    spec = permutation_spec(apply_fn, {"a": array(3, 6), "b": array(6, 2)}, array(4, 3))
    assert spec.groups == ()


def test_no_permutation_depends_on_an_axis_whose_positions_meet():
    # Blocks of channels are mixed by a square matrix, or by reading them backwards: the units in
    # a block may be permuted, but alike in every block.
    def mixed(p, x):
        h = jnp.tanh(x @ p["a"]).reshape(-1, 3, 4)
        h = h + jnp.einsum("gk,bkc->bgc", p["m"], h)
        return h.reshape(-1, 12) @ p["b"]

    def backwards(p, x):
        h = jnp.tanh(x @ p["a"]).reshape(-1, 3, 4)
        return (h + jnp.sin(jnp.flip(h, 1))).reshape(-1, 12) @ p["b"]

    params = {"a": array(3, 12), "b": array(12, 2)}
    spec = permutation_spec(mixed, params | {"m": array(3, 3)}, array(5, 3))
    assert sizes(spec) == [(3,), (4,)]
    assert sizes(permutation_spec(backwards, params, array(5, 3))) == [(4,)]


def test_sorting_moves_entries_along_the_axis_that_it_does_not_fix():
    # The rows may be permuted, but not in each column apart: sorted rows are added to themselves.
    def apply_fn(p):
        return jnp.sum(jnp.sin(p["w"] + jnp.sort(p["w"], axis=1)))

    spec = permutation_spec(apply_fn, {"w": array(3, 6)})
    assert sizes(spec) == [(3,)]
    # Alone, the sorted axis is read without regard to its order.
    spec = permutation_spec(
        lambda p: jnp.sin(jnp.sort(p["w"], axis=1))[:, 2].sum(), {"w": array(3, 6)}
    )
    assert sizes(spec) == [(3,), (3, 6)]


def test_leaves_that_are_not_read_are_listed_and_stay():
    def apply_fn(p, x):
        dead = jnp.cumsum(x @ p["a"], -1)  # its result is not used, so that it fixes nothing
        del dead
        return jax.jit(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"])(p, x)

    params = {"a": array(3, 6), "b": array(6, 2), "c": array(4, 4)}
    spec = permutation_spec(apply_fn, params, array(4, 3))
    assert spec.unused == ("['c']",)
    assert sizes(spec) == [(6,)]


def test_integers_alone_make_no_group():
    def apply_fn(p, x):
        return x + jnp.sum(p["counts"])

    params = {"counts": jax.ShapeDtypeStruct((5,), jnp.int32)}
    assert permutation_spec(apply_fn, params, jax.ShapeDtypeStruct((), jnp.int32)).groups == ()


def test_a_billion_parameters_need_not_exist_to_be_read():
    apply_fn, params, x = registered("tinyllama", (1, 16), jnp.int32)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) > 1e9
    spec = permutation_spec(apply_fn, params, x)
    # One stream; per layer key heads, queries per key head, value width, MLP.
    assert len(spec.groups) == 1 + 4 * 22


def test_nothing_is_warned_of_in_a_network_that_is_read_completely():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert derived(networks.llama()).notes == ()


def equation(jaxpr, path):
    """The equation that a site's path leads to."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    eqn = jaxpr.eqns[path[0]]
    return eqn if len(path) == 1 else equation(bodies(eqn)[path[1]], path[2:])


@pytest.mark.parametrize("make", [networks.mlp, networks.gpt, networks.scanned_heads])
def test_sites_name_the_products_that_read_a_group(make):
    network = make()
    found = analyze(network.apply_fn, network.params, *network.inputs)
    assert found.num_leaves == len(found.spec.leaves)
    for group in found.spec.groups:
        assert found.sites[group.name]
        for site in found.sites[group.name]:
            eqn = equation(found.jaxpr, site.path)
            assert eqn.primitive.name == "dot_general"
            shape = eqn.invars[site.operand].aval.shape
            assert tuple(layout_size(axis) for axis in site.axes) == shape
            on = [name for i in site.summed for name in names(site.axes[i])]
            assert group.name in on
            everywhere = on + [n for axis in (*site.axes, *site.context) for n in names(axis)]
            assert set(group.index) <= set(everywhere)


def test_sites_of_a_free_group_are_its_reductions():
    network = networks.channel_mean()
    found = analyze(network.apply_fn, network.params, *network.inputs)
    (free,) = (group for group in found.spec.groups if group.free)
    (site,) = found.sites[free.name]
    assert equation(found.jaxpr, site.path).primitive.name == "reduce_sum"


def names(layout):
    return [factor.name for factor in factors(layout)]
