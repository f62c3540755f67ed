"""TextStream: stop strings, end of answer and logprobs over real tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, models, pre_tokenizers, trainers

from crane.errors import RequestError
from crane.models.files import Checkpoint
from crane.models.tokenizer import load_tokenizer
from crane.runtime.text import TextStream
from crane.runtime.types import Output, SamplingParams, TokenLogprob

CORPUS = ["the quick brown fox jumps over the lazy dog", "stop here and stop there", "low lower lowest"] * 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Byte-level BPE, small enough that most characters beyond ASCII take several tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    pipeline = Pipeline(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    pipeline.train_from_iterator(CORPUS, trainer)
    pipeline.save(str(folder / "tokenizer.json"))
    return load_tokenizer(Checkpoint(folder, "safetensors"))


EOS = 0


def output(ids, finish_reason=None, matched_id=None, logprobs=False):
    entries = [TokenLogprob(-float(token_id)) for token_id in ids] if logprobs else None
    return Output("r", 0, list(ids), finish_reason, matched_id, entries)


def run(tokenizer, ids, *, chunk=1, finish="length", matched_id=None, logprobs=False, **sampling):
    """All deltas of an answer whose tokens arrive `chunk` by `chunk`."""
    stream = TextStream(tokenizer, SamplingParams(**sampling))
    deltas = []
    for start in range(0, len(ids), chunk):
        last = start + chunk >= len(ids)
        end = (finish, matched_id) if last else (None, None)
        deltas.append(stream.push(output(ids[start : start + chunk], *end, logprobs=logprobs)))
        assert stream.text == "".join(delta.text for delta in deltas)
    return stream, deltas


def first_stop(text, stops):
    """Where the answer ends, by brute force: the stop string complete first, of those the longest."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_text_without_stop_strings_comes_out_whole(tokenizer, chunk):
    text = "the lazy 狐 👩‍👧 jumps"
    ids = tokenizer.encode(text)
    stream, deltas = run(tokenizer, ids, chunk=chunk)
    assert stream.text == text
    assert stream.finished and deltas[-1].finish_reason == "length" and deltas[-1].stop is None
    assert stream.token_ids == [token_id for delta in deltas for token_id in delta.token_ids] == ids


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_a_stop_string_across_tokens_never_leaks(tokenizer, chunk):
    ids = tokenizer.encode("the fox\n\nUser: more and more")
    stream, deltas = run(tokenizer, ids, chunk=chunk, stop=("\n\nUser:",))
    assert stream.text == "the fox"
    assert stream.finished and stream.matched_stop == "\n\nUser:"
    ends = [delta for delta in deltas if delta.finish_reason]
    assert [(delta.finish_reason, delta.stop) for delta in ends] == [("stop", "\n\nUser:")]


def test_tokens_after_the_one_that_completes_a_stop_string_are_dropped(tokenizer):
    ids = tokenizer.encode("the fox stop there and on")
    num_kept = next(n for n in range(len(ids)) if "stop" in tokenizer.decode(ids[:n]))
    for chunk in (1, 4, 100):
        stream, deltas = run(tokenizer, ids, chunk=chunk, stop=("stop",), logprobs=True)
        assert stream.token_ids == ids[:num_kept]
        kept = [delta for delta in deltas if delta.token_ids]
        assert [t for delta in kept for t in delta.token_ids] == ids[:num_kept]
        logprobs = [entry.logprob for delta in kept for entry in delta.logprobs]
        assert logprobs == [-float(token_id) for token_id in ids[:num_kept]]
        assert deltas[-1] in kept or deltas[-1] == ("", None, None, [], None)


def test_text_that_only_looked_like_a_stop_string_comes_later(tokenizer):
    ids = [tokenizer.token_to_id(character) for character in "abcabd!"]
    stream, deltas = run(tokenizer, ids, stop=("abcabe",))
    assert [delta.text for delta in deltas] == ["", "", "", "", "", "abcabd", "!"]


def test_held_text_comes_out_at_the_end(tokenizer):
    ids = tokenizer.encode("the sto")
    stream, deltas = run(tokenizer, ids, stop=("stop",), finish="stop", matched_id=None)
    assert stream.text == "the sto" and stream.matched_stop is None
    assert deltas[-1].finish_reason == "stop"


def test_a_stop_string_of_characters_made_of_several_tokens(tokenizer):
    ids = tokenizer.encode("一二三四")
    assert len(ids) == 12
    stream, deltas = run(tokenizer, ids, stop=("三",))
    assert stream.text == "一二" and stream.matched_stop == "三"
    assert stream.token_ids == ids[:9]


def test_the_end_token_has_no_text_but_counts(tokenizer):
    ids = [*tokenizer.encode("low"), EOS]
    for skip in (True, False):
        stream, deltas = run(tokenizer, ids, finish="stop", matched_id=EOS, skip_special_tokens=skip)
        assert stream.text == "low"
        assert stream.token_ids == ids
        assert (deltas[-1].finish_reason, deltas[-1].stop) == ("stop", EOS)


def test_the_text_of_an_ordinary_stop_id_is_left_out(tokenizer):
    ids = tokenizer.encode("lowX")
    stream, deltas = run(tokenizer, ids, finish="stop", matched_id=ids[-1], stop_token_ids=(ids[-1],))
    assert stream.text == "low" and deltas[-1].stop == ids[-1]


