"""Pairs judged by a model behind an OpenAI-compatible endpoint, which returns the probabilities of its first token.

A score is stored before the thread that got it asks again. So a job that is killed asks again only for the answers that
were on their way, at most `concurrency` of them. Scores that arrive together are stored together.
"""

from __future__ import annotations

import base64
import io
import math
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from jobs.embedding.vectors import VectorCache, write_part
from jobs.judging.inputs import PairPlaces, reasons_of
from jobs.judging.local import Work
from jobs.judging.specs import ApiJudge, JudgeSpec
from jobs.runtime.progress import say
from pipelines.errors import UserError
from pipelines.imports import import_extra
from pipelines.samples import DecodedInput, UInt8Array, Visual
from pipelines.storage.store import Store
from rzen.reranking.prompts import PAIR_TEMPLATES

_ALTERNATIVES = 20  # the most that the API gives for a token
_REFUSED_AT_FIRST = 20  # pairs; if the first ones are all refused, the request is wrong and not the pair
NO_ANSWER, REFUSED = "no_answer", "refused"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for a pair. `score` is NaN for an answer that is neither yes nor no, and for a refused pair."""

    score: float
    reason: str
    input_tokens: int
    output_tokens: int

    def row(self) -> list[float]:
        """Return what is kept."""
        return [self.score, self.input_tokens, self.output_tokens]


@dataclass
class RemoteJudge:
    """An endpoint that judges. `config` has content only: the model's name stands for its weights."""

    judge: ApiJudge
    places: PairPlaces
    config: dict[str, Any]
    used: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, judge: ApiJudge, places: PairPlaces) -> RemoteJudge:
        """Raise `UserError` if the library is missing."""
        _import_openai()
        places = places.for_model(judge.max_image_pixels)
        config = {
            "by": "endpoint",
            "model": judge.model,
            "template": judge.template,
            "max_text_chars": judge.max_text_chars,
            "max_image_pixels": judge.max_image_pixels,
            "instructions": places.instructions,
            "media": places.media.model_dump(mode="json"),
        }
        return cls(judge, places, config)

    @property
    def name(self) -> str:
        """Return what people call the model."""
        return f"{self.judge.model} at {self.judge.url}"

    def score(self, work: Work, workers: JudgeSpec, on_pairs: Callable[[int], None]) -> Counter[str]:
        """Ask for each pair and keep the answers. Raises `UserError` when the endpoint gives up, or at `max_cost`."""
        reasons: Counter[str] = Counter()
        client, keeper = _Client(self.judge), ScoreKeeper()
        pool = ThreadPoolExecutor(self.judge.concurrency, thread_name_prefix="judge")
        waiting: set[Future[Answer]] = set()
        try:
            for question in self._questions(work, reasons, on_pairs):
                waiting.add(pool.submit(_ask, client, keeper, question))
                if len(waiting) >= 2 * self.judge.concurrency:
                    waiting = self._collect(waiting, reasons, on_pairs)
            while waiting:
                waiting = self._collect(waiting, reasons, on_pairs)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # answers that are on their way are paid, and kept
            keeper.close()
            client.close()
        self._print_usage()
        return reasons

    def _questions(self, work: Work, reasons: Counter[str], on_pairs: Callable[[int], None]) -> Iterator[_Question]:
        """Yield each pair with its decoded inputs. Those with a bad input are counted."""
        reader = self.places.reader()
        for cache, unit in work:
            queries, documents = reader.read(unit)
            bad = reasons_of(unit, queries, documents)
            for key, (query, document), reason in zip(unit.keys, unit.pairs.tolist(), bad, strict=True):
                if reason:
                    reasons[reason] += 1
                    on_pairs(1)
                else:
                    yield _Question(key.decode(), cache, queries[query], documents[document])

    def _collect(
        self, waiting: set[Future[Answer]], reasons: Counter[str], on_pairs: Callable[[int], None]
    ) -> set[Future[Answer]]:
        """Count the answers that have come. Return those that are still awaited."""
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            answer = future.result()
            self.used += Counter(requests=1, input=answer.input_tokens, output=answer.output_tokens)
            if answer.reason:
                reasons[answer.reason] += 1
            on_pairs(1)
        if self.used["requests"] == reasons[REFUSED] >= _REFUSED_AT_FIRST:
            problem = f"refused each of the first {_REFUSED_AT_FIRST} pairs"
            raise UserError(self.judge.url, problem, "check the model, and whether it takes images and gives logprobs")
        if self.judge.max_cost is not None and self.cost >= self.judge.max_cost:
            problem = f"the job has cost {self.cost:.2f}"
            fix = "raise api.max_cost, and run the job again: it resumes"
            raise UserError(f"api.max_cost={self.judge.max_cost:g}", problem, fix)
        return waiting

    @property
    def cost(self) -> float:
        """Return what the answers of this job cost."""
        return (self.used["input"] * self.judge.input_price + self.used["output"] * self.judge.output_price) / 1e6

    def _print_usage(self) -> None:
        if self.used["requests"]:
            tokens = f"{self.used['input']:,} input and {self.used['output']:,} output tokens"
            price = f", cost {self.cost:.2f}" if self.judge.input_price or self.judge.output_price else ""
            say(f"  {self.used['requests']:,} answers, {tokens}{price}")


@dataclass(frozen=True, slots=True)
class _Question:
    key: str
    cache: VectorCache
    query: DecodedInput
    document: DecodedInput


