"""NBL: the attentions that come nearest to a linear map are replaced by one."""

from __future__ import annotations

import torch
from torch import Tensor

from adaskip.errors import AdaskipError
from adaskip.methods.method import Growth, method
from adaskip.plan import Sublayer
from adaskip.search.cross_fitting import Learned
from adaskip.search.trials import Trials

_RIDGE = 1e-3


@method("NBL", linear=True)
def nbl(rows: Trials) -> Growth:
    """Replaces attentions by full linear maps, those of the lowest bound on the error first.

    With `x` the residual stream before an attention and `y` the one behind it, the bound is the sum
    of `1 - rho^2` over their canonical correlations. Bounds and maps are of the dense model, once
    and for all; the calibration costs a forward of all rows and a decomposition per layer.

    Args:
        rows: calibration rows, of more tokens than the model is wide.

    Raises:
        AdaskipError: there are too few tokens.

    Source: NBL (arXiv 2505.21077), theorem 3.2 and algorithm 1: `W = C_yx C_xx^-1`.
    Differs: the map is of the stream divided by its root mean square, which attention sinks leave
    alone; `C_xx`, and for the bounds `C_yy`, too, is regularized by a thousandth of its mean
    diagonal, which sinks make large in the bounds: layers where they stand out come later; the
    first tokens of each row are left out of the fit, not of the bounds.
    """
    losses = rows.losses
    attentions = [sublayer for sublayer in losses.order if sublayer.kind == "attn"]
    bounds = {
        s: _bound(torch.cat(losses.before(s)), torch.cat(losses.behind(s))) for s in attentions
    }
    # Fitted on the dense stream, as nothing has become part of the plan yet.
    plan: dict[Sublayer, Learned] = {}
    for sublayer in sorted(attentions, key=lambda s: (bounds[s], s.position)):
        plan[sublayer] = losses.linear(sublayer, None).settled()
        yield dict(plan)


def _bound(x: Tensor, y: Tensor) -> float:
    """Sum of `1 - rho^2` over the canonical correlations of two streams: [tokens, hidden] each."""
    n_tokens, hidden = x.shape
    if n_tokens <= hidden:
        raise AdaskipError(
            f"Canonical correlations of a model {hidden} wide take at least {hidden + 1} tokens; "
            f"{n_tokens} were given. Give more or longer rows."
        )
    both = torch.cat([x, y], dim=1).double().T
    cov = torch.cov(both)
    xx, yy, yx = cov[:hidden, :hidden], cov[hidden:, hidden:], cov[hidden:, :hidden]
    for part in (xx, yy):
        part.diagonal().add_(_RIDGE * part.diagonal().mean())
    left, right = torch.linalg.cholesky(yy), torch.linalg.cholesky(xx)
    # The singular values of L_y^-1 C_yx L_x^-T are the correlations, its squares their sum.
    half = torch.linalg.solve_triangular(left, yx, upper=False)
    correlations = torch.linalg.solve_triangular(right, half.T, upper=False)
    return hidden - float(correlations.square().sum())
