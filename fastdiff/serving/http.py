"""The paths of the server: images, edits, models, jobs, health and metrics. It takes neither files nor URLs."""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from fastdiff.serving import wire
from fastdiff.serving.front import CONTEXT, Context, respond
from fastdiff.serving.metrics import Metrics
from fastdiff.serving.process import LOST, MOST_JOBS, Failure, Remote, Supervisor
from fastdiff.serving.requests import (
    Edit,
    Generation,
    Limits,
    Refusal,
    check_limits,
    encode_picture,
    invalid,
    options_of,
    read_edit,
    read_generation,
    read_picture,
    request_for,
)
from fastdiff.serving.streaming import Events, event, until

MOST_RECORDS = 1000  # jobs that have ended and can still be asked for
BODY_S = 30.0  # in which a body must have arrived
ANSWER_S = 5.0  # for which a job's state is waited for
STARTING_S = 2.0  # after which a client may try again while models are loaded

# The status and the code of errors, by the class that `fastdiff.Engine` raised.
ERRORS = {
    "InvalidArgument": (400, "invalid_value"),
    "QueueFull": (429, "queue_full"),
    "DeadlineImpossible": (504, "deadline_impossible"),
    "DeadlineMissed": (504, "deadline_missed"),
    "Cancelled": (409, "cancelled"),
    "NumericsError": (500, "not_finite"),
    "OutOfMemory": (503, "out_of_memory"),
    "BackendError": (503, "engine_failed"),
    "EngineClosed": (503, "engine_failed"),
    LOST: (503, "engine_lost"),
}


class Left(Exception):
    """The client has left."""


def refusal(e: Failure) -> Refusal:
    """Return the answer for a job that has no images."""
    status, code = ERRORS.get(e.error, (500, "internal_error"))
    param = None
    if e.error == "InvalidArgument" and (found := re.match(r"(\w+)(\[\d+\])?=", str(e))):
        param = {"labels": "label", "prompts": "prompt", "deadline_s": "deadline_ms"}.get(found[1], found[1])
    return Refusal(status, str(e), code, param, e.retry_after_s)


