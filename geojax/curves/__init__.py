"""Curves of low loss between networks: mode-connecting paths.

A curve is a basis, from t to coefficients, and a stack of control points. Nothing about the model
is rewritten: a point of the curve is a parameter pytree like any other.
"""

from geojax.curves.bases import (
    Basis,
    Bezier,
    PiecewiseBezier,
    Polychain,
    Speed,
    arc_length_ts,
    bezier,
    coefficients,
    initialize,
    length,
    piecewise_bezier,
    point,
    points,
    polychain,
    segment,
    speed,
)
from geojax.curves.ensembling import Collected, Swag, collect, fge, snapshots, swa, swag
from geojax.curves.evaluation import CurveEvaluation, MetricOnCurve, evaluate, summarize
from geojax.curves.training import CurveFit, Sampler, fit, sample_ts

__all__ = [
    "Basis",
    "Bezier",
    "Collected",
    "CurveEvaluation",
    "CurveFit",
    "MetricOnCurve",
    "PiecewiseBezier",
    "Polychain",
    "Sampler",
    "Speed",
    "Swag",
    "arc_length_ts",
    "bezier",
    "coefficients",
    "collect",
    "evaluate",
    "fge",
    "fit",
    "initialize",
    "length",
    "piecewise_bezier",
    "point",
    "points",
    "polychain",
    "sample_ts",
    "segment",
    "snapshots",
    "speed",
    "summarize",
    "swa",
    "swag",
]
