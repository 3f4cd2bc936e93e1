"""Zero-shot evaluation: clean and robust accuracy with intervals, over sets and attacks, bare or behind a defence."""

from zsr.eval.defended import DefendedCLIP
from zsr.eval.zeroshot import Accuracy, EvalRow, evaluate_sets

__all__ = ["Accuracy", "DefendedCLIP", "EvalRow", "evaluate_sets"]
