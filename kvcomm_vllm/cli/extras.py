# SPDX-License-Identifier: Apache-2.0
"""What only the measuring commands need: some packages, and the folder ``evaluation``."""

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator

import typer

from kvcomm_vllm.cli.failure import UserError, errors, fail

CLIENT = ("openai", "yaml", "prometheus_client", "psutil")
PICTURE = ("matplotlib",)
TOOLS = "kvcomm_vllm.evaluation"


def lacking(packages: Iterable[str]) -> str | None:
    """The packages that cannot be imported, and what installs them; None if all are there."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)}: pip install '.[bench]' in the checkout" if missing else None


@contextlib.contextmanager
def measuring(command: str, packages: Iterable[str], hint: str = "") -> Iterator[None]:
    """Run a command of `evaluation`; whatever a user can mend ends it with one line.

    Args:
        packages: that it needs.
        hint: how to go on after Ctrl-C.
    """
    if lack := lacking([*packages, TOOLS]):
        fail(f"kvcomm {command} needs {lack}")
    from kvcomm_vllm.config import ConfigError

    try:
        yield
    except (UserError, ConfigError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        errors.print("Interrupted; what was started here has been stopped.")
        if hint:
            errors.print(hint, highlight=False, markup=False)
        raise typer.Exit(130) from None
