"""The command line of the export: from a plan file, or a policy and its budget, to a folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from adaskip.command import BEGINS_ANEW, Command, say
from adaskip.errors import AdaskipError, PlanError
from adaskip.export import refusing
from adaskip.export.exporting import export_checkpoint
from adaskip.importance import GAINS, Importance, shipped_profiles
from adaskip.models.loading import load_model, load_tokenizer
from adaskip.models.processes import refuse_several
from adaskip.models.spec import model_source
from adaskip.plan import SCOPES, SkipPlan
from adaskip.policies import POLICIES
from adaskip.policies.factory import BUDGETS, build_policy, takes
from adaskip.policy import policy_class


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to write to, new or empty")
    parser.add_argument("--model", required=True, help="short name, folder or hub id")
    parser.add_argument(
        "--plan",
        metavar="FILE",
        help="a plan's file, or a shipped one's name",
    )
    parser.add_argument("--policy", metavar="NAME", help=f"or a policy: {', '.join(POLICIES)}")
    for unit, flag in BUDGETS.items():
        users = ", ".join(name for name, policy in POLICIES.items() if policy.budget == unit)
        parser.add_argument(
            f"--{flag}", type=int, metavar="N", help=f"budget in {unit}, of {users}"
        )
    parser.add_argument(
        "--importance",
        metavar="FILE",
        help="profile of a policy that learns (default: a shipped one)",
    )
    parser.add_argument("--gain", choices=(*GAINS, "none"), help="compensation, of AdaSkip")
    parser.add_argument("--scope", default="e2e", choices=SCOPES, help="where the policy applies")
    parser.add_argument(
        "--format", default="hf", help=f"{' or '.join(refusing.FORMATS)} (default: hf)"
    )
    listed = "; ".join(f"{name}: {', '.join(d)}" for name, d in refusing.DTYPES.items())
    parser.add_argument("--dtype", help=f"of the weights (default: as loaded; {listed})")
    parser.add_argument(
        "--tokenizer", metavar="FILE.gguf", help="for gguf: copy the tokenizer of this file"
    )
    parser.add_argument("--device", help="to load the model on (default: CUDA if there is one)")
    parser.add_argument(
        "--allow_pickle",
        action="store_true",
        help="also read weights from .bin files: pickles, of which torch reads tensors only",
    )


def _act(given: argparse.Namespace) -> int:
    """Exports what the options ask for.

    Raises:
        AdaskipError: they do not fit each other, or the export is refused or fails.
    """
    refuse_several(
        "adaskip export writes one folder",
        "start it in one process, without torchrun or accelerate",
    )
    refusing.check_folder(Path(given.out))
    refusing.given_dtype(given.dtype, given.format)
    refusing.check_tokenizer(given.format, given.tokenizer)
    model_source(given.model)  # refuses a name that is none before anything is read
    plan = _plan(given)
    # What a dtype is asked for is rounded to it once, when it is written.
    loaded_in = None if given.dtype is None else "float32"
    model = load_model(
        given.model, device=given.device, dtype=loaded_in, allow_pickle=given.allow_pickle
    )
    if not isinstance(plan, SkipPlan):
        plan.check_model(model)
        refusing.plan_of(plan, model.config.num_hidden_layers, given.scope)
    report = export_checkpoint(
        model,
        load_tokenizer(given.model),
        plan,
        given.out,
        format=given.format,
        dtype=given.dtype,
        tokenizer_gguf=given.tokenizer,
    )
    say(str(report))
    return 0


def _plan(given: argparse.Namespace) -> Any:
    """The plan file, or the policy with its budget; the model is not needed yet.

    Raises:
        AdaskipError: there are both or neither, or a setting is missing or of no use.
    """
    budgets = {flag: getattr(given, flag) for flag in BUDGETS.values()}
    settings = {"importance": given.importance, "gain": given.gain} | budgets
    if (given.plan is None) == (given.policy is None):
        raise AdaskipError("Give either a --plan or a --policy with its budget.")
    if given.plan is not None:
        unused = [name for name, value in settings.items() if value is not None]
        if unused or given.scope != "e2e":
            raise AdaskipError(
                f"--{[*unused, 'scope'][0]} is of no use beside --plan; leave it out."
            )
        return SkipPlan.load(given.plan)
    flag = BUDGETS[policy_class(given.policy).budget]
    unused = [
        name
        for name, value in settings.items()
        if value is not None and name != flag and not takes(given.policy, name)
    ]
    if unused:
        raise AdaskipError(f"--{unused[0]} is of no use to policy {given.policy}; leave it out.")
    if settings[flag] is None:
        raise AdaskipError(f"Policy {given.policy} needs its budget: --{flag} N.")
    offered: dict[str, Any] = {"online": False}
    if given.gain is not None:
        offered["gain"] = None if given.gain == "none" else given.gain

    def importance() -> Importance:
        shipped = given.model if given.model in shipped_profiles() else None
        name = given.importance or shipped
        if name is None:
            raise PlanError(
                f"Policy {given.policy} needs what it has learned: --importance FILE, a profile "
                "that `adaskip learn` or Importance.save has written."
            )
        return Importance.load(name)

    return build_policy(given.policy, int(settings[flag]), offered, importance)


EXPORT = Command(
    summary="Writes a model under a plan as a checkpoint in which what is skipped is absent.",
    options=_options,
    action=_act,
    example="--model smollm2 --policy ADA --skip_sub_layer_num 16 --format gguf exported",
    kept=BEGINS_ANEW,
)
