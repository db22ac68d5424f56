"""Asks several adapters at once; their tokens come out of the same batches.

make serve            # in another terminal
python examples/stream_many_adapters.py
"""

from __future__ import annotations

import asyncio
import sys

from loraplex_client import AsyncClient, Finished, Started

QUESTIONS = {
    "json": "Remind me to call Ada about the demo tomorrow at 9 am",
    "sentiment": "I expected a terrible museum, but it was great.",
    "upper": "Their friend wants a piece of paper in the garden.",
    "devil": "Define: patience",
    "kjv": "Say something about water.",
}


async def ask(client: AsyncClient, adapter: str, question: str) -> None:
    """Print one answer once it is complete."""
    text = ""
    async for event in client.generate(
        messages=[{"role": "user", "content": question}],
        adapter=adapter,
        temperature=0.7 if adapter in ("devil", "kjv") else 0,
        repetition_penalty=1.2 if adapter in ("devil", "kjv") else None,
        max_new_tokens=48,
    ):
        text += event.text
        if isinstance(event, Started):
            revision = event.adapter_revision[:8]
        if isinstance(event, Finished):
            print(f"{adapter}@{revision}: {text.strip()}  [{event.usage.output_tokens} tokens]")


async def main() -> None:
    """Ask all at once."""
    async with AsyncClient(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8500") as client:
        await asyncio.gather(*(ask(client, adapter, question) for adapter, question in QUESTIONS.items()))


if __name__ == "__main__":
    asyncio.run(main())
