"""The colours of every figure: a policy has the same one wherever it is drawn."""

from __future__ import annotations

# Okabe and Ito's palette, told apart by colour-blind readers.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
# The same hues for thin marks and text: darker on light ground, lighter on dark ground.
ON_LIGHT = ("#0072B2", "#C77700", "#00805D", "#B0578D", "#3A8FBF", "#C04A00", "#8A7F00")
ON_DARK = ("#5AB4EE", "#F0B030", "#35C79B", "#E29BC6", "#8FD0F5", "#F08A4B", "#F0E442")


def policy_number(policy: str) -> int:
    """The place of a registered policy's colour in each of the palettes."""
    from adaskip.policies import POLICIES

    return list(POLICIES).index(policy) % len(COLOURS)


def policy_colour(policy: str) -> str:
    """The colour of a registered policy in figures of filled marks."""
    return COLOURS[policy_number(policy)]
