"""A forest plot: what is drawn where, read back from the figure."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is absent: pip install 'lorambo-alloc[plot]'")

from lorambo_alloc.plots import intervals
from tests.plots.drawn import axes_of, labels, subplots, texts

ROWS = [
    ("rank 1", "ours", -0.006, -0.008, -0.004),
    ("rank 1", "shuffled", 0.003, 0.001, 0.006),
    ("rank 8", "ours", -0.001, -0.003, 0.002),
]


def drawn(ax: Any) -> list[tuple[float, float, float, float, str]]:
    """Of each row, from top to bottom, its height, mean, low, high and marker."""
    found: list[tuple[float, float, float, float, str]] = []
    for container in ax.containers:
        point, _, (bar,) = container.lines
        for place, mean, ends in zip(
            point.get_ydata(), point.get_xdata(), bar.get_segments(), strict=True
        ):
            low, high = ends[:, 0].tolist()
            found.append((float(place), float(mean), low, high, point.get_marker()))
    return sorted(found)


def test_means_and_intervals_by_groups():
    (ax,) = axes_of(intervals(ROWS))
    found = drawn(ax)
    np.testing.assert_allclose([row[1:4] for row in found], [row[2:] for row in ROWS])
    names = dict(zip(ax.get_yticks().tolist(), labels(ax), strict=True))
    assert [names[row[0]] for row in found] == ["ours", "shuffled", "ours"]
    headings = {place: text for place, text in names.items() if text.startswith("rank")}
    assert list(headings.values()) == ["rank 1", "rank 8"]
    # A heading, its rows, a gap, the next heading.
    assert [row[0] for row in found] == [1.0, 2.0, 4.5]
    assert list(headings) == [0.0, 3.5]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    bold = [t.get_text() for t in ax.get_yticklabels() if t.get_fontweight() == "bold"]
    assert bold == ["rank 1", "rank 8"]


def test_0_is_marked_and_in_sight():
    rows = [("", "ours", 3.0, 2.0, 4.0)]
    (ax,) = axes_of(intervals(rows))
    assert any(np.array_equal(line.get_xdata(), [0, 0]) for line in ax.lines)
    low, high = ax.get_xlim()
    assert low < 0 < 4 < high
    assert labels(ax) == ["ours"]


@pytest.mark.parametrize(
    ("better", "markers", "words"),
    [
        ("lower", ["o", "s", "D"], ["\N{LEFTWARDS ARROW} better", "worse \N{RIGHTWARDS ARROW}"]),
        ("higher", ["s", "o", "D"], ["\N{LEFTWARDS ARROW} worse", "better \N{RIGHTWARDS ARROW}"]),
    ],
)
def test_sides_are_told_by_words_and_markers(better, markers, words):
    (ax,) = axes_of(intervals(ROWS, better=better))
    assert [row[-1] for row in drawn(ax)] == markers
    assert texts(ax) == words
    left, right = ax.texts
    assert (left.get_ha(), right.get_ha()) == ("right", "left")
    points = [container.lines[0] for container in ax.containers]
    assert [point.get_markerfacecolor() == "white" for point in points] == [False, False, True]


def test_an_interval_that_touches_0_is_open():
    (ax,) = axes_of(intervals([("", "a", 1.0, 0.0, 2.0)]))
    assert drawn(ax)[0][-1] == "D"


def test_numbers_stand_beside_the_rows():
    (ax,) = axes_of(intervals(ROWS))
    (side,) = ax.child_axes
    assert [text.replace("\N{MINUS SIGN}", "-") for text in labels(side)] == [
        "-0.00600  [-0.00800, -0.00400]",
        "+0.00300  [+0.00100, +0.00600]",
        "-0.00100  [-0.00300, +0.00200]",
    ]
    assert side.get_yticks().tolist() == [row[0] for row in drawn(ax)]
    assert not axes_of(intervals(ROWS, numbers=False))[0].child_axes


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (1e-20, "+2.00e-20  [+1.00e-20, +3.00e-20]"),
        (1e-6, "+0.00000200  [+0.00000100, +0.00000300]"),
        (1e5, "+200000  [+100000, +300000]"),
        (1e100, "+2.00e+100  [+1.00e+100, +3.00e+100]"),
    ],
)
def test_numbers_of_any_size_have_room(factor, said):
    figure = intervals([("", "a", 2 * factor, factor, 3 * factor)])
    figure.draw_without_rendering()
    (side,) = axes_of(figure)[0].child_axes
    assert [text.replace("\N{MINUS SIGN}", "-") for text in labels(side)] == [said]


def test_of_many_rows_only_groups_are_labelled():
    rows = [(f"group {k // 500}", f"a{k}", k * 1e-3, 0.0, 3.0) for k in range(1500)]
    figure = intervals(rows)
    assert figure.get_size_inches()[1] < 12
    (ax,) = axes_of(figure)
    assert labels(ax) == ["group 0", "group 1", "group 2"]
    assert not ax.child_axes
    assert [row[1:4] for row in drawn(ax)] == [pytest.approx(row[2:]) for row in rows]
    assert len(ax.containers) == 1


def test_labels_say_what_and_against_what():
    (ax,) = axes_of(intervals(ROWS, quantity="accuracy (points)", against="EVA", level=0.9))
    assert ax.get_xlabel() == "accuracy (points)\nagainst EVA, with 90 % interval"


def test_a_mapping_of_groups_is_the_same():
    nested: dict[str, dict[str, tuple[float, float, float]]] = {}
    for group, name, *values in ROWS:
        mean, low, high = values
        nested.setdefault(group, {})[name] = (mean, low, high)
    given, expected = (axes_of(intervals(rows))[0] for rows in (nested, ROWS))
    assert drawn(given) == drawn(expected)
    assert labels(given) == labels(expected)


def test_draws_into_given_axes():
    figure, (left, right) = subplots(2)
    assert intervals(iter(ROWS), ax=right) is figure
    assert len(drawn(right)) == 3
    assert not left.lines


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="rows: expected at least one, got none"):
        intervals([])
    bad: Any
    for bad in (("a", "b", 1.0), ("a", "b", 1.0, None, 2.0, 3.0), 7):
        with pytest.raises(ValueError, match=r"rows: row 0: expected \(group, label, mean"):
            intervals([bad])
    bad = None
    with pytest.raises(ValueError, match="rows: expected rows or a mapping of groups, got None"):
        intervals(bad)
    nan = float("nan")
    for values in (
        (1.0, 2.0, 3.0),
        (4.0, 2.0, 3.0),
        (nan, 0.0, 1.0),
        (1.0, nan, 2.0),
        (1, 0, 1e999),
        (1, 0, 1e200),
    ):
        bad = {"a": {"b": values}}
        with pytest.raises(ValueError, match="rows: 'a b': expected finite low <= mean <= high"):
            intervals(bad)
    with pytest.raises(ValueError, match="better: expected 'lower' or 'higher', got 'more'"):
        intervals(ROWS, better="more")
    with pytest.raises(ValueError, match="level: expected a share between 0 and 1, got 95"):
        intervals(ROWS, level=95)
