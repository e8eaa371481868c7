"""Does the model load, is it sound, which layers would be adapted, with what capacity, and do the prompts fit it?"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from keeplora.errors import counted, listed
from keeplora.layers.lora import linear_targets
from keeplora.layers.weights import shape_of
from keeplora.methods.registry import find_method
from keeplora.models.dual_encoder import token_ids
from keeplora.models.interfaces import Family
from keeplora.models.pretrained import load_tokenizer
from keeplora.models.registry import family_of, locate
from keeplora.runs.config import RunConfig
from keeplora.studies.doctor.data import TaskData
from keeplora.studies.doctor.findings import FAILURES, Finding
from keeplora.training.trainer import best_device

SHOWN = 3  # Prompts of each task that are shown.


@dataclass
class Subject:
    """The model under examination."""

    family: Family
    source: str  # Folder or hub name.
    model: nn.Module
    parameters: int
    weight_bytes: int
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)  # `(d_out, d_in)` of each target layer.
    free: dict[str, int] = field(default_factory=dict)
    """How many input directions of each layer a method that protects some leaves at the start."""
    start_seconds: float = 0.0  # How long it took to protect what the model knows.

    def config(self, tower: str, key: str) -> Any:
        """Return what the config of a tower says; None if it says nothing."""
        return getattr(getattr(getattr(self.model, "config", None), tower, None), key, None)

    @property
    def side(self) -> int:
        """The width of its input images; 0 if its config does not say so."""
        size = self.config("vision_config", "image_size") or 0
        return max(size) if isinstance(size, list | tuple) else size


def load_subject(config: RunConfig, findings: list[Finding]) -> Subject | None:
    """Load a run's model as the run does, and find the layers to adapt; return None if it cannot be loaded."""
    subject = None
    try:
        family, source = family_of(config.model), locate(config.model)
        model = family.load(source, config.precision).to(best_device())
        weights = dict(model.named_parameters())
        num_bytes = sum(weight.nbytes for weight in weights.values())
        subject = Subject(family, source, model, sum(weight.numel() for weight in weights.values()), num_bytes)
        if broken := [name for name, weight in weights.items() if not torch.isfinite(weight).all()]:
            message = f"{counted(len(broken), 'weight')} of the model hold numbers that are not finite"
            findings.append(Finding("problem", "", f"{message}: {listed(broken)}", "get the model anew"))
        targets = linear_targets(model, config.options.targets, config.options.towers)
        subject.shapes = {name: shape_of(model, name) for name in targets}
        findings += _full_layers(subject, config)
    except FAILURES as error:
        findings.append(Finding("problem", "", str(error)))
    return subject


def _full_layers(subject: Subject, config: RunConfig) -> Iterator[Finding]:
    """Protect what the model knows, and compare the free dimensions of each layer with the rank."""
    method, start = find_method(config.method)[0](config.options, seed=config.seed), time.perf_counter()
    try:
        method.protect(subject.model)
    except FAILURES as error:
        yield Finding("problem", "", f"the principal directions cannot be protected: {error}")
    subject.start_seconds = time.perf_counter() - start
    subject.free = {name: basis.shape[0] - basis.shape[1] for name, basis in method.protected().items()}
    rank, total = config.options.rank, len(subject.free)
    lower = "lower weight_energy, or " if hasattr(config.options, "weight_energy") else ""
    cure = f"{lower}give rank less than {rank}"
    if full := [name for name, dims in subject.free.items() if dims == 0]:
        message = f"{len(full)} of {total} layers have no free direction at the start: {listed(full)}"
        yield Finding("problem" if len(full) == total else "warning", "", message, cure)
    if small := [f"{name} ({dims})" for name, dims in subject.free.items() if 0 < dims < rank]:
        message = f"{len(small)} of {total} layers have fewer free directions than the rank {rank}: {listed(small)}"
        yield Finding("warning", "", message, cure)


def prompt_findings(subject: Subject, tasks: list[TaskData]) -> Iterator[Finding]:
    """Tokenise the prompts of every task whose classes are known, and name those that a run would refuse."""
    try:
        tokenizer = load_tokenizer(subject.source)
    except ValueError as error:
        yield Finding("problem", "", str(error), "get the model anew")
        return
    limit = subject.config("text_config", "max_position_embeddings") or tokenizer.model_max_length
    for data in tasks:
        prompts = data.spec.prompts(data.class_names)
        data.prompts = prompts[:: max(1, len(prompts) // SHOWN)][:SHOWN]
        encoded = [tuple(ids) for ids in token_ids(tokenizer, prompts)] if prompts else []
        if long := [f"{p!r} ({len(ids)} tokens)" for p, ids in zip(prompts, encoded, strict=True) if len(ids) > limit]:
            message = f"{counted(len(long), 'prompt')} longer than the model's context of {limit} tokens"
            cure = "shorten the template or the class names"
            yield Finding("problem", data.spec.name, f"{message}: {listed(long)}", cure)
        groups: dict[tuple[tuple[int, ...], ...], list[str]] = {}
        number = len(data.spec.templates)
        for place, name in enumerate(data.class_names):
            own = tuple(ids[:limit] for ids in encoded[place * number : (place + 1) * number])
            groups.setdefault(own, []).append(name)
        if same := [" = ".join(map(repr, names)) for names in groups.values() if len(set(names)) > 1]:
            message = f"the tokenizer cannot tell class names apart: {listed(same)}"
            yield Finding("problem", data.spec.name, message, "give them other names with class_names")
