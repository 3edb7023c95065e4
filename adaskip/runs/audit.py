"""Notes which sublayers really ran, apart from the code that skips them: compared with the plan.

Users of such tools report "compression was active on the first sample only" (TRAPS 17); here every
forward of every run is checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from adaskip.blocks import block_spec
from adaskip.errors import RunError
from adaskip.plan import KINDS, Phase, SkipPlan, Step, Sublayer, all_sublayers
from adaskip.replacements import Window
from adaskip.runs.rows import PhaseSkips, Skips
from adaskip.supported import absent_sublayers


class Audited(Protocol):
    """What the audit reads of a session: the latest forward's step and plan."""

    @property
    def step(self) -> Step | None: ...  # noqa: D102

    @property
    def plan(self) -> SkipPlan: ...  # noqa: D102


@dataclass
class PhaseCount:
    """What the forwards of one phase left out.

    Attributes:
        forwards: how many there were.
        skipped: sublayers left out, summed over the forwards, by kind.
        latest: those of the latest forward.
        windows: attentions that saw a window, likewise.
    """

    forwards: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    latest: tuple[Sublayer, ...] = ()
    windows: int = 0

    def kept(self) -> PhaseSkips:
        """As a row keeps it."""
        names = [str(sublayer) for sublayer in self.latest]
        attn, ffn = (self.skipped[kind] for kind in KINDS)
        windows = {"windows": self.windows} if self.windows else {}
        return PhaseSkips(forwards=self.forwards, attn=attn, ffn=ffn, sublayers=names, **windows)


class Audit:
    """Watches a model's attention and MLP modules through plain forward hooks while entered.

    Enter it inside `skipping(...)`, so that its look at the plan comes after each forward.

    Args:
        model: the model that generates.
        session: the session whose plan must come true; None where nothing may be skipped.
    """

    def __init__(self, model: nn.Module, session: Audited | None) -> None:
        base: Any = model.base_model
        self._base = base
        self._session = session
        self._ran: set[Sublayer] = set()
        self._windowed: set[Sublayer] = set()
        self._spec = block_spec(base.config.model_type)
        # What an exported model was made without can neither run nor be left out.
        absent = absent_sublayers(base.layers, self._spec)
        self._all = [s for s in all_sublayers(len(base.layers)) if s not in absent]
        self._handles: list[RemovableHandle] = []
        self._phases: dict[Phase, PhaseCount] = {}
        self._forwards = 0

    def __enter__(self) -> Audit:
        for sublayer in self._all:
            names = getattr(self._spec, sublayer.kind)
            body = getattr(self._base.layers[sublayer.layer], names.body)
            hook = self._note(sublayer)
            self._handles.append(body.register_forward_hook(hook, with_kwargs=True))
        self._handles.append(self._base.register_forward_hook(self._check))
        self.start_request()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start_request(self) -> None:
        """Forgets what was counted; the next forward is a prefill."""
        self._phases = {phase: PhaseCount() for phase in Phase}
        self._forwards = 0

    def counts(self, online_extension: Sequence[str] = ()) -> Skips:
        """What the request so far left out, and what its policy added to the plan meanwhile."""
        return Skips(
            prefill=self._phases[Phase.PREFILL].kept(),
            decode=self._phases[Phase.DECODE].kept(),
            online_extension=list(online_extension),
        )

    def _note(self, sublayer: Sublayer) -> Any:
        ran, windowed = self._ran, self._windowed

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            ran.add(sublayer)
            if kwargs.get("window_step") is not None:
                windowed.add(sublayer)

        return hook

    def _check(self, *_: Any) -> None:
        left_out = tuple(sublayer for sublayer in self._all if sublayer not in self._ran)
        windowed = tuple(sorted(self._windowed))
        self._ran.clear()
        self._windowed.clear()
        # Phase by our own count: generation prefills in one forward.
        phase = Phase.DECODE if self._forwards else Phase.PREFILL
        self._forwards += 1
        count = self._phases[phase]
        count.forwards += 1
        count.skipped.update(sublayer.kind for sublayer in left_out)
        count.latest = left_out
        count.windows += len(windowed)
        self._compare(phase, left_out, windowed)

    def _compare(
        self, phase: Phase, left_out: tuple[Sublayer, ...], windowed: tuple[Sublayer, ...]
    ) -> None:
        step = self._session.step if self._session else None
        plan = self._session.plan if self._session else SkipPlan()
        windows = tuple(s for s, r in plan.items() if isinstance(r, Window))
        planned = tuple(s for s in plan if s in self._all and s not in windows)
        if step is not None and step.phase != phase:
            raise RunError(
                f"The {phase} forward was taken for {step.phase}; this is a bug, report it."
            )
        if planned != left_out:
            missed = _names(set(planned) - set(left_out))
            extra = _names(set(left_out) - set(planned))
            raise RunError(
                f"What ran is not the plan ({phase}): planned to be skipped but run: {missed}; "
                f"skipped without a plan: {extra}. The row is not kept; this is a bug, report it."
            )
        if windows != windowed:
            raise RunError(
                f"What ran is not the plan ({phase}): planned windows: {_names(set(windows))}; "
                f"seen: {_names(set(windowed))}. The row is not kept; this is a bug, report it."
            )


def _names(sublayers: set[Sublayer]) -> str:
    return ", ".join(str(sublayer) for sublayer in sorted(sublayers)) or "none"
