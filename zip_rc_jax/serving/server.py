"""Starts and stops: sockets, signals, and what happens to requests when a server is asked to
end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

import uvicorn

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.serving.app import PATHS, make_app
from zip_rc_jax.serving.limits import Limits
from zip_rc_jax.serving.live_page import live_page
from zip_rc_jax.serving.metrics import Metrics
from zip_rc_jax.serving.service import Service
from zip_rc_jax.serving.translation import Translator

ROOM_FOR_PROMPTS = 1024  # tokens, where nothing else is said


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """How a model is served.

    Attributes:
      name: of the model, as clients call it.
      host, port: where it listens; port 0 takes a free one.
      api_key: that clients must send; "" asks for none.
      context: most tokens of a prompt and its longest prefix together; 0 takes max_tokens and
        `ROOM_FOR_PROMPTS`, at most the positions of the model.
      max_queue: requests that may wait for slots.
      max_seconds: that a request may wait for slots, and then the time budget of its search.
      max_body_bytes: of a body.
      grace_seconds: in which what runs may end after a signal to stop.
      log_prompts: prompts are written to the log.
      calibration: what `zip-rc calibrate` promised of the model, for clients; None without.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    context: int = 0
    max_queue: int = 256
    max_seconds: float = 300.0
    max_body_bytes: int = 4 * 2**20
    grace_seconds: float = 60.0
    log_prompts: bool = False
    calibration: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for field in ("max_queue", "max_seconds", "max_body_bytes"):
            if not getattr(self, field) > 0:
                raise UsageError(
                    f"{field}={getattr(self, field)}",
                    "nothing could ever be answered",
                    "use a positive number",
                )
        if not 0 <= self.port < 2**16:
            raise UsageError(f"port={self.port}", "it is no port", "use one from 0 to 65535")
        if self.context < 0 or self.grace_seconds < 0:
            value = f"context={self.context}, grace_seconds={self.grace_seconds}"
            raise UsageError(value, "they are not negative", "use 0 or a positive number")
        if not self.name or ":" in self.name:
            reason = "the part behind a colon names a strategy"
            raise UsageError(f"name={self.name!r}", reason, "use a name without a colon")
        if not (self.api_key.isascii() and self.api_key.strip() == self.api_key):
            raise UsageError("api_key", "headers are ASCII, without spaces", "use another key")


def context_of(serve: ServeConfig, config: DecodeConfig, lm: LanguageModel) -> int:
    """Most tokens of a request.

    Raises:
      UsageError: the model has fewer positions, or a longest answer leaves no room for a prompt.
    """
    positions = lm.config.max_positions
    context = serve.context or min(positions, config.max_tokens + ROOM_FOR_PROMPTS)
    if context > positions:
        reason = f"the model has {positions} positions"
        raise UsageError(f"context={context}", reason, "lower it")
    if config.max_tokens >= context:
        raise UsageError(
            f"max_tokens={config.max_tokens} with {context} tokens for a request",
            "no prompt would fit beside a longest answer",
            "lower max_tokens, or raise the context",
        )
    return context


class Server(uvicorn.Server):
    """Answers what runs after the first signal to stop, and refuses what is new. A second signal
    ends it at once.

    Attributes:
      service: has the engine.
      url: where it listens, once it has started.
    """

    def __init__(self, lm: LanguageModel, config: DecodeConfig, serve: ServeConfig):
        """Args:
          config: what requests start from; its `n` and `max_tokens` are the most that one may ask.

        Raises:
          UsageError: a model without a head, slots that do not fit the device, or bad options.
        """
        context = context_of(serve, config, lm)
        engine = Engine(lm, config, 0)
        # The slots are made for the longest request, so this is checked once.
        engine.processor.check_memory(context, context - 1, True)
        metrics = Metrics()
        self.service = Service(
            engine,
            metrics,
            context=context,
            max_queue=serve.max_queue,
            max_seconds=serve.max_seconds,
        )
        translator = Translator(engine, serve.name, context, serve.max_seconds)
        app = make_app(
            translator,
            self.service,
            log_prompts=serve.log_prompts,
            calibration=serve.calibration,
            page=live_page(translator, bool(serve.api_key), serve.calibration),
        )
        limited = Limits(app, metrics, PATHS, serve.max_body_bytes, serve.api_key)
        super().__init__(
            uvicorn.Config(
                limited,
                host=serve.host,
                port=serve.port,
                server_header=False,
                timeout_graceful_shutdown=5,
            )
        )
        self.url = ""
        self._grace, self._deadline = serve.grace_seconds, float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to stop."""
        if self.service.draining:
            self.force_exit = self.should_exit = True
            return
        self.service.draining = True
        self._deadline = time.monotonic() + self._grace

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def on_tick(self, counter: int) -> bool:
        """Asked ten times a second."""
        if self.service.draining:
            late = time.monotonic() > self._deadline
            if late:
                self.service.fail_all("the server shuts down before this answer is ready")
            if late or self.service.is_idle:
                self.should_exit = True
        return await super().on_tick(counter)
