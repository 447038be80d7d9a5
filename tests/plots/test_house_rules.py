"""All pictures: no pyplot, no global state, and a word where matplotlib is absent."""

import builtins
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is absent: pip install 'lorambo-alloc[plot]'")

import matplotlib as mpl
from matplotlib.figure import Figure

from lorambo_alloc import RankHistory, compare, plots
from lorambo_alloc import frontier as frontier_of
from lorambo_alloc.plots.style import percent_down

SPECTRA = {f"layers.{b}.{m}": [3.0 + b, 2.0, 1.0] for b in range(5) for m in "qv"}


def history() -> RankHistory:
    found = RankHistory({"layers.0.q": 10})
    found.record(0, {"layers.0.q": 1}, budget=40)
    return found


PICTURES: dict[str, Callable[..., Figure]] = {
    "against_baselines": lambda **k: plots.against_baselines(compare(SPECTRA, 5), **k),
    "frontier": lambda **k: plots.frontier(frontier_of(SPECTRA), target=0.5, **k),
    "intervals": lambda **k: plots.intervals([("g", "a", 1.0, 0.0, 2.0)], **k),
    "predicted_against_real": lambda **k: plots.predicted_against_real({"a": 1}, {"a": 2}, **k),
    "rank_history": lambda **k: plots.rank_history(history(), **k),
    "rank_map": lambda **k: plots.rank_map({"layers.0.q": 1, "head": 20}, **k),
    "regret_by_round": lambda **k: plots.regret_by_round({"a": np.ones(3)}, **k),
    "spectra": lambda **k: plots.spectra(SPECTRA, **k),
}


def test_every_picture_is_here():
    assert sorted(PICTURES) == sorted(plots.__all__)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_written_and_nothing_global_is_left(name, tmp_path):
    before = copy.deepcopy(dict(mpl.rcParams))
    figure = PICTURES[name]()
    for ending in ("png", "pdf"):
        figure.savefig(tmp_path / f"picture.{ending}")
        assert (tmp_path / f"picture.{ending}").stat().st_size > 1000
    assert dict(mpl.rcParams) == before


# The rows of a history bear the names of layers, which need no label.
@pytest.mark.parametrize("name", sorted(PICTURES.keys() - {"rank_history"}))
def test_every_axis_has_a_label(name):
    for ax in PICTURES[name]().axes:
        assert ax.get_xlabel() or ax.get_ylabel() or ax.get_title()


@pytest.mark.parametrize("name", PICTURES)
def test_it_says_what_to_install(name, monkeypatch):
    original = builtins.__import__

    def absent(module, *arguments, **keywords):
        if module.startswith("matplotlib"):
            raise ImportError(module)
        return original(module, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install 'lorambo-alloc\[plot\]'"):
        PICTURES[name]()


def test_pyplot_is_never_imported():
    code = (
        "import runpy, sys\n"
        "for draw in runpy.run_path(sys.argv[1])['PICTURES'].values(): draw()\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, __file__],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("share", "said"), [(1.0, "100.00 %"), (0.99999, "99.99 %"), (0.29, "29.00 %"), (0.0, "0.00 %")]
)
def test_percentages_are_rounded_down(share, said):
    assert percent_down(share) == said
