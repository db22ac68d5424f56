"""A process that tries constraints out before the engine compiles them: ``python -m loraplex_engine.constraints.trial``.

A schema of some hundred bytes may take hours or all memory to compile, and a compile cannot be interrupted. So each one is
first done in a fork of this process, which the system kills at the bounds; the engine compiles only what has come through.
The process holds the model's tokenizer, no weights; it ends when its standard input does.

Its input has one JSON object per line: first `TrialSetup`, then trials. Its output has one line for each trial; the
grammar for the library goes to a file. A line shorter than PIPE_BUF (4096 bytes) is written as a whole, so that forks need
no lock.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from llguidance import LLMatcher
from loraplex_common.structured_output import ConstraintKind, StructuredOutput

from loraplex_engine.constraints.context_free import schemas_of
from loraplex_engine.constraints.grammars import to_grammar
from loraplex_engine.constraints.json_text import ConstraintTextError
from loraplex_engine.constraints.limits import ConstraintLimits
from loraplex_engine.constraints.tokenizer import make_vocabulary

if TYPE_CHECKING:
    from loraplex_engine.constraints.tokenizer import Vocabulary

NUM_STEPS: Final = 8
"""Tokens that a trial draws, to see what masks cost."""
MAX_MASK_S: Final = 0.5
"""Longest processor time of one mask of a trial."""
NICENESS: Final = 10
"""What trials add to the engine's: where there are no idle cores, steps get nine tenths of one that they share with a trial."""
WALL_FACTOR: Final = 10
"""Wall time of a trial in processor times, for machines with more to do: at its priority it may get a tenth of a core."""
MAX_REASON_CHARS: Final = 900
PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSetup:
    """What a trial process is made of.

    Attributes:
        tokenizer_file: The model's tokenizer.json.
        vocab_size: Rows of the model's embedding.
        eos_token_ids: The model's end-of-text ids.
        limits: What a constraint may cost, as a dictionary of `ConstraintLimits`.
    """

    tokenizer_file: str
    vocab_size: int
    eos_token_ids: list[int]
    limits: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A constraint to be tried.

    Attributes:
        number: Which trial this is.
        kind: The value of a `ConstraintKind`.
        text: The constraint.
        grammar_file: Gets the library's grammar.
    """

    number: int
    kind: str
    text: str
    grammar_file: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """What came of a trial.

    Attributes:
        number: Which trial this was.
        reason: Why the constraint cannot be compiled; empty if it can.
        num_bytes: Memory that the compiled constraint takes.
        killed_by: The signal that ended the trial; 0 if it ended itself.
    """

    number: int
    reason: str = ""
    num_bytes: int = 0
    killed_by: int = 0

    def write(self) -> None:
        """Write one line of output."""
        os.write(sys.stdout.fileno(), json.dumps(asdict(self)).encode() + b"\n")


def main() -> int:
    """Serve trials until the standard input ends."""
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the engine, which then ends the input
    setup = TrialSetup(**json.loads(sys.stdin.readline()))
    limits = ConstraintLimits(**setup.limits)
    text = Path(setup.tokenizer_file).read_text(encoding="utf-8")
    vocabulary = make_vocabulary(text, vocab_size=setup.vocab_size, eos_token_ids=setup.eos_token_ids)
    running: dict[int, int] = {}  # process id -> trial
    signal.signal(signal.SIGCHLD, lambda *_: _reap(running))
    for line in sys.stdin:
        trial = Trial(**json.loads(line))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # not before the trial is noted
        process = os.fork()
        if process == 0:
            _run(trial, vocabulary, limits)
        running[process] = trial.number
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    return 0


def _reap(running: dict[int, int]) -> None:
    """Note which trials have ended; one that the system killed wrote nothing."""
    while running:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == 0:
            return
        number = running.pop(process)
        if status != 0:
            killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else signal.SIGABRT
            TrialResult(number=number, killed_by=killed_by).write()


def _run(trial: Trial, vocabulary: Vocabulary, limits: ConstraintLimits) -> None:
    """Do one trial in a process of its own, which ends here."""
    status = 1
    try:
        _end_with_parent()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # the library tells of its end at length
        _bound(limits)
        before = _private_bytes()
        reason = try_constraint(trial, vocabulary, limits)
        TrialResult(number=trial.number, reason=reason, num_bytes=max(0, _private_bytes() - before)).write()
        status = 0
    finally:
        os._exit(status)


def _end_with_parent() -> None:
    """Let the system kill this fork when the process that it came from ends, however that happens."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _bound(limits: ConstraintLimits) -> None:
    seconds = limits.compile_timeout_s
    used = resource.getrusage(resource.RUSAGE_SELF)
    whole = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (whole, whole))
    signal.setitimer(signal.ITIMER_REAL, seconds * WALL_FACTOR)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + limits.compile_memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _private_bytes() -> int:
    """Return the memory that belongs to this process alone, so not that of libraries, which the engine has anyway."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * resource.getpagesize()


def try_constraint(trial: Trial, vocabulary: Vocabulary, limits: ConstraintLimits) -> str:
    """Compile a constraint, draw some tokens, write its grammar; return why that does not work, or nothing.

    Args:
        trial: The constraint.
        vocabulary: The model's tokens.
        limits: What it may cost.
    """
    wanted = StructuredOutput(kind=ConstraintKind(trial.kind), text=trial.text)
    try:
        grammar = to_grammar(wanted, vocabulary, compact=limits.compact_json)
    except ConstraintTextError as error:
        return str(error)[:MAX_REASON_CHARS]
    if reason := _draw(grammar, vocabulary, limits):
        blamed = _blame(grammar, vocabulary, limits) if wanted.kind is ConstraintKind.GRAMMAR else ""
        return f"{trial.kind}: {blamed or reason}"[:MAX_REASON_CHARS]
    Path(trial.grammar_file).write_text(grammar, encoding="utf-8")
    return ""


def _draw(grammar: str, vocabulary: Vocabulary, limits: ConstraintLimits) -> str:
    """Compile the library's list of grammars and draw some tokens; return why that does not work, or nothing."""
    matcher = LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=limits.of_library())
    rng = Random(0)
    for _ in range(NUM_STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        began_s = time.process_time()
        mask = matcher.compute_bitmask()
        if (took_s := time.process_time() - began_s) > MAX_MASK_S:
            return f"the mask of one token takes {took_s:.1f} s; make it smaller"
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
        matcher.consume_token(int(rng.choice(allowed)))
    return _explain(matcher.get_error()) if matcher.is_error() else ""


def _blame(grammar: str, vocabulary: Vocabulary, limits: ConstraintLimits) -> str:
    """Return which rule has a schema that does not work by itself either, and why; nothing if each of them does."""
    lark = json.loads(grammar)["grammars"][0].get("lark_grammar", "")
    for rule, start, end in schemas_of(lark):
        schema = json.loads(lark[start:end])
        if reason := _draw(json.dumps({"grammars": [{"json_schema": schema}]}), vocabulary, limits):
            return f"rule {rule!r}: {reason}"
    return ""


TOO_MUCH_AT_ONCE: Final = (
    "too much may come in one place: an object may have some 490 optional 'properties', other choices about as many cases; "
    "require the properties, with types that take null, or group them in objects of their own"
)
EXPLANATIONS: Final = {
    "Unimplemented keys": "keywords cannot be enforced",
    "Unsatisfiable schema": "no value satisfies the schema",
    "oneOf constraints": "keyword 'oneOf' cannot be enforced unless its options exclude each other, by type, by bounds or by "
    "the values of a required property; use anyOf, or x-guidance with coerce_one_of, which reads it as anyOf",
    "not present in a registry": "keyword '$ref' points to another document, which is not read",
    "Anchor": "keyword '$ref' points to an anchor that is not there",
    "patternProperty regexes": "keyword 'patternProperties' cannot be enforced unless no name matches two of its patterns",
    "circular references": "keyword '$ref' cannot be enforced where a circle of references has other keywords beside it",
    "Schema intersection stack level": "keywords 'allOf' and '$ref' cannot be enforced where they are intersected without end",
    "NoExtension": "no output satisfies it; perhaps a keyword 'pattern' or an expression asks for characters that outputs "
    "cannot have",
    "min/maxProperties": "keywords 'minProperties' and 'maxProperties' cannot be enforced where another schema adds optional "
    "properties; list those under the same properties",
    "Current row has": TOO_MUCH_AT_ONCE,
    "Too many items": TOO_MUCH_AT_ONCE,
    "regex for integer range": "keywords 'minimum' and 'maximum' cannot be enforced: the integers are too large",
    "regex for float range": "keywords 'minimum' and 'maximum' cannot be enforced: the numbers are too large",
}
"""Part of what the library says -> what is said to the caller before it."""


def _explain(message: str) -> str:
    message = message.removesuffix("\n<non-verbose/>").strip()
    explanation = next((text for part, text in EXPLANATIONS.items() if part in message), None)
    return f"{explanation} ({message})" if explanation else message


if __name__ == "__main__":
    sys.exit(main())