def answer(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response of JSON."""
    return Response(msgspec.json.encode(data), status, headers, "application/json")


class App:
    """The server's answers.

    Args:
        supervisor: The drawing process.
        metrics: What happens is counted there.
        limits: The most that a request may ask for.
        page: Further routes.
    """

    def __init__(self, supervisor: Supervisor, metrics: Metrics, limits: Limits, page: list[Any]):
        self._supervisor, self._metrics, self._limits = supervisor, metrics, limits
        self._records: collections.OrderedDict[str, tuple[bytes, dict[str, Any]]] = collections.OrderedDict()
        self.asgi = Starlette(
            routes=[
                Route("/v1/images/generations", self.generations, methods=["POST"]),
                Route("/v1/images/edits", self.edits, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name}", self.model),
                Route("/v1/jobs/{id}", self.job, methods=["GET", "DELETE"]),
                Route("/health/live", self.live),
                Route("/health/ready", self.ready),
                Route("/metrics", self.metrics),
                *page,
            ],
            exception_handlers={Refusal: _refused, HTTPException: _not_found, Exception: _failed},
        )

    # Images -----------------------------------------------------------------------------------------------------------

    async def generations(self, request: Request) -> Response:
        """Answer POST /v1/images/generations."""
        return await self._counted(request, self._generation(request))

    async def edits(self, request: Request) -> Response:
        """Answer POST /v1/images/edits."""
        return await self._counted(request, self._edit(request))

    async def _counted(self, request: Request, drawing: Any) -> Response:
        """Count a request by its outcome, unless it is a stream, which is counted at its end."""
        try:
            response: Response = await drawing
        except Refusal as e:
            self._metrics.requests.labels(_outcome(e)).inc()
            raise
        except (Left, ClientDisconnect):
            self._metrics.requests.labels("cancelled").inc()
            return Response(status_code=499)  # which nobody reads
        return response

    async def _generation(self, request: Request) -> Response:
        _check_type(request, "application/json")
        g = read_generation(await _body(request))
        return await self._draw(request, g, self._model(g.model), {})

    async def _edit(self, request: Request) -> Response:
        _check_type(request, "multipart/form-data")
        fields: dict[str, str] = {}
        files: dict[str, bytes] = {}
        try:
            async with _in_time(BODY_S), request.form(max_files=2, max_fields=50) as form:
                for key, value in form.multi_items():
                    key = key.removesuffix("[]")
                    if key in fields or key in files:
                        raise invalid(f"{key} is given twice; one is possible", key)
                    if isinstance(value, UploadFile):
                        files[key] = await value.read()
                    else:
                        fields[key] = value
        except (MultiPartException, HTTPException) as e:
            raise Refusal(400, f"the body is no form: {getattr(e, 'message', None) or e}", "invalid_form") from None
        if "image" not in files or not files.keys() <= {"image", "mask"}:
            raise invalid("a file named image is needed, and one named mask is possible", "image")
        g = read_edit(fields)
        model = self._model(g.model)
        pictures = {name: await asyncio.to_thread(read_picture, name, file, model) for name, file in files.items()}
        return await self._draw(request, g, model, pictures)

    def _model(self, name: str | None) -> wire.Model:
        """Return the model of a request; refuse the request if none can be given jobs now."""
        models = self._supervisor.models
        if self._supervisor.draining:
            raise Refusal(503, "the server is shutting down", "shutting_down", retry_after_s=STARTING_S)
        if not self._supervisor.pulse.ready:
            raise Refusal(503, "the models are being loaded", "not_ready", retry_after_s=STARTING_S)
        if name is None:
            return next(iter(models.values()))
        if name not in models:
            raise Refusal(404, f"model {name!r} is unknown; there are {', '.join(models)}", "model_not_found", "model")
        return models[name]

    async def _draw(self, request: Request, g: Generation, model: wire.Model, pictures: dict[str, Any]) -> Response:
        """Run a job, and answer with its images, or with a stream of events."""
        context: Context = request.scope[CONTEXT]
        check_limits(g, self._limits)
        options = options_of(g, model)
        if g.deadline_ms is not None:
            options["deadline_s"] = max(g.deadline_ms / 1e3 - context.seconds, 1e-9)
        job = self._submit(context, wire.Submit(context.id, model.name, g.n, options, **pictures))
        context.fields.update(model=model.name, n=g.n)
        left = asyncio.ensure_future(_left(request))
        streams = False
        try:
            await self._unless_left(job, left, job.accepted)
            if g.stream:
                streams = True
                job.streams = True
                return Events(self._events(job, g, model, context), left, lambda: self._leave(job))
            done: wire.Done = await self._unless_left(job, left, job.outcome)
            images = await asyncio.to_thread(_images, done, g, model)
        except Failure as e:
            raise self._failed(e, g) from None
        finally:
            if not streams:
                left.cancel()
        self._finished(done, g, context)
        body = {
            "created": int(time.time()), "data": images, "background": "opaque", **_facts(g, model),
            "fastdiff": _receipt(done, model, context),
        }  # fmt: skip
        times = {"x-queue-ms": f"{1e3 * done.queue_s:.1f}", "x-run-ms": f"{1e3 * done.run_s:.1f}"}
        return answer(body, headers=times)

    def _submit(self, context: Context, message: wire.Submit) -> Remote:
        jobs = self._supervisor.jobs
        if context.id in jobs:
            raise Refusal(409, f"x-request-id: a request {context.id} is running already", "duplicate_request")
        if len(jobs) >= MOST_JOBS:
            raise Refusal(429, f"{MOST_JOBS} requests are waiting already", "queue_full", retry_after_s=1.0)
        job = self._supervisor.submit(message, context.owner)
        job.outcome.add_done_callback(lambda done: self._record(job, done))
        return job

    async def _unless_left(self, job: Remote, left: asyncio.Task[None], future: asyncio.Future[Any]) -> Any:
        """Wait for a job, which is ended as soon as its client leaves."""
        try:
            await asyncio.wait((left, future), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._abandon(job)
            raise
        if not future.done():
            self._abandon(job)
            raise Left
        return future.result()

    def _abandon(self, job: Remote) -> None:
        """End a job whose client has left."""
        if not job.outcome.done():
            self._supervisor.cancel(job)

    def _leave(self, job: Remote) -> None:
        """End a job whose stream nobody reads any more."""
        self._abandon(job)
        self._metrics.requests.labels("cancelled").inc()

    def _failed(self, e: Failure, g: Generation) -> Refusal:
        if g.deadline_ms is not None and e.error in ("DeadlineMissed", "DeadlineImpossible"):
            self._metrics.deadline.labels("missed" if e.error == "DeadlineMissed" else "impossible").inc()
        if e.error == "Cancelled" and self._supervisor.draining:
            return Refusal(503, "the server is shutting down", "shutting_down", retry_after_s=STARTING_S)
        return refusal(e)

    def _finished(self, done: wire.Done, g: Generation, context: Context) -> None:
        self._metrics.requests.labels("ok").inc()
        self._metrics.duration.observe(context.seconds)
        self._metrics.queue.observe(done.queue_s)
        if g.deadline_ms is not None:
            self._metrics.deadline.labels("met").inc()

    async def _events(self, job: Remote, g: Generation, model: wire.Model, context: Context) -> AsyncIterator[bytes]:
        """Yield the previews of a job, then its images or its error."""
        sort, shown = "image_edit" if isinstance(g, Edit) else "image_generation", collections.Counter[int]()
        common = {"background": "opaque", "quality": "auto", **_facts(g, model)}
        while True:
            while job.previews:
                p = job.previews.popleft()
                picture = await asyncio.to_thread(_base64, p.pixels, g, model)
                yield event(f"{sort}.partial_image", {
                    "type": f"{sort}.partial_image", "b64_json": picture, "created_at": int(time.time()), **common,
                    "partial_image_index": shown[p.image], "image_index": p.image, "row": p.row, "rows": p.rows,
                })  # fmt: skip
                shown[p.image] += 1
            if job.outcome.done() and not job.previews:
                break
            async for comment in until(job.news):
                yield comment
        try:
            done = job.outcome.result()
        except Failure as e:
            refused = self._failed(e, g)
            self._metrics.requests.labels(_outcome(refused)).inc()
            yield b"event: error\ndata: " + refused.body + b"\n\n"
            return
        self._finished(done, g, context)
        images = await asyncio.to_thread(_images, done, g, model)
        for i, image in enumerate(images):
            last = {"fastdiff": _receipt(done, model, context)} if i + 1 == len(images) else {}
            yield event(f"{sort}.completed", {
                "type": f"{sort}.completed", "created_at": int(time.time()), **common, **image, "image_index": i,
                "usage": NO_TOKENS, **last,
            })  # fmt: skip

    # Models and jobs --------------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """Answer GET /v1/models."""
        return answer({"object": "list", "data": [_described(m) for m in self._supervisor.models.values()]})

    async def model(self, request: Request) -> Response:
        """Answer GET /v1/models/{name}."""
        name = request.path_params["name"]
        if name not in self._supervisor.models:
            raise Refusal(404, "this model is unknown", "model_not_found", "model")
        return answer(_described(self._supervisor.models[name]))

    async def job(self, request: Request) -> Response:
        """Answer GET and DELETE /v1/jobs/{id}; a job belongs to the key that it was asked for with."""
        name, owner = request.path_params["id"], request.scope[CONTEXT].owner
        job = self._supervisor.jobs.get(name)
        if job is not None and job.owner == owner:
            if request.method == "DELETE":
                self._supervisor.cancel(job)
                with contextlib.suppress(Failure, asyncio.TimeoutError):
                    await asyncio.wait_for(asyncio.shield(job.outcome), ANSWER_S)
            else:
                with contextlib.suppress(Failure, asyncio.TimeoutError, asyncio.CancelledError):
                    looked = await asyncio.wait_for(self._supervisor.look(job), ANSWER_S)
                    return answer({**_job(job), "status": looked.state, "eta_ms": round(1e3 * looked.eta_s, 1)})
        if name in self._records and self._records[name][0] == owner:
            return answer(self._records[name][1])
        if job is not None and job.owner == owner:
            raise Refusal(503, "the process that draws does not answer", "not_ready", retry_after_s=ANSWER_S)
        raise Refusal(404, "there is no such job, or it was too long ago", "job_not_found", "id")

    def _record(self, job: Remote, done: asyncio.Future[wire.Done]) -> None:
        """Keep the outcome of a job, without its pixels."""
        record, e = _job(job), None if done.cancelled() else done.exception()
        if isinstance(e, Failure):
            if e.error == "Cancelled":
                stage = "streaming" if job.streams else "running" if e.ran else "waiting"
                self._metrics.cancelled.labels(stage).inc()
            record["status"] = "cancelled" if e.error == "Cancelled" else "failed"
            record["error"] = msgspec.json.decode(refusal(e).body)["error"]
        elif e is None and not done.cancelled():
            record |= {"status": "finished", "receipt": done.result().receipt}
        self._records[job.id] = (job.owner, record)
        self._records.move_to_end(job.id)
        while len(self._records) > MOST_RECORDS:
            self._records.popitem(last=False)

    # Health -----------------------------------------------------------------------------------------------------------

    async def live(self, request: Request) -> Response:
        """Answer GET /health/live: the process answers."""
        return answer({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """Answer GET /health/ready: whether images are drawn."""
        why = self._supervisor.trouble
        return answer({"status": "not ready", "reason": why} if why else {"status": "ready"}, 503 if why else 200)

    async def metrics(self, request: Request) -> Response:
        """Answer GET /metrics."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


NO_TOKENS = {
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # fmt: skip


async def _refused(request: Request, e: Exception) -> Response:
    assert isinstance(e, Refusal)
    return respond(e)


async def _not_found(request: Request, e: Exception) -> Response:
    assert isinstance(e, HTTPException)
    response = respond(Refusal(e.status_code, f"{e.detail}: docs/serving.md lists the paths", "not_found"))
    response.headers.update(e.headers or {})
    return response


async def _failed(request: Request, e: Exception) -> Response:
    return respond(Refusal(500, "an error of fastdiff's own; its log says more", "internal_error"))


def _outcome(e: Refusal) -> str:
    codes = {"cancelled": "cancelled", "queue_full": "refused", "shutting_down": "refused", "not_ready": "refused"}
    return codes.get(e.code, "invalid" if e.status < 429 else "deadline" if e.status == 504 else "failed")


def _check_type(request: Request, needed: str) -> None:
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != needed:
        raise Refusal(415, f"content-type: {needed} is needed", "unsupported_media_type")


async def _body(request: Request) -> bytes:
    async with _in_time(BODY_S):
        return await request.body()


@contextlib.asynccontextmanager
async def _in_time(seconds: float) -> AsyncIterator[None]:
    """Refuse a request whose body does not arrive in time."""
    task = asyncio.current_task()
    assert task is not None
    late = False

    def cancel() -> None:
        nonlocal late
        late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, cancel)
    try:
        yield
    except asyncio.CancelledError:
        if late:
            raise Refusal(408, f"the body did not arrive within {seconds:g} s", "timeout") from None
        raise
    finally:
        timer.cancel()


async def _left(request: Request) -> None:
    """Wait until the client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _images(done: wire.Done, g: Generation, model: wire.Model) -> list[dict[str, Any]]:
    """Return the entries of the images in an answer."""
    r, size = done.receipt, model.width * model.height * model.channels
    return [
        {
            "b64_json": _base64(done.pixels[i * size : (i + 1) * size], g, model, _image_facts(r, i, g, model)),
            "index": r["indices"][i],
            "label": None if r["labels"] is None else r["labels"][i], "sha256": r["pixels_sha256"][i],
        }
        for i in range(r["n"])
    ]  # fmt: skip


def _base64(pixels: bytes, g: Generation, model: wire.Model, facts: dict[str, Any] | None = None) -> str:
    format = g.output_format or "png"
    return base64.b64encode(encode_picture(pixels, model, format, g.output_compression, facts)).decode()


def _image_facts(r: dict[str, Any], i: int, g: Generation, model: wire.Model) -> dict[str, Any]:
    """Return what an image's file says: what it was drawn with, its pixels' SHA-256, and a request for it alone.

    There is no such request for an edit, whose image it would lack, nor where the setting was chosen for a deadline.
    """
    per_image = {"indices": "index", "labels": "label", "prompts": "prompt", "negative": "negative",
                 "guidance": "guidance", "pixels_sha256": "pixels_sha256"}  # fmt: skip
    same = ("seed", "solver", "rows", "table_sha256", "nfe", "backend", "dtype", "determinism", "version")
    facts: dict[str, Any] = {"model": model.name, **{name: r[name] for name in same}}
    facts |= {name: None if r[key] is None else r[key][i] for key, name in per_image.items()}
    if not isinstance(g, Edit) and not r["degraded"]:
        facts["request"] = request_for(g, model, r["seed"], facts["index"], facts["label"])
    return facts


def _facts(g: Generation, model: wire.Model) -> dict[str, Any]:
    return {"output_format": g.output_format or "png", "size": f"{model.width}x{model.height}"}


def _receipt(done: wire.Done, model: wire.Model, context: Context) -> dict[str, Any]:
    times = {"queue_ms": done.queue_s, "run_ms": done.run_s, "total_ms": context.seconds}
    return {"model": model.name, **done.receipt, **{name: round(1e3 * value, 1) for name, value in times.items()}}


def _described(m: wire.Model) -> dict[str, Any]:
    facts = msgspec.to_builtins(m)
    name = facts.pop("name")
    return {"id": name, "object": "model", "created": 0, "owned_by": "fastdiff", "fastdiff": facts}


def _job(job: Remote) -> dict[str, Any]:
    return {"id": job.id, "object": "job", "model": job.message.model, "n": job.message.n}
