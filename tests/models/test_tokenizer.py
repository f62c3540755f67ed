"""Tokenizer against llama.cpp's vectors, transformers, sentencepiece, and its own promises."""

import io
import json
import random
import subprocess
import sys
import threading
import time

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from crane.errors import ModelError, RequestError
from crane.models.files import Checkpoint, open_checkpoint
from crane.models.tokenizer import MAX_CHARS, load_tokenizer
from crane.models.vocab_gguf import KNOWN_PRE_TOKENIZERS

# llama.cpp wrote these ids without BOS and with special tokens taken as text
VECTOR_VOCABS = (
    "qwen2 qwen35 llama-bpe llama-spm phi-3 gpt-2 mpt starcoder refact command-r falcon deepseek-llm "
    "deepseek-coder"
).split()
TEXTS = [
    "",
    " ",
    "Hello, world!  two  spaces\n\n\ttabs\r\n",
    "naïve café — “quotes” … 1234567890 3.14",
    "日本語のテキスト 한국어 हिन्दी العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 e\u0301 \u200d",
    "def f(x):\n    return x ** 2  # comment\n",
    "I'll we've THEY'RE don't",
    "\x00\x01 control\x7f",
]
CORPUS = [
    "the quick brown fox jumps over the lazy dog", "low lower lowest new newer newest", "日本語 café naïve"
] * 8  # fmt: skip


@pytest.fixture(scope="module")
def qwen3(qwen3_tokenizer):
    return load_tokenizer(Checkpoint(qwen3_tokenizer, "safetensors"))


@pytest.fixture(scope="module")
def transformers_qwen3(qwen3_tokenizer):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(qwen3_tokenizer, local_files_only=True)


@pytest.fixture(scope="module")
def coder(qwen_coder):
    return load_tokenizer(open_checkpoint(qwen_coder))


def byte_level(vocab_size=400, specials=("<s>", "</s>")) -> tokenizers.Tokenizer:
    pipeline = tokenizers.Tokenizer(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pipeline.train_from_iterator(CORPUS, trainer)
    return pipeline


def folder(tmp_path, pipeline=None, **files):
    """A checkpoint folder with tokenizer.json and other JSON files, without weights."""
    if pipeline is not None:
        pipeline.save(str(tmp_path / "tokenizer.json"))
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return Checkpoint(tmp_path, "safetensors")


def train_pieces(**options) -> sentencepiece.SentencePieceProcessor:
    buffer = io.BytesIO()
    defaults = {"vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=buffer, **{**defaults, **options}
    )
    return sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())


@pytest.fixture(scope="module")
def pieces():
    return train_pieces(normalization_rule_name="identity", remove_extra_whitespaces=False)


def gguf_metadata(pieces: sentencepiece.SentencePieceProcessor, **more) -> dict:
    """The metadata that a converter writes for a SentencePiece model."""
    kinds = []
    for i in range(pieces.get_piece_size()):
        control, unknown = pieces.is_control(i), pieces.is_unknown(i)
        kinds.append(3 if control else 2 if unknown else 6 if pieces.is_byte(i) else 1)
    entries = {
        "model": "llama",
        "tokens": [pieces.id_to_piece(i) for i in range(len(kinds))],
        "scores": [pieces.get_score(i) for i in range(len(kinds))],
        "token_type": kinds,
        "bos_token_id": pieces.bos_id(),
        "eos_token_id": pieces.eos_id(),
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value is not None}


def bpe_metadata(**more) -> dict:
    """The metadata of a small byte-level BPE vocabulary."""
    described = json.loads(byte_level().to_str())["model"]
    tokens = sorted(described["vocab"], key=described["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["merges"]]
    entries = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3, 3] + [1] * (len(tokens) - 2),
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value is not None}


def from_metadata(metadata, path="model.gguf"):
    return load_tokenizer(Checkpoint(path, "gguf", metadata))


# --- vocabularies of others


