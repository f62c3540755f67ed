"""One choice of one request on its way through the engine. Torch-free."""

import enum
import secrets
import time

from crane.runtime.types import Generate, SamplingParams, Usage


# What deterministic requests add to their salt: pages that others computed may differ from theirs in the last
# bits. Nobody else can give it.
_DETERMINISTIC = f"\0{secrets.token_hex(16)}"
# Their prompts are computed in pieces that begin and end at multiples of so many tokens (or of a page).
_FIXED_CHUNK = 128


class Status(enum.Enum):
    """Where a sequence stands with the scheduler."""

    QUEUED = "queued"  # wants to run: new, giving way after its quantum, or to be recomputed
    RUNNING = "running"  # has a run slot; part of every step
    FINISHED = "finished"


class Sequence:
    """Prompt, output and pages of one choice. Written by Scheduler only.

    token_ids: prompt, then output. num_computed: tokens whose K/V are in `pages`, or while it has none in `host_pages`.
    A sequence has no phase: it wants `len(token_ids) - num_computed` tokens computed,
    be they a prompt, a recomputed past or the one token sampled last.

    The next step may be planned while steps that were launched still run. What they do to the sequence is counted
    apart until they are over: num_flying tokens that they compute, num_unknown that they draw, which follow
    `token_ids` and which only the device knows yet. Nothing else knows of them.
    """

    def __init__(self, request: Generate, index: int, seed: int, eos_ids: frozenset[int], now_s: float | None = None):
        sampling = request.sampling
        self.rid = request.rid
        self.index = index
        self.sampling: SamplingParams = sampling
        self.seed = seed
        self.token_ids = list(request.prompt_ids)
        self.num_prompt = len(self.token_ids)
        self.pooling = request.pooling  # "last" | "mean": the hidden state is wanted, no token is drawn
        self.max_tokens = 0 if request.pooling else sampling.max_tokens
        self.stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos_ids)
        self.num_computed = 0
        self.num_flying = 0
        self.num_unknown = 0
        self.num_preemptions = 0  # how often it gave up its pages
        self.pages: list[int] = []
        self.host_pages: list[int] = []  # in host memory, which have what it had to give up its pages for
        self.nodes: list = []  # what the first of them contain, as `PagePool` remembers it
        self.disk_job = None  # `disk.Job` that reads pages it starts with; False: there are none
        self.deterministic = sampling.deterministic
        penalties = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
        self.penalised = penalties != (1, 0, 0)  # its logits depend on which tokens it has
        # texts share pages only with texts of the same salt
        self.salt = f"{request.cache_salt}{_DETERMINISTIC}" if self.deterministic else request.cache_salt
        self.num_cached = 0  # prompt tokens found in remembered pages when it first started
        self.leader: Sequence | None = None  # the first choice of the same request
        self.constraint = None  # `grammar.Constraint` on its tokens, when there is one
        self.drafts = None  # `drafts.Drafts`: what its next tokens are guessed from, when they are
        self.status = Status.QUEUED
        self.quantum_used = 0  # tokens decoded since it last got a run slot
        self.prompt_logprobs: list = []  # collected chunk by chunk when asked for
        self.arrival_s = time.monotonic() if now_s is None else now_s
        self.deadline_s = None if request.timeout_s is None else self.arrival_s + request.timeout_s
        self.level = request.priority  # its class; lower ones run first
        self.tenant = request.tenant
        self.ticket = 0  # its place among those of its class and tenant
        self.num_charged = 0  # prompt tokens that its tenant has been charged for, or that were cached
        self.num_overtaken = 0  # pages that those may hold which overtook it while it waited for pages
        self.trickled = False  # has its slot although more urgent ones wait
        self.admitted_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None  # written by Metrics

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_tokens(self) -> int:
        """Prompt and output, with what is being drawn."""
        return len(self.token_ids) + self.num_unknown

    @property
    def start(self) -> int:
        """Where its next row begins: behind what is computed or being computed."""
        return self.num_computed + self.num_flying

    @property
    def num_wanted(self) -> int:
        """Tokens to compute before the next one can be sampled; 0 when its last one is being drawn."""
        if self.num_unknown and self.num_output + self.num_unknown >= self.max_tokens:
            return 0
        return self.num_tokens - self.start

    def next_count(self, limit: int, page_size: int) -> int:
        """How many tokens to compute in one row, when `limit` may be: a deterministic sequence's rows are the same
        every time, so it computes a past that was lost as it did then, what it wrote itself token by token."""
        if not self.deterministic:
            return min(self.num_wanted, limit)
        if self.start >= self.num_prompt:
            return 1
        chunk = max(_FIXED_CHUNK, page_size)
        return min(self.start // chunk * chunk + chunk, self.num_prompt) - self.start

    def num_shared(self, num_tokens: int, page_size: int) -> int:
        """How many of the first `num_tokens`, whole pages, may be shared with others, either way."""
        if not self.deterministic:
            return num_tokens
        chunk = max(_FIXED_CHUNK, page_size)
        return min(num_tokens, self.num_prompt) // chunk * chunk

    @property
    def waits(self) -> bool:
        """Its next token cannot be drawn yet, whatever is computed: its grammar is not ready."""
        return self.constraint is not None and self.constraint.waits

    @property
    def takes_best(self) -> bool:
        """Its next token is the one with the largest logit after changes; no mask, and nobody asks for logits."""
        return self.sampling.greedy and self.sampling.logprobs is None and self.constraint is None

    @property
    def changes_logits(self) -> bool:
        """Penalties, bias, or stop tokens that may not come yet may change its logits."""
        p = self.sampling
        return self.penalised or bool(p.logit_bias) or self.num_output < p.min_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Logits of prompt positions are wanted (once, for the first choice only)."""
        return self.sampling.prompt_logprobs and self.index == 0 and len(self.prompt_logprobs) < self.num_prompt - 1

    def usage(self, now: float) -> Usage:
        """Counts and times until `now`, on the scheduler's clock."""
        admitted = now if self.admitted_s is None else self.admitted_s
        first = now if self.first_token_s is None else self.first_token_s
        return Usage(
            prompt_tokens=self.num_prompt, completion_tokens=self.num_output, cached_tokens=self.num_cached,
            queue_s=admitted - self.arrival_s, prefill_s=first - admitted, decode_s=now - first,
            reasoning_tokens=self.constraint.reasoning_tokens if self.constraint else 0,
            num_preemptions=self.num_preemptions,
        )  # fmt: skip
