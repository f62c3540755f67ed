"""The promises of docs/architecture.md that a machine can hold: floors, sizes, torch-free parts."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "crane"
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
# House rule: the core (kernels, models, runtime) can be read in an afternoon; every API dialect adds its own files,
# every kernel its Triton twin.
MAX_TOTAL_LINES = 25_700

# What the modules of each package may import from crane; `crane.errors` is open to all.
FLOORS = {
    "kernels": {"crane.kernels"},
    "models": {"crane.kernels", "crane.models"},
    "runtime": {"crane.kernels", "crane.models", "crane.runtime"},
    "api": {"crane.runtime.types", "crane.runtime.settings", "crane.runtime.client", "crane.runtime.launch",
            "crane.runtime.text", "crane.models.files", "crane.models.config", "crane.models.tokenizer",
            "crane.models.chat", "crane.api"},
}  # fmt: skip
TORCH_FREE = [
    "crane", "crane.cli", "crane.errors", "crane.api", "crane.api.app", "crane.api.worker",
    "crane.models.files", "crane.models.config", "crane.models.tokenizer", "crane.models.chat",
    "crane.runtime.types", "crane.runtime.settings", "crane.runtime.wire", "crane.runtime.client", "crane.runtime.text",
    "crane.runtime.scheduler", "crane.runtime.sequence", "crane.runtime.pages", "crane.runtime.batch",
    "crane.runtime.policy", "crane.runtime.slots", "crane.runtime.roster", "crane.runtime.forecast",
    "crane.runtime.drafts", "crane.runtime.recovery", "crane.runtime.ledger", "crane.runtime.costs",
    "crane.runtime.disk", "crane.runtime.tiers", "crane.runtime.tables", "crane.runtime.journal",
    "crane.runtime.overlap",
]  # fmt: skip
HEAVY = ("torch", "transformers", "gguf", "safetensors", "triton")

FILES = sorted(PACKAGE.rglob("*.py"))
ids = [str(path.relative_to(ROOT)) for path in FILES]


def imports(path: Path) -> set[str]:
    """Modules a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_stay_below_their_floor(path):
    floor = path.relative_to(PACKAGE).parts[0]
    if floor not in FLOORS:
        return
    for name in imports(path):
        if name.startswith("crane.") and not name.startswith("crane.errors") and name != "crane.__version__":
            allowed = any(name == root or name.startswith(root + ".") for root in FLOORS[floor])
            package = any(root.startswith(name + ".") for root in FLOORS[floor])
            assert allowed or package, f"{floor} may not import {name}"
    top = {name.split(".")[0] for name in imports(path)}
    if floor != "api":
        assert not top & {"falcon", "gunicorn"}, "HTTP belongs to crane.api"
    if floor in ("kernels", "models"):
        assert "socket" not in top and "asyncio" not in top
    assert not top & {"transformers", "tests", "tools", "pickle"}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_the_environment_is_read_in_one_place(path):
    if path.name != "settings.py":
        assert "os.environ" not in path.read_text() or path.name == "cli.py", "settings.py reads the environment"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_files_and_functions_can_be_seen_whole(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{node.name} is too long"


def test_all_of_crane_can_be_read_in_an_afternoon():
    assert sum(path.read_text().count("\n") for path in FILES) <= MAX_TOTAL_LINES


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_public_things_have_docstrings(path):
    tree = ast.parse(path.read_text())
    if path.name == "__init__.py" and not tree.body:
        return
    assert ast.get_docstring(tree), "the module says what it is for"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_module_loads_without_torch(module):
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", f"{module} loads {done.stdout.strip()}"


def test_every_feature_names_the_test_that_holds_it_or_says_why_not():
    rows = 0
    for line in (ROOT / "docs" / "features.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells or cells[1] in ("crane", "---"):
            continue
        rows += 1
        assert len(cells) == 6 and cells[1] in ("Y", "P", "N"), line
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", cells[5])
        assert named or (cells[1] == "N" and cells[5]), f"nothing holds: {line}"
        for path, test in named:
            assert re.search(rf"^(async )?def {test}\(", (ROOT / "tests" / path).read_text(), re.M), f"{path}::{test}"
    assert rows > 60


def test_versions_are_pinned_for_every_package_that_setup_cfg_names():
    import configparser

    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")

    def names(text):
        lines = (line.strip() for line in text.splitlines())
        return {re.split("[=<>;]", line)[0].strip() for line in lines if line and line[0] != "#"}

    pinned = names((ROOT / "requirements.txt").read_text())
    assert names(parser["options"]["install_requires"]) - {"torch"} == pinned
    wanted = names(parser["options.extras_require"]["test"])
    assert wanted <= names((ROOT / "requirements-test.txt").read_text())
