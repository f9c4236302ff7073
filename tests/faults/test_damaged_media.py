"""Over 500 hostile, damaged and odd files, decoded one by one and through the ingest job: each has one known end."""

import json
import os
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil
import pytest

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.ingest import report as report_module
from pipelines.ingest.blocks import TRAIN
from pipelines.ingest.ingest import ingest
from pipelines.media.decode import Decoder
from pipelines.media.reasons import REASONS
from pipelines.samples import MediaKind, RawSample, Rejected, Sample
from pipelines.shards.verify import verify
from pipelines.sources.folder import LIST_NAME, read_folder
from pipelines.storage.location import open_store
from tests.faults.damaged_media import DAMAGE, LIMITS, STOPPED, USED, CorpusFile, corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
DEFAULTS = LIMITS
OTHERS = LIMITS.model_copy(update={"video_backend": "decord", "document_backend": "pypdfium2"})
BACKENDS = [
    pytest.param(DEFAULTS, id="pyav-pymupdf"),
    pytest.param(OTHERS, id="decord-pypdfium2", marks=pytest.mark.long),
]
HEALTHY: dict[MediaKind, str] = {"image": "progressive.jpg", "video": "plain-gop-4.mp4", "document": "plain.pdf"}
# By the clock, for the slowest file on a busy machine: the limits of CPU time are tight, starting a child is slow.
MAX_FILE_S = 60.0
MAX_GROWTH_BYTES = 300 << 20


@cache
def files() -> tuple[CorpusFile, ...]:
    return tuple(corpus())


@cache
def by_name() -> dict[str, CorpusFile]:
    return {file.name: file for file in files()}


def allowed(file: CorpusFile, config: MediaConfig) -> frozenset[str]:
    refused = file.kind == "video" and config.video_backend == "decord"
    return file.outcomes | {"decord_unsupported"} if refused else file.outcomes


