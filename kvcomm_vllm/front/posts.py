# SPDX-License-Identifier: Apache-2.0
"""What our ASGI middlewares have in common: they look at POST requests alone."""

from __future__ import annotations

from abc import ABC, abstractmethod

from starlette.types import ASGIApp, Receive, Scope, Send


class PostMiddleware(ABC):
    """Hands all other requests on as they are."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            await self.post(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    @abstractmethod
    async def post(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One such request, which is to reach ``app``."""
