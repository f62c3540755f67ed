"""Per-sequence sampling parameters turned into tensors for `kernels.draw` and `kernels.logprobs`."""

import dataclasses
import itertools
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crane.kernels.draw import sample
from crane.kernels.logprobs import log_probabilities
from crane.kernels.sampling import Changes, Draws, count_drawn
from crane.kernels.transfer import download, upload_all
from crane.runtime.sequence import Sequence
from crane.runtime.types import TokenLogprob


# What a row without penalties has listed.
_NO_IDS, _NO_COUNTS = np.empty(0, np.int32), np.empty(0, np.float32)


class _Seen:
    """The distinct tokens of one sequence and how often the output has each, kept up to date as it grows."""

    def __init__(self, vocab_size: int):
        self.places: dict[int, int] = {}
        self.ids, self.counts = np.empty(vocab_size, np.int32), np.zeros(vocab_size, np.float32)  # of all places
        self.num_read = 0

    def catch_up(self, sequence: Sequence) -> None:
        for position in range(self.num_read, len(sequence.token_ids)):
            token_id = sequence.token_ids[position]
            place = self.places.setdefault(token_id, len(self.places))
            self.ids[place] = token_id
            self.counts[place] += position >= sequence.num_prompt
        self.num_read = len(sequence.token_ids)

    def with_output(self, token_ids) -> tuple[np.ndarray, np.ndarray]:
        """(ids, counts) as they would be with these tokens at the output's end."""
        size = len(self.places)
        if not token_ids:
            return self.ids[:size], self.counts[:size]
        new = [i for i in dict.fromkeys(token_ids) if i not in self.places]
        ids = np.concatenate((self.ids[:size], np.array(new, np.int32)))
        counts = np.concatenate((self.counts[:size], np.zeros(len(new), np.float32)))
        for token_id in token_ids:
            counts[self.places[token_id] if token_id in self.places else size + new.index(token_id)] += 1
        return ids, counts


@dataclass(slots=True)
class Drawn:
    """What `Sampler.launch` draws for some rows of logits.

    ids: int64 [rows]. wanting: the rows that want log-probabilities, each with how many of the best and how many
    listed ones. found: what `log_probabilities` gives for them; None where there are none.
    """

    ids: Tensor
    wanting: list[tuple[int, int, int]]
    found: tuple[Tensor, Tensor, Tensor] | None

    def fetch(self) -> "Drawn":
        """The same in host memory, once the device has come so far."""
        return Drawn(download(self.ids), self.wanting, self.found and tuple(map(download, self.found)))

    def read(self) -> tuple[list[int], list[TokenLogprob | None]]:
        """Token and log-probability (None where not asked for) of each row. Call it on what was fetched."""
        logprobs: list[TokenLogprob | None] = [None] * len(self.ids)
        if self.found:
            for (row, num_top, num_listed), one in zip(self.wanting, pack(*self.found), strict=True):
                logprobs[row] = TokenLogprob(one.logprob, one.top_ids[:num_top], one.top_logprobs[:num_top],
                                             one.ids_logprobs[:num_listed])  # fmt: skip
        return self.ids.tolist(), logprobs


