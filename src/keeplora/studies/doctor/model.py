"""Does the model load, is it sound, which layers would be adapted, and how much room do they have?"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from keeplora.layers.lora import linear_targets
from keeplora.methods.base import Method
from keeplora.methods.keeplora import KeepLoRA
from keeplora.models.interfaces import Family
from keeplora.models.registry import family_of, locate
from keeplora.studies.doctor.findings import Finding, Level, counted, listed
from keeplora.training.profiling import Costs, measured
from keeplora.training.trainer import best_device


@dataclass
class Subject:
    """The model under examination."""

    family: Family
    source: str
    """Folder or hub name."""
    model: nn.Module
    kind: str
    """`model_type` of its config."""
    parameters: int
    weight_bytes: int
    side: int | None
    """Width of its input images, if its config says so."""
    context: int | None
    """How many tokens its text tower takes, if its config says so."""
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """`(d_out, d_in)` of each target layer."""
    free: dict[str, int] = field(default_factory=dict)
    """How many input directions of each layer a method that protects some leaves at the start."""
    phases: Costs = field(default_factory=dict)


def load_subject(name: str) -> tuple[Subject | None, list[Finding]]:
    """Load a model by its name as a run does; a problem tells why that is not possible."""
    try:
        family, source = family_of(name), locate(name)
        model = family.load(source).to(best_device())
    except (ValueError, OSError, RuntimeError) as error:
        return None, [Finding("problem", "", str(error))]
    config: Any = getattr(model, "config", None)
    parameters = list(model.parameters())
    subject = Subject(
        family=family,
        source=source,
        model=model,
        kind=str(getattr(config, "model_type", type(model).__name__)),
        parameters=sum(parameter.numel() for parameter in parameters),
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        side=_side(config),
        context=getattr(getattr(config, "text_config", None), "max_position_embeddings", None),
    )
    broken = [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if broken:
        message = f"{counted(len(broken), 'weight')} of the model hold numbers that are not finite: {listed(broken)}"
        return subject, [Finding("problem", "", message, "get the model anew")]
    return subject, []


def target_findings(subject: Subject, method: Method) -> list[Finding]:
    """Find the layers to adapt and how much room they have, and write both into the subject."""
    model, config = subject.model, method.config
    try:
        names = linear_targets(model, config.targets)
    except ValueError as error:
        return [Finding("problem", "", str(error))]
    weights = {name: model.get_parameter(f"{name}.weight") for name in names}
    subject.shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    if isinstance(method, KeepLoRA):
        return _room_findings(subject, method)
    if hasattr(method, "bases"):
        subject.free = {name: d_in for name, (_, d_in) in subject.shapes.items()}
    return []


def _room_findings(subject: Subject, method: KeepLoRA) -> list[Finding]:
    """Compare the free dimensions of each layer with the rank, once its principal directions are protected."""
    try:
        with measured(subject.phases, "start"):
            method.protect(subject.model)
    except (ValueError, RuntimeError) as error:
        return [Finding("problem", "", f"the principal directions cannot be protected: {error}")]
    subject.free = {name: basis.shape[0] - basis.shape[1] for name, basis in method.bases.items()}
    rank, total = method.config.rank, len(subject.free)
    cure = f"lower weight_energy, or give rank less than {rank}"
    findings = []
    if full := [name for name, free in subject.free.items() if free == 0]:
        level: Level = "problem" if len(full) == total else "warning"
        message = f"{len(full)} of {total} layers have no free direction at the start: {listed(full)}"
        findings.append(Finding(level, "", message, cure))
    if small := [f"{name} ({free})" for name, free in subject.free.items() if 0 < free < rank]:
        message = f"{len(small)} of {total} layers have fewer free directions than the rank {rank}: {listed(small)}"
        findings.append(Finding("warning", "", message, cure))
    return findings


def _side(config: Any) -> int | None:
    size = getattr(getattr(config, "vision_config", None), "image_size", None)
    if isinstance(size, list | tuple):
        size = max(size)
    return int(size) if size else None
