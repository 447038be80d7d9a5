"""Formats that need no framework: axolotl, Unsloth, vLLM, sd-scripts' arguments, and the texts."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorambo_adapters.ranks.formats import (
    ranks_of,
    to_axolotl,
    to_kohya,
    to_lycoris,
    to_peft,
    to_unsloth,
    to_vllm,
    toml_text,
    yaml_text,
)
from lorambo_adapters.ranks.scaling import alpha_for
from lorambo_alloc import allocate
from tests.strategies import examples

ROOT = Path(__file__).resolve().parents[2]
RANKS = {"layers.1.q_proj": 3, "layers.11.q_proj": 8, "layers.1.v_proj": 0, "layers.2.v_proj": 3}
KEYS = {"layers.1.q_proj": r"^layers\.1\.q_proj", "layers.2.v_proj": r"^layers\.2\.v_proj"}


def test_no_framework_is_imported_for_writing_or_reading(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is absent")
    import numpy as np

    factors = {"q.lora_A.weight": np.ones((2, 5)), "q.lora_B.weight": np.ones((4, 2))}
    factors = {f"base_model.model.{name}": array for name, array in factors.items()}
    safetensors.save_file(factors, tmp_path / "adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    code = f"""
import sys

for name in ("torch", "peft", "transformers"):
    sys.modules[name] = None
from lorambo_adapters.ranks.formats import *
ranks = {RANKS!r}
to_peft(ranks, modules=list(ranks)), to_axolotl(ranks), to_unsloth(ranks), to_vllm(ranks, cap=8)
to_lycoris(ranks)
write_kohya_seed({str(tmp_path / "s.safetensors")!r}, ranks, dict.fromkeys(ranks, (9, 9)))
found = ranks_of({str(tmp_path / "s.safetensors")!r})
assert sorted(found.values()) == [3, 3, 8], found
found = ranks_of({str(tmp_path)!r})
assert (dict(found), found.scales, found.shapes) == ({{"q": 2}}, {{"q": 3.0}}, {{"q": (4, 5)}})
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'adapters'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@settings(max_examples=examples(2))
@given(st.integers(1, 512), st.floats(1e-3, 1e3), st.booleans())
def test_the_scale_comes_back_to_the_last_place(rank, scale, rslora):
    alpha = alpha_for(rank, scale, rslora)
    factor = rank**0.5 if rslora else rank
    assert abs(alpha / factor - scale) <= 2.0**-52 * scale
    assert type(alpha) is (int if float(alpha).is_integer() else float)


def test_axolotl_entries():
    entries = to_axolotl(RANKS, alpha=16, r=4)
    assert entries["lora_r"] == 8
    assert entries["lora_alpha"] == 32
    assert entries["lora_rank_pattern"] == dict.fromkeys(KEYS.values(), 3)
    assert entries["lora_alpha_pattern"] == dict.fromkeys(KEYS.values(), 12)
    assert entries["lora_target_modules"] == sorted(name for name in RANKS if RANKS[name])
    assert "lora_dropout" not in entries
    experts = {f"layers.0.experts.up.{i}": 2 for i in range(3)}
    entries = to_axolotl({**RANKS, **experts}, target_parameters=["experts.up"])
    assert entries["lora_target_parameters"] == ["layers.0.experts.up"]
    assert entries["lora_dropout"] == 0.0


@pytest.mark.parametrize("rslora", [False, True])
def test_axolotl_gets_a_whole_alpha_and_every_layer_its_own(rslora):
    entries = to_axolotl(RANKS, scale=0.1, rslora=rslora)
    assert type(entries["lora_alpha"]) is int
    assert len(entries["lora_alpha_pattern"]) == 3  # of all layers, as the default is not exact
    for key, rank in entries["lora_rank_pattern"].items():
        factor = rank**0.5 if rslora else rank
        assert entries["lora_alpha_pattern"][key] / factor == pytest.approx(0.1, rel=1e-15)


SCALARS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",))), st.booleans(), st.integers(0, 10**6),
    st.floats(1e-12, 1e12),
)  # fmt: skip
WORDS = st.sampled_from(["lora_r", "alpha", "target_modules", "use_dora"])
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1)


