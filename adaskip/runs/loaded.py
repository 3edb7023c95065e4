"""A loaded model with what its runs share: tokenizer, rows, importance. Loaded once, used often."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaskip.errors import DataError
from adaskip.fingerprint import model_fingerprint
from adaskip.importance import Importance
from adaskip.learning import learn_importance
from adaskip.models.internlm import check_prompt_length
from adaskip.models.loading import ModelSpec, load_model, load_tokenizer, model_spec
from adaskip.models.processes import team
from adaskip.policies import SkipPolicy, policy_class
from adaskip.policies.factory import build_policy
from adaskip.policies.made_plan import MadePlan, PlanFile
from adaskip.positions import positions
from adaskip.runs.data import from_files, source_of_warm_up, tokens_of_warm_up, told_as_warm_up
from adaskip.runs.files import writing
from adaskip.runs.generation import StopRule, generate_greedy
from adaskip.runs.ledger import answer_length, rewritten, stamp
from adaskip.runs.runconfig import DENSE, HORIZON, RunConfig
from adaskip.runs.store import Store
from adaskip.search.journal import short_hash
from adaskip.tasks.documents import Split
from adaskip.tasks.prompts import Prompt, build_prompt, stop_token_ids
from adaskip.tasks.retrieval import retrieval_rows
from adaskip.tasks.sample import sample_rows
from adaskip.tasks.spec import Row, task_spec

logger = logging.getLogger(__name__)
# Tokens by which a cut prompt may grow when its text is tokenized again.
_RETOKENIZED = 16
# How a learned profile tells of its rows.
_LEARNED_FROM = re.compile(r"(\d+) rows of (\w+)")
# How a plan tells that it was calibrated with rows that are also its tasks' tests.
FIRST_ROWS = "first rows of"


@dataclass
class LoadedModel:
    """What stays loaded between runs of one model.

    `source` is what was loaded; `fits` says whether it serves another configuration.
    """

    spec: ModelSpec
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: tuple[str | None, ...]
    _rows: dict[str, list[Row]] = field(default_factory=dict)
    _profiles: dict[RunConfig, Importance] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)
    _warm: bool = False

    @classmethod
    def open(cls, config: RunConfig) -> LoadedModel:
        """Loads the model a resolved configuration names.

        Raises:
            AdaskipError: it cannot be loaded, or its architecture is not supported.
        """
        name = config.model_path or config.model_name
        # A path or hub id replaces the weights only.
        spec = model_spec(config.model_name)
        names = ("dtype", "device", "device_map", "tp_plan", "allow_pickle")
        model = load_model(name, **{option: getattr(config, option) for option in names})
        return cls(spec, model, load_tokenizer(name), _source(config))

    def fits(self, config: RunConfig) -> bool:
        """Whether this model is the one a resolved configuration names."""
        return self.source == _source(config)

    @property
    def n_layers(self) -> int:
        """Decoder layers of the model."""
        return int(self.model.config.num_hidden_layers)

    def rows(self, config: RunConfig, task: str) -> list[Row]:
        """The rows of a run, in their order, ids made unique.

        Raises:
            DataError: the data is missing or damaged, or no row is left.
        """
        return self._load(config, task, warmup=False, limit=config.limit)

    def warmup_rows(self, config: RunConfig, task: str, n: int) -> list[Row]:
        """Rows to learn from, apart from those of runs where the task has splits.

        Raises:
            DataError: as `rows`.
        """
        return self._load(config, task, warmup=True, limit=n)

    def prompt(self, config: RunConfig, row: Row) -> Prompt:
        """The prompt of a row, cut to the run's limit and wrapped in the model's template."""
        return build_prompt(
            row,
            task_spec(row.task),
            self.tokenizer,
            max_length=config.max_length or self.spec.prompt_limit,
            template=self.spec.template,
        )

    def check_lengths(self, config: RunConfig, task: str, rows: Sequence[Row]) -> None:
        """Warns once of rows whose prompt and answer the model has no positions for.

        Prompts are made for it only where the run's limit does not say that all of them fit.

        Raises:
            UnsupportedCallError: beyond them the model is another one (InternLM v1).
        """
        room, answer = positions(self.model.config), answer_length(config, task)
        limit = config.max_length or self.spec.prompt_limit
        around = len(self.tokenizer(self.spec.wrap("")).input_ids) + _RETOKENIZED
        told = f"{task} of {len(rows)} rows, {limit} and {answer} tokens"
        if room is None or limit + around + answer <= room or told in self._warned:
            return
        self._warned.add(told)
        lengths = [self.prompt(config, row).tokens_after for row in rows]
        check_prompt_length(self.model, max(lengths), answer)
        # The last token of an answer is never an input.
        beyond = sum(length + answer - 1 > room for length in lengths)
        if beyond:
            logger.warning(
                "%d of %d prompts of %s with answers of %d tokens are longer than the model's %d "
                "positions, beyond which it was never trained; give a lower --max_length.",
                *(beyond, len(lengths), task, answer, room),
            )

    def importance(self, config: RunConfig) -> Importance:
        """The profile named by the configuration, or the one learned from its warm-up prompts.

        A learned profile is kept in `<results_dir>/importance/` and used again.

        Raises:
            ProfileError: the profile is damaged or belongs to another model.
            DataError: too few warm-up rows.
        """
        if config not in self._profiles:
            given = config.importance
            self._profiles[config] = self._read(Path(given)) if given else self._learned(config)
        profile = self._profiles[config]
        self._warn_of_overlap(config, profile.source)
        return profile

    def policy(self, config: RunConfig, task: str) -> SkipPolicy | None:
        """The policy of a resolved configuration for one task, tried on this model; None for dense.

        Raises:
            AdaskipError: the budget does not fit the model, or the profile is of another one.
        """
        if config.policy == DENSE:
            return None
        # Before anything is learned for it.
        policy_class(config.policy).check_budget(config.budget, self.n_layers)
        offered = config.offered() | {HORIZON: answer_length(config, task)}
        policy = build_policy(
            config.policy, config.budget, offered, lambda: self.importance(config)
        )
        policy.bind(self.n_layers)
        if isinstance(policy, MadePlan):
            self._warn_of_calibration(policy.plan_file, task)
        return policy

    def end_tokens(self) -> frozenset[int]:
        """The tokens by which the model ends an answer."""
        ends = self.model.generation_config.eos_token_id if self.model.generation_config else None
        listed = [*ends] if isinstance(ends, list) else [ends, self.tokenizer.eos_token_id]
        if self.spec.answer_end:
            # The prediction is cut there anyway; what would follow need not be computed.
            end = self.tokenizer.convert_tokens_to_ids(self.spec.answer_end)
            listed.append(None if end == self.tokenizer.unk_token_id else end)
        return frozenset(int(token) for token in listed if token is not None)

    def stop_rule(self, config: RunConfig, task: str) -> StopRule:
        """When an answer of this task ends: the model's end tokens, and the task's own."""
        spec = task_spec(task)
        return StopRule(
            self.end_tokens().union(stop_token_ids(spec, self.tokenizer)),
            answer_length(config, task),
            spec.min_new_tokens,
        )

    @property
    def pad_id(self) -> int:
        """A token to fill a batch with; it is masked out, so any will do."""
        token = self.tokenizer.pad_token_id
        return int(token) if isinstance(token, int) else 0

    def warm_up(self) -> None:
        """Generates a few tokens once, so that no row's times hold the first call's costs."""
        if not self._warm:
            generate_greedy(self.model, [[self.pad_id] * 32], StopRule(frozenset(), 4))
            self._warm = True

    def _read(self, path: Path) -> Importance:
        profile = Importance.load(path)
        profile.check_model(self.model)
        return profile

    def _learned(self, config: RunConfig) -> Importance:
        """The profile of the warm-up prompts, kept from before or learned now."""
        task = source_of_warm_up(config)
        rows = told_as_warm_up(config, lambda: self.warmup_rows(config, task, config.warmup))
        if len(rows) < config.warmup:
            raise DataError(
                f"{task} has {len(rows)} warm-up rows, {config.warmup} were asked for: use a lower "
                "--warmup, or a profile (--importance FILE)."
            )
        prompts = [self.prompt(config, row).input_ids for row in rows]
        path = self._profile_path(config, prompts)
        if path.exists():
            return self._read(path)
        logger.info("Learning importance from %d %s prompts; kept in %s", config.warmup, task, path)
        ids, source = [torch.tensor([prompt]) for prompt in prompts], f"{len(rows)} rows of {task}"
        profile = learn_importance(self.model, ids, source=source, progress=True)
        with writing(path):
            profile.save(path)
        return profile

    def _warn_of_overlap(self, config: RunConfig, source: str) -> None:
        """Warns where rows that are learned from are scored, whenever that was learned."""
        learned = _LEARNED_FROM.match(source)
        if learned is None:
            return
        n_rows, task = learned.groups()
        if task in config.tasks and not task_spec(task).offline and task not in self._warned:
            self._warned.add(task)
            logger.warning(
                "%s has no split: the first %s rows that are learned from are scored, too; another "
                "--warmup_task, or a profile of other rows (--importance), keeps them apart.",
                *(task, n_rows),
            )

    def _warn_of_calibration(self, file: PlanFile, task: str) -> None:
        """Warns where rows that a plan was made from are scored under it."""
        source, told = file.plan.about.get("calibration"), f"{file.name} {task}"
        if task in calibrated_on_tests(source) and told not in self._warned:
            self._warned.add(told)
            logger.warning(
                "The plan %s was calibrated with the %s: what %s scores on those tells too much "
                "of it.",
                *(file.name, source, task),
            )

    def _profile_path(self, config: RunConfig, prompts: Sequence[Sequence[int]]) -> Path:
        """Where the profile is that these prompts, ids each, give of this model."""
        recipe = [self.source, model_fingerprint(self.model), prompts]
        digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]
        task = source_of_warm_up(config)
        size = f"-{tokens_of_warm_up(config)}tokens" if task_spec(task).offline else ""
        name = f"{Path(config.model_name).name}-{task}-{config.warmup}rows{size}-{digest}.json"
        return Path(config.results_dir) / "importance" / name

    def _load(self, config: RunConfig, task: str, *, warmup: bool, limit: int | None) -> list[Row]:
        offline = task_spec(task).offline
        tokens = tokens_of_warm_up(config) if warmup else config.sample_tokens
        # What is learned does not depend on where a run's needle is.
        depth = None if warmup else config.needle_depth
        key = json.dumps(
            [task, warmup, limit, tokens, depth, config.seed]
            if offline
            else [task, limit, config.data_dir, config.min_length, config.longbench_e]
        )
        if key not in self._rows:
            n = task_spec(task).wanted(limit)
            if offline and n is not None:
                rows = self._made(config, task, warmup, n, tokens, depth)
            else:
                rows = from_files(config, task, n)
            if not rows:
                raise DataError(f"{task} has no row longer than --min_length {config.min_length}.")
            self._rows[key] = rows
        return self._rows[key]

    def _made(
        self, config: RunConfig, task: str, warmup: bool, n: int, tokens: int, depth: int | None
    ) -> list[Row]:
        """Rows of a task that is made offline."""
        split: Split = "warmup" if warmup else "test"
        common: dict[str, Any] = {"split": split, "n": n, "tokens": tokens, "seed": config.seed}
        if task_spec(task).kind == "sample":
            return sample_rows(task, self.tokenizer, **common)
        takes_depth = task_spec(task).takes_depth
        rows = retrieval_rows(task, self.tokenizer, depth=depth if takes_depth else None, **common)
        for prompt in (self.prompt(config, row) for row in rows):
            if prompt.truncated:
                limit = config.max_length or self.spec.prompt_limit
                raise DataError(
                    f"A prompt of {task} has {prompt.tokens_before} tokens, more than the limit of"
                    f" {limit}: cutting out its middle could cut out what is asked for. Choose"
                    " fewer --sample_tokens, or a larger --max_length if the model has the"
                    " positions."
                )
        return rows


def _source(config: RunConfig) -> tuple[str | None, ...]:
    split = [part for part in (config.device_map, config.tp_plan) if part]
    return (config.model_name, config.model_path, config.dtype, config.device, *split)


def unchanged(store: Store[Any], config: RunConfig) -> bool:
    """Whether a store's rows are sure to be of the weights as they are now; for the main process.

    If not, only the loaded model tells (`hold`).
    """
    return not rewritten(config, str(store.record().get("weights", "")))


def hold(store: Store[Any], config: RunConfig, loaded: LoadedModel, rows: Sequence[Row]) -> None:
    """Refuses to add to what was made with other weights, rows or prompts; all together.

    Raises:
        RunError: there is such; or as `Store.hold`.
    """
    model = model_fingerprint(loaded.model)
    sources = {
        f"{row.task} {row.id}": hashlib.sha256(
            json.dumps([row.input, row.context, row.answers]).encode()
        ).hexdigest()[:12]
        for row in rows
    }

    prompts = {
        f"{row.task} {row.id}": short_hash(loaded.prompt(config, row).input_ids) for row in rows
    }

    def check() -> None:
        store.hold(model, sources, prompts)
        store.note(weights=stamp(config))

    team().on_main(check)


def calibrated_on_tests(source: object) -> frozenset[str]:
    """The tasks whose test rows a plan was made from, by what it says of its calibration."""
    _, found, names = str(source).partition(f" {FIRST_ROWS} ")
    return frozenset(names.partition(",")[0].split()) if found else frozenset()
