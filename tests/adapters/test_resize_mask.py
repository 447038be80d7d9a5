"""Ranks that come and go behind a mask, with every tensor's shape kept."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
peft = pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

from lorambo_adapters.ranks.mask import MaskedLinear, active_ranks  # noqa: E402  (needs torch)
from lorambo_adapters.ranks.resize import resize  # noqa: E402
from tests.adapters.resize_models import (  # noqa: E402
    Plain,
    deltas,
    everything,
    loaded,
    plain,
    quiet,
)
from tests.strategies import examples  # noqa: E402

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("resize_worker.py")
NAMES = ["first", "second", "last"]
RANKS = {"first": 2, "second": 3, "last": 1}
TOKENS = torch.arange(8).view(2, 4) % 11


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 8, dtype=torch.float64, generator=generator)
    return x, torch.sin(x[:, :3] * 2)


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        x, y = batch(step)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def adamw(model, decay=0.0):
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, 1e-2, weight_decay=decay)


def factor_modules(model, name):
    module = model.get_base_model().get_submodule(name)
    return {side: getattr(module, f"lora_{side}")["default"] for side in "AB"}


def lora_parameters(model):
    return {n: p for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_a_masked_adapter_trains_as_one_whose_tensors_shrank(options):
    curves, outputs = [], []
    for mode in ("resize", "mask"):
        model = plain(**options)
        optimizer = adamw(model, decay=0.05)
        curve = train(model, optimizer, range(6))
        report = resize(model, RANKS, optimizer, mode=mode)
        assert report.ranks == active_ranks(model) == RANKS
        assert report.parameters == 2 * (8 + 7) + 3 * (7 + 9) + 1 * (9 + 3)
        curve += train(model, optimizer, range(6, 14))
        resize(model, {"first": 4, "last": 3}, optimizer, mode=mode)
        curve += train(model, optimizer, [14])
        curves.append(curve)
        outputs.append(model(batch(99)[0]).detach())
        if mode == "mask":
            assert all(p.shape.count(4) for p in lora_parameters(model).values() if p.ndim == 2)
    # The last step begins from the same function; the new directions then differ.
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-11, atol=0)
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-9)


@settings(max_examples=examples(0.4))
@given(
    walk=st.lists(
        st.tuples(
            st.sampled_from(["resize", "mask"]),
            st.fixed_dictionaries(dict.fromkeys(NAMES, st.integers(0, 6))),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_a_walk_through_both_modes_with_training_between(walk):
    model = plain()
    optimizer = adamw(model, decay=0.05)
    train(model, optimizer, [0])
    for number, (mode, ranks) in enumerate(walk):
        before = deltas(model)
        sizes = {n: len(factor_modules(model, n)["A"].weight) for n in before}
        if mode == "mask":  # up to the tensors' shapes, and only where there are some
            ranks = {n: min(ranks[n], size) for n, size in sizes.items()}
        elif not any(ranks.values()):
            continue
        report = resize(model, ranks, optimizer, mode=mode)
        after = deltas(model)
        zero = torch.zeros((), dtype=torch.float64)
        lost = 0.0
        for name in before.keys() | after.keys():
            delta = before.get(name, zero)
            error = float((after.get(name, zero) - delta).square().sum())
            tail = 0.0
            if delta.ndim:
                tail = float(torch.linalg.svdvals(delta)[ranks[name] :].square().sum())
            energy = float(delta.square().sum())
            assert error == pytest.approx(tail, rel=1e-6, abs=1e-22 * energy + 1e-30)
            lost += error
        assert report.lost == pytest.approx(lost, rel=1e-6, abs=1e-24)
        assert {n: r for n, r in report.ranks.items() if r} == {n: r for n, r in ranks.items() if r}
        trained = {id(p): p for g in optimizer.param_groups for p in g["params"]}
        assert trained.keys() == {id(p) for p in lora_parameters(model).values()}
        for p in trained.values():
            for key, value in optimizer.state.get(p, {}).items():
                assert key == "step" or value.shape == p.shape
        train(model, optimizer, [number + 1])


def test_masked_ranks_are_zero_in_the_function_and_nothing_moves_them():
    model = plain()
    optimizer = adamw(model)
    train(model, optimizer, range(5))
    identities = {n: id(p) for n, p in lora_parameters(model).items()}
    resize(model, RANKS, optimizer, mode="mask")
    before = {}
    for name in NAMES:
        factors = factor_modules(model, name)
        masked = ~factors["A"].rank_mask
        assert int(masked.sum()) == 4 - RANKS[name]
        assert not factors["B"].weight[:, masked].any()
        width = factors["A"].weight.shape[1]
        assert not factors["A"](torch.randn(5, width).double())[:, masked].any()
        before[name] = masked, factors["A"].weight[masked].clone()
    train(model, optimizer, range(5, 12))
    for name, (masked, rows) in before.items():
        factors = factor_modules(model, name)
        assert torch.equal(factors["A"].weight[masked], rows)
        assert not factors["B"].weight[:, masked].any()
        assert not factors["A"].weight.grad[masked].any()
        assert not factors["B"].weight.grad[:, masked].any()
        assert factors["B"].weight.grad[:, ~masked].any()
    assert identities == {n: id(p) for n, p in lora_parameters(model).items()}


def test_weight_decay_moves_a_masked_row_of_a_and_not_the_function():
    model = plain()
    optimizer = adamw(model, decay=0.5)
    train(model, optimizer, range(3))
    resize(model, {"first": 1}, optimizer, mode="mask")
    factors = factor_modules(model, "first")
    masked, before = ~factors["A"].rank_mask, factors["A"].weight.detach().clone()
    train(model, optimizer, [3])
    torch.testing.assert_close(factors["A"].weight[masked], before[masked] * (1 - 0.5 * 1e-2))
    assert not factors["B"].weight[:, masked].any()


def test_ranks_come_back_and_learn_again():
    model = plain()
    optimizer = adamw(model)
    train(model, optimizer, range(5))
    resize(model, RANKS, optimizer, mode="mask")
    train(model, optimizer, range(5, 8))
    x = batch(50)[0]
    before = model(x)
    report = resize(model, {"first": 4, "second": 4, "last": 2}, optimizer, mode="mask")
    assert report.lost == 0.0
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    train(model, optimizer, [8])
    assert factor_modules(model, "first")["B"].weight.any(0).all()
    train(model, optimizer, range(9, 20))
    values = torch.linalg.svdvals(deltas(model)["first"])
    assert float(values[3]) > 1e-4 * float(values[0])
    assert float(torch.linalg.svdvals(deltas(model)["last"])[2]) < 1e-14


def test_directions_of_the_gradient_come_back_where_given():
    model = plain()
    resize(model, {"first": 1}, mode="mask")
    gradient = torch.randn(7, 8, dtype=torch.float64)
    resize(model, {"first": 2}, mode="mask", gradients={"first": gradient})
    factors = factor_modules(model, "first")
    slots = factors["A"].rank_mask.nonzero()[:, 0]
    new = next(i for i in slots if not factors["B"].weight[:, i].any())
    old = next(i for i in slots if i != new)
    rows = factors["A"].weight.detach()
    residual = gradient - gradient @ torch.outer(rows[old], rows[old]) / rows[old].square().sum()
    column = factors["B"].weight.detach()[:, old]
    residual -= torch.outer(column, column @ residual) / column.square().sum()
    cosine = float(rows[new] @ torch.linalg.svd(residual).Vh[0] / rows[new].norm())
    assert abs(cosine) == pytest.approx(1)


def test_rank_0_masks_the_whole_layer():
    model = plain()
    report = resize(model, dict.fromkeys(NAMES, 0), mode="mask")
    assert report.parameters == 0
    assert report.lost == pytest.approx(sum(change.energy for change in report.changes))
    with model.disable_adapter():
        expected = model(batch(1)[0])
    torch.testing.assert_close(model(batch(1)[0]), expected, rtol=0, atol=0)
    assert resize(model, {"first": 2}, mode="mask").ranks == {"first": 2, "second": 0, "last": 0}


def test_what_is_saved_computes_the_same_without_the_mask(tmp_path):
    model = plain()
    resize(model, RANKS, mode="mask")
    with quiet():
        model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    other = loaded(Plain(), tmp_path)
    torch.testing.assert_close(other(batch(1)[0]), model(batch(1)[0]), rtol=1e-13, atol=0)
    assert resize(other, RANKS, mode="mask").lost < 1e-25  # the mask goes on where it was
    torch.testing.assert_close(deltas(other), deltas(model))


def test_mode_resize_takes_the_masked_ranks_out():
    model = plain()
    optimizer = adamw(model)
    train(model, optimizer, range(3))
    resize(model, RANKS, optimizer, mode="mask")
    before = deltas(model)
    report = resize(model, {**RANKS, "last": 2}, optimizer)
    assert report.lost == 0.0
    torch.testing.assert_close(deltas(model), before, rtol=1e-14, atol=1e-14)
    for name, rank in (RANKS | {"last": 2}).items():
        factors = factor_modules(model, name)
        assert type(factors["A"]) is torch.nn.Linear
        assert factors["A"].weight.shape[0] == factors["B"].weight.shape[1] == rank
        assert "rank_mask" not in dict(factors["A"].named_buffers())
    train(model, optimizer, range(3, 6))


def test_hooks_are_refused_where_masked_ranks_are_taken_out():
    model = plain()
    resize(model, RANKS, mode="mask")
    factor_modules(model, "first")["A"].weight.register_hook(lambda g: g)
    with pytest.raises(ValueError, match="'first': expected parameters without gradient hooks"):
        resize(model, RANKS)


def test_copies_and_types_of_a_masked_model():
    model = plain()
    resize(model, RANKS, mode="mask")
    other = copy.deepcopy(model).to(torch.bfloat16)
    factor = factor_modules(other, "first")["A"]
    assert type(factor) is MaskedLinear
    assert factor.rank_mask.dtype == torch.bool
    assert other(batch(1)[0].bfloat16()).dtype == torch.bfloat16
    resize(other, {"first": 4}, mode="mask")
    assert active_ranks(model) == RANKS


def test_convolutions_are_masked_and_what_peft_does_not_call_is_refused():
    model = everything(conv1d=True)
    before = deltas(model)
    resize(model, {"conv": 2, "conv1d": 1}, mode="mask")
    values = torch.linalg.svdvals(before["conv"].flatten(1))
    after = deltas(model)["conv"].flatten(1)
    torch.testing.assert_close(torch.linalg.svdvals(after)[:2], values[:2])
    model(TOKENS).sum().backward()
    factor = factor_modules(model, "conv")
    masked = ~factor["A"].rank_mask
    assert not factor["A"].weight.grad[masked].any()
    assert not factor["B"].weight.grad[:, masked].any()
    assert factor["B"].weight.grad[:, ~masked].any()
    with pytest.raises(ValueError, match=r"'table': expected factors that are modules"):
        resize(model, {"table": 2}, mode="mask")
    with pytest.raises(ValueError, match=r"'experts.plain': expected factors that are modules"):
        resize(everything(), {"experts.plain": 2}, mode="mask")
    with pytest.raises(ValueError, match=r"'conv': expected at most 4 ranks"):
        resize(model, {"conv": 5}, mode="mask")


def test_a_compiled_model_is_not_compiled_again_when_ranks_change():
    torch._dynamo.reset()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    model = plain()
    optimizer = adamw(model)
    compiled = torch.compile(model, backend=backend)
    before = train(compiled, optimizer, range(2))
    resize(compiled, {"first": 3, "second": 4, "last": 3}, optimizer, mode="mask")
    resize(compiled, {"first": 2, "second": 3, "last": 4}, optimizer, mode="mask")
    train(compiled, optimizer, range(2, 4))
    count = len(compilations)
    for ranks in (RANKS, {"first": 4, "second": 0}, {"second": 2}):
        resize(compiled, ranks, optimizer, mode="mask")
        losses = train(compiled, optimizer, range(4, 6))
        torch.testing.assert_close(compiled(batch(9)[0]), model(batch(9)[0]))
    assert len(compilations) == count > 0
    assert losses != before
    torch._dynamo.reset()


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_keep_equal_ranks_and_parameters(tmp_path, mode):
    path = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(WORKER), mode, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    assert one["ranks"] == other["ranks"] == [RANKS, {"first": 4, "second": 2, "last": 3}]
    assert one["parameters"].keys() == other["parameters"].keys()
    for name, value in one["parameters"].items():
        assert torch.equal(value, other["parameters"][name]), name
    assert one["refusals"] == other["refusals"]
    outside = "expected a model outside DistributedDataParallel"
    reasons = [outside, outside] if mode == "ddp" else ["expected a model that is not sharded"]
    expected = ["ranks: expected the same in every process", *reasons]
    for message, part in zip(one["refusals"], expected, strict=True):
        assert part in message

    # The same in one process, on both halves of each batch together.
    model = plain()
    optimizer = adamw(model, decay=0.05)
    losses = train(model, optimizer, range(4))
    resize(model, RANKS, optimizer, mode="mask")
    losses += train(model, optimizer, range(4, 8))
    resize(model, {"first": 4, "second": 2, "last": 3}, optimizer, mode="mask")
    losses += train(model, optimizer, range(8, 12))
    halves = [(a + b) / 2 for a, b in zip(one["losses"], other["losses"], strict=True)]
    torch.testing.assert_close(halves, losses, rtol=1e-9, atol=0)
    for name, p in lora_parameters(model).items():
        torch.testing.assert_close(one["parameters"][name], p.detach(), rtol=1e-7, atol=1e-10)
