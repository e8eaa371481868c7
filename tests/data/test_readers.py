"""Readers: the same images from a folder, an archive and a dataset; everything wrong with them is named."""

import datetime as dt
import gc
import json
import re
import zipfile
from collections import Counter
from pathlib import Path

import datasets as hf_datasets
import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

import tiny
from keeplora.data.benchmark import TaskSpec
from keeplora.data.cache import PixelStore
from keeplora.data.readers import HELD_OUT, read_splits


def spec_of(path, **options):
    return TaskSpec(name="colors", path=path, hub=str(path), **options)


def archive_of(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def dataset_of(folder, path, *, labels="class"):
    """Store the same images as a DatasetDict with ClassLabel or string labels."""
    splits = {}
    for split in ("train", "test"):
        files = sorted((folder / split).rglob("*.png"))
        names = sorted({file.parent.name for file in files})
        label = hf_datasets.ClassLabel(names=names) if labels == "class" else hf_datasets.Value("string")
        splits[split] = hf_datasets.Dataset.from_dict(
            {
                "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
                "label": [names.index(f.parent.name) if labels == "class" else f.parent.name for f in files],
            },
            features=hf_datasets.Features({"image": hf_datasets.Image(), "label": label}),
        )
    hf_datasets.DatasetDict(splits).save_to_disk(str(path))
    return path


def content(examples):
    return [(examples.class_names[label], np.asarray(examples.image(i)).tobytes())
            for i, label in enumerate(examples.labels)]  # fmt: skip


@pytest.fixture(autouse=True)
def no_progress_bars():
    hf_datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    return tiny.write_images(tmp_path / "images")


def refused(spec, evaluation="test"):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - every caller checks the words
        [examples.image(i) for examples in read_splits(spec, evaluation) for i in range(len(examples))]
    assert "'colors'" in str(caught.value)
    return str(caught.value)


def test_folder_archive_and_dataset_give_the_same_examples(folder, tmp_path):
    sources = {
        "folder": spec_of(folder),
        "archive": spec_of(archive_of(folder, tmp_path / "images.zip")),
        "class labels": spec_of(dataset_of(folder, tmp_path / "by_number"), reader="dataset"),
        "text labels": spec_of(dataset_of(folder, tmp_path / "by_name", labels="text"), reader="dataset"),
    }
    read = {name: read_splits(spec, "test") for name, spec in sources.items()}
    for split in (0, 1):
        expected = content(read["folder"][split])
        assert len(expected) == 18
        for name, splits in read.items():
            assert splits[split].class_names == ("blue", "green", "red"), name
            assert content(splits[split]) == expected, name


def test_images_are_given_as_rgb_whatever_they_are_stored_as(folder):
    first = sorted((folder / "train" / "red").iterdir())[0]
    Image.open(first).convert("L").save(first)
    train, _ = read_splits(spec_of(folder), "test")
    assert {train.image(i).mode for i in range(len(train))} == {"RGB"}


def test_hidden_files_and_other_files_are_no_images(folder):
    (folder / "train" / "red" / "notes.txt").write_text("x")
    (folder / "train" / "red" / ".hidden.png").write_bytes(b"x")
    (folder / "train" / ".cache").mkdir()
    (folder / "README.md").write_text("x")
    train, _ = read_splits(spec_of(folder), "test")
    assert len(train) == 18
    assert train.class_names == ("blue", "green", "red")


@pytest.mark.parametrize("per_class", [2, 5, 10])
def test_the_held_out_split_is_a_fixed_share_of_every_class_and_disjoint(tmp_path, per_class):
    folder = tiny.write_images(tmp_path / "images", per_class=per_class)
    train, held_out = read_splits(spec_of(folder), "validation")
    counts = Counter(held_out.labels)
    assert counts == dict.fromkeys(range(3), max(1, round(HELD_OUT * per_class)))
    kept, held = set(content(train)), set(content(held_out))
    assert not kept & held
    assert kept | held == set(content(read_splits(spec_of(folder), "test")[0]))
    again = read_splits(spec_of(folder), "validation")
    assert content(again[1]) == content(held_out)
    assert again[0].labels == train.labels


def test_the_held_out_split_never_takes_test_images(folder):
    test = set(content(read_splits(spec_of(folder), "test")[1]))
    train, held_out = read_splits(spec_of(folder), "validation")
    assert not test & (set(content(train)) | set(content(held_out)))


def test_a_validation_split_that_there_is_is_used(folder):
    (folder / "test").rename(folder / "validation")
    train, held_out = read_splits(spec_of(folder), "validation")
    assert (len(train), len(held_out)) == (18, 18)


def test_class_names_are_what_the_prompt_says(folder):
    train, test = read_splits(spec_of(folder, class_names={"red": "dark red"}), "test")
    assert train.class_names == test.class_names == ("blue", "green", "dark red")


def test_two_classes_with_one_name_are_refused(folder):
    text = refused(spec_of(folder, class_names={"red": "blue"}))
    assert "2 classes are named 'blue'" in text


def test_labels_are_matched_by_name_where_the_splits_number_them_differently(folder, tmp_path):
    path = dataset_of(folder, tmp_path / "stored")
    stored = hf_datasets.load_from_disk(str(path))
    swapped = stored["test"].cast_column("label", hf_datasets.Value("int64"))
    swapped = swapped.map(lambda row: {"label": 2 - row["label"]})
    swapped = swapped.cast_column("label", hf_datasets.ClassLabel(names=["red", "green", "blue"]))
    other = tmp_path / "swapped"
    hf_datasets.DatasetDict(train=stored["train"], test=swapped).save_to_disk(str(other))
    _, expected = read_splits(spec_of(path, reader="dataset"), "test")
    _, test = read_splits(spec_of(other, reader="dataset"), "test")
    assert content(test) == content(expected)


def test_an_unknown_reader_lists_the_known_ones(folder):
    assert "unknown reader 'csv'; known readers: folder, dataset" in refused(spec_of(folder, reader="csv"))


def test_a_missing_folder_is_named_with_what_is_expected(tmp_path):
    text = refused(spec_of(tmp_path / "absent"))
    assert str(tmp_path / "absent") in text
    assert "SPLIT/CLASS/IMAGE" in text


def test_a_file_that_is_no_archive_is_named(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"not a zip")
    assert "images.zip is neither a folder nor a zip archive" in refused(spec_of(tmp_path / "images.zip"))


def test_a_missing_dataset_is_named(tmp_path):
    assert str(tmp_path / "absent") in refused(spec_of(tmp_path / "absent", reader="dataset"))


def test_a_folder_without_images_says_where_they_should_be(tmp_path):
    assert "holds no image at SPLIT/CLASS/IMAGE" in refused(spec_of(tmp_path))


@pytest.mark.parametrize(("gone", "words"), [("train", "has no train split"), ("test", "has no test split")])
def test_a_missing_split_is_named(folder, gone, words):
    (folder / gone).rename(folder / "other")
    assert words in refused(spec_of(folder))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_corrupt_png_is_named(folder, split):
    path = folder / split / "red" / "3.png"
    path.write_bytes(path.read_bytes()[:20] + b"garbage" * 5)
    text = refused(spec_of(folder))
    assert str(path) in text
    assert "not a readable image" in text
    assert "replace or remove it" in text


def test_a_png_with_damaged_pixels_is_named(folder):
    path = folder / "train" / "red" / "3.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert str(path) in refused(spec_of(folder))


def test_a_truncated_jpeg_is_named(folder):
    path = folder / "train" / "red" / "long.jpg"
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    assert str(path) in refused(spec_of(folder))


def test_an_empty_file_is_named(folder):
    path = folder / "train" / "red" / "3.png"
    path.write_bytes(b"")
    assert str(path) in refused(spec_of(folder))


def test_a_corrupt_image_in_an_archive_is_named(folder, tmp_path):
    (folder / "test" / "blue" / "1.png").write_bytes(b"garbage")
    path = archive_of(folder, tmp_path / "images.zip")
    text = refused(spec_of(path))
    assert "images.zip" in text
    assert "test/blue/1.png" in text


def test_a_damaged_archive_is_named_with_the_image(folder, tmp_path):
    path = archive_of(folder, tmp_path / "images.zip")
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("train/red/2.png").header_offset
    content = bytearray(path.read_bytes())
    content[offset + 60] ^= 0xFF
    path.write_bytes(content)
    assert "train/red/2.png" in refused(spec_of(path))


def test_a_corrupt_image_in_a_dataset_is_named_by_its_row(folder, tmp_path):
    (folder / "train" / "blue" / "1.png").write_bytes(b"garbage")
    text = refused(spec_of(dataset_of(folder, tmp_path / "stored"), reader="dataset"))
    assert "train row 1" in text


def test_an_unreadable_image_is_found_when_the_pixels_are_read_before_training(folder, tmp_path):
    (folder / "train" / "green" / "4.png").write_bytes(b"garbage")
    train, _ = read_splits(spec_of(folder), "test")
    store = PixelStore(CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16))
    with pytest.raises(ValueError, match=r"green/4\.png is not a readable image"):
        store.read(train, lambda items, description, total: items, "reading")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_folder_without_images_is_named(folder, split):
    for image in (folder / split / "red").iterdir():
        image.unlink()
    assert f"1 class has no image in {split}: red; add some, or remove the class" in refused(spec_of(folder))


