"""What a run learned, for use without keeplora: the merged model, one adapter, or the adapter of each task.

All is made again in float32 from the base model and the recorded adapters, and cast once.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from keeplora.config import Config
from keeplora.data.readers import read_splits
from keeplora.layers import lora
from keeplora.layers.lora import SavedAdapter
from keeplora.methods.base import TaskRecord
from keeplora.methods.registry import find_method
from keeplora.models.registry import EMBEDDED, family_of, locate
from keeplora.progress import Track, silent
from keeplora.runs.atomic_store import flush, made_whole
from keeplora.runs.config import RunConfig
from keeplora.runs.directory import RunDirectory
from keeplora.runs.export.card import Card, render_card
from keeplora.runs.open import config_of, read_run
from keeplora.subspace.low_rank_update import cut_to, summed

NOTICE = Path(__file__).parents[2] / "data" / "mini" / "NOTICE"


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """In which form a run is exported, and where to."""

    format: Literal["merged", "adapter", "adapters"]
    """The model with all updates in its weights, one adapter that holds their sum, or an adapter for each task."""
    output: Path
    """Folder to write; it must not exist, or be empty."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the weights."""
    rank: int | None = None
    """Format adapter: cut each layer's update to its best approximation of this rank; exact if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.format != "adapter":
            raise ValueError(f"rank = {self.rank} is for format 'adapter'; leave it out for format {self.format!r}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank = {self.rank} keeps nothing; set it to at least 1")


@dataclass(frozen=True)
class _Source:
    """A run that is read: its base model, its finished tasks, and what each left."""

    directory: RunDirectory
    config: RunConfig
    base: nn.Module
    records: list[tuple[TaskRecord, Path]]
    track: Track

    def name(self, index: int) -> str:
        return str(self.directory.manifest["tasks"][index])

    def place(self, index: int) -> str:
        return f"{index + 1:02d}-{self.name(index)}"

    @property
    def base_name(self) -> str:
        """The hub name of the base model, or its absolute folder."""
        source = locate(self.config.model)
        return str(Path(source).resolve()) if Path(source).is_dir() else source

    def adapters(self) -> dict[int, SavedAdapter]:
        return {index: r.adapter for index, (r, _) in enumerate(self.records) if r.adapter is not None}


def export_run(folder: Path, config: ExportConfig, *, track: Track = silent) -> Card:
    """Write the finished tasks of a run to `config.output`, with a model card, and return what the card says.

    Args:
        folder: The run directory.
        config: The form of the export and its place.
        track: Shows progress.

    Raises:
        ValueError: If no task is finished, a file of the run is missing or damaged, the run cannot have this form, the
            output is not empty, or a weight is too large for the precision.
    """
    source = _read(folder, config, track)
    with made_whole(config.output) as part:
        part.mkdir()
        found = WRITERS[config.format](source, config, part)
        card = _card(source, config, heads=_write_heads(source, part), **found)
        (part / "README.md").write_text(render_card(card), encoding="utf-8")
        if card.embedded:
            shutil.copyfile(NOTICE, part / "NOTICE")
        flush(part)
    return card


def _read(folder: Path, config: ExportConfig, track: Track) -> _Source:
    directory = read_run(folder)
    if directory.num_finished == 0:
        raise ValueError(f"{folder} has nothing to export: no task is finished; go on with the run first")
    run = config_of(directory)
    records = [directory.record(index) for index in range(directory.num_finished)]
    if not all(record.merged for record, _ in records):
        raise ValueError(
            f"{folder} was learned by {run.method}, whose updates depend on the input and stay beside the weights: no"
            " plain model or adapter computes the same. Load it with keeplora.reopen, or run a method that merges"
        )
    if config.format != "merged" and all(record.adapter is None for record, _ in records):
        raise ValueError(f"{folder} was learned by {run.method}, which leaves no adapter; use --format merged")
    return _Source(directory, run, family_of(run.model).load(locate(run.model)), records, track)


def _write_merged(source: _Source, config: ExportConfig, part: Path) -> dict[str, Any]:
    """Write the base model with all updates merged."""
    run, model = source.config, source.base
    for record, folder in source.track(source.records, "merging", len(source.records)):
        model = model if record.adapter is None else lora.merge_from(model, folder)
    model = model.to(getattr(torch, config.dtype))
    _require_finite(model.state_dict(), config.dtype)
    family_of(run.model).save(model, locate(run.model), part)
    return {}


def _write_sum(source: _Source, config: ExportConfig, part: Path) -> dict[str, Any]:
    """Write the sum of all updates as one adapter, exact or cut to a rank."""
    factors = summed([saved.factors() for saved in source.adapters().values()])
    cut = None
    if config.rank is not None:
        factors, cut = cut_to(factors, config.rank, track=source.track)
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    adapted = lora.attach(source.base, ranks, {name: float(r) for name, r in ranks.items()}, factors=factors)
    saved = lora.detach(adapted)
    lora.unload(adapted)
    _write_adapter(source, config, saved, part)
    return {"cut": cut}


def _write_each(source: _Source, config: ExportConfig, part: Path) -> dict[str, Any]:
    """Write the adapter of each task as it was recorded."""
    adapters = source.adapters()
    for index, saved in adapters.items():
        _write_adapter(source, config, saved, part / source.place(index))
    return {"folders": {source.name(index): source.place(index) for index in adapters}}


WRITERS: dict[str, Callable[[_Source, ExportConfig, Path], dict[str, Any]]] = {
    "merged": _write_merged,
    "adapter": _write_sum,
    "adapters": _write_each,
}
"""Each writes one format to a folder, and returns what the card says of that format alone."""


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
    """Write the tasks' own classifiers, with their class names and prompts; return the task and file of each."""
    heads = {index: record.head for index, (record, _) in enumerate(source.records) if record.head}
    if not heads:
        return {}
    (part / "heads").mkdir()
    specs = {spec.name: spec for spec in source.config.stream}
    for index, head in heads.items():
        name, place = source.name(index), part / "heads" / source.place(index)
        if name not in specs:
            raise ValueError(f"task {name!r} of the run is not in {source.config.benchmark} any more; put it back")
        classes = read_splits(specs[name], source.config.evaluation)[0].class_names
        if len(classes) != len(head["weight"]):
            raise ValueError(
                f"task {name!r}: its data have {len(classes)} classes, its classifier {len(head['weight'])}; the data"
                " were changed after the run, bring back those of the run"
            )
        prompts = [specs[name].template.replace("{}", label) for label in classes]
        values = {"task": name, "class_names": list(classes), "prompts": prompts}
        place.with_name(place.name + ".json").write_text(json.dumps(values, indent=1) + "\n")
        place.with_name(place.name + ".safetensors").write_bytes(save(head))
    return {source.name(index): f"heads/{source.place(index)}" for index in heads}


def _card(source: _Source, config: ExportConfig, **found: Any) -> Card:
    run = source.config
    train = {name: getattr(run.train, name) for name in ("epochs", "batch_size", "learning_rate", "schedule")}
    tasks = source.directory.manifest["config"]["tasks"]
    return Card(
        format=config.format,
        dtype=config.dtype,
        base=source.base_name,
        model_class=type(source.base).__name__,
        has_text_tower=hasattr(source.base, "get_text_features"),
        embedded=tuple(kind for kind in ("model", "benchmark") if getattr(run, kind) in EMBEDDED),
        results=source.directory.results(),
        prompts={name: spec["template"] for name, spec in tasks.items()},
        evaluation=run.evaluation,
        one_by_one=find_method(run.method)[0].one_by_one,
        settings={"method": run.method, **dataclasses.asdict(run.options), **train, "seed": run.seed},
        **found,
    )
