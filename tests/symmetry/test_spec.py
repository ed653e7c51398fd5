"""Specs by hand: builders, dictionaries in any layout, validation, editing, writing."""

import functools
import itertools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from geojax import models, permute
from geojax.symmetry import (
    Concatenation,
    Factor,
    PermutationSpec,
    SpecError,
    action,
    bottleneck,
    conv,
    dense,
    from_axes,
    norm,
    permutation_spec,
    residual_block,
    shortcut_block,
    validate,
)
from geojax.symmetry.spec import short

KEY = jax.random.key(0)


def mlp_axes(num_hidden=3):
    groups = [None, *(f"P_{i}" for i in range(num_hidden)), None]
    layers = [dense(f"Dense_{i}", *pair) for i, pair in enumerate(itertools.pairwise(groups))]
    return functools.reduce(lambda x, y: x | y, layers)


def vgg16_axes():
    groups = [None, *(f"P_Conv_{i}" for i in range(13)), "P_Dense_0", "P_Dense_1", None]
    axes = {}
    for i, (before, after) in enumerate(itertools.pairwise(groups)):
        if i < 13:
            axes |= conv(f"Conv_{i}", before, after, bias=True) | norm(f"LayerNorm_{i}", after)
        else:
            axes |= dense(f"Dense_{i - 13}", before, after)
    return axes


def resnet20_axes():
    axes = conv("conv1", None, "P_bg0") | norm("norm1", "P_bg0") | dense("dense", "P_bg2", None)
    for i, j in itertools.product(range(3), range(3)):
        block, inner = f"blockgroups_{i}/blocks_{j}", f"P_{i}_{j}_inner"
        if i and not j:
            axes |= shortcut_block(block, f"P_bg{i - 1}", f"P_bg{i}", inner)
        else:
            axes |= residual_block(block, f"P_bg{i}", inner)
    return axes


def resnet50_axes():
    axes = conv("conv1", None, "P_bg0") | norm("norm1", "P_bg0") | dense("dense", "P_bg4", None)
    for i, count in enumerate((3, 4, 6, 3), start=1):
        for j in range(count):
            before = f"P_bg{i}" if j else f"P_bg{i - 1}"
            inner = (f"P_{i}_{j}_inner1", f"P_{i}_{j}_inner2")
            axes |= bottleneck(f"layer{i}_{j}", before, f"P_bg{i}", inner, shortcut=not j)
    return axes


BY_HAND = {
    "mlp": (mlp_axes, 3, {}, (1, 8, 8, 3)),
    "vgg16": (vgg16_axes, 15, {"norm": "layer"}, (1, 32, 32, 3)),
    "resnet20": (resnet20_axes, 12, {}, (1, 32, 32, 3)),
    "resnet50": (resnet50_axes, 37, {"norm": "layer"}, (1, 64, 64, 3)),
}


def as_sets(spec):
    """The groups as sets of (leaf, axis)."""
    return {frozenset(spec.members(group.name)) for group in spec.groups}


@pytest.mark.parametrize("name", BY_HAND)
def test_specs_by_hand_have_the_groups_that_the_jaxpr_says(name):
    make, num_groups, options, shape = BY_HAND[name]
    model = models.build(name, **options)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    params, state = jax.eval_shape(model.init, KEY, x)
    by_hand = from_axes(make(), params)
    derived = permutation_spec(lambda p, x: model.apply(p, state, x, False)[0], params, x)
    assert len(by_hand.groups) == num_groups
    assert as_sets(by_hand) == as_sets(derived)
    assert by_hand.axes_to_groups().keys() == derived.axes_to_groups().keys()
    # The dictionary is the inverse of the groups, and the inverse of that.
    assert {short(path): axes for path, axes in by_hand.axes_to_groups().items()} == make()
    assert from_axes(by_hand.axes_to_groups(), params) == by_hand