def test_a_class_folder_without_images_in_an_archive_is_named(folder, tmp_path):
    for image in (folder / "train" / "red").iterdir():
        image.unlink()
    text = refused(spec_of(archive_of(folder, tmp_path / "images.zip")))
    assert "1 class has no image in train: red" in text


@pytest.mark.parametrize("options", [{}, {"test_share": 0.5}])
@pytest.mark.parametrize("evaluation", ["test", "validation"])
def test_a_class_that_no_held_out_split_took_is_not_said_to_be_taken(folder, evaluation, options):
    for image in (folder / "train" / "red").iterdir():
        image.unlink()
    text = refused(spec_of(folder, **options), evaluation)
    assert "1 class has no image in train: red; add some, or remove the class" in text


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_name_without_a_row_in_one_split_of_a_dataset_is_named(folder, tmp_path, split):
    stored = hf_datasets.load_from_disk(str(dataset_of(folder, tmp_path / "stored")))
    stored[split] = stored[split].filter(lambda row: row["label"] != 1)
    stored.save_to_disk(str(tmp_path / "fewer"))
    text = refused(spec_of(tmp_path / "fewer", reader="dataset"))
    assert (
        "classes that train does not have: green" if split == "train" else "1 class has no image in test: green" in text
    )


def test_a_class_name_that_a_filter_left_without_any_row_is_no_class(folder, tmp_path):
    path = dataset_of(folder, tmp_path / "stored")
    hf_datasets.load_from_disk(str(path)).filter(lambda row: row["label"] != 1).save_to_disk(str(tmp_path / "fewer"))
    train, test = read_splits(spec_of(tmp_path / "fewer", reader="dataset"), "test")
    assert train.class_names == test.class_names == ("blue", "red")
    assert {train.class_names[label] for label in train.labels} == {"blue", "red"}
    whole = read_splits(spec_of(path, reader="dataset"), "test")[0]
    assert content(train) == [item for item in content(whole) if item[0] != "green"]


