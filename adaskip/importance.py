"""Offline importance of a model's sublayers, kept as a JSON profile."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaskip.errors import ProfileError
from adaskip.plan import Sublayer, all_sublayers

Gain = Literal["norm", "token"]
GAINS: tuple[Gain, ...] = get_args(Gain)

PROFILE_VERSION = 1


@dataclass(frozen=True)
class Importance:
    """What the warm-up requests told about each sublayer of one model.

    Attributes:
        similarity: IO similarity, mean over requests of the mean over tokens. High means
            unimportant.
        gain_norm: output norm / input norm over a whole request, mean over requests.
        gain_token: median over tokens of the per-token ratio, mean over requests.
        fingerprint: tells the model apart; see `model_fingerprint`.
        n_requests: warm-up requests.
        n_tokens: their real tokens altogether.
        source: what the warm-up prompts were, for the record.
    """

    similarity: Mapping[Sublayer, float]
    gain_norm: Mapping[Sublayer, float]
    gain_token: Mapping[Sublayer, float]
    fingerprint: str
    n_requests: int
    n_tokens: int
    source: str = ""

    @property
    def n_layers(self) -> int:
        """Decoder layers of the model."""
        return len(self.similarity) // 2

    @property
    def name(self) -> str:
        """Tells profiles apart, of one model too: its fingerprint and a hash of the values."""
        columns = (self.similarity, self.gain_norm, self.gain_token)
        values = json.dumps([list(column.values()) for column in columns])
        return f"{self.fingerprint}-{hashlib.sha256(values.encode()).hexdigest()[:8]}"

    def ranking(self) -> tuple[Sublayer, ...]:
        """All sublayers, least important first; ties by lower layer, attention before FFN."""
        # sorted() is stable and the mapping is in depth order.
        return tuple(sorted(self.similarity, key=lambda s: -self.similarity[s]))

    def gain(self, sublayer: Sublayer, kind: Gain | None) -> float | None:
        """The compensation of a skipped sublayer: METHOD, "Gain"."""
        if kind is None:
            return None
        return (self.gain_norm if kind == "norm" else self.gain_token)[sublayer]

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises a `ProfileError` unless this profile was learned on `model`."""
        found = model_fingerprint(model)
        if found != self.fingerprint:
            raise ProfileError(
                f"The importance profile belongs to model {self.fingerprint}, this model is "
                f"{found}; learn a profile of this model."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile as JSON, whole or not at all."""
        rows = [
            {
                "layer": s.layer,
                "kind": s.kind,
                "similarity": self.similarity[s],
                "gain_norm": self.gain_norm[s],
                "gain_token": self.gain_token[s],
            }
            for s in self.similarity
        ]
        content = {
            "version": PROFILE_VERSION,
            "fingerprint": self.fingerprint,
            "n_requests": self.n_requests,
            "n_tokens": self.n_tokens,
            "source": self.source,
            "sublayers": rows,
        }
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Importance:
        """Reads a profile.

        Raises:
            ProfileError: it is missing, damaged, or of another version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ProfileError(f"There is no importance profile at {path}.") from None
        except (ValueError, OSError) as error:
            raise ProfileError(f"The importance profile {path} cannot be read: {error}.") from error
        return _from_content(content, path)


def _typed(value: Any, *kinds: type) -> Any:
    """The value; raises a `TypeError` unless it is of one of these types, true being no number."""
    if type(value) not in kinds:
        raise TypeError(f"{value!r} is no {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _from_content(content: Any, path: object) -> Importance:
    """The profile in parsed JSON, every value checked."""
    damaged = f"The importance profile {path} is damaged: %s. Learn it anew."
    if not isinstance(content, dict) or content.get("version") != PROFILE_VERSION:
        found = content.get("version") if isinstance(content, dict) else "none"
        raise ProfileError(
            f"The importance profile {path} has version {found!r}; this adaskip reads version "
            f"{PROFILE_VERSION}. Learn it anew."
        )
    try:
        rows = {Sublayer(_typed(r["layer"], int), r["kind"]): r for r in content["sublayers"]}
        if tuple(rows) != all_sublayers(len(rows) // 2) or not rows:
            raise ProfileError(damaged % "its sublayers are not those of whole layers in order")
        values = [
            {s: float(_typed(r[name], int, float)) for s, r in rows.items()}
            for name in ("similarity", "gain_norm", "gain_token")
        ]
        if not all(abs(v) < 1e6 for column in values for v in column.values()):
            raise ProfileError(damaged % "a value is not a finite number")
        return Importance(
            values[0],
            values[1],
            values[2],
            fingerprint=_typed(content["fingerprint"], str),
            n_requests=_typed(content["n_requests"], int),
            n_tokens=_typed(content["n_tokens"], int),
            source=_typed(content["source"], str),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ProfileError(damaged % f"{type(error).__name__} {error}") from error
    except ValueError as error:
        if isinstance(error, ProfileError):
            raise
        raise ProfileError(damaged % str(error)) from error


def model_fingerprint(model: PreTrainedModel) -> str:
    """A name of the model that changes with its shape or training, not with dtype or device.

    Made of the configuration's dimensions and a hash, in bfloat16, of the first embedding rows and
    the beginning of the final norm.
    """
    config = model.config.get_text_config(decoder=True)
    facts = [
        getattr(config, name, None)
        for name in (
            "model_type",
            "num_hidden_layers",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
        )
    ]
    digest = hashlib.sha256(json.dumps(facts).encode())
    decoder: Any = model.base_model
    for module in (decoder.embed_tokens, decoder.norm):
        values = _weight(module)[:64].to("cpu", torch.bfloat16).contiguous().view(torch.int16)
        digest.update(values.numpy().tobytes())
    return f"{facts[0]}-{facts[1]}x{facts[2]}-{digest.hexdigest()[:12]}"


def _weight(module: Any) -> Tensor:
    """The weight of a module, fetched where accelerate has offloaded it or ranks share it."""
    if module.weight.device.type != "meta":
        weight: Any = module.weight.detach()
        whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        return whole
    from accelerate.utils import align_module_device

    with align_module_device(module, torch.device("cpu")):
        fetched: Tensor = module.weight.detach().clone()
        return fetched
