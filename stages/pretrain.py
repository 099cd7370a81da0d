"""SimCLR: make two views of every image of a batch, and learn to tell which two belong together."""

from bisect import bisect_right
from collections.abc import Callable
from contextlib import closing
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import BadData, UsageError
from pipeline.run import Run
from pipeline.training import Training
from stages.evaluation.representation import alignment, rankme, uniformity
from stages.images import Shards, open_shards
from stages.images.loader import BatchLoader, least_side_for
from stages.images.order import order
from stages.images.schedule import OnePerGroup, Shuffled
from stages.losses import contrastive_accuracy, nt_xent
from stages.losses.gather import gather_rows, mean_over_processes
from stages.models import (
    ArchitectureCard,
    Encoder,
    ModelCard,
    Optimisation,
    ProjectorCard,
    architecture_at,
    build_encoder,
    build_projector,
    choose_memory_format,
    convert_batch_norm,
    count_parameters,
    load_card,
    load_encoder,
    make_card,
    match_channels,
    save_model,
)
from stages.models.encoders import require_backbone
from stages.settings.pretrain import Pretrain
from stages.views import Policy, Views, evaluation_view, load, read_policy, to_device

PROBE_LEARNING_RATE = 1e-3  # AdamW's usual one; the online probe is a gauge, not a result
RANKME_SAMPLES_PER_DIMENSION = 10  # below that the estimate depends on their number (Garrido et al. 2023, section 4)
UNIFORMITY_ROWS = 512


def check_settings(settings: Pretrain) -> None:
    """What can be said before anything runs. Raises UnusableBackbone."""
    if settings.encoder is None:
        require_backbone(settings.architecture.backbone)


def pretrain(run: Run, settings: Pretrain) -> None:
    """Write encoder.safetensors, projector.safetensors, model.json and metrics.jsonl."""
    shards, batch_size = _training_images(run, settings)
    encoder, architecture, policy = _encoder(run, settings)
    projector = build_projector(encoder.embedding_size, **settings.projector.model_dump())
    memory_format = choose_memory_format(encoder, settings.channels_last)
    for module in (encoder, projector):
        convert_batch_norm(module)
        module.to(run.device).to(memory_format=memory_format)
    network = run.distribute(Network(encoder, projector))
    if settings.one_per_group:
        schedule = OnePerGroup(run.seed, shards.groups.numpy(), batch_size)
    else:
        schedule = Shuffled(run.seed, len(shards), batch_size)
    # Large images of which small views are made need not be decoded whole.
    least_side = least_side_for(policy.image_size, policy.crop_area, policy.crop_ratio)
    batches = BatchLoader(shards, schedule, settings.workers, run.rank, run.ranks, least_side=least_side)
    run.say(batches.description)
    epochs = settings.epochs_for(batches.steps_per_epoch)
    if settings.epochs is None:
        run.say(f"epochs are fitted: {epochs:,} of {batches.steps_per_epoch:,} steps")
    steps = min(epochs * batches.steps_per_epoch, settings.max_steps or 2**62)
    views_at = _views_by_step(run, settings, encoder, policy, steps)
    optimisation = Optimisation(
        settings.optimiser,
        [([encoder, projector], 1.0)],
        batch_size=batch_size,
        steps=steps,
        steps_per_epoch=batches.steps_per_epoch,
        gradient_clip=settings.gradient_clip,
    )
    state = {"encoder": encoder, "projector": projector, "optimiser": optimisation.optimiser}
    probe = None
    if settings.online_probe and shards.classes:
        probe = OnlineProbe(run, encoder.embedding_size, len(shards.classes))
        state |= {"probe": probe.linear, "probe_optimiser": probe.optimiser}
    run.say(
        f"{architecture.backbone} of width {architecture.width}, {count_parameters(encoder):,} parameters; "
        f"{len(shards):,} images, {steps:,} steps of {batch_size} ({epochs:,} epochs), learning rate "
        f"{optimisation.rate:.4g} on {run.device}"
    )
    with (
        closing(batches),
        Training(
            run, state, steps=steps, steps_per_epoch=batches.steps_per_epoch, images_per_step=batch_size
        ) as training,
    ):
        for step, batch in training.steps(batches.load):
            epoch = step // batches.steps_per_epoch
            with training.part("views"):
                pair = views_at(step)(batch.images, batch.sample_ids, epoch, batch.sizes)  # [2, B, 3, h, w]
                pair = pair.flatten(0, 1).contiguous(memory_format=memory_format)
            with training.part("encoder forward"), run.autocast(settings.precision):
                embeddings, projections = network(pair)  # [2B, D] and [2B, d]
            view_a, view_b = projections.chunk(2)
            with training.part("loss"):
                loss = nt_xent(view_a, view_b, settings.temperature)
            optimisation.optimiser.zero_grad()
            with training.part("backward"):
                training.backward(loss)
            with training.part("optimiser"):
                norm = optimisation.clip_gradient()
                if not training.accepts(loss, norm, sample_ids=batch.sample_ids, images=pair):
                    continue
                rate = optimisation.step(step)
            training.record(loss=loss, learning_rate=rate, gradient_norm=norm)
            if probe is not None:
                with training.part("online probe"):
                    labels = to_device(batch.labels, run.device).repeat(2)
                    training.record(probe_accuracy=probe.step(embeddings.detach(), labels))
            if training.line_is_due:
                with training.part("measurements"):
                    training.record(**_geometry(view_a.detach(), view_b.detach()))
            if (step + 1) % (batches.steps_per_epoch * settings.health_every_epochs) == 0 or step + 1 == steps:
                with training.part("measurements"):
                    health = _rankme(run, encoder, projector, shards, policy, settings, batch_size)
                if health:
                    training.write_line(**health)

    save_model(run.out, _card(run, settings, encoder, architecture, policy), encoder, projector)
    run.count(samples=len(shards), steps=steps, **training.latest)


