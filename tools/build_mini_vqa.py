"""Build the embedded generative model and its tasks: `python tools/build_mini_vqa.py --work DIR [stage ...]`.

Stages, in order: begin, pretrain, measure, tasks, model. Pre-training is the long one: it keeps its state in DIR, stops
after --minutes, and goes on where it was when it is started again. Two processes of one thread are faster than one of
two: `torchrun --nproc-per-node 2 tools/build_mini_vqa.py --work DIR pretrain`.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoProcessor

from mini_vqa import lookup, measure, model, pack, pretrain


def begin(work: Path, flags: argparse.Namespace) -> None:
    """Learn the tokens and make a model that has learned nothing but to look words up."""
    processor = model.new_processor()
    processor.save_pretrained(work / "untrained")
    made = model.new_model(len(processor.tokenizer))
    lookup.teach(made, processor.tokenizer, steps=flags.look_up_steps)
    made.save_pretrained(work / "untrained")
    print(sum(parameter.numel() for parameter in made.parameters()), "parameters")


def train(work: Path, flags: argparse.Namespace) -> None:
    """Pre-train on the general mix."""
    processor = AutoProcessor.from_pretrained(work / "untrained", backend="pil")
    finished = pretrain.pretrain(work, processor, steps=flags.steps, minutes=flags.minutes)
    print("finished" if finished else "to be taken up again")


def examine(work: Path, flags: argparse.Namespace) -> None:
    """Examine what was learned so far."""
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(work / "untrained", backend="pil")
    state = pretrain.State.load(work)
    print(json.dumps({"step": state.step} | measure.report(state.averaged(), processor, flags.questions), indent=1))


def pack_tasks(_: Path, __: argparse.Namespace) -> None:
    """Write the tasks into the package."""
    pack.write_tasks()


def pack_model(work: Path, _: argparse.Namespace) -> None:
    """Write the model into the package."""
    processor = AutoProcessor.from_pretrained(work / "untrained", backend="pil")
    pack.write_model(pretrain.State.load(work).averaged(), processor)


STAGES = {"begin": begin, "pretrain": train, "measure": examine, "tasks": pack_tasks, "model": pack_model}


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=list(STAGES), help="which stages; all of them if none is named")
    parser.add_argument("--work", type=Path, required=True, help="a folder for what is not shipped")
    parser.add_argument("--steps", type=int, default=4600, help="steps of the whole pre-training")
    parser.add_argument("--look-up-steps", type=int, default=500, help="steps of the practice before it")
    parser.add_argument("--minutes", type=float, default=1e9, help="how long this stretch may take")
    parser.add_argument("--questions", type=int, default=1000, help="of the examination")
    flags = parser.parse_args()
    flags.work.mkdir(parents=True, exist_ok=True)
    for stage in flags.stages:
        STAGES[stage](flags.work, flags)


if __name__ == "__main__":
    main()
