"""Specs tried on the function itself: true ones pass, wrong and incomplete ones are caught."""

import dataclasses
import functools

import graphs
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax.symmetry import (
    Factor,
    Group,
    PermutationSpec,
    Product,
    SpecError,
    action,
    check,
    completeness,
    permutation_spec,
    with_kinds,
)
from geojax.symmetry.proof import _applied, generic

KEY = jax.random.key(0)
ALL = {make.__name__: make for make in networks.PLAIN} | networks.MODELS


@functools.cache
def derived(name):
    network = ALL[name]()
    return network, permutation_spec(network.apply_fn, network.params, *network.inputs)


def proved(network, spec, **options):
    return check(spec, network.apply_fn, network.params, *network.inputs, key=KEY, **options)


def changed(spec, path, axes):
    """The spec with other layouts for one leaf."""
    leaves = tuple(
        dataclasses.replace(leaf, axes=axes) if leaf.path == path else leaf for leaf in spec.leaves
    )
    return dataclasses.replace(spec, leaves=leaves)


@pytest.mark.parametrize("name", ALL)
def test_derived_specs_are_true_and_lack_nothing(name):
    network, spec = derived(name)
    report = proved(network, spec)
    assert report.changes.keys() == {group.name for group in spec.groups}
    assert max(*report.changes.values(), report.joint) <= 1e-5
    # The same test would have seen a mistake: one leaf left behind changes the outputs.
    controls = np.array(list(report.controls.values()))
    assert (controls[~np.isnan(controls)] > 1e-3).all()
    missed = completeness(spec, network.apply_fn, network.params, *network.inputs, key=KEY)
    assert missed == []


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_graphs_have_no_false_symmetry_sign_or_scale(first):
    apply_fn, params, x = graphs.batch(range(first, first + 20), np.float32)
    spec = permutation_spec(apply_fn, params, x)
    report = check(spec, apply_fn, params, x, key=jax.random.key(first), rtol=1e-5)
    assert max(*report.changes.values(), report.joint) <= 1e-5
    controls = np.array([c for c in report.controls.values() if not np.isnan(c)])
    assert len(controls) > 30
    assert (controls > 1e-5).mean() > 0.95
    # Nor a false sign or scale; compiled as the function is, this costs its evaluation alone.
    spec = with_kinds(spec, apply_fn, params, x)
    kinds = [group.kind for group in spec.groups]
    assert kinds.count("permutation") > 4
    assert len(kinds) - kinds.count("permutation") > 4
    report = check(spec, apply_fn, params, x, key=jax.random.key(first), rtol=1e-5)
    assert max(*report.changes.values(), report.joint) <= 1e-5


def test_random_graphs_have_no_false_symmetry_in_float64():
    with jax.enable_x64(True):
        apply_fn, params, x = graphs.batch(range(1000, 1020), np.float64)
        spec = permutation_spec(apply_fn, params, x)
        report = check(spec, apply_fn, params, x, key=KEY, rtol=1e-12)
    assert len(report.changes) > 30
    assert max(*report.changes.values(), report.joint) <= 1e-12


def test_a_corrupted_spec_of_a_random_graph_is_rejected_and_the_group_named():
    apply_fn, params, x = graphs.batch(range(2000, 2003), np.float32)
    spec = permutation_spec(apply_fn, params, x)
    check(spec, apply_fn, params, x, key=KEY)
    guilty = 0
    for leaf in spec.leaves:
        for axis, layout in enumerate(leaf.axes):
            alone = isinstance(layout, Factor) and layout.name and not spec[layout.name].index
            if not alone or len(spec.members(layout.name)) < 2:
                continue
            fixed = (*leaf.axes[:axis], Factor("", layout.size), *leaf.axes[axis + 1 :])
            if any(layout.name in group.index for group in spec.groups):
                continue
            wrong = changed(spec, leaf.path, fixed)
            with pytest.raises(SpecError) as caught:
                check(wrong, apply_fn, params, x, key=KEY)
            assert f"group {layout.name!r} is no symmetry" in str(caught.value)
            guilty += 1
    assert guilty >= 8


def test_a_corrupted_spec_is_rejected_and_the_guilty_group_named():
    network, spec = derived("mlp")
    first, second = (group.name for group in spec.groups)
    kernel = "['params']['Dense_1']['kernel']"
    still = changed(spec, "['params']['Dense_1']['bias']", (Factor("", 6),))
    with pytest.raises(SpecError, match=f"group '{second}' is no symmetry") as caught:
        proved(network, still)
    assert kernel in str(caught.value)
    still = changed(spec, kernel, (Factor("", 8), spec.by_path[kernel].axes[1]))
    with pytest.raises(SpecError, match=f"group '{first}' is no symmetry"):
        proved(network, still)


