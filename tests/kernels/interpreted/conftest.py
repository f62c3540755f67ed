"""Tests of Triton kernels under Triton's interpreter. It must be chosen before Triton loads, which the other tests
must not notice, so tests/kernels/test_interpreter.py runs this folder in a process of its own:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]
else:
    pytest.importorskip("triton")
    from tests.kernels import mends

    mends.install()
