"""Zero-shot evaluation: clean and robust accuracy with intervals, over sets and attacks."""

from zsr.eval.zeroshot import Accuracy, EvalRow, evaluate_sets

__all__ = ["Accuracy", "EvalRow", "evaluate_sets"]
