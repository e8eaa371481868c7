"""How conversations become tokens: a chat template, the model's own processor, and a mask of the answers.

The answers that are learned are the text of every message of the assistant and the end token behind it, nothing else.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from keeplora.data.conversations import Message, text_of
from keeplora.models.pretrained import naming

TEMPLATES = Path(__file__).parent / "chat_templates"

Span = tuple[int, int]
"""The first character of something in a text, and the one behind its last."""


@dataclass(frozen=True)
class Encoded:
    """A conversation as text, with the spans of its answers."""

    text: str
    answers: tuple[Span, ...]


def template_named(name: str) -> str | None:
    """Return the chat template of a name or of a file; None, for the model's own, if none is given."""
    if not name:
        return None
    path = Path(name) if name.endswith(".jinja") else TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.jinja")))
        raise ValueError(f"unknown chat template {name!r}; known: {known}, or give the path of a .jinja file")
    return path.read_text(encoding="utf-8").rstrip("\n")


class ChatFormat:
    """Turns conversations into what a model reads; `processor` is its own, or its tokenizer if it reads text alone."""

    def __init__(self, processor: Any, template: str | None = None) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.reads_images = self.tokenizer is not processor
        self.template = template
        if template is None and not getattr(processor, "chat_template", None):
            raise ValueError('the model has no chat template of its own; name one: chat_template = "vicuna_v1"')
        if not self.tokenizer.is_fast:
            raise ValueError(f"{type(self.tokenizer).__name__} is a slow tokenizer, which tells no places of tokens")
        if self.tokenizer.pad_token_id is None:
            raise ValueError("the model's tokenizer has no pad token; set one, and save the tokenizer anew")
        self.image_token: str | None = getattr(processor, "image_token", None) if self.reads_images else None

    def prompt(self, messages: Sequence[Message], *, suffix: str = "") -> str:
        """Return the text to which a model is to add the next answer; `suffix` stands behind the last question."""
        if suffix:
            last = messages[-1]
            messages = [*messages[:-1], {**last, "content": [*last["content"], {"type": "text", "text": suffix}]}]
        return self._rendered(messages, ends_open=True)

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Return a conversation as text, and where its answers are; ValueError says why they cannot be found."""
        self._require_no_image_token(messages)
        text, cursor = self._rendered(messages), 0
        answers: list[Span] = []
        for place, message in enumerate(messages):
            words = text_of(message).strip()
            if message["role"] != "assistant":
                cursor = max(cursor, text.find(words, cursor) + len(words))
                continue
            before = self._rendered(messages[:place], ends_open=True)
            is_prefix = text.startswith(before) and text[len(before) :].lstrip().startswith(words)
            # A template may write earlier messages otherwise in a prompt for the answer.
            start = text.find(words, len(before) if is_prefix else cursor)
            cursor = self._end_of(text, start, words)
            answers.append((start, cursor))
        return Encoded(text, tuple(answers))

    def batch(self, texts: Sequence[str], images: Sequence[list[Image.Image]], *, left: bool = False) -> dict[str, Any]:
        """Tokenise texts with their images, padded to one side; `offsets` and `replaced` tell the places of tokens."""
        options: dict[str, Any] = {
            "return_tensors": "pt", "padding": True, "padding_side": "left" if left else "right",
            "add_special_tokens": self.adds_special_tokens(texts[0]), "return_offsets_mapping": True,
        }  # fmt: skip
        with naming("the model's processor"):
            if not self.reads_images:
                found = dict(self.tokenizer(list(texts), **options))
            else:
                given = [list(own) for own in images] if any(images) else None
                options["return_text_replacement_offsets"] = True
                found = dict(self.processor(text=list(texts), images=given, **options))
        found["offsets"], found["replaced"] = found.pop("offset_mapping"), found.pop("text_replacement_offsets", None)
        return found

    def adds_special_tokens(self, text: str) -> bool:
        """Tell whether the tokenizer is to add its own marks: not where the template has written them."""
        start = self.tokenizer.bos_token
        return self.reads_images and not (start is not None and text.startswith(start))

    def answer_mask(self, encoded: Sequence[Encoded], offsets: Tensor, replaced: Any) -> Tensor:
        """Return which tokens are of answers, `[n, length]`, given the characters `[n, length, 2]` of each."""
        masks = []
        for number, one in enumerate(encoded):
            starts, ends = offsets[number].unbind(-1)
            mask = torch.zeros(len(starts), dtype=torch.bool)
            for span in one.answers:
                start, end = (_moved(place, replaced[number] if replaced else ()) for place in span)
                mask |= (starts < end) & (ends > start)
            masks.append(mask)
        return torch.stack(masks)

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """The tokens that end an answer, as text."""
        names = (self.tokenizer.eos_token, *END_TOKENS)
        known = self.tokenizer.get_vocab()
        return tuple(dict.fromkeys(name for name in names if name in known))

    def _end_of(self, text: str, start: int, answer: str) -> int:
        """Return where the end token behind an answer ends."""
        end = start + len(answer)
        rest = text[end:]
        token = next((token for token in self.end_tokens if rest.lstrip(" ").startswith(token)), None)
        if start < 0 or token is None:
            flaw = "which cannot be found in" if start < 0 else "without an end token behind it in"
            raise ValueError(
                f"an answer, {answer[:40]!r}, {flaw} what the chat template makes of it, {text[-80:]!r}; name another:"
                ' chat_template = "vicuna_v1"'
            )
        return end + rest.index(token) + len(token)

    def _require_no_image_token(self, messages: Sequence[Message]) -> None:
        token = self.image_token
        if token and any(token in text_of(message) for message in messages):
            raise ValueError(f"{token!r}, which stands for an image, inside a text")

    def _rendered(self, messages: Sequence[Message], *, ends_open: bool = False) -> str:
        given = messages if self.reads_images else [{**one, "content": text_of(one)} for one in messages]
        with naming("the chat template"):
            return str(
                self.processor.apply_chat_template(
                    list(given), chat_template=self.template, tokenize=False, add_generation_prompt=ends_open
                )
            )


END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<end_of_utterance>", "<|end|>", "</s>")
"""Tokens that end a message in chat templates, where they are others than the end of a text."""


def _moved(place: int, replaced: Sequence[Mapping[str, Any]]) -> int:
    """Return where a character lies once placeholders of images are replaced by what is longer."""
    gained = [one["new_span"][1] - one["span"][1] for one in replaced if one["span"][1] <= place]
    return place + (gained[-1] if gained else 0)


def ends_of(tokenizer: Any, tokens: Sequence[str]) -> Iterator[int]:
    """Yield the numbers of tokens."""
    yield from (tokenizer.convert_tokens_to_ids(token) for token in tokens)
