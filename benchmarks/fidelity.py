# SPDX-License-Identifier: Apache-2.0
"""How far answers with reused KV are from dense ones: KL per token along the dense greedy answer.

Three agents on GSM8K: an analyst, a solver who reads the analyst, an inspector who reads both. The
inspector's prompt is ``p0 | question | p1 | message a | p2 | message b | tail``; its dense greedy
answer is forced on every mode, token by token, and the distributions are compared: KL(dense ||
mode) in nats, at the first token and on average, and argmax agreement.

``python benchmarks/fidelity.py --model DIR [--questions FILE] [--prompts 10] [--tokens 24] [--json
F]``; without a file of questions those packaged with the demo are used.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the tape below is read in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.v1.sample.logits_processor import LogitsProcessor

QUESTIONS = Path(__file__).parent.parent / "kvcomm_vllm/cli/data/questions.jsonl"
MODES: dict[str, dict[str, Any]] = {
    "rotate": {"mode": "rotate"},
    "seam 4": {"mode": "seam", "seam_tokens": 4},
    "seam 16": {"mode": "seam", "seam_tokens": 16},
    "seam 32": {"mode": "seam", "seam_tokens": 32},
}
ANALYST = (
    "You are the Analyst of a team. Name the quantities in the question and how they depend on "
    "each other."
)
SOLVER = (
    "You are the Solver of a team. Use the Analyst's notes to work out the answer step by step."
)
INSPECTOR = (
    "You are the Inspector of a team. Check the Solver's work and state the final answer as a "
    "number."
)


class Tape(LogitsProcessor):
    """Records the distribution of each step of the one running request, and forces given tokens on
    it.
    """

    forced: list[int] | None = None
    steps: ClassVar[list[torch.Tensor]] = []

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        step = len(Tape.steps)
        Tape.steps.append(torch.log_softmax(logits[0].double(), dim=-1))
        if Tape.forced is not None:
            logits.fill_(float("-inf"))
            logits[0, Tape.forced[step]] = 0.0
        return logits


@dataclass(frozen=True)
class Case:
    """One question with the messages of its first two agents, as token ids of whole prompts."""

    analyst: list[int]
    message_a: list[int]
    solver: list[int]
    message_b: list[int]
    inspector: list[int]


class Bench:
    def __init__(self, model: str, **options: Any) -> None:
        defaults: dict[str, Any] = {"block_size": 32, "max_model_len": 4096, "enforce_eager": True}
        self.llm = LLM(
            model=model,
            kv_transfer_config=KVTransferConfig(kv_connector="kvcomm", kv_role="kv_both"),
            logits_processors=[Tape],
            disable_log_stats=True,
            **{**defaults, **options},
        )
        self.tokenizer = self.llm.get_tokenizer()

    def run(
        self,
        prompt: list[int],
        hints: dict[str, Any],
        salt: str,
        tokens: int = 1,
        force: list[int] | None = None,
    ) -> tuple[list[int], list[torch.Tensor], dict[str, Any]]:
        """Token ids, distributions and the plugin's report of one answer."""
        Tape.forced, Tape.steps = force, []
        extra = {"kv_transfer_params": {"kvcomm": hints}}
        params = SamplingParams(
            temperature=0, max_tokens=tokens, extra_args=extra, ignore_eos=force is not None
        )
        request = {"prompt_token_ids": prompt, "cache_salt": salt}
        output = self.llm.generate([request], params, use_tqdm=False)[0]
        return list(output.outputs[0].token_ids), Tape.steps, output.kv_transfer_params["kvcomm"]

    def prompt(self, system: str, user: str) -> list[int]:
        chat = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def case(self, question: str, message_tokens: int = 120) -> Case:
        """Messages are the model's own dense answers."""

        def said(prompt: list[int]) -> tuple[list[int], str]:
            ids, _, _ = self.run(prompt, {"mode": "off"}, "messages", message_tokens)
            return ids, self.tokenizer.decode(ids, skip_special_tokens=True).strip()

        user = f"Question:\n{question}\n\n"
        analyst = self.prompt(ANALYST, user + "List the quantities.")
        ids_a, a = said(analyst)
        user += f"The Analyst said:\n{a}\n\n"
        solver = self.prompt(SOLVER, user + "Solve the question.")
        ids_b, b = said(solver)
        user += f"The Solver said:\n{b}\n\n"
        inspector = self.prompt(INSPECTOR, user + "What is the final answer?")
        return Case(analyst, ids_a, solver, ids_b, inspector)

    def compare(
        self, case: Case, name: str, modes: dict[str, dict[str, Any]], tokens: int
    ) -> dict[str, Any]:
        """Scores of each mode on one case. Every mode has its own cache, in which the agents have
        spoken before.
        """
        exact = {"mode": "off"}
        answer, dense, _ = self.run(case.inspector, exact, f"{name} dense", tokens)
        scores: dict[str, Any] = {}
        for mode, hints in modes.items():
            salt = f"{name} {mode}"
            self.run(case.analyst + case.message_a, hints, salt)
            self.run(case.solver + case.message_b, hints, salt)
            _, steps, report = self.run(case.inspector, hints, salt, len(answer), force=answer)
            scores[mode] = {
                **divergence(dense, steps),
                "reused": report["reused"] / report["prompt_tokens"],
            }
        return scores


def divergence(dense: list[torch.Tensor], other: list[torch.Tensor]) -> dict[str, float]:
    """KL1, KLmean (nats) and argmax agreement of two lists of log-distributions over the same
    tokens.
    """
    kl = [float((p.exp() * (p - q)).sum()) for p, q in zip(dense, other, strict=True)]
    same = [bool(p.argmax() == q.argmax()) for p, q in zip(dense, other, strict=True)]
    return {"kl1": kl[0], "kl_mean": statistics.fmean(kl), "top1": statistics.fmean(same)}


def read_questions(path: Path, count: int, skip: int = 0) -> list[str]:
    lines = path.read_text().splitlines()[skip : skip + count]
    return [str(json.loads(line)["question"]) for line in lines]


def measure(
    bench: Bench, questions: list[str], modes: dict[str, dict[str, Any]], tokens: int
) -> dict[str, dict[str, float]]:
    """Means over questions, per mode."""
    found = [
        bench.compare(bench.case(question), str(number), modes, tokens)
        for number, question in enumerate(
            track(questions, "comparing", console=Console(stderr=True))
        )
    ]
    keys = ("kl1", "kl_mean", "top1", "reused")
    return {mode: {k: statistics.fmean(f[mode][k] for f in found) for k in keys} for mode in modes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument(
        "--skip", type=int, default=0, help="questions left out at the start of the file"
    )
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bench = Bench(options.model)
    questions = read_questions(options.questions, options.prompts, options.skip)
    scores = measure(bench, questions, MODES, options.tokens)
    table = Table(
        title=f"{len(questions)} prompts, {options.tokens} tokens each: distance to dense"
    )
    for column in ("mode", "KL first", "KL mean", "top-1", "prompt reused"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for mode, s in scores.items():
        table.add_row(
            mode, f"{s['kl1']:.4f}", f"{s['kl_mean']:.4f}", f"{s['top1']:.3f}", f"{s['reused']:.0%}"
        )
    Console().print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
