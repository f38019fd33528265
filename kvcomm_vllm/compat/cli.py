# SPDX-License-Identifier: Apache-2.0
"""Our flags on vLLM's command line, our checks before vLLM builds an engine, and what we add to the
front end of an engine that is ours.

vLLM has no hook for any of them, so two methods of ``EngineArgs`` are wrapped (same names in 0.20
to 0.33): ``add_cli_args`` and ``create_model_config``, which every way to start an engine goes
through before it looks at ``kv_transfer_config``; and, where that names us, those of the front end
through which hints and reports go (:func:`wrap_front_end`).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from vllm.config import KVTransferConfig, ModelConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.logger import init_logger

from kvcomm_vllm.compat.hybrid import beside_hybrid, choose, keep_findable, wants_hybrid
from kvcomm_vllm.compat.offload import unknown_tiers
from kvcomm_vllm.compat.parts import NAMES, other_parts, our_parts, with_part, without_us
from kvcomm_vllm.compat.rules import asks_for_tiers
from kvcomm_vllm.config import ConfigError, KVCommConfig
from kvcomm_vllm.config.address import Address
from kvcomm_vllm.config.file import load_file
from kvcomm_vllm.front import hints_http, late_reports, stream_reports
from kvcomm_vllm.front.carried_hints import with_carried_hints
from kvcomm_vllm.guards.arguments import unsupported_arguments
from kvcomm_vllm.guards.model import unsupported_model

# Only loggers below "vllm" have a handler.
logger = init_logger("vllm.kvcomm")

# To vLLM a consumer is sent KV by other engines: for one (``kv_both`` is one) it accepts embeddings
# and holds freed pages back. A producer differs from it in nothing else that it does.
ROLE = "kv_producer"
_EXTRA = "kv_connector_extra_config"
MIDDLEWARE = (hints_http.MIDDLEWARE, stream_reports.MIDDLEWARE)
_BOTH = (
    "--kv-transfer-config and --kv-connector/--kvcomm-config both say which KV connector to use; "
    "give one of them (kvcomm can be one of the connectors of a MultiConnector: docs/connectors.md)"
)
# Where the front end makes requests and answers: module, class.
_LLM_ENGINE = ("vllm.v1.engine.llm_engine", "LLMEngine")
_ASYNC_ENGINE = ("vllm.v1.engine.async_llm", "AsyncLLM")
_OUTPUTS = ("vllm.v1.engine.output_processor", "RequestState")
_BATCHES = ("vllm.entrypoints.openai.chat_completion.batch_serving", "OpenAIServingChatBatch")
_TEXTS = ("vllm.entrypoints.openai.completion.serving", "OpenAIServingCompletion")
_DESCRIPTION = """Reuse of other requests' KV cache at any place of a prompt (kvcomm_vllm)."""
_CONNECTOR_HELP = (
    "KV connector to use. kvcomm lets agents reuse the KV cache of text that another agent's "
    "request has already computed, wherever it stands in their own prompts."
)
_CONFIG_HELP = (
    "YAML file with settings for kvcomm; implies --kv-connector kvcomm. Keys and defaults: "
    f"{KVCommConfig().describe()}."
)


def install() -> None:
    """Wrap ``EngineArgs``; does nothing the second time."""
    if hasattr(EngineArgs.add_cli_args, "__wrapped__"):
        return
    add_cli_args, create_model_config = EngineArgs.add_cli_args, EngineArgs.create_model_config

    @functools.wraps(add_cli_args)
    def with_our_flags(parser: Any) -> Any:
        return add_flags(add_cli_args(parser))

    @functools.wraps(create_model_config)
    def with_our_checks(self: EngineArgs) -> ModelConfig:
        model = create_model_config(self)
        check_engine(self, model)
        if our_parts(self.kv_transfer_config):
            wrap_front_end(isinstance(self, AsyncEngineArgs))
        return model

    EngineArgs.add_cli_args = staticmethod(with_our_flags)
    EngineArgs.create_model_config = with_our_checks


def wrap_front_end(serving: bool) -> None:
    """Let hints reach every engine request, and reports every answer, in the process that makes
    the requests; does nothing the second time.

    Args:
        serving: for the asynchronous engine and its HTTP API; otherwise for ``LLM``.
    """
    engine = _ASYNC_ENGINE if serving else _LLM_ENGINE
    _wrap(*engine, "add_request", with_hints, "request_id prompt params")
    output = "new_token_ids pooling_output finish_reason stop_reason kv_transfer_params"
    _wrap(*_OUTPUTS, "make_request_output", late_reports.with_kept_report, output)
    if serving:
        begin = "request_id external_req_id parent_req request_index"
        _wrap(*_OUTPUTS, "__init__", stream_reports.with_listener, begin)
        chat, text = late_reports.with_batch_reports, late_reports.with_choices_reports
        _wrap(*_BATCHES, "chat_completion_full_generator_batch", chat, "request generators")
        _wrap(*_TEXTS, "request_output_to_completion_response", text, "final_res_batch")


