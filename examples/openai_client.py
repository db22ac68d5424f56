"""The official openai client against loraplex: the adapter is the model.

pip install openai
make serve            # in another terminal
python examples/openai_client.py
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main() -> None:
    """List what can be asked, then stream one answer."""
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8501"
    client = OpenAI(base_url=f"http://{address}/v1", api_key="not needed")
    print("models:", ", ".join(model.id for model in client.models.list()))
    stream = client.chat.completions.create(
        model="json",
        messages=[{"role": "user", "content": "Book a flight from Oslo to Rome on Friday for Ada"}],
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
