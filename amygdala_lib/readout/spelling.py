"""Spelling: the text that each token adds to those before it."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"


class Spelling:
    """Spells a text token by token, so that the pieces put together are the decoded text.

    Decoding one id at a time would lose the spaces of some tokenizers and garble characters that
    are spread over several tokens. Such a character belongs to the token that completes it; the
    tokens before have the piece "".
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._spelt: list[int] = []
        """The ids of the last whole piece: what follows is decoded together with them."""
        self._waiting: list[int] = []

    def add(self, token_id: int, *, last: bool = False) -> str:
        """The piece of the next token; of the `last` one, whatever is left."""
        self._waiting.append(token_id)
        before = self._decode(self._spelt)
        both = self._decode(self._spelt + self._waiting)
        # A character has at most four bytes; one that never ends is spelt as it is.
        if both.endswith(_UNFINISHED) and len(self._waiting) < 4 and not last:
            return ""
        self._spelt, self._waiting = self._waiting, []
        return both[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def spell(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    """The pieces of all tokens of a text."""
    spelling, ids = Spelling(tokenizer), list(ids)
    return [spelling.add(token_id, last=n == len(ids)) for n, token_id in enumerate(ids, 1)]
