"""The model card of an export: Hugging Face front matter, tasks and scores, settings, licences, how to load it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from keeplora.evaluation.accuracy_matrix import METRIC_NAMES, Results
from keeplora.subspace.low_rank_update import Cut


@dataclass(frozen=True, kw_only=True)
class Card:
    """All that a card says."""

    format: str
    dtype: str
    base: str
    """Hub name or absolute folder of the base model."""
    model_class: str
    """Its class in transformers."""
    has_text_tower: bool
    """Whether it tells images apart by prompts."""
    embedded: tuple[str, ...]
    """What of the run came with keeplora, so that its licence is known: model, benchmark, both or none."""
    results: Results
    prompts: dict[str, str]
    """The template of the prompts of each task."""
    evaluation: str
    one_by_one: bool
    settings: dict[str, Any]
    folders: dict[str, str] = field(default_factory=dict)
    """Task and folder of each adapter."""
    heads: dict[str, str] = field(default_factory=dict)
    """Task and file, without its ending, of each classifier."""
    cut: Cut | None = None

    @property
    def names(self) -> dict[str, str]:
        """Names to load the adapters under, and the folder of each; PEFT allows no dot in a name."""
        return {f"task{number}": folder for number, folder in enumerate(self.folders.values(), 1)}


def render_card(card: Card) -> str:
    """Return the card as Markdown."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["literal"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8"))
    return template.render(
        **vars(card), names=card.names, is_on_hub=not Path(card.base).is_absolute(), metric_names=METRIC_NAMES
    )
