"""What a step does, as the loop of training knows it: model and loss as one module, for any kind of objective.

    batch -> parts -> for each part:  forward pass -> loss -> backward pass -> statistics of the batch

The losses of the parts add up to that of the batch. An embedder contrasts all pairs with each other, and has one part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from rzen.inputs.processor import EncodedBatch
from rzen.model.activations import ChunkInputs
from rzen.model.embedding_model import SequenceModel
from rzen.objective.loss import Objective
from rzen.training.held_out import HeldOutShare
from rzen.training.held_out_scores import SourceScore
from rzen.training.zero_grads import with_zero_grads_for_unused

Blocks = Sequence[tuple[str, int]]
"""Task and number of own samples of each block of a batch, in their order."""


class OwnBatch(Protocol):
    """One rank's share of a batch, as the encoder of its learner makes it."""

    @property
    def keys(self) -> tuple[str, ...]:
        """`source/key` of each sample."""

    def __len__(self) -> int: ...


class Learner(nn.Module, ABC):
    """Model and loss as one module, as data parallelism needs it.

    With gradients averaged over ranks, W ranks of B samples equal one process with W * B samples.
    """

    makes: str = "vector"
    """What the model makes of an input, for messages."""
    objective: Objective | None
    """The objective of an embedder, which owns temperatures. None: there are none."""

    def __init__(self, chunk_tokens: int | None, blanks: list[EncodedBatch]) -> None:
        super().__init__()
        self.chunk_tokens = chunk_tokens
        self.blanks = blanks
        """Inputs that are read with every chunk, for ZeRO stage 3."""

    @property
    @abstractmethod
    def model(self) -> SequenceModel:
        """The model that is trained, with its backbone."""

    @abstractmethod
    def parts(self, batch: Any) -> Iterator[Any]:
        """Yield what `forward` takes, part after part. A collective where there are `blanks`."""

    @abstractmethod
    def forward(self, part: Any, blocks: Blocks, step: int) -> tuple[Tensor, Any]:
        """Return the loss of a part, 0-dim fp32, and what `statistics` needs of it, detached."""

    @abstractmethod
    def statistics(self, batch: Any, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """Return the 0-dim statistics of a batch, from the outputs of its parts in their order."""

    @abstractmethod
    def score(self, shares: Mapping[str, HeldOutShare]) -> dict[str, SourceScore]:
        """Return the held-out score of each source that has samples; nothing on ranks other than 0. A collective."""

    @abstractmethod
    def not_finite(self, batch: Any) -> list[str]:
        """Return the keys of the samples that the model gives a number that is not finite. Each is read by itself.

        A collective in ZeRO stage 3.
        """

    @abstractmethod
    def example(self, inputs: ChunkInputs) -> Tensor:
        """Return what the model makes of inputs of this shape without content, with its gradient."""

    def temperatures(self) -> dict[str, float]:
        """Return the temperature of each task. Empty without an objective that has them."""
        return self.objective.temperatures() if self.objective is not None else {}

    def _with_zero_grads(self, loss: Tensor) -> Tensor:
        # With `blanks` every parameter is used; and parameters in pieces have other shapes than their gradients.
        return with_zero_grads_for_unused(
            loss, [] if self.blanks else [p for p in self.parameters() if p.requires_grad]
        )
