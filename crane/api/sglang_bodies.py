"""The bodies of SGLang's native routes. See `bodies` for the rules."""

from typing import Annotated, Any

from msgspec import UNSET, Meta, UnsetType

from crane.api.bodies import MAX_INT, Absent, Bias, Body, NumChoices, NumTop, Off, QueuedBody, StopText, TokenId

On = Annotated[Any, Meta(extra={"neutral": (True,)})]
Empty = Annotated[Any, Meta(extra={"neutral": ("", [], {})})]

Salt = Annotated[str, Meta(max_length=256)]
Rid = Annotated[str, Meta(min_length=1, max_length=256)]
StartLen = Annotated[int, Meta(ge=-1, le=MAX_INT)]
Grammar = Annotated[str, Meta(min_length=1)]


class NativeSamplingBody(Body):
    """`sampling_params` of /generate. Null is the default, except for max_new_tokens: to the context's end."""

    max_new_tokens: Annotated[int, Meta(ge=0, le=MAX_INT)] | None | UnsetType = UNSET
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None  # 0 is greedy
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=MAX_INT)] | None = None  # -1 and 0 are off
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    min_new_tokens: Annotated[int, Meta(ge=0, le=MAX_INT)] | None = None
    n: NumChoices | None = None
    stop: StopText | list[StopText] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None  # the stop string or stop token stays at the end of the text
    logit_bias: dict[str, Bias] | None = None  # keys are token ids
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    sampling_seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    deterministic: bool | None = None  # the same bits whatever runs beside it, in bfloat16, too; slower
    stream_interval: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None  # an event per so many tokens
    # what the text has to match: at most one of these
    json_schema: Grammar | None = None
    regex: Grammar | None = None
    ebnf: Grammar | None = None
    choice: Annotated[list[str], Meta(min_length=1)] | None = None
    structural_tag: Absent = None
    stop_regex: Empty = None
    beam_width: Absent = None
    custom_params: Empty = None
    spaces_between_special_tokens: bool | None = None  # crane's tokenizers never put any, as fast ones everywhere
    watermark: Off = None


class NativeBody(QueuedBody):
    """POST /generate. text or input_ids, one or a list; other fields given as lists have one entry per prompt."""

    text: str | Annotated[list[str], Meta(min_length=1)] | None = None
    input_ids: list[int | list[TokenId]] | None = None
    sampling_params: NativeSamplingBody | list[NativeSamplingBody] | None = None
    rid: Rid | list[Rid] | None = None
    stream: bool | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: StartLen | list[StartLen] | None = None  # -1: of the output only
    top_logprobs_num: NumTop | list[NumTop] | None = None
    token_ids_logprob: Annotated[list[TokenId | list[TokenId] | None], Meta(max_length=1024)] | None = None
    return_text_in_logprobs: bool | None = None
    return_prompt_token_ids: bool | None = None
    # computed prefixes are shared only between prompts for which both of these are the same
    extra_key: Salt | list[Salt] | None = None
    cache_salt: Salt | list[Salt] | None = None
    return_hidden_states: Off = None
    return_routed_experts: Off = None
    return_indexer_topk: Off = None
    return_sampling_mask: Off = None
    return_flat_raw_top_logprobs: Off = None
    return_flat_raw_top_logprobs_b64: Off = None
    return_entropy: Off = None
    return_bytes: Off = None
    log_metrics: On = None
    background: Off = None
    use_audio_in_video: Off = None
    input_embeds: Absent = None
    image_data: Empty = None
    video_data: Empty = None
    audio_data: Empty = None
    modalities: Empty = None
    lora_path: Empty = None
    lora_id: Absent = None
    custom_logit_processor: Absent = None
    session_params: Absent = None
    session_id: Absent = None
    routing_key: Absent = None
    routed_dp_rank: Absent = None
    data_parallel_rank: Absent = None
    # the text begins with a thinking section, of at most so many tokens; what it has to match comes behind it
    require_reasoning: bool | None = None
    max_thinking_tokens: Annotated[int, Meta(ge=0, le=MAX_INT)] | None = None
    custom_labels: Absent = None
    no_logs: Off = None
    bootstrap_host: Absent = None
    bootstrap_port: Absent = None
    bootstrap_room: Absent = None


class AbortBody(Body):
    """POST /abort_request. rid: all requests whose id begins so; an empty one is none."""

    rid: Annotated[str, Meta(max_length=1024)] | None = None
    abort_all: bool = False