@pytest.mark.parametrize("name", VECTOR_VOCABS)
def test_ids_are_those_of_llama_cpp(vocabs_dir, name):
    path = vocabs_dir / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path.name} is absent: run tools/fetch_test_inputs.py")
    tokenizer = load_tokenizer(open_checkpoint(path))
    texts = (vocabs_dir / f"{path.name}.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = (vocabs_dir / f"{path.name}.out").read_text().split("\n")
    assert len(texts) >= 47
    for text, line in zip(texts, lines[: len(texts)], strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        assert ids == [int(word) for word in line.split()], text
        assert tokenizer.decode(ids) == text
    same_as_at_once(tokenizer, random.Random(name), 60)


def same_as_at_once(tokenizer, rng, num_texts: int) -> None:
    """Chats whose stretches are remembered have the ids that they have as one text, whatever stands side by side."""
    assert tokenizer._marks is not None
    marks = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in sorted(tokenizer.special_ids)
             if i < tokenizer.vocab_size]  # fmt: skip
    parts = [*TEXTS, " a", "b ", "\n", "<", "<|", "|>", *marks[:40], *[f" {mark} " for mark in marks[:40]]]
    for _ in range(num_texts):
        text = "".join(rng.choices(parts, k=rng.randint(1, 9)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        for owner in ("a", "a", "b", None):
            assert tokenizer.encode_chat(text, owner) == ids, text


@pytest.mark.parametrize("text", [*TEXTS, "<|im_start|>user\nHi<|im_end|>\n<think>\n</think><tool_call>"])
def test_qwen3_folder_agrees_with_transformers(qwen3, transformers_qwen3, text):
    ids = qwen3.encode(text)
    assert ids == transformers_qwen3.encode(text)
    for skip in (True, False):
        expected = transformers_qwen3.decode(ids, skip_special_tokens=skip)
        assert qwen3.decode(ids, skip_special_tokens=skip) == expected


def test_qwen3_folder_has_the_special_tokens_of_transformers(qwen3, transformers_qwen3):
    assert qwen3.vocab_size == len(transformers_qwen3)
    assert qwen3.special_ids == set(transformers_qwen3.all_special_ids)
    assert qwen3.special_tokens.get("bos_token") is None
    assert qwen3.special_tokens["eos_token"] == transformers_qwen3.eos_token
    assert qwen3.token_to_id("<|im_end|>") == 151645


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60))
def test_any_text_gives_the_ids_of_transformers(qwen3, transformers_qwen3, text):
    assert qwen3.encode(text) == transformers_qwen3.encode(text)


def test_qwen_gguf_agrees_with_the_qwen_tokenizer_json(coder, qwen3):
    for text in [*TEXTS[:5], *TEXTS[6:]]:  # the left out one is not NFC, which GGUF has no word for
        assert coder.encode(text) == qwen3.encode(text)
    assert coder.encode("<|im_start|>x<tool_call>") == qwen3.encode("<|im_start|>x<tool_call>")


def test_padding_at_the_end_of_a_gguf_vocabulary_does_not_count(coder):
    assert coder.vocab_size == 151665
    assert coder.token_bytes(151664) == b"<|file_sep|>"


def test_a_gguf_of_150_thousand_tokens_loads_at_once(qwen_coder):
    start = time.process_time()
    load_tokenizer(open_checkpoint(qwen_coder))
    assert time.process_time() - start < 2.5  # half a second on an idle core


def test_smollm_reads_digit_by_digit(smollm2):
    tokenizer = load_tokenizer(open_checkpoint(smollm2))
    ids = tokenizer.encode("in 2024 ½")
    assert [tokenizer.decode([token_id]) for token_id in ids][:6] == ["in", " ", "2", "0", "2", "4"]
    assert tokenizer.decode(ids) == "in 2024 ½"
    names = tokenizer.special_tokens
    assert (names["bos_token"], names["eos_token"]) == ("<|im_start|>", "<|im_end|>")


# --- tokenizer.json


def test_tokenizer_json_of_our_own_round_trips(tmp_path):
    pipeline = byte_level()
    tokenizer = load_tokenizer(folder(tmp_path, pipeline))
    for text in TEXTS:
        assert tokenizer.encode(text) == pipeline.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_post_processor_says_what_goes_around_a_text(tmp_path):
    pipeline = byte_level()
    pipeline.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = load_tokenizer(folder(tmp_path, pipeline))
    assert tokenizer.encode("low") == pipeline.encode("low").ids
    assert tokenizer.encode("low")[0] == 0 and tokenizer.encode("low")[-1] == 1
    bare = pipeline.encode("low", add_special_tokens=False).ids
    assert tokenizer.encode("low", add_special_tokens=False) == bare


def test_add_bos_token_of_the_configuration_wins(tmp_path):
    pipeline = byte_level()
    pipeline.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    config = {"add_bos_token": True, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    tokenizer = load_tokenizer(folder(tmp_path, pipeline, tokenizer_config=config))
    assert tokenizer.encode("low") == [0, *pipeline.encode("low", add_special_tokens=False).ids]
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_special_tokens_in_text_are_parsed_or_not(tmp_path):
    tokenizer = load_tokenizer(folder(tmp_path, byte_level()))
    assert tokenizer.encode("a<s>b").count(0) == 1
    literal = tokenizer.encode("a<s>b", parse_special=False)
    assert 0 not in literal and tokenizer.decode(literal) == "a<s>b"
    assert tokenizer.encode("a<s>b").count(0) == 1  # the switch left nothing behind


def test_special_tokens_are_skipped_only_on_request(tmp_path):
    tokenizer = load_tokenizer(folder(tmp_path, byte_level()))
    ids = tokenizer.encode("<s>low</s>")
    assert tokenizer.decode(ids) == "low"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>low</s>"


def test_tokens_that_only_the_configuration_has_are_added(tmp_path):
    pipeline = byte_level()
    new_id = pipeline.get_vocab_size()
    config = {"added_tokens_decoder": {str(new_id): {"content": "<think>", "special": False}}}
    tokenizer = load_tokenizer(folder(tmp_path, pipeline, tokenizer_config=config))
    assert tokenizer.encode("a<think>")[-1] == new_id
    assert tokenizer.vocab_size == new_id + 1
    assert tokenizer.decode([new_id]) == "<think>"


def test_added_token_ids_that_contradict_each_other_are_refused(tmp_path):
    config = {"added_tokens_decoder": {"90000": {"content": "<think>", "special": False}}}
    with pytest.raises(ModelError, match="90000"):
        load_tokenizer(folder(tmp_path, byte_level(), tokenizer_config=config))


@pytest.mark.parametrize("added", [{"5": "<a>"}, {"x": {"content": "<a>"}}, {"5": {}}, ["<a>"]])
def test_malformed_added_tokens_are_refused(tmp_path, added):
    with pytest.raises(ModelError, match="tokenizer_config.json: malformed entry"):
        load_tokenizer(folder(tmp_path, byte_level(), tokenizer_config={"added_tokens_decoder": added}))


def test_ids_with_gaps_survive_both_ways_of_parsing(tmp_path):
    data = json.loads(byte_level().to_str())
    gap = {"id": 1000, "content": "<gap>", "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    data["model"]["vocab"]["far"] = 900
    data["added_tokens"].append({**gap, **flags})
    data["model"]["vocab"]["<gap>"] = 1000
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_tokenizer(Checkpoint(tmp_path, "safetensors"))
    assert tokenizer.vocab_size == 1001
    assert tokenizer.encode("<gap>") == [1000]
    assert tokenizer.decode(tokenizer.encode("<gap>", parse_special=False)) == "<gap>"
    assert tokenizer.token_bytes(950) == b""


def test_a_metaspace_tokenizer_json_has_exact_bytes(tmp_path, pieces):
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    pipeline = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    pipeline.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = load_tokenizer(folder(tmp_path, pipeline))
    for text in ("low ß 🦊", "  the", "the"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == pipeline.decode(ids)
    assert tokenizer.decode(tokenizer.encode("low ß 🦊")) == "low ß 🦊"
    assert tokenizer.token_bytes(pieces.piece_to_id("<0xC3>")) == b"\xc3"


def test_a_decoder_without_exact_bytes_is_refused(tmp_path):
    pipeline = byte_level()
    pipeline.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match=r"tokenizer.json.*WordPiece"):
        load_tokenizer(folder(tmp_path, pipeline))


def test_a_broken_tokenizer_json_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ModelError, match="tokenizer.json: not a tokenizer"):
        load_tokenizer(Checkpoint(tmp_path, "safetensors"))


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(Checkpoint(tmp_path, "safetensors"))


# --- SentencePiece


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {},  # NFKC, extra spaces removed
        {"model_type": "unigram", "vocab_size": 295},
        {"add_dummy_prefix": False, "normalization_rule_name": "identity"},
    ],
)
def test_tokenizer_model_gives_the_ids_of_sentencepiece(tmp_path, options):
    processor = train_pieces(**options)
    (tmp_path / "tokenizer.model").write_bytes(processor.serialized_model_proto())
    tokenizer = load_tokenizer(Checkpoint(tmp_path, "safetensors"))
    for text in TEXTS[:-1]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == processor.encode(text)
        assert tokenizer.decode(ids) == processor.decode(ids)
    assert tokenizer.encode("low") == [processor.bos_id(), *processor.encode("low")]


