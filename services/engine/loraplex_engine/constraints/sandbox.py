"""Runs trials of constraints in another process, from the engine's event loop."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import InvalidParameterError
from loraplex_common.log import get_logger

from loraplex_engine.constraints.tokenizer import FIELD
from loraplex_engine.constraints.trial import Trial, TrialResult, TrialSetup

if TYPE_CHECKING:
    from loraplex_common.structured_output import StructuredOutput

    from loraplex_engine.constraints.limits import ConstraintLimits
    from loraplex_engine.constraints.tokenizer import VocabularySource

TIME_SIGNALS: Final = frozenset({signal.SIGXCPU, signal.SIGALRM, signal.SIGPROF, signal.SIGKILL})

_log = get_logger()


class TrialProcessError(RuntimeError):
    """The process that tries constraints has ended; the next trial starts another."""


class Sandbox:
    """Starts the process of `trial` when the first constraint comes, and again if it should end.

    Args:
        source: Says where the tokenizer is.
        limits: What a constraint may cost.
    """

    def __init__(self, source: VocabularySource, limits: ConstraintLimits) -> None:
        self._source = source
        self._limits = limits
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._pending: dict[int, asyncio.Future[TrialResult]] = {}
        self._num_trials = 0

    async def try_out(self, wanted: StructuredOutput) -> tuple[str, int]:
        """Return the library's grammar of a constraint that can be compiled, and the bytes that it takes compiled.

        Raises:
            InvalidParameterError: If it cannot be compiled within the bounds; the message says why.
            TrialProcessError: If the process ended.
        """
        process = await self._ensure_process()
        assert process.stdin is not None
        self._num_trials += 1
        number = self._num_trials
        with tempfile.TemporaryDirectory(prefix="loraplex-constraint-") as directory:
            file = Path(directory) / "grammar.json"
            trial = Trial(number=number, kind=wanted.kind.value, text=wanted.text, grammar_file=str(file))
            self._pending[number] = asyncio.get_running_loop().create_future()
            try:
                process.stdin.write(json.dumps(asdict(trial)).encode() + b"\n")
                await process.stdin.drain()
                result = await self._pending[number]
            except ConnectionError as error:
                raise TrialProcessError("the process that tries constraints has ended") from error
            finally:
                self._pending.pop(number, None)
            if reason := self._reason(wanted, result):
                raise InvalidParameterError(reason, field=FIELD)
            return await asyncio.to_thread(file.read_text, encoding="utf-8"), result.num_bytes

    def _reason(self, wanted: StructuredOutput, result: TrialResult) -> str:
        if not result.killed_by:
            return result.reason
        kind, limits = wanted.kind.value, self._limits
        if result.killed_by in TIME_SIGNALS:
            return f"{kind}: it takes more than {limits.compile_timeout_s:g} s to compile; make it smaller"
        _log.warning("a constraint ended its trial", kind=kind, signal=signal.Signals(result.killed_by).name)
        return f"{kind}: it takes more than {limits.compile_memory_bytes >> 20} MiB to compile; make it smaller"

    async def _ensure_process(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._process is None or self._process.returncode is not None or self._reader is None:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "loraplex_engine.constraints.trial",
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                )
                setup = TrialSetup(
                    tokenizer_file=str(self._source.tokenizer_file),
                    vocab_size=self._source.vocab_size,
                    eos_token_ids=list(self._source.eos_token_ids),
                    limits=asdict(self._limits),
                )
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps(asdict(setup)).encode() + b"\n")
                self._reader = asyncio.create_task(self._read(self._process))
            return self._process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        try:
            while line := await process.stdout.readline():
                result = TrialResult(**json.loads(line))
                future = self._pending.get(result.number)
                if future is not None and not future.done():
                    future.set_result(result)
        finally:
            self._reader = None
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(TrialProcessError("the process that tries constraints has ended"))

    async def close(self) -> None:
        """End the process."""
        process, reader = self._process, self._reader
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        if process.returncode is None:
            process.terminate()
        await process.wait()
        if reader is not None:
            await asyncio.wait([reader])
