"""Settings of the objective. Each field of `ObjectiveConfig` but the temperature and the tiles is a term of its own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.config import Config, Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from pipelines.errors import UserError

NonNegativeFloat = Annotated[float, Field(ge=0)]


class TemperatureConfig(Config):
    """tau_t = exp(theta_t), one learnable theta per task (paper, section 3). It always divides the similarity."""

    initial: PositiveFloat = 0.02
    """First value of every temperature (as VLM2Vec-V2, because the paper is silent)."""
    minimum: PositiveFloat = 0.005
    """Lower bound of a temperature. Our choice."""
    maximum: PositiveFloat = 0.5
    """Upper bound of a temperature. Our choice."""
    learnable: bool = True
    """`false` keeps the first value of every task."""
    carried: bool = False
    """`true` starts from the temperatures that `init_adapter`, or else the backbone, was trained with. Every model is
    saved with those of its tasks. Tasks that it does not have start from `initial`."""
    lr_scale: NonNegativeFloat = 5.0
    """Learning rate of theta relative to the model's. Our choice. Theta has no weight decay."""

    @model_validator(mode="after")
    def _possible(self) -> TemperatureConfig:
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(f"initial={self.initial} must lie in [minimum={self.minimum}, maximum={self.maximum}]")
        if self.learnable and self.minimum == self.maximum:
            raise ValueError(
                f"minimum and maximum are both {self.minimum}, which leaves nothing to learn; set learnable: false"
            )
        if self.learnable and self.lr_scale == 0:
            raise ValueError("lr_scale=0 leaves nothing to learn; set learnable: false")
        return self


class FalseNegativeConfig(Config):
    """False-negative elimination: negative i is dropped where cos(k_i, k+) exceeds the threshold (paper, section 3)."""

    threshold: Annotated[float, Field(gt=-1, lt=1)] = 0.95
    """Cosine above which a negative counts as a duplicate of the positive (paper)."""
    warmup_steps: NonNegativeInt = 100
    """Steps before the rule applies. An untrained model scores every pair nearly 1 and would drop them all. Our choice.
    """
    max_dropped_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """At most this share of a query's negatives is dropped, the most similar first. Our choice."""


class HardnessConfig(Config):
    """Hard negatives weigh more: w_i = exp(alpha * s(q, k_i)), a factor of their term (paper, section 3)."""

    alpha: PositiveFloat = 9.0
    """Strength of the weights (paper)."""
    gradient: Literal["detached", "flowing"] = "detached"
    """Whether the weight is a constant (as in LLaVE, its origin) or is differentiated. The paper is silent."""
    normalized: bool = False
    """Divide a query's weights by their mean over its kept negatives (Robinson et al., arXiv 2010.04592). They then
    move weight between negatives and add none. The paper writes no normalization."""


class MinedConfig(Config):
    """How mined hard negatives count: those that samples bring, up to `data.negatives_per_sample` each."""

    shared: bool = True
    """`true`: a mined negative counts for every query of the global batch. `false`: only for its own query."""
    hardness: HardnessConfig | None = HardnessConfig()
    """Weights of mined negatives, separate from those of in-batch negatives. `null`: all 1."""


class TeacherConfig(Config):
    """What both kinds of distillation have in common."""

    weight: PositiveFloat = 1.0
    """Factor of this loss."""
    contrastive_weight: NonNegativeFloat = 1.0
    """Factor of the contrastive loss, which it is added to. 0 trains on the teacher only (U-MARVEL)."""
    teacher_temperature: PositiveFloat | Literal["student"] = 0.05
    """Divides the teacher's scores. `student` takes the student's temperature as a constant (U-MARVEL), which must not
    be learned: a larger one lowers the loss while no score changes. The default is our choice."""


class DistillationConfig(TeacherConfig):
    """Learn from a teacher's scores of each query's positive and candidates, which a judged candidate table holds."""

    loss: Literal["kl", "cross_entropy", "symmetric_kl", "margin_mse"] = "kl"
    """`kl`: KL(teacher || student) of the softmax over the candidates (U-MARVEL). `cross_entropy`: the same gradient,
    plus the teacher's entropy in the value. `symmetric_kl`: mean of both directions (UniME-V2 has their sum).
    `margin_mse`: squared difference of the positive's lead over each candidate, without temperatures."""
    only_if_right: bool = False
    """`true` leaves out queries for which the teacher scores a candidate higher than the positive. A re-ranker makes
    some tasks worse, such as captions of images. Our choice."""


