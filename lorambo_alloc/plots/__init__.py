"""Pictures (extra `plot`: matplotlib), for print and for any eyes.

- `spectra`: singular values by layer, and what they leave unresolved.
- `rank_map`: ranks by block and module type, several allocations side by side.
- `frontier`: value and price at every budget, with the knee and a target.
- `against_baselines`: what `compare` found.
- `rank_history`: ranks over the steps of a training run.
- `regret_by_round`: cumulative regret of allocators that learn.
- `intervals`: differences with their intervals, as a forest plot.
- `predicted_against_real`: how well predictions hold, layer by layer.

Each takes `ax=` to draw into axes of the caller's and returns the figure. Figures are made without
pyplot: no window, no global state; a notebook shows them after `%matplotlib inline`.

Ordered quantities are drawn in viridis, whose lightness changes steadily; other colours are those
of Okabe and Ito, always with a dash, a marker or a word beside them, so that neither a grey printer
nor a colour-blind reader loses anything.
"""

from lorambo_alloc.plots.against_baselines import against_baselines
from lorambo_alloc.plots.frontier import frontier
from lorambo_alloc.plots.intervals import intervals
from lorambo_alloc.plots.predicted_against_real import predicted_against_real
from lorambo_alloc.plots.rank_history import rank_history
from lorambo_alloc.plots.rank_map import rank_map
from lorambo_alloc.plots.regret_by_round import regret_by_round
from lorambo_alloc.plots.spectra import spectra

__all__ = [
    "against_baselines",
    "frontier",
    "intervals",
    "predicted_against_real",
    "rank_history",
    "rank_map",
    "regret_by_round",
    "spectra",
]
