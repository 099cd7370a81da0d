"""SimCLR: make two views of every image of a batch, and learn to tell which two belong together."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import UsageError
from pipeline.run import Run
from stages.evaluation.representation import alignment, rankme, uniformity
from stages.images import Shards, open_shards
from stages.images.loader import BatchLoader
from stages.images.order import order
from stages.images.schedule import Shuffled
from stages.losses import contrastive_accuracy, nt_xent
from stages.models import (
    ArchitectureCard,
    Encoder,
    ModelCard,
    ProjectorCard,
    WeightsCard,
    build_encoder,
    build_optimiser,
    build_projector,
    convert_batch_norm,
    count_parameters,
    learning_rate_at,
    load_encoder,
    save_model,
    scaled_learning_rate,
)
from stages.settings.pretrain import Pretrain
from stages.views import Policy, evaluation_view, load, read_policy

PROBE_LEARNING_RATE = 1e-3  # AdamW's usual one; the online probe is a gauge, not a result
RANKME_SAMPLES_PER_DIMENSION = 10  # below that the estimate depends on their number (Garrido et al. 2023, section 4)
UNIFORMITY_ROWS = 512


def pretrain(run: Run, settings: Pretrain) -> None:
    """Write encoder.safetensors, projector.safetensors, model.json and metrics.jsonl."""
    shards = _training_images(run, settings)
    encoder, architecture, policy = _encoder(run, settings)
    projector = build_projector(encoder.embedding_size, **settings.projector.model_dump())
    memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
    for module in (encoder, projector):
        convert_batch_norm(module)
        module.to(run.device).to(memory_format=memory_format)
    views = load(policy, run.seed, run.device)
    batches = BatchLoader(shards, Shuffled(run.seed, len(shards), settings.batch_size), settings.workers)
    steps = min(settings.epochs * batches.steps_per_epoch, settings.max_steps or 2**62)
    rate = scaled_learning_rate(settings.optimiser.learning_rate, settings.optimiser.scaling, settings.batch_size)
    warmup_steps = min(round(settings.optimiser.warmup_epochs * batches.steps_per_epoch), steps // 10)
    optimiser = build_optimiser(
        settings.optimiser.name,
        [encoder, projector],
        rate,
        settings.optimiser.momentum,
        settings.optimiser.weight_decay,
    )
    state = {"encoder": encoder, "projector": projector, "optimiser": optimiser}
    probe = None
    if settings.online_probe and shards.classes:
        probe = OnlineProbe(run, encoder.embedding_size, len(shards.classes))
        state |= {"probe": probe.linear, "probe_optimiser": probe.optimiser}
    run.say(
        f"{architecture.backbone} of width {architecture.width}, {count_parameters(encoder):,} parameters; "
        f"{len(shards):,} images, {steps:,} steps of {settings.batch_size}, learning rate {rate:.4g} on {run.device}"
    )
    with run.training(
        state, steps=steps, steps_per_epoch=batches.steps_per_epoch, images_per_step=settings.batch_size
    ) as training:
        for step, batch in training.steps(batches.load):
            epoch = step // batches.steps_per_epoch
            pair = views(batch.images, batch.sample_ids, epoch, batch.sizes)  # [2, B, 3, h, w]
            with run.autocast(settings.precision):
                embeddings = encoder(pair.flatten(0, 1).contiguous(memory_format=memory_format))  # [2B, D]
                view_a, view_b = projector(embeddings).chunk(2)
            loss = nt_xent(view_a, view_b, settings.temperature)
            optimiser.zero_grad()
            loss.backward()
            gradient_norm = _clip(optimiser, settings.gradient_clip)
            learning_rate = learning_rate_at(step, steps, rate, warmup_steps)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate
            optimiser.step()

            training.record(loss=loss, learning_rate=learning_rate, gradient_norm=gradient_norm)
            if probe is not None:
                training.record(probe_accuracy=probe.step(embeddings.detach(), batch.labels.to(run.device).repeat(2)))
            if training.line_is_due:
                training.record(**_geometry(view_a.detach(), view_b.detach()))
            if (step + 1) % (batches.steps_per_epoch * settings.health_every_epochs) == 0 or step + 1 == steps:
                health = _rankme(encoder, projector, shards, policy, settings)
                if health:
                    training.write_line(**health)
    batches.close()

    save_model(run.out, _card(settings, encoder, architecture, policy), encoder, projector)
    run.count(samples=len(shards), steps=steps, **training.latest)


def _training_images(run: Run, settings: Pretrain) -> Shards:
    shards = open_shards(run.input("shards"), "train")
    if len(shards) < settings.batch_size:
        raise UsageError(
            f"{run.step}.batch_size: {settings.batch_size} is more than the {len(shards)} training images; "
            f"set it to {len(shards)} or less"
        )
    needed = RANKME_SAMPLES_PER_DIMENSION * settings.projector.dimension
    if needed > len(shards):
        run.say(f"RankMe is left out: it needs {needed:,} images, ten for each dimension of the projector")
    return shards


def _encoder(run: Run, settings: Pretrain) -> tuple[Encoder, ArchitectureCard, Policy]:
    """The encoder to train, its architecture, and the view policy with the mean and std that fit its weights."""
    policy = read_policy(run.input("views"))
    torch.manual_seed(run.seed)  # the encoder is the first to draw: `random` in the stage embed has the same weights
    if run.is_artifact("encoder"):
        encoder, card = load_encoder(run.input("encoder"))
        encoder.train()
        architecture = card.architecture
        return encoder, architecture, policy.model_copy(update={"mean": card.mean, "std": card.std})
    encoder = build_encoder(**settings.architecture.model_dump(), image_size=policy.image_size)
    if encoder.weights.mean is not None:
        run.say(f"starts from {encoder.weights.source}, licence: {encoder.weights.licence or 'not stated'}")
        policy = policy.model_copy(update={"mean": encoder.weights.mean, "std": encoder.weights.std})
    return encoder, ArchitectureCard(**settings.architecture.model_dump()), policy


def _card(settings: Pretrain, encoder: Encoder, architecture: ArchitectureCard, policy: Policy) -> ModelCard:
    return ModelCard(
        kind="pretrain",
        architecture=architecture,
        embedding_size=encoder.embedding_size,
        image_size=policy.image_size,
        mean=policy.mean,
        std=policy.std,
        interpolation=policy.interpolation,
        antialias=policy.antialias,
        projector=ProjectorCard(**settings.projector.model_dump()),
        parameters=count_parameters(encoder),
        weights=WeightsCard(source=encoder.weights.source, licence=encoder.weights.licence),
    )


def _clip(optimiser: torch.optim.Optimizer, largest: float | None) -> Tensor:
    """The norm of the whole gradient, as it was before it was clipped."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    if largest is not None:
        return nn.utils.clip_grad_norm_(parameters, largest)
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def _geometry(view_a: Tensor, view_b: Tensor) -> dict[str, Tensor | float]:
    """How far the task is solved, and how the projections lie on the sphere (Wang and Isola 2020)."""
    return {
        "contrastive_accuracy": contrastive_accuracy(view_a, view_b),
        "alignment": alignment(view_a, view_b),
        "uniformity": uniformity(view_a, UNIFORMITY_ROWS),
    }


