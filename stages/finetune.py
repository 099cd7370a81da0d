"""Supervised training of an encoder: all of it, its head alone, or what lies above a named part."""

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import timm
import torch
from torch import Tensor

from pipeline.errors import BadData, UsageError
from pipeline.run import Run
from stages.evaluation import label_subset, labels_digest
from stages.images import Shards, open_shards, read_summary
from stages.images.loader import BatchLoader
from stages.images.schedule import Among, ClassBalanced, Schedule, Shuffled
from stages.losses import Loss, Task, build_loss
from stages.models import (
    ArchitectureCard,
    Encoder,
    HeadCard,
    LabelsCard,
    ModelCard,
    architecture_at,
    build_encoder,
    build_optimiser,
    choose_memory_format,
    convert_batch_norm,
    count_parameters,
    keep_projector_layers,
    learning_rate_at,
    load_encoder,
    make_card,
    match_channels,
    save_model,
    scaled_learning_rate,
    take_step,
)
from stages.models.encoders import PUBLISHED_WIDTH, TIMM_PREFIX, require_backbone
from stages.models.freezing import UnknownPart, freeze, train_around
from stages.models.heads import Head
from stages.settings.finetune import Finetune
from stages.views import Interpolation, Policy, load, preset, read_policy, to_device

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
class Plan:
    """Which images come when.

    Attributes:
        batch_size: of the global batch.
        repeats: an image comes at most so often in a batch, and then within so many rows that follow one another.
    """

    schedule: Schedule
    batch_size: int
    repeats: int


def check_settings(settings: Finetune) -> None:
    """What can be said before anything runs. Raises UnusableBackbone."""
    if settings.encoder == "random":
        require_backbone(settings.architecture.backbone)
    elif settings.encoder.startswith(TIMM_PREFIX):
        require_backbone(settings.encoder)


