"""Names that look like one another: every layer its own rank by PEFT's own matching functions."""

import json
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
peft = pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

from peft.tuners.tuners_utils import (  # noqa: E402
    _find_minimal_target_modules,
    check_target_module_exists,
)
from peft.utils.other import get_pattern_key  # noqa: E402

from lorambo_adapters.ranks.formats import ranks_of, to_lycoris, to_peft  # noqa: E402
from tests.strategies import examples  # noqa: E402

# Parts that make prefixes, suffixes and look-alikes of one another, as expressions too.
PLAIN = ("layers", "1", "11", "q", "0", "a-b", "a_b", "x1")
SPECIAL = ("q+", "(q|0)", "[01]", ".*", "^q", "q$", "a|q", "\\d", "é", "q?", "{2}", "1\\")


@st.composite
def ranked(draw, parts):
    """Names and their ranks, some of them 0."""
    piece = st.sampled_from(parts)
    name = st.lists(piece, min_size=1, max_size=4).map(".".join)
    names = draw(st.lists(name, min_size=1, max_size=8, unique=True))
    ranks = {name: draw(st.sampled_from([0, 1, 2, 2, 4])) for name in names}
    ranks[names[0]] = ranks[names[0]] or 3
    return ranks


def by_peft(config, name):
    """Rank and alpha of a module as PEFT finds them, from the configuration as it saves it."""
    found = []
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        saved = json.loads(json.dumps(config[pattern], sort_keys=True))
        assert list(saved) == list(config[pattern])
        found.append(saved.get(get_pattern_key(saved.keys(), name), config[default]))
    return found


def by_peft_014(config, name):
    """The same by the rule of PEFT 0.14 (`utils/other.py`)."""
    found = []
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        keys = config[pattern]
        key = next((key for key in keys if re.match(rf".*\.{key}$", name)), name)
        found.append(keys.get(key, config[default]))
    return found


@settings(max_examples=examples(2))
@given(ranked(PLAIN + SPECIAL), st.sampled_from([1.0, 0.5, 3.0]), st.booleans())
@example({"layers.1": 2, "layers.11": 4, "layers": 1, "1": 0, "11": 0}, 1.0, False)
def test_exact_keys_and_targets(ranks, scale, rslora):
    config = to_peft(ranks, scale=scale, rslora=rslora, modules=ranks)
    lora = peft.LoraConfig(**config)
    assert list(config["rank_pattern"]) == list(config["alpha_pattern"])
    for name, rank in ranks.items():
        assert bool(check_target_module_exists(lora, name)) == bool(rank)
        # No key of another layer has a say, wherever it stands.
        for key in config["rank_pattern"]:
            assert bool(re.match(rf"(.*\.)?({key})$", name)) == (key == "^" + re.escape(name))
        if rank:
            factor = rank**0.5 if rslora else rank
            found, alpha = by_peft(config, name)
            assert found == rank
            assert alpha / factor == pytest.approx(scale, rel=2.0**-52)
    default = config["r"] ** 0.5 if rslora else config["r"]
    assert config["lora_alpha"] / default == pytest.approx(scale, rel=2.0**-52)
    read = ranks_of(lora, modules=list(ranks))
    assert read == {name: rank for name, rank in ranks.items() if rank}


@settings(max_examples=examples(2))
@given(ranked(PLAIN + SPECIAL))
def test_lists_are_exact_or_refused(ranks):
    kept = {name for name, rank in ranks.items() if rank}
    # The modules that are known of: these, and those that they lie in.
    pieces = [name.split(".") for name in ranks]
    known = {".".join(path[: i + 1]) for path in pieces for i in range(len(path))}
    clash = any(other.endswith(f".{name}") for name in kept for other in known - kept)
    if clash:
        with pytest.raises(ValueError, match="expected no adapter"):
            to_peft(ranks, targets="list")
        assert isinstance(to_peft(ranks)["target_modules"], str)
        return
    config = to_peft(ranks)
    assert config["target_modules"] == sorted(kept)
    others = known - kept
    # What PEFT makes of a list of 20 entries or more.
    shorter = _find_minimal_target_modules(config["target_modules"], others)
    for targets in (config["target_modules"], sorted(shorter)):
        lora = peft.LoraConfig(target_modules=targets)
        assert {name for name in known if check_target_module_exists(lora, name)} == kept


