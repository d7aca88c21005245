"""What is shipped: metadata, pins and files agree with each other."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mgam

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HOSTS = re.compile(r"pypi\.org/simple|pythonhosted|registry\.npmjs|deb\.debian\.org|download\.pytorch", re.IGNORECASE)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in found.items()}


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for group in (PROJECT["dependencies"], *extras) for text in group]


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_one_version() -> None:
    assert PROJECT["version"] == mgam.__version__


def test_typed_and_licensed() -> None:
    assert (Path(mgam.__file__).parent / "py.typed").is_file()
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_every_dependency_is_pinned_to_a_version_that_is_accepted(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)], prereleases=True)


def test_commands_exist() -> None:
    for target in PROJECT["scripts"].values():
        module, name = target.split(":")
        assert callable(getattr(import_module(module), name))


def test_ci_runs_what_people_run() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text(encoding="utf-8")


def test_no_models_registries_or_large_files_are_committed() -> None:
    """Policies and adapters of our own making are the exception."""
    for path in tracked_files():
        if path.suffix == ".safetensors" and path.is_relative_to(ROOT / "src" / "mgam" / "adapters"):
            assert path.stat().st_size < 15_000_000, path
            continue
        assert path.suffix not in {".gguf", ".safetensors", ".bin", ".pt", ".ckpt"}, path
        assert path.stat().st_size < 3_000_000, path
        if path != Path(__file__):
            assert not HOSTS.search(path.read_text(encoding="utf-8", errors="replace")), path


def test_every_page_of_the_docs_is_in_the_site_and_its_links_lead_somewhere() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = sorted((ROOT / "docs").rglob("*.md"))
    assert len(pages) > 5
    for page in pages:
        name = page.relative_to(ROOT / "docs").as_posix()
        assert f": {name}\n" in site, f"{name} is not in the nav of mkdocs.yml"
        for target in re.findall(r"\]\(([^)#:]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{name} links to {target}, which is not there"
