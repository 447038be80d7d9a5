"""Sphinx settings: the reference is built from docstrings, the overview from README.md."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The checkout's own sources, installed or not, and the small extensions beside this file.
sys.path[:0] = [str(ROOT), str(ROOT / "adapters"), str(ROOT / "docs" / "_extensions")]

project = "lorambo-alloc"
author = "lorambo-alloc contributors"
copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "array_types",
    "docstring_markup",
    "backticks",
    "command_line",
    "completeness",
    "readme",
]
exclude_patterns = ["_build", "_extensions"]
smartquotes_action = "D"  # dashes alone: options in quotes are code

html_theme = "furo"
html_title = "lorambo-alloc"
html_show_sourcelink = False

default_role = "backticks"
add_module_names = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

myst_heading_anchors = 3
myst_enable_extensions = ["html_image"]  # README.md may give a picture's width

nitpicky = True
# No inventory of another project is fetched, so that the build needs no network.
_OTHERS = "collections|fractions|numpy|np|npt|os|pathlib|torch|transformers|types|matplotlib"
nitpick_ignore_regex = [
    (r"py:.*", rf"({_OTHERS})\..*"),
    # Annotations of what only a type checker imports (Figure, Path) do not say where it is from.
    (r"py:class", r"[A-Z]\w*"),
]

# The modules whose public names must all have an entry (completeness.py); README.md's are added.
reference_modules = [
    "lorambo_alloc",
    "lorambo_alloc.baselines",
    "lorambo_alloc.online",
    "lorambo_alloc.plots",
    "lorambo_alloc.submodular",
    "lorambo_alloc.testing",
    "lorambo_adapters.calibration",
    "lorambo_adapters.layers",
    "lorambo_adapters.plan",
    "lorambo_adapters.ranks.calibrated",
    "lorambo_adapters.ranks.calibrated_result",
    "lorambo_adapters.ranks.compress",
    "lorambo_adapters.ranks.extract",
    "lorambo_adapters.ranks.formats",
    "lorambo_adapters.ranks.lora_result",
    "lorambo_adapters.ranks.resize",
    "lorambo_adapters.ranks.refit",
    "lorambo_adapters.ranks.resize_report",
    "lorambo_adapters.ranks.truncate",
    "lorambo_adapters.ranks.weighted_cut",
    "lorambo_adapters.spectra.activations",
    "lorambo_adapters.spectra.checkpoints",
    "lorambo_adapters.spectra.curvature",
    "lorambo_adapters.spectra.decompose",
    "lorambo_adapters.spectra.directions",
    "lorambo_adapters.spectra.distributed",
    "lorambo_adapters.spectra.fisher",
    "lorambo_adapters.spectra.gradients",
    "lorambo_adapters.spectra.kronecker",
    "lorambo_adapters.spectra.lora",
    "lorambo_adapters.spectra.loss_units",
    "lorambo_adapters.spectra.low_rank",
    "lorambo_adapters.spectra.probe",
    "lorambo_adapters.spectra.sketcher",
    "lorambo_adapters.spectra.weights",
    "lorambo_adapters.spectra.whitening",
    "lorambo_adapters.trainer",
    "lorambo_adapters.trainer_callback",
    "lorambo_adapters.training.probe",
]
# Without an underscore because modules beside them use them; callers have no need to.
reference_left_out = {
    "lorambo_adapters.spectra.checkpoints": ["differences", "layer_pairs"],
    "lorambo_adapters.spectra.decompose": ["exact_method", "is_exact", "squared_norm"],
    "lorambo_adapters.ranks.refit": ["passes"],
    "lorambo_adapters.spectra.curvature": ["add_terms"],
    "lorambo_adapters.spectra.directions": ["first_dimension"],
    "lorambo_adapters.spectra.fisher": ["FisherLoss", "compared", "labelled_logits", "same_number"],
    "lorambo_adapters.spectra.low_rank": ["misfits", "pair_of", "refuse", "weighted_core"],
    "lorambo_adapters.spectra.probe": ["cycled"],
    "lorambo_adapters.spectra.sketcher": ["positive_scale"],
}
