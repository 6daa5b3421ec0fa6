"""Evaluation: what a trained model does on data."""

from timm_structdrop.evaluation.accuracy import evaluate

__all__ = ["evaluate"]
