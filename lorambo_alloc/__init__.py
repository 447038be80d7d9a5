"""Optimal ranks for LoRA adapters within a budget, with a certificate."""

from lorambo_alloc.allocate import allocate
from lorambo_alloc.allocation import Allocation
from lorambo_alloc.certificate import Certificate, CertificateError, Verification
from lorambo_alloc.costs import uniform_rank
from lorambo_alloc.curves import GainCurves, Spectra
from lorambo_alloc.objectives import Objective, log, schatten
from lorambo_alloc.problem import InfeasibleError, Problem
from lorambo_alloc.solve import solve

__all__ = [
    "Allocation",
    "Certificate",
    "CertificateError",
    "GainCurves",
    "InfeasibleError",
    "Objective",
    "Problem",
    "Spectra",
    "Verification",
    "allocate",
    "log",
    "schatten",
    "solve",
    "uniform_rank",
]
