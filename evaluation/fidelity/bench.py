# SPDX-License-Identifier: Apache-2.0
"""One engine in this process, in which agents speak under any mode and are listened to."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kvcomm_vllm.cli.failure import UserError
from kvcomm_vllm.cli.machine import is_cpu_build, serving_dtype
from kvcomm_vllm.cli.serve_command import CPU_BLOCK_TOKENS, max_model_tokens
from kvcomm_vllm.evaluation.fidelity.tape import Tape
from kvcomm_vllm.evaluation.modes import DENSE
from kvcomm_vllm.evaluation.workloads.case import Case, fill
from kvcomm_vllm.reasons import Reason, Scope

MESSAGE_TOKENS = 120
MOST_TOKENS = 4096
RESTING_SECONDS = 0.05  # between two looks whether there is something to do
MOST_STEPS = 1_000_000  # of learning after one request; far more than any prompt has pieces
# Anchors come from training cases alone: what is scored must not teach. Sources are as they were
# served.
PLUGIN: dict[str, Any] = {
    "mode": "anchor",
    "audits": False,
    "heal": "off",
    "audit_idle_seconds": 0.0,
    "audit_share": 1.0,
}


class BenchError(UserError, RuntimeError):
    """The engine or the prompts do not allow the comparison; the message says why."""


@dataclass(frozen=True)
class Run:
    """One answer: token ids, log-probabilities of the steps listened to, the plugin's report."""

    tokens: list[int]
    steps: list[torch.Tensor]
    report: dict[str, Any]


@dataclass(frozen=True)
class Script:
    """Token ids of each agent's prompt, and of each answer but the last."""

    prompts: list[list[int]]
    messages: list[list[int]]


