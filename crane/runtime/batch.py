"""What one step computes and what came out: plain numbers between scheduler and runner. Torch-free."""

from dataclasses import dataclass, field

from crane.runtime.sequence import Sequence
from crane.runtime.types import TokenLogprob


@dataclass(slots=True)
class Row:
    """Compute tokens `start .. start + count` of one sequence.

    samples: the row reaches the sequence's last token, so the next one is drawn.
    drafts: guesses of the tokens that follow, the last ones of `count`; a token is drawn behind each.
    num_accepted: how many of them the commit kept. void: the sequence had ended before the commit.
    prompt_logits: log-probabilities of the prompt tokens after each position are wanted.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    prompt_logits: bool = False
    drafts: list[int] | tuple[()] = ()
    num_accepted: int = 0
    void: bool = False

    def ahead(self, num_drafts: int, places: dict[Sequence, int]) -> list[int]:
        """What the draw behind so many drafts takes to follow the sequence's own tokens. One that the step before
        draws is -1 - its place among that step's draws; places: of each sequence's."""
        if self.start + self.count - len(self.drafts) > len(self.sequence.token_ids):
            return [-1 - places[self.sequence]]
        return list(self.drafts[:num_drafts])

    def input_ids(self, places: dict[Sequence, int]) -> list[int]:
        """The tokens to compute, those that nobody knows yet as in `ahead`."""
        known = self.sequence.token_ids[self.start : self.start + self.count]
        return known if len(known) == self.count else known + self.ahead(len(self.drafts), places)


@dataclass(slots=True)
class Batch:
    """The rows of one step, and the copies of pages that come before it, as in `PagePool.copies`."""

    rows: list[Row] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)


@dataclass(slots=True)
class Picked:
    """What the runner found for one row: the drawn token (None when it does not sample),
    its log-probability when asked for, those of prompt tokens `start + 1 ..` covered by the row, and the
    pooled hidden state of a pooling sequence that the row completes. after_drafts: the same draw behind each of
    the row's drafts, as if it and those before were true."""

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    embedding: list[float] | None = None
    after_drafts: list[tuple[int, TokenLogprob | None]] = field(default_factory=list)
