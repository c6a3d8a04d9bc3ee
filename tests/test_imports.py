"""Which room imports which: one way down, no circle, and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import blockem

SOURCE = Path(blockem.__file__).parent
UPPER = {
    *("pipeline", "session", "trainings", "blocking", "blocking_rounds", "anchoring", "defend", "training", "report"),
    *("cli", "defend_cli", "compare_cli", "sweep", "grid", "comparison"),
}
LOWER = ("errors", "store", "defence_names", "config", "examples", "forwards", "model", "steering")


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"}


def imported(path: Path) -> set[str]:
    """The blockem modules that a file imports anywhere in it, also inside functions; not those for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            whole = all(part.removeprefix("blockem.") in MODULES for part in parts)  # `from package import module` needs the module alone
            names = parts if whole else [node.module or "", *parts]
        else:
            continue
        for name in names:
            inner = name.removeprefix("blockem.")
            if name.startswith("blockem.") and inner in MODULES:
                found.add(inner)
    return found - {module_name(path)}


GRAPH = {name: imported(path) for name, path in MODULES.items()}


def reachable(start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for name in GRAPH[todo.pop()]:
            if name not in seen:
                seen.add(name)
                todo.append(name)
    return seen


def test_the_parser_sees_the_imports() -> None:
    assert "errors" in GRAPH["store"]
    assert "discovery.discover" in GRAPH["pipeline"] and "training" in GRAPH["trainings"]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_imports_itself_by_a_circle(name: str) -> None:
    assert name not in reachable(name)


@pytest.mark.parametrize("name", LOWER)
def test_a_lower_room_never_reaches_an_upper_one(name: str) -> None:
    assert not {room.split(".")[0] for room in reachable(name)} & UPPER


def test_neither_discovery_nor_defences_know_each_other() -> None:
    for name, found in GRAPH.items():
        room = name.split(".")[0]
        if room == "discovery":
            assert not {other for other in reachable(name) if other.split(".")[0] in ("defences", "training")}
        if room == "defences":
            assert not {other for other in reachable(name) if other.split(".")[0] in ("discovery", "training")}
            assert found <= reachable(name)


def test_no_defence_knows_another() -> None:
    for name in MODULES:
        if name.startswith("defences."):
            assert {other for other in reachable(name) if other.startswith("defences.")} <= {"defences.defence"}, name


def test_choosing_latents_needs_neither_discovery_nor_a_defence() -> None:
    assert not {other for other in reachable("selection") if other.split(".")[0] in {"discovery", "defences", *UPPER}}


def test_the_trainer_names_no_defence() -> None:
    assert {name for name in GRAPH["training"] if name.startswith("defences")} <= {"defences", "defences.defence"}


def test_what_is_measured_of_a_reemergence_knows_no_run() -> None:
    for name in ("audit", "patching", "decoding", "drift", "verdict"):
        assert not {room.split(".")[0] for room in reachable(f"reemergence.{name}")} & UPPER


def test_the_report_computes_nothing_and_knows_no_model() -> None:
    for name in MODULES:
        if name.split(".")[0] == "report":
            assert not reachable(name) & {"model", "training", "discovery.discover", "pipeline"}


def test_import_blockem_loads_nothing_heavy() -> None:
    heavy = "'torch', 'transformers', 'numpy', 'peft', 'sae_lens', 'yaml', 'typer'"
    code = f"import sys, blockem; print([name for name in ({heavy}) if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_command_line_and_a_recipe_load_without_torch() -> None:
    code = "import sys, blockem.cli, blockem.config; blockem.config.Recipe(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_the_processes_of_a_comparison_know_their_share_of_the_cores_before_torch_is_loaded() -> None:
    code = "import sys, blockem.sweep; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_every_public_name_resolves() -> None:
    for name in blockem.__all__:
        assert getattr(blockem, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = blockem.nonsense
