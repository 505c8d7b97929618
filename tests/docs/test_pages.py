"""What the pages tell is true of the code: links lead somewhere, code compiles, settings parse, named files exist."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
import yaml

from pipeline.cli.app import app
from pipeline.settings import load_adaptation, load_joined, parse_settings

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / "docs/comparison"  # made by a job
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if REPORTS not in page.parents),
    *(ROOT / name for name in ("cluster/gpu/README.md", "findings/README.md", "pipeline/bank/FORMAT.md")),
]
HISTORY = {ROOT / "CHANGELOG.md"}  # tells of files that are gone
TASK = {"train": "train.parquet", "dev": "dev.parquet"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def told(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(language: str) -> list:
    """Code of a language, each with its page and line."""
    texts = {page: page.read_text() for page in PAGES}
    return [
        pytest.param(found[2], id=f"{told(page)}:{text.count(chr(10), 0, found.start()) + 1}")
        for page, text in texts.items()
        for found in FENCE.finditer(text)
        if found[1] == language
    ]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=told)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY], ids=told)
def test_named_files_exist(page):
    named = re.findall(r"`((?:cluster|docs|examples|findings|jobs|pipeline|tests)/[\w./-]*)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("code", blocks("python"))
def test_python_compiles_and_imports_what_exists(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and find_spec(node.module.partition(".")[0]):
            module = import_module(node.module)
            assert [name.name for name in node.names if name.name not in dir(module)] == []


@pytest.mark.parametrize("text", blocks("yaml"))
def test_settings_are_valid(text, tmp_path):
    raw = yaml.safe_load(text)
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    if "objective" in raw:
        load_adaptation(path)
    elif "panels" in raw:
        load_joined(path)
    else:  # a part of a file is completed
        named = {name: TASK for name in ("cr", "mr", "sst2", "sst5")}
        parse_settings({"model": {"path": "smollm2-135m"}, "tasks": named, **raw})


def commands() -> list[list[str]]:
    """Of all blocks for a shell, the words of every line that starts a script or a command of the project's own."""
    lines = [line for block in blocks("sh") for line in block.values[0].replace("\\\n", " ").splitlines()]
    return [re.sub(r"\s#\s.*", "", line).split() for line in lines]


def test_scripts_of_shell_commands_exist_and_know_their_options():
    for words in commands():
        scripts = [word for word in words if re.fullmatch(r"(?:\S*/)?(?:jobs|cluster|findings|tests)/\S+", word)]
        scripts = [re.sub(r"^.*?(jobs|cluster|findings|tests)/", r"\1/", script) for script in scripts]
        exist = [script for script in scripts if list(ROOT.glob(script))]
        assert exist == scripts, words
        programs = [script for script in scripts if re.fullmatch(r"jobs/\w+\.py", script)]
        if len(programs) == 1 and words[0].endswith("python"):
            source = (ROOT / programs[0]).read_text()
            options = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help", "--"}
            assert [o for o in options if o not in source and o[2:].replace("-", "_") not in source] == [], words


def test_make_has_the_targets_that_pages_name():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    texts = [page.read_text() for page in PAGES if page not in HISTORY]
    named = {word for text in texts for word in re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.M)}
    assert named <= targets, named - targets


def test_promptbank_has_the_commands_that_pages_name():
    known = set(typer.main.get_command(app).commands)
    named = {words[1] for words in commands() if words[:1] == ["promptbank"]}
    assert named and named <= known, named - known


def test_the_faults_name_tests_that_exist():
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)…`", (ROOT / "docs/faults.md").read_text())
    assert named and [name for name in named if f"def {name}" not in sources] == []


def test_the_glossary_names_classes_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \| (`.*`) \|$", text.partition("## Words")[2].partition("\n## ")[0], re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    sources = "\n".join(path.read_text() for path in (ROOT / "pipeline").rglob("*.py"))
    assert named and [name for name in named if not re.search(rf"^class {name}\b", sources, re.M)] == []


@pytest.mark.processes
def test_the_settings_reference_is_that_of_the_schema():
    script = ROOT / "docs/print_settings_reference.py"
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    assert printed == (ROOT / "docs/settings.md").read_text(), "run make docs"


def test_the_readme_is_a_front_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