def test_a_permuted_classifier_axis_is_caught():
    network, spec = derived("mlp")
    out = Factor("classes", 3)
    leaves = tuple(
        dataclasses.replace(leaf, axes=(*leaf.axes[:-1], out)) if "Dense_2" in leaf.path else leaf
        for leaf in spec.leaves
    )
    wrong = PermutationSpec(leaves, (*spec.groups, Group("classes", 3)))
    with pytest.raises(SpecError, match="group 'classes' is no symmetry"):
        proved(network, wrong)


def test_inputs_and_outputs_swapped_are_caught():
    network = networks.elman()
    # The recurrent kernel moved on one axis alone.
    spec = permutation_spec(network.apply_fn, network.params, *network.inputs)
    (group,) = spec.groups
    for axes in ((Factor(group.name, 6), Factor("", 6)), (Factor("", 6), Factor(group.name, 6))):
        with pytest.raises(SpecError, match="is no symmetry"):
            proved(network, changed(spec, "['wh']", axes))


def test_leaves_and_shapes_are_compared_first():
    network, spec = derived("mlp")
    params = {"params": dict(network.params["params"]), "state": {}}
    params["params"]["extra"] = {"bias": np.zeros(3, np.float32)}
    with pytest.raises(SpecError, match=r"leaf \['params'\]\['extra'\]\['bias'\].* no place"):
        proved(network._replace(params=params), spec)
    del params["params"]["extra"], params["params"]["Dense_1"]
    with pytest.raises(SpecError, match=r"names leaf \['params'\]\['Dense_1'\]\['bias'\]"):
        proved(network._replace(params=params), spec)
    params["params"]["Dense_1"] = {
        "bias": np.zeros(7, np.float32),
        "kernel": np.zeros((8, 6), np.float32),
    }
    with pytest.raises(SpecError, match=r"\['Dense_1'\]\['bias'\] has shape \(7,\)"):
        proved(network._replace(params=params), spec)


def test_shapes_alone_cannot_be_checked():
    network, spec = derived("mlp")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), network.params)
    with pytest.raises(TypeError, match="shapes only"):
        proved(network._replace(params=shapes), spec)


def test_zero_biases_and_unit_scales_hide_nothing():
    # A fresh network: biases zero, and inputs of ones. The bias is wrongly left in place.
    def apply_fn(p, x):
        return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]

    params = {"w": np.ones((3, 5), np.float32), "b": np.zeros(5, np.float32)}
    params["v"] = np.ones((5, 2), np.float32)
    x = np.ones((4, 3), np.float32)
    spec = permutation_spec(apply_fn, params, x)
    check(spec, apply_fn, params, x, key=KEY)
    with pytest.raises(SpecError, match="'w:1' is no symmetry"):
        check(changed(spec, "['b']", (Factor("", 5),)), apply_fn, params, x, key=KEY)


def test_generic_parameters_keep_what_is_positive_positive():
    params = {"var": np.full(50, 1e-3, np.float32), "b": np.zeros(50, np.float32)}
    params["n"] = np.arange(3)
    out = jax.tree.map(np.asarray, generic(params, KEY))
    assert (out["var"] > 0).all()
    assert len(np.unique(out["var"])) == len(np.unique(out["b"])) == 50
    assert (out["n"] == np.arange(3)).all()


def test_unmoved_statistics_change_the_outputs():
    network, spec = derived("resnet-batch")
    marked = [leaf for leaf in spec.leaves if leaf.statistic]
    still = spec
    for leaf in marked:
        still = changed(still, leaf.path, tuple(Factor("", n) for n in leaf.shape))
    with pytest.raises(SpecError, match="is no symmetry"):
        proved(network, still)


def test_any_permutation_of_normalized_groups_is_not_a_symmetry():
    network, spec = derived("resnet-group")
    name = "['params']['norm1']['scale']"
    outer, inner = spec.by_path[name].axes[0].parts
    stream = Factor("stream", outer.size * inner.size)

    def whole(layout):
        same = getattr(layout, "parts", None) == (outer, inner)
        return stream if same else layout

    leaves = tuple(
        dataclasses.replace(leaf, axes=tuple(whole(axis) for axis in leaf.axes))
        for leaf in spec.leaves
    )
    groups = [group for group in spec.groups if group.name not in (outer.name, inner.name)]
    wrong = PermutationSpec(leaves, (*groups, Group("stream", stream.size)))
    with pytest.raises(SpecError, match="'stream' is no symmetry"):
        proved(network, wrong)


