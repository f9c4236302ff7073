"""The queue between requests and the model: batches of similar length, within a budget of tokens.

Each batch holds the item whose turn it is, and of the next ones those whose lengths are nearest, so that little is
padding. An item's turn comes after the tokens before it in its own request, counted from the turn of the queue when it
came (start-time fair queueing, Goyal et al. 1996). A batch moves the turn of the queue by its tokens, divided among the
requests that wait, as if each was served a little all the time. So a small request does not wait for all of a large
one, and the last item of a large one does not wait for small ones that came later.

The queue holds a limited number of tokens. A request that comes when it is full is refused with the time to wait.
"""

from __future__ import annotations

import asyncio
import time
from bisect import insort
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from rzen.serving.types import RequestError

WINDOW = 256
"""Items, in the order of their turns, that a batch is chosen from. Our choice."""
_RATE_MEMORY = 0.9  # of the moving average of tokens per second
Payload = TypeVar("Payload")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class BatchStats:
    """A batch: items, their tokens, those of the padded rectangle, and seconds in the model."""

    items: int
    tokens: int
    padded_tokens: int
    seconds: float


@dataclass(order=True, slots=True)
class _Ticket(Generic[Payload, Result]):
    turn: int
    number: int
    request: int = field(compare=False)
    group: Hashable = field(compare=False)
    payload: Payload = field(compare=False)
    num_tokens: int = field(compare=False)
    result: asyncio.Future[Result] = field(compare=False)


def choose(lengths: Sequence[int], max_tokens: int, *, packed: bool) -> list[int]:
    """Return which items go with item 0, in the order of their lengths.

    The nearest lengths come first: a shorter one costs its padding, a longer one that of all others. A batch has at
    most `max_tokens`, padding included unless `packed`. Item 0 is a batch of its own if it is longer.
    """
    order = sorted(range(len(lengths)), key=lambda item: (lengths[item], item))
    first = last = order.index(0)
    total = lengths[0]
    while True:
        size, longest = last - first + 1, lengths[order[last]]
        options = []
        if first > 0:
            shorter = lengths[order[first - 1]]
            cost = total + shorter if packed else (size + 1) * longest
            options.append((longest - shorter, cost, -1))
        if last + 1 < len(order):
            longer = lengths[order[last + 1]]
            cost = total + longer if packed else (size + 1) * longer
            options.append((size * (longer - longest), cost, 1))
        step = next((step for _, cost, step in sorted(options) if cost <= max_tokens), 0)
        if step == 0:
            return order[first : last + 1]
        first, last = (first - 1, last) if step < 0 else (first, last + 1)
        total += lengths[order[first if step < 0 else last]]