class Bench:
    """vLLM with the plugin in this process.

    Args:
        model: folder or Hugging Face id.
        plugin: configuration of the plugin, over ``PLUGIN``.
        options: of vLLM's ``LLM``, over the defaults here.

    Raises:
        BenchError: vLLM cannot start.
    """

    def __init__(
        self, model: str, plugin: Mapping[str, Any] = MappingProxyType({}), **options: Any
    ) -> None:
        limit = min(MOST_TOKENS, max_model_tokens(model) or MOST_TOKENS)
        defaults: dict[str, Any] = {"max_model_len": limit, "disable_log_stats": True, "seed": 0}
        # In one piece each: the tape would take a prompt's parts for tokens of the answer.
        defaults["max_num_batched_tokens"] = limit
        if is_cpu_build():
            defaults |= {"enforce_eager": True, "block_size": CPU_BLOCK_TOKENS}
        defaults["dtype"] = serving_dtype()
        transfer = KVTransferConfig(
            kv_connector="kvcomm", kv_role="kv_both", kv_connector_extra_config={**PLUGIN, **plugin}
        )
        try:
            self.llm = LLM(
                model=model,
                kv_transfer_config=transfer,
                logits_processors=[Tape],
                **{**defaults, **options},
            )
        except Exception as error:  # of a dozen kinds, from a missing folder to a lack of memory
            first = str(error).strip().splitlines() or [type(error).__name__]
            raise BenchError(f"vLLM cannot serve {model}: {' '.join(first)}") from error
        self.client: Any = self.llm.llm_engine.engine_core
        if not hasattr(self.client, "engine_core"):
            raise BenchError("VLLM_ENABLE_V1_MULTIPROCESSING=0 is needed to read distributions")
        self.tokenizer: Any = self.llm.get_tokenizer()
        self.max_tokens = int(self.llm.llm_engine.model_config.max_model_len)
        self._scripts: dict[Case, Script] = {}

    def close(self) -> None:
        """Stop the engine; a process can start another one after it."""
        self.client.shutdown()

    def run(
        self,
        prompt: list[int],
        hints: dict[str, Any],
        salt: str,
        *,
        tokens: int = 1,
        force: list[int] | None = None,
        listen: int = 0,
    ) -> Run:
        """A greedy answer of ``tokens`` at most, or the one that is forced.

        Raises:
            BenchError: the prompt is too long, or the plugin is off in this engine.
        """
        Tape.rewind(listen, force)
        (output,) = self._generate([prompt], hints, salt, tokens, force is not None)
        report = (output.kv_transfer_params or {}).get("kvcomm")
        if report is None:
            raise BenchError("reuse is off: vLLM runs without the plugin with this model")
        for word in report["declined"]:
            if Reason.of(word).scope is Scope.ENGINE:
                raise BenchError(f"reuse is off: {Reason.of(word).explanation}")
        return Run(list(output.outputs[0].token_ids), list(Tape.steps), report)

    def follow(self, prompt: list[int], answer: list[int], hints: dict[str, Any], salt: str) -> Run:
        """The distributions along an answer that is given.

        Raises:
            BenchError: see :meth:`run`.
        """
        count = len(answer)
        return self.run(prompt, hints, salt, tokens=count, force=answer, listen=count)

    def answers(
        self, prompts: list[list[int]], hints: dict[str, Any], salt: str, tokens: int
    ) -> list[list[int]]:
        """Greedy answers to prompts that are sent at once, which takes little longer than one.

        Raises:
            BenchError: a prompt is too long.
        """
        Tape.rewind(0, None)
        outputs = self._generate(prompts, hints, salt, tokens)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _generate(
        self,
        prompts: list[list[int]],
        hints: dict[str, Any],
        salt: str,
        tokens: int,
        ignore_eos: bool = False,
    ) -> list[Any]:
        longest = max(map(len, prompts))
        if longest + tokens > self.max_tokens:
            need = f"{longest} tokens and {tokens} for the answer"
            raise BenchError(f"a prompt has {need}, the engine takes {self.max_tokens} in all")
        extra = {"kv_transfer_params": {"kvcomm": hints}}
        params = SamplingParams(
            temperature=0, max_tokens=tokens, extra_args=extra, ignore_eos=ignore_eos
        )
        requests: Any = [{"prompt_token_ids": prompt, "cache_salt": salt} for prompt in prompts]
        outputs: list[Any] = self.llm.generate(requests, params, use_tqdm=False)
        return outputs

    def anchor_bytes(self) -> dict[str, int]:
        """Bytes by placeholder, of those with anchors; none where there is no room for them."""
        scheduler = self.client.engine_core.scheduler.connector._scheduler
        worker = get_kv_transfer_group()._worker
        if worker.ready is None:
            return {}
        learned, arena = (worker.ready.corrections[name] for name in ("anchor", "paper"))
        anchor, paper = (scheduler.modes[name] for name in ("anchor", "paper"))
        held = dict.fromkeys(anchor.table.taught(), learned.bytes_per_placeholder)
        rows = paper.table.rows()
        return held | {key: count * arena.row_bytes for key, count in rows.items()}

    def rest(self, seconds: float) -> None:
        """So long nobody asks anything, and the plugin may do what it does when it is idle."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.client.engine_core.scheduler.has_requests():
                self.client.get_output()
            else:
                time.sleep(RESTING_SECONDS)

    def settle(self) -> None:
        """Let the plugin learn until nothing waits to be learned.

        Raises:
            BenchError: it does not come to an end.
        """
        for _ in range(MOST_STEPS):
            if not self.client.engine_core.scheduler.has_requests():
                return
            self.client.get_output()
        raise BenchError("the plugin has not finished learning")

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def rehearse(self, cases: Sequence[Case]) -> None:
        """Write the scripts of these cases: messages are the model's own dense answers, where the
        case does not say what was answered.
        """
        drafts = [(case, Script([], [])) for case in cases if case not in self._scripts]
        while drafts:
            for case, script in drafts:
                turn = case.turns[len(script.prompts)]
                user = fill(turn.user, [self.decode(message) for message in script.messages])
                script.prompts.append(chat_prompt(self.tokenizer, turn.system, user))
                if len(script.prompts) == len(case.turns):
                    self._scripts[case] = script
                elif turn.reply:
                    script.messages.append(self.encode(turn.reply))
            drafts = [(case, script) for case, script in drafts if case not in self._scripts]
            asked = [script for _, script in drafts if len(script.messages) < len(script.prompts)]
            prompts = [script.prompts[-1] for script in asked]
            said = self.answers(prompts, DENSE, "messages", MESSAGE_TOKENS) if asked else []
            for script, message in zip(asked, said, strict=True):
                script.messages.append(message)

    def script(self, case: Case) -> Script:
        """The prompts of all agents. Kept, as every mode is given the same."""
        self.rehearse([case])
        return self._scripts[case]


def chat_prompt(tokenizer: Any, system: str, user: str) -> list[int]:
    """The prompt as the model's chat template has it, plain text where there is none.

    Args:
        tokenizer: of the transformers library.
        system: instructions; empty = none. Templates without a place for them get them in front
            of the user's text.
    """
    if tokenizer.chat_template is None:
        text = f"{system}\n\n{user}\n\n".lstrip()
        return list(tokenizer(text)["input_ids"])
    chat = [{"role": "user", "content": user}]
    if system:
        try:
            return _templated(tokenizer, [{"role": "system", "content": system}, *chat])
        except TemplateError:
            chat = [{"role": "user", "content": f"{system}\n\n{user}"}]
    return _templated(tokenizer, chat)


def _templated(tokenizer: Any, chat: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
