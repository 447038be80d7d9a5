"""What counts as an array of layers, and what is refused, by the layer's name."""

import re
from collections import UserDict

import numpy as np
import pytest

from lorambo_alloc import GainCurves, Problem, Spectra
from lorambo_alloc.arrays import chunks, first_ascent, flatten


class OnlyArray:
    """Has `__array__`, as a torch tensor has, and nothing else."""

    def __init__(self, values):
        self._values = np.asarray(values)

    def __array__(self, dtype=None, copy=None):
        return self._values.copy() if copy else self._values


class OnlyDLPack:
    """Has DLPack, and no `__array__`."""

    def __init__(self, values):
        self._values = np.asarray(values)

    def __dlpack__(self, **keywords):
        return self._values.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self._values.__dlpack_device__()


class OnDevice:
    """A tensor on an accelerator: its memory must not be asked for."""

    def __init__(self, kind):
        self._kind = kind

    def __dlpack__(self, **keywords):
        raise AssertionError("the memory of a device was asked for")

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("the memory of a device was asked for")

    def __dlpack_device__(self):
        return (self._kind, 0)


class Broken:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("out of order")


VALUES = [4.0, 2.0, 1.0]
read_only = np.array(VALUES)
read_only.flags.writeable = False

ACCEPTED = {
    "list": VALUES,
    "tuple": tuple(VALUES),
    "float64": np.array(VALUES),
    "float32": np.array(VALUES, dtype=np.float32),
    "float16": np.array(VALUES, dtype=np.float16),
    "int8": np.array(VALUES, dtype=np.int8),
    "int64": np.array(VALUES, dtype=np.int64),
    "uint16": np.array(VALUES, dtype=np.uint16),
    "big-endian": np.array(VALUES, dtype=">f8"),
    "big-endian float32": np.array(VALUES, dtype=">f4"),
    "list of ints": [4, 2, 1],
    "strided": np.repeat(VALUES, 3)[::3],
    "reversed": np.array(VALUES[::-1])[::-1],
    "column": np.asfortranarray(np.column_stack([VALUES, VALUES]))[:, 0],
    "row of Fortran order": np.asfortranarray([VALUES, VALUES])[1],
    "read-only": read_only,
    "only __array__": OnlyArray(VALUES),
    "only __array__, float32": OnlyArray(np.array(VALUES, dtype=np.float32)),
    "only DLPack": OnlyDLPack(VALUES),
    "only DLPack, float32": OnlyDLPack(np.array(VALUES, dtype=np.float32)),
    "masked nowhere": np.ma.array(VALUES),
}

REFUSED = {
    "NaN": ([4.0, float("nan")], "finite numbers, got nan at index 1"),
    "NaN first": ([float("nan"), 1.0], "finite numbers, got nan at index 0"),
    "inf": ([float("inf"), 1.0], "finite numbers, got inf at index 0"),
    "-inf": ([1.0, -float("inf")], "finite numbers, got -inf at index 1"),
    "negative": ([1.0, -0.5], "expected singular values >= 0, got -0.5 at index 1"),
    "all negative": ([-2.0], "expected singular values >= 0, got -2.0 at index 0"),
    "ascending": ([3.0, 1.0, 2.0], "descending order, got 2.0 after 1.0 at index 2"),
    "empty": ([], "expected a non-empty spectrum, got one of length 0"),
    "empty array": (np.zeros(0), "expected a non-empty spectrum, got one of length 0"),
    "2-D": (np.ones((2, 2)), "expected a 1-D spectrum, got an array of shape (2, 2)"),
    "0-D": (3.0, "expected a 1-D spectrum, got an array of shape ()"),
    "ragged": ([[1.0, 2.0], [3.0]], "expected a 1-D spectrum, got list"),
    "str": (["1.0"], "expected a 1-D spectrum of real numbers, got dtype <U3"),
    "a str": ("abc", "of real numbers, got dtype <U3"),
    "bytes": (np.array([b"1"]), "of real numbers, got dtype |S1"),
    "object": ([object()], "of real numbers, got dtype object"),
    "None": (None, "of real numbers, got dtype object"),
    "a mapping": ({1: 2.0}, "of real numbers, got dtype object"),
    "too long an int": ([10**400], "of real numbers, got dtype object"),
    "bool": ([True, False], "of real numbers, got dtype bool"),
    "complex": ([1.0 + 0.0j], "of real numbers, got dtype complex128"),
    "datetime": (np.array([2, 1], dtype="datetime64[s]"), "of real numbers, got dtype datetime64"),
    "extended": (np.array([2, 1], dtype=np.longdouble), "of real numbers, got dtype float"),
    "broken": (Broken(), "expected a 1-D spectrum, got Broken: out of order"),
}


@pytest.mark.parametrize("given", ACCEPTED.values(), ids=ACCEPTED.keys())
@pytest.mark.parametrize("make", [Spectra, GainCurves.from_increments])
def test_accepted(given, make):
    curves = make({"first": [9.0], "second": given})
    expected = VALUES if make is Spectra else [0.0, 4.0, 6.0, 7.0]
    assert curves["second"].tolist() == expected
    assert curves["second"].dtype == np.float64


