"""Contracts that every quantizer and every datapath keeps, to be run by pytest: ours and yours."""

from adq_search.testing.datapaths import DatapathContract, InputStageContract
from adq_search.testing.quantizers import (
    InputQuantizerContract,
    QuantizerContract,
    SlowPass,
    WeightQuantizerContract,
)

__all__ = [
    "DatapathContract",
    "InputQuantizerContract",
    "InputStageContract",
    "QuantizerContract",
    "SlowPass",
    "WeightQuantizerContract",
]
