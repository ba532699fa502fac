"""The routes: OpenAI's /v1, /health, and the what-if page of a `tune` report with what its readers chose.

Nobody but this machine's programs reaches it by default. A request's Host must be one that the server was started for,
so a page on the internet cannot have a browser ask for it; with an API key every route but /health wants the key, as
`Bearer`, or as the password where a browser asks for one.
"""

import asyncio
import base64
import binascii
import contextlib
import hmac
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lowbit.environment import installed
from lowbit.errors import InputError, LowbitError
from lowbit.runtime.sampling import SamplingParams
from lowbit.serving.answers import Answering, event, total
from lowbit.serving.requests import ApiError, ChatRequest, TextRequest, checked, parse
from lowbit.serving.selections import Full, Selections
from lowbit.serving.worker import Busy, Reply, Worker

MOST_BODY = 8 << 20  # bytes
MOST_SELECTION = 64 << 10
_DISCONNECT_SECONDS = 0.2


@dataclass(frozen=True)
class Page:
    """The report as HTML, its content security policy, and where selections are kept."""

    html: str
    policy: str
    selections: Selections


@dataclass(frozen=True)
class Service:
    """What the routes serve, and to whom: a request's Host must be one of `hosts`, without port (None: any)."""

    worker: Worker
    name: str
    hosts: Sequence[str] | None = None
    key: str | None = None
    page: Page | None = None


def make_app(service: Service) -> Starlette:
    routes = [
        Route("/health", _bind(service, health)),
        Route("/version", _bind(service, _guarded(version))),
        Route("/v1/models", _bind(service, _guarded(models))),
        Route("/v1/chat/completions", _bind(service, _guarded(chat)), methods=["POST"]),
        Route("/v1/completions", _bind(service, _guarded(complete)), methods=["POST"]),
    ]
    if service.page is not None:
        routes += [
            Route("/", _bind(service, _guarded(page))),
            Route("/selections", _bind(service, _guarded(selections)), methods=["GET", "POST"]),
        ]
    return Starlette(
        routes=routes,
        exception_handlers={ApiError: _error, 404: _http_error, 405: _http_error, 500: _fault},
    )


Handler = Callable[[Service, Request], Any]


def _bind(service: Service, handler: Handler) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        if service.hosts is not None and request.url.hostname not in service.hosts:
            raise ApiError(421, f"this server is not {request.url.hostname!r}.")
        response: Response = await handler(service, request)
        return response

    return endpoint


def _guarded(handler: Handler) -> Handler:
    async def checked_first(service: Service, request: Request) -> Response:
        if service.key is not None and not _has_key(request.headers.get("authorization", ""), service.key):
            error = ApiError(401, "the API key is missing or wrong.", code="invalid_api_key")
            return JSONResponse(error.body, 401, {"WWW-Authenticate": 'Basic realm="lowbit", Bearer'})
        response: Response = await handler(service, request)
        return response

    return checked_first


def _has_key(header: str, key: str) -> bool:
    kind, _, value = header.partition(" ")
    if kind.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif kind.lower() != "bearer":
        return False
    return hmac.compare_digest(value.strip().encode(), key.encode())


def _error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status == 503 else None)


def _http_error(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 500)
    return JSONResponse(ApiError(status, f"{request.method} {request.url.path}: not here.").body, status)


def _fault(_request: Request, _error: Exception) -> Response:
    return JSONResponse(ApiError(500, "an error inside the server; its log says more.", kind="server_error").body, 500)


