"""Ranks that follow running estimates of what they gain, reallocated exactly from time to time.

allocator.py         OnlineAllocator: the clock, the present ranks, observe, propose, accept
proposal.py          what it proposes
timetable.py         when
budget_schedule.py   within which budget
curve_estimates.py   from which estimates: of all layers,
running_curves.py    and of one
completed_curves.py  made complete where some are missing
layers.py            under which costs and limits
switching.py         and the best move, with what moving costs
"""

from lorambo_alloc.online.allocator import OnlineAllocator
from lorambo_alloc.online.budget_schedule import BudgetSchedule, cubic_budget
from lorambo_alloc.online.proposal import Proposal

__all__ = ["BudgetSchedule", "OnlineAllocator", "Proposal", "cubic_budget"]
