"""Ranks out to the tools, and back; without torch, except for `ranks_of` of a live model.

| tool | function | what it gives |
|---|---|---|
| PEFT | `to_peft` | keywords of `LoraConfig` |
| axolotl | `to_axolotl`, `yaml_text` | entries of the configuration, their text |
| Unsloth | `to_unsloth` | keywords of `get_peft_model` |
| vLLM | `to_vllm` | keywords of `LoraConfig`, and `max_lora_rank` |
| LyCORIS | `to_lycoris`, `toml_text` | a preset, its text |
| kohya's sd-scripts | `to_kohya`, `write_kohya_seed` | network arguments; a file to start from |

`ranks_of` reads ranks and scales out of what these tools write or have made, and its `check` finds
where that is not what was wanted. Each function gives every layer one scale; `constant_scale` says
which.
"""

from lorambo_adapters.ranks.config_text import toml_text, yaml_text
from lorambo_adapters.ranks.kohya_format import to_kohya, write_kohya_seed
from lorambo_adapters.ranks.lycoris_format import to_lycoris
from lorambo_adapters.ranks.peft_format import to_peft
from lorambo_adapters.ranks.scaling import constant_scale
from lorambo_adapters.ranks.stored_ranks import StoredRanks, ranks_of
from lorambo_adapters.ranks.trainers import to_axolotl, to_unsloth
from lorambo_adapters.ranks.vllm_format import to_vllm

__all__ = [
    "StoredRanks",
    "constant_scale",
    "ranks_of",
    "to_axolotl",
    "to_kohya",
    "to_lycoris",
    "to_peft",
    "to_unsloth",
    "to_vllm",
    "toml_text",
    "write_kohya_seed",
    "yaml_text",
]
