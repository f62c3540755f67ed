"""Between the page pool and the disk: which pages go there and which come back. Torch-free.

Pages pass through host memory in both directions, so that no step waits for a file.
"""

import time
from array import array
from collections.abc import Callable

from crane.runtime.costs import Costs
from crane.runtime.disk import DiskTier, Job, next_name, root_name
from crane.runtime.ledger import Node
from crane.runtime.pages import PagePool
from crane.runtime.sequence import Sequence

# The part of host memory that may be on its way to or from the disk, each.
_SHARE = 4
_POLL_S = 0.001


class DiskLink:
    """Saves the pages of sequences that end, and finds those of new ones. All calls from the scheduler's thread.

    buffer: the memory of a host page.
    """

    def __init__(self, pool: PagePool, disk: DiskTier, costs: Costs, buffer: Callable[[int], memoryview]):
        self.pool = pool
        self.disk = disk
        self.costs = costs
        self.num_skipped = 0  # pages not written because too many were on their way
        self._buffer = buffer
        # What waits for the copies that are due: they fill host pages that are to be written, and empty or even
        # fill, for somebody who is gone, those that are to be read into. All are held.
        self._outbox: list[tuple[Node, int]] = []
        self._reads: list[Job] = []
        self._writing: dict[Job, list[int]] = {}
        self._reading: dict[Job, tuple[list[int], Node | None, str]] = {}
        self._wanted: dict[bytes, Job] = {}  # names of pages that are being read

    @property
    def has_work(self) -> bool:
        """Pages wait to be handed over, once the copies that are due are made."""
        return bool(self._outbox or self._reads)

    @property
    def held(self) -> list[int]:
        """Host pages that are held for this."""
        return [page for pages in self._writing.values() for page in pages] + [
            page for pages, _, _ in self._reading.values() for page in pages] + [
            page for _, page in self._outbox]  # fmt: skip

    def save(self, nodes: list[Node]) -> None:
        """These pages' sequence has ended: note those that the disk does not have."""
        if not self.disk.ready or not self.disk.writable or (nodes and "\0flushed" in nodes[0].salt):
            return
        limit = self.pool.host.size // _SHARE - len(self._outbox) - sum(map(len, self._writing.values()))
        new = [node for node in nodes if not node.on_disk]
        self.num_skipped += max(len(new) - limit, 0)
        for node in new[: max(limit, 0)]:
            if not self.pool.to_host(node):
                return
            node.on_disk = True
            self._outbox.append((node, node.host))

    def hand_over(self) -> None:
        """The copies that were due are made: start what was noted."""
        if self._outbox:
            texts = _texts([node for node, _ in self._outbox])
            pages = [(self._name(node), text, self._buffer(page)) for (node, page), text in zip(self._outbox, texts)]
            job = Job("write", pages, self.disk.epoch)
            self._writing[job] = [page for _, page in self._outbox]
            self.disk.submit(job)
        for job in self._reads:
            self.disk.submit(job)
        self._outbox, self._reads = [], []

    def look_up(self, sequence: Sequence) -> bool:
        """Whether the sequence waits for pages that the disk has behind those in memory. Asks once."""
        if sequence.disk_job is None and self.disk.ready:
            sequence.disk_job = self._read(sequence) or False
        self.poll()
        return sequence.disk_job in self._reading

    def _read(self, sequence: Sequence) -> Job | None:
        size, tokens = self.pool.page_size, sequence.token_ids
        nodes = self.pool.match(tokens, sequence.salt)
        name = self._name(nodes[-1]) if nodes else root_name(self.disk.print, sequence.salt)
        limit = min((len(tokens) - 1) // size - len(nodes), self.pool.host.size // _SHARE)
        names = []
        for start in range(len(nodes) * size, (len(nodes) + max(limit, 0)) * size, size):
            name = next_name(name, tuple(tokens[start : start + size]))
            if name in self._wanted:
                return self._wanted[name]  # another sequence asked first
            if not self.disk.has(name):
                break
            names.append(name)
        if not names or not self.costs.reads(len(names), len(names) * size):
            return None
        pages = self.pool.take_host_pages(len(names), nodes)
        if pages is None:
            return None
        text = memoryview(array("I", tokens))  # one for all pages
        ends = [(len(nodes) + place + 1) * size for place in range(len(names))]
        job = Job("read", [(name, text[:end], self._buffer(page)) for name, end, page in zip(names, ends, pages)],
                  self.disk.epoch)  # fmt: skip
        self._reads.append(job)
        self._reading[job] = pages, nodes[-1] if nodes else None, sequence.salt
        self._wanted.update(dict.fromkeys(names, job))
        return job

    def poll(self) -> None:
        """Take note of what the disk's thread has finished."""
        while self.disk.finished:
            job = self.disk.finished.popleft()
            if job in self._writing:
                self.pool.host.release(self._writing.pop(job))
            elif job in self._reading:
                self._take_in(job)

    def _take_in(self, job: Job) -> None:
        pages, parent, salt = self._reading.pop(job)
        for name, _, _ in job.pages:
            del self._wanted[name]
        self.costs.read(job.num_done, job.seconds)
        size = self.pool.page_size
        count = job.num_done if job.epoch == self.disk.epoch else 0
        for (name, text, _), page in list(zip(job.pages, pages))[:count]:
            parent = self.pool.adopt(parent, salt, tuple(text[-size:]), page)
            if parent is None:
                break
            parent.digest, parent.on_disk, parent.from_disk = name, True, True
        self.pool.host.release(pages)

    def wait(self) -> None:
        """There is nothing to compute: let the disk's thread have the processor if pages are being read."""
        if self._reading:
            time.sleep(_POLL_S)

    def settle(self) -> None:
        """Wait for the disk's thread, and let go of every host page."""
        for job in self._reads:
            self._reading.pop(job)
            for name, _, _ in job.pages:
                del self._wanted[name]
        while self._writing or self._reading:
            self.poll()
            time.sleep(_POLL_S)
        self._outbox, self._reads = [], []

    def flush(self) -> None:
        """Forget all, on disk too."""
        self.pool.host.release([page for _, page in self._outbox])
        self._outbox = []
        self.disk.flush()

    def _name(self, node: Node) -> bytes:
        """SHA-256 of everything up to this page."""
        unnamed = []
        while node is not None and not node.digest:
            unnamed.append(node)
            node = node.parent
        name = node.digest if node is not None else root_name(self.disk.print, unnamed[-1].salt)
        for node in reversed(unnamed):
            name = node.digest = next_name(name, node.tokens)
        return name


def _texts(nodes: list[Node]) -> list[memoryview]:
    """Every token up to each page's last; those of one text, which come in its order, share their memory."""
    texts: list[memoryview] = []
    follower = None
    for node in reversed(nodes):
        if follower is not None and follower.parent is node:
            texts.append(texts[-1][: -len(follower.tokens)])
        else:
            texts.append(_text(node))
        follower = node
    return texts[::-1]


def _text(node: Node | None) -> memoryview:
    parts = []
    while node is not None:
        parts.append(node.tokens)
        node = node.parent
    return memoryview(array("I", [token for part in reversed(parts) for token in part]))
