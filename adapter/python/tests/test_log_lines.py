"""Every line that reaches vLLM's log, read in the sources. Its readers run vLLM, and know kvring from its README.

`kvring._logs` makes each line name kvring, and ruff refuses other loggers. This file is about what the lines say.
"""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[3]
RUST = [ROOT / "adapter" / "src", ROOT / "adapter" / "python" / "src", ROOT / "gpu-kernels" / "src"]
"""The crates that run in vLLM's processes."""
ALL_RUST = [*RUST, ROOT / "shm-abi" / "src", ROOT / "engine" / "src"]
PYTHON = ROOT / "adapter" / "python" / "kvring"

INSIDE = (
    "abort", "beat", "breach", "client entry", "commit", "completion", "degraded", "detach", "entry", "epoch", "futex word",
    "generation", "grant", "header", "incarnation", "keeper", "ledger", "lease", "life word", "lobby", "mover", "nonce", "ring",
    "shard", "slab", "slot", "stands still", "tracker", "unsettled",
)  # fmt: skip
"""Words for the inside of kvring, which its users do not need."""

_MACRO = re.compile(r"tracing::(info|warn|error)!\(")
_ERROR = re.compile(r"#\[error\(")


def _literals(text):
    """The texts between quotes in Rust, with their lines joined; `{…}` stands for a value."""
    for literal in re.findall(r'"((?:[^"\\]|\\.)*)"', text, re.DOTALL):
        yield re.sub(r"\\\n\s*", "", literal)


def _arguments(text, start):
    """From an open parenthesis to the one that closes it, quotes and their content included."""
    depth, at, quoted = 1, start, False
    while depth:
        if text[at] == "\\" and quoted:
            at += 1
        elif text[at] == '"':
            quoted = not quoted
        elif not quoted:
            depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return text[start : at - 1]


def _in_rust(pattern, roots=RUST):
    """The place and the arguments of every macro or attribute that begins so, but for those in tests."""
    for path in sorted(path for root in roots for path in root.rglob("*.rs")):
        text = path.read_text().split("#[cfg(test)]")[0]
        for found in pattern.finditer(text):
            where = f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, found.start()) + 1}"
            yield where, _arguments(text, found.end())


def _in_python():
    """The place, the level and the message of every call of a logger."""
    for path in sorted(PYTHON.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "logger"
                and node.func.attr in ("debug", "info", "warning", "error", "exception", "log")
            ):
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: expected its text as a literal"
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node.func.attr, node.args[0].value


LINES = {where: " ".join(_literals(arguments)) for where, arguments in _in_rust(_MACRO)}
"""The adapters' lines from `info` on: others never reach vLLM's log."""
REASONS = {where: " ".join(_literals(text)) for where, text in _in_rust(_ERROR) if "transparent" not in text}
"""The texts of errors: values in those lines."""
SHOWN = {
    where: text for where, text in REASONS.items() if where.startswith(("adapter/src/error.rs", "adapter/src/worker/report.rs"))
}
"""Errors that lines show while vLLM serves."""
CALLS = {where: text for where, level, text in _in_python() if level != "debug"}


def test_the_lines_are_found():
    assert len(LINES) >= 20 and len(REASONS) >= 40 and len(CALLS) >= 10, "this file looks in the wrong places"


@pytest.mark.parametrize("where, text", [*LINES.items(), *CALLS.items(), *SHOWN.items()])
def test_a_line_says_nothing_that_only_its_author_understands(where, text):
    words = re.sub(r"\{[^}]*\}", "", text)
    assert not [word for word in INSIDE if re.search(rf"\b{word}(s|es|ed)?\b", words, re.IGNORECASE)], f"{where}: {text}"


@pytest.mark.parametrize("where, text", [*LINES.items(), *CALLS.items(), *REASONS.items()])
def test_a_line_says_that_the_engine_is_kvrings(where, text):
    """ "The engine" alone is vLLM's own EngineCore to the reader of its log."""
    bare = re.sub(r"kvring('s)? engine", "", text)
    assert not re.search(r"\bengine\b(?!=)", bare), f"{where}: {text}"


@pytest.mark.parametrize("where, arguments", [*_in_rust(_MACRO, ALL_RUST), *_in_rust(_ERROR, ALL_RUST)])
def test_nothing_is_shown_as_rust_shows_it_to_programmers(where, arguments):
    """`{…:?}` quotes what a user gave (`got {…:?}`), and nothing else."""
    code = re.sub(r'"((?:[^"\\]|\\.)*)"', "", arguments)
    shown = re.findall(r"(?<!got )\{\w*:[#x]?\?\}", arguments) + re.findall(r"\?\w+", code)
    assert not shown, f"{where}: {shown} in {arguments}"


def test_no_error_tells_its_cause_twice():
    """A text of an error and its causes (`{:#}`) would: an error that has its cause in its own words does not also name it as its
    source (`#[from]`, `#[source]`, a field called `source`)."""
    twice = []
    for where, arguments in _in_rust(_ERROR, [*ALL_RUST, ROOT / "benches" / "src", ROOT / "engine" / "cli" / "src"]):
        name, line = where.rsplit(":", 1)
        text = (ROOT / name).read_text()
        after = "".join(text.splitlines(keepends=True)[int(line) - 1 :]).split(arguments, 1)[1]
        # The variant, up to the next one's comment or attribute.
        variant = re.split(r"\n    (?:///|#\[)|\n\}", after, maxsplit=1)[0]
        shown = re.search(r"\{0[:}]|\{source[:}]", arguments)
        if shown and re.search(r"#\[(from|source)\]|\bsource:", variant):
            twice.append(f"{where}: {arguments.strip()}")
    assert not twice