def test_a_class_with_one_image_cannot_be_held_out_and_is_named(tmp_path):
    folder = tiny.write_images(tmp_path / "images", per_class=1)
    text = refused(spec_of(folder), "validation")
    assert "3 classes have one image, which validation takes: blue, green, red" in text
    assert "add images, or a validation split" in text


def test_a_class_that_only_the_test_split_has_is_named_with_those_of_train(folder):
    (folder / "test" / "red").rename(folder / "test" / "pink")
    text = refused(spec_of(folder))
    assert "test has classes that train does not have: pink" in text
    assert "blue, green, red" in text


def test_a_label_out_of_range_is_named_by_its_row(folder, tmp_path):
    path = dataset_of(folder, tmp_path / "stored")
    stored = hf_datasets.load_from_disk(str(path))
    stored["test"] = stored["test"].map(lambda row, i: {"label": -1 if i == 4 else row["label"]}, with_indices=True)
    stored.save_to_disk(str(tmp_path / "wrong"))
    text = refused(spec_of(tmp_path / "wrong", reader="dataset"))
    assert "test row 4 has label -1, out of range for 3 classes" in text


def test_a_label_above_the_number_of_classes_is_named_by_its_row(folder, tmp_path):
    """The file says fewer classes than its numbers need, as a hand-made dataset may."""
    path = dataset_of(folder, tmp_path / "stored")
    for split in ("train", "test"):
        _forget_last_class(path / split)
    text = refused(spec_of(path, reader="dataset"))
    assert "label 2, out of range for 2 classes" in text


def _forget_last_class(split: Path) -> None:
    info = json.loads((split / "dataset_info.json").read_text())
    info["features"]["label"]["names"].remove("red")
    (split / "dataset_info.json").write_text(json.dumps(info))