def test_marks_of_a_sentencepiece_model_are_parsed_or_not(tmp_path, pieces):
    (tmp_path / "tokenizer.model").write_bytes(pieces.serialized_model_proto())
    tokenizer = load_tokenizer(folder(tmp_path, added_tokens={"<|user|>": pieces.get_piece_size()}))
    ids = tokenizer.encode("<s>low</s><|user|>new", add_special_tokens=False)
    assert ids == [1, *pieces.encode("low"), 2, pieces.get_piece_size(), *pieces.encode("new")]
    assert 1 not in tokenizer.encode("<s>low", add_special_tokens=False, parse_special=False)
    assert tokenizer.token_to_id("<|user|>") == tokenizer.vocab_size - 1
    assert tokenizer.token_to_id("<|nobody|>") is None
    assert tokenizer.special_ids == {0, 1, 2}
    same_as_at_once(tokenizer, random.Random(1), 100)


def test_what_a_chat_said_before_is_not_encoded_again_for_the_same_owner(byte_vocab, monkeypatch):
    encoded = []
    encode = type(byte_vocab).encode

    def watched(self, text, *args, **kwargs):
        encoded.append(text)
        return encode(self, text, *args, **kwargs)

    monkeypatch.setattr(type(byte_vocab), "encode", watched)
    expected = encode(byte_vocab, "<s>low lower</s>new", False)
    for owner in "aab":
        assert byte_vocab.encode_chat("<s>low lower</s>new", owner) == expected
    assert encoded == ["low lower", "new"] * 2, "b's request is not to be faster because a said the same"
    long = "low " * MAX_CHARS
    assert byte_vocab.encode_chat(long, "a") == byte_vocab.encode_chat(long, "a") == encode(byte_vocab, long, False)
    assert encoded[4:] == [long] * 2, "there is a bound to what is remembered"


