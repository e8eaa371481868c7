"""What a run learned, for use without keeplora: made again in float32 from base model and adapters, cast once."""

import dataclasses
import html
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
from pydantic import PositiveInt
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from keeplora.config import Config, parse
from keeplora.data.benchmark import TaskSpec
from keeplora.evaluation.accuracy_matrix import METRIC_NAMES, Results
from keeplora.evaluation.evaluate import evaluate
from keeplora.layers import lora, merging
from keeplora.layers.lora import SavedAdapter
from keeplora.methods.base import TaskRecord
from keeplora.methods.registry import find_method
from keeplora.models.dual_encoder import context_of
from keeplora.models.interfaces import StreamTask
from keeplora.models.pretrained import Dtype
from keeplora.models.registry import EMBEDDED, family_of, locate
from keeplora.progress import Track, silent
from keeplora.runs.atomic_store import made_whole
from keeplora.runs.config import RunConfig
from keeplora.runs.directory import RunDirectory
from keeplora.runs.open import Places, config_of, read_run, require_recorded_tasks, require_same_data
from keeplora.subspace.low_rank_update import Cut, cut_to, summed
from keeplora.training.trainer import best_device


@dataclass(frozen=True, kw_only=True)
class Card:
    """All that a card says."""

    format: str
    dtype: str
    base: str  # Hub name of the base model, or its folder as seen from the card.
    is_folder: bool
    model_class: str  # Its class in transformers.
    has_text_tower: bool  # Whether it tells images apart by prompts.
    embedded: tuple[str, ...]
    """What of the run came with keeplora, so that its licence is known: model, benchmark, both or none."""
    results: Results
    context: int | None  # Tokens that every prompt is padded to; None if padding is masked out.
    templates: dict[str, tuple[str, ...]]  # Those of the prompts of each task.
    classes: dict[str, list[str]]  # Names of the classes of each task that told them, in the order of the logits.
    evaluation: str
    one_by_one: bool
    settings: dict[str, Any]
    folders: dict[str, str] = field(default_factory=dict)  # Task and folder of each adapter.
    heads: dict[str, str] = field(default_factory=dict)  # Task and file of each classifier.
    cut: Cut | None = None
    cut_scores: list[float] | None = None  # Of what was exported on all tasks, where cutting lost something.

    @property
    def names(self) -> dict[str, str]:
        """Names to load the adapters under, and the folder of each; PEFT allows no dot in a name."""
        return {f"task{number}": folder for number, folder in enumerate(self.folders.values(), 1)}

    def to_classify(self) -> dict[str, dict[str, Any]]:
        """Return what `classes.json` holds of each task: class names, templates, the file of its classifier."""
        told = {task: {"class_names": names, "templates": self.templates[task]} for task, names in self.classes.items()}
        for task, file in self.heads.items():
            told.setdefault(task, {})["classifier"] = file
        return told


