"""What a session did, in numbers: counted forward by forward, without asking the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from adaskip.plan import EMPTY_PLAN, KINDS, Kind, Phase, SkipPlan, Step
from adaskip.replacements import Replacement, Window


@dataclass(frozen=True)
class PhaseSummary:
    """The forwards of one phase.

    Attributes:
        forwards: how many.
        tokens: new tokens in them, over all sequences, padding included.
        skipped: sublayers that were not computed, on average per forward, by kind.
        replaced: what took sublayers' place, on average per forward: "identity", "gain", "linear",
            and "window", which is computed.
        latest: the plan of the latest one.
    """

    forwards: int
    tokens: int
    skipped: Mapping[Kind, float]
    replaced: Mapping[str, float]
    latest: SkipPlan


@dataclass(frozen=True)
class Summary:
    """What a session did so far; as a text, a line per phase and one on memory.

    Forwards that `generate_batch()` replays as CUDA graphs are not counted: nobody sees them
    (`ContinuousBatchingConfig(use_cuda_graph=False)`).

    Attributes:
        n_layers: decoder layers of the model.
        phases: by phase; only those of which there was a forward.
        requests: KV caches, or forwards without one, that were begun.
        kv_tokens: tokens of the largest request, over all its sequences.
        kv_bytes: keys and values held of them.
        dense_kv_bytes: what the dense model holds of them. Both are what the tokens take in the
            model's precision; room that a static cache keeps free, or a quantized cache saves, is
            not in them.
    """

    n_layers: int
    phases: Mapping[Phase, PhaseSummary]
    requests: int
    kv_tokens: int
    kv_bytes: int
    dense_kv_bytes: int

    def __str__(self) -> str:
        lines = [self._line(phase, each) for phase, each in self.phases.items()]
        if self.kv_tokens:
            lines.append(
                f"KV of the largest of {_counted(self.requests, 'request')}: "
                f"{self.kv_bytes / 1e6:.2f} of {self.dense_kv_bytes / 1e6:.2f} MB, "
                f"{_counted(self.kv_tokens, 'token')}"
            )
        return "\n".join(lines) or "no forward yet"

    def _line(self, phase: Phase, each: PhaseSummary) -> str:
        counts = ", ".join(f"{kind} {each.skipped[kind]:.3g}" for kind in KINDS)
        placed = ", ".join(f"{name} {n:.3g}" for name, n in each.replaced.items())
        return (
            f"{phase}: {_counted(each.forwards, 'forward')}, {_counted(each.tokens, 'token')}; "
            f"not computed: {sum(each.skipped.values()):.3g} of {2 * self.n_layers} sublayers "
            f"({counts}){placed and '; in their place: '}{placed}"
        )


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


@dataclass
class _PhaseCount:
    """Sums over the forwards of a phase."""

    forwards: int = 0
    tokens: int = 0
    skipped: Counter[Kind] = field(default_factory=Counter)
    replaced: Counter[str] = field(default_factory=Counter)
    latest: SkipPlan = EMPTY_PLAN


# Layers whose attention is not computed, and the window of each that has one.
_Attention = tuple[frozenset[int], tuple[tuple[int, Window], ...]]


@dataclass
class RequestCount:
    """Tokens per sequence that one request's cache has seen, by what attention did with them."""

    rows: int = 1
    tokens: int = 0
    by_attention: dict[_Attention, int] = field(default_factory=dict)

    def copied(self) -> RequestCount:
        """One that counts on for itself."""
        return RequestCount(self.rows, self.tokens, dict(self.by_attention))


