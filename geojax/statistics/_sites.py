"""The layers of a model whose units can be rescaled: a contraction with a kernel, plus a bias.

They are found in its jaxpr, by following the arrays back to the leaves of the parameters.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from geojax.statistics._program import Instruction, Program, ancestors, descendants, inline

PyTree = Any


class Site(NamedTuple):
    """A layer with a kernel and a bias of its own."""

    kernel: int  # the leaf of the parameters
    bias: int
    output: int  # the variable after the bias was added
    unit_axes: tuple[int | None, ...]  # of the output, for each axis of the bias
    kernel_axes: tuple[int | None, ...]  # of the kernel, for each axis of the bias
    level: int  # how many layers are in the longest chain before it


class Reading(NamedTuple):
    program: Program
    sites: list[Site]


_SAME = {"convert_element_type", "copy", "copy_p", "stop_gradient"}


class _Graph:
    """A program with what is needed to follow an array back to where it came from."""

    def __init__(self, program: Program):
        self.producers = {y: i for i in program.instructions for y in i.outputs}
        self.uses: dict[int, int] = {}
        for x in [x for i in program.instructions for x in i.inputs] + list(program.outputs):
            if isinstance(x, int):
                self.uses[x] = self.uses.get(x, 0) + 1

    def back(
        self, x: Any, stops: Callable[[int], bool]
    ) -> tuple[int, tuple[int | None, ...]] | None:
        """Where an array was made, if only its layout changed since and nothing else reads it.

        Returns:
            The variable for which `stops` holds, and for each axis of the array the axis there.
        """
        axes: tuple[int | None, ...] | None = None
        while isinstance(x, int) and self.uses.get(x, 0) == 1:
            if stops(x):
                if axes is None:
                    shape = (
                        self.producers[x].eqn.outvars[0].aval.shape if x in self.producers else None
                    )
                    axes = None if shape is None else tuple(range(len(shape)))
                return x, () if axes is None else axes
            if x not in self.producers:
                return None
            instruction = self.producers[x]
            step = _layout(instruction)
            if step is None:
                return None
            axes = step if axes is None else tuple(None if a is None else step[a] for a in axes)
            x = instruction.inputs[0]
        return None


def _layout(instruction: Instruction) -> tuple[int | None, ...] | None:
    """For each axis of an instruction's output the axis of its input; None for real computing."""
    eqn = instruction.eqn
    name = eqn.primitive.name
    before, after = eqn.invars[0].aval.shape if eqn.invars else (), eqn.outvars[0].aval.shape
    if name in _SAME:
        return tuple(range(len(after)))
    if name == "transpose":
        return tuple(eqn.params["permutation"])
    if name == "broadcast_in_dim":
        axes: list[int | None] = [None] * len(after)
        for i, axis in enumerate(eqn.params["broadcast_dimensions"]):
            axes[axis] = i if before[i] == after[axis] else None
        return tuple(axes)
    if name in ("reshape", "squeeze", "expand_dims"):
        real = [i for i, size in enumerate(before) if size != 1]
        if [before[i] for i in real] != [size for size in after if size != 1]:
            return None
        rest = iter(real)
        return tuple(None if size == 1 else next(rest) for size in after)
    return None


def _contraction(instruction: Instruction) -> list[tuple[int, dict[int, int]]]:
    """The operands of a contraction that may be its kernel, with their axes by output axis."""
    eqn = instruction.eqn
    if eqn.primitive.name == "dot_general":
        (lhs_in, rhs_in), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
        out = []
        if not lhs_batch:
            free = [
                [i for i in range(v.aval.ndim) if i not in contracted and i not in batch]
                for v, contracted, batch in zip(
                    eqn.invars, (lhs_in, rhs_in), (lhs_batch, rhs_batch), strict=True
                )
            ]
            out.append((0, dict(enumerate(free[0]))))
            out.append((1, {len(free[0]) + k: axis for k, axis in enumerate(free[1])}))
        return out
    if eqn.primitive.name == "conv_general_dilated" and eqn.params["batch_group_count"] == 1:
        numbers = eqn.params["dimension_numbers"]
        return [(1, {numbers.out_spec[1]: numbers.rhs_spec[0]})]
    return []


