"""The engine: requests in, outputs out, one step at a time. No sockets, no text, no threads."""

import logging
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from crane.kernels import native, registry
from crane.models.config import load_config
from crane.models.files import open_checkpoint
from crane.models.registry import load_model
from crane.models.tokenizer import load_tokenizer
from crane.runtime import device as devices
from crane.runtime.drafts import Drafter
from crane.runtime.forecast import Forecast
from crane.runtime.grammar import GrammarCompiler, wait_any
from crane.runtime.graphs import DecodeGraphs
from crane.runtime.kv_cache import open_disk
from crane.runtime.kv_memory import KVMemory
from crane.runtime.metrics import Metrics
from crane.runtime.overlap import Flight, Overlap
from crane.runtime.recorded import RecordedSteps
from crane.runtime.recovery import Recovery
from crane.runtime.runner import ModelRunner
from crane.runtime.sampler import Sampler
from crane.runtime.scheduler import Scheduler
from crane.runtime.sequence import Sequence, Status
from crane.runtime.settings import Settings
from crane.runtime.timeline import Timelines
from crane.runtime.types import Accepted, EngineInfo, EngineStats, Generate, Output, Plan, Rejected

log = logging.getLogger("crane.engine")

# When every sequence waits for its grammar, the engine looks for new messages so often.
_GRAMMAR_POLL_S = 0.005


