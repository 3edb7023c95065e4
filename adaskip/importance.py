"""Offline importance of a model's sublayers, kept as a JSON profile."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedModel

from adaskip.errors import AdaskipError, ProfileError, did_you_mean
from adaskip.fingerprint import fingerprint_name, model_fingerprint, same_model
from adaskip.plan import Sublayer, all_sublayers
from adaskip.whole_files import write_whole

Gain = Literal["norm", "token"]
GAINS: tuple[Gain, ...] = get_args(Gain)

PROFILE_VERSION = 2
# Profiles that come with the package, by the short name of their model.
_SHIPPED = Path(__file__).parent / "profiles"
_COLUMNS = ("similarity", "gain_norm", "gain_token")


@dataclass(frozen=True)
class Importance:
    """What the warm-up prompts told about each sublayer of one model.

    Attributes:
        similarity: IO similarity, mean over requests of the mean over tokens. High means
            unimportant.
        gain_norm: output norm / input norm over a whole request, mean over requests.
        gain_token: median over tokens of the per-token ratio, mean over requests.
        fingerprint: tells the model apart; see `model_fingerprint`.
        n_requests: warm-up prompts, each sequence of a batch being one.
        n_tokens: their real tokens altogether.
        source: what the warm-up prompts were, for the record.
        layer_similarity: IO similarity of whole layers, averaged likewise, by layer; empty in
            profiles of earlier versions.

    Raises:
        ProfileError: a value is not a finite number.
    """

    similarity: Mapping[Sublayer, float]
    gain_norm: Mapping[Sublayer, float]
    gain_token: Mapping[Sublayer, float]
    fingerprint: str
    n_requests: int
    n_tokens: int
    source: str = ""
    layer_similarity: Sequence[float] = ()

    def __post_init__(self) -> None:
        # In depth order: what is wrong in one sublayer is wrong in all that follow.
        for sublayer in self.similarity:
            for name in _COLUMNS:
                value = getattr(self, name)[sublayer]
                if not abs(value) < 1e6:
                    raise ProfileError(
                        f"The {name} of {sublayer} is {value}: the residual stream holds values "
                        "that are not finite, or zeros only. Look for NaN in the model's weights, "
                        "or learn in bfloat16 or float32."
                    )

    @property
    def n_layers(self) -> int:
        """Decoder layers of the model."""
        return len(self.similarity) // 2

    @property
    def name(self) -> str:
        """Tells profiles apart, of one model too: its fingerprint and a hash of the values."""
        values = json.dumps([list(getattr(self, name).values()) for name in _COLUMNS])
        digest = hashlib.sha256(values.encode()).hexdigest()[:8]
        return f"{fingerprint_name(self.fingerprint)}-{digest}"

    def ranking(self) -> tuple[Sublayer, ...]:
        """All sublayers, least important first; ties by lower layer, attention before FFN."""
        # sorted() is stable and the mapping is in depth order.
        return tuple(sorted(self.similarity, key=lambda s: -self.similarity[s]))

    def layer_ranking(self) -> tuple[int, ...]:
        """All layers, least important first; ties by lower layer.

        Raises:
            ProfileError: the profile is of an earlier version, without whole layers.
        """
        if not self.layer_similarity:
            raise ProfileError(
                "The importance profile tells nothing of whole layers, as those of earlier "
                "versions; learn it anew."
            )
        return tuple(sorted(range(self.n_layers), key=lambda i: -self.layer_similarity[i]))

    def gain(self, sublayer: Sublayer, kind: Gain | None) -> float | None:
        """The compensation of a skipped sublayer: METHOD, "Gain"."""
        if kind is None:
            return None
        return (self.gain_norm if kind == "norm" else self.gain_token)[sublayer]

    def check_layers(self, n_layers: int) -> None:
        """Raises an `AdaskipError` unless it is of a model of so many layers."""
        if self.n_layers != n_layers:
            raise AdaskipError(
                f"The importance profile is of a model of {self.n_layers} layers, the model has "
                f"{n_layers}; learn a profile of this model."
            )

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises a `ProfileError` unless this profile was learned on `model`."""
        found = model_fingerprint(model)
        if not same_model(found, self.fingerprint):
            raise ProfileError(
                "The importance profile belongs to model "
                f"{fingerprint_name(self.fingerprint)}, this model is {fingerprint_name(found)}; "
                "learn a profile of this model."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile as JSON, whole or not at all."""
        rows = [
            {"layer": s.layer, "kind": s.kind, **{n: getattr(self, n)[s] for n in _COLUMNS}}
            for s in self.similarity
        ]
        content = {
            "version": PROFILE_VERSION,
            "fingerprint": self.fingerprint,
            "n_requests": self.n_requests,
            "n_tokens": self.n_tokens,
            "source": self.source,
            "sublayers": rows,
            "layers": list(self.layer_similarity),
        }
        write_whole(path, (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Importance:
        """Reads a profile.

        Args:
            path: a file; or the name of a model whose profile is shipped, e.g. "smollm2".

        Raises:
            ProfileError: it is missing, damaged, or of another version.
        """
        file = Path(path)
        if not file.is_file() and str(path) in shipped_profiles():
            file = _SHIPPED / f"{path}.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            shipped = shipped_profiles()
            hint = did_you_mean(str(path), shipped)
            raise ProfileError(
                f"There is no importance profile at {path}; shipped are those of: "
                f"{', '.join(shipped)}.{hint}"
            ) from None
        except (ValueError, OSError) as error:
            raise ProfileError(f"The importance profile {path} cannot be read: {error}.") from error
        return _from_content(content, path)


def check_importance(given: object, policy: str) -> Importance:
    """What a policy is given, if it is a profile.

    Args:
        given: as its importance.
        policy: what messages call it.

    Raises:
        AdaskipError: it is none.
    """
    if not isinstance(given, Importance):
        raise AdaskipError(
            f"{policy}'s importance is a {type(given).__name__}; give what "
            "learn_importance(model, prompts) or Importance.load(path) returns."
        )
    return given


def shipped_profiles() -> tuple[str, ...]:
    """The names that `Importance.load` knows without a file."""
    return tuple(sorted(path.stem for path in _SHIPPED.glob("*.json")))


def _typed(value: Any, *kinds: type) -> Any:
    """The value; raises a `TypeError` unless it is of one of these types, true being no number."""
    if type(value) not in kinds:
        raise TypeError(f"{value!r} is no {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _layers(values: Any, n_layers: int) -> tuple[float, ...]:
    """The similarities of whole layers; none in a profile that was learned without."""
    found = tuple(float(_typed(value, int, float)) for value in _typed(values, list))
    if len(found) not in (0, n_layers) or not all(abs(value) < 1e6 for value in found):
        raise ValueError("its layers are not those of the sublayers")
    return found


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
            raise ValueError("its sublayers are not those of whole layers in order")
        values = [
            {s: float(_typed(r[name], int, float)) for s, r in rows.items()} for name in _COLUMNS
        ]
        return Importance(
            values[0],
            values[1],
            values[2],
            fingerprint=_typed(content["fingerprint"], str),
            n_requests=_typed(content["n_requests"], int),
            n_tokens=_typed(content["n_tokens"], int),
            source=_typed(content["source"], str),
            layer_similarity=_layers(content.get("layers", []), len(rows) // 2),
        )
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ProfileError(damaged % f"{type(error).__name__} {error}") from error
    except ValueError as error:
        raise ProfileError(damaged % str(error).rstrip(".")) from error
