"""Which layer bears how few bits: estimators of curvature, and the table made of it."""

from adq_search.sensitivity._base import (
    Curvature,
    LayerCurvature,
    SensitivityEstimator,
)
from adq_search.sensitivity._registry import (
    estimator_names,
    make_estimator,
    register_estimator,
)
from adq_search.sensitivity.fisher import FisherEstimator
from adq_search.sensitivity.hessian import HessianEstimator
from adq_search.sensitivity.table import SensitivityTable, sensitivity_table

__all__ = [
    "Curvature",
    "FisherEstimator",
    "HessianEstimator",
    "LayerCurvature",
    "SensitivityEstimator",
    "SensitivityTable",
    "estimator_names",
    "make_estimator",
    "register_estimator",
    "sensitivity_table",
]
