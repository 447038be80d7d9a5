"""Gemma 3 270M out of its GGUF file, with the vocabulary cut down to what the snippets use.

Of 262,144 tokens the snippets use 20,271; the softmax over all of them would take most of
the time. The kept rows of the embedding are unchanged, so logits are, but the loss is that of a
softmax over the kept tokens alone: it is not comparable with the whole model's. The weights are
those of the Q4_K_M quantisation, dequantised.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.finetune import snippets

WINDOW = 64  # tokens, the first of them the beginning-of-sequence token


def prune(gguf: Path, made: Path) -> None:
    """Write the model and the windows of the snippets.

    Writes:
        the model (config.json, model.safetensors), `tokens.json` (the tokens' old numbers, in the
        order of the new ones) and `windows.npz` ("train", "dev" and "test": windows x WINDOW).
    """
    import torch
    import transformers

    from benchmarks.finetune.sources import prepared

    options = {"gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), **options)
    start = tokenizer.bos_token_id
    streams: dict[str, list[int]] = {}
    for split, texts in snippets.read(prepared("snippets") / "snippets.txt").items():
        whole = "".join(snippet.text + "\n" for snippet in texts)
        streams[split] = tokenizer(whole, add_special_tokens=False).input_ids
    special = [tokenizer.pad_token_id, tokenizer.eos_token_id, start]
    used = sorted(set().union(special, *streams.values()))
    new = np.full(max(used) + 1, -1)
    new[used] = np.arange(len(used))
    windows = {split: _windows(new[stream], new[start]) for split, stream in streams.items()}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), dtype=torch.float32, **options
    )
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    for key in ("pad_token_id", "eos_token_id", "bos_token_id"):
        config[key] = int(new[getattr(tokenizer, key)])
    config |= {"vocab_size": len(used), "unk_token_id": None}
    small = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**config))
    weights = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][torch.tensor(used)]
    small.load_state_dict(weights)
    small.save_pretrained(made)
    (made / "tokens.json").write_text(json.dumps(used))
    np.savez_compressed(made / "windows.npz", **windows)


def _windows(stream: np.ndarray, start: int) -> np.ndarray:
    """The stream cut into windows, each begun with `start`; what is left at the end is dropped."""
    body = WINDOW - 1
    count = len(stream) // body
    cut = stream[: count * body].reshape(count, body)
    return np.concatenate([np.full((count, 1), start), cut], axis=1).astype(np.int32)