def with_hints(add_request: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``add_request`` of an engine: all that is asked of it comes through there."""

    def with_request_hints(
        self: Any, request_id: Any, prompt: Any, params: Any, *rest: Any, **named: Any
    ) -> Any:
        return add_request(self, request_id, prompt, with_carried_hints(params), *rest, **named)

    return with_request_hints


def _wrap(
    module: str,
    owner: str,
    name: str,
    wrapper: Callable[[Callable[..., Any]], Callable[..., Any]],
    arguments: str,
) -> None:
    """Wrap a method, once, if its first arguments behind ``self`` have these names; otherwise the
    front end works as vLLM made it.
    """
    try:
        holder = getattr(import_module(module), owner)
        found = getattr(holder, name)
        if getattr(found, "kvcomm_wraps", False):
            return
        _, *names = inspect.signature(found).parameters
        if names[: len(arguments.split())] != arguments.split():
            raise TypeError(f"its arguments are {names}")
        wrapped = functools.wraps(found)(wrapper(found))
        wrapped.kvcomm_wraps = True  # type: ignore[attr-defined]
        setattr(holder, name, wrapped)
    except Exception as error:
        logger.warning(
            "kvcomm: %s.%s cannot be wrapped (%s: %s): hints do not reach requests that vLLM makes "
            "itself, or some answers have no report",
            *(owner, name, type(error).__name__, error),
        )


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """``parser`` with our two flags; one that this vLLM has come to own is left alone."""
    known = parser._option_string_actions
    group = parser.add_argument_group("KVCommConfig", _DESCRIPTION)
    if "--kv-connector" not in known:
        group.add_argument(
            "--kv-connector",
            dest="kvcomm_connector",
            action=_OurFlag,
            type=_connector_name,
            metavar="NAME",
            help=_CONNECTOR_HELP,
        )
    if "--kvcomm-config" not in known:
        group.add_argument("--kvcomm-config", action=_OurFlag, metavar="FILE", help=_CONFIG_HELP)
    if "--kv-transfer-config" in known:
        known["--kv-transfer-config"].__class__ = _TransferConfigFlag
    return parser


def transfer_config(path: str | None) -> KVTransferConfig:
    """What ``--kv-connector kvcomm [--kvcomm-config path]`` stands for.

    Raises:
        ConfigError: see :func:`kvcomm_vllm.config.file.load_file`, and
            :func:`refuse_what_is_not_here`.
    """
    config = KVCommConfig() if path is None else load_file(path)
    refuse_what_is_not_here(config, str(path))
    return KVTransferConfig(
        kv_connector="kvcomm",
        kv_role=ROLE,
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=_told(config, as_given=True),
    )


def _told(config: KVCommConfig, *, as_given: bool = False) -> dict[str, Any]:
    """Our configuration as vLLM gets it, which logs its arguments: without a password in sight."""
    mapping = config.to_mapping(as_given=as_given)
    mapping["tiers"]["shared"] = Address(config.tiers.shared)
    mapping["tiers"]["secondary_tiers"] = config.tiers.secondary_tiers or []
    return mapping


def checked(config: KVTransferConfig) -> KVCommConfig:
    """Our configuration inside a ``KVTransferConfig`` that selects us, or has us among its parts.

    Raises:
        ConfigError: a key or value is refused, the role is ``kv_consumer``, or we are there twice.
    """
    config, *again = our_parts(config)
    if again:
        raise ConfigError("connectors: kvcomm is one of them more than once")
    if config.kv_role not in (ROLE, "kv_both"):
        raise ConfigError(
            f"kv_role: {config.kv_role!r} is not allowed; allowed: {ROLE}, kv_both (which is taken "
            f"for {ROLE})"
        )
    found = KVCommConfig.from_mapping(config.kv_connector_extra_config, _EXTRA)
    refuse_what_is_not_here(found, _EXTRA)
    return found


def refuse_what_is_not_here(config: KVCommConfig, origin: str) -> None:
    """Raises:
    ConfigError: a tier's type is none that vLLM knows, or the trace cannot be written.
    """
    problems = [*unknown_tiers(config.tiers), *config.trace.problems()]
    if problems:
        raise ConfigError.of(problems, origin)


def check_engine(args: EngineArgs, model: ModelConfig) -> None:
    """Validate our configuration in ``args``; drop it, with one warning, if reuse cannot work.

    Whatever was asked for, the role becomes the one that changes nothing for clients, and a load
    that fails is computed again where vLLM can (the connector sees to the others): vLLM's default
    is to answer such a request with an error, and a default cannot be told from a wish.

    Raises:
        ConfigError: see :func:`checked`.
    """
    if isinstance(args.kv_transfer_config, dict):
        args.kv_transfer_config = KVTransferConfig(**args.kv_transfer_config)
    transfer = args.kv_transfer_config
    if transfer is None or not our_parts(transfer):
        return
    config = checked(transfer)
    # With several API servers their parent (rank -1) has already said it.
    quiet = args._api_process_count > 1 and args._api_process_rank >= 0
    hybrid = wants_hybrid(config, args, model)
    beside = beside_hybrid(config, args, model) if hybrid else None
    hybrid = hybrid and beside is None
    copied = asks_for_tiers(args, config) or bool(other_parts(transfer))
    reason = unsupported_model(model, copied) or unsupported_arguments(
        args, transfer, config, model, hybrid
    )
    if reason is not None:
        args.kv_transfer_config = without_us(transfer)
        if not quiet:
            others = ", ".join(other_parts(transfer))
            logger.warning(
                "KV reuse is off (%s): %s The engine starts without kvcomm and serves exactly.%s",
                reason,
                reason.explanation,
                f" Its other connectors stay: {others}." if others else "",
            )
        return
    (ours,) = our_parts(transfer)
    ours = choose(with_host_pool(args, ours, config), hybrid)
    if hybrid:
        keep_findable(args)
    elif args.disable_hybrid_kv_cache_manager is False:
        # Without windowed layers it changes nothing, but vLLM would refuse it beside our connector.
        args.disable_hybrid_kv_cache_manager = None
    if transfer.kv_load_failure_policy != "recompute" and not quiet:
        logger.info("kv_load_failure_policy is set: failed loads are computed where vLLM can")
    if not quiet:
        if beside is not None:
            logger.warning("hybrid_kv_cache has no effect beside %s", beside)
        for warning in config.warnings():
            logger.warning("%s", warning)
    if config.moved or config.tiers.confidential:  # what has moved has been said now
        ours = dataclasses.replace(ours, kv_connector_extra_config=_told(config))
    ours = dataclasses.replace(ours, kv_role=ROLE, kv_load_failure_policy="recompute")
    whole = dataclasses.replace(transfer, kv_load_failure_policy="recompute")
    args.kv_transfer_config = with_part(whole, ours)


def with_host_pool(
    args: EngineArgs, transfer: KVTransferConfig, config: KVCommConfig
) -> KVTransferConfig:
    """``--kv-offloading-size`` is the size of our host pool then, and installs no other connector.

    Raises:
        ConfigError: ``tiers.host_gb`` says another size.
    """
    size, args.kv_offloading_size = args.kv_offloading_size, None
    if size is None:
        return transfer
    if config.tiers.wanted and config.tiers.host_gb != size:
        raise ConfigError(
            f"tiers.host_gb: {config.tiers.host_gb} is not what --kv-offloading-size says "
            f"({size}); give one of them"
        )
    given = dict(transfer.kv_connector_extra_config)
    given["tiers"] = {**given.get("tiers", {}), "host_gb": float(size)}
    return dataclasses.replace(transfer, kv_connector_extra_config=given)


class _OurFlag(argparse.Action):
    """Rebuilds ``kv_transfer_config`` from our flags as far as they have been parsed."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if not _flags_given(namespace) and namespace.kv_transfer_config is not None:
            parser.error(_BOTH)
        setattr(namespace, self.dest, values)
        try:
            namespace.kv_transfer_config = transfer_config(
                getattr(namespace, "kvcomm_config", None)
            )
        except ConfigError as error:
            parser.error(f"argument --kvcomm-config: {error}")
        _add_middleware(namespace)


class _TransferConfigFlag(argparse.Action):
    """vLLM's ``--kv-transfer-config``, with our part of it checked as it is parsed."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if _flags_given(namespace):
            parser.error(_BOTH)
        if parts := our_parts(values):
            try:
                config = checked(values)
            except ConfigError as error:
                parser.error(f"argument --kv-transfer-config: {error}")
            if config.tiers.confidential:
                extra = _told(config, as_given=True)
                ours = dataclasses.replace(parts[0], kv_connector_extra_config=extra)
                values = with_part(values, ours)
            _add_middleware(namespace)
        setattr(namespace, self.dest, values)


def _flags_given(namespace: argparse.Namespace) -> bool:
    ours = ("kvcomm_connector", "kvcomm_config")
    return any(getattr(namespace, name, None) is not None for name in ours)


def _connector_name(value: str) -> str:
    if value != NAMES[0]:
        raise argparse.ArgumentTypeError(
            f"{value!r} is not allowed; allowed: {NAMES[0]} "
            "(other connectors are chosen with --kv-transfer-config)"
        )
    return value


def _add_middleware(namespace: argparse.Namespace) -> None:
    """First in the list is next to the routes: what others make of a body, ours sees as well, and
    what ours makes of a response, they see.
    """
    given = getattr(namespace, "middleware", None)
    if given is not None:
        namespace.middleware = [*(one for one in MIDDLEWARE if one not in given), *given]
