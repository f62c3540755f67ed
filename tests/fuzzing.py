"""What is fuzzed: from bytes to a call that must end in an answer or in one of our own refusals, soon.

`tests/test_fuzz.py` runs these for moments in CI, `tools/fuzz_parsers.py` for as long as somebody likes, guided by
coverage. Inputs that once broke something are in tests/corpus/<target>/.
"""

import contextlib
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

from crane.api import sse
from crane.api.app import ENDPOINTS
from crane.api.chat_parser import ChatForm, ChatParser
from crane.api.endpoint import Context, Request
from crane.api.served import ServedModel
from crane.api.tenancy import parse_keys
from crane.errors import EngineError, ModelError, RequestError, SettingsError
from crane.models.chat import ChatTemplate, load_chat_template
from crane.models.config import load_config, load_generation_defaults
from crane.models.files import open_checkpoint
from crane.models.tokenizer import load_tokenizer
from crane.runtime.settings import Settings
from crane.runtime.text import TextStream
from crane.runtime.types import EngineInfo, Output, SamplingParams, State
from crane.runtime.wire import FrameReader, WireError
from tests.tiny import make_tiny

CORPUS = Path(__file__).parent / "corpus"
MESSAGES = [{"role": "system", "content": "a"}, {"role": "user", "content": "b<|im_end|>"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "c"}]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@functools.cache
def _room() -> Path:
    """A folder with a tiny model in both formats, in memory where there is such a place."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = tempfile.TemporaryDirectory(prefix="crane-fuzz-", dir=place)
    _room.keep = folder  # until the process ends
    root = Path(folder.name)
    make_tiny(root / "folder", "qwen2")
    os.replace(make_tiny(root / "gguf", "llama", fmt="gguf"), root / "good.gguf")
    return root


@functools.cache
def _model() -> ServedModel:
    return ServedModel.load(Settings(model_path=str(_room() / "folder"), model_name="tiny"))


def _with(name: str, data: bytes) -> Path:
    """The tiny model's folder with another file in it."""
    folder = _room() / f"with-{name}"
    if not folder.exists():
        shutil.copytree(_room() / "folder", folder)
    (folder / name).write_bytes(data)
    return folder


def _load(path: Path) -> None:
    """All that an API worker reads of a model, and the header of its weights."""
    with contextlib.suppress(ModelError):
        checkpoint = open_checkpoint(path)
        assert isinstance(checkpoint.tensors, dict)
        config = load_config(checkpoint)
        load_generation_defaults(checkpoint)
        tokenizer = load_tokenizer(checkpoint)
        tokenizer.decode(tokenizer.encode("hello, world 1 \u2028"))
        load_chat_template(checkpoint, tokenizer, config.model_type)


def gguf(data: bytes) -> None:
    path = _room() / "fuzzed.gguf"
    path.write_bytes(data)
    _load(path)


def safetensors(data: bytes) -> None:
    _load(_with("model.safetensors", data))


def index(data: bytes) -> None:
    folder = _with("model.safetensors.index.json", data)
    if (folder / "model.safetensors").exists():
        os.replace(folder / "model.safetensors", folder / "one.safetensors")
    _load(folder)


def config(data: bytes) -> None:
    _load(_with("config.json", data))


def generation_config(data: bytes) -> None:
    _load(_with("generation_config.json", data))


def tokenizer_config(data: bytes) -> None:
    _load(_with("tokenizer_config.json", data))


@functools.cache
def _pieces_folder() -> Path:
    """The tiny model's folder with a SentencePiece tokenizer instead of its own."""
    import sentencepiece

    folder = _room() / "pieces"
    shutil.copytree(_room() / "folder", folder)
    (folder / "tokenizer.json").unlink()
    sentences = iter(["the time of the year", "a way of life and a day", "é ü 1 2 3"] * 9)
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=file, vocab_size=310, byte_fallback=True, model_type="bpe",
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    return folder


def added_tokens(data: bytes) -> None:
    """added_tokens.json beside a tokenizer.model."""
    (_pieces_folder() / "added_tokens.json").write_bytes(data)
    _load(_pieces_folder())


def pieces(data: bytes) -> None:
    """A tokenizer.model."""
    folder = _pieces_folder()
    (folder / "added_tokens.json").unlink(missing_ok=True)
    good = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(data)
    try:
        _load(folder)
    finally:
        (folder / "tokenizer.model").write_bytes(good)


def tokenizer_json(data: bytes) -> None:
    _load(_with("tokenizer.json", data))


