"""Settings of the stage `finetune`."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import model_validator

from pipeline.settings import LIBRARIES_BYTES, Estimate, ForeignInput, Settings, StageSettings, artifact, setting
from stages.settings.architecture import Architecture
from stages.settings.losses import OF_SEVERAL_LABELS, CrossEntropy, LossChoice, LossSettings, Sampler
from stages.settings.pretrain import Projector
from stages.settings.relation import Relation
from stages.settings.training import CANVASES, Optimiser, disk_bytes, map_bytes, weight_bytes

NOT_OF_GIVEN_PAIRS = (
    "pseudo_labels",
    "label_relation",
    "target",
    "label_fraction",
    "label_subset",
    "negative_only",
    "flip_is_new_class",
    "positive_share",
)
"""Settings that given pairs have no use for."""


class FinetuneOptimiser(Optimiser):
    """Optimiser and learning-rate schedule (warm-up, then cosine to zero, per step)."""

    name: Literal["lars", "sgd", "adamw", "muon"] = setting("sgd", "LARS: You et al. 2017; Muon: Jordan et al. 2024")
    learning_rate: float = setting(
        0.2, "before scaling by the batch size (of few labels the batch is small, and so is the rate)", gt=0
    )
    warmup_epochs: float = setting(1.0, "linear warm-up; at most a tenth of the steps where a run is short", ge=0)


class Curriculum(Settings):
    """Classes of many images first, then all."""

    min_per_class: int = setting(description="labelled images of a class that comes first, at least", ge=2)
    share: float = setting(0.5, "of the steps that these classes have to themselves", gt=0, lt=1)


class Finetune(StageSettings):
    """Train an encoder on labels: a classifier or an embedding, from all labels or a share of them."""

    stage_version: ClassVar[int] = 3
    uses_ranks: ClassVar[bool] = True
    lower_for_memory: ClassVar[tuple[str, ...]] = ("batch_size", "classes_per_batch", "images_per_class")

    shards: str = artifact("shard", description="images to learn from: the labelled ones of their training part")
    views: str | None = artifact(
        "augment",
        default=None,
        description="the view policy, of which each image gets one view; if left out: crop and flip",
    )
    encoder: str = artifact(
        "pretrain",
        "finetune",
        description="an encoder to start from, `random` (as initialised from the seed), or `timm:NAME`",
        literals=("random",),
        prefixes=("timm:",),
    )
    architecture: Architecture = setting(Architecture(), "of a `random` encoder")
    image_size: int = setting(32, "pixels, for a `random` encoder without views; any other brings its own", ge=4)
    projector_layers: int = setting(
        0, "layers of the projector that the encoder keeps (SimCLRv2 keeps the first); the embedding is their output",
        ge=0,
    )  # fmt: skip
    loss: LossChoice = setting(
        CrossEntropy(name="cross_entropy"),
        "what is learned: `name` and the loss's own settings; or a list of such, whose weighted sum counts",
    )
    projection: Projector | None = setting(
        None, "layers between the embedding and the loss that are thrown away afterwards, as in SimCLR and SupCon"
    )
    neck: Literal["none", "bn"] = setting(
        "none", "bn: the encoder ends with a batch norm; losses that compare see what comes in, others what comes out"
    )
    pooling: Literal["average", "gem", "average_max"] | None = setting(
        None, "how a ResNet's last maps become one vector; left out: as the encoder has it"
    )
    sampler: Sampler | None = setting(
        None,
        "shuffled: every image once an epoch; balanced: classes equally often; p_by_k: P classes with K images each; "
        "hierarchical: the same, the P of few classes above; pairs: of all pairs of images; left out: the loss's own",
    )
    hierarchy: str | None = setting(None, "of hierarchical: the attribute that says the class above")
    parents_per_batch: int = setting(2, "of hierarchical: classes above in a global batch", ge=1)
    positive_share: float = setting(0.5, "of pairs: share of a batch that is of one class each", ge=0, le=1)
    pairs: str | None = setting(
        None,
        "of losses of pairs: a CSV file of the pairs to learn from, in place of labels: columns a, b (images, by their "
        "paths relative to the source) and target (0 to 1: how alike the two are)",
        hashed=False,  # counts by content: see foreign_inputs
        min_length=1,
    )
    negative_only: tuple[str, ...] = setting(
        (),
        "classes that are nobody's positive: their images are told from all others, and have no class of their own (by "
        "losses that compare with all of a batch, bce and focal)",
    )
    negatives_per_batch: int = setting(
        0, "of p_by_k and hierarchical: images of negative-only classes that are added to each batch", ge=0
    )
    classes_of_one: Literal["repeat", "drop", "negative"] = setting(
        "repeat",
        "of p_by_k and hierarchical, classes of a single image: repeat: other views of it are its positives; drop: "
        "they are left out; negative: they are negative-only",
    )
    flip_is_new_class: bool = setting(
        False, "a mirrored image is of another class (Humpback Whale competition): twice the classes and images"
    )
    curriculum: Curriculum | None = setting(None, "classes of many images first")
    target: str | None = setting(
        None, "an attribute of the images that is learned in place of their labels (columns.attributes of stage shard)"
    )
    label_relation: Relation | None = setting(
        None,
        "of images with several labels: which belong together, to mining and loss, and to batches of P x K (all draws "
        "whole sets of labels, any and jaccard draw labels); left out: any",
    )
    label_fraction: float = setting(1.0, "share of the labelled training images that is used, stratified", gt=0, le=1)
    label_subset: int = setting(0, "which of the subsets of that share: those of the probe's label curve", ge=0)
    pseudo_labels: str | None = artifact(
        "pseudo_label",
        default=None,
        description="images that join the labelled ones, with the classes that a classifier gave them",
    )
    freeze: str = setting(
        "none",
        "none; encoder: only the head is trained; or the name of a part such as layer2: frozen up to and with it",
    )
    optimiser: FinetuneOptimiser = setting(FinetuneOptimiser(), "optimiser and schedule")
    head_learning_rate: float = setting(1.0, "rate of the head, as a multiple of the encoder's", gt=0)
    layer_decay: float = setting(
        1.0, "each part of the encoder is trained at so many times the rate of the part that follows it", gt=0, le=1
    )
    epochs: int = setting(50, "passes over the labelled images that are used, or over given pairs", ge=1)
    max_steps: int | None = setting(None, "stop after this many steps, if that is less than the epochs", ge=1)
    batch_size: int = setting(
        128, "images in a global batch, at most all there are (of pairs two for each); of p_by_k P x K instead", ge=2
    )
    classes_per_batch: int = setting(
        8, "P: classes in a global batch of p_by_k and hierarchical, at most all there are", ge=2
    )
    images_per_class: int = setting(8, "K: images of each of these classes", ge=2)
    gradient_clip: float | None = setting(None, "largest norm of the whole gradient", gt=0)
    precision: Literal["fp32", "bf16"] = setting("fp32", "of the encoder's arithmetic; the loss is always fp32")
    channels_last: bool = setting(
        True, "memory format of the encoder, where torch is safe with it (at 8 channels or more)"
    )
    record_every_steps: int = setting(10, "steps that one line of metrics.jsonl is the mean of", ge=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where to train", hashed=False)
    workers: int = setting(2, "threads that read and decode", hashed=False, ge=1)
    log_every_seconds: float = setting(10.0, "between two lines of progress", hashed=False, ge=0)
    checkpoint_every_steps: int | None = setting(
        None,
        "steps between two checkpoints; null: 200, or more where that would take over 1% of the time",
        hashed=False,
        ge=1,
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = setting(
        (), "experiment trackers, by Accelerate", hashed=False
    )

    @model_validator(mode="after")
    def _check(self) -> "Finetune":
        new = self.encoder == "random" or self.encoder.startswith("timm:")
        if new and self.projector_layers:
            raise ValueError(f"projector_layers: only a pretrained encoder has a projector, {self.encoder} has none")
        if self.encoder == "random" and self.architecture.pretrained:
            raise ValueError("architecture.pretrained: a random encoder has no published weights; say timm:NAME")
        if self.freeze == "encoder" and not any(loss.has_head for loss in self.losses) and self.projection is None:
            raise ValueError(f"freeze: encoder leaves nothing to train: {self.loss_name} has no head")
        if self.freeze == "encoder" and self.projection is not None:
            raise ValueError("freeze: encoder leaves nothing that is kept: the projection is thrown away")
        if self.pseudo_labels is not None and self.target is not None:
            raise ValueError("pseudo_labels: they are classes of the labels, and target names an attribute: take one")
        if self.neck == "bn" and self.projection is not None:
            raise ValueError("neck: bn stands between embedding and classifier, where the projection is: take one")
        if self.neck == "bn" and not any(loss.classifies for loss in self.losses):
            raise ValueError(f"neck: nothing works behind it: {self.loss_name} compares; add a loss that classifies")
        self._check_losses()
        return self

    def _check_losses(self) -> None:
        names = [loss.title for loss in self.losses]
        if not names:
            raise ValueError("loss: the list is empty")
        if len(set(names)) < len(names):
            raise ValueError(f"loss: {next(name for name in names if names.count(name) > 1)} stands twice")
        for loss in self.losses:
            if self.sampler_used not in loss.samplers:
                raise ValueError(
                    f"sampler: {loss.title} cannot be trained on batches of {self.sampler_used}; it takes "
                    f"{' or '.join(loss.samplers)}"
                )
        if len({loss.views for loss in self.losses}) > 1:
            two = next(loss.title for loss in self.losses if loss.views == 2)
            raise ValueError(
                f"loss: {two} takes two views of each image and the others one: train them one after another"
            )
        if self.sampler_used == "pairs" and self.batch_size % 2:
            raise ValueError("batch_size: pairs are of two images: take an even number")
        if (self.sampler_used == "hierarchical") != (self.hierarchy is not None):
            raise ValueError("hierarchy and sampler: hierarchical go together")
        if self.negatives_per_batch and not self.is_grouped:
            raise ValueError(f"negatives_per_batch: {self.sampler_used} takes them as they come; leave it out")
        asked = [name for name, is_asked in (
            ("negative_only", bool(self.negative_only)), ("negatives_per_batch", self.negatives_per_batch > 0),
            ("classes_of_one: negative", self.is_grouped and self.classes_of_one == "negative"),
        ) if is_asked]  # fmt: skip
        if asked and not any(loss.uses_negatives for loss in self.losses):
            raise ValueError(f"{asked[0]}: {self.loss_name} has no use for images without a class")
        if self.curriculum is not None and self.sampler_used == "pairs":
            raise ValueError("curriculum: is for classes, not for pairs")
        if self.pairs is not None:
            self._check_pairs()
        self._check_relation()

    def _check_pairs(self) -> None:
        if self.sampler_used != "pairs":
            raise ValueError(
                f"pairs: {self.loss_name} does not learn from given pairs; pairs_cosine, pairs_difference and "
                "pairs_concatenated do"
            )
        for name in NOT_OF_GIVEN_PAIRS:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: is for labels, and given pairs are learned from without; leave it out")

    def _check_relation(self) -> None:
        compares = any(loss.several_labels and not loss.classifies for loss in self.losses)
        draws_sets = self.label_relation is not None and self.label_relation.kind == "all" and self.is_grouped
        if self.label_relation is not None and not compares and not draws_sets:
            raise ValueError(f"label_relation: {self.loss_name} does not compare images by their labels; leave it out")

    @property
    def losses(self) -> tuple[LossSettings, ...]:
        """What is learned, as a list in any case."""
        return self.loss if isinstance(self.loss, tuple) else (self.loss,)

    @property
    def loss_name(self) -> str:
        """`triplet`, or `triplet+bce`."""
        return "+".join(loss.title for loss in self.losses)

    @property
    def of_one_label(self) -> str | None:
        """Where a loss cannot learn from images with several labels: which, and those that can, in words."""
        found = next((loss.title for loss in self.losses if not loss.several_labels), None)
        *others, last = OF_SEVERAL_LABELS
        return found and f"{found} learns from one label an image; {', '.join(others)} and {last} take several"

    @property
    def sampler_used(self) -> Sampler:
        """The one that is named, or that of the first loss that is particular about it."""
        if self.sampler is not None:
            return self.sampler
        return self._sampler_of_losses

    @property
    def is_grouped(self) -> bool:
        """Whether batches are P classes with K images each."""
        return self.sampler_used in ("p_by_k", "hierarchical")

    @property
    def _sampler_of_losses(self) -> Sampler:
        return next((loss.sampler for loss in self.losses if loss.sampler != "shuffled"), "shuffled")

    @property
    def images_per_batch(self) -> int:
        """Of the global batch, where there are so many; counting views."""
        views = max((loss.views for loss in self.losses), default=1)
        if self.is_grouped:
            return views * (self.classes_per_batch * self.images_per_class + self.negatives_per_batch)
        return views * self.batch_size

    def without_effect(self) -> set[str]:
        idle = {"batch_size"} if self.is_grouped else {"classes_per_batch", "images_per_class", "classes_of_one"}
        if self.label_relation is None:
            idle |= {"label_relation"}
        if self.sampler_used == self._sampler_of_losses:
            idle |= {"sampler"}
        if self.sampler_used != "hierarchical":
            idle |= {"parents_per_batch"}
        if self.sampler_used != "pairs" or self.pairs is not None:
            idle |= {"positive_share"}
        if self.encoder != "random":
            idle |= {"architecture", "image_size"}
        elif self.views is not None:
            idle |= {"image_size"}
        return idle | ({"label_subset"} if self.label_fraction == 1 else set())

    def foreign_inputs(self) -> dict[str, ForeignInput]:
        return {} if self.pairs is None else {"pairs": ForeignInput("pairs", (self.pairs_file,))}

    @property
    def pairs_file(self) -> Path:
        """The file of given pairs."""
        assert self.pairs is not None
        return Path(self.pairs).expanduser()

    def estimate(self, inputs: Mapping[str, Estimate]) -> Estimate:
        pixels = inputs["views"].sample_bytes / 12 if "views" in inputs else self.image_size**2
        weights, maps = weight_bytes(self.architecture), map_bytes(self.architecture, pixels)
        if "encoder" in inputs:  # the stage that made it told both
            weights, maps = inputs["encoder"].weight_bytes, inputs["encoder"].sample_bytes
        shards = inputs["shards"] if "shards" in inputs else Estimate()
        scalar_bytes = {"fp32": 1.0, "bf16": 0.5}[self.precision]
        batch = 1.3 * self.images_per_batch * maps * scalar_bytes
        canvases = CANVASES * self.images_per_batch * shards.sample_bytes
        memory_bytes = int(LIBRARIES_BYTES + 4 * weights + batch + canvases)
        disk = disk_bytes(weights, self.optimiser)
        return Estimate(shards.samples, int(maps), disk, memory_bytes, int(weights))