class EmbeddingDistillationConfig(TeacherConfig):
    """Learn the cosines that a larger model gives the queries and targets of the batch, from its stored vectors.

    The teacher may have vectors of any width. `data.teacher_vectors` names them (NeMo AutoModel has the same losses).
    """

    loss: Literal["kl", "cross_entropy", "symmetric_kl", "mse"] = "kl"
    """`kl`: KL(teacher || student) of the softmax over the targets of the batch. `cross_entropy`: the same gradient,
    plus the teacher's entropy in the value. `symmetric_kl`: mean of both directions. `mse`: mean squared difference of
    the cosines, without temperatures."""


class QuantizedConfig(Config):
    """Train for vectors that are stored in few bits: the loss is also that of rounded vectors (straight-through).

    Exports and servers are the same as without it: the model returns unrounded vectors, and an index rounds them.
    """

    types: Annotated[list[Literal["int8", "binary"]], Field(min_length=1)] = Field(default=["int8"])
    """`int8`: 255 steps of a learned size (LSQ, arXiv 1902.08153). `binary`: the sign of each value."""
    weight: PositiveFloat = 1.0
    """Factor of the loss of each type. It is added to that of the unrounded vectors. Our choice."""

    @model_validator(mode="after")
    def _distinct(self) -> QuantizedConfig:
        if len(set(self.types)) < len(self.types):
            raise ValueError("types must not name anything twice")
        return self


Inherit = Literal["inherit"]
Margin = Annotated[float, Field(ge=0, lt=2)]
FocalGamma = Annotated[float, Field(ge=1)]


class TaskObjectiveConfig(Config):
    """Settings of the objective for one task. `inherit` is the setting of all tasks, and others replace it whole."""

    in_batch: bool | Inherit = "inherit"
    """`false`: only mined negatives, as for classification, where other targets of the batch may be right as well."""
    hardness: HardnessConfig | Inherit | None = "inherit"
    """Weights of in-batch negatives."""
    false_negatives: FalseNegativeConfig | Inherit | None = "inherit"
    """False-negative elimination."""
    mined: MinedConfig | Inherit = "inherit"
    """Mined hard negatives: shared or of their own query, and their weights."""
    duplicates: Literal["drop", "positive"] | Inherit = "inherit"
    """Other right answers of the batch."""
    margin: Margin | Inherit | None = "inherit"
    """Margin above which a negative is dropped."""
    focal_gamma: FocalGamma | Inherit | None = "inherit"
    """Focal weights of queries."""
    symmetric: Fraction | Inherit = "inherit"
    """Share of the reverse direction."""
    same_side: list[Literal["queries", "targets"]] | Inherit = "inherit"
    """Other queries and other targets as negatives."""
    distillation: DistillationConfig | Inherit | None = "inherit"
    """Learn from a teacher's scores of candidates. `null`: not for this task."""
    embedding_distillation: EmbeddingDistillationConfig | Inherit | None = "inherit"
    """Learn a larger model's cosines. `null`: not for this task."""


