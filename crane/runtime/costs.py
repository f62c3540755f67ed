"""What moving KV pages and what computing them costs here, measured as the engine runs. Torch-free."""

# How much of the past a new measurement replaces.
_WEIGHT = 0.1


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


def _mean(past: float, value: float) -> float:
    return value if not past else past + _WEIGHT * (value - past)