@settings(max_examples=examples(1))
@given(
    st.dictionaries(
        WORDS, st.one_of(SCALARS, st.lists(SCALARS), st.dictionaries(TEXTS, SCALARS)), min_size=1
    )
)
@example({"lora_r": "\x85 \u2028 \ufeff \uffff \x7f \U0001f600", "alpha": 1e-7})
def test_yaml_is_read_back(entries):
    yaml = pytest.importorskip("yaml", reason="PyYAML is absent")
    assert yaml.safe_load(yaml_text(entries)) == entries


@settings(max_examples=examples(1))
@given(
    st.dictionaries(
        WORDS,
        st.one_of(
            SCALARS,
            st.lists(SCALARS),
            st.dictionaries(TEXTS, st.one_of(SCALARS, st.dictionaries(TEXTS, SCALARS))),
        ),
    )
)
@example({"lora_r": "\x85 \u2028 \ufeff \uffff \x7f \U0001f600", "alpha": {"\x00": 1e-7}})
def test_toml_is_read_back(entries):
    assert tomllib.loads(toml_text(entries)) == entries


def test_presets_are_read_back():
    for component in ("model", "unet", "text_encoder"):
        preset = to_lycoris(RANKS, scale=0.25, component=component)
        assert tomllib.loads(toml_text(preset)) == preset
        # The package that LyCORIS reads with leaves escapes in keys as they are.
        assert not any("\\" in key for key in preset["name_algo_map"])
    with pytest.raises(ValueError, match="component: expected 'model', 'unet' or"):
        to_lycoris(RANKS, component="vae")  # pyright: ignore[reportArgumentType]


def test_unsloth_keywords():
    config = to_unsloth(RANKS, scale=2.0, rslora=True)
    expected = to_peft(RANKS, scale=2.0, rslora=True)
    assert config == {**expected, "target_parameters": []}
    # Unsloth walks over it: a string would fall into letters.
    assert type(config["target_modules"]) is list
    with pytest.raises(ValueError, match=r"layer 'model.embed_tokens'.*train all"):
        to_unsloth({**RANKS, "model.embed_tokens": 2})
    to_unsloth({**RANKS, "lm_head": 0})
    with pytest.raises(ValueError, match="expected no adapter"):
        to_unsloth({"q": 1, "layers.q": 0})


def test_vllm_sizes_caps_and_warnings():
    for largest, size in ((1, 1), (5, 8), (8, 8), (9, 16), (257, 320), (512, 512)):
        config, max_lora_rank = to_vllm({"q": largest, "k": largest})
        assert config["r"] == largest
        assert max_lora_rank == size
    with pytest.raises(ValueError, match=r"layer 'q': expected a rank of at most 512, got 513"):
        to_vllm({"q": 513})
    with pytest.raises(ValueError, match=r"at most 16, got 17; allocate with max_rank=16"):
        to_vllm({"q": 17, "k": 3}, cap=16)
    with pytest.raises(ValueError, match="cap: expected a whole number"):
        to_vllm({"q": 17}, cap=0)


def test_vllm_warns_of_what_it_would_set_aside():
    # 16 ranks in each of three layers for 16 + 7 + 1 of them: exactly twice.
    to_vllm({"q": 16, "k": 7, "v": 1})
    with pytest.warns(UserWarning, match=r"max_lora_rank=16 ranks in every layer, 2.1 times"):
        to_vllm({"q": 16, "k": 6, "v": 1})
    with pytest.warns(UserWarning, match=r"4.0 times.*max_rank of 8"):
        to_vllm({"q": 16, "k": 0, "v": 0, "o": 0})
    # By parameters, where they are known: 8 x 110 for 8 x 100.
    allocation = allocate(
        {"q": [2.0] * 8, "k": [0.1] * 8}, 800, costs={"q": 100, "k": 10}, max_rank=8
    )
    assert dict(allocation) == {"q": 8, "k": 0}
    assert to_vllm(allocation)[1] == 8


def test_vllm_experts():
    ranks: dict[str, int] = {"q": 8, **{f"experts.up.{i}": 4 for i in range(3)}}
    config, _ = to_vllm(ranks, target_parameters=["experts.up"])
    assert config["r"] == 8
    assert config["rank_pattern"] == {r"^experts\.up": 4}
    assert to_peft(ranks, target_parameters=["experts.up"])["rank_pattern"] == {"^q": 8}


