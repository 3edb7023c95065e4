"""What was exported and how near it is to the plan in the process: `export.json`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPORT = "export.json"


@dataclass(frozen=True)
class Written:
    """What a writer has written.

    Attributes:
        architecture: as engines name it.
        parameters: numbers in its weights.
        weights: the files that hold them.
        engines: what loads it; a sentence each where there is a condition or a reason why not.
    """

    architecture: str
    parameters: int
    weights: tuple[Path, ...]
    engines: dict[str, str]

    @property
    def bytes(self) -> int:
        """Of the files."""
        return sum(file.stat().st_size for file in self.weights)


@dataclass(frozen=True)
class Check:
    """One engine's outputs beside those of the plan in the process.

    Attributes:
        engine: "transformers" or "llama.cpp", with its version.
        tokens: at which distributions were compared.
        max_logit_difference: the largest difference of a log-probability at any of them.
        kl: mean divergence KL(plan || checkpoint) over them, in nats.
        kl_tolerance: what it may be.
        greedy_equal: of the greedy tokens, how many came before the first one that differs.
        greedy_tokens: that were generated, over all texts.
        worst: where the largest difference is.
        passed: whether it is within the tolerance, and greedy tokens differ nowhere but where the
            two best lie closer than twice the largest difference.
    """

    engine: str
    tokens: int
    max_logit_difference: float
    kl: float
    kl_tolerance: float
    greedy_equal: int
    greedy_tokens: int
    worst: str
    passed: bool


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        folder: where it lies.
        format: "hf" or "gguf".
        architecture: as engines name it.
        dtype: of its matrices.
        source: the model it was made from.
        n_layers: of the checkpoint; `attentions`, `ffns`, `linears`: what they hold.
        parameters: numbers in its weights; `dense_parameters`: in the model's.
        bytes: of its weights on disk.
        kv_bytes_per_token: of its KV cache, in 16 bits; `dense_kv_bytes_per_token`: the model's.
        engines: what loads it; a sentence each where there is a condition or a reason why not.
        checks: how near it is to the plan, engine by engine.
    """

    folder: str
    format: str
    architecture: str
    dtype: str
    source: str
    n_layers: int
    attentions: int
    ffns: int
    linears: int
    parameters: int
    dense_parameters: int
    bytes: int
    kv_bytes_per_token: int
    dense_kv_bytes_per_token: int
    engines: dict[str, str]
    checks: tuple[Check, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)

    def save(self, folder: Path) -> None:
        """Writes `export.json` into the folder of the checkpoint."""
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False)
        (folder / REPORT).write_text(text + "\n", encoding="utf-8")

    def __str__(self) -> str:
        share = self.kv_bytes_per_token / self.dense_kv_bytes_per_token
        lines = [
            f"{self.folder}: {self.architecture} ({self.format}, {self.dtype}), {self.n_layers} "
            f"layers with {self.attentions} attentions and {self.ffns} FFNs, "
            f"{self.parameters:,} of {self.dense_parameters:,} parameters, {self.bytes:,} bytes, "
            f"KV {share:.0%} of the model's."
        ]
        for check in self.checks:
            lines.append(
                f"  {check.engine}: KL {check.kl:.1e} (at most {check.kl_tolerance:.0e}), largest "
                f"difference {check.max_logit_difference:.1e}, greedy tokens "
                f"{check.greedy_equal}/{check.greedy_tokens}"
            )
        lines += [f"  {engine}: {said}" for engine, said in self.engines.items()]
        return "\n".join(lines)
