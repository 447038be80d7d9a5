"""What the reference's build relies on; the build itself is a step of the checks."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import lorambo_alloc
from lorambo_alloc import objectives

pytest.importorskip("sphinx", reason="the reference needs the extra docs")

EXTENSIONS = Path(__file__).resolve().parent.parent / "docs" / "_extensions"


def extension(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXTENSIONS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_public_name_without_an_entry_is_told():
    missing = extension("completeness").missing
    entries = {f"lorambo_alloc.{name}" for name in lorambo_alloc.__all__}
    assert list(missing(["lorambo_alloc", "lorambo_alloc.online"], {}, entries)) == []
    (told,) = missing(["lorambo_alloc"], {}, entries - {"lorambo_alloc.solve"})
    assert "lorambo_alloc.solve" in told


def test_without_all_the_names_are_those_the_module_defines():
    names = extension("completeness").public_names(objectives)
    assert "schatten" in names
    assert "dataclass" not in names


def test_what_is_left_out_has_to_be_there():
    module = "lorambo_alloc.objectives"
    missing = extension("completeness").missing
    names = extension("completeness").public_names(objectives)
    assert list(missing([module], {module: names}, [])) == []
    (told,) = missing([module], {module: [*names, "gone"]}, [])
    assert f"{module}.gone" in told


def test_a_module_that_is_not_there_is_told():
    (told,) = extension("completeness").missing(["lorambo_alloc.nothing"], {}, [])
    assert "lorambo_alloc.nothing cannot be imported" in told


def test_a_markdown_table_becomes_a_list_table():
    tables_to_rst = extension("docstring_markup").tables_to_rst
    table = ["  | a | b |", "  |---|---|", "  | 1 | `x` |", "  | and more |  |", "after"]
    assert [line for line in tables_to_rst(table) if line] == [
        "  .. list-table::",
        "     :header-rows: 1",
        "     * - a",
        "       - b",
        "     * - 1 and more",
        "       - `x`",
        "after",
    ]


@pytest.mark.parametrize(
    ("line", "escaped"),
    [
        ("|x|^2 and 2 * x", r"\|x\|^2 and 2 \* x"),
        ("of `a*b|c` and **bold**", "of `a*b|c` and **bold**"),
        ("lora_unet_ and lora_unet", r"lora_unet\_ and lora_unet"),
        (">>> 2 * x", ">>> 2 * x"),
    ],
)
def test_plain_text_stands_for_itself(line: str, escaped: str):
    assert extension("docstring_markup").escaped([line]) == [escaped]


def test_what_is_set_off_stays_as_it_is():
    markup = extension("docstring_markup")
    lines = ["The gain is", "", "    f(S) = |x| *", "      y", "", "where x."]
    out = markup.escaped(markup.verbatim(lines))
    assert out == ["The gain is", "", "::", "", *lines[2:]]


def test_sections_and_lists_are_not_set_off():
    lines = ["Args:", "", "    x: one.", "", "Text:", "", "    - a", "    - b"]
    assert extension("docstring_markup").verbatim(lines) == lines
