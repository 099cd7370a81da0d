"""Supervised training of an encoder: all of it, its head alone, or what lies above a named part."""

from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import timm
import torch
from torch import Tensor, nn

from pipeline.errors import BadData, UsageError
from pipeline.run import Run
from pipeline.training import Training
from stages.evaluation import label_subset, labels_digest
from stages.images import Shards, open_shards, read_summary
from stages.images.batch_plan import Batches, Labelled, Plan, begin_with, label_samples, plan_batches, plan_given_pairs
from stages.images.loader import BatchLoader
from stages.images.pseudo_labels import Learned, PseudoLabels, add_pseudo_labels, read_pseudo_labels
from stages.images.targets import Targets, targets_of
from stages.labels import LabelRelation, relation_of
from stages.losses import Task
from stages.losses.combined import Combined, Part
from stages.losses.registry import build_loss
from stages.losses.watch import Watch
from stages.models import (
    ArchitectureCard,
    BottleneckedEncoder,
    Encoder,
    HeadCard,
    LabelsCard,
    ModelCard,
    Optimisation,
    PseudoLabelsCard,
    architecture_at,
    build_bottleneck,
    build_encoder,
    build_projector,
    choose_memory_format,
    convert_batch_norm,
    count_parameters,
    keep_projector_layers,
    load_encoder,
    make_card,
    match_channels,
    save_model,
    set_pooling,
)
from stages.models.encoders import PUBLISHED_WIDTH, TIMM_PREFIX, require_backbone
from stages.models.freezing import UnknownPart, freeze, train_around
from stages.models.heads import Head
from stages.models.optimisation import layers_with_multiples
from stages.settings.finetune import Finetune
from stages.sources.pair_table import read_pairs
from stages.views import Interpolation, Policy, load, preset, read_policy, to_device

BATCHES_LOOKED_AT = 10
MANY_LONE = 0.1
"""Share of a batch without a partner that is worth a word."""
CROP_AND_FLIP = {"colour_jitter": 0.0, "saturation": 0.0, "hue": 0.0, "grey": 0.0, "blur": 0.0}
"""What is left of the policy of pretraining where a recipe names no views."""


@dataclass(frozen=True)
class Start:
    """The encoder to train, and what is known of it."""

    encoder: Encoder
    architecture: ArchitectureCard
    policy: Policy
    """With the mean and std that fit the weights."""
    labels_seen: tuple[LabelsCard, ...] = ()


@dataclass(frozen=True)
class Lesson:
    """What is learned from.

    Attributes:
        shards: where the plan's images are.
        images: how many there are.
        in_words: what it is.
        seen: what the encoder will have seen.
    """

    shards: Shards
    plan: Plan
    images: int
    in_words: str
    seen: tuple[LabelsCard, ...]


def check_settings(settings: Finetune) -> None:
    """What can be said before anything runs. Raises UnusableBackbone."""
    if settings.encoder == "random":
        require_backbone(settings.architecture.backbone)
    elif settings.encoder.startswith(TIMM_PREFIX):
        require_backbone(settings.encoder)


