"""Folders and archives: every file is read or told, whatever it is called, and however links lead to it."""

import os
import shutil
import unicodedata
import zipfile

import numpy as np
import pytest
from PIL import Image

import tiny
from keeplora.data.benchmark import TaskSpec
from keeplora.data.folder import readable_suffixes
from keeplora.data.readers import read_splits, stored_splits


def spec_of(path, **options):
    return TaskSpec(name="colors", path=path, hub=str(path), **options)


def refused(spec, evaluation="test"):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - every caller checks the words
        [examples.image(i) for examples in read_splits(spec, evaluation) for i in range(len(examples))]
    assert "'colors'" in str(caught.value)
    return str(caught.value)


def archive_of(folder, path, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.fixture
def folder(tmp_path):
    return tiny.write_images(tmp_path / "images")


def stored(spec, split="train"):
    return stored_splits(spec)[split]


# Endings


def all_suffixes():
    Image.init()
    return sorted(Image.registered_extensions())


@pytest.mark.parametrize("in_archive", [False, True])
def test_every_ending_that_pillow_knows_is_read_or_told(folder, tmp_path, in_archive):
    place = folder / "train" / "red"
    for suffix in [*all_suffixes(), ".JPG", ".txt", ".csv"]:
        (place / f"x{suffix}").write_bytes(b"")
    spec = spec_of(archive_of(folder, tmp_path / "images.zip") if in_archive else folder)
    examples = stored(spec)
    read = {examples.origin(i).rsplit("/", 1)[1] for i in range(len(examples))}
    told = {text.split(" (")[0].rsplit("/", 1)[1] for text in examples.left_out}
    names = {path.name for path in place.iterdir()}
    assert names <= read | told
    assert not read & told
    assert {"x.txt", "x.csv"} <= told
    assert {"x.jpg", "x.jfif", "x.jpe", "x.ppm", "x.JPG", "x.tif"} <= read


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".ppm", ".jp2", ".avif", ".webp", ".tga", ".ico", ".pcx", ""])
@pytest.mark.parametrize("in_archive", [False, True])
def test_images_of_every_ending_are_read(folder, tmp_path, suffix, in_archive):
    if suffix and Image.registered_extensions().get(suffix) not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {suffix}")
    for file in sorted(folder.rglob("*.png")):
        target = file.with_suffix(suffix)
        if suffix:
            Image.open(file).save(target)
        else:
            shutil.copyfile(file, target)
        file.unlink()
    spec = spec_of(archive_of(folder, tmp_path / "images.zip") if in_archive else folder)
    train, test = read_splits(spec, "test")
    assert (len(train), len(test)) == (18, 18)
    assert train.left_out == ()
    assert train.image(0).mode == "RGB"


def test_what_is_left_out_is_named_where_a_class_has_no_image(folder):
    for file in (folder / "train" / "red").iterdir():
        file.rename(file.with_suffix(".xyz"))
    text = refused(spec_of(folder))
    assert "1 class has no image in train: red; left out: train/red/" in text
    assert ".xyz is no image that Pillow reads" in text


def test_formats_that_pillow_only_tells_are_left_out():
    assert {".h5", ".grib", ".mpg", ".wmf"}.isdisjoint(readable_suffixes())


# Links, pipes, sizes


def links(folder):
    red = folder / "train" / "red"
    return {
        "parent": (red / "up", folder / "train"),
        "root": (folder / "train" / "all", folder),
        "itself": (red / "self", red / "self"),
        "nothing": (red / "gone.png", folder / "absent.png"),
        "sibling": (folder / "train" / "pink", red),
        "other split": (folder / "test" / "red" / "more", red),
    }


@pytest.mark.parametrize("kind", ["parent", "root", "itself", "nothing", "sibling", "other split"])
def test_each_real_folder_is_read_once_and_a_link_to_it_is_told(folder, kind):
    link, target = links(folder)[kind]
    link.symlink_to(target)
    splits = stored_splits(spec_of(folder))
    images = [splits[name].origin(i) for name in splits for i in range(len(splits[name]))]
    assert len(images) == len(set(images)) == 36
    told = [text for examples in splits.values() for text in examples.left_out]
    assert len(told) == 1
    assert told[0].startswith(f"{link.relative_to(folder)} ("), "the folder itself goes before a link to it"
    assert splits["train"].class_names == ("blue", "green", "red")


