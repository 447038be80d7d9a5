"""Listening to parameters that are multiplied by a module's own code, such as stacked experts.

A mixture of experts of transformers 5 keeps the matrices of all experts of a block in one 3-D
parameter, and no module's output is one expert's product. So while the forward of a module that
owns such parameters runs, a mode of torch's sees its calls, and picks out the products.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

try:
    import torch
    from torch.overrides import TorchFunctionMode
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.experts needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import TargetLayer, stored_transposed
from lorambo_adapters.spectra.expert_products import Experts, Memory, Product, View, recognise
from lorambo_adapters.spectra.token_rows import TokenRows

Use: TypeAlias = Callable[[Product, torch.Tensor, torch.Tensor], torch.Tensor]
"""A product, its input and its output to what is to be the output."""

_COPIES = frozenset("to type float double half bfloat16 contiguous clone cuda cpu".split())
_SHAPED = frozenset(  # take shape, type and device of a tensor, not its numbers
    "empty_like zeros_like ones_like full_like rand_like randn_like new_empty new_zeros new_ones "
    "new_full new_tensor".split()
)
_AS_ANOTHER = frozenset("to type_as view_as reshape_as expand_as".split())
_DATA: Any = torch.Tensor.data  # of a type that stubs do not know
_CUT = (torch.Tensor.detach, torch.detach, _DATA.__get__)


@contextlib.contextmanager
def listening(
    layers: Iterable[TargetLayer], use: Use, follow: Callable[[], bool] = lambda: False
) -> Generator[None]:
    """Inside, each product of tokens with a slice of a layer's parameter passes through `use`.

    Understood are `linear`, `matmul` (`@`), `mm`, `bmm`, `addmm`, `baddbmm` and grouped products
    with offsets, with one expert, all of them, or those of an index (`W[ids]`), through views,
    copies and conversions; hence transformers' "eager", "batched_mm" and "grouped_mm". A low-rank
    or other term that is added to the parameter (PEFT's adapters) is seen through.

    Args:
        layers: of the kind "expert".
        use: called with the product, its input and its output, at each; returns the output. An
            expert without tokens is in no product's groups.
        follow: asked at each call of a module whether to find out which token each row is of
            (`Product.tokens`).

    Raises:
        ValueError: in the model's forward: a parameter is used in another way, or not at all; the
            message names the layer.
    """
    owners: dict[int, tuple[Any, dict[str, dict[int | None, TargetLayer]]]] = {}
    for layer in layers:
        _, parameters = owners.setdefault(id(layer.module), (layer.module, {}))
        parameters.setdefault(layer.parameter, {})[layer.expert] = layer
    with contextlib.ExitStack() as stack:
        for module, parameters in owners.values():
            stack.enter_context(_wrapped(module, parameters, use, follow))
        yield


@contextlib.contextmanager
def _wrapped(
    module: Any, parameters: Mapping[str, Experts], use: Use, follow: Callable[[], bool]
) -> Generator[None]:
    """Inside, the module's forward runs in the mode."""
    own, inner = module.__dict__.get("forward"), module.forward
    listens = True

    # Not a pair of hooks: they would leave the mode on where the forward is interrupted.
    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not listens:
            return inner(*args, **kwargs)
        given = [value for value in (*args, *kwargs.values()) if value is not None]
        x = _tokens_in(given)
        followed = x is not None and follow() and _in_order(x, given)
        mode = _Listener(module, parameters, use, x, followed)
        with mode:
            output = inner(*args, **kwargs)
        mode.check_used()
        return output

    module.forward = forward
    try:
        yield
    finally:
        listens = False
        if module.__dict__.get("forward") is forward:  # else somebody has wrapped it again
            del module.forward
            if own is not None:
                module.forward = own


def _tokens_in(given: Sequence[Any]) -> torch.Tensor | None:
    """The first argument that can be tokens with features."""
    for value in given:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1:
            return value
    return None


def _in_order(x: torch.Tensor, given: Sequence[Any]) -> bool:
    """Whether a module's tokens are still in the model's order, as far as its arguments tell.

    They are where it chooses the experts itself, or is given their indices, a row a token. With
    numbers of tokens an expert, for one, they come sorted.
    """
    return len(given) == 1 or any(
        isinstance(value, torch.Tensor)
        and not (value.is_floating_point() or value.dtype == torch.bool)
        and value.ndim > 1
        and value[..., 0].numel() == x[..., 0].numel()
        for value in given
    )


class _Listener(TorchFunctionMode):
    """One run of a module's forward."""

    def __init__(
        self,
        module: Any,
        parameters: Mapping[str, Experts],
        use: Use,
        x: torch.Tensor | None,
        follow: bool,
    ) -> None:
        super().__init__()
        self._module, self._parameters, self._use = module, parameters, use
        self._inputs = 0 if x is None else x[..., 0].numel()
        self._tokens = TokenRows(x) if follow and x is not None else None
        self._sent = (x.detach() != 0).any(-1).reshape(-1) if follow and x is not None else None
        self._memory = Memory()
        self._known: dict[str, torch.Tensor] = {}
        self._used: set[str] = set()
        self._gradients = torch.is_grad_enabled()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self._look()
        name = str(getattr(func, "__name__", func)).partition(".")[0]
        views = [(t, self._memory.find(t)) for t in _all_tensors([*args, *kwargs.values()])]
        used = [(tensor, view) for tensor, view in views if view is not None]
        versions = [_version(tensor) for tensor, _ in used]
        result = func(*args, **kwargs)
        if not used:
            if self._tokens is not None:
                self._tokens.follow(name, args, kwargs, result)
            return result
        changed = versions != [_version(tensor) for tensor, _ in used]
        # Out of the graph, it does not take part in what is differentiated.
        if changed or (func in _CUT and torch.is_grad_enabled()):
            name = "data" if name == "__get__" else name
            raise self._not_understood(used[0][1].parameter, name)
        found = recognise(name, args, kwargs, result, self._memory)
        if found is not None:
            return self._product(*found, output=result)
        if not self._harmless(name, args, kwargs, used, result):
            raise self._not_understood(used[0][1].parameter, name)
        return result

    def _look(self) -> None:
        """Note the parameters as they are now: they may be gathered or replaced during the run."""
        for name in self._parameters:
            parametrized = getattr(self._module, "parametrizations", {})
            weight = self._module._parameters.get(name)
            if weight is None and name in parametrized:
                weight = parametrized[name].original
            if weight is None or self._known.get(name) is weight:
                continue
            if hasattr(weight, "full_tensor"):
                raise ValueError(
                    f"layer {self._name(name)!r}: expected a plain tensor during the forward pass, "
                    "got a DTensor; leave it out of the targets"
                )
            self._known[name] = weight
            self._memory.add(weight, View(name, "all"))

    def _product(
        self, view: View, product: Product, x: torch.Tensor, transposed: bool, output: torch.Tensor
    ) -> torch.Tensor:
        layers = product.experts = self._parameters[view.parameter]
        layer = next(iter(layers.values()))
        if transposed != stored_transposed(layer):
            stored = ("d x k", "k x d")
            then = (
                "set `is_transposed` of its module to "
                f"{transposed} before the layers are looked for"
                if layer.expert is not None
                else "leave it out of the targets"
            )
            raise ValueError(
                f"layer {layer.name!r}: expected a product with a {stored[not transposed]} matrix, "
                f"got one with a {stored[transposed]} one; {then}"
            )
        self._used.add(view.parameter)
        product.inputs = self._inputs
        product.hidden = self._gradients and not torch.is_grad_enabled()
        tokens = None if self._tokens is None else self._tokens.of(x)
        if tokens is not None and product.columns and tokens.shape[-2] != 1:
            tokens = None  # rows are what is summed over
        if tokens is not None and tokens.ndim <= output.ndim:
            product.tokens, product.sent = product.rows(tokens)[:, 0], self._sent
            if not product.columns:
                tokens = tokens.expand(*product.lead, 1)
        output = self._use(product, x, output)
        if self._tokens is not None:
            self._tokens.put(output, tokens)
        return output

    def _harmless(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        used: Sequence[tuple[torch.Tensor, View]],
        result: Any,
    ) -> bool:
        """Whether a call's result holds none of a parameter's numbers, or is known to hold them."""
        tensors = _all_tensors([result])
        if name in _SHAPED or (not tensors and name != "__setitem__"):
            return True
        if tensors and all(self._memory.find(tensor) is not None for tensor in tensors):
            return True
        source, view = used[0]
        if source is not args[0]:
            return name in _AS_ANOTHER
        if len(used) > 1 or len(tensors) != 1 or view.what == "part":
            return False
        # PEFT's parametrisation adds its term by one of these.
        added = name in ("add", "__add__", "baddbmm") and kwargs.get("beta", 1) == 1
        if name in _COPIES or added:
            if tensors[0].shape == source.shape:
                self._memory.add(tensors[0], view)
                return True
        if name == "__getitem__" or name == "index_select":
            return self._gathered(name, args, source, view, tensors[0])
        return False

    def _gathered(
        self, name: str, args: Sequence[Any], source: torch.Tensor, view: View, result: torch.Tensor
    ) -> bool:
        index = args[2] if name == "index_select" and len(args) == 3 else args[1]
        index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
        if not isinstance(index, torch.Tensor) or index.dtype == torch.bool or view.what != "all":
            return False
        if source.ndim != 3 or result.shape != (*index.shape, *source.shape[1:]):
            return False
        ids = index.detach().long() % len(source)
        self._memory.add(result, view._replace(what="gathered", ids=ids))
        return True

    def check_used(self) -> None:
        """Refuse a forward that was given tokens but in which a parameter was in no product."""
        if not self._inputs or getattr(self._module, "_is_expert_parallel", False):
            return
        for parameter in self._parameters:
            if parameter not in self._used:
                raise self._not_understood(parameter, None)

    def _name(self, parameter: str) -> str:
        return next(iter(self._parameters[parameter].values())).name

    def _not_understood(self, parameter: str, name: str | None) -> ValueError:
        config = getattr(self._module, "config", None)
        implementation = getattr(config, "_experts_implementation", None)
        got = "none" if name is None else repr(name)
        if implementation in (None, "eager"):
            then = "leave it out of the targets"
        else:
            got += f" (experts implementation {implementation!r})"
            then = 'call model.set_experts_implementation("eager"), or leave it out of the targets'
        return ValueError(
            f"layer {self._name(parameter)!r}: expected {type(self._module).__name__} to multiply "
            f"tokens by this parameter or a slice of it, got {got}; {then}"
        )


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _all_tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among values, and in lists and tuples among them."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _all_tensors(value)
    return found
