"""What an optimizer remembers of an adapter's factors, carried over to factors of another rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.moments needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

Law = Literal["gradient", "square"]

# By their names in torch.optim, transformers and bitsandbytes' 32-bit states. State of another name
# is refused: a tensor's shape does not say whether it goes with the gradient or with its square.
_GRADIENTS = frozenset({"exp_avg", "momentum_buffer", "grad_avg", "state1"})
_SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "state2"})


def moment_laws(
    optimizer: Any, parameter: torch.Tensor, where: str
) -> tuple[dict[str, Law], dict[str, Any]]:
    """How each entry of a parameter's state follows when the parameter changes its rank.

    - "gradient": a running mean of gradients (`exp_avg`, SGD's `momentum_buffer`). The gradient of
      the new factors is linear in that of the old ones (`projection`), so the mean that they would
      have had is too: exact, up to the truncated part of B A in the gradients to come. RMSprop's
      `momentum_buffer` is of quotients, and this an approximation.
    - "square": a running mean (or sum, or maximum) of squared gradients, element by element. With
      g' = P^T g, E[g'_i^2] = sum_a P_ai^2 E[g_a^2] + cross terms that the optimizer has not kept;
      they are left out. Exact where directions are kept as they are, otherwise as if the gradients
      of different directions were uncorrelated. Where a centred RMSprop keeps the mean of the
      gradients too, this is said of the variances alone (`carried_moments`).

    Args:
        optimizer: with `state`, a mapping from parameters to their entries.
        parameter: the old one.
        where: which it is, for messages.

    Returns:
        The laws of the entries that have the parameter's shape, and the entries that are kept as
        they are (numbers of steps).

    Raises:
        ValueError: an entry is of another shape, of an unknown name, quantised (8-bit) or a
            tensor of another kind.
    """
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    kind = type(optimizer).__name__
    # bitsandbytes' RMSprop and Adagrad keep their squares in state1, and have no state2.
    ambiguous = "state2" not in state
    laws: dict[str, Law] = {}
    kept: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            if not isinstance(value, int | float | str | None):
                raise ValueError(_refusal(where, kind, key, f"a {type(value).__name__}"))
            kept[key] = value
        elif value.numel() == 1 and value.shape != parameter.shape:
            kept[key] = value
        elif not value.is_floating_point():
            what = f"numbers in {value.dtype}, quantised in blocks that cross the ranks"
            raise ValueError(_refusal(where, kind, key, what))
        elif type(value) is not type(parameter.data) or getattr(value, "is_paged", False):
            raise ValueError(_refusal(where, kind, key, f"a special {type(value).__name__}"))
        elif value.shape != parameter.shape:
            what = f"shape {tuple(value.shape)} beside a parameter of {tuple(parameter.shape)}"
            raise ValueError(_refusal(where, kind, key, what))
        elif key in _SQUARES:
            laws[key] = "square"
        elif key in _GRADIENTS and not (key == "state1" and ambiguous):
            laws[key] = "gradient"
        else:
            raise ValueError(_refusal(where, kind, key, "a name without a known law"))
    return laws, kept


def holds(optimizer: Any, parameters: set[int]) -> bool:
    """Whether one of these parameters, by id, is in a group of the optimizer.

    Raises:
        ValueError: this is no optimizer, or one that keeps its parameters elsewhere too (L-BFGS, or
            one around another that has the state).
    """
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "state"):
        raise ValueError(
            f"optimizer: expected one with param_groups and state, got {type(optimizer).__name__}"
        )
    if hasattr(optimizer, "_params"):
        raise ValueError(
            f"optimizer: expected one whose state belongs to single parameters, got "
            f"{type(optimizer).__name__}"
        )
    for name, inner in vars(optimizer).items():
        if (
            hasattr(inner, "param_groups")
            and hasattr(inner, "state")
            and inner.state is not optimizer.state
        ):
            raise ValueError(
                "optimizer: expected one that has its state itself, got "
                f"{type(optimizer).__name__} around {type(inner).__name__} ({name}), whose state "
                "would stay that of the old parameters"
            )
    return any(id(p) in parameters for group in optimizer.param_groups for p in group["params"])


def _refusal(where: str, kind: str, key: str, what: str) -> str:
    return (
        f"{where}: expected optimizer state that can follow a change of rank, got {kind}'s "
        f"{key!r} with {what}; use an optimizer with 32-bit states of the parameters' shape (Adam, "
        "AdamW, SGD, RMSprop, Adagrad, ...), or delete this parameter's entry of optimizer.state "
        "to begin it anew"
    )
