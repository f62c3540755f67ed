"""Requests whose answer is one output each, gathered into one JSON body: embeddings and scores."""

from collections.abc import Callable

from crane.api.endpoint import Generation
from crane.api.errors import out_of_time
from crane.errors import EngineError, RequestError
from crane.runtime.types import Generate, Output


class GatheredOutputs(Generation):
    """See `endpoint.Generation`; never streams. render: the last output of each request, in order -> the body."""

    stream = False
    num_tokens = 0  # none is drawn

    def __init__(self, requests: list[Generate], render: Callable[[list[Output]], bytes]):
        self.requests = requests
        self.failed: EngineError | None = None
        self._render = render
        self._outputs: dict[str, Output | None] = {request.rid: None for request in requests}
        self._num_open = len(requests)
        self._aborted = False
        self.aborts: list[tuple[str, int]] = []

    def feed(self, outputs: list[Output]) -> bytes:
        for output in outputs:
            if output.finish_reason is None or output.rid not in self._outputs:
                continue
            if output.finish_reason == "error":
                message = output.error or "the engine failed"
                self.failed = EngineError("lost" if message.startswith("engine_lost") else "internal", message)
                break
            if output.finish_reason == "timeout":
                self.failed = out_of_time()
                break
            self._aborted |= output.finish_reason == "abort"
            self._num_open -= self._outputs[output.rid] is None
            self._outputs[output.rid] = output
        return b""

    def finish(self) -> bytes:
        return b""

    def body(self) -> bytes:
        """The whole answer. Raises EngineError when the engine broke it, RequestError (409) when it was aborted."""
        if self.failed is not None:
            raise self.failed
        if self._aborted:
            raise RequestError("the request was aborted", code="aborted", status=409)
        return self._render(list(self._outputs.values()))
