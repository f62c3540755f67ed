"""Fixtures shared by all tests: where the real inputs are, and what skips without them.

Real models and vocabularies are fetched by `tools/fetch_test_inputs.py` into the
user's cache; a test that needs one is skipped, with that reason, where it is absent.
"""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")
for _name in [name for name in os.environ if name.startswith("CRANE_")]:
    del os.environ[_name]  # a developer's own settings must not steer the tests


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crane"


def _present(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.name} is absent: run tools/fetch_test_inputs.py")
    return path


@pytest.fixture(scope="session")
def models_dir() -> Path:
    return _present(cache_dir() / "models")


@pytest.fixture(scope="session")
def smollm2(models_dir) -> Path:
    """SmolLM2-135M-Instruct: llama architecture, Q4_1 GGUF, tied output."""
    return _present(models_dir / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def qwen_coder(models_dir) -> Path:
    """Qwen2.5-Coder-0.5B-Instruct: qwen2 architecture, mixed K-quant GGUF, separate output."""
    return _present(models_dir / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf")


@pytest.fixture(scope="session")
def qwen3_tokenizer(models_dir) -> Path:
    """Folder with Qwen3's tokenizer.json and tokenizer_config.json, no weights."""
    return _present(models_dir / "qwen3-tokenizer")


@pytest.fixture(scope="session")
def vocabs_dir() -> Path:
    """llama.cpp's vocabulary-only GGUF files with their .inp and .out vectors."""
    return _present(cache_dir() / "vocabs")


@pytest.fixture
def c_kernels():
    """The C kernels, loaded for one test."""
    from crane.kernels import native
    from crane.runtime.settings import cache_dir

    if native.load(cache_dir(), 2) is None:
        pytest.skip(f"no C kernels here: {native.reason()}")
    yield native.library()
    native.unload()
