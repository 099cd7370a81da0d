"""What is measured on features: logistic regression, neighbours, retrieval, label subsets, intervals, health."""

from stages.evaluation.features import FeatureFile, Features, read_features
from stages.evaluation.intervals import bootstrap_interval
from stages.evaluation.labels_seen import Fair, ProbeLabels, labels_digest
from stages.evaluation.logistic import LogisticPath, fit_logistic_path, fit_logistic_paths, principal_axes
from stages.evaluation.neighbours import Neighbours, classify, nearest
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
from stages.evaluation.penalty import Choice, Solver
from stages.evaluation.query_sets import QuerySets, TooFewIdentities, pair_sets
from stages.evaluation.representation import alignment, rankme, uniformity
from stages.evaluation.retrieval import Ranking, rank_gallery
from stages.evaluation.scores import accuracy, score
from stages.evaluation.subsets import held_out, label_subset, stratified_folds, subset_size
from stages.evaluation.verification import Verification, count_pairs, verify

__all__ = [
    "Answers",
    "Choice",
    "Fair",
    "FeatureFile",
    "Features",
    "LogisticPath",
    "Neighbours",
    "ProbeLabels",
    "QuerySets",
    "Ranking",
    "Solver",
    "TooFewIdentities",
    "Verification",
    "accuracy",
    "alignment",
    "answer_queries",
    "auroc",
    "bootstrap_interval",
    "choose_threshold",
    "classify",
    "count_pairs",
    "fit_logistic_path",
    "fit_logistic_paths",
    "held_out",
    "label_subset",
    "labels_digest",
    "map_at_5_interval",
    "nearest",
    "open_set_curve",
    "oscr",
    "oscr_points",
    "pair_sets",
    "principal_axes",
    "rank_gallery",
    "rankme",
    "read_features",
    "score",
    "stratified_folds",
    "subset_size",
    "uniformity",
    "verify",
]
