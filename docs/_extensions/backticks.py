"""What single backticks mean in docstrings: code, and a link where it names something public."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from docutils import nodes
from docutils.parsers.rst.states import Inliner
from docutils.utils import unescape
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.domains.python import ObjectEntry
from sphinx.environment import BuildEnvironment

_CLASSES = ("class", "exception")
# A name, perhaps called: `allocate`, `Problem.curve`, `schatten(p)`.
_NAME = re.compile(r"([A-Za-z_][\w.]*)(?:\(.*\))?")


def backticks(
    name: str,
    rawtext: str,
    text: str,
    lineno: int,
    inliner: Inliner,
    options: dict[str, Any] | None = None,
    content: list[str] | None = None,
) -> tuple[list[nodes.Node], list[nodes.system_message]]:
    """The default role: code as it stands, and a reference if it could be a name."""
    code = unescape(text, restore_backslashes=True)
    literal = nodes.literal(rawtext, code, classes=["xref", "py"])
    called = _NAME.fullmatch(code)
    if not called:
        return [literal], []
    env = inliner.document.settings.env
    reference = addnodes.pending_xref(
        rawtext,
        literal,
        refdoc=env.current_document.docname,
        refdomain="py",
        reftype="backticks",
        reftarget=called[1],
        refexplicit=False,
        refwarn=False,
    )
    reference["py:module"] = env.ref_context.get("py:module")
    reference["py:class"] = env.ref_context.get("py:class")
    return [reference], []


def resolve(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    """Link a name to its entry: of the class or module at hand, or of the library's top level.

    From the adapters' pages, a name that only one of their modules has will do as well. What is not
    found was an argument, a value or another library's: it stays code, so it is not warned of.
    """
    objects = env.domains.python_domain.objects
    if node.get("reftype") == "class" and f"lorambo_alloc.{node['reftarget']}" in objects:
        # An annotation that autodoc could not evaluate, as a type checker alone imports its names.
        full = f"lorambo_alloc.{node['reftarget']}"
        return _linked(app, env, node, content, "class", full)
    if node.get("reftype") != "backticks":
        return None
    target = node["reftarget"]
    # An attribute that is described with its class has no entry of its own.
    owner = target.rpartition(".")[0] if target[0].isupper() else ""
    for name in filter(None, (target, owner)):
        for full in _places(name, node, objects):
            if full in objects and objects[full].objtype != "module":
                return _linked(app, env, node, content, "obj", full)
    return content


def _places(
    name: str, node: addnodes.pending_xref, objects: Mapping[str, ObjectEntry]
) -> list[str]:
    """Full names that a name may stand for, the nearest first."""
    module = node.get("py:module") or ""
    places = [f"{module}.{node.get('py:class')}.{name}", f"{module}.{name}", name]
    places.append(f"lorambo_alloc.{name}")
    if not module.startswith("lorambo_alloc"):
        ending = f".{name}"
        classes = {full for full, entry in objects.items() if entry.objtype in _CLASSES}
        # Of the submodular part only classes: `curvature` is an argument of many adapters.
        within = ("lorambo_adapters.", "lorambo_alloc.submodular.")[: 1 + name[0].isupper()]
        others = [
            full
            for full, entry in objects.items()
            if full.endswith(ending) and full.removesuffix(ending) not in classes
            if full.startswith(within) and not entry.aliased
        ]
        places += others if len(others) == 1 else []
    return places


def _linked(
    app: Sphinx,
    env: BuildEnvironment,
    node: addnodes.pending_xref,
    content: nodes.TextElement,
    kind: str,
    full: str,
) -> nodes.Node | None:
    domain = env.domains.python_domain
    return domain.resolve_xref(env, node["refdoc"], app.builder, kind, full, node, content)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the role and what resolves it."""
    app.add_role("backticks", backticks)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
