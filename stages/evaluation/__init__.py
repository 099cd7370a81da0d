"""What is measured on features: logistic regression, neighbours, retrieval, label subsets, intervals, health."""

from stages.evaluation.confidence import choose_confidence, confidence_curve, precision_from
from stages.evaluation.features import FeatureFile, Features, read_features
from stages.evaluation.intervals import bootstrap_interval
from stages.evaluation.labels_seen import (
    TEST_IMAGES_SEEN,
    Fair,
    ProbeLabels,
    labels_digest,
    pseudo_labelled_test_images,
)
from stages.evaluation.logistic import LogisticPath, fit_logistic_path, fit_logistic_paths, principal_axes
from stages.evaluation.multilabel import (
    LabelPlan,
    LabelSets,
    Linear,
    Neighbourhood,
    fold_labels,
    label_targets,
    linear_figures,
    measure_linear,
    measure_neighbours,
    neighbour_figures,
    transfer,
)
from stages.evaluation.neighbours import Neighbours, classify, nearest
from stages.evaluation.one_vs_rest import OneVsRest, fit_one_vs_rest
from stages.evaluation.open_set import (
    Answers,
    answer_queries,
    auroc,
    choose_threshold,
    map_at_5_interval,
    open_set_curve,
    oscr,
    oscr_points,
)
from stages.evaluation.pair_scores import ScoredPairs, probability_of, score_pairs
from stages.evaluation.penalty import Choice, Solver, spaced_penalties
from stages.evaluation.query_sets import QuerySets, TooFewIdentities, pair_sets
from stages.evaluation.representation import alignment, rankme, uniformity
from stages.evaluation.retrieval import Ranking, rank_gallery
from stages.evaluation.scores import accuracy, score
from stages.evaluation.stratification import iterative_folds
from stages.evaluation.subsets import held_out, label_subset, stratified_folds, subset_size
from stages.evaluation.verification import Verification, count_pairs, verify

__all__ = [
    "TEST_IMAGES_SEEN",
    "Answers",
    "Choice",
    "Fair",
    "FeatureFile",
    "Features",
    "LabelPlan",
    "LabelSets",
    "Linear",
    "LogisticPath",
    "Neighbourhood",
    "Neighbours",
    "OneVsRest",
    "ProbeLabels",
    "QuerySets",
    "Ranking",
    "ScoredPairs",
    "Solver",
    "TooFewIdentities",
    "Verification",
    "accuracy",
    "alignment",
    "answer_queries",
    "auroc",
    "bootstrap_interval",
    "choose_confidence",
    "choose_threshold",
    "classify",
    "confidence_curve",
    "count_pairs",
    "fit_logistic_path",
    "fit_logistic_paths",
    "fit_one_vs_rest",
    "fold_labels",
    "held_out",
    "iterative_folds",
    "label_subset",
    "label_targets",
    "labels_digest",
    "linear_figures",
    "map_at_5_interval",
    "measure_linear",
    "measure_neighbours",
    "nearest",
    "neighbour_figures",
    "open_set_curve",
    "oscr",
    "oscr_points",
    "pair_sets",
    "precision_from",
    "principal_axes",
    "probability_of",
    "pseudo_labelled_test_images",
    "rank_gallery",
    "rankme",
    "read_features",
    "score",
    "score_pairs",
    "spaced_penalties",
    "stratified_folds",
    "subset_size",
    "transfer",
    "uniformity",
    "verify",
]
