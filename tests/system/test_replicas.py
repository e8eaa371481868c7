"""The benchmarks of conversations that come with the package, end to end on replicas of their published layout."""

import gzip
import json
import re
import shutil
from types import SimpleNamespace

import pytest

import chatty
from keeplora.cli import main as cli
from keeplora.data.benchmark import read_benchmark, stream_of
from keeplora.evaluation.accuracy_matrix import Results
from keeplora.evaluation.metrics import METRICS
from keeplora.models.registry import family_of
from keeplora.progress import silent
from keeplora.runs.open import reopen

FAST = ["--rank", "2", "--alpha", "4", "--batch-size", "2", "--accumulation", "1", "--learning-rate", "0.02",
        "--gradient-share", "1", "--weight-energy", "0.3", "--feature-energy", "0.7"]  # fmt: skip


def mllm_dcl(folder):
    """Write each domain with train.json, test.json and images/, image names relative to the domain."""
    for seed, task in enumerate(("RS", "Med", "AD", "Sci", "Fin")):
        place = chatty.write_llava(folder / "Domain_data" / task, seed=seed, count=4)
        if task == "Sci":
            rows = json.loads((place / "test.json").read_text())
            for row, name in zip(rows, ("AI2D", "TQA", "map", "map"), strict=True):
                new = f"images/{name}_{row['question_id']}.png"
                (place / row["image"]).rename(place / new)
                row["image"] = new
            rows[3] |= {"text": "Which states border it?", "answer": "Iowa,Utah"}
            (place / "test.json").write_text(json.dumps(rows))
        if task == "Fin":
            rows = json.loads((place / "test.json").read_text())
            rows[0] |= {"answer": "Yes"}
            (place / "test.json").write_text(json.dumps(rows))
    return folder


def ucit(folder):
    """Write each task with its own file names, image names relative to the folder of all tasks."""
    for seed, spec in enumerate(read_benchmark("ucit", folder).tasks):
        place = chatty.write_llava(folder / spec.path.name, seed=seed, count=3)
        for split, name in spec.files.items():
            rows = json.loads((place / f"{split}.json").read_text())
            for row in rows:
                row["image"] = f"{spec.path.name}/{row['image']}"
            (place / f"{split}.json").unlink()
            (place / name).write_text(json.dumps(rows))
    return folder


def coin(folder):
    """Write instructions in a folder of each task, image names relative to the folder of all data."""
    for seed, spec in enumerate(read_benchmark("coin", folder).tasks):
        place = chatty.write_llava(spec.path, seed=seed, count=3)
        for split, name in spec.files.items():
            rows = json.loads((place / f"{split}.json").read_text())
            for row in rows:
                row["image"] = f"Instructions_Original/{spec.path.name}/{row['image']}"
            if spec.name == "ScienceQA" and split == "train":
                del rows[0]["image"]  # Some have none there.
                rows[0]["conversations"][0]["value"] = "Which is a metal? A. tin B. wood"
            (place / f"{split}.json").unlink()
            (place / name).write_text(json.dumps(rows))
    return folder


def texts(name):
    """Return what writes the files of a benchmark of texts: each column that its questions are made of, and answers."""

    def write(folder):
        for spec in read_benchmark(name, folder).tasks:
            spec.path.mkdir(parents=True)
            for split, file in spec.files.items():
                columns = re.findall(r"{(\w+)}", spec.question_template) or [spec.question_column]
                rows = [
                    {**dict.fromkeys(columns, f"{split} {color}"), spec.answer_column: color} for color in chatty.COLORS
                ]
                (spec.path / file).write_text(json.dumps(rows))
        return folder

    return write


