"""Generative models of Hugging Face: conversations about images or text are learned by their answers, and answered."""

import hashlib
import inspect
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median_low
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from keeplora.config import parse
from keeplora.data.benchmark import TaskSpec
from keeplora.data.conversations import Conversations, Record, conversations_of, told_of
from keeplora.data.readers import read_conversations
from keeplora.layers.names import tower_of
from keeplora.layers.statistics import require_finite
from keeplora.models.chat import ChatFormat, Encoded, ends_of, template_named
from keeplora.models.interfaces import Family, StreamTask
from keeplora.models.pretrained import WHOLE, Precision, load_config, load_generative, load_processor
from keeplora.progress import Track, silent
from keeplora.task import Batch

IGNORED = -100  # The label of what is no answer.
AT_ONCE = 512  # Records that are checked together.


class ConversationTask(StreamTask):
    """Conversations whose answers are to be learned; what of a batch is padding is never counted.

    The loss is the mean cross-entropy over the tokens of the answers and their end tokens. `metric` names one of texts.
    """

    metric = "exact_match"

    def __init__(
        self, records: Any, processor: Any, *, test: Any = None, batch_size: int = 8, seed: int = 0, **settings: Any
    ) -> None:
        """Make a task of records for a model with this processor, or with this tokenizer if it reads text alone.

        `records` are a list, a data set, or the path of a JSON or JSON-lines file: with `messages` or `prompt` and
        `completion` as TRL takes them, with `conversations` as LLaVA does, or with `question` and `answer`. `test` are
        those to evaluate on, the same if not given; `seed` draws the order of the batches; `settings` are keys of a
        task in a benchmark file: `name`, `max_length`, `image_root`, `metric`. A ValueError names what is wrong.
        """
        own = {"name": "conversations", "path": Path(), "reader": "messages"}
        spec = parse(TaskSpec, own | settings, source="ConversationTask")
        train = conversations_of(records, spec)
        held = train if test is None else conversations_of(test, spec, "test")
        self._prepare(train, held, processor, batch_size, seed)

    @classmethod
    def of_splits(
        cls, train: Conversations, test: Conversations, processor: Any, *, batch_size: int, seed: int, track: Track
    ) -> "ConversationTask":
        """Make a task of what was read, with the settings of its benchmark."""
        task = cls.__new__(cls)
        task._prepare(train, test, processor, batch_size, seed, track)
        return task

    def _prepare(
        self,
        train: Conversations,
        test: Conversations,
        processor: Any,
        batch_size: int,
        seed: int,
        track: Track = silent,
    ) -> None:
        spec = self.spec = train.spec
        self.name, self.epochs, self.metric = spec.name, spec.epochs, spec.metric or type(self).metric
        try:
            self.chat = ChatFormat(processor, template_named(spec.chat_template))
            counts = [
                token_counts(one, self.chat, track, f"{spec.name}: checking {one.split}") for one in (train, test)
            ]
        except ValueError as error:
            raise ValueError(f"task {spec.name!r}: {error}") from None
        self.train, self.test, self.lengths = train, test, counts[0]
        self._order = torch.Generator().manual_seed(seed)
        self._train = DataLoader(
            _Rows(train), batch_size, shuffle=True, generator=self._order, collate_fn=self._to_learn
        )
        self._test = DataLoader(_Rows(test), batch_size, collate_fn=self._to_answer)
        texts = [[(one.identity, one.question, one.answer) for one in read.records] for read in (train, test)]
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        self.data = {"classes": [], "images": [len(train), len(test)], "digest": digest}

    def batches(self) -> Iterable[Batch]:
        return self._train

    def test_batches(self) -> Iterable[Batch]:
        return self._test

    def generators(self) -> tuple[torch.Generator, ...]:
        return (self._order,)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over the answers' tokens, or over examples of theirs, in float32."""
        labels = batch["labels"][:, 1:]
        places = (labels != IGNORED).any(0).nonzero().squeeze(1)
        # Of the positions that lead to an answer somewhere in the batch: those of all would take the most memory.
        kept = {"logits_to_keep": places} if _keeps_some(model) else {}
        logits = cast(Tensor, model(**batch["inputs"], use_cache=False, **kept).logits)
        logits = (logits if kept else logits[:, :-1][:, places]).float()
        wanted = labels[:, places]
        if self.spec.loss_over == "answer_tokens":
            return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
        losses = F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none").sum(1)
        return cast(Tensor, (losses / (wanted != IGNORED).sum(1)).mean())

    def weight(self, batch: Batch) -> float:
        """Return the number of answer tokens, or of examples, as the loss is a mean over them."""
        is_answer = batch["labels"][:, 1:] != IGNORED
        return float(is_answer.sum() if self.spec.loss_over == "answer_tokens" else len(is_answer))

    def padding_mask(self, layer: str, batch: Batch) -> Tensor | None:
        """Leave the padding out of the language model's statistics; a vision tower and a projector see none."""
        if tower_of(layer) in ("vision", "projector"):
            return None
        mask = batch["inputs"]["attention_mask"].bool()
        if self.spec.features_of == "answers":
            return cast(Tensor, mask & (batch["labels"] != IGNORED))
        if self.spec.features_of == "text" and self.chat.image_token:
            number = self.chat.tokenizer.convert_tokens_to_ids(self.chat.image_token)
            mask = mask & (batch["inputs"]["input_ids"] != number)
        return cast(Tensor, mask)

    def predict(self, model: nn.Module, batch: Batch) -> list[str]:
        """Return the model's answers as text: greedy, up to the end token."""
        inputs = batch["inputs"]
        tokens = cast(Any, model).generate(
            **inputs, generation_config=self._generation(), logits_processor=LogitsProcessorList([_Finite()])
        )
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.chat.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def references(self, batch: Batch) -> list[Record]:
        return list(batch["records"])

    def examples(self, number: int) -> list[tuple[dict[str, str], Image.Image | None]]:
        return [
            (
                {"id": one.identity, "question": one.question, "answer": one.answer},
                next(iter(self.test.images(i)), None),
            )
            for i, one in enumerate(self.test.records[:number])
        ]

    def shown(self) -> list[str]:
        return [self.chat.encode(record.messages).text for record in self.train.records[:1]]

    def remarks(self) -> list[str]:
        if not self.lengths:
            return []
        low, middle, high = min(self.lengths), median_low(self.lengths), max(self.lengths)
        return [f"conversations of train have {low} to {high} tokens, {middle} in the middle, images included"]

    def describe(self, prediction: str, reference: Record) -> dict[str, Any]:
        return {
            "task": self.name, "id": reference.identity, "question": reference.question, "prediction": prediction,
            "answer": reference.answer,
        }  # fmt: skip

    def _generation(self) -> GenerationConfig:
        tokenizer = self.chat.tokenizer
        return GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=self.spec.max_new_tokens, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=list(ends_of(tokenizer, self.chat.end_tokens)),
        )  # fmt: skip

    def _to_learn(self, rows: Sequence[tuple[Conversations, int]]) -> Batch:
        records = [split.records[i] for split, i in rows]
        encoded = [self.chat.encode(record.messages) for record in records]
        found = self.chat.batch([one.text for one in encoded], [split.images(i) for split, i in rows])
        mask = self.chat.answer_mask(encoded, found.pop("offsets"), found.pop("replaced"))
        return {"inputs": found, "labels": found["input_ids"].masked_fill(~mask, IGNORED)}

    def _to_answer(self, rows: Sequence[tuple[Conversations, int]]) -> Batch:
        records = [split.records[i] for split, i in rows]
        prompts = [self.chat.prompt(record.messages[:-1], suffix=_suffix(self.spec, record)) for record in records]
        found = self.chat.batch(prompts, [split.images(i) for split, i in rows], left=True)
        return {"inputs": {key: found[key] for key in found if key not in ("offsets", "replaced")}, "records": records}


