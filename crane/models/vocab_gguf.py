"""A tokenizer from GGUF metadata alone, with the ids that llama.cpp gives.

Two kinds: "gpt2" is byte-level BPE with a named pre-tokenizer, "llama" is
SentencePiece BPE. Where a checkpoint's tokenizer.json normalises to NFC (Qwen),
GGUF has no word for it and, as in llama.cpp, text is taken as it is. Torch-free.
"""

import logging
import struct

import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers

from crane.errors import ModelError
from crane.models.vocab import Decoder, FastVocab, PieceVocab

log = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CASED_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_CASED_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED_UPPER}*{_CASED_LOWER}+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_CASED_UPPER}+{_CASED_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ASCII_PUNCTUATION = r"!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~"
_DEEPSEEK3 = (
    rf"[{_ASCII_PUNCTUATION}][A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# letters whose canonical form is another letter are escaped: an editor would normalise them
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-Ⴥ"
    "Ꭰ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴ"
    "ᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄ"
    "Ⰰ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
_DEEPSEEK_CJK = "[一-龥ࠀ-一가-\ud7ff]+"

# Pre-tokenizers: each expression cuts the stretches that the one before it left. The
# lookbehind in deepseek-llm's changes no cut; it keeps long runs of spaces from quadratic time.
_LLAMA3_STEPS = (_LLAMA3,)
_QWEN2_STEPS = (_QWEN2,)
_GPT2_STEPS = (_GPT2,)
_DIGIT_STEPS = (r"\p{N}", _GPT2)
_DEEPSEEK3_STEPS = (r"\p{N}{1,3}", _CJK, _DEEPSEEK3)
_STEPS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx", "falcon3"), _LLAMA3_STEPS),
    **dict.fromkeys(("falcon-h1", "pixtral", "lfm2", "glm4", "chatglm-bpe"), _LLAMA3_STEPS),
    **dict.fromkeys(("qwen2", "qwen3", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), _QWEN2_STEPS),
    "qwen35": (_QWEN35,),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "mellum", "gigachat"), _GPT2_STEPS),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGIT_STEPS),
    "minerva-7b": _DIGIT_STEPS,
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "deepseek-llm": (
        r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"(?<!\s)\s+$",
        _DEEPSEEK_CJK, r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}"),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK3_STEPS),
    "tekken": (_TEKKEN,),
}  # fmt: skip
# A word that is itself a token is taken whole, whatever the merges say.
_WHOLE_WORDS = frozenset(
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2 glm4 tekken".split()
)
_BOS_BY_DEFAULT = _WHOLE_WORDS - {"glm4"}
KNOWN_PRE_TOKENIZERS = tuple(sorted(_STEPS))

# Converters sometimes mark these as ordinary words; a chat cannot work then.
_CONTROL_TEXTS = frozenset({
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>",
    "<end_of_turn>", "<｜end▁of▁sentence｜>", "<｜hy_place▁holder▁no▁2｜>", "<|eos|>",
})  # fmt: skip
_NAMED_IDS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_OTHER_STOP_IDS = ("eot", "eom")


