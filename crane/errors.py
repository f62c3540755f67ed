"""The errors crane raises on purpose; every other exception is a bug of ours."""


class CraneError(Exception):
    """Base of all deliberate errors. `str(error)` is fit to show to a user."""


class SettingsError(CraneError):
    """A flag or CRANE_* variable is unknown or malformed."""


class ModelError(CraneError):
    """A model file is missing, malformed or not supported. Names file and reason."""


class RequestError(CraneError):
    """A request cannot be honoured: an HTTP 4xx.

    field: the request field at fault, or None.
    code: machine-readable code such as "context_length_exceeded", or None.
    """

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.field = field
        self.code = code
        self.status = status


class EngineError(CraneError):
    """The engine did not take or finish a request.

    code: "queue_full" | "rate_limited" (429), "loading" | "draining" | "stuck" | "lost" | "failed" (503),
        "duplicate_rid" | "too_long" | "bad_request" (400), "not_found" (404), "internal" (500), "timeout" (504).
    retry_after_s: seconds after which a retry makes sense, or None.
    """

    def __init__(self, code: str, message: str, retry_after_s: float | None = None):
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s
