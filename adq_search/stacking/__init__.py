"""Many networks of one architecture as one network, so that one pass trains them all."""

from adq_search.stacking._stack import Stack, why_not_stackable

__all__ = ["Stack", "why_not_stackable"]
