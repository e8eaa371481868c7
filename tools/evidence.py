"""Compare LoRA-FT and KeepLoRA on `mini`: a search on validation splits, then several seeds on test splits.

Both methods get the same data, epochs, rank, and grid of learning rates; KeepLoRA's `feature_energy` is searched too.
For LoRA-FT the setting with the best mean of Transfer, Average and Last is chosen; for KeepLoRA the one whose smallest
lead over that, among the three, is largest. Only then are the test splits looked at. Prints the tables of
docs/evidence.md as Markdown. Finished runs are not run again.

    python tools/evidence.py --output runs/evidence
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PLAIN, OURS = "lora_ft", "keeplora"
RATES = ("1e-3", "3e-3", "1e-2", "3e-2")
SEARCH = [
    *((PLAIN, rate, "") for rate in RATES),
    *((OURS, rate, "0.99") for rate in RATES),
    *((OURS, rate, energy) for energy in ("0.95", "0.9") for rate in ("1e-2", "3e-2")),
]
SEEDS = (0, 1, 2)
METRICS = ("transfer", "average", "last")
Setting = tuple[str, str, str]
"""Method, learning rate, feature energy."""
Run = tuple[Setting, int, str]
"""Setting, seed, split to evaluate on."""


def main() -> None:
    """Search, then compare, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the run directories")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    arguments = parser.parse_args()
    searched = measure([(setting, 0, "validation") for setting in SEARCH], arguments)
    found = {setting: result for (setting, _, _), result in searched.items()}
    chosen = choose(found)
    print(search_table(found, chosen))
    print(comparison_table(measure([(setting, seed, "test") for seed in SEEDS for setting in chosen], arguments)))


def choose(found: dict[Setting, dict]) -> tuple[Setting, Setting]:
    """Return the settings to compare; a run that diverged has no result and is never chosen."""
    plain = max((s for s in found if s[0] == PLAIN and found[s]), key=lambda s: statistics.mean(metrics_of(found[s])))

    def smallest_lead(setting: Setting) -> float:
        return min(
            ours - theirs for ours, theirs in zip(metrics_of(found[setting]), metrics_of(found[plain]), strict=True)
        )

    return plain, max((s for s in found if s[0] == OURS and found[s]), key=smallest_lead)


def metrics_of(result: dict) -> list[float]:
    """Return Transfer, Average and Last."""
    return [result[key] for key in METRICS]


def measure(runs: list[Run], arguments: argparse.Namespace) -> dict[Run, dict]:
    """Make the runs that are not there yet and return the metrics of all."""
    with ThreadPoolExecutor(arguments.jobs) as pool:
        return dict(zip(runs, pool.map(lambda run: make(run, arguments), runs), strict=True))


def make(run: Run, arguments: argparse.Namespace) -> dict:
    """Make one run by the command line and read its metrics."""
    (method, rate, energy), seed, split = run
    flags = ["--feature-energy", energy] if energy else []
    name = "-".join([split, method, f"lr{rate}", *([f"f{energy}"] if energy else []), f"seed{seed}"])
    folder = arguments.output / name
    command = ["keeplora", "run", "--benchmark", "mini", "--method", method, "--seed", str(seed), "--epochs", "4"]
    command += ["--learning-rate", rate, *flags, "--evaluation", split, "--output", str(folder)]
    print("+", *command, file=sys.stderr, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if arguments.jobs > 1 else None
    program = [sys.executable, "-m", *command]
    finished = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        print(f"{' '.join(command)} failed: {finished.stderr.strip()[-500:]}", file=sys.stderr)
        return {}
    return json.loads((folder / "metrics.json").read_text())


def search_table(found: dict[Setting, dict], chosen: tuple[Setting, Setting]) -> str:
    """Return the search as Markdown."""
    lines = [
        "",
        "| method | learning rate | feature_energy | Transfer | Average | Last | |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting, result in found.items():
        cells = " | ".join(f"{value:.1f}" for value in metrics_of(result)) if result else "diverged | |"
        lines.append(f"| {' | '.join(setting)} | {cells} | {'chosen' if setting in chosen else ''} |")
    return "\n".join(lines)


def comparison_table(found: dict[Run, dict]) -> str:
    """Return mean and standard deviation over seeds, and the paired difference, as Markdown."""
    zero = next(iter(found.values()))["zero_shot"]
    reference = [statistics.mean(zero[1:]), statistics.mean(zero), statistics.mean(zero)]
    lines = ["", "| method | Transfer | Average | Last |", "|---|---|---|---|"]
    lines.append("| zero-shot | " + " | ".join(f"{value:.2f}" for value in reference) + " |")
    by_method = {
        method: [result for (setting, _, _), result in found.items() if setting[0] == method]
        for method in (PLAIN, OURS)
    }
    for method, results in by_method.items():
        lines.append(f"| {method} | " + " | ".join(spread([r[key] for r in results]) for key in METRICS) + " |")
    pairs = list(zip(by_method[PLAIN], by_method[OURS], strict=True))
    cells = " | ".join(spread([ours[key] - plain[key] for plain, ours in pairs]) for key in METRICS)
    lines.append(f"| {OURS} less {PLAIN}, by seed | {cells} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return mean and standard deviation."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    main()
