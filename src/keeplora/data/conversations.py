"""Conversations about images, or text alone: records of three shapes, from JSON files or a Hugging Face dataset."""

import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets as hf
import torch
from datasets.exceptions import DatasetsError
from PIL import Image

from keeplora.data.benchmark import TaskSpec
from keeplora.data.images import decoded
from keeplora.errors import counted, listed

PLACEHOLDER = "<image>"  # Where an image stands in a text, in the data of LLaVA and of all that follow it.
ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("user", "assistant", "system", "tool")}
HOLD_OUT_SEED = 42
SPLITS = ("train", "test", "validation")
PLACE = r"{(\w+)}"  # Of a column, in a template.

Message = Mapping[str, Any]
"""A message as chat templates take it: `role`, and `content`, a list of parts of the type image or text."""


@dataclass(frozen=True)
class Record:
    """One conversation, which ends with an answer, and the images that its parts of type image stand for, in order."""

    identity: str
    messages: tuple[Message, ...]
    images: tuple[Any, ...] = ()  # A path, the content of a file, or an image each.

    @property
    def answer(self) -> str:
        """The text of the last message."""
        return text_of(self.messages[-1])

    @property
    def question(self) -> str:
        """The text of the message before it."""
        return text_of(self.messages[-2]) if len(self.messages) > 1 else ""

    @property
    def place(self) -> str:
        """Where its first image lies, as it was written; "" without one, or if it lies in a dataset."""
        return str(self.images[0]) if self.images and isinstance(self.images[0], str | Path) else ""


def text_of(message: Message) -> str:
    """Return the text of a message, without its images."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


@dataclass(frozen=True)
class Conversations:
    """The records of one split; images are opened on demand."""

    spec: TaskSpec
    split: str
    records: tuple[Record, ...]

    def __len__(self) -> int:
        return len(self.records)

    def images(self, index: int) -> list[Image.Image]:
        """Decode the images of a record as RGB; ValueError names one that cannot be read."""
        record, size = self.records[index], self.spec.max_megapixels
        return [decoded(partial(self._open, one), self.origin(record), size) for one in record.images]

    def sizes(self, index: int) -> list[tuple[int, int]]:
        """Return width and height of the images of a record, from their headers where these tell."""
        return [image.size for image in self.images(index)]

    def origin(self, record: Record) -> str:
        """Say where a record comes from, for messages."""
        place = f" ({record.place})" if record.place else ""
        return f"task {self.spec.name!r}: an image of {self.split} record {record.identity}{place}"

    def subset(self, indices: Sequence[int]) -> "Conversations":
        """Return some of the records."""
        return replace(self, records=tuple(self.records[i] for i in indices))

    def _open(self, image: Any) -> Image.Image:
        if isinstance(image, Image.Image):
            return image.copy()  # What is opened is closed again.
        content = image if isinstance(image, bytes) else None
        if content is not None:
            self.spec.require_size(len(content))
            return Image.open(io.BytesIO(content))
        path = image_root(self.spec) / image
        self.spec.require_size(path.stat().st_size)
        return Image.open(path)


def image_root(spec: TaskSpec) -> Path:
    """Return the folder that paths of images are relative to."""
    return spec.path / spec.image_root if spec.path.is_dir() else spec.path.parent / spec.image_root


Shape = Callable[[TaskSpec, Mapping[str, Any]], Record]


def read_llava(spec: TaskSpec) -> dict[str, Conversations]:
    """Read JSON files in the two shapes of LLaVA: `conversations` for training, `text` and `answer` for tests."""
    return _read(llava_record, spec)


def read_messages(spec: TaskSpec) -> dict[str, Conversations]:
    """Read `messages`, or `prompt` and `completion`, from JSON files or a dataset."""
    return _read(messages_record, spec)


def read_question_answer(spec: TaskSpec) -> dict[str, Conversations]:
    """Read columns with questions, answers and images, from JSON files or a dataset."""
    return _read(question_answer_record, spec)


def _read(shape: Shape, spec: TaskSpec) -> dict[str, Conversations]:
    read = {split: _split(shape, spec, split, rows) for split, rows in _rows_of(spec).items()}
    if spec.test_share and "test" not in read and "train" in read:
        read["train"], read["test"] = hold_out(read["train"], spec.test_share, seed=HOLD_OUT_SEED)
    return read


def conversations_of(source: Any, spec: TaskSpec, split: str = "train") -> Conversations:
    """Return the conversations of a list of records, a data set, or the path of a JSON file, in any of the shapes."""
    if isinstance(source, str | Path):
        rows: Any = _json_rows(Path(source))
    else:
        rows = _undecoded(source) if isinstance(source, hf.Dataset) else list(source)
    first = rows[0] if len(rows) else {}
    if "conversations" in first or ("text" in first and "answer" in first):
        shape = llava_record
    else:
        shape = messages_record if "messages" in first or "prompt" in first else question_answer_record
    try:
        return _split(shape, spec, split, rows)
    except ValueError as error:
        raise ValueError(f"task {spec.name!r}: {error}") from None


def hold_out(train: Conversations, share: float, *, seed: int) -> tuple[Conversations, Conversations]:
    """Split the records at random, with a fixed seed: what is left, and a share of them."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    number = max(1, round(share * len(train)))
    return train.subset(sorted(order[number:])), train.subset(sorted(order[:number]))


