# SPDX-License-Identifier: Apache-2.0
"""How a command ends that cannot go on: one line for the user, no traceback."""

from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

errors = Console(stderr=True)


class UserError(Exception):
    """What a user can do something about; the message says what is wrong and where."""


def fail(message: str) -> NoReturn:
    """Print the message and exit with status 1."""
    text = f"[bold red]Error:[/bold red] {escape(message)}"
    errors.print(text, highlight=False, soft_wrap=True)
    raise typer.Exit(1)
