"""The commands and programs in our documents, checked against the code without running them."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from google.protobuf import json_format
from google.protobuf.message_factory import GetMessageClass
from loraplex.v1 import gateway_pb2

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
)
EXAMPLES = tuple(sorted((ROOT / "examples").glob("*.py")))
LANGUAGES = {"sh": "shell", "bash": "shell", "shell": "shell", "console": "shell", "python": "python", "py": "python"}
NO_PROGRAMS = ("mermaid", "json", "yaml", "toml", "text", "jsonc", "diff", "promql", "proto")
TOOLS = {"guidellm": "guidellm", "aiperf": "aiperf", "vllm": "vLLM"}
_FENCE = re.compile(r"^ *```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)
_NOTE = re.compile(r"<!-- run by: (.+) -->")
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_COMMENT = re.compile(r"\s+#\s.*$|^#.*$")
_COMMAND = re.compile(
    r"(loraplex(-gateway|-engine|-adapter-store)? |make |python |docker compose |pip install |pytest |\.ci/run|[A-Z_]+=\S+ )"
)


@dataclass(frozen=True, slots=True)
class Block:
    """A block of commands or of a program, with the note above it.

    Attributes:
        line: Its line in the document.
        runners: What runs it, as ``<!-- run by: A, B -->`` above it says; empty without such a note.
        commands: Its commands, or its one program.
    """

    line: int
    runners: tuple[str, ...]
    commands: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Snippet:
    """A command, or a Python program.

    Attributes:
        where: File and line, for people to read.
        kind: ``shell``, ``python`` or ``inline`` (a command named in running text).
    """

    where: str
    kind: str
    text: str


def fences(path: Path) -> list[tuple[int, str, str]]:
    """Return line, language and text of each fenced block."""
    source = path.read_text()
    return [(source.count("\n", 0, m.start()) + 1, m["language"], m["text"]) for m in _FENCE.finditer(source)]


def snippets(path: Path) -> list[Snippet]:
    """Return what a document says to run, in order; for a Python example, the commands of its docstring."""
    relative = path.relative_to(ROOT)
    if path.suffix == ".py":
        lines = path.read_text().split('"""')[1].splitlines()
        commands = [line for line in map(_without_comment, lines) if _COMMAND.match(line)]
        return [Snippet(str(relative), "shell", line) for line in commands]
    found = []
    for line, language, text in fences(path):
        kind = LANGUAGES.get(language)
        for part in shell_lines(text) if kind == "shell" else [text] if kind else []:
            found.append(Snippet(f"{relative}:{line}", kind or "", part))
    prose = _FENCE.sub("", path.read_text())
    found += [Snippet(str(relative), "inline", span) for span in _INLINE.findall(prose) if _COMMAND.match(span)]
    return found


def marked_blocks(path: Path) -> list[Block]:
    """Return the blocks of a document that are to be run."""
    lines = path.read_text().splitlines()
    found = []
    for line, language, text in fences(path):
        kind = LANGUAGES.get(language)
        if kind is None:
            continue
        note = _NOTE.fullmatch(lines[line - 2].strip()) if line > 1 else None
        runners = tuple(note[1].split(", ")) if note else ()
        found.append(Block(line, runners, tuple(shell_lines(text)) if kind == "shell" else (text,)))
    return found


def lines_marked(path: Path, runner: str) -> list[str]:
    """Return the commands of the blocks of which a document says that one file runs them."""
    return [command for block in marked_blocks(path) if runner in block.runners for command in block.commands]


def lines_of_tools(path: Path) -> dict[str, str]:
    """Return a document's command of a load generator of others -> the tool that it needs, which the tests do not have."""
    commands = (command for block in marked_blocks(path) for command in block.commands)
    return {command: TOOLS[name] for command in commands if (name := command.split()[0]) in TOOLS}


def shell_lines(text: str) -> list[str]:
    """Return a block's commands, continued lines joined, prompts and comments left out."""
    joined = text.replace("\\\n", " ")
    lines = (_without_comment(line.removeprefix("$ ")) for line in joined.splitlines())
    return [re.sub(r"\s+", " ", line) for line in lines if line]


