"""The model before it has learned anything: LLaVA of transformers, which sees with the tower of `mini`."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .canvas import SIZE
from .domains import DOMAINS
from .general import picture
from .language import vocabulary, words
from .wiring import wire

MINI = Path(__file__).parents[2] / "src/keeplora/data/mini/model"
PATCH = 16
IMAGE_TOKENS = (SIZE // PATCH) ** 2
VISION_LAYERS = 5  # Of 6: the last one of a CLIP has forgotten where things are.
WIDTH, LAYERS = 256, 5
VOCABULARY = 1536
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<user>", "<assistant>")
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def _corpus() -> Iterator[str]:
    """Yield what is asked and answered, in the general mix and in the five tasks."""
    rng = Random("corpus")
    for _ in range(5000):
        for made in (picture(rng, "train"), words(rng)):
            for question in made.questions:
                yield question.text
                yield question.answer
    for domain in DOMAINS.values():
        for _ in range(200):
            for question in domain(rng).questions:
                yield question.text
                yield question.answer
    yield from vocabulary()


def new_processor() -> LlavaProcessor:
    """Learn the tokens, and return the processor: bytes, single digits, lower case."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    images = CLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        do_convert_rgb=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        images,
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def new_model(vocabulary_size: int) -> LlavaForConditionalGeneration:
    """Return the model: the eyes of `mini` at a larger size, a new projector, a new language model."""
    clip = CLIPModel.from_pretrained(MINI)
    seen = clip.config.vision_config.to_dict() | {"image_size": SIZE, "num_hidden_layers": VISION_LAYERS}
    language = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=WIDTH,
        intermediate_size=640,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL.index("<pad>"),
        initializer_range=0.06,  # The default is for wide models; here attention would start almost uniform.
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**seen),
        text_config=language,
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    _take_eyes(clip, model)
    wire(model)
    return model


@cache
def has_bfloat16() -> bool:
    """Return whether the processor multiplies in bfloat16; where it does not, that is far slower than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _take_eyes(clip: CLIPModel, model: LlavaForConditionalGeneration) -> None:
    """Copy the tower; positions are interpolated from 4 x 4 to 6 x 6."""
    source, target = clip.vision_model.state_dict(), model.model.vision_tower.state_dict()
    positions = "embeddings.position_embedding.weight"
    prefix = "" if positions in target else "vision_model."
    for name, tensor in source.items():
        if name != positions and prefix + name in target:
            target[prefix + name].copy_(tensor)
    first, rest = source[positions][:1], source[positions][1:]
    side = round(len(rest) ** 0.5)
    square = rest.T.reshape(1, -1, side, side)
    side = SIZE // PATCH
    larger = functional.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
    target[prefix + positions].copy_(torch.cat([first, larger[0].flatten(1).T]))
    model.model.vision_tower.load_state_dict(target)