def finetune(run: Run, settings: Finetune) -> None:
    """Write encoder.safetensors, model.json, metrics.jsonl and, where there are any, head, neck and bottleneck."""
    shards = open_shards(run.input("shards"), "train")
    lesson = _lesson_of_labels(run, settings, shards) if settings.pairs is None else _given(run, settings, shards)
    shards, plan = lesson.shards, lesson.plan
    start = _start(run, settings, shards)
    encoder, memory_format = start.encoder, choose_memory_format(start.encoder, settings.channels_last)
    objective = Objective(settings, encoder, plan.samples)
    for module in (encoder, objective):
        convert_batch_norm(module)
    _freeze(run, settings, encoder, objective)
    encoder.to(run.device).to(memory_format=memory_format)
    objective.to(run.device)
    number_of_views = settings.losses[0].views
    views = load(start.policy, run.seed, run.device, views=number_of_views)
    batches = BatchLoader(shards, plan.images(), settings.workers, run.rank, run.ranks)
    run.say(batches.description)
    steps = _steps(settings, batches.steps_per_epoch)
    optimisation = Optimisation(
        settings.optimiser,
        [*layers_with_multiples(encoder, settings.layer_decay), ([objective], settings.head_learning_rate)],
        batch_size=plan.batch_size,
        steps=steps,
        steps_per_epoch=batches.steps_per_epoch,
        gradient_clip=settings.gradient_clip,
    )
    state = {"encoder": encoder, "loss": objective, "optimiser": optimisation.optimiser}
    run.say(
        f"{settings.loss_name} on {lesson.in_words}; "
        f"{start.architecture.backbone}, {count_parameters(encoder):,} parameters, {steps:,} steps of "
        f"{plan.batch_size}, learning rate {optimisation.rate:.4g} on {run.device}"
    )
    if settings.projection is not None and objective.loss.trained_head is not None:
        run.say("the head is trained on the projection, and thrown away with it")
    watch = Watch(settings.loss_name, objective.loss.value_at_a_point)
    embed, measure = run.distribute(encoder), run.distribute(objective)
    with (
        closing(batches),
        Training(
            run, state, steps=steps, steps_per_epoch=batches.steps_per_epoch, images_per_step=plan.batch_size
        ) as training,
    ):
        for step, batch in training.steps(batches.load):
            rows = plan.rows(step, run.rank, run.ranks)
            with training.part("views"):
                visits = _visits(plan, step, run.rank, len(rows))
                images = views(batch.images, batch.sample_ids, visits, batch.sizes)  # [views, B, C, h, w]
                images = _mirrored(images, plan.samples.mirrored[rows]).flatten(0, 1)
                images = images.contiguous(memory_format=memory_format)
                labels = torch.from_numpy(plan.answers(step, run.rank, run.ranks))
                labels = torch.cat([labels] * number_of_views)  # [views x B], or [views x B, classes]
            with training.part("encoder forward"), run.autocast(settings.precision):
                embeddings = embed(images)  # [views x B, D]
            with training.part("loss"):
                loss, figures = measure(embeddings, to_device(labels, run.device), step / steps)
            optimisation.optimiser.zero_grad()
            with training.part("backward"):
                training.backward(loss)
            with training.part("optimiser"):
                norm = optimisation.clip_gradient()
                if not training.accepts(loss, norm, sample_ids=batch.sample_ids, images=images):
                    continue
                rate = optimisation.step(step)
            training.record(loss=loss, learning_rate=rate, gradient_norm=norm, **figures)
            if training.line_is_due:
                with training.part("measurements"):
                    training.record(spread=watch.look(embeddings.detach(), loss.detach(), figures))
                for alarm in watch.alarms():
                    run.warn(alarm)

    trained = BottleneckedEncoder(encoder, objective.bottleneck) if objective.bottleneck else encoder
    save_model(run.out, _card(start, trained, lesson.seen, objective), trained, None, objective.head)
    run.count(samples=lesson.images, steps=steps, **training.latest)


