"""Ray, or one sentence on how to install it: imported before anything that needs it."""

from __future__ import annotations

from adq_search.errors import MissingExtraError

try:
    import ray
    from ray import tune
except ImportError as error:
    msg = "The host 'ray' needs Ray Tune. Install it: pip install 'adq-search[ray]'"
    raise MissingExtraError(msg) from error

__all__ = ["ray", "tune"]
