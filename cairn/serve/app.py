"""The service: its addresses, its page, and the process that holds it."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Annotated, Any
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from cairn.errors import CairnError, ConfigError, ResultError, one_line
from cairn.serve.connection import Connection
from cairn.serve.guard import Guard, Rules
from cairn.serve.service import Service
from cairn.storage.schema import reason_of
from cairn.storage.versions import versions

IMAGES = 100
"""Pictures in one request, at most."""

PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}

UPLOADS = ("image", "images")
"""Fields of forms that hold files."""

log = logging.getLogger("uvicorn.error")


class Known(BaseModel):
    name: str
    images: int = Field(description="how many it was learned from")


class Classes(BaseModel):
    classes: list[Known] = Field(description="in order of arrival")


class Likely(BaseModel):
    name: str
    probability: float


class Patch(BaseModel):
    patch: int = Field(description="number in the grid, row by row from the top left")
    share: float = Field(description="of all transported likeness")
    sentence: str = Field(description="what it speaks for")


class Reason(Likely):
    patches: list[Patch]


class Region(BaseModel):
    name: str
    colour: str = Field(description="of it in the mask")
    share: float = Field(description="of the area, 0 to 1")


class Objects(BaseModel):
    mask: str = Field(
        description="a PNG as a data: address, to be laid over what the tower saw; the background is clear"
    )
    regions: list[Region] = Field(description="the largest first")


class Prediction(BaseModel):
    classes: list[Likely] = Field(description="the likeliest first")
    labels: list[Likely] | None = Field(
        description="where pictures may show several classes, those that it is said to show, the likeliest first; else null"
    )
    known: float | None = Field(
        description="how well the picture fits what is known, 0 to 1; null where pictures may show several classes"
    )
    grid: int | None = Field(description="patches along a side; null for methods without")
    view: str = Field(description="what the tower saw: crop or keep, the centre square, or squash or pad, all of it")
    reasons: list[Reason]
    objects: Objects | None = Field(
        default=None, description="where in the picture each class is; null unless it is told"
    )


class ClassAccuracy(BaseModel):
    name: str
    accuracy: float | None = Field(description="null where no picture of it was left out")


class Confused(BaseModel):
    first: str
    second: str
    pictures: float = Field(description="left-out pictures of either that are taken for the other")
    advice: str


class Estimate(BaseModel):
    accuracy: float | None = Field(description="mean over classes; null before any picture was left out")
    interval: tuple[float, float] | None
    sources: list[str] = Field(description="how many pictures were left out, and how")
    classes: list[ClassAccuracy] = Field(description="in order of arrival")
    confused: list[Confused] = Field(description="the pairs that are mixed up most")
    shown: list[str] = Field(description="classes of `confusions`: all, or of many those that are mixed up most")
    confusions: list[list[float]] = Field(
        description="pictures of each of these classes (row) taken for each (column); fractions are expected numbers"
    )
    others: list[float] = Field(description="of each of these classes, pictures that are taken for a class not shown")


class Entry(BaseModel):
    date: str
    change: str
    names: list[str]


class History(BaseModel):
    entries: list[Entry] = Field(description="the first first")
    undoable: int = Field(description="how many changes can be undone")


class Health(BaseModel):
    status: str = "ok"
    version: str
    learning: float | None = Field(description="share of the stage in progress; null if nothing is being changed")
    may_ask: bool
    may_change: bool
    describes: bool = Field(description="whether a new class needs sentences")
    several: bool = Field(description="whether pictures may show several classes: names are given between semicolons")
    relabels: bool = Field(description="whether pictures that were learned can be learned as another class instead")
    max_bytes: int
    max_images: int = IMAGES


class Problem(BaseModel):
    error: str


def application(service: Service, rules: Rules) -> ASGIApp:
    """The ASGI application."""
    app = FastAPI(
        title="cairn",
        version=versions()["cairn"],
        docs_url=None,
        redoc_url=None,
        description="Changes need `Authorization: Bearer TOKEN`; on a network, everything does.",
        responses={"4XX": {"model": Problem}, "5XX": {"model": Problem}},
    )

    def small(file: UploadFile) -> None:
        if (file.size or 0) > rules.max_bytes:
            raise HTTPException(413, f"too large: a picture may have {rules.max_bytes / 1e6:g} MB")

    def classes() -> Classes:
        return Classes.model_validate({"classes": service.classes()})

    @app.get("/api/health")
    async def health(request: Request) -> Health:
        """Whether it is there, and what it allows."""
        trusted, work = request.state.trusted, service.work
        return Health(
            version=app.version,
            learning=None if work is None else work.share,
            may_ask=rules.local or trusted,
            may_change=trusted,
            describes=service.describes,
            several=service.several,
            relabels=service.relabels,
            max_bytes=rules.max_bytes,
        )

    @app.get("/api/classes")
    async def known() -> Classes:
        """The classes that are known."""
        return classes()

    @app.post("/api/predict")
    def predict(
        image: Annotated[UploadFile, File(description="one picture")],
        topk: Annotated[int, Form(ge=1, le=100, description="classes to tell")] = 5,
        threshold: Annotated[
            float | None,
            Form(ge=0, le=1, description="of several classes: in place of their own, from which probability on"),
        ] = None,
    ) -> Prediction:
        """What a picture shows."""
        small(image)
        return Prediction.model_validate(service.predict(image.file, topk, threshold))

    @app.post("/api/learn")
    async def learn(
        name: Annotated[str, Form(description="a new class, or a known one to learn more of")],
        images: Annotated[list[UploadFile], File(min_length=1, max_length=IMAGES, description="pictures of it")],
        sentences: Annotated[list[str] | None, Form(description="what a new class looks like, if asked for")] = None,
    ) -> Classes:
        """Learn a class; the answer comes when it is learned and saved."""
        for image in images:
            small(image)
        await service.learn(name, [image.file for image in images], sentences or ())
        return classes()

    @app.post("/api/relabel")
    async def relabel(
        name: Annotated[str, Form(description="the class that the pictures are of, new or known")],
        images: Annotated[list[UploadFile], File(min_length=1, max_length=IMAGES, description="the pictures")],
    ) -> Classes:
        """Pictures are of this class and of no other: taken out of those that they were learned as, and learned as this."""
        for image in images:
            small(image)
        await service.relabel(name, [image.file for image in images])
        return classes()

    @app.post("/api/undo")
    async def undo() -> Classes:
        """Take back the last change."""
        await service.undo()
        return classes()

    @app.get("/api/history")
    def history() -> History:
        """What was done when."""
        return History.model_validate(service.history())

    @app.get("/api/estimate")
    def estimate() -> Estimate:
        """How good it is, estimated from pictures left out of learning, and what it mixes up."""
        return Estimate.model_validate(service.estimate())

    @app.delete("/api/classes/{name:path}")
    async def forget(name: str) -> Classes:
        """Forget a class."""
        await service.forget(name)
        return classes()

    def page(path: str, name: str, kind: str) -> None:
        content = (resources.files("cairn.serve") / name).read_bytes()

        async def give() -> Response:
            return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

        app.get(path, include_in_schema=False)(give)

    for path, (name, kind) in PAGE.items():
        page(path, name, kind)

    def problem(status: int, text: str, headers: Any = None) -> JSONResponse:
        return JSONResponse({"error": one_line(text)}, status, headers)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        _, field, *position = map(str, first["loc"])
        upload = field in UPLOADS and first["type"] == "value_error"
        what = "must be an uploaded picture, sent as multipart/form-data" if upload else reason_of(first)
        return problem(422, f"{' '.join([field, *position])}: {what}")

    @app.exception_handler(CairnError)
    async def wrong(request: Request, error: CairnError) -> JSONResponse:
        if isinstance(error, ResultError):  # it names folders of this machine
            log.error("cairn: %s", error)
            return problem(503, "the learner's folder is in use or cannot be written; nothing was changed")
        return problem(422, str(error))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return problem(500, "something went wrong here; nothing was changed")

    return Guard(app, rules)


class Server(uvicorn.Server):
    """The first signal lets requests finish but gives up learning; the second waits for a save alone."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit, self.should_exit = self.should_exit, True
        self.service.stop(sig)


