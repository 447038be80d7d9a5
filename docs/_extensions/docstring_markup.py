"""Docstrings are plain text with Markdown tables; this turns them into what Sphinx reads."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon.docstring import GoogleDocstring

_ROW = re.compile(r"\s*\|.*\|\s*")
_RULE = re.compile(r"\s*\|[\s|:-]+\|\s*")
# What is kept: code in backticks, bold, a bullet, and napoleon's *args; then what is escaped.
_PLAIN = re.compile(r"(?P<kept>`[^`]*`|\*\*[^*\s][^*]*\*\*|^\s*[*|](?=\s))|[*|]|(?<=\w)_(?!\w)")
# What may have deeper lines below it anyway: a section's name, `::`; and what is code already.
_LEADS = re.compile(r"^\s*(\w+:|.*::)$|^\s*\.\. ")
_OWN = re.compile(r"\s*(>>>|\.\. |:\w|[-*] )")


def tables_to_rst(lines: list[str]) -> list[str]:
    """Lines in which each Markdown table has become a list-table.

    A row with an empty cell goes on with the row above, cell by cell.
    """
    out: list[str] = []
    at = 0
    while at < len(lines):
        if not _ROW.fullmatch(lines[at]) or not _RULE.fullmatch("".join(lines[at + 1 : at + 2])):
            out.append(lines[at])
            at += 1
            continue
        end = at
        while end < len(lines) and _ROW.fullmatch(lines[end]):
            end += 1
        rows: list[list[str]] = []
        for line in (lines[at], *lines[at + 2 : end]):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if rows and not all(cells):
                cells = [" ".join(both).strip() for both in zip(rows.pop(), cells, strict=True)]
            rows.append(cells)
        indent = " " * (len(lines[at]) - len(lines[at].lstrip()))
        out += ["", f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
        for row in rows:
            for column, cell in enumerate(row):
                out.append(f"{indent}   {'* -' if column == 0 else '  -'} {cell}".rstrip())
        out.append("")
        at = end
    return out


def verbatim(lines: list[str]) -> list[str]:
    """Lines in which code and formulas, set off by a blank line and four spaces, stay as they are.

    Sphinx would take them for a quotation and fill its lines.
    """
    out: list[str] = []
    above, blank, literal = "", False, -1
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.strip():
            if indent <= literal:
                literal = -1
            base = len(above) - len(above.lstrip())
            deeper = blank and literal < 0 and indent >= base + 4
            if deeper and not _LEADS.search(above) and not _OWN.match(line):
                out += [" " * base + "::", ""]
                literal = base
            above = line
        blank = not line.strip()
        out.append(line)
    return out


def escaped(lines: list[str]) -> list[str]:
    """Lines in which |x|, 2 * x and name_ stand for themselves.

    Backticks and **bold** are the only markup inside a line. Doctests, and what is indented after
    `::`, are left alone.
    """
    out: list[str] = []
    doctest, literal = False, -1
    for line in lines:
        indent = len(line) - len(line.lstrip())
        doctest = bool(line.strip()) and (doctest or line.lstrip().startswith(">>>"))
        if line.strip() and indent <= literal:
            literal = -1
        if doctest or literal >= 0:
            out.append(line)
            continue
        out.append(_PLAIN.sub(_escape, line))
        if line.endswith("::") and not line.lstrip().startswith(".. "):
            literal = indent
    return out


def _escape(match: re.Match[str]) -> str:
    return match[0] if match["kept"] else f"\\{match[0]}"


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """What autodoc asks for each docstring, before napoleon reads its sections.

    In a property's docstring napoleon would take what stands before a colon for a type, and see no
    sections. So it is read here as a function's, and napoleon finds an empty comment first.
    """
    lines[:] = escaped(verbatim(tables_to_rst(lines)))
    if what in ("attribute", "data", "property"):
        sections = GoogleDocstring(lines, app.config, app, "function", name, obj, options)
        lines[:] = ["..", "", *sections.lines()]


def setup(app: Sphinx) -> dict[str, bool]:
    """Go before napoleon, whose sections may hold tables too."""
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
