"""A model's jaxpr without nested calls, and its evaluation with values read or replaced inside.

What the modules beside this one look for in a model, they find here.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jax.core import eval_jaxpr
from jax.extend import core as jex


class Instruction(NamedTuple):
    """One primitive of an inlined jaxpr; an atom is a variable's number or a literal."""

    eqn: Any
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]


class Program(NamedTuple):
    """A jaxpr without nested calls; every variable has a number of its own."""

    instructions: list[Instruction]
    inputs: list[int]
    outputs: list[Any]
    constants: dict[int, Any]
    template: Any  # the outer jaxpr, from which others are made


class Constant(NamedTuple):
    value: Any


_INLINED = {
    "jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
    "custom_vjp_call_jaxpr", "checkpoint", "remat", "remat2",
}  # fmt: skip


def inline(closed: Any) -> Program:
    instructions: list[Instruction] = []
    constants: dict[int, Any] = {}
    count = 0

    def fresh() -> int:
        nonlocal count
        count += 1
        return count - 1

    def walk(jaxpr: Any, consts: Any, arguments: list[Any]) -> list[Any]:
        numbers: dict[Any, Any] = {}
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            numbers[var] = fresh()
            constants[numbers[var]] = value
        numbers.update(zip(jaxpr.invars, arguments, strict=True))

        def atom(x):
            return Constant(x.val) if isinstance(x, jex.Literal) else numbers[x]

        for eqn in jaxpr.eqns:
            inputs = [atom(x) for x in eqn.invars]
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if eqn.primitive.name in _INLINED and inner is not None:
                is_closed = isinstance(inner, jex.ClosedJaxpr)
                body, given = (inner.jaxpr, inner.consts) if is_closed else (inner, ())
                numbers.update(zip(eqn.outvars, walk(body, given, inputs), strict=True))
                continue
            outputs = tuple(fresh() for _ in eqn.outvars)
            numbers.update(zip(eqn.outvars, outputs, strict=True))
            instructions.append(Instruction(eqn, tuple(inputs), outputs))
        return [atom(x) for x in jaxpr.outvars]

    inputs = [fresh() for _ in closed.jaxpr.invars]
    outputs = walk(closed.jaxpr, closed.consts, list(inputs))
    return Program(instructions, inputs, outputs, constants, closed.jaxpr)


def descendants(program: Program, roots: set[int]) -> set[int]:
    found = set(roots)
    for instruction in program.instructions:
        if any(x in found for x in instruction.inputs if isinstance(x, int)):
            found.update(instruction.outputs)
    return found


def ancestors(producers: dict[int, Instruction], root: int) -> set[int]:
    found, stack = set(), [root]
    while stack:
        x = stack.pop()
        if x in found:
            continue
        found.add(x)
        if x in producers:
            stack += [y for y in producers[x].inputs if isinstance(y, int)]
    return found


def evaluate(
    program: Program,
    arguments: list[Any],
    wanted: Iterable[int],
    read: Callable[[int, Any, tuple[int, ...]], Any] | None = None,
) -> dict[int, Any]:
    """The values of a program's variables, run until all that are wanted are known.

    `read(variable, value, outputs)` gives the value that an instruction with these outputs sees.
    """
    values: dict[int, Any] = dict(program.constants)
    values.update(zip(program.inputs, arguments, strict=True))

    def given(x, outputs):
        if isinstance(x, Constant):
            return x.value
        return values[x] if read is None else read(x, values[x], outputs)

    missing = set(wanted)
    for instruction in program.instructions:
        eqn = instruction.eqn
        operands = [given(x, instruction.outputs) for x in instruction.inputs]
        # One equation as a jaxpr of its own: how primitives are bound varies between versions.
        bound = {v: g for v, g in zip(eqn.invars, operands, strict=True) if isinstance(v, jex.Var)}
        single = program.template.replace(
            constvars=[], invars=list(bound), outvars=list(eqn.outvars), eqns=[eqn]
        )
        out = eval_jaxpr(single, (), *bound.values())
        values.update(zip(instruction.outputs, out, strict=True))
        missing.difference_update(instruction.outputs)
        if not missing:
            break
    return values
