"""Which units may also change sign or scale: tanh units and ReLU units, read off the jaxpr.

Each place of a group has an unknown power: entries there are multiplied by s^power, s being the
unit's factor. Every equation of the jaxpr says something linear about powers; a solution that is
not zero is a symmetry.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from geojax.symmetry import control, trace
from geojax.symmetry.atoms import Atom, Axis, alternatives, atoms
from geojax.symmetry.rules import Value
from geojax.symmetry.spec import Concatenation, Factor, Kind, Layout, PermutationSpec, Product

__all__ = ["with_kinds"]

PyTree = Any
Mode = Literal["scaled", "signed"]
Form = dict[Any, Fraction]


class Power:
    """The power of a unit's factor in an array, on one of its axes.

    Attributes:
        axis: The axis; for a group that is not on it the power is zero.
        terms: (coefficient for positive factors, coefficient for signs, power) summed.
        unknown: A variable, for the axes of leaves and for arrays of zeros, which suit any power.
    """

    __slots__ = ("axis", "terms", "unknown")

    def __init__(self, axis: Axis, terms: "Sequence[Term]" = (), unknown: Any = None):
        self.axis = axis
        self.terms = tuple(terms)
        self.unknown = unknown


Term = tuple[Fraction | int, int, Power]


class _Constraint(NamedTuple):
    """A sum of powers that must vanish on an axis."""

    axis: Axis
    terms: tuple[Term, ...]


# Coefficients (for positive factors, for signs) of functions f with f(s x) = s^c f(x).
_UNARY: dict[str, tuple[Fraction | int, int]] = {
    **dict.fromkeys(
        ("neg", "convert_element_type", "copy", "copy_p", "stop_gradient", "reduce_precision"),
        (1, 1),
    ),
    **dict.fromkeys(("name", "optimization_barrier", "sharding_constraint", "real"), (1, 1)),
    "abs": (1, 0),
    "sign": (0, 1),
    "square": (2, 0),
    "cbrt": (Fraction(1, 3), 1),
}
# Of positive arguments alone: no sign may get in.
_ROOTS = {"sqrt": Fraction(1, 2), "rsqrt": Fraction(-1, 2)}
_ODD = frozenset(("tanh", "sin", "tan", "asin", "atan", "sinh", "asinh", "atanh", "erf", "erf_inv"))
_EVEN = frozenset(("cos", "cosh"))


class _Walk(trace.Walk):
    """A walk that also writes down what each equation says of powers."""

    def __init__(self) -> None:
        super().__init__()
        self.constraints: list[_Constraint] = []
        self.made: list[Power] = []
        self.merged: list[Value] = []
        self.muted = False

    def enter(self, leaf: int, value: Value) -> Value:
        powers = tuple(Power(axis, unknown=("leaf", leaf, i)) for i, axis in enumerate(value.axes))
        return value._replace(powers=powers)

    def _equation(self, eqn: Any, operands: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        if self.muted:
            return super()._equation(eqn, operands)
        if name in control.CALLS:
            return super()._equation(eqn, operands)
        self.muted = True
        out = super()._equation(eqn, operands)
        self.muted = False
        rule = _RULES.get(name)
        if name == "convert_element_type" and not jnp.issubdtype(
            eqn.params["new_dtype"], jnp.floating
        ):
            rule = None
        if rule is None:
            for value in operands:
                self.vanish(value)
            return [value._replace(powers=None, zero=False) for value in out]
        return rule(self, eqn, operands, out)

    def vanish(self, value: Value, signs: bool = True, scales: bool = True) -> None:
        """Demand that no factor is in an array."""
        for axis, power in zip(value.axes, value.powers or (), strict=False):
            self.demand(axis, [(int(scales), int(signs), power)])

    def demand(self, axis: Axis, terms: Sequence[Term]) -> None:
        """Demand that a sum of powers on an axis is zero."""
        self.constraints.append(_Constraint(axis, tuple(terms)))


def _powers(value: Value) -> tuple[Power, ...]:
    """The powers of an array; all zero where none were written down."""
    if value.powers is not None and len(value.powers) == len(value.axes):
        return value.powers
    return tuple(Power(axis) for axis in value.axes)


def _at(value: Value, axis: int, size: int) -> Power | None:
    """The power on an axis of an operand that may be a scalar or stretched; None for no factor."""
    if not value.axes or value.axes[axis].size != size or value.uniform[axis]:
        return None
    return _powers(value)[axis]


def _each(value: Value, make: Callable[[int, Axis], Sequence[Term]], zero: bool = False) -> Value:
    """An output whose power on each axis is a sum."""
    powers = tuple(Power(axis, make(i, axis)) for i, axis in enumerate(value.axes))
    return value._replace(powers=powers, zero=zero)


def _unary(walk: _Walk, eqn: Any, operands: list[Value], out: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    (x,) = operands
    if name in _ODD:
        walk.vanish(x, signs=False)
        scales, signs = 0, 1
    elif name in _EVEN:
        walk.vanish(x, signs=False)
        scales, signs = 0, 0
    elif name in _ROOTS:
        walk.vanish(x, scales=False)
        scales, signs = _ROOTS[name], 0
    elif name == "integer_pow":
        scales, signs = eqn.params["y"], eqn.params["y"] % 2
    else:
        scales, signs = _UNARY[name]
    own = _powers(x)
    return [_each(out[0], lambda i, axis: [(scales, signs, own[i])], zero=x.zero and scales > 0)]


def _product(walk: _Walk, eqn: Any, operands: list[Value], out: list[Value]) -> list[Value]:
    sign = -1 if eqn.primitive.name == "div" else 1

    def terms(i: int, axis: Axis) -> list[Term]:
        found = [_at(value, i, axis.size) for value in operands]
        coefficients = ((1, 1), (sign, 1))
        return [(*c, p) for c, p in zip(coefficients, found, strict=True) if p is not None]

    zero = operands[0].zero or (operands[1].zero and sign == 1)
    return [_each(out[0], terms, zero)]


def _same(walk: _Walk, values: Sequence[Value], result: Value, signs: bool = True) -> Value:
    """Demand equal powers of all but zero arrays; the result has them."""
    moving = [value for value in values if not value.zero]

    def terms(i: int, axis: Axis) -> list[Term]:
        found = [_at(value, i, axis.size) for value in moving]
        for power in found[1:]:
            pair = [(1, found[0]), (-1, power)]
            walk.demand(axis, [(c, int(signs), p) for c, p in pair if p is not None])
        return [] if not found or found[0] is None else [(1, int(signs), found[0])]

    return _each(result, terms, zero=not moving)


def _sum(walk: _Walk, eqn: Any, operands: list[Value], out: list[Value]) -> list[Value]:
    return [_same(walk, operands, out[0])]


def _extreme(walk: _Walk, eqn: Any, operands: list[Value], out: list[Value]) -> list[Value]:
    for value in operands:
        walk.vanish(value, scales=False)
    return [_same(walk, operands, out[0], signs=False)]


def _comparison(walk: _Walk, eqn: Any, operands: list[Value], out: list[Value]) -> list[Value]:
    _extreme(walk, eqn, operands, out)
    return [_each(out[0], lambda i, axis: [])]


def _select(walk: _Walk, eqn: Any, operands: list[Value], out: list[Value]) -> list[Value]:
    walk.vanish(operands[0])
    return [_same(walk, operands[1:], out[0])]


def _broadcast(walk: _Walk, eqn: Any, operands: list[Value], out: list[Value]) -> list[Value]:
    source = {place: i for i, place in enumerate(eqn.params["broadcast_dimensions"])}
    (x,) = operands

    def terms(i: int, axis: Axis) -> list[Term]:
        power = _at(x, source[i], axis.size) if i in source else None
        return [] if power is None else [(1, 1, power)]

    return [_each(out[0], terms, x.zero)]


def _permuted(walk: _Walk, eqn: Any, operands: list[Value], out: list[Value]) -> list[Value]:
    (x,) = operands
    own = _powers(x)
    if eqn.primitive.name == "transpose":
        places = eqn.params["permutation"]
    else:
        gone = {d % len(own) for d in eqn.params["dimensions"]}
        places = [i for i in range(len(own)) if i not in gone]
    return [_each(out[0], lambda i, axis: [(1, 1, own[places[i]])], x.zero)]


def _all(walk: _Walk, eqn: Any, operands: list[Value], out: list[Value]) -> list[Value]:
    """The factors of an axis are those of the old axis that its atoms were on."""
    (x,) = operands
    walk.merged.append(x)
    return [_each(out[0], lambda i, axis: [(1, 1, p) for p in _powers(x)], x.zero)]


def _kept(walk: _Walk, eqn: Any, operands: list[Value], out: list[Value]) -> list[Value]:
    x = operands[0]
    own = _powers(x)
    return [_each(y, lambda i, axis: [(1, 1, own[i])], x.zero) for y in out]


def _pad(walk: _Walk, eqn: Any, operands: list[Value], out: list[Value]) -> list[Value]:
    kept = _kept(walk, eqn, operands[:1], out)
    if operands[1].zero:
        return kept
    walk.vanish(operands[0])
    return [value._replace(zero=False) for value in kept]


def _concatenate(walk: _Walk, eqn: Any, operands: list[Value], out: list[Value]) -> list[Value]:
    # Nothing is said of groups that are parts of an axis; along the others powers are equal.
    along = eqn.params["dimension"]
    moving = [value for value in operands if not value.zero]

    def terms(i: int, axis: Axis) -> list[Term]:
        found = [_at(value, i, value.axes[i].size) for value in moving]
        if i == along:
            return [(1, 1, p) for p in found if p is not None]
        for power in found[1:]:
            pair = [(1, found[0]), (-1, power)]
            walk.demand(axis, [(c, 1, p) for c, p in pair if p is not None])
        return [] if not found or found[0] is None else [(1, 1, found[0])]

    return [_each(out[0], terms, not moving)]


def _reduce(walk: _Walk, eqn: Any, operands: list[Value], out: list[Value]) -> list[Value]:
    (x,) = operands
    own, gone = _powers(x), eqn.params["axes"]
    signs = eqn.primitive.name == "reduce_sum"
    for i in gone:
        walk.demand(x.axes[i], [(1, 1, own[i])])
    if not signs:
        walk.vanish(x, scales=False)
    kept = [power for i, power in enumerate(own) if i not in gone]
    return [_each(out[0], lambda i, axis: [(1, int(signs), kept[i])], x.zero)]


def _window(walk: _Walk, eqn: Any, operands: list[Value], out: list[Value]) -> list[Value]:
    if eqn.primitive.name != "reduce_window_sum":
        walk.vanish(operands[0], scales=False)
    return _kept(walk, eqn, operands[:1], out)


def _dot(walk: _Walk, eqn: Any, operands: list[Value], out: list[Value]) -> list[Value]:
    summed, batch = eqn.params["dimension_numbers"]
    x, y = operands
    px, py = _powers(x), _powers(y)
    for i, j in zip(*summed, strict=True):
        walk.demand(x.axes[i], [(1, 1, px[i]), (1, 1, py[j])])
    terms: list[list[Term]] = [[(1, 1, px[i]), (1, 1, py[j])] for i, j in zip(*batch, strict=True)]
    for side, (value, own) in enumerate(((x, px), (y, py))):
        for i in range(len(value.axes)):
            if i not in summed[side] and i not in batch[side]:
                terms.append([(1, 1, own[i])])
                if not value.data:
                    walk.made.append(own[i])
    return [_each(out[0], lambda i, axis: terms[i])]


def _conv(walk: _Walk, eqn: Any, operands: list[Value], out: list[Value]) -> list[Value]:
    x, kernel = operands
    px, pk = _powers(x), _powers(kernel)
    numbers = eqn.params["dimension_numbers"]
    if eqn.params["batch_group_count"] != 1:
        walk.vanish(x)
        walk.vanish(kernel)
        return [_each(out[0], lambda i, axis: [])]
    feature, inner, made = numbers.lhs_spec[1], numbers.rhs_spec[1], numbers.rhs_spec[0]
    walk.demand(kernel.axes[inner], [(1, 1, px[feature]), (1, 1, pk[inner])])
    if not kernel.data:
        walk.made.append(pk[made])
    terms: dict[int, list[Term]] = {
        new: [(1, 1, px[old])] for old, new in zip(numbers.lhs_spec, numbers.out_spec, strict=True)
    }
    terms[numbers.out_spec[1]] = [(1, 1, pk[made])]
    if eqn.params["feature_group_count"] > 1:  # the blocks of channels are common to both
        terms[numbers.out_spec[1]].append((1, 1, px[feature]))
    return [_each(out[0], lambda i, axis: terms[i])]


def _gather(walk: _Walk, eqn: Any, operands: list[Value], out: list[Value]) -> list[Value]:
    walk.vanish(operands[1])
    fill = eqn.params["fill_value"]
    if fill is not None and fill != 0 and not math.isnan(fill):
        walk.vanish(operands[0])  # what is out of range is this number, whatever the factors
    # By atoms: an axis of the result has the factors of the operand's axis that it is.
    return [value._replace(zero=False) for value in _all(walk, eqn, operands[:1], out)]


_RULES: dict[str, Any] = {
    **dict.fromkeys([*_UNARY, *_ROOTS, *_ODD, *_EVEN, "integer_pow"], _unary),
    "mul": _product,
    "div": _product,
    **dict.fromkeys(("add", "sub", "add_any"), _sum),
    **dict.fromkeys(("max", "min"), _extreme),
    **dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne"), _comparison),
    "select_n": _select,
    "broadcast_in_dim": _broadcast,
    **dict.fromkeys(("transpose", "squeeze"), _permuted),
    "reshape": _all,
    **dict.fromkeys(("slice", "split", "rev", "cumsum", "dynamic_slice"), _kept),
    "pad": _pad,
    "concatenate": _concatenate,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduce),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
}


# --------------------------------------------------------------------------- solving


class _System:
    """What the constraints say of one group's powers."""

    def __init__(self, walk: _Walk, atom: Atom, mode: Mode):
        self.walk, self.atom, self.mode = walk, atom, mode
        self._forms: dict[int, Form] = {}
        self._on: dict[int, bool] = {}

    def on(self, axis: Axis) -> bool:
        """Whether the group is on an axis."""
        if id(axis) not in self._on:
            self._on[id(axis)] = any(atom is self.atom for atom in atoms(axis))
        return self._on[id(axis)]

    def form(self, power: Power) -> Form:
        """A power as a linear form in the unknown ones."""
        if id(power) not in self._forms:
            found: Form = {}
            if self.on(power.axis):
                found = self.total(power.terms)
                if power.unknown is not None:
                    found[power.unknown] = Fraction(1)
            self._forms[id(power)] = found
        return self._forms[id(power)]

    def total(self, terms: Iterable[Term]) -> Form:
        out: Form = {}
        for scales, signs, power in terms:
            coefficient = Fraction(scales if self.mode == "scaled" else signs)
            if coefficient:
                for key, value in self.form(power).items():
                    out[key] = out.get(key, Fraction(0)) + coefficient * value
        return self.reduced(out)

    def reduced(self, form: Form) -> Form:
        """Without zeros; for signs, modulo two."""
        if self.mode == "signed":
            form = {key: Fraction(value.numerator % 2) for key, value in form.items()}
        return {key: value for key, value in form.items() if value}

    def equations(self) -> list[Form]:
        """Forms that must vanish, each once."""
        found = {}
        for axis, terms in self.walk.constraints:
            if self.on(axis):
                form = self.total(terms)
                if form:
                    found[frozenset(form.items())] = form
        return list(found.values())

    def solution(self) -> dict[Any, Fraction] | None:
        """Powers under which a layer that makes the units has power one; None if there are none."""
        made = [form for form in map(self.form, self.walk.made) if form]
        makers = list(dict.fromkeys(key for form in made for key in form))
        pivots: dict[Any, Form] = {}
        for form in self.equations():
            # Each unknown that has been solved for is put in; the rest is solved for one more,
            # the powers of the makers last, so that these stay to be chosen.
            for key, rest in pivots.items():
                form = self._with(form, key, rest)
            if not form:
                continue
            key = next((k for k in form if k not in makers), None) or next(iter(form))
            rest = {k: -v / form[key] for k, v in form.items() if k != key}
            rest = self.reduced(rest)
            pivots = {k: self._with(v, key, rest) for k, v in pivots.items()}
            pivots[key] = rest
        for chosen in makers:
            if chosen in pivots:
                continue
            values = {key: rest.get(chosen, Fraction(0)) for key, rest in pivots.items()}
            values[chosen] = Fraction(1)
            return values
        return None

    def _with(self, form: Form, key: Any, rest: Form) -> Form:
        if key not in form:
            return form
        out = {k: v for k, v in form.items() if k != key}
        for k, v in rest.items():
            out[k] = out.get(k, Fraction(0)) + form[key] * v
        return self.reduced(out)

    def holds(self, values: dict[Any, Fraction]) -> bool:
        """Whether these powers satisfy every equation."""
        return all(
            not self.reduced({0: sum((v * values.get(k, 0) for k, v in form.items()), Fraction(0))})
            for form in self.equations()
        )


