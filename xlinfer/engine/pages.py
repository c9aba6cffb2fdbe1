"""Which pages are free, who shares them, and which prefix each one holds.

Host-side; the device only ever sees page numbers. Page 0 is never handed out (kvcache.py).
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

FIRST_PAGE = 1


def page_keys(
    tokens: Sequence[int], page_size: int, known: Sequence[bytes], salt: str
) -> list[bytes]:
    """The keys of all full pages of `tokens`, the first `known` of them given.

    SHA-256 over the key before and the page's tokens, so a key names a whole prefix and
    cannot be met by chance or design; `salt` is the first key's predecessor.
    """
    keys = list(known)
    key = keys[-1] if keys else hashlib.sha256(salt.encode()).digest()
    for start in range(len(keys) * page_size, len(tokens) - page_size + 1, page_size):
        page = array("q", tokens[start : start + page_size])
        key = hashlib.sha256(key + page.tobytes()).digest()
        keys.append(key)
    return keys


class PagePool:
    """Reference-counted pages. One that nobody holds keeps its prefix until it is taken again,
    the longest unused first.

    Invariant, counted by `check`: a page is free exactly when nobody holds it, and every key
    leads to the one page that carries it.
    """

    def __init__(self, num_pages: int):
        self._holders = [0] * num_pages
        self._free = OrderedDict.fromkeys(range(FIRST_PAGE, num_pages))  # longest unused first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_pages(self) -> int:
        """That can be held at all."""
        return len(self._holders) - FIRST_PAGE

    def take(self, count: int) -> list[int]:
        """`count` pages for one holder; the caller has seen that so many are free."""
        assert count <= self.num_free, f"asked for {count} pages, {self.num_free} are free"
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
            self._forget(page)
        return pages

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the longest run of `keys`, from the first on, that is cached."""
        pages = []
        for key in keys:
            if (page := self._page_of.get(key)) is None:
                break
            pages.append(page)
        return pages

    def num_unheld(self, pages: Iterable[int]) -> int:
        """How many of them `share` would take from the free ones."""
        return sum(self._holders[page] == 0 for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each."""
        for page in pages:
            if self._holders[page] == 0:
                del self._free[page]
            self._holders[page] += 1

    def give(self, pages: Sequence[int]) -> None:
        """One holder fewer for each. Of one sequence's pages the last are reused first, since
        the first are the likelier prefix."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free[page] = None

    def remember(self, page: int, key: bytes) -> None:
        """A held page now carries this prefix. The first page to carry a key keeps it."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def forget_all(self) -> None:
        """No prefix is cached any more: the weights that computed them are gone."""
        self._page_of.clear()
        self._key_of.clear()

    def _forget(self, page: int) -> None:
        if (key := self._key_of.pop(page, None)) is not None:
            del self._page_of[key]

    def check(self, held: Iterable[int]) -> None:
        """AssertionError unless `held`, every holder's pages one after the other, accounts for
        every page that is not free."""
        holders = [0] * len(self._holders)
        for page in held:
            holders[page] += 1
        assert holders == self._holders, "a page's holders were miscounted"
        unheld = {p for p in range(FIRST_PAGE, len(holders)) if holders[p] == 0}
        assert unheld == set(self._free), "free pages are not those that nobody holds"
        assert {p: k for k, p in self._page_of.items()} == self._key_of
