"""The server's queue: budgets, order, fairness, errors of single items, and what a full queue says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rzen.serving.queue import BatchStats, TokenQueue, choose
from rzen.serving.types import RequestError

Batches = list[list[Any]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200), st.booleans())
def test_a_batch_has_the_first_item_and_keeps_the_budget(lengths: list[int], budget: int, packed: bool) -> None:
    chosen = choose(lengths, budget, packed=packed)
    assert 0 in chosen
    assert len({*chosen}) == len(chosen)
    taken = [lengths[item] for item in chosen]
    assert taken == sorted(taken)
    cost = sum(taken) if packed else len(taken) * max(taken)
    assert cost <= budget or chosen == [0]
    if len(chosen) < len(lengths):  # nothing between the shortest and the longest is left out
        left = [length for item, length in enumerate(lengths) if item not in chosen]
        assert not any(taken[0] < length < taken[-1] for length in left)


def test_lengths_meet_so_that_little_is_padding() -> None:
    lengths = np.random.default_rng(0).integers(5, 500, 256).tolist()
    waiting, batches = list(lengths), []
    while waiting:
        chosen = choose(waiting, 4096, packed=False)
        batches.append([waiting[item] for item in chosen])
        waiting = [length for item, length in enumerate(waiting) if item not in chosen]
    padded = sum(len(batch) * max(batch) for batch in batches)
    in_order = [lengths[i : i + 8] for i in range(0, 256, 8)]
    assert 1 - sum(lengths) / padded < 0.15
    assert 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in in_order) > 0.4  # as they came


def run_queue(
    work: Callable[[TokenQueue[Any, Any]], Any],
    run: Callable[[Any, Sequence[Any]], Sequence[Any]],
    *,
    max_batch_tokens: int = 100,
    max_waiting_tokens: int = 1000,
    **options: Any,
) -> Any:
    async def main() -> Any:
        with ThreadPoolExecutor(1) as executor:
            queue = TokenQueue[Any, Any](run, executor, max_batch_tokens, max_waiting_tokens, **options)
            return await work(queue)

    return asyncio.run(main())


def test_a_small_request_does_not_wait_for_all_of_a_large_one() -> None:
    batches: Batches = []

    def run(group: Any, payloads: Sequence[Any]) -> Sequence[Any]:
        batches.append(list(payloads))
        return payloads

    async def work(queue: TokenQueue[Any, Any]) -> None:
        large = asyncio.ensure_future(queue.put("m", [("large", n) for n in range(100)], [50] * 100))
        while len(batches) < 3:
            await asyncio.sleep(0)
        small = await queue.put("m", [("small", 0)], [50])
        assert small == [("small", 0)]
        assert len(batches) < 10
        assert await large == [("large", n) for n in range(100)]

    run_queue(work, run)


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    served: list[Any] = []

    def run(group: Any, payloads: Sequence[Any]) -> Sequence[Any]:
        served.extend(payloads)
        return payloads

    async def work(queue: TokenQueue[Any, Any]) -> None:
        large = asyncio.ensure_future(queue.put("m", [("large", n) for n in range(4)], [90] * 4))
        waiting: list[Any] = []
        while not large.done():  # there is always a small one
            waiting.append(asyncio.ensure_future(queue.put("m", ["small"], [10])))
            await asyncio.sleep(0.001)
            assert len(waiting) < 2000
        await asyncio.gather(*waiting)

    run_queue(work, run)
    assert served.count("small") > 0


def test_the_last_item_of_a_large_request_does_not_wait_for_requests_that_come_and_go() -> None:
    """Three clients ask for one long item again and again, which leaves room for no other in a batch."""
    batches: Batches = []

    def run(group: Any, payloads: Sequence[Any]) -> Sequence[Any]:
        batches.append(list(payloads))
        return payloads

    async def work(queue: TokenQueue[Any, Any]) -> None:
        large = asyncio.ensure_future(queue.put("m", [("large", n) for n in range(4)], [60] * 4))

        async def ask(client: int) -> None:
            while not large.done() and len(batches) < 300:
                await queue.put("m", [("small", client)], [60])

        await asyncio.gather(large, *map(ask, range(3)))

    run_queue(work, run)
    # Four requests share the model. Four items of one of them take four rounds of four batches, and some to begin with.
    assert batches.index([("large", 3)]) < 24


def test_one_bad_item_fails_alone() -> None:
    calls: Batches = []

    def run(group: Any, payloads: Sequence[Any]) -> Sequence[Any]:
        calls.append(list(payloads))
        if "bad" in payloads:
            raise MemoryError("too large")
        return [payload.upper() for payload in payloads]

    async def work(queue: TokenQueue[Any, Any]) -> Any:
        return await asyncio.gather(queue.put("m", ["a", "bad", "b"], [1, 1, 1]), queue.put("m", ["c"], [1]))

    first, second = run_queue(work, run)
    assert [first[0], first[2], *second] == ["A", "B", "C"]
    assert isinstance(first[1], MemoryError)
    assert ["bad"] in calls


def test_results_may_be_errors() -> None:
    def run(group: Any, payloads: Sequence[Any]) -> Sequence[Any]:
        return [ValueError(payload) if payload < 0 else payload for payload in payloads]

    async def work(queue: TokenQueue[Any, Any]) -> Any:
        return await queue.put("m", [1, -2, 3], [1, 1, 1])

    one, two, three = run_queue(work, run)
    assert (one, type(two), three) == (1, ValueError, 3)


def test_models_are_not_mixed_in_a_batch() -> None:
    seen: list[tuple[Any, list[Any]]] = []

    def run(group: Any, payloads: Sequence[Any]) -> Sequence[Any]:
        seen.append((group, list(payloads)))
        return payloads

    async def work(queue: TokenQueue[Any, Any]) -> None:
        await asyncio.gather(*(queue.put(f"m{n % 2}", [(n % 2, n)], [5]) for n in range(20)))

    run_queue(work, run)
    assert all(group == f"m{model}" for group, payloads in seen for model, _ in payloads)


def test_a_full_queue_refuses_with_the_time_to_wait_and_gives_room_back() -> None:
    stats: list[BatchStats] = []

    async def work(queue: TokenQueue[Any, Any]) -> None:
        with queue.promise(60), queue.promise(60):  # the second one comes while there is room
            assert queue.promised_tokens == 120
            with pytest.raises(RequestError) as caught, queue.promise(1):
                pass
            assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
            await queue.put("m", [1, 2], [40, 20])
        assert queue.promised_tokens == 0
        with queue.promise(1):
            pass

    run_queue(work, lambda group, payloads: payloads, max_waiting_tokens=100, on_batch=stats.append)
    assert [(one.items, one.tokens, one.padded_tokens) for one in stats] == [(2, 60, 80)]


def test_items_of_a_client_that_left_are_not_run() -> None:
    batches: Batches = []
    going = threading.Event()

    def run(group: Any, payloads: Sequence[Any]) -> Sequence[Any]:
        batches.append(list(payloads))
        going.wait(5)
        return payloads

    async def work(queue: TokenQueue[Any, Any]) -> None:
        first = asyncio.ensure_future(queue.put("m", ["first"], [100]))
        while not batches:
            await asyncio.sleep(0)
        left = asyncio.ensure_future(queue.put("m", ["left"], [100]))
        stays = asyncio.ensure_future(queue.put("m", ["stays"], [100]))
        await asyncio.sleep(0)
        left.cancel()
        going.set()
        assert await first == ["first"]
        assert await stays == ["stays"]

    run_queue(work, run)
    assert batches == [["first"], ["stays"]]
