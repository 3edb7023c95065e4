"""A run's budget as an acceleration: `--acceleration 1.15` in place of a number of sublayers."""

from __future__ import annotations

import dataclasses
import logging

from adaskip.budget import sublayers_for
from adaskip.errors import AdaskipError
from adaskip.models.processes import team
from adaskip.plan import Phase
from adaskip.policies.factory import takers, takes
from adaskip.profiling.calibration import measured_times
from adaskip.profiling.timing import growing_cache
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.runner import resolve
from adaskip.tasks.spec import task_spec

logger = logging.getLogger(__name__)


def accelerated(config: RunConfig, acceleration: float) -> tuple[RunConfig, LoadedModel]:
    """The configuration whose number of sublayers reaches an acceleration, and its loaded model.

    Sublayers are taken by similarity until the predicted ratio of dense to skipped time reaches
    `acceleration`, so the run is the one with that number of sublayers, and is kept as such. Times
    are those of prefill in the prefill experiment, else of a decode step, at the longest context
    the run may have.

    Raises:
        AdaskipError: another policy or budget was asked for, or the ratio cannot be reached.

    Source: METHOD, "Budget by acceleration ratio".
    """
    if not takes(config.policy, "acceleration") or config.skip_sub_layer_num is not None:
        raise AdaskipError(
            f"--acceleration {acceleration} is a budget of {', '.join(takers('acceleration'))}, in "
            "place of --skip_sub_layer_num; give one of them."
        )
    if team().world > 1:
        raise AdaskipError(
            "--acceleration measures times, which differ between processes: run it once in one "
            "process, and give the others the number of sublayers it found."
        )
    config = dataclasses.replace(config, skip_sub_layer_num=0)
    resolved = resolve(config)
    loaded = LoadedModel.open(resolved)
    offline = all(task_spec(task).offline for task in resolved.tasks)
    limit = config.max_length or loaded.spec.prompt_limit
    context = min(limit, config.sample_tokens) if offline else limit
    phase = Phase.PREFILL if config.experiment == "prefill" else Phase.DECODE
    times = measured_times(
        loaded.model, phase, context, batch=config.batch_size, make_cache=growing_cache
    )
    chosen = sublayers_for(loaded.importance(resolved), times, acceleration, "rank")
    logger.warning(
        "An acceleration of %s in %s at %d tokens takes %d sublayers: %.3f predicted",
        *(acceleration, phase, context, len(chosen), times.speedup(chosen)),
    )
    return dataclasses.replace(config, skip_sub_layer_num=len(chosen)), loaded
