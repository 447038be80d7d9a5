"""Tiny models, tokenizers and data of the classes and schemas that the paper's settings load."""

import json
import random
from pathlib import Path
from typing import Any

WORDS = "good bad fine poor film plot who what when is was the a of in".split()


def tokenizer(folder: Path, kind: str) -> Any:
    """Words and their pieces, with the special tokens that a model of this kind adds."""
    import tokenizers
    import transformers

    start, end = {"roberta": ("<s>", "</s>"), "t5": (None, "</s>"), "gpt2": (None, None)}[kind]
    special = [token for token in ("<pad>", "<unk>", start, end) if token]
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    pieces.train_from_iterator([" ".join(WORDS) + " sst2 sentence: positive negative"], trainer)
    ids = [(token, pieces.token_to_id(token)) for token in (start, end) if token]
    if kind == "roberta":
        pieces.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ids
        )
    elif kind == "t5":
        pieces.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A </s>", special_tokens=ids
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token=end,
        bos_token=start,
    )
    fast.save_pretrained(folder)
    return fast


def model(folder: Path, kind: str, width: int = 16, layers: int = 2) -> Path:
    """Save a model of RoBERTa's ("roberta"), T5's or GPT-2's class, and its tokenizer."""
    import torch
    import transformers

    count = len(tokenizer(folder, kind))
    ends: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    made: Any
    if kind == "roberta":
        made = transformers.RobertaForMaskedLM(
            transformers.RobertaConfig(
                vocab_size=count, hidden_size=width, intermediate_size=2 * width,
                num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=64,
                pad_token_id=0, type_vocab_size=1,
            )
        )  # fmt: skip
    elif kind == "t5":
        made = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=count, d_model=width, d_kv=8, d_ff=2 * width, num_layers=layers,
                num_heads=2, **ends,
            )
        )  # fmt: skip
    else:
        made = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=count, n_embd=width, n_layer=layers, n_head=2, n_positions=16,
                bos_token_id=1, eos_token_id=1,
            )
        )  # fmt: skip
    made.save_pretrained(folder)
    return folder


def glue(folder: Path, config: str, train: int = 60, validation: int = 12) -> Path:
    """`question`, `sentence`, `label` (qnli) or `sentence`, `label` (sst2), as on the hub."""
    draw = random.Random(0)

    def row(split: str, index: int) -> dict[str, Any]:
        label = index % 2
        text = " ".join([("bad", "good")[label], *draw.choices(WORDS[4:], k=draw.randint(2, 6))])
        found: dict[str, Any] = {"sentence": text, "label": -1 if split == "test" else label}
        if config == "qnli":
            found["question"] = " ".join(draw.choices(WORDS[6:], k=3))
        return found | {"idx": index}

    counts = {"train": train, "validation": validation, "test": 6}
    return _written(
        folder / config,
        {split: [row(split, i) for i in range(count)] for split, count in counts.items()},
    ).parent


def wikitext(folder: Path, train: int = 60, held: int = 20) -> Path:
    """`text`: a line a row, empty ones among them."""
    draw = random.Random(0)

    def rows(count: int) -> list[dict[str, Any]]:
        lines = [" ".join(draw.choices(WORDS, k=8)) + " \n" for _ in range(count)]
        return [{"text": ""}, *({"text": f" {line}"} for line in lines)]

    return _written(folder, {"train": rows(train), "validation": rows(held), "test": rows(held)})


def _written(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> Path:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    return folder
