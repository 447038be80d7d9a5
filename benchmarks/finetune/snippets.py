"""Movie-review snippets with their ratings, and their split into train, dev and test.

10,605 snippets, each rated from -4 to 4 by 20 people (Hutto and Gilbert, ICWSM 2014). A snippet is
positive where its mean rating is above 0. Those whose mean is 0 and repeated texts are left out.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

TRAIN, DEV = 6000, 2566


@dataclass(frozen=True)
class Snippet:
    """A sentence of a film review.

    Attributes:
        text: of it.
        label: 1 where its mean rating is above 0, else 0.
    """

    text: str
    label: int


def read(path: Path) -> dict[str, list[Snippet]]:
    """The snippets of a file, by "train", "dev" and "test", in an order that the texts decide.

    The order is that of the texts' SHA-256, so that it depends on no random generator.

    Raises:
        ValueError: a line is not "ID <tab> rating <tab> text", with a finite number as rating.
    """
    found: dict[str, Snippet] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        parts = line.split("\t")
        if len(parts) != 3:
            raise ValueError(f"{path}:{number}: expected ID, rating and text, got {line[:60]!r}")
        rating, text = _rating(parts[1]), " ".join(parts[2].split())
        if not math.isfinite(rating):
            raise ValueError(f"{path}:{number}: expected a number as rating, got {parts[1]!r}")
        if rating and text:
            found.setdefault(text, Snippet(text, int(rating > 0)))
    ordered = sorted(found.values(), key=lambda s: hashlib.sha256(s.text.encode()).digest())
    return {
        "train": ordered[:TRAIN],
        "dev": ordered[TRAIN : TRAIN + DEV],
        "test": ordered[TRAIN + DEV :],
    }


def _rating(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
