"""Progress bars for long loops, which keep quiet on short ones and without a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

__all__ = ["Bar", "bar"]


class Bar(Protocol):
    """What a loop tells its progress bar."""

    def __call__(self, done: int, total: int | None = None, **values: Any) -> None:
        """Show that `done` of `total` steps are finished, with a few values beside."""
        ...


@contextmanager
def bar(total: int | None, label: str, *, show: bool | None = None) -> Iterator[Bar]:
    """A progress bar on standard error, as the context of a loop.

    Args:
        total: The number of steps, or None if unknown.
        label: What is being done.
        show: True for a bar at once, False for none; None for one that appears after three
            seconds, and only on a terminal. Without tqdm (extra `examples`) there is none.

    Yields:
        A function to call as `update(done, total, **values)`; it fits wherever this package takes
        a `progress` hook.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        show = False
    if show is False:
        yield lambda done, total=None, **values: None
        return
    inner = tqdm(  # pyright: ignore[reportPossiblyUnboundVariable]
        total=total,
        desc=label,
        delay=0 if show else 3,
        disable=None if show is None else False,
        dynamic_ncols=True,
        leave=False,
    )

    def update(done: int, total: int | None = None, **values: Any) -> None:
        if total is not None:
            inner.total = total
        if values:
            inner.set_postfix(values, refresh=False)
        inner.update(done - inner.n)

    try:
        yield update
    finally:
        inner.close()
