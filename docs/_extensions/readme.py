"""Pages made of README.md: its beginning on the first page, all of it as the overview."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

_IMAGE = re.compile(r'(<img\b[^>]*\bsrc=")([^":]+)"')
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def fill(app: Sphinx, name: str, source: list[str]) -> None:
    """Put README.md's text in place of a page's `{{ readme start }}` or `{{ readme }}`."""
    if name not in ("index", "overview"):
        return
    root = Path(app.srcdir).parent
    readme = (root / "README.md").read_text(encoding="utf-8")
    title, _, body = readme.partition("\n")
    if not title.startswith("# "):
        raise ValueError(f"README.md: expected a title in the first line, got {title!r}")
    start = body.partition("\n## ")[0]
    page = source[0].replace("{{ readme start }}", _relinked(start, root, "overview.md"))
    source[0] = page.replace("{{ readme }}", _relinked(body, root, ""))


def _relinked(text: str, root: Path, page: str) -> str:
    """Text whose links work in the built pages.

    A link to another page leads there. One to another file of the repository becomes its text.
    A link to a file that is not there stays as it is, and the build complains of it. Pictures are
    looked for from the folder of the pages.
    """

    def link(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        if target.startswith("#"):
            return f"[{label}]({page}{target})"
        if target.startswith("docs/") and not mark:
            return f"[{label}]({target.removeprefix('docs/')})"
        if "://" in target or not (root / target.partition("#")[0]).exists():
            return match[0]
        return f"![{label}](../{target})" if mark else label

    return _IMAGE.sub(r'\1../\2"', _LINK.sub(link, text))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the pages' source."""
    app.connect("source-read", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
