"""Evaluation of a model on a data set: the loop, its images, its scores, its pictures and its table."""

from common.evaluation.loop import evaluate, evaluation_mode, mirrored_classes
from common.evaluation.pictures import write_label
from common.evaluation.samples import network_input
from common.evaluation.score_files import pair_dataset, pair_folders, plain_row, score_files
from common.evaluation.summary import summarise
from common.evaluation.table import format_table

__all__ = [
    "evaluate",
    "evaluation_mode",
    "format_table",
    "mirrored_classes",
    "network_input",
    "pair_dataset",
    "pair_folders",
    "plain_row",
    "score_files",
    "summarise",
    "write_label",
]
