"""The page pool: against a naive model, and the keys that name prefixes."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xlinfer.engine.pages import PagePool, page_keys

NUM_PAGES = 9  # eight to hand out
KEYS = [bytes([i]) * 32 for i in range(6)]


class TestKeys:
    def test_only_full_pages_have_keys(self):
        assert [len(page_keys(range(n), 4, [], "")) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]

    def test_a_key_names_the_whole_prefix(self):
        """The same page of tokens after another first page is another page."""
        first, second = page_keys([1, 2, 3, 4], 2, [], "")
        other_first, other_second = page_keys([1, 9, 3, 4], 2, [], "")
        assert len({first, second, other_first, other_second}) == 4
        assert page_keys([1, 2, 3, 4, 5], 2, [], "") == [first, second]
        assert page_keys([3, 4], 2, [], "") != [second]

    def test_salts_share_nothing(self):
        keys = [page_keys([1, 2, 3, 4], 2, [], salt) for salt in ("", "a", "b")]
        assert len({key for some in keys for key in some}) == 6

    def test_known_keys_are_extended(self):
        tokens = list(range(20))
        whole = page_keys(tokens, 3, [], "s")
        for known in range(len(whole) + 1):
            assert page_keys(tokens, 3, whole[:known], "s") == whole

    def test_tokens_are_not_confused_across_their_borders(self):
        assert page_keys([1, 23], 2, [], "") != page_keys([12, 3], 2, [], "")
        assert page_keys([256, 0], 2, [], "") != page_keys([0, 1], 2, [], "")
        assert all(len(key) == 32 for key in page_keys([2**31 - 1, 0], 1, [], ""))


class TestPool:
    def test_page_zero_is_never_handed_out(self):
        pool = PagePool(NUM_PAGES)
        assert pool.num_pages == pool.num_free == 8
        assert sorted(pool.take(8)) == list(range(1, 9))
        with pytest.raises(AssertionError, match="asked for 1 pages, 0 are free"):
            pool.take(1)

    def test_the_longest_unused_goes_first(self):
        """And of one sequence's pages the last: its first are the likelier prefix."""
        pool = PagePool(NUM_PAGES)
        early, late = pool.take(4), pool.take(4)
        pool.give(late)
        pool.give(early)
        assert pool.take(8) == [*reversed(late), *reversed(early)]

    def test_a_prefix_stays_until_its_page_is_taken(self):
        pool = PagePool(NUM_PAGES)
        pages = pool.take(3)
        for page, key in zip(pages, KEYS, strict=False):
            pool.remember(page, key)
        pool.give(pages)
        pool.take(5)  # never used before
        assert pool.find(KEYS) == pages
        assert pool.take(1) == pages[2:]
        assert pool.find(KEYS) == pages[:2]
        assert pool.num_unheld(pages[:2]) == 2
        pool.share(pages[:2])
        assert pool.num_free == pool.num_unheld(pages[:2]) == 0
        pool.check([*pages[:2], *set(range(1, 9)).difference(pages[:2])])

    def test_sharing_makes_a_page_recently_used(self):
        pool = PagePool(4)
        first, second, third = pool.take(3)
        pool.give([third, second, first])  # first is now the longest unused
        pool.share([first])
        pool.give([first])
        assert pool.take(3) == [second, third, first]

    def test_a_run_ends_at_the_first_key_that_is_missing(self):
        pool = PagePool(NUM_PAGES)
        pages = pool.take(3)
        pool.remember(pages[0], KEYS[0])
        pool.remember(pages[2], KEYS[2])
        assert pool.find(KEYS[:3]) == pages[:1]
        assert pool.find(KEYS[1:3]) == []

    def test_the_first_page_keeps_a_key(self):
        pool = PagePool(NUM_PAGES)
        first, second = pool.take(2)
        pool.remember(first, KEYS[0])
        pool.remember(second, KEYS[0])
        pool.remember(first, KEYS[1])
        assert pool.find([KEYS[0]]) == [first]
        assert pool.find([KEYS[1]]) == []
        pool.check([first, second])

    def test_forget_all(self):
        pool = PagePool(NUM_PAGES)
        pages = pool.take(2)
        pool.remember(pages[0], KEYS[0])
        pool.forget_all()
        assert pool.find(KEYS) == []
        pool.check(pages)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda pool: pool._holders.__setitem__(1, 2),
            lambda pool: pool._holders.__setitem__(8, 1),
            lambda pool: pool._free.popitem(),
            lambda pool: pool._free.__setitem__(1, None),
            lambda pool: pool._page_of.__setitem__(KEYS[1], 2),
            lambda pool: pool._key_of.clear(),
            lambda pool: pool.take(1),
            lambda pool: pool.give([2]),
        ],
        ids=[
            "counted twice", "held by nobody", "lost", "free and held", "key without its page",
            "page without its key", "leaked", "given twice",
        ],
    )  # fmt: skip
    def test_check_finds_planted_miscounts(self, damage):
        pool = PagePool(NUM_PAGES)
        pages = pool.take(3)
        pool.remember(1, KEYS[0])
        pool.check(pages)
        damage(pool)
        with pytest.raises(AssertionError):
            pool.check(pages)


class PoolMachine(RuleBasedStateMachine):
    """PagePool beside lists: each holder's pages, the free ones in order, the keys in order."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.holders: list[list[int]] = []
        self.free = list(range(1, NUM_PAGES))
        self.keys: list[tuple[bytes, int]] = []

    @rule(data=st.data())
    def take(self, data):
        count = data.draw(st.integers(0, len(self.free)))
        taken, self.free = self.free[:count], self.free[count:]
        self.keys = [(key, page) for key, page in self.keys if page not in taken]
        assert self.pool.take(count) == taken
        self.holders.append(taken)

    @rule(data=st.data())
    def find_and_share(self, data):
        asked = data.draw(st.lists(st.sampled_from(KEYS), unique=True))
        found = []
        while len(found) < len(asked) and asked[len(found)] in dict(self.keys):
            found.append(dict(self.keys)[asked[len(found)]])
        assert self.pool.find(asked) == found
        assert self.pool.num_unheld(found) == len(set(found) & set(self.free))
        self.pool.share(found)
        self.free = [page for page in self.free if page not in found]
        self.holders.append(found)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def give(self, data):
        pages = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.give(pages)
        held = {page for holder in self.holders for page in holder}
        self.free += [page for page in reversed(pages) if page not in held]

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data())
    def remember(self, data):
        page = data.draw(st.sampled_from([page for holder in self.holders for page in holder]))
        key = data.draw(st.sampled_from(KEYS))
        self.pool.remember(page, key)
        if all(key != k and page != p for k, p in self.keys):
            self.keys.append((key, page))

    @rule(sure=st.sampled_from([False, False, False, True]))
    def forget_all(self, sure):
        if sure:
            self.pool.forget_all()
            self.keys = []

    @invariant()
    def agree(self):
        self.pool.check(page for holder in self.holders for page in holder)
        assert self.pool.num_free == len(self.free)
        assert [self.pool.find([key]) for key, _ in self.keys] == [[page] for _, page in self.keys]


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
