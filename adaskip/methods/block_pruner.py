"""BlockPruner: attention and FFN sublayers are taken away one by one, by perplexity."""

from __future__ import annotations

from adaskip.methods.method import Growth, least_lost, method
from adaskip.search.trials import Trials


@method("BLOCKPRUNER", lazy=True)
def block_pruner(rows: Trials, *, exact: bool = False) -> Growth:
    """Takes away the sublayer without which the perplexity is lowest, again and again.

    The calibration costs about half a forward of all rows per sublayer and round, if `exact`.

    Args:
        rows: calibration rows.
        exact: whether every round looks at all that is left, as in the paper.

    Source: BlockPruner (arXiv 2406.10594), algorithm 1.
    Differs: the perplexity is that of the rows' answers, there of whole texts; and, without
    `exact`, a sublayer is looked at anew only if it comes to the top by what it lost before.
    """
    return least_lost(rows, [(sublayer,) for sublayer in rows.losses.order], exact=exact)
