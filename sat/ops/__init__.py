"""Numerical kernels, each with a plain torch form."""

from sat.ops.adam import FusedEmaAdam

__all__ = ["FusedEmaAdam"]