def template(data: bytes) -> None:
    """A chat template, rendered with and without tools."""
    _load(_with("chat_template.jinja", data))
    import jinja2

    try:
        made = ChatTemplate(data.decode("utf-8", "replace"), {"bos_token": "<s>"})
    except (jinja2.TemplateError, RecursionError):
        return  # what `load_chat_template` makes a ModelError of
    for tools in (None, TOOLS):
        with contextlib.suppress(RequestError):
            made.render([dict(message) for message in MESSAGES], tools=tools)


_BODIES = [endpoint for endpoint in ENDPOINTS if endpoint.body is not None]
_INFO = EngineInfo(pid=1, model_path="m", model_type="qwen25", dtype="float32", device="cpu", max_model_len=256,
                   vocab_size=512, num_pages=64, page_size=16, max_concurrent=8, decode_tokens_per_seq=16)  # fmt: skip


def request(data: bytes) -> None:
    """A body, for the route that the first byte says."""
    endpoint = _BODIES[(data[0] if data else 0) % len(_BODIES)]
    context = Context(Settings(response_store=0), _model(), State("ready", info=_INFO))
    try:
        endpoint.run(context, Request(endpoint.method, endpoint.path, {}, {}, data[1:]))
    except (RequestError, EngineError) as error:
        reply = (endpoint.error_reply or _plain)(error)
        assert 400 <= reply.status < 500 and json.loads(reply.body) and len(reply.body) < 8000


def _plain(error):
    from crane.api.errors import error_reply

    return error_reply(error)


def wire(data: bytes) -> None:
    """Frames, however they are cut."""
    for side in ("engine", "api"):
        whole, pieces = [], []
        with contextlib.suppress(WireError):
            whole = FrameReader(side).feed(data)
        reader = FrameReader(side)
        with contextlib.suppress(WireError):
            for start in range(0, len(data), 3):
                pieces += reader.feed(data[start : start + 3])
        assert repr(pieces[: len(whole)]) == repr(whole)  # NaN is not equal to itself


def events(data: bytes) -> None:
    """Text in events is on one line, whatever the client splits at, and comes back as it was."""
    text = data.decode("utf-8", "replace")
    raw = sse.json_text(text).decode()
    assert json.loads(raw) == text and len(raw.splitlines()) == 1


