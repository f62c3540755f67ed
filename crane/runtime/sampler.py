"""Per-sequence sampling parameters turned into tensors for `kernels.sampling`."""

import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crane.kernels import sampling as kernels
from crane.kernels.draw import sample, uniforms
from crane.kernels.transfer import download, upload
from crane.runtime.sequence import Sequence
from crane.runtime.types import TokenLogprob


class _Seen:
    """The distinct tokens of one sequence and how often the output has each, kept up to date as it grows."""

    def __init__(self):
        self.places: dict[int, int] = {}
        self.ids = np.empty(256, np.int64)
        self.counts = np.zeros(256, np.float32)
        self.num_read = 0

    def catch_up(self, sequence: Sequence) -> None:
        for position in range(self.num_read, len(sequence.token_ids)):
            token_id = sequence.token_ids[position]
            place = self.places.setdefault(token_id, len(self.places))
            if place == len(self.ids):
                self.ids = np.concatenate((self.ids, np.empty_like(self.ids)))
                self.counts = np.concatenate((self.counts, np.zeros_like(self.counts)))
            self.ids[place] = token_id
            self.counts[place] += position >= sequence.num_prompt
        self.num_read = len(sequence.token_ids)

    def with_output(self, token_ids) -> tuple[np.ndarray, np.ndarray]:
        """(ids, counts) as they would be with these tokens at the output's end."""
        size = len(self.places)
        if not token_ids:
            return self.ids[:size], self.counts[:size]
        new = [i for i in dict.fromkeys(token_ids) if i not in self.places]
        ids = np.concatenate((self.ids[:size], np.array(new, np.int64)))
        counts = np.concatenate((self.counts[:size], np.zeros(len(new), np.float32)))
        for token_id in token_ids:
            counts[self.places[token_id] if token_id in self.places else size + new.index(token_id)] += 1
        return ids, counts


@dataclass(slots=True)
class Drawn:
    """What `Sampler.launch` draws for some rows of logits.

    ids: int64 [rows]. logprobs: of those that want any, the rows that want the same together: their numbers, and what
    `log_probabilities` gives for them, the drawn token in the first place.
    """

    ids: Tensor
    logprobs: list[tuple[list[int], tuple[Tensor, Tensor, Tensor]]]

    def fetch(self) -> "Drawn":
        """The same in host memory, once the device has come so far."""
        return Drawn(download(self.ids), [(rows, tuple(map(download, found))) for rows, found in self.logprobs])

    def read(self) -> tuple[list[int], list[TokenLogprob | None]]:
        """Token and log-probability (None where not asked for) of each row. Call it on what was fetched."""
        logprobs: list[TokenLogprob | None] = [None] * len(self.ids)
        for rows, found in self.logprobs:
            for row, entry in zip(rows, pack(*found), strict=True):
                logprobs[row] = entry
        return self.ids.tolist(), logprobs


