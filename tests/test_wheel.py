"""A wheel and an sdist are built, installed into an empty environment, and run outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EMPTY = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=EMPTY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def asks(mgam: Path, folder: Path) -> None:
    """`mgam ask` reads, answers and cites, with a tiny model in a folder."""
    from documents.tiny import make_plain_model, make_tokenizer, text

    make_plain_model(window=4096).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "book.txt").write_text(text(900), encoding="utf-8")
    how = ("--model", "model", "--dense-until", "64", "--budget", "128", "--max-new-tokens", "4", "--json")
    answers = json.loads(run(mgam, "ask", "book.txt", "who?", "-q", "where?", *how, cwd=folder))
    assert [answer["question"] for answer in answers] == ["who?", "where?"]
    for passage in (passage for answer in answers for passage in answer["evidence"]):
        assert (passage["file"], text(900)[passage["start"] : passage["end"]]) == ("book.txt", passage["text"])
    assert answers[0]["evidence"]


def environment(folder: Path) -> Path:
    """The interpreter of a new environment."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    return folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What hatchling builds: the wheel is built from the unpacked sdist, as a registry's users would."""
    folder = tmp_path_factory.mktemp("build")
    python = environment(folder / "tools")
    tools = [str(python), "-m", "pip", "install", "--quiet", "hatchling>=1.27"]
    if subprocess.run(tools, env=EMPTY, capture_output=True).returncode:
        pytest.skip("the build backend cannot be installed here")
    run(python, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    [sdist] = folder.glob("mgam-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    [source] = (folder / "unpacked").iterdir()
    run(python, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    [wheel] = folder.glob("mgam-*.whl")
    return {"sdist": sdist, "wheel": wheel, "source": source}


def test_the_wheel_holds_the_package_and_nothing_else(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mgam"}
    assert "mgam/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    there = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "mgam").rglob("*.py")}
    assert there <= set(names)
    adapters = {name for name in names if name.startswith("mgam/adapters/")}
    lookup = "mgam/adapters/lookup/lora"
    assert adapters >= {"mgam/adapters/default/policy.safetensors", f"{lookup}/adapter_model.safetensors"}
    assert built["wheel"].stat().st_size - sum((ROOT / "src" / name).stat().st_size for name in adapters) < 5_000_000


def test_the_sdist_can_be_tested_and_built(built: dict[str, Path]) -> None:
    for name in ("src/mgam/__init__.py", "tests/conftest.py", "pyproject.toml", "LICENSE", "README.md", "Makefile"):
        assert (built["source"] / name).is_file(), name


def test_what_is_installed_runs_outside_the_checkout(tmp_path: Path) -> None:
    """The command of the environment that runs the tests; with `make test-oldest` a wheel, installed from nothing."""
    mgam = Path(sysconfig.get_path("scripts")) / "mgam"
    if not mgam.exists():
        pytest.skip("mgam is not installed in this environment")
    asks(mgam, tmp_path)


def test_it_runs_outside_the_checkout(built: dict[str, Path], tmp_path: Path) -> None:
    """Only mgam is installed anew; what it needs is lent by the environment that runs the tests."""
    python = environment(tmp_path / "user")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", built["wheel"], cwd=tmp_path)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (Path(packages) / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    place = run(python, "-c", "import mgam; print(mgam.__file__)", cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(tmp_path)
    mgam = python.with_name("mgam")
    asks(mgam, tmp_path)
    assert "transformers" in run(mgam, "env", cwd=tmp_path)
    assert {"mgam", "dense"} <= {method["name"] for method in json.loads(run(mgam, "methods", "--json", cwd=tmp_path))}


def test_the_citation_names_this_version() -> None:
    import mgam

    assert f"\nversion: {mgam.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
