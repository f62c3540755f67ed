"""The page tables of sequences: giving them pages, noting what they fill, taking pages back. Torch-free."""

from collections.abc import Iterable

from crane.runtime.costs import Costs
from crane.runtime.ledger import Node
from crane.runtime.pages import PagePool
from crane.runtime.sequence import Sequence
from crane.runtime.tiers import DiskLink


class PageTables:
    """Moves sequences in and out of memory; who and when is the scheduler's to say."""

    def __init__(self, pool: PagePool, *, prefix_cache: bool, costs: Costs | None = None, disk: DiskLink | None = None):
        self.pool = pool
        self.prefix_cache = prefix_cache
        self.costs = costs or Costs(page_bytes=0)
        self.disk = disk
        self.num_swaps = 0  # how often a sequence that gave up its pages left them in host memory
        self.num_cached_tokens = 0  # prompt tokens that did not have to be computed
        self.num_host_tokens = 0  # of those: tokens that came from host memory
        self.num_disk_tokens = 0  # and tokens that came from disk

    def poll(self) -> None:
        """Take note of what came from disk and what went there."""
        if self.disk is not None:
            self.disk.poll()

    def may_share(self, sequence: Sequence) -> bool:
        """What is wanted of every prompt position has to be computed at every position."""
        return self.prefix_cache and not sequence.wants_prompt_logprobs and sequence.pooling != "mean"

    def match(self, sequence: Sequence) -> list[Node]:
        """The remembered pages that a sequence without any starts with."""
        if not self.may_share(sequence):
            return []
        nodes = self.pool.match(sequence.token_ids, sequence.salt)
        size = self.pool.page_size
        most = len(nodes) * size
        if sequence.deterministic:  # its last prompt token is computed together with those before it
            most = min(most, sequence.num_prompt - 1)
        return nodes[: sequence.num_shared(most, size) // size]

    def awaits_disk(self, sequence: Sequence) -> bool:
        """Whether pages that it starts with are being read."""
        if self.disk is None or sequence.deterministic or not self.may_share(sequence):
            return False
        return self.disk.look_up(sequence)

    def start(self, sequence: Sequence, spare: int) -> bool:
        """Pages for the whole past of a sequence without any: those it left in host memory, or those it can share,
        and new ones; False: fewer than that and `spare` more are free."""
        nodes = sequence.nodes if sequence.host_pages else self.match(sequence)
        from_host = sum(node.page is None for node in nodes)
        count = self.pool.pages_for(sequence.num_tokens)
        pages = self.pool.hold(nodes, count, sequence.host_pages, spare)
        if pages is None:
            return False
        if not sequence.host_pages:
            sequence.num_computed = len(nodes) * self.pool.page_size
            self._fork(sequence, pages)
        sequence.pages, sequence.nodes, sequence.host_pages = pages, nodes, []
        if sequence.admitted_s is None:
            self._count_cached(sequence, from_host)
        return True

    def _fork(self, sequence: Sequence, pages: list[int]) -> None:
        """The rest of its prompt, up to the last token: from the page of the request's first choice that ends it."""
        leader, last = sequence.leader, sequence.num_prompt - 1
        if leader is None or not leader.pages or sequence.deterministic or not self.may_share(sequence):
            return
        if sequence.num_computed < last < sequence.num_computed + self.pool.page_size:
            place = last // self.pool.page_size
            self.pool.copies.append((leader.pages[place], pages[place]))
            sequence.num_computed = last

    def _count_cached(self, sequence: Sequence, from_host: int) -> None:
        sequence.num_cached = sequence.num_computed
        self.num_cached_tokens += sequence.num_cached
        size, from_disk = self.pool.page_size, [node for node in sequence.nodes if node.from_disk]
        self.num_disk_tokens += len(from_disk) * size
        self.num_host_tokens += max(from_host - len(from_disk), 0) * size
        for node in from_disk:
            node.from_disk = False

    def resume(self, sequence: Sequence) -> bool:
        """The next token's page for a sequence that kept its pages; False: none is free."""
        missing = max(self.pool.pages_for(sequence.num_tokens) - len(sequence.pages), 0)
        if missing > self.pool.num_free:
            return False
        sequence.pages += self.pool.take(missing)
        return True

    def remember(self, sequence: Sequence) -> None:
        """Enter the pages that a step has filled into the prefix index."""
        size = self.pool.page_size
        most = sequence.num_shared(sequence.num_computed, size) if self.prefix_cache else 0
        while (len(sequence.nodes) + 1) * size <= most:
            place = len(sequence.nodes)
            tokens = tuple(sequence.token_ids[place * size : (place + 1) * size])
            parent = sequence.nodes[-1] if sequence.nodes else None
            node = self.pool.remember(parent, sequence.salt, tokens, sequence.pages[place])
            if node.page != sequence.pages[place]:  # another sequence was first: one copy serves both
                self.pool.share([node.page])
                self.pool.release([sequence.pages[place]])
                sequence.pages[place] = node.page
            sequence.nodes.append(node)

    def give_up(self, sequence: Sequence) -> None:
        """Its pages are needed: leave what they contain in host memory if that is worth it and fits, else nowhere."""
        used = sequence.pages[: self.pool.pages_for(sequence.num_computed)]
        num_copied = len(used) - sum(node.host is not None for node in sequence.nodes)
        if used and self.costs.swaps(num_copied, sequence.num_computed):
            host_pages = self.pool.swap_out(used, sequence.nodes)
            if host_pages is not None:
                self.pool.release(sequence.pages[len(used) :])
                sequence.pages, sequence.host_pages = [], host_pages
                self.num_swaps += 1
                return
        self.release(sequence)

    def end(self, sequence: Sequence) -> None:
        """It has ended: its pages are free at once, and on their way to the disk if there is one."""
        if self.disk is not None and not sequence.deterministic:
            self.disk.save(sequence.nodes)
        self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Take all its pages back."""
        self.pool.release(sequence.pages)
        self.pool.host.release(sequence.host_pages)
        sequence.pages, sequence.host_pages = [], []
        sequence.nodes = []
        sequence.num_computed = 0

    def flush(self, live: Iterable[Sequence]) -> int:
        """Forget all remembered pages, in every tier; live sequences start theirs anew. Returns how many pages of the
        device became blank."""
        for sequence in live:
            sequence.salt = f"{sequence.salt}\0flushed"  # what it remembers from here on has no known start
            sequence.nodes = []
        if self.disk is not None:
            self.disk.flush()
        return self.pool.flush()

    def reset(self) -> None:
        """Every page blank. Only while nothing lives."""
        if self.disk is not None:
            self.disk.settle()
        self.pool.reset()

    def check(self, live: Iterable[Sequence]) -> None:
        """Prove all tables and the ledgers of all tiers consistent. Raises AssertionError."""
        for sequence in live:
            assert not (sequence.pages and sequence.host_pages), "a sequence is in two places"
            assert sequence.start <= len(sequence.pages or sequence.host_pages) * self.pool.page_size
            assert not sequence.num_flying or sequence.pages, "the pages of a launched step were taken away"
        held = [s.host_pages for s in live] + ([self.disk.held] if self.disk is not None else [])
        self.pool.check([s.pages for s in live], held)
