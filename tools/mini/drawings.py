"""Collect the drawings of every source as RGBA arrays with their concept names."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import names, rasterise

SKIP = re.compile(
    r"skin-tone|-(dark|light|medium)(-|$)|logo|brand|arrow|chevron|caret|align|-off$|-slash$|^flag|-flag$"
)
GENERIC = {
    "fluent",
    "material-symbols",
    "mdi",
    "tabler",
    "ph",
    "hugeicons",
    "solar",
    "mingcute",
    "boxicons",
    "carbon",
    "bi",
    "mynaui",
    "tdesign",
    "ion",
}


@dataclass
class Drawings:
    """Drawings of one source: `images [n, size, size, 4]` uint8 and, for each, its names (the first is the concept)."""

    source: str
    images: np.ndarray
    names: list[list[str]]
    keys: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write the arrays and the names."""
        np.save(folder / f"{self.source}.npy", self.images)
        (folder / f"{self.source}.json").write_text(json.dumps({"names": self.names, "keys": self.keys}))


def load(folder: Path, source: str) -> Drawings:
    """Read what `Drawings.save` wrote."""
    data = json.loads((folder / f"{source}.json").read_text())
    return Drawings(source, np.load(folder / f"{source}.npy", mmap_mode="r"), data["names"], data["keys"])


def iconify_svgs(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield name and SVG text of each icon of an unpacked Iconify package."""
    data = json.loads((folder / "package/icons.json").read_text())
    for name, icon in data["icons"].items():
        width, height = icon.get("width", data.get("width", 16)), icon.get("height", data.get("height", 16))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        body = icon["body"].replace("currentColor", "#000")
        namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        yield name, f'<svg {namespaces} viewBox="{box}">{body}</svg>'


def wanted(source: str, name: str, vocabulary: set[str]) -> bool:
    """Tell whether an icon is a concrete thing worth a place: of the large interface sets only known concepts."""
    if source == "noto-v1" and name.startswith("flag-for-"):
        return True
    if SKIP.search(name):
        return False
    if source == "fluent" and not re.search(r"-24-(filled|regular)$", name):
        return False
    if source == "material-symbols" and name.endswith(("-sharp", "-outline-rounded", "-outline-sharp")):
        return False
    if source == "ph" and name.endswith(("-bold", "-light", "-thin")):
        return False
    return source not in GENERIC or names.clean(name) in vocabulary


def rasterise_all(items: list[tuple[str, str]]) -> list[tuple[str, np.ndarray]]:
    """Return name and RGBA of each SVG that can be drawn, on all cores."""
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(rasterise.from_svg, [svg for _, svg in items], chunksize=64)
        return [(name, image) for (name, _), image in zip(items, drawn, strict=True) if image is not None]


def from_icons(source: str, folder: Path, vocabulary: set[str]) -> Drawings:
    """Return the drawings of an Iconify set that names a concrete concept."""
    drawn = rasterise_all([item for item in iconify_svgs(folder) if wanted(source, item[0], vocabulary)])
    found = [[names.clean(name), *names.aliases(names.clean(name))] for name, _ in drawn]
    return Drawings(source, np.stack([image for _, image in drawn]), found, [name for name, _ in drawn])


def from_google(folder: Path, names_of: dict[str, list[str]]) -> Drawings:
    """Return Noto's emoji, flags included, named by code point."""
    images, found, keys = [], [], []
    for entry in json.loads((folder / "package/emoji.json").read_text()):
        image = rasterise.from_bitmap((folder / "package/img/google/64" / entry["image"]).read_bytes())
        code = names.bare(entry["unified"])
        if entry["subcategory"] == "country-flag":
            every = ["flag of " + names.clean(entry["name"].removesuffix(" Flag"))]
        else:
            every = list(dict.fromkeys(names.clean(name) for name in names_of.get(code, []) if name))
        if image is not None and every:
            images.append(image)
            found.append(list(dict.fromkeys([*every, *names.aliases(every[0])])))
            keys.append(code)
    return Drawings("google", np.stack(images), found, keys)


def openclipart_names(paths: list[Path]) -> list[str]:
    """Return a name for each openclipart file: its title, or the file's stem where the title names a collection."""
    titles = []
    for path in paths:
        match = re.search(r"<dc:title[^>]*>([^<]{2,60})</dc:title>", path.read_text(errors="replace"))
        titles.append(names.clean(match.group(1)) if match else "")
    common = Counter(titles)
    stems = [names.clean(re.sub(r"_([a-z.]+_)+(\d+)?$|_\d+$", "", path.stem.lower())) for path in paths]
    return [title if title and common[title] <= 12 else stem for title, stem in zip(titles, stems, strict=True)]


def keywords(path: Path) -> list[str]:
    """Return the cleaned keywords that an openclipart file carries."""
    return [
        names.clean(word)
        for word in re.findall(r"<rdf:li[^>]*>([^<]{3,20})</rdf:li>", path.read_text(errors="replace"))
    ]


def from_openclipart(folder: Path) -> Drawings:
    """Return the openclipart drawings whose file says public domain, but flags, maps and abstract shapes."""
    root = folder / "usr/share/openclipart/svg"
    skip = re.compile(r"/(flags?|shapes|geography|maps|unsorted|logos?)/")
    paths = [
        path for path in sorted(root.rglob("*.svg")) if not skip.search(str(path)) and path.stat().st_size < 400_000
    ]
    paths = [path for path in paths if "publicdomain" in path.read_text(errors="replace").lower().replace(" ", "")]
    titles = openclipart_names(paths)
    drawn = rasterise_all([(str(number), path.read_text(errors="replace")) for number, path in enumerate(paths)])
    picked = [int(number) for number, _ in drawn]
    found = [[titles[n], *names.aliases(titles[n]), *keywords(paths[n])] for n in picked]
    keys = [str(paths[n].relative_to(root)) for n in picked]
    return Drawings("openclipart", np.stack([image for _, image in drawn]), found, keys)
