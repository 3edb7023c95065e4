"""Plans whose files are gone, put together again from what a board has of them.

The files of plans are not committed, as full linear maps are large. All else of a plan is in the
board's records, so that whoever has those can measure it anew without the hours of its search.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from transformers import PreTrainedModel

from adaskip.errors import RunError
from adaskip.fingerprint import fingerprint_name, model_fingerprint
from adaskip.fitting import DISTILLED_ON, refit_linears
from adaskip.leaderboard.rows import PlanRow
from adaskip.plan import SkipPlan, all_sublayers
from adaskip.profiling.plan_times import linear_like
from adaskip.replacements import Linear, Replacement, Window
from adaskip.search import SEARCH
from adaskip.search.menu import NOTHING
from adaskip.search.rows import Row, reads
from adaskip.sublayer_times import replacement_name
from adaskip.summary import key_value_heads

_WINDOW = re.compile(r"window (\d+)(?: and (\d+) sinks)?(?: of heads ([\d ]+))?")
_LINEAR = re.compile(r"linear(?: (\d+))?")
_GAIN = "gain "


def told(replacement: Replacement) -> str:
    """What takes a sublayer's place, in words that `stand_in` reads: "nothing", "gain 1.015"."""
    if replacement is None:
        return NOTHING
    if isinstance(replacement, Linear | Window):
        return replacement_name(replacement)
    return f"{_GAIN}{replacement!r}"


def replaced(plan: SkipPlan) -> dict[str, str]:
    """By what each sublayer of a plan is replaced, as `told` has it: `PlanRow.replaced`."""
    return {str(sublayer): told(replacement) for sublayer, replacement in plan.items()}


def take_as_long(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether what two plans replace is the same but for the numbers of gains and linear maps."""
    kinds = (
        {name: _GAIN if text.startswith(_GAIN) else text for name, text in each.items()}
        for each in (one, other)
    )
    return next(kinds) == next(kinds)


def stand_in(model: PreTrainedModel, row: PlanRow) -> SkipPlan | None:
    """The plan that a row tells of, with any numbers in its linear maps: it takes the same time.

    Args:
        model: that it is for.
        row: what is known of it.

    Returns:
        The plan; None if the row is of another model, or has too little.

    Raises:
        RunError: it says something that cannot be in a sublayer's place.
    """
    made_for = model_fingerprint(model)
    if not row.replaced or row.model not in ("", fingerprint_name(made_for)):
        return None
    config = model.config.get_text_config(decoder=True)
    n_layers, n_heads = config.num_hidden_layers, key_value_heads(config)
    by_name = {str(sublayer): sublayer for sublayer in all_sublayers(n_layers)}
    try:
        replacements = {
            by_name[name]: _read(text, n_heads, model) for name, text in row.replaced.items()
        }
    except (KeyError, ValueError) as error:
        raise RunError(
            f"The record of {row.id} is damaged: {error} is nothing that can be in a sublayer's "
            "place; delete the row, and --parts plans makes the plan anew."
        ) from error
    return SkipPlan(replacements, fingerprint=made_for, about=row.about)


def put_together(
    model: PreTrainedModel, row: PlanRow, calibration: Callable[[], Iterable[Row]]
) -> SkipPlan | None:
    """The plan that a row tells of.

    Linear maps of a search are fitted anew, in depth order on the streams that the plan makes, as
    the search does last. If that did not help it then, or this is a machine of other roundings, the
    plan has another digest: what was lost under the former one does not count for it.

    Args:
        model: that it is for.
        row: what is known of it.
        calibration: gives the rows that it was made from.

    Returns:
        The plan; None if `stand_in` has none, or its linear maps were made in another way.
    """
    plan = stand_in(model, row)
    if plan is None or not plan.has_linears:
        return plan
    if row.about.get("method") != SEARCH or DISTILLED_ON in row.about:
        return None
    fitted = refit_linears(model, plan, reads(calibration()), source=row.about["calibration"])
    same = fitted.digest == row.plan_digest
    return SkipPlan(fitted, fingerprint=plan.fingerprint, about=row.about) if same else fitted


def _read(text: str, n_heads: int, model: PreTrainedModel) -> Replacement:
    """What takes a sublayer's place, as `told` has it; a linear map with any numbers."""
    if text == NOTHING:
        return None
    if text.startswith(_GAIN):
        return float(text.removeprefix(_GAIN))
    if found := _LINEAR.fullmatch(text):
        return linear_like(model, None if found[1] is None else int(found[1]))
    found = _WINDOW.fullmatch(text)
    if found is None:
        raise ValueError(repr(text))
    size, sinks, heads = found.groups()
    return Window(
        int(size),
        Window.sinks if sinks is None else int(sinks),
        None if heads is None else tuple(map(int, heads.split())),
        None if heads is None else n_heads,
    )
