"""SLEB: whole layers are taken away one by one, by the likelihood that remains without them."""

from __future__ import annotations

from adaskip.methods.method import Growth, least_lost, method
from adaskip.plan import KINDS, Sublayer
from adaskip.search.trials import Trials


@method("SLEB", lazy=True)
def sleb(rows: Trials, *, exact: bool = False) -> Growth:
    """Takes away the layer without which the calibration rows stay most likely, again and again.

    The calibration costs about half a forward of all rows per layer and round, if `exact`.

    Args:
        rows: calibration rows.
        exact: whether every round looks at all that is left, as in the paper.

    Source: SLEB (arXiv 2402.09025), redundancy verified on the model that is left.
    Differs: the likelihood is that of the rows' answers, there of whole texts; and, without
    `exact`, a layer is looked at anew only if it comes to the top by what it lost before.
    """
    layers = range(len(rows.losses.order) // 2)
    return least_lost(
        rows, [tuple(Sublayer(i, kind) for kind in KINDS) for i in layers], exact=exact
    )
