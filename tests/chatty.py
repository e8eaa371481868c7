"""Small generative models with their processors, and streams of conversations, made on the spot from seeds."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

CORPUS = ["What colour is it? red green blue", "a b c d e yes no USER: ASSISTANT: user assistant <|im_start|>"] * 3
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"]
MORE_TOKENS = {
    "idefics3": {"fake": "<fake_token_around_image>", "global": "<global-img>"},
    "smolvlm": {"fake": "<fake_token_around_image>", "global": "<global-img>"},
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
}
_QWEN = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>",
         "vision_end": "<|vision_end|>"}  # fmt: skip
MORE_TOKENS |= {"qwen2_5_vl": _QWEN, "qwen3_vl": _QWEN}
COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 50, 220), "grey": (120, 120, 120)}
SIDE = 28


def tokenizer(chat_template: str | None = CHATML, kind: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE, as most language models have one, with the tokens that a kind of model needs."""
    extra = MORE_TOKENS.get(kind, {})
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[*SPECIAL, *extra.values()], initial_alphabet=alphabet)
    inner.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=chat_template,
        extra_special_tokens=extra or SPECIAL[3:], model_max_length=512,
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


TEXT_MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, {}),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 8, "sliding_window": 16}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {}),
}


def save_text_model(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """Save a language model with its tokenizer."""
    torch.manual_seed(seed)
    words = tokenizer()
    config, model, more = TEXT_MODELS[kind]
    spread(model(config(**text_config(len(words)), **more))).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def clip_vision(**more) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=SIDE,
        patch_size=14, projection_dim=16, **more,
    )  # fmt: skip


def _llava(words):
    text = LlamaConfig(**text_config(len(words)))
    config = LlavaConfig(
        vision_config=clip_vision(), text_config=text, image_seq_length=4, vision_feature_layer=-2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        images, words, patch_size=14, vision_feature_select_strategy="default", chat_template=CHATML,
        num_additional_image_tokens=1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def _llava_next(words):
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = LlavaNextConfig(
        vision_config=clip_vision(), text_config=LlamaConfig(**text_config(len(words))), vision_feature_layer=-2,
        image_token_id=words.convert_tokens_to_ids("<image>"), image_grid_pinpoints=pinpoints,
    )  # fmt: skip
    size = {"height": SIDE, "width": SIDE}
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=size, image_grid_pinpoints=pinpoints, do_pad=True
    )
    processor = LlavaNextProcessor(
        images, words, patch_size=14, vision_feature_select_strategy="default", chat_template=CHATML,
        num_additional_image_tokens=1,
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config), processor


def _idefics(words, config, images):
    """The configuration and the image processor of Idefics3, or of SmolVLM, which was made of it."""
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    made = config(
        vision_config=vision, text_config=LlamaConfig(**text_config(len(words))), scale_factor=2, pad_token_id=0,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return made, images(size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False)


def _idefics3(words):
    config, images = _idefics(words, Idefics3Config, Idefics3ImageProcessorPil)
    processor = Idefics3Processor(images, words, image_seq_len=4, chat_template=CHATML)
    return Idefics3ForConditionalGeneration(config), processor


def _gemma3(words):
    vision = SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=SIDE, patch_size=7
    )
    text = Gemma3TextConfig(**text_config(len(words)), head_dim=8, sliding_window=16)
    ids = {
        name: words.convert_tokens_to_ids(name) for name in ("<image_soft_token>", "<start_of_image>", "<end_of_image>")
    }
    config = Gemma3Config(
        vision_config=vision, text_config=text, image_token_id=ids["<image_soft_token>"], mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"], eoi_token_index=ids["<end_of_image>"],
    )  # fmt: skip
    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    template = CHATML.replace("<image>", "<start_of_image>")
    model = Gemma3ForConditionalGeneration(config)
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # Zeros, until it is trained.
    return model, Gemma3Processor(images, words, chat_template=template, image_seq_length=4)


