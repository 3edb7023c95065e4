"""Where this reproduction differs from the released AdaSkip code on purpose, and nowhere else.

README.md and docs/FIDELITY.md show this table; a test keeps them equal to it.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True, slots=True)
class Difference:
    """One deliberate difference.

    Attributes:
        topic: what it is about.
        released: what the released code does.
        ours: what we do.
        reason: why.
        checked: the test that shows both.
    """

    topic: str
    released: str
    ours: str
    reason: str
    checked: str


DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        "AdaSkip, online extension",
        "its threshold is reset to 1.0 by every prompt, so it never fires",
        "theta is the N-th largest offline similarity, as the paper says",
        "the paper's method; `online=False` reproduces the released numbers",
        "`test_golden.py`: variants `upstream` and `threshold_kept_isolated`",
    ),
    Difference(
        "Unified Skipping, N does not divide L",
        "skips every layer with i mod floor(L/N) = 1, more than N",
        "skips exactly N layers",
        "a budget has to mean the same for every policy",
        "`test_golden.py`, `test_policies.py`",
    ),
    Difference(
        "SkipDecode, E2E prefill",
        "uses the previous request's token count; crashes for N > 1",
        "the count starts anew with each request",
        "a request must not depend on the one before it",
        "`test_golden.py`: variant `isolated`",
    ),
    Difference(
        "Attention of layer 0 skipped",
        "the cache reports length 0; decoding crashes",
        "a stand-in cache layer keeps the length true",
        "any sublayer may be the least important one",
        "`test_families.py`: equal to zeroed projections",
    ),
    Difference(
        "Prompt of a single token",
        "counts as a decode step",
        "is a prefill",
        "a request begins with an empty cache",
        "`test_phases.py`",
    ),
    Difference(
        "Gain of a skipped sublayer",
        "Frobenius norm ratio, in the model's dtype",
        'median of the per-token ratios by default, in fp32; `gain="norm"` for the released one',
        "attention-sink tokens dominate the Frobenius ratio (docs/LOG.md)",
        '`test_golden.py` with `gain="norm"`',
    ),
    Difference(
        "Batches",
        "crash in the first recorded decode step",
        "each sequence of a warm-up batch is a request; online, a batch decides together",
        "batches are how people generate",
        "`test_recorders.py`, `test_families.py`",
    ),
    Difference(
        "InternLM beyond its trained length",
        "caches unrotated keys and rotates all of them anew at every step",
        "refused with an error",
        "exact within `max_position_embeddings`; beyond it no KV cache can be exact",
        "`test_internlm.py`",
    ),
    Difference(
        "Speed scripts",
        "never skip anything",
        "time every policy beside the dense model and the ideal",
        "a speed figure has to be of the thing it is about",
        "`test_timing.py`",
    ),
    Difference(
        "Importance",
        "learned again on every run",
        "learned once, kept as a profile bound to the model",
        "same numbers, minutes saved",
        "`test_golden.py`, `test_recorders.py`",
    ),
    Difference(
        "Result files",
        "appended to blindly",
        "resumed, locked, repaired; other settings under one name are refused",
        "a rerun must not double rows",
        "`test_records.py`, `test_runner.py`",
    ),
)


def differences_table() -> str:
    """The table in Markdown."""
    head = ("Topic", "Released code", "Here", "Reason", "Checked by")
    rows = [head, ("---",) * len(head), *(astuple(row) for row in DIFFERENCES)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