def render_card(card: Card) -> str:
    """Return the card as Markdown."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["literal"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters |= {"prose": as_prose, "code": as_code}
    template = environment.from_string(Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8"))
    more = {"is_on_hub": not card.is_folder, "metric_names": METRIC_NAMES, "most_classes": MOST_CLASSES}
    return template.render(**vars(card), names=card.names, **more)


MOST_CLASSES = 20  # More of a task are not on the card.

NOTICE = Path(__file__).parents[1] / "data" / "mini" / "NOTICE"


def as_prose(text: object) -> str:
    """Return text from elsewhere so that Markdown shows it as it is: no HTML, no links, no columns."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def as_code(text: object) -> str:
    """Return text from elsewhere as a Markdown code span, which holds no HTML and ends where we end it."""
    plain = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    return f"{fence} {plain} {fence}" if "`" in plain else f"{fence}{plain}{fence}"


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """In which form a run is exported, and where to."""

    format: Literal["merged", "adapter", "adapters"]
    """The model with all updates in its weights, one adapter that holds their sum, or an adapter for each task."""
    output: Path
    """Folder to write; it must not exist, or be empty."""
    dtype: Dtype = "float32"
    """Precision of the weights."""
    benchmark: Path | None = None
    """Where the benchmark's file is now, if it was moved away from where the run knew it."""
    data: Path | None = None
    """Where the folder of the benchmark's data is now, if it was moved."""
    rank: PositiveInt | None = None
    """Format adapter: cut each layer's update to its best approximation of this rank; exact if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.format != "adapter":
            raise ValueError(f"rank = {self.rank} is for format 'adapter'; leave it out for format {self.format!r}")


@dataclass(frozen=True)
class _Source:
    """A run that is read, its base model, and by name what each finished task left and the folder of its adapter."""

    directory: RunDirectory
    config: RunConfig
    base: nn.Module
    records: dict[str, tuple[TaskRecord, Path]]
    track: Track
    output: Path

    @property
    def base_name(self) -> str:
        """The hub name of the base model, or its folder as seen from the export: nobody else has ours."""
        name = locate(self.config.model)
        return os.path.relpath(Path(name).resolve(), self.output.resolve()) if Path(name).is_dir() else name

    @property
    def adapters(self) -> dict[str, SavedAdapter]:
        return {name: record.adapter for name, (record, _) in self.records.items() if record.adapter is not None}

    def place(self, name: str) -> str:
        return self.records[name][1].parent.name


def export_run(folder: Path, config: ExportConfig, *, track: Track = silent) -> Card:
    """Write the finished tasks of a run to `config.output`, with a model card, and return what the card says.

    ValueError says that there is none, a file is damaged, the run cannot have this form, or the output is not empty.
    """
    directory = read_run(folder)
    if directory.num_finished == 0:
        raise ValueError(f"{folder} has nothing to export: no task is finished; resume the run first")
    run = config_of(directory, Places(config.benchmark, config.data))
    finished = directory.manifest["tasks"][: directory.num_finished]
    records = {name: directory.record(index) for index, name in enumerate(finished)}
    if not all(record.merged for record, _ in records.values()):
        raise ValueError(
            f"{folder} was learned by {run.method}, whose updates depend on the input and stay beside the weights: no"
            " plain model or adapter computes the same. Load it with keeplora.runs.open.reopen, or run a method that"
            " merges"
        )
    if config.format != "merged" and all(record.adapter is None for record, _ in records.values()):
        raise ValueError(f"{folder} was learned by {run.method}, which leaves no adapter; use --format merged")
    source = _Source(directory, run, family_of(run.model).load(locate(run.model)), records, track, config.output)
    with made_whole(config.output) as part:
        found = WRITERS[config.format](source, config, part)
        card = _card(source, config, heads=_write_heads(source, part), **found)
        (part / "README.md").write_text(render_card(card), encoding="utf-8")
        if card.classes:
            (part / "classes.json").write_text(json.dumps(card.to_classify(), indent=1) + "\n")
        (part / "export.json").write_text(json.dumps(_origin(source, card), indent=1) + "\n")
        if card.embedded:
            shutil.copyfile(NOTICE, part / "NOTICE")
    return card


def _write_merged(source: _Source, config: ExportConfig, part: Path) -> dict[str, Any]:
    run, model = source.config, source.base
    for name in source.track(source.adapters, "merging", len(source.adapters)):
        model = merging.merge_from(model, source.records[name][1])
    model = model.to(getattr(torch, config.dtype))
    _require_finite(model.state_dict(), config.dtype)
    family_of(run.model).save(model, locate(run.model), part)
    return {}


def _write_sum(source: _Source, config: ExportConfig, part: Path) -> dict[str, Any]:
    factors, cut, scores = summed([saved.factors() for saved in source.adapters.values()]), None, None
    if config.rank is not None:
        factors, cut = cut_to(factors, config.rank, track=source.track)
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    alphas = {name: float(r) for name, r in ranks.items()}
    adapted = lora.attach(source.base, ranks, alphas, factors=factors)
    saved = lora.detach(adapted).cast(getattr(torch, config.dtype))
    lora.unload(adapted)
    _write_adapter(source, config, saved, part)
    if cut is not None and cut.overall > 0:  # As it was written, rounded too.
        written = lora.attach(source.base.to(best_device()), ranks, alphas, factors=saved.factors())
        scores = evaluate(written, _tasks_of(source), track=source.track)
        lora.unload(written)
    return {"cut": cut, "cut_scores": scores}


def _tasks_of(source: _Source) -> list[StreamTask]:
    """Load the tasks of a run, with the classifiers that it has learned for them."""
    run = source.config
    require_recorded_tasks(source.directory, run)
    tasks = family_of(run.model).tasks(
        locate(run.model), run.stream, batch_size=run.train.batch_size, evaluation=run.evaluation, seed=run.seed,
        track=source.track,
    )  # fmt: skip
    require_same_data(source.directory, tasks)
    for task in tasks:
        if task.name in source.records and (head := source.records[task.name][0].head):
            task.load_head(head)
    return tasks


def _write_each(source: _Source, config: ExportConfig, part: Path) -> dict[str, Any]:
    for name, saved in source.adapters.items():
        _write_adapter(source, config, saved, part / source.place(name))
    return {"folders": {name: source.place(name) for name in source.adapters}}


WRITERS: dict[str, Callable[[_Source, ExportConfig, Path], dict[str, Any]]] = {
    "merged": _write_merged,
    "adapter": _write_sum,
    "adapters": _write_each,
}
"""Each writes one format to a folder: all merged, the sum of updates, or each; and returns what its card says."""


def _write_adapter(source: _Source, config: ExportConfig, saved: SavedAdapter, folder: Path) -> None:
    saved = saved.based_on(source.base, source.base_name).cast(getattr(torch, config.dtype))
    _require_finite(saved.weights, config.dtype)
    folder.mkdir(exist_ok=True)
    for name, content in saved.files().items():
        (folder / name).write_bytes(content)


def _require_finite(weights: dict[str, Tensor], dtype: str) -> None:
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"the weight {name!r} is not finite in {dtype}; use --dtype bfloat16 or float32")


def _write_heads(source: _Source, part: Path) -> dict[str, str]:
    """Write the tasks' own classifiers; return the task and file of each."""
    heads = {name: record.head for name, (record, _) in source.records.items() if record.head}
    files = {name: f"heads/{source.place(name)}.safetensors" for name in heads}
    for name, head in heads.items():
        (part / "heads").mkdir(exist_ok=True)
        (part / files[name]).write_bytes(save(head))
    return files