def test_links_to_folders_elsewhere_and_to_single_images_are_followed(folder, tmp_path):
    (folder / "test").rename(tmp_path / "elsewhere")
    (folder / "test").symlink_to(tmp_path / "elsewhere")
    one = folder / "train" / "red" / "one.png"
    one.symlink_to(tmp_path / "elsewhere" / "red" / "1.png")
    train, test = read_splits(spec_of(folder), "test")
    assert (len(train), len(test)) == (19, 18)


def test_many_links_to_each_other_take_no_longer_than_their_folders(tmp_path):
    """Two links in each of 30 folders, both to the folder below: a billion ways lead to the last one."""
    folder = tiny.write_images(tmp_path / "images")
    place = folder / "train" / "red"
    for depth in range(30):
        below = tmp_path / f"deep{depth}"
        below.mkdir()
        for name in ("a", "b"):
            (place / name).symlink_to(below)
        place = below
    examples = stored(spec_of(folder))
    assert len(examples) == 18
    assert len(examples.left_out) == 30


def test_a_pipe_is_no_image_and_nobody_waits_for_it(folder):
    os.mkfifo(folder / "train" / "red" / "z.png")
    examples = stored(spec_of(folder))
    assert examples.left_out == ("train/red/z.png (no regular file)",)
    os.remove(folder / "train" / "red" / "z.png")
    (folder / "train" / "red" / "1.png").unlink()
    os.mkfifo(folder / "train" / "red" / "1.png")  # It came after the names were read.
    [examples.image(i) for i in range(len(examples)) if "1.png" not in examples.origin(i)]
    index = next(i for i in range(len(examples)) if "red/1.png" in examples.origin(i))
    with pytest.raises(ValueError, match=r"red/1\.png is not a readable image \(it is no file any more"):
        examples.image(index)


def test_a_picture_with_too_many_pixels_is_named_with_the_setting(folder):
    Image.new("1", (1500, 1000)).save(folder / "train" / "red" / "3.png")
    text = refused(spec_of(folder, max_megapixels=1))
    assert "red/3.png is not a readable image (it has 2 megapixels, more than the task's max_megapixels = 1" in text
    assert len(read_splits(spec_of(folder), "test")[0]) == 18


