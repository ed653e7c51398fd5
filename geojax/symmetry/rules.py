"""What each primitive means for axes: which are one, which stay in place, which are cut or merged.

A rule takes the walk, the equation and its operands, and returns the outputs. What a rule does not
know it must fix; the walk does so for every primitive without a rule.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from geojax.symmetry.atoms import (
    UNIT,
    Axis,
    cut,
    fixed,
    fresh,
    is_pinned,
    joined,
    mix,
    nested,
    pin,
    unify,
)

__all__ = [
    "RULES",
    "SILENT",
    "Rule",
    "Value",
    "Walker",
    "constant",
    "rule",
    "sized",
    "touched",
    "with_axes",
]


class Value(NamedTuple):
    """An array in the walk.

    Attributes:
        axes: One expression per axis.
        uniform: Whether the array is constant along that axis, so that nothing on it can matter.
        data: Whether it depends on the inputs.
        zero: Whether it is known to be zero.
        powers: What `kinds` knows of each axis.
    """

    axes: tuple[Axis, ...]
    uniform: tuple[bool, ...]
    data: bool = False
    zero: bool = False
    powers: Any = None


class Walker(Protocol):
    """What a rule may tell the walk."""

    def contracted(
        self,
        eqn: Any,
        operands: Sequence[Value],
        summed: Sequence[Sequence[int]],
        pairs: Iterable[tuple[Axis, bool]],
        free: Sequence[Iterable[Axis]],
    ) -> None:
        """Record a sum of products.

        Args:
            eqn: The equation.
            operands: Its two operands.
            summed: For each operand, the axes that hold what is summed over.
            pairs: What is summed over, and whether an operand is constant along it.
            free: For each operand, what is neither summed over nor common to both.
        """
        ...

    def reduced(self, eqn: Any, operand: Value, axes: Sequence[int]) -> None:
        """Record that axes of an operand are read without regard to their order."""
        ...


Rule = Callable[[Walker, Any, list[Value]], list[Value] | None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of some primitives."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


# Without a rule, and nobody expects one: these make or take keys.
_SILENT = (
    "random_wrap random_unwrap random_seed random_fold_in random_split random_clone "
    "create_token after_all debug_callback debug_print"
)
SILENT = frozenset(_SILENT.split())


def touched(axis: Axis, size: int | None = None) -> Axis:
    """Fix an axis along which entries meet or move; returns the axis of the result, another one."""
    pin(axis, mixed=True)
    return fixed(axis.size if size is None else size, [axis])


def constant(array: Any) -> Value:
    """A captured array: each axis is fixed unless the values are constant along it."""
    try:
        values = np.asarray(array)
    except (TypeError, ValueError, RuntimeError):  # keys and tracers show no values
        return Value(tuple(fixed(n) for n in array.shape), (False,) * array.ndim)
    uniform = tuple(
        bool(n == 1 or (values == values.take([0], axis)).all())
        for axis, n in enumerate(values.shape)
        if n
    )
    if values.size == 0:
        uniform = (False,) * values.ndim
    return Value(
        tuple(fresh(n) if u else fixed(n) for n, u in zip(values.shape, uniform, strict=True)),
        uniform,
        zero=not values.any(),
    )


def _new(shape: Sequence[int]) -> Value:
    """An array that is constant along every axis."""
    return Value(tuple(fresh(n) for n in shape), (True,) * len(shape))


# --------------------------------------------------------------------------- entry by entry


_ENTRY_BY_ENTRY = (
    "abs acos acosh add add_any add_jaxvals and asin asinh atan atan2 atanh bessel_i0e bessel_i1e "
    "cbrt ceil clamp clz complex conj convert_element_type copy copy_p cos cosh digamma div eq "
    "eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag "
    "integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max min mul ne neg "
    "nextafter not or polygamma population_count pow pvary pcast real reduce_precision "
    "regularized_incomplete_beta rem reshard round rsqrt select_n sharding_constraint mesh_cast "
    "shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square "
    "stop_gradient sub tan tanh xor zeta"
)


@rule(*_ENTRY_BY_ENTRY.split())
def _elementwise(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value] | None:
    shape = eqn.outvars[0].aval.shape
    # Scalars meet every entry. Axes of size one are stretched without a broadcast in the jaxpr.
    full = [value for value in operands if value.axes]
    if any(len(value.axes) != len(shape) for value in full):
        return None
    axes, uniform = [], []
    for axis, size in enumerate(shape):
        found: Axis | None = None
        for value in full:
            if value.axes[axis].size != size or value.uniform[axis]:
                continue
            if found is None:
                found = value.axes[axis]
            else:
                unify(found, value.axes[axis])
        axes.append(fresh(size) if found is None else found)
        uniform.append(found is None)
    return [Value(tuple(axes), tuple(uniform))]


@rule("name", "optimization_barrier", "device_put", "copy")
def _pass(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value] | None:
    return operands if len(operands) == len(eqn.outvars) else None


@rule("bitcast_convert_type")
def _bitcast(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value] | None:
    same = eqn.invars[0].aval.shape == eqn.outvars[0].aval.shape
    return operands if same else None


@rule("iota")
def _iota(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    shape, along = eqn.outvars[0].aval.shape, eqn.params["dimension"]
    return [
        Value(
            tuple(fixed(n) if axis == along else fresh(n) for axis, n in enumerate(shape)),
            tuple(axis != along for axis in range(len(shape))),
        )
    ]


# --------------------------------------------------------------------------- shape


@rule("broadcast_in_dim")
def _broadcast(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    out = _new(shape)
    axes, uniform = list(out.axes), list(out.uniform)
    for source, place in enumerate(places):
        if operands[0].axes[source].size == shape[place]:
            axes[place] = operands[0].axes[source]
            uniform[place] = operands[0].uniform[source]
    return [Value(tuple(axes), tuple(uniform))]


def _picked(value: Value, places: Iterable[int]) -> Value:
    places = tuple(places)
    return Value(tuple(value.axes[i] for i in places), tuple(value.uniform[i] for i in places))


@rule("transpose")
def _transpose(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    return [_picked(operands[0], eqn.params["permutation"])]


@rule("squeeze")
def _squeeze(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    gone = {d % len(operands[0].axes) for d in eqn.params["dimensions"]}
    return [_picked(operands[0], (i for i in range(len(operands[0].axes)) if i not in gone))]


@rule("reshape")
def _reshape(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value] | None:
    if eqn.params.get("dimensions") is not None:
        return None
    (value,) = operands
    old = [axis.size for axis in value.axes]
    new = list(eqn.params["new_sizes"])
    if 0 in old:
        return None
    out = _new(new)
    axes, uniform = list(out.axes), list(out.uniform)
    i = j = 0
    while True:
        # The shortest runs of old and new axes that hold equally many entries.
        while i < len(old) and old[i] == 1:
            i += 1
        while j < len(new) and new[j] == 1:
            j += 1
        if i == len(old) or j == len(new):
            break
        before, after = [i], [j]
        while (a := math.prod(old[k] for k in before)) != (b := math.prod(new[k] for k in after)):
            if a < b:
                before.append(before[-1] + 1)
            else:
                after.append(after[-1] + 1)
        i, j = before[-1] + 1, after[-1] + 1
        same = all(value.uniform[k] for k in before if old[k] > 1)
        if same:
            continue
        merged = nested([value.axes[k] for k in before])
        if len(after) == 1:
            axes[after[0]] = merged
        else:
            unify(merged, nested([axes[k] for k in after]))
        for k in after:
            uniform[k] = new[k] == 1
    return [Value(tuple(axes), tuple(uniform))]


def with_axes(value: Value, change: Callable[[int, Axis], Axis | None]) -> Value:
    """The value with some axes replaced; None leaves an axis."""
    axes, uniform = list(value.axes), list(value.uniform)
    for i, axis in enumerate(value.axes):
        if uniform[i]:
            continue
        other = change(i, axis)
        if other is not None:
            axes[i] = other
    return Value(tuple(axes), tuple(uniform))


def _range(axis: Axis, start: int, stop: int) -> Axis:
    """A run of positions of an axis."""
    if (start, stop) == (0, axis.size):
        return axis
    if stop == start or is_pinned(axis):
        return touched(axis, stop - start)
    if stop < axis.size:
        pieces = cut(axis, stop)
        if pieces is None:
            return touched(axis, stop - start)
        rest = pieces[0]
    else:
        rest = axis
    if start == 0:
        return rest
    pieces = cut(rest, start)
    return touched(axis, stop - start) if pieces is None else pieces[1]


def sized(value: Value, shape: Sequence[int]) -> Value:
    """The value with axes that are uniform made as long as the result's."""
    return Value(
        tuple(
            fresh(n) if u and axis.size != n else axis
            for axis, u, n in zip(value.axes, value.uniform, shape, strict=True)
        ),
        value.uniform,
    )


