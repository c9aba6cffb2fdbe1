"""Which of several replicas computes a request. No jax, no clock."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from xlinfer.engine.pages import page_keys
from xlinfer.request import Request

# Tokens of a prompt that an answer weighs as when replicas are compared: its length is not known,
# and the answers of ShareGPT, by which the field measures, have some 200 tokens.
ANSWER = 256


@dataclass
class _Placed:
    replica: int
    load: int


class Placement:
    """A request goes where it costs least. The tokens that a replica has to compute for others
    delay this request; those of its own prompt that are not cached there delay it and whoever
    comes after it, so they count twice. Of equals, the first.

    A prefix counts as cached where a prompt that begins with it was sent, so that prompts which
    arrive together and begin alike stay together too; the oldest are forgotten when as many pages
    followed as the replicas have.

    `load` holds, for each replica, tokens that unfinished requests still cost, by estimate.
    """

    def __init__(self, replicas: int, *, page_size: int, num_pages: int, prefix_caching: bool):
        """`num_pages` are those of one replica."""
        self.load = [0] * replicas
        self._page_size, self._most_keys = page_size, replicas * num_pages
        self._prefix_caching = prefix_caching
        self._sent: OrderedDict[bytes, set[int]] = OrderedDict()  # page key -> replicas
        self._placed: dict[str, _Placed] = {}

    def place(self, request: Request) -> int:
        """The request's replica, until it has `ended`."""
        keys = []
        if self._prefix_caching:
            prompt = request.prompt_token_ids
            keys = page_keys(prompt, self._page_size, [], request.cache_salt)
        tokens = len(request.prompt_token_ids) + len(request.encoder_token_ids)
        costs = [tokens - cached * self._page_size for cached in self._cached(keys)]
        replica = min(range(len(costs)), key=lambda i: self.load[i] + 2 * costs[i])
        for key in keys:
            self._sent.setdefault(key, set()).add(replica)
            self._sent.move_to_end(key)
        while len(self._sent) > self._most_keys:
            self._sent.popitem(last=False)
        self._placed[request.request_id] = _Placed(replica, costs[replica] + ANSWER)
        self.load[replica] += costs[replica] + ANSWER
        return replica

    def replica_of(self, request_id: str) -> int | None:
        """Of an unfinished request."""
        found = self._placed.get(request_id)
        return None if found is None else found.replica

    def answering(self, request_id: str) -> None:
        """Its prompt has been computed."""
        if (found := self._placed.get(request_id)) is not None:
            self.load[found.replica] -= found.load - ANSWER
            found.load = ANSWER

    def ended(self, request_id: str) -> None:
        if (found := self._placed.pop(request_id, None)) is not None:
            self.load[found.replica] -= found.load

    def _cached(self, keys: Sequence[bytes]) -> list[int]:
        """How many of the first pages each replica has."""
        pages, having = [0] * len(self.load), set(range(len(self.load)))
        for n, key in enumerate(keys):
            having = having & self._sent.get(key, set())
            for replica in having:
                pages[replica] = n + 1
        return pages