def server_config(app: ASGIApp) -> uvicorn.Config:
    """Without WebSockets, and without trust in what a proxy says of a client."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_level="error",
        access_log=False,
        lifespan="off",
        proxy_headers=False,
        server_header=False,
    )


def serve(
    folder: Path,
    host: str,
    port: int,
    *,
    token: str | None,
    max_bytes: int,
    max_pixels: int,
    public_url: str | None,
    ready: Callable[[str], None],
    towers: str | None = None,
) -> None:
    """Serve the learner of `folder` until a signal comes; `ready` is told where. Raises ConfigError for an address that
    cannot be had or must not be had without a token."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ConfigError(f"--host {one_line(host)}: {error.strerror}; give 127.0.0.1") from None
    loopback = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
    rules = Rules(
        loopback=loopback, host=host, token=token, max_bytes=max_bytes, max_pixels=max_pixels, public_url=public_url
    )
    service = Service(folder, max_pixels=max_pixels, towers=towers)
    try:
        listening = socket.create_server(address, family=family, backlog=128)
    except OSError as error:
        raise ConfigError(f"--port {port}: {error.strerror}; give another --port") from None
    with listening:
        config = server_config(application(service, rules))
        # A token that was given is known to whoever gave it, and is not shown
        shown = f"[{host}]" if ":" in host else host
        where = rules.public_url or f"http://{shown}:{listening.getsockname()[1]}/"
        ready(where if token is not None else f"{where}#token={quote(rules.token or '', safe='')}")
        try:
            Server(config, service).run(sockets=[listening])
        finally:
            service.close()