class ObjectiveConfig(Config):
    """InfoNCE with the recipe's additions and further options. All compose; raw loss values are not comparable.

    Pairs with a `relevance` are trained on its order (CoSENT). Only the temperature and `matryoshka` apply to them.
    """

    kind: Literal["contrastive"] = "contrastive"
    """`contrastive`, the default, trains an embedder. `rerank` trains a re-ranker."""
    in_batch: bool = True
    """Whether other targets of the batch are negatives. `false`: only mined negatives, which all samples then need."""
    hardness: HardnessConfig | None = HardnessConfig()
    """Weights of in-batch negatives. `null`: all 1 (stage 1)."""
    false_negatives: FalseNegativeConfig | None = FalseNegativeConfig()
    """False-negative elimination. `null` turns it off. In our runs, it gains 2 to 3 points where half of the
    look-alikes are right answers. It costs up to 6 where none is, at temperature 0.02 without hardness weights."""
    temperature: TemperatureConfig = TemperatureConfig()
    """One learnable temperature per task."""
    mined: MinedConfig = MinedConfig()
    """Mined hard negatives."""
    distillation: DistillationConfig | None = None
    """Learn from a teacher's scores of mined negatives. `null`: only from the pairs."""
    embedding_distillation: EmbeddingDistillationConfig | None = None
    """Learn the cosines that a larger model gives the pairs of a batch. `null`: only from the pairs."""
    duplicates: Literal["drop", "positive"] = "drop"
    """Other targets of the batch that are right answers: those with the content of the positive, and the targets of
    equal queries. `drop` leaves them out. `positive` makes them positives too, and the loss of a query is the mean
    over its positives."""
    margin: Margin | None = None
    """Drop negatives with s > s(q, k+) + margin: too good to be negative (Qwen3-Embedding has 0.1)."""
    focal_gamma: FocalGamma | None = None
    """Weigh each query by (1 - p)^gamma, p the probability of its positive. Queries that are right already count less
    (KaLM-Embedding-V2; Lin et al., arXiv 1708.02002)."""
    symmetric: Fraction = 0.0
    """Share of the reverse direction, target -> queries, in the loss. 0.5 is the usual two-way loss."""
    same_side: list[Literal["queries", "targets"]] = Field(default=[])
    """Further negatives of query i: other queries, by s(q_i, q_j), and other targets, by s(k_i+, k_j) (GTE)."""
    matryoshka: list[PositiveInt] = Field(default=[])
    """Smaller widths of the vector that are trained too: its first values are a vector of their own. The loss is the
    mean over these and the full width (Kusupati et al., arXiv 2205.13147)."""
    quantized: QuantizedConfig | None = None
    """Train for vectors in 8 bits or 1 bit. `null`: only for unrounded ones."""
    tasks: dict[str, TaskObjectiveConfig] = Field(default={})
    """Task -> settings that hold for its batches instead. A group of sources with several tasks has its own name."""
    tile_rows: PositiveInt | None = 512
    """Queries of a worker that are scored at a time against all columns. Memory is tile_rows x columns instead of all
    queries x columns. Work and results stay the same. `null`: all at once. Our choice."""

    @model_validator(mode="after")
    def _compatible(self) -> ObjectiveConfig:
        if len(set(self.same_side)) < len(self.same_side) or len(set(self.matryoshka)) < len(self.matryoshka):
            raise ValueError("same_side and matryoshka must not name anything twice")
        if any(map(_follows_student, [self, *map(self.of_task, self.tasks)])) and self.temperature.learnable:
            raise ValueError(
                "teacher_temperature: student needs a fixed temperature, because a larger one lowers the loss by"
                " itself; set temperature.learnable: false, or a number"
            )
        for place, some in [("", self), *((f"tasks.{task}: ", self.of_task(task)) for task in self.tasks)]:
            if some.symmetric == 1 and some.same_side:
                raise ValueError(
                    f"{place}same_side adds to query -> targets, of which symmetric: 1 leaves nothing; lower symmetric"
                )
            if some.symmetric == 1 and some.distillation:
                raise ValueError(
                    f"{place}distillation needs query -> targets, of which symmetric: 1 leaves nothing; lower symmetric"
                )
            if some.distillation and some.embedding_distillation:
                weights = some.distillation.contrastive_weight, some.embedding_distillation.contrastive_weight
                if weights[0] != weights[1]:
                    raise ValueError(
                        f"{place}distillation and embedding_distillation have contrastive_weight {weights[0]:g} and"
                        f" {weights[1]:g}, and there is one contrastive loss; set both to the same"
                    )
            if not some.in_batch and (some.symmetric or some.same_side):
                raise ValueError(
                    f"{place}in_batch: false leaves symmetric and same_side without negatives; set symmetric: 0 and"
                    " same_side: []"
                )
        return self

    @property
    def distills(self) -> bool:
        """Whether the batches of any task learn a teacher's scores."""
        return any(some.distillation for some in [self, *map(self.of_task, self.tasks)])

    @property
    def distills_vectors(self) -> bool:
        """Whether the batches of any task learn from a teacher's vectors."""
        return any(some.embedding_distillation for some in [self, *map(self.of_task, self.tasks)])

    def of_task(self, task: str) -> ObjectiveConfig:
        """Return the settings that hold for a task."""
        if task not in self.tasks:
            return self.model_copy(update={"tasks": {}})
        own = self.tasks[task]
        settings = {name: getattr(own, name) for name in type(own).model_fields}
        return self.model_copy(update={name: it for name, it in settings.items() if it != "inherit"} | {"tasks": {}})

    def check_tasks(self, tasks: Collection[str]) -> None:
        """Raise `UserError` for settings of a task that is none of `tasks`."""
        for task in sorted(set(self.tasks).difference(tasks)):
            problem = "is no task of the sources that are trained on"
            raise UserError(f"objective.tasks.{task}", problem, f"name one of {', '.join(sorted(tasks))}")


def _follows_student(config: ObjectiveConfig) -> bool:
    teachers = (config.distillation, config.embedding_distillation)
    return any(teacher is not None and teacher.teacher_temperature == "student" for teacher in teachers)
