"""OptunaHub package: pruner for studies with several objectives."""

from adq_search.plugins.optuna_pruner import FalseStops, FrontPruner

__all__ = ["FalseStops", "FrontPruner"]
