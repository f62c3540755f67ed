"""A tiny served model, and a client for each driver."""

import pytest

from crane.api.served import ServedModel
from crane.runtime.settings import Settings
from tests.api.harness import Client
from tests.tiny import make_tiny


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("api") / "tiny-qwen2", "qwen2")


@pytest.fixture(scope="session")
def model(tiny_path) -> ServedModel:
    return ServedModel.load(Settings(model_path=str(tiny_path), model_name="org/tiny"))


@pytest.fixture(params=["asgi", "wsgi"])
def client(request, model):
    """client(script, **options) -> Client, for both drivers."""
    return lambda script=None, **options: Client(request.param, model, script, **options)
