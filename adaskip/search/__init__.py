"""From calibration rows and a budget in time to a plan."""

from adaskip.search.menu import MENU
from adaskip.search.searching import NAME as SEARCH, WINDOWS, search_plan

__all__ = ["MENU", "SEARCH", "WINDOWS", "search_plan"]