def _suffix(spec: TaskSpec, record: Record) -> str:
    is_yes_no = record.answer.strip().lower() in ("yes", "no")
    return spec.yes_no_suffix if is_yes_no and spec.yes_no_suffix else spec.suffix


class _Rows(torch.utils.data.Dataset[tuple[Conversations, int]]):
    """The places of a split's records: their images are read where a batch is put together."""

    def __init__(self, split: Conversations) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Conversations, int]:
        return self.split, index


class _Finite(LogitsProcessor):
    """Raises a `LearningError` where outputs are not finite: the largest of several NaN would be an answer."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        require_finite(scores, "the model's outputs hold NaN or infinity; are its weights whole, and in float32?")
        return scores


class Generative(Family):
    """Loads a language model, with or without a vision tower, and makes tasks of conversations for it."""

    def load(self, name: str, precision: Precision = WHOLE) -> nn.Module:
        return load_generative(name, precision)

    def tasks(
        self, name: str, specs: tuple[TaskSpec, ...], *, batch_size: int, evaluation: str, seed: int, track: Track
    ) -> list[StreamTask]:
        processor = load_processor(name)
        context = _context_of(load_config(name))
        tasks: list[StreamTask] = []
        for index, spec in enumerate(specs):
            spec = replace(spec, max_length=min(spec.max_length, context))
            train, test = read_conversations(spec, evaluation)
            tasks.append(
                ConversationTask.of_splits(
                    train, test, processor, batch_size=batch_size, seed=seed + index, track=track
                )
            )
        return tasks

    def save(self, model: nn.Module, name: str, folder: Path) -> None:
        cast(Any, model).save_pretrained(folder)
        load_processor(name).save_pretrained(folder)


def token_counts(read: Conversations, chat: ChatFormat, track: Track = silent, what: str = "") -> list[int]:
    """Return the number of tokens of every record of a split, which is checked: answers are found, all has a place.

    Raises:
        ValueError: If answers cannot be found, images are not read, or records are too long; it counts and names them.
    """
    longest = read.spec.max_length
    counts: list[int] = []
    flaws: dict[str, list[str]] = {}
    starts = range(0, len(read), AT_ONCE)
    image_tokens = _ImageTokens(chat)
    for start in track(starts, what, len(starts)):
        some: list[tuple[int, Encoded]] = []
        for index in range(start, min(start + AT_ONCE, len(read))):
            record = read.records[index]
            if record.images and not chat.reads_images:
                flaws.setdefault("an image, which the model does not read", []).append(record.identity)
                continue
            try:
                some.append((index, chat.encode(record.messages)))
            except ValueError as error:
                flaws.setdefault(str(error), []).append(record.identity)
        if not some:
            continue
        if start == 0:
            _require_whole_answers(read, some[0], chat)
        texts = [one.text for _, one in some]
        tokens = chat.tokenizer(texts, add_special_tokens=chat.adds_special_tokens(texts[0]))["input_ids"]
        for (index, _), ids in zip(some, tokens, strict=True):
            record = read.records[index]
            length = len(ids) + (sum(image_tokens.of(size) for size in read.sizes(index)) if record.images else 0)
            counts.append(length)
            if length > longest:
                flaws.setdefault(f"more than {longest} tokens", []).append(f"{record.identity} ({length})")
    if flaws:
        cure = "Mend or remove them, or raise max_length if the model's context allows it"
        raise ValueError(f"{told_of(flaws, read.split)}. {cure}")
    return counts


def _require_whole_answers(read: Conversations, one: tuple[int, Encoded], chat: ChatFormat) -> None:
    """Check with one record that the processor leaves answers where the chat template has put them."""
    index, encoded = one
    found = chat.batch([encoded.text], [read.images(index)])
    mask = chat.answer_mask([encoded], found["offsets"], found["replaced"])[0]
    learned = chat.tokenizer.decode(found["input_ids"][0][mask])
    wanted = "".join(encoded.text[start:end] for start, end in encoded.answers)
    if "".join(learned.split()) != "".join(wanted.split()):
        raise ValueError(
            f"the model's processor changes the text: the tokens {learned!r} were to be learned of {wanted!r}"
        )


class _ImageTokens:
    """How many more tokens an image of a size makes than its placeholder."""

    def __init__(self, chat: ChatFormat) -> None:
        self.chat = chat
        self.known: dict[tuple[int, int], int] = {}

    def of(self, size: tuple[int, int]) -> int:
        if size not in self.known:
            text = self.chat.prompt([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}])
            whole = self.chat.batch([text], [[Image.new("RGB", size)]])["input_ids"].shape[1]
            bare = len(self.chat.tokenizer(text, add_special_tokens=self.chat.adds_special_tokens(text))["input_ids"])
            self.known[size] = whole - bare
        return self.known[size]


def _context_of(config: Any) -> int:
    """Return how many tokens a model can read."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "max_position_embeddings", None) or 2**31)


def _keeps_some(model: nn.Module) -> bool:
    """Tell whether a model can compute the logits of some positions alone."""
    inner: Any = getattr(model, "module", model)  # DDP has the model inside.
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return "logits_to_keep" in inspect.signature(type(inner).forward).parameters
