"""From output tokens to text: detokenise, match stop strings, keep logprobs aligned. Torch-free."""

from collections.abc import Sequence
from typing import NamedTuple

from crane.errors import RequestError
from crane.models.tokenizer import Tokenizer
from crane.runtime.types import Output, SamplingParams, TokenLogprob


class Delta(NamedTuple):
    """What one output adds to the answer.

    stop: the stop string or token id that ended it. token_ids: the tokens covered,
    also those whose text is still held back. logprobs: one per token, or None.
    """

    text: str
    finish_reason: str | None
    stop: str | int | None
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None


class TextStream:
    """The answer of one choice as it grows. Written by its one caller, `push` by `push`.

    token_ids: all tokens of the answer. finished: no text will follow. matched_stop:
    the stop string that came up, on which the caller must abort the request.
    prompt_ids: what the text follows, when known; keep_ids: see `Tokenizer.decoder`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        prompt_ids: Sequence[int] | None = None,
        keep_ids: frozenset[int] = frozenset(),
    ):
        self._decoder = tokenizer.decoder(
            sampling.skip_special_tokens, prompt_ids or (), continuing=prompt_ids is None, keep_ids=keep_ids
        )
        self._push = self._decoder.push
        if "" in sampling.stop:
            raise RequestError("stop: an empty string would stop every answer", field="stop")
        self._matchers = [StopMatcher(stop) for stop in sampling.stop]
        self._min_tokens = sampling.min_tokens
        self._held = ""  # may be the beginning of a stop string
        self._parts: list[str] = []
        self.token_ids: list[int] = []
        self.finished = False
        self.matched_stop: str | None = None

    @property
    def text(self) -> str:
        """All text given out so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    @property
    def free(self) -> bool:
        """Whether `grow` is enough until the answer ends: nothing is looked for in the text."""
        return not self._matchers

    def grow(self, token_ids: list[int]) -> str:
        """The text that further tokens of a running answer add, when it is `free`."""
        self.token_ids += token_ids
        push = self._push
        text = push(token_ids[0]) if len(token_ids) == 1 else "".join(map(push, token_ids))
        if text:
            self._parts.append(text)
        return text

    def push(self, output: Output) -> Delta:
        """The next delta. After the end, whatever the engine still sent is dropped."""
        if self.finished:
            return Delta("", None, None, [], None)
        if output.finish_reason is None and not self._matchers:
            return Delta(self.grow(output.token_ids), None, None, output.token_ids, output.logprobs)
        ended = output.finish_reason is not None
        # the text of an EOS or stop id is not part of the answer
        num_read = len(output.token_ids) - (ended and output.matched_id is not None)
        pieces = []
        for i, token_id in enumerate(output.token_ids):
            self.token_ids.append(token_id)
            if i < num_read:
                pieces.append(self._take(self._push(token_id)))
                if self.matched_stop is not None:
                    return self._delta(pieces, "stop", self.matched_stop, output, i + 1)
        if not ended:
            return self._delta(pieces, None, None, output, len(output.token_ids))
        pieces.append(self._take(self._decoder.flush()))
        if self.matched_stop is not None:
            return self._delta(pieces, "stop", self.matched_stop, output, len(output.token_ids))
        pieces.append(self._held)
        return self._delta(pieces, output.finish_reason, output.matched_id, output, len(output.token_ids))

    def _take(self, piece: str) -> str:
        """Adds decoded text; returns what can be given out now."""
        if not self._matchers or not piece:
            return piece
        counts = len(self.token_ids) >= self._min_tokens
        found: tuple[int, StopMatcher] | None = None
        for matcher in self._matchers:
            end = matcher.feed(piece, counts)
            # of several, the one complete first; of those complete at once, the longest
            if end and (found is None or (end, -matcher.length) < (found[0], -found[1].length)):
                found = end, matcher
        text = self._held + piece
        if found is not None:
            end, matcher = found
            self.matched_stop = matcher.stop
            return text[: len(self._held) + end - matcher.length]
        num_held = max(matcher.matched for matcher in self._matchers)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def _delta(self, pieces: list[str], reason: str | None, stop, output: Output, num_tokens: int) -> Delta:
        text = "".join(pieces)
        if text:
            self._parts.append(text)
        self.finished = reason is not None
        logprobs = None if output.logprobs is None else output.logprobs[:num_tokens]
        return Delta(text, reason, stop, output.token_ids[:num_tokens], logprobs)


class StopMatcher:
    """Finds one stop string in text that comes in pieces, in linear time (Knuth, Morris, Pratt).

    matched: how many characters at the end of the text may begin the stop string.
    """

    def __init__(self, stop: str):
        self.stop = stop
        self.length = len(stop)
        self.matched = 0
        self._borders = _borders(stop)

    def feed(self, piece: str, counts: bool) -> int:
        """Where in `piece` the stop string is complete, as an end offset; 0 when it is not.

        counts: whether a match ends the text. When not, it is passed over.
        """
        stop, borders, matched = self.stop, self._borders, self.matched
        start = 0
        if not matched:
            start = piece.find(stop[0])
            if start < 0:
                return 0
        for i in range(start, len(piece)):
            character = piece[i]
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            if stop[matched] == character:
                matched += 1
                if matched == self.length:
                    if counts:
                        return i + 1
                    matched = borders[matched - 1]
        self.matched = matched
        return 0


def _borders(text: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for i in range(1, len(text)):
        while length and text[i] != text[length]:
            length = borders[length - 1]
        length += text[i] == text[length]
        borders[i] = length
    return borders
