"""Ray, or one sentence on how to install it: everything that is imported of it comes from here."""

from __future__ import annotations

from adq_search.errors import MissingExtraError

try:
    import pyarrow.fs as arrow_files
    import ray
    from ray import cloudpickle, tune
    from ray.exceptions import RayActorError, RayTaskError
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler
    from ray.tune.search import Searcher
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    msg = "The host 'ray' needs Ray Tune. Install it: pip install 'adq-search[ray]'"
    raise MissingExtraError(msg) from error

__all__ = [
    "FIFOScheduler",
    "NodeAffinitySchedulingStrategy",
    "RayActorError",
    "RayTaskError",
    "Searcher",
    "Trial",
    "TrialScheduler",
    "arrow_files",
    "cloudpickle",
    "ray",
    "tune",
]
