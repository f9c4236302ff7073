import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jobs.runtime.moto_server import AtomicWrites


class TwoSteps:
    """A server as moto's: it compares and then writes."""

    def __init__(self) -> None:
        self.tag = 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        matches = environ["HTTP_IF_MATCH"] == self.tag
        time.sleep(0.05)
        self.tag += matches
        return [b"written" if matches else b"refused"]


def answers(app: Callable[..., Iterable[bytes]]) -> list[bytes]:
    """Return the answers to four writers at the same moment."""
    request = {"REQUEST_METHOD": "PUT", "HTTP_IF_MATCH": 0}
    with ThreadPoolExecutor(4) as pool:
        return sorted(answer for (answer,) in pool.map(lambda _: list(app(request, print)), range(4)))


def test_one_of_several_conditional_writes_succeeds() -> None:
    assert answers(AtomicWrites(TwoSteps())) == [b"refused"] * 3 + [b"written"]
    assert answers(TwoSteps()) != [b"refused"] * 3 + [b"written"], "the planted fault does not show"
