"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, TypeVar

import msgspec
from loraplex_common.errors import InvalidParameterError, LoraplexError
from loraplex_common.rights import GATEWAY

from loraplex_gateway.openai import further_fields
from loraplex_gateway.openai.answers import DetokenizeAnswer, TokenizeAnswer
from loraplex_gateway.openai.body import decode
from loraplex_gateway.openai.endpoint import Endpoint, OpenEndpoint
from loraplex_gateway.openai.errors import BodyNames, error_response
from loraplex_gateway.openai.json_responses import json_response
from loraplex_gateway.openai.model_names import bases_of, read_names
from loraplex_gateway.openai.tokenize_bodies import DetokenizeBody, TokenizeBody, prompt_of
from loraplex_gateway.requests import validation
from loraplex_gateway.types import ChatPrompt
from loraplex_gateway.weighted import names_by_field

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.admissions import Admission
    from loraplex_common.auth import Principal
    from starlette.requests import Request
    from starlette.responses import Response

    from loraplex_gateway.openai.context import HttpContext
    from loraplex_gateway.text.token_ids import TokenIds

Body = TypeVar("Body", bound=msgspec.Struct)


def endpoints(context: HttpContext) -> list[Endpoint | OpenEndpoint]:
    """Return the routes about text and its tokens."""
    routes = _Text(context)
    return [
        Endpoint(
            path="/tokenize",
            right=GATEWAY + "Tokenize",
            handler=routes.tokenize,
            summary="Return the token ids of a text or a conversation.",
            body=TokenizeBody,
            table=further_fields.TOKENIZE,
            answer=TokenizeAnswer,
        ),
        Endpoint(
            path="/detokenize",
            right=GATEWAY + "Detokenize",
            handler=routes.detokenize,
            summary="Return the text of token ids.",
            body=DetokenizeBody,
            table=further_fields.DETOKENIZE,
            answer=DetokenizeAnswer,
        ),
    ]


class _Text:
    def __init__(self, context: HttpContext) -> None:
        self._context = context

    async def tokenize(self, request: Request, admission: Admission) -> Response:
        """Return the token ids that a generation would use."""
        caller = admission.principal
        async with self._context.bodies.read(request, tenant=caller.name) as data:
            body = await self._decoded(data, TokenizeBody, caller)
            try:
                return json_response(await self._tokens(body, caller))
            except LoraplexError as error:
                return error_response(error, BodyNames(further_fields.TOKENIZE, body))

    async def detokenize(self, request: Request, admission: Admission) -> Response:
        """Return the text of all token ids at once, special tokens written out."""
        caller = admission.principal
        async with self._context.bodies.read(request, tenant=caller.name) as data:
            body = await self._decoded(data, DetokenizeBody, caller)
            try:
                return json_response(await self._text(body, caller))
            except LoraplexError as error:
                return error_response(error, BodyNames(further_fields.DETOKENIZE, body))

    async def _tokens(self, body: TokenizeBody, caller: Principal) -> TokenizeAnswer:
        prompt = prompt_of(body)
        names = read_names(body.model, body.adapters, bases_of(self._context.catalog, caller))
        validation.check_adapters(names.adapter, names.adapters)
        adapters = names_by_field(names.adapter, names.adapters)
        model = await self._context.core.voice(names.base, adapters, caller=caller, prompt=prompt)
        if isinstance(prompt, ChatPrompt):
            validation.check_prompt(prompt)  # an empty text has its tokens
        ids = (await self._context.core.encode(model, prompt, tenant=caller.name)).ids
        return TokenizeAnswer(
            count=len(ids),
            max_model_len=self._context.listing.max_model_len(model),
            tokens=list(ids),
            token_strs=model.tokenizer.token_strings(ids) if body.return_token_strs else None,
        )

    async def _text(self, body: DetokenizeBody, caller: Principal) -> DetokenizeAnswer:
        names = read_names(body.model, None, bases_of(self._context.catalog, caller))
        adapters = names_by_field(names.adapter, ())
        model = await self._context.core.voice(names.base, adapters, caller=caller)
        check = functools.partial(_check_ids, body.tokens, model.token_ids)
        await self._context.away(check, caller, num_bytes=4 * len(body.tokens))
        text = await model.tokenizer.decode(body.tokens, skip_special_tokens=False, tenant=caller.name)
        return DetokenizeAnswer(prompt=text)

    async def _decoded(self, data: bytes, kind: type[Body], caller: Principal) -> Body:
        return await self._context.away(functools.partial(decode, data, kind), caller, num_bytes=len(data))


def _check_ids(tokens: Sequence[int], known: TokenIds) -> None:
    if (bad := known.first_unknown(tokens)) is not None:
        raise InvalidParameterError(f"tokens holds {bad}; token ids of this model are {known}", field="tokens")
