"""Stand-ins for training that answer in milliseconds, to measure samplers and pruners with."""

from adq_search.simulator._problem import Measurement, SimulatedProblem
from adq_search.simulator.published import published_problem
from adq_search.simulator.tabulated import TabulatedProblem, TabulatedTrial, read_table

__all__ = [
    "Measurement",
    "SimulatedProblem",
    "TabulatedProblem",
    "TabulatedTrial",
    "published_problem",
    "read_table",
]
