"""Which plan is fastest and fits. No device needed."""

from search.plan import Plan

__all__ = ["Plan"]