def test_special_tokens_inside_an_answer_are_shown_on_request(tokenizer):
    ids = [*tokenizer.encode("a"), EOS, *tokenizer.encode("b")]
    assert run(tokenizer, ids, ignore_eos=True)[0].text == "ab"
    assert run(tokenizer, ids, ignore_eos=True, skip_special_tokens=False)[0].text == "a<eos>b"


def test_an_unfinished_character_is_replaced_at_the_end(tokenizer):
    ids = tokenizer.encode("a狐")[:-1]
    stream, deltas = run(tokenizer, ids)
    assert stream.text == "a\ufffd"
    assert deltas[-1].text == "\ufffd"


def test_min_tokens_delays_stop_strings(tokenizer):
    ids = [tokenizer.token_to_id(character) for character in "a!b!c!d"]
    assert run(tokenizer, ids, stop=("!",))[0].text == "a"
    assert run(tokenizer, ids, stop=("!",), min_tokens=2)[0].text == "a"
    assert run(tokenizer, ids, stop=("!",), min_tokens=3)[0].text == "a!b"
    assert run(tokenizer, ids, stop=("!",), min_tokens=99)[0].text == "a!b!c!d"
    assert run(tokenizer, ids, stop=("!",), min_tokens=3, chunk=7)[0].text == "a!b"


def test_a_stop_string_begun_before_min_tokens_still_ends_the_answer(tokenizer):
    ids = [tokenizer.token_to_id(character) for character in "xabcy"]
    stream, deltas = run(tokenizer, ids, stop=("abc",), min_tokens=4)
    assert stream.text == "x"


@pytest.mark.parametrize(
    "stops, text, matched",
    [
        (("lazy", "fox"), "the quick brown ", "fox"),
        (("fox jumps", "fox"), "the quick brown ", "fox"),
        (("quick", "the quick"), "", "the quick"),
        (("k brown f", "brown"), "the quick ", "brown"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_of_several_stop_strings_the_first_complete_one_wins(tokenizer, stops, text, matched, chunk):
    ids = tokenizer.encode("the quick brown fox jumps over the lazy dog")
    stream, _ = run(tokenizer, ids, chunk=chunk, stop=stops)
    assert (stream.text, stream.matched_stop) == (text, matched)


def test_a_stop_string_beats_the_limit_reached_with_it(tokenizer):
    ids = tokenizer.encode("the fox")
    stream, deltas = run(tokenizer, ids, stop=("fox",), finish="length")
    assert (deltas[-1].finish_reason, stream.text) == ("stop", "the ")


def test_logprobs_stay_with_their_tokens_while_text_is_held(tokenizer):
    ids = tokenizer.encode("a狐b")
    _, deltas = run(tokenizer, ids, logprobs=True, stop=("狐狐",))
    for token_id, delta in zip(ids, deltas, strict=True):
        assert delta.token_ids == [token_id]
        assert [entry.logprob for entry in delta.logprobs] == [-float(token_id)]


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_cut_by_the_engine_keeps_its_text(tokenizer, reason):
    ids = tokenizer.encode("the sto")
    stream, deltas = run(tokenizer, ids, stop=("stop",), finish=reason)
    assert stream.text == "the sto" and deltas[-1].finish_reason == reason


def test_an_end_without_tokens_flushes(tokenizer):
    stream = TextStream(tokenizer, SamplingParams(stop=("stop",)))
    assert stream.push(output(tokenizer.encode("sto"))).text == ""
    assert stream.push(output([], "abort")) == ("sto", "abort", None, [], None)
    assert stream.push(output([1], "abort")) == ("", None, None, [], None)


def test_an_empty_stop_string_is_refused(tokenizer):
    with pytest.raises(RequestError) as caught:
        TextStream(tokenizer, SamplingParams(stop=("",)))
    assert caught.value.field == "stop"


def test_a_character_begun_by_the_prompt_is_completed_when_the_prompt_is_known(tokenizer):
    ids = tokenizer.encode("狐!")
    stream = TextStream(tokenizer, SamplingParams(), prompt_ids=ids[:2])
    assert stream.push(output(ids[2:], "length")).text == "狐!"


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab狐 é", max_size=30),
    stops=st.lists(st.text(alphabet="ab狐 é", min_size=1, max_size=4), max_size=4),
    chunk=st.integers(1, 5),
)
def test_any_stop_strings_cut_where_a_plain_search_does(tokenizer, text, stops, chunk):
    stream, deltas = run(tokenizer, tokenizer.encode(text), chunk=chunk, stop=tuple(stops))
    if text:
        assert (stream.text, stream.matched_stop) == first_stop(text, stops)


def test_long_stop_strings_and_repeating_text_take_linear_time(tokenizer):
    token_id = tokenizer.token_to_id("a")
    stream = TextStream(tokenizer, SamplingParams(stop=("a" * 100_000 + "b", "a" * 99_999 + "c")))
    for _ in range(100):
        stream.push(output([token_id] * 1000))
    stream.push(output([token_id], "length"))
    assert len(stream.text) == 100_001
