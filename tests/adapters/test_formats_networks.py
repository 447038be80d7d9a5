"""Ranks in LyCORIS, kohya's sd-scripts and Diffusers: what their own code makes of our files."""

import importlib
import re
import warnings
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
pytest.importorskip("safetensors", reason="safetensors is absent")

from safetensors.torch import load_file, save_file  # noqa: E402

from lorambo_adapters.ranks.formats import (  # noqa: E402
    ranks_of,
    to_lycoris,
    to_peft,
    toml_text,
    write_kohya_seed,
)
from lorambo_adapters.spectra.lora import lora_spectra  # noqa: E402


@pytest.fixture
def lycoris():
    # Its kernels are optional, and it says so at import.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(
            "lycoris", reason="lycoris is absent: pip install --no-deps lycoris-lora"
        )
        return importlib.import_module("lycoris.wrapper"), importlib.import_module("lycoris.kohya")


@pytest.fixture
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("diffusers", reason="diffusers is absent")
        pytest.importorskip("peft", reason="peft is absent")
    return module


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3)
        self.pointwise = torch.nn.Conv2d(5, 4, 1)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(6, 4) for _ in range(12)])


def network():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"block": Block(), "block_2": torch.nn.Linear(6, 4)})


RANKS = {f"block.layers.{i}": i % 4 for i in range(12)}
RANKS |= {"block.conv": 3, "block.pointwise": 2, "block_2": 0}
KEPT = {name: rank for name, rank in RANKS.items() if rank}
SHAPES = {f"block.layers.{i}": (4, 6) for i in range(12)}
SHAPES |= {"block.conv": (5, 3, 3, 3), "block.pointwise": (4, 5, 1, 1), "block_2": (4, 6)}
COST = sum(r * (SHAPES[n][0] + int(np.prod(SHAPES[n][1:]))) for n, r in RANKS.items())


def joined(prefix, names):
    return {f"{prefix}_{name.replace('.', '_')}": value for name, value in names.items()}


def test_lycoris_makes_these_ranks_and_saves_them(lycoris, tmp_path):
    wrapper, _ = lycoris
    # What an earlier preset left in the class would otherwise still be there.
    wrapper.LycorisNetwork.apply_preset(
        {"target_module": ["Linear"], "use_fnmatch": True, "exclude_name": ["block.layers.*"]}
    )
    preset = tmp_path / "preset.toml"
    preset.write_text(toml_text(to_lycoris(RANKS, scale=0.5)), encoding="utf-8")
    model = network()
    made = wrapper.create_lycoris(model, 1.0, linear_dim=1, linear_alpha=1, preset=str(preset))
    made.apply_to()
    assert {lora.lora_name: lora.lora_dim for lora in made.loras} == joined("lycoris", KEPT)
    assert {lora.scale for lora in made.loras} == {0.5}
    assert sum(p.numel() for p in made.parameters()) == COST
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    made.save_weights(str(tmp_path / "lora.safetensors"), None, {})
    found = ranks_of(tmp_path / "lora.safetensors")
    assert found == joined("lycoris", KEPT)
    assert set(found.scales.values()) == {0.5}
    assert found.parameters == COST
    # The ranks that the other reader finds, which reads the factors.
    assert {n: len(v) for n, v in lora_spectra(tmp_path / "lora.safetensors").items()} == dict(
        found
    )


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_lycoris_in_sd_scripts_leaves_the_other_component_alone(lycoris, component, tmp_path):
    _, kohya = lycoris
    preset = tmp_path / "preset.toml"
    preset.write_text(toml_text(to_lycoris(RANKS, component=component)), encoding="utf-8")
    made = kohya.create_network(
        1.0, 1, 1, None, network(), network(), preset=str(preset), algo="lora"
    )
    loras = made.unet_loras if component == "unet" else made.text_encoder_loras
    prefix = "lora_unet" if component == "unet" else "lora_te"
    assert {lora.lora_name: lora.lora_dim for lora in loras} == joined(prefix, KEPT)
    assert {lora.scale for lora in loras} == {1.0}
    assert len(made.unet_loras) + len(made.text_encoder_loras) == len(KEPT)


