"""Metrics on the planes through triangles between points: the faces of a simplex or a complex."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from geojax import tree
from geojax.fit import Checkpointer
from geojax.surface.planes import Frame, Plane, frame, plane

__all__ = ["Face", "faces"]

PyTree = Any


class Face(NamedTuple):
    """Metrics on the plane of one triangle.

    Attributes:
        triangle: The indices of its three vertices.
        plane: The `Plane` through them; `plane.frame.points` are the triangle's coordinates, the
            first vertex at the origin and the second on the x axis.
    """

    triangle: tuple[int, int, int]
    plane: Plane


def faces(
    metrics_fn: Callable[..., dict[str, jax.Array]],
    vertices: PyTree,
    triangles: Sequence[Sequence[int]],
    batches: Any,
    *,
    num: int = 15,
    margin: float = 0.25,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    chunk: int = 1,
    checkpoints: Callable[[int], Checkpointer] | None = None,
    progress: bool | None = None,
) -> tuple[Face, ...]:
    """Metrics on the plane through each of several triangles, one square of each.

    Each square is centred on its triangle's smallest box and as wide as the longer side of that box
    and the margins, so that a triangle fills it however it is turned; the squares differ in size.

    Args:
        metrics_fn: As for `plane`.
        vertices: Stacked points, leaves `(n, ...)`: the vertices of a simplex or a complex.
        triangles: The indices of three vertices each, such as `simplex.faces(complex, 2)`.
        batches: One batch or a re-iterable.
        num: Positions along each side of a square; at least 2.
        margin: What is added on each side, as a part of the box's longer side; at least 0.
        state_fn: As for `plane`.
        weight_fn: As for `plane`.
        mesh: As for `plane`.
        chunk: As for `plane`.
        checkpoints: From the number of the triangle to its `Checkpointer`, as `plane` uses one; the
            same call then goes on where it was stopped. Of each triangle that was begun or done it
            measures one position (or chunk) again, and refuses where other numbers show.
        progress: As for `plane`, a bar for each triangle.

    Returns:
        One `Face` for each triangle, in their order. Cost: `num**2` passes over the data for each,
        and one more for each with a checkpoint that goes on; memory: a frame for each, three times
        the parameters.

    Raises:
        ValueError: If there is no triangle, or one that does not name three different vertices; if
            three vertices lie on a line, naming the triangle; as `plane`. All triangles are checked
            before the first is measured.

    Example:
        >>> import jax.numpy as jnp
        >>> corners = {"w": jnp.array([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]])}
        >>> bowl = lambda p, batch: {"loss": jnp.mean(batch) + jnp.sum(p["w"] ** 2)}
        >>> (face,) = faces(bowl, corners, [(0, 1, 2)], jnp.zeros(1), num=3, margin=0.0)
        >>> face.plane.coordinates[0, 0].tolist(), face.plane.values["loss"][0].tolist()
        ([0.0, -0.5], [0.25, 1.25, 4.25])

    Reference:
        Benton et al., "Loss Surface Simplexes for Mode Connecting Volumes and Fast Ensembling",
        ICML 2021, the faces of the two spirals' simplex.
    """
    if not isinstance(num, (int, np.integer)) or num < 2:
        raise ValueError(f"num is {num!r}; expected an integer of at least 2.")
    if not (np.isfinite(margin) and margin >= 0):
        raise ValueError(f"margin is {margin!r}; expected a number of at least 0.")
    chosen = _checked(triangles, tree.num_points(vertices))
    members = tree.unstack(vertices)
    frames = [_frame(members, triangle) for triangle in chosen]
    found = []
    for i, (triangle, through) in enumerate(zip(chosen, frames, strict=True)):
        measured = plane(
            metrics_fn, through, batches, num=int(num), extent=_square(through, margin),
            state_fn=state_fn, weight_fn=weight_fn, mesh=mesh, chunk=chunk, progress=progress,
            checkpoint=None if checkpoints is None else checkpoints(i),
        )  # fmt: skip
        found.append(Face(triangle, measured))
    return tuple(found)


def _checked(triangles: Sequence[Sequence[int]], num: int) -> list[tuple[int, int, int]]:
    chosen = []
    for triangle in triangles:
        if (
            len(triangle) != 3
            or any(isinstance(i, bool) or not isinstance(i, (int, np.integer)) for i in triangle)
            or any(not 0 <= i < num for i in triangle)
            or len(set(triangle)) < 3
        ):
            raise ValueError(
                f"triangles: got {triangle!r}; expected three different indices from 0 to "
                f"{num - 1}."
            )
        a, b, c = map(int, triangle)
        chosen.append((a, b, c))
    if not chosen:
        raise ValueError(
            "triangles: got none; a complex has triangles where a simplex has three vertices or "
            "more."
        )
    return chosen


def _frame(members: list[PyTree], triangle: tuple[int, int, int]) -> Frame:
    try:
        return frame([members[i] for i in triangle])
    except ValueError as error:
        raise ValueError(f"faces: triangle {triangle}: {error}") from error


def _square(through: Frame, margin: float) -> tuple[tuple[float, float], tuple[float, float]]:
    low, high = np.array(through.box).T
    center, half = (low + high) / 2, (0.5 + margin) * float((high - low).max())
    (x, y) = center
    return (x - half, x + half), (y - half, y + half)
