"""Text to token ids and back: the union of the seed's, SGLang's and vLLM's dialects."""

import msgspec

from crane.api.bodies import DetokenizeBody, TokenizeBody, decode, invalid
from crane.api.chat_prompt import chat_ids
from crane.api.endpoint import Context, Endpoint, Reply, Request

_json = msgspec.json.Encoder().encode


def tokenize(context: Context, request: Request) -> Reply:
    """Encode a text or a chat. Answers {tokens, count, max_model_len} and, when asked for, token_strs; lists
    of these for a list of texts."""
    body = decode(TokenizeBody, request.body, context)
    context.model.check_name(body.model)
    given = [name for name in ("text", "prompt", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise invalid(given[1] if given else "text", "expected exactly one of text, prompt, messages")
    if body.messages is not None:
        tokens = chat_ids(context.model, body, add_special_tokens=bool(body.add_special_tokens))
    else:
        _refuse_chat_options(body, given[0])
        text = body.text if body.prompt is None else body.prompt
        special = body.add_special_tokens is not False
        encode = context.model.tokenizer.encode
        if isinstance(text, str):
            tokens = encode(text, add_special_tokens=special)
        else:
            tokens = [encode(each, add_special_tokens=special) for each in text]
    batched = bool(tokens) and isinstance(tokens[0], list)
    answer = {
        "tokens": tokens,
        "count": [len(ids) for ids in tokens] if batched else len(tokens),
        "max_model_len": context.max_model_len,
    }
    if body.return_token_strs:
        strings = [_strings(context, ids) for ids in (tokens if batched else [tokens])]
        answer["token_strs"] = strings if batched else strings[0]
    return Reply(_json(answer))


def detokenize(context: Context, request: Request) -> Reply:
    """Decode token ids. Answers {text} and, the same under vLLM's name, {prompt}; lists of texts for lists of ids."""
    body = decode(DetokenizeBody, request.body, context)
    context.model.check_name(body.model)
    kinds = {type(item) for item in body.tokens}
    if len(kinds) > 1:
        raise invalid("tokens", "expected token ids or lists of token ids, got a mixture")
    lists = body.tokens if kinds == {list} else [body.tokens]
    for i, ids in enumerate(lists):
        context.model.check_ids(ids, f"tokens[{i}]" if kinds == {list} else "tokens")
    skip = body.skip_special_tokens is not False
    texts = [context.model.tokenizer.decode(ids, skip_special_tokens=skip) for ids in lists]
    text = texts if kinds == {list} else texts[0]
    return Reply(_json({"text": text, "prompt": text}))


def _refuse_chat_options(body: TokenizeBody, given: str) -> None:
    for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools"):
        if getattr(body, name) not in (None, []):
            raise invalid(name, f"goes with messages, not with {given}")


def _strings(context: Context, ids: list[int]) -> list[str]:
    token_bytes = context.model.tokenizer.token_bytes
    return [token_bytes(token_id).decode("utf-8", "replace") for token_id in ids]


ENDPOINTS = tuple(
    Endpoint("POST", prefix + path, run, needs="model", body=body)
    for prefix in ("/v1", "")
    for path, run, body in (("/tokenize", tokenize, TokenizeBody), ("/detokenize", detokenize, DetokenizeBody))
)
