"""Model families by the `model_type` of a Hugging Face config. Adding one is a file in this folder and a line here.

Every model that transformers can let answer conversations is of the generative family, unless its type has its own.
"""

from pathlib import Path

from keeplora.models.dual_encoder import DualEncoder
from keeplora.models.generative import Generative
from keeplora.models.interfaces import Family
from keeplora.models.pretrained import is_generative, load_config
from keeplora.registry import Registry, load_extensions

FAMILIES: Registry[type[Family]] = Registry("model type", {"clip": DualEncoder, "siglip": DualEncoder})

EMBEDDED = {name: Path(__file__).parents[1] / "data" / name / "model" for name in ("mini", "mini_vqa")}
"""Models that come with the package, by name."""


def locate(model: str) -> str:
    """Return where a model is: the folder of an embedded one, or the name or folder itself."""
    return str(EMBEDDED.get(model, model))


def family_of(model: str) -> Family:
    """Find the family of a model by its hub name or folder, or raise a `ValueError` that lists the known ones."""
    load_extensions()  # They may teach transformers new types.
    try:
        if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not Path(model).is_dir():
            raise ValueError("there is no such folder, and no name on the hub looks like this")
        config = load_config(locate(model))
    except ValueError as error:
        raise ValueError(
            f"model {model!r} is neither an embedded model ({', '.join(EMBEDDED)}), nor a folder with a Hugging Face"
            f" model, nor on the hub: {error}"
        ) from None
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]()
    if is_generative(config):
        return Generative()
    known = f"{', '.join(FAMILIES)}, and all that transformers has for image-text-to-text and causal language models"
    raise ValueError(f"model {model!r} is of type {config.model_type!r}; known types: {known}")
