"""Speculation without a second model: what followed the same tokens before is guessed to follow again. Torch-free.

A draft is a run of guessed tokens, computed together with the sequence's next token. The sampler draws at every
position as if the guesses before it were true, with that position's own noise; the draws are kept as far as the
guesses agree with them, and one more. So the output is, token for token, the one without drafts, and what a
wrong guess costs is time only. Guesses come from the sequence's own text (prompt-lookup decoding, Saxena 2023)
and from a prediction of the answer that came with the request.

How long a draft is depends on what it is worth. Guess number j of a row is of use with probability p ** j, where p
is how often guesses of this kind were right lately, and then saves one sequence its share of a step. It
costs what one more token costs a step. Both are measured while serving.
"""

import math

from crane.runtime.costs import StepTime
from crane.runtime.settings import Settings
from crane.runtime.types import Generate

# Logits of so many positions more, at most, in one step: they take memory that nobody has planned for.
MAX_STEP_DRAFTS = 64
# Earlier places of the same tokens that are compared before the best is taken.
_MAX_PLACES = 16
# What is not worth a draft is still tried with one guess in so many steps, or it could never prove better.
_PROBE_STEPS = 16
# How much of what was learned is kept at each lesson: of one sequence, of all together.
_OWN_MEMORY = 0.9
_COMMON_MEMORY = 0.99
_COST_MEMORY = 0.98
_PRIOR_WEIGHT = 2.0


class NgramIndex:
    """Where runs of `smallest` tokens stand in a text that may grow. One dictionary entry a token."""

    def __init__(self, token_ids: list[int], smallest: int, largest: int):
        self._token_ids = token_ids
        self._smallest = smallest
        self._largest = largest
        self._last: dict[tuple[int, ...], int] = {}  # the run -> where its last one ends
        self._before: dict[int, int] = {}  # that place -> where the same run ends the time before
        self._num_read = smallest

    def follow(self, text: list[int], limit: int) -> tuple[int, list[int]]:
        """(how many tokens match, at most `limit` tokens that followed them) for the longest run of tokens
        at the end of `text` found here, the latest of several; (0, []) when none of `smallest` is.

        `text` may be the indexed one itself.
        """
        tokens, smallest = self._token_ids, self._smallest
        for end in range(self._num_read, len(tokens)):  # a run that nothing follows is of no use yet
            run = tuple(tokens[end - smallest : end])
            if run in self._last:
                self._before[end] = self._last[run]
            self._last[run] = end
        self._num_read = max(self._num_read, len(tokens))
        place = self._last.get(tuple(text[-smallest:]))
        best, best_place = 0, 0
        for _ in range(_MAX_PLACES):
            if place is None:
                break
            length = self._match(text, place)
            if length > best:
                best, best_place = length, place
            if length >= self._largest:
                break
            place = self._before.get(place)
        if not best:
            return 0, []
        found = tokens[best_place : best_place + limit]
        if tokens is text:  # what repeats itself is guessed to go on doing so
            found += [0] * (limit - len(found))
            for i in range(len(tokens) - best_place, limit):
                found[i] = found[i - (len(tokens) - best_place)]
        return best, found

    def _match(self, text: list[int], end: int) -> int:
        """How many tokens before `end` are those at the end of `text`, up to `largest`."""
        longest = min(self._largest, end, len(text))
        length = self._smallest
        while length < longest and self._token_ids[end - 1 - length] == text[-1 - length]:
            length += 1
        return length


class Acceptance:
    """How often guesses were right lately, by how many tokens had matched before them."""

    def __init__(self, memory: float):
        self._memory = memory
        self._right: dict[int, float] = {}
        self._all: dict[int, float] = {}

    def learn(self, length: int, num_right: int, num_wrong: int) -> None:
        self._right[length] = self._memory * self._right.get(length, 0.0) + num_right
        self._all[length] = self._memory * self._all.get(length, 0.0) + num_right + num_wrong

    def rate(self, length: int, prior: float) -> float:
        """Between 0 and 1; `prior` where nothing is known."""
        right, total = self._right.get(length, 0.0), self._all.get(length, 0.0)
        return (right + _PRIOR_WEIGHT * prior) / (total + _PRIOR_WEIGHT)