def _training_images(run: Run, settings: Pretrain) -> tuple[Shards, int]:
    """The images, and how many of them make a batch."""
    shards = open_shards(run.input("shards"), "train")
    if len(shards) < 2:
        raise BadData(f"{run.step}: there is one training image, and SimCLR tells images apart: it takes two at least")
    count, what = len(shards), "training images"
    if settings.one_per_group:
        count, what = len(shards.groups.unique()), "groups of training images"
        if count < 2:
            raise UsageError(f"{run.step}.one_per_group: all training images are of one group; leave the setting out")
    elif shards.has_groups:
        run.say("images of a group may be negatives of one another; `one_per_group: true` keeps them apart")
    batch_size = settings.batch_size_for(count, read_policy(run.input("views")).image_size)
    if settings.batch_size is None:
        run.say(f"batch_size is fitted: {batch_size} of the {count:,} {what}")
    run.check_divides("batch_size", batch_size)
    if count < batch_size:
        raise UsageError(
            f"{run.step}.batch_size: {batch_size} is more than the {count} {what}; set it to {count} or less"
        )
    needed = RANKME_SAMPLES_PER_DIMENSION * settings.projector.dimension
    if needed > len(shards):
        run.say(f"RankMe is left out: it needs {needed:,} images, ten for each dimension of the projector")
    return shards, batch_size


def _encoder(run: Run, settings: Pretrain) -> tuple[Encoder, ArchitectureCard, Policy]:
    """The encoder to train, its architecture, and the view policy with the mean and std that fit its weights."""
    policy = read_policy(run.input("views"))
    torch.manual_seed(run.seed)  # the encoder is the first to draw: `random` in the stage embed has the same weights
    if run.is_artifact("encoder"):
        encoder, card = load_encoder(run.input("encoder"))
        is_inflated = match_channels(encoder, card.channels, len(policy.mean))
        encoder.train()
        architecture = architecture_at(card, policy.image_size)
        if is_inflated:
            run.say(f"the encoder's first layer, made for RGB images, is inflated to {len(policy.mean)} channels")
            return encoder, architecture, policy
        return encoder, architecture, policy.model_copy(update={"mean": card.mean, "std": card.std})
    encoder = build_encoder(
        **settings.architecture.model_dump(), image_size=policy.image_size, channels=len(policy.mean)
    )
    if encoder.weights.mean is not None:
        run.say(f"starts from {encoder.weights.source}, licence: {encoder.weights.licence or 'not stated'}")
        policy = policy.model_copy(update={"mean": encoder.weights.mean, "std": encoder.weights.std})
    return encoder, ArchitectureCard(**settings.architecture.model_dump()), policy


def _views_by_step(
    run: Run, settings: Pretrain, encoder: Encoder, policy: Policy, steps: int
) -> Callable[[int], Views]:
    """Which views a step has: smaller ones first where the settings say so, then those of the policy.

    Raises:
        UsageError: the encoder does not take images of such a size.
    """
    parts = [load(policy.model_copy(update={"image_size": part.image_size}), run.seed, run.device)
             for part in settings.smaller_views]  # fmt: skip
    for part in parts:
        _require_size(run, encoder, part.policy)
    shares = accumulate(part.share for part in settings.smaller_views)
    ends = [round(share * steps) for share in shares]
    if parts:
        sizes = [f"{part.policy.image_size} px to step {end:,}" for part, end in zip(parts, ends, strict=True)]
        if ends[-1] < steps:
            sizes.append(f"{policy.image_size} px to step {steps:,}")
        run.say(f"views grow: {', '.join(sizes)}")
    parts.append(load(policy, run.seed, run.device))
    return lambda step: parts[bisect_right(ends, step)]


