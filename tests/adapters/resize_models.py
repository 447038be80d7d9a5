"""Tiny models for the tests of live resizing, and what they compute."""

import contextlib
import warnings
from typing import Any

import torch


@contextlib.contextmanager
def quiet():
    """Without PEFT's warnings: of fan_in_fan_out, embeddings, experts' patterns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Experts(torch.nn.Module):
    """Three experts in one 3-D parameter, and a plain one beside it."""

    def __init__(self):
        super().__init__()
        self.stack = torch.nn.Parameter(torch.randn(3, 5, 6))
        self.plain = torch.nn.Parameter(torch.randn(6, 5))

    def forward(self, x):
        return torch.tanh(torch.einsum("eoi,...i->...eo", self.stack, x).sum(-2)) @ self.plain.T


class Everything(torch.nn.Module):
    """A layer of each kind that PEFT adapts; it refuses Conv1D beside parameters."""

    def __init__(self, conv1d):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.table = torch.nn.Embedding(11, 8)
        self.conv = torch.nn.Conv2d(1, 3, (2, 3), padding=(0, 1))
        self.linear = torch.nn.Linear(8, 7)
        self.conv1d = Conv1D(6, 7) if conv1d else torch.nn.Linear(7, 6)  # 7 x 6 and 6 x 7
        self.experts = Experts()
        self.kept = torch.nn.Linear(6, 2)  # trained in full by modules_to_save

    def forward(self, tokens):
        x = self.table(tokens)  # batch x 4 x 8
        x = x[:, 1:] + self.conv(x[:, None]).mean(1)
        x = torch.tanh(self.conv1d(torch.tanh(self.linear(x))))
        return self.kept(self.experts(x)).mean(1)


class Plain(torch.nn.Module):
    """Three linear layers."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 7)
        self.second = torch.nn.Linear(7, 9)
        self.last = torch.nn.Linear(9, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def adapted(model, *, random=True, seed=1, dtype=torch.float64, **options) -> Any:
    """The model with LoRA layers; random: factors that are not zero."""
    import peft

    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 6, **options}
    with quiet():
        config = peft.LoraConfig(**{"init_lora_weights": not random, **options})
        return peft.get_peft_model(model.to(dtype), config, autocast_adapter_dtype=False)


def plain(seed=0, **options) -> Any:
    torch.manual_seed(seed)
    return adapted(Plain(), target_modules=["first", "second", "last"], **options)


def everything(seed=0, conv1d=False, **options) -> Any:
    torch.manual_seed(seed)
    return adapted(
        Everything(conv1d),
        target_modules=["table", "conv", "linear", "conv1d"],
        target_parameters=None if conv1d else ["experts.stack", "experts.plain"],
        modules_to_save=["kept"],
        **options,
    )


def loaded(base, folder) -> Any:
    """A new base with the adapter that was saved."""
    import peft

    with quiet():
        return peft.PeftModel.from_pretrained(base.double(), folder, autocast_adapter_dtype=False)


def deltas(model, adapter="default"):
    """PEFT's own s B A in each layer, by module (and by parameter)."""
    found = {}
    for path, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight") and adapter in module.scaling:
            name = path.replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            name = name if parameter is None else f"{name}.{parameter}"
            found[name] = module.get_delta_weight(adapter).detach().clone()
    return found


def everything_that_counts(model, optimizer=None):
    """All numbers and settings of a model and its optimizer, to compare before and after."""
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found[f"{name}: grad"] = None if parameter.grad is None else parameter.grad.clone()
        found[f"{name}: settings"] = (parameter.requires_grad, parameter.dtype, id(parameter))
    for path, module in model.named_modules():
        if hasattr(module, "lora_A"):
            found[path] = dict(module.scaling), dict(module.r), dict(module.lora_alpha)
        found[f"{path}: type"] = type(module)
    found["config"] = repr(model.peft_config)
    if optimizer is not None:
        for g, group in enumerate(optimizer.param_groups):
            found[f"group {g}"] = [id(p) for p in group["params"]]
            for i, p in enumerate(group["params"]):
                for key, value in optimizer.state.get(p, {}).items():
                    found[f"{g}.{i}.{key}"] = value.clone() if torch.is_tensor(value) else value
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if torch.is_tensor(value):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key