@pytest.mark.parametrize("labels", ["class", "text"])
def test_a_missing_label_is_named_by_its_row(folder, tmp_path, labels):
    path = dataset_of(folder, tmp_path / "stored", labels=labels)
    stored = hf_datasets.load_from_disk(str(path))
    feature = stored["train"].features
    rows = stored["train"].to_list()
    rows[2]["label"] = None
    stored["train"] = hf_datasets.Dataset.from_list(rows, features=feature)
    stored.save_to_disk(str(tmp_path / "wrong"))
    assert "train row 2 has label None" in refused(spec_of(tmp_path / "wrong", reader="dataset"))


@pytest.mark.parametrize("column", ["image_column", "label_column"])
def test_a_wrong_column_lists_the_columns_and_the_setting(folder, tmp_path, column):
    path = dataset_of(folder, tmp_path / "stored")
    text = refused(spec_of(path, reader="dataset", **{column: "picture"}))
    assert "no column 'picture'; it has image, label" in text
    assert column in text


def test_other_columns_are_read_when_they_are_named(folder, tmp_path):
    path = dataset_of(folder, tmp_path / "stored")
    renamed = hf_datasets.load_from_disk(str(path)).rename_columns({"image": "picture", "label": "kind"})
    renamed.save_to_disk(str(tmp_path / "renamed"))
    spec = spec_of(tmp_path / "renamed", reader="dataset", image_column="picture", label_column="kind")
    assert content(read_splits(spec, "test")[0]) == content(read_splits(spec_of(folder), "test")[0])


def test_a_single_split_on_disk_asks_for_a_dataset_dict(folder, tmp_path):
    path = dataset_of(folder, tmp_path / "stored")
    hf_datasets.load_from_disk(str(path))["train"].save_to_disk(str(tmp_path / "single"))
    assert "save a DatasetDict with train and test" in refused(spec_of(tmp_path / "single", reader="dataset"))


@pytest.fixture
def dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_what_load_dataset_reads_from_a_folder_is_read(folder, tmp_path, dataset_cache):
    """Images in folders, or the parquet files of a downloaded repository."""
    wanted = [content(examples) for examples in read_splits(spec_of(folder), "test")]
    stored = hf_datasets.load_from_disk(str(dataset_of(folder, tmp_path / "stored")))
    for split in stored:
        (tmp_path / "repository" / "data").mkdir(parents=True, exist_ok=True)
        stored[split].to_parquet(tmp_path / "repository" / "data" / f"{split}-00000-of-00001.parquet")
    for path in (folder, tmp_path / "repository"):
        assert [content(examples) for examples in read_splits(spec_of(path, reader="dataset"), "test")] == wanted


def test_one_of_several_configurations_is_named(folder, tmp_path, dataset_cache):
    repository = tmp_path / "repository"
    lines = ["---", "configs:"]
    stored = hf_datasets.load_from_disk(str(dataset_of(folder, tmp_path / "stored")))
    for name, number in (("one", 1), ("two", 2)):
        lines += [f"- config_name: {name}", "  data_files:"]
        for split in stored:
            file = repository / name / f"{split}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            stored[split].filter(lambda row: row["label"] != 0 or number == 2).to_parquet(file)  # noqa: B023
            lines += [f"  - split: {split}", f"    path: {name}/{split}.parquet"]
    (repository / "README.md").write_text("\n".join([*lines, "---", ""]))
    assert "one" in refused(spec_of(repository, reader="dataset"))
    for name, classes in (("one", ("green", "red")), ("two", ("blue", "green", "red"))):
        assert read_splits(spec_of(repository, reader="dataset", config=name), "test")[0].class_names == classes


@pytest.mark.slow
# The library leaves a file open that it cannot read, until it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "files", [{"builder.py": "raise SystemExit"}, {"train.parquet": "no parquet"}, {"a.csv": ""}, {}]
)
def test_what_load_dataset_cannot_read_is_one_message(tmp_path, dataset_cache, files):
    for name, text in {**files, ".keep": ""}.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text(text)
    assert "is no dataset on disk" in refused(spec_of(tmp_path / "data", reader="dataset"))
    gc.collect()


