"""An allocator for a live model: its layers, what a rank costs, and which ranks can be given."""

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
peft = pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

from lorambo_adapters.ranks.resize import resize  # noqa: E402
from lorambo_adapters.training.model_allocator import allocator_for  # noqa: E402  (needs torch)
from lorambo_alloc import uniform_rank  # noqa: E402
from tests.adapters.resize_models import adapted, everything, plain, quiet  # noqa: E402

NAMES = ["first", "second", "last"]


def limits(allocator):
    """The ranks of each layer that the allocator may propose, if gains are without end."""
    found = {}
    for sign, end in ((1.0, "most"), (-1.0, "least")):
        allocator.observe({n: [0.0, *(sign * (i + 1) for i in range(40))] for n in allocator.names})
        found[end] = dict(allocator.propose().ranks)
    return found


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("mode", ["resize", "mask"])
def test_costs_are_the_parameters_of_the_tensors(conv1d, mode):
    model = everything(conv1d=conv1d)
    allocator = allocator_for(model, uniform_rank(3), mode=mode)
    counted = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert allocator.cost == counted == 4 * sum(allocator.costs.values())
    assert allocator.budget_at(0) == 3 * sum(allocator.costs.values())
    assert set(allocator.ranks.values()) == {4}
    if not conv1d:
        assert {name: cost for name, cost in allocator.costs.items() if "stack" in name} == {
            f"experts.stack.{i}": 5 + 6 for i in range(3)
        }


def test_only_ranks_that_resize_can_give_are_proposed():
    model = everything()
    allocator = allocator_for(model, 10**6)
    most = limits(allocator)["most"]
    assert most == {
        "table": 8, "conv": 3, "linear": 7, "conv1d": 6, "experts.plain": 5,
        **{f"experts.stack.{i}": 5 for i in range(3)},
    }  # fmt: skip
    with quiet():
        resize(model, most)
    least = limits(allocator_for(model, 10**6))["least"]
    assert least == {name: int("experts" in name) for name in most}
    with quiet():
        resize(model, least)


def test_experts_of_one_parameter_have_one_rank():
    model = everything()
    allocator = allocator_for(model, 10**6)
    curves = {n: [0.0, 1.0, 1.0, 1.0, 1.0] for n in allocator.names}
    curves |= {"experts.stack.1": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}
    curves |= {f"experts.stack.{i}": [0.0, 1.0, 1.0, 1.0, 1.0, 0.9] for i in (0, 2)}
    allocator.observe(curves)
    ranks = allocator.propose().ranks
    assert {ranks[f"experts.stack.{i}"] for i in range(3)} == {5}


@pytest.mark.parametrize("mode", ["resize", "mask"])
def test_masked_ranks_go_up_to_those_of_the_tensors(mode):
    model = plain()
    resize(model, {"first": 2, "last": 0}, mode="mask")
    allocator = allocator_for(model, 10**6, mode=mode)
    assert allocator.ranks == {"first": 2, "second": 4, "last": 0}
    expected = {"first": 4, "second": 4, "last": 4} if mode == "mask" else None
    assert limits(allocator)["most"] == (expected or {"first": 7, "second": 7, "last": 3})


def test_what_cannot_be_masked_stays():
    allocator = allocator_for(everything(), 10**6, mode="mask")
    found = limits(allocator)
    for name in allocator.names:
        fixed = "experts" in name or name == "table"
        assert (found["least"][name], found["most"][name]) == ((4, 4) if fixed else (0, 4)), name


def test_a_dora_keeps_a_rank():
    allocator = allocator_for(plain(use_dora=True), 10**6)
    assert limits(allocator)["least"] == dict.fromkeys(NAMES, 1)


def test_a_layer_that_lost_its_adapter_is_there_in_its_place():
    model = plain()
    resize(model, {"second": 0})
    allocator = allocator_for(model, 10**6)
    assert allocator.ranks == {"first": 4, "second": 0, "last": 4}
    assert list(allocator.names) == NAMES
    assert allocator.costs["second"] == 7 + 9
    assert limits(allocator)["most"]["second"] == 7
    resize(model, {"second": 2})
    assert allocator_for(model, 10**6).costs == allocator.costs


def test_a_convolution_that_lost_its_adapter_has_its_cost():
    model = everything()
    costs = allocator_for(model, 10**6).costs
    with quiet():
        resize(model, {"conv": 0, "table": 0, "linear": 0})
    assert allocator_for(model, 10**6).costs == costs


def test_a_layer_of_another_adapter_is_not_among_them():
    base = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    model = adapted(base, target_modules=["0"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["1"]))
    assert allocator_for(model, 10**6).names == ("0",)
    assert allocator_for(model, 10**6, "other").names == ("1",)


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({"min_rank": 2, "max_rank": 5}, [2, 2, 2], [5, 5, 3]),
        ({"min_rank": {"last": 1}, "max_rank": {"first": 6}}, [0, 0, 1], [6, 7, 3]),
        ({"tied": [["first", "last"]]}, [0, 0, 0], [3, 7, 3]),
        ({"multiple_of": 2}, [0, 0, 0], [6, 6, 2]),
    ],
)
def test_limits_of_the_caller_hold_in_addition(options, least, most):
    found = limits(allocator_for(plain(), 10**6, **options))
    assert list(found["least"].values()) == least
    assert list(found["most"].values()) == most


def test_what_the_caller_gives_replaces_what_is_found():
    allocator = allocator_for(plain(), 100, costs=dict.fromkeys(NAMES, 5), ranks={"last": 1})
    assert allocator.costs == dict.fromkeys(NAMES, 5)
    assert allocator.ranks == {"first": 0, "second": 0, "last": 1}


def test_arguments():
    with pytest.raises(ValueError, match="mode: expected 'resize' or 'mask', got 'other'"):
        allocator_for(plain(), 100, mode="other")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="adapter: expected one of 'default', got 'other'"):
        allocator_for(plain(), 100, "other")
    with pytest.raises(ValueError, match="'elsewhere'"):
        allocator_for(plain(), 100, min_rank={"elsewhere": 1})
