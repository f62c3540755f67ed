"""PagePool: the ledger of KV pages and the index of what they contain."""

import pytest

from crane.runtime.pages import PagePool


def test_pages_for_rounds_up_to_whole_pages():
    pool = PagePool(4, 16)
    assert [pool.pages_for(n) for n in (0, 1, 16, 17, 64)] == [0, 1, 1, 2, 4]


def test_shared_page_is_free_only_after_its_last_holder_releases_it():
    pool = PagePool(2, 16)
    first = pool.take(1)
    pool.share(first)
    pool.release(first)
    assert pool.num_free == 1
    pool.check([first])
    pool.release(first)
    assert pool.num_free == 2
    pool.check([])


def test_releasing_a_free_page_and_sharing_a_blank_one_are_refused():
    pool = PagePool(2, 16)
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages)
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.share(pages)


def test_check_finds_a_page_nobody_holds_and_one_held_twice():
    pool = PagePool(2, 16)
    pages = pool.take(1)
    with pytest.raises(AssertionError, match="1 references counted, 0 held"):
        pool.check([])
    with pytest.raises(AssertionError, match="1 references counted, 2 held"):
        pool.check([pages, pages])


def remembered(pool, tokens, salt=""):
    """A text whose full pages are computed, remembered and held: (pages, nodes)."""
    size = pool.page_size
    pages, nodes = pool.take(len(tokens) // size), []
    for place, page in enumerate(pages):
        part = tuple(tokens[place * size : (place + 1) * size])
        nodes.append(pool.remember(nodes[-1] if nodes else None, salt, part, page))
    return pages, nodes


def test_match_finds_the_longest_start_short_of_the_last_token():
    pool = PagePool(8, 2)
    pages, _ = remembered(pool, [1, 2, 3, 4, 5, 6])

    def found(tokens, salt=""):
        return [node.page for node in pool.match(tokens, salt)]

    assert found([1, 2, 3, 4, 5, 6, 7]) == pages
    assert found([1, 2, 3, 4, 5, 6]) == pages[:2]
    assert found([1, 2, 9, 4, 5, 6, 7]) == pages[:1]
    assert found([3, 4, 5, 6, 7]) == []  # the same tokens, but not at the start
    assert found([1, 2, 3], "other") == []


def test_a_second_copy_of_known_content_is_not_entered():
    pool = PagePool(8, 2)
    (page, _), nodes = remembered(pool, [1, 2, 3, 4])
    other = pool.take(1)
    assert pool.remember(None, "", (1, 2), other[0]) is nodes[0]
    pool.release(other)
    assert pool.num_kept == 0  # the copy is blank again
    assert pool.match([1, 2, 0])[0].page == page


def test_kept_pages_are_taken_only_when_no_blank_one_is_left_and_the_end_of_a_text_first():
    pool = PagePool(4, 2)
    pages, _ = remembered(pool, [1, 2, 3, 4, 5, 6])
    pool.release(pages)
    assert (pool.num_free, pool.num_kept) == (4, 3)
    blank = pool.take(1)
    assert blank[0] not in pages and pool.num_kept == 3
    assert pool.take(1) == [pages[2]]
    assert [node.page for node in pool.match([1, 2, 3, 4, 5, 6, 7])] == pages[:2]
    pool.check([blank, [pages[2]]])


def test_sharing_a_kept_page_holds_it_again():
    pool = PagePool(2, 2)
    pages, nodes = remembered(pool, [1, 2, 3, 4])
    pool.release(pages)
    assert pool.num_kept == 2
    assert pool.hold(nodes[:1], 1) == pages[:1]
    assert (pool.num_free, pool.num_kept) == (1, 1)
    pool.check([pages[:1]])


def test_pages_that_are_shared_do_not_count_as_free_for_the_same_sequence():
    pool = PagePool(3, 2)
    pages, nodes = remembered(pool, [1, 2, 3, 4])
    pool.release(pages)
    assert pool.hold(nodes, 4) is None and pool.hold(nodes, 3, spare=1) is None
    held = pool.hold(nodes, 3)
    assert held[:2] == pages and pool.num_free == 0
    pool.check([held])


def copied(pool):
    """The copies that are due, as (source, target) with h1 for host page 1."""
    def name(place):
        return place if place < pool.num_pages else f"h{place - pool.num_pages}"

    made, pool.copies = pool.copies, []
    return [(name(source), name(target)) for source, target in made]


def test_what_the_device_has_no_room_for_goes_on_in_host_memory_and_comes_back():
    pool = PagePool(2, 2, num_host_pages=2)
    pages, nodes = remembered(pool, [1, 2, 3, 4])
    pool.release(pages)
    other = pool.take(2)
    assert copied(pool) == [(pages[1], "h0"), (pages[0], "h1")]
    assert pool.match([1, 2, 3, 4, 5]) == nodes and [node.page for node in nodes] == [None, None]
    assert pool.hold(nodes, 2) is None
    pool.release(other)
    held = pool.hold(nodes, 2)
    assert copied(pool) == [("h1", held[0]), ("h0", held[1])]
    pool.check([held])
    pool.release(held)
    assert pool.take(2) and copied(pool) == []  # host memory has them still
    assert pool.match([1, 2, 3, 4, 5]) == nodes


def test_host_memory_forgets_the_end_of_the_oldest_text_first_and_what_follows_a_forgotten_page():
    pool = PagePool(2, 2, num_host_pages=2)
    for text in ([1, 2, 3, 4], [5, 6, 7, 8]):
        pages, _ = remembered(pool, text)
        pool.release(pages)
    third = pool.take(1)
    assert [len(pool.match(text + [0])) for text in ([1, 2, 3, 4], [5, 6, 7, 8])] == [1, 2]
    pool.check([third])
    pool.take(1)
    assert [len(pool.match(text + [0])) for text in ([1, 2, 3, 4], [5, 6, 7, 8])] == [0, 2]


def test_a_swapped_sequence_keeps_its_host_pages_whatever_else_wants_room():
    pool = PagePool(3, 2, num_host_pages=3)
    pages, nodes = remembered(pool, [1, 2, 3, 4])
    tail = pool.take(1)
    copies = pool.swap_out(pages + tail, nodes)
    assert copied(pool) == [(pages[0], "h0"), (pages[1], "h1"), (tail[0], "h2")] and pool.num_free == 3
    pool.check([], [copies])
    others, _ = remembered(pool, [5, 6, 7, 8, 9, 10])
    pool.release(others)
    pool.take(3)
    assert copied(pool) == [] and pool.match([5, 6, 7]) == []  # no room for the others
    assert pool.swap_out([others[0]], []) is None
    pool.check([others], [copies])


def test_swapping_copies_only_what_the_other_side_does_not_have():
    pool = PagePool(3, 2, num_host_pages=3)
    pages, nodes = remembered(pool, [1, 2, 3, 4])
    tail = pool.take(1)
    copies = pool.swap_out(pages + tail, nodes)
    assert len(copied(pool)) == 3
    back = pool.hold(nodes, 3, copies)
    assert back[:2] == pages and copied(pool) == [("h2", back[2])]  # nobody had taken the two
    again = pool.swap_out(back, nodes)
    assert copied(pool) == [(back[2], "h2")]
    pool.check([], [again])


def test_flush_leaves_a_swapped_sequence_its_host_pages():
    pool = PagePool(2, 2, num_host_pages=2)
    pages, nodes = remembered(pool, [1, 2, 3, 4])
    copies = pool.swap_out(pages, nodes)
    pool.flush()
    assert pool.match([1, 2, 3, 4, 5]) == [] and copied(pool)
    pool.check([], [copies])
    held = pool.hold([], 2, copies)
    assert copied(pool) == [("h0", held[0]), ("h1", held[1])] and pool.host.num_free == 2
    pool.check([held])


def test_flush_forgets_everything_and_leaves_held_pages_to_their_holders():
    pool = PagePool(4, 2)
    pages, _ = remembered(pool, [1, 2])
    held, _ = remembered(pool, [5, 6])
    pool.release(pages)
    assert pool.flush() == 1
    assert pool.match([1, 2, 3]) == pool.match([5, 6, 7]) == []
    pool.check([held])
    pool.release(held)
    assert (pool.num_free, pool.num_kept) == (4, 0)
