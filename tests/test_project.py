"""Promises of the repository as a whole: its version, and documents that stay true."""

from __future__ import annotations

import os
import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import opensora

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    file for pattern in ("*.md", "docs/**/*.md", "configs/**/*.md", "scripts/**/*.md") for file in ROOT.glob(pattern)
)
TEXT_SUFFIXES = {".md", ".py", ".toml", ".txt", ".yml", ".cff"}
MOST_EMBEDDED_BYTES = 40_000_000

# A folder of somebody's machine, where to download packages from, and marks of unfinished work.
UNWANTED = {
    "path of a machine": r"(?<![\w.>:/])/(?:home|mnt|opt|root|work|Users)/\w|\b[A-Z]:\\Users\b",
    "package registry": r"--(?:extra-)?index-url|--find-links|--trusted-host",
    "unfinished work": r"\b(?:TODO|FIXME|XXX|FIGURES_PENDING)\b",
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def own_texts() -> list[Path]:
    """Every text file that is written by hand: no recorded numbers, no outputs, no environments."""
    folders = ("opensora", "scripts", "tools", "configs", "docs", "tests", ".ci", ".github")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in TEXT_SUFFIXES]
    files += [file for file in ROOT.iterdir() if file.suffix in TEXT_SUFFIXES]
    return sorted(file for file in files if "data" not in file.relative_to(ROOT).parts) + [ROOT / ".ci" / "run"]


def test_embedded_model_stays_small():
    size = sum(file.stat().st_size for file in (ROOT / "opensora" / "embedded").rglob("*") if file.is_file())
    assert size <= MOST_EMBEDDED_BYTES, f"the embedded model takes {size / 1e6:.1f} MB"


def test_version_is_written_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", opensora.__version__)
    project = read("pyproject.toml")
    assert 'dynamic = ["version"]' in project and 'path = "opensora/__init__.py"' in project
    assert not re.search(r"^version\s*=", project, re.MULTILINE)
    assigned = [file for file in own_texts() if re.search(r"^__version__\s*=", file.read_text("utf-8"), re.MULTILINE)]
    assert assigned == [ROOT / "opensora" / "__init__.py"]


def test_installed_version_is_the_source_version():
    try:
        installed = metadata.version("opensora")
    except metadata.PackageNotFoundError:
        pytest.skip("opensora is not installed, only on the path")
    assert installed == opensora.__version__


def test_constraints_pin_everything_the_project_needs():
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", read("constraints.txt"), re.MULTILINE))
    names = {name.lower().replace("_", "-") for name in pinned}
    assert not [version for version in pinned.values() if "+" in version], "a local build exists on one machine only"
    wanted = re.findall(r'^    "([\w.-]+)>=', read("pyproject.toml"), re.MULTILINE)
    wanted += re.findall(r'"([\w.-]+)>=', re.search(r"^dev = (.*)$", read("pyproject.toml"), re.MULTILINE)[1])
    assert len(wanted) > 10
    assert not {name.lower().replace("_", "-") for name in wanted} - names


def test_workflows_run_what_a_reviewer_runs():
    ci, nightly = (yaml.safe_load(read(f".github/workflows/{name}.yml")) for name in ("ci", "nightly"))
    assert ci["jobs"]["ci"]["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert {"run": "bash .ci/run"} in ci["jobs"]["ci"]["steps"]
    full = nightly["jobs"]["full"]
    assert len(full["strategy"]["matrix"]["seed"]) == 3
    assert {"OPENSORA_FULL": "1", "OPENSORA_MUTATIONS": "2000", "OPENSORA_AS_WRITTEN": "1"}.items() <= full[
        "env"
    ].items()


def test_forms_and_citation_are_valid():
    for file in (ROOT / ".github").rglob("*.yml"):
        assert yaml.safe_load(file.read_text(encoding="utf-8")), file
    fields = yaml.safe_load(read(".github/ISSUE_TEMPLATE/bug_report.yml"))["body"]
    assert "opensora doctor" in next(field for field in fields if field["id"] == "doctor")["attributes"]["label"]
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == opensora.__version__ and citation["license"] == "Apache-2.0"
    assert f"## [{opensora.__version__}]" in read("CHANGELOG.md")


def test_modules_that_mypy_skips_exist():
    """The list shrinks; a module that is gone leaves it."""
    overrides = re.search(r"^module = \[\n(.*?)^\]\nignore_errors", read("pyproject.toml"), re.MULTILINE | re.DOTALL)[1]
    for name in re.findall(r'"([\w.]+?)(?:\.\*)?"', overrides):
        path = ROOT / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"remove {name} from the overrides of mypy"


def test_ci_runs_the_commands_of_the_readme():
    shown = re.findall(r"^```bash\n(.*?)\n```$", read("README.md"), re.MULTILINE | re.DOTALL)[:2]
    run = re.findall(r"^(?:first|second)='(.*)'$", read(".ci/run"), re.MULTILINE)
    assert run == shown
    for check in ("ruff check .", "ruff format --check ."):
        assert re.search(rf"^{re.escape(check)} \|\| fail", read(".ci/run"), re.MULTILINE)
    assert re.search(r"^python\(\) \{\n *nice .* mypy .*&$", read(".ci/run"), re.MULTILINE), "beside the tests"
    assert re.search(r'^wait "\$types" \|\| fail "mypy', read(".ci/run"), re.MULTILINE)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_named_files_exist(document):
    """Files that a document names in `code`, from the root of the repository, are there."""
    named = re.findall(
        r"`((?:configs|docs|opensora|scripts|tests|tools)/[\w./-]+\.(?:py|md|png|txt))`", document.read_text("utf-8")
    )
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("what", UNWANTED)
def test_texts_hold_nothing_unwanted(what):
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in own_texts()
        if file != Path(__file__)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(UNWANTED[what], line)
    ]
    assert not found, "\n".join(found)
