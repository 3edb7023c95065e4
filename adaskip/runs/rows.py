"""What is kept of every row: pydantic models, checked wherever a file is read."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adaskip.errors import first_problem
from adaskip.plan import Phase


class Stored(BaseModel):
    """What a file of ours holds: types are checked, and what it says beyond the fields is kept."""

    # An infinity stays one: as pydantic would have it, what is beyond the fields becomes null.
    model_config = ConfigDict(strict=True, frozen=True, extra="allow", ser_json_inf_nan="constants")

    @classmethod
    def from_dict(cls, content: Any) -> Self:
        """Reads it from JSON.

        Raises:
            ValueError: it is no such thing; the message names the field.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ValueError(first_problem(error)) from error

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: what was set, by the names that files have."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class PhaseSkips(Stored):
    """What the forwards of one phase left out.

    Attributes:
        forwards: how many there were.
        attn: attention sublayers left out, summed over the forwards.
        ffn: FFN sublayers left out, likewise.
        sublayers: the names of those that the latest forward left out.
        windows: attentions that saw a window, summed over the forwards; set where there are any.
    """

    forwards: int
    attn: int
    ffn: int
    sublayers: list[str] = []
    windows: int = 0


class Skips(Stored):
    """What a request left out, by phase.

    Attributes:
        online_extension: sublayers that were added while decoding.
    """

    prefill: PhaseSkips
    decode: PhaseSkips
    online_extension: list[str] = []

    def of(self, phase: Phase) -> PhaseSkips:
        """What one phase left out."""
        return self.prefill if phase is Phase.PREFILL else self.decode


class Seconds(Stored):
    """The times of one row, in seconds.

    Attributes:
        ttft: to the first token.
        per_token: per decode step; None without one.
        total: to the last token; None where a file does not tell.
    """

    ttft: float
    per_token: float | None
    total: float | None = None


class GeneratedRow(Stored):
    """One answer of a run.

    Attributes:
        id: what tells it from the other rows of its task.
        prediction: the answer, as it is scored.
        references: what it is scored against.
        classes: the labels of a classification task.
        length: of the row's context, as LongBench counts.
        tokens_before: of the prompt before it was cut.
        tokens_after: of the prompt, in tokens.
        truncated: whether the prompt lost its middle.
        generated_tokens: of the answer, the one that ended it included.
        batch: rows generated together.
        command: the command that made it; times compare only within one.
    """

    id: str
    task: str = ""
    prediction: str
    references: Annotated[list[str], Field(min_length=1)]
    classes: list[str] | None
    length: int
    tokens_before: int = 0
    tokens_after: int
    truncated: bool
    generated_tokens: int
    skipped: Skips
    seconds: Seconds
    batch: int = 1
    command: str = Field(alias="session")  # what files have always called it

    @property
    def source(self) -> tuple[list[str], int]:
        """What tells its row from another one of the same id: the references, and the length."""
        return self.references, self.length
