"""``loraplex generate`` and ``loraplex chat``."""

import sys
from typing import Annotated

import typer

from loraplex_client._requests import ChatMessage, GenerateOptions
from loraplex_client._sync.client import Client
from loraplex_client._sync.stream import GenerateStream
from loraplex_client.cli.context import Target, connect, stderr
from loraplex_client.events import Finished

AdapterNames = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="NAME, NAME:LABEL or NAME@REVISION; left out: the base model. May be given again: effects are added up, each "
        "times its weight.",
        metavar="NAME[=WEIGHT]",
    ),
]
ModelName = Annotated[str, typer.Option(help="Base model, where the gateway fronts several.", metavar="NAME")]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="0 always takes the likeliest token.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that reach this probability.")]
TopK = Annotated[int | None, typer.Option(help="Draw from this many likeliest tokens; 0: from all.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1: avoid tokens seen before.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Same seed, same output.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
Stop = Annotated[list[str] | None, typer.Option(help="String that ends the output; may be given again.")]
Stats = Annotated[bool, typer.Option("--stats", help="Print token counts and timings to stderr.")]


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    adapter: AdapterNames = None,
    model: ModelName = "",
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    max_new_tokens: MaxNewTokens = 256,
    stop: Stop = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of the text.")] = False,
    stats: Stats = False,
    target: Target = None,
) -> None:
    """Continue a text, as it is: no chat template."""
    options = GenerateOptions(
        prompt=sys.stdin.read() if prompt == "-" else prompt,
        model=model,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop=stop,
        ignore_eos=ignore_eos or None,
    )
    options.update(_adapters(adapter))
    with connect(context, target) as client:
        _print_stream(client.generate(**options), show_stats=stats)


def chat(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="What to say; - reads it from stdin; left out: a conversation.")
    ] = None,
    adapter: AdapterNames = None,
    model: ModelName = "",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    max_new_tokens: MaxNewTokens = 256,
    stop: Stop = None,
    stats: Stats = False,
    target: Target = None,
) -> None:
    """Talk to the model through its chat template."""
    messages: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
    options = GenerateOptions(
        model=model,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop=stop,
    )
    options.update(_adapters(adapter))
    with connect(context, target) as client:
        if prompt is None:
            _converse(client, messages, options, show_stats=stats)
            return
        messages.append({"role": "user", "content": sys.stdin.read() if prompt == "-" else prompt})
        options["messages"] = messages
        _print_stream(client.generate(**options), show_stats=stats)


def _adapters(given: list[str] | None) -> GenerateOptions:
    """Return the options that name adapters, of ``NAME`` and ``NAME=WEIGHT``."""
    pairs = [_weighted(text) for text in given or ()]
    if len(pairs) > 1:
        return {"adapters": [(name, 1.0 if weight is None else weight) for name, weight in pairs]}
    return {"adapter": pairs[0][0], "adapter_scale": pairs[0][1]} if pairs else {}


def _weighted(text: str) -> tuple[str, float | None]:
    name, equals, weight = text.partition("=")
    try:
        return name, float(weight) if equals else None
    except ValueError:
        raise typer.BadParameter(
            f"{weight!r} is no number: write NAME=WEIGHT, e.g. {name or 'poet'}=0.5", param_hint="--adapter"
        ) from None


def _converse(client: Client, messages: list[ChatMessage], options: GenerateOptions, *, show_stats: bool) -> None:
    """Take turns until end-of-file; Ctrl-C cuts an answer short."""
    if sys.stdin.isatty():
        stderr.print("Ctrl-C stops an answer, Ctrl-D ends the conversation.", style="dim")
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        options["messages"] = messages
        stream = client.generate(**options)
        messages.append({"role": "assistant", "content": _print_stream(stream, show_stats=show_stats, cut=True)})


def _print_stream(stream: GenerateStream, *, show_stats: bool, cut: bool = False) -> str:
    """Print the text as it comes and return it.

    Args:
        stream: What to print.
        show_stats: Print counts and timings at the end.
        cut: Whether an interrupt ends the answer only, not the program.
    """
    text = ""
    with stream:
        try:
            for event in stream:
                sys.stdout.write(event.text)
                sys.stdout.flush()
                text += event.text
                if isinstance(event, Finished) and show_stats:
                    _print_stats(event)
        except KeyboardInterrupt:
            if not cut:
                raise
    sys.stdout.write("\n")
    sys.stdout.flush()
    return text


def _print_stats(finished: Finished) -> None:
    usage, timings = finished.usage, finished.timings
    rate = (usage.output_tokens - 1) / timings.decode_s if timings.decode_s > 0 else 0.0
    stderr.print(
        f"\n{finished.finish_reason.value}: {usage.prompt_tokens} prompt ({usage.cached_tokens} cached) + "
        f"{usage.output_tokens} output tokens; queue {timings.queue_s:.3f} s (adapter {timings.adapter_load_s:.3f} s), "
        f"prefill {timings.prefill_s:.3f} s, decode {timings.decode_s:.3f} s, {rate:.1f} tokens/s",
        style="dim",
    )
