"""What extraction by examples refuses before its long part, and what it warns of after it."""

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters.ranks import calibrated, calibrated_cuts  # noqa: E402
from lorambo_adapters.ranks.calibrated import extract_calibrated  # noqa: E402
from tests.adapters import calibrated_models as models  # noqa: E402


def small(samples=32, offset=0.0):
    """Two networks, what else their extraction takes, and a batch whose inputs have a mean."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    with torch.no_grad():
        base[0].weight /= 1 + offset
    options = {"targets": ["0", "2"], "fisher": "true", "predict": lambda m, b: m(b["x"])}
    x = torch.randn(samples, 6) + offset
    return (base, models.updated(base, 1.0 / (1 + offset)), [{"x": x}], "uniform:1"), options


@pytest.mark.parametrize("samples", [5, 6])
def test_few_predictions_are_warned_of(samples):
    args, options = small(samples)
    options["min_rank"] = 1
    if samples < 6:
        with pytest.warns(UserWarning, match="2 singular values are refitted to 5") as caught:
            lora = extract_calibrated(*args, **options)
        assert caught[0].filename == __file__
    else:
        lora = extract_calibrated(*args, **options)
    assert lora.predictions == samples
    # Without a refit there is nothing to warn of.
    assert extract_calibrated(*args, **options, refit=0).predictions == 0


def test_the_tokens_of_a_text_are_predictions(transformers):
    base = models.llama(transformers)
    batches = models.examples("lm", 2)
    lora = extract_calibrated(base, models.updated(base), batches, "uniform:1")
    assert lora.predictions == sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)


def test_the_summary_says_of_what_its_numbers_are():
    args, options = small()
    text = extract_calibrated(*args, **options).summary()
    assert "on the 32 predictions that they were fitted to" in text
    assert "the energy is that of a plain cut" in text
    assert "fitted" not in extract_calibrated(*args, **options, refit=0).summary()


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_no_damping(offset):
    args, options = small(256, offset)
    lora = extract_calibrated(*args, **options, damping=0, min_rank=1)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in lora.tensors.values())
    assert lora.divergences[-1] <= lora.divergences[0]


def test_a_moment_that_is_not_positive_is_named(monkeypatch):
    own = calibrated_cuts.centred_sums

    def broken(*args, **options):
        sums = own(*args, **options)
        sums.left["2"] -= 2 * torch.eye(4) * sums.left["2"].diagonal().max()
        return sums

    monkeypatch.setattr(calibrated_cuts, "centred_sums", broken)
    args, options = small()
    with pytest.raises(ValueError, match=r"layer '2': .*positive definite with damping 0.25"):
        extract_calibrated(*args, **options, damping=0.25, min_rank=1)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("dtype", "bfloat16", "dtype: expected a floating-point torch.dtype.*got 'bfloat16'"),
        ("dtype", torch.int8, "dtype: expected a floating-point torch.dtype.*got torch.int8"),
        ("dtype", torch.float8_e5m2, "of 16 bits or more, got torch.float8_e5m2"),
        ("scale", "1", "scale: expected a finite number that is not 0, got '1'"),
        ("scale", True, "scale: expected a finite number that is not 0, got True"),
        ("damping", "0", "damping: expected a finite number >= 0, got '0'"),
    ],
)
def test_numbers_of_another_kind_are_refused_first(option, value, message):
    nothing: Any = None
    with pytest.raises(ValueError, match=message):
        extract_calibrated(nothing, nothing, nothing, "uniform:1", **{option: value})


def test_a_configuration_that_peft_would_refuse_costs_no_pass(monkeypatch):
    def refuse(*args, **options):
        raise ValueError("no such targets")

    monkeypatch.setattr(calibrated, "extracted_entries", refuse)
    monkeypatch.setattr(calibrated, "cut_layers", lambda *args, **options: pytest.fail("a pass"))
    args, options = small()
    with pytest.raises(ValueError, match="no such targets"):
        extract_calibrated(*args, **options)
