"""Small generative models with their processors, and streams of conversations, made on the spot from seeds."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

CORPUS = ["What colour is it? red green blue", "a b c d e yes no USER: ASSISTANT: user assistant <|im_start|>"] * 3
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"]
COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 50, 220), "grey": (120, 120, 120)}
SIDE = 28


def tokenizer(chat_template: str | None = CHATML, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as most language models have one."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[*SPECIAL, *extra], initial_alphabet=alphabet)
    inner.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=chat_template,
        extra_special_tokens=[*SPECIAL[3:], *extra], model_max_length=512,
    )  # fmt: skip


def text_config(vocabulary: int) -> dict:
    return {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def spread(model: nn.Module) -> nn.Module:
    """Let a random model say different things to different questions."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=1.5 * module.weight.shape[1] ** -0.5)
    return model


def save_llama(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    words = tokenizer()
    spread(LlamaForCausalLM(LlamaConfig(**text_config(len(words))))).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_llava(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    words = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=SIDE,
        patch_size=14, projection_dim=16,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**text_config(len(words))), image_seq_length=4,
        image_token_id=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-2,
    )  # fmt: skip
    model = spread(LlavaForConditionalGeneration(config))
    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    LlavaProcessor(
        images, words, patch_size=14, vision_feature_select_strategy="default", chat_template=CHATML,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def picture(color: str, seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, 30, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(COLORS[color]) + noise, 0, 255).astype(np.uint8))


def write_llava(folder: Path, *, count: int = 8, seed: int = 0, with_images: bool = True) -> Path:
    """Write train.json and test.json in the shapes of LLaVA, with questions about colours."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        records = []
        for i in range(count):
            color, name = list(COLORS)[(i + seed) % len(COLORS)], f"images/{split}{i}.png"
            question = "What colour is it?" if with_images else f"What is {color} like?"
            picture(color, 100 * seed + i, (SIDE + 3 * (i % 3), SIDE)).save(folder / name)
            image = {"image": name} if with_images else {}
            if split == "train":
                turns = [{"from": "human", "value": ("<image>\n" if with_images else "") + question},
                         {"from": "gpt", "value": color}]  # fmt: skip
                records.append({"id": f"{split}{i}", **image, "conversations": turns})
            else:
                records.append({"question_id": f"{split}{i}", **image, "text": question, "answer": color})
        (folder / f"{split}.json").write_text(json.dumps(records))
    return folder


def write_stream(folder: Path, *, tasks: int = 2, with_images: bool = True, more: str = "") -> Path:
    lines = []
    for i in range(tasks):
        write_llava(folder / f"data{i}", seed=i, with_images=with_images)
        lines += ["[[tasks]]", f'name = "task{i}"', f'path = "data{i}"', 'reader = "llava"', "max_new_tokens = 4", more]
    path = folder / "chat.toml"
    path.write_text("\n".join(lines))
    return path
