"""Build the embedded data and model: `python tools/build_mini.py --work DIR [--minutes 70] [stage ...]`.

Stages, in order: fetch, tasks, draw, leakage, pack, train, export, notice, measure. Without a stage all of them run.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from mini import (
    captions,
    classes,
    collect,
    drawings,
    export,
    leakage,
    notice,
    pack,
    pretrain,
    schedule,
    sources,
    task_drawings,
    tasks,
)

PACKAGE = Path(__file__).parents[1] / "src/keeplora/data/mini"


def fetch(work: Path, _: argparse.Namespace) -> None:
    """Download and unpack every source."""
    sources.fetch_all(work)


def make_tasks(work: Path, _: argparse.Namespace) -> None:
    """Write the task archives."""
    print(tasks.build(work / "unpacked", PACKAGE / "data"))


def draw(work: Path, _: argparse.Namespace) -> None:
    """Collect the pre-training drawings."""
    print(collect.collect(work / "unpacked", work / "drawings"))


def find_leaks(work: Path, _: argparse.Namespace) -> None:
    """Mark pre-training drawings that look like a validation or test drawing; write leaks.npz and leaks.json."""
    order = sorted(path.stem for path in (work / "drawings").glob("*.json"))
    loaded = [drawings.load(work / "drawings", source) for source in order]
    parts = [leakage.signatures(drawn.images) for drawn in loaded]
    known = np.concatenate([hashes for hashes, _ in parts]), np.concatenate([small for _, small in parts])
    owner = [drawn.source for drawn in loaded for _ in drawn.names]
    matches = {}
    for task in classes.TEMPLATES:
        held_out = leakage.held_out_images(task_drawings.splits_of(task, work / "unpacked"))
        matches[task] = leakage.near_duplicates(known, leakage.signatures(held_out))
    np.savez(work / "leaks.npz", removed=np.any(list(matches.values()), axis=0))
    counts = {task: int(alike.sum()) for task, alike in matches.items()}
    (work / "leaks.json").write_text(json.dumps({"of": len(owner), "removed": counts}, indent=2) + "\n")
    print(len(owner), "drawings;", counts)


def make_bank(work: Path, _: argparse.Namespace) -> None:
    """Choose captions and weights, and pack drawings and captions for training."""
    code_of, names_of = collect.emoji_names(work / "unpacked")
    order = sorted(path.stem for path in (work / "drawings").glob("*.json"))
    owner, found = captions.source_rows(work / "drawings", order)
    removed = np.load(work / "leaks.npz")["removed"]
    bank = captions.build(owner, found, removed, captions.class_names(names_of, code_of))
    (work / "train").mkdir(exist_ok=True)
    size = pack.pack(bank, owner, work / "train", work / "drawings")
    print(f"{len(bank.rows)} drawings, {len(bank.concepts)} concepts, vocabulary {size}")


def train(work: Path, options: argparse.Namespace) -> None:
    """Pre-train for the given minutes."""
    size = len(json.loads((work / "train/tokenizer.json").read_text())["model"]["vocab"])
    plan = schedule.Schedule(minutes=options.minutes)
    pretrain.run(work / "train", plan, size, processes=options.processes)


def write_model(work: Path, _: argparse.Namespace) -> None:
    """Write the averaged weights as a Hugging Face folder; any checkpoint of a run will do."""
    export.export(work / "train/checkpoint.safetensors", work / "train", PACKAGE / "model")


def write_notice(_: Path, __: argparse.Namespace) -> None:
    """Write the attributions."""
    (PACKAGE / "NOTICE").write_text(notice.text(sources.every()))


def measure(_: Path, options: argparse.Namespace) -> None:
    """Print zero-shot accuracy of the shipped model on a split."""
    print(export.table(export.zero_shot(PACKAGE / "model", PACKAGE / "data", options.split, classes.TEMPLATES)))


STAGES = {
    "fetch": fetch,
    "tasks": make_tasks,
    "draw": draw,
    "leakage": find_leaks,
    "pack": make_bank,
    "train": train,
    "export": write_model,
    "notice": write_notice,
    "measure": measure,
}


def main() -> None:
    """Run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="*", choices=[*STAGES, []], help="stages to run (default: all)")
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads and intermediate files (5 GB)")
    parser.add_argument("--minutes", type=float, default=70.0, help="length of pre-training")
    parser.add_argument("--processes", type=int, default=2, help="training processes of one thread each")
    parser.add_argument("--split", choices=["train", "validation", "test"], default="test", help="what `measure` reads")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.stage or STAGES:
        start = time.time()
        print(f"== {name}", flush=True)
        STAGES[name](options.work.resolve(), options)
        print(f"   {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
