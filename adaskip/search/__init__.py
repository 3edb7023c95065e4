"""From calibration rows and a budget in time to a plan."""

from adaskip.search.searching import search_plan

__all__ = ["search_plan"]
