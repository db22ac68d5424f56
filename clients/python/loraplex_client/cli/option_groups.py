"""Options in groups: a dataclass of a command's parameters is as many options on the command line."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

Command = Callable[..., None]


def grouped(command: Command) -> Command:
    """Let a command take dataclasses whose fields are options; the command line shows the fields in their place.

    Fields are annotated as parameters of commands are: ``rate: Annotated[float, typer.Option(...)] = 1.0``.
    """
    own = inspect.signature(command, eval_str=True)
    groups = {name: parameter.annotation for name, parameter in own.parameters.items() if _is_group(parameter)}

    @functools.wraps(command)
    def flat(*positional: Any, **arguments: Any) -> None:
        for name, group in groups.items():
            arguments[name] = group(**{field.name: arguments.pop(field.name) for field in dataclasses.fields(group)})
        command(*positional, **arguments)

    parameters = [shown for parameter in own.parameters.values() for shown in _shown(parameter)]
    flat.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _is_group(parameter: inspect.Parameter) -> bool:
    return isinstance(parameter.annotation, type) and dataclasses.is_dataclass(parameter.annotation)


def _shown(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    """Return what typer sees of a parameter; by keyword only, because a group may mix fields with and without default."""
    if not _is_group(parameter):
        return [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    hints = get_type_hints(parameter.annotation, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(parameter.annotation)
    ]
