"""The field's methods that make plans from calibration rows: one file each, and an import below."""

from adaskip.methods.block_pruner import block_pruner
from adaskip.methods.making import make_plan, method_names
from adaskip.methods.method import METHODS, Growth, method
from adaskip.methods.nbl import nbl
from adaskip.methods.prune_and_comp import prune_and_comp
from adaskip.methods.sleb import sleb

__all__ = [
    "METHODS",
    "Growth",
    "block_pruner",
    "make_plan",
    "method",
    "method_names",
    "nbl",
    "prune_and_comp",
    "sleb",
]
