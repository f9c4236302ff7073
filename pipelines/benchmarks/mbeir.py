"""M-BEIR: queries, candidates and relevance as lines.

What is assumed, from the data card and the published evaluation (UniIR); the files themselves were not at hand:

    query/test/mbeir_{task}_test.jsonl                qid, query_txt, query_img_path, query_modality
    cand_pool/local/mbeir_{pool}_cand_pool.jsonl      did, txt, img_path, modality
    cand_pool/global/mbeir_union_test_cand_pool.jsonl the same, of all tasks
    qrels/test/mbeir_{task}_test_qrels.txt            qid 0 did relevance task
    instructions/query_instructions.tsv               header; query modality, candidate modality, name, dataset, prompts
    mbeir_images/...                                  named by img_path

`dataset` is the number before the colon of a qid. Of the prompts of a task the protocol draws one at random for each
query; here it is the first, so that a run can be repeated. Texts are as in the files, spaces at the ends apart: the
published evaluation also capitalises them and ends them with a stop. Candidates carry no instruction. Relevant
candidates that are not in the pool (of both OVEN and InfoSeek there are some) cannot be found and are left out; a query
with none left scores 0.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from pipelines.benchmarks.corpus import Corpus
from pipelines.benchmarks.files import Line, read_lines
from pipelines.benchmarks.qrels import Qrels
from pipelines.benchmarks.types import Dataset, Query, Row, file_in, make_item
from pipelines.errors import UserError
from pipelines.items.types import Item
from pipelines.samples import FileRef
from pipelines.texts import decode_text, lines_of

_TASK = re.compile(r"_task(\d)$")
# number of the task in a name -> modalities of queries and candidates, as files of M-BEIR write them
_FORMS = {
    **{"0": ("text", "image"), "1": ("text", "text"), "2": ("text", "image,text"), "3": ("image", "text")},
    **{"4": ("image", "image"), "6": ("image,text", "text"), "7": ("image,text", "image")},
    **{"8": ("image,text", "image,text")},
}


def paths(row: Row, root: Path) -> dict[str, Path]:
    """The files of a task, by what they hold."""
    scope = "global" if row.suite == "M-BEIR global" else "local"
    pool = "mbeir_union_test_cand_pool.jsonl" if scope == "global" else f"mbeir_{row.subset}_cand_pool.jsonl"
    return {
        "queries": root / f"query/test/mbeir_{row.name}_test.jsonl",
        "pool": root / f"cand_pool/{scope}/{pool}",
        "qrels": root / f"qrels/test/mbeir_{row.name}_test_qrels.txt",
        "instructions": root / "instructions/query_instructions.tsv",
    }


def read_mbeir(row: Row, root: Path) -> Dataset:
    """A task with its own pool, or with the union of all."""
    files = paths(row, root)
    pool = Corpus(files["pool"], "did", partial(_candidate, root=root))
    qrels = _qrels(files["qrels"])
    relevant = qrels.relevant()
    ids = pool.ids({did for grades in relevant.values() for did in grades})
    notes = qrels.notes()
    if lacking := sum(did not in ids for grades in relevant.values() for did in grades):
        notes.append(f"{lacking} grades name a candidate that the pool lacks")
    prompts = _prompts(files["instructions"])
    match = _TASK.search(row.name)
    form = _FORMS[match[1]] if match else ("", "")
    queries = []
    for line in read_lines(files["queries"], ("qid",)):
        qid = line["qid"]
        prompt = prompts.get((qid.partition(":")[0], *form))
        if prompt is None:
            raise UserError(str(files["instructions"]), f"has no prompt for {row.name}", "fetch it again")
        item = _item(qid, line.get("query_txt"), line.get("query_img_path"), root, "q", prompt)
        grades = {ids[did]: grade for did, grade in relevant.get(qid, {}).items() if did in ids}
        queries.append(Query(item, grades))
    corpus = "M-BEIR union" if row.suite == "M-BEIR global" else f"M-BEIR {row.subset}"
    return Dataset(row, queries, pool, corpus, tuple(notes))


def _candidate(line: Line, root: Path) -> Item:
    return _item(line["did"], line.get("txt"), line.get("img_path"), root, "p", "")


def _item(name: str, text: str | None, image: str | None, root: Path, slot: str, instruction: str) -> Item:
    refs = [FileRef(str(file_in(root, image)))] if image else []
    return make_item(name, (text or "").strip(), [("image", ref) for ref in refs], root, slot, instruction)


def _qrels(path: Path) -> Qrels:
    found = Qrels(higher_counts=True)
    for number, line in enumerate(_rows(path), start=1):
        fields = line.split()
        if len(fields) < 4:
            raise UserError(f"{path}:{number}", "is not: query 0 candidate relevance", "fetch it again")
        found.add(f"{path}:{number}", fields[0], fields[2], fields[3])
    return found


def _prompts(path: Path) -> dict[tuple[str, str, str], str]:
    """Dataset, modality of query, modality of candidate -> the first prompt."""
    found = {}
    for line in _rows(path)[1:]:
        query, candidate, _, dataset, *prompts = line.split("\t")
        found[dataset, query, candidate] = next(prompt.strip() for prompt in prompts if prompt.strip())
    return found


def _rows(path: Path) -> list[str]:
    try:
        return [line for line in lines_of(decode_text(path.read_bytes())) if line.strip()]
    except OSError as error:
        raise UserError(str(path), error.strerror or "cannot be read", "fetch it") from error
