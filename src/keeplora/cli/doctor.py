"""The command that examines a run before it is started. A typed function."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from keeplora.cli.doctor_tables import diagnosis_page
from keeplora.cli.flags import flag, run_flags, sourced
from keeplora.cli.progress import Display
from keeplora.runs.config import resolve
from keeplora.studies.doctor.diagnose import diagnose

console = Console()


def doctor(settings: Any, train: Any, method: Any, *, duplicates: bool = True, strict: bool = False) -> None:
    """Examine data, model, time, memory and disk of a run before hours are spent on it.

    Example: keeplora doctor --benchmark birds.toml --model openai/clip-vit-base-patch16 --method keeplora

    Takes the flags of keeplora run. Ends with exit code 0 if a run can start, 1 if something would stop or spoil it.

    Args:
        settings: What to learn; the run directory is not touched, only its place is looked at.
        train: How each task is optimised.
        method: The method's own options.
        duplicates: Decode every image and look for the same or alike ones in two splits; without it only headers are
            read.
        strict: Let warnings count as problems in the exit code.
    """
    config = resolve(*sourced(settings, train, method))
    with Display(console) as display:
        found = diagnose(config, duplicates=duplicates, track=display.track)
    console.print(diagnosis_page(found))
    if code := found.exit_code(strict=strict):
        sys.exit(code)


doctor.__annotations__ |= run_flags(config=flag(Path, "TOML file with the settings of the run."))
