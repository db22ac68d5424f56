"""What can go wrong on the way to the demo's base model."""


class DemoModelError(Exception):
    """The demo's base model cannot be had; the message says why."""


class ConversionError(DemoModelError, ValueError):
    """The GGUF file holds something that the converter does not know; the message names it."""


class FetchError(DemoModelError, RuntimeError):
    """The model could not be downloaded, or what came is not it; the message says what to try."""
