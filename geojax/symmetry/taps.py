"""The values at chosen places inside a function: what the units of a group send on."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import eval_jaxpr
from jax.extend import core as jex

from geojax.symmetry import control
from geojax.symmetry.trace import Analysis, Site

__all__ = ["evaluate", "reachable"]

PyTree = Any
Path = tuple[int, ...]
_INSIDE = {"cond", "while"}


def reachable(analysis: Analysis, site: Site) -> bool:
    """Whether a site's value is well defined: not inside a branch or an open-ended loop."""
    jaxpr = analysis.jaxpr.jaxpr
    for number, body in zip(site.path[:-1:2], site.path[1::2], strict=True):
        eqn = jaxpr.eqns[number]
        if eqn.primitive.name in _INSIDE:
            return False
        inside = control.bodies(eqn)[body]
        jaxpr = getattr(inside, "jaxpr", inside)
    return True


def evaluate(
    analysis: Analysis, sites: Sequence[Site], params: PyTree, *inputs: Any
) -> list[jax.Array]:
    """The operands at some sites, in one evaluation of the function.

    Args:
        analysis: Of this function at these shapes.
        sites: Which places; each `reachable`.
        params: The parameters.
        *inputs: The inputs.

    Returns:
        One array per site; a site inside scans has one leading axis per scan, outermost first.
        (A scan that holds a site is unrolled.)
    """
    closed = analysis.jaxpr
    wanted = {(site.path, site.operand) for site in sites}
    found: dict[tuple[Path, int], Any] = {}
    arguments = jax.tree.leaves((params, inputs))
    _run(closed.jaxpr, closed.consts, arguments, (), wanted, found)
    return [found[site.path, site.operand] for site in sites]


def _run(
    jaxpr: Any,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    prefix: Path,
    wanted: set[tuple[Path, int]],
    found: dict[tuple[Path, int], Any],
) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    depth = len(prefix)

    def read(x: Any) -> Any:
        return x.val if isinstance(x, jex.Literal) else values[x]

    for number, eqn in enumerate(jaxpr.eqns):
        given = [read(x) for x in eqn.invars]
        here = (*prefix, number)
        for path, operand in wanted:
            if path == here:
                found[path, operand] = given[operand]
        if any(len(path) > depth + 1 and path[: depth + 1] == here for path, _ in wanted):
            (body,) = control.bodies(eqn)
            inside, own = _open(body)
            if eqn.primitive.name == "scan":
                out = _scan(eqn, inside, own, given, (*here, 0), wanted, found)
            else:
                out = _run(inside, own, given, (*here, 0), wanted, found)
        else:
            out = _bind(jaxpr, eqn, given)
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _open(body: Any) -> tuple[Any, Sequence[Any]]:
    return (body.jaxpr, body.consts) if isinstance(body, jex.ClosedJaxpr) else (body, ())


def _bind(jaxpr: Any, eqn: Any, given: Sequence[Any]) -> list[Any]:
    # One equation as a jaxpr of its own: how primitives are bound varies between versions.
    bound = {v: g for v, g in zip(eqn.invars, given, strict=True) if isinstance(v, jex.Var)}
    single = jaxpr.replace(constvars=[], invars=list(bound), outvars=list(eqn.outvars), eqns=[eqn])
    return eval_jaxpr(single, (), *bound.values())


def _scan(
    eqn: Any,
    inside: Any,
    own: Sequence[Any],
    given: Sequence[Any],
    prefix: Path,
    wanted: set[tuple[Path, int]],
    found: dict[tuple[Path, int], Any],
) -> list[Any]:
    consts, carried = control.scan_counts(eqn)
    carry = list(given[consts : consts + carried])
    steps: list[Mapping[tuple[Path, int], Any]] = []
    stacked: list[list[Any]] = []
    length = eqn.params["length"]
    order = reversed(range(length)) if eqn.params["reverse"] else range(length)
    for i in order:
        slices = [lax.index_in_dim(x, i, keepdims=False) for x in given[consts + carried :]]
        seen: dict[tuple[Path, int], Any] = {}
        out = _run(inside, own, [*given[:consts], *carry, *slices], prefix, wanted, seen)
        carry = out[:carried]
        stacked.append(out[carried:])
        steps.append(seen)
    if eqn.params["reverse"]:
        steps, stacked = steps[::-1], stacked[::-1]
    for key in steps[0] if steps else ():
        found[key] = jnp.stack([seen[key] for seen in steps])
    return [*carry, *(jnp.stack(list(x)) for x in zip(*stacked, strict=True))]
