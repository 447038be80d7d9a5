"""Rules that others use to choose ranks, each made to meet the budget, for comparison.

| rule | what it looks at |
|---|---|
| `uniform` | nothing: the same rank everywhere |
| `mlp_only` | the layers' names: the same rank in the MLP layers, none elsewhere |
| `eva` | each layer's own shares of variance; one order over all layers, costs ignored |
| `adalora` | an importance of every single rank; one threshold over all layers, costs ignored |
| `gora` | an importance of every layer; its share of the budget, over the cost of a rank |
| `square_root` | the same, under a square root |

As published, `gora` alone counts its budget in parameters, and what it rounds away or adds it does
not make up for; `eva` and `adalora` count ranks; `square_root` gives about as many ranks as it is
told, whatever they cost; a uniform rank is chosen by hand. Here each is followed as far as the
budget (caps included) lets it: to the lowest threshold, or the largest scale, at which all its
ranks fit. So all are compared at the same budget, and none is charged for a rank that it did not
get. What is left over then is less than the rule's next step needs, and stays unspent, as the costs
show; `fill=True` spends it on the rule's own next ranks, passing over those that do not fit.

The ranks obey every limit of the problem: minimum ranks are given first, and a rank that is not
allowed is rounded down to one that is (`square_root`: to the nearest). A tied group takes a
further rank when the rule has given it to all of the group's layers.

`one_rank_exchange` is a rule of another kind: it goes on from ranks that are there, one rank at a
time, as ranks that adapt in training do. It stands beside the table of rules, not in it.

No rule proves anything. The certificate of what it returns carries the bound of the price, so its
gap says at most how much the rule loses to the optimum; `compare` says it against the optimum.
"""

from lorambo_alloc.baselines.equal import MLP, mlp_only, uniform
from lorambo_alloc.baselines.exchange import one_rank_exchange
from lorambo_alloc.baselines.path import certified
from lorambo_alloc.baselines.rules import RULES
from lorambo_alloc.baselines.shares import gora, square_root
from lorambo_alloc.baselines.thresholds import adalora, eva

__all__ = [
    "MLP",
    "RULES",
    "adalora",
    "certified",
    "eva",
    "gora",
    "mlp_only",
    "one_rank_exchange",
    "square_root",
    "uniform",
]