def _sites(program: Program, num_params: int, shapes: list[tuple[int, ...]]) -> list[Site]:
    graph = _Graph(program)
    leaf_of = {number: leaf for leaf, number in enumerate(program.inputs[:num_params])}
    from_data = descendants(program, set(program.inputs[num_params:]))

    def leaf(x):
        found = graph.back(x, lambda y: y in leaf_of)
        if found is None:
            return None
        number, axes = found
        return leaf_of[number], axes or tuple(range(len(shapes[leaf_of[number]])))

    def is_contraction(x):
        return x in graph.producers and bool(_contraction(graph.producers[x]))

    def site(output, product, addend):
        bias, made = leaf(addend), graph.back(product, is_contraction)
        if bias is None or made is None:
            return None
        instruction = graph.producers[made[0]]
        for operand, kernel_axis_of in _contraction(instruction):
            kernel, other = leaf(instruction.inputs[operand]), instruction.inputs[1 - operand]
            if kernel is None or not (isinstance(other, int) and other in from_data):
                continue
            axes = _unit_axes(
                shapes[bias[0]], bias[1], made[1], kernel_axis_of, kernel[1], shapes[kernel[0]]
            )
            if axes is not None:
                return Site(kernel[0], bias[0], output, *axes, level=0)
        return None

    found: list[Site] = []
    for instruction in program.instructions:
        if instruction.eqn.primitive.name not in ("add", "add_any"):
            continue
        x, y = instruction.inputs
        for product, addend in ((x, y), (y, x)):
            one = site(instruction.outputs[0], product, addend)
            if one is not None:
                before = ancestors(graph.producers, one.output)
                level = max((s.level + 1 for s in found if s.output in before), default=0)
                found.append(one._replace(level=level))
                break
    return found


def _unit_axes(bias_shape, bias_axes, to_contraction, kernel_axis_of, leaf_axes, kernel_shape):
    """The axes of the output and of the kernel that each axis of the bias is, or None."""
    unit_axes: list[int | None] = []
    kernel_axes: list[int | None] = []
    for axis, size in enumerate(bias_shape):
        if size == 1:
            unit_axes.append(None)
            kernel_axes.append(None)
            continue
        where = [i for i, a in enumerate(bias_axes) if a == axis]
        if len(where) != 1:
            return None
        product_axis = to_contraction[where[0]]
        operand_axis = None if product_axis is None else kernel_axis_of.get(product_axis)
        leaf_axis = None if operand_axis is None else leaf_axes[operand_axis]
        if leaf_axis is None or kernel_shape[leaf_axis] != size:
            return None
        unit_axes.append(where[0])
        kernel_axes.append(leaf_axis)
    # A bias that units share could not shift them one by one.
    free = {leaf_axes[axis] for axis in kernel_axis_of.values()}
    uncovered = [a for a in free if a is None or (kernel_shape[a] != 1 and a not in kernel_axes)]
    return None if uncovered else (tuple(unit_axes), tuple(kernel_axes))


def _call(apply_fn: Callable, with_state: bool, params: PyTree, state: PyTree, inputs: PyTree):
    if with_state:
        return apply_fn(params, state, inputs, False)[0]
    return apply_fn(params, *inputs) if isinstance(inputs, tuple) else apply_fn(params, inputs)


def read(apply_fn, with_state, params, state, inputs) -> Reading:
    """Trace the model in evaluation mode and find its layers, in order."""
    call = functools.partial(_call, apply_fn, with_state)
    program = inline(jax.make_jaxpr(call)(params, state, inputs))
    leaves = jax.tree.leaves(params)
    return Reading(program, _sites(program, len(leaves), [jnp.shape(x) for x in leaves]))


def read_shapes(apply_fn, params, state, batch, inputs_fn) -> Reading:
    shape = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
    arguments = shape(params), shape({} if state is None else state), shape(inputs_fn(batch))
    return read(apply_fn, state is not None, *arguments)
