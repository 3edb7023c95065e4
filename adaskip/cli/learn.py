"""`adaskip learn`: the importance profile of a model, from text files or the offline sample."""

from __future__ import annotations

import argparse
import shlex
import tempfile
from pathlib import Path
from typing import Any

from adaskip.cli.run import LOADING, WARM_UP, add_model, add_run_options, as_words
from adaskip.command import BEGINS_ANEW, Command, say
from adaskip.configuration import cache_root
from adaskip.errors import AdaskipError
from adaskip.importance import Importance
from adaskip.learning import learn_importance
from adaskip.models.loading import load_model, load_tokenizer
from adaskip.runs.calibration import read_texts
from adaskip.runs.files import writing
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.runconfig import DENSE, RunConfig
from adaskip.runs.runner import resolve

_SHOWN = 8
# What texts of the user's own have no use for.
_OF_SAMPLE = ("warmup", "sample_tokens", "seed")


def _options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="where the profile goes")
    parser.add_argument(
        "--texts",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text files, one prompt each (default: warm-up documents of the offline sample)",
    )
    add_run_options(parser, (*_OF_SAMPLE, *LOADING))


def _act(given: argparse.Namespace) -> int:
    options = vars(given)
    out, texts = Path(options.pop("out")), [Path(text) for text in options.pop("texts")]
    if out.exists():
        raise AdaskipError(f"{out} exists; give another --out, or move it away.")
    unused = [f"--{key}" for key in _OF_SAMPLE if options[key] != getattr(RunConfig, key)]
    if texts and unused:
        raise AdaskipError(
            f"--texts are learned from whole, each as one prompt; leave {', '.join(unused)} out."
        )
    _refuse_unwritable(out)
    profile = _of_texts(texts, options) if texts else _of_sample(options)
    with writing(out):
        profile.save(out)
    first = ", ".join(map(str, profile.ranking()[:_SHOWN]))
    say(f"{profile.n_requests} prompts, {profile.n_tokens} tokens. Least important: {first}.")
    loading = as_words({key: options[key] for key in LOADING})
    use = ["adaskip", "chat", "--model", options["model_name"], *loading, "--policy", "ADA"]
    use += ["--skip_sub_layer_num", str(_SHOWN), "--importance", str(out)]
    say(f"Written: {out}; use it: {shlex.join(use)}")
    return 0


def _refuse_unwritable(out: Path) -> None:
    """Refuses a file that cannot be written before the minutes that learning takes."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise AdaskipError(
            f"Cannot write {out} ({error.strerror or error}); give another --out."
        ) from error


def _of_texts(files: list[Path], options: dict[str, Any]) -> Importance:
    """Learned from files, all of them read before the model is loaded.

    Raises:
        DataError: a file cannot be read as text, or is named twice.
    """
    texts = [*read_texts(files).values()]
    name = options["model_path"] or options["model_name"]
    how = {key: options[key] for key in ("dtype", "device", "device_map", "allow_pickle")}
    source = f"{len(files)} texts: {', '.join(file.name for file in files)}"
    return learn_importance(
        load_model(name, **how),
        texts,
        tokenizer=load_tokenizer(name),
        source=source,
        progress=True,
    )


def _of_sample(options: dict[str, Any]) -> Importance:
    """Learned from the offline sample's warm-up rows, or found where it was learned before."""
    rest = {"policy": DENSE, "tasks": (WARM_UP,), "warmup_task": WARM_UP}
    kept = {"experiment": "e2e", "results_dir": str(cache_root())}
    config = resolve(RunConfig.from_dict({**rest, **kept, **options}))
    return LoadedModel.open(config).importance(config)


LEARN = Command(
    "Learns how important each sublayer of a model is, from prefills of warm-up prompts.",
    _options,
    _act,
    "--model smollm2 --out smollm2-importance.json",
    BEGINS_ANEW,
)
