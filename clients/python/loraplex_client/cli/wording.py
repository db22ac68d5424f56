"""Messages of the services in the words of the command line."""

from typing import Final

FLAGS: Final = {"`base_model`": "--base-model"}
"""Fields of requests, as messages quote them, and the flags that set them."""


def as_flags(message: str) -> str:
    """Return a message that names flags where it named fields of a request."""
    for field, flag in FLAGS.items():
        message = message.replace(field, flag)
    return message
