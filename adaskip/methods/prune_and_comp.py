"""Prune&Comp: whole layers are taken away one by one, and what is left is scaled up for each."""

from __future__ import annotations

from adaskip.methods.method import Growth, method
from adaskip.plan import Sublayer
from adaskip.search.losses import stream_similarity, token_gain
from adaskip.search.trials import Trials


@method("PRUNECOMP", gain=True)
def prune_and_comp(rows: Trials) -> Growth:
    """Takes away the layer of least block influence, with a gain in its place, again and again.

    Block influence is seen anew on the model that is left, gains included. The calibration costs a
    forward of all rows, and what lies behind each layer that is taken away.

    Args:
        rows: calibration rows.

    Source: Prune&Comp (arXiv 2507.18212), the iterative loop with block influence.
    Differs: the gain is the median over tokens of the ratio of norms, which attention sinks leave
    alone; and it scales the stream where the layer was, in place of the weights behind it.
    """
    losses = rows.losses
    left = list(range(len(losses.order) // 2))
    while left:
        similarity = {
            layer: stream_similarity(
                losses.before(Sublayer(layer, "attn")), losses.behind(Sublayer(layer, "ffn"))
            )
            for layer in left
        }
        chosen = max(left, key=lambda layer: (similarity[layer], -layer))
        left.remove(chosen)
        attn, ffn = Sublayer(chosen, "attn"), Sublayer(chosen, "ffn")
        gain = token_gain(losses.before(attn), losses.behind(ffn))
        losses.accept({attn: gain, ffn: None})
        yield dict(losses.plan)
