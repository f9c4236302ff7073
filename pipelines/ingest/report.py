"""What became of every raw sample: counts by reason, and examples. Each task counts its part, and the job adds them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from pipelines.samples import MediaKind, Rejected

REPORT_PATH = "report.json"
MAX_EXAMPLES = 20


@dataclass(slots=True)
class Tally:
    """Samples that are not used, by reason, with the first examples of each."""

    rejected: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> origins and details

    def reject(self, item: Rejected) -> None:
        """Count a sample that is not used."""
        self.rejected[item.reason] = self.rejected.get(item.reason, 0) + 1
        examples = self.examples.setdefault(item.reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(f"{item.origin}: {item.detail}" if item.detail else item.origin)

    def add(self, other: Tally) -> None:
        """Add the counts of a later part."""
        for reason, count in other.rejected.items():
            self.rejected[reason] = self.rejected.get(reason, 0) + count
            examples = self.examples.setdefault(reason, [])
            examples += other.examples[reason][: MAX_EXAMPLES - len(examples)]

    @property
    def num_rejected(self) -> int:
        """Samples that are not used, duplicates included."""
        return sum(self.rejected.values())


@dataclass(slots=True)
class IngestReport(Tally):
    """Counts of all raw samples: `seen` is the sum of all counts in `accepted` and `rejected`."""

    seen: int = 0
    accepted: dict[str, dict[str, int]] = field(default_factory=dict)  # split -> source -> samples
    num_groups: int = 0
    num_reused: int = 0  # groups that an earlier job has stored
    num_bytes: int = 0
    elapsed_s: float = 0.0
    libraries: dict[MediaKind, str] = field(default_factory=dict)  # kind of media -> its decoder and version
    licenses: dict[str, str] = field(default_factory=dict)  # source -> license, where it is stated

    @property
    def num_accepted(self) -> int:
        """Samples in shards."""
        return sum(sum(sources.values()) for sources in self.accepted.values())

    def to_json(self) -> bytes:
        """Return readable JSON."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
