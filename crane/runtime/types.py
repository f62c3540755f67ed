"""What crosses the border between API workers and the engine. Torch-free.

All are msgspec Structs: immutable where they describe a wish or a fact, and
packed as arrays, in field order, on the engine socket (see `wire`).
"""

from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error", "timeout"]
EngineStatus = Literal["starting", "loading", "ready", "stuck", "draining", "failed", "lost"]


class Thinking(msgspec.Struct, frozen=True, array_like=True):
    """Where the output's thinking section is, and how long it may be.

    open: the prompt ends inside it; else it is open when the output's first tokens are `start_ids`.
    It ends with `end_ids`. max_tokens: after so many tokens of it `end_ids` are put in, whatever the model wants.
    """

    start_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    open: bool = False
    max_tokens: int | None = None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How one request's tokens are chosen and when it ends. Neutral by default.

    Order of application, as in transformers: repetition penalty (prompt and
    output), frequency and presence penalty (output only), logit bias,
    temperature, top-k, top-p on what top-k kept, min-p relative to the best.
    """

    max_tokens: int = 512
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None  # None: the engine draws one at admission
    n: int = 1
    stop: tuple[str, ...] = ()  # matched on text by the API side, never by the engine
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0  # no EOS, stop id or stop string before so many tokens
    ignore_eos: bool = False
    logprobs: int | None = None  # None: off; k: the chosen token's and the k best
    prompt_logprobs: bool = False  # with logprobs=k: the same for every prompt token
    skip_special_tokens: bool = True
    logprob_ids: tuple[int, ...] = ()  # with logprobs: also the log-probabilities of these tokens
    # what the output must match, once it does not think (any more): a grammar in llguidance's Lark dialect
    grammar: str | None = None
    thinking: Thinking | None = None
    num_draft_tokens: int | None = None  # guesses verified in one step, at most; 0: none; None: the server's setting
    # in bfloat16, too, the same whatever runs beside it: computed in batches of a fixed shape (`runner`)
    deterministic: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def constrained(self) -> bool:
        """Somewhere in the output only some tokens are allowed."""
        return self.grammar is not None or (self.thinking is not None and self.thinking.max_tokens is not None)

    def problem(self) -> str | None:
        """What is wrong with these parameters, naming the field, or None.

        Ids are compared with the vocabulary elsewhere. NaN is never inside bounds.
        """
        for name, (kind, low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if value is None and name in ("seed", "logprobs", "num_draft_tokens"):
                continue
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                return f"{name} must be in [{low}, {high}], got {value!r}"
        for token_id, bias in self.logit_bias.items():
            if not abs(bias) <= _MAX_BIAS:
                return f"logit_bias of token {token_id} must be in [-{_MAX_BIAS}, {_MAX_BIAS}], got {bias!r}"
        if self.thinking is not None and not self.thinking.end_ids:
            return "thinking.end_ids must name at least one token"
        if self.thinking is not None and self.thinking.max_tokens is not None and self.thinking.max_tokens < 0:
            return f"thinking.max_tokens must be at least 0, got {self.thinking.max_tokens}"
        return None


_INT = 2**31 - 1
_MAX_BIAS = 1e6
_NUMBER = (int, float)
# What the kernels can compute with; the API refuses more, by its own field names.
_BOUNDS = {
    "max_tokens": (int, 0, _INT),
    "temperature": (_NUMBER, 0.0, 100.0),
    "top_k": (int, 0, _INT),
    "top_p": (_NUMBER, 1e-9, 1.0),
    "min_p": (_NUMBER, 0.0, 1.0),
    "repetition_penalty": (_NUMBER, 1e-6, 1e6),
    "frequency_penalty": (_NUMBER, -1e6, 1e6),
    "presence_penalty": (_NUMBER, -1e6, 1e6),
    "seed": (int, -(2**63), 2**63 - 1),
    "n": (int, 1, 1024),
    "min_tokens": (int, 0, _INT),
    "logprobs": (int, 0, 1000),
    "num_draft_tokens": (int, 0, 64),
}


class Generate(msgspec.Struct, frozen=True, array_like=True, tag="generate"):
    """API to engine: start a request. `rid` is unique among live requests."""

    rid: str
    prompt_ids: list[int]
    sampling: SamplingParams
    # "last" or "mean": no token is drawn; the one output carries the pooled last hidden state
    pooling: Literal["last", "mean"] | None = None
    # computed prefixes are shared only between requests of the same salt
    cache_salt: str = ""
    # what the output is expected to be, to be guessed from; it may turn out otherwise
    prediction_ids: list[int] = []
    priority: int = 0  # its class: lower ones run first
    tenant: str = ""  # whose it is: tenants share the engine fairly
    timeout_s: float | None = None  # after so long it ends, finished or not
    # its outputs are kept for `Resume`, with this note for whoever resumes it
    journal: bytes | None = None
    timeline: bool = False  # its last outputs come with their timelines
    owner: str = ""  # whose key it came with


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """API to engine: end this request (any worker's), or all when rid is None.

    index: end this choice only, as after a stop string in one of several.
    """

    rid: str | None
    index: int | None = None


class Leave(msgspec.Struct, frozen=True, array_like=True, tag="leave"):
    """API to engine: nobody listens to this request any more; unless it is in the journal it ends."""

    rid: str


class Resume(msgspec.Struct, frozen=True, array_like=True, tag="resume"):
    """API to engine: all outputs of this request, from its first one, come here from now on. Answered like Generate."""

    rid: str


class Call(msgspec.Struct, frozen=True, array_like=True, tag="call"):
    """API to engine: a question, answered by `Reply` with the same id.

    op: "stats", "metrics", "plan" (payload: Generate messages; answered by a `Plan` of each), "abort" (payload: the
    beginning of rids, None for all, and their owner, "" for anybody), "journal" (payload: a rid; answered by its note,
    or None), "trace", or one of `waiting.Waiting`.
    """

    id: int
    op: str
    payload: Any = None


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """API to engine, first on every connection."""

    protocol: int
    pid: int
    version: str


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one chosen token under the raw distribution (before
    penalties and temperature), and the best alternatives, best first."""

    logprob: float
    top_ids: list[int] = []
    top_logprobs: list[float] = []
    ids_logprobs: list[float] = []  # of SamplingParams.logprob_ids, in their order


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Counts and times of one choice so far; times in seconds."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    reasoning_tokens: int = 0  # of completion_tokens: those of the thinking section
    num_preemptions: int = 0  # how often it had to give up its KV pages


class Output(msgspec.Struct, frozen=True, array_like=True):
    """What one step gave to one choice of one request.

    token_ids: the new tokens; a matched EOS or stop id is included last.
    finish_reason: None while running. matched_id: the EOS or stop id that ended it.
    logprobs: one per new token when asked for.
    prompt_logprobs: on the first output of choice 0 when asked for; the entry of
        the first prompt token is None.
    usage: so far, on the first and the last output. error: a message when finish_reason is "error".
    embedding: float32 values of the pooled, unnormalised hidden state, on the one output of a pooling request.
    num_drafted: guesses that the step verified; all but one of the new tokens are those that were right.
    """

    rid: str
    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    matched_id: int | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    usage: Usage | None = None
    error: str | None = None
    embedding: list[float] | None = None
    num_drafted: int = 0
    timeline: list[dict[str, Any]] | None = None  # on the last one, when asked for: see `timeline.Timeline`


class Step(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """Engine to API: all outputs of one step for this connection, one message."""

    outputs: list[Output]


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag="accepted"):
    """Engine to API: the request is queued; its outputs will follow."""

    rid: str


class Rejected(msgspec.Struct, frozen=True, array_like=True, tag="rejected"):
    """Engine to API: the request is not taken. Fields as `errors.EngineError`."""

    rid: str
    code: str
    message: str
    retry_after_s: float | None = None


class Plan(msgspec.Struct):
    """What would become of a request now; `/v1/plan` shows it. Times in seconds, null when nothing is measured yet.

    max_tokens: as far as the context goes. fits: the prompt does, and a token of output. pages: KV pages that each
    choice may come to need. code, message, retry_after_s: why it would be refused now.
    queue_position: how many would get a slot before it. wait_s: until it starts. first_token_s: until its first token.
    """

    prompt_tokens: int
    cached_tokens: int
    max_tokens: int
    fits: bool
    waiting: int
    free_pages: int
    pages: int = 0
    code: str | None = None
    message: str | None = None
    retry_after_s: float | None = None
    queue_position: int | None = None
    wait_s: float | None = None
    first_token_s: float | None = None


class Reply(msgspec.Struct, frozen=True, array_like=True, tag="reply"):
    """Engine to API: the answer to `Call` id. error: a message, or None."""

    id: int
    payload: Any = None
    error: str | None = None


class EngineInfo(msgspec.Struct, frozen=True):
    """What a ready engine serves. Sizes in tokens unless the name says else."""

    pid: int
    model_path: str
    model_type: str  # "hunyuan" | "qwen25" | "qwen3" | "llama"
    dtype: str  # "float32" | "bfloat16" | "float16"
    device: str  # "cpu" | "cuda:0" | "mps"
    max_model_len: int
    vocab_size: int
    num_pages: int
    page_size: int
    max_concurrent: int
    decode_tokens_per_seq: int
    kv_capacity: dict = {}  # `KVMemory.capacity`: what fits in each tier


class State(msgspec.Struct, frozen=True, array_like=True, tag="state"):
    """Engine to API: first on every connection, and again at every change.

    info is set when status is "ready", "stuck" (for now: a step takes too long) or "draining". While "loading",
    loaded_bytes of total_bytes are in place. reason explains "failed" and "stuck".
    """

    status: EngineStatus
    reason: str = ""
    info: EngineInfo | None = None
    loaded_bytes: int = 0
    total_bytes: int = 0


class EngineStats(msgspec.Struct):
    """Counters of one engine since its start; `/v1/stats` shows them as they are."""

    total_requests: int = 0
    completed_requests: int = 0
    aborted_requests: int = 0
    failed_requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0  # of preemptions: those whose pages went to host memory
    host_cached_tokens: int = 0  # of cached_tokens: those that came from host memory
    avg_decode_tokens_per_sec: float = 0.0
    avg_prefill_tokens_per_sec: float = 0.0
    timed_out_requests: int = 0
    active_sequences: int = 0
    waiting_sequences: int = 0
    waiting_by_priority: dict[int, int] = {}
    waiting_tenants: int = 0  # how many share the queue
    num_pages: int = 0
    free_pages: int = 0
    num_host_pages: int = 0
    free_host_pages: int = 0
    disk_cached_tokens: int = 0  # of cached_tokens: those that came from --kv-cache-dir
    disk_bytes: int = 0
    disk_files: int = 0
    disk_bad_files: int = 0  # removed because they were not what they should be
    disk_pages_written: int = 0
    disk_pages_read: int = 0
    disk_pages_skipped: int = 0  # not written because too many others were on their way
    disk_writable: bool = True  # False after an error: nothing more is written
    steps: int = 0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    step_faults: int = 0  # steps that raised
    memory_shortages: int = 0  # of those: for lack of memory
    ledger_faults: int = 0  # times that pages were found unaccounted for
    uptime_s: float = 0.0
    # what each runs in, "triton" or "torch", and why not in Triton; "cuda_graphs", "recorded_steps": of
    # how many rows, and why of no more; "screen": what it spared
    kernels: dict[str, str] = {}
    # "on", "why_off"; "steps_ahead": launched while another one ran; "steps_alone": how many others were not, by why
    overlap: dict[str, bool | str | int | dict[str, int] | None] = {}


ToEngine = Hello | Generate | Abort | Leave | Resume | Call
ToApi = State | Accepted | Rejected | Step | Reply
