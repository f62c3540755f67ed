"""Who computes what in each step: `plan` -> Batch, `commit` -> outputs. Arithmetic only, no torch.

Sequences that want to run wait for one of `max_running` slots (`slots`), in the order of `policy`. Those that have one
take part in every step. Whoever gives way keeps its pages, so coming back costs nothing.

Each step gives every running sequence that decodes its one token, then spends what
is left of `max_step_tokens` on prompts, in the order of the policy. A prompt gets all of its pages
when it gets its slot, so half-computed prompts cannot starve each other. When a
growing sequence finds no free page, the last in the policy's order gives up its pages and goes on
later: its tokens, and the noise of its next ones, stay as they are. A more urgent one that
is to start takes pages from less urgent ones in the same way. What the pages contain is left in host memory where
that costs less than computing it again (`costs`).

A step may be planned while the one before runs (`launch`): what that one computes and draws is counted on, and
nobody loses pages that it uses but those who end. Their rows are void; what runs on the device runs in order, so their
pages may be given to others at once.

A full page is remembered by its content. A sequence that gets pages shares those whose content it starts with, and
computes only what follows. The choices of one request wait for the first one's prompt, and then share it.
"""

import time
from collections.abc import Callable

from crane.runtime.batch import Batch, Picked, Row
from crane.runtime.costs import Costs
from crane.runtime.drafts import MAX_STEP_DRAFTS, Drafter
from crane.runtime.pages import PagePool
from crane.runtime.policy import Tenants
from crane.runtime.roster import Roster
from crane.runtime.sequence import Sequence, Status
from crane.runtime.slots import Slots
from crane.runtime.tables import PageTables
from crane.runtime.tiers import DiskLink
from crane.runtime.types import Output


