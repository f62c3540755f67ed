"""Tokenizer: text to ids, ids to text, and text that grows token by token.

Loads tokenizer.json, a SentencePiece tokenizer.model, or the vocabulary in GGUF
metadata. Text is always the exact bytes of the tokens, read as UTF-8; nothing is
cleaned up afterwards. Torch-free.
"""

import codecs
import ctypes
import functools
from array import array
from collections.abc import Iterable, Mapping, Sequence

import sentencepiece
import tokenizers

from crane.errors import ModelError, RequestError
from crane.models.files import Checkpoint
from crane.models.gguf_header import show
from crane.models.vocab import FastVocab, PieceVocab, UnsupportedVocab, alternatives, read_decoder
from crane.models.vocab_gguf import GgufVocab

JSON_NAME = "tokenizer.json"
PIECES_NAME = "tokenizer.model"
CONFIG_NAME = "tokenizer_config.json"
MAX_REMEMBERED, MAX_CHARS = 1024, 32_768  # stretches of chats, and the length of one
_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


class Tokenizer:
    """One model's tokenizer. Immutable after construction; safe to share between threads.

    vocab_size: ids 0 to vocab_size - 1 exist. special_ids: tokens that are marks, not text.
    whole_texts: of tokens decoded so far, those that hold whole characters only.
    special_tokens: {"bos_token": text, ...}, what chat templates are given.
    """

    def __init__(self, vocab: FastVocab | PieceVocab, *, special_ids: Iterable[int], special_tokens: Mapping[str, str],
                 prefix_ids: Sequence[int] = (), suffix_ids: Sequence[int] = (), vocab_size: int | None = None):
        self._vocab = vocab
        self._bytes: dict[int, bytes] = {}
        self.whole_texts: dict[int, str] = {}
        self._marks = alternatives(vocab.marks)
        self._stretch = functools.lru_cache(MAX_REMEMBERED)(self._encode_stretch)
        self._prefix = list(prefix_ids)
        self._suffix = list(suffix_ids)
        self.vocab_size = vocab.size if vocab_size is None else vocab_size
        self.special_ids = frozenset(special_ids)
        self.special_tokens = dict(special_tokens)

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of `text`.

        add_special_tokens: with the BOS and EOS that the model wants around a text.
        parse_special: special tokens written out in `text` become their ids, else plain text.
        Long texts let other threads run. Raises RequestError for text that is not Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"text has a lone surrogate at character {error.start}") from None
        ids = self._vocab.encode(text, parse_special)
        return self.with_ends(ids) if add_special_tokens else ids

    def encode_chat(self, text: str, owner: str | None) -> list[int]:
        """`encode(text, False)`, but what stands between special tokens is remembered: of a conversation's next turn
        only what is new has to be encoded.

        owner: whose it is, so that nobody else's requests get faster by it; None: it is not remembered.
        """
        if self._marks is None or owner is None:
            return self.encode(text, False)
        ids = []
        for i, part in enumerate(self._marks.split(text)):
            if i % 2:
                ids.append(self._vocab.marks[part])
            elif part:
                ids += self._stretch(part, owner) if len(part) <= MAX_CHARS else self.encode(part, False)
        return ids

    def _encode_stretch(self, text: str, owner: str) -> array:
        return array("I", self.encode(text, False))

    def with_ends(self, ids: list[int]) -> list[int]:
        """`ids` of a text with the BOS and EOS that the model wants around it."""
        return [*self._prefix, *ids, *self._suffix]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids` from its start. Invalid UTF-8 becomes U+FFFD.

        Raises RequestError for an unknown id.
        """
        if ids and max(ids) >= self.vocab_size:
            self.token_bytes(max(ids))  # raises
        decoder = self.decoder(skip_special_tokens)
        return "".join([decoder.push(token_id) for token_id in ids]) + decoder.flush()

    def decoder(self, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = (), continuing: bool = False,
                keep_ids: frozenset[int] = frozenset()) -> "IncrementalDecoder":
        """A decoder for tokens that follow `prompt_ids`. keep_ids: special tokens that are not skipped.

        A character that the prompt leaves unfinished is completed. SentencePiece's own space
        at the start of a text is dropped, unless the prompt has text; continuing: it has
        text, which is not given here.
        """
        return IncrementalDecoder(self, skip_special_tokens, prompt_ids, continuing, keep_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of one token, perhaps a part of a character. Raises RequestError for an unknown id."""
        raw = self._bytes.get(token_id)
        if raw is None:
            if not 0 <= token_id < self.vocab_size:
                raise RequestError(f"expected a token id in 0..{self.vocab_size - 1}, got {token_id}")
            raw = self._bytes[token_id] = self._vocab.token_bytes(token_id)
        return raw

    def token_to_id(self, token: str) -> int | None:
        """Id of a token by its text in the vocabulary's own spelling."""
        return self._vocab.token_to_id(token)

    @property
    def strip_left(self) -> int:
        """Spaces at the start of a decoded text that are the tokenizer's own, not the text's."""
        return self._vocab.strip_left


class IncrementalDecoder:
    """Tokens in, whole characters out; all pieces joined are what `Tokenizer.decode` gives.

    Constant work per token. Written by its one caller. Ids past the vocabulary, which a
    model with padded logits could pick, have no text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt_ids: Sequence[int], continuing: bool,
                 keep_ids: frozenset[int] = frozenset()):
        self._vocab_size = tokenizer.vocab_size
        self._token_bytes = tokenizer.token_bytes
        self._whole_texts = tokenizer.whole_texts
        self._skipped = tokenizer.special_ids - keep_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_left = 0 if continuing else tokenizer.strip_left
        if prompt_ids:
            self._continue(prompt_ids)
        self._between = not self._strip_left and not self._utf8.getstate()[0]  # no token depends on the one before

    def push(self, token_id: int) -> str:
        """The characters that this token completes; "" while one is unfinished."""
        if token_id in self._skipped or token_id >= self._vocab_size:
            return ""
        was_between = self._between
        if was_between and (text := self._whole_texts.get(token_id)) is not None:
            return text
        raw = self._token_bytes(token_id)
        if self._strip_left:
            raw = self._strip(raw)
        text = self._utf8.decode(raw)
        self._between = not self._strip_left and not self._utf8.getstate()[0]
        if was_between and self._between:
            self._whole_texts[token_id] = text
        return text

    def flush(self) -> str:
        """What an unfinished character at the end amounts to: U+FFFD, or ""."""
        return self._utf8.decode(b"", True)

    def _strip(self, raw: bytes) -> bytes:
        rest = raw.lstrip(b" ")
        num_spaces = min(len(raw) - len(rest), self._strip_left)
        # after the first byte that is not such a space, the text has begun
        self._strip_left = self._strip_left - num_spaces if num_spaces == len(raw) else 0
        return raw[num_spaces:]

    def _continue(self, prompt_ids: Sequence[int]) -> None:
        """Takes over the bytes of a character that the prompt's last tokens leave unfinished."""
        tail = b""
        for token_id in reversed(prompt_ids):
            if len(tail) >= 4:  # no character is longer
                break
            if token_id not in self._skipped:
                tail = self._token_bytes(token_id) + tail
        if tail:
            self._strip_left = 0
            self._utf8.decode(tail)  # what is complete belongs to the prompt


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer. Raises ModelError naming the file and what is wrong with it."""
    tokenizer = _load(checkpoint)
    trim_memory()  # reading one of 150,000 tokens takes 100 MB more than keeping it
    return tokenizer


def trim_memory() -> None:
    """Give the system back what the C allocator keeps free, where it can (glibc). A few milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _load(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.format == "gguf":
        return _from_gguf(checkpoint)
    config = _config(checkpoint)
    text = checkpoint.read_text(JSON_NAME)
    if text is not None:
        return _from_json(checkpoint, text, config)
    if (checkpoint.path / PIECES_NAME).is_file():
        return _from_pieces(checkpoint, config)
    raise ModelError(f"{checkpoint.path}: has no tokenizer: neither {JSON_NAME} nor {PIECES_NAME}")


def _from_gguf(checkpoint: Checkpoint) -> Tokenizer:
    parts = GgufVocab(checkpoint.metadata, checkpoint.path)
    return Tokenizer(
        parts.vocab,
        special_ids=parts.special_ids,
        special_tokens=parts.names,
        prefix_ids=[parts.ids["bos"]] if parts.add_bos else (),
        suffix_ids=[parts.ids["eos"]] if parts.add_eos else (),
        vocab_size=parts.num_used,
    )


def _from_json(checkpoint: Checkpoint, text: str, config: dict) -> Tokenizer:
    path = checkpoint.path / JSON_NAME
    try:
        pipeline = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # the library raises bare Exception, and for a panic of its own not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{path}: not a tokenizer: {error}") from None
    _add_missing(pipeline, config, path)
    names = _special_tokens(config)
    added = pipeline.get_added_tokens_decoder()
    special_ids = {token_id for token_id, token in added.items() if token.special}
    special_ids.update(_ids_of(names, config, pipeline.token_to_id))
    try:
        vocab = FastVocab(pipeline, read_decoder(pipeline), frozenset(added))
    except UnsupportedVocab as error:
        raise ModelError(f"{path}: not supported: {error}") from None
    if "add_bos_token" in config or "add_eos_token" in config:
        prefix, suffix = _flagged_ends(config, names, pipeline.token_to_id)
    else:
        prefix, suffix = _template_ends(pipeline, path)
    return Tokenizer(
        vocab, special_ids=special_ids, special_tokens=names, prefix_ids=prefix, suffix_ids=suffix
    )


def _from_pieces(checkpoint: Checkpoint, config: dict) -> Tokenizer:
    path = checkpoint.path / PIECES_NAME
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not a SentencePiece model: {str(error).strip()}") from None
    num_pieces = processor.get_piece_size()
    try:
        for token_id in range(num_pieces):
            processor.id_to_piece(token_id)
    except UnicodeDecodeError:
        raise ModelError(f"{path}: piece {token_id} is not UTF-8") from None
    marks = [i for i in range(num_pieces) if processor.is_control(i) or processor.is_unknown(i)]
    special = {i: processor.id_to_piece(i) for i in marks}
    extra, plain = {}, {}
    for token_id, token, is_special in _added_tokens(checkpoint, config):
        if token_id >= num_pieces:
            extra[token_id] = token
        elif processor.id_to_piece(token_id) != token:
            found = processor.id_to_piece(token_id)
            raise ModelError(f"{path}: id {token_id} is {found!r} here, {token!r} in the added tokens")
        (special if is_special else plain)[token_id] = token
    names = _special_tokens(config)
    for name, i in (("bos_token", processor.bos_id()), ("eos_token", processor.eos_id())):
        if i >= 0:
            names.setdefault(name, processor.id_to_piece(i))
    vocab = PieceVocab(
        processor,
        add_space_prefix=_adds_space_prefix(processor),
        extra=extra,
        split_special={token: i for i, token in special.items()},
        split_always={token: i for i, token in plain.items()},
    )
    prefix, suffix = _flagged_ends({"add_bos_token": True, **config}, names, vocab.token_to_id)
    special_ids = {*special, *_ids_of(names, config, vocab.token_to_id)}
    return Tokenizer(
        vocab, special_ids=special_ids, special_tokens=names, prefix_ids=prefix, suffix_ids=suffix
    )


def _config(checkpoint: Checkpoint) -> dict:
    """tokenizer_config.json; names of special tokens that it lacks come from special_tokens_map.json."""
    path = checkpoint.path / CONFIG_NAME
    own = checkpoint.read_json(CONFIG_NAME) or {}
    config = {**(checkpoint.read_json("special_tokens_map.json") or {}), **own}
    added = config.get("added_tokens_decoder") or {}
    entries = added.items() if isinstance(added, dict) else [("", added)]
    for key, entry in entries:
        if not key.isdecimal() or len(key) > 9 or not isinstance(entry, dict) or not _content(entry):
            raise ModelError(f"{path}: malformed entry {show(key)} of added_tokens_decoder")
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if not isinstance(config.get(key), list | dict | None):
            raise ModelError(f"{path}: {key} must be a list or an object")
    return config


def _special_tokens(config: dict) -> dict[str, str]:
    """{"bos_token": text, ...} for every role that the configuration names."""
    named = {key: _content(value) for key, value in config.items() if key.endswith("_token")}
    return {key: text for key, text in named.items() if text is not None}


def _content(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _ids_of(names: dict[str, str], config: dict, token_to_id) -> set[int]:
    """Ids of the tokens with a role and of the additional special ones."""
    texts = set(names.values())
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or ()
        texts.update(_content(value) for value in (more.values() if isinstance(more, dict) else more))
    ids = {token_to_id(text) for text in texts if text is not None}
    return ids - {None}


def _added_tokens(checkpoint: Checkpoint, config: dict) -> list[tuple[int, str, bool]]:
    """(id, text, special) of tokens that a folder adds to its tokenizer.model."""
    found = {}
    for text, token_id in (checkpoint.read_json("added_tokens.json") or {}).items():
        if type(token_id) is not int:
            raise ModelError(f"{checkpoint.path}: malformed added token {show(text)}: {show(repr(token_id))} is no id")
        found[token_id] = (text, False)
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        found[int(key)] = (entry["content"], bool(entry.get("special")))
    for token_id, (text, _) in found.items():
        if not isinstance(token_id, int) or not 0 <= token_id < 1 << 24 or not text:
            raise ModelError(f"{checkpoint.path}: malformed added token {token_id}: {show(str(text))}")
    return [(token_id, *found[token_id]) for token_id in sorted(found)]


def _add_missing(pipeline: tokenizers.Tokenizer, config: dict, path) -> None:
    """Adds tokens that only the configuration has."""
    known = pipeline.get_added_tokens_decoder()
    entries = config.get("added_tokens_decoder") or {}
    for key in sorted(entries, key=int):
        entry = entries[key]
        if int(key) in known:
            continue
        flags = {name: bool(entry.get(name)) for name in _TOKEN_FLAGS}
        pipeline.add_tokens([tokenizers.AddedToken(entry["content"], **flags)])
        if pipeline.token_to_id(entry["content"]) != int(key):
            found = pipeline.token_to_id(entry["content"])
            raise ModelError(f"{path}: {entry['content']!r} is id {found} here, {key} in {CONFIG_NAME}")


def _flagged_ends(config: dict, names: dict[str, str], token_to_id) -> tuple[list[int], list[int]]:
    """BOS and EOS around a text, as add_bos_token and add_eos_token say."""
    ends = []
    for role in ("bos_token", "eos_token"):
        token_id = token_to_id(names[role]) if config.get(f"add_{role}") and role in names else None
        ends.append([] if token_id is None else [token_id])
    return ends[0], ends[1]


def _template_ends(pipeline: tokenizers.Tokenizer, path) -> tuple[list[int], list[int]]:
    """What the pipeline's post-processor puts around a text."""
    bare = pipeline.encode("a", add_special_tokens=False).ids
    full = pipeline.encode("a").ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise ModelError(f"{path}: its post-processor changes a text's own tokens")


def _adds_space_prefix(processor: sentencepiece.SentencePieceProcessor) -> bool:
    return processor.encode("a", out_type=str)[0].startswith("\u2581")
