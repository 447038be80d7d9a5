"""Singular values fitted anew to what the tuned model predicts."""

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters.ranks import predictions  # noqa: E402
from lorambo_adapters.ranks.adapted_base import AdaptedBase  # noqa: E402
from lorambo_adapters.ranks.calibrated import extract_calibrated  # noqa: E402
from lorambo_adapters.ranks.live_pairs import pairs_of  # noqa: E402
from lorambo_adapters.ranks.predictions import (  # noqa: E402
    Wanted,
    log_probabilities,
    own_predictions,
)
from lorambo_adapters.ranks.refit import CutModel, passes, refitted  # noqa: E402
from lorambo_adapters.ranks.weighted_cut import Fold, WeightedCut  # noqa: E402
from lorambo_adapters.spectra.batches import frozen  # noqa: E402
from tests.adapters import calibrated_models as models  # noqa: E402

TARGETS = r".*(query|value|intermediate\.dense|[qv]_proj|up_proj)"


class Setting:
    """A model that is the tuned one but in some layers, whose differences are cut."""

    def __init__(self, transformers, make, fold=True, batches=None):
        self.base = make(transformers).eval().requires_grad_(False)
        kind = "lm" if make is models.llama else "classes"
        self.batches = models.examples(kind, 4) if batches is None else batches
        self.tuned = models.updated(self.base).eval()
        every = {**self.tuned.state_dict()}
        self.pairs = pairs_of(self.base, self.tuned, TARGETS, None, [])
        names = {f"{pair.before.name}.weight" for pair in self.pairs}
        self.base.load_state_dict({k: v for k, v in every.items() if k not in names}, strict=False)
        self.layers = [pair.before for pair in self.pairs]
        self.folds = {}
        draw = torch.Generator().manual_seed(3)
        for pair in self.pairs:
            if fold and pair.bias is not None:
                mean = torch.randn(pair.before.shape[1], generator=draw, dtype=torch.float64)
                change = pair.difference(torch.float64) @ mean
                self.folds[pair.before.name] = Fold(pair.bias, change, mean)
        biases = {f"{name}.bias": fold.bias for name, fold in self.folds.items()}
        types = {layer.name: torch.float32 for layer in self.layers}
        self.adapted = AdaptedBase(self.base, self.layers, biases, self.folds, types, 1.0)
        self.predict = own_predictions(None)

    def factors(self, rank, share=1.0):
        cuts = {p.before.name: WeightedCut(p.difference(torch.float32)) for p in self.pairs}
        found = {name: cut.factors(rank or len(cut.values)) for name, cut in cuts.items()}
        return {name: (share * u, v) for name, (u, v) in found.items()}

    def refit(self, factors, **options):
        subject = CutModel(
            self.base,
            self.layers,
            self.adapted.cut,
            lambda batch: log_probabilities(self.predict, self.base, batch),
            Wanted(self.predict, self.tuned, self.batches),
            {name: fold.mean for name, fold in self.folds.items()},
        )
        with frozen(self.base), self.adapted:
            found = refitted(subject, factors, self.batches, **options)
            reached = models.divergence(self.tuned, self.base, self.batches)
        return found, reached


@pytest.mark.parametrize("make", [models.bert, models.llama])
@pytest.mark.parametrize("fold", [True, False])
def test_the_right_scale_is_found_again(transformers, make, fold):
    setting = Setting(transformers, make, fold)
    factors = setting.factors(None, 0.6)
    found, reached = setting.refit(factors, steps=6, draws=8, damping=0.1)
    assert found.divergences[-1] < 0.1 * found.divergences[0]
    assert found.divergences[-1] == pytest.approx(reached, rel=1e-3, abs=1e-7)
    assert all(torch.equal(found.factors[name][1], v) for name, (_, v) in factors.items())


