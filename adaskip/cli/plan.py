"""The command line that makes plans: a search, the field's methods, or all, at given accelerations.

Plans that are there are kept, an interrupted one goes on, and the policy PLAN applies them.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from adaskip.budget import check_acceleration
from adaskip.cli.kept_plans import (
    FIT_ROWS,
    is_ready,
    kept_plan,
    made_of,
    may_hold,
    plan_path,
    training_of,
)
from adaskip.cli.run import LOADING, add_run_options, as_words
from adaskip.command import Command, say
from adaskip.distilling import LEAST_PROMPTS, TWICE, can_learn, check_distills, distill_plan
from adaskip.errors import AdaskipError, DataError, refuse_below_one, unknown_name
from adaskip.fitting import EPOCHS, LOSS_BEFORE, refit_linears
from adaskip.methods import METHODS, make_plan, method_names
from adaskip.models.processes import refuse_several
from adaskip.models.spec import model_names, model_spec
from adaskip.plan import Phase, SkipPlan
from adaskip.reports.explorer import write_explorer
from adaskip.runs.calibration import calibration_rows, read_texts, text_rows
from adaskip.runs.files import writing
from adaskip.runs.loaded import FIRST_ROWS, LoadedModel
from adaskip.runs.runconfig import DENSE, RunConfig
from adaskip.runs.runner import resolve
from adaskip.search import MENU, SEARCH, WINDOWS, search_plan
from adaskip.search.describing import record_name, with_measured
from adaskip.search.menu import Dishes
from adaskip.search.rows import Row, reads
from adaskip.tables import markdown_table, number, percent
from adaskip.tasks.spec import task_spec

logger = logging.getLogger(__name__)

ALL = "all"
_ROWS, _FIT_ROWS, _TASKS = 4, 32, ("sample_summarization", "sample_qa")
# What texts of the user's own have no use for.
_OF_TASKS = ("rows", "fit_rows", "tasks", "seed", "data_dir", "min_length")
_LOADING = ("model_path", "dtype", "device", "allow_pickle", "seed", "data_dir", "min_length")


def plan_main(argv: Sequence[str] | None = None) -> int:
    """What `adaskip plan` does with its options, by default those of the command line."""
    return PLAN.main(argv)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = f"{ALL}, or of: {', '.join(method_names())}"
    add("--model", metavar="NAME", help=f"{', '.join(model_names())}, a folder or a hub id")
    add("--show", nargs="+", metavar="FILE", help="make none: show these plans' files")
    add("--method", nargs="+", default=[SEARCH], metavar="NAME", help=f"{names}; {SEARCH}")
    add("--acceleration", nargs="+", type=float, default=[1.2], metavar="RATIO", help="1.2")
    add("--phase", choices=[*Phase], default=str(Phase.PREFILL), help="in which it is reached")
    add("--context", type=int, default=1000, metavar="N", help="prompt tokens; 1000")
    add("--batch", type=int, default=1, metavar="N", help="sequences at which times count; 1")
    add("--rows", type=int, metavar="N", help=f"calibration rows; {_ROWS}")
    add(
        "--fit_rows",
        type=int,
        metavar="N",
        help="fit linear maps anew on so many rows at last, those of --rows among them; "
        f"of packaged documents up to {_FIT_ROWS}, as many as there are",
    )
    add(
        "--distill",
        type=int,
        default=0,
        metavar="N",
        help=f"train gains and linear maps on these rows at last, N times over, e.g. {TWICE}; 0",
    )
    add("--reference_tokens", type=int, default=96, metavar="N", help="of each answer; 96")
    add(
        "--tasks",
        nargs="+",
        metavar="NAME",
        help=f"whose warm-up rows calibrate; {' '.join(_TASKS)}",
    )
    add(
        "--texts",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="calibrate on these text files, one row each: --context tokens, and how they go on",
    )
    add("--replacements", nargs="+", default=[*MENU], help=f"of the search: {' '.join(MENU)}")
    add("--windows", nargs="+", type=int, default=[*WINDOWS], metavar="N", help="of the search")
    add("--rank", type=int, metavar="N", help="of the search's linear maps (default: full ones)")
    add("--kv_share", type=float, metavar="SHARE", help="of the search: keys and values held")
    add("--exact", action="store_true", help="SLEB and BLOCKPRUNER as their papers have them")
    add("--measure", action="store_true", help="also measure what each plan reaches")
    add("--out", default="results/plans", metavar="FOLDER", help="results/plans")
    add("--html", metavar="FILE", help="write a page to explore the plans with; self-contained")
    add_run_options(parser, _LOADING)


def _act(given: argparse.Namespace) -> int:
    """Makes plans, or shows those that are there."""
    refuse_several(
        "adaskip plan measures times, and its files have one writer",
        "start it in one process, without torchrun or accelerate",
    )
    if (given.model is None) == (given.show is None):
        raise AdaskipError("Give either a --model to make plans for, or plans to --show.")
    return _make(given) if given.show is None else _show(given)


def _changed(given: argparse.Namespace) -> list[str]:
    """The options that are not as they are by default."""
    defaults = vars(PLAN.parser().parse_args([]))
    return [key for key, value in vars(given).items() if value != defaults[key]]


def _flags(names: Sequence[str]) -> str:
    return ", ".join(f"--{name}" for name in names)


def _show(given: argparse.Namespace) -> int:
    if unused := [key for key in _changed(given) if key not in ("show", "html")]:
        raise AdaskipError(
            f"--show shows plans as they are and makes none; leave {_flags(unused)} out."
        )
    # By the names given: shipped plans of two models are called alike.
    plans = {path: SkipPlan.load(path) for path in given.show}
    _tell(plans, given.html)
    return 0


def _tell(plans: dict[str, SkipPlan], page: str | None) -> None:
    """The table of plans, and their page if one is wanted."""
    say(_table(plans))
    if page is not None:
        write_explorer(Path(page), plans)
        say(f"\nTo explore them: {page}")


def _make(given: argparse.Namespace) -> int:
    """Makes what is missing, and tells of all."""
    methods = [*method_names()] if given.method == [ALL] else given.method
    for method in methods:
        if method not in method_names():
            raise unknown_name("method", method, [*method_names(), ALL])
    Dishes(given.replacements, given.windows, given.rank).check()
    _refuse_unused(given, methods)
    for ratio in given.acceleration:
        check_acceleration(ratio)
    texts = _read(given)
    counts = ("context", "batch", "rows", "reference_tokens")
    refuse_below_one({name: getattr(given, name) for name in counts})
    if given.distill < 0:
        raise AdaskipError(f"--distill is {given.distill}; give 0 to leave it out, or more.")
    if given.fit_rows is not None and given.fit_rows < given.rows:
        raise AdaskipError(
            f"--fit_rows is {given.fit_rows}, fewer than the {given.rows} calibration rows, which "
            "are among them; give more, or leave it out."
        )
    folder = Path(given.out)
    wanted = [*dict.fromkeys((m, ratio) for m in methods for ratio in given.acceleration)]
    plans = {plan_path(folder, given, *one): kept_plan(folder, given, *one) for one in wanted}
    failures: dict[str, str] = {}
    if not all(is_ready(plan, given) for plan in plans.values()):
        loaded, rows = _opened(given, texts)
        if given.distill:
            check_distills(loaded.model)
        if given.distill and len(rows) < LEAST_PROMPTS:
            raise AdaskipError(
                f"--distill takes at least {LEAST_PROMPTS} rows or texts, as one is held out to "
                f"judge by; there is {len(rows)}. Give more, or leave it out."
            )
        for (method, ratio), (path, kept) in zip(wanted, [*plans.items()], strict=True):
            if is_ready(kept, given):
                continue
            say(f"{path.stem} ...")
            try:
                if kept is None:
                    plan = _made(loaded, rows, given, method, ratio, path)
                else:
                    kept.check_model(loaded.model)
                    plan = with_measured(loaded.model, kept, progress=True)
                # More than the model computes in would be lost on every use of the file.
                with writing(path):
                    plan.save(path, dtype=loaded.model.dtype)
                training_of(path).unlink(missing_ok=True)
                plans[path] = plan
            except AdaskipError as error:
                # The methods are independent of each other.
                failures[path.stem] = " ".join(str(error).split())
    found = {path: plan for path, plan in plans.items() if plan is not None}
    if found:
        _tell({path.stem: plan for path, plan in found.items()}, given.html)
        loading = as_words({name: getattr(given, name, None) for name in LOADING})
        words = ["--model", given.model, *loading, "--plan", str(next(iter(found)))]
        say(f"\nWritten: {folder}. Talk under one: adaskip chat {shlex.join(words)}")
        say(f"In experiments: --policy PLAN --plan {next(iter(found))}")
    for name, reason in failures.items():
        say(f"{name}: {reason}")
    return 1 if failures else 0


def _refuse_unused(given: argparse.Namespace, methods: Sequence[str]) -> None:
    """Refuses what none of the methods would look at.

    Raises:
        AdaskipError: there is such an option.
    """
    of_search = {"replacements": [*MENU], "windows": [*WINDOWS], "rank": None, "kv_share": None}
    owners = [({SEARCH}, name, default) for name, default in of_search.items()]
    held = {name: may_hold(given, name) for name in method_names()}
    fitted = {name for name, may in held.items() if may["linear"]}
    trained = fitted | {name for name, may in held.items() if may["gain"]}
    owners += [(trained, "distill", 0), (trained if given.distill else fitted, "fit_rows", None)]
    for takers, name, default in [*owners, (_lazy(), "exact", False)]:
        if getattr(given, name) != default and not takers & {*methods}:
            raise AdaskipError(
                f"--{name} is of {' and '.join(sorted(takers))}, none of which is asked for "
                f"(--method {' '.join(methods)}); leave it out."
            )


def _lazy() -> set[str]:
    """Methods that look at everything in every round, if asked to."""
    return {name for name in METHODS if METHODS[name].lazy}


def _read(given: argparse.Namespace) -> dict[str, str]:
    """The texts to calibrate with; if there are none, sets what to take instead.

    Raises:
        AdaskipError: they cannot be read, or what they have no use for is given beside them.
    """
    if given.texts is None:
        given.rows = _ROWS if given.rows is None else given.rows
        given.tasks = given.tasks or [*_TASKS]
        # LongBench has no rows apart from those of its tests.
        split = all(task_spec(task).offline for task in given.tasks)
        given.fits_what_there_is = given.fit_rows is None and split
        if given.fits_what_there_is:
            given.fit_rows = max(_FIT_ROWS, given.rows)
        if not split:
            logger.warning(
                "%s has no split: what is calibrated with are the first rows of its test; leave "
                "those out where the plans are scored, or calibrate with other tasks.",
                " ".join(task for task in given.tasks if not task_spec(task).offline),
            )
        given.source = (
            f"{given.rows} {'warm-up rows of' if split else FIRST_ROWS} {' '.join(given.tasks)}, "
            f"{given.reference_tokens} tokens of each answer, seed {given.seed}"
        )
        return {}
    if unused := [key for key in _changed(given) if key in _OF_TASKS]:
        raise AdaskipError(f"--texts are the rows to calibrate with; leave {_flags(unused)} out.")
    texts = read_texts(given.texts)
    given.rows, given.tasks = len(texts), []
    digest = hashlib.sha256(repr([*texts.values()]).encode()).hexdigest()[:8]
    given.source = f"{len(texts)} texts ({digest}), {given.reference_tokens} tokens as the answer"
    return texts


def _opened(given: argparse.Namespace, texts: Mapping[str, str]) -> tuple[LoadedModel, list[Row]]:
    """The model, and the rows to calibrate with, first those that plans are chosen by."""
    settings: dict[str, Any] = {name: getattr(given, name) for name in _LOADING}
    settings |= {"tasks": tuple(given.tasks), "name": Path(given.model).name, "policy": DENSE}
    settings |= {"sample_tokens": given.context, "max_length": given.context}
    if all(task_spec(task).offline for task in given.tasks):
        # Contexts of that many tokens, around which the prompt stands.
        del settings["max_length"]
    limit = model_spec(given.model).prompt_limit
    if given.context >= limit:
        raise AdaskipError(
            f"--context is {given.context}; the longest prompt of {given.model} is {limit}, which "
            "has to hold a question, too."
        )
    config = resolve(RunConfig(experiment="e2e", model_name=given.model, **settings))
    loaded = LoadedModel.open(config)
    tasks, answers = list(config.tasks), given.reference_tokens
    if texts:
        return loaded, text_rows(loaded.tokenizer, texts, given.context, answers)
    wanted = given.fit_rows or given.rows
    while True:
        try:
            return loaded, calibration_rows(loaded, config, tasks, wanted, answers)
        except DataError:
            # In short contexts few documents fit.
            if not given.fits_what_there_is or wanted == given.rows:
                raise
            wanted = max(given.rows, wanted // 2)


def _made(
    loaded: LoadedModel,
    rows: Sequence[Row],
    given: argparse.Namespace,
    method: str,
    ratio: float,
    path: Path,
) -> SkipPlan:
    """Makes a plan, and keeps the record of what it took."""
    options: dict[str, Any] = {"phase": given.phase, "context": given.context}
    options |= {"batch": given.batch, "measure": given.measure, "progress": True}
    options |= {"source": given.source, "acceleration": ratio}
    chosen_by = rows[: given.rows]
    # One record serves all plans that are made from the same rows.
    options["record"] = path.with_name(record_name(loaded.model, chosen_by))
    if method == SEARCH:
        make = partial(
            search_plan,
            replacements=given.replacements,
            windows=given.windows,
            rank=given.rank,
            kv_share=given.kv_share,
        )
    else:
        exact = given.exact and method in _lazy()
        looks = given.html is not None
        make = partial(make_plan, method=method, exact=exact, losses_on_the_way=looks)
    plan = make(loaded.model, chosen_by, **options)
    told: dict[str, Any] = {"source": f"{len(rows)} rows", "progress": True}
    if plan.has_linears and given.fit_rows is not None:
        plan = refit_linears(loaded.model, plan, reads(rows), **told)
    if given.distill and can_learn(plan):
        told |= {"epochs": given.distill, "record": training_of(path)}
        plan = distill_plan(loaded.model, plan, reads(rows), **told)
    about = {**plan.about, **made_of(given, method)}
    about |= {FIT_ROWS: given.fit_rows} if EPOCHS in about else {}
    return SkipPlan(plan, fingerprint=plan.fingerprint, about=about)


def _table(plans: dict[str, SkipPlan]) -> str:
    header = ["plan", "predicted", "measured", "KV %", "loss", "forwards", "replaces"]
    lines = []
    for name, plan in plans.items():
        about: dict[str, Any] = dict(plan.about)
        measured = number(about.get("measured acceleration"), 3)
        if "measured from" in about:
            measured += f" [{about['measured from']:.3f}, {about['measured to']:.3f}]"
        lines.append(
            [
                name,
                number(about.get("predicted acceleration"), 3),
                measured,
                percent(about.get("predicted kv share")),
                _loss(about),
                number(about.get("forwards"), 0),
                _replaces(plan),
            ]
        )
    return markdown_table(header, lines)


def _loss(about: dict[str, Any]) -> str:
    """The loss of a plan; nobody looked at that of one fitted anew, but at the one before."""
    if LOSS_BEFORE in about:
        return f"{number(about[LOSS_BEFORE], 4)} before fit"
    return number(about.get("loss"), 4)


def _replaces(plan: SkipPlan) -> str:
    """How many of each kind a plan skips or replaces."""
    kinds = [f"{len(plan.layers(kind))} {kind}" for kind in ("attn", "ffn") if plan.layers(kind)]
    return ", ".join([*kinds, *([f"{len(plan.windows)} windows"] if plan.windows else [])])


PLAN = Command(
    "Makes plans by a search or by the field's methods; the policy PLAN applies them.",
    _add_options,
    _act,
    "--model smollm2 --acceleration 1.2 --context 1000 --html plan.html",
)