def test_queries_alone_cannot_be_permuted():
    network, spec = derived("gpt")
    own = Group("own", 4)
    leaves = tuple(
        dataclasses.replace(leaf, axes=(*leaf.axes[:-1], Factor("own", 4)))
        if "block_0" in leaf.path and "'query'" in leaf.path
        else leaf
        for leaf in spec.leaves
    )
    wrong = PermutationSpec(leaves, (*spec.groups, own))
    with pytest.raises(SpecError, match="is no symmetry"):
        proved(network, wrong)


def test_gates_of_an_lstm_cannot_be_exchanged():
    network, spec = derived("lstm")
    (group,) = spec.groups
    gates, units = Factor("gates", 4), Factor(group.name, 6)
    leaves = tuple(
        dataclasses.replace(leaf, axes=(*leaf.axes[:-1], Product((gates, units))))
        if leaf.shape[-1] == 24
        else leaf
        for leaf in spec.leaves
    )
    wrong = PermutationSpec(leaves, (group, Group("gates", 4)))
    with pytest.raises(SpecError, match="'gates' is no symmetry"):
        proved(network, wrong)


@pytest.mark.parametrize("name", ["scanned_heads", "zero_padded"])
def test_the_proof_moves_parameters_as_the_library_does(name):
    network, spec = derived(name)
    permutation = action.random(jax.random.key(3), spec)
    ours = _applied(spec, permutation, network.params)
    theirs = jax.jit(action.apply, static_argnums=0)(spec, permutation, network.params)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (np.asarray(x) == np.asarray(y)).all()


def test_completeness_finds_what_was_given_up():
    network, spec = derived("mlp")
    first, second = spec.groups
    missed = completeness(
        spec.pin(first.name), network.apply_fn, network.params, *network.inputs, key=KEY
    )
    (one,) = missed
    assert set(one.places) == set(spec.members(first.name))
    assert one.size == first.size
    assert one.change <= 1e-5


def test_completeness_sees_through_a_primitive_without_a_rule():
    def apply_fn(p, x):
        h = x @ p["a"] + p["c"][None]
        return jax.pure_callback(lambda h: np.tanh(np.asarray(h)), h, h) @ p["b"]

    rng = np.random.default_rng(0)
    params = {
        "a": rng.standard_normal((3, 6)).astype(np.float32),
        "b": rng.standard_normal((6, 2)).astype(np.float32),
        "c": np.zeros(6, np.float32),
    }
    x = rng.standard_normal((4, 3)).astype(np.float32)
    with pytest.warns(UserWarning, match="pure_callback"):
        spec = permutation_spec(apply_fn, params, x)
    assert spec.groups == ()
    (one,) = completeness(spec, apply_fn, params, x, key=KEY)
    assert set(one.places) == {("['a']", 1), ("['b']", 0), ("['c']", 0)}


def test_gradients_move_with_the_parameters():
    network, spec = derived("llama")
    permutation = action.random(jax.random.key(5), spec)

    @jax.jit
    def gradient(params, tokens):
        return jax.grad(lambda p: jnp.sum(jnp.sin(network.apply_fn(p, tokens))))(params)

    params = jax.tree.map(jnp.asarray, generic(network.params, KEY))
    there = gradient(_applied(spec, permutation, params), *network.inputs)
    back = _applied(spec, permutation, gradient(params, *network.inputs))
    for x, y in zip(jax.tree.leaves(there), jax.tree.leaves(back), strict=True):
        assert np.abs(x - y).max() <= 1e-5 * max(1.0, float(np.abs(y).max()))


def test_sharded_parameters_and_data_keep_their_places(mesh):
    def apply_fn(p, x):
        return jnp.tanh(x @ p["a"] + p["c"][None]) @ p["b"]

    network = networks.plain(apply_fn, networks.shapes(a=(3, 8), c=(8,), b=(8, 2)), (8, 3))
    specs = {"a": P(None, "model"), "c": P("model"), "b": P("model", None)}
    with jax.set_mesh(mesh):
        placed = {
            k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in network.params.items()
        }
        x = jax.device_put(network.inputs[0], NamedSharding(mesh, P("data")))

        def sharded(p, x):
            hidden = jnp.tanh(jnp.einsum("bi,ij->bj", x, p["a"]) + p["c"][None])
            return jnp.sum(hidden[:, :, None] * p["b"][None], axis=1)

        spec = permutation_spec(sharded, placed, x)
        report = check(spec, sharded, placed, x, key=KEY)
    assert [group.size for group in spec.groups] == [8]
    assert report.joint <= 1e-5 < report.controls[spec.groups[0].name]
