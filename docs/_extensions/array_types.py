"""Arrays in signatures, as the source writes them: NDArray[float64]."""

from __future__ import annotations

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

_OPEN, _CLOSE = "ndarray[tuple[Any, ...], dtype[", "]]"


def shorten(app: Sphinx, doctree: nodes.document) -> None:
    """Replace ndarray[tuple[Any, ...], dtype[float64]] by NDArray[float64].

    An annotation is a flat row of nodes, one a name, bracket or comma.
    """
    for signature in doctree.findall(addnodes.desc_signature):
        starts = [
            node
            for node in signature.findall(addnodes.pending_xref)
            if node.get("reftarget") == "numpy.ndarray"
        ]
        for start in starts:
            _shorten_at(start)


def _shorten_at(start: addnodes.pending_xref) -> None:
    parent = start.parent
    first = parent.index(start)
    text = ""
    for last in range(first, len(parent)):
        text += parent[last].astext()
        if text.startswith(_OPEN) and text.endswith(_CLOSE):
            dtype = text.removeprefix(_OPEN).removesuffix(_CLOSE)
            parent[first : last + 1] = [nodes.Text(f"NDArray[{dtype}]")]
            return


def setup(app: Sphinx) -> dict[str, bool]:
    """Shorten while pages are read."""
    app.connect("doctree-read", shorten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
