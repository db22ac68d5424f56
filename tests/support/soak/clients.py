"""Clients that send requests over gRPC and HTTP through both gateways, and compare every token as it comes."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

import httpx2
from loraplex_client import AsyncClient, Started
from loraplex_client._requests import GenerateOptions
from loraplex_common.errors import LoraplexError
from support.soak.book import Book, Outcome, Stream
from support.soak.expectations import is_expected_of_generation
from support.soak.truth import MOVING, PASSING, STABLE, Question, Truth, any_question

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncGenerator

    from support.soak.catalogue import Catalogue
    from support.soak.fleet import Fleet, Part

DEADLINE_S: Final = 60.0
OVERTIME_S: Final = 5.0
BASE: Final = "tiny"
HTTP_SHARE: Final = 0.3
PAUSE_S: Final = 0.3
# A client that resumes its streams through any gateway loses none with a killed gateway. Over HTTP, and with a client
# library without resuming, the streams lost with a killed gateway are counted separately.
CLIENTS_RESUME: Final = "resume" in GenerateOptions.__annotations__


class WrongAnswerError(Exception):
    """A token or a revision is not the right one."""


class HttpRefusalError(Exception):
    """An answer over HTTP is an error object, or the connection broke; `reason` is as over gRPC."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Asker:
    """One client; it asks one question after another."""

    def __init__(self, fleet: Fleet, truth: Truth, catalogue: Catalogue, book: Book, rng: random.Random) -> None:
        self._fleet = fleet
        self._truth = truth
        self._catalogue = catalogue
        self._book = book
        self._rng = rng
        self._grpc = {part.name: self._client(part) for part in fleet.gateways}
        self._http = httpx2.AsyncClient(timeout=DEADLINE_S)

    async def run(self, over: asyncio.Event) -> None:
        """Ask until the soak ends."""
        try:
            while not over.is_set():
                gateway = self._rng.choice(self._fleet.gateways)
                outcome = await self.ask(gateway, any_question(self._rng, self._adapter()))
                pause_s = self._rng.random() * PAUSE_S * (1 if outcome is Outcome.OK else 3)
                await asyncio.sleep(pause_s)
        finally:
            await self._http.aclose()
            for client in self._grpc.values():
                await client.close()

    async def ask(self, gateway: Part, question: Question) -> Outcome:
        """Ask one question and enter its outcome."""
        is_http = self._rng.random() < HTTP_SHARE
        stream = self._book.open("http" if is_http else "grpc", gateway)
        events = self._over_http(gateway, question) if is_http else self._over_grpc(gateway, question)
        try:
            async with asyncio.timeout(DEADLINE_S + OVERTIME_S), aclosing(events):
                await self._check(stream, question, events)
            self._book.close(stream, Outcome.OK)
        except TimeoutError:
            self._book.close(stream, Outcome.HUNG)
            self._book.wrong(f"hung past its deadline: {question} through {gateway.name}")
        except WrongAnswerError as error:
            self._book.close(stream, Outcome.WRONG)
            self._book.wrong(f"{error} to {question} through {gateway.name} over {stream.face}")
        except (LoraplexError, HttpRefusalError) as error:
            self._fail(stream, question, error.reason, str(error))
        assert stream.outcome is not None
        return stream.outcome

    def _client(self, gateway: Part) -> AsyncClient:
        """Return a client of a gateway; if it can resume elsewhere, also of the other gateways."""
        others = [part for part in self._fleet.gateways if part is not gateway and CLIENTS_RESUME]
        return AsyncClient(",".join(part.grpc for part in (gateway, *others)))

    def _adapter(self) -> str:
        kind = self._rng.random()
        if kind < 0.1:
            return ""
        if kind < 0.35:
            return f"{self._rng.choice(MOVING)}:prod"
        if kind < 0.5:
            return self._rng.choice(PASSING)
        name = self._rng.choice(STABLE)
        return name if kind < 0.75 else f"{name}@{self._truth.revisions[name]}"

    async def _check(
        self, stream: Stream, question: Question, events: AsyncGenerator[tuple[str | None, tuple[int, ...]], None]
    ) -> None:
        expected: tuple[int, ...] | None = None
        async for revision, tokens in events:
            stream.hear()
            if revision is not None:
                expected = self._truth.answer(revision, question)
                if expected is None:
                    raise WrongAnswerError(f"a revision that nobody knows, {revision!r},")
                self._catalogue.check(question.adapter, revision, stream)
            if not tokens:
                continue
            position = stream.num_tokens
            stream.num_tokens += len(tokens)
            if expected is None or tokens != expected[position : stream.num_tokens]:
                raise WrongAnswerError(f"wrong tokens from {position}: {tokens}, not {expected}")
        if stream.num_tokens != question.num_tokens:
            raise WrongAnswerError(f"{stream.num_tokens} tokens")

    def _fail(self, stream: Stream, question: Question, reason: str, message: str) -> None:
        disturbers = self._book.disturbers(stream.began_s, time.monotonic())
        told = f"{reason} to {question} over {stream.face} after {stream.num_tokens} tokens; {sorted(disturbers)}: {message}"
        if stream.num_tokens:
            is_deleted = reason == "ADAPTER_NOT_FOUND" and self._catalogue.may_be_missing(question.adapter, stream)
            has_others = stream.face != "http" and CLIENTS_RESUME
            # Nothing outlives its name: a resume is refused.
            if is_deleted and self._book.lost_its_gateway(stream, has_others=has_others):
                self._book.counts["resumes of deleted adapters refused"] += 1
                self._book.close(stream, Outcome.REFUSED, reason)
                return
            cannot_resume = stream.face == "http" or not CLIENTS_RESUME
            is_with_gateway = cannot_resume and self._book.lost_its_gateway(stream)
            is_with_gateway = is_with_gateway and is_expected_of_generation(reason, disturbers)
            self._book.close(stream, Outcome.LOST_WITH_GATEWAY if is_with_gateway else Outcome.LOST, reason)
            if not is_with_gateway:
                self._book.wrong(f"lost: {told}")
            return
        self._book.close(stream, Outcome.REFUSED, reason)
        if reason == "ADAPTER_NOT_FOUND" and self._catalogue.may_be_missing(question.adapter, stream):
            return
        if not is_expected_of_generation(reason, disturbers):
            self._book.wrong(f"unexpected: {told}")

    async def _over_grpc(
        self, gateway: Part, question: Question
    ) -> AsyncGenerator[tuple[str | None, tuple[int, ...]], None]:
        stream = self._grpc[gateway.name].generate(**question.options(), timeout=DEADLINE_S)
        async with stream:
            async for event in stream:
                yield (event.adapter_revision if isinstance(event, Started) else None), event.token_ids

    async def _over_http(
        self, gateway: Part, question: Question
    ) -> AsyncGenerator[tuple[str | None, tuple[int, ...]], None]:
        url, body = f"http://{gateway.http}/v1/completions", question.body(BASE)
        has_begun = is_done = False
        try:
            async with self._http.stream("POST", url, json=body) as answer:
                if answer.status_code != 200:
                    raise _refusal(json.loads(await answer.aread()))
                async for line in answer.aiter_lines():
                    is_done = is_done or line == "data: [DONE]"
                    if is_done or not line.startswith("data: "):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise _refusal(chunk)
                    revision = None if has_begun else chunk.get("system_fingerprint") or ""
                    has_begun = True
                    yield revision, tuple(chunk["choices"][0].get("token_ids") or ())
                if not is_done:
                    raise HttpRefusalError("STREAM_INTERRUPTED", "the body ended without its last event")
        except httpx2.HTTPError as error:
            raise HttpRefusalError("UNAVAILABLE", repr(error)) from error


def _refusal(body: dict[str, Any]) -> HttpRefusalError:
    error = body["error"]
    return HttpRefusalError(str(error.get("reason")), str(error.get("message")))
