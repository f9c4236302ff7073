"""Named templates of re-rankers: a query and a document as one question that is answered with yes or no.

    <|im_start|>system\\n{system}<|im_end|>\\n<|im_start|>user\\n{opening}{visuals}{text}{middle}{visuals}{text}<|im_end|>\\n
    <|im_start|>assistant\\n                          (one line; the model's next token is the answer)

Imports neither torch nor transformers, because the workers that encode media read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.samples import DecodedInput, Visual
from rzen.config import PairTemplateName

Part = str | Visual
"""A text of the question, or a visual in its place."""


@dataclass(frozen=True, slots=True)
class PairTemplate:
    """Fixed texts of a question. `{instruction}` in the opening is that of the query, or the default one.

    Without it, the instruction comes right before the text of the query. `empty` stands for an input that has neither
    text nor visuals.
    """

    system: str
    opening: str
    middle: str
    default_instruction: str
    empty: str
    yes: str
    no: str

    def parts(self, query: DecodedInput, document: DecodedInput) -> list[Part]:
        """Return what the user's turn says, adjacent texts joined. The document's instruction is left out."""
        instruction = query.instruction or self.default_instruction
        text = query.text
        if "{instruction}" not in self.opening:
            text = f"{instruction} {text}".strip()
        opening = self.opening.replace("{instruction}", instruction)
        parts = [opening, *self._content(query, text), self.middle, *self._content(document, document.text)]
        return _joined(parts)

    def _content(self, given: DecodedInput, text: str) -> list[Part]:
        if not text and not given.visuals:
            return [self.empty]
        return [*given.visuals, text]


PAIR_TEMPLATES: dict[PairTemplateName, PairTemplate] = {
    # The script `qwen3_vl_reranker.py` that was released with Qwen3-VL-Reranker.
    "qwen3_reranker": PairTemplate(
        system=(
            "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
            'Note that the answer can only be "yes" or "no".'
        ),
        opening="<Instruct>: {instruction}<Query>:",
        middle="\n<Document>:",
        default_instruction="Given a search query, retrieve relevant candidates that answer the query.",
        empty="NULL",
        yes="yes",
        no="no",
    ),
    # LamRA and U-MARVEL (`datasets_mbeir_eval_rerank.py`). Their source breaks the line inside the string, so that 24
    # spaces and a misspelled word are part of what the models were trained on. The system prompt is the default of
    # Qwen2-VL's chat format.
    "lamra": PairTemplate(
        system="You are a helpful assistant.",
        opening=(
            "I will provide you with a query and a candidate. Please evaluate whether the candidate"
            f"{' ' * 24}meets the requirements of the query. If it does, respond with 'Yes'; if it doesn't,"
            " responed with 'No'.Query:"
        ),
        middle="Candidate:",
        default_instruction="",
        empty="",
        yes="Yes",
        no="No",
    ),
}


def _joined(parts: Iterable[Part]) -> list[Part]:
    """Join adjacent texts, because a tokenizer sees them as one stretch."""
    found: list[Part] = []
    for part in parts:
        if found and isinstance(part, str) and isinstance(found[-1], str):
            found[-1] += part
        elif part != "":
            found.append(part)
    return found
