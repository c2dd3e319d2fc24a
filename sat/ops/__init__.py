"""Numerical kernels, each with a plain torch form."""

from sat.ops.adam import FusedEmaAdam
from sat.ops.muon import Muon

__all__ = ["FusedEmaAdam", "Muon"]