class GgufVocab:
    """What GGUF metadata says about text.

    vocab: FastVocab | PieceVocab. special_ids: control and unknown tokens.
    num_used: ids from here on only pad the vocabulary.
    names: {"bos_token": text, ...} for chat templates. add_bos, add_eos: around every text.
    Raises ModelError naming file and key.
    """

    def __init__(self, metadata: dict[str, object], path):
        self._metadata = metadata
        self._path = path
        self.tokens = self._list("tokens", str)
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.tokens)]
        self.types = self._list("token_type", int, optional=True) or [NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            self._fail("token_type", f"has {len(self.types)} entries for {len(self.tokens)} tokens")
        self.num_used = self._num_used()
        kind = self._get("model")
        self.is_spm = kind == "llama"
        if kind not in ("gpt2", "llama"):
            known = "gpt2 (byte-level BPE), llama (SentencePiece)"
            self._fail("model", f"{kind!r} is not supported; known: {known}")
        self.ids = self._named_ids()
        special = {i for i, kind in enumerate(self.types) if kind in (CONTROL, UNKNOWN)}
        special.update(self.ids.values())
        special.update(i for i, token in enumerate(self.tokens) if token in _CONTROL_TEXTS)
        self.special_ids = frozenset(special)
        self.names = {_NAMED_IDS[name]: self.tokens[i] for name, i in self.ids.items() if name in _NAMED_IDS}
        self.pre = self._pre_tokenizer() if not self.is_spm else None
        self.add_bos = self._flag("add_bos_token", self.is_spm or self.pre in _BOS_BY_DEFAULT)
        self.add_eos = self._flag("add_eos_token", False)
        for name, wanted in (("bos", self.add_bos), ("eos", self.add_eos)):
            if wanted and name not in self.ids:
                self._fail(f"{name}_token_id", f"is missing, but add_{name}_token asks for it")
        self.vocab = self._spm() if self.is_spm else self._bpe()

    def _bpe(self) -> FastVocab:
        merges = [tuple(merge.split(" ", 1)) for merge in self._list("merges", str)]
        ids = {token: i for i, token in enumerate(self.tokens)}
        try:
            model = models.BPE(ids, merges, ignore_merges=self.pre in _WHOLE_WORDS)
        except Exception as error:  # the library raises bare Exception
            self._fail("merges", f"do not fit the tokens: {error}")
        pipeline = tokenizers.Tokenizer(model)
        expressions = map(tokenizers.Regex, _STEPS[self.pre])
        steps = [pre_tokenizers.Split(expression, behavior="isolated") for expression in expressions]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        pipeline.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
        added = self.special_ids.union(self._user_defined())
        pipeline.add_tokens(
            [
                tokenizers.AddedToken(self.tokens[i], special=i in self.special_ids, normalized=False)
                for i in sorted(added)
            ]
        )
        literal = added.union(i for i, kind in enumerate(self.types) if kind == UNUSED)
        return FastVocab(pipeline, Decoder(byte_level=True), literal)

    def _spm(self) -> PieceVocab:
        scores = self._list("scores", (int, float))
        if len(scores) != len(self.tokens):
            self._fail("scores", f"has {len(scores)} entries for {len(self.tokens)} tokens")
        always = {self.tokens[i]: i for i in self._user_defined()}
        prefix = self._flag("add_space_prefix", True)
        unknown = self.ids["unknown"]
        types = [self._piece_type(i, unknown) for i in range(len(self.tokens))]
        proto = model_proto(
            zip(self.tokens, scores, types, strict=True),
            byte_fallback=BYTE in types,
            add_dummy_prefix=prefix,
            remove_extra_whitespaces=self._flag("remove_extra_whitespaces", False),
        )
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            self._fail("tokens", f"are not a SentencePiece vocabulary: {str(error).strip()}")
        special = {self.tokens[i]: i for i in self.special_ids if i != unknown}
        return PieceVocab(processor, add_space_prefix=prefix, split_special=special, split_always=always)

    def _piece_type(self, i: int, unknown: int) -> int:
        """SentencePiece's numbers for types, which are GGUF's. It wants exactly one unknown piece.

        Tokens that are cut out of the text before it are control pieces: it never makes those.
        """
        if i == unknown:
            return UNKNOWN
        if i in self.special_ids or self.types[i] in (UNKNOWN, USER_DEFINED):
            return CONTROL
        return self.types[i] if self.types[i] in (NORMAL, UNUSED, BYTE) else NORMAL

    def _user_defined(self) -> list[int]:
        return [i for i, kind in enumerate(self.types[: self.num_used]) if kind == USER_DEFINED]

    def _num_used(self) -> int:
        """Converters fill up to the size of the embedding with unused or [PAD<id>] tokens."""
        num = len(self.tokens)
        while num and (self.types[num - 1] == UNUSED or self.tokens[num - 1] == f"[PAD{num - 1}]"):
            num -= 1
        return num

    def _pre_tokenizer(self) -> str:
        pre = self._get("pre", None)
        if pre is None:
            log.warning("%s: names no pre-tokenizer (tokenizer.ggml.pre); using 'default'", self._path)
            return "default"
        if pre not in _STEPS:
            known = ", ".join(KNOWN_PRE_TOKENIZERS)
            self._fail("pre", f"{pre!r} is not a known pre-tokenizer; known: {known}")
        return pre

    def _named_ids(self) -> dict[str, int]:
        """Ids of the tokens with a role. SPM files may leave out the classic ones."""
        ids = {"unknown": 0, "bos": 1, "eos": 2} if self.is_spm else {}
        for name in (*_NAMED_IDS, *_OTHER_STOP_IDS):
            value = self._get(f"{name}_token_id", None)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(self.tokens):
                self._fail(f"{name}_token_id", f"must be an id below {len(self.tokens)}, got {value!r}")
            ids[name] = value
        return {name: i for name, i in ids.items() if i < len(self.tokens)}

    def _get(self, key: str, *default):
        name = f"tokenizer.ggml.{key}"
        if name not in self._metadata and not default:
            self._fail(key, "is missing")
        return self._metadata.get(name, *default)

    def _flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            self._fail(key, f"must be a bool, got {value!r}")
        return value

    def _list(self, key: str, kind, optional=False) -> list:
        value = self._get(key, *([None] if optional else []))
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(entry, kind) for entry in value):
            self._fail(key, "is not a list of the expected type")
        return value

    def _fail(self, key: str, reason: str):
        raise ModelError(f"{self._path}: tokenizer.ggml.{key} {reason}")


def model_proto(
    pieces, *, byte_fallback: bool, add_dummy_prefix: bool, remove_extra_whitespaces: bool
) -> bytes:
    """A serialised SentencePiece BPE model from (text, score, type) triples.

    Written by hand: the message is three levels of tag, length and value, and a
    protobuf runtime would be a dependency for this alone.
    """
    out = bytearray()
    for text, score, kind in pieces:
        raw = text.encode()
        piece = b"\x0a" + _varint(len(raw)) + raw  # text, score, type
        piece += b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)
        out += b"\x0a" + _varint(len(piece)) + piece  # ModelProto.pieces
    trainer = b"\x18\x02" + b"\x98\x02" + _varint(byte_fallback)  # model_type = BPE; byte_fallback
    # name; then add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = b"\x0a\x08identity"
    normalizer += bytes([0x18, add_dummy_prefix, 0x20, remove_extra_whitespaces, 0x28, 1])
    for tag, message in ((b"\x12", trainer), (b"\x1a", normalizer)):
        out += tag + _varint(len(message)) + message
    return bytes(out)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
