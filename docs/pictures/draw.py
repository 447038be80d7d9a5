"""Draw README.md's picture from the shipped spectra (extra `plot`)."""

from __future__ import annotations

from pathlib import Path

from lorambo_alloc import Spectra, allocate, uniform_rank
from lorambo_alloc.plots import rank_map

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Uniform ranks beside the best ones, at one budget."""
    spectra = Spectra.load(HERE.parents[1] / "examples" / "all-MiniLM-L6-v2.npz")
    best = allocate(spectra, uniform_rank(8), max_rank=64)
    share = best.value / allocate(spectra, uniform_rank(8), min_rank=8, max_rank=8).value
    figure = rank_map(
        {
            f"rank 8 in every layer\n{best.budget:,} parameters": dict.fromkeys(spectra, 8),
            f"allocate\n{best.cost:,} parameters, {share - 1:.0%} more captured": best,
        }
    )
    figure.savefig(HERE / "ranks.png", dpi=130)


if __name__ == "__main__":
    main()
