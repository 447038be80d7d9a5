"""Spectra and gain curves as mappings, with what they carry."""

import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Spectra, allocate
from tests.strategies import spectra as drawn_spectra

VALUES = {"q": [3.0, 2.0, 1.0], "v": [2.5, 0.5]}
SHAPES = {"q": (3, 8), "v": (8, 2)}


class TestSpectra:
    def test_is_a_mapping(self):
        spectra = Spectra(VALUES)
        assert list(spectra) == ["q", "v"]
        assert len(spectra) == 2
        assert {name: row.tolist() for name, row in spectra.items()} == VALUES
        assert "z" not in spectra
        with pytest.raises(KeyError):
            spectra["z"]

    def test_what_it_carries(self):
        bare = Spectra(VALUES)
        assert (bare.shapes, bare.source, bare.unresolved) == (None, "", {"q": 0.0, "v": 0.0})
        full = Spectra(VALUES, shapes=SHAPES, source="by hand", unresolved={"v": 2})
        assert full.shapes == SHAPES
        assert full.source == "by hand"
        assert full.unresolved == {"q": 0.0, "v": 2.0}

    def test_shapes_come_in_layer_order(self):
        spectra = Spectra(VALUES, shapes=dict(reversed(SHAPES.items())))
        assert spectra.shapes is not None
        assert list(spectra.shapes.items()) == list(SHAPES.items())

    def test_shapes_it_carries_give_the_costs(self):
        allocation = allocate(Spectra(VALUES, shapes=SHAPES), 100)
        assert allocation.problem.costs.tolist() == [11, 10]
        assert allocate(Spectra(VALUES, shapes=SHAPES), 9, costs=[1, 2]).cost == 7

    def test_repr(self):
        assert repr(Spectra(VALUES)) == "Spectra(2 layers, 5 singular values)"
        assert "source='by hand'" in repr(Spectra(VALUES, source="by hand"))

    @pytest.mark.parametrize(
        ("shapes", "expected"),
        [
            ({"q": (3, 8)}, "layer 'v' is missing"),
            ({**SHAPES, "z": (1, 1)}, "layer 'z' is not among the spectra"),
            ({"q": (3, 8), "z": (8, 2)}, "layer 'z' is not among the spectra"),
            (
                {**SHAPES, "q": (2, 8)},
                "layer 'q': a 2 x 8 matrix has at most 2 singular values, got 3",
            ),
            (
                {**SHAPES, "v": (8, 1)},
                "layer 'v': a 8 x 1 matrix has at most 1 singular values, got 2",
            ),
            ([(3, 8), (8, 2)], "expected a mapping of layer name to value, got [(3, 8), (8, 2)]"),
            (5, "expected a mapping of layer name to value, got 5"),
        ],
    )
    def test_shapes_that_do_not_fit(self, shapes, expected):
        with pytest.raises(ValueError, match="^shapes: " + re.escape(expected)):
            Spectra(VALUES, shapes=shapes)

    @pytest.mark.parametrize(
        "shape",
        [
            (3,),
            (3, 8, 1),
            (3.5, 8),
            (0, 8),
            (-3, 8),
            (8, 0),
            (8, -3),
            5,
            None,
            "38",
            ("3", 8),
            (float("nan"), 8),
            (8, float("inf")),
            (True, 8),
            (8, True),
            (2**52 + 1, 8),
            (8, 2**53),
        ],
    )
    def test_what_is_no_shape(self, shape):
        expected = r"shapes: layer 'q': expected \(d, k\), two whole numbers from 1 to 2\^52, got "
        with pytest.raises(ValueError, match=expected + re.escape(repr(shape))):
            Spectra({"q": [1.0]}, shapes={"q": shape})

    def test_shapes_up_to_2_52(self):
        spectra = Spectra({"q": [1.0]}, shapes={"q": (2**52, 2**52)})
        assert allocate(spectra, 2**53).cost == 2**53

    @pytest.mark.parametrize("shape", [(3, 8), [3, 8], np.array([3, 8]), (3.0, 8.0)])
    def test_shapes_become_pairs_of_ints(self, shape):
        spectra = Spectra({"q": [1.0]}, shapes={"q": shape})
        assert repr(spectra.shapes) == "{'q': (3, 8)}"

    @pytest.mark.parametrize(
        ("unresolved", "expected"),
        [
            ({"z": 1.0}, "layer 'z' is not among the spectra"),
            ({"q": -1.0}, "layer 'q': expected a finite energy >= 0, got -1.0"),
            ({"q": float("nan")}, "layer 'q': expected a finite energy >= 0, got nan"),
            ({"q": float("inf")}, "layer 'q': expected a finite energy >= 0, got inf"),
            ({"q": "1"}, "layer 'q': expected a finite energy >= 0, got '1'"),
            ({"q": True}, "layer 'q': expected a finite energy >= 0, got True"),
            ({"q": 10**400}, "layer 'q': expected a finite energy >= 0, got 1000"),
            ("x", "expected a mapping of layer name to energy, got 'x'"),
            (["q"], "expected a mapping of layer name to energy, got ['q']"),
        ],
    )
    def test_energy_that_is_none(self, unresolved, expected):
        with pytest.raises(ValueError, match="^unresolved: " + re.escape(expected)):
            Spectra(VALUES, unresolved=unresolved)

    def test_all_zero_and_one_value(self):
        assert Spectra({"q": [0.0, 0.0]})["q"].tolist() == [0.0, 0.0]
        assert Spectra({"q": [5e-324]})["q"].tolist() == [5e-324]