def finetune(run: Run, settings: Finetune) -> None:
    """Write encoder.safetensors, model.json, metrics.jsonl and, where there are any, the head and the neck."""
    shards = open_shards(run.input("shards"), "train")
    chosen = _labelled_images(run, settings, shards)
    labels = shards.labels[chosen].numpy()
    plan = _plan(run, settings, chosen, labels)
    start = _start(run, settings, shards)
    encoder, memory_format = start.encoder, choose_memory_format(start.encoder, settings.channels_last)
    loss_of = _loss(settings, encoder, np.bincount(labels, minlength=len(shards.classes)))
    convert_batch_norm(encoder)
    _freeze(run, settings, encoder, loss_of)
    encoder.to(run.device).to(memory_format=memory_format)
    loss_of.to(run.device)
    views = load(start.policy, run.seed, run.device, views=1)
    batches = BatchLoader(shards, plan.schedule, settings.workers, run.rank, run.ranks)
    run.say(batches.description)
    steps = min(settings.epochs * batches.steps_per_epoch, settings.max_steps or 2**62)
    rate = scaled_learning_rate(settings.optimiser.learning_rate, settings.optimiser.scaling, plan.batch_size)
    warmup_steps = min(round(settings.optimiser.warmup_epochs * batches.steps_per_epoch), steps // 10)
    optimiser = build_optimiser(
        settings.optimiser.name,
        [encoder],
        rate,
        settings.optimiser.momentum,
        settings.optimiser.weight_decay,
        head=loss_of,
        head_multiple=settings.head_learning_rate,
    )
    state = {"encoder": encoder, "loss": loss_of, "optimiser": optimiser}
    run.say(
        f"{settings.loss.name} on {len(chosen):,} labelled images of {len(np.unique(labels)):,} classes; "
        f"{start.architecture.backbone}, {count_parameters(encoder):,} parameters, {steps:,} steps of "
        f"{plan.batch_size}, learning rate {rate:.4g} on {run.device}"
    )
    embed, measure = run.distribute(encoder), run.distribute(loss_of)
    with (
        closing(batches),
        run.training(
            state, steps=steps, steps_per_epoch=batches.steps_per_epoch, images_per_step=plan.batch_size
        ) as training,
    ):
        for step, batch in training.steps(batches.load):
            visits = _visits(plan, step, run.rank, len(batch.labels))
            with training.part("views"):
                images = views(batch.images, batch.sample_ids, visits, batch.sizes)[0]  # [B, C, h, w]
                images = images.contiguous(memory_format=memory_format)
            with training.part("encoder forward"), run.autocast(settings.precision):
                embeddings = embed(images)  # [B, D]
            with training.part("loss"):
                loss, figures = measure(embeddings, to_device(batch.labels, run.device), step / steps)
            optimiser.zero_grad()
            with training.part("backward"):
                loss.backward()
            learning_rate = learning_rate_at(step, steps, rate, warmup_steps)
            with training.part("optimiser"):
                gradient_norm = take_step(optimiser, learning_rate, settings.gradient_clip)
            training.record(loss=loss, learning_rate=learning_rate, gradient_norm=gradient_norm, **figures)

    head = loss_of.trained_head
    save_model(run.out, _card(run, settings, start, shards, chosen, head), encoder, None, head)
    run.count(samples=len(chosen), steps=steps, **training.latest)


def _labelled_images(run: Run, settings: Finetune, shards: Shards) -> np.ndarray:
    """Positions of the labelled training images that are used, ascending: int64 [n]."""
    if any(len(labels) > 1 for labels in shards.label_lists):
        raise BadData(f"{run.step}: images with several labels; {settings.loss.name} learns from one label an image")
    labelled = np.flatnonzero(shards.labels.numpy() >= 0)
    if not len(labelled):
        raise BadData(f"{run.step}: no training image has a label; fine-tuning needs them (a folder for each class)")
    if len(labelled) < len(shards):
        run.warn(f"{len(shards) - len(labelled):,} of {len(shards):,} training images have no label and are left out")
    labels = shards.labels.numpy()[labelled]
    if len(np.unique(labels)) < 2:
        only = shards.classes[labels[0]]
        raise BadData(f"{run.step}: all {len(labels):,} labelled training images are {only!r}; two classes are needed")
    ids = shards.sample_ids.numpy()[labelled]
    return labelled[label_subset(labels, ids, settings.label_fraction, run.seed, settings.label_subset)]


def _plan(run: Run, settings: Finetune, chosen: np.ndarray, labels: np.ndarray) -> Plan:
    """Plain batches, or batches of P classes with K images each where the loss compares images."""
    if settings.loss.batches == "plain":
        batch_size = min(settings.batch_size, len(chosen))
        if batch_size < settings.batch_size:
            run.say(f"batches of {batch_size}: there are no more than {len(chosen)} labelled images")
        run.check_divides("batch_size", batch_size, largest=len(chosen))
        return Plan(Among(chosen, Shuffled(run.seed, len(chosen), batch_size)), batch_size, 1)
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    wanted, images = min(settings.classes_per_batch, len(counts)), settings.images_per_class
    if wanted < settings.classes_per_batch:
        run.say(f"batches of {wanted} classes with {images} images each: there are no more than {len(counts)} classes")
    few, single = int((counts < images).sum()), int((counts == 1).sum())
    if few:
        alone = f"; {single} have a single image, whose only positives are other views of it" if single else ""
        run.say(
            f"{few} of {len(counts)} classes have fewer than images_per_class = {images} images: a batch repeats "
            f"theirs, in other views{alone}"
        )
    run.check_divides("classes_per_batch x images_per_class", wanted * images)
    schedule = ClassBalanced(run.seed, labels, wanted, images)
    return Plan(Among(chosen, schedule), wanted * images, images)


def _visits(plan: Plan, step: int, rank: int, rows: int) -> Tensor:
    """For each of this process's rows a number that no other visit of the same image has, int64 [rows].

    It keys the draws of the view: where a batch repeats an image, and where an epoch does, the view is another.
    """
    return step * plan.repeats + (rank * rows + torch.arange(rows)) % plan.repeats


def _start(run: Run, settings: Finetune, shards: Shards) -> Start:
    """The encoder to start from, and the policy of the one view."""
    torch.manual_seed(run.seed)  # the encoder is the first to draw: `random` in the stage embed has the same weights
    if run.is_artifact("encoder"):
        return _trained(run, settings, shards)
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


def _loss(settings: Finetune, encoder: Encoder, class_counts: np.ndarray) -> Loss:
    options = settings.loss.model_dump(exclude={"name"})
    return build_loss(settings.loss.name, options, Task(encoder.embedding_size, tuple(class_counts.tolist())))


def _freeze(run: Run, settings: Finetune, encoder: Encoder, loss_of: Loss) -> None:
    """Training mode for what is to be trained."""
    try:
        frozen = [] if settings.freeze == "none" else freeze(encoder, settings.freeze)
    except UnknownPart as error:
        raise UsageError(f"{run.step}.freeze: {error}") from error
    train_around(encoder, frozen)
    if not any(parameter.requires_grad for module in (encoder, loss_of) for parameter in module.parameters()):
        raise UsageError(
            f"{run.step}.freeze: {settings.freeze} leaves nothing to train: {settings.loss.name} has no head"
        )


def _card(
    run: Run, settings: Finetune, start: Start, shards: Shards, chosen: np.ndarray, head: Head | None
) -> ModelCard:
    seen = LabelsCard(
        loss=settings.loss.name,
        fraction=settings.label_fraction,
        subset=settings.label_subset if settings.label_fraction < 1 else 0,
        seed=run.seed,
        samples=len(chosen),
        digest=labels_digest(
            (shards.keys[row] for row in chosen), (shards.classes[shards.labels[row]] for row in chosen)
        ),
    )
    head_card = None if head is None else HeadCard(kind=head.kind, classes=head.classes, learned_from=seen)
    # Labels that trained a head alone left no trace in the encoder.
    trained = any(parameter.requires_grad for parameter in start.encoder.parameters())
    labels_seen = (*start.labels_seen, seen) if trained else start.labels_seen
    return make_card("finetune", start.encoder, start.architecture, start.policy, labels_seen, head=head_card)
