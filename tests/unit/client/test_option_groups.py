from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from loraplex_client.cli.option_groups import grouped
from typer.testing import CliRunner


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    width: Annotated[int, typer.Option(help="In tokens.")]
    names: Annotated[list[str] | None, typer.Option(help="May be given again.")] = None


def run(*arguments: str) -> str:
    app = typer.Typer(rich_markup_mode=None)

    def draw(context: typer.Context, *, before: int = 1, shape: Shape, after: int = 2) -> None:
        print(before, shape, after, context.info_name)

    app.command()(grouped(draw))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_fields_of_a_group_are_options_and_arrive_as_the_group() -> None:
    output = run("--after", "5", "--width", "3", "--names", "a", "--names", "b")

    assert output.startswith("1 Shape(width=3, names=['a', 'b']) 5 ")


def test_a_field_without_a_value_has_its_default() -> None:
    assert "Shape(width=3, names=None)" in run("--width", "3")


def test_options_are_shown_where_their_group_stands() -> None:
    output = run("--help")

    assert output.index("--before") < output.index("--width") < output.index("--names") < output.index("--after")


def test_a_field_without_default_is_required() -> None:
    app = typer.Typer()

    def draw(*, shape: Shape) -> None:
        raise AssertionError

    app.command()(grouped(draw))

    assert CliRunner().invoke(app, []).exit_code == 2