LABELS = {
    "whole numbers": (hf_datasets.Value("int64"), [2, 10, 1, 2, 10, 1], ("1", "2", "10")),
    "small numbers": (hf_datasets.Value("uint8"), [2, 10, 1, 2, 10, 1], ("1", "2", "10")),
    "yes or no": (hf_datasets.Value("bool"), [True, False, True] * 2, ("False", "True")),
    "texts": (hf_datasets.Value("string"), ["b", "a", "c"] * 2, ("a", "b", "c")),
    "large texts": (hf_datasets.Value("large_string"), ["b", "a", "c"] * 2, ("a", "b", "c")),
    "classes": (hf_datasets.ClassLabel(names=["b", "a", "c"]), [0, 1, 2] * 2, ("b", "a", "c")),
    "floats": (hf_datasets.Value("float32"), [1.0, 2.0, 3.0] * 2, None),
    "not a number": (hf_datasets.Value("float64"), [float("nan"), 1.0, 2.0] * 2, None),
    "lists": (hf_datasets.List(hf_datasets.Value("int64")), [[1], [2], [1, 2]] * 2, None),
    "dates": (hf_datasets.Value("date32"), [dt.date(2020, 1, day) for day in (1, 2, 3)] * 2, None),
    "tables": ({"a": hf_datasets.Value("int64")}, [{"a": 1}] * 6, None),
    "bytes": (hf_datasets.Value("binary"), [b"a", b"b", b"c"] * 2, None),
    "arrays": (hf_datasets.Array2D((1, 1), "int32"), [[[1]]] * 6, None),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_type_are_right_or_an_error_that_names_column_and_type(folder, tmp_path, kind):
    feature, values, names = LABELS[kind]
    files = sorted((folder / "train").rglob("*.png"))[: len(values)]
    rows = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files], "label": values}
    features = hf_datasets.Features({"image": hf_datasets.Image(), "label": feature})
    split = hf_datasets.Dataset.from_dict(rows, features=features)
    hf_datasets.DatasetDict(train=split, test=split).save_to_disk(str(tmp_path / "stored"))
    spec = spec_of(tmp_path / "stored", reader="dataset")
    if names is None:
        text = refused(spec)
        assert re.search(r"train: column 'label' is .*, no label of a class; set label_column", text)
        return
    train, _ = read_splits(spec, "test")
    assert train.class_names == names
    shown = feature.names if isinstance(feature, hf_datasets.ClassLabel) else None
    assert [train.class_names[label] for label in train.labels] == [shown[v] if shown else str(v) for v in values]


IMAGES = {
    "images": (hf_datasets.Image(), lambda file: {"bytes": file.read_bytes(), "path": None}, ""),
    "paths": (hf_datasets.Value("string"), str, ""),
    "bytes": (hf_datasets.Value("binary"), lambda file: file.read_bytes(), ""),
    "missing": (hf_datasets.Image(), lambda file: None, "train row 0 .*there is none in this row"),
    "numbers": (hf_datasets.Value("int64"), lambda file: 1, "column 'image' is .*no image; set image_column"),
    "lists": (hf_datasets.List(hf_datasets.Image()), lambda file: [{"bytes": file.read_bytes(), "path": None}],
              "column 'image' is .*no image; set image_column"),
    "arrays": (hf_datasets.Array2D((1, 1), "uint8"), lambda file: [[1]], "column 'image' is .*no image"),
    "classes": (hf_datasets.ClassLabel(names=["a"]), lambda file: 0, "column 'image' is .*no image"),
}  # fmt: skip


@pytest.mark.parametrize("kind", IMAGES)
def test_images_of_every_type_are_right_or_an_error_that_names_column_and_type(folder, tmp_path, kind):
    feature, stored, words = IMAGES[kind]
    splits = {}
    for split in ("train", "test"):
        files = sorted((folder / split).rglob("*.png"))
        rows = {"image": [stored(file) for file in files], "label": [file.parent.name for file in files]}
        features = hf_datasets.Features({"image": feature, "label": hf_datasets.Value("string")})
        splits[split] = hf_datasets.Dataset.from_dict(rows, features=features)
    hf_datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "stored"))
    spec = spec_of(tmp_path / "stored", reader="dataset")
    if words:
        assert re.search(words, refused(spec), re.DOTALL)
    else:
        assert content(read_splits(spec, "test")[0]) == content(read_splits(spec_of(folder), "test")[0])


def test_columns_that_were_swapped_are_named(folder, tmp_path):
    path = dataset_of(folder, tmp_path / "stored")
    text = refused(spec_of(path, reader="dataset", image_column="label", label_column="image"))
    assert re.search(r"column 'image' is Image\(.*no label of a class", text)


def test_a_subset_keeps_images_labels_and_origins_together(folder):
    train, _ = read_splits(spec_of(folder), "test")
    part = train.subset([17, 2])
    whole = content(train)
    assert content(part) == [whole[17], whole[2]]
    assert part.origin(0) == train.origin(17)
