"""A room imports the rooms below it, never above: the order of docs/design.md, read from the imports themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import mgam

SOURCE = Path(mgam.__file__).parent
ROOMS = [
    ("errors",),
    (
        "levels",
        "schedule",
        "positions",
        "merge",
        "kernels",
        "processes",
        "threads",
        "lasting",
        "words",
        "arguments_triton",
        "chain_triton",
    ),
    ("pyramid", "pyramid_triton", "cover"),
    ("attend", "policies"),
    ("settings", "segments", "plan", "record", "engine", "device", "step"),
    ("methods", "nn"),
    ("integrations",),
    ("documents",),
    ("training", "evaluation", "benchmarks"),
    ("cli", "server", "__main__", "__init__"),
]
"""From the ground up; names in one line are rooms of one storey."""
STOREY = {name: number for number, names in enumerate(ROOMS) for name in names}


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Rooms that a file imports, wherever in the file; what is imported for type checkers alone is left out."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("mgam.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "mgam":
            found |= {f"mgam.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mgam."):
            found.add(str(node.module))
    return {module.split(".")[1] for module in found}


def test_every_room_has_a_storey() -> None:
    there = {room(path) for path in SOURCE.rglob("*.py")}
    assert there <= set(STOREY), f"give these a storey here and in docs/design.md: {sorted(there - set(STOREY))}"


def test_nobody_imports_from_above() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)} imports mgam.{other}"
        for path in sorted(SOURCE.rglob("*.py"))
        for other in sorted(imported(path))
        if STOREY.get(other, -1) > STOREY[room(path)]
    ]
    assert not wrong


def test_policies_attention_and_caches_meet_in_cover_and_pyramid() -> None:
    for one, others in (("policies", {"attend", "engine", "integrations"}), ("attend", {"policies", "engine"})):
        for path in (SOURCE / one).rglob("*.py"):
            assert not imported(path) & others, path