class Sampler:
    """Picks the next token of each row. Holds, per live sequence, only what penalties need.

    vocab_size: ids the tokenizer knows; a model's padding beyond it is never drawn.
    """

    def __init__(self, vocab_size: int, device: torch.device):
        self.vocab_size = vocab_size
        self.device = device
        self._seen: weakref.WeakKeyDictionary[Sequence, _Seen] = weakref.WeakKeyDictionary()

    def launch(self, logits: Tensor, sequences: list[Sequence], masks: dict[int, np.ndarray], ahead: list) -> Drawn:
        """One token, and its log-probability when asked for, per row. Nothing here waits for the device.

        logits: float32 [rows, vocab], changed in place. sequences: whose row it is. masks: of rows that may not
        go on with every token, bits of the allowed ones, uint32 [words], lowest first; at least one is set.
        ahead: tokens that each row takes to follow the sequence's own.
        """
        raw = logits = logits[:, : self.vocab_size]
        if any(s.sampling.logprobs is not None for s in sequences) and (
            masks or any(_changes_logits(s) for s in sequences)  # more than enough for rows further on
        ):
            logits = raw.clone()  # log-probabilities are those of the raw distribution
        self._mask(logits, masks)
        self._penalise(logits, sequences, ahead)
        self._bias(logits, sequences, masks, ahead)
        if all(s.sampling.greedy for s in sequences):
            drawn = kernels.best(logits)
        else:
            drawn = sample(logits, **self._parameters(sequences, ahead))
        return Drawn(drawn, self._logprobs(raw, drawn, sequences))

    def prompt_logprobs(self, logits: Tensor, chosen: list[int], sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of known tokens of one sequence, for `pack` once they are in host memory.

        logits: float32 [rows, vocab]; chosen: one id per row.
        """
        logits = logits[:, : self.vocab_size]
        params = sequence.sampling
        places = self._upload([[i, *params.logprob_ids] for i in chosen])
        return kernels.log_probabilities(logits, places, min(params.logprobs or 0, logits.shape[1]))

    def _upload(self, values: list | np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return upload(values, dtype, self.device)

    def _parameters(self, sequences: list[Sequence], ahead: list) -> dict[str, Tensor]:
        params = [s.sampling for s in sequences]
        seeds, choices = self._upload([s.seed for s in sequences]), self._upload([s.index for s in sequences])
        positions = self._upload([len(s.token_ids) + len(more) for s, more in zip(sequences, ahead)])
        return {
            "temperature": self._upload([p.temperature for p in params], torch.float32),
            "top_k": self._upload([p.top_k for p in params]),
            "top_p": self._upload([p.top_p for p in params], torch.float32),
            "min_p": self._upload([p.min_p for p in params], torch.float32),
            "uniform": uniforms(seeds, choices, positions),
        }

    def _penalise(self, logits: Tensor, sequences: list[Sequence], ahead: list) -> None:
        rows, ids, counts = [], [], []
        for row, sequence in enumerate(sequences):
            if _penalised(sequence):
                state = self._seen.get(sequence)
                if state is None:
                    state = self._seen[sequence] = _Seen()
                state.catch_up(sequence)
                rows.append(row)
                for parts, part in zip((ids, counts), state.with_output(ahead[row])):
                    parts.append(part)
        if not rows:
            return
        sizes = [len(part) for part in ids]

        def spread(values, dtype=torch.float32):
            return self._upload(np.repeat(values, sizes), dtype)

        params = [sequences[row].sampling for row in rows]
        kernels.penalise(
            logits, spread(rows, torch.int64), self._upload(np.concatenate(ids)),
            counts=self._upload(np.concatenate(counts), torch.float32),
            repetition=spread([p.repetition_penalty for p in params]),
            frequency=spread([p.frequency_penalty for p in params]),
            presence=spread([p.presence_penalty for p in params]),
        )

    def _mask(self, logits: Tensor, masks: dict[int, np.ndarray]) -> None:
        places = torch.arange(32, dtype=torch.int32, device=self.device)
        for row, bits in masks.items():
            words = self._upload(bits.view(np.int32), torch.int32)
            allowed = (words[:, None] >> places).bitwise_and_(1).bool().flatten()[: self.vocab_size]
            logits[row].masked_fill_(~allowed, -torch.inf)

    def _bias(self, logits: Tensor, sequences: list[Sequence], masks: dict[int, np.ndarray], ahead: list) -> None:
        rows, ids, values = [], [], []
        for row, sequence in enumerate(sequences):
            bias = dict(sequence.sampling.logit_bias)
            # a mask knows when the output may end
            if sequence.num_output + len(ahead[row]) < sequence.sampling.min_tokens and row not in masks:
                bias.update(dict.fromkeys(sequence.stop_ids, -torch.inf))
            rows += [row] * len(bias)
            ids += bias.keys()
            values += bias.values()
        if rows:
            logits[self._upload(rows), self._upload(ids)] += self._upload(values, torch.float32)

    def _logprobs(self, raw: Tensor, drawn: Tensor, sequences: list[Sequence]) -> list[tuple]:
        result = []
        groups: dict[tuple, list[int]] = {}  # rows that want the same, nearly always all of them
        for row, sequence in enumerate(sequences):
            if sequence.sampling.logprobs is not None:
                groups.setdefault((sequence.sampling.logprobs, sequence.sampling.logprob_ids), []).append(row)
        for (num_top, ids), wanted in groups.items():
            rows = self._upload(wanted)
            more = self._upload(ids).expand(len(wanted), -1)
            places = torch.cat((drawn[rows, None], more), dim=1)
            result.append((wanted, kernels.log_probabilities(raw[rows], places, min(num_top, raw.shape[1]))))
        return result


def pack(picked: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> list[TokenLogprob]:
    """Rows of `log_probabilities`, whose first place is the token itself."""
    entries = zip(picked.tolist(), top_ids.tolist(), top_logprobs.tolist(), strict=True)
    return [TokenLogprob(first, ids, values, more) for (first, *more), ids, values in entries]


def _penalised(sequence: Sequence) -> bool:
    p = sequence.sampling
    return p.repetition_penalty != 1.0 or p.frequency_penalty != 0.0 or p.presence_penalty != 0.0


def _changes_logits(sequence: Sequence) -> bool:
    p = sequence.sampling
    return _penalised(sequence) or bool(p.logit_bias) or sequence.num_output < p.min_tokens