def _rows_of(spec: TaskSpec) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Return the rows of every split that is there: of JSON or JSON-lines files, or of a dataset."""
    files = {split: spec.path / file for split, file in spec.files.items()}
    if not files:
        named = {split: [spec.path / f"{split}{end}" for end in (".json", ".jsonl")] for split in SPLITS}
        files = {split: path for split, paths in named.items() for path in paths if path.is_file()}
    if files:
        if missing := [path for path in files.values() if not path.is_file()]:
            raise ValueError(f"there is no file {missing[0]}; name the files of the splits: files = {{ train = ... }}")
        return {split: _json_rows(path) for split, path in files.items()}
    if any((spec.path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        loaded: Any = hf.load_from_disk(str(spec.path))
    elif spec.path.exists():
        raise ValueError(f"{spec.path} has no train.json, train.jsonl, nor a saved dataset; name the files with files")
    else:
        loaded = _from_hub(spec)
    splits = loaded if isinstance(loaded, hf.DatasetDict) else {"train": loaded}
    return {split: _undecoded(rows) for split, rows in splits.items()}


def _from_hub(spec: TaskSpec) -> Any:
    try:
        return hf.load_dataset(spec.hub, spec.config or None)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, DatasetsError) as error:
        raise ValueError(f"{spec.path} is not there, nor is {spec.hub!r} on the hub: {error}") from None


def _undecoded(rows: Any) -> Any:
    """Let a dataset give files in place of decoded images."""
    for name, kind in rows.features.items():
        if isinstance(kind, hf.Image):
            rows = rows.cast_column(name, hf.Image(decode=False))
        elif isinstance(kind, hf.List) and isinstance(kind.feature, hf.Image):
            rows = rows.cast_column(name, hf.List(hf.Image(decode=False)))
    return rows


def _json_rows(path: Path) -> list[Mapping[str, Any]]:
    """Read a JSON array, or JSON lines."""
    text = path.read_text(encoding="utf-8")
    try:
        is_array = text.lstrip().startswith("[")
        rows = json.loads(text) if is_array else [json.loads(one) for one in text.splitlines() if one]
    except ValueError as error:
        raise ValueError(f"{path} is neither a JSON array nor JSON lines: {error}") from None
    odd = next((number for number, row in enumerate(rows) if not isinstance(row, dict)), None)
    if odd is not None:
        raise ValueError(f"{path}: record {odd} is no object")
    return list(rows)


def _split(shape: Shape, spec: TaskSpec, split: str, rows: Sequence[Mapping[str, Any]]) -> Conversations:
    """Make the records of a split; ValueError counts and names all that is wrong with them."""
    records: list[Record] = []
    flaws: dict[str, list[str]] = defaultdict(list)
    for number, row in enumerate(rows):
        try:
            record = shape(spec, row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            flaws[reason].append(str(number))
            continue
        record = record if record.identity else replace(record, identity=str(number))
        for flaw in _flaws(spec, record):
            flaws[flaw].append(record.identity)
        records.append(record)
    twice = [name for name, times in Counter(record.identity for record in records).items() if times > 1]
    if twice and split != "train":
        flaws["the id of another one"] = twice
    if flaws:
        raise ValueError(f"{told_of(flaws, split)}. Mend or remove them")
    if not records:
        raise ValueError(f"{split} has no record")
    return Conversations(spec, split, tuple(records))


def told_of(flaws: Mapping[str, Sequence[str]], split: str) -> str:
    """Return in one line what is wrong with which records of a split, counted."""
    verbs = {flaw: "has" if len(of) == 1 else "have" for flaw, of in flaws.items()}
    parts = (
        f"{counted(len(of), 'record')} of {split} {verbs[flaw]} {flaw}: {listed(of, 5)}" for flaw, of in flaws.items()
    )
    return "; ".join(parts)


def _flaws(spec: TaskSpec, record: Record) -> Iterator[str]:
    """Yield what is wrong with a record."""
    parts = sum(part["type"] == "image" for message in record.messages for part in message["content"])
    if parts != len(record.images):
        yield f"another number of {PLACEHOLDER} than of images"
    if record.messages[-1]["role"] != "assistant":
        yield "no answer at the end"
    elif not record.answer.strip():
        yield "an empty answer"
    if len(record.messages) < 2 or record.messages[-2]["role"] == "assistant":
        yield "no question before the answer"
    for image in record.images:
        if isinstance(image, str | Path) and not (image_root(spec) / image).is_file():
            yield "an image that is not there"


# Shapes


def llava_record(spec: TaskSpec, row: Mapping[str, Any]) -> Record:
    """Read a record of LLaVA's training (`conversations`) or of its tests (`text`, `answer`): images go in front."""
    images = _images(row.get("image"))
    if "conversations" in row:
        turns = [(_role(turn["from"]), turn["value"]) for turn in row["conversations"]]
    else:
        turns = [("user", row["text"]), ("assistant", str(row["answer"]))]
    messages = []
    for number, (role, text) in enumerate(turns):
        text = text.replace(PLACEHOLDER, "").strip() if role == "user" else text
        messages.append(_message(role, text, num_images=len(images) if number == 0 else 0))
    return Record(str(row.get("question_id", row.get("id", ""))), tuple(messages), images)


