"""Equations that hold jaxprs: calls, branches, loops; and which equations matter at all.

A loop's body is walked once. What is carried is the same array before and after, so its axes are
one; what a scan runs over has one more axis outside, which inside is implied in every array.
"""

from collections.abc import Callable, Sequence
from typing import Any

from geojax.symmetry.atoms import fixed, unify
from geojax.symmetry.rules import Value

__all__ = ["CALLS", "RULES", "Liveness", "bodies"]

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def bodies(eqn: Any) -> list[Any]:
    """The jaxprs inside an equation, closed or open, in the order in which sites number them.

    Calls and scans have one; a cond has its branches in order; a while has its condition (0) and
    its body (1).
    """
    name = eqn.primitive.name
    if name in CALLS:
        return [eqn.params[CALLS[name]]]
    if name == "scan":
        return [eqn.params["jaxpr"]]
    if name == "cond":
        return list(eqn.params["branches"])
    if name == "while":
        return [eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]]
    return []


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many operands of a scan are constants of its body, and how many are carried.

    Read off the shapes: what is scanned over or stacked has one axis more outside the body. The
    parameters that said so have other names from one version of jax to the next.
    """
    (body,) = bodies(eqn)
    inside = getattr(body, "jaxpr", body)

    def alike(outer: Any, inner: Any) -> int:
        return sum(
            len(x.aval.shape) == len(y.aval.shape) for x, y in zip(outer, inner, strict=True)
        )

    carried = alike(eqn.outvars, inside.outvars)
    return alike(eqn.invars, inside.invars) - carried, carried


class Liveness:
    """Which equations of a jaxpr, and which of its inputs, its used outputs depend on."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, tuple[bool, ...]], tuple[list[int], tuple[bool, ...]]] = {}

    def __call__(self, jaxpr: Any, used: tuple[bool, ...]) -> tuple[list[int], tuple[bool, ...]]:
        """Numbers of the equations that matter, in order, and a flag per `invar`."""
        key = (id(jaxpr), used)
        if key not in self._known:
            self._known[key] = self._search(jaxpr, used)
        return self._known[key]

    def _search(self, jaxpr: Any, used: tuple[bool, ...]) -> tuple[list[int], tuple[bool, ...]]:
        needed = {id(var) for var, use in zip(jaxpr.outvars, used, strict=True) if use}
        numbers = []
        for number in range(len(jaxpr.eqns) - 1, -1, -1):
            eqn = jaxpr.eqns[number]
            wanted = tuple(id(var) in needed for var in eqn.outvars)
            if not any(wanted):
                continue
            numbers.append(number)
            reads = [True] * len(eqn.invars)
            if eqn.primitive.name in CALLS:
                inside = bodies(eqn)[0]
                inside = getattr(inside, "jaxpr", inside)
                if len(inside.invars) == len(eqn.invars):
                    reads = self(inside, wanted)[1]
            needed |= {id(var) for var, read in zip(eqn.invars, reads, strict=True) if read}
        return numbers[::-1], tuple(id(var) in needed for var in jaxpr.invars)


def _call(walk: Any, eqn: Any, operands: list[Value]) -> list[Value] | None:
    (body,) = bodies(eqn)
    inside = getattr(body, "jaxpr", body)
    if len(inside.invars) != len(operands) or len(inside.outvars) != len(eqn.outvars):
        return None
    return walk.inner(0, body, operands)


def _moving(values: Sequence[Value], operands: Sequence[Value]) -> list[Value]:
    """What a loop carries: that it is constant along an axis at the start says nothing."""
    data = any(value.data for value in operands)
    return [
        value._replace(uniform=tuple(axis.size == 1 for axis in value.axes), data=data)
        for value in values
    ]


def _same(values: Sequence[Value], others: Sequence[Value]) -> None:
    for value, other in zip(values, others, strict=True):
        for axis, another, uniform in zip(value.axes, other.axes, other.uniform, strict=True):
            if not uniform:
                unify(axis, another)


def _cond(walk: Any, eqn: Any, operands: list[Value]) -> list[Value]:
    results = [walk.inner(i, branch, operands[1:]) for i, branch in enumerate(bodies(eqn))]
    out = []
    for values in zip(*results, strict=True):
        axes, uniform = [], []
        for i in range(len(values[0].axes)):
            moving = [value.axes[i] for value in values if not value.uniform[i]]
            for axis in moving[1:]:
                unify(moving[0], axis)
            axes.append(moving[0] if moving else values[0].axes[i])
            uniform.append(not moving)
        out.append(Value(tuple(axes), tuple(uniform), any(value.data for value in values)))
    return out


def _while(walk: Any, eqn: Any, operands: list[Value]) -> list[Value]:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    condition, body = bodies(eqn)
    carry = _moving(operands[first + second :], operands)
    walk.inner(0, condition, [*operands[:first], *carry])
    result = walk.inner(1, body, [*operands[first : first + second], *carry])
    _same(carry, result)
    return carry


def _scan(walk: Any, eqn: Any, operands: list[Value]) -> list[Value]:
    consts, carried = scan_counts(eqn)
    length = eqn.params["length"]
    (body,) = bodies(eqn)
    carry = _moving(operands[consts : consts + carried], operands)
    step = fixed(length)
    slices = []
    for value in operands[consts + carried :]:
        if not value.uniform[0]:
            unify(step, value.axes[0])
        slices.append(Value(value.axes[1:], value.uniform[1:], value.data))
    outer = walk.context
    walk.context = (*outer, step)
    # Inside, arrays have the step as an axis that is not written.
    for value in (*operands[:consts], *carry, *slices):
        walk.record(value)
    result = walk.inner(0, body, [*operands[:consts], *carry, *slices])
    walk.context = outer
    _same(carry, result[:carried])
    stacked = [
        Value((step, *value.axes), (length == 1, *value.uniform), value.data)
        for value in result[carried:]
    ]
    return [*carry, *stacked]


RULES: dict[str, Callable[[Any, Any, list[Value]], list[Value] | None]] = {
    **dict.fromkeys(CALLS, _call),
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
