"""A tree of low paths through several networks, which bounds the saddle between any two of them."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import progress as bars
from geojax import tree
from geojax.curves.paths import Path, autoneb, measure_path, measured_by

__all__ = ["Edge", "SpanningTree", "spanning_tree"]

PyTree = Any
Pair = tuple[int, int]


class Edge(NamedTuple):
    """A path of the tree.

    Attributes:
        i: The mode where it starts.
        j: The mode where it ends, more than i.
        path: The path; `path.points` are its pivots.
        cost: The highest loss on it.
        refined: Whether it was connected, or is still the straight segment.
    """

    i: int
    j: int
    path: Path
    cost: float
    refined: bool


class SpanningTree(NamedTuple):
    """The cheapest tree of paths found through all modes.

    Attributes:
        edges: K - 1 of them, the most costly first.
        mode_losses: `(K,)`.
        straight: `(K, K)` the highest loss on each straight segment; the diagonal is
            `mode_losses`.
        num_refined: How many pairs were connected.
        complete: Whether every pair that could replace an edge was tried; False where the budget
            ended first.
        num_gradients: Of all connections.
    """

    edges: tuple[Edge, ...]
    mode_losses: np.ndarray
    straight: np.ndarray
    num_refined: int
    complete: bool
    num_gradients: int

    def _route(self, i: int, j: int) -> list[tuple[Edge, bool]]:
        """The edges from i to j, and whether each is walked from its start to its end."""
        num = len(self.mode_losses)
        if not (0 <= i < num and 0 <= j < num):
            raise ValueError(f"modes {i} and {j}: expected numbers from 0 to {num - 1}.")
        came: dict[int, list[tuple[Edge, bool]]] = {i: []}
        waiting = [i]
        while waiting:
            here = waiting.pop()
            for edge in self.edges:
                for first, last, ahead in ((edge.i, edge.j, True), (edge.j, edge.i, False)):
                    if first == here and last not in came:
                        came[last] = [*came[here], (edge, ahead)]
                        waiting.append(last)
        return came[j]

    def bound(self, i: int, j: int) -> float:
        """The highest cost on the way from mode i to mode j through the tree.

        The saddle between the two lies no higher than the highest loss on any path between them,
        and this path is one; up to the grid on which the costs were measured.
        """
        costs = [edge.cost for edge, _ in self._route(i, j)]
        return max(costs, default=float(self.mode_losses[i]))

    def path(self, i: int, j: int) -> PyTree:
        """The pivots on the way from mode i to mode j through the tree, stacked."""
        route = self._route(i, j)
        if not route:
            raise ValueError(f"modes {i} and {j} are one; expected two different ones.")
        members: list[PyTree] = []
        for edge, ahead in route:
            pivots = tree.unstack(edge.path.points)
            pivots = pivots if ahead else pivots[::-1]
            members += pivots[1:] if members else pivots
        return tree.stack(members)


def spanning_tree(
    loss_fn: Callable[..., Any],
    modes: PyTree,
    batches: Any,
    optimizer: Any = None,
    num_steps: int | None = None,
    *,
    key: jax.Array | None = None,
    connect: Callable[[int, int], Path] | None = None,
    max_refinements: int | None = None,
    measure_fn: Callable[..., Any] | None = None,
    num_between: int = 9,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    folder: str | pathlib.Path | None = None,
    progress: bool | None = None,
    **options: Any,
) -> SpanningTree:
    r"""Connect K networks by a tree of paths with low highest losses.

    All straight segments are measured first. Then, as long as the budget lasts, the most costly
    edge of the cheapest tree that is still straight is connected; once none is, the tree is cut at
    its most costly edge, and the cheapest pair across the cut that was never tried is connected in
    the hope that it may replace it. Since the highest loss on two paths end to end is the higher
    of the two, the tree gives for every pair

    .. math:: L_{AC} \le \max(L_{AB}, L_{BC}).

    Args:
        loss_fn: As for `neb`.
        modes: Stacked networks, two or more.
        batches: As for `neb`.
        optimizer: As for `autoneb`; needed without `connect`.
        num_steps: As for `autoneb`.
        key: For `autoneb`; the pair (i, j) uses `fold_in(fold_in(key, i), j)`.
        connect: `(i, j) -> Path` from mode i to mode j, i < j, instead of `autoneb`;
            `measure_path` makes a `Path` of any pivots.
        max_refinements: How many pairs to connect; by default 2 (K - 1).
        measure_fn: As for `neb`.
        num_between: As for `neb`; the same for all paths.
        state_fn: As for `neb`.
        folder: Where each connection keeps its checkpoints, see `autoneb`. A call with the same
            folder goes on where another stopped, and ends with the same tree.
        progress: True or False for a bar; by default one appears when it takes long.
        **options: Further options of `autoneb`.

    Returns:
        A `SpanningTree`. Cost: K (K - 1) / 2 segments measured, and the connections; memory: the
        pivots of every connection that was made.

    Raises:
        ValueError: If there is one mode; without `connect`, if the optimizer, its steps or the key
            are missing; if what `connect` returns does not join the two modes.

    Example:
        >>> wall = lambda p, batch: jnp.mean(batch) * jnp.sum(p["w"]) ** 2
        >>> modes = {"w": jnp.array([[0.0, 0.0], [1.0, -1.0], [3.0, 0.0]])}
        >>> found = spanning_tree(wall, modes, jnp.ones(1), max_refinements=0)
        >>> [(edge.i, edge.j, edge.cost) for edge in found.edges]
        [(0, 2, 9.0), (0, 1, 0.0)]
        >>> found.bound(1, 2)
        9.0

    Reference:
        Draxler et al., "Essentially No Barriers in Neural Network Energy Landscape", ICML 2018,
        section 2.3.
    """
    tree.check_floating(modes, "modes")
    num = tree.num_points(modes)
    if num < 2:
        raise ValueError("there is one mode; expected at least 2.")
    budget = 2 * (num - 1) if max_refinements is None else max_refinements
    if not isinstance(budget, (int, np.integer)) or budget < 0:
        raise ValueError(f"max_refinements is {max_refinements!r}; expected at least 0.")
    if connect is None and budget and (optimizer is None or num_steps is None or key is None):
        raise ValueError("expected an optimizer, num_steps and a key, or connect.")
    if connect is not None and (options or folder is not None):
        raise ValueError("folder and the options of autoneb do not go with connect.")
    measured = measured_by(loss_fn, measure_fn)
    members = tree.unstack(modes)
    judged = {"num_between": num_between, "state_fn": state_fn}
    data = {name: options[name] for name in ("mesh", "weight_fn") if name in options}

    def connected(i: int, j: int) -> Path:
        if connect is not None:
            found = connect(i, j)
        else:
            assert key is not None
            assert num_steps is not None
            found = autoneb(
                loss_fn, members[i], members[j], batches, optimizer, num_steps,
                key=jax.random.fold_in(jax.random.fold_in(key, i), j), measure_fn=measure_fn,
                folder=None if folder is None else pathlib.Path(folder) / f"modes-{i}-{j}",
                progress=False, **judged, **options,
            )  # fmt: skip
        pivots = tree.unstack(found.points)
        for what, mode, pivot in (("starts", i, pivots[0]), ("ends", j, pivots[-1])):
            tree.check_same(members[mode], pivot, names=(f"mode {mode}", "the path's pivot"))
            if not bool(_same(members[mode], pivot)):
                raise ValueError(
                    f"connect({i}, {j}) returned a path that {what} at another point than mode "
                    f"{mode}; expected the modes themselves at its ends."
                )
        return found

    pairs = [(i, j) for i in range(num) for j in range(i + 1, num)]
    paths: dict[Pair, Path] = {}
    tried: dict[Pair, Path] = {}
    with bars.bar(len(pairs) + int(budget), "tree", show=progress) as update:
        for done, (i, j) in enumerate(pairs):
            both = tree.stack([members[i], members[j]])
            paths[i, j] = measure_path(measured, both, batches, progress=False, **judged, **data)
            update(done + 1)
        straight = np.zeros((num, num))
        losses = np.zeros(num)
        for (i, j), path in paths.items():
            straight[i, j] = straight[j, i] = path.highest
            losses[i], losses[j] = path.pivot_losses
        np.fill_diagonal(straight, losses)
        while True:
            edges = _cheapest_tree({pair: path.highest for pair, path in paths.items()}, num)
            pair = _next_pair(edges, paths, set(tried), num)
            if pair is None or len(tried) == budget:
                break
            tried[pair] = found = connected(*pair)
            if found.highest < paths[pair].highest:
                paths[pair] = found
            update(len(pairs) + len(tried))
    return SpanningTree(
        tuple(Edge(*e, paths[e], paths[e].highest, e in tried) for e in edges),
        losses,
        straight,
        len(tried),
        pair is None,
        sum(path.num_gradients for path in tried.values()),
    )


@jax.jit
def _same(a: PyTree, b: PyTree) -> jax.Array:
    return jnp.stack(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.all(x == y), a, b))).all()


def _cheapest_tree(costs: dict[Pair, float], num: int) -> list[Pair]:
    """The edges of the minimum spanning tree, the most costly first (Kruskal)."""
    group = list(range(num))
    edges = []
    for i, j in sorted(costs, key=lambda pair: (costs[pair], pair)):
        if group[i] != group[j]:
            edges.append((i, j))
            old, new = group[j], group[i]
            group = [new if x == old else x for x in group]
    return edges[::-1]


def _next_pair(
    edges: list[Pair], paths: dict[Pair, Path], tried: set[Pair], num: int
) -> Pair | None:
    """What to connect next: a straight edge of the tree, or what may replace a costly one."""
    for edge in edges:
        if edge not in tried:
            return edge
    for edge in edges:
        side = {edge[0]}
        for _ in range(num):
            for i, j in edges:
                if (i, j) != edge and (i in side or j in side):
                    side |= {i, j}
        across = [p for p in paths if p not in tried and (p[0] in side) != (p[1] in side)]
        if across:
            return min(across, key=lambda pair: (paths[pair].highest, pair))
    return None