def stop_strings(data: bytes) -> None:
    """The first byte's share of the rest are stop strings; the answer's text ends where the first of them does."""
    text = data[2:].decode("utf-8", "replace")
    size = (data[0] if data else 0) % 5 + 1
    stops = tuple(stop for stop in (text[:size], text[size + 1 : 2 * size]) if stop)
    ids = _model().tokenizer.encode(text, False, parse_special=False)
    chunk = (data[1] if len(data) > 1 else 0) % 4 + 1
    stream = TextStream(_model().tokenizer, SamplingParams(stop=stops))
    said = ""
    for start in range(0, len(ids), chunk):
        last = start + chunk >= len(ids)
        said += stream.push(Output("r", 0, ids[start : start + chunk], "length" if last else None)).text
        if stream.finished:
            break
    whole = _model().tokenizer.decode(ids, skip_special_tokens=False)
    ends = [(whole.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in whole]
    assert said == (whole[: min(ends)[0] - len(min(ends)[2])] if ends else whole), (said, whole, stops)


FORMS = [ChatForm(thinks, answers, True, tools) for thinks in (False, True) for answers in (False, True)
         for tools in ("hermes", "hunyuan", "xml", "json")]  # fmt: skip


def answers(data: bytes) -> None:
    """What a model writes is read the same however it is cut."""
    form = FORMS[(data[0] if data else 0) % len(FORMS)]
    step = (data[1] if len(data) > 1 else 0) % 7 + 1
    text = data[2:].decode("utf-8", "replace")
    found = []
    for size in (max(len(text), 1), step):
        parser = ChatParser(form, TOOLS, form.thinks and step % 2 == 0, True)
        for start in range(0, len(text), size):
            parser.push(text[start : start + size])
        reason = parser.finish("stop")[1]
        calls = [(call.name, call.arguments, call.complete) for call in parser.calls]
        found.append((parser.reasoning, parser.content, calls, reason))
    assert found[0] == found[1], (form, step, text, found)


def keys(data: bytes) -> None:
    """A key file."""
    with contextlib.suppress(SettingsError):
        parse_keys(data.decode("utf-8", "replace").splitlines(), "here")


TARGETS = {each.__name__: each for each in (
    gguf, safetensors, index, config, generation_config, tokenizer_config, tokenizer_json, added_tokens, pieces,
    template, request, wire, events, stop_strings, answers, keys,
)}  # fmt: skip


def seeds(name: str) -> list[bytes]:
    """Inputs to begin from: good ones, and those that once broke something."""
    folder = _room() / "folder"
    known = {
        "gguf": lambda: [(_room() / "good.gguf").read_bytes()],
        "safetensors": lambda: [(folder / "model.safetensors").read_bytes()],
        "index": lambda: [b'{"weight_map": {"lm_head.weight": "one.safetensors"}}'],
        "config": lambda: [(folder / "config.json").read_bytes()],
        "generation_config": lambda: [b'{"temperature": 0.5, "top_k": 3, "eos_token_id": [1, 2], "do_sample": true}'],
        "tokenizer_config": lambda: [(folder / "tokenizer_config.json").read_bytes(), _TOKENIZER_CONFIG],
        "tokenizer_json": lambda: [(folder / "tokenizer.json").read_bytes(), _TOKENIZER_JSON],
        "added_tokens": lambda: [b'{"<a>": 400, "<b>": 401}', b'{"the": 300}'],
        "pieces": lambda: [(_pieces_folder() / "tokenizer.model").read_bytes()],
        "template": lambda: [_model().template.source.encode(), *_TEMPLATES],
        "request": lambda: [bytes([i]) + body for i in range(len(_BODIES)) for body in _REQUESTS],
        "wire": _frames,
        "events": lambda: ["a\u2028\x85\u2029\n\"\\".encode()],
        "stop_strings": lambda: [bytes([3, 1]) + b"the end of the day, the end"],
        "answers": lambda: [bytes([i, 2]) + text for i in range(len(FORMS)) for text in _ANSWERS],
        "keys": lambda: [b"sk-a name=a rpm=1 tpm=2 concurrent=3\n# no\nsk-b\n"],
    }[name]()
    found = sorted((CORPUS / name).glob("*")) if (CORPUS / name).is_dir() else []
    return known + [path.read_bytes() for path in found]


_TOKENIZER_CONFIG = json.dumps({
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": {"content": "<|endoftext|>", "lstrip": False},
    "eos_token": "<|im_end|>", "unk_token": None, "add_bos_token": True, "add_eos_token": False,
    "additional_special_tokens": ["<|im_start|>", {"content": "<a>"}], "extra_special_tokens": {"b_token": "<b>"},
    "added_tokens_decoder": {"321": {"content": "<|im_start|>", "special": True, "lstrip": False}},
    "chat_template": [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "a"}],
}).encode()  # fmt: skip
_TOKENIZER_JSON = json.dumps({
    "version": "1.0", "added_tokens": [{"id": 3, "content": "<s>", "single_word": False, "lstrip": False,
                                        "rstrip": False, "normalized": False, "special": True}],
    "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                       "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}}},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "byte_fallback": False},
}).encode()  # fmt: skip
_TEMPLATES = [
    b"{% for m in messages %}{{ m.role ~ m['content']|trim }}{% if loop.last %}{{ loop.index }}{% endif %}{% endfor %}",
    b"{% macro f(x) %}{{ x|tojson }}{% endmacro %}{{ f(tools) }}{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}",
    b"{{ ''.__class__ }}{{ '%s'|format(messages) }}{{ 'a{0.__class__}'.format(1) }}",
    b"{% for a in range(99) %}{% for b in range(9) %}{{ 'a' * 9 }}{% endfor %}{% endfor %}{{ raise_exception('no') }}",
    b"{{ messages|map(attribute='role')|join(',') }}{% if tools %}{{ tools[0].name }}{% endif %}",
]
_REQUESTS = [
    b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "stop": ["a"], "stream": true}',
    b'{"prompt": ["a", "b"], "logprobs": 1, "logit_bias": {"1": 2}, "n": 2}',
    b'{"text": "a", "sampling_params": {"regex": "[ab]+", "max_new_tokens": 3}, "return_logprob": true}',
    b'{"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}], "store": false}',
]
_ANSWERS = [
    b'<think>a</think>b<tool_call>\n{"name": "f", "arguments": {"a": [1, "}"]}}\n</tool_call>c',
    b'<tool_calls><tool_call>f<tool_sep>\n```json\n{"a": 1}\n```</tool_call></tool_calls><answer>a</answer>',
    b"<tool_call>\n<function=f>\n<parameter=a>\nb\n</parameter>\n</function>\n</tool_call>",
    b'{"name": "f", "parameters": {"a": "\\u00e9"}} <thi',
]


def _frames() -> list[bytes]:
    from crane.runtime.types import Abort, Accepted, Call, Generate, Hello, Step
    from crane.runtime.wire import PROTOCOL, pack

    messages = [Hello(PROTOCOL, 1, "0"), Generate("r", [1, 2], SamplingParams()), Abort("r", 1), Call(1, "stats"),
                State("ready", info=_INFO), Accepted("r"), Step([Output("r", 0, [1], "stop")])]  # fmt: skip
    return [b"".join(map(pack, messages[:4])), b"".join(map(pack, messages[4:]))]
