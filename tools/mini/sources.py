"""Which packages the embedded data and model are made of (sources.csv), and how to fetch and unpack them."""

import csv
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

PERMISSIVE = {
    "MIT",
    "ISC",
    "Apache-2.0",
    "BSD-3-Clause",
    "CC0-1.0",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "OFL-1.0",
    "OFL-1.1",
    "Bitstream-Vera",
    "public-domain",
    "aenigma",
} | {"free for any use"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One registry package: where it comes from, its licence, whom to credit, and what it is used for."""

    key: str
    registry: str
    package: str
    version: str
    licence: str
    credit: str
    use: str

    def __post_init__(self) -> None:
        """Refuse licences that may not be shipped."""
        if self.licence not in PERMISSIVE:
            raise ValueError(f"{self.key}: licence {self.licence!r} is not one we ship; drop the source")


def every() -> list[Source]:
    """Return all sources."""
    with (Path(__file__).parent / "sources.csv").open(newline="") as file:
        return [Source(**row) for row in csv.DictReader(file)]


def pretrain_icons() -> list[str]:
    """Return the keys of the icon sets used in pre-training."""
    return [
        source.key for source in every() if source.package.startswith("@iconify-json/") and source.use == "pretrain"
    ]


def fetch(source: Source, downloads: Path, unpacked: Path) -> None:
    """Download one package with its registry's own client and unpack it; what is there already is kept."""
    font = source.package.startswith("fonts-")
    target = unpacked / "fonts" / source.key if font else unpacked / source.key
    if target.exists() or source.key == "digits":
        return
    place = downloads / source.key
    place.mkdir(parents=True, exist_ok=True)
    name = f"{source.package}@{source.version}" if source.registry == "npm" else f"{source.package}={source.version}"
    command = {
        "npm": ["npm", "pack", "--silent", name],
        "debian": ["apt-get", "download", "-qq", name],
        "pypi": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", name.replace("=", "==")],
    }[source.registry]
    subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
    unpack(next(path for path in place.iterdir() if path.is_file()), target)


def unpack(archive: Path, target: Path) -> None:
    """Unpack a .tgz, .whl or .deb; of emoji-datasource packages only the 64-pixel images and the table."""
    target.mkdir(parents=True)
    if archive.suffix == ".deb":
        subprocess.run(["dpkg", "-x", str(archive), str(target)], check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(target)
    else:
        with tarfile.open(archive) as opened:
            kept = [
                member
                for member in opened.getmembers()
                if "emoji-datasource" not in archive.name or re.search(r"/64/|emoji\.json$|README", member.name)
            ]
            opened.extractall(target, members=kept, filter="data")


def fetch_all(work: Path) -> Path:
    """Fetch and unpack every source below `work`; return the folder of unpacked packages."""
    unpacked = work / "unpacked"
    for source in every():
        fetch(source, work / "downloads", unpacked)
    return unpacked
