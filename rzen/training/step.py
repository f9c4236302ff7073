"""The forward pass of a training step: embed both sides, contrast them across ranks, leave no parameter out.

Shapes: B own pairs, N pairs of all ranks, K mined negatives of a query at most, D width of the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rzen.inputs.pairs import EncodedPairs
from rzen.model.chunks import chunks_of, embed, padding_fraction
from rzen.model.embedding_model import EmbeddingModel
from rzen.objective.gather import gather_ids, gather_with_gradient
from rzen.objective.loss import Mined, Objective
from rzen.training.lockstep import align_chunk_counts, dummy_input


class Learner(nn.Module):
    """Embedder and objective as one module, as data parallelism wants it.

    With gradients averaged over ranks, W ranks of B pairs equal one process with W * B pairs, parameters and
    temperatures alike (tests/parity/test_training_step.py).
    """

    def __init__(
        self, embedder: EmbeddingModel, objective: Objective, chunk_tokens: int | None = None, *, lockstep: bool = False
    ) -> None:
        super().__init__()
        self.embedder = embedder
        self.objective = objective
        self.chunk_tokens = chunk_tokens
        backbone: Any = embedder.backbone
        self.blanks = [dummy_input(backbone)] if lockstep else []
        """Sides that are embedded with every chunk, for ZeRO stage 3."""
        objective.widths(backbone.config.get_text_config().hidden_size)  # refuses a wider one before the first batch

    def forward(
        self, pairs: EncodedPairs, blocks: Sequence[tuple[str, int]], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of the own queries, 0-dim fp32, and the objective's detached statistics.

        `blocks` are (task, own pairs) in the order of the pairs; each is contrasted with itself alone, across ranks.
        A collective: every rank must bring the same blocks.
        """
        (queries_BD, targets_BD, *mined), counts = self._vectors(pairs)
        counts_N = gather_ids(torch.tensor(pairs.negative_counts, device=targets_BD.device))
        negatives_BKD = _placed(mined, pairs.negative_counts, int(counts_N.max()), targets_BD)
        ids_B = torch.tensor(pairs.target_ids, device=targets_BD.device)
        relevance_N = gather_ids(torch.tensor(pairs.relevance, device=targets_BD.device))
        graded = not bool(relevance_N.isnan().all())
        rank = dist.get_rank() if dist.is_initialized() else 0
        gathered = {
            "targets": gather_with_gradient(targets_BD),
            "ids": gather_ids(ids_B),
            "counts": counts_N,
            "negatives": gather_with_gradient(negatives_BKD) if negatives_BKD.shape[1] else None,
            "queries": gather_with_gradient(queries_BD) if graded or self.objective.needs_queries else None,
            "relevance": relevance_N if graded else None,
        }
        losses: list[Tensor] = []
        stats: list[dict[str, Tensor]] = []
        start = 0
        for task, size in blocks:
            own = slice(start, start + size)
            block = {
                name: None if rows is None else rows.view(-1, len(pairs), *rows.shape[1:])[:, own].flatten(0, 1)
                for name, rows in gathered.items()
            }
            loss, block_stats = self.objective(
                queries_BD[own],
                block["targets"],
                task,
                positive_offset=rank * size,
                step=step,
                queries_ND=block["queries"],
                mined=_mined(block["negatives"], block["counts"]),
                target_ids_N=block["ids"],
                relevance_N=block["relevance"],
            )
            losses.append(loss)
            stats.append(block_stats)
            start += size
        shares = torch.tensor([size for _, size in blocks], device=ids_B.device) / len(pairs)
        means = {name: _mean([some[name] for some in stats], shares) for name in stats[0]}
        return self._with_zero_grads(_mean(losses, shares)), means | counts

    def _with_zero_grads(self, loss: Tensor) -> Tensor:
        # In lockstep the blank sides do so; parameters are in pieces, which have other shapes than their gradients.
        return with_zero_grads_for_unused(
            loss, [] if self.blanks else [p for p in self.parameters() if p.requires_grad]
        )

    def _vectors(self, pairs: EncodedPairs) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Of queries, of targets, and of mined negatives where there are any; and counts of tokens.

        All at once where `chunk_tokens` is None, but one role after the other: they differ in length more than among
        themselves. With chunks, all roles are mixed.
        """
        roles = [role for role in (pairs.queries, pairs.targets, pairs.negatives) if role is not None]
        sizes = [len(role) for role in roles]
        lengths = np.concatenate([role.lengths for role in roles])
        if self.chunk_tokens is None:
            chunks = np.split(np.arange(len(lengths)), np.cumsum(sizes)[:-1])
        else:
            chunks = chunks_of(lengths, self.chunk_tokens, packed=self.embedder.packs)
        sides = [side for role in roles for side in role.split()]
        called = align_chunk_counts(chunks, len(sides), self.embedder.image_mean.device) if self.blanks else chunks
        twice = self.chunk_tokens is not None and len(called) > 1
        vectors = embed(self.embedder, [*sides, *self.blanks], called, twice=twice)[: len(sides)]
        padding = padding_fraction(lengths, chunks, packed=self.embedder.packs)
        counts = {"tokens": torch.tensor(lengths.sum()), "padding_fraction": torch.tensor(padding)}
        return list(torch.split(vectors, sizes)), counts


def _placed(mined: Sequence[Tensor], counts: npt.NDArray[np.int64], most: int, like_BD: Tensor) -> Tensor:
    """Mined negatives `[B, K, D]`, zero where a query has fewer than K = `most`."""
    vectors_BKD = like_BD.new_zeros(len(counts), most, like_BD.shape[1])
    if not mined:
        # Gathering them must have a backward pass on this rank too, as other ranks wait for it.
        return vectors_BKD.requires_grad_(torch.is_grad_enabled())
    vectors_BKD[_filled(torch.tensor(counts, device=like_BD.device), most)] = mined[0]
    return vectors_BKD


def _mined(vectors_NKD: Tensor | None, counts_N: Tensor | None) -> Mined | None:
    """Of a block, as the objective wants them."""
    if vectors_NKD is None or counts_N is None:
        return None
    owners_N1 = torch.arange(len(counts_N), device=counts_N.device)[:, None]
    owners_NK = owners_N1.where(_filled(counts_N, vectors_NKD.shape[1]), -1)
    return Mined(vectors_NKD.flatten(0, 1), owners_NK.flatten())


def _filled(counts_N: Tensor, most: int) -> Tensor:
    """Mark, bool `[N, K]`, the places that hold a negative."""
    return torch.arange(most, device=counts_N.device) < counts_N[:, None]


def _mean(values: Sequence[Tensor], shares: Tensor) -> Tensor:
    return values[0] if len(values) == 1 else (torch.stack(list(values)) * shares).sum()


def with_zero_grads_for_unused(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The loss unchanged, with a gradient for each of the parameters: zero where the loss does not depend on it, and
    nowhere finite where the loss is not, so that the step is skipped on all ranks.

    Without it, a batch of text leaves the vision tower without gradient. Ranks whose batches differ in that would fill
    their communication buckets differently, and wait for each other for ever or reduce the wrong numbers.
    """
    reached: Tensor = _Reach.apply(loss, *parameters)  # type: ignore[no-untyped-call]
    return reached


class _Reach(torch.autograd.Function):
    """Identity in the first input. The zeros are expanded scalars: they take no memory."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.zeros = [(parameter.new_zeros(()), parameter.shape) for parameter in parameters]
        ctx.save_for_backward(torch.where(loss.isfinite(), 1.0, torch.nan))
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (one,) = ctx.saved_tensors
        return gradients[0] * one, *((zero * one).expand(shape) for zero, shape in ctx.zeros)