class Tally:
    """Counts the forwards of a session.

    Args:
        config: of the decoder.
        n_layers: its layers.
        itemsize: bytes of a number of its keys and values.
        attending: layers that have an attention: of exported models not all.
    """

    def __init__(
        self, config: PretrainedConfig, n_layers: int, itemsize: int, attending: Sequence[int]
    ) -> None:
        self._config: Any = config
        self._n_layers, self._itemsize, self._attending = n_layers, itemsize, attending
        self._phases: dict[Phase, _PhaseCount] = {}
        self._requests: dict[int, RequestCount] = {}
        self._largest = RequestCount(rows=0)
        self._n_requests = 0
        self._plan: SkipPlan | None = None
        self._skipped: Counter[Kind] = Counter()
        self._replaced: Counter[str] = Counter()
        self._attention: _Attention = (frozenset(), ())

    def note(self, step: Step, plan: SkipPlan, rows: int, past: int, *, cached: bool) -> None:
        """Counts one forward.

        Args:
            step: which it was.
            plan: what it skipped.
            rows: its sequences.
            past: tokens its cache held before it.
            cached: whether there is a cache.
        """
        if plan is not self._plan:
            self._look_at(plan)
        phase = self._phases.setdefault(step.phase, _PhaseCount())
        phase.forwards += 1
        phase.tokens += rows * step.tokens
        phase.skipped += self._skipped
        phase.replaced += self._replaced
        phase.latest = plan
        self._n_requests = max(self._n_requests, step.request + 1)
        if cached:
            self._note_cache(step, rows, past)

    def _look_at(self, plan: SkipPlan) -> None:
        self._plan = plan
        self._skipped = Counter({kind: len(plan.layers(kind)) for kind in KINDS})
        self._replaced = Counter(map(_name, plan.values()))
        self._attention = frozenset(plan.layers("attn")), tuple(plan.windows.items())

    def _note_cache(self, step: Step, rows: int, past: int) -> None:
        count = self._requests.setdefault(step.request, RequestCount())
        seen = count.by_attention
        if not seen and past:
            # A cache that was used outside: what is in it is not known here.
            seen[self._attention] = past
        elif past < count.tokens and seen:
            # Cut back, the latest tokens first.
            cut = count.tokens - past
            for attention in reversed([*seen]):
                taken = min(seen[attention], cut)
                seen[attention], cut = seen[attention] - taken, cut - taken
        count.rows, count.tokens = rows, past + step.tokens
        seen[self._attention] = seen.pop(self._attention, 0) + step.tokens
        if rows * count.tokens >= self._largest.rows * self._largest.tokens:
            self._largest = count

    def memory(self, request: int) -> RequestCount | None:
        """What was counted of a request until now."""
        count = self._requests.get(request)
        return None if count is None else count.copied()

    def resume(self, request: int, memory: RequestCount | None) -> None:
        """A copied or stored cache was met: `request` goes on from such a memory."""
        if memory is not None:
            self._requests[request] = memory.copied()

    def forget(self, request: int) -> None:
        """The cache of `request` is gone."""
        self._requests.pop(request, None)

    def summary(self) -> Summary:
        """What was counted so far."""
        largest = self._largest
        per_token = largest.rows * self._itemsize * numbers_per_token(self._config)
        held = sum(self._held(largest, layer) for layer in self._attending)
        dense = sum(kept_tokens(self._config, layer, largest.tokens) for layer in self._attending)
        return Summary(
            self._n_layers,
            {phase: _averaged(self._phases[phase]) for phase in Phase if phase in self._phases},
            self._n_requests,
            largest.rows * largest.tokens,
            round(held * per_token),
            dense * per_token,
        )

    def _held(self, count: RequestCount, layer: int) -> float:
        """Tokens per sequence whose keys and values a layer holds, mean of its heads."""
        computed = sum(n for (skipped, _), n in count.by_attention.items() if layer not in skipped)
        _, windows = next(reversed(count.by_attention), (frozenset(), ()))
        window = dict(windows).get(layer)
        own = kept_tokens(self._config, layer, computed)
        return own if window is None else window.held(computed)


def key_value_heads(config: PretrainedConfig) -> int:
    """Of each attention of a text model."""
    n_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return n_heads


def numbers_per_token(config: PretrainedConfig) -> int:
    """Keys and values of one token in one layer of a text model."""
    heads: int = config.num_attention_heads
    width: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * key_value_heads(config) * width


def kept_tokens(config: PretrainedConfig, layer: int, tokens: int, *, static: bool = False) -> int:
    """What a layer's own sliding window, if it has one, leaves of the keys and values of tokens.

    Args:
        config: of the text model.
        layer: its number.
        tokens: that the layer has computed.
        static: whether the cache has room for the whole window from the first token.
    """
    window: int | None = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or (types is not None and types[layer] != "sliding_attention"):
        return tokens
    # A cache that grows keeps what the next token will see besides itself.
    return min(tokens, window if static else window - 1)


def _name(replacement: Replacement) -> str:
    if replacement is None:
        return "identity"
    if isinstance(replacement, float):
        return "gain"
    return type(replacement).__name__.lower()


def _averaged(count: _PhaseCount) -> PhaseSummary:
    return PhaseSummary(
        count.forwards,
        count.tokens,
        {kind: count.skipped[kind] / count.forwards for kind in KINDS},
        {name: n / count.forwards for name, n in sorted(count.replaced.items())},
        count.latest,
    )