def test_builders_give_the_dictionaries_of_git_re_basin():
    assert mlp_axes(2) == {
        "Dense_0/kernel": (None, "P_0"),
        "Dense_0/bias": ("P_0",),
        "Dense_1/kernel": ("P_0", "P_1"),
        "Dense_1/bias": ("P_1",),
        "Dense_2/kernel": ("P_1", None),
        "Dense_2/bias": (None,),
    }
    block = {
        "b/conv1/kernel": (None, None, "P", "I"),
        "b/norm1/scale": ("I",),
        "b/norm1/bias": ("I",),
        "b/norm2/scale": ("Q",),
        "b/norm2/bias": ("Q",),
        "b/conv2/kernel": (None, None, "I", "Q"),
    }
    assert shortcut_block("b", "P", "Q", "I") == block | {
        "b/shortcut/layers_0/kernel": (None, None, "P", "Q"),
        "b/shortcut/layers_1/scale": ("Q",),
        "b/shortcut/layers_1/bias": ("Q",),
    }
    assert residual_block("b", "P", "I") == {
        path: tuple("P" if group == "Q" else group for group in axes)
        for path, axes in block.items()
    }
    assert bottleneck("b", "P", "P", ("I", "J")) == {
        "b/conv1/kernel": (None, None, "P", "I"),
        "b/norm1/scale": ("I",),
        "b/norm1/bias": ("I",),
        "b/conv2/kernel": (None, None, "I", "J"),
        "b/norm2/scale": ("J",),
        "b/norm2/bias": ("J",),
        "b/conv3/kernel": (None, None, "J", "P"),
        "b/norm3/scale": ("P",),
        "b/norm3/bias": ("P",),
    }
    assert conv("c", "P", None, bias=True, num_spatial=1) == {
        "c/kernel": (None, "P", None),
        "c/bias": (None,),
    }
    assert norm("n", "P", bias=False) == {"n/scale": ("P",)}
    with pytest.raises(SpecError, match="bottleneck b adds its input, of group 'P', to its output"):
        bottleneck("b", "P", "Q", ("I", "J"))


# ------------------------------------------------------------------------------ any layout


def oracle(axes, permutation, params):
    """Git Re-Basin's gathers: along every axis that has a group."""
    out = {}
    for path, array in params.items():
        for axis, group in enumerate(axes[path]):
            if group is not None:
                array = np.take(array, permutation[group], axis)
        out[path] = array
    return out


def random_arrays(shapes):
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


TORCH = {
    "features.0.weight": ((4, 3, 3, 3), ("P", None, None, None)),
    "features.1.weight": ((4,), ("P",)),
    "features.1.running_mean": ((4,), ("P",)),
    "features.3.weight": ((5, 4, 3, 3), ("Q", "P", None, None)),
    "features.3.bias": ((5,), ("Q",)),
    "fc.weight": ((2, 5), (None, "Q")),
}
JAX = {
    "features_0/kernel": ((3, 3, 3, 4), (None, None, None, "P")),
    "features_1/scale": ((4,), ("P",)),
    "features_1/running_mean": ((4,), ("P",)),
    "features_3/kernel": ((3, 3, 4, 5), (None, None, "P", "Q")),
    "features_3/bias": ((5,), ("Q",)),
    "fc/kernel": ((5, 2), ("Q", None)),
}


@pytest.mark.parametrize("layout", [TORCH, JAX], ids=["torch", "jax"])
def test_dictionaries_move_parameters_as_gathers_in_numpy_do(layout):
    axes = {path: entry for path, (_, entry) in layout.items()}
    params = random_arrays({path: shape for path, (shape, _) in layout.items()})
    spec = from_axes(axes, params)
    assert [leaf.path for leaf in spec.leaves if leaf.statistic] == [
        f"['{path}']" for path in params if "running" in path
    ]
    permutation = {"P": np.array([2, 0, 3, 1]), "Q": np.array([4, 2, 0, 1, 3])}
    moved = action.apply(spec, permutation, params)
    expected = oracle(axes, permutation, params)
    for path, array in expected.items():
        np.testing.assert_array_equal(moved[path], array)
        assert array.shape == params[path].shape


