"""Predictions averaged over points of weight space, and what they are worth.

Ensembles are read member by member; calibration, temperature and diversity are then host arithmetic
in float64 on their outputs.
"""

from geojax.ensemble.differences import Ambiguity, Diversity, diversity
from geojax.ensemble.predictions import (
    Mode,
    Running,
    average,
    log_probabilities,
    predict,
    running,
)
from geojax.ensemble.reliability import (
    Bins,
    Calibration,
    Scheme,
    Uncertain,
    calibration,
    top_k_accuracy,
)
from geojax.ensemble.scaling import Temperature, fit_temperature, tempered
from geojax.ensemble.seeds import Interval, SeedComparison, compare_seeds, interval
from geojax.ensemble.shifts import Corruption, auroc, corrupt, predictive_entropy

__all__ = [
    "predictive_entropy",
    "interval",
    "corrupt",
    "compare_seeds",
    "auroc",
    "SeedComparison",
    "Interval",
    "Corruption",
    "Ambiguity",
    "Bins",
    "Calibration",
    "Diversity",
    "Mode",
    "Running",
    "Scheme",
    "Temperature",
    "Uncertain",
    "average",
    "calibration",
    "diversity",
    "fit_temperature",
    "log_probabilities",
    "predict",
    "running",
    "tempered",
    "top_k_accuracy",
]