def from_weights(state, model, prefix="lora_unet"):
    """Name to (rank, alpha) by the rule of sd-scripts, `networks/lora.py`.

    `create_network_from_weights` reads dimensions and alphas; `create_modules` makes those of the
    network's linear layers and convolutions whose names are there.
    """
    dims, alphas = {}, {}
    for key, value in state.items():
        name = key.split(".")[0]
        if "alpha" in key:
            alphas[name] = value
        elif "lora_down" in key:
            dims[name] = value.shape[0]
    made = {}
    for name, module in model.named_modules():
        lora_name = f"{prefix}.{name}".replace(".", "_")
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and lora_name in dims:
            rank = dims[lora_name]
            # `LoRAModule`: factors of these shapes, into which the file is loaded.
            down, up = module.weight.shape, module.weight.shape
            expected = (rank, *down[1:]), (up[0], rank, *[1] * (len(up) - 2))
            for part, shape in zip(("lora_down", "lora_up"), expected, strict=True):
                assert state[f"{lora_name}.{part}.weight"].shape == shape
            made[lora_name] = (rank, float(alphas[lora_name]))
    return made


def test_a_seed_gives_sd_scripts_each_rank_and_one_scale(tmp_path):
    file = tmp_path / "seed.safetensors"
    write_kohya_seed(file, RANKS, SHAPES, alpha=8, r=16, modules=[n for n in RANKS])
    state = load_file(file)
    made = from_weights(state, network())
    assert made == {n: (r, r / 2) for n, r in joined("lora_unet", KEPT).items()}
    assert len(state) == 3 * len(KEPT)
    for key, tensor in state.items():
        if "lora_up" in key:
            assert not tensor.any()
        if "lora_down" in key:
            bound = tensor[0].numel() ** -0.5
            assert bound / 2 < tensor.abs().max() <= bound
    found = ranks_of(file)
    assert found == joined("lora_unet", KEPT)
    assert set(found.scales.values()) == {0.5}
    assert found.parameters == COST
    # From the file's own names to another such file, and the same numbers from the same seed.
    shapes = joined("lora_unet", SHAPES)
    write_kohya_seed(tmp_path / "again.safetensors", found, shapes, scale=0.5)
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())
    write_kohya_seed(file, RANKS, SHAPES, seed=1)
    assert not torch.equal(
        load_file(file)["lora_unet_block_conv.lora_down.weight"],
        state["lora_unet_block_conv.lora_down.weight"],
    )


def test_lycoris_starts_from_a_seed(lycoris, tmp_path):
    _, kohya = lycoris
    file = tmp_path / "seed.safetensors"
    write_kohya_seed(file, RANKS, SHAPES, scale=2.0)
    kohya.LycorisNetworkKohya.apply_preset({"unet_target_name": []})
    made, _ = kohya.create_network_from_weights(1.0, str(file), None, None, network())
    assert {lora.lora_name: lora.lora_dim for lora in made.unet_loras} == joined("lora_unet", KEPT)
    assert {float(lora.scale) for lora in made.unet_loras} == {2.0}


def test_seeds_that_would_go_wrong_are_refused(tmp_path):
    file = tmp_path / "seed.safetensors"
    cases: list[tuple[Any, Any, Any, str]] = [
        (RANKS, {}, {}, r"layer 'block.conv': expected a shape"),
        ({"a": 1}, {"a": (3, 4, 5)}, {}, r"layer 'a': expected a shape \(out, in\)"),
        ({"a": 1}, {"a": (0, 4)}, {}, r"layer 'a': shape: expected a whole number"),
        ({"a.b": 1, "a_b": 1}, {"a.b": (3, 4), "a_b": (3, 4)}, {}, "does not tell apart"),
        ({"a": 1, "b": 1}, {"a": (3, 4)}, {"prefix": lambda n: "x"}, "different names"),
        ({"a": 1}, {"a": (3, 4)}, {"modules": ["b"]}, r"layer 'a': expected one of modules"),
        ({"a": 1}, None, {}, "shapes: expected the shape of each layer"),
    ]
    for ranks, shapes, options, message in cases:
        with pytest.raises(ValueError, match=message):
            write_kohya_seed(file, ranks, shapes, **options)
    assert list(tmp_path.iterdir()) == []


def unet(diffusers):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=12,
    )  # fmt: skip


