"""What the benchmarks of curves and simplexes share: the table of claims, timing, kept networks."""

import time

import jax
import numpy as np
import optax

from geojax import checkpoint, report

BEGIN = time.perf_counter()


class Table:
    """Claims with what was measured."""

    def __init__(self):
        self.rows = []

    def add(self, claim, sign, limit, value):
        holds = value <= limit if sign == "<=" else value >= limit
        verdict = "met" if holds else "MISSED"
        row = {"claim": claim, "target": f"{sign} {limit:g}", "measured": f"{value:.4g}",
               "verdict": verdict}  # fmt: skip
        self.rows.append(row)
        print("  " + "   ".join(row.values()), flush=True)

    def show(self):
        if not self.rows:
            return True
        print("\n" + report.text_table(self.rows))
        return all(row["verdict"] == "met" for row in self.rows)


def heading(text):
    print(f"\n[{time.perf_counter() - BEGIN:.0f} s] {text}", flush=True)


def least(runs, rounds):
    """The least CPU seconds of each run, interleaved; the first round compiles and is left out."""
    best = dict.fromkeys(runs, float("inf"))
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            jax.block_until_ready(run())
            if i:
                best[name] = min(best[name], time.process_time() - start)
    return best


def stored(folder, make):
    """What `make` trains, from the folder where it was kept."""
    if not (folder / "geojax.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(folder, make())
    return checkpoint.load(folder)[0]


def decayed(rate, weight_decay=5e-4):
    """SGD with momentum and coupled decay."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, 0.9))


def spread(values, digits, scale=1.0):
    """The mean over the seeds, and half the width of its 95 % t-interval."""
    from scipy import stats

    values = scale * np.asarray(values)
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}"