@pytest.mark.parametrize("change", [
    {"rstrip": True}, {"lstrip": True}, {"single_word": True},
    {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first")},
])  # fmt: skip
def test_a_vocabulary_in_which_stretches_are_no_texts_of_their_own_is_not_cut(tmp_path, change):
    pipeline = byte_level()
    if "pre_tokenizer" in change:
        pipeline.pre_tokenizer = change["pre_tokenizer"]
    else:
        pipeline.add_tokens([tokenizers.AddedToken("<m>", normalized=False, **change)])
    tokenizer = load_tokenizer(folder(tmp_path, pipeline))
    text = "low <s> new <m> low</s> <m>new"
    assert tokenizer._marks is None and tokenizer.encode_chat(text, "a") == tokenizer.encode(text, False)


def test_a_broken_tokenizer_model_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="tokenizer.model: not a SentencePiece model"):
        load_tokenizer(Checkpoint(tmp_path, "safetensors"))


def test_gguf_spm_gives_the_ids_of_its_sentencepiece_model(pieces):
    tokenizer = from_metadata(gguf_metadata(pieces))
    for text in TEXTS[:-1]:
        assert tokenizer.encode(text) == [pieces.bos_id(), *pieces.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gguf_spm_without_space_prefix_keeps_every_space(pieces):
    tokenizer = from_metadata(gguf_metadata(pieces, add_space_prefix=False, add_bos_token=False))
    ids = tokenizer.encode(" low")
    assert tokenizer.decode(ids) == " low"
    assert tokenizer.decode(tokenizer.encode("low")) == "low"
    assert ids != tokenizer.encode("low")


# --- GGUF metadata


def test_gguf_flags_put_bos_and_eos_around_a_text():
    bare = from_metadata(bpe_metadata()).encode("low")
    assert from_metadata(bpe_metadata(add_bos_token=True, add_eos_token=True)).encode("low") == [0, *bare, 1]
    assert from_metadata(bpe_metadata(pre="llama-bpe")).encode("low")[0] == 0  # by default there
    assert 0 not in from_metadata(bpe_metadata(pre="llama-bpe", add_bos_token=False)).encode("low")


def test_gguf_token_types_decide_what_is_special():
    metadata = bpe_metadata()
    num = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["<tool_call>", "<|im_end|>", "", "[PAD9]"]
    metadata["tokenizer.ggml.token_type"] += [4, 1, 1, 5]
    tokenizer = from_metadata(metadata)
    assert tokenizer.special_ids == {0, 1, num + 1}  # <|im_end|>, although marked as a word
    ids = tokenizer.encode("a<tool_call><|im_end|>")
    assert ids[1:] == [num, num + 1]
    assert tokenizer.decode(ids) == "a<tool_call>"
    assert num in tokenizer.encode("<tool_call>", parse_special=False)
    assert tokenizer.vocab_size == num + 3


def test_a_missing_pre_tokenizer_is_said_aloud(caplog):
    from_metadata(bpe_metadata(pre=None))
    assert "tokenizer.ggml.pre" in caplog.text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pre": "martian"}, "pre 'martian' is not a known pre-tokenizer; known: .*llama-bpe.*qwen2"),
        ({"model": "bert"}, "model 'bert' is not supported; known: gpt2"),
        ({"model": None}, "model is missing"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["nosuch pair"]}, "merges do not fit the tokens"),
        ({"merges": ["alone"]}, "merges do not fit the tokens"),
        ({"merges": [1, 2]}, "merges is not a list of the expected type"),
        ({"tokens": "abc"}, "tokens is not a list"),
        ({"token_type": [1]}, "token_type has 1 entries for"),
        ({"eos_token_id": 10**6}, "eos_token_id must be an id below"),
        ({"eos_token_id": -1}, "eos_token_id must be an id below"),
        ({"add_bos_token": 1}, "add_bos_token must be a bool"),
        ({"add_bos_token": True, "bos_token_id": None}, "bos_token_id is missing, but add_bos_token asks"),
    ],
)
def test_a_bad_gguf_vocabulary_is_refused_by_key(change, message):
    with pytest.raises(ModelError, match=rf"model\.gguf: tokenizer\.ggml\.{message}"):
        from_metadata(bpe_metadata(**change))


