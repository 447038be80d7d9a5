"""The library as the allocator inside another tool: PEFT's EVA and AdaLoRA, at a parameter budget.

Both methods budget the sum of the ranks, so that a rank in a wide layer costs as much as one in a
narrow layer. Here each keeps its own signal, and the ranks come from `allocate` at the true cost of
a rank. EVA, whose components come from one pass over the inputs of the layers:

    config = LoraConfig(r=32, target_modules=..., eva_config=EvaConfig(rho=1.0, whiten=True))
    state = get_eva_state_dict(model, batches, config)
    ranks, state = redistribute(state, {name: sum(shape) for name, shape in shapes.items()}, 8)
    config = LoraConfig(**to_peft(ranks, keys="suffix"), init_lora_weights="eva")
    model = get_peft_model(model, config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(model, eva_state_dict=state)

AdaLoRA, which masks triplets while it trains:

    model = get_peft_model(model, AdaLoraConfig(init_r=12, target_r=8, ...))
    tuner = model.base_model
    tuner.rankallocator = ParameterAllocator(tuner.model, tuner.peft_config["default"], "default")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.adalora.layer import RankAllocator

from lorambo_alloc import Allocation, GainCurves, allocate, uniform_rank


def redistribute(
    state: Mapping[str, torch.Tensor], costs: Mapping[str, int], rank: int
) -> tuple[Allocation, dict[str, torch.Tensor]]:
    """EVA's redistribution, at what rank `rank` in every layer would cost in parameters.

    EVA ranks components by the share of a layer's variance that they explain. Its state does not
    say so, but whitened components do, up to a factor a layer: they are divided by the square root
    of their singular value. The share is then of the variance that the layer's components hold
    together (EVA's is of all of it, the rest included).

    Args:
        state: of PEFT's `get_eva_state_dict` for the model without adapters, with
            `EvaConfig(rho=1.0, whiten=True)` and an `r` as large as a rank may become.
        costs: parameters of a rank by layer: d + k.
        rank: the uniform rank whose parameters are the budget.

    Returns:
        The ranks, and the components of the layers that have any, of unit length, under the names
        that `initialize_lora_eva_weights` looks for.
    """
    lengths = {name: rows.double().norm(dim=1) for name, rows in state.items()}
    variances = {name: length.pow(-4).cpu().numpy() for name, length in lengths.items()}
    shares = {name: values / values.sum() for name, values in variances.items()}
    ranks = allocate(GainCurves.from_increments(shares), uniform_rank(rank), costs=costs)
    components = {
        f"base_model.model.{name}": (rows / lengths[name][:, None].to(rows))[: ranks[name]]
        for name, rows in state.items()
        if ranks[name]
    }
    return ranks, components


class ParameterAllocator(RankAllocator):
    """AdaLoRA's `RankAllocator` with its schedule and scores, but a budget in parameters.

    The schedule's n ranks stand for the parameters that n / layers ranks in every layer have. What
    is masked still takes memory, as in AdaLoRA.
    """

    def mask_to_budget(self, model: torch.nn.Module, budget: int) -> dict[str, list[bool]]:
        """Mask all but the triplets that score highest in all, at d + k + 1 parameters each."""
        parameters = dict(model.named_parameters())
        scores: dict[str, torch.Tensor] = {}
        costs: dict[str, int] = {}
        for name in self.name_set:
            e, a, b = (name % part for part in ("lora_E", "lora_A", "lora_B"))
            sides = self._element_score(a).mean(1), self._element_score(b).mean(0)
            scores[e] = self._combine_ipt(self._element_score(e), torch.stack(sides, dim=1))
            costs[e] = parameters[a].shape[1] + parameters[b].shape[0] + 1
        gains = {e: score.sort(descending=True).values.tolist() for e, score in scores.items()}
        self.allocation = allocate(
            GainCurves.from_increments(gains),
            sum(costs.values()) * budget // len(costs),
            costs=costs,
        )
        pattern: dict[str, list[bool]] = {}
        for e, score in scores.items():
            keep = torch.zeros_like(score, dtype=torch.bool)
            keep[score.argsort(descending=True)[: self.allocation[e]]] = True
            parameter: Any = parameters[e]
            with torch.no_grad():
                parameter.masked_fill_(~keep[:, None], 0.0)
            pattern[e] = keep.tolist()
        return pattern
