"""The command line: what it says when something is wrong, where settings come from, what it prints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets as hf_datasets
import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError

import chatty
import tiny
from keeplora.cli import learn, progress
from keeplora.cli import main as cli
from keeplora.data import benchmark
from keeplora.evaluation.accuracy_matrix import Results
from keeplora.methods.base import MethodConfig
from keeplora.methods.keeplora import KeepLoRAConfig
from keeplora.models import registry
from keeplora.runs.open import open_run

TRAINING = "[defaults.train]\nepochs = 1\nbatch_size = 6\n"
RANKS = "[defaults.keeplora]\nrank = 2\n[defaults.lora_ft]\nrank = 2\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model and a stream of one task, which also stand in for the embedded ones."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.save_dual_encoder(folder / "model")
    path = tiny.write_benchmark(folder, tasks=1, per_class=3)
    (folder / "mini.toml").write_text(path.read_text() + TRAINING + RANKS)
    return folder


@pytest.fixture(autouse=True)
def embedded(place, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "BENCHMARKS", place)
    monkeypatch.setitem(registry.EMBEDDED, "mini", place / "model")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def words_of(text):
    """Undo the boxes and line breaks of a terminal."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", re.sub(r"\x1b\[[0-9;]*m", "", text)).split())


def refused(capsys, *arguments):
    """Run a command that must fail, and return its one message."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert caught.value.code not in (0, None)
    message = words_of(shown.err + shown.out)
    assert "Traceback" not in message
    assert message.lower().count("error") <= 3
    return message


def benchmark_of(folder, path, **keys):
    """Write a benchmark of one task with the given keys."""
    lines = ["[[tasks]]", 'name = "broken"', f'path = "{path}"', *(f'{key} = "{value}"' for key, value in keys.items())]
    (folder / "broken.toml").write_text("\n".join(lines))
    return folder / "broken.toml"


def test_a_wrong_flag_is_named(capsys):
    assert "--lerning-rate" in refused(capsys, "run", "--lerning-rate", "1")


def test_a_wrong_command_lists_the_commands(capsys):
    message = refused(capsys, "trian")
    assert "trian" in message
    assert "run" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("sed = 3", "unknown key 'sed'; known keys: benchmark, model, method"),
        ("[train]\nepoch = 3", "unknown key 'train.epoch'; known keys: epochs"),
        ("[options]\nrang = 3", "unknown key 'rang'; known keys: rank"),
        ('[train]\nepochs = "many"', "train.epochs = 'many'"),
        ("[options]\nrank = 0", "rank = 0"),
        ("seed = = 3", "is not a TOML file"),
        ('method = "best"', "unknown method 'best'; known methods: zero_shot, "),
        ('benchmark = "none"', "unknown benchmark 'none'; known:"),
    ],
)
def test_a_mistake_in_the_settings_file_is_named_with_the_file(capsys, tmp_path, content, expected):
    path = tmp_path / "mine.toml"
    path.write_text(content)
    message = refused(capsys, "run", "--config", path)
    assert expected in message
    if "unknown method" not in expected and "unknown benchmark" not in expected:
        assert "mine.toml" in message


def test_a_missing_settings_file_is_named(capsys):
    assert "there is no file absent.toml" in refused(capsys, "run", "--config", "absent.toml")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--rank", "0"], "rank = 0"),
        (["--weight-energy", "1.5"], "weight_energy = 1.5"),
        (["--weight-energy", "vision", "1.5"], "weight_energy for 'vision' = 1.5"),
        (["--feature-energy", "1.5"], "feature_energy = 1.5"),
        (["--learning-rate", "-1"], "learning_rate = -1.0"),
        (["--epochs", "0"], "epochs = 0"),
        (["--epochs", "many"], "many"),
        (["--schedule", "linear"], "linear"),
        (["--method", "best"], "unknown method 'best'; known methods: zero_shot, "),
        (["--benchmark", "none"], "unknown benchmark 'none'; known: colors, mini"),
        (["--benchmark", "none.toml"], "there is no file none.toml"),
        (["--model", "no/where"], "model 'no/where' is neither an embedded model"),
        (["--targets", "nothing"], "no linear layer is named nothing; set targets to some of:"),
        (["--seed", "-3"], "seed = -3"),
    ],
)
def test_a_wrong_value_is_named(capsys, flags, expected):
    assert expected in refused(capsys, "run", *flags)


def test_a_missing_folder_is_named(capsys, tmp_path):
    message = refused(capsys, "run", "--benchmark", benchmark_of(tmp_path, "absent"))
    assert f"task 'broken': {tmp_path / 'absent'} is neither a folder nor a zip archive" in message


def test_a_corrupt_image_is_named(capsys, tmp_path):
    folder = tiny.write_images(tmp_path / "data", per_class=2)
    (folder / "test" / "red" / "1.png").write_bytes(b"garbage")
    message = refused(capsys, "run", "--benchmark", benchmark_of(tmp_path, "data"))
    assert "red/1.png is not a readable image" in message


def test_a_class_without_images_is_named(capsys, tmp_path):
    folder = tiny.write_images(tmp_path / "data", per_class=1)
    (folder / "train" / "red" / "0.png").unlink()
    message = refused(capsys, "run", "--benchmark", benchmark_of(tmp_path, "data"))
    assert "1 class has no image in train: red" in message


def test_a_label_out_of_range_is_named(capsys, tmp_path):
    image = {"bytes": (tiny.write_images(tmp_path / "d", per_class=1) / "train/red/0.png").read_bytes(), "path": None}
    features = hf_datasets.Features({"image": hf_datasets.Image(), "label": hf_datasets.ClassLabel(names=["a", "b"])})
    rows = hf_datasets.Dataset.from_dict({"image": [image] * 3, "label": [0, 1, -1]}, features=features)
    hf_datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "stored"))
    message = refused(capsys, "run", "--benchmark", benchmark_of(tmp_path, "stored", reader="dataset"))
    assert "train row 2 has label -1, out of range for 2 classes" in message


def test_an_output_with_other_things_is_refused(capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    assert "out is not empty and holds no run" in refused(capsys, "run", "--output", "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_an_output_that_cannot_be_made_is_named(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "file" in refused(capsys, "run", "--output", "file/run")
    assert "file is a file; give another --output" in refused(capsys, "run", "--output", "file")


def test_evaluating_what_is_no_run_is_refused(capsys, tmp_path):
    assert "absent holds no run" in refused(capsys, "evaluate", tmp_path / "absent")
    assert "holds no run" in refused(capsys, "evaluate", tmp_path)


def test_evaluating_a_run_that_has_not_begun_says_to_go_on_with_it(capsys, tmp_path):
    with open_run(tmp_path / "run", {"benchmark": "mini", "method": "keeplora"}, ["task0"]):
        pass
    assert "no task is finished" in refused(capsys, "evaluate", tmp_path / "run")


def test_an_interrupted_run_says_that_it_can_go_on(capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(learn, "run_stream", interrupted)
    assert "interrupted; a run keeps what it has finished" in refused(capsys, "run")


def test_names_in_brackets_are_no_markup(capsys):
    assert "[bold]x[/]" in refused(capsys, "run", "--method", "[bold]x[/]")


@pytest.fixture
def captured(monkeypatch):
    """Return the configurations that the command line asks to run, without running them."""
    configs = []

    def fake(config, **options):
        configs.append(config)
        return Results(
            method=config.method, benchmark="b", model="m", seed=0, tasks=["a"], zero_shot=[1.0], accuracy=[[2.0]]
        )

    monkeypatch.setattr(learn, "run_stream", fake)
    monkeypatch.setattr(learn, "show_run", lambda results, run: None)  # There is no run directory.
    return configs


def test_flags_go_before_the_file_and_the_file_before_the_benchmark(captured, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("seed = 5\n[train]\nbatch_size = 7\nwarmup = 0.5\n[options]\nalpha = 4.0\n")
    cli.main(["run", "--config", str(path), "--warmup", "0.25", "--output", "out"])
    (config,) = captured
    assert config.train.warmup == 0.25  # flag before file
    assert (config.train.batch_size, config.seed, config.options.alpha) == (7, 5, 4.0)  # file before benchmark
    assert (config.train.epochs, config.options.rank) == (1, 2)  # benchmark before library
    assert (config.train.learning_rate, config.options.feature_energy) == (1e-3, 0.99)  # the library's
    assert config.output == Path("out")


def test_the_file_may_name_benchmark_and_method_and_a_flag_overrules_it(captured, place, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(f'benchmark = "{place}/colors.toml"\nmethod = "lora_ft"\nmodel = "m"\noutput = "o"\n')
    cli.main(["run", "--config", str(path)])
    cli.main(["run", f"--config={path}", "--method=keeplora", "--benchmark", "mini"])
    first, second = captured
    assert (first.benchmark, first.method, first.model) == (f"{place}/colors.toml", "lora_ft", "m")
    assert type(first.options) is MethodConfig
    assert first.output == Path("o")
    assert (second.benchmark, second.method, second.options.rank) == ("mini", "keeplora", 2)
    assert type(second.options) is KeepLoRAConfig


def test_without_flags_the_embedded_stream_is_learned_by_keeplora(captured):
    cli.main(["run"])
    assert (captured[0].benchmark, captured[0].model, captured[0].method) == ("mini", "mini", "keeplora")


def test_every_field_of_a_run_is_a_flag(captured):
    flags = {
        "--seed": "3", "--evaluation": "validation", "--epochs": "4", "--batch-size": "5", "--weight-decay": "0.5",
        "--schedule": "cosine", "--mixed-precision": "bf16", "--accumulation": "6", "--rank": "7", "--alpha": "8",
        "--gradient-share": "0.5", "--b-start": "gradient", "--features": "batch_mean", "--layer-scale": "0.25",
        "--classifier": "cosine", "--weight-energy": "0.75",
    }  # fmt: skip
    cli.main(["run", *[word for pair in flags.items() for word in pair], "--targets", "q_proj", "v_proj"])
    (config,) = captured
    values = vars(config) | vars(config.train) | vars(config.options)
    for flag, value in flags.items():
        assert values[flag[2:].replace("-", "_")] in (
            value,
            pytest.approx(float(value)) if value[0].isdigit() else value,
        )
    assert config.options.targets == ("q_proj", "v_proj")


def test_a_method_without_an_option_does_not_take_its_flag(capsys):
    assert "--feature-energy" in refused(capsys, "run", "--method", "lora_ft", "--feature-energy", "0.5")


@pytest.mark.parametrize("command", ["", "demo", "run", "compare", "evaluate", "certify", "export", "analyze"])
def test_help_of_every_command_teaches(capsys, command):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    shown = words_of(capsys.readouterr().out)
    expected = {
        "": "demo", "demo": "report", "run": "Example: keeplora run", "compare": "Example: keeplora compare",
        "evaluate": "validation", "export": "Example: keeplora export", "analyze": "principal",
        "certify": "Example: keeplora certify",
    }[command]  # fmt: skip
    assert "usage: keeplora" in shown
    assert expected in shown


def test_help_of_run_shows_the_papers_defaults(capsys, place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")  # in one column
    with pytest.raises(SystemExit):
        cli.main(["run", "--benchmark", str(place / "colors.toml"), "--help"])
    shown = words_of(capsys.readouterr().out)
    for flag, default in {
        "--rank INT": "16", "--alpha FLOAT": "1.0", "--weight-energy": "vision 0.85 text 0.2 other 0.6",
        "--feature-energy FLOAT": "0.99", "--learning-rate FLOAT": "0.001", "--batch-size INT": "64",
        "--epochs INT": "10", "--method STR": "keeplora", "--features": "second_moment", "--classifier": "none",
    }.items():  # fmt: skip
        assert f"(default: {default})" in shown.split(flag)[1].split(" --")[0], flag


def settings_shown(capsys, *arguments):
    """Return what --show-settings says: the value and the source of each setting."""
    cli.main(["run", *arguments, "--show-settings"])
    lines = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    return {line[0]: tuple(line[1:]) for line in lines if len(line) == 3}


def test_settings_are_shown_with_their_sources_and_nothing_is_learned(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(learn, "run_stream", None)
    (tmp_path / "mine.toml").write_text("seed = 5\n[train]\nwarmup = 0.5\n[options]\nalpha = 4.0\n")
    found = settings_shown(capsys, "--config", "mine.toml", "--seed", "6", "--method", "keeplora_plus", "--epochs", "1")
    assert found["seed"] == ("6", "--seed")
    assert found["train.epochs"] == ("1", "--epochs")
    assert found["train.warmup"] == ("0.5", "mine.toml")
    assert found["options.alpha"] == ("4.0", "mine.toml")
    assert found["train.batch_size"] == ("6", "benchmark 'mini' [defaults.train]")
    assert found["options.rank"] == ("2", "benchmark 'mini' [defaults.keeplora]")
    assert found["options.classifier"] == ("cosine", "method keeplora_plus")
    assert found["options.feature_energy"] == ("0.99", "default")
    assert not (tmp_path / "runs").exists()


def test_without_a_terminal_a_long_loop_tells_how_far_it_is_once_a_minute(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    shown = progress.Display(Console(width=200))
    assert list(shown.track(range(6), "learning", 6)) == [0, 1, 2, 3, 4, 5]
    assert capsys.readouterr().out.splitlines() == ["learning: 3/6, 1 min left"]


@pytest.mark.slow
def test_a_run_prints_its_matrix_and_evaluate_the_recorded_scores(capsys, tmp_path):
    cli.main(["run", "--output", "out", "--method", "keeplora"])
    shown = words_of(capsys.readouterr().out)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "keeplora: accuracy in %" in shown
    assert f"Last {metrics['last']:.1f}" in shown
    assert "Run directory: out" in shown
    cli.main(["evaluate", "out"])
    row = next(line for line in capsys.readouterr().out.splitlines() if re.search(r"\btask0\b.*\d", line))
    score = f"{metrics['accuracy'][-1][0]:.1f}"
    assert re.findall(r"\d+\.\d", row) == [score, score]


@pytest.mark.slow
def test_the_demo_compares_three_methods_and_writes_a_report(capsys, tmp_path):
    cli.main(["demo", "--output", "demo"])
    shown = words_of(capsys.readouterr().out)
    for method in ("zero_shot", "lora_ft", "keeplora"):
        assert f"{method}: accuracy in %" in shown
        assert json.loads((tmp_path / "demo" / "images" / method / "metrics.json").read_text())["method"] == method
    page = (tmp_path / "demo" / "images" / "report.html").read_text()
    assert page.count("<img") == 1
    assert "Report: demo/images/report.html" in shown


@pytest.mark.slow
def test_the_demo_of_questions_shows_what_was_answered_before_and_after(capsys, tmp_path, monkeypatch):
    stream = chatty.write_stream(tmp_path / "vqa", tasks=1).read_text()
    probe = stream.replace("[[tasks]]", "[[probes]]").replace("task0", "general")
    shown_benchmark = f"{stream}\n{probe}\n[defaults.train]\nepochs = 1\n[defaults.keeplora]\nrank = 4\n"
    (tmp_path / "vqa" / "mini_vqa.toml").write_text(shown_benchmark)
    monkeypatch.setattr(benchmark, "BENCHMARKS", tmp_path / "vqa")
    monkeypatch.setitem(registry.EMBEDDED, "mini_vqa", chatty.save_llava(tmp_path / "model"))
    cli.main(["demo", "--kind", "vqa", "--output", "demo"])
    shown = words_of(capsys.readouterr().out)
    assert "Report: demo/vqa/report.html" in shown
    assert "Probe general" in shown
    page = (tmp_path / "demo" / "vqa" / "report.html").read_text()
    first, *rows = re.findall(r"<tr>.*?</tr>", page[page.index("Questions and answers") :], re.DOTALL)
    assert re.findall("<th>(.*?)</th>", first)[4:] == ["untouched", "lora_ft", "keeplora"]
    assert [row.count("The image of the question") for row in rows[:3]] == [1, 1, 1]


@pytest.mark.slow
def test_a_real_process_ends_without_a_traceback(place, tmp_path):
    command = [sys.executable, "-m", "keeplora", "run", "--rank", "2",
               "--benchmark", str(benchmark_of(tmp_path, "absent")), "--model", str(place / "model")]  # fmt: skip
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=600
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr + ended.stdout
    assert "Warning" not in ended.stderr
    assert "absent is neither a folder nor a zip archive" in words_of(ended.stderr)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), SafetensorError("No space")]
)
def test_a_lack_of_memory_or_disk_is_one_message_that_says_what_is_kept(monkeypatch, capsys, error):
    def fails(folder):
        raise error

    monkeypatch.setattr("keeplora.cli.runs.read_run", fails)
    with pytest.raises(SystemExit) as caught:
        cli.main(["resume", "runs/x"])
    assert caught.value.code == 1
    text = capsys.readouterr().err
    assert str(error) in text or "MemoryError" in text
    assert "A run keeps what it has finished" in text


@pytest.mark.parametrize("arguments", [["--help"], ["rnu"], [], ["certify", "--foo"], ["--version"]])
def test_a_further_process_says_nothing_and_ends_as_the_first(monkeypatch, capsys, arguments):
    codes = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        codes.append(end.value.code)
        shown = capsys.readouterr()
        assert bool(shown.out + shown.err) == (rank == "0")
    assert codes[0] == codes[1]


@pytest.mark.parametrize(("rank", "number"), [("x", "2"), ("1", "1"), ("1", "")])
def test_what_some_other_program_calls_a_rank_silences_nothing(monkeypatch, capsys, rank, number):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", number)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert "keeplora" in capsys.readouterr().out


def test_an_option_of_another_method_says_whose_it_is(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "--strength", "3", "--show-settings"])
    text = " ".join(capsys.readouterr().err.split())
    assert "--strength: strength is an option of ewc, sefe, and the method is keeplora; leave it out, or choose" in text


def test_the_error_of_a_further_process_waits_for_that_of_the_first(monkeypatch, capfd, tmp_path):
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit):
            cli.main(["certify", str(tmp_path / "absent")])
        said = capfd.readouterr().err
        assert ("error in process 1:" if rank == "1" else "error:") in said
    assert waited == [cli.GRACE]
