"""Text parts are fetched once for all that wait, kept within a bound of bytes, and never replaced by the base model's."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_status import rpc_status
from loraplex.v1 import adapter_store_pb2_grpc
from loraplex_common import text_parts_wire
from loraplex_common.added_tokens import AddedToken
from loraplex_common.error_status import to_status
from loraplex_common.errors import AdapterIncompatibleError, AdapterNotFoundError, LoraplexError, StoreUnavailableError
from loraplex_common.peers import PeerChannel, Peers
from loraplex_common.text_parts import TextParts
from loraplex_gateway.adapters import text_parts
from loraplex_gateway.adapters.names import ResolvedAdapter
from loraplex_gateway.text.added_vocabularies import VOCABULARY_BYTES
from loraplex_gateway.text.fair_workers import FairWorkers
from loraplex_gateway.text.joined_parts import TextNeeds
from loraplex_gateway.text.models import load_served_model
from loraplex_gateway.text.token_table import TokenTable
from loraplex_gateway.text.voices import Voices
from support.gateway_rig import model_directory
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from loraplex_gateway.text.models import ServedModel


class Store(adapter_store_pb2_grpc.AdapterStoreServiceServicer):
    """A store that gives out text parts, slowly, wrongly or not at all."""

    def __init__(self) -> None:
        self.parts: dict[str, TextParts] = {}
        self.calls: list[str] = []
        self.failure: LoraplexError | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    def resolved(self, number: int, parts: TextParts) -> ResolvedAdapter:
        """Keep parts under a new revision."""
        digest = f"{number:064x}"
        self.parts[digest] = parts
        return ResolvedAdapter(name=f"a{number}", digest=digest, base_fingerprint="", text_parts=parts.digest)

    async def GetTextParts(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Give out parts."""
        self.calls.append(request.revision)
        await self.gate.wait()
        if self.failure is not None:
            await context.abort_with_status(rpc_status.to_status(to_status(self.failure)))
        return text_parts_wire.to_message(self.parts[request.revision])


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return load_served_model(model_directory(), FairWorkers())


@pytest.fixture
async def store() -> AsyncIterator[tuple[Store, PeerChannel]]:
    service, server = Store(), grpc.aio.server()  # type: ignore[abstract]  # the one call that a gateway makes
    adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = PeerChannel(Peers(), f"127.0.0.1:{port}")
    yield service, channel
    service.gate.set()
    await channel.close()
    await server.stop(None)


def parts_of(size: int, mark: str = "x") -> TextParts:
    return TextParts(chat_template=mark * size)


async def test_what_many_requests_wait_for_is_fetched_once(
    store: tuple[Store, PeerChannel], model: ServedModel
) -> None:
    service, channel = store
    service.gate.clear()
    voices = Voices.over(channel)
    adapters = [service.resolved(number, TextParts(stop_token_ids=(5,))) for number in range(3)]
    waiting = [asyncio.create_task(voices.of(model, adapters[number % 3])) for number in range(30)]
    await eventually(lambda: service.calls)
    waiting[0].cancel()
    service.gate.set()

    found = await asyncio.gather(*waiting[1:])

    assert len(service.calls) == 1
    assert len({id(voice) for voice in found}) == 1
    assert found[0].defaults.added_stop_ids == {5}
    await voices.close()


async def test_a_model_by_itself_is_not_changed(store: tuple[Store, PeerChannel], model: ServedModel) -> None:
    _, channel = store
    voices = Voices.over(channel)

    assert await voices.of(model, None) is model
    assert await voices.of(model, ResolvedAdapter(name="a", digest="0", base_fingerprint="")) is model
    await voices.close()


async def test_no_more_bytes_are_kept_than_the_bound(store: tuple[Store, PeerChannel], model: ServedModel) -> None:
    service, channel = store
    voices = Voices(text_parts.TextPartsSource(channel), max_bytes=10_000)
    adapters = [service.resolved(number, parts_of(3000, str(number))) for number in range(6)]
    for adapter in adapters:
        await voices.of(model, adapter)
        assert voices.num_bytes <= 10_000
    await voices.of(model, adapters[5])
    await voices.of(model, adapters[0])

    assert service.calls == [adapter.digest for adapter in (*adapters, adapters[0])]
    await voices.close()


