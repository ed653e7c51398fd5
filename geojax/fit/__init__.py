"""One training loop for any loss over any pytree, with optax: resumable, and frozen where asked.

`init` and `make_step` are the pure parts; `fit` runs them over batches with checkpoints, a log and
progress. A network, the bends of a curve or the vertex of a simplex are all trained by it.
"""

from geojax.fit.loop import Checkpointer, FitResult, NonFiniteError, fit
from geojax.fit.schedules import cyclic, three_phase, warmup_cosine
from geojax.fit.steps import FitState, init, make_step, takes_key

__all__ = [
    "Checkpointer",
    "FitResult",
    "FitState",
    "NonFiniteError",
    "cyclic",
    "fit",
    "init",
    "make_step",
    "takes_key",
    "three_phase",
    "warmup_cosine",
]
