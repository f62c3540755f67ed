"""`from crane import LLM`: the engine without HTTP."""

import subprocess
import sys

import msgspec
import pytest

from crane import LLM, SamplingParams
from crane.errors import ModelError, RequestError, SettingsError
from crane.runtime.engine import Engine
from tests.serving import ROOT
from tests.tiny import make_tiny

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = make_tiny(tmp_path_factory.mktemp("tiny"), "qwen2")
    return LLM(path, dtype="float32", cpu=True, threads=1, max_queue=3, max_model_len=128)


def test_prompts_as_text_and_as_ids_give_the_same_and_keep_their_order(llm):
    texts = ["The quick brown fox", "Why is the sky blue?", "12 + 30 ="]
    done = llm.generate(texts, GREEDY)
    assert [c.prompt_index for c in done] == [0, 1, 2]
    assert done == _without_times(llm.generate([llm.tokenizer.encode(t) for t in texts], GREEDY), done)
    alone = llm.generate(texts[1], GREEDY)
    assert len(alone) == 1 and alone[0].token_ids == done[1].token_ids
    assert done[0].text == llm.tokenizer.decode(done[0].token_ids) and done[0].usage.completion_tokens == 12


def _without_times(done, like):
    return [c.__class__(**{f: getattr(c, f) for f in c.__dataclass_fields__} | {"usage": o.usage})
            for c, o in zip(done, like, strict=True)]


def test_more_prompts_than_the_queue_holds_are_all_answered(llm):
    done = llm.generate([[i + 1, i + 2] for i in range(20)], msgspec.structs.replace(GREEDY, n=2))
    assert [(c.prompt_index, c.index) for c in done] == [(i, j) for i in range(20) for j in range(2)]
    assert llm.engine.scheduler.pool.num_free == llm.engine.info.num_pages


def test_stop_strings_end_a_choice_and_clip_what_it_returns(llm):
    plain = llm.generate("The quick", msgspec.structs.replace(GREEDY, max_tokens=40))[0]
    stop = plain.text[5:8]
    cut = llm.generate("The quick", msgspec.structs.replace(GREEDY, max_tokens=40, stop=(stop,)))[0]
    assert (cut.finish_reason, cut.stop) == ("stop", stop)
    assert cut.text == plain.text[: plain.text.index(stop)]
    assert cut.usage.completion_tokens == len(cut.token_ids) < 40
    assert llm.engine.scheduler.pool.num_free == llm.engine.info.num_pages


def test_a_stop_string_in_the_first_token_leaves_nothing_running(llm):
    plain = llm.generate("The quick", GREEDY)[0]
    cut = llm.generate("The quick", msgspec.structs.replace(GREEDY, stop=(plain.text[0],)))[0]
    assert (cut.text, cut.finish_reason, cut.usage.completion_tokens) == ("", "stop", 1)
    assert not llm.engine.has_work


WRITES = """
import sys, time
from crane import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", cpu=True, threads=1, page_size=4, kv_memory=1 << 24, kv_cache_dir=sys.argv[2])
while not llm.engine.memory.disk.disk.ready:
    time.sleep(0.01)
llm.generate([[i + 1, *range(3, 200)] for i in range(16)], SamplingParams(max_tokens=2, temperature=0.0))
"""


def test_what_goes_to_the_cache_folder_is_written_to_the_end_when_the_program_ends(tmp_path):
    path, folder = make_tiny(tmp_path / "tiny", "qwen2"), tmp_path / "kv"
    subprocess.run([sys.executable, "-c", WRITES, path, folder], check=True, cwd=ROOT)
    names = [each.name for each in folder.rglob("*") if each.is_file()]
    assert len(names) == 16 * 49 and not [name for name in names if not name.endswith(".kv")]


def test_whatever_can_be_prepared_is_prepared_before_the_first_prompt(llm, monkeypatch):
    left = [False, True, True]
    monkeypatch.setattr(Engine, "prepare", lambda self: left.pop())
    LLM(llm.settings.model_path, dtype="float32", cpu=True, threads=1, max_model_len=128)
    assert not left


def test_chat_renders_the_models_template(llm):
    messages = [{"role": "user", "content": "Hi"}]
    answer = llm.chat(messages, GREEDY)[0]
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert answer.token_ids == llm.generate(rendered, GREEDY)[0].token_ids
    assert [c.prompt_index for c in llm.chat([messages, messages], GREEDY)] == [0, 1]


def test_logprobs_come_one_per_token(llm):
    done = llm.generate("The quick", msgspec.structs.replace(GREEDY, logprobs=2, prompt_logprobs=True))[0]
    assert len(done.logprobs) == 12 and all(len(entry.top_ids) == 2 for entry in done.logprobs)
    assert [entry.top_ids[0] for entry in done.logprobs] == done.token_ids
    assert done.prompt_logprobs[0] is None and len(done.prompt_logprobs) == done.usage.prompt_tokens


@pytest.mark.parametrize("prompt", [[[]], [[1], [10**6]], [[1] * 500]], ids=["empty", "unknown id", "too long"])
def test_a_prompt_that_cannot_be_served_is_an_error_and_leaves_nothing_behind(llm, prompt):
    with pytest.raises(RequestError):
        llm.generate(prompt, GREEDY)
    assert not llm.engine.has_work
    assert llm.generate("The quick", GREEDY)[0].finish_reason == "length"


@pytest.mark.parametrize(
    "params",
    [dict(temperature=float("nan")), dict(temperature=-1.0), dict(top_p=0.0), dict(top_p=1.5), dict(min_p=-0.1),
     dict(repetition_penalty=0.0), dict(frequency_penalty=float("inf")), dict(n=0), dict(max_tokens=-1),
     dict(logprobs=-1), dict(top_k=-5), dict(logit_bias={3: float("nan")}), dict(min_tokens=-1), dict(seed=2**80)],
    ids=str,
)  # fmt: skip
def test_a_bad_sampling_parameter_is_refused_by_name(llm, params):
    with pytest.raises(RequestError, match=next(iter(params))):
        llm.generate("The quick", SamplingParams(**params))


def test_what_cannot_be_loaded_says_so(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        LLM(tmp_path / "nowhere")
    with pytest.raises(SettingsError, match="PAGE_SIZE"):
        LLM(tmp_path, page_size=3)