class _Memory:
    """The largest resident sizes (bytes) seen: of this process, of the sandbox children, and of Ray's workers without
    what earlier tests have left in them.
    """

    def __init__(self) -> None:
        self.own = self.workers = self.children = 0
        self._before: dict[int, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    @contextmanager
    def watched(self) -> Iterator["_Memory"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._done.set()
            self._thread.join()

    def _watch(self) -> None:
        this = psutil.Process()
        self._before = {process.pid: process.memory_info().rss for process in this.children(recursive=True)}
        while not self._done.wait(0.1):
            self.own = max(self.own, this.memory_info().rss)
            for process in this.children(recursive=True):
                try:
                    command, resident = " ".join(process.cmdline()), process.memory_info().rss
                except psutil.Error:
                    continue
                if "pipelines.media.sandbox" in command:
                    self.children = max(self.children, resident)
                elif command.startswith("ray::"):
                    self.workers = max(self.workers, resident - self._before.get(process.pid, 0))


def decoded(decoder: Decoder, file: CorpusFile) -> tuple[str, str]:
    """The outcome, and what is wrong with it."""
    start_s = time.monotonic()
    try:
        frames = decoder.member(file.kind, file.data).frames
        outcome, detail = USED, "; ".join(file.look.differences(frames)) if file.look else ""
    except BadMedia as bad:
        outcome, detail = bad.reason, ""
        if bad.reason not in REASONS:
            detail = "not a documented reason"
    elapsed_s = time.monotonic() - start_s
    return outcome, detail or (f"took {elapsed_s:.0f} s" if elapsed_s > MAX_FILE_S else "")


def test_the_corpus_is_large_seeded_and_of_every_kind() -> None:
    assert {name for name in changed(corpus(), files()) if not name.startswith("encrypted-")} == set()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    others = changed(corpus(seed=1), files())
    assert {name for name in others if not name.startswith("encrypted-")} == {
        file.name for file in files() if file.name.startswith("random-")
    }
    kinds = Counter(file.kind for file in files())
    assert sum(kinds.values()) >= 500
    assert min(kinds.values()) >= 100
    assert {outcome for file in files() for outcome in file.outcomes} <= {USED, *REASONS}
    assert sum(file.look is not None for file in files()) >= 100


def changed(some: Sequence[CorpusFile], others: Sequence[CorpusFile]) -> set[str]:
    assert [file.name for file in some] == [file.name for file in others]
    return {file.name for file, other in zip(some, others, strict=True) if file.data != other.data}


@pytest.mark.parametrize("config", BACKENDS)
def test_every_file_ends_in_a_way_it_may_end_and_good_ones_look_right(config: MediaConfig) -> None:
    healthy = {kind: name for kind, name in HEALTHY.items() if kind != "image" or config is DEFAULTS}  # one back end
    wrong: dict[str, str] = {}
    outcomes: dict[str, str] = {}
    before = psutil.Process().memory_info().rss
    with _Memory().watched() as memory, Decoder(config, isolated=True) as decoder:
        for file in files():
            if file.kind not in healthy:
                continue
            outcome, problem = decoded(decoder, file)
            outcomes[file.name] = outcome
            if problem or outcome not in allowed(file, config):
                wrong[file.name] = f"{outcome} {problem}, expected {'|'.join(sorted(allowed(file, config)))}"
            if outcome in STOPPED:  # the next file meets a child of its own, and is none the worse for it
                after, problem = decoded(decoder, by_name()[healthy[file.kind]])
                if after != USED or problem:
                    wrong[file.name] = f"the file after it: {after} {problem}"
    assert wrong == {}
    assert memory.own - before < MAX_GROWTH_BYTES
    assert memory.children <= config.max_memory_bytes
    tally = Counter(outcomes.values())
    assert tally[USED] > 150
    assert tally["decoder_cpu_limit"] >= 1
    assert sum(tally[reason] for reason in STOPPED) >= 3
    assert outcomes["plain-gop-4.mp4"] == outcomes["plain-gop-4.mkv"] == outcomes["plain-gop-4.webm"] == USED


@pytest.mark.parametrize("config", BACKENDS)
def test_documents_without_captions_are_all_accounted_for(config: MediaConfig, tmp_path: Path) -> None:
    documents = [file for file in files() if file.kind == "document"]
    for file in documents:
        (tmp_path / file.name).write_bytes(file.data)
    outcomes_of: dict[str, set[str]] = {}
    for item in read_folder(str(tmp_path), config):
        origin, outcome = (item.origin, item.reason) if isinstance(item, Rejected) else (item.sample.origin, USED)
        outcomes_of.setdefault(origin.partition("#")[0], set()).add(outcome)
        if isinstance(item, RawSample):
            assert len(item.sample.query.text) < 2000
    assert set(outcomes_of) == {file.name for file in documents}
    # Which files are refused before any page is looked at; pages that cannot be drawn may well have text.
    refused = {"empty_file", "not_a_pdf", "encrypted_pdf", "too_many_pages"}
    either = DAMAGE["document"] | STOPPED | {USED, "no_text_layer"}
    wrong = {
        file.name: outcomes_of[file.name]
        for file in documents
        if not outcomes_of[file.name] <= (file.outcomes if file.outcomes <= refused else either)
    }
    assert wrong == {}
    assert outcomes_of["plain.pdf"] == {USED}


def stored(split: Path) -> Iterator[tuple[Sample, bytes]]:
    """Every sample of a published split with the one medium it has: two entries of a tar each."""
    for path in sorted(split.rglob("*.tar")):
        with tarfile.open(path) as tar:
            contents = [tar.extractfile(entry).read() for entry in tar]  # type: ignore[union-attr]
        for text, data in zip(contents[::2], contents[1::2], strict=True):
            yield Sample.from_json(text), data


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("config", BACKENDS)
def test_ingest_accounts_for_every_file_exactly_once(
    config: MediaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "MAX_EXAMPLES", len(files()))  # of each reason: all, as a block has no more
    raw, out = tmp_path / "raw", open_store(str(tmp_path / "out"))
    raw.mkdir()
    for file in files():
        (raw / file.name).write_bytes(file.data)
    lines = [json.dumps({"file": file.name, "caption": f"this is {file.name}"}) for file in files()]
    (raw / LIST_NAME).write_text("\n".join(lines))

    with _Memory().watched() as memory:
        report = ingest(
            read_folder(str(raw), config), out, media=config, held_out_fraction=0.0, seed=0, samples_per_shard=20
        )

    assert report.seen == len(files()) == report.num_accepted + report.num_rejected
    outcomes: dict[str, list[str]] = {file.name: [] for file in files()}
    lines_of = {f"{LIST_NAME}:{number}": file.name for number, file in enumerate(files(), start=1)}
    for reason, examples in report.examples.items():
        for example in examples:
            origin = example.partition(": ")[0].partition("#")[0]
            outcomes[lines_of.get(origin, origin)].append(reason)
    for sample, data in stored(tmp_path / "out" / TRAIN):
        name = sample.origin.partition("#")[0]
        outcomes[name].append(USED)
        file = by_name()[name]
        assert file.kind == "document" or data == file.data
    assert verify(out, TRAIN) == []

    assert {name: found for name, found in outcomes.items() if len(found) != 1} == {}
    wrong = {
        file.name: f"{outcomes[file.name][0]}, expected {'|'.join(sorted(allowed(file, config)))}"
        for file in files()
        if outcomes[file.name][0] not in allowed(file, config)
    }
    assert wrong == {}
    tally = Counter(found[0] for found in outcomes.values())
    assert report.rejected == {reason: count for reason, count in tally.items() if reason != USED}
    assert tally["decoder_cpu_limit"] >= 1
    assert sum(tally[reason] for reason in STOPPED) >= 3
    assert memory.workers < 1 << 30
    assert memory.children <= config.max_memory_bytes
