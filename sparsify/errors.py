"""The errors that sparsify raises on purpose. Each says what was seen, why it is refused and what to do."""

from __future__ import annotations


class SparsifyError(Exception):
    """Base of every error that sparsify raises on purpose."""


class CaptureError(SparsifyError, RuntimeError):
    """The model could not be traced, or the example inputs do not fit it."""


class NoFFNError(SparsifyError, ValueError):
    """The model holds no feed-forward layer that can be split; the message lists the nearest rejections."""


class SelectionError(SparsifyError, ValueError):
    """`select`, `overrides` or `plan` do not fit the feed-forward layers of the model."""


class BudgetError(SparsifyError, ValueError):
    """No conversion that the options allow keeps the budget; the message says what can be reached."""


class CausalityError(SparsifyError, ValueError):
    """A router would let tokens of a causal model depend on later ones."""


class CalibrationError(SparsifyError, ValueError):
    """The calibration data is empty, does not fit the model or the disk, or leads to values that are not finite."""


class PassError(SparsifyError, RuntimeError):
    """A pass failed, or broke the contract that it declares."""


class VerificationError(SparsifyError, RuntimeError):
    """A promise does not hold: a receipt or a parity check is above its bound."""


class GraftError(SparsifyError, ValueError):
    """The experts do not fit into the model: it is not the one that was converted."""


class ExportError(SparsifyError, RuntimeError):
    """The model could not be exported to ONNX."""


class OutputError(SparsifyError, OSError):
    """The output folder or file cannot be written."""


class LoadError(SparsifyError, ValueError):
    """A saved model is damaged, was written by another version, or is no saved model at all."""
