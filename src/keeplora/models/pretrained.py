"""What transformers loads of a user's model. The one place that asks it: it runs no code that comes with a model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils.hub import cached_file

VIDEO_PROCESSOR = "video_preprocessor_config.json"  # Where models keep it that have it in a file of its own.
ATTENTION = "sdpa"  # Whatever a config asks for: another name may be that of a kernel to fetch.


def load_config(name: str) -> Any:
    """Return the configuration of a model; that of an adapter, or of a quantised model, is a ValueError."""
    if (Path(name) / "adapter_config.json").exists():
        raise ValueError(
            f"{name} is an adapter, or has one beside the model; give a folder with the whole model, such as the export"
            " of a run in the format merged"
        )
    with naming(f"the configuration of model {name!r}"):
        config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"model {name!r} is quantised, and its weights take no update; give the one it was made of")
    return config


Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "nf4"]


@dataclass(frozen=True)
class Precision:
    """What the weights of a model are loaded in: a type, and perhaps 4 bits for the linear layers of its blocks."""

    dtype: Dtype = "float32"
    quantize: Quantization = "none"

    def to_settings(self) -> dict[str, Any]:
        """Return what transformers is told; ValueError if a package is missing."""
        settings: dict[str, Any] = {"dtype": getattr(torch, self.dtype)}
        if self.quantize == "none":
            return settings
        if find_spec("bitsandbytes") is None:
            raise ValueError("quantize = 'nf4' needs the package bitsandbytes: pip install 'keeplora[quantize]'")
        kind = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, self.dtype)
        )
        return {**settings, "quantization_config": kind}


WHOLE = Precision()


def load_model(name: str, kind: Any = AutoModel, precision: Precision = WHOLE) -> nn.Module:
    """Load a model from safetensors alone; ValueError names what is wrong with it.

    `kind` is a class of transformers that finds the model's own by its configuration.
    """
    config, settings = load_config(name), precision.to_settings()
    cure = (
        ". Weights are read from safetensors alone: a pickled .bin or .pt could run any code; save the model anew with"
        " save_pretrained"
    )
    with naming(f"the weights of model {name!r}", cure):
        model, info = kind.from_pretrained(
            name, config=config, output_loading_info=True, use_safetensors=True, trust_remote_code=False,
            attn_implementation=ATTENTION, **settings,
        )  # fmt: skip
    if missing := sorted(info["missing_keys"]):
        kind, saved = type(model).__name__, ", ".join(getattr(config, "architectures", None) or [])
        hint = f"; it was saved as {saved}, and {kind} is needed" if saved not in ("", kind) else "; get it anew"
        raise ValueError(f"model {name!r} has no weight {missing[0]!r} ({len(missing)} are missing){hint}")
    for module in model.modules():
        # On some CPUs bitsandbytes packs a weight anew, and rounds it, when it is first used outside training.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return cast(nn.Module, model.eval())


def is_generative(config: Any) -> bool:
    """Tell whether transformers has a class that answers texts, with images or without, for a configuration."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def load_generative(name: str, precision: Precision = WHOLE) -> nn.Module:
    """Load a model that answers conversations, as `load_model` does."""
    reads_images = type(load_config(name)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return load_model(name, AutoModelForImageTextToText if reads_images else AutoModelForCausalLM, precision)


def load_processor(name: str) -> Any:
    """Return the processor of a model that reads images, which works with Pillow; the tokenizer of another one."""
    config = load_config(name)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return load_tokenizer(name)
    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    if kind is not None and "video_processor" in kind.get_attributes():
        return _processor_of_images(name, kind)
    with naming(f"the processor of model {name!r}"):
        processor: Any = AutoProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    processor.tokenizer = load_tokenizer(name)  # The other one took `pil` for its own backend.
    return processor


class _NoVideos:
    """Stands in a processor for that of videos, which has no version for Pillow and needs torchvision to be loaded.

    It has the settings of the one it stands for, so that it is saved as that one.
    """

    model_input_names: tuple[str, ...] = ()
    merge_size, temporal_patch_size, num_frames, fps = 2, 2, None, None
    _auto_class = None

    def __init__(self, settings: dict[str, Any]) -> None:
        vars(self).update(settings)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def _processor_of_images(name: str, kind: Any) -> Any:
    """Return a processor that is also for videos, without its part for these."""

    class Processor(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if isinstance(argument, _NoVideos):
                return _NoVideos
            return super().check_argument_for_proper_class(argument_name, argument)

        def to_dict(self) -> dict[str, Any]:
            told = cast(dict[str, Any], super().to_dict())
            videos = told.pop("video_processor").to_dict()
            return {**told, "video_processor": videos} if videos else told

    Processor.__name__ = kind.__name__  # It is saved by this name.
    parts = {"image_processor": load_image_processor(name), "tokenizer": load_tokenizer(name)}
    with naming(f"the processor of model {name!r}"):
        told, _ = kind.get_processor_dict(name)
        settings = told.get("video_processor")
        if settings is None:
            file = cached_file(name, VIDEO_PROCESSOR, _raise_exceptions_for_missing_entries=False)
            settings = json.loads(Path(file).read_text()) if file else {}
        parts["video_processor"] = _NoVideos(settings)
        return Processor.from_args_and_dict([parts[one] for one in kind.get_attributes()], told)


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a model."""
    with naming(f"the tokenizer of model {name!r}"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def load_image_processor(name: str) -> Any:
    """Return the image processor of a model, which works with Pillow."""
    with naming(f"the image processor of model {name!r}"):
        return AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)


@contextmanager
def naming(what: str, cure: str = "") -> Iterator[None]:
    """Turn what a library raises inside into one message that names what it was given; nothing of ours runs there."""
    try:
        yield
    except Exception as error:  # The rust libraries raise plain ones.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what} cannot be used: {reason[:500]}{cure}") from None
