"""Names in traces: spans, attributes and events; OpenTelemetry's semantic conventions where they have one.

Source: OpenTelemetry semantic conventions for generative AI (``gen_ai.*``, in development) and errors, v1.41. They are pinned
here: no other module writes such a name, and a later version of the conventions changes this file alone.
"""

from typing import Final

# Spans. The gateway's is "{operation} {model}", as the conventions have it.
OPERATION_CHAT: Final = "chat"
OPERATION_COMPLETION: Final = "text_completion"
ENGINE_REQUEST: Final = "engine.request"
STORE_TRANSFER: Final = "adapter_store.transfer"

# Attributes of the conventions.
OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_ID: Final = "gen_ai.response.id"
MAX_TOKENS: Final = "gen_ai.request.max_tokens"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
TIME_TO_FIRST_TOKEN: Final = "gen_ai.server.time_to_first_token"
ERROR_TYPE: Final = "error.type"

# Attributes of ours.
TENANT: Final = "loraplex.tenant"
ADAPTER: Final = "loraplex.adapter.name"
REVISION: Final = "loraplex.adapter.revision"
REQUEST_ID: Final = "loraplex.request_id"
ENGINE_ID: Final = "loraplex.engine.id"
ATTEMPTS: Final = "loraplex.attempts"
USAGE_ID: Final = "loraplex.usage_id"
QUEUE_S: Final = "loraplex.queue_seconds"
ADAPTER_LOAD_S: Final = "loraplex.adapter_load_seconds"
PREFILL_S: Final = "loraplex.prefill_seconds"
DECODE_S: Final = "loraplex.decode_seconds"
KV_PAGE_S: Final = "loraplex.kv_page_seconds"
ADAPTER_PAGE_S: Final = "loraplex.adapter_page_seconds"
NUM_RESUMED: Final = "loraplex.resumed_tokens"

# Events of spans.
QUEUED: Final = "queued"
ADMITTED: Final = "admitted"
STARTED: Final = "started"
FIRST_TOKEN: Final = "first_token"

PROVIDER_NAME: Final = "loraplex"
