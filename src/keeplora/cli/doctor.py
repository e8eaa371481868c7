"""The subcommand that examines a run before it is started. A typed function, as in `cli`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from keeplora.cli.doctor_tables import diagnosis_page
from keeplora.cli.progress import Display
from keeplora.config import Config, read_toml
from keeplora.runs.config import RunConfig, run_defaults
from keeplora.studies.doctor.diagnose import diagnose

console = Console()


@dataclass(frozen=True, kw_only=True)
class DoctorFlags(Config):
    """Which run to examine; what is not given is what `keeplora run` would take."""

    benchmark: str | None = None
    """Name of a benchmark, or path of its TOML file."""
    model: str | None = None
    """The embedded model, a hub name, or a folder."""
    method: str | None = None
    """Name of the method, or of a variant of one."""
    config: Path | None = None
    """TOML file with the settings of the run; flags go before it."""
    seed: int | None = None
    """Seed of every random draw."""
    batch_size: int | None = None
    """Images in a batch."""
    evaluation: Literal["test", "validation"] | None = None
    """The split to evaluate on."""
    output: Path | None = None
    """The run directory: it is not touched, only its place is looked at."""
    duplicates: bool = True
    """Decode every image and look for the same or alike ones in two splits; without it only headers are read."""
    strict: bool = False
    """Let warnings count as problems in the exit code."""


def doctor(flags: tyro.conf.OmitArgPrefixes[DoctorFlags]) -> None:
    """Examine data, model, time, memory and disk of a run before hours are spent on it; names all that is wrong.

    Example: keeplora doctor --benchmark birds.toml --model openai/clip-vit-base-patch16 --method keeplora

    Ends with exit code 0 if a run can start, 1 if something would stop or spoil it.

    Args:
        flags: The run, and how to look at it.
    """
    display = Display(console)
    with display.shown():
        found = diagnose(_run_of(flags), duplicates=flags.duplicates, track=display.track)
    console.print(diagnosis_page(found))
    if code := found.exit_code(strict=flags.strict):
        sys.exit(code)


def _run_of(flags: DoctorFlags) -> RunConfig:
    """Return the run that the flags, before the file, before the benchmark's defaults, describe."""
    values: dict[str, Any] = read_toml(flags.config) if flags.config else {}
    for key in ("benchmark", "method", "model", "seed", "evaluation", "output"):
        if (given := getattr(flags, key)) is not None:
            values[key] = given
    if flags.batch_size is not None and isinstance(values.get("train", {}), dict):
        values["train"] = {**values.get("train", {}), "batch_size": flags.batch_size}
    benchmark, method = (values.pop(key, getattr(RunConfig, key)) for key in ("benchmark", "method"))
    if wrong := [name for name in (benchmark, method) if not isinstance(name, str)]:
        raise ValueError(f"{flags.config}: {wrong[0]!r} must be a name")
    return run_defaults(benchmark, method, values, str(flags.config or "the flags"))
