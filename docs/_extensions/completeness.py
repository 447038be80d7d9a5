"""A public name without an entry in the reference is a warning, and so an error under -W."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

_MENTION = re.compile(r"\blorambo_(?:alloc|adapters)(?:\.[a-z_]+)+")


def public_names(module: ModuleType) -> list[str]:
    """`__all__`, or the functions and classes defined in the module, without underscore."""
    named = getattr(module, "__all__", None)
    if named is not None:
        return list(named)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]


def missing(
    modules: Collection[str], left_out: Mapping[str, Collection[str]], entries: Collection[str]
) -> Iterator[str]:
    """What the reference lacks, and what of `left_out` is no longer there to be left out."""
    top = importlib.import_module("lorambo_alloc")
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            yield f"{name} cannot be imported: {error}"
            continue
        names = public_names(module)
        out = left_out.get(name, ())
        for public in names:
            entry = f"{name}.{public}"
            # A subpackage may name again what the top level has.
            if getattr(top, public, None) is getattr(module, public):
                entry = f"lorambo_alloc.{public}"
            if entry not in entries and public not in out:
                yield f"{name}.{public} is public and has no entry in the reference"
        for gone in set(out) - set(names):
            yield f"{name}.{gone} is left out of the reference, but is not public or not there"


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Compare the modules that conf.py lists, and those README.md and the guide name, with them."""
    entries = env.domains.python_domain.objects
    modules, left_out = app.config.reference_modules, app.config.reference_left_out
    logger = logging.getLogger(__name__)
    for complaint in missing(modules, left_out, entries):
        logger.warning(complaint, type="reference", subtype="missing")
    pages = [Path(app.srcdir).parent / "README.md", *sorted(Path(app.srcdir).glob("guide/*.md"))]
    for page in pages:
        for name in sorted(set(_MENTION.findall(page.read_text(encoding="utf-8")))):
            if not any(entry == name or entry.startswith(f"{name}.") for entry in entries):
                logger.warning(f"{page.name} names {name}, which the reference has nothing of")


def setup(app: Sphinx) -> dict[str, bool]:
    """Check once all pages are read."""
    app.add_config_value("reference_modules", [], "env")
    app.add_config_value("reference_left_out", {}, "env")
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