class Sampler:
    """Picks the next token of each row. Holds, per live sequence, only what penalties need.

    vocab_size: ids the tokenizer knows; a model's padding beyond it is never drawn.
    """

    def __init__(self, vocab_size: int, device: torch.device):
        self.vocab_size = vocab_size
        # Metal has no float64, which draws are made of; a copy of the logits is cheap there, memory being one
        self.device = torch.device("cpu") if device.type == "mps" else device
        self._seen: weakref.WeakKeyDictionary[Sequence, _Seen] = weakref.WeakKeyDictionary()

    def launch(self, logits: Tensor, sequences: list[Sequence], masks: dict[int, np.ndarray], ahead: list,
               before: Tensor | None = None) -> Drawn:
        """One token, and its log-probability when asked for, per row. Nothing here waits for the device.

        logits: float32 [rows, vocab], changed in place. sequences: whose row it is. masks: of rows that may not
        go on with every token, bits of the allowed ones, uint32 [words], lowest first; at least one is set.
        ahead: tokens that each row takes to follow the sequence's own, as `Row.ahead` gives them. before: int64
        [num_draws], those of them that only the device knows.
        """
        logits = logits[:, : self.vocab_size].to(self.device)
        wanting = [(row, min(s.sampling.logprobs, logits.shape[1]), len(s.sampling.logprob_ids))
                   for row, s in enumerate(sequences) if s.sampling.logprobs is not None]  # fmt: skip
        listed = [sequences[row].sampling.logprob_ids for row, _, _ in wanting]
        unknown, *changes = self._changes(sequences, masks, ahead)
        arrays = [unknown, *_draws(sequences, ahead), *changes, np.array([row for row, _, _ in wanting], np.int32),
                  _rectangle(listed)]  # fmt: skip
        places, *tensors = upload_all(arrays, self.device)
        count = len(dataclasses.fields(Draws))
        draws, changes, (rows, listed) = Draws(*tensors[:count]), Changes(*tensors[count:-2]), tensors[-2:]
        if unknown.min() < 0:
            changes = count_drawn(changes, places, before)
        drawn = sample(logits, draws, changes, bool(wanting))  # log-probabilities are those of the raw distribution
        if not wanting:
            return Drawn(drawn, [], None)
        num_top = max(count for _, count, _ in wanting)
        return Drawn(drawn, wanting, log_probabilities(logits, rows, drawn, listed, num_top))

    def changes(self, sequences: list[Sequence], ahead: list, before: Tensor | None) -> Changes | None:
        """What is done to logits before the best of each row without a mask is taken, on the CPU; None: nothing.

        The arguments are as for `launch`.
        """
        if not any(sequence.changes_logits for sequence in sequences):
            return None
        unknown, *changes = map(torch.from_numpy, self._changes(sequences, {}, ahead))
        return Changes(*changes) if before is None else count_drawn(Changes(*changes), unknown, before)

    def prompt_logprobs(self, logits: Tensor, chosen: list[int], sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of known tokens of one sequence, for `pack` once they are in host memory.

        logits: float32 [rows, vocab]; chosen: one id per row.
        """
        logits = logits[:, : self.vocab_size].to(self.device)
        params = sequence.sampling
        rows, listed = np.arange(len(chosen), dtype=np.int32), _rectangle([params.logprob_ids] * len(chosen))
        rows, tokens, listed = upload_all([rows, np.array(chosen, np.int64), listed], self.device)
        return log_probabilities(logits, rows, tokens, listed, min(params.logprobs or 0, logits.shape[1]))

    def _changes(self, sequences: list[Sequence], masks: dict[int, np.ndarray], ahead: list) -> list[np.ndarray]:
        """`places` of `count_drawn`, then the fields of `Changes`."""
        unknown = [min(more, default=0) if s.penalised else 0 for s, more in zip(sequences, ahead)]
        ids, counts, bias = zip(*(self._places(each, i in masks, ahead[i]) for i, each in enumerate(sequences)))
        params, mask_of = [each.sampling for each in sequences], dict(zip(masks, range(len(masks))))
        penalties = zip(*((p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params))
        return [  # by few operations: each of numpy's, in no cache any more, takes 10 to 40 us
            np.array(unknown, np.int32), np.array([0, *itertools.accumulate(map(len, ids))], np.int32),
            *map(np.concatenate, (ids, counts, bias)), *np.array([*penalties], np.float32),
            np.array([mask_of.get(row, -1) for row in range(len(sequences))], np.int32),
            np.stack(list(masks.values())).view(np.int32) if masks else np.empty((0, 0), np.int32),
        ]  # fmt: skip

    def _places(self, sequence: Sequence, masked: bool, ahead) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, counts, bias) of the row's places, as in `Changes`."""
        ids, counts = _NO_IDS, _NO_COUNTS
        if sequence.penalised:
            state = self._seen.get(sequence)
            if state is None:
                state = self._seen[sequence] = _Seen(self.vocab_size)
            state.catch_up(sequence)
            ids, counts = state.with_output(ahead)
        bias = dict(sequence.sampling.logit_bias)
        # a mask knows when the output may end
        if sequence.num_output + len(ahead) < sequence.sampling.min_tokens and not masked:
            bias.update(dict.fromkeys(sequence.stop_ids, -np.inf))
        values = np.zeros(len(ids), np.float32)
        if not bias:
            return ids, counts, values
        both = np.flatnonzero(np.isin(ids, list(bias)))
        values[both] = [bias.pop(token_id) for token_id in ids[both].tolist()]
        return (np.concatenate((ids, np.array(list(bias), np.int32))),
                np.concatenate((counts, np.full(len(bias), -1, np.float32))),
                np.concatenate((values, np.array(list(bias.values()), np.float32))))  # fmt: skip


def _draws(sequences: list[Sequence], ahead: list) -> list[np.ndarray]:
    """The fields of `Draws`."""
    params = [sequence.sampling for sequence in sequences]
    return [
        np.array([p.temperature for p in params], np.float32), np.array([p.top_k for p in params], np.int32),
        np.array([p.top_p for p in params], np.float32), np.array([p.min_p for p in params], np.float32),
        np.array([sequence.seed for sequence in sequences], np.int64),
        np.array([sequence.index for sequence in sequences], np.int32),
        np.array([len(s.token_ids) + len(more) for s, more in zip(sequences, ahead, strict=True)], np.int32),
    ]  # fmt: skip


def _rectangle(lists: list[tuple[int, ...]]) -> np.ndarray:
    """int32 [len(lists), longest], short ones padded with id 0."""
    longest = max(map(len, lists), default=0)
    return np.array([[*each, *[0] * (longest - len(each))] for each in lists], np.int32).reshape(len(lists), longest)


def pack(picked: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> list[TokenLogprob]:
    """Rows of `log_probabilities`, whose first place is the token itself."""
    entries = zip(picked.tolist(), top_ids.tolist(), top_logprobs.tolist(), strict=True)
    return [TokenLogprob(first, ids, values, more) for (first, *more), ids, values in entries]