@pytest.mark.parametrize("change", [{"scores": None}, {"scores": [0.0]}, {"tokens": ["same"] * 330}])
def test_a_bad_gguf_spm_vocabulary_is_refused(pieces, change):
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\."):
        from_metadata(gguf_metadata(pieces, **change))


@pytest.mark.parametrize("pre", KNOWN_PRE_TOKENIZERS)
def test_every_known_pre_tokenizer_keeps_the_text(pre):
    tokenizer = from_metadata(bpe_metadata(pre=pre))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


# --- bytes and streaming


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_token_bytes_joined_are_the_text(byte_vocab, text):
    ids = byte_vocab.encode(text, parse_special=False)
    assert b"".join(map(byte_vocab.token_bytes, ids)) == text.encode()


@pytest.fixture(scope="module")
def byte_vocab(tmp_path_factory):
    return load_tokenizer(folder(tmp_path_factory.mktemp("bytes"), byte_level()))


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def small(request, byte_vocab, pieces):
    return byte_vocab if request.param == "byte-level" else from_metadata(gguf_metadata(pieces))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_pushed_pieces_joined_are_the_decoded_text(small, data):
    ids = data.draw(st.lists(st.integers(0, small.vocab_size - 1), max_size=40))
    skip = data.draw(st.booleans())
    decoder = small.decoder(skip)
    text = "".join([decoder.push(token_id) for token_id in ids]) + decoder.flush()
    assert text == small.decode(ids, skip)
    kept = [token_id for token_id in ids if not (skip and token_id in small.special_ids)]
    raw = b"".join(map(small.token_bytes, kept))
    assert text == (raw[1:] if small.strip_left and raw[:1] == b" " else raw).decode("utf-8", "replace")


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), max_size=40))
def test_pieces_of_whole_text_never_hold_part_of_a_character(small, text):
    decoder = small.decoder()
    seen = ""
    for token_id in small.encode(text, parse_special=False):
        piece = decoder.push(token_id)
        assert "\ufffd" not in piece
        seen += piece
        assert text.startswith(seen)
    assert (seen, decoder.flush()) == (text, "")