@settings(max_examples=examples(2))
@given(ranked(PLAIN))
@example({"layers.1": 2, "1": 4})
@example({"q.x1": 2, "1.q.x1": 2, "q-x1": 4, "1.q-x1": 1})
def test_suffix_keys_are_exact_in_any_order_or_refused(ranks):
    kept = {name: rank for name, rank in ranks.items() if rank}
    wrong = any(
        re.match(rf"(.*\.)?({key})$", name) and kept[key] != rank
        for name, rank in kept.items()
        for key in kept
    )
    if wrong:
        with pytest.raises(ValueError, match="catches it too"):
            to_peft(ranks, keys="suffix")
        return
    config = to_peft(ranks, keys="suffix")
    for name, rank in kept.items():
        assert by_peft(config, name) == [rank, rank]
        assert by_peft(config, f"base_model.model.{name}") == [rank, rank]  # as EVA asks
        assert by_peft_014(config, name) == [rank, rank]


@pytest.mark.parametrize("name", ["a b", "q+", "q(1)", "q|k", "é+"])
def test_suffix_keys_of_names_that_are_expressions_are_refused(name):
    with pytest.raises(ValueError, match="a suffix key is a regular expression"):
        to_peft({name: 2, "other": 3}, keys="suffix")


@settings(max_examples=examples(2))
@given(ranked(PLAIN + SPECIAL))
@example({"layers.1": 2, "layers.11": 4, "layers.1.q": 0})
def test_lycoris_keys_match_by_its_own_rule(ranks):
    joined = [name.replace(".", "_") for name in ranks]
    if len(set(joined)) < len(joined):
        with pytest.raises(ValueError, match="does not tell apart"):
            to_lycoris(ranks)
        return
    preset = to_lycoris(ranks, scale=2.0)
    for name, rank in ranks.items():
        # LyCORIS 4.1.3: the exact key, then `re.match`, the first that fits.
        targets = [key for key in preset["target_name"] if key == name or re.match(key, name)]
        assert len(targets) == bool(rank)
        if rank:
            expected = {"algo": "lora", "dim": rank, "alpha": 2 * rank}
            assert preset["name_algo_map"][targets[0]] == expected


def test_what_is_not_ranks_is_refused():
    cases: list[tuple[Any, str]] = [
        ({"q": 0, "k": 0}, "got 0 in all of 2 layers"),
        ({}, "got 0 in all of 0 layers"),
        ({"q": -1}, "layer 'q': rank: expected a whole number >= 0, got -1"),
        ({"q": 1.5}, "layer 'q': rank"),
        ({"q": True}, "layer 'q': rank"),
        ({"": 1}, "expected the names of layers"),
        ({3: 1}, "expected the names of layers, got 3"),
        ([("q", 1)], "expected a mapping"),
    ]
    for ranks, message in cases:
        with pytest.raises(ValueError, match=message):
            to_peft(ranks)
    cases = [
        ({"scale": 0}, "scale: expected a finite number > 0"),
        ({"scale": float("nan")}, "scale: expected a finite number > 0"),
        ({"scale": "2"}, "scale: expected a finite number > 0"),
        ({"alpha": 16}, "either scale, or alpha and r"),
        ({"r": 16}, "either scale, or alpha and r"),
        ({"alpha": 16, "r": 8, "scale": 2}, "either scale, or alpha and r"),
        ({"alpha": 16, "r": 0}, "r: expected a whole number >= 1"),
        ({"keys": "prefix"}, "keys: expected 'exact' or 'suffix'"),
        ({"targets": "glob"}, "targets: expected 'auto', 'list' or 'regex'"),
        ({"modules": "q"}, "modules: expected a model or names"),
        ({"modules": [1]}, "modules: expected a model or names"),
        ({"modules": ["k"]}, "layer 'q': expected a name in modules"),
        ({"target_parameters": "q"}, "target_parameters: expected a list"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            to_peft({"q": 2}, **options)