class StepCost(StepTime):
    """Of the latest steps that only decoded."""

    def __init__(self):
        super().__init__(_COST_MEMORY)

    def worth(self, num_rows: int) -> float:
        """How likely a guess must be right to be worth its time, in a step that `num_rows` sequences share."""
        base_s, token_s = self.line
        return num_rows * token_s / (base_s + num_rows * token_s)


class Drafts:
    """What one sequence may be guessed from, and how its guesses fared. Written by Drafter.

    limit: guesses in a row, at most. num_drafted, num_accepted: tokens.
    """

    def __init__(self, token_ids: list[int], num_prompt: int, prediction_ids: list[int], limit: int,
                 sizes: tuple[int, int]):
        self.limit = limit
        self.num_drafted = 0
        self.num_accepted = 0
        self.acceptance = Acceptance(_OWN_MEMORY)
        self.num_skipped = 0
        self.matched = 0  # tokens, before the draft under way
        self._token_ids = token_ids
        self._num_prompt = num_prompt
        self._prediction_ids = prediction_ids
        self._largest = sizes[1]
        self._own = NgramIndex(token_ids, *sizes)
        self._predicted = NgramIndex(prediction_ids, *sizes) if prediction_ids else None

    def guess(self, limit: int) -> tuple[int, list[int]]:
        """(tokens that matched, guesses): the prediction's where it matches as well as the sequence's own text."""
        if self._predicted is None:
            return self._own.follow(self._token_ids, limit)
        place = len(self._token_ids) - self._num_prompt
        guesses = self._prediction_ids[place : place + limit]
        if guesses and self._token_ids[self._num_prompt :] == self._prediction_ids[:place]:  # right so far
            return self._largest, guesses
        predicted = self._predicted.follow(self._token_ids, limit)
        if predicted[0] == self._largest:
            return predicted
        return max(predicted, self._own.follow(self._token_ids, limit), key=lambda found: found[0])


class Drafter:
    """Decides what is guessed in each step."""

    def __init__(self, settings: Settings):
        self._limit = settings.num_draft_tokens if settings.speculative == "ngram" else 0
        self._sizes = (settings.ngram_min, settings.ngram_max)
        self._common = Acceptance(_COMMON_MEMORY)
        self._default = settings.num_draft_tokens
        self.cost = StepCost()
        self.num_drafts = 0
        self.num_drafted = 0
        self.num_accepted = 0

    def drafts_for(self, request: Generate, token_ids: list[int]) -> Drafts | None:
        """For a new sequence of this request, whose list of tokens is `token_ids`; None: no guesses are wanted.

        Where only some tokens may follow (a grammar, a thinking budget) nothing is guessed: what is allowed
        depends on every token before, and masks are computed one token ahead. Nor is it for deterministic requests:
        what is verified together is not computed as it would be one by one.
        """
        sampling = request.sampling
        limit = self._limit if sampling.num_draft_tokens is None else sampling.num_draft_tokens
        if request.prediction_ids and sampling.num_draft_tokens is None:
            limit = self._default
        if not limit or request.pooling or sampling.constrained or sampling.deterministic:
            return None
        return Drafts(token_ids, len(token_ids), request.prediction_ids, limit, self._sizes)

    def draft(self, drafts: Drafts, limit: int, num_rows: int) -> list[int]:
        """Guesses for the next tokens, at most `limit`, in a step that `num_rows` sequences share."""
        matched, guesses = drafts.guess(min(limit, drafts.limit))
        if not guesses:
            return []
        # a long match is more often right than a short one: so it is at first, until more is known
        prior = self._common.rate(matched, 1 - 0.5 ** max(matched - 1, 1))
        rate = min(drafts.acceptance.rate(matched, prior), 0.99)
        count = int(math.log(self.cost.worth(num_rows)) / math.log(rate)) if rate > 0 else 0
        if count == 0:
            drafts.num_skipped += 1
            count = int(drafts.num_skipped % _PROBE_STEPS == 0)
        drafts.matched = matched
        return guesses[:count]

    def learn(self, drafts: Drafts, num_drafted: int, num_accepted: int) -> None:
        """So many of the sequence's guesses were kept."""
        drafts.num_drafted += num_drafted
        drafts.num_accepted += num_accepted
        self.num_drafts += 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        wrong = int(num_accepted < num_drafted)  # guesses behind a wrong one say nothing
        drafts.acceptance.learn(drafts.matched, num_accepted, wrong)
        self._common.learn(drafts.matched, num_accepted, wrong)