def attention(model):
    """Ranks, some of them 0, of the projections of a U-Net's attentions, and their shapes."""
    found = {n: m for n, m in model.named_modules() if re.search(r"attn\d\.to_(q|k|v|out\.0)$", n)}
    ranks = {name: (3 * i) % 5 for i, name in enumerate(found)}
    return ranks, {name: tuple(module.weight.shape) for name, module in found.items()}


def test_diffusers_adapts_saves_and_loads_these_ranks(diffusers, tmp_path):
    peft = pytest.importorskip("peft")
    model = unet(diffusers)
    ranks, shapes = attention(model)
    kept = {name: rank for name, rank in ranks.items() if rank}
    config = to_peft(ranks, scale=0.5, modules=model)
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(peft.LoraConfig(**config))
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trainable == sum(rank * sum(shapes[name]) for name, rank in ranks.items())
        assert ranks_of(model) == kept
        assert set(ranks_of(model).scales.values()) == {0.5}
        model.save_lora_adapter(tmp_path)
        (file,) = tmp_path.glob("*.safetensors")
        found = ranks_of(file)
        assert found == kept
        assert set(found.scales.values()) == {0.5}
        other = unet(diffusers)
        other.load_lora_adapter(str(tmp_path), prefix=None, use_safetensors=True)
    assert ranks_of(other) == kept
    assert set(ranks_of(other).scales.values()) == {0.5}


def test_diffusers_loads_a_seed(diffusers, tmp_path):
    model = unet(diffusers)
    ranks, shapes = attention(model)
    write_kohya_seed(tmp_path / "seed.safetensors", ranks, shapes)
    # Diffusers 0.42 takes the most frequent alpha of such a file for all of its layers, so that
    # scales shift; without any alpha it takes each layer's rank.
    state = load_file(tmp_path / "seed.safetensors")
    state = {key: tensor for key, tensor in state.items() if "alpha" not in key}
    mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mixin.load_lora_into_unet(*mixin.lora_state_dict(state), model)
    assert ranks_of(model) == {name: rank for name, rank in ranks.items() if rank}
    assert set(ranks_of(model).scales.values()) == {1.0}


def test_what_is_not_a_lora_of_this_kind_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    pair = {"a.lora_down.weight": torch.ones(2, 5), "a.lora_up.weight": torch.ones(4, 2)}
    for state, message in (
        ({"w": torch.ones(2)}, "expected a LoRA, got no factor"),
        ({"a.hada_w1_a": torch.ones(2, 2)}, r"expected a LoRA, got 'a.hada_w1_a'"),
        ({"a.lora_up.weight": torch.ones(4, 2)}, r"layer 'a': 'a.lora_up.weight' has no partner"),
        ({**pair, "a.lora_up.weight": torch.ones(4, 3)}, "layer 'a': expected A and B of one rank"),
        ({**pair, "a.lora_up.weight": torch.ones(4)}, "layer 'a': expected factors"),
        ({**pair, "a.alpha": torch.zeros(())}, r"'a.alpha': expected one number above 0"),
        ({**pair, "a.alpha": torch.ones(2)}, r"'a.alpha': expected one number above 0"),
        ({f"base_model.model.{k}": v for k, v in pair.items()}, "expected adapter_config.json"),
    ):
        save_file(state, file)
        with pytest.raises(ValueError, match=message):
            ranks_of(file)
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32):
        save_file({**pair, "a.alpha": torch.tensor(3, dtype=dtype)}, file)
        found = ranks_of(file)
        assert (dict(found), found.scales, found.shapes) == ({"a": 2}, {"a": 1.5}, {"a": (4, 5)})
    save_file(pair, file)
    assert ranks_of(file).scales == {"a": 1.0}
    file.write_bytes(b"PK" * 20)
    with pytest.raises(ValueError, match="expected a safetensors file"):
        ranks_of(file)
    with pytest.raises(FileNotFoundError):
        ranks_of(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError):
        ranks_of(tmp_path / "absent")
    with pytest.raises(ValueError, match="expected none but for a live model"):
        ranks_of(file, adapter="a")
    with pytest.raises(ValueError, match="expected a path, a configuration or a model, got int"):
        ranks_of(3)
