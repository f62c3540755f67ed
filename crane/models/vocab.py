"""Vocabularies: text to ids, and ids to exact bytes, over the two tokenizer libraries.

`FastVocab` holds a `tokenizers` pipeline (tokenizer.json, GGUF byte-level BPE),
`PieceVocab` a SentencePiece model (tokenizer.model, GGUF SPM). Both are used
through the same six members; nothing above this file knows which one it has.
Torch-free.
"""

import json
import re
from functools import cached_property

import sentencepiece
import tokenizers

SPACE = "\u2581"  # SentencePiece writes a space as this character
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LONG_TEXT = 2000  # characters; from here on, releasing the GIL is worth a thread pool


class UnsupportedVocab(Exception):
    """A tokenizer file uses a part that has no exact byte form here. `str` says which."""


def byte_level_table() -> dict[str, int]:
    """GPT-2's alphabet: the printable character that stands for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update((chr(256 + i), byte) for i, byte in enumerate(others))
    return table


class FastVocab:
    """A `tokenizers` pipeline with its byte form.

    decoder: how token text becomes bytes, see `read_decoder`.
    literal_ids: ids whose text is taken as it is (added tokens).
    """

    def __init__(self, pipeline: tokenizers.Tokenizer, decoder: "Decoder", literal_ids: frozenset[int]):
        pipeline.no_padding()
        pipeline.no_truncation()
        self._pipeline = pipeline
        self._decoder = decoder
        self._literal_ids = literal_ids
        self.strip_left = decoder.strip_left

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same pipeline, but the text of a special token is only text to it.

        A twin that shares the model, because the switch itself is not safe to flip
        while another thread encodes.
        """
        twin = tokenizers.Tokenizer(self._pipeline.model)
        if self._pipeline.normalizer is not None:
            twin.normalizer = self._pipeline.normalizer
        if self._pipeline.pre_tokenizer is not None:
            twin.pre_tokenizer = self._pipeline.pre_tokenizer
        added = self._pipeline.get_added_tokens_decoder()
        twin.add_tokens([added[token_id] for token_id in sorted(added)])
        if twin.get_added_tokens_decoder().keys() != added.keys():
            # ids with gaps do not survive adding anew; a copy through JSON keeps them
            twin = tokenizers.Tokenizer.from_str(self._pipeline.to_str())
        twin.encode_special_tokens = True
        return twin

    @cached_property
    def marks(self) -> dict[str, int]:
        """Tokens by their texts, if what stands between them is encoded as a text of its own; else none."""
        added = self._pipeline.get_added_tokens_decoder()
        cut = {token.content: token_id for token_id, token in added.items() if not token.normalized}
        reach = any(t.lstrip or t.rstrip or t.single_word for t in added.values() if not t.normalized)
        parts = (self._pipeline.normalizer, self._pipeline.pre_tokenizer)
        if reach or any(b'"prepend_scheme":"first"' in part.__getstate__() for part in parts if part is not None):
            return {}
        return cut

    @cached_property
    def size(self) -> int:
        """One more than the greatest id."""
        return max(self._pipeline.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, parse_special: bool) -> list[int]:
        pipeline = self._pipeline if parse_special else self._plain
        if len(text) < _LONG_TEXT:
            return pipeline.encode(text, add_special_tokens=False).ids
        # only the batch call lets other threads run meanwhile
        return pipeline.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def token_to_id(self, token: str) -> int | None:
        return self._pipeline.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes; b"" for an id that no token has."""
        token = self._pipeline.id_to_token(token_id)
        if token is None:
            return b""
        return token.encode() if token_id in self._literal_ids else self._decoder.to_bytes(token)


class Decoder:
    """The byte form of one token's text.

    byte_level: the text is in GPT-2's byte alphabet. Else `replace_space` turns
    SentencePiece's space mark into a space and `byte_fallback` reads <0xNN>.
    strip_left: spaces to drop at the very start of a text.
    """

    def __init__(self, *, byte_level=False, replace_space=False, byte_fallback=False, strip_left=0):
        self._alphabet = byte_level_table() if byte_level else None
        self._replace_space = replace_space
        self._byte_fallback = byte_fallback
        self.strip_left = strip_left

    def to_bytes(self, token: str) -> bytes:
        if self._alphabet is not None:
            try:
                return bytes(map(self._alphabet.__getitem__, token))
            except KeyError:
                return token.encode()  # not in the alphabet: a token added as plain text
        if self._byte_fallback and (match := _BYTE_PIECE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return (token.replace(SPACE, " ") if self._replace_space else token).encode()


def read_decoder(pipeline: tokenizers.Tokenizer) -> Decoder:
    """The byte form that a pipeline's own decoder describes. Raises UnsupportedVocab."""
    if pipeline.decoder is None:
        raise UnsupportedVocab("it has no decoder")
    description = json.loads(pipeline.decoder.__getstate__())
    parts = description["decoders"] if description["type"] == "Sequence" else [description]
    found = {}
    for part in parts:
        match part:
            case {"type": "ByteLevel"}:
                found["byte_level"] = True
            case {"type": "ByteFallback"}:
                found["byte_fallback"] = True
            case {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}:
                found["replace_space"] = True
            case {"type": "Metaspace", "replacement": "\u2581", **rest}:
                found["replace_space"] = True
                found["strip_left"] = 0 if rest.get("prepend_scheme") == "never" else 1
            case {"type": "Strip", "content": " ", "start": start, "stop": 0}:
                found["strip_left"] = start
            case {"type": "Fuse"}:
                pass  # tokens are joined anyway
            case _:
                raise UnsupportedVocab(f"its decoder has an unsupported part: {json.dumps(part)[:200]}")
    if not (found.get("byte_level") or found.get("replace_space")):
        shown = json.dumps(parts)[:200]
        raise UnsupportedVocab(f"its decoder is neither byte-level nor SentencePiece's: {shown}")
    return Decoder(**found)


