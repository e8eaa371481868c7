"""Do the prompts of all classes fit the model, and can its tokenizer tell them apart?"""

from typing import Any

from transformers import AutoTokenizer

from keeplora.studies.doctor.data import TaskData
from keeplora.studies.doctor.findings import Finding, counted, listed


def prompt_findings(source: str, context: int | None, tasks: list[TaskData]) -> list[Finding]:
    """Tokenise the prompts of every task and name those that a run would refuse.

    Args:
        source: Folder or hub name of the model.
        context: How many tokens the model's text tower takes, if it says so; the tokenizer's own limit counts too.
        tasks: The tasks whose class names are known.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        return [Finding("problem", "", f"the model's tokenizer cannot be loaded: {error}", "get the model anew")]
    limit = min(tokenizer.model_max_length, context or tokenizer.model_max_length)
    findings = []
    for data in tasks:
        if data.class_names:
            findings += _of_task(tokenizer, limit, data)
    return findings


def _of_task(tokenizer: Any, limit: int, data: TaskData) -> list[Finding]:
    prompts = [data.spec.template.replace("{}", name) for name in data.class_names]
    encoded = [tuple(ids) for ids in tokenizer(prompts)["input_ids"]]
    findings = []
    if long := [f"{p!r} ({len(ids)} tokens)" for p, ids in zip(prompts, encoded, strict=True) if len(ids) > limit]:
        message = f"{counted(len(long), 'prompt')} longer than the model's context of {limit} tokens: {listed(long)}"
        findings.append(Finding("problem", data.name, message, "shorten the template or the class names"))
    groups: dict[tuple[int, ...], list[str]] = {}
    for ids, name in zip(encoded, data.class_names, strict=True):
        groups.setdefault(ids[:limit], []).append(name)
    if same := [" = ".join(repr(name) for name in names) for names in groups.values() if len(set(names)) > 1]:
        message = f"the tokenizer cannot tell class names apart: {listed(same)}"
        findings.append(Finding("problem", data.name, message, "give them other names with class_names"))
    return findings
