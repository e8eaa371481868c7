"""Do the prompts of all classes fit the model, and can its tokenizer tell them apart?"""

from collections.abc import Iterator
from typing import Any

from transformers import AutoTokenizer

from keeplora.errors import counted, listed
from keeplora.studies.doctor.data import TaskData
from keeplora.studies.doctor.findings import Finding
from keeplora.studies.doctor.model import Subject


def prompt_findings(subject: Subject, tasks: list[TaskData]) -> Iterator[Finding]:
    """Tokenise the prompts of every task whose classes are known, and name those that a run would refuse."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(subject.source)
    except (OSError, ValueError) as error:
        yield Finding("problem", "", f"the model's tokenizer cannot be loaded: {error}", "get the model anew")
        return
    text_config = getattr(getattr(subject.model, "config", None), "text_config", None)
    context = getattr(text_config, "max_position_embeddings", None)
    limit = min(tokenizer.model_max_length, context or tokenizer.model_max_length)
    for data in tasks:
        if data.class_names:
            yield from _of_task(tokenizer, limit, data)


def _of_task(tokenizer: Any, limit: int, data: TaskData) -> Iterator[Finding]:
    prompts = [data.spec.template.replace("{}", name) for name in data.class_names]
    encoded = [tuple(ids) for ids in tokenizer(prompts)["input_ids"]]
    if long := [f"{p!r} ({len(ids)} tokens)" for p, ids in zip(prompts, encoded, strict=True) if len(ids) > limit]:
        message = f"{counted(len(long), 'prompt')} longer than the model's context of {limit} tokens: {listed(long)}"
        yield Finding("problem", data.name, message, "shorten the template or the class names")
    groups: dict[tuple[int, ...], list[str]] = {}
    for ids, name in zip(encoded, data.class_names, strict=True):
        groups.setdefault(ids[:limit], []).append(name)
    if same := [" = ".join(repr(name) for name in names) for names in groups.values() if len(set(names)) > 1]:
        message = f"the tokenizer cannot tell class names apart: {listed(same)}"
        yield Finding("problem", data.name, message, "give them other names with class_names")
