# SPDX-License-Identifier: Apache-2.0
"""Entry point of the plugin (``vllm.general_plugins``): vLLM calls ``register`` in every process.

Importing this module imports neither torch nor vLLM.
"""

from __future__ import annotations

from contextlib import suppress

CONNECTOR_MODULE = "kvcomm_vllm.connector"


def register() -> None:
    """Make the connector known by name and add our flags; may be called any number of times.

    The connector's module is imported only when an engine uses it. Outside the supported vLLM
    versions nothing is registered. Nothing that goes wrong here stops vLLM: an exception would end
    every process that loads plugins, also where nobody asked for kvcomm.
    """
    from vllm.logger import init_logger

    try:
        problem = _register()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        init_logger("vllm.kvcomm").warning("kvcomm is not available: %s", problem)


def _register() -> str | None:
    from kvcomm_vllm.guards.version import check_vllm

    if (problem := check_vllm()) is not None:
        return problem
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from kvcomm_vllm.compat import cli
    from kvcomm_vllm.compat.parts import CLASSES

    for name, class_name in CLASSES.items():
        with suppress(ValueError):  # registered before
            KVConnectorFactory.register_connector(name, CONNECTOR_MODULE, class_name)
    cli.install()
    return None
