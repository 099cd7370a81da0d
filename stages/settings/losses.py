"""The supervised losses as a recipe says them: `loss: {name: arcface, margin: 0.4}`. One class each."""

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from pipeline.settings import Settings, one_or_several, setting

Sampler = Literal["shuffled", "balanced", "p_by_k", "hierarchical", "pairs"]


def _margin(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """One fault instead of one for each type that it could have been."""
    try:
        return check(value)
    except ValidationError:
        raise ValueError("is a number above 0, or soft") from None


class LossSettings(Settings):
    """Base of the settings of a loss; each has its `name`, and a docstring of one line with its paper.

    Attributes:
        sampler: what it takes its batches from, where the recipe names none.
        samplers: all that it can take them from.
        views: of each image.
        has_head: whether it trains something that tells classes or pairs apart on top of the encoder.
        classifies: whether it works behind a bottleneck (`neck: bn`).
        uses_negatives: whether images that are nobody's positive (`negative_only`) change it.
        several_labels: whether it learns from images with several labels.
        learns_from, paper, choose_when: for the table of docs/metric-learning.md.
    """

    sampler: ClassVar[Sampler] = "shuffled"
    samplers: ClassVar[tuple[Sampler, ...]] = ("shuffled", "balanced", "p_by_k", "hierarchical")
    views: ClassVar[Literal[1, 2]] = 1
    has_head: ClassVar[bool] = True
    classifies: ClassVar[bool] = True
    uses_negatives: ClassVar[bool] = False
    several_labels: ClassVar[bool] = False
    learns_from: ClassVar[str] = "classes"
    paper: ClassVar[str]
    choose_when: ClassVar[str]

    weight: float = setting(1.0, "what the loss counts, in a list of several", gt=0)

    @property
    def title(self) -> str:
        """The name in a recipe."""
        return getattr(self, "name")  # noqa: B009 - each of the classes below has it, as a type of its own

    @property
    def options(self) -> dict[str, Any]:
        """What the loss itself is told."""
        return self.model_dump(exclude={"name", "weight"})


class _Comparing(LossSettings):
    """A loss that compares the images of a batch."""

    sampler = "p_by_k"
    samplers = ("p_by_k", "hierarchical")
    has_head = False
    classifies = False


class _Remembering(_Comparing):
    """One that can compare with batches before."""

    uses_negatives = True
    several_labels = True

    memory: int = setting(
        0, "embeddings of batches before that are compared with too (cross-batch memory: Wang et al. 2020)", ge=0
    )
    memory_start: float = setting(0.1, "share of the steps before the memory counts", ge=0, le=1)


class _Pairs(LossSettings):
    """A loss of given pairs."""

    uses_negatives = True
    sampler = "pairs"
    samplers = ("pairs",)
    classifies = False
    learns_from = "pairs"


class _ClassWeighted(LossSettings):
    class_weights: Literal["none", "effective_number"] = setting(
        "none", "effective_number: rare classes count more (Cui et al. 2019, beta 0.999)"
    )


class _MarginSoftmax(LossSettings):
    scale: float | None = setting(None, "factor of the cosines; if left out 16, above 1,000 classes 30", gt=0)


class CrossEntropy(_ClassWeighted):
    """Softmax cross-entropy of a linear classifier on the embedding."""

    paper = "Szegedy et al. 2016 (smoothing)"
    choose_when = "classes are few and have many images each; the baseline of all others"

    name: Literal["cross_entropy"]
    label_smoothing: float = setting(
        0.0, "share of the target spread over all classes (Szegedy et al. 2016)", ge=0, lt=1
    )


class BinaryCrossEntropy(_ClassWeighted):
    """Logistic loss of each class by itself: an image may be of none."""

    uses_negatives = True
    several_labels = True
    paper = "Cox 1958"
    choose_when = "an image may be of no class, beside a loss that compares"

    name: Literal["bce"]
    scale: float | None = setting(None, "length that embeddings are brought to; left out: they keep theirs", gt=0)


class Focal(_ClassWeighted):
    """Logistic loss of each class that hardly counts where the model is sure."""

    uses_negatives = True
    several_labels = True
    paper = "Lin et al. 2017"
    choose_when = "most decisions are easy, and the rare hard ones matter"

    name: Literal["focal"]
    gamma: float = setting(2.0, "how little easy classes count; 0: bce", ge=0)
    alpha: float | None = setting(None, "weight of what is true, 1 - alpha of what is not; left out: alike", gt=0, lt=1)


class PairsConcatenated(_Pairs):
    """Siamese encoder, both embeddings side by side into a binary classifier; f(a, b) is not f(b, a)."""

    paper = "Bromley et al. 1993; Koch et al. 2015"
    choose_when = "the two images of a pair play different parts"

    name: Literal["pairs_concatenated"]


class PairsDifference(_Pairs):
    """Siamese encoder, |a - b| into a binary classifier."""

    paper = "Koch et al. 2015"
    choose_when = "same or not is all that is known, and a score for a pair is wanted"

    name: Literal["pairs_difference"]


class PairsCosine(_Pairs):
    """Siamese encoder, the cosine of the two regressed on the target: 0, 1, or graded."""

    has_head = False
    paper = "Reimers and Gurevych 2019"
    choose_when = "pairs are known, and plain cosines are to be searched by"

    name: Literal["pairs_cosine"]


class Contrastive(_Remembering):
    """Positives are pulled together, negatives pushed beyond a margin."""

    learns_from = "pairs of a batch"
    paper = "Hadsell et al. 2006"
    choose_when = "a distance with a fixed meaning (a threshold) is wanted"

    name: Literal["contrastive"]
    margin: float = setting(0.8, "that negatives are to be apart, in distances of unit vectors", gt=0, le=2)
    squared: bool = setting(True, "false: the hinge, by distances and not their squares")
    mining: Literal["all", "hard", "easy_positive", "multi_similarity", "distance_weighted"] = setting(
        "all", "which pairs count"
    )


class Margin(_Remembering):
    """Contrastive with a boundary for each class that is learned along, and negatives drawn evenly over distances."""

    learns_from = "pairs of a batch"
    paper = "Wu et al. 2017"
    choose_when = "classes differ in how alike their images are"

    name: Literal["margin"]
    alpha: float = setting(0.2, "half of the width between positives and negatives", gt=0)
    beta: float = setting(1.2, "the boundary at the start, as a distance", gt=0)
    beta_weight: float = setting(0.0, "nu: price of large boundaries", ge=0)
    mining: Literal["all", "hard", "easy_positive", "multi_similarity", "distance_weighted"] = setting(
        "distance_weighted", "which pairs count"
    )


class Triplet(_Remembering):
    """A positive is to be nearer than a negative, by a margin; unit vectors, unsquared distance."""

    learns_from = "triplets of a batch"
    paper = "Schroff et al. 2015; Hermans et al. 2017"
    choose_when = "identities are very many; semi_hard where hard ones collapse"

    name: Literal["triplet"]
    margin: Annotated[Annotated[float, Field(gt=0)] | Literal["soft"], WrapValidator(_margin)] = setting(
        0.3, "by which a negative is to be farther away than a positive; soft: softplus"
    )
    mining: Literal["all", "hard", "semi_hard", "easy_positive", "multi_similarity", "distance_weighted"] = setting(
        "hard", "which triplets count"
    )


class ArcFace(_MarginSoftmax):
    """Softmax over cosines to class prototypes, a margin added to the angle to the own one."""

    learns_from = "classes, as directions"
    paper = "Deng et al. 2019; Deng et al. 2020 (sub-centres)"
    choose_when = "identities are many; the default of face recognition; centres: 3 where labels are noisy"

    name: Literal["arcface"]
    margin: float = setting(0.3, "radians that are added to the angle to the own class", ge=0, lt=1.57)
    margin_ramp: float = setting(0.5, "share of the steps over which the margin grows from 0", ge=0, le=1)
    centres: int = setting(1, "prototypes of each class; above 1 sub-centre ArcFace", ge=1)


class CosFace(_MarginSoftmax):
    """Softmax over cosines to class prototypes, a margin taken from the cosine to the own one."""

    learns_from = "classes, as directions"
    paper = "Wang et al. 2018"
    choose_when = "as ArcFace, with a margin that is easier to reason about"

    name: Literal["cosface"]
    margin: float = setting(0.2, "taken from the own cosine", ge=0, lt=2)
    margin_ramp: float = setting(0.5, "share of the steps over which the margin grows from 0", ge=0, le=1)


class SphereFace(_MarginSoftmax):
    """Softmax over cosines to class prototypes, the angle to the own one multiplied."""

    learns_from = "classes, as directions"
    paper = "Liu et al. 2017; Deng et al. 2019"
    choose_when = "to compare with ArcFace and CosFace"

    name: Literal["sphereface"]
    margin: float = setting(1.35, "factor of the angle to the own class", ge=1)
    margin_ramp: float = setting(0.5, "share of the steps over which the margin grows from 1", ge=0, le=1)


class OriginalSphereFace(LossSettings):
    """SphereFace as published: a whole margin, lengths of embeddings kept, annealed from the plain softmax."""

    learns_from = "classes, as directions"
    paper = "Liu et al. 2017"
    choose_when = "to reproduce the paper"

    name: Literal["sphereface_original"]
    margin: int = setting(4, "m: factor of the angle to the own class", ge=1)
    anneal_from: float = setting(1000.0, "lambda at the start: weight of the plain softmax", gt=0)
    anneal_to: float = setting(5.0, "lambda at the end", gt=0)
    annealing: float = setting(0.5, "share of the steps over which it falls", ge=0, le=1)


class NPairs(_Comparing):
    """One pair of each class; each anchor is to find its positive among those of all classes."""

    learns_from = "one pair a class"
    paper = "Sohn 2016"
    choose_when = "many classes of two images or more, and batches that hold many classes"

    name: Literal["n_pairs"]
    temperature: float = setting(0.2, "of the cosines", gt=0)


class SupCon(LossSettings):
    """Two views of each image; all images of the own class are positives."""

    uses_negatives = True
    several_labels = True
    views = 2
    has_head = False
    classifies = False
    learns_from = "classes, as sets of positives"
    paper = "Khosla et al. 2020"
    choose_when = "as SimCLR goes on when labels come; with a projection, for a linear classifier afterwards"

    name: Literal["supcon"]
    temperature: float = setting(0.1, "of the cosines", gt=0)


class MultiSimilarity(_Remembering):
    """All positives and negatives of an anchor, weighed by how hard they are."""

    learns_from = "pairs of a batch"
    paper = "Wang et al. 2019"
    choose_when = "a strong choice for retrieval in general"

    name: Literal["multi_similarity"]
    alpha: float = setting(2.0, "how much hard positives stand out", gt=0)
    beta: float = setting(40.0, "how much hard negatives stand out", gt=0)
    base: float = setting(0.5, "lambda: the similarity that parts both", ge=-1, le=1)
    mining: Literal["all", "hard", "easy_positive", "multi_similarity"] = setting(
        "multi_similarity", "which pairs count"
    )


class Circle(_Remembering):
    """Positives and negatives of an anchor, each pulled by how far it is from where it should be."""

    learns_from = "pairs of a batch"
    paper = "Sun et al. 2020"
    choose_when = "as multi_similarity, with one margin"

    name: Literal["circle"]
    margin: float = setting(0.4, "m: 0 to 1", gt=0, lt=1)
    scale: float = setting(80.0, "gamma", gt=0)


class ProxyAnchor(LossSettings):
    """Each class has a proxy, which is compared with all images of the batch."""

    classifies = False
    has_head = False
    learns_from = "classes, as proxies"
    paper = "Kim et al. 2020"
    choose_when = "quick convergence with moderately many classes"

    name: Literal["proxy_anchor"]
    margin: float = setting(0.1, "delta", ge=0)
    alpha: float = setting(32.0, "scale of the cosines", gt=0)


class SoftTriple(LossSettings):
    """Softmax over classes of several centres, softly chosen."""

    classifies = False
    has_head = False
    learns_from = "classes, as several proxies"
    paper = "Qian et al. 2019"
    choose_when = "classes fall into several kinds of images"

    name: Literal["soft_triple"]
    centres: int = setting(5, "of each class", ge=1)
    scale: float = setting(20.0, "lambda: of the similarities to classes", gt=0)
    gamma: float = setting(0.1, "temperature of the choice among centres", gt=0)
    margin: float = setting(0.01, "delta", ge=0)


class LiftedStructure(_Comparing):
    """The farthest positive against the nearest negative of an anchor, both softly chosen."""

    learns_from = "pairs of a batch"
    paper = "Song et al. 2016; Hermans et al. 2017"
    choose_when = "to compare with triplets"

    name: Literal["lifted_structure"]
    margin: float = setting(1.0, "that negatives are to be apart", gt=0)


LOSSES: tuple[type[LossSettings], ...] = (
    CrossEntropy, BinaryCrossEntropy, Focal, PairsConcatenated, PairsDifference, PairsCosine, Contrastive, Margin,
    Triplet, ArcFace, CosFace, SphereFace, OriginalSphereFace, NPairs, SupCon, MultiSimilarity, Circle, ProxyAnchor,
    SoftTriple, LiftedStructure,
)  # fmt: skip
"""Every loss, in the order of the documentation; stages/losses/registry.py has the same names."""

OF_SEVERAL_LABELS = tuple(get_args(loss.model_fields["name"].annotation)[0] for loss in LOSSES if loss.several_labels)
"""Names of those that take images with several labels."""

LossChoice = one_or_several(LOSSES)
"""One loss, or several whose weighted sum counts."""
