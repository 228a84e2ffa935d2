"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.engine import ResultEvent, StepEvent
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.serving import answers
from zip_rc_jax.serving.errors import ApiError, json_response, of_validation
from zip_rc_jax.serving.schema import Body, ChatBody, CompletionBody
from zip_rc_jax.serving.service import Service, Told
from zip_rc_jax.serving.streams import ChoiceStream
from zip_rc_jax.serving.translation import Plan, Translator

log = logging.getLogger("uvicorn.error")
Events = asyncio.Queue[tuple[int, Told]]

BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
}
PATHS = frozenset({*BODIES, "/", "/v1/models", "/health", "/metrics"})


# The page has a policy of its own; no other page may frame it.
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class EventStream(StreamingResponse):
    """Server-sent events. `close` is called however the response ends."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._close = close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def make_app(
    translator: Translator,
    service: Service,
    *,
    log_prompts: bool = False,
    calibration: Mapping[str, Any] | None = None,
    page: str = "",
) -> FastAPI:
    """The application. `service` is started and stopped with it. `calibration` is told with the
    models. `page` is what `/` answers with."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    # The pages of FastAPI load scripts from elsewhere, so there are none.
    app = FastAPI(title="zip-rc serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_errors(app)
    tokenizer, grid = translator.engine.lm.tokenizer, translator.engine.head.grid
    created = int(time.time())

    async def answered(request: Request, body: Body, plan_of: Callable[[Any], Plan]) -> Response:
        service.check_room(1)
        if log_prompts:
            given = body.model_dump(include={"messages", "prompt"})
            log.info("%s %s", request.url.path, json.dumps(given))
        plan = await asyncio.to_thread(plan_of, body)
        return await _answer(request, plan, service, tokenizer, grid)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody) -> Response:
        return await answered(request, body, translator.chat)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        return await answered(request, body, translator.completion)

    def described(name: str) -> dict[str, Any]:
        told = {"zip_rc": {"calibration": dict(calibration)}} if calibration else {}
        own = {"id": name, "object": "model", "created": created, "owned_by": "zip-rc"}
        return own | told

    @app.get("/v1/models")
    async def models() -> Response:
        data = [described(name) for name in translator.model_names()]
        return json_response({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        translator.check_model(name)
        return json_response(described(name))

    @app.get("/", include_in_schema=False)
    async def explorer() -> Response:
        return Response(page, headers=PAGE_HEADERS, media_type="text/html; charset=utf-8")

    @app.get("/health")
    async def health() -> Response:
        if service.draining:
            raise ApiError(503, "the server shuts down", code="shutting_down")
        if not service.is_alive():
            raise ApiError(503, "the engine has ended", code="engine_failed")
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def _add_errors(app: FastAPI) -> None:
    """Every error has the body of OpenAI's API."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        body = BODIES.get(request.url.path, Body)
        return of_validation(error.errors(), body).response()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message).response()

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed on this request; its log says why").response()


async def _answer(
    request: Request, plan: Plan, service: Service, tokenizer: Tokenizer, grid: Grid
) -> Response:
    entered = time.monotonic()
    events: Events = asyncio.Queue()
    tickets = service.submit(plan.jobs, events)
    try:
        if plan.stream:
            # An error before the first event still has a status of its own.
            first = await _unless_gone(request, events.get())
            if first is not None:
                if isinstance(first[1], ApiError):
                    raise first[1]
                chunks = _chunks(plan, service, tokenizer, grid, events, first, entered)
                streamed, tickets = tickets, []
                return EventStream(chunks, lambda: service.cancel(streamed))
        elif (results := await _unless_gone(request, _results(events, len(tickets)))) is not None:
            # What was weighed is computed again, which takes its time.
            run = asyncio.to_thread if plan.introspect else _at_once
            return json_response(await run(answers.completion, plan, results, tokenizer, grid))
        return Response(status_code=499)  # nobody reads it
    finally:
        service.cancel(tickets)


async def _at_once(function: Callable[..., Any], *given: Any) -> Any:
    """What `asyncio.to_thread` gives, without a thread."""
    return function(*given)


async def _unless_gone(request: Request, work: Any) -> Any:
    """What `work` gives; None if the client goes away before, and then it is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


async def _results(events: Events, count: int) -> list[Result]:
    """The results of all choices, in order. Raises ApiError if one fails."""
    found: dict[int, Result] = {}
    while len(found) < count:
        index, event = await events.get()
        if isinstance(event, ApiError):
            raise event
        if isinstance(event, ResultEvent):
            answers.check_result(event.result)
            found[index] = event.result
    return [found[index] for index in range(count)]


async def _chunks(
    plan: Plan,
    service: Service,
    tokenizer: Tokenizer,
    grid: Grid,
    events: Events,
    first: tuple[int, Told],
    entered: float,
) -> AsyncIterator[str]:
    """The events of a stream, as lines. The queue holds what a slow reader has not read yet."""
    header = answers.header(plan, True)
    streams = [ChoiceStream(plan, i, header, tokenizer, grid) for i in range(len(plan.jobs))]
    run = asyncio.to_thread if plan.introspect else _at_once
    for stream in streams:
        for chunk in stream.begin():
            yield _line(chunk)
    results: dict[int, Result] = {}
    told, pending = False, first
    try:
        while True:
            index, event = pending
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, StepEvent):
                yield _line(await run(streams[index].step, event))
            else:
                results[index] = event.result
                yield _line(await run(streams[index].end, event.result))
            if not told and streams[index].has_text:
                told = True
                service.metrics.first.observe(time.monotonic() - entered)
            if len(results) == len(streams):
                break
            pending = await events.get()
    except ApiError as error:
        yield _line(error.body())
        return
    except Exception:
        log.exception("a stream failed")
        yield _line(ApiError(500, "the server failed on this request; its log says why").body())
        return
    if plan.include_usage:
        total = answers.usage(plan, [results[i] for i in range(len(streams))])
        yield _line(header | {"choices": [], "usage": total})
    yield "data: [DONE]\n\n"


def _line(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, allow_nan=False)}\n\n"