class PieceVocab:
    """A SentencePiece model plus tokens that it does not know.

    split_special: texts of tokens that are cut out before SentencePiece sees the rest,
    only when special tokens are parsed; split_always: in any case. Every stretch
    between two such tokens is encoded as a text of its own, leading space included.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, *, add_space_prefix: bool,
                 extra: dict[int, str] | None = None, split_special: dict[str, int], split_always: dict[str, int]):
        self._processor = processor
        self._extra = extra or {}
        self._extra_ids = {token: token_id for token_id, token in self._extra.items()}
        self.marks = {**split_special, **split_always}
        self._cut_pattern = alternatives(self.marks)
        self._plain_pattern = alternatives(split_always)
        self.strip_left = 1 if add_space_prefix else 0
        self.size = max(processor.get_piece_size(), max(self._extra, default=-1) + 1)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        pattern = self._cut_pattern if parse_special else self._plain_pattern
        if pattern is None:
            return self._processor.encode(text) if text else []
        ids = []
        for i, stretch in enumerate(pattern.split(text)):
            if i % 2:
                ids.append(self.marks[stretch])
            elif stretch:
                ids.extend(self._processor.encode(stretch))
        return ids

    def token_to_id(self, token: str) -> int | None:
        if token in self._extra_ids:
            return self._extra_ids[token]
        token_id = self._processor.piece_to_id(token)
        return token_id if self._processor.id_to_piece(token_id) == token else None

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes; b"" for an id that no token has."""
        if token_id in self._extra:
            return self._extra[token_id].encode()
        processor = self._processor
        if not 0 <= token_id < processor.get_piece_size():
            return b""
        piece = processor.id_to_piece(token_id)
        if processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        if processor.is_control(token_id) or processor.is_unknown(token_id):
            return piece.encode()
        return piece.replace(SPACE, " ").encode()


def alternatives(tokens: dict[str, int]) -> re.Pattern | None:
    """Matches the longest of `tokens` at the first place where one stands."""
    if not tokens:
        return None
    return re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")
