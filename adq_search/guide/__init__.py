"""The guide: finished policies in, the next policy out. It knows of no host."""

from adq_search.guide._candidates import sweep
from adq_search.guide._costs import learned_costs
from adq_search.guide._curves import Forecast, forecast_end
from adq_search.guide._decisions import (
    Decision,
    Rows,
    additive_costs,
    bit_products,
    decisions_of,
    extra_decision,
)
from adq_search.guide._guide import Guide
from adq_search.guide._model import Belief, LossModel

__all__ = [
    "Belief",
    "Decision",
    "Forecast",
    "Guide",
    "LossModel",
    "Rows",
    "additive_costs",
    "bit_products",
    "decisions_of",
    "extra_decision",
    "forecast_end",
    "learned_costs",
    "sweep",
]
