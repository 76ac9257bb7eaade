"""How dense the code is: `python tests/architecture/test_density.py` prints what the tests limit.

The targets of the report are matters of taste; only the hard limits are asserted.
"""

from __future__ import annotations

import ast
import io
import statistics
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINE = 100
MAX_FUNCTION = 80
MAX_FILE = 400
SHOWN = 8
"""Entries that the report lists of each kind."""


@dataclass(frozen=True)
class Source:
    """A parsed file; `name` is its path from the root of the repository."""

    name: str
    text: str
    tree: ast.Module

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


@dataclass(frozen=True)
class Function:
    name: str
    length: int


def sources() -> list[Source]:
    paths = [*(ROOT / "rnp").rglob("*.py"), *(ROOT / "stages").rglob("*.py")]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(paths)}
    return [Source(name, text, ast.parse(text)) for name, text in texts.items()]


def code_lines(source: Source) -> list[str]:
    """The lines that hold code: no blank ones, comments, or docstrings."""
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    documented = docstring_lines(source.tree)
    numbers: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type not in (*ignored, tokenize.ENDMARKER):
            numbers.update(range(token.start[0], token.end[0] + 1))
    return [source.lines[number - 1] for number in sorted(numbers - documented)]


def docstring_lines(tree: ast.Module) -> set[int]:
    """The lines of docstrings, those of attributes included."""
    numbers: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                numbers.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return numbers


def functions(source: Source) -> Iterator[Function]:
    """Each function and method, from `def` to its last line, nested ones too."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Function(f"{source.name}:{node.lineno} {node.name}", length)


def assignments(source: Source) -> tuple[int, list[str]]:
    """The number of assignments, and where one sets several names to as many expressions.

    That is `a, b = x, y`. Unpacking a value, as in `a, b = f()`, does not count.
    """
    total = 0
    several = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.AnnAssign | ast.AugAssign):
            total += 1
        elif isinstance(node, ast.Assign):
            total += 1
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                several.append(f"{source.name}:{node.lineno}")
    return total, several


def long_lines(files: list[Source]) -> list[str]:
    return [
        f"{source.name}:{number}"
        for source in files
        for number, line in enumerate(source.lines, 1)
        if len(line) > MAX_LINE
    ]


def long_functions(files: list[Source]) -> list[str]:
    lengths = {f.name: f.length for source in files for f in functions(source)}
    too_long = [name for name, length in lengths.items() if length > MAX_FUNCTION]
    return [f"{name} ({lengths[name]})" for name in sorted(too_long, key=lengths.get, reverse=True)]


def long_files(files: list[Source]) -> list[str]:
    """Files of the library that are too long."""
    lengths = {source.name: len(source.lines) for source in files if source.name[:4] == "rnp/"}
    return [f"{name} ({length})" for name, length in lengths.items() if length > MAX_FILE]


def report(files: list[Source]) -> str:
    """The measures with their targets, a line each."""
    code = [len(line) for source in files for line in code_lines(source)]
    lengths = [function.length for source in files for function in functions(source)]
    counted = [assignments(source) for source in files]
    total = sum(number for number, _ in counted)
    several = [place for _, places in counted for place in places]
    rows = [
        ("characters a line of code, mean", f"{statistics.mean(code):.1f}", "45", []),
        (f"lines above {MAX_LINE} characters", len(long_lines(files)), "0", long_lines(files)),
        ("assignments of several at once", f"{len(several) / total:.1%}", "3 %", several),
        ("lines of a function, median", f"{statistics.median(lengths):g}", "8", []),
        ("lines of a function, longest", max(lengths), MAX_FUNCTION, long_functions(files)),
        (f"files of rnp above {MAX_FILE} lines", len(long_files(files)), "0", long_files(files)),
    ]
    lines = []
    for name, value, target, places in rows:
        lines.append(f"{name:38}{value:>8}   (at most {target})")
        lines += [f"    {place}" for place in places[:SHOWN]]
        lines += [f"    and {len(places) - SHOWN} more"] if len(places) > SHOWN else []
    return "\n".join(lines)


@pytest.fixture(scope="module")
def files() -> list[Source]:
    files = sources()
    print(f"\n{report(files)}")
    return files


def test_no_line_is_too_long(files):
    assert long_lines(files) == []


def test_no_function_is_too_long(files):
    assert long_functions(files) == []


def test_no_file_is_too_long(files):
    assert long_files(files) == []


SAMPLE = (
    '"""Doc."""',
    "# comment",
    "",
    "a, b = 1, 2",
    "c, d = a",
    "def f():",
    '    """Doc."""',
    "    return c",
)


def test_the_measures():
    """On a file whose numbers are known by counting."""
    text = "\n".join(SAMPLE)
    source = Source("rnp/x.py", text, ast.parse(text))
    assert code_lines(source) == ["a, b = 1, 2", "c, d = a", "def f():", "    return c"]
    assert list(functions(source)) == [Function("rnp/x.py:6 f", 3)]
    assert assignments(source) == (2, ["rnp/x.py:4"])
    text = "def f():\n" + "    x = 1\n" * 400 + f"    return '{'z' * 100}'\n"
    long = Source("rnp/y.py", text, ast.parse(text))
    assert long_lines([source, long]) == ["rnp/y.py:402"]
    assert long_functions([source, long]) == ["rnp/y.py:1 f (402)"]
    assert long_files([source, long]) == ["rnp/y.py (402)"]


if __name__ == "__main__":
    print(report(sources()))
