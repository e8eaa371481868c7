"""Images in folders or in a zip archive, as `SPLIT/CLASS/IMAGE`: what is read, and what of it is left out, and why."""

import io
import os
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from unicodedata import normalize

from PIL import Image, UnidentifiedImageError

from keeplora.data.benchmark import TaskSpec
from keeplora.data.images import Examples

WITHOUT_DECODER = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "WMF"})  # Formats that Pillow tells, but cannot read.
SPLITS = ("train", "test", "validation")
UTF8 = 0x800  # The flag of a zip member whose name is in UTF-8.
Entry = tuple[str, str]  # The name of a file or folder (with a slash at its end), and why it is left out, or "".


def read_folder(spec: TaskSpec) -> dict[str, Examples]:
    """Read `SPLIT/CLASS/IMAGE` from a folder, through symbolic links too, or from a zip archive."""
    if spec.path.is_dir():
        if (spec.path / "dataset_dict.json").exists() or (spec.path / "dataset_info.json").exists():
            raise ValueError(f'{spec.path} is a saved Hugging Face dataset; add to the task: reader = "dataset"')
        entries = list(_in_folder(spec.path))
    elif zipfile.is_zipfile(spec.path):
        entries = list(_in_archive(spec))
    else:
        raise ValueError(f"{spec.path} is neither a folder nor a zip archive; expected SPLIT/CLASS/IMAGE in it")
    return _by_split(spec, entries)


def _by_split(spec: TaskSpec, entries: list[Entry]) -> dict[str, Examples]:
    """Sort what was found into splits and classes."""
    for name, _ in entries:
        if not name.isprintable() or not _is_text(name):
            raise ValueError(f"{spec.path} holds {name!a}, a name that is not UTF-8 or not printable; rename it")
    parts = {name: tuple(normalize("NFC", part) for part in PurePosixPath(name).parts) for name, _ in entries}
    start = _wrapping_folders(parts.values())
    is_one_split = spec.test_share > 0 and _has_classes_alone(parts.values())
    images: dict[str, list[str]] = defaultdict(list)
    classes: dict[str, set[str]] = defaultdict(set)
    left_out: dict[str, list[str]] = defaultdict(list)
    for name, reason in sorted(entries):
        place = ("train", *parts[name]) if is_one_split else parts[name][start:]
        if not place or any(part.startswith((".", "__MACOSX")) for part in place):
            continue
        is_file = not name.endswith("/") and len(place) >= 3
        if is_file and not reason:
            images[place[0]].append(name)
        elif is_file or reason:
            left_out[place[0]].append(f"{name.rstrip('/')} ({reason})")
        if (is_file and not reason) or (name.endswith("/") and len(place) == 2 and not reason):
            classes[place[0]].add(place[1])
    if not any(images.values()):
        raise ValueError(_what_is_there(spec, parts.values(), left_out))
    return {
        split: _split_of(spec, images[split], sorted(names), 0 if is_one_split else start + 1, tuple(left_out[split]))
        for split, names in classes.items()
    }


def _split_of(
    spec: TaskSpec, names: list[str], class_names: list[str], depth: int, left_out: tuple[str, ...]
) -> Examples:
    def load(i: int) -> Image.Image:
        if not spec.path.is_dir():
            member = _members(spec.path)[names[i]]
            spec.require_size(member.file_size)
            return Image.open(io.BytesIO(_archive(spec.path, os.getpid()).read(member)))
        if not (path := spec.path / names[i]).is_file():  # Opening a pipe would wait for ever.
            raise OSError("it is no file any more")
        spec.require_size(path.stat().st_size)
        return Image.open(path)

    number = {label: i for i, label in enumerate(class_names)}
    labels = tuple(number[normalize("NFC", PurePosixPath(name).parts[depth])] for name in names)
    origin = lambda i: f"task {spec.name!r}: {spec.path / names[i]}"  # noqa: E731
    return Examples(tuple(class_names), labels, load, origin, left_out, spec.max_megapixels)


