"""What steps, and moving KV pages or computing them again, cost here, measured as the engine runs. Torch-free."""

# How much of the past a new measurement replaces.
_WEIGHT = 0.1
# What a step takes without any token is taken for so many tokens as long as all steps were of one size.
_BASE_TOKENS = 16.0


class Costs:
    """Rates of copying, reading and prefill, and what follows for a sequence that has to give up its pages.

    page_bytes: of one page. policy: "auto", or always "swap" or "recompute".
    copy_bytes_s: bytes a second between device and host memory, as first measured.
    """

    def __init__(self, page_bytes: int, policy: str = "auto", copy_bytes_s: float = 0.0):
        self.page_bytes = page_bytes
        self.policy = policy
        self.copy_bytes_s = copy_bytes_s
        self.prefill_tokens_s = 0.0  # 0: nothing was computed yet
        self.disk_bytes_s = 0.0  # 0: nothing was read yet

    def copied(self, num_pages: int, seconds: float) -> None:
        """So many pages were copied in one step."""
        self.copy_bytes_s = _mean(self.copy_bytes_s, num_pages * self.page_bytes / max(seconds, 1e-9))

    def computed(self, num_tokens: int, seconds: float) -> None:
        """So many prompt tokens were computed in one step."""
        self.prefill_tokens_s = _mean(self.prefill_tokens_s, num_tokens / max(seconds, 1e-9))

    def read(self, num_pages: int, seconds: float) -> None:
        """So many pages were read from disk."""
        if num_pages:
            self.disk_bytes_s = _mean(self.disk_bytes_s, num_pages * self.page_bytes / max(seconds, 1e-9))

    def swap_s(self, num_pages: int) -> float:
        """Seconds to copy so many pages out and in again."""
        return 2 * num_pages * self.page_bytes / self.copy_bytes_s if self.copy_bytes_s else 0.0

    def recompute_s(self, num_tokens: int) -> float:
        """Seconds to compute so many tokens again; infinite as long as no rate is known."""
        return num_tokens / self.prefill_tokens_s if self.prefill_tokens_s else float("inf")

    def swaps(self, num_pages: int, num_tokens: int) -> bool:
        """Whether a sequence of so many computed tokens had better be copied than computed again."""
        if self.policy != "auto":
            return self.policy == "swap"
        return self.swap_s(num_pages) <= self.recompute_s(num_tokens)

    def reads(self, num_pages: int, num_tokens: int) -> bool:
        """Whether pages of so many tokens had better be read from disk than computed again."""
        return num_pages * self.page_bytes <= self.recompute_s(num_tokens) * (self.disk_bytes_s or float("inf"))


class StepTime:
    """Seconds of a step as a line over its tokens, fitted to the latest steps by least squares.

    memory: what each step leaves of the weight of those before.
    """

    def __init__(self, memory: float):
        self._memory = memory
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def __bool__(self) -> bool:
        """Whether anything was measured."""
        return self._y > 0

    def learn(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        memory = self._memory
        self._weight = memory * self._weight + 1.0
        self._x = memory * self._x + num_tokens
        self._y = memory * self._y + seconds
        self._xx = memory * self._xx + num_tokens**2
        self._xy = memory * self._xy + num_tokens * seconds

    @property
    def line(self) -> tuple[float, float]:
        """(seconds of any step, seconds of each token); before anything is measured only their ratio means anything."""
        if not self:
            return _BASE_TOKENS, 1.0
        x, y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - x * x
        slope = y / (x + _BASE_TOKENS)
        if spread > 0.25:
            slope = min(max((self._xy / self._weight - x * y) / spread, slope / 16), y / x)
        return max(y - slope * x, 0.0), slope


def _mean(past: float, value: float) -> float:
    return value if not past else past + _WEIGHT * (value - past)
