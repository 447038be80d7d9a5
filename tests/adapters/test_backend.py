"""The example of the core inside EVA and AdaLoRA, run on tiny models with PEFT's own code."""

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
transformers = pytest.importorskip("transformers", reason="transformers is absent")
peft = pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

from lorambo_adapters.layers import find_layers  # noqa: E402
from lorambo_adapters.ranks.formats import ranks_of, to_peft  # noqa: E402
from lorambo_alloc import GainCurves, uniform_rank  # noqa: E402

FILE = Path(__file__).parents[2] / "examples" / "backend.py"


@pytest.fixture(scope="module")
def backend():
    spec = importlib.util.spec_from_file_location("backend", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def llama(layers=2):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=40,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batches(count=3):
    torch.manual_seed(1)
    tokens = torch.randint(0, 40, (count, 8, 16))
    return [{"input_ids": batch, "labels": batch} for batch in tokens]


TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def eva():
    """PEFT's state with all components of every layer; whitened, and as they are."""
    states = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for whiten in (True, False):
            config = peft.LoraConfig(
                r=6,
                target_modules=TARGETS,
                init_lora_weights="eva",
                eva_config=peft.EvaConfig(rho=1.0, whiten=whiten, tau=0.8),
            )
            states.append(
                peft.get_eva_state_dict(llama(), batches(), config, show_progress_bar=False)
            )
    return states


def test_eva_at_the_cost_of_parameters(backend, eva):
    whitened, plain = eva
    model = llama()
    shapes = {layer.name: layer.shape for layer in find_layers(model, TARGETS)}
    costs = {name: sum(shape) for name, shape in shapes.items()}
    assert whitened.keys() == shapes.keys()
    assert {len(rows) for rows in whitened.values()} == {6}
    ranks, state = backend.redistribute(whitened, costs, rank=2)
    assert ranks.budget == 2 * sum(costs.values())
    assert ranks.certificate.status == "optimal_exact"
    assert len(set(ranks.values())) > 1
    for name, rows in state.items():
        layer = name.removeprefix("base_model.model.")
        # Unit rows, the very ones that EVA finds without whitening.
        assert rows.shape == (ranks[layer], shapes[layer][1])
        expected = plain[layer][: len(rows)]
        cosines = (rows * expected).sum(1).abs()
        assert torch.allclose(cosines, torch.ones_like(cosines), atol=1e-3)
    for rslora in (False, True):
        config = to_peft(ranks, scale=2.0, rslora=rslora, keys="suffix", modules=model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned = peft.get_peft_model(
                llama(), peft.LoraConfig(**config, init_lora_weights="eva"), low_cpu_mem_usage=True
            )
            peft.initialize_lora_eva_weights(tuned, eva_state_dict=dict(state))
        made = ranks_of(tuned)
        assert made == {name: rank for name, rank in ranks.items() if rank}
        assert np.allclose(list(made.scales.values()), 2.0, rtol=1e-12)
        trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        assert trainable == ranks.cost <= ranks.budget
        for name, rows in state.items():
            module = tuned.get_submodule(name)
            assert torch.equal(module.lora_A["default"].weight, rows.float())
            assert not module.lora_B["default"].weight.any()


def test_the_variances_come_back_from_whitened_components(backend):
    torch.manual_seed(3)
    values = {"a": torch.tensor([5.0, 2.0, 0.3]), "b": torch.tensor([4.0, 3.5, 3.4])}
    rows = {name: torch.linalg.qr(torch.randn(7, 3)).Q.T for name in values}
    # As `_get_eva_state_dict` whitens, by the singular values of the inputs.
    state = {name: rows[name] / values[name].sqrt().reshape(-1, 1) for name in values}
    ranks, components = backend.redistribute(state, {"a": 10, "b": 1}, 1)
    for name, singular in values.items():
        variances = singular.double() ** 2
        expected = variances / variances.sum()
        found = ranks.problem.curve(ranks.problem.names.index(name))
        assert np.allclose(np.diff(found), expected, rtol=1e-5)
    assert torch.allclose(components["base_model.model.a"], rows["a"][: ranks["a"]])
    assert dict(ranks) == {"a": 0, "b": 3} or ranks.cost <= 11


def test_eva_itself_counts_ranks_and_so_misses_the_budget(backend, eva):
    shapes = {layer.name: layer.shape for layer in find_layers(llama(), TARGETS)}
    costs = {name: sum(shape) for name, shape in shapes.items()}
    shares = {name: rows.double().norm(dim=1).pow(-4) for name, rows in eva[0].items()}
    shares = {name: (values / values.sum()).numpy() for name, values in shares.items()}
    missed = []
    for rank in range(1, 6):
        # EVA's rule on the same shares: the best components of all, whatever they cost.
        scored = sorted((-s, name) for name, values in shares.items() for s in values)
        best = [name for _, name in scored[: rank * len(costs)]]
        ranks = {name: best.count(name) for name in costs}
        cost = sum(costs[name] * rank for name, rank in ranks.items())
        missed.append(cost != rank * sum(costs.values()))
        # At EVA's own parameters, the allocation explains no less.
        ours = backend.allocate(GainCurves.from_increments(shares), cost, costs=costs)
        explained = sum(values[: ranks[name]].sum() for name, values in shares.items())
        assert ours.value >= explained - 1e-9
    assert any(missed)


def adalora(steps=12):
    config = peft.AdaLoraConfig(
        target_modules=TARGETS, init_r=4, target_r=2, tinit=2, tfinal=4, deltaT=2, total_step=steps
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter.normal_()
    return model


def train(model, steps=12):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches(1)[0]).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)


def left(model):
    """By triplets' name, how many are not masked."""
    return {
        name: int((parameter.abs().sum(1) > 0).sum())
        for name, parameter in model.named_parameters()
        if "lora_E" in name
    }


def test_adalora_within_a_budget_of_parameters(backend):
    model = adalora()
    tuner = model.base_model
    allocator = backend.ParameterAllocator(tuner.model, tuner.peft_config["default"], "default")
    tuner.rankallocator = allocator
    train(model)
    allocation = allocator.allocation
    # Names as the tuner sees them; the final budget is that of rank 2 in every layer.
    found = {name.removeprefix("base_model.model."): rank for name, rank in left(model).items()}
    assert found == dict(allocation)
    assert allocation.certificate.status == "optimal_exact"
    costs = dict(zip(allocation.problem.names, allocation.problem.costs.tolist(), strict=True))
    shapes = {layer.name: layer.shape for layer in find_layers(llama(), TARGETS)}
    for name, shape in shapes.items():
        assert costs[f"{name}.lora_E.default"] == sum(shape) + 1
    assert allocation.budget == uniform_rank(2).cost(
        allocation.problem.costs, allocation.problem.fixed_costs
    )
    assert allocation.cost <= allocation.budget
    pattern = tuner.peft_config["default"].rank_pattern
    assert {name: sum(mask) for name, mask in pattern.items()} == dict(allocation)


def test_adaloras_own_rule_on_equal_costs_gives_the_same_masks(backend, monkeypatch):
    """With one cost for all ranks, what is left is what AdaLoRA's threshold leaves."""
    theirs = adalora()
    train(theirs, steps=7)
    ours = adalora()
    tuner = ours.base_model
    allocator = backend.ParameterAllocator(tuner.model, tuner.peft_config["default"], "default")
    tuner.rankallocator = allocator

    def equal_costs(gains, budget, *, costs):
        ranks = budget * len(costs) // sum(costs.values())
        return allocate(gains, ranks, costs=dict.fromkeys(costs, 1))

    allocate = backend.allocate
    monkeypatch.setattr(backend, "allocate", equal_costs)
    train(ours, steps=7)
    assert 0 < sum(left(ours).values()) < 4 * len(left(ours))
    assert left(ours) == left(theirs)