def _wrapping_folders(places: Iterable[tuple[str, ...]]) -> int:
    """Return 1 if all lies in one folder that has the splits in it, else 0."""
    shown = [place for place in places if not place[0].startswith((".", "__MACOSX"))]
    tops = {place[0] for place in shown if len(place) > 1}
    return int(len(tops) == 1 and not tops & {*SPLITS} and any(place[1:2] == ("train",) for place in shown))


def _has_classes_alone(places: Iterable[tuple[str, ...]]) -> bool:
    """Say whether images lie at CLASS/IMAGE, and none deeper."""
    depths = {len(place) for place in places if PurePosixPath(place[-1]).suffix.lower() in readable_suffixes()}
    return 2 in depths and max(depths) == 2


def _what_is_there(spec: TaskSpec, places: Iterable[tuple[str, ...]], left_out: dict[str, list[str]]) -> str:
    """Say what a source without an image at SPLIT/CLASS/IMAGE holds in its place."""
    if skipped := [text for texts in left_out.values() for text in texts]:
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        return f"{spec.path} holds no image at SPLIT/CLASS/IMAGE; left out: {', '.join(skipped[:3])}{more}"
    if _has_classes_alone(places):
        return (
            f"{spec.path} holds CLASS/IMAGE without splits; add to the task: test_share = 0.2, or put the classes into"
            " train and a part of the images into test"
        )
    return f"{spec.path} holds no image at SPLIT/CLASS/IMAGE"


@lru_cache(maxsize=1)
def readable_suffixes() -> frozenset[str]:
    """Return the endings of files that Pillow can decode."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in Image.OPEN and kind not in WITHOUT_DECODER)


def _in_folder(root: Path) -> Iterator[Entry]:
    """Yield what is in a folder, but for what is hidden: each real folder once, however many links lead to it."""
    seen: dict[tuple[int, int], str] = {}
    folders, links = [""], list[str]()
    while folders or links:
        above = folders.pop() if folders else links.pop(0)  # A folder's own name goes before those of links to it.
        if (first := seen.setdefault(_identity(root / above), above)) != above:
            yield above, f"a link to {first or '.'}, which is read already"
            continue
        if above:
            yield above, ""
        with os.scandir(root / above) as found:
            names = sorted(item.name for item in found if not item.name.startswith((".", "__MACOSX")))
        for name in names:
            path = root / above / name
            if path.is_dir():
                (links if path.is_symlink() else folders).append(f"{above}{name}/")
            elif not path.is_file():  # Opening a pipe would wait for ever.
                yield f"{above}{name}", "a link to nothing" if path.is_symlink() else "no regular file"
            else:
                yield f"{above}{name}", _why_not(name, lambda path=path: _is_image(path))  # type: ignore[misc]


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _in_archive(spec: TaskSpec) -> Iterator[Entry]:
    """Yield what is in a zip archive."""
    try:
        members = _members(spec.path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{spec.path} is a damaged zip archive: {error}") from None
    for name, info in members.items():
        if name.endswith("/"):
            yield name, ""
        else:
            yield name, _why_not(name, lambda info=info: _is_image(_archive(spec.path, os.getpid()).open(info)))  # type: ignore[misc]


@lru_cache(maxsize=64)
def _members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the members of an archive by their names, whichever way these were written."""
    members = {}
    for info in _archive(path, os.getpid()).infolist():
        name = info.filename
        if not info.flag_bits & UTF8:  # Python took it for the letters of DOS.
            with suppress(UnicodeError):
                name = name.encode("cp437").decode("utf-8")
        members[name.replace("\\", "/")] = info
    return members


def _why_not(name: str, is_image: Callable[[], bool]) -> str:
    """Return why a file is not taken for an image, or nothing."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix:
        return "" if suffix in readable_suffixes() else f"{suffix} is no image that Pillow reads"
    return "" if is_image() else "it has no ending, and does not begin as an image does"


@lru_cache(maxsize=64)
def _archive(path: Path, process: int) -> zipfile.ZipFile:
    """Open an archive once for each process: a file offset cannot be shared with a worker."""
    return zipfile.ZipFile(path)


def _is_text(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _is_image(source: Any) -> bool:
    """Say whether a file without an ending starts as an image does."""
    try:
        with Image.open(source):
            return True
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