class Engine:
    """One model on one device. All calls come from the thread that made it.

    Raises ModelError or SettingsError when the model cannot be served as asked.
    """

    def __init__(self, settings: Settings, progress: Callable[[int, int], None] | None = None):
        self._started_s = time.monotonic()
        devices.set_threads(settings)
        checkpoint = open_checkpoint(settings.model_path, settings.format)
        config = load_config(checkpoint, settings.model_type)
        device = devices.pick_device(settings)
        self.settings = settings = devices.pick_page_size(settings, device)
        registry.configure(settings.kernels, settings.torch_kernels, device)
        devices.load_native(settings, device)
        dtype = devices.pick_dtype(settings, device, config.dtype)
        kv_dtype = devices.pick_kv_dtype(settings, device, dtype)
        disk = open_disk(settings, checkpoint, config, device, dtype, kv_dtype)
        self._eos_ids = frozenset(config.eos_token_ids)
        with ThreadPoolExecutor(1) as pool:  # the tokenizer is read while the weights are
            tokenizer = pool.submit(load_tokenizer, checkpoint)
            model = load_model(checkpoint, config, device, dtype, progress, devices.is_exact(settings))
            tokenizer = tokenizer.result()
        if settings.screen and settings.recorded_steps:
            model.head.add_screen()
        # ids that both know: a model's embedding is often padded, and some fine-tunes add tokens that it lacks
        vocab_size = min(tokenizer.vocab_size, config.vocab_size)
        self._grammars = GrammarCompiler(tokenizer, vocab_size, self._eos_ids)
        self.memory = KVMemory(settings, config, device, kv_dtype, disk)
        self._graphs = self._recorded = None
        sampler = Sampler(vocab_size, self.memory.pages.device)
        shape = self.memory.pages, settings.max_concurrent, self.memory.max_model_len
        if settings.recorded_steps and native.library() is not None:
            self._recorded = RecordedSteps(model, *shape, sampler)
        elif settings.cuda_graphs:
            self._graphs = DecodeGraphs(model, *shape)
        self.runner = ModelRunner(model, self.memory.pages, sampler, self._recorded or self._graphs)
        self.scheduler = Scheduler(
            self.memory.pool, max_running=settings.max_concurrent, quantum_tokens=settings.decode_tokens_per_seq,
            max_step_tokens=settings.max_step_tokens, max_model_len=self.memory.max_model_len,
            prefix_cache=settings.prefix_cache, output_weight=settings.fair_output_weight,
            drafter=Drafter(settings), costs=self.memory.costs, disk=self.memory.disk,
        )  # fmt: skip
        self._compiling: list[Sequence] = []  # new sequences whose grammar may yet turn out to be wrong
        self._stats = EngineStats(num_pages=self.memory.pool.num_pages)
        self._recovery = Recovery(lambda batch: self.runner.run(batch), self.runner.free_memory)
        self._overlap = Overlap(self.scheduler, self.runner, self._recovery, devices.why_no_overlap(settings, device))
        self._metrics = Metrics()
        self._timelines = Timelines(settings.trace_requests)
        self._prefill, self._decode = _Rate(), _Rate()
        self._forecast = Forecast(self.scheduler, settings.max_queue)
        self.info = EngineInfo(
            pid=os.getpid(), model_path=settings.model_path, model_type=config.model_type,
            dtype=str(dtype).removeprefix("torch."), device=str(device), max_model_len=self.memory.max_model_len,
            vocab_size=vocab_size, num_pages=self.memory.pool.num_pages, page_size=settings.page_size,
            max_concurrent=settings.max_concurrent, decode_tokens_per_seq=settings.decode_tokens_per_seq,
            kv_capacity=self.memory.capacity(),
        )  # fmt: skip
        log.info("%s on %s in %s: %s", config.model_type, device, self.info.dtype, self.memory.describe())

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def prepare(self) -> bool:
        """For a moment without work: make later steps faster by a little. True when there is more to do."""
        return self._graphs is not None and self._graphs.capture_next()

    def add(self, request: Generate) -> Accepted | Rejected:
        """Queue a request. Whatever is wrong with it is said in the `Rejected`."""
        problem = self._problem(request)
        if problem:
            return Rejected(request.rid, *problem)
        sampling = request.sampling
        # 63 bits: torch has no unsigned 64-bit integers
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        sequences = [Sequence(request, index, seed, self._eos_ids) for index in range(sampling.n)]
        for sequence in sequences:
            sequence.leader = sequences[0] if sequence is not sequences[0] else None
            sequence.constraint = self._grammars.constraint(sampling, sequence.stop_ids)
            sequence.drafts = self.scheduler.drafter.drafts_for(request, sequence.token_ids)
            self.scheduler.enqueue(sequence)
            self._timelines.begin(sequence, request.timeline)
        if sampling.grammar is not None:
            self._compiling += sequences
        self._stats.total_requests += 1
        self._stats.prompt_tokens += len(request.prompt_ids)
        return Accepted(request.rid)

    def _problem(self, request: Generate) -> tuple | None:
        """Why a request is not taken: (code, message[, retry_after_s]). The API checks first and names fields;
        this is the last line of defence of the tensors behind it."""
        ids, sampling, info = request.prompt_ids, request.sampling, self.info
        if self.scheduler.find(request.rid):
            return "duplicate_rid", f"a request with id {request.rid!r} is running"
        if sampling.problem():
            return "bad_request", sampling.problem()
        if not ids:
            return "bad_request", "the prompt is empty"
        if min(ids) < 0 or max(ids) >= info.vocab_size:
            return "bad_request", f"prompt token ids must be in [0, {info.vocab_size})"
        named = (*sampling.stop_token_ids, *sampling.logit_bias, *sampling.logprob_ids, *request.prediction_ids)
        if any(not 0 <= i < info.vocab_size for i in named):
            fields = "stop_token_ids, logit_bias keys, logprob_ids and prediction_ids"
            return "bad_request", f"{fields} must be in [0, {info.vocab_size})"
        if request.pooling not in (None, "last", "mean") or (request.pooling and sampling.n != 1):
            return "bad_request", "pooling must be last or mean, of one choice"
        thinking = sampling.thinking
        if thinking and any(not 0 <= i < info.vocab_size for i in (*thinking.start_ids, *thinking.end_ids)):
            return "bad_request", f"thinking.start_ids and end_ids must be in [0, {info.vocab_size})"
        if sampling.grammar is not None and (problem := self._grammars.problem(sampling.grammar)):
            return "bad_request", problem
        if len(ids) + min(0 if request.pooling else sampling.max_tokens, 1) > info.max_model_len:
            return "too_long", f"a prompt of {len(ids)} tokens exceeds the limit of {info.max_model_len} tokens"
        if not self._forecast.has_place(request.tenant):
            text, retry_after_s = self._forecast.refuse(request.tenant)
            return "queue_full", text, retry_after_s
        return None

    def plan(self, request: Generate) -> Plan:
        """What would become of a request now. It is not taken."""
        return self._forecast.plan(request, self._problem(request))

    def abort(self, rid: str | None, index: int | None = None) -> list[Output]:
        """End one request, one choice of it, or all (rid None): their last outputs, with finish_reason "abort".

        Unknown ids give none.
        """
        ended = self.scheduler.end([s for s in self.scheduler.find(rid) if index in (None, s.index)], "abort")
        rids = {output.rid for output in ended}
        for output in ended:
            self._metrics.end(output, "abort" if index is None else "stop")
        if index is None:
            self._stats.aborted_requests += len(rids)
        else:  # it got all it wanted
            self._stats.completed_requests += sum(not self.scheduler.find(rid) for rid in rids)
        return self._ended(ended) + self._move(self.memory.pool.due_copies())

    def flush_cache(self) -> int:
        """Forget all remembered prefixes; returns how many pages become blank."""
        return self.scheduler.flush()

    def rest(self) -> None:
        """For a second without work: prove that every page is accounted for, and prepare for the first grammar.

        A ledger that is wrong starts anew, empty.
        """
        self._grammars.prepare()
        try:
            self.scheduler.check()
        except AssertionError as error:
            self._stats.ledger_faults += 1
            log.critical("the ledger of KV pages is wrong (%s): what was cached is forgotten", error)
            self.scheduler.reset()

    def fail_all(self, message: str) -> list[Output]:
        """End every request with an error: the last resort after a fault nobody in particular caused."""
        return self._ended(self._fail(self.scheduler.find(None), message))

    def trace(self) -> dict:
        """The timelines of the last requests that have one, as a Chrome trace."""
        return self._timelines.trace()

    def step(self) -> list[Output]:
        """Plan, run and commit one step. A fault in it fails the request that is to blame, nobody else's."""
        return self._ended(self._step())

    def _ended(self, outputs: list[Output]) -> list[Output]:
        """`outputs`, which may be the last ones of their requests."""
        if not self.has_work:
            self._overlap.forget()
        return self._timelines.end(outputs)

    def _step(self) -> list[Output]:
        outputs = self._refuse_grammars() + self._expire()
        flight = self._overlap.next or self._launch(outputs)
        if flight is None:
            if not outputs and self.has_work:
                self.memory.wait()
                wait_any([s.constraint for s in self.scheduler.find(None) if s.constraint], _GRAMMAR_POLL_S)
            return outputs
        if flight.launched is not None and self._overlap.may_follow(flight.batch):
            self._launch(outputs)
            if self._overlap.next is not flight:  # all have ended over it
                return outputs
        return outputs + self._commit(flight)

    def _launch(self, outputs: list[Output]) -> Flight | None:
        """Plan a step and launch it, if there is anything to compute. outputs: gets what went wrong."""
        batch = self.scheduler.plan()
        if lost := self._move(batch.copies):
            outputs += lost
            return None
        return self._overlap.launch(batch) if batch.rows else None

    def _commit(self, flight: Flight) -> list[Output]:
        """What a step gave."""
        found, outputs, batch = self._overlap.read(flight), [], flight.batch
        if found is None:
            return outputs
        picked, broken, since_s = found
        for place, error in broken.items():
            live = self.scheduler.find(batch.rows[place].sequence.rid)
            outputs += self._fail(live, f"the engine failed on this request: {type(error).__name__}")
        self.scheduler.step_limit = self._recovery.max_tokens
        committed = self.scheduler.commit(batch, picked)
        self._count(batch, committed, time.monotonic() - since_s)
        self._metrics.step(batch, committed)
        self._timelines.step(batch, since_s, committed)
        return outputs + committed + self._move(self.memory.pool.due_copies())

    def _move(self, copies: list[tuple[int, int]]) -> list[Output]:
        """Move pages before the step. When that fails nobody knows what pages contain: everything starts anew."""
        try:
            self.memory.move(copies)
        except Exception as error:  # whatever went wrong, its requests must be answered
            log.exception("copying %d pages failed", len(copies))
            self.flush_cache()
            return self.fail_all(f"the engine lost its cache: {type(error).__name__}")
        return []

    def close(self) -> None:
        """Write what is still to be written to disk, for a few seconds at most."""
        self.memory.close()

    def _refuse_grammars(self) -> list[Output]:
        """End sequences whose grammar turns out not to compile."""
        outputs = []
        for sequence in list(self._compiling):
            error = sequence.constraint.check()
            if error and sequence.status is not Status.FINISHED:
                outputs += self._fail([sequence], error)
            if error or not sequence.waits:
                self._compiling.remove(sequence)
        return outputs

    def _expire(self) -> list[Output]:
        """End sequences whose time is over."""
        ended = self.scheduler.expire()
        for output in ended:
            self._metrics.end(output)
        self._stats.timed_out_requests += len({output.rid for output in ended})
        return ended

    def _fail(self, sequences: list[Sequence], message: str) -> list[Output]:
        ended = self.scheduler.end(sequences, "error", message)
        for output in ended:
            self._metrics.end(output)
        self._stats.failed_requests += len({output.rid for output in ended})
        return ended

    def _count(self, batch, outputs: list[Output], elapsed_s: float) -> None:
        stats = self._stats
        stats.steps += 1
        stats.generated_tokens += sum(len(output.token_ids) for output in outputs)
        failed = {output.rid for output in outputs if output.finish_reason == "error"}
        finished = {output.rid for output in outputs if output.finish_reason} - failed
        stats.failed_requests += len(failed)
        stats.completed_requests += sum(not self.scheduler.find(rid) for rid in finished)
        decoding = [row for row in batch.rows if row.count == 1 + len(row.drafts)]
        decoded = sum(row.count for row in decoding)
        # a mixed step's time goes to both by their shares of its tokens
        share_s = elapsed_s / batch.num_tokens
        self._decode.add(sum(1 + row.num_accepted for row in decoding if not row.void), decoded * share_s)
        self._prefill.add(batch.num_tokens - decoded, (batch.num_tokens - decoded) * share_s)
        self._forecast.step(batch.num_tokens, elapsed_s)
        if decoded == batch.num_tokens:
            self.scheduler.drafter.cost.learn(decoded, elapsed_s)
        if batch.num_tokens > decoded:
            self.memory.costs.computed(batch.num_tokens - decoded, (batch.num_tokens - decoded) * share_s)

    def metrics(self) -> dict:
        """All that is counted: `Metrics.snapshot`, and the counters of `stats` by name."""
        return self._metrics.snapshot() | {"stats": msgspec.to_builtins(self.stats())}

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        stats, scheduler = self._stats, self.scheduler
        stats.preemptions = scheduler.num_preemptions
        stats.swaps = scheduler.tables.num_swaps
        stats.host_cached_tokens = scheduler.tables.num_host_tokens
        stats.disk_cached_tokens = scheduler.tables.num_disk_tokens
        self.memory.count(stats)
        stats.cached_tokens = scheduler.tables.num_cached_tokens
        drafter = scheduler.drafter
        stats.drafts, stats.drafted_tokens = drafter.num_drafts, drafter.num_drafted
        stats.accepted_tokens = drafter.num_accepted
        stats.step_faults, stats.memory_shortages = self._recovery.num_faults, self._recovery.num_shortages
        stats.avg_decode_tokens_per_sec = round(self._decode.value, 2)
        stats.avg_prefill_tokens_per_sec = round(self._prefill.value, 2)
        stats.waiting_sequences = scheduler.num_waiting
        sign = -1 if self.settings.priority_order == "highest-first" else 1
        stats.waiting_by_priority = {sign * level: num for level, num in scheduler.roster.waiting_by_level.items()}
        stats.waiting_tenants = len(scheduler.roster.waiting_by_tenant)
        stats.active_sequences = scheduler.num_live - stats.waiting_sequences
        stats.free_pages = scheduler.pool.num_free
        stats.overlap = self._overlap.report()
        steps = {"cuda_graphs": self._graphs, "recorded_steps": self._recorded}
        stats.kernels = registry.report() | {name: each.state if each else "not used" for name, each in steps.items()}
        stats.kernels["screen"] = self.runner.model.head.screened or "not used"
        stats.uptime_s = round(time.monotonic() - self._started_s, 3)
        return stats


class _Rate:
    """Tokens per second over all time spent on them."""

    def __init__(self):
        self.tokens = 0
        self.seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds

    @property
    def value(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0
