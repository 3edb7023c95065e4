"""Plans whose files are gone, put together again from what a board has of them.

The files of plans are not committed, as full linear maps are large. All else of a plan is in the
board's records, so that whoever has those can measure it anew without the hours of its search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from adaskip.fingerprint import fingerprint_name, model_fingerprint
from adaskip.fitting import fit_linears
from adaskip.leaderboard.rows import PlanRow
from adaskip.plan import SkipPlan, Sublayer
from adaskip.plan_file import is_linear, told_replacement
from adaskip.search import SEARCH
from adaskip.search.losses import Row, row_ids

# What `about` says of a plan whose linear maps are not, to the bit, those that it had.
FITTED_ANEW = "linear maps"


def put_together(
    model: PreTrainedModel, row: PlanRow, calibration: Callable[[], Sequence[Row]]
) -> SkipPlan | None:
    """The plan that a row tells of.

    Linear maps of a search are fitted anew, in depth order on the streams that the plan makes, as
    the search does last. If that did not help it then, or this is another machine, the plan has
    another digest: what was measured under the former one does not count for it.

    Args:
        model: that it is for.
        row: what is known of it.
        calibration: gives the rows that it was made from.

    Returns:
        The plan; None if the row is of another model, has too little, or is of a method that fits
        linear maps in its own way.
    """
    made_for = model_fingerprint(model)
    if not row.sublayers or row.model != fingerprint_name(made_for):
        return None
    places = {Sublayer(told["layer"], told["kind"]): told for told in row.sublayers}
    linears = [sublayer for sublayer, told in places.items() if is_linear(told)]
    kept = {s: told_replacement(told) for s, told in places.items() if s not in linears}
    plan = SkipPlan(kept, fingerprint=made_for, about=row.about)
    if not linears:
        return plan if plan.digest == row.plan_digest else None
    if row.about.get("method") != SEARCH:
        return None
    prompts = [row_ids(*each)[0][:, :-1] for each in calibration()]
    fitted = fit_linears(model, prompts, linears, rank=row.recipe["rank"], plan=plan)
    about = dict(row.about)
    if fitted.digest != row.plan_digest:
        # What it loses on the calibration rows was measured with the former maps.
        about = {key: value for key, value in about.items() if key != "loss"}
        about[FITTED_ANEW] = "fitted anew"
    return SkipPlan(fitted, fingerprint=made_for, about=about)