@torch.no_grad()
def _require_size(run: Run, encoder: Encoder, policy: Policy) -> None:
    """Refuse views of a size that the encoder does not take: some are made for one only."""
    size = policy.image_size
    encoder.eval()
    try:
        encoder(torch.zeros(1, policy.channels, size, size, device=run.device))
    except Exception as error:  # each architecture has its own way to say so
        reason = str(error).split("\n")[0]
        raise UsageError(
            f"{run.step}.smaller_views: the encoder takes no images of {size} pixels ({reason})"
        ) from error
    finally:
        encoder.train()


def _card(run: Run, settings: Pretrain, encoder: Encoder, architecture: ArchitectureCard, policy: Policy) -> ModelCard:
    labels_seen = load_card(run.input("encoder")).labels_seen if run.is_artifact("encoder") else ()
    projector = ProjectorCard(**settings.projector.model_dump())
    return make_card("pretrain", encoder, architecture, policy, labels_seen, projector)


def _geometry(view_a: Tensor, view_b: Tensor) -> dict[str, Tensor | float]:
    """How far the task is solved, and how the projections lie on the sphere (Wang and Isola 2020), of all ranks."""
    all_a, all_b = gather_rows(view_a), gather_rows(view_b)
    return {
        "contrastive_accuracy": contrastive_accuracy(view_a, view_b),
        "alignment": alignment(all_a, all_b),
        "uniformity": uniformity(all_a, UNIFORMITY_ROWS),
    }


@torch.no_grad()
def _rankme(
    run: Run,
    encoder: Encoder,
    projector: nn.Module,
    shards: Shards,
    policy: Policy,
    settings: Pretrain,
    batch_size: int,
) -> dict[str, float]:
    """RankMe of the projections of a fixed sample of images, as a share of the dimension (Garrido et al. 2023).

    Each rank projects its part of the sample. In evaluation mode nothing is exchanged but the projections.
    """
    samples = RANKME_SAMPLES_PER_DIMENSION * settings.projector.dimension
    if samples > len(shards):
        return {}
    encoder.eval()
    projector.eval()
    device = next(encoder.parameters()).device
    projections = []
    for first in range(0, samples, batch_size):
        positions = order(0, 0, len(shards))[first : min(first + batch_size, samples)]
        positions = np.array_split(positions, run.ranks)[run.rank]
        if not len(positions):
            continue
        batch = shards.batch(positions, settings.workers)
        images = evaluation_view(
            batch.images.to(device), batch.sizes, policy.image_size, policy.mean, policy.std,
            policy.interpolation, policy.antialias,
        )  # fmt: skip
        projections.append(projector(encoder(images)))
    encoder.train()
    projector.train()
    if not projections:  # this rank had no part in it
        projections = [torch.empty(0, settings.projector.dimension, device=device)]
    effective_rank = rankme(run.gather(torch.cat(projections)))
    return {
        "rankme": effective_rank,
        "rankme_share": effective_rank / settings.projector.dimension,
        "rankme_samples": samples,
    }


class Network(nn.Module):
    """Encoder and projector as one module, which is what several processes share."""

    def __init__(self, encoder: Encoder, projector: nn.Module):
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, h, w] -> embeddings [N, D] and their projections [N, d]"""
        embeddings = self.encoder(images)
        return embeddings, self.projector(embeddings)


class OnlineProbe:
    """A linear classifier beside the training, behind a stopped gradient: it shows progress and changes nothing.

    Its weights are drawn from a generator of its own, so that the encoder's bytes are the same with and without it.
    """

    def __init__(self, run: Run, embedding_size: int, classes: int):
        with torch.random.fork_rng():
            torch.manual_seed(run.seed)
            self.linear = nn.Linear(embedding_size, classes).to(run.device)
        self._distributed = run.distribute(self.linear)
        self.optimiser = torch.optim.AdamW(self.linear.parameters(), lr=PROBE_LEARNING_RATE)

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """One step on [N, D] and [N] of each rank; returns the accuracy of all before it. Labels of -1 do not count."""
        # The mean over the ranks, as of the gradients; where there is no label at all, the sums are 0 as well.
        labelled = mean_over_processes((labels >= 0).sum().float()).clamp(min=1e-6)
        with torch.enable_grad():
            scores = self._distributed(embeddings.to(self.linear.weight.dtype))
            loss = F.cross_entropy(scores, labels, ignore_index=-1, reduction="sum") / labelled
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return mean_over_processes((scores.argmax(1) == labels).sum().float()) / labelled