class TestGainCurves:
    def test_is_a_mapping(self):
        curves = GainCurves({"q": [0.0, 5.0, 4.0], "v": [0.0]})
        assert {name: row.tolist() for name, row in curves.items()} == {"q": [0, 5, 4], "v": [0]}
        assert repr(curves) == "GainCurves(2 layers)"

    def test_from_increments(self):
        curves = GainCurves.from_increments({"q": [5.0, -1.0]})
        assert curves["q"].tolist() == [0.0, 5.0, 4.0]

    @pytest.mark.parametrize("make", [GainCurves, GainCurves.from_increments])
    def test_no_layers(self, make):
        assert len(make({})) == 0
        assert dict(allocate(make({}), 3)) == {}

    def test_a_curve_without_any_rank(self):
        allocation = allocate(GainCurves({"q": [0.0], "v": [0.0, 1.0]}), 5)
        assert dict(allocation) == {"q": 0, "v": 1}

    def test_increments_are_kept_where_doubles_hold_them(self):
        exact = GainCurves({"q": [0.0, 3.0, 5.0], "v": [0.0, 0.5]})
        assert exact.increments is not None
        assert [exact.increments.row(i).tolist() for i in (0, 1)] == [[3.0, 2.0], [0.5]]
        # 1 - 2^-60 is no double.
        assert GainCurves({"q": [0.0, 2.0**-60, 1.0]}).increments is None
        assert GainCurves({"q": [0.0, 1e308, -1e308]}).increments is None
        given = GainCurves.from_increments({"q": [2.0**-60, 1.0]})
        assert given.increments is not None

    @given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6))
    def test_increments_that_are_kept_sum_to_the_curve_exactly(self, totals):
        curves = GainCurves({"q": [0.0, *totals]})
        if curves.increments is not None:
            running = Fraction(0)
            for gain, total in zip(curves.increments.row(0).tolist(), totals, strict=True):
                running += Fraction(gain)
                assert running == Fraction(total)

    @pytest.mark.parametrize(
        ("curve", "expected"),
        [
            ([1.0, 2.0], "expected a gain curve that starts with F(0) = 0, got F(0) = "),
            ([0.0, float("nan")], "expected a gain curve of finite numbers, got nan at index 1"),
            (
                [0.0, 1.0, float("inf")],
                "expected a gain curve of finite numbers, got inf at index 2",
            ),
            ([], "expected a non-empty gain curve, got one of length 0"),
            ([[0.0, 1.0]], "expected a 1-D gain curve, got an array of shape (1, 2)"),
            ([False, True], "expected a 1-D gain curve of real numbers, got dtype bool"),
            ([0.0, 1j], "expected a 1-D gain curve of real numbers, got dtype complex128"),
            (["0"], "expected a 1-D gain curve of real numbers, got dtype <U1"),
        ],
    )
    def test_what_is_no_gain_curve(self, curve, expected):
        with pytest.raises(ValueError, match="layer 'bad': " + re.escape(expected)):
            GainCurves({"good": [0.0, 1.0], "bad": curve})

    @pytest.mark.parametrize(
        ("increments", "expected"),
        [
            ([float("nan")], "expected a sequence of gains of finite numbers, got nan at index 0"),
            ([], "expected a non-empty sequence of gains, got one of length 0"),
            ([1e308, 1e308], "expected a gain curve of finite numbers, got inf at index 2"),
            ([1j], "expected a 1-D sequence of gains of real numbers, got dtype complex128"),
        ],
    )
    def test_what_are_no_increments(self, increments, expected):
        with pytest.raises(ValueError, match="layer 'bad': " + re.escape(expected)):
            GainCurves.from_increments({"good": [1.0], "bad": increments})

    def test_curves_that_overflow_are_refused(self):
        with pytest.raises(ValueError, match="layer 'a': expected gains that sum to at most"):
            allocate(GainCurves({"a": [0.0, 1e308, -1e308]}), 3)
        with pytest.raises(ValueError, match=r"layer 'a': expected gains that sum to at most"):
            allocate(GainCurves({"a": [0.0, 1e308], "b": [0.0, 1e308]}), 3)
        with pytest.raises(ValueError, match=r"layer 'b'.*finite numbers, got inf"):
            allocate(
                GainCurves({"a": [0.0, 2.0**-60, 1.0], "b": [0.0, 1e300]}), 1, weights=[1, 1e9]
            )

    @pytest.mark.parametrize("objective", ["nuclear", "operator"])
    def test_an_objective_makes_no_sense(self, objective):
        with pytest.raises(ValueError, match=f"gain curves are gains already, got .*{objective}"):
            allocate(GainCurves({"a": [0.0, 1.0]}), 3, objective=objective)