@rule("slice")
def _slice(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    shape = eqn.outvars[0].aval.shape
    strides = eqn.params["strides"] or (1,) * len(starts)

    def change(i: int, axis: Axis) -> Axis | None:
        if shape[i] == axis.size:
            return None
        if strides[i] != 1:
            return touched(axis, shape[i])
        return _range(axis, int(starts[i]), int(stops[i]))

    return [sized(with_axes(operands[0], change), shape)]


@rule("split")
def _split(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    along, sizes = eqn.params["axis"], [int(n) for n in eqn.params["sizes"]]
    (value,) = operands
    out, start = [], 0
    for size, var in zip(sizes, eqn.outvars, strict=True):
        piece = with_axes(
            value,
            lambda i, axis, start=start, size=size: (
                _range(axis, start, start + size) if i == along else None
            ),
        )
        out.append(sized(piece, var.aval.shape))
        start += size
    return out


@rule("concatenate")
def _concatenate(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    along = eqn.params["dimension"]
    axes, uniform = [], []
    for i in range(len(operands[0].axes)):
        if i == along:
            axes.append(joined(value.axes[i] for value in operands))
            uniform.append(False)
            continue
        moving = [value.axes[i] for value in operands if not value.uniform[i]]
        for axis in moving[1:]:
            unify(moving[0], axis)
        axes.append(moving[0] if moving else operands[0].axes[i])
        uniform.append(not moving)
    return [Value(tuple(axes), tuple(uniform))]


@rule("pad")
def _pad(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    value, shape = operands[0], eqn.outvars[0].aval.shape
    axes, uniform = list(value.axes), list(value.uniform)
    for i, (low, high, interior) in enumerate(eqn.params["padding_config"]):
        low, high = int(low), int(high)
        if not (low or high or interior):
            continue
        if interior or low < 0 or high < 0 or is_pinned(axes[i]):
            axes[i] = touched(axes[i], shape[i])
        else:
            # What is padded holds one number: as good as fresh axes that nothing else reads.
            sides = [fresh(n) if n else None for n in (low, high)]
            axes[i] = joined(x for x in (sides[0], axes[i], sides[1]) if x is not None)
        uniform[i] = False
    return [Value(tuple(axes), tuple(uniform))]


@rule("rev")
def _rev(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    dims = eqn.params["dimensions"]
    return [with_axes(operands[0], lambda i, axis: touched(axis) if i in dims else None)]


# --------------------------------------------------------------------------- reductions


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
@rule("reduce_and", "reduce_or", "reduce_xor")
def _reduce(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    dims = eqn.params["axes"]
    walk.reduced(eqn, operands[0], dims)
    return [_picked(operands[0], (i for i in range(len(operands[0].axes)) if i not in dims))]


@rule("argmax", "argmin")
def _argmax(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    dims = eqn.params["axes"]
    for i in dims:
        touched(operands[0].axes[i])
    return [_picked(operands[0], (i for i in range(len(operands[0].axes)) if i not in dims))]


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    along = eqn.params["axis"]
    return [_replaced(operands[0], along, touched(operands[0].axes[along]))]


def _replaced(value: Value, i: int, axis: Axis) -> Value:
    """The value with another axis i, along which it is not constant."""
    return Value(
        (*value.axes[:i], axis, *value.axes[i + 1 :]),
        (*value.uniform[:i], axis.size == 1, *value.uniform[i + 1 :]),
    )


@rule("sort")
def _sort(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    along = eqn.params["dimension"]
    # Sorting one array does not care how it came, but entries move; with several, ties do.
    axis = fixed(operands[0].axes[along].size)
    if len(operands) == 1:
        mix(operands[0].axes[along])
        walk.reduced(eqn, operands[0], [along])
    else:
        for value in operands:
            touched(value.axes[along])
    axes, uniform = [], []
    for i in range(len(operands[0].axes)):
        moving = [value.axes[i] for value in operands if not value.uniform[i]]
        if i != along:
            for other in moving[1:]:
                unify(moving[0], other)
        axes.append(axis if i == along else moving[0] if moving else operands[0].axes[i])
        uniform.append(i != along and not moving)
    return [Value(tuple(axes), tuple(uniform))] * len(operands)


@rule("top_k", "approx_top_k")
def _top_k(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value] | None:
    (value,) = operands
    shape = eqn.outvars[0].aval.shape
    along = eqn.params.get("axis", eqn.params.get("reduction_dimension", len(shape) - 1))
    along %= len(shape)
    return [_replaced(value, along, touched(value.axes[along], shape[along]))] * 2


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")
@rule("select_and_gather_add", "select_and_scatter_add")
def _window(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value] | None:
    params, shape = eqn.params, eqn.outvars[0].aval.shape
    arrays = [value for value in operands if value.axes]
    if len(arrays) != (2 if eqn.primitive.name.startswith("select") else 1):
        return None
    rank = len(shape)
    ones = (1,) * rank
    window = zip(
        params["window_dimensions"],
        params["window_strides"],
        params["padding"],
        params.get("base_dilation") or ones,
        params.get("window_dilation") or ones,
        strict=True,
    )
    axes = []
    for i, (size, stride, padding, base, _) in enumerate(window):
        passes = size == stride == base == 1 and not any(padding)
        if passes:
            for value in arrays[1:]:
                unify(arrays[0].axes[i], value.axes[i])
            axes.append(arrays[0].axes[i])
            continue
        for value in arrays:
            touched(value.axes[i])
        axes.append(fixed(shape[i]))
    return [Value(tuple(axes), (False,) * rank)] * len(eqn.outvars)


# --------------------------------------------------------------------------- products


@rule("dot_general")
def _dot(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    summed, batch = eqn.params["dimension_numbers"]
    x, y = operands
    for i, j in zip((*summed[0], *batch[0]), (*summed[1], *batch[1]), strict=True):
        unify(x.axes[i], y.axes[j])
    free = [
        [i for i in range(len(value.axes)) if i not in summed[side] and i not in batch[side]]
        for side, value in enumerate(operands)
    ]
    walk.contracted(
        eqn,
        operands,
        summed,
        [
            (x.axes[i], x.uniform[i] or y.uniform[j])
            for i, j in zip(summed[0], summed[1], strict=True)
        ],
        [[x.axes[i] for i in free[0]], [y.axes[i] for i in free[1]]],
    )
    axes, uniform = [], []
    for i, j in zip(batch[0], batch[1], strict=True):
        axes.append(y.axes[j] if x.uniform[i] else x.axes[i])
        uniform.append(x.uniform[i] and y.uniform[j])
    for value, places in zip(operands, free, strict=True):
        axes += [value.axes[i] for i in places]
        uniform += [value.uniform[i] for i in places]
    return [Value(tuple(axes), tuple(uniform))]


@rule("conv_general_dilated")
def _conv(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value] | None:
    params, shape = eqn.params, eqn.outvars[0].aval.shape
    if params["batch_group_count"] != 1:
        return None
    x, kernel = operands
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    (batch, feature, *space), (out, inner, *window), (new_batch, new_feature, *new_space) = (
        numbers.lhs_spec,
        numbers.rhs_spec,
        numbers.out_spec,
    )
    axes: list[Axis] = [UNIT] * len(shape)
    block, made = UNIT, kernel.axes[out]
    if groups == 1:
        unify(x.axes[feature], kernel.axes[inner])
    else:
        # Channels of the input and of the result fall into the same consecutive blocks.
        block, made = fresh(groups), fresh(kernel.axes[out].size // groups)
        unify(kernel.axes[out], nested([block, made]))
        unify(x.axes[feature], nested([block, kernel.axes[inner]]))
    for i, j, k, stride, padding, dilation in zip(
        space,
        window,
        new_space,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        strict=True,
    ):
        alone = kernel.axes[j].size == stride == dilation == 1 and not any(padding)
        if not alone:
            touched(kernel.axes[j])
            touched(x.axes[i])
        axes[k] = x.axes[i] if alone else fixed(shape[k])
    walk.contracted(
        eqn,
        operands,
        [[feature], [inner]],
        [(kernel.axes[inner], False)],
        [
            [x.axes[i] for i in (batch, *space)],
            [made, *(kernel.axes[j] for j in window)],
        ],
    )
    axes[new_batch], axes[new_feature] = x.axes[batch], kernel.axes[out]
    return [Value(tuple(axes), (False,) * len(axes))]
