"""Contracts that quantizers, datapaths and estimators keep, to be run by pytest: ours and yours."""

from adq_search.testing.datapaths import DatapathContract, InputStageContract
from adq_search.testing.estimators import EstimatorContract, FormulaEstimatorContract
from adq_search.testing.quantizers import (
    InputQuantizerContract,
    QuantizerContract,
    SlowPass,
    WeightQuantizerContract,
)

__all__ = [
    "DatapathContract",
    "EstimatorContract",
    "FormulaEstimatorContract",
    "InputQuantizerContract",
    "InputStageContract",
    "QuantizerContract",
    "SlowPass",
    "WeightQuantizerContract",
]
