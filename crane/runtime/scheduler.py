"""Who computes what in each step: `plan` -> Batch, `commit` -> outputs. Arithmetic only, no torch.

Policy. Sequences that want to run stand in one queue, first come first served.
At most `max_running` have a run slot and take part in every step; after
`quantum_tokens` decoded tokens a running one goes back to the queue's end if
others wait for its slot. It keeps its pages there, so coming back costs nothing.

Each step gives every running sequence that decodes its one token, then spends what
is left of `max_step_tokens` on prompts, oldest first. A prompt gets all of its pages
when it gets its slot, so half-computed prompts cannot starve each other. When a
growing sequence finds no free page, the one that came last gives up its pages
and is recomputed later: its tokens, and the noise of its next ones, stay as they are.

A full page is remembered by its content. A sequence that gets pages shares those whose content it starts with, and
computes only what follows. The choices of one request wait for the first one's prompt, and then share it.
"""

import time
from collections import deque

from crane.runtime.batch import Batch, Picked, Row
from crane.runtime.drafts import MAX_STEP_DRAFTS, Drafter
from crane.runtime.pages import PagePool
from crane.runtime.sequence import Sequence, Status
from crane.runtime.types import Output


class Scheduler:
    """Owns all live sequences and all pages. Every sequence is in exactly one of `queue`, `running`."""

    def __init__(self, pool: PagePool, *, max_running: int, quantum_tokens: int, max_step_tokens: int,
                 max_model_len: int, prefix_cache: bool = True, drafter: Drafter | None = None):
        assert max_model_len <= pool.num_pages * pool.page_size, "one sequence may not outgrow the pool"
        self.pool = pool
        self.max_running = max_running
        self.quantum_tokens = quantum_tokens
        self.max_step_tokens = max(max_step_tokens, max_running)
        self.max_model_len = max_model_len
        self.queue: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.prefix_cache = prefix_cache
        self.drafter = drafter  # for sequences that have `drafts`
        self.num_preemptions = 0
        self.num_cached_tokens = 0  # prompt tokens that did not have to be computed

    @property
    def has_work(self) -> bool:
        return bool(self.queue or self.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that have not started yet."""
        return sum(sequence.admitted_s is None for sequence in self.queue)

    def enqueue(self, sequence: Sequence) -> None:
        """Take a new sequence in. Its prompt is shorter than `max_model_len`."""
        assert 0 < sequence.num_prompt < self.max_model_len or sequence.max_tokens == 0
        sequence.max_tokens = min(sequence.max_tokens, self.max_model_len - sequence.num_prompt)
        self.queue.append(sequence)

    # --- plan

    def plan(self) -> Batch:
        """The next step. Empty only when there is nothing to do, or all that is left waits for a grammar."""
        self._yield_slots()
        self._fill_slots()
        decoding = [s for s in self.running if s.num_wanted == 1 and not s.waits]
        prompts = [s for s in self.running if s.num_wanted > 1]
        budget = self.max_step_tokens
        batch = Batch()
        for sequence in decoding:
            # a sequence planned earlier may have taken this one's pages
            if sequence.status is Status.RUNNING and self._grow(sequence, batch):
                batch.rows.append(self._row(sequence, 1))
                budget -= 1
        budget -= self._add_drafts(batch.rows, budget // 2 if prompts else budget)
        for sequence in prompts:
            if budget > 0 and sequence.status is Status.RUNNING:
                count = min(sequence.num_wanted, budget)
                batch.rows.append(self._row(sequence, count))
                budget -= count
        return batch

    def _row(self, sequence: Sequence, count: int) -> Row:
        return Row(
            sequence,
            start=sequence.num_computed,
            count=count,
            samples=count == sequence.num_wanted and sequence.max_tokens > 0,
            prompt_logits=sequence.wants_prompt_logprobs and sequence.num_computed < sequence.num_prompt,
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
            room = (len(sequence.pages) + max(spare, 0)) * self.pool.page_size - len(sequence.token_ids)
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

    def _yield_slots(self) -> None:
        """Sequences past their quantum give their slots to as many that wait."""
        wanted = sum(not s.waits for s in self.queue) - (self.max_running - len(self.running))
        for sequence in list(self.running):
            if wanted <= 0:
                break
            if sequence.quantum_used >= self.quantum_tokens:
                self.running.remove(sequence)
                sequence.status = Status.QUEUED
                self.queue.append(sequence)
                wanted -= 1

    def _fill_slots(self) -> None:
        """Give free run slots to the queue, in order."""
        self._admit()
        while not self.running:
            head = next((s for s in self.queue if not s.waits), None)
            if head is None:
                return
            # Everybody waits for pages that others in the queue hold: the last holder gives up its own.
            holder = next(s for s in reversed(self.queue) if s.pages and s is not head)
            self.num_preemptions += 1
            holder.num_preemptions += 1
            self._release(holder)
            self._admit()

    def _admit(self) -> None:
        """One pass over the queue. A sequence without pages waits until its whole past fits and every
        running one can still grow by a page; none behind it may start before it, but those who hold
        their pages run on."""
        waiting = deque()
        blocked = False
        while self.queue and len(self.running) < self.max_running:
            sequence = self.queue.popleft()
            starts = not sequence.pages
            if starts and (blocked or sequence.waits or self._waits_for_leader(sequence)):
                waiting.append(sequence)
                continue
            if not (self._start(sequence) if starts else self._resume(sequence)):
                blocked = blocked or starts
                waiting.append(sequence)
                continue
            sequence.status = Status.RUNNING
            sequence.quantum_used = 0
            if sequence.admitted_s is None:
                sequence.admitted_s = time.monotonic()
            self.running.append(sequence)
        self.queue = waiting + self.queue

    def _start(self, sequence: Sequence) -> bool:
        """Pages for the whole past of a sequence without any: those it can share, and new ones; False: too few."""
        nodes = self.pool.match(sequence.token_ids, sequence.salt) if self._may_share(sequence) else []
        missing = self.pool.pages_for(len(sequence.token_ids)) - len(nodes)
        if missing + len(self.running) > self.pool.num_free - self.pool.num_kept_of(nodes):
            return False
        shared = [node.page for node in nodes]
        self.pool.share(shared)
        sequence.pages = shared + self.pool.take(missing)
        sequence.nodes = nodes
        sequence.num_computed = len(nodes) * self.pool.page_size
        if sequence.admitted_s is None:
            sequence.num_cached = sequence.num_computed
            self.num_cached_tokens += sequence.num_cached
        return True

    def _resume(self, sequence: Sequence) -> bool:
        """The next token's page for a sequence that kept its pages; False: none is free."""
        missing = max(self.pool.pages_for(len(sequence.token_ids)) - len(sequence.pages), 0)
        if missing > self.pool.num_free:
            return False
        sequence.pages += self.pool.take(missing)
        return True

    def _may_share(self, sequence: Sequence) -> bool:
        """What is wanted of every prompt position has to be computed at every position."""
        return self.prefix_cache and not sequence.wants_prompt_logprobs and sequence.pooling != "mean"

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        leader = sequence.leader
        if leader is None or not self._may_share(sequence):
            return False
        return leader.status is not Status.FINISHED and leader.num_computed < leader.num_prompt

    def _remember(self, sequence: Sequence) -> None:
        """Enter the pages that a step has filled into the prefix index."""
        size = self.pool.page_size
        while self.prefix_cache and (len(sequence.nodes) + 1) * size <= sequence.num_computed:
            place = len(sequence.nodes)
            tokens = tuple(sequence.token_ids[place * size : (place + 1) * size])
            parent = sequence.nodes[-1] if sequence.nodes else None
            node = self.pool.remember(parent, sequence.salt, tokens, sequence.pages[place])
            if node.page != sequence.pages[place]:  # another sequence was first: one copy serves both
                self.pool.share([node.page])
                self.pool.release([sequence.pages[place]])
                sequence.pages[place] = node.page
            sequence.nodes.append(node)

    def flush(self) -> int:
        """Forget all remembered pages; live sequences start theirs anew. Returns how many pages became blank."""
        for sequence in self.find(None):
            sequence.salt = f"{sequence.salt}\0flushed"  # what it remembers from here on has no known start
            sequence.nodes = []
        return self.pool.flush()

    def _grow(self, sequence: Sequence, batch: Batch) -> bool:
        """Make room for the sequence's next token; False when it had to give up its own pages."""
        missing = self.pool.pages_for(len(sequence.token_ids)) - len(sequence.pages)
        while missing > self.pool.num_free:
            victim = self._victim({row.sequence for row in batch.rows})
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages += self.pool.take(missing) if missing > 0 else []
        return True

    def _victim(self, planned: set[Sequence]) -> Sequence:
        """Who gives up pages: the last in the queue that holds some, else the last that got a slot."""
        for sequence in reversed(self.queue):
            if sequence.pages:
                return sequence
        return next(sequence for sequence in reversed(self.running) if sequence not in planned)

    def _preempt(self, sequence: Sequence) -> None:
        """Take all pages back. The sequence is recomputed as soon as it fits again: first in the queue."""
        self.num_preemptions += 1
        sequence.num_preemptions += 1
        self._release(sequence)
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        else:
            self.queue.remove(sequence)
        sequence.status = Status.QUEUED
        self.queue.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.nodes = []
        sequence.num_computed = 0

    # --- commit

    def commit(self, batch: Batch, picked: list[Picked]) -> list[Output]:
        """Record what a step gave; finished sequences return their pages at once."""
        outputs = []
        for row, result in zip(batch.rows, picked, strict=True):
            sequence = row.sequence
            if sequence.status is Status.FINISHED:  # aborted while the step ran
                continue
            # a row whose mask came too late did not sample: its last token is computed again with the mask
            late = row.samples and result.token_id is None
            sequence.num_computed += row.count - len(row.drafts) - late
            self._remember(sequence)
            if row.prompt_logits:
                known = len(sequence.prompt_logprobs) - row.start  # more than 0 when recomputed
                sequence.prompt_logprobs += result.prompt_logprobs[known:]
            if late:
                continue
            if row.samples:
                outputs.append(self._append(row, result))
            elif sequence.max_tokens == 0 and sequence.num_wanted == 0:
                reason = "stop" if sequence.pooling else "length"
                outputs.append(self._finish(sequence, reason, embedding=result.embedding))
        return outputs

    def _append(self, row: Row, result: Picked) -> Output:
        """The drawn token and, as long as the draws agree with the drafts before them, those behind the drafts."""
        sequence, drafts = row.sequence, row.drafts
        if sequence.first_token_s is None:
            sequence.first_token_s = time.monotonic()
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
            self._remember(sequence)
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
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        else:
            self.queue.remove(sequence)
        output = self._output(sequence, list(token_ids), logprobs=logprobs, finish_reason=reason,
                              usage=sequence.usage(), **fields)
        self._release(sequence)
        sequence.status = Status.FINISHED
        return output

    def _output(self, sequence: Sequence, token_ids: list[int], **fields) -> Output:
        first = sequence.num_output == len(token_ids)
        if first:  # whoever ends it by a stop string will not see the last one
            fields.setdefault("usage", sequence.usage())
        if sequence.sampling.prompt_logprobs and sequence.index == 0 and first:
            # nothing precedes the first prompt token, so it has no log-probability
            fields["prompt_logprobs"] = [None, *sequence.prompt_logprobs]
        return Output(sequence.rid, sequence.index, token_ids, **fields)

    # --- ending from outside

    def find(self, rid: str | None) -> list[Sequence]:
        """Live sequences of one request, or all when rid is None."""
        return [s for s in (*self.running, *self.queue) if rid is None or s.rid == rid]

    def end(self, sequences: list[Sequence], reason: str, error: str | None = None) -> list[Output]:
        """End live sequences now ("abort" or "error"); their pages are free when this returns."""
        return [self._finish(sequence, reason, error=error) for sequence in sequences]

    def check(self) -> None:
        """Prove pages and lists consistent. Raises AssertionError."""
        live = [*self.running, *self.queue]
        assert len(set(live)) == len(live), "a sequence is listed twice"
        assert len(self.running) <= self.max_running
        for sequence in live:
            expected = Status.RUNNING if sequence in self.running else Status.QUEUED
            assert sequence.status is expected
            assert sequence.num_computed <= len(sequence.pages) * self.pool.page_size
        self.pool.check(sequence.pages for sequence in live)
