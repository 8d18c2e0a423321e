"""Adapters to hosts: translation only. The folder `plugins/` imports as `adq_search.plugins`."""