def siglip_vision(**more) -> SiglipVisionConfig:
    sizes = {"image_size": SIDE, "patch_size": 14} | more
    return SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, vision_use_head=False, **sizes
    )


def _llava_onevision(words):
    pinpoints = [[28, 28], [56, 56]]
    config = LlavaOnevisionConfig(
        vision_config=siglip_vision(), text_config=Qwen2Config(**text_config(len(words))),
        image_token_id=words.convert_tokens_to_ids("<image>"), video_token_id=len(words) - 1,
        image_grid_pinpoints=pinpoints, vision_feature_layer=-1,
    )  # fmt: skip
    images = LlavaOnevisionImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints)
    more = {"num_image_tokens": 4, "vision_feature_select_strategy": "full", "image_token": "<image>"}
    return LlavaOnevisionForConditionalGeneration(config), Parts("LlavaOnevisionProcessor", images, words, more)


def _qwen(words, config, model, kind, side, head, sections, **vision):
    text = text_config(len(words)) | head
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in MORE_TOKENS["qwen2_5_vl"].items()}
    # The places of an image are found by its start, its tokens, and its end.
    sizes = {"depth": 2, "hidden_size": 24, "out_hidden_size": 32, "num_heads": 3, "intermediate_size": 40,
             "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "patch_size": side}  # fmt: skip
    images = Qwen2VLImageProcessorPil(
        patch_size=side, size={"shortest_edge": (2 * side) ** 2, "longest_edge": (4 * side) ** 2}
    )
    template = CHATML.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    made = model(config(text_config=text, vision_config=sizes | vision, **ids))
    return made, Parts(kind, images, words, {}, template)


def _qwen2_5_vl(words):
    return _qwen(
        words, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, "Qwen2_5_VLProcessor", 14, {}, [1, 1, 2],
        window_size=56, fullatt_block_indexes=[1],
    )  # fmt: skip


def _qwen3_vl(words):
    return _qwen(
        words, Qwen3VLConfig, Qwen3VLForConditionalGeneration, "Qwen3VLProcessor", 16, {"head_dim": 8}, [2, 1, 1],
        num_position_embeddings=16, deepstack_visual_indexes=[0, 1],
    )  # fmt: skip


def _internvl(words):
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
              "image_size": [SIDE, SIDE], "patch_size": [7, 7]}  # fmt: skip
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**text_config(len(words))), image_seq_length=4,
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"), downsample_ratio=0.5,
    )  # fmt: skip
    images = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=False)
    template = CHATML.replace("<image>", "<IMG_CONTEXT>\n")
    return InternVLForConditionalGeneration(config), Parts(
        "InternVLProcessor", images, words, {"image_seq_length": 4}, template
    )


def _smolvlm(words):
    config, images = _idefics(words, SmolVLMConfig, SmolVLMImageProcessorPil)
    return SmolVLMForConditionalGeneration(config), Parts("SmolVLMProcessor", images, words, {"image_seq_len": 4})


@dataclass
class Parts:
    """A processor that cannot be made without torchvision, as the files that a model on the hub has."""

    kind: str
    images: object
    words: PreTrainedTokenizerFast
    settings: dict
    template: str = CHATML

    def save_pretrained(self, folder: Path) -> None:
        self.images.save_pretrained(folder)
        self.words.save_pretrained(folder)
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": self.kind, **self.settings}))
        (folder / "chat_template.jinja").write_text(self.template)


IMAGE_MODELS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "idefics3": _idefics3,
    "gemma3": _gemma3,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "smolvlm": _smolvlm,
}


def save_image_model(folder: Path, kind: str = "llava", seed: int = 0) -> Path:
    """Save a vision-language model with its processor."""
    torch.manual_seed(seed)
    words = tokenizer(None, kind)
    model, processor = IMAGE_MODELS[kind](words)
    spread(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_llava(folder: Path) -> Path:
    return save_image_model(folder, "llava")


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
