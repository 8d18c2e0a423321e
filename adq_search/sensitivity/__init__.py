"""What each precision of each layer is predicted to cost in loss: estimators, and their table."""

from adq_search.sensitivity._base import (
    Estimate,
    ScoreKey,
    Scores,
    SensitivityEstimator,
    Subject,
)
from adq_search.sensitivity._curvature import Curvature, LayerCurvature
from adq_search.sensitivity._labels import Labels
from adq_search.sensitivity._registry import (
    estimator_names,
    make_estimator,
    register_estimator,
)
from adq_search.sensitivity.fisher import FisherEstimator
from adq_search.sensitivity.fisher_output import FisherOutputEstimator
from adq_search.sensitivity.hessian import HessianEstimator
from adq_search.sensitivity.kl import KlEstimator
from adq_search.sensitivity.lsq_steps import LsqStepsEstimator
from adq_search.sensitivity.table import SensitivityTable, sensitivity_table

__all__ = [
    "Curvature",
    "Estimate",
    "FisherEstimator",
    "FisherOutputEstimator",
    "HessianEstimator",
    "KlEstimator",
    "Labels",
    "LayerCurvature",
    "LsqStepsEstimator",
    "ScoreKey",
    "Scores",
    "SensitivityEstimator",
    "SensitivityTable",
    "Subject",
    "estimator_names",
    "make_estimator",
    "register_estimator",
    "sensitivity_table",
]
