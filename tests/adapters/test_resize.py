"""Live resizing: what the model computes, what is reported, and what is saved."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
peft = pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

from lorambo_adapters.ranks.growth import new_rows  # noqa: E402  (needs torch)
from lorambo_adapters.ranks.resize import resize  # noqa: E402
from tests.adapters.resize_models import (  # noqa: E402
    assert_same,
    deltas,
    everything,
    everything_that_counts,
    plain,
)
from tests.strategies import examples  # noqa: E402

EXPERTS = [f"experts.stack.{i}" for i in range(3)]
OTHERS = ["table", "conv", "linear", "conv1d", "experts.plain"]
TOKENS = torch.arange(8).view(2, 4) % 11


def ranks_of(conv1d, experts, others) -> Any:
    """Ranks for `everything`; `others` a number, or a mapping with all of OTHERS."""
    given = dict.fromkeys(OTHERS, others) if isinstance(others, int) else others
    if conv1d:
        return {name: given[name] for name in OTHERS if name != "experts.plain"}
    return {name: given[name] for name in OTHERS} | dict.fromkeys(EXPERTS, experts)


def matrices(model):
    """s B A as matrices, an expert each; of a Conv1D as PEFT has it, transposed."""
    return {
        f"{name}.{i}" if many else name: matrix.flatten(1)
        for name, delta in deltas(model).items()
        for many in [name == "experts.stack"]
        for i, matrix in enumerate(delta if many else [delta])
    }


def inputs(seed=3):
    return torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@st.composite
def walks(draw):
    rank = st.integers(1, 9)
    step = st.fixed_dictionaries({name: rank for name in OTHERS} | {"experts": rank})
    return draw(st.lists(step, min_size=1, max_size=4))


@settings(max_examples=examples(0.4))
@given(walk=walks(), rslora=st.booleans(), conv1d=st.booleans())
def test_a_walk_changes_the_function_by_the_truncation_it_reports(walk, rslora, conv1d):
    model = everything(conv1d=conv1d, use_rslora=rslora)
    for step in walk:
        ranks = ranks_of(conv1d, step["experts"], step)
        before, output = matrices(model), model(TOKENS)
        report = resize(model, ranks)
        after = matrices(model)
        assert report.ranks == ranks
        assert report.parameters == sum(
            p.numel() for n, p in model.named_parameters() if "lora_" in n
        )
        best = {
            name: torch.linalg.svdvals(matrix)[ranks[name] :].square().sum()
            for name, matrix in before.items()
        }
        for name, matrix in before.items():
            scale = matrix.norm()
            distance = (after[name] - matrix).norm()
            assert distance <= best[name].sqrt() + 1e-13 * scale
            assert torch.linalg.matrix_rank(after[name], atol=1e-11 * scale) <= ranks[name]
        for part in model.modules():  # what modules say of their shapes is so
            for end, axis in (("out", 0), ("in", 1)):
                size = getattr(part, f"{end}_features", getattr(part, f"{end}_channels", None))
                if size is not None and type(part) in (torch.nn.Linear, torch.nn.Conv2d):
                    assert part.weight.shape[axis] == size
        for change in report.changes:
            names = EXPERTS if change.name == "experts.stack" else [change.name]
            lost = sum(float((after[n] - before[n]).square().sum()) for n in names)
            energy = sum(float(before[n].square().sum()) for n in names)
            assert change.lost == pytest.approx(lost, rel=1e-6, abs=1e-24 * energy)
            assert change.energy == pytest.approx(energy, rel=1e-9)
            if change.after >= change.before:
                assert change.lost == 0.0
        if not report.lost:
            torch.testing.assert_close(model(TOKENS), output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("conv1d", [False, True])
def test_growing_leaves_the_old_directions_bit_for_bit(conv1d):
    model = everything(conv1d=conv1d, use_rslora=conv1d)
    old = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    scales = {n: m.scaling["default"] for n, m in model.named_modules() if hasattr(m, "scaling")}
    output = model(TOKENS)
    report = resize(model, ranks_of(conv1d, 6, 7))
    assert report.lost == 0.0
    new = {n: p for n, p in model.named_parameters() if "lora_" in n}
    for name, tensor in old.items():
        part = new[name]
        for axis, size in enumerate(tensor.shape):
            part = part.narrow(axis, 0, size)
        if "experts" not in name:  # PEFT lays experts out otherwise; the walk checks these
            assert torch.equal(part, tensor), name
    for name, module in model.named_modules():
        if hasattr(module, "scaling"):
            assert module.scaling["default"] == scales[name]
    torch.testing.assert_close(model(TOKENS), output, rtol=1e-13, atol=1e-13)


def test_a_resize_to_the_same_ranks_changes_nothing():
    model = everything()
    before = everything_that_counts(model)
    report = resize(model, ranks_of(False, 4, 4))
    assert report.changes == ()
    assert_same(before, everything_that_counts(model))


@pytest.mark.parametrize("diagonal", [False, True])
def test_truncation_is_the_best_one_in_the_curvature(diagonal):
    model = plain()
    torch.manual_seed(5)
    ranks = {"first": 2, "second": 1, "last": 2}
    sizes = {"first": (7, 8), "second": (9, 7), "last": (3, 9)}
    curvature = {}
    for name, (d, k) in sizes.items():
        left, right = (torch.randn(n, n, dtype=torch.float64) for n in (d, k))
        sides = [(m @ m.T) for m in (right, left)]
        curvature[name] = tuple(s.diagonal().clone() if diagonal else s for s in sides)
    before = deltas(model)
    report = resize(model, ranks, curvature=curvature)
    after = deltas(model)
    for change in report.changes:
        a, b = (m.diag() if diagonal else m for m in curvature[change.name])
        roots = []
        for matrix in (b, a):
            values, vectors = torch.linalg.eigh(matrix)
            roots.append((vectors * values.clamp(min=0).sqrt()) @ vectors.T)
        weighted = roots[0] @ before[change.name] @ roots[1]
        tail = torch.linalg.svdvals(weighted)[ranks[change.name] :].square().sum()
        error = roots[0] @ (after[change.name] - before[change.name]) @ roots[1]
        assert float(error.square().sum()) == pytest.approx(float(tail), rel=1e-7)
        assert change.lost_in_loss == pytest.approx(0.5 * float(tail), rel=1e-7)
    assert report.lost_in_loss == pytest.approx(sum(c.lost_in_loss or 0.0 for c in report.changes))


def test_curvature_that_sees_nothing_of_a_direction_still_keeps_the_larger_one():
    model = plain()
    curvature = {"first": (torch.zeros(8), None), "second": (torch.zeros(7), torch.zeros(9))}
    curvature["last"] = (None, torch.zeros(3))
    before = deltas(model)
    resize(model, dict.fromkeys(curvature, 2), curvature=curvature)
    for name, delta in deltas(model).items():
        values = torch.linalg.svdvals(before[name])
        torch.testing.assert_close(torch.linalg.svdvals(delta)[:2], values[:2])


def test_new_directions_are_those_of_the_gradient_outside_the_adapter():
    model = plain()
    x = inputs()
    # The gradient with respect to W + s B A, from the base weights as they get the same.
    bases = {n: m.base_layer.weight.requires_grad_(True) for n, m in layers(model).items()}
    (model(x).square().sum()).backward()
    gradients = {n: w.grad.clone() for n, w in bases.items()}
    old = {n: (factors(m)) for n, m in layers(model).items()}
    resize(model, dict.fromkeys(gradients, 6), gradients=gradients)
    for name, module in layers(model).items():
        (left, right), (new_left, new_right) = old[name], factors(module)
        p_b = left @ torch.linalg.pinv(left)
        p_a = torch.linalg.pinv(right) @ right
        eye_b, eye_a = (torch.eye(len(p), dtype=torch.float64) for p in (p_b, p_a))
        residual = (eye_b - p_b) @ gradients[name] @ (eye_a - p_a)
        _, values, vt = torch.linalg.svd(residual)
        count = min(2, int((values > 1e-9 * values[0]).sum())) if values[0] > 1e-12 else 0
        assert not new_left[:, 4:].any()
        for i in range(count):
            row = new_right[4 + i]
            assert abs(float(row @ vt[i])) == pytest.approx(float(row.norm()), rel=1e-9)
            mean = float(right.norm(dim=1).mean())
            assert float(row.norm()) == pytest.approx(mean, rel=1e-12)
        if name == "first":
            assert count == 2


def test_directions_may_be_given_instead_of_gradients():
    model = plain(random=False)
    v = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64)).Q
    resize(model, {"first": 5}, gradients={"first": (torch.zeros(7, 3), v)})
    _, right = factors(layers(model)["first"])
    old = right[:4]
    left_over = v[:, 0] - torch.linalg.pinv(old) @ (old @ v[:, 0])
    cosine = float(right[4] @ left_over / right[4].norm() / left_over.norm())
    assert cosine == pytest.approx(1, rel=1e-12)


def test_peft_initialises_new_directions_where_asked():
    model = plain(random=False)
    torch.manual_seed(0)
    resize(model, {"first": 400, "second": 5})
    _, right = factors(layers(model)["first"])
    bound = 1 / math.sqrt(8)
    assert right[4:].abs().max() < bound
    assert float(right[4:].std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    with pytest.raises(ValueError, match=r"gradients: layer 'last' gains ranks and is missing"):
        resize(model, {"last": 6}, new_directions="gradient", gradients={})


def layers(model):
    found = model.get_base_model().named_modules()
    return {n: m for n, m in found if hasattr(m, "lora_A") and "default" in m.scaling}


def factors(module):
    left = module.lora_B["default"].weight.detach().clone()
    return left, module.lora_A["default"].weight.detach().clone()


def test_gradients_of_embeddings_convolutions_and_experts():
    model = everything()
    before = model(TOKENS)
    gradients = {
        "table": torch.randn(8, 11, dtype=torch.float64),
        "conv": torch.randn(3, 6, dtype=torch.float64),
        **{name: torch.randn(5, 6, dtype=torch.float64) for name in EXPERTS},
    }
    resize(model, dict.fromkeys(gradients, 5), gradients=gradients)
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-12, atol=1e-12)
    base = model.get_base_model()
    left = base.table.lora_embedding_B["default"].detach()
    right = base.table.lora_embedding_A["default"].detach()
    assert not right[4].any()
    residual = (
        gradients["table"] - left[:, :4] @ torch.linalg.pinv(left[:, :4]) @ gradients["table"]
    )
    residual -= residual @ torch.linalg.pinv(right[:4]) @ right[:4]
    cosine = left[:, 4] @ torch.linalg.svd(residual).U[:, 0] / left[:, 4].norm()
    assert abs(float(cosine)) == pytest.approx(1)
    # The convolution's 3 outputs are in the span of 4 directions, so PEFT's own are left.
    rows = base.conv.lora_A["default"].weight.detach().flatten(1)
    assert rows[4].abs().max() <= 1 / math.sqrt(6)
    wrapper = base.experts.base_layer if base.experts.parameter_name != "stack" else base.experts
    rows = wrapper.lora_A["default"].weight.detach().view(3, 5, 6)
    columns = wrapper.lora_B["default"].weight.detach().view(5, 5, 3)
    for expert, name in enumerate(EXPERTS):
        b, a = columns[:, :4, expert], rows[expert, :4]
        residual = gradients[name] - b @ torch.linalg.pinv(b) @ gradients[name]
        residual -= residual @ torch.linalg.pinv(a) @ a
        new = rows[expert, 4]
        assert abs(float(new @ torch.linalg.svd(residual).Vh[0] / new.norm())) == pytest.approx(1)
        assert not columns[:, 4, expert].any()


def test_directions_of_a_large_gradient():
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 40).double()).Q for n in (600, 560))
    gradient = (u * 0.5 ** torch.arange(40)) @ v.T
    rows = new_rows(3, torch.zeros(600, 2), torch.zeros(2, 560), gradient=gradient)
    torch.testing.assert_close((rows @ v[:, :3]).abs(), torch.eye(3).double() / math.sqrt(3))
    torch.testing.assert_close(rows, rows @ v[:, :3] @ v[:, :3].T, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (torch.zeros(8, 7), r"'first': expected a gradient of shape \(7, 8\), got \(8, 7\)"),
        (torch.full((7, 8), torch.nan), r"'first': expected a finite gradient"),
        ((torch.zeros(7, 2), torch.zeros(7, 2)), r"'first': expected a gradient of shape"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(gradient, message):
    model = plain()
    with pytest.raises(ValueError, match=message):
        resize(model, {"first": 6}, gradients={"first": gradient})
    with pytest.raises(ValueError, match="layer 'first' is missing"):
        resize(model, {"first": 2, "second": 2}, curvature={"second": (None, None)})
