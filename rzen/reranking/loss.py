"""Losses of a re-ranker. Each is a sum over pairs or lists, so that parts of a batch are differentiated by themselves.

z is the log-odds of yes against no. Shapes: P pairs, B queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def pointwise_loss(z_P: Tensor, is_positive_P: Tensor, weights_P: Tensor) -> Tensor:
    """Return the weighted sum of the binary cross-entropies of sigmoid(z), 0-dim fp32.

    `is_positive_P` (bool) are the labels. With the weights of `pair_weights`, the sum over all pairs of a batch is its
    loss.
    """
    each_P = binary_cross_entropy_with_logits(z_P, is_positive_P.to(z_P.dtype), reduction="none")
    return (each_P * weights_P).sum()


def pair_weights(counts_B: Tensor, is_positive_P: Tensor, positive_weight: float) -> Tensor:
    """Return fp32 `[P]`: the weight of each pair in the mean over the pairs of a query, then over the B queries.

    Every query weighs the same, however many of its candidates could be read. So the mean over ranks with equally many
    queries is the loss of the whole batch.
    """
    weights_P = torch.where(is_positive_P, positive_weight, 1.0)
    totals_B = torch.stack([of_query.sum() for of_query in torch.split(weights_P, counts_B.tolist())])
    return weights_P / (totals_B * len(counts_B)).repeat_interleave(counts_B)


def listwise_loss(z_P: Tensor, counts: Sequence[int], temperature: float) -> Tensor:
    """Return the sum over lists of the cross-entropy of softmax(z / temperature), 0-dim fp32.

    The lists lie one after the other, of `counts` pairs each, and the positive is the first of each. A list of only the
    positive has the loss 0.
    """
    losses = [-torch.log_softmax(of_list / temperature, dim=0)[0] for of_list in torch.split(z_P, list(counts))]
    # Without a list, the sum still depends on the model, as a backward pass needs it.
    return torch.stack(losses).sum() if losses else z_P.sum()