class Objective(nn.Module):
    """What the encoder's embeddings go through in training: a projection that is thrown away, or a bottleneck that
    stays, and the losses with their heads."""

    def __init__(self, settings: Finetune, encoder: Encoder, samples: Labelled):
        super().__init__()
        size = encoder.embedding_size
        self.projection = None
        if settings.projection is not None:
            self.projection = build_projector(size, **settings.projection.model_dump())
            size = settings.projection.dimension
        task = Task(size, tuple(samples.counts.tolist()))
        if samples.have_several:
            task = replace(task, relation=relation_of(settings.label_relation), samples=int(samples.known.sum()))
        parts = [Part(one.title, build_loss(one.title, one.options, task), one.weight, one.classifies)
                 for one in settings.losses]  # fmt: skip
        self.names = samples.names
        self.loss = Combined(parts, build_bottleneck(size) if settings.neck == "bn" else None)

    def forward(self, embeddings: Tensor, labels: Tensor, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """[N, D], labels of each -> the loss and figures, see Loss."""
        return self.loss(embeddings if self.projection is None else self.projection(embeddings), labels, progress)

    @property
    def bottleneck(self) -> nn.Module | None:
        return self.loss.bottleneck

    @property
    def head(self) -> Head | None:
        """What was trained on embeddings; on projections it is of no use."""
        return self.loss.trained_head if self.projection is None else None


def _in_words(samples: Labelled, images: int) -> str:
    """`of 10 classes`, with what is mirrored or negative-only."""
    negative = int((~samples.known).sum())
    more = f" as {len(samples):,} samples" if len(samples) != images else ""
    return f"of {len(samples.names):,} classes{more}" + (f", {negative:,} of them negative-only" if negative else "")


def _steps(settings: Finetune, steps_per_epoch: int) -> int:
    return min(settings.epochs * steps_per_epoch, settings.max_steps or 2**62)


def _lesson_of_labels(run: Run, settings: Finetune, shards: Shards) -> Lesson:
    targets = targets_of(shards, settings.target)
    chosen = _labelled_images(run, settings, shards, targets)
    seen: tuple[LabelsCard, ...] = (_labels_seen(run, settings, shards, targets, chosen),)
    words = f"{len(chosen):,} labelled images"
    if run.is_artifact("pseudo_labels"):
        given = read_pseudo_labels(run.input("pseudo_labels"))
        learned = add_pseudo_labels(shards, targets, chosen, given)
        shards, targets, chosen = learned.shards, learned.targets, learned.positions
        seen, words = _with_pseudo_labels(run, learned, given, seen[0])
    plan = _plan(run, settings, shards, targets, chosen)
    return Lesson(shards, plan, len(chosen), f"{words} {_in_words(plan.samples, len(chosen))}", seen)


def _given(run: Run, settings: Finetune, shards: Shards) -> Lesson:
    """The pairs of a file whose two images are both in the training part; labels are not looked at."""
    table = read_pairs(settings.pairs_file)
    pairs = table.among(shards.keys)
    kept = np.flatnonzero((pairs >= 0).all(axis=1))
    if len(kept) < len(table):
        first = int(np.argmax((pairs < 0).any(axis=1)))
        lacking = f"line {table.lines[first]} names {table.names[first][int(pairs[first, 0] >= 0)]!r}"
        if not len(kept):
            raise BadData(
                f"{run.step}.pairs: none of the {len(table):,} pairs of {table.path} is of two training images: "
                f"{lacking}, and training images are named like {shards.keys[0]!r}"
            )
        run.warn(
            f"{len(table) - len(kept):,} of {len(table):,} pairs of {table.path} are left out, since an image is not "
            f"in the training part: {lacking}"
        )
    targets = table.targets[kept]
    plan = plan_given_pairs(run.seed, pairs[kept], targets.astype(np.float32), settings.batch_size)
    for note in plan.notes:
        run.say(note)
    run.check_divides("batch_size", plan.batch_size, largest=2 * len(kept), unit=plan.unit)
    digest = labels_digest(("\t".join(table.names[row]) for row in kept), map(str, targets.tolist()))
    images = len(plan.samples)
    seen = LabelsCard(loss=settings.loss_name, fraction=1.0, subset=0, seed=run.seed, samples=images, digest=digest)
    return Lesson(shards, plan, images, f"{len(kept):,} given pairs of {images:,} images", (seen,))


def _labelled_images(run: Run, settings: Finetune, shards: Shards, targets: Targets) -> np.ndarray:
    """Positions of the labelled training images that are used, ascending: int64 [n]."""
    if targets.are_several and settings.of_one_label is not None:
        raise BadData(
            f"{run.step}: images with several labels; {settings.of_one_label}; `target` names an attribute to learn in "
            "their place"
        )
    what = "label" if settings.target is None else settings.target
    labelled = np.flatnonzero(targets.known)
    if not len(labelled):
        raise BadData(f"{run.step}: no training image has a {what}; fine-tuning needs them (a folder for each class)")
    if len(labelled) < len(shards):
        left = "are left out" if settings.pseudo_labels is None else "have a pseudo-label or are left out"
        run.warn(f"{len(shards) - len(labelled):,} of {len(shards):,} training images have no {what} and {left}")
    classes = targets.present(labelled)
    if len(classes) < 2:
        only = targets.classes[classes[0]]
        raise BadData(
            f"{run.step}: all {len(labelled):,} labelled training images are {only!r}; two classes are needed"
        )
    ids = shards.sample_ids.numpy()[labelled]
    return labelled[
        label_subset(targets.strata(labelled), ids, settings.label_fraction, run.seed, settings.label_subset)
    ]


def _plan(run: Run, settings: Finetune, shards: Shards, targets: Targets, chosen: np.ndarray) -> Plan:
    """The batches, checked against the number of processes."""
    labels, relation = targets.labels[chosen], relation_of(settings.label_relation)
    samples = label_samples(chosen, labels, targets.classes, settings.negative_only, settings.flip_is_new_class)
    asked = Batches(
        sampler=settings.sampler_used,
        batch_size=settings.batch_size,
        classes_per_batch=settings.classes_per_batch,
        images_per_class=settings.images_per_class,
        parents_per_batch=settings.parents_per_batch,
        positive_share=settings.positive_share,
        negatives_per_batch=settings.negatives_per_batch,
        classes_of_one=settings.classes_of_one,
        by_set=relation.needs_equal_sets,
    )
    if settings.hierarchy is not None:
        above = np.asarray([name or "" for name in shards.attribute(settings.hierarchy)])  # without one: alike
        samples = replace(samples, parents=np.unique(above, return_inverse=True)[1][samples.positions])
    plan = plan_batches(run.seed, samples, asked)
    if settings.curriculum is not None:
        steps = round(settings.curriculum.share * _steps(settings, plan.schedule.steps_per_epoch))
        plan = begin_with(run.seed, plan, asked, settings.curriculum.min_per_class, steps)
    for note in plan.notes:
        run.say(note)
    if samples.have_several and settings.is_grouped:
        _warn_of_lone_rows(run, plan, relation)
    elif not samples.have_several and settings.label_relation is not None:
        run.warn("label_relation changes nothing: every image has one label")
    setting = "classes_per_batch x images_per_class" if settings.is_grouped else "batch_size"
    largest = len(plan.samples) if settings.sampler_used == "shuffled" else None
    run.check_divides(setting, plan.batch_size, largest=largest, unit=plan.unit)
    return plan


def _warn_of_lone_rows(run: Run, plan: Plan, relation: LabelRelation) -> None:
    """Whether many rows of a batch find no partner: batches are drawn by label, and the relation may ask for more."""
    lone, rows = 0, 0
    for step in range(min(BATCHES_LOOKED_AT, plan.schedule.steps_per_epoch)):
        labels = torch.from_numpy(plan.samples.labels[plan.schedule.positions(step)])
        labels = labels[labels.any(dim=1)]
        lone += int((relation.between(labels, labels).sum(dim=1) == 1).sum())  # itself alone
        rows += len(labels)
    if lone > MANY_LONE * rows:
        run.warn(
            f"label_relation: {lone / rows:.0%} of the images of a batch belong to no other of it, and teach what is "
            "apart alone: a lower threshold, or more images_per_class, finds them partners"
        )


def _visits(plan: Plan, step: int, rank: int, rows: int) -> Tensor:
    """For each of this process's rows a number that no other visit of the same sample has, int64 [rows].

    It keys the draws of the view: where a batch repeats a sample, and where an epoch does, the view is another.
    """
    return step * plan.repeats + (rank * rows + torch.arange(rows)) % plan.repeats


def _mirrored(images: Tensor, mirrored: np.ndarray) -> Tensor:
    """Views [views, B, C, h, w], some of them turned left to right: bool [B]."""
    if not mirrored.any():
        return images
    turned = to_device(torch.from_numpy(mirrored), images.device)
    return torch.where(turned[:, None, None, None], images.flip(-1), images)


def _start(run: Run, settings: Finetune, shards: Shards) -> Start:
    """The encoder to start from, and the policy of the one view."""
    torch.manual_seed(run.seed)  # the encoder is the first to draw: `random` in the stage embed has the same weights
    start = _trained(run, settings, shards) if run.is_artifact("encoder") else _new(run, settings, shards)
    if settings.pooling is not None:
        set_pooling(start.encoder, settings.pooling)
    if not settings.flip_is_new_class:
        return start
    if start.policy.vertical_flip:
        raise UsageError(
            f"{run.step}.flip_is_new_class: the views are flipped vertically, which mirrors too: set vertical_flip of "
            "the policy to 0"
        )
    return replace(start, policy=start.policy.model_copy(update={"horizontal_flip": 0.0}))


def _new(run: Run, settings: Finetune, shards: Shards) -> Start:
    """An encoder as initialised, or as published."""
    if settings.encoder == "random":
        architecture = ArchitectureCard(**settings.architecture.model_dump())
        policy = _policy(run, settings.image_size)
    else:
        architecture = ArchitectureCard(
            backbone=settings.encoder, width=PUBLISHED_WIDTH, small_stem_up_to=0, pretrained=True
        )
        published = timm.get_pretrained_cfg(settings.encoder.removeprefix(TIMM_PREFIX))
        image_size = settings.image_size if published is None else published.input_size[-1]
        is_bilinear = published is None or published.interpolation == "bilinear"
        policy = _policy(run, image_size, "bilinear" if is_bilinear else "bicubic")
    encoder = build_encoder(**architecture.model_dump(), image_size=policy.image_size, channels=shards.channels)
    if encoder.weights.mean is not None:
        run.say(f"starts from {encoder.weights.source}, licence: {encoder.weights.licence or 'not stated'}")
        policy = policy.model_copy(update={"mean": encoder.weights.mean, "std": encoder.weights.std})
    return Start(encoder, architecture, policy)


def _trained(run: Run, settings: Finetune, shards: Shards) -> Start:
    """An encoder of the store, with the layers of its projector that are asked for."""
    folder = run.input("encoder")
    encoder, card = load_encoder(folder)
    policy = _policy(run, card.image_size, card.interpolation, card.antialias)
    if match_channels(encoder, card.channels, shards.channels):
        run.say(f"the encoder's first layer, made for RGB images, is inflated to {shards.channels} channels")
    else:
        policy = policy.model_copy(update={"mean": card.mean, "std": card.std})
    there = 0 if card.projector is None else card.projector.layers
    if settings.projector_layers > there:
        raise UsageError(
            f"{run.step}.projector_layers: {settings.projector_layers} is more than the {there} that the encoder has"
        )
    if settings.neck == "bn" and card.bottleneck:
        raise UsageError(f"{run.step}.neck: the encoder ends with a batch norm already; leave it out")
    if settings.projector_layers and card.bottleneck:
        raise UsageError(f"{run.step}.projector_layers: the encoder ends with a batch norm; leave it out")
    if settings.projector_layers and card.neck is not None:
        raise UsageError(
            f"{run.step}.projector_layers: the encoder ends with layers of an earlier projector already; leave it out"
        )
    if settings.projector_layers:
        encoder = keep_projector_layers(encoder, card, folder, settings.projector_layers)
    return Start(encoder, architecture_at(card, policy.image_size), policy, card.labels_seen)


def _policy(run: Run, image_size: int, interpolation: Interpolation = "bilinear", antialias: bool = True) -> Policy:
    """The policy that the recipe names, or crop and flip with the mean and std of the shards."""
    if run.is_artifact("views"):
        return read_policy(run.input("views"))
    statistics = read_summary(run.input("shards"))["statistics"]
    resize = {"interpolation": interpolation, "antialias": antialias}
    colours = {name: tuple(statistics[name]) for name in ("mean", "std")}
    return Policy.model_validate(preset("natural", image_size) | CROP_AND_FLIP | resize | colours)


def _freeze(run: Run, settings: Finetune, encoder: Encoder, objective: Objective) -> None:
    """Training mode for what is to be trained."""
    try:
        frozen = [] if settings.freeze == "none" else freeze(encoder, settings.freeze)
    except UnknownPart as error:
        raise UsageError(f"{run.step}.freeze: {error}") from error
    train_around(encoder, frozen)
    if not any(parameter.requires_grad for module in (encoder, objective) for parameter in module.parameters()):
        raise UsageError(
            f"{run.step}.freeze: {settings.freeze} leaves nothing to train: {settings.loss_name} has no head"
        )


def _labels_seen(run: Run, settings: Finetune, shards: Shards, targets: Targets, chosen: np.ndarray) -> LabelsCard:
    return LabelsCard(
        loss=settings.loss_name,
        fraction=settings.label_fraction,
        subset=settings.label_subset if settings.label_fraction < 1 else 0,
        seed=run.seed,
        samples=len(chosen),
        digest=labels_digest((shards.keys[row] for row in chosen), targets.names(chosen)),
    )


def _with_pseudo_labels(
    run: Run, learned: Learned, given: PseudoLabels, own: LabelsCard
) -> tuple[tuple[LabelsCard, ...], str]:
    """What is seen with pseudo-labels: entries for the labels behind them, then the training's own; and in words."""
    words = f"{own.samples:,} labelled images and {len(given):,} pseudo-labelled ones"
    if not len(given):
        run.warn("pseudo_labels: there are none; labels alone are learned")
        return (own,), words
    if given.test_images:
        words += f" ({given.test_images:,} of them test images: transductive)"
    rows = learned.positions[learned.pseudo]
    digest = labels_digest((learned.shards.keys[row] for row in rows), learned.targets.names(rows))
    pseudo = PseudoLabelsCard(train=len(given) - given.test_images, test=given.test_images, digest=digest)
    behind = [LabelsCard.model_validate(one) for one in given.labels_seen]
    return (*(one for one in behind if one.pseudo or one.digest != own.digest),
            own.model_copy(update={"pseudo": pseudo})), words  # fmt: skip


def _card(start: Start, trained: Encoder, seen: tuple[LabelsCard, ...], objective: Objective) -> ModelCard:
    head, head_card = objective.head, None
    if head is not None:
        names = objective.names if head.classes else None
        head_card = HeadCard(
            kind=head.kind,
            classes=head.classes,
            centres=head.centres,
            scale=head.scale,
            names=names,
            learned_from=seen[-1],
        )
    # Labels that trained a head alone left no trace in the encoder.
    is_trained = trained is not start.encoder or any(one.requires_grad for one in start.encoder.parameters())
    labels_seen = (*start.labels_seen, *seen) if is_trained else start.labels_seen
    return make_card("finetune", trained, start.architecture, start.policy, labels_seen, head=head_card)