def test_a_member_of_an_archive_that_unpacks_to_too_much_is_named_with_the_setting(folder, tmp_path):
    (folder / "train" / "red" / "3.png").write_bytes(bytes(3 * 10**6))
    path = archive_of(folder, tmp_path / "images.zip", compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    text = refused(spec_of(path, max_file_mb=2))
    assert "red/3.png is not a readable image (it has 3 MB, more than the task's max_file_mb = 2" in text


# Names


NAMES = ("Café", "Škoda", "東京", "naïve")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_class_names_are_composed_whatever_form_the_file_system_has(folder, tmp_path, form):
    for split in ("train", "test"):
        for old, new in zip(("red", "green", "blue"), NAMES, strict=False):
            (folder / split / old).rename(folder / split / unicodedata.normalize(form, new))
    wanted = tuple(sorted(NAMES[:3]))
    zipped = archive_of(folder, tmp_path / "images.zip")
    names = {unicodedata.normalize("NFD", "Café"): "coffee house"}
    for path in (folder, zipped):
        assert read_splits(spec_of(path), "test")[0].class_names == wanted
        shown = read_splits(spec_of(path, class_names=names), "test")[0].class_names
        assert set(shown) == {"coffee house", *NAMES[1:3]}


def test_both_forms_of_one_name_are_one_class(folder):
    for split in ("train", "test"):
        (folder / split / "red").rename(folder / split / unicodedata.normalize("NFC", "Café"))
        (folder / split / "green").rename(folder / split / unicodedata.normalize("NFD", "Café"))
    train, test = read_splits(spec_of(folder), "test")
    assert train.class_names == test.class_names == ("Café", "blue")
    assert (train.labels.count(0), test.labels.count(0)) == (12, 12)


@pytest.mark.parametrize("slash", ["/", "\\"])
def test_names_in_archives_of_other_programs_are_read(folder, tmp_path, slash):
    """UTF-8 without the flag that says so, and the backslashes of Windows."""
    for split in ("train", "test"):
        (folder / split / "red").rename(folder / split / "CafXX")
    path = archive_of(folder, tmp_path / "images.zip")
    content = path.read_bytes()
    for split in ("train", "test"):
        for old, new in (("CafXX", "Café"), ("blue", "blue"), ("green", "green")):
            wanted = f"{split}{slash}{new}{slash}".encode()
            content = content.replace(f"{split}/{old}/".encode(), wanted)
    path.write_bytes(content)
    train, test = read_splits(spec_of(path), "test")
    assert train.class_names == ("Café", "blue", "green")
    assert [len(train), len(test)] == [18, 18]
    assert np.asarray(train.image(0)).shape[2] == 3


def test_a_name_that_is_no_utf8_is_refused_by_name(folder):
    os.rename(folder / "train" / "red", os.fsencode(folder) + b"/train/Caf\xe9")
    assert "holds 'train/Caf\\udce9/'" in refused(spec_of(folder))


@pytest.mark.parametrize("name", ["a\x1b[31mb", "a\u202eb", "a\nb"])
def test_a_name_that_would_write_to_a_terminal_is_refused(folder, name):
    (folder / "train" / "red").rename(folder / "train" / name)
    assert "a name that is not UTF-8 or not printable" in refused(spec_of(folder))


# Layouts


@pytest.mark.parametrize("in_archive", [False, True])
def test_a_folder_around_the_splits_is_looked_through(folder, tmp_path, in_archive):
    outer = tmp_path / "outer"
    outer.mkdir()
    wanted = read_splits(spec_of(folder), "test")
    labels = [(examples.class_names, examples.labels) for examples in wanted]
    folder.rename(outer / "birds")
    (outer / "README.txt").write_text("x")
    (outer / "__MACOSX").mkdir()
    path = archive_of(outer, tmp_path / "images.zip") if in_archive else outer
    found = read_splits(spec_of(path), "test")
    assert [(examples.class_names, examples.labels) for examples in found] == labels


@pytest.mark.parametrize("in_archive", [False, True])
def test_classes_without_splits_are_told_what_to_do(folder, tmp_path, in_archive):
    path = archive_of(folder / "train", tmp_path / "images.zip") if in_archive else folder / "train"
    text = refused(spec_of(path))
    assert "holds CLASS/IMAGE without splits" in text
    assert "test_share = 0.2" in text
    train, test = read_splits(spec_of(path, test_share=0.5), "test")
    assert sorted([*train.labels, *test.labels]) == sorted(read_splits(spec_of(folder), "test")[0].labels)
    assert train.class_names == ("blue", "green", "red")


def test_a_share_of_train_is_the_test_split_where_there_is_none(folder):
    shutil.rmtree(folder / "test")
    assert "has no test split; it has train; add the split, or to the task: test_share = 0.2" in refused(
        spec_of(folder)
    )
    spec = spec_of(folder, test_share=0.5)
    (train, test), again = read_splits(spec, "test"), read_splits(spec, "test")
    places = [[examples.origin(i) for i in range(len(examples))] for examples in (train, test)]
    assert [len(own) for own in places] == [9, 9]
    assert not set(places[0]) & set(places[1])
    assert places == [[examples.origin(i) for i in range(len(examples))] for examples in again]
    held_out = read_splits(spec, "validation")
    rest = {examples.origin(i) for examples in held_out for i in range(len(examples))}
    assert rest == set(places[0]), "the validation split never takes test images"


def test_a_share_is_not_taken_where_there_is_a_test_split(folder):
    assert len(read_splits(spec_of(folder, test_share=0.5), "test")[0]) == 18


def test_a_saved_dataset_is_told_its_reader(tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert 'add to the task: reader = "dataset"' in refused(spec_of(tmp_path))
