"""Per-sequence sampling parameters turned into tensors for `kernels.sampling`."""

import weakref

import numpy as np
import torch
from torch import Tensor

from crane.kernels import sampling as kernels
from crane.kernels.draw import sample, uniforms
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


class Sampler:
    """Picks the next token of each row. Holds, per live sequence, only what penalties need.

    vocab_size: ids the tokenizer knows; a model's padding beyond it is never drawn.
    """

    def __init__(self, vocab_size: int, device: torch.device):
        self.vocab_size = vocab_size
        self.device = device
        self._seen: weakref.WeakKeyDictionary[Sequence, _Seen] = weakref.WeakKeyDictionary()

    def pick(
        self, logits: Tensor, sequences: list[Sequence], masks: dict[int, np.ndarray], ahead: list
    ) -> tuple[list[int], list[TokenLogprob | None]]:
        """One token, and its log-probability when asked for, per row.

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
        return drawn.tolist(), self._logprobs(raw, drawn, sequences)

    def prompt_logprobs(self, logits: Tensor, chosen: list[int], sequence: Sequence) -> list[TokenLogprob]:
        """Log-probabilities of known tokens of one sequence. logits: float32 [rows, vocab]; chosen: one id per row."""
        logits = logits[:, : self.vocab_size]
        params = sequence.sampling
        places = torch.tensor([[i, *params.logprob_ids] for i in chosen], dtype=torch.int64, device=logits.device)
        return _pack(*kernels.log_probabilities(logits, places, min(params.logprobs or 0, logits.shape[1])))

    def _parameters(self, sequences: list[Sequence], ahead: list) -> dict[str, Tensor]:
        params = [s.sampling for s in sequences]
        place = {"device": self.device}
        seeds = torch.tensor([s.seed for s in sequences], dtype=torch.int64, **place)
        choices = torch.tensor([s.index for s in sequences], **place)
        positions = torch.tensor([len(s.token_ids) + len(more) for s, more in zip(sequences, ahead)], **place)
        return {
            "temperature": torch.tensor([p.temperature for p in params], dtype=torch.float32, **place),
            "top_k": torch.tensor([p.top_k for p in params], dtype=torch.int64, **place),
            "top_p": torch.tensor([p.top_p for p in params], dtype=torch.float32, **place),
            "min_p": torch.tensor([p.min_p for p in params], dtype=torch.float32, **place),
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

        def spread(values, dtype):
            return torch.from_numpy(np.repeat(np.array(values, dtype), sizes)).to(self.device)

        def joined(parts):
            return torch.from_numpy(np.concatenate(parts)).to(self.device)

        params = [sequences[row].sampling for row in rows]
        kernels.penalise(
            logits, spread(rows, np.int64), joined(ids), counts=joined(counts),
            repetition=spread([p.repetition_penalty for p in params], np.float32),
            frequency=spread([p.frequency_penalty for p in params], np.float32),
            presence=spread([p.presence_penalty for p in params], np.float32),
        )

    def _mask(self, logits: Tensor, masks: dict[int, np.ndarray]) -> None:
        places = torch.arange(32, dtype=torch.int32, device=self.device)
        for row, bits in masks.items():
            words = torch.from_numpy(bits.view(np.int32)).to(self.device)
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
            logits[torch.tensor(rows, device=self.device), torch.tensor(ids, device=self.device)] += torch.tensor(
                values, dtype=torch.float32, device=self.device
            )

    def _logprobs(self, raw: Tensor, drawn: Tensor, sequences: list[Sequence]) -> list[TokenLogprob | None]:
        result: list[TokenLogprob | None] = [None] * len(sequences)
        groups: dict[tuple, list[int]] = {}  # rows that want the same, nearly always all of them
        for row, sequence in enumerate(sequences):
            if sequence.sampling.logprobs is not None:
                groups.setdefault((sequence.sampling.logprobs, sequence.sampling.logprob_ids), []).append(row)
        for (num_top, ids), wanted in groups.items():
            rows = torch.tensor(wanted, device=raw.device)
            more = torch.tensor(ids, dtype=torch.int64, device=raw.device).expand(len(wanted), -1)
            places = torch.cat((drawn[rows, None], more), dim=1)
            found = _pack(*kernels.log_probabilities(raw[rows], places, min(num_top, raw.shape[1])))
            for row, entry in zip(wanted, found, strict=True):
                result[row] = entry
        return result


def _pack(picked: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> list[TokenLogprob]:
    """Rows of `log_probabilities`, whose first place is the token itself."""
    entries = zip(picked.tolist(), top_ids.tolist(), top_logprobs.tolist(), strict=True)
    return [TokenLogprob(first, ids, values, more) for (first, *more), ids, values in entries]


def _penalised(sequence: Sequence) -> bool:
    p = sequence.sampling
    return p.repetition_penalty != 1.0 or p.frequency_penalty != 0.0 or p.presence_penalty != 0.0


def _changes_logits(sequence: Sequence) -> bool:
    p = sequence.sampling
    return _penalised(sequence) or bool(p.logit_bias) or sequence.num_output < p.min_tokens