class Scheduler:
    """Owns all live sequences and all pages. clock: seconds, as `time.monotonic`."""

    def __init__(self, pool: PagePool, *, max_running: int, quantum_tokens: int, max_step_tokens: int,
                 max_model_len: int, prefix_cache: bool = True, drafter: Drafter | None = None,
                 output_weight: float = 2.0, clock: Callable[[], float] = time.monotonic,
                 costs: Costs | None = None, disk: DiskLink | None = None):
        assert max_model_len <= pool.num_pages * pool.page_size, "one sequence may not outgrow the pool"
        self.pool = pool
        self.max_step_tokens = max(max_step_tokens, max_running)
        self.max_model_len = max_model_len
        self.clock = clock
        self.tenants = Tenants(output_weight)
        self.roster = Roster(self.tenants)
        self.slots = Slots(self.tenants, self, max_running=max_running, quantum_tokens=quantum_tokens)
        self.running, self.parked = self.slots.running, self.slots.parked
        self.tables = PageTables(pool, prefix_cache=prefix_cache, costs=costs, disk=disk)
        self.flights: list[Batch] = []  # launched, neither committed nor given up yet, in order
        self.short = False  # the last plan left out somebody, because nobody may lose pages while a step runs
        self.drafter = drafter  # for sequences that have `drafts`
        self.step_limit: int | None = None  # tokens of a step while memory is short
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.roster)

    @property
    def num_live(self) -> int:
        """Sequences that have not ended."""
        return len(self.slots)

    @property
    def num_waiting(self) -> int:
        """Sequences that have not started yet."""
        return self.roster.num_waiting

    def enqueue(self, sequence: Sequence) -> None:
        """Take a new sequence in. Its prompt is shorter than `max_model_len`."""
        assert 0 < sequence.num_prompt < self.max_model_len or sequence.max_tokens == 0
        sequence.max_tokens = min(sequence.max_tokens, self.max_model_len - sequence.num_prompt)
        self.roster.enter(sequence)
        self.slots.add(sequence)

    # --- plan

    def plan(self) -> Batch:
        """The next step. Empty only when there is nothing to do, or all that is left waits for a grammar, or for
        steps that were launched."""
        self.short = False
        self.tables.poll()
        self.slots.wake()
        self.slots.give_way()
        while True:
            self._fill_slots()
            num_preemptions = self.num_preemptions
            batch = self._fill_step()
            # one that gave up its pages and was alone in the step has made room for others
            if batch.rows or num_preemptions == self.num_preemptions:
                break
        batch.copies = self.pool.due_copies()
        return batch

    def _fill_step(self) -> Batch:
        decoding = [s for s in self.running if s.num_wanted == 1 and not s.waits]
        prompts = [s for s in self.running if s.num_wanted > 1]
        # of one tenant and class in the order they got their slots
        prompts.sort(key=lambda s: self.slots.rank(s)[:2])
        budget = min(self.max_step_tokens, self.step_limit or self.max_step_tokens)
        batch = Batch()
        if len(decoding) > budget:  # while memory is short: those first that have had least
            decoding = sorted(decoding, key=lambda s: s.quantum_used)[:budget]
        for sequence in decoding:
            # a sequence planned earlier may have taken this one's pages
            if sequence.status is Status.RUNNING and self._grow(sequence, batch):
                batch.rows.append(self._row(sequence, 1))
                budget -= 1
        budget -= self._add_drafts(batch.rows, budget // 2 if prompts else budget)
        for sequence in prompts:
            if budget > 0 and sequence.status is Status.RUNNING:
                count = sequence.next_count(budget, self.pool.page_size)
                batch.rows.append(self._row(sequence, count))
                budget -= count
        return batch

    def _row(self, sequence: Sequence, count: int) -> Row:
        return Row(
            sequence,
            start=sequence.start,
            count=count,
            samples=count == sequence.num_wanted and sequence.max_tokens > 0,
            prompt_logits=sequence.wants_prompt_logprobs and sequence.start < sequence.num_prompt,
        )

    def _add_drafts(self, rows: list[Row], budget: int) -> int:
        """Lengthen decoding rows by guesses of what follows, with pages that nobody else needs to grow; how many."""
        budget = min(budget, MAX_STEP_DRAFTS)
        spare = self.pool.num_free - len(self.running)
        added = 0
        for row in rows:
            sequence = row.sequence
            if sequence.drafts is None:
                continue
            room = (len(sequence.pages) + max(spare, 0)) * self.pool.page_size - sequence.num_tokens
            # behind the last draft one more token is drawn
            limit = min(budget - added, room, sequence.max_tokens - sequence.num_output - 1)
            row.drafts = self.drafter.draft(sequence.drafts, limit, len(rows)) if limit > 0 else ()
            row.count += len(row.drafts)
            added += len(row.drafts)
            missing = self.pool.pages_for(row.start + row.count) - len(sequence.pages)
            if missing > 0:
                sequence.pages += self.pool.take(missing)
                spare -= missing
        return added

    def _fill_slots(self) -> None:
        """Give free run slots to those that wait, in order."""
        self.slots.fill()
        while not self.running and self.parked and not self.flights:
            # Everybody waits for pages that parked ones hold: the last of them gives up its own.
            self._preempt(max(self.parked, key=self.slots.rank))
            self.slots.fill()
        for sequence in self.running:
            if sequence.admitted_s is None:
                self.roster.starts(sequence, self.clock())

    # `slots.Memory`

    def may_start(self, sequence: Sequence) -> bool:
        return not (sequence.waits or self._waits_for_leader(sequence) or self.tables.awaits_disk(sequence))

    def pages_needed(self, sequence: Sequence) -> int:
        return self.pool.pages_for(sequence.num_tokens)

    def most_pages(self, sequence: Sequence) -> int:
        return self.pool.pages_for(sequence.num_prompt + sequence.max_tokens)

    def start(self, sequence: Sequence) -> bool:
        """Its pages, if need be those of less urgent ones."""
        if self.tables.start(sequence, len(self.running)):
            return True
        victims = [s for s in (*self.parked, *self.running) if s.level > sequence.level and not s.trickled]
        missing = self.pool.pages_for(sequence.num_tokens) + len(self.running)
        if self.pool.num_free + sum(self.pool.num_sole(s.pages) for s in victims) < missing:
            return False
        if self.flights:
            self.short = True
            return False
        # parked ones of a class first, then those that got their slots last
        place = {s: i for i, s in enumerate(victims)}
        victims.sort(key=lambda s: (s.level, s.status is Status.QUEUED, place[s]), reverse=True)
        for victim in victims:
            self._preempt(victim)
            if self.tables.start(sequence, len(self.running)):
                return True
        return False

    def resume(self, sequence: Sequence) -> bool:
        return self.tables.resume(sequence)

    def num_cached_now(self, sequence: Sequence) -> int:
        """How many tokens of a new sequence's prompt would not have to be computed."""
        return len(self.tables.match(sequence)) * self.pool.page_size

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        leader = sequence.leader
        if leader is None or not self.tables.may_share(sequence):
            return False
        return leader.status is not Status.FINISHED and leader.num_computed < leader.num_prompt

    def flush(self) -> int:
        """Forget all remembered pages; live sequences start theirs anew. Returns how many pages became blank."""
        return self.tables.flush(self.find(None))

    def _grow(self, sequence: Sequence, batch: Batch) -> bool:
        """Make room for the sequence's next token; False when it had to give up its own pages, or has to wait."""
        missing = self.pool.pages_for(sequence.num_tokens) - len(sequence.pages)
        while missing > self.pool.num_free:
            if self.flights:
                self.short = True
                return False
            victim = self._victim({row.sequence for row in batch.rows})
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages += self.pool.take(missing) if missing > 0 else []
        return True

    def _victim(self, planned: set[Sequence]) -> Sequence:
        """Who gives up pages: of the least urgent class the last of those that are parked, else the last that got
        a slot. One that has its slot although more urgent ones wait keeps it as long as there is anyone else."""
        holders = [s for s in (*self.parked, *self.running) if s not in planned]
        holders = [s for s in holders if not s.trickled] or holders
        level = max(s.level for s in holders)
        parked = [s for s in holders if s.level == level and s.status is Status.QUEUED]
        if parked:
            return max(parked, key=self.slots.rank)
        return next(s for s in reversed(holders) if s.level == level)

    def _preempt(self, sequence: Sequence) -> None:
        """Take all pages back. The sequence goes on as soon as it fits again: first of its lane."""
        assert not self.flights
        self.num_preemptions += 1
        sequence.num_preemptions += 1
        self.tables.give_up(sequence)
        self.slots.return_first(sequence)

    # --- launched steps

    def launch(self, batch: Batch) -> None:
        """The device computes this step from here on; the next one may be planned."""
        self.flights.append(batch)
        for row in batch.rows:
            row.sequence.num_flying += row.count
            row.sequence.num_unknown += row.samples

    def land(self, batch: Batch) -> None:
        """A launched step is over: it is committed next, or was for nothing and its tokens are computed again."""
        self.flights.remove(batch)
        for row in batch.rows:
            row.sequence.num_flying -= row.count
            row.sequence.num_unknown -= row.samples

    def why_alone(self, batch: Batch) -> str | None:
        """Why no step can be planned while this one, the last, runs; or None."""
        if self.short:
            return "pages are short"
        drawing = [row.sequence for row in batch.rows if row.samples]
        if any(sequence.constraint is not None for sequence in drawing):
            return "a grammar or a thinking budget needs each token at once"
        if any(sequence.drafts is not None for sequence in drawing):
            return "drafts follow tokens that are known"
        return None

    # --- commit

    def commit(self, batch: Batch, picked: list[Picked]) -> list[Output]:
        """Record what a step gave; finished sequences return their pages at once."""
        outputs = []
        for row, result in zip(batch.rows, picked, strict=True):
            sequence = row.sequence
            row.void = sequence.status is Status.FINISHED
            if row.void:
                continue
            # a row whose mask came too late did not sample: its last token is computed again with the mask
            late = row.samples and result.token_id is None
            sequence.num_computed += row.count - len(row.drafts) - late
            self.tables.remember(sequence)
            self._charge(row)
            if row.prompt_logits:
                known = len(sequence.prompt_logprobs) - row.start  # more than 0 when recomputed
                sequence.prompt_logprobs += result.prompt_logprobs[known:]
            if late:
                continue
            if row.samples:
                outputs.append(self._append(row, result))
            elif sequence.max_tokens == 0 and sequence.num_computed == sequence.num_prompt:
                reason = "stop" if sequence.pooling else "length"
                outputs.append(self._finish(sequence, reason, embedding=result.embedding))
        return outputs

    def _charge(self, row: Row) -> None:
        """Count the prompt tokens that were computed; those computed again were the scheduler's choice."""
        sequence, end = row.sequence, min(row.start + row.count, row.sequence.num_prompt)
        if end > sequence.num_charged:
            self.tenants.charge(sequence.tenant, end - max(row.start, sequence.num_charged), 0)
            sequence.num_charged = end

    def _append(self, row: Row, result: Picked) -> Output:
        """The drawn token and, as long as the draws agree with the drafts before them, those behind the drafts."""
        sequence, drafts = row.sequence, row.drafts
        if sequence.first_token_s is None:
            sequence.first_token_s = self.clock()
        token_ids = [result.token_id]
        logprobs = [result.logprob] if result.logprob is not None else None
        reason = self._push(sequence, result.token_id)
        for draft, (token_id, logprob) in zip(drafts, result.after_drafts):
            if reason is not None or draft != token_ids[-1]:
                break
            row.num_accepted += 1
            token_ids.append(token_id)
            if logprob is not None:
                logprobs.append(logprob)
            reason = self._push(sequence, token_id)
        if drafts:
            self.drafter.learn(sequence.drafts, len(drafts), row.num_accepted)
            sequence.num_computed += row.num_accepted
            self.tables.remember(sequence)
        if reason is None:
            return self._output(sequence, token_ids, logprobs=logprobs, num_drafted=len(drafts))
        if reason == "error":
            return self._finish(sequence, "error", error=sequence.constraint.error)
        matched_id = token_ids[-1] if reason == "stop" and self._is_stop(sequence, token_ids[-1]) else None
        return self._finish(sequence, reason, token_ids, logprobs, matched_id=matched_id, num_drafted=len(drafts))

    def _push(self, sequence: Sequence, token_id: int) -> str | None:
        """The sequence goes on with this token. Returns why it ends with it, or None."""
        sequence.token_ids.append(token_id)
        sequence.quantum_used += 1
        self.tenants.charge(sequence.tenant, 0, 1)
        constraint = sequence.constraint
        if constraint is not None:
            constraint.advance(token_id)
            if constraint.error:
                return "error"
        if self._is_stop(sequence, token_id) or (constraint is not None and constraint.finished):
            return "stop"
        return "length" if sequence.num_output >= sequence.max_tokens else None

    @staticmethod
    def _is_stop(sequence: Sequence, token_id: int) -> bool:
        return token_id in sequence.stop_ids and sequence.num_output > sequence.sampling.min_tokens

    def _finish(self, sequence: Sequence, reason: str, token_ids=(), logprobs=None, **fields) -> Output:
        """The last output of a sequence; it leaves the scheduler and its pages are free."""
        self.slots.remove(sequence)
        output = self._output(sequence, list(token_ids), logprobs=logprobs, finish_reason=reason,
                              usage=sequence.usage(self.clock()), **fields)
        self.tables.end(sequence)
        sequence.status = Status.FINISHED
        self.roster.leave(sequence)
        return output

    def _output(self, sequence: Sequence, token_ids: list[int], **fields) -> Output:
        first = sequence.num_output == len(token_ids)
        if first:  # whoever ends it by a stop string will not see the last one
            fields.setdefault("usage", sequence.usage(self.clock()))
        if sequence.sampling.prompt_logprobs and sequence.index == 0 and first:
            # nothing precedes the first prompt token, so it has no log-probability
            fields["prompt_logprobs"] = [None, *sequence.prompt_logprobs]
        return Output(sequence.rid, sequence.index, token_ids, **fields)

    # --- ending from outside

    def find(self, rid: str | None) -> list[Sequence]:
        """Live sequences of one request, or all when rid is None."""
        return self.roster.find(rid)

    def end(self, sequences: list[Sequence], reason: str, error: str | None = None) -> list[Output]:
        """End live sequences now ("abort" or "error"); their pages are free when this returns."""
        return [self._finish(sequence, reason, error=error) for sequence in sequences]

    def expire(self) -> list[Output]:
        """End the sequences whose deadline has passed, with finish_reason "timeout"."""
        return self.end(self.roster.overdue(self.clock()), "timeout")

    def reset(self) -> None:
        """Start the ledger anew, with every page blank. Only while nothing lives."""
        self.tables.reset()

    def check(self) -> None:
        """Prove pages and lists consistent. Raises AssertionError."""
        slots = self.slots
        without = [*slots.waiting, *slots.unready]
        live = {*self.running, *self.parked, *without}
        assert len(live) == len(slots), "a sequence is listed twice"
        assert len(self.running) <= slots.max_running
        for sequence in live:
            expected = Status.RUNNING if sequence in self.running else Status.QUEUED
            assert sequence.status is expected
            assert bool(sequence.pages) is (sequence not in without)
            rows = [row for batch in self.flights for row in batch.rows if row.sequence is sequence]
            assert sequence.num_flying == sum(row.count for row in rows)
            assert sequence.num_unknown == sum(row.samples for row in rows)
        self.roster.check(live)
        self.tables.check(live)