def _origin(source: _Source, card: Card) -> dict[str, Any]:
    """Return what `export.json` holds, which `keeplora evaluate` reads: nothing of where things lie on this machine."""
    recorded = source.directory.manifest["config"]
    paths = {path: os.path.relpath(path, source.output.resolve()) for path in _paths_of(source.config)}
    config = recorded | {
        "benchmark": paths.get(source.config.benchmark, source.config.benchmark),
        "more": [paths.get(name, name) for name in source.config.more],
        "data": None if source.config.data is None else os.path.relpath(source.config.data, source.output.resolve()),
        "model": source.config.model if source.config.model in EMBEDDED else card.base,
        "tasks": {
            name: {key: table[key] for key in table if key != "hub"} for name, table in recorded["tasks"].items()
        },
    }
    return {
        "format": card.format,
        "config": config,
        "adapters": list(card.folders.values()),
        "heads": card.heads,
        "tasks": card.results.tasks,
        "scores": card.cut_scores or card.results.accuracy[-1],
        "data": source.directory.manifest.get("data", {}),
    }


def _paths_of(config: RunConfig) -> list[str]:
    """Return the settings of a run that are paths of benchmarks."""
    return [name for name in (config.benchmark, *config.more) if name.endswith(".toml")]


def _card(source: _Source, config: ExportConfig, **found: Any) -> Card:
    run = source.config
    train = {name: getattr(run.train, name) for name in ("epochs", "batch_size", "learning_rate", "schedule")}
    tables = source.directory.manifest["config"]["tasks"]
    return Card(
        format=config.format,
        dtype=config.dtype,
        base=source.base_name,
        is_folder=Path(locate(run.model)).is_dir(),
        model_class=type(source.base).__name__,
        has_text_tower=hasattr(source.base, "get_text_features"),
        embedded=tuple(kind for kind in ("model", "benchmark") if getattr(run, kind) in EMBEDDED),
        results=source.directory.results(),
        context=context_of(source.base.config) if isinstance(source.base, PreTrainedModel) else None,
        templates={name: parse(TaskSpec, table, source=name).templates for name, table in tables.items()},
        classes={name: told["classes"] for name, told in source.directory.manifest.get("data", {}).items()},
        evaluation=run.evaluation,
        one_by_one=find_method(run.method)[0].one_by_one,
        settings={"method": run.method, **dataclasses.asdict(run.options), **train, "seed": run.seed},
        **found,
    )