REPLICAS = {"mllm_dcl": mllm_dcl, "ucit": ucit, "coin": coin} | {
    name: texts(name) for name in ("standard_cl", "long_cl", "trace")
}
OF_TEXTS = ("standard_cl", "long_cl", "trace")


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLICAS)
def test_a_benchmark_runs_on_a_replica_of_its_layout(tmp_path, name, capsys):
    data = REPLICAS[name](tmp_path / "data")
    model = (chatty.save_text_model if name in OF_TEXTS else chatty.save_llava)(tmp_path / "model")
    flags = ["--benchmark", name, "--data", str(data), "--model", str(model), *FAST, "--output", str(tmp_path / "run")]
    cli.main(["run", *flags])
    cli.main(["certify", str(tmp_path / "run")])
    assert "no breach was found" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    matrix, number = found["accuracy"], len(found["tasks"])
    assert found["tasks"] == [task.name for task in read_benchmark(name).tasks]
    assert found["MFT"] == pytest.approx(sum(matrix[i][i] for i in range(number)) / number)
    assert found["MFN"] == found["last"] == pytest.approx(sum(matrix[-1]) / number)
    assert found["MAA"] == pytest.approx(sum(sum(row[: t + 1]) / (t + 1) for t, row in enumerate(matrix)) / number)
    lost = [matrix[-1][i] - matrix[i][i] for i in range(number - 1)]
    assert found["BWT"] == found["backward_transfer"] == pytest.approx(sum(lost) / (number - 1))
    assert {"transfer", "average", "forgetting"} <= set(found)

    places = {}
    _, _, tasks = reopen(tmp_path / "run")
    for task in tasks:
        places |= {(task.name, record.identity): record.place for record in task.test.records}
    for index, row in enumerate(matrix):
        folder = tmp_path / "run" / "tasks" / f"{index + 1:02d}-{found['tasks'][index]}"
        lines = gzip.decompress((folder / "predictions.jsonl.gz").read_bytes()).decode().splitlines()
        told = [json.loads(line) for line in lines]
        for task, score in zip(tasks, row, strict=True):
            own = [one for one in told if one["task"] == task.name]
            references = [SimpleNamespace(**one, place=places[task.name, one["id"]]) for one in own]
            assert METRICS[task.metric]([one["prediction"] for one in own], references) == pytest.approx(score)
    shutil.move(data, tmp_path / "elsewhere")
    cli.main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "elsewhere")])
    shown = capsys.readouterr().out
    assert all(f"{score:.1f}" in shown for score in matrix[-1])


def test_the_suffix_of_a_yes_or_no_question_is_another(tmp_path):
    spec = next(task for task in read_benchmark("mllm_dcl", mllm_dcl(tmp_path)).tasks if task.name == "Fin")
    model = chatty.save_llava(tmp_path / "model")
    (task,) = family_of(str(model)).tasks(str(model), (spec,), batch_size=4, evaluation="test", seed=0, track=silent)
    (batch,) = task.test_batches()
    texts = task.chat.tokenizer.batch_decode(batch["inputs"]["input_ids"])
    assert texts[0].endswith("What colour is it? Only answer with yes or no directly. ASSISTANT:")
    assert texts[1].endswith("Answer with the given letter directly, e.g., A, B, C, D. ASSISTANT:")


@pytest.mark.parametrize(
    ("name", "firsts"),
    [("standard_cl", ["dbpedia", "dbpedia", "yahoo"]), ("long_cl", ["mnli", "multirc", "yelp"])],
)
def test_streams_of_texts_have_the_orders_of_the_papers_first(name, firsts, tmp_path):
    benchmark = read_benchmark(name)
    streams = [[spec.name for spec in stream_of(name, data=tmp_path, order=order)] for order in range(4)]
    assert [stream[0] for stream in streams[:3]] == firsts
    assert streams[1:3] == list(benchmark.orders)
    assert all(sorted(stream) == sorted(streams[0]) for stream in streams)
    assert streams[3] not in streams[:1]


@pytest.mark.parametrize("name", REPLICAS)
def test_without_their_data_benchmarks_say_where_these_are(name, capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["run", "--benchmark", name, "--output", str(tmp_path / "run")])
    text = " ".join(capsys.readouterr().err.split())
    assert f"benchmark '{name}' comes without its data; give their folder with --data: the " in text


def test_the_names_of_mllm_cl_on_a_published_row():
    rows = [[80.0, 1.0], [70.0, 60.0]]
    results = Results("m", "b", "m", 0, ["a", "b"], [0.0, 0.0], rows)
    assert results.summary_of_mllm_cl() == {"MFT": 70.0, "MFN": 65.0, "MAA": (80 + 65) / 2, "BWT": -10.0}
