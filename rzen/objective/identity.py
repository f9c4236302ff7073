"""What the ids of a batch say about its contents: which columns cannot be negatives of a row.

A pair of the batch says that its target is a right answer of its query. Two contents that are equal or form a pair are
never pushed apart. Two queries are never pushed apart if they have a right answer in common, nor two targets that
answer one query. Targets are equal by content, and queries as they are asked: content and instruction.

Every function takes R rows and marks columns, bool `[R, C]`. It holds a few bytes for each row and content, so that its
memory is that of a tile. Shapes: N pairs of all ranks, M mined negatives, U contents, A queries as they are asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Identity:
    """Contents and queries of a batch as numbers without gaps."""

    targets: Tensor
    """`[N]`, content of each target."""
    queries: Tensor
    """`[N]`, content of each query. It is equal to that of a target that shows the same."""
    asked: Tensor
    """`[N]`, number of each query with its instruction."""
    mined: Tensor
    """`[M]`, content of each mined negative. Those of one own query follow each other where they are not shared."""
    num_contents: int
    num_asked: int
    is_plain: bool
    """Whether no query shows what another query or a target shows. Then only targets can be equal, which is quicker."""

    @classmethod
    def of(
        cls,
        target_ids: Tensor | None,
        query_ids: Tensor | None,
        instruction_ids: Tensor | None,
        mined_ids: Tensor | None,
        num_pairs: int,
        num_mined: int,
        device: torch.device,
    ) -> Identity:
        """Number the ids, `[N]` and `[M]`. What has no ids is equal to nothing."""
        given = (target_ids, query_ids, mined_ids)
        sizes = (num_pairs, num_pairs, num_mined)
        known = [ids for ids in given if ids is not None]
        numbers = _numbered(torch.cat(known)) if known else torch.zeros(0, dtype=torch.int64, device=device)
        of_known = iter(torch.split(numbers, [len(ids) for ids in known]))
        num_contents = len(numbers)
        parts = []
        for ids, size in zip(given, sizes, strict=True):
            if ids is not None:
                parts.append(next(of_known))
                continue
            parts.append(num_contents + torch.arange(size, device=device))
            num_contents += size
        targets, queries, mined = parts
        asked = queries
        if instruction_ids is not None:
            asked = queries * num_pairs + _numbered(instruction_ids)
        shown = torch.cat([targets, queries]).bincount(minlength=num_contents)
        is_plain = not num_pairs or bool(shown[queries].max() == 1)
        return cls(targets, queries, _numbered(asked), mined, num_contents, num_pairs, is_plain)

    def query_to_targets(self, row_R: Tensor) -> Tensor:
        """Mark the targets that are no negatives of these queries, `[R, N]`."""
        if self.is_plain:
            return self.targets[row_R, None] == self.targets
        return self._near_queries(row_R)[:, self.targets]

    def query_to_mined(self, row_R: Tensor) -> Tensor:
        """Mark the mined negatives that are no negatives of these queries, `[R, M]`."""
        if self.is_plain:
            return (self.targets[row_R, None] == self.mined).logical_or_(self.queries[row_R, None] == self.mined)
        return self._near_queries(row_R)[:, self.mined]

    def query_to_own_mined(self, row_R: Tensor, own_R: Tensor, num_own: int) -> Tensor:
        """Mark, of the K mined negatives of each row itself, those that are no negatives of it, `[R, K]`.

        `own_R` numbers the rows among the `num_own` own queries, which have equally many mined negatives.
        """
        mined_RK = self.mined.view(num_own, -1)[own_R]
        if self.is_plain:
            return (self.targets[row_R, None] == mined_RK).logical_or_(self.queries[row_R, None] == mined_RK)
        return self._near_queries(row_R).gather(1, mined_RK)

    def query_to_queries(self, row_R: Tensor) -> Tensor:
        """Mark the queries that are no negatives of these queries, `[R, N]`: those with a common answer included."""
        answered_RN = self.answers(row_R)
        shares_RA = _count(answered_RN, self.asked, self.num_asked) > 0
        return shares_RA[:, self.asked].logical_or_(self._near_queries(row_R)[:, self.queries])

    def target_to_queries(self, row_R: Tensor) -> Tensor:
        """Mark the queries that are no negatives of the targets of these rows, `[R, N]`."""
        if self.is_plain:
            return self.targets[row_R, None] == self.targets
        content_R = self.targets[row_R]
        near_RU = self._linked(content_R, self.queries, self.targets)
        near_RU.scatter_(1, content_R[:, None], True)
        return near_RU[:, self.queries].logical_or_(self.askers(row_R))

    def target_to_targets(self, row_R: Tensor) -> Tensor:
        """Mark the targets that are no negatives of the targets of these rows, `[R, N]`.

        Those that answer a common query are among them.
        """
        content_R = self.targets[row_R]
        near_RU = _count(self.askers(row_R), self.targets, self.num_contents) > 0
        near_RU |= self._linked(content_R, self.queries, self.targets)
        near_RU |= self._linked(content_R, self.targets, self.queries)
        near_RU.scatter_(1, content_R[:, None], True)
        return near_RU[:, self.targets]

    def answers(self, row_R: Tensor) -> Tensor:
        """Mark the targets that a pair of the batch calls a right answer of these queries, `[R, N]`."""
        return self._linked(self.asked[row_R], self.asked, self.targets)[:, self.targets]

    def askers(self, row_R: Tensor) -> Tensor:
        """Mark the queries that a pair of the batch answers by the targets of these rows, `[R, N]`."""
        return self._linked(self.targets[row_R], self.targets, self.asked)[:, self.asked]

    def _near_queries(self, row_R: Tensor) -> Tensor:
        """Mark the contents that are no negatives of these queries, `[R, U]`.

        They are the right answers, the query itself, and the queries that it answers.
        """
        content_R = self.queries[row_R]
        near_RU = self._linked(self.asked[row_R], self.asked, self.targets)
        near_RU |= self._linked(content_R, self.targets, self.queries)
        return near_RU.scatter_(1, content_R[:, None], True)

    def _linked(self, key_R: Tensor, key_N: Tensor, value_N: Tensor) -> Tensor:
        """Mark, for each row, the values of all pairs whose key is that of the row, bool `[R, U]`."""
        num_rows = len(key_R)
        # Rows of one key share one row of marks. All other pairs mark the last row, so that nothing waits for a GPU.
        row_of_key_U = key_N.new_full((self.num_contents,), num_rows)
        row_of_key_U[key_R] = torch.arange(num_rows, device=key_R.device)
        marks = torch.zeros(num_rows + 1, self.num_contents, dtype=torch.bool, device=key_R.device)
        marks[row_of_key_U[key_N], value_N] = True
        return marks[row_of_key_U[key_R]]


def _numbered(ids: Tensor) -> Tensor:
    """Return numbers from 0 without gaps, equal for equal ids."""
    numbers: Tensor = ids.unique(return_inverse=True)[1]  # type: ignore[no-untyped-call]
    return numbers


def _count(marks_RN: Tensor, key_N: Tensor, num_keys: int) -> Tensor:
    """Count the marked columns of each key, int32 `[R, num_keys]`."""
    counts = torch.zeros(len(marks_RN), num_keys, dtype=torch.int32, device=marks_RN.device)
    return counts.index_add_(1, key_N, marks_RN.int())
