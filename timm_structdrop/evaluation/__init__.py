"""Evaluation: what a trained model does on data, corrupted, attacked, or with units dropped."""

from timm_structdrop.evaluation.accuracy import evaluate
from timm_structdrop.evaluation.attack import Attack, evaluate_attack, pgd, random_targets
from timm_structdrop.evaluation.corruption_error import (
    check_baseline,
    corruption_errors,
    corruption_table,
    read_corruption_rows,
)
from timm_structdrop.evaluation.corruptions import (
    CORRUPTIONS,
    PAPER_CORRUPTIONS,
    SEVERITIES,
    CorruptedDataset,
    corrupt,
    load_corruptions,
    parse_corruptions,
    parse_severities,
)
from timm_structdrop.evaluation.inference_drop import (
    InferenceDrop,
    dropblock_layers,
    dropping,
    with_dropblock,
)
from timm_structdrop.evaluation.results import accuracy_row, write_results

__all__ = [
    "CORRUPTIONS",
    "PAPER_CORRUPTIONS",
    "SEVERITIES",
    "Attack",
    "CorruptedDataset",
    "InferenceDrop",
    "accuracy_row",
    "check_baseline",
    "corrupt",
    "corruption_errors",
    "corruption_table",
    "dropblock_layers",
    "dropping",
    "evaluate",
    "evaluate_attack",
    "load_corruptions",
    "parse_corruptions",
    "parse_severities",
    "pgd",
    "random_targets",
    "read_corruption_rows",
    "with_dropblock",
    "write_results",
]
