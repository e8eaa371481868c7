"""What a generative model answered is kept from the start, and some of it is shown with its questions."""

import gzip
import json
import re
from types import SimpleNamespace

import pytest

import chatty
from keeplora.cli import main as cli
from keeplora.data.benchmark import read_benchmark
from keeplora.evaluation.metrics import METRICS
from keeplora.methods.base import MethodConfig
from keeplora.runs.answers import NUMBER, answered
from keeplora.runs.branch import undo
from keeplora.runs.config import RunConfig
from keeplora.runs.loop import run
from keeplora.runs.open import read_run
from keeplora.training.trainer import TrainConfig

pytestmark = pytest.mark.slow


def learned(place, **changes):
    config = RunConfig(
        benchmark=str(place / "chat.toml"), model=str(place / "model"), method="lora_ft", output=place / "run",
        options=MethodConfig(rank=2), train=TrainConfig(epochs=2, batch_size=4, learning_rate=0.02), **changes,
    )  # fmt: skip
    return run(config)


def told(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def score(lines, task):
    own = [one for one in lines if one["task"] == task]
    return METRICS["exact_match"]([one["prediction"] for one in own], [SimpleNamespace(**one, place="") for one in own])


@pytest.fixture(params=[True, False], ids=["images", "text"])
def with_images(request, tmp_path):
    chatty.write_stream(tmp_path, with_images=request.param)
    (chatty.save_llava if request.param else chatty.save_text_model)(tmp_path / "model")
    return request.param


def test_questions_are_shown_with_the_answers_of_the_untouched_model_and_of_the_last_one(tmp_path, with_images):
    results = learned(tmp_path)
    untouched, last = (
        told(tmp_path / "run" / name) for name in ("predictions.jsonl.gz", "tasks/02-task1/predictions.jsonl.gz")
    )
    assert [score(untouched, task) for task in results.tasks] == pytest.approx(results.zero_shot)
    assert [score(last, task) for task in results.tasks] == pytest.approx(results.accuracy[-1])

    shown = answered([read_run(tmp_path / "run")])
    assert [one.task for one in shown] == ["task0"] * NUMBER + ["task1"] * NUMBER
    for lines, column in ((untouched, "untouched"), (last, "lora_ft")):
        firsts = [one for task in results.tasks for one in [o for o in lines if o["task"] == task][:NUMBER]]
        assert [one.given[column] for one in shown] == [one["prediction"] for one in firsts]
        assert [one.expected for one in shown] == [one["answer"] for one in firsts]
        assert [one.question for one in shown] == [one["question"] for one in firsts]
    text = (tmp_path / "run" / "report.html").read_text()
    assert text.count("data:image/webp;base64,") == (2 * NUMBER if with_images else 0)
    assert "Questions and answers" in text


def test_a_run_without_a_task_of_another_keeps_its_questions(tmp_path):
    chatty.write_stream(tmp_path)
    chatty.save_llava(tmp_path / "model")
    learned(tmp_path)
    results = undo(tmp_path / "run", "task0", tmp_path / "undone")
    lines = told(tmp_path / "undone" / "tasks" / "01-task1" / "predictions.jsonl.gz")
    assert [score(lines, "task1")] == pytest.approx(results.accuracy[-1])
    shown = answered([read_run(tmp_path / "undone")])
    assert [one.task for one in shown] == ["task1"] * NUMBER
    assert all(set(one.given) == {"untouched", "lora_ft"} for one in shown)


@pytest.mark.parametrize("way", ["continue", "fork"])
def test_a_run_that_gets_more_tasks_shows_their_questions_too(tmp_path, way):
    chatty.write_stream(tmp_path)
    chatty.save_llava(tmp_path / "model")
    learned(tmp_path)
    text = (tmp_path / "chat.toml").read_text().replace("task0", "more").replace("data0", "more")
    chatty.write_llava(tmp_path / "more", seed=2)
    (tmp_path / "more.toml").write_text(text.split('[[tasks]]\nname = "task1"')[0])
    to = "run" if way == "continue" else "fork"
    where = ["--benchmark"] if way == "continue" else ["--output", str(tmp_path / to), "--more"]
    cli.main(["run", f"--{way}", str(tmp_path / "run"), *where, str(tmp_path / "more.toml")])
    shown = answered([read_run(tmp_path / to)])
    assert [one.task for one in shown] == ["task0"] * NUMBER + ["task1"] * NUMBER + ["more"] * NUMBER
    results = read_run(tmp_path / to).results()
    for place, row in (("", results.zero_shot), ("tasks/01-task0/", results.accuracy[0])):
        lines = told(tmp_path / to / f"{place}predictions.jsonl.gz")
        assert [score(lines, task) for task in results.tasks] == pytest.approx(row)


def test_a_probe_needs_no_training_split(tmp_path):
    path = chatty.write_stream(tmp_path, tasks=1)
    chatty.save_llava(tmp_path / "model")
    chatty.write_llava(tmp_path / "general", seed=3)
    (tmp_path / "general" / "train.json").unlink()
    keys = 'reader = "llava"\nmax_new_tokens = 4'
    path.write_text(path.read_text() + f'\n[[probes]]\nname = "general"\npath = "general"\n{keys}\n')
    results = learned(tmp_path)
    assert len(results.probes["general"]) == 2
    assert re.search("hub|is_probe", path.read_text()) is None
    path.write_text(path.read_text() + "is_probe = true\n")
    with pytest.raises(ValueError, match="have no key 'is_probe'"):
        read_benchmark(str(path))