def messages_record(spec: TaskSpec, row: Mapping[str, Any]) -> Record:
    """Read a record of `messages`, or of `prompt` and `completion`, as TRL takes them; with `images` or `image`."""
    images = _images(row.get("images", row.get("image")))
    if "messages" in row:
        told = list(row["messages"])
    else:
        told = []
        for role, side in (("user", row["prompt"]), ("assistant", row["completion"])):
            told += [{"role": role, "content": side}] if isinstance(side, str) else list(side)
    messages = [_message_of(one) for one in told]
    stand = sum(part["type"] == "image" for message in messages for part in message["content"])
    if images and not stand:
        first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
        messages[first] = {**messages[first], "content": [{"type": "image"}] * len(images) + messages[first]["content"]}
    return Record(str(row.get("id", row.get("question_id", ""))), tuple(messages), images)


def question_answer_record(spec: TaskSpec, row: Mapping[str, Any]) -> Record:
    """Read a record from the columns that the task names."""
    answer = row[spec.answer_column]
    if spec.question_template:
        question = re.sub(PLACE, lambda found: str(row[found[1]]), spec.question_template)
    else:
        question = row[spec.question_column]
    images = _images(row.get(spec.image_column))
    if not isinstance(question, str) or not isinstance(answer, str | int | float):
        raise ValueError(f"a question or an answer that is no text ({spec.question_column}, {spec.answer_column})")
    messages = (_message("user", question, num_images=len(images)), _message("assistant", str(answer)))
    return Record(str(row.get("id", "")), messages, images)


def _role(name: str) -> str:
    if name not in ROLES:
        raise ValueError(f"the role {name!r}, known are {', '.join(ROLES)}")
    return ROLES[name]


def _message(role: str, text: str, *, num_images: int = 0) -> Message:
    return {"role": role, "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}


def _message_of(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with parts, also of a text in which placeholders stand for images."""
    role, content = _role(told["role"]), told["content"]
    if not isinstance(content, str):
        if odd := [part["type"] for part in content if part["type"] not in ("image", "text")]:
            raise ValueError(f"a part of type {odd[0]!r}, known are image and text")
        texts = [{"text": part["text"]} if part["type"] == "text" else {} for part in content]
        return {
            "role": role,
            "content": [{"type": one["type"], **text} for one, text in zip(content, texts, strict=True)],
        }
    pieces = content.split(PLACEHOLDER) if role == "user" else [content]
    parts = [{"type": "text", "text": pieces[0]}] if pieces[0] or len(pieces) == 1 else []
    for piece in pieces[1:]:
        parts += [{"type": "image"}] + ([{"type": "text", "text": piece}] if piece else [])
    return {"role": role, "content": parts}


def _images(value: Any) -> tuple[Any, ...]:
    """Return the images of a record: a path, a file's content, a row of a dataset, several of these, or none."""
    if value is None or value == "":
        return ()
    if isinstance(value, list | tuple):
        return tuple(one for item in value for one in _images(item))
    if isinstance(value, Mapping):
        return (value["bytes"] if value.get("bytes") is not None else value["path"],)
    return (value,)
