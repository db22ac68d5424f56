"""Client library and command line of loraplex.

`Client` and `AsyncClient` generate text through a gateway and manage adapters in a store. Failures are the classes of
`loraplex_common.errors`, all below `LoraplexError`.
"""

from loraplex_common.errors import LoraplexError
from loraplex_common.version import package_version

from loraplex_client._aio.adapters import AsyncAdapters
from loraplex_client._aio.client import AsyncClient
from loraplex_client._aio.stream import AsyncGenerateStream
from loraplex_client._push import push
from loraplex_client._push_messages import RawTensor
from loraplex_client._requests import ChatMessage, GenerateOptions, PromptOptions
from loraplex_client._sync.adapters import Adapters
from loraplex_client._sync.client import Client
from loraplex_client._sync.stream import GenerateStream
from loraplex_client.events import (
    Accepted,
    AdapterLoading,
    Chunk,
    Completion,
    Event,
    Finished,
    FinishReason,
    PositionLogprobs,
    Queued,
    Started,
    Tier,
    Timings,
    TokenLogprob,
    Usage,
)
from loraplex_client.report import AdapterReport, ReportImage, ReportModule, ReportNotes, ReportPart
from loraplex_client.resources import (
    Adapter,
    AdapterState,
    ImportProgress,
    ImportResult,
    ImportStage,
    LabelMove,
    Model,
    PushResult,
    Revision,
    RollBack,
)

__version__ = package_version()

__all__ = [
    "Accepted",
    "Adapter",
    "AdapterLoading",
    "AdapterReport",
    "AdapterState",
    "Adapters",
    "AsyncAdapters",
    "AsyncClient",
    "AsyncGenerateStream",
    "ChatMessage",
    "Chunk",
    "Client",
    "Completion",
    "Event",
    "FinishReason",
    "Finished",
    "GenerateOptions",
    "GenerateStream",
    "ImportProgress",
    "ImportResult",
    "ImportStage",
    "LabelMove",
    "LoraplexError",
    "Model",
    "PositionLogprobs",
    "PromptOptions",
    "PushResult",
    "Queued",
    "RawTensor",
    "ReportImage",
    "ReportModule",
    "ReportNotes",
    "ReportPart",
    "Revision",
    "RollBack",
    "Started",
    "Tier",
    "Timings",
    "TokenLogprob",
    "Usage",
    "__version__",
    "push",
]