def test_paths_may_be_written_with_slashes_dots_or_brackets():
    params = {"a": {"w": np.zeros((2, 3))}, "b": [np.zeros(3)]}
    one = from_axes({"a/w": (None, "h"), "b/0": ("h",)}, params)
    assert from_axes({"a.w": (None, "h"), "b.0": ["h"]}, params) == one
    assert from_axes({"['a']['w']": (None, "h"), "['b'][0]": ("h",)}, params) == one
    with pytest.raises(SpecError, match=r"leaf a/w has two entries: a/w, a\.w"):
        from_axes({"a/w": (None, "h"), "a.w": (None, "h"), "b/0": ("h",)}, params)
    with pytest.raises(SpecError, match="two leaves of the parameters are called a/w"):
        from_axes({"a/w": (None, "h")}, {"a": {"w": np.zeros((2, 3))}, "a/w": np.zeros((2, 3))})


def test_what_is_a_statistic_can_be_said():
    axes = {"s": ("h",), "w": ("h",), "batch_stats/m": ("h",)}
    params = {"s": np.zeros(3), "w": np.zeros(3), "batch_stats": {"m": np.zeros(3)}}
    default = from_axes(axes, params)
    assert [leaf.statistic for leaf in default.leaves] == [True, False, False]
    chosen = from_axes(axes, params, statistics=lambda path: path == "s")
    assert [leaf.statistic for leaf in chosen.leaves] == [False, True, False]


# ------------------------------------------------------------------------------ seven mistakes


@functools.cache
def square_mlp():
    """All widths equal, so that no size gives a mistake away."""
    rng = np.random.default_rng(0)
    params = {
        f"Dense_{i}": {
            "kernel": rng.normal(size=(6, 6)).astype(np.float32),
            "bias": rng.normal(size=6).astype(np.float32),
        }
        for i in range(3)
    }

    def apply_fn(params, x):
        for i in range(3):
            x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"][None]
            x = jnp.tanh(x) if i < 2 else x
        return x

    return apply_fn, params, rng.normal(size=(5, 6)).astype(np.float32)


def without(axes, path):
    return {p: entry for p, entry in axes.items() if p != path}


