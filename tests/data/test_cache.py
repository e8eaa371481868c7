"""Pixels of a split: those of the full image processor, decoded once, in memory or in a mapped temporary file."""

import errno
import os
import resource
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

import tiny
from keeplora.data import cache
from keeplora.data.benchmark import read_benchmark
from keeplora.data.cache import PixelStore, kept
from keeplora.data.images import Examples
from keeplora.data.readers import read_splits
from keeplora.models.dual_encoder import DualEncoder
from keeplora.progress import silent

CROPPING = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
STRETCHING = SiglipImageProcessorPil(size={"height": 16, "width": 16})
PLAIN = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16, do_normalize=False)
UNCROPPED = CLIPImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False)

BYTES = 15 * 3 * 16 * 16
"""What the images of a split take."""

linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="/proc tells what is mapped")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixels")
    tiny.write_benchmark(folder, tasks=2, per_class=5)
    tiny.save_dual_encoder(folder / "clip", "clip")
    return folder


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Return the empty folder that temporary files go to."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Read a split in several chunks, the last of them smaller."""
    monkeypatch.setattr(cache, "READ_AT_ONCE", 4)


def examples_of(place, index=0):
    return read_splits(read_benchmark(str(place / "colors.toml")).tasks[index], "test")[1]


def counted(examples, decoded):
    """Return the examples, noting every image that is decoded."""
    return replace(examples, load=lambda i: decoded.append(i) or examples.load(i))


def read(examples, limit, processor=CROPPING):
    return PixelStore(processor, memory_limit=limit).read(examples, silent, "reading")


def all_of(split):
    return torch.stack([split[i][0] for i in range(len(split))])


def mapped_in(folder):
    return str(folder) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("processor", [CROPPING, STRETCHING, PLAIN], ids=["clip", "siglip", "no_normalise"])
@pytest.mark.parametrize("limit", [BYTES, BYTES - 1, 0], ids=["in_memory", "one_byte_short", "mapped"])
def test_pixels_are_those_of_the_full_image_processor(place, processor, limit):
    examples = examples_of(place)
    images = [examples.image(i) for i in range(len(examples))]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    split = read(examples, limit, processor)
    batch = split.collate([split[i] for i in range(len(split))])
    torch.testing.assert_close(batch["pixel_values"], expected, rtol=1e-5, atol=1e-5)
    assert batch["labels"].tolist() == list(examples.labels)
    assert split[0][0].dtype == torch.uint8


@pytest.mark.parametrize("processor", [CROPPING, STRETCHING], ids=["clip", "siglip"])
def test_mapped_pixels_are_the_very_bytes_of_those_in_memory(place, processor):
    examples = examples_of(place)
    assert torch.equal(all_of(read(examples, BYTES, processor)), all_of(read(examples, 0, processor)))


@linux
def test_splits_beyond_the_memory_limit_are_mapped_and_others_are_not(place, temporary):
    store = PixelStore(CROPPING, memory_limit=BYTES)
    first = store.read(examples_of(place, 0), silent, "first")
    assert not mapped_in(temporary)
    second = store.read(examples_of(place, 1), silent, "second")
    assert mapped_in(temporary)
    assert len(first) == len(second)


@pytest.mark.parametrize("limit", [BYTES, 0], ids=["in_memory", "mapped"])
def test_every_image_is_decoded_once_however_many_epochs(place, limit):
    decoded = []
    examples = counted(examples_of(place), decoded)
    split = read(examples, limit)
    epochs = [all_of(split) for _ in range(3)]
    assert decoded == list(range(len(examples)))
    assert torch.equal(epochs[0], epochs[2])


def test_no_file_is_in_the_temporary_folder_even_while_images_are_decoded(place, temporary):
    """So a process that is killed leaves nothing behind."""
    seen = []
    examples = examples_of(place)
    split = read(replace(examples, load=lambda i: seen.append(os.listdir(temporary)) or examples.load(i)), 0)
    assert seen == [[]] * len(examples)
    assert len(all_of(split)) == len(examples)
    assert os.listdir(temporary) == []


@linux
def test_the_mapped_file_lasts_as_long_as_its_pixels(place, temporary):
    split = read(examples_of(place), 0)
    files = len(os.listdir("/proc/self/fd"))
    one = split[3][0]
    expected = one.clone()
    del split
    assert mapped_in(temporary)
    assert torch.equal(one, expected)
    del one
    assert not mapped_in(temporary)
    assert len(os.listdir("/proc/self/fd")) < files


def test_too_little_free_space_is_refused_with_the_cure(place, temporary, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, BYTES - 1))
    decoded = []
    with pytest.raises(ValueError, match="set TMPDIR to a folder with so much space") as error:
        read(counted(examples_of(place), decoded), 0)
    assert f"{BYTES:,} bytes" in str(error.value)
    assert str(temporary) in str(error.value)
    assert len(decoded) == 4, "found at the first chunk"
    assert os.listdir(temporary) == []


