"""Where chance begins: what is drawn at random is the same in every repetition."""

SEED = 2025