def _whole(values: dict[Any, Fraction]) -> dict[Any, int]:
    """The smallest whole multiples."""
    common = math.lcm(*(v.denominator for v in values.values()))
    whole = {key: int(value * common) for key, value in values.items()}
    divisor = math.gcd(*whole.values()) or 1
    return {key: value // divisor for key, value in whole.items()}


def _simple(walk: _Walk, placed: Iterable[Atom]) -> set[Atom]:
    """The atoms that are a factor of an axis wherever they are: never a part, never twice."""
    out = set(placed)
    for array in walk.arrays:
        for axis in array.axes:
            found = alternatives(axis)
            if len(found) > 1:
                out -= {atom for one in found for atom in one}
            else:
                out -= {atom for atom, n in Counter(found[0]).items() if n > 1}
    for value in walk.merged:
        count = Counter(atom for axis in value.axes for atom in set(atoms(axis)))
        out -= {atom for atom, n in count.items() if n > 1}
    return out


def with_kinds(
    spec: PermutationSpec, apply_fn: Callable[..., Any], params: PyTree, *inputs: Any
) -> PermutationSpec:
    """The spec with signs and scales for the units that admit them.

    Units behind odd functions (tanh, erf) may change sign, units behind positively homogeneous
    ones (ReLU, max pooling) may be scaled by positive factors, and units that are only multiplied
    and added (values of attention, the ungated half of a SwiGLU) both. A group gets such a kind
    where the layers that make its units can carry the factor; `Factor.power` says with which power
    each place has it. Where there are several ways, the factor is in the first maker and in as few
    other places as follow from that. Units in loops and branches, and units of which parts are
    joined along an axis, keep their kind.

    Args:
        spec: A spec of the function; groups that are not as derived keep their kind.
        apply_fn: As for `permutation_spec`.
        params: As for `permutation_spec`.
        *inputs: As for `permutation_spec`.

    Returns:
        A spec whose permutations carry factors; see `action.Monomial`.

    Example:
        >>> from geojax.symmetry import permutation_spec
        >>> def mlp(params, x):
        ...     return jnp.tanh(x @ params["w"]) @ params["v"]
        >>> params = {"w": jnp.zeros((3, 8)), "v": jnp.zeros((8, 2))}
        >>> spec = permutation_spec(mlp, params, jnp.zeros((5, 3)))
        >>> with_kinds(spec, mlp, params, jnp.zeros((5, 3)))["w:1"].kind
        'signed'

    Reference:
        Chen, Lu, Hecht-Nielsen, On the geometry of feedforward neural network error surfaces, 1993
        (signs); Dinh et al., Sharp minima can generalize for deep nets, 2017 (scales).
    """
    walk = _Walk()
    naming = trace.walked(apply_fn, params, inputs, walk=walk)[0]
    simple = _simple(walk, naming.places)
    kinds: dict[str, Kind] = {}
    powers: dict[tuple[str, int, str], int] = {}
    for atom in naming.groups:
        places = [(naming.paths[p.leaf], p.axis) for p in naming.places[atom]]
        same = [g for g in spec.groups if g.size == atom.size and spec.members(g.name) == places]
        name = same[0].name if same else None
        floating = all(
            jnp.issubdtype(naming.leaves[p.leaf].dtype, jnp.floating) for p in naming.places[atom]
        )
        if name is None or atom not in simple or not floating:
            continue
        scaled = _System(walk, atom, "scaled").solution()
        signs = _System(walk, atom, "signed")
        signed = signs.solution()
        if scaled is not None:
            both = {key: Fraction(value) for key, value in _whole(scaled).items()}
            kinds[name] = "signed_scaled" if signs.holds(both) else "scaled"
        elif signed is not None:
            kinds[name] = "signed"
        else:
            continue
        for key, value in _whole(scaled or signed or {}).items():
            if key[0] == "leaf":
                powers[naming.paths[key[1]], key[2], name] = value
    return _carrying(spec, kinds, powers)


def _carrying(
    spec: PermutationSpec, kinds: dict[str, Kind], powers: dict[tuple[str, int, str], int]
) -> PermutationSpec:
    def carried(layout: Layout, path: str, axis: int) -> Layout:
        if isinstance(layout, Product | Concatenation):
            return type(layout)(tuple(carried(part, path, axis) for part in layout.parts))
        power = powers.get((path, axis, layout.name), 0)
        return Factor(layout.name, layout.size, power) if layout.name in kinds else layout

    return dataclasses.replace(
        spec,
        leaves=tuple(
            dataclasses.replace(
                leaf, axes=tuple(carried(x, leaf.path, i) for i, x in enumerate(leaf.axes))
            )
            for leaf in spec.leaves
        ),
        groups=tuple(
            dataclasses.replace(group, kind=kinds.get(group.name, group.kind))
            for group in spec.groups
        ),
    )
