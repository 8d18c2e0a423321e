"""Quantizers: where the levels are, and how values are pulled there.

`WEIGHT_QUANTIZERS` and `INPUT_QUANTIZERS` hold them by name; `resolve_scheme` pairs them.
"""

from adq_search.quantizers._again import made_again
from adq_search.quantizers._base import (
    INPUT_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    ErrorFloor,
    InputQuantizer,
    Quantizer,
    QuantizerHealth,
    WeightQuantizer,
)
from adq_search.quantizers._registry import Registry
from adq_search.quantizers.adq import AdqWeight
from adq_search.quantizers.asq import Adapter, AsqInput
from adq_search.quantizers.lsq import LsqInput, LsqWeight
from adq_search.quantizers.n2uq import N2uqInput
from adq_search.quantizers.post import PostWeight
from adq_search.quantizers.pot import PotWeight
from adq_search.quantizers.root import RootWeight
from adq_search.quantizers.schemes import (
    SCHEMES,
    Scheme,
    check_options,
    check_precision,
    make_quantizers,
    resolve_scheme,
)

__all__ = [
    "INPUT_QUANTIZERS",
    "SCHEMES",
    "WEIGHT_QUANTIZERS",
    "Adapter",
    "AdqWeight",
    "AsqInput",
    "ErrorFloor",
    "InputQuantizer",
    "LsqInput",
    "LsqWeight",
    "N2uqInput",
    "PostWeight",
    "PotWeight",
    "Quantizer",
    "QuantizerHealth",
    "Registry",
    "RootWeight",
    "Scheme",
    "WeightQuantizer",
    "check_options",
    "check_precision",
    "made_again",
    "make_quantizers",
    "resolve_scheme",
]