def test_a_character_comes_with_the_token_that_completes_it(byte_vocab):
    ids = byte_vocab.encode("👩‍👧")
    decoder = byte_vocab.decoder()
    pieces = [decoder.push(token_id) for token_id in ids]
    assert [piece for piece in pieces if piece] == ["👩", "\u200d", "👧"]
    assert pieces[0] == ""


def test_a_character_that_never_ends_is_replaced_only_at_the_flush(byte_vocab):
    decoder = byte_vocab.decoder()
    first = byte_vocab.encode("👩")[:-1]
    assert [decoder.push(token_id) for token_id in first] == [""] * len(first)
    assert decoder.flush() == "\ufffd"


def test_a_character_that_the_prompt_leaves_unfinished_is_completed(byte_vocab):
    ids = byte_vocab.encode("low 👩")
    for cut in range(len(ids) - 3, len(ids)):
        decoder = byte_vocab.decoder(prompt_ids=ids[:cut])
        text = "".join(decoder.push(token_id) for token_id in ids[cut:]) + decoder.flush()
        assert text == "👩"


def test_the_leading_space_is_dropped_only_at_the_start_of_a_text(pieces):
    tokenizer = from_metadata(gguf_metadata(pieces))
    ids = tokenizer.encode("low new")
    (boundary,) = [i for i in range(2, len(ids)) if tokenizer.decode(ids[:i]) == "low"]
    assert tokenizer.decode(ids[boundary:]) == "new"
    for decoder in (tokenizer.decoder(prompt_ids=ids[:boundary]), tokenizer.decoder(continuing=True)):
        assert "".join(decoder.push(token_id) for token_id in ids[boundary:]) == " new"
    after_bos = tokenizer.decoder(prompt_ids=[1])
    assert "".join(after_bos.push(token_id) for token_id in ids[1:]) == "low new"


def test_an_unknown_id_is_refused_in_a_request_and_silent_in_a_stream(byte_vocab):
    for bad in (-1, byte_vocab.vocab_size):
        with pytest.raises(RequestError, match="expected a token id"):
            byte_vocab.decode([2, bad])
        with pytest.raises(RequestError, match="expected a token id"):
            byte_vocab.token_bytes(bad)
    assert byte_vocab.decoder().push(byte_vocab.vocab_size) == ""


def test_text_with_a_lone_surrogate_is_refused(byte_vocab):
    with pytest.raises(RequestError, match="lone surrogate at character 1"):
        byte_vocab.encode("a\ud800")


# --- cost


def test_long_texts_have_the_ids_of_their_parts(byte_vocab):
    line = "the quick brown fox <s>\n"
    assert byte_vocab.encode(line * 500) == byte_vocab.encode(line) * 500
    literal = byte_vocab.encode(line, parse_special=False)
    assert byte_vocab.encode(line * 500, parse_special=False) == literal * 500


def test_encoding_a_long_text_lets_other_threads_run(small):
    text = "the quick brown fox jumps over the lazy dog 日本語 café\n" * 20_000
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    small.encode(text)
    end = time.perf_counter()
    done.set()
    thread.join()
    assert sum(start + 0.01 < at < end - 0.01 for at in ticks) >= 3


def test_threads_may_parse_special_tokens_differently_at_once(byte_vocab):
    text = "a<s>b " * 600
    wrong = []

    def work(parse_special):
        for _ in range(20):
            if byte_vocab.encode(text, parse_special=parse_special).count(0) != (600 if parse_special else 0):
                wrong.append(parse_special)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_text_needs_no_torch():
    code = (
        "import sys, crane.runtime.text, crane.models.chat; "
        "print([m for m in ('torch', 'gguf', 'safetensors', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
