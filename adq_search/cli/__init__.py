"""The command `adq-search`."""

from adq_search.cli._app import app, main

__all__ = ["app", "main"]