@pytest.mark.parametrize(("given", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(given, expected):
    with pytest.raises(ValueError, match=f"layer 'bad'.*{re.escape(expected)}"):
        Problem({"good": [2.0], "bad": given, "other": [1.0]}, 3)


@pytest.mark.parametrize("kind", [2, 4, 8, 10, 13])
@pytest.mark.parametrize("wrap", [lambda x: {"layer": x}, lambda x: [x], lambda x: x])
def test_memory_of_a_device_is_refused_and_left_alone(kind, wrap):
    where = r"(layer '(layer|0)'|the spectra)"
    message = f"{where}: expected .* in host memory, got one on a device .*type {kind}.*cpu()"
    with pytest.raises(ValueError, match=message):
        Spectra(wrap(OnDevice(kind)))


@pytest.mark.parametrize("kind", [1, 3, 11])
def test_memory_that_the_host_may_read_is_taken(kind):
    class Pinned(OnlyArray):
        def __dlpack_device__(self):
            return (kind, 0)

    assert Spectra({"layer": Pinned(VALUES)})["layer"].tolist() == VALUES


@pytest.mark.parametrize("given", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_inputs_are_left_as_they_were(given):
    before = np.array(given, copy=True) if isinstance(given, np.ndarray) else None
    Problem({"layer": given}, 2, weights=[3.0]).value_of(np.array([2]))
    if before is not None:
        assert np.array_equal(before, given)


def test_rows_cannot_be_written():
    rows = np.array([VALUES, VALUES])
    for spectra in (Spectra(rows), Spectra({"0": rows[0]})):
        with pytest.raises(ValueError, match="read-only"):
            spectra["0"][0] = 9.0
    assert rows.tolist() == [VALUES, VALUES]


def test_names_of_mappings_sequences_and_2d_arrays():
    rows = np.array([[2.0, 1.0], [4.0, 3.0]])
    assert flatten({"b": [1.0], "a": [2.0]}, "", "").names == ("b", "a")
    assert flatten(UserDict(b=[1.0]), "", "").names == ("b",)
    for given in ([rows[0], rows[1]], tuple(rows), rows, rows.tolist(), OnlyArray(rows)):
        layers = flatten(given, "", "")
        assert layers.names == ("0", "1")
        assert [layers.row(i).tolist() for i in range(len(layers))] == rows.tolist()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_2d_array_is_viewed_and_not_copied(dtype):
    rows = np.array([[2.0, 1.0], [4.0, 3.0]], dtype=dtype)
    assert np.shares_memory(flatten(rows, "", "").flat, rows)


@pytest.mark.parametrize(
    "rows", [np.asfortranarray([[2.0, 1.0], [4.0, 3.0]]), np.array([[2, 9, 1], [4, 9, 3]])[:, ::2]]
)
def test_a_2d_array_of_another_order_means_the_same(rows):
    layers = flatten(rows, "", "")
    assert [layers.row(0).tolist(), layers.row(1).tolist()] == [[2.0, 1.0], [4.0, 3.0]]


@pytest.mark.parametrize("given", [{}, [], (), np.zeros((0, 3)), np.zeros((0, 0))])
def test_no_layers(given):
    layers = flatten(given, "", "")
    assert len(layers) == 0
    assert layers.names == ()
    assert layers.offsets.tolist() == [0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            np.ones(3),
            "the spectra: expected a mapping .* one 2-D array, got an array of shape .3,.",
        ),
        (np.ones((1, 1, 1)), "the spectra: expected .* got an array of shape .1, 1, 1."),
        (5.0, "the spectra: expected .* got an array of shape ()"),
        ("abc", "the spectra: expected .* got dtype <U3"),
        (b"abc", "the spectra: expected .* got dtype .S3"),
        (None, "the spectra: expected .* got dtype object"),
        ({1, 2}, "the spectra: expected .* got dtype object"),
        (np.ones((2, 0)), "layer '0': expected a non-empty spectrum, got one of length 0"),
        ({1: [1.0]}, "layer names: expected strings, got 1"),
        ({("a",): [1.0]}, "layer names: expected strings, got .'a',."),
        ([[1.0], [2.0, 3.0]], "layer '1': expected singular values in descending order"),
    ],
)
def test_what_is_no_set_of_layers(given, expected):
    with pytest.raises(ValueError, match=expected):
        Spectra(given)


def test_chunks_cover_everything_once():
    for size in (0, 1, 5, 6, 7):
        covered = [i for part in chunks(size, 3) for i in range(size)[part]]
        assert covered == list(range(size))
    assert list(chunks(1 << 17)) == [slice(0, 1 << 16), slice(1 << 16, 1 << 17)]


@pytest.mark.parametrize("fault", [None, 1, 2, 65_535, 65_536, 65_537, 131_072, 199_998])
@pytest.mark.parametrize("kind", ["ascent", "NaN"])
def test_the_first_ascent_is_found_on_either_side_of_a_chunk(fault, kind):
    values = np.linspace(2.0, 1.0, 199_999)
    if fault is not None:
        values[fault] = values[fault - 1] + 1e-9 if kind == "ascent" else np.nan
    assert first_ascent(flatten([values], "", "")) == fault


@pytest.mark.parametrize("length", [1, 2, 65_536])
def test_an_ascent_from_one_layer_to_the_next_is_no_fault(length):
    low, high = np.full(length, 1.0), np.full(length, 2.0)
    assert first_ascent(flatten([low, high, low, high], "", "")) is None
    # The fault inside the second layer is found although the layers meet with an ascent.
    if length > 1:
        high[1] = 3.0
        assert first_ascent(flatten([low, high], "", "")) == length + 1


def test_a_device_that_dlpack_does_not_know_is_refused_by_name():
    class Meta:
        def __dlpack_device__(self):
            raise ValueError("Unknown device type meta for Dlpack")

    with pytest.raises(ValueError, match="layer 'q': expected a 1-D spectrum in host memory: Unk"):
        Spectra({"q": Meta()})
