"""`plan.json`: what all runs of a comparison's folder have in common; and whose folder it is."""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from keeplora.runs.config import absolute
from keeplora.runs.disk import write_atomically
from keeplora.runs.manifest import differences
from keeplora.studies.compare.config import CompareConfig

FORMAT = 1

VERSIONS_OF = ("keeplora", "torch", "transformers", "peft")

OURS = {"plan.json", "search", "runs", "compare.json"}

LEFT_BY_A_START = {"lock", "plan.json.part"}

MOST_DIFFERENCES = 3


def require_free(folder: Path) -> None:
    """Refuse a folder that holds something, but nothing of a comparison.

    Raises:
        ValueError: If it does.
    """
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if found - LEFT_BY_A_START and not found & OURS:
        raise ValueError(f"{folder} holds other files than those of a comparison; give another --output")


def claim(config: CompareConfig) -> None:
    """Write the comparison's `plan.json`, or compare with the one that is there.

    Methods, seeds, orders, jobs and the reference are no part of it: a later command may change them.

    Raises:
        ValueError: If the folder holds a comparison with another benchmark, model, `quick` or budget.
    """
    path = config.output / "plan.json"
    plan = _plan(config)
    if not path.exists():
        content = {"format": FORMAT, "versions": {name: version(name) for name in VERSIONS_OF}, **plan}
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
        return
    try:
        found = json.loads(path.read_text())
        newer, before = found["format"] > FORMAT, {key: found[key] for key in plan}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or not of keeplora: {error}") from None
    if newer:
        raise ValueError(f"{path} has format {found['format']}, newer than {FORMAT}; update keeplora")
    if different := differences(before, plan):
        more = len(different) - MOST_DIFFERENCES
        shown = different[:MOST_DIFFERENCES] + ([f"and {more} more"] if more > 0 else [])
        raise ValueError(f"{config.output} holds another comparison ({'; '.join(shown)}); give another --output")


def _plan(config: CompareConfig) -> dict[str, Any]:
    plan = {
        "benchmark": absolute(config.benchmark),
        "model": config.model,
        "quick": config.quick,
        "budget": asdict(config.budget),
    }
    return dict(json.loads(json.dumps(plan)))