def _without_comment(line: str) -> str:
    return _COMMENT.sub("", line).strip()


def problem_with(command: str) -> str | None:
    """Return what is wrong with a command, as far as that can be told without running it."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if program.startswith("loraplex"):
        return _unknown_flag(program, arguments)
    if program == "make":
        return _make_problem(arguments)
    if program == "python" and arguments[0] == "-m":
        return None if importlib.util.find_spec(arguments[1]) else f"no module {arguments[1]}"
    if program in ("python", "pytest", ".ci/run"):
        return _script_problem([program, *arguments] if program == ".ci/run" else arguments)
    if program == "docker":
        return _compose_problem(arguments)
    if program == "grpcurl":
        return _grpcurl_problem(arguments)
    if program == "pip":
        return _requirement_problem(arguments[1])
    if program in TOOLS:
        return None if "http://127.0.0.1:8501" in command else f"{program} does not ask the HTTP port"
    return f"nobody knows how to check {program}"


def _requirement_problem(requirement: str) -> str | None:
    """Tell what is wrong with what pip is to install: the package itself, or something that the tests have, too."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if named := re.fullmatch(r"loraplex\[(.+)\]", requirement):
        unknown = set(named[1].split(",")) - extras.keys()
        return f"no extra {', '.join(sorted(unknown))}" if unknown else None
    installed = [re.split(r"[^\w.-]", each)[0] for each in extras["dev"]]
    return None if requirement in installed else f"{requirement} is not tested with"


def _grpcurl_problem(arguments: list[str]) -> str | None:
    """Check that the method of a call exists, and that its data is a request of it."""
    service, _, method = arguments[-1].partition("/")
    if service == "list":
        return None
    found = gateway_pb2.DESCRIPTOR.services_by_name.get(service.removeprefix("loraplex.v1."))
    if found is None or method not in found.methods_by_name:
        return f"no method {arguments[-1]}"
    data = arguments[arguments.index("-d") + 1]
    try:
        json_format.Parse(data, GetMessageClass(found.methods_by_name[method].input_type)())
    except json_format.ParseError as error:
        return str(error)
    return None


def _unknown_flag(program: str, arguments: list[str]) -> str | None:
    path: list[str] = []
    for word in arguments:
        if not re.fullmatch(r"[a-z][a-z-]*", word) or (path and path not in (["adapters"], ["credentials"])):
            break
        path.append(word)
    shown = _help(program, *path)
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    missing = [flag for flag in flags if not re.search(rf"{re.escape(flag)}\b", shown)]
    return f"{program} {' '.join(path)} has no {missing[0]}" if missing else None


@cache
def _help(program: str, *path: str) -> str:
    module = {"loraplex": "loraplex_client"}.get(program, program.replace("-", "_"))
    command = [sys.executable, "-m", module, *path, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{program} {' '.join(path)} --help: {done.stderr}"
    return done.stdout


def _make_problem(arguments: list[str]) -> str | None:
    command = ["make", "--dry-run", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    return done.stderr if done.returncode else None


def _script_problem(arguments: list[str]) -> str | None:
    path, *options = arguments
    if not (ROOT / path).exists():
        return f"no {path}"
    text = (ROOT / path).read_text() if (ROOT / path).is_file() else ""
    missing = [option for option in options if option.startswith("--") and f'"{option}"' not in text]
    return f"{path} has no {missing[0]}" if missing else None


def _compose_problem(arguments: list[str]) -> str | None:
    text = (ROOT / "compose.yaml").read_text()
    pairs = list(itertools.pairwise(arguments))
    names = [word.partition("=")[0] for flag, word in pairs if flag in ("--profile", "--scale")]
    names += arguments[-1:] if "run" in arguments else []
    missing = [name for name in names if not re.search(rf"^  {name}:|profiles: \[{name}\]", text, re.MULTILINE)]
    return f"compose.yaml has no {missing[0]}" if missing else None