@torch.no_grad()
def _rankme(
    encoder: Encoder, projector: nn.Module, shards: Shards, policy: Policy, settings: Pretrain
) -> dict[str, float]:
    """RankMe of the projections of a fixed sample of images, as a share of the dimension (Garrido et al. 2023)."""
    samples = RANKME_SAMPLES_PER_DIMENSION * settings.projector.dimension
    if samples > len(shards):
        return {}
    encoder.eval()
    projector.eval()
    device = next(encoder.parameters()).device
    projections = []
    for first in range(0, samples, settings.batch_size):
        positions = order(0, 0, len(shards))[first : min(first + settings.batch_size, samples)]
        batch = shards.batch(positions, settings.workers)
        images = evaluation_view(
            batch.images.to(device), batch.sizes, policy.image_size, policy.mean, policy.std,
            policy.interpolation, policy.antialias,
        )  # fmt: skip
        projections.append(projector(encoder(images)))
    encoder.train()
    projector.train()
    effective_rank = rankme(torch.cat(projections))
    return {
        "rankme": effective_rank,
        "rankme_share": effective_rank / settings.projector.dimension,
        "rankme_samples": samples,
    }


class OnlineProbe:
    """A linear classifier beside the training, behind a stopped gradient: it shows progress and changes nothing.

    Its weights are drawn from a generator of its own, so that the encoder's bytes are the same with and without it.
    """

    def __init__(self, run: Run, embedding_size: int, classes: int):
        with torch.random.fork_rng():
            torch.manual_seed(run.seed)
            self.linear = nn.Linear(embedding_size, classes).to(run.device)
        self.optimiser = torch.optim.AdamW(self.linear.parameters(), lr=PROBE_LEARNING_RATE)

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """One step on [N, D] and [N]; returns the accuracy before it. Labels of -1 do not count."""
        with torch.enable_grad():
            scores = self.linear(embeddings.float())
            loss = F.cross_entropy(scores, labels, ignore_index=-1, reduction="sum") / (labels >= 0).sum().clamp(min=1)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return (scores.argmax(1) == labels).sum() / (labels >= 0).sum().clamp(min=1)