@pytest.mark.parametrize("seed", range(4))
def test_on_few_samples_it_never_moves_further_away(transformers, seed):
    few = [{k: v[seed : seed + 2] for k, v in models.examples("classes")[0].items()}]
    setting = Setting(transformers, models.bert, batches=few)
    # Next to no damping, one draw, and more columns than samples: whole steps would be wild.
    found, reached = setting.refit(setting.factors(2), draws=1, damping=1e-6, seed=seed)
    assert found.divergences == sorted(found.divergences, reverse=True)
    assert reached == pytest.approx(found.divergences[-1], rel=1e-3, abs=1e-7)
    assert len(found.divergences) <= 4


def test_no_step_is_taken_where_none_lowers_the_divergence(transformers, monkeypatch):
    setting = Setting(transformers, models.bert)
    factors = setting.factors(1)
    wild = torch.full((sum(u.shape[1] for u, _ in factors.values()),), 1e4)
    monkeypatch.setattr("lorambo_adapters.ranks.refit._step", lambda *_: wild.double())
    found, _ = setting.refit(factors)
    assert len(found.divergences) == 1
    assert all(torch.equal(found.factors[name][0], u) for name, (u, _) in factors.items())


def test_no_column_changes_by_more_than_is_allowed(transformers):
    setting = Setting(transformers, models.bert)
    factors = setting.factors(2)
    found, _ = setting.refit(factors, steps=2, largest_change=0.1)
    assert len(found.divergences) == 3
    for name, (u, _) in factors.items():
        ratio = found.factors[name][0].norm(dim=0) / u.norm(dim=0)
        assert float((ratio.log()).abs().max()) <= -2 * math.log(0.9) + 1e-6
    free, _ = setting.refit(factors, steps=2)
    assert free.divergences[-1] < found.divergences[-1]


def test_the_step_is_newtons_on_all_layers_together(transformers, monkeypatch):
    from lorambo_adapters.ranks import refit

    setting = Setting(transformers, models.bert, batches=models.examples("classes", 1))
    factors = setting.factors(1)
    taken = []
    own = refit._step

    def step(*args):
        taken.append(own(*args))
        return taken[-1]

    monkeypatch.setattr(refit, "_step", step)
    setting.refit(factors, steps=1, draws=200, damping=0.5)
    # Worked out by autograd: the columns' scales are parameters, labels are not drawn.
    scales = torch.ones(len(factors), requires_grad=True)
    sums = torch.zeros(len(factors), dtype=torch.float64)
    fisher = torch.zeros(len(factors), len(factors), dtype=torch.float64)
    handles = []
    with setting.adapted, frozen(setting.base):
        setting.adapted.cut(factors)
        for i, (layer, (u, v)) in enumerate(zip(setting.layers, factors.values(), strict=True)):
            sides = u.float(), v.float(), setting.folds[layer.name].mean.float()

            def scaled(module, args, output, i=i, sides=sides):
                u, v, mean = sides
                return output + (scales[i] - 1) * ((args[0] - mean) @ v) @ u.T

            handles.append(layer.module.register_forward_hook(scaled))
        for batch in setting.batches:
            wanted = log_probabilities(setting.predict, setting.tuned, batch).exp()
            now = log_probabilities(setting.predict, setting.base, batch)
            for p, q in zip(wanted, now, strict=True):
                sums += torch.autograd.grad(-(p * q).sum(), scales, retain_graph=True)[0].double()
                for label in range(3):
                    g = torch.autograd.grad(-q[label], scales, retain_graph=True)[0].double()
                    fisher += float(q[label].detach().exp()) * torch.outer(g, g)
        for handle in handles:
            handle.remove()
    fisher += 0.5 * torch.diag(fisher.diagonal())
    wanted = torch.linalg.solve(fisher, -sums)
    # There labels are drawn, so that the two are near and not equal.
    cosine = torch.nn.functional.cosine_similarity(taken[0], wanted, dim=0)
    assert float(cosine) > 0.99
    assert float(taken[0].norm() / wanted.norm()) == pytest.approx(1, abs=0.1)


