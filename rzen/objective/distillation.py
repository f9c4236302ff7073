"""Losses of the student's scores against a teacher's, over the columns that the teacher has scored.

Shapes: R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rzen.config import DistillationConfig, EmbeddingDistillationConfig


def distillation_loss(
    scores_RC: Tensor,
    teacher_RC: Tensor,
    positives_R: Tensor,
    tau: Tensor,
    config: DistillationConfig | EmbeddingDistillationConfig,
) -> Tensor:
    """Return the unweighted loss of each row, `[R]`; zero for rows where the teacher has scored fewer than two columns.

    A NaN of `teacher_RC` marks a column without a score. `positives_R` are the columns of the positives. `tau` is the
    student's temperature, 0-dim or `[R, 1]`. All gradients are finite.
    """
    is_known_RC = ~teacher_RC.isnan()
    is_used_R = is_known_RC.sum(dim=1) > 1
    if config.loss == "margin_mse":
        is_used_R &= is_known_RC.gather(1, positives_R[:, None])[:, 0]
        loss_R = _margin_error(scores_RC, teacher_RC, positives_R)
    elif config.loss == "mse":
        errors_RC = torch.where(is_known_RC, scores_RC - teacher_RC.nan_to_num(), 0.0).square()
        loss_R = errors_RC.sum(dim=1) / is_known_RC.sum(dim=1).clamp(min=1)
    else:
        teacher_tau = tau.detach() if config.teacher_temperature == "student" else config.teacher_temperature
        loss_R = _divergence(teacher_RC / teacher_tau, scores_RC / tau, is_known_RC, config.loss)
    return torch.where(is_used_R, loss_R, 0.0)


def _divergence(teacher_RC: Tensor, student_RC: Tensor, is_known_RC: Tensor, kind: str) -> Tensor:
    """Return the divergence of the softmax over each row's known columns. The logits are divided by temperatures."""
    log_t_RC, log_s_RC = (_log_softmax(logits_RC, is_known_RC) for logits_RC in (teacher_RC, student_RC))
    t_RC, s_RC = (torch.where(is_known_RC, log_RC.exp(), 0.0) for log_RC in (log_t_RC, log_s_RC))
    if kind == "cross_entropy":
        return -(t_RC * log_s_RC).sum(dim=1)
    to_student_R = (t_RC * (log_t_RC - log_s_RC)).sum(dim=1)
    if kind == "kl":
        return to_student_R
    return (to_student_R + (s_RC * (log_s_RC - log_t_RC)).sum(dim=1)) / 2


def _log_softmax(logits_RC: Tensor, is_known_RC: Tensor) -> Tensor:
    """Return the log of the softmax over each row's known columns, 0 in the others.

    The sum over the known columns alone would be -inf for a row without any, and its gradient NaN. The log of a softmax
    plus a small number would have no gradient where the softmax is smaller.
    """
    is_summed_RC = is_known_RC | ~is_known_RC.any(dim=1, keepdim=True)
    logits_RC = torch.where(is_known_RC, logits_RC, 0.0)
    total_R1 = logits_RC.masked_fill(~is_summed_RC, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.where(is_known_RC, logits_RC - total_R1, 0.0)


def _margin_error(scores_RC: Tensor, teacher_RC: Tensor, positives_R: Tensor) -> Tensor:
    """Return the mean squared difference between student and teacher of the positive's lead over each other column.

    It is the mean over the columns that the teacher has scored. A row without a teacher's score of its positive has 0.
    """
    teacher_lead_RC = teacher_RC.gather(1, positives_R[:, None]) - teacher_RC
    is_other_RC = (~teacher_lead_RC.isnan()).scatter(1, positives_R[:, None], False)
    lead_RC = scores_RC.gather(1, positives_R[:, None]) - scores_RC
    errors_RC = torch.where(is_other_RC, lead_RC - teacher_lead_RC.nan_to_num(), 0.0).square()
    return errors_RC.sum(dim=1) / is_other_RC.sum(dim=1).clamp(min=1)
