"""The KV pages of the device and their copies in host memory: who holds them, what they contain.

A page holds the K and V of `page_size` consecutive tokens in every layer. Pages are reference-counted, so
that sequences can share them. A full page is remembered by its content: the tokens in it and all tokens before
it. When nobody holds it any more it stays, until its memory is needed, for the next sequence that starts
the same way; then it goes on in a page of host memory, if there are any, until that is needed, too.

Host arithmetic only, no tensors: what has to be copied is noted in `copies`, in order, for the runner.
"""

from collections.abc import Iterable

from crane.runtime.ledger import Ledger, Node


class PagePool:
    """`num_pages` pages on the device, `num_host_pages` of the same size in host memory, one prefix index of both.

    Written by Scheduler only. copies: (source, target) in the order they have to be made; a number below
    `num_pages` is a page, `num_pages + i` host page i.
    """

    def __init__(self, num_pages: int, page_size: int, num_host_pages: int = 0):
        self.num_pages = num_pages
        self.page_size = page_size
        self.device = Ledger(num_pages)
        self.host = Ledger(num_host_pages)
        self.copies: list[tuple[int, int]] = []
        self._nodes: dict[tuple, Node] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be taken: blank ones, and kept ones that would lose their content."""
        return self.device.num_free

    @property
    def num_kept(self) -> int:
        return self.device.num_kept

    def num_sole(self, pages: list[int]) -> int:
        """How many of these pages only their holder holds: releasing them makes them free."""
        return self.device.num_sole(pages)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages `num_tokens` tokens occupy."""
        return -(-num_tokens // self.page_size)

    # --- holding pages

    def take(self, count: int) -> list[int]:
        """`count` pages with one reference each. The caller has checked `num_free`."""
        assert 0 <= count <= self.num_free, f"take({count}) with {self.num_free} pages free"
        return [self._take_page() for _ in range(count)]

    def _take_page(self) -> int:
        if not self.device.num_blank:
            self._evict(self.device.oldest)
        return self.device.take_blank()

    def _evict(self, page: int) -> None:
        """Make a kept page blank; its content goes to host memory unless it is there already or cannot."""
        node = self.device.node_of[page]
        if node.host is None and self.host.num_free:
            host_page = self._take_host_page()
            self._put(node, host_page, page)
            self.host.release([host_page])
        self.device.drop(page)
        node.page = None
        if node.host is None:
            self._forget(node)

    def _take_host_page(self) -> int:
        """A host page with one reference. What it contained is forgotten unless the device has it, too."""
        if not self.host.num_blank:
            node = self.host.drop(self.host.oldest)
            node.host = None
            if node.page is None:
                self._forget(node)
        return self.host.take_blank()

    def _put(self, node: Node | None, host_page: int, page: int) -> None:
        """Copy a page into a held host page."""
        self.copies.append((page, self.num_pages + host_page))
        if node is not None:
            node.host = host_page
            self.host.node_of[host_page] = node

    def due_copies(self) -> list[tuple[int, int]]:
        """`copies`, which the caller makes now."""
        due, self.copies = self.copies, []
        return due

    def share(self, pages: Iterable[int]) -> None:
        """One more reference on each of `pages`, held or kept."""
        self.device.share(pages)

    def release(self, pages: list[int]) -> None:
        """One reference less on each of `pages`, a sequence's in order; those without any become free."""
        self.device.release(pages)

    def hold(self, nodes: list[Node], count: int, host_pages: list[int] = (), spare: int = 0) -> list[int] | None:
        """`count` pages, the first of them with what `nodes` and then `host_pages` contain; None: too few are free.

        host_pages: one of the first pages each, held by the caller, nodes' own first; they are released.
        spare: how many pages have to be left over.
        """
        here = [node.page for node in nodes if node.page is not None]
        missing = count - len(here)
        if missing + spare > self.num_free - sum(map(self.device.is_kept, here)):
            return None
        copies = [node.host for node in nodes if node.host is not None]
        self.host.share(copies)  # taking pages must not push them out
        self.device.share(here)
        new = iter(self.take(missing))
        pages = [node.page if node.page is not None else next(new) for node in nodes]
        pages += new
        for place, page in enumerate(pages):
            node = nodes[place] if place < len(nodes) else None
            if node is None and place < len(host_pages):
                self.copies.append((self.num_pages + host_pages[place], page))
            elif node is not None and node.page is None:
                self.copies.append((self.num_pages + node.host, page))
                self._enter(node, page)
        self.host.release(copies)
        self.host.release(list(host_pages))
        return pages

    def to_host(self, node: Node) -> bool:
        """Hold a host page with what a remembered page contains; False: there is no room."""
        if node.host is not None:
            self.host.share([node.host])
        elif self.host.num_free:
            self._put(node, self._take_host_page(), node.page)
        else:
            return False
        return True

    def take_host_pages(self, count: int, nodes: list[Node]) -> list[int] | None:
        """Host pages for what comes from elsewhere behind `nodes`, which stay where they are; None: no room."""
        there = [node.host for node in nodes if node.host is not None]
        if count > self.host.num_free - sum(map(self.host.is_kept, there)):
            return None
        self.host.share(there)
        pages = [self._take_host_page() for _ in range(count)]
        self.host.release(there)
        return pages

    def adopt(self, parent: Node | None, salt: str, tokens: tuple[int, ...], host_page: int) -> Node | None:
        """Remember what a held host page contains now. Returns its node; None: what comes before it was forgotten."""
        if parent is not None and self._nodes.get(parent.key) is not parent:
            return None
        node = self._node(parent, salt, tokens)
        if node.host is None:
            node.host = host_page
            self.host.node_of[host_page] = node
        return node

    def swap_out(self, pages: list[int], nodes: list[Node]) -> list[int] | None:
        """Host pages that hold what `pages` contain, whose first are `nodes`; the pages are released. None: no room.

        What host memory has already is not copied again.
        """
        there = [node.host for node in nodes if node.host is not None]
        if len(pages) - len(there) > self.host.num_free - sum(map(self.host.is_kept, there)):
            return None
        self.host.share(there)
        host_pages = []
        for place, page in enumerate(pages):
            node = nodes[place] if place < len(nodes) else None
            if node is not None and node.host is not None:
                host_pages.append(node.host)
            else:
                host_pages.append(self._take_host_page())
                self._put(node, host_pages[-1], page)
        self.device.release(pages)
        return host_pages

    # --- what pages contain

    def match(self, token_ids: list[int], salt: str = "") -> list[Node]:
        """The longest remembered start of a text, page by page, short of its last token.

        That one is always computed, because the next is drawn from its logits.
        """
        found: list[Node] = []
        size = self.page_size
        for start in range(0, len(token_ids) - size, size):
            parent = found[-1] if found else None
            node = self._nodes.get((parent, salt, tuple(token_ids[start : start + size])))
            if node is None:
                break
            found.append(node)
        return found

    def remember(self, parent: Node | None, salt: str, tokens: tuple[int, ...], page: int) -> Node:
        """Note what a held page contains now that it is full. Returns its node, or the one of another page
        that has the same content already; then this page stays unremembered."""
        node = self._node(parent, salt, tokens)
        if node.page is None:  # new, or only in host memory so far
            self._enter(node, page)
        return node

    def _node(self, parent: Node | None, salt: str, tokens: tuple[int, ...]) -> Node:
        """The node of this content, a new one if need be."""
        node = Node(parent, salt, tokens)
        known = self._nodes.setdefault(node.key, node)
        if known is node and parent is not None:
            parent.children.add(node)
        return known

    def _enter(self, node: Node, page: int) -> None:
        node.page = page
        self.device.node_of[page] = node

    def _forget(self, node: Node) -> None:
        """Remove a node that is nowhere any more, and all that follow it: they cannot be found without it."""
        if node.parent is not None:
            node.parent.children.discard(node)
        doomed = [node]
        while doomed:
            node = doomed.pop()
            del self._nodes[node.key]
            doomed += node.children
            if node.page is not None:
                self.device.drop(node.page)
            if node.host is not None:
                self.host.drop(node.host)
            node.page = node.host = None

    def flush(self) -> int:
        """Forget all content; returns how many kept pages become blank. Held ones stay with their holders."""
        self._nodes.clear()
        self.host.drop_all()
        return self.device.drop_all()

    def reset(self) -> None:
        """Every page blank, whoever holds it."""
        self.__init__(self.num_pages, self.page_size, self.host.size)

    def check(self, tables: Iterable[list[int]], host_tables: Iterable[list[int]] = ()) -> None:
        """Prove the ledger against the device and the host pages of all who hold any. Raises AssertionError."""
        self.device.check(tables, "page")
        self.host.check(host_tables, "host page")
        nodes = self._nodes.values()
        assert {n.page: n for n in nodes if n.page is not None} == self.device.node_of, "pages and nodes differ"
        assert {n.host: n for n in nodes if n.host is not None} == self.host.node_of, "host pages and nodes differ"
        for node in nodes:
            assert node.page is not None or node.host is not None, "a remembered page is nowhere"
            assert node.parent is None or self._nodes.get(node.parent.key) is node.parent, "a page lost its start"
            assert node.parent is None or node in node.parent.children, "a page is not among its parent's"
        assert sum(len(n.children) for n in nodes) == sum(n.parent is not None for n in nodes), "a child is lost"
