"""The tokenizer in a GGUF file, byte-level BPE or SentencePiece, as one of `tokenizers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tqdm import tqdm

from adaskip.errors import AdaskipError
from adaskip.models.text_splitting import SPLITTINGS, pre_tokenizer

# GGUF's types of tokens.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
# SentencePiece writes a space so.
SPACE = "▁"


class Vocabulary(NamedTuple):
    """The fields `tokenizer.ggml.*` of a GGUF file, by the rest of their names."""

    fields: Mapping[str, Any]

    @property
    def tokens(self) -> list[str]:
        """All tokens, by id."""
        found: list[str] = self.fields["tokens"]
        return found

    def of_kind(self, kind: int) -> list[str]:
        """The tokens of a type, by id."""
        pairs = zip(self.tokens, self.fields["token_type"], strict=True)
        return [token for token, own in pairs if own == kind]

    def special(self, role: str) -> str | None:
        """The text of the token of a role (bos, eos, padding, unknown), if there is one."""
        index = self.fields.get(f"{role}_token_id")
        return None if index is None else self.tokens[index]


def check_ids(name: str, vocabulary: Vocabulary, shape: Mapping[str, Any]) -> None:
    """Refuses a vocabulary whose size or special ids are not those of the model's configuration.

    Raises:
        AdaskipError: they differ.
    """
    ends = shape["eos_token_id"]
    expected = {
        "tokens": shape["vocab_size"],
        "bos": shape["bos_token_id"],
        "eos": ends[0] if isinstance(ends, list) else ends,
        "padding": shape["pad_token_id"],
    }
    found = {role: vocabulary.fields.get(f"{role}_token_id") for role in expected}
    found["tokens"] = len(vocabulary.tokens)
    if found != expected:
        raise AdaskipError(
            f"The tokenizer in the GGUF file of {name!r} is not the model's: {found}, and "
            f"configs/models.yaml has {expected}."
        )


def make_tokenizer(vocabulary: Vocabulary) -> Any:
    """The `tokenizers.Tokenizer` of a vocabulary.

    Raises:
        AdaskipError: a kind of tokenizer, or a way to split texts, that is not known here.
    """
    from tokenizers import AddedToken

    kind = vocabulary.fields["model"]
    if kind == "gpt2":
        tokenizer = _byte_level(vocabulary)
    elif kind == "llama" and not vocabulary.fields.get("add_space_prefix", True):
        tokenizer = _sentencepiece(vocabulary)
    else:
        raise AdaskipError(f"A GGUF tokenizer {kind!r} is not read here: gpt2 or llama is.")
    given = [AddedToken(token, normalized=False) for token in vocabulary.of_kind(USER_DEFINED)]
    tokenizer.add_tokens(given)
    special = vocabulary.of_kind(CONTROL)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    if vocabulary.fields.get("add_bos_token"):
        _begin(tokenizer, vocabulary)
    return tokenizer


def _byte_level(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    name = vocabulary.fields["pre"]
    if name not in SPLITTINGS:
        known = ", ".join(SPLITTINGS)
        raise AdaskipError(f"A GGUF tokenizer that splits texts by {name!r} is not read: {known}.")
    splitting = SPLITTINGS[name]
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    merges = [tuple(merge.split(" ")) for merge in vocabulary.fields["merges"]]
    own = {"ignore_merges": True} if splitting.ignore_merges else {}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, **own))
    if splitting.normalizers[-1] == "NFC":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer(splitting.pattern)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary) -> Any:
    """SentencePiece's BPE without a space before texts, bytes for what the vocabulary lacks."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    model = models.BPE(
        vocab=ids,
        merges=sentencepiece_merges(vocabulary),
        unk_token=vocabulary.special("unknown"),
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def sentencepiece_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, best first.

    SentencePiece merges the two neighbours whose token has the highest score. Of the pairs that
    make the same token, the one of the longer left part is named first; which of them is done first
    makes no difference to the score.

    Args:
        vocabulary: of `llama` kind. Only normal tokens are merged; the others are cut out of the
            text before.
    """
    kinds = vocabulary.fields["token_type"]
    scores = {
        token: score
        for token, score, kind in zip(
            vocabulary.tokens, vocabulary.fields["scores"], kinds, strict=True
        )
        if kind == NORMAL
    }
    merges = []
    ranked = sorted(scores, key=lambda token: -scores[token])
    for token in tqdm(ranked, desc="Reading merges", unit="token", leave=False):
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in scores and right in scores:
                merges.append((left, right))
    return merges


def _begin(tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Lets every text begin with the token of beginnings."""
    from tokenizers import processors

    bos = vocabulary.special("bos")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, vocabulary.fields["bos_token_id"])],
    )