class TokenQueue(Generic[Payload, Result]):
    """Runs `run(group, payloads)` on batches of one group, in `executor`, one batch after the other.

    `run` returns a result or an exception for each payload. If it raises, each half of the batch is run again, so that
    one bad item fails alone. `max_batch_tokens` limits a batch, `max_waiting_tokens` what is promised to requests.
    `on_batch` is called after each batch.
    """

    def __init__(
        self,
        run: Callable[[Any, Sequence[Payload]], Sequence[Result | Exception]],
        executor: Executor,
        max_batch_tokens: int,
        max_waiting_tokens: int,
        *,
        packed: bool = False,
        window: int = WINDOW,
        on_batch: Callable[[BatchStats], None] = lambda stats: None,
    ) -> None:
        self._run, self._executor, self._on_batch = run, executor, on_batch
        self._max_batch_tokens, self._max_waiting_tokens = max_batch_tokens, max_waiting_tokens
        self._packed, self._window = packed, window
        self._waiting: list[_Ticket[Payload, Result]] = []
        self._turn = self._number = self._request = self._promised = 0
        self._tokens_per_s = 0.0
        self._worker: asyncio.Task[None] | None = None
        self.failed_batches = 0
        """Batches in a row of which no item had a result."""

    @property
    def promised_tokens(self) -> int:
        """Return the tokens of all requests that were accepted and not answered."""
        return self._promised

    @contextmanager
    def promise(self, num_tokens: int) -> Iterator[None]:
        """Hold room for a request of about this many tokens. Raises `RequestError` 429 if the queue is full.

        A request of any size is accepted when there is room for one token, so that large ones come to their turn.
        """
        if self._promised >= self._max_waiting_tokens:
            problem = f"{self._promised} tokens are waiting, at most {self._max_waiting_tokens}; ask again later"
            raise RequestError(429, problem, reason="queue_full", retry_after_s=self._seconds_to_wait())
        self._promised += num_tokens
        try:
            yield
        finally:
            self._promised -= num_tokens

    async def put(
        self, group: Hashable, payloads: Sequence[Payload], lengths: Sequence[int]
    ) -> list[Result | BaseException]:
        """Return a result or an exception for each item of a request. If the caller is cancelled, so are its items."""
        loop = asyncio.get_running_loop()
        turn = self._turn
        futures: list[asyncio.Future[Result]] = []
        for payload, num_tokens in zip(payloads, lengths, strict=True):
            futures.append(loop.create_future())
            ticket = _Ticket(turn, self._number, self._request, group, payload, num_tokens, futures[-1])
            insort(self._waiting, ticket)
            turn += max(1, num_tokens)
            self._number += 1
        self._request += 1
        if self._waiting and (self._worker is None or self._worker.done()):
            self._worker = loop.create_task(self._work())
        return await asyncio.gather(*futures, return_exceptions=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._take():
            start_s = time.monotonic()
            payloads = [ticket.payload for ticket in batch]
            results = await loop.run_in_executor(self._executor, self._run_halves, batch[0].group, payloads)
            self._record(batch, time.monotonic() - start_s)
            has_failed = all(isinstance(result, Exception) for result in results)
            self.failed_batches = self.failed_batches + 1 if has_failed else 0
            for ticket, result in zip(batch, results, strict=True):
                if ticket.result.done():  # whoever asked has gone
                    continue
                if isinstance(result, Exception):
                    ticket.result.set_exception(result)
                else:
                    ticket.result.set_result(result)

    def _take(self) -> list[_Ticket[Payload, Result]]:
        """Remove and return the next batch; nothing if nobody waits."""
        self._waiting = [ticket for ticket in self._waiting if not ticket.result.done()]
        if not self._waiting:
            return []
        head = self._waiting[0]
        window = [ticket for ticket in self._waiting[: self._window] if ticket.group == head.group]
        lengths = [ticket.num_tokens for ticket in window]
        batch = [window[item] for item in choose(lengths, self._max_batch_tokens, packed=self._packed)]
        num_requests = len({ticket.request for ticket in self._waiting})
        share = sum(ticket.num_tokens for ticket in batch) // num_requests
        self._turn = max(self._turn, head.turn) + max(1, share)
        taken = {ticket.number for ticket in batch}
        self._waiting = [ticket for ticket in self._waiting if ticket.number not in taken]
        return batch

    def _run_halves(self, group: Hashable, payloads: Sequence[Payload]) -> list[Result | Exception]:
        try:
            return list(self._run(group, payloads))
        except Exception as error:  # noqa: BLE001  memory of the device, above all; it is given to who asked
            if len(payloads) == 1:
                return [error]
        middle = len(payloads) // 2
        return self._run_halves(group, payloads[:middle]) + self._run_halves(group, payloads[middle:])

    def _record(self, batch: Sequence[_Ticket[Payload, Result]], seconds: float) -> None:
        lengths = [ticket.num_tokens for ticket in batch]
        tokens = sum(lengths)
        rate = tokens / max(seconds, 1e-6)
        known = self._tokens_per_s or rate
        self._tokens_per_s = _RATE_MEMORY * known + (1 - _RATE_MEMORY) * rate
        padded = tokens if self._packed else len(lengths) * max(lengths)
        self._on_batch(BatchStats(len(batch), tokens, padded, seconds))

    def _seconds_to_wait(self) -> float:
        """Return when half of the queue will be done, at the rate of the last batches."""
        return min(60.0, 0.5 * self._promised / self._tokens_per_s) if self._tokens_per_s else 1.0
