"""Log-probabilities in the two shapes of OpenAI's API."""

from crane.models.tokenizer import Tokenizer
from crane.runtime.types import TokenLogprob

_LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say


def chat_logprobs(tokenizer: Tokenizer, token_ids: list[int], entries: list[TokenLogprob]) -> dict:
    """`choices[].logprobs` of a chat completion, for the tokens that one chunk covers."""
    return {
        "content": [
            {
                **_chat_token(tokenizer, token_id, entry.logprob),
                "top_logprobs": [
                    _chat_token(tokenizer, top_id, logprob)
                    for top_id, logprob in zip(entry.top_ids, entry.top_logprobs)
                ],
            }
            for token_id, entry in zip(token_ids, entries, strict=True)
        ],
        "refusal": None,
    }


def trimmed(entries: list[TokenLogprob | None] | None, k: int) -> list[TokenLogprob | None] | None:
    """`entries` with at most the `k` best alternatives each."""
    if entries is None:
        return None
    return [e and TokenLogprob(e.logprob, e.top_ids[:k], e.top_logprobs[:k]) for e in entries]


def prompt_logprobs(
    tokenizer: Tokenizer, token_ids: list[int], entries: list[TokenLogprob | None]
) -> list[dict | None]:
    """vLLM's `prompt_logprobs`: per prompt token {id: {logprob, rank, decoded_token}}, of it and the best.

    The first token's is None. rank: 1 is best; None below the best ones that were asked for.
    """
    return [
        None if entry is None else _ranked(tokenizer, token_id, entry)
        for token_id, entry in zip(token_ids, entries, strict=True)
    ]


def _ranked(tokenizer: Tokenizer, token_id: int, entry: TokenLogprob) -> dict[str, dict]:
    ranks = {top_id: i for i, top_id in enumerate(entry.top_ids, 1)}
    pairs = [(token_id, entry.logprob), *zip(entry.top_ids, entry.top_logprobs)]
    return {
        str(each): {
            "logprob": max(logprob, _LOWEST),
            "rank": ranks.get(each),
            "decoded_token": tokenizer.token_bytes(each).decode("utf-8", "replace"),
        }
        for each, logprob in pairs
    }


class LegacyLogprobs:
    """`choices[].logprobs` of a text completion, over one choice from its first token on.

    Offsets count characters of the choice's text. They are counted on bytes, so a
    character split over several tokens has one offset. silent: ids without text.
    """

    def __init__(self, tokenizer: Tokenizer, silent: frozenset[int]):
        self._tokenizer = tokenizer
        self._silent = silent
        self._offset = 0

    def prompt(self, token_ids: list[int], entries: list[TokenLogprob | None], text: str) -> dict:
        """The tokens of an echoed prompt, `text`, in which special tokens are spelled out.

        The entry of its first token is None. What the tokens have before the text begins,
        such as BOS or the space that SentencePiece puts there, has no characters.
        """
        silent, self._silent = self._silent, frozenset()
        num_all = sum(num_characters(self._tokenizer.token_bytes(token_id)) for token_id in token_ids)
        self._offset = min(len(text) - num_all, 0)
        shaped = self.shape(token_ids, entries)
        self._silent = silent
        return shaped

    def shape(self, token_ids: list[int], entries: list[TokenLogprob | None]) -> dict:
        """The next tokens."""
        tokens, offsets, logprobs, tops = [], [], [], []
        for token_id, entry in zip(token_ids, entries, strict=True):
            tokens.append(legacy_token(self._tokenizer, token_id))
            offsets.append(max(self._offset, 0))
            if token_id not in self._silent:
                self._offset += num_characters(self._tokenizer.token_bytes(token_id))
            logprobs.append(None if entry is None else max(entry.logprob, _LOWEST))
            tops.append(None if entry is None else self._top(token_id, entry))
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, token_id: int, entry: TokenLogprob) -> dict[str, float]:
        pairs = [*zip(entry.top_ids, entry.top_logprobs), (token_id, entry.logprob)]
        return {legacy_token(self._tokenizer, top_id): max(logprob, _LOWEST) for top_id, logprob in pairs}


def legacy_token(tokenizer: Tokenizer, token_id: int) -> str:
    """The token's text, or `bytes:\\xNN...` when it is a piece of a character."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def num_characters(raw: bytes) -> int:
    """Characters that begin in `raw`."""
    return sum(byte & 0xC0 != 0x80 for byte in raw)


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "bytes": list(raw), "logprob": max(logprob, _LOWEST)}
