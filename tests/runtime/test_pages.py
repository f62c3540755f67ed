"""PagePool: the ledger of KV pages."""

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


def test_releasing_a_free_page_is_refused():
    pool = PagePool(2, 16)
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages)


def test_check_finds_a_page_nobody_holds_and_one_held_twice():
    pool = PagePool(2, 16)
    pages = pool.take(1)
    with pytest.raises(AssertionError, match="1 references counted, 0 held"):
        pool.check([])
    with pytest.raises(AssertionError, match="1 references counted, 2 held"):
        pool.check([pages, pages])
