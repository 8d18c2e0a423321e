"""OptunaHub package: sampler of mixed-precision quantization policies."""

from adq_search.plugins.optuna_sampler import PolicySampler

__all__ = ["PolicySampler"]
