# SPDX-License-Identifier: Apache-2.0
"""The keys below ``tiers``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvcomm_vllm.config.address import FORM, Address, Place
from kvcomm_vllm.config.key import key
from kvcomm_vllm.config.secondary import SecondaryTiers
from kvcomm_vllm.wording import shown


@dataclass(frozen=True)
class TiersConfig:
    """Where KV goes on lying when the engine's own pages are given to others."""

    host_gb: float = key(
        0.0,
        "Host memory (GiB) for pages of requests that have ended, of all ranks of an engine, taken "
        "at start; what has left the KV cache is brought back from there when a prompt needs it.",
        low=0.0,
        high=65536.0,
        when_zero="none: what is reused must still lie in the KV cache",
    )
    disk_path: str = key(
        "",
        "Folder where pages are kept as well, and found after a restart and by other engines that "
        "use the same folder; for its owner alone (0700). Needs host_gb, through which they pass.",
        when_zero="no disk",
    )
    disk_gb: float = key(
        50.0,
        "Most that lies in disk_path (GiB); what was used longest ago goes first.",
        low=0.01,
        high=1e6,
    )
    shared: str = key(
        Address(""),
        "Valkey or Redis server where pages are kept as well, for engines on several machines: "
        "valkey://[:password@]host:port[/db]. Whoever can reach it can read and change them. Needs "
        "host_gb, through which they pass.",
        when_zero="none",
    )
    shared_ttl_seconds: int = key(
        86_400,
        "How long a page stays in the shared server after it was last asked for.",
        low=60,
        high=31_536_000,
    )
    secondary_tiers: SecondaryTiers = key(
        SecondaryTiers(),
        "Tiers of vLLM's own, or by module_path of others, where pages are kept as well: each as "
        "in secondary_tiers of vLLM's tiering connector, passed on unchanged. Needs host_gb, "
        "through which they pass.",
    )
    wait_seconds: float = key(
        5.0,
        "Longest time a request waits for pages that are being brought back; then they are "
        "computed.",
        low=0.0,
        high=600.0,
    )

    @property
    def wanted(self) -> bool:
        return self.host_gb > 0

    @property
    def confidential(self) -> bool:
        """Whether there may be a password in it."""
        return bool(self.shared or self.secondary_tiers)

    @property
    def server(self) -> Place:
        """Where the shared one is.

        Raises:
            ValueError: ``shared`` is no address of one.
        """
        return Address(self.shared).place()

    def problems(self) -> Iterator[str]:
        """Combinations that cannot work, a line each."""
        for name in ("disk_path", "shared", "secondary_tiers"):
            if getattr(self, name) and not self.wanted:
                yield f"tiers.{name}: pages pass through host memory; set tiers.host_gb, e.g. to 4"
        try:
            if self.shared:
                _ = self.server
        except ValueError:
            told = shown(str(Address(self.shared)))
            yield f"tiers.shared: {told} is no such address; allowed: {FORM}"
