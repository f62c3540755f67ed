"""Settings: one field, one variable, one flag."""

import dataclasses

import pytest

from crane.errors import SettingsError
from crane.runtime.settings import Settings, variable


def test_defaults_are_the_seeds():
    s = Settings()
    seed = (s.model_type, s.host, s.port, s.cpu, s.max_concurrent, s.decode_tokens_per_seq, s.format)
    assert seed == ("auto", "0.0.0.0", 8080, False, 32, 16, "auto")


def test_variables_give_typed_values_and_arguments_win_over_them():
    env = {"CRANE_PORT": "9000", "CRANE_CPU": "true", "CRANE_KV_MEMORY": "1.5g", "CRANE_LINGER_S": "0.5", "HOME": "x"}
    s = Settings.from_env(env, port=9001)
    assert (s.port, s.cpu, s.kv_memory, s.linger_s) == (9001, True, 3 << 29, 0.5)


def test_settings_survive_the_trip_through_variables():
    changed = Settings(model_path="a b/c", cpu=True, worker_swap=False, kv_memory=123456789, linger_s=0.25, port=0)
    assert Settings.from_env(changed.to_env()) == changed
    assert Settings().to_env() == {}


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("CRANE_PORT", "80a", "CRANE_PORT must be a whole number, got '80a'"),
        ("CRANE_PORT", "70000", "at most 65535"),
        ("CRANE_MAX_CONCURRENT", "0", "CRANE_MAX_CONCURRENT must be at least 1"),
        ("CRANE_PAGE_SIZE", "24", "CRANE_PAGE_SIZE must be a power of two, got 24"),
        ("CRANE_FORMAT", "pt", "CRANE_FORMAT must be one of auto, safetensors, gguf"),
        ("CRANE_CPU", "maybe", "CRANE_CPU must be 0 or 1"),
        ("CRANE_KV_MEMORY", "2x", "CRANE_KV_MEMORY must be a size"),
        ("CRANE_LINGER_S", "nan", "CRANE_LINGER_S must be at least 0"),
        ("CRANE_PROT", "1", "unknown variable CRANE_PROT"),
    ],
)
def test_a_malformed_variable_is_an_error_that_names_it(name, text, words):
    with pytest.raises(SettingsError, match=words):
        Settings.from_env({name: text})


@pytest.mark.parametrize(
    "text, value",
    [("2g", 2 << 30), ("40%", 0.4), ("0.4", 0.4), (".5", 0.5), ("1.0", 1.0), ("100%", 1.0), ("auto", None), ("0", 0)],
)
def test_memory_is_a_size_or_a_part_of_what_is_free(text, value):
    settings = Settings.from_env({"CRANE_HOST_KV_MEMORY": text})
    assert settings.host_kv_memory == value and type(settings.host_kv_memory) is type(value)
    assert Settings.from_env(settings.to_env()) == settings


@pytest.mark.parametrize("text", ["0.0", "0%", "101%", "1.01", "half", "-1", "1e9g"])
def test_memory_that_is_neither_is_refused(text):
    with pytest.raises(SettingsError, match="CRANE_HOST_KV_MEMORY must be a size such as 500m or 2g, or a part"):
        Settings.from_env({"CRANE_HOST_KV_MEMORY": text})


@pytest.mark.parametrize(
    "path, name, served",
    [("/m/Qwen2.5-7B", "", "Qwen2.5-7B"), ("/m/a.Q4_0.gguf", "", "a.Q4_0"), ("/m/x/", "", "x"), ("/m/x", "n/1", "n/1")],
)
def test_model_name_is_the_folders_or_files_unless_given(path, name, served):
    assert Settings(model_path=path, model_name=name).served_name == served


def test_every_setting_explains_itself():
    for spec in dataclasses.fields(Settings):
        assert len(spec.metadata["help"]) > 10, variable(spec.name)