MUTATIONS = {
    "missing leaf": (
        lambda axes: without(axes, "Dense_1/bias"),
        r"leaf \['Dense_1'\]\['bias'\] has no entry",
    ),
    "extra leaf": (
        lambda axes: axes | {"Dense_3/bias": (None,)},
        "entry of leaf Dense_3/bias has no leaf",
    ),
    "wrong rank": (
        lambda axes: axes | {"Dense_1/kernel": ("P_0", "P_1", None)},
        r"leaf \['Dense_1'\]\['kernel'\] has 2 axes \(6, 6\); its entry .* has 3",
    ),
    "unknown group": (
        lambda axes: axes | {"Dense_1/kernel": ("P_O", "P_1")},
        r"axis 0 of leaf \['Dense_1'\]\['kernel'\] names the unknown group 'P_O'",
    ),
    "classifier axis permuted": (
        lambda axes: axes | {"Dense_2/kernel": ("P_1", "P_0"), "Dense_2/bias": ("P_0",)},
        r"group 'P_0' is no symmetry.*\['Dense_2'\]\['kernel'\] axis 1",
    ),
    "swapped in and out": (
        lambda axes: axes | {"Dense_1/kernel": ("P_1", "P_0")},
        r"group 'P_0' is no symmetry.*\['Dense_1'\]\['kernel'\] axis 1",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_mistake_is_an_error_that_names_the_leaf(mutation):
    apply_fn, params, x = square_mlp()
    mutate, message = MUTATIONS[mutation]

    def both(axes):
        spec = from_axes(axes, params, groups=["P_0", "P_1"])
        return validate(spec, params, apply_fn, x, key=KEY)

    with pytest.raises(SpecError, match=message):
        both(mutate(mlp_axes(2)))


def test_a_group_of_two_sizes_is_an_error_that_names_both_leaves():
    _, params, _ = square_mlp()
    params = params | {"Dense_1": {"kernel": np.zeros((6, 5)), "bias": np.zeros(6)}}
    message = (
        r"axis 1 of leaf \['Dense_1'\]\['kernel'\] has 5 units of group 'P_1'; "
        r"axis 0 of leaf \['Dense_1'\]\['bias'\] has 6"
    )
    with pytest.raises(SpecError, match=message):
        from_axes(mlp_axes(2), params)


def test_a_right_spec_is_valid_of_its_parameters_and_its_function():
    apply_fn, params, x = square_mlp()
    spec = from_axes(mlp_axes(2), params, groups=["P_0", "P_1"])
    report = validate(spec, params, apply_fn, x, key=KEY)
    assert report is not None
    assert report.joint <= 1e-5 < min(report.controls.values())
    assert validate(spec, params) is None
    assert validate(spec, jax.eval_shape(lambda p: p, params)) is None
    with pytest.raises(ValueError, match="pass key"):
        validate(spec, params, apply_fn, x)


def test_parameters_other_than_those_of_the_spec_are_refused_by_path():
    _, params, _ = square_mlp()
    spec = from_axes(mlp_axes(2), params)
    layer = params["Dense_1"]
    cases = {
        r"leaf \['Dense_1'\]\['bias'\] of the spec is missing": {"kernel": layer["kernel"]},
        r"leaf \['Dense_1'\]\['scale'\] of the parameters has no place": layer
        | {"scale": np.ones(6)},
        r"leaf \['Dense_1'\]\['bias'\] has 2 axes \(6, 1\)": layer | {"bias": np.ones((6, 1))},
        r"leaf \['Dense_1'\]\['bias'\] has shape \(5,\)": layer | {"bias": np.ones(5)},
    }
    for message, changed in cases.items():
        with pytest.raises(SpecError, match=message):
            validate(spec, params | {"Dense_1": changed})


# ---------------------------------------------------------------------------- writing, hashing


ARCHITECTURES = {
    "mlp": networks.mlp,
    "vgg": networks.vgg,
    "resnet": functools.partial(networks.resnet, "group"),
    "gpt": networks.gpt,
    "lstm": networks.lstm,
    "dense_net": networks.dense_net,
}


@functools.cache
def derived(name):
    network = ARCHITECTURES[name]()
    return permutation_spec(network.apply_fn, network.params, *network.inputs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_json_gives_the_spec_back_and_the_table_lists_every_leaf_once(name):
    spec = derived(name)
    again = PermutationSpec.from_json(spec.to_json())
    assert again == spec
    assert hash(again) == hash(spec)
    first = [line.split()[0] for line in spec.table().splitlines() if line.strip()]
    assert [first.count(short(leaf.path)) for leaf in spec.leaves] == [1] * len(spec.leaves)


def test_specs_differ_where_anything_in_them_does():
    spec = derived("mlp")
    name = spec.groups[0].name
    others = [spec.pin(name), spec.rename({name: "other"}), derived("vgg")]
    assert all(other != spec for other in others)
    assert len({spec, PermutationSpec.from_json(spec.to_json()), *others}) == 4


def test_an_equal_spec_is_the_same_static_argument():
    _, params, _ = square_mlp()
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def moved(spec, permutation, params):
        traces.append(spec)
        return action.apply(spec, permutation, params)

    for _ in range(2):
        spec = from_axes(mlp_axes(2), params)
        out = moved(spec, action.random(KEY, spec), params)
    assert len(traces) == 1
    moved(spec.pin("P_0"), action.random(KEY, spec.pin("P_0")), params)
    assert len(traces) == 2
    np.testing.assert_array_equal(out["Dense_2"]["bias"], params["Dense_2"]["bias"])


# ------------------------------------------------------------------------------------- editing


@functools.cache
def planted():
    """A network of three hidden layers of 12, and the same permuted."""
    rng = np.random.default_rng(1)
    params = {
        f"Dense_{i}": {
            "kernel": rng.normal(size=(12, 12)).astype(np.float32),
            "bias": rng.normal(size=12).astype(np.float32),
        }
        for i in range(4)
    }
    spec = from_axes(mlp_axes(3), params)
    permutation = action.random(KEY, spec)
    assert not any(action.num_fixed_points(permutation)[g.name] == 12 for g in spec.groups)
    return spec, params, jax.tree.map(np.asarray, action.apply(spec, permutation, params))


@pytest.mark.parametrize("method", ["coordinate_descent", "progressive", "frank_wolfe", "best"])
def test_a_pinned_group_stays_in_place_through_every_method(method):
    spec, a, b = planted()
    pinned = spec.pin("P_1")
    assert [group.name for group in pinned.groups] == ["P_0", "P_2"]
    assert pinned.members("P_0") == spec.members("P_0")
    result = permute.weight_matching(pinned, a, b, method=method)
    assert result.permutation.keys() == {"P_0", "P_2"}
    assert result.objective > result.initial
    moved = action.apply(pinned, result.permutation, b)
    np.testing.assert_array_equal(moved["Dense_1"]["bias"], b["Dense_1"]["bias"])
    with pytest.raises(SpecError, match="there is no group 'P_9'"):
        spec.pin("P_9")


def test_a_subset_leaves_all_other_leaves_as_they_are():
    spec, a, b = planted()
    part = spec.subset(["Dense_0/*", "Dense_1/*", "Dense_2/kernel"])
    assert [group.name for group in part.groups] == ["P_0", "P_1"]
    assert [g.name for g in spec.subset(exclude="Dense_0/*").groups] == ["P_1", "P_2"]
    result = permute.weight_matching(part, a, b)
    assert result.objective > result.initial
    moved = action.apply(part, result.permutation, b)
    for where in (("Dense_2", "bias"), ("Dense_3", "kernel"), ("Dense_3", "bias")):
        np.testing.assert_array_equal(moved[where[0]][where[1]], b[where[0]][where[1]])
    assert (moved["Dense_0"]["bias"] != b["Dense_0"]["bias"]).any()
    with pytest.raises(SpecError, match="include pattern 'nothing' matches no leaf"):
        spec.subset("nothing")


def test_merged_groups_move_together():
    spec, a, _ = planted()
    merged = spec.merge("P_0", "P_2")
    assert [group.name for group in merged.groups] == ["P_0", "P_1"]
    assert set(merged.members("P_0")) == {*spec.members("P_0"), *spec.members("P_2")}
    p = action.random(KEY, merged)
    expected = action.apply(spec, {**p, "P_2": p["P_0"]}, a)
    jax.tree.map(np.testing.assert_array_equal, action.apply(merged, p, a), expected)
    with pytest.raises(SpecError, match="cannot be one"):
        spec.split("P_0", [6, 6]).merge("P_0[0]", "P_1")


def test_a_split_group_moves_within_its_blocks():
    spec, a, _ = planted()
    split = spec.split("P_0", [5, 7])
    layout = split.by_path["['Dense_0']['bias']"].axes[0]
    assert layout == Concatenation((Factor("P_0[0]", 5), Factor("P_0[1]", 7)))
    p = action.random(KEY, split)
    joined = np.concatenate([p["P_0[0]"], np.asarray(p["P_0[1]"]) + 5])
    whole = {"P_0": joined, "P_1": p["P_1"], "P_2": p["P_2"]}
    expected = action.apply(spec, whole, a)
    jax.tree.map(np.testing.assert_array_equal, action.apply(split, p, a), expected)
    with pytest.raises(SpecError, match=r"\[5, 6\] does not add up to the 12 units of 'P_0'"):
        spec.split("P_0", [5, 6])


def test_renamed_groups_act_as_before():
    spec, a, _ = planted()
    renamed = spec.rename({"P_0": "first", "P_1": "P_0"})
    assert [group.name for group in renamed.groups] == ["first", "P_0", "P_2"]
    assert as_sets(renamed) == as_sets(spec)
    p = action.random(KEY, spec)
    new = {"first": p["P_0"], "P_0": p["P_1"], "P_2": p["P_2"]}
    expected = action.apply(spec, p, a)
    jax.tree.map(np.testing.assert_array_equal, action.apply(renamed, new, a), expected)
    with pytest.raises(SpecError, match="gives two groups one name"):
        spec.rename({"P_0": "P_1"})
