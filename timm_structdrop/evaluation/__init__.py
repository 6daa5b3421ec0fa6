"""Evaluation: what a trained model does on data."""

from timm_structdrop.evaluation.accuracy import evaluate
from timm_structdrop.evaluation.results import accuracy_row, write_results

__all__ = ["accuracy_row", "evaluate", "write_results"]
