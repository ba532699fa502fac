"""The documentation says what the code is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "lowbit"


def modules() -> set[str]:
    """Every module as structure.md names it: a file, or a folder with a slash for its __init__."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        relative = file.relative_to(PACKAGE)
        if file.name == "__init__.py":
            if relative.parent != Path() and "".join(file.read_text().split()):
                found.add(f"{relative.parent}/")
        elif file.name != "__main__.py":
            found.add(str(relative))
    return found


def test_structure_lists_every_module_and_no_other() -> None:
    rows = set(re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "structure.md").read_text(), re.M))
    assert rows - {"demo/", "kernels/cpu/"} == modules()


def console_examples() -> list[tuple[str, str]]:
    """(command, shown output) of every ```console block in the README."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```console\n(.*?)```", text, re.S)
    examples = []
    for block in blocks:
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            examples.append((command, output))
    return examples


def masked(text: str) -> list[str]:
    """Words only: numbers and instruction sets differ from machine to machine, and with them the columns' widths."""
    text = re.sub(r"lowbit, (avx\w+|neon|portable)", "lowbit, ISA", text)
    text = re.sub(r"(\d) (MB|GB)\b", r"\1 bytes", text)
    lines = [re.sub(r"[-+±]?\d[\d.,e+-]*%?", "#", line) for line in text.strip().splitlines()]
    # sorted: layers that lost nearly the same may change places
    return sorted(" ".join(line.split()) for line in lines)


@pytest.mark.model
def test_readme_shows_real_output(tmp_path: Path) -> None:
    """Each lowbit command of the README prints what the README shows, numbers aside."""
    examples = [(c, o) for c, o in console_examples() if c.startswith("lowbit ")]
    assert len(examples) >= 4
    for command, shown in examples:
        if command.startswith(("lowbit tune", "lowbit bench")):
            continue  # what they recommend depends on the machine; tests/tune and tests/bench run them
        words = [sys.executable, "-m", "lowbit", *command.split()[1:]]
        run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert masked(run.stdout + run.stderr) == masked(shown), command


def test_changelog_names_this_version() -> None:
    import lowbit

    assert f"## {lowbit.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_importing_lowbit_and_asking_for_help_loads_no_torch() -> None:
    code = "import sys, lowbit, lowbit.cli; assert 'torch' not in sys.modules, 'torch was imported'"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_api_mirrors_the_commands_whatever_is_imported_before() -> None:
    code = """
import importlib, lowbit
for name in ("accuracy", "speed", "tuning", "pipeline", "inspect"):
    importlib.import_module(f"lowbit.{name}")
for name in lowbit.__all__[1:]:
    for _ in range(2):
        assert callable(getattr(lowbit, name)), name
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