class TestFiles:
    @given(st.data())
    def test_round_trip(self, tmp_path_factory, data):
        lengths = data.draw(st.lists(st.integers(1, 4), max_size=4))
        values = data.draw(drawn_spectra(lengths)) if lengths else {}
        shapes = data.draw(
            st.sampled_from([None, {name: (9, len(row) + 3) for name, row in values.items()}])
        )
        unresolved = {name: 0.1 for name in list(values)[::2]}
        spectra = Spectra(values, shapes=shapes, source="dess ☃", unresolved=unresolved)
        path = tmp_path_factory.mktemp("spectra") / "file.npz"
        spectra.save(path)
        again = Spectra.load(path)
        assert list(again) == list(spectra)
        assert all(again[name].tolist() == spectra[name].tolist() for name in spectra)
        assert again.shapes == spectra.shapes
        assert again.source == spectra.source
        assert again.unresolved == spectra.unresolved

    def test_float32_stays_float32(self, tmp_path):
        Spectra(np.array([[2.0, 1.0]], dtype=np.float32)).save(tmp_path / "file.npz")
        assert Spectra.load(tmp_path / "file.npz").layers.flat.dtype == np.float32

    def test_loading_validates(self, tmp_path, tampered):
        path = tmp_path / "file.npz"
        Spectra(VALUES, shapes=SHAPES).save(path)
        for change, expected in (
            ({"values": np.array([1.0, 2.0, 3.0, 2.5, 0.5])}, "layer 'q'.*descending"),
            ({"values": np.zeros(5, dtype=complex)}, "layer 'q'.*complex"),
            ({"offsets": np.array([0, 5])}, "zip"),
            ({"offsets": np.array([0, 5, 5])}, "layer 'v'.*non-empty"),
            ({"values": None}, "values"),
            ({"header.names": ["q", "q"]}, "a layer name appears twice"),
            ({"header.names": ["q"]}, "zip"),
            ({"header.names": None}, "names"),
            ({"header.shapes": [[1, 1], [8, 2]]}, "layer 'q'.*at most 1"),
            ({"header.shapes": [[3, 8]]}, "zip"),
            ({"header.unresolved": [-1.0, 0.0]}, "layer 'q'.*energy"),
            ({"header.unresolved": None}, "unresolved"),
        ):
            with pytest.raises(ValueError, match=f"file is damaged: .*{expected}"):
                Spectra.load(tampered(path, **change))