def _ask(client: _Client, keeper: ScoreKeeper, question: _Question) -> Answer:
    answer = client.ask(question.query, question.document)
    keeper.keep(question.cache.store, question.key, answer.row())
    return answer


class ScoreKeeper:
    """Stores scores. `keep` returns when its score is stored; those of several threads go into one object."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Store, str, list[float], Future[None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="scores")
        self._thread.start()

    def keep(self, store: Store, key: str, row: list[float]) -> None:
        """Store one row, durably. Raises what the store raises."""
        stored: Future[None] = Future()
        self._queue.put((store, key, row, stored))
        stored.result()

    def close(self) -> None:
        """End the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            waiting = [first]
            while not self._queue.empty():
                following = self._queue.get()
                if following is None:
                    self._queue.put(None)
                    break
                waiting.append(following)
            by_store: dict[str, list[tuple[Store, str, list[float], Future[None]]]] = {}
            for entry in waiting:
                by_store.setdefault(entry[0].url, []).append(entry)
            for entries in by_store.values():
                _write(entries)


def _write(entries: list[tuple[Store, str, list[float], Future[None]]]) -> None:
    try:
        rows = np.array([row for _, _, row, _ in entries], np.float32)
        write_part(entries[0][0], [key for _, key, _, _ in entries], rows)
    except Exception as error:  # noqa: BLE001  # it is raised in the threads that wait
        for *_, stored in entries:
            stored.set_exception(error)
        return
    for *_, stored in entries:
        stored.set_result(None)


class _Client:
    """Asks the endpoint. Any thread may call `ask`."""

    def __init__(self, judge: ApiJudge) -> None:
        self._judge = judge
        self._openai = _import_openai()
        self._api = self._openai.OpenAI(
            base_url=judge.url,
            api_key=os.environ.get(judge.api_key_env) or "none",
            max_retries=judge.retries,
            timeout=judge.timeout_s,
        )
        self._pace = _Pace(judge.requests_per_minute)
        template = PAIR_TEMPLATES[judge.template]
        self._answers = (template.yes.lower(), template.no.lower())

    def close(self) -> None:
        """Close the connections."""
        self._api.close()

    def ask(self, query: DecodedInput, document: DecodedInput) -> Answer:
        """Return the answer for a pair. Raises `UserError` where the endpoint cannot be used."""
        openai = self._openai
        self._pace.wait()
        try:
            response = self._api.chat.completions.create(
                model=self._judge.model,
                messages=messages_of(self._judge, query, document),
                max_tokens=1,
                temperature=0,
                logprobs=True,
                top_logprobs=_ALTERNATIVES,
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            say(f"  a pair was refused: {_first_line(error)}", "yellow")
            return Answer(math.nan, REFUSED, 0, 0)
        except openai.APIStatusError as error:
            fix = "check api.url, api.model and the API key; answers so far are kept, so that the job resumes"
            raise UserError(self._judge.url, f"answers {error.status_code}: {_first_line(error)}", fix) from error
        except openai.APIConnectionError as error:
            fix = "check api.url and the network; answers so far are kept, so that the job resumes"
            raise UserError(self._judge.url, f"does not answer: {_first_line(error)}", fix) from error
        usage = response.usage
        tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        score = self._score(response)
        return Answer(score, NO_ANSWER if math.isnan(score) else "", *tokens)

    def _score(self, response: Any) -> float:
        """Return the probability of yes among yes and no, in any case and with spaces. NaN if neither is likely."""
        choice = response.choices[0] if response.choices else None
        if choice is None or choice.logprobs is None or not choice.logprobs.content:
            return math.nan
        mass = dict.fromkeys(self._answers, 0.0)
        for alternative in choice.logprobs.content[0].top_logprobs:
            word = alternative.token.strip().lower()
            if word in mass:
                mass[word] += math.exp(alternative.logprob)
        yes, no = (mass[answer] for answer in self._answers)
        return yes / (yes + no) if yes + no > 0 else math.nan


class _Pace:
    """Spreads requests evenly over time."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval_s = 60 / per_minute if per_minute else 0.0
        self._next_s = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Return when the next request may be sent."""
        with self._lock:
            now_s = time.monotonic()
            start_s = max(now_s, self._next_s)
            self._next_s = start_s + self._interval_s
        time.sleep(start_s - now_s)


def messages_of(judge: ApiJudge, query: DecodedInput, document: DecodedInput) -> list[dict[str, Any]]:
    """Return the chat of a pair, its pictures in place. Videos are their frames, one after the other."""
    template = PAIR_TEMPLATES[judge.template]
    query, document = (replace(one, text=one.text[: judge.max_text_chars]) for one in (query, document))
    content: list[dict[str, Any]] = []
    for part in template.parts(query, document):
        if isinstance(part, Visual):
            content += [_picture(frame, judge.max_image_pixels) for frame in part.frames]
        else:
            content.append({"type": "text", "text": part})
    return [{"role": "system", "content": template.system}, {"role": "user", "content": content}]


def _picture(frame: UInt8Array, max_pixels: int) -> dict[str, Any]:
    image = Image.fromarray(frame)
    if image.width * image.height > max_pixels:
        shrink = math.sqrt(max_pixels / (image.width * image.height))
        image = image.resize((max(1, int(image.width * shrink)), max(1, int(image.height * shrink))))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=92)
    url = f"data:image/jpeg;base64,{base64.b64encode(sink.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _import_openai() -> Any:
    return import_extra("openai", "judge", "api")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
