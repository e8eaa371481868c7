"""Compare LoRA-FT and KeepLoRA on `mini`: learning-rate search on validation splits, then several seeds on test splits.

Both methods get the same data, epochs, rank, and grid of learning rates. The rate with the best mean of Transfer,
Average and Last on the validation splits is chosen for each, and only then are the test splits looked at. Prints the
tables of docs/evidence.md as Markdown. Finished runs are not run again.

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

METHODS = ("lora_ft", "keeplora")
RATES = ("3e-3", "1e-2", "3e-2")
SEEDS = (0, 1, 2)
METRICS = ("transfer", "average", "last")
Run = tuple[str, str, int, str]
"""Method, learning rate, seed, split to evaluate on."""


def main() -> None:
    """Search, then compare, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the run directories")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--epochs", default="4")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="further flags of keeplora run")
    arguments = parser.parse_args()
    search = [(method, rate, 0, "validation") for rate in RATES for method in METHODS]
    found = measure(search, arguments)
    chosen = {method: best_rate(method, found) for method in METHODS}
    print(search_table(found, chosen))
    compared = [(method, chosen[method], seed, "test") for seed in SEEDS for method in METHODS]
    print(comparison_table(measure(compared, arguments)))


def measure(runs: list[Run], arguments: argparse.Namespace) -> dict[Run, dict]:
    """Make the runs that are not there yet and return the metrics of all."""
    with ThreadPoolExecutor(arguments.jobs) as pool:
        return dict(zip(runs, pool.map(lambda run: make(run, arguments), runs), strict=True))


def make(run: Run, arguments: argparse.Namespace) -> dict:
    """Make one run by the command line and read its metrics."""
    method, rate, seed, split = run
    folder = arguments.output / f"{split}-{method}-lr{rate}-seed{seed}"
    command = ["keeplora", "run", "--benchmark", "mini", "--method", method, "--seed", str(seed), "--output", str(folder),
               "--learning-rate", rate, "--epochs", arguments.epochs, "--evaluation", split, *arguments.extra]  # fmt: skip
    print("+", *command, file=sys.stderr, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if arguments.jobs > 1 else None
    program = [sys.executable, "-m", "keeplora", *command[1:]]
    finished = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        print(f"{' '.join(command)} failed: {finished.stderr.strip()[-500:]}", file=sys.stderr)
        return {}
    return json.loads((folder / "metrics.json").read_text())


def best_rate(method: str, found: dict[Run, dict]) -> str:
    """Return the learning rate with the best mean of the three metrics; a diverged run has none."""
    scores = {run[1]: validation_score(result) for run, result in found.items() if run[0] == method and result}
    return max(scores, key=scores.__getitem__)


def validation_score(result: dict) -> float:
    """Return the mean of Transfer, Average and Last."""
    return statistics.mean(result[key] for key in METRICS)


def search_table(found: dict[Run, dict], chosen: dict[str, str]) -> str:
    """Return the search as Markdown."""
    lines = ["", "| method | learning rate | Transfer | Average | Last | chosen |", "|---|---|---|---|---|---|"]
    for (method, rate, _, _), result in found.items():
        cells = " | ".join(f"{result[key]:.1f}" for key in METRICS) if result else "diverged | |"
        lines.append(f"| {method} | {rate} | {cells} | {'yes' if chosen[method] == rate else ''} |")
    return "\n".join(lines)


def comparison_table(found: dict[Run, dict]) -> str:
    """Return mean and standard deviation over seeds, and the paired difference, as Markdown."""
    first = next(iter(found.values()))
    zero = first["zero_shot"]
    lines = ["", "| method | Transfer | Average | Last |", "|---|---|---|---|"]
    reference = [statistics.mean(zero[1:]), statistics.mean(zero), statistics.mean(zero)]
    lines.append("| zero-shot | " + " | ".join(f"{value:.2f}" for value in reference) + " |")
    by_method = {method: [result for run, result in found.items() if run[0] == method] for method in METHODS}
    for method, results in by_method.items():
        lines.append(f"| {method} | " + " | ".join(spread([r[key] for r in results]) for key in METRICS) + " |")
    pairs = list(zip(*by_method.values(), strict=True))
    cells = " | ".join(spread([ours[key] - plain[key] for plain, ours in pairs]) for key in METRICS)
    lines.append(f"| {METHODS[1]} less {METHODS[0]}, by seed | {cells} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return mean and standard deviation."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    main()