async def _body(request: Request, most: int) -> bytes:
    """Raises ApiError for one that is too large or no JSON by its type: a form on another site sends other types."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON, with Content-Type: application/json.")
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise ApiError(413, f"the body has more than {most} bytes.")
            parts.append(part)
    except ClientDisconnect as error:
        raise ApiError(499, "the client left.") from error
    return b"".join(parts)


async def health(service: Service, _request: Request) -> Response:
    failure = service.worker.failure
    return JSONResponse({"status": "ok" if failure is None else failure}, 200 if failure is None else 503)


async def version(_service: Service, _request: Request) -> Response:
    return JSONResponse({"version": installed("lowbit")})


async def models(service: Service, _request: Request) -> Response:
    engine = service.worker.engine
    entry = {"id": service.name, "object": "model", "created": 0, "owned_by": "lowbit",
             "max_model_len": engine.context_length, "runtime": engine.runtime}  # fmt: skip
    return JSONResponse({"object": "list", "data": [entry]})


async def chat(service: Service, request: Request) -> Response:
    return await _answer(service, request, parse(ChatRequest, await _body(request, MOST_BODY)))


async def complete(service: Service, request: Request) -> Response:
    return await _answer(service, request, parse(TextRequest, await _body(request, MOST_BODY)))


async def _answer(service: Service, request: Request, asked: ChatRequest | TextRequest) -> Response:
    if asked.model not in (None, service.name):
        message = f"the model {asked.model!r} is not here; this server has {service.name!r}."
        raise ApiError(404, message, param="model", code="model_not_found")
    worker = service.worker
    prompts, params = await run_in_threadpool(checked, asked, worker.tokenizer)
    answers = [
        Answering(asked, service.name, tokens, worker.tokenizer, worker.end, i) for i, tokens in enumerate(prompts)
    ]
    with contextlib.ExitStack() as stack:
        waiting = []
        for answering in answers:
            if params is None and asked.top is None:
                break  # an echo: there is nothing to compute
            replies, cancel = _asked(worker, answering.prompt, params, asked.top)
            stack.callback(cancel)  # harmless where it has ended
            waiting.append((answering, replies))
        if asked.stream:
            ((answering, replies),) = waiting
            first = await _next(replies, request)
            stack.pop_all()
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            pieces = _pieces(answering, first, replies, cancel, usage)
            return StreamingResponse(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        for answering, replies in waiting:
            while not _ends(answering, await _next(replies, request)):
                pass
    choices = await run_in_threadpool(lambda: [a.choice() for a in answers])
    return JSONResponse(answers[0].document(choices) | {"usage": total([a.usage() for a in answers])})


Replies = asyncio.Queue[Reply]


def _asked(
    worker: Worker, tokens: Sequence[int], params: SamplingParams | None, top: int | None
) -> tuple[Replies, Callable[[], None]]:
    """What the worker will say, and what cancels it. Raises ApiError."""
    replies: Replies = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def deliver(reply: Reply) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(replies.put_nowait, reply)

    try:
        return replies, worker.ask(tokens, params, deliver, top)
    except Busy as error:
        raise ApiError(503, str(error), kind="overloaded_error") from error
    except LowbitError as error:
        raise ApiError(503, str(error), kind="server_error") from error


async def _next(replies: Replies, request: Request) -> Reply:
    """The next reply that is no error. Raises ApiError, also where the client has left meanwhile."""
    while True:
        try:
            reply = await asyncio.wait_for(replies.get(), _DISCONNECT_SECONDS)
        except TimeoutError:
            if await request.is_disconnected():
                raise ApiError(499, "the client left.") from None
            continue
        if reply.error is not None:
            status, kind = (400, "invalid_request_error") if reply.refused else (500, "server_error")
            raise ApiError(status, reply.error, kind=kind)
        if replies.empty() and await request.is_disconnected():
            raise ApiError(499, "the client left.")
        return reply


def _ends(answering: Answering, reply: Reply) -> bool:
    if reply.scores is not None:
        answering.expected(reply.scores)
    if reply.output is not None:
        answering.add(reply.output, reply.cached_tokens)
    return reply.last


async def _pieces(
    answering: Answering, reply: Reply, replies: Replies, cancel: Callable[[], None], usage: bool
) -> AsyncIterator[bytes]:
    """The events of a stream. The generator is closed when the client leaves, and the request with it."""
    try:
        if (beginning := answering.first_piece()) is not None:
            yield event(beginning)
        while True:
            if reply.error is not None:
                yield event(ApiError(500, reply.error, kind="server_error").body)
                break
            ended = _ends(answering, reply)
            assert reply.output is not None
            if (piece := answering.piece(reply.output)) is not None:
                yield event(piece)
            if ended:
                if usage:
                    yield event(answering.usage_piece())
                break
            reply = await replies.get()
        yield event("[DONE]")
    finally:
        cancel()


async def page(service: Service, _request: Request) -> Response:
    assert service.page is not None
    return HTMLResponse(
        service.page.html, headers={"Content-Security-Policy": f"{service.page.policy}; frame-ancestors 'none'"}
    )


async def selections(service: Service, request: Request) -> Response:
    """GET: all that were kept. POST: keep one."""
    assert service.page is not None
    kept = service.page.selections
    if request.method == "GET":
        headers = {"Content-Disposition": 'attachment; filename="lowbit-selections.json"'}
        return JSONResponse({"selections": await run_in_threadpool(kept.all)}, headers=headers)
    body = await _body(request, MOST_SELECTION)
    try:
        return JSONResponse(await run_in_threadpool(kept.add, body), 201)
    except InputError as error:
        raise ApiError(400, str(error)) from error
    except (Full, OSError) as error:
        raise ApiError(507, f"not kept: {error}", kind="server_error") from error
