"""The trained network in integers: codes, exact sums, fixed-point requantization.

`lower` makes it; `verify` compares it with the fake-quantized network code by code; `verify_layers`
checks each layer alone.
"""

from adq_search.integer.agreement import Agreement, LayerAgreement
from adq_search.integer.lower import lower
from adq_search.integer.network import IntegerLayer, IntegerNetwork
from adq_search.integer.verify import LayerCheck, verify, verify_layers
from adq_search.integer.words import WeightWords, register_words, snap_codebooks_, weight_words

__all__ = [
    "Agreement",
    "IntegerLayer",
    "IntegerNetwork",
    "LayerAgreement",
    "LayerCheck",
    "WeightWords",
    "lower",
    "register_words",
    "snap_codebooks_",
    "verify",
    "verify_layers",
    "weight_words",
]
