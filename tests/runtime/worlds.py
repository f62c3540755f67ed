"""A scheduler with a clock of its own and a scripted model, for tests of policies."""

from crane.runtime.batch import Batch, Picked
from crane.runtime.overlap import Overlap
from crane.runtime.pages import PagePool
from crane.runtime.recovery import Recovery
from crane.runtime.scheduler import Scheduler
from crane.runtime.sequence import Sequence, Status
from crane.runtime.types import Generate, SamplingParams


class Script:
    """A runner whose tokens say which ones they are: 1000 and how many come before. broken: of so many calls from now
    on every second one raises."""

    def __init__(self):
        self.broken = 0

    def run(self, batch: Batch) -> list[Picked]:
        return [Picked(1000 + row.start + row.count if row.samples else None) for row in batch.rows]

    def launch(self, batch: Batch, before: dict | None) -> dict:
        for row in batch.rows:
            ids = row.input_ids({s: 7000 + i for i, s in enumerate(before or ())})
            expected = row.sequence.token_ids[row.start : row.start + row.count]
            assert ids[: len(expected)] == expected
            assert all(i < -7000 for i in ids[len(expected) :]) and len(ids) == row.count
        self._fail()
        return {row.sequence: picked for row, picked in zip(batch.rows, self.run(batch))}

    def collect(self, launched: dict) -> list[Picked]:
        self._fail()
        return list(launched.values())

    def _fail(self) -> None:
        if self.broken:
            self.broken -= 1
            if self.broken % 2:
                raise RuntimeError("a launched step failed")


class World:
    """Requests go in by `add`; a `step` takes a second. tokens: what each choice got; ended: why."""

    def __init__(self, *, num_pages=64, page_size=4, num_host_pages=0, preemption="recompute", overlap=False,
                 **options):
        self.now_s = 0.0
        options = {"max_running": 4, "quantum_tokens": 2, "max_step_tokens": 16, "max_model_len": 64} | options
        pool = PagePool(num_pages, page_size, num_host_pages)
        self.scheduler = Scheduler(pool, clock=lambda: self.now_s, **options)
        self.scheduler.tables.costs.policy = preemption
        self.live: dict[tuple[str, int], Sequence] = {}
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ended: dict[tuple[str, int], str] = {}
        self.started: list[Sequence] = []  # in the order in which they got their first slots
        self.script = Script()
        self._recovery = Recovery(self.script.run)
        self.overlap = Overlap(self.scheduler, self.script, self._recovery, None if overlap else "off")
        self._num_added = 0

    def add(self, num_prompt=4, max_tokens=4, kind=None, rid=None, stop_after=None, **fields) -> Sequence:
        """A request of choices that all get `max_tokens` tokens, or end with the one after `stop_after`. kind: prompts
        of one kind begin alike."""
        self._num_added += 1
        rid = rid or f"r{self._num_added}"
        first = 1_000_000 * (kind if kind is not None else 1000 + self._num_added)
        n = fields.pop("n", 1)
        stops = () if stop_after is None else (1000 + num_prompt + stop_after,)
        sampling = SamplingParams(max_tokens=max_tokens, n=n, stop_token_ids=stops)
        request = Generate(rid, [first + i for i in range(num_prompt)], sampling, **fields)
        sequences = [Sequence(request, index, 0, frozenset(), self.now_s) for index in range(n)]
        for sequence in sequences:
            sequence.leader = sequences[0] if sequence is not sequences[0] else None
            self.live[rid, sequence.index], self.tokens[rid, sequence.index] = sequence, []
            self.scheduler.enqueue(sequence)
        return sequences[0]

    def step(self):
        """Expire, plan, compute, commit, as `Engine.step` does; returns the batch, empty if launching it failed."""
        self.take(self.scheduler.expire())
        flight, batch = self.overlap.next or self._launch(), Batch()
        if flight is not None:
            batch = flight.batch
            if flight.launched is not None and self.overlap.may_follow(batch):
                self._launch()
                self.scheduler.check()
            found = self.overlap.read(flight)
            if found is not None:
                self.take(self.scheduler.commit(batch, found[0]))
        if not self.scheduler.has_work:
            self.overlap.forget()
        self.now_s += 1.0
        self.scheduler.check()
        return batch

    @property
    def num_faults(self) -> int:
        return self._recovery.num_faults

    def _launch(self):
        batch = self.scheduler.plan()
        self.started += [s for s in self.scheduler.running if s.admitted_s == self.now_s and s not in self.started]
        return self.overlap.launch(batch) if batch.rows else None

    def take(self, outputs) -> None:
        """Note what sequences got, and that it is what the model says."""
        for output in outputs:
            key = output.rid, output.index
            self.tokens[key] += output.token_ids
            sequence = self.live[key]
            assert self.tokens[key] == [1000 + sequence.num_prompt + i for i in range(len(self.tokens[key]))]
            if output.finish_reason is not None:
                assert output.finish_reason != "length" or len(self.tokens[key]) == sequence.max_tokens
                assert output.finish_reason != "stop" or {self.tokens[key][-1]} == sequence.stop_ids
                assert sequence.status is Status.FINISHED and not sequence.pages
                self.ended[key] = output.finish_reason
                del self.live[key]

    def drain(self, limit: int = 20_000) -> None:
        """Until nobody is left; no step on the way is idle."""
        while self.scheduler.has_work:
            faults = self.num_faults
            batch = self.step()
            assert batch.rows or self.num_faults > faults or not self.scheduler.has_work, "work, but the step is empty"
            limit -= 1
            assert limit > 0, "the scheduler does not come to an end"
        pool = self.scheduler.pool
        assert pool.num_free == pool.num_pages and pool.host.num_free == pool.host.size
