"""The house itself: imports go down only, kernels/ hides nobody, README's commands and links exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {"kernels": 0, "pipeline": 1, "stages": 2}
SOURCES = [file for floor in FLOORS for file in sorted((ROOT / floor).rglob("*.py"))]


def imported_modules(file: Path) -> list[str]:
    """Absolute names of everything a file imports, at any depth of its code."""
    package = ("hedgehog", *file.relative_to(ROOT).parent.parts)
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            found.append(".".join([*base, *([node.module] if node.module else [])]))
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down_only(file: Path) -> None:
    floor = file.relative_to(ROOT).parts[0]
    for name in imported_modules(file):
        parts = name.split(".")
        if parts[0] != "hedgehog" or len(parts) < 2:
            continue
        assert FLOORS[parts[1]] <= FLOORS[floor], f"{file.name} imports {name}"
        if floor == "stages" and parts[1] == "stages":
            pytest.fail(f"stage {file.name} imports stage {name}")


def test_kernels_knows_torch_and_triton_only() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "hedgehog"}
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        others = {name.split(".")[0] for name in imported_modules(file)} - allowed
        assert others == set(), file.name


def test_a_package_called_kernels_is_found_from_the_repository_root(tmp_path: Path) -> None:
    """transformers probes PyPI's `kernels`; with the root on sys.path our folder of that name must not win."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("marker = 'the real one'\n")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.marker); "
        "import hedgehog.kernels.feature_maps as f; print('elu' in f.FEATURE_MAPS)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["the real one", "True"], done.stderr


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md")]), ids=lambda page: str(page))
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page} links to {target}"


def readme_commands() -> list[list[str]]:
    lines = (ROOT / "README.md").read_text().splitlines()
    return [line.split("#")[0].split() for line in lines if line.startswith(("hedgehog ", "make "))]


def test_readme_names_commands_and_files_that_exist() -> None:
    from typer.main import get_command

    from hedgehog.pipeline.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    commands = readme_commands()
    assert len(commands) > 8
    for program, name, *arguments in commands:
        assert name in (known if program == "hedgehog" else targets), f"{program} {name}"
        for argument in arguments:
            if argument.startswith(("configs/", "benchmarks/")):
                assert (ROOT / argument).exists(), argument


def test_an_installation_has_every_package():
    """pyproject.toml names them one by one: a package that it lacks works from a checkout only."""
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert listed is not None
    named = re.findall(r'"([\w.]+)"', listed[1])
    found = {".".join(("hedgehog", *file.parent.relative_to(ROOT).parts)) for file in SOURCES}
    assert found | {"hedgehog.slurm"} == set(named), "slurm holds templates"


@pytest.mark.parametrize("num_workers", range(1, 7))
def test_each_test_is_dealt_to_one_worker(num_workers: int, request: pytest.FixtureRequest) -> None:
    """An item that the order lost would not run, and nobody would miss it."""
    (conftest,) = [one for one in request.config.pluginmanager.get_plugins() if hasattr(one, "dealt")]

    class Item:
        def __init__(self, number: int) -> None:
            self.number = number

        def get_closest_marker(self, name: str) -> bool:
            return self.number % {"slurm": 7, "slow": 5}[name] == 0

    for count in (0, 1, 5, 100):
        items = [Item(number) for number in range(count)]
        order = conftest.dealt(items, num_workers)
        assert sorted(item.number for item in order) == list(range(count))
    share = len(items) // num_workers
    shares = [order[worker * share : (worker + 1) * share] for worker in range(num_workers)]
    on_slurm = [sum(item.get_closest_marker("slurm") for item in items) for items in shares]
    assert sum(count > 0 for count in on_slurm) == min(2, num_workers), on_slurm
