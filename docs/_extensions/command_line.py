"""The directive `lorambo-commands`: every command and option, as the program has them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lorambo_adapters.commands import app as commands


class Commands(SphinxDirective):
    """A section for each command: usage, help, arguments and options with their defaults."""

    def run(self) -> list[nodes.Node]:
        """Write the sections and let Sphinx read them."""
        root = typer.main.get_command(commands)
        leaves = _leaves(root, "lorambo")
        lines = [line for path, command in leaves for line in _section(path, command)]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def _leaves(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield path, command
        return
    for name, child in children.items():
        yield from _leaves(child, f"{path} {name}")


def _section(path: str, command: Any) -> list[str]:
    context = typer.Context(command, info_name=path)
    usage = " ".join(command.get_usage(context).split())
    lines = [path, "-" * len(path), "", ".. code-block:: text", "", f"   {usage}", ""]
    lines += [inspect.cleandoc(command.help), "", f".. program:: {path}", ""]
    for parameter in command.params:
        if parameter.name == "help":
            continue
        value = parameter.metavar or parameter.name.upper()
        if parameter.param_type_name == "argument":
            spelling = value
        else:
            names = sorted([*parameter.opts, *parameter.secondary_opts], key=len)
            spelling = ", ".join(name if parameter.is_flag else f"{name} {value}" for name in names)
        lines += [f".. option:: {spelling}", "", f"   {parameter.help}{_default(parameter)}", ""]
    return lines


def _default(parameter: Any) -> str:
    if parameter.required:
        return " (required)"
    if parameter.default is None or parameter.default is False:
        return ""
    return f" (default: {parameter.default})"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("lorambo-commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
