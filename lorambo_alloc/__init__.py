"""Optimal ranks for LoRA adapters within a budget, with a certificate."""

from lorambo_alloc.allocate import allocate
from lorambo_alloc.allocation import Allocation
from lorambo_alloc.budget_certificate import BudgetCertificate
from lorambo_alloc.caps import Cap
from lorambo_alloc.certificate import Certificate, CertificateError, Verification
from lorambo_alloc.compare import Comparison, compare
from lorambo_alloc.costs import training_bytes, uniform_rank
from lorambo_alloc.curves import GainCurves, Spectra
from lorambo_alloc.frontier import Frontier, frontier
from lorambo_alloc.history import RankHistory
from lorambo_alloc.minimize_budget import CheapestRanks, minimize_budget
from lorambo_alloc.objectives import Objective, log, schatten
from lorambo_alloc.online import BudgetSchedule, OnlineAllocator, Proposal, cubic_budget
from lorambo_alloc.problem import InfeasibleError, Problem
from lorambo_alloc.solve import solve
from lorambo_alloc.solvers.relaxation import Relaxation, relax
from lorambo_alloc.stability import Stability, stability

__all__ = [
    "Allocation",
    "BudgetCertificate",
    "BudgetSchedule",
    "Cap",
    "Certificate",
    "CertificateError",
    "CheapestRanks",
    "Comparison",
    "Frontier",
    "GainCurves",
    "InfeasibleError",
    "Objective",
    "OnlineAllocator",
    "Problem",
    "Proposal",
    "RankHistory",
    "Relaxation",
    "Spectra",
    "Stability",
    "Verification",
    "allocate",
    "compare",
    "cubic_budget",
    "frontier",
    "log",
    "minimize_budget",
    "relax",
    "schatten",
    "solve",
    "stability",
    "training_bytes",
    "uniform_rank",
]