def test_space_that_is_just_enough_is_used(place, temporary, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, BYTES))
    assert len(read(examples_of(place), 0)) == 15


@pytest.mark.parametrize("call", ["write", "fsync", "memmap"])
def test_a_disk_that_fills_up_meanwhile_is_refused_with_the_cure(place, temporary, monkeypatch, call):
    calls = []

    def full(*args, **options):
        calls.append(args)
        if call == "write" and len(calls) < 3:
            return real(*args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = os.write
    monkeypatch.setattr(cache.np if call == "memmap" else cache.os, call, full)
    with pytest.raises(
        ValueError, match=r"No space left on device.*set TMPDIR to a folder with so much space"
    ) as error:
        read(examples_of(place), 0)
    assert calls
    assert str(temporary) in str(error.value)
    assert f"{BYTES:,} bytes" in str(error.value)
    assert os.listdir(temporary) == []


@linux
def test_a_file_that_may_not_grow_so_far_is_refused_where_it_stops(place, temporary):
    """A write that the system itself cuts short, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    files = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES // 2, hard))
    try:
        with pytest.raises(ValueError, match="set TMPDIR"):
            read(examples_of(place), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(os.listdir("/proc/self/fd")) == files
    assert not mapped_in(temporary)


def test_writes_that_take_a_part_at_a_time_lose_nothing(place, monkeypatch):
    expected, whole = all_of(read(examples_of(place), BYTES)), os.write
    monkeypatch.setattr(cache.os, "write", lambda number, content: whole(number, content[:1000]))
    assert torch.equal(all_of(read(examples_of(place), 0)), expected)


def test_no_folder_for_temporary_files_at_all_is_refused_with_the_cure(place, monkeypatch):
    def nowhere():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(ValueError, match=r"No usable temporary directory.*set TMPDIR"):
        read(examples_of(place), 0)


@pytest.mark.parametrize("limit", [BYTES, 0], ids=["in_memory", "mapped"])
def test_an_unreadable_image_is_named_and_leaves_no_file(place, temporary, limit):
    examples = examples_of(place)

    def load(index):
        if index == 9:
            raise OSError("truncated")
        return examples.load(index)

    with pytest.raises(ValueError, match=r"is not a readable image \(truncated\)") as error:
        read(replace(examples, load=load), limit)
    assert examples.origin(9) in str(error.value)
    assert os.listdir(temporary) == []


@pytest.mark.parametrize("limit", [10**6, 0], ids=["in_memory", "mapped"])
@pytest.mark.parametrize("first", [6, 8], ids=["inside a chunk", "between two"])
def test_a_processor_that_leaves_images_of_different_sizes_is_refused(place, limit, first):
    examples = examples_of(place)
    turned = replace(examples, load=lambda i: examples.load(i).rotate(90 * (i >= first), expand=True))
    with pytest.raises(ValueError, match=r"images of different sizes, 20 x 16 and 16 x 20"):
        read(turned, limit, UNCROPPED)


@pytest.mark.parametrize("limit", [10**9, 2 * BYTES, 0], ids=["in_memory", "some_mapped", "mapped"])
def test_inside_kept_a_second_run_on_the_same_images_decodes_nothing_again(place, monkeypatch, limit):
    decoded = []
    image = Examples.image
    monkeypatch.setattr(Examples, "image", lambda self, index: decoded.append(index) or image(self, index))
    with kept(limit):
        first = tasks_of(place)
        assert decoded
        decoded.clear()
        second = tasks_of(place)
        assert not decoded
    assert all(torch.equal(all_of(one.train), all_of(same.train)) for one, same in zip(first, second, strict=True))
    tasks_of(place)
    assert decoded, "nothing is kept after the block"


@linux
def test_only_what_is_in_memory_counts_towards_the_limit_of_kept(place, temporary):
    """A split that is mapped leaves the room to the next that fits."""
    examples = examples_of(place)
    with kept(BYTES):
        big = read_more(examples, 2)
        assert mapped_in(temporary)
        del big
        before = Path("/proc/self/maps").read_text().count(str(temporary))
        small = PixelStore(CROPPING).read(examples, silent, "small")
        assert Path("/proc/self/maps").read_text().count(str(temporary)) == before
        other = PixelStore(CROPPING).read(examples_of(place, 1), silent, "other")
        assert Path("/proc/self/maps").read_text().count(str(temporary)) > before
    del small, other
    assert not mapped_in(temporary)


def read_more(examples, times):
    twice = examples.subset([*range(len(examples))] * times)
    return PixelStore(CROPPING).read(twice, silent, "twice")


def tasks_of(place):
    specs = read_benchmark(str(place / "colors.toml")).tasks
    return DualEncoder().tasks(str(place / "clip"), specs, batch_size=4, evaluation="test", seed=0, track=silent)
