"""Stand-ins for training that answer in microseconds, to measure samplers and pruners with."""

from adq_search.simulator._problem import Measurement, SimulatedProblem
from adq_search.simulator.published import published_problem

__all__ = ["Measurement", "SimulatedProblem", "published_problem"]
