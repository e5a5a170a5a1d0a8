"""The promises that every file keeps: short, in order, documented, and no arrow that points back."""

import ast
import doctest
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import chain

HERE = Path(chain.__file__).parent
SCRIPTS = sorted(HERE.glob("*.py")) + sorted(HERE.glob("labs/*.py"))
FILES = SCRIPTS + sorted(HERE.glob("tests/*.py"))
# Who may import whom. Each room may also take what the rooms before it may.
MAY_IMPORT = {
    "chain": set(), "world": set(), "attention": set(), "model": {"attention"}, "dial": {"chain", "model"},
    "data": {"chain", "world"}, "bpe": {"chain", "data"}, "packed": set(),
    "experts": {"model"}, "checkpoint": {"chain", "bpe", "experts", "model", "packed"},
    "decode": {"dial", "model"},
    "drafts": {"chain", "checkpoint", "decode", "model"},
    "speculative": {"chain", "world", "checkpoint", "decode", "dial", "drafts", "model"},
    "bench": {"decode", "drafts", "model", "packed", "speculative"},
    "sample": {"bench", "chain", "bpe", "checkpoint", "decode", "drafts", "model", "packed", "speculative"},
    "evaluate": {"chain", "data", "world", "bpe", "checkpoint", "model"},
    "train": {"chain", "data", "bpe", "attention", "model", "decode", "dial", "evaluate"},
    "asking": {"world"}, "errands": {"world", "asking"},
    "tasks": {"chain", "world", "asking", "errands"}, "dialogue": {"chain", "data", "bpe"},
    "lora": set(),
    "exam": {"chain", "asking", "tasks", "bpe", "checkpoint", "decode", "dialogue", "model", "sample"},
    "sft": {"chain", "attention", "tasks", "bpe", "checkpoint", "dial", "dialogue", "exam", "experts", "lora",
            "model", "train"},
    "dpo": {"chain", "tasks", "bpe", "checkpoint", "dialogue", "exam", "model", "train"},
    "moe": {"chain", "checkpoint", "dial", "evaluate", "experts", "model", "train"},
    "retrieve": {"chain"}, "library": {"chain", "world", "asking", "retrieve"},
    "embed": {"chain", "library", "bpe", "checkpoint", "dialogue", "model", "train"},
    "rag": {"chain", "library", "asking", "bpe", "checkpoint", "dialogue", "dpo", "embed", "exam", "model",
            "retrieve", "sample"},
    "jail": set(), "sandbox": set(), "tools": {"chain", "sandbox"},
    "agent": {"chain", "library", "world", "asking", "bpe", "dialogue", "errands", "exam", "model", "rag",
              "retrieve", "tools"},
    "injection": {"agent", "chain", "library", "asking", "bpe", "checkpoint", "model", "rag", "retrieve",
                  "sft", "tasks", "tools"},
    "tree": {"chain", "world", "asking", "bpe", "checkpoint", "errands", "exam", "model", "rag", "sft"},
    "quantize": {"bench", "chain", "data", "bpe", "checkpoint", "decode", "evaluate", "exam", "model",
                 "packed"},
}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300, f"{path.name} has {len(lines)} lines: it holds two concepts or too many options"
    wide = [i for i, line in enumerate(lines, 1) if len(line) > 110]
    assert not wide, f"{path.name}: lines {wide} are wider than 110 columns"
    long = [node.name for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)
            and node.end_lineno - node.lineno + 1 > 50]
    assert not long, f"{path.name}: {long} have more than 50 lines"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_runs_on_import(path):
    body = tree(path).body
    assert ast.get_docstring(tree(path)), f"{path.name} has no docstring"
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If)
    for node in body[1:]:
        is_call = isinstance(node, ast.Expr) and path.parent.name == "tests"  # conftest.py sets the path
        assert isinstance(node, allowed) or is_call, f"{path.name}:{node.lineno} runs on import"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_public_functions_are_documented(path):
    bare = [node.name for node in tree(path).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not ast.get_docstring(node)]
    assert not bare, f"{path.name}: {bare} have no docstring"



@pytest.mark.parametrize("path", sorted(HERE.glob("*.py")), ids=lambda path: path.name)
def test_no_arrow_points_back(path):
    rooms = {script.stem for script in SCRIPTS}
    nodes = list(ast.walk(tree(path)))
    taken = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    taken |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert path.stem in MAY_IMPORT, f"{path.name}: say in this test whom it may import"
    wrong = taken & rooms - MAY_IMPORT[path.stem]
    assert not wrong, f"{path.name} imports {wrong}; an arrow never points back"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_examples_in_docstrings_are_true(path):
    results = doctest.testmod(importlib.import_module(path.stem))
    assert results.failed == 0, f"{path.name}: {results.failed} of {results.attempted} examples are wrong"


@pytest.mark.parametrize("room", ["bpe", "data", "world", "chain", "asking", "tasks", "retrieve", "library",
                                  "tools"])
def test_the_ground_floor_needs_no_torch(room):
    code = f"import sys; sys.modules['torch'] = None; import {room}"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0, f"{room}.py imports torch"


def test_checkpoints_are_opened_safely():
    for path in FILES:
        for call in re.findall(r"torch\.load\([^)]*\)", path.read_text(encoding="utf-8")):
            assert "weights_only=True" in call, f"{path.name}: {call}"


def test_the_readme_tells_the_truth():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    for path in SCRIPTS:
        row = re.search(rf"^\| `{path.name}` \| (\d+) \|", readme, flags=re.M)
        n = len(path.read_text(encoding="utf-8").splitlines())
        assert row, f"README.md has no row for {path.name} in its table of files"
        assert int(row[1]) == n, f"README.md says {row[1]} lines for {path.name}, it has {n}"
    results = json.loads((HERE / "docs/results.json").read_text(encoding="utf-8"))
    assert chain.set_table(readme, chain.markdown_table(results)) == readme, "run `python chain.py --record`"
