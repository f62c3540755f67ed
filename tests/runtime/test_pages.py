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
    assert pool.num_kept_of(nodes) == 2
    pool.share(pages[:1])
    assert (pool.num_free, pool.num_kept_of(nodes)) == (1, 1)
    pool.check([pages[:1]])


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
