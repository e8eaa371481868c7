"""Train the small byte-pair tokenizer and turn captions into padded ids."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

LENGTH = 20
SPECIAL = ["<pad>", "<unk>", "<start>", "<end>"]
PAD, UNKNOWN, START, END = range(4)


def train(texts: list[str], *, size: int = 3000) -> Tokenizer:
    """Return a lower-casing BPE tokenizer that puts <start> and <end> around a text."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN], end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = list("abcdefghijklmnopqrstuvwxyz0123456789.,-'!?")
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", START), ("<end>", END)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Return `[n, LENGTH]` int16 ids, padded on the right; longer texts are cut before <end>."""
    ids = np.full((len(texts), LENGTH), PAD, np.int16)
    for row, encoding in enumerate(tokenizer.encode_batch(texts)):
        kept = encoding.ids if len(encoding.ids) <= LENGTH else [*encoding.ids[: LENGTH - 1], END]
        ids[row, : len(kept)] = kept
    return ids


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the two files that `AutoTokenizer.from_pretrained` reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LENGTH, "padding_side": "right",
        "pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>",
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