def unet(model):
    """sd-scripts' names of modules in the transformers of a U-Net, one block after another."""
    if model == "sd":
        blocks = [f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)]
        blocks += ["mid_block.attentions.0"]
        blocks += [f"up_blocks.{i}.attentions.{j}" for i in range(1, 4) for j in range(3)]
    else:
        blocks = [f"input_blocks.{i}.1" for i in (4, 5, 7, 8)] + ["middle_block.1"]
        blocks += [f"output_blocks.{i}.1" for i in range(6)]
    parts = ("proj_in", "proj_out", "transformer_blocks.0.attn1.to_q")
    return {block: [f"{block}.{part}" for part in parts] for block in blocks}


def block_index(name, model):
    """sd-scripts' `get_block_index` (networks/lora.py), for modules of transformers."""
    pieces = name.split(".")
    if model == "sd":
        if pieces[0] == "mid_block":
            return 12
        at = 3 * int(pieces[1]) + int(pieces[3])
        return (1 if pieces[0] == "down_blocks" else 13) + at
    start = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}[pieces[0]]
    return start + int(pieces[1])


@pytest.mark.parametrize("model", ["sd", "sdxl"])
@pytest.mark.parametrize("underscores", [False, True])
def test_block_dimensions(model, underscores):
    blocks = unet(model)
    of_block = {block: (3 * i) % 5 for i, block in enumerate(blocks)}
    ranks = {name: of_block[block] for block, names in blocks.items() for name in names}
    given = {f"lora_unet_{n.replace('.', '_')}": r for n, r in ranks.items()}
    found = to_kohya(given if underscores else ranks, scale=0.5, model=model, modules=ranks)
    text = dict(argument.split("=") for argument in found)
    dims = [int(part) for part in text["block_dims"].split(",")]
    alphas = [float(part) for part in text["block_alphas"].split(",")]
    assert len(dims) == len(alphas) == (25 if model == "sd" else 23)
    for name, rank in ranks.items():
        index = block_index(name, model)
        assert dims[index] == rank
        if rank:
            assert alphas[index] / rank == 0.5
    assert sum(map(bool, dims)) == sum(map(bool, of_block.values()))


def test_block_dimensions_that_would_not_be_exact_are_refused():
    q, k = ("input_blocks.4.1.transformer_blocks.0.attn1.to_q", "input_blocks.4.1.proj_in")
    cases: list[tuple[Any, Any, str]] = [
        ({q: 2, k: 3}, {}, r"expected rank 2 as elsewhere in block 5.*got 3"),
        ({q: 2, k: 0}, {}, r"expected rank 2 as elsewhere in block 5.*got 0"),
        ({q: 2}, {"modules": [q, k]}, "sd-scripts gives it that of block 5"),
        ({"input_blocks.4.0.in_layers.2": 2}, {}, "expected a module in a transformer"),
        ({"input_blocks.9.1.proj_in": 2}, {}, "expected a module in a transformer"),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1": 2}, {}, "expected a module in a"),
        ({"down_blocks.0.resnets.0.conv1": 2}, {"model": "sd"}, "expected a module in a"),
        ({"down_blocks.4.attentions.0.proj_in": 2}, {"model": "sd"}, "expected a module in a"),
        ({q: 2}, {"model": "flux"}, "model: expected 'sd' or 'sdxl'"),
    ]
    for ranks, options, message in cases:
        with pytest.raises(ValueError, match=message):
            to_kohya(ranks, **options)
    assert to_kohya({q: 2, "input_blocks.7.1.proj_in": 0}, modules=[q])[0].count(",") == 22


def test_configurations_without_what_is_needed_are_refused(tmp_path):
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["q"]}
    cases: list[tuple[Any, Any, str]] = [
        (config, None, "expected modules"),
        (config, ["k"], "expected targets among the modules, got none"),
        ({**config, "target_modules": "all-linear"}, ["q"], "got 'all-linear'"),
        ({**config, "peft_type": "ADALORA"}, ["q"], "expected peft_type LORA, got ADALORA"),
        ({**config, "target_parameters": ["w"]}, ["q"], "expected a model for target_parameters"),
        ({**config, "r": 0}, ["q"], "expected whole ranks"),
    ]
    for entries, modules, message in cases:
        with pytest.raises(ValueError, match=message):
            ranks_of(entries, modules=modules)
    assert ranks_of({**config, "exclude_modules": ["k.q"]}, modules=["q", "k.q", "v.q"]) == {
        "q": 2,
        "v.q": 2,
    }