@pytest.mark.parametrize("way", ["refuses", "hangs", "sends others", "is gone"])
async def test_a_store_that_does_not_give_them_fails_that_request_and_the_next_one_asks_again(
    store: tuple[Store, PeerChannel], model: ServedModel, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_parts, "FETCH_S", 0.5)
    service, channel = store
    voices, parts = Voices.over(channel), parts_of(10)
    adapter = service.resolved(1, parts)
    if way == "refuses":
        service.failure = StoreUnavailableError("Valkey is away", retry_after_s=1.0)
    elif way == "hangs":
        service.gate.clear()
    elif way == "sends others":
        service.parts[adapter.digest] = parts_of(11)
    else:
        service.failure = AdapterNotFoundError("revision does not exist")
    expected = AdapterNotFoundError if way == "is gone" else StoreUnavailableError

    with pytest.raises(expected):
        await voices.of(model, adapter)

    service.failure, service.parts[adapter.digest] = None, parts
    service.gate.set()
    assert (await voices.of(model, adapter)).text_parts == parts
    await voices.close()


async def test_adapters_that_add_the_same_tokens_share_one_tokenizer_built_once(
    store: tuple[Store, PeerChannel], model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, channel = store
    voices, extended = Voices.over(channel), TokenTable.extended
    built: list[int] = []

    def noted(table: TokenTable, added: Sequence[AddedToken]) -> TokenTable:
        built.append(threading.get_ident())
        return extended(table, added)

    monkeypatch.setattr(TokenTable, "extended", noted)
    tokens = (AddedToken(id=model.info.vocab_size, content="<tool>"),)
    adapters = [
        service.resolved(number, TextParts(added_tokens=tokens, stop_token_ids=(number,))) for number in range(3)
    ]

    found = await asyncio.gather(*(voices.of(model, adapters[number % 3]) for number in range(30)))

    assert len(built) == 1
    assert built[0] != threading.get_ident()
    assert len({id(voice.tokenizer.table) for voice in found}) == 1
    assert found[0].token_ids.first_unknown([0, model.info.vocab_size]) is None
    assert model.token_ids.first_unknown([0, model.info.vocab_size]) == model.info.vocab_size
    await voices.close()


async def test_tokens_that_do_not_fit_the_models_tokenizer_are_refused_by_name(
    store: tuple[Store, PeerChannel], model: ServedModel
) -> None:
    service, channel = store
    voices = Voices.over(channel)
    adapter = service.resolved(1, TextParts(added_tokens=(AddedToken(id=5, content="<tool>"),)))

    with pytest.raises(AdapterIncompatibleError, match="added tokens do not fit the tokenizer of tiny: token '<tool>'"):
        await voices.of(model, adapter)
    await voices.close()


async def test_tokenizers_count_among_the_bytes_that_are_kept(
    store: tuple[Store, PeerChannel], model: ServedModel
) -> None:
    service, channel = store
    voices = Voices(text_parts.TextPartsSource(channel), max_bytes=3 * VOCABULARY_BYTES)
    for number in range(6):
        tokens = (AddedToken(id=model.info.vocab_size, content=f"<{number}>"),)
        await voices.of(model, service.resolved(number, TextParts(added_tokens=tokens)))
        assert voices.num_bytes <= 3 * VOCABULARY_BYTES

    gc.collect()
    assert len(voices._vocabularies._tables) == 2
    await voices.close()


async def test_several_adapters_of_which_one_adds_tokens_are_tokenised_with_them(
    store: tuple[Store, PeerChannel], model: ServedModel
) -> None:
    service, channel = store
    voices = Voices.over(channel)
    tokens = (AddedToken(id=model.info.vocab_size, content="<tool>"),)
    adapters = [
        service.resolved(1, TextParts(added_tokens=tokens)),
        service.resolved(2, TextParts(stop_token_ids=(5,))),
    ]

    voice = await voices.of_all(model, adapters, TextNeeds(has_template=False, has_stops=True))

    assert voice.tokenizer.token_id("<tool>") == model.info.vocab_size
    assert voice.defaults.added_stop_ids == {5}
    await voices.close()
