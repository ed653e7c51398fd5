"""Rules of the primitives that read and write by index.

Axes that are taken whole pass; along an axis that is indexed, entries stay in place.
"""

from typing import Any

from geojax.symmetry.atoms import UNIT, Axis, fresh, pin, unify
from geojax.symmetry.rules import RULES, Value, Walker, rule, sized, touched, with_axes

__all__ = ["RULES"]


@rule("dynamic_slice")
def _dynamic_slice(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    shape = eqn.outvars[0].aval.shape
    out = with_axes(
        operands[0],
        lambda i, axis: None if shape[i] == axis.size else touched(axis, shape[i]),
    )
    return [sized(out, shape)]


@rule("dynamic_update_slice")
def _dynamic_update_slice(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    value, update = operands[:2]
    axes = []
    for i, axis in enumerate(value.axes):
        if update.axes[i].size == axis.size:
            unify(axis, update.axes[i])
        else:
            pin(axis, mixed=True)
            pin(update.axes[i], mixed=True)
        axes.append(axis)
    return [Value(tuple(axes), (False,) * len(axes))]


@rule("gather")
def _gather(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    value, indices = operands
    numbers, shape = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    sizes = eqn.params["slice_sizes"]
    rank = len(indices.axes) - 1
    touched(indices.axes[rank])
    shared = dict(
        zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    )
    axes: list[Axis] = [UNIT] * len(shape)
    uniform = [True] * len(shape)
    looked_up = [i for i in range(len(shape)) if i not in numbers.offset_dims]
    for place, i in zip(looked_up, range(rank), strict=True):
        axes[place], uniform[place] = indices.axes[i], indices.uniform[i]
    offsets = iter(numbers.offset_dims)
    for i, axis in enumerate(value.axes):
        if i in shared:
            place = looked_up[shared[i]]
            unify(axis, indices.axes[shared[i]])
            if uniform[place]:
                axes[place], uniform[place] = axis, value.uniform[i]
            continue
        if i in numbers.collapsed_slice_dims:
            if not value.uniform[i]:
                touched(axis)
            continue
        place = next(offsets)
        if sizes[i] == axis.size:
            axes[place], uniform[place] = axis, value.uniform[i]
        else:
            axes[place] = fresh(sizes[i]) if value.uniform[i] else touched(axis, sizes[i])
            uniform[place] = value.uniform[i]
    # Where an index is out of range a whole window may be filled, but along no axis of a window.
    return [Value(tuple(axes), tuple(uniform))]


@rule("scatter", "scatter_add", "scatter_mul", "scatter_min", "scatter_max", "scatter_sub")
@rule("scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter-sub")
def _scatter(walk: Walker, eqn: Any, operands: list[Value]) -> list[Value]:
    value, indices, updates = operands
    numbers = eqn.params["dimension_numbers"]
    rank = len(indices.axes) - 1
    touched(indices.axes[rank])
    shared = dict(
        zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
    )
    rows = [i for i in range(len(updates.axes)) if i not in numbers.update_window_dims]
    in_any_order = eqn.primitive.name != "scatter"
    for i, place in enumerate(rows):
        if i in shared.values() or in_any_order:
            unify(indices.axes[i], updates.axes[place])
        else:  # of two writes to one place the last one stays
            touched(indices.axes[i])
            touched(updates.axes[place])
    if in_any_order:
        walk.reduced(eqn, updates, rows)
    windows = iter(numbers.update_window_dims)
    for i, axis in enumerate(value.axes):
        if i in shared:
            unify(axis, indices.axes[shared[i]])
        elif i in numbers.inserted_window_dims:
            pin(axis, mixed=True)
        else:
            place = next(windows)
            if updates.axes[place].size == axis.size:
                unify(axis, updates.axes[place])
            else:
                pin(axis, mixed=True)
                touched(updates.axes[place])
    return [Value(value.axes, (False,) * len(value.axes))]