class MeanPool(torch.nn.Module):
    """Averages over all tokens, padding too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(40, 8)
        self.first, self.last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None):
        return self.last(torch.tanh(self.first(self.table(input_ids))).mean(1))


def test_the_slope_is_that_of_the_divergence_where_padding_counts(monkeypatch):
    from lorambo_adapters.ranks import refit

    base = MeanPool().double()
    tuned, batches = models.updated(base, 1.0), models.examples("classes", labelled=False)
    for batch in batches:
        batch["attention_mask"][:, 3:] = 0
    found = {}

    def step(subject, factors, batches, *rest):
        def divergence(name, change):
            u, v = factors[name]
            subject.cut({**factors, name: (u * (1 + change), v)})
            return refit._divergence(subject, batches, lambda *_: None)

        for name in factors:
            up, down = (divergence(name, change) for change in (1e-4, -1e-4))
            found[name] = (up[0] - down[0]) / 2e-4 * up[1]
        subject.cut(factors)
        solve = torch.linalg.solve
        with monkeypatch.context() as patched:
            patched.setattr(torch.linalg, "solve", lambda c, b: found.update(b=-b) or solve(c, b))
            return own(subject, factors, batches, *rest)

    own = refit._step
    monkeypatch.setattr(refit, "_step", step)
    extract_calibrated(
        base, tuned, batches, "uniform:1", predict=lambda m, b: m(**b), fisher="true",
        targets=["first", "last"], min_rank=1, refit=1,
    )  # fmt: skip
    assert found["b"].tolist() == pytest.approx([found["first"], found["last"]], rel=1e-5)


def test_predictions_beyond_what_is_kept_are_computed_anew(transformers, monkeypatch):
    setting = Setting(transformers, models.llama)
    wanted = Wanted(setting.predict, setting.tuned, setting.batches)
    first = wanted(0)
    assert wanted(0) is first
    monkeypatch.setattr(predictions, "_KEPT", first.nbytes)
    second = Wanted(setting.predict, setting.tuned, setting.batches)
    assert second(0) is second(0)
    assert second(1) is not second(1)
    assert torch.equal(second(1), wanted(1))


def test_what_counts_of_the_predictions(transformers):
    lm, classes = models.llama(transformers).eval(), models.bert(transformers).eval()
    own = own_predictions(None)
    batch = models.examples("lm")[0]
    found = log_probabilities(own, lm, batch)
    torch.testing.assert_close(found.double(), models.log_probabilities(lm, batch))
    assert len(found) == int((batch["labels"][:, 1:] != -100).sum())
    unlabelled = {k: v for k, v in batch.items() if k != "labels"}
    assert len(log_probabilities(own, lm, unlabelled)) == int(batch["attention_mask"].sum())
    assert log_probabilities(own, classes, models.examples("classes")[0]).shape == (8, 3)
    assert passes(3) == 16


def test_predictions_that_cannot_be_compared_are_refused(transformers):
    model = models.bert(transformers, num_labels=1).eval()
    batch = {k: v for k, v in models.examples("classes")[0].items() if k != "labels"}
    with pytest.raises(ValueError, match=r"logits of at least two classes.*got \(8, 1\)"):
        log_probabilities(own_predictions(None), model, batch)
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="expected a model that returns logits, got none"):
        log_probabilities(own_predictions(None), plain, {"input": torch.ones(1, 2)})
    with pytest.raises(ValueError, match=r"mask of shape \(8,\), got \(3,\)"):
        log_probabilities(lambda *_: (torch.ones(8, 2), torch.ones(3)), plain, {})
    setting = Setting(transformers, models.bert)
    setting.predict = lambda model, batch: math.nan * model(**batch).logits
    with pytest.raises(ValueError, match="expected finite predictions of both models, got KL nan"):
        setting.refit(setting.factors(1))
