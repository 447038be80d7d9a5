"""The result: a mapping with a certificate, a table, and a file."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings

from lorambo_alloc import Allocation, GainCurves, Spectra, allocate, log, schatten, uniform_rank
from lorambo_alloc.caps import Cap
from lorambo_alloc.testing import Instance
from tests.checks import check_answer
from tests.strategies import capped, examples, instances

SPECTRA = {"q": [3.0, 2.0, 1.0], "v": [2.5, 0.5]}


@pytest.fixture
def allocation() -> Allocation:
    return allocate(SPECTRA, 44, costs={"q": 16, "v": 12})


class TestMapping:
    def test_reads_like_a_dict(self, allocation):
        assert dict(allocation) == {"q": 2, "v": 1}
        assert list(allocation) == ["q", "v"]
        assert len(allocation) == 2
        assert type(allocation["q"]) is int
        assert "z" not in allocation
        with pytest.raises(KeyError):
            allocation["z"]

    def test_figures(self, allocation):
        assert allocation.ranks.tolist() == [2, 1]
        assert allocation.ranks.dtype == np.int64
        assert (allocation.cost, allocation.budget) == (44, 44)
        assert allocation.value == allocation.certificate.value == 9 + 4 + 6.25
        assert allocation.captured == pytest.approx(19.25 / 20.5)

    def test_ranks_cannot_be_written(self, allocation):
        with pytest.raises(ValueError, match="read-only"):
            allocation.ranks[0] = 1

    def test_a_certificate_cannot_be_written(self, allocation):
        with pytest.raises(dataclasses.FrozenInstanceError):
            allocation.certificate.value = 1e9


class TestCaptured:
    def test_counts_only_what_the_limits_allow(self):
        assert allocate(SPECTRA, 2, max_rank=1).captured == 1.0
        assert allocate(SPECTRA, 1, max_rank=1).captured == 9 / 15.25

    @pytest.mark.parametrize("keywords", [{}, {"objective": "operator"}, {"multiple_of": 2}])
    def test_of_nothing_is_all(self, keywords):
        assert allocate({"a": [0.0, 0.0]}, 1, **keywords).captured == 1.0
        assert allocate({}, 1, **keywords).captured == 1.0

    def test_of_the_operator_norm_is_the_share_of_the_way(self):
        spectra = {"a": [4.0, 3.0, 1.0]}
        found = [allocate(spectra, b, objective="operator").captured for b in range(4)]
        assert found == [0.0, 0.25, 0.75, 1.0]
        limited = allocate(spectra, 1, objective="operator", max_rank=2)
        assert limited.captured == pytest.approx(1 / 3)

    def test_is_never_above_1(self):
        for seed in range(20):
            values = np.sort(np.random.default_rng(seed).random(50))[::-1]
            assert allocate({"a": values}, 50).captured <= 1.0

    def test_negative_gains(self):
        curves = GainCurves.from_increments({"a": [4.0, -3.0], "b": [-1.0]})
        assert allocate(curves, 3).captured == 1.0
        assert allocate(curves, 3, min_rank={"a": 2}).captured == 1.0
        assert allocate(curves, 3, min_rank=1).captured == 1.0


def table_of(allocation: Allocation) -> tuple[str, list[str], str]:
    """Head, rows and foot of the table; the rules between them are as wide as the rows."""
    lines = repr(allocation).splitlines()
    rules = [n for n, line in enumerate(lines) if set(line) == {"-"}]
    assert len(rules) == 2
    assert rules[0] == 1
    assert len({len(line) for line in lines[: rules[1] + 1]}) == 1
    return lines[0], lines[2 : rules[1]], "\n".join(lines[rules[1] + 1 :])


class TestTable:
    def test_columns_and_totals(self, allocation):
        head, rows, foot = table_of(allocation)
        assert head.split() == ["layer", "rank", "of", "captured", "cost"]
        assert rows[0].split() == ["q", "2", "3", "92.9%", "32"]
        assert rows[1].split() == ["v", "1", "2", "96.2%", "12"]
        assert len(rows) == 2
        for fact in (
            "2, ranks 1 to 2, 3 in all",
            "objective frobenius",
            "value 19.25",
            "44 of 44 (100.00%)",
            "93.90% of the attainable gain",
            "gain per unit of cost",
            "optimal exact",
            allocation.certificate.method,
            f"{allocation.certificate.price:.4g}",
        ):
            assert fact in foot

    def test_numbers_stand_below_each_other(self):
        head, rows, _ = table_of(allocate({"a": [1.0] * 12, "b": [1.0]}, 12, costs=[1, 1000]))
        assert all(row[len(head) - 1].isdigit() for row in rows)
        end = head.index("rank") + len("rank")
        assert [row[:end].split()[1] for row in rows] == ["12", "0"]

    def test_big_numbers_are_grouped(self):
        _, rows, foot = table_of(allocate(SPECTRA, 10**7, costs={"q": 10**6, "v": 2 * 10**6}))
        assert rows[0].endswith(" 3,000,000")
        assert "7,000,000 of 10,000,000 (70.00%)" in foot

    def test_long_names_move_the_columns(self):
        _, rows, _ = table_of(allocate({"model.layers.0.self_attn.q_proj": [1.0], "b": [1.0]}, 1))
        assert len(rows) == 2

    @pytest.mark.parametrize("layers", [1, 24, 48, 49, 50, 700])
    def test_is_short_for_hundreds_of_layers(self, layers):
        allocation = allocate(np.arange(3.0, 0, -1) * np.ones((layers, 1)), layers)
        _, rows, foot = table_of(allocation)
        left_out = [row for row in rows if row.startswith("...")]
        names = [int(row.split()[0]) for row in rows if row not in left_out]
        if left_out:
            half = len(names) // 2
            assert names == [*range(half), *range(layers - half, layers)]
            assert left_out == [rows[half]]
            assert rows[half].rstrip() == f"... {layers - len(names)} more"
            assert len(repr(allocation).splitlines()) < 60
        else:
            assert names == list(range(layers))
        assert bool(left_out) == (layers > 48)
        assert f"{layers}, ranks 1 to 1, {layers} in all" in foot

    def test_a_gap_is_told(self):
        curves = GainCurves({"a": [0.0, 6.0], "b": [0.0, 5.0], "c": [0.0, 5.0]})
        allocation = allocate(curves, 10, costs=[6, 5, 5], method="water_filling", min_rank=0)
        certificate = allocation.certificate
        table = repr(allocation)
        if certificate.gap:
            assert f"relative gap at most {certificate.relative_gap:.1e}" in table
        else:
            assert "gap" not in table
        stopped = dataclasses.replace(certificate, status="gap_certified", gap=0.5)
        told = repr(Allocation(allocation.problem, allocation.ranks, stopped))
        assert f"gap certified, relative gap at most {stopped.relative_gap:.1e}" in told

    def test_nothing_at_all(self):
        _, rows, foot = table_of(allocate({}, 0))
        assert rows == []
        assert "0, ranks none" in foot
        assert "0 of 0 (all)" in foot

    def test_layers_that_have_nothing_to_capture(self):
        _, rows, _ = table_of(allocate({"a": [0.0]}, 1))
        assert rows[0].split()[:4] == ["a", "0", "1", "-"]

    def test_operator_has_no_shares(self):
        _, rows, foot = table_of(allocate(SPECTRA, 2, objective="operator"))
        assert rows[0].split() == ["q", "1", "3", "-", "1"]
        assert "objective operator" in foot

    def test_gain_curves_have_one_rank_less_than_points(self):
        _, rows, _ = table_of(allocate(GainCurves({"a": [0.0, 1.0, 2.0]}), 1))
        assert rows[0].split() == ["a", "1", "2", "50.0%", "1"]


class TestFiles:
    def same(self, a: Allocation, b: Allocation) -> None:
        assert list(a) == list(b)
        assert a.ranks.tolist() == b.ranks.tolist()
        assert a.certificate == b.certificate
        assert (a.cost, a.budget, a.captured) == (b.cost, b.budget, b.captured)
        assert repr(a) == repr(b)
        one, other = a.problem, b.problem
        assert one.objective == other.objective
        assert one.tied == other.tied
        assert one.costs.tolist() == other.costs.tolist()
        assert one.fixed_costs.tolist() == other.fixed_costs.tolist()
        for i in range(len(a)):
            assert one.allowed_ranks(i).tolist() == other.allowed_ranks(i).tolist()
        assert type(one.curves) is type(other.curves)
        for name in a:
            assert one.curves[name].tolist() == other.curves[name].tolist()
        if one.objective.kind != "operator":
            assert one.value_of(a.ranks) == other.value_of(b.ranks)
        check_answer(b)

    @given(instances())
    @settings(max_examples=examples(0.5))
    def test_round_trip(self, tmp_path_factory, instance: Instance):
        path = tmp_path_factory.mktemp("allocation") / "file.npz"
        allocation = instance.allocate(time_limit=0.0)
        allocation.save(path)
        self.same(allocation, Allocation.load(path))

    @pytest.mark.parametrize(
        ("spectra", "keywords"),
        [
            (SPECTRA, {"objective": "operator", "weights": [0.5, 2.0]}),
            (SPECTRA, {"objective": log(0.1)}),
            (SPECTRA, {"objective": schatten(1 / 3)}),
            (SPECTRA, {"tied": [["v", "q"]], "allowed_ranks": {"q": [0, 2]}}),
            (SPECTRA, {"fixed_costs": [1, 0], "min_rank": {"q": 1}, "max_rank": 2}),
            (SPECTRA, {"multiple_of": 2}),
            (np.array([[2.0, 1.0], [1.5, 1.0]], dtype=np.float32), {}),
            (GainCurves({"a": [0.0, 2.0**-60, 1.0], "b": [0.0]}), {}),
            (GainCurves.from_increments({"a": [2.0**-60, 1.0]}), {}),
            (GainCurves({}), {}),
            ({}, {}),
            ([], {"objective": "operator"}),
        ],
    )
    def test_every_kind(self, tmp_path, spectra, keywords):
        allocation = allocate(spectra, 3, **keywords)
        allocation.save(tmp_path / "file.npz")
        self.same(allocation, Allocation.load(tmp_path / "file.npz"))

    def test_what_spectra_carry(self, tmp_path):
        spectra = Spectra(
            SPECTRA, shapes={"q": (3, 9), "v": (8, 4)}, source="by hand", unresolved={"v": 0.25}
        )
        allocate(spectra, uniform_rank(1)).save(tmp_path / "file.npz")
        again = Allocation.load(tmp_path / "file.npz").problem
        assert isinstance(again.curves, Spectra)
        assert again.curves.shapes == spectra.shapes
        assert again.curves.source == "by hand"
        assert again.curves.unresolved == spectra.unresolved
        assert (again.costs.tolist(), again.budget) == ([12, 12], 24)

    def test_a_budget_beyond_64_bits(self, tmp_path):
        allocate(SPECTRA, 10**40).save(tmp_path / "file.npz")
        assert Allocation.load(tmp_path / "file.npz").budget == 10**40

    def test_a_cut_survives(self, tmp_path, allocation):
        certificate = dataclasses.replace(allocation.certificate, cut=(0.1, 1 / 3))
        cut = Allocation(allocation.problem, allocation.ranks, certificate)
        cut.save(tmp_path / "file.npz")
        assert Allocation.load(tmp_path / "file.npz").certificate == certificate

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"ranks": np.array([3, 1])}, "the ranks cost 60, more than the budget 44"),
            ({"ranks": np.array([9, 0])}, "layer 'q': rank 9 is not allowed"),
            ({"ranks": np.array([2])}, "expected 2 whole numbers"),
            ({"ranks": np.array([2.0, 1.0])}, "expected 2 whole numbers"),
            ({"ranks": None}, "ranks"),
            ({"costs": np.array([0, 12])}, "costs: layer 'q': expected a whole number >= 1, got 0"),
            ({"costs": np.array([16])}, "costs: expected 2 values, got 1"),
            ({"costs": None}, "costs"),
            ({"lower": np.array([3, 0])}, "smallest feasible budget"),
            ({"upper": np.array([3])}, "zip"),
            ({"values": np.array([1.0, 2.0, 1.0, 2.5, 0.5])}, "layer 'q'.*descending order"),
            ({"offsets": np.array([0, 5])}, "zip"),
            ({"header.names": ["q", "q"]}, "a layer name appears twice"),
            ({"header.names": None}, "names"),
            ({"header.budget": -1}, "budget"),
            ({"header.budget": None}, "budget"),
            ({"header.objective": ["foo", 0.0]}, "unknown kind 'foo'"),
            ({"header.objective": ["power"]}, ""),
            ({"header.tied": [["q", "z"]]}, "tied: layer 'z'"),
            ({"header.multiple_of": 0}, "multiple_of"),
            ({"header.certificate": {"status": "optimal_exact"}}, ""),
            ({"header.certificate": None}, "certificate"),
        ],
    )
    def test_loading_validates(self, tmp_path, allocation, tampered, change, expected):
        allocation.save(tmp_path / "file.npz")
        assert Allocation.load(tampered(tmp_path / "file.npz")).ranks.tolist() == [2, 1]
        with pytest.raises(ValueError, match=f"tampered.npz: the file is damaged: .*{expected}"):
            Allocation.load(tampered(tmp_path / "file.npz", **change))

    def test_a_certificate_in_a_file_is_not_believed(self, tmp_path, allocation, tampered):
        allocation.save(tmp_path / "file.npz")
        claim = dataclasses.asdict(allocation.certificate) | {"value": 20.0, "upper_bound": 20.0}
        again = Allocation.load(tampered(tmp_path / "file.npz", **{"header.certificate": claim}))
        with pytest.raises(ValueError, match=r"the certificate claims 20.0"):
            again.certificate.verify(again.problem, again.ranks)

    def test_a_newer_file(self, tmp_path, allocation, tampered):
        allocation.save(tmp_path / "file.npz")
        newer = tampered(tmp_path / "file.npz", **{"header.version": 2})
        with pytest.raises(ValueError, match="version 1 or older, got 2"):
            Allocation.load(newer)


CAPPED = {"q": [3.0, 2.0, 1.0], "v": [2.5, 0.5], "o": [1.5, 1.0]}


def capped_allocation(**caps) -> Allocation:
    costs = {"q": 16, "v": 12, "o": 1500}
    return allocate(CAPPED, 10_000, costs=costs, fixed_costs=[0, 0, 9], caps=caps)


class TestCaps:
    def test_costs_and_prices_by_name(self):
        allocation = capped_allocation(
            stage=(["q", "o"], 1600), device=Cap(["v", "q"], 5, [2, 3], [0, 2]), wide=(["q"], 999)
        )
        assert dict(allocation) == {"q": 1, "v": 0, "o": 1}
        assert allocation.cap_costs == {"stage": 16 + 1500 + 9, "device": 5, "wide": 16}
        assert list(allocation.cap_prices) == ["stage", "device", "wide"]
        assert allocation.cap_prices["wide"] == 0.0
        assert allocation.cap_prices["device"] > 0
        assert tuple(allocation.cap_prices.values()) == allocation.certificate.cap_prices

    def test_caps_without_a_price_are_free(self):
        allocation = capped_allocation(wide=(["q"], 999))
        assert allocation.certificate.cap_prices == ()
        assert allocation.cap_prices == {"wide": 0.0}
        plain = allocate(CAPPED, 3)
        assert (plain.cap_prices, plain.cap_costs) == ({}, {})


class TestCapsInTheTable:
    def lines(self, allocation: Allocation) -> list[str]:
        foot = table_of(allocation)[2].splitlines()
        start = next(n for n, line in enumerate(foot) if line.startswith("cost ")) + 1
        stop = next(n for n, line in enumerate(foot) if line.startswith("captured "))
        return foot[start:stop]

    def test_the_fullest_come_first(self):
        allocation = capped_allocation(wide=(["q"], 200), stage=(["q", "o"], 1600), none=(["v"], 0))
        assert dict(allocation) == {"q": 3, "v": 0, "o": 1}
        assert self.lines(allocation) == [
            "cap       none: 0 of 0 (100.00%)",
            "cap       stage: 1,557 of 1,600 (97.31%)",
            "cap       wide: 48 of 200 (24.00%)",
        ]

    def test_without_caps_nothing_is_said(self):
        assert self.lines(allocate(CAPPED, 3)) == []

    @pytest.mark.parametrize("count", [1, 8, 9, 40])
    def test_only_some_of_many_are_shown(self, count):
        caps = {f"cap{n}": (["q"], 100 - n) for n in range(count)}
        lines = self.lines(allocate(CAPPED, 3, max_rank=1, caps=caps))
        shown = lines[:8]
        assert shown == [
            f"cap       cap{n}: 1 of {100 - n} ({100 / (100 - n):.2f}%)"
            for n in sorted(range(count), reverse=True)[:8]
        ]
        assert lines[8:] == ([f"          ... {count - 8} more"] if count > 8 else [])


class TestCapsInFiles:
    def same(self, a: Allocation, b: Allocation) -> None:
        TestFiles().same(a, b)
        assert a.cap_costs == b.cap_costs
        assert a.cap_prices == b.cap_prices
        for one, other in zip(a.problem.caps, b.problem.caps, strict=True):
            assert (one.name, one.budget) == (other.name, other.budget)
            assert one.costs.tolist() == other.costs.tolist()
            assert one.fixed_costs.tolist() == other.fixed_costs.tolist()

    @given(capped(instances(layers=4, ranks=3)))
    @settings(max_examples=examples(0.5))
    def test_round_trip(self, tmp_path_factory, instance: Instance):
        path = tmp_path_factory.mktemp("caps") / "file.npz"
        allocation = instance.allocate(time_limit=0.0)
        allocation.save(path)
        self.same(allocation, Allocation.load(path))

    def test_searched_caps_and_a_ratio_survive(self, tmp_path):
        allocation = capped_allocation(stage=(["q", "o"], 1600), device=Cap(["v"], 5, [2], [1]))
        certificate = dataclasses.replace(
            allocation.certificate,
            within=(("stage", 0.1), ("device", 1 / 3)),
            side=None,
            ratio=1 / 3,
            theorem="a theorem",
        )
        for own in (certificate, dataclasses.replace(certificate, side=((0.1, -0.2, 1 / 3), 0.7))):
            told = Allocation(allocation.problem, allocation.ranks, own)
            told.save(tmp_path / "file.npz")
            assert Allocation.load(tmp_path / "file.npz").certificate == own

    def test_a_budget_beyond_64_bits(self, tmp_path):
        capped_allocation(stage=(["q", "o"], 10**40)).save(tmp_path / "file.npz")
        assert Allocation.load(tmp_path / "file.npz").problem.caps[0].budget == 10**40

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"header.caps": [["stage", 1600], ["stage", 5]]}, "the name of a cap appears twice"),
            ({"header.caps": [["stage", 10], ["device", 5]]}, "cap 'stage': the ranks cost 1557"),
            ({"header.caps": [["stage", -1], ["device", 5]]}, "cap 'stage': budget: expected"),
            ({"header.caps": [["stage", 1600]]}, "zip"),
            ({"header.caps": [["stage"], ["device", 5]]}, "unpack"),
            ({"header.caps": [["", 1600], ["device", 5]]}, "names that are non-empty strings"),
            ({"header.caps": None}, "caps"),
            ({"cap_costs": None}, "cap_costs"),
            ({"cap_fixed_costs": None}, "cap_fixed_costs"),
            ({"cap_costs": np.array([[16, 0], [0, 2]])}, "cap 'stage': expected one cost a layer"),
            ({"cap_costs": np.ones((2, 4), dtype=np.int64)}, "cap 'stage': expected one cost a"),
            ({"cap_costs": np.array([16, 2])}, "cap 'stage': expected one cost a layer"),
            (
                {"cap_fixed_costs": np.array([[0, 0], [0, 0]])},
                "cap 'stage': expected one cost a layer",
            ),
            ({"cap_costs": np.array([[16, 0, -1], [0, 2, 0]])}, "cap 'stage': costs: layer 'o'"),
            ({"cap_costs": np.array([[0, 0, 0], [0, 2, 0]])}, "cap 'stage': expected one or more"),
        ],
    )
    def test_loading_validates(self, tmp_path, tampered, change, expected):
        allocation = capped_allocation(stage=(["q", "o"], 1600), device=Cap(["v"], 5, [2], [1]))
        allocation.save(tmp_path / "file.npz")
        self.same(allocation, Allocation.load(tampered(tmp_path / "file.npz")))
        with pytest.raises(ValueError, match=f"tampered.npz: the file is damaged: .*{expected}"):
            Allocation.load(tampered(tmp_path / "file.npz", **change))

    def test_a_certificate_in_a_file_is_not_believed(self, tmp_path, tampered):
        allocation = capped_allocation(stage=(["q", "o"], 1600), device=Cap(["v"], 5, [2], [1]))
        allocation.save(tmp_path / "file.npz")
        own = dataclasses.asdict(allocation.certificate)
        for change, message in (
            ({"within": [["nowhere", 0.0]]}, "expected a search within different caps"),
            ({"within": 7}, "expected names of searched caps"),
            ({"cap_prices": [1.0]}, "expected finite prices"),
            ({"side": [[1.0], 0.0], "within": []}, "expected finite charges"),
        ):
            path = tampered(tmp_path / "file.npz", **{"header.certificate": {**own, **change}})
            again = Allocation.load(path)
            with pytest.raises(ValueError, match=message):
                again.certificate.verify(again.problem, again.ranks)
