"""Print the tables of a comparison as Markdown, for docs/evidence.md: `python tools/compare_to_markdown.py DIR`."""

import argparse
import json
from pathlib import Path
from typing import Any

COSTS = {"trained_parameters": ",.0f", "added_parameters": ",.0f", "seconds_per_task": ".1f", "peak_memory_mb": ",.0f"}
SCORES = {"transfer": "Transfer", "average": "Average", "last": "Last", "forgetting": "Forgetting"}


def main() -> None:
    """Read compare.json of the folder and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="output folder of keeplora compare")
    parser.add_argument("--no-search", action="store_true", help="leave the table of the search out")
    arguments = parser.parse_args()
    found = json.loads((arguments.folder / "compare.json").read_text())
    if not arguments.no_search:
        print(search_table(found), end="\n\n")
    print(score_table(found), end="\n\n")
    print(difference_table(found), end="\n\n")
    print(cost_table(found))


def search_table(found: dict[str, Any]) -> str:
    """Return what was tried on the validation splits: one row a method, the value of every setting, the best bold."""
    lines = ["| method | settings: mean of Transfer, Average and Last |", "|---|---|"]
    methods = list(dict.fromkeys(trial["method"] for trial in found["search"]))
    for method in methods:
        cells = []
        for trial in found["search"]:
            if trial["method"] == method:
                value = "failed" if trial["value"] is None else f"{trial['value']:.1f}"
                text = ", ".join(f"{key} {_setting(setting)}" for key, setting in trial["settings"].items())
                text = f"{text}: {value}".replace("learning_rate", "lr")
                takers = [name for name in found["chosen"] if found["inherits"].get(name, name) == method]
                is_chosen = any(found["chosen"][name] == trial["settings"] for name in takers)
                cells.append(f"**{text}**" if is_chosen else text)
        lines.append(f"| {method} | {'; '.join(cells)} |")
    return "\n".join(lines)


def score_table(found: dict[str, Any]) -> str:
    """Return the mean and the 95 % interval of every score, and how many runs finished."""
    asked = found["config"]["seeds"] * found["config"]["orders"]
    lines = _grid(found["table"], lambda value: f"{value['mean']:.2f}").splitlines()
    finished = [sum(run["method"] == method for run in found["runs"]) for method in found["table"]]
    last = [" runs |", "---|", *(f" {count}/{asked} |" for count in finished)]
    return "\n".join(line + cell for line, cell in zip(lines, last, strict=True))


def difference_table(found: dict[str, Any]) -> str:
    """Return the paired differences to the reference; bold where the interval excludes 0."""
    return _grid(found["differences"], lambda value: f"{value['mean']:+.2f}", mark=True)


def cost_table(found: dict[str, Any]) -> str:
    """Return the mean and the 95 % interval of every cost, and how many settings were tried for the method."""
    lines = [
        "| method | settings tried | parameters trained a task | added at inference | seconds a task | MiB |",
        "|---|---|---|---|---|---|",
    ]
    for method, row in found["table"].items():
        cells = [_cost(row[key], spec) for key, spec in COSTS.items()]
        lines.append(f"| {method} | {found['trials'][method]} | {' | '.join(cells)} |")
    config = found["config"]
    return "\n".join([*lines, "", f"Seconds: runs at a time {config['jobs']}, threads of each {config['threads']}."])


def _cost(value: dict[str, Any], spec: str) -> str:
    """Return a mean and its interval, which parameters mostly do without."""
    mean, width = format(value["mean"], spec), value["half_width"]
    return f"{mean} ± {format(width, spec)}" if width else mean


def _setting(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _grid(table: dict[str, Any], mean: Any, *, mark: bool = False) -> str:
    lines = [f"| method | {' | '.join(SCORES.values())} |", "|---" * 5 + "|"]
    for method, row in table.items():
        cells = []
        for key in SCORES:
            value = row[key]
            if value is None:
                cells.append("-")
                continue
            width = value["half_width"]
            text = mean(value) if width is None else f"{mean(value)} ± {width:.2f}"
            cells.append(f"**{text}**" if mark and width is not None and abs(value["mean"]) > width else text)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
