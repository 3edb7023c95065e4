"""InternLM v1's sentencepiece tokenizer, which has no class in transformers 5."""

from __future__ import annotations

import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from adaskip.errors import AdaskipError

# English spacing that InternLM mends in everything it decodes: what follows the space, without it.
TIGHTENED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class InternLMTokenizer(PreTrainedTokenizer):
    """Encodes and decodes with a checkpoint's own `tokenizer.model`.

    A prompt begins with `<s>`. Decoding keeps InternLM's rule: runs of ordinary pieces are decoded
    by sentencepiece, special tokens are written as they are, each run of them puts one space before
    the text that precedes it, and the spacing of English punctuation is tightened.

    Args:
        vocab_file: the sentencepiece model.
        unk_token: the unknown piece.
        bos_token: begins every prompt.
        eos_token: ends an answer.
        pad_token: fills shorter rows of a batch.
        add_bos_token: whether prompts begin with `bos_token`.
        add_eos_token: whether they end with `eos_token`.
        kwargs: as for every transformers tokenizer.

    Raises:
        AdaskipError: sentencepiece is not installed.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 - transformers' interface
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - transformers' interface

    def __init__(
        self,
        vocab_file: str,
        unk_token: str = "<unk>",  # noqa: S107 - not a password
        bos_token: str = "<s>",  # noqa: S107 - not a password
        eos_token: str = "</s>",  # noqa: S107 - not a password
        pad_token: str = "</s>",  # noqa: S107 - not a password
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        **kwargs: Any,
    ) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise AdaskipError(
                "InternLM's tokenizer needs sentencepiece: pip install sentencepiece."
            ) from error
        self.vocab_file = vocab_file
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        self.pieces = SentencePieceProcessor(model_file=vocab_file)
        super().__init__(  # type: ignore[no-untyped-call]  # transformers leaves it so
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """Pieces of the sentencepiece model, without tokens added later."""
        return int(self.pieces.get_piece_size())

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id, added ones included."""
        own = {self.pieces.id_to_piece(index): index for index in range(self.vocab_size)}
        return {**own, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        tokens: list[str] = self.pieces.encode(text, out_type=str)
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.pieces.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.pieces.id_to_piece(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens, by InternLM's rule (see the class)."""
        special = set(self.all_special_tokens)
        text, pending = "", ""
        for is_special, run in groupby(tokens, key=special.__contains__):
            if is_special:
                text, pending = f"{text} {pending}{''.join(run)}", ""
            else:
                pending = self.pieces.decode(list(run))
        text += pending
        for spaced in TIGHTENED:
            text = text.replace(spaced, spaced.strip())
        return text

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Ids of one text or a pair, with the tokens that begin and end a prompt."""
        ids = list(token_ids_0) + list(token_ids_1 or [])
        if self.add_bos_token:
            ids = [int(self.bos_token_id), *ids]
        return [*ids, int(self.eos_token_id)] if self.add_eos_token else ids

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Copies the sentencepiece model to a folder and returns where."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / f"{prefix}{self.vocab_files_names['vocab_file']}"
        if Path(self.vocab_file).resolve() != target.resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
