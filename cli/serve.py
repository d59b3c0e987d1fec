"""`graft serve` and `graft worker`: the processes of a hub."""

import errno
import ipaddress
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cli.console import CommandError, err, out

if TYPE_CHECKING:
    from fastapi import FastAPI

    from hub.context import Hub
    from hub.settings import Settings


def register(app: typer.Typer) -> None:
    app.command()(serve)
    app.command()(worker)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on (127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one (8470).")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the hub's data (data).")] = None,
    demo: Annotated[bool | None, typer.Option(help="Fill an empty hub with adapters.")] = None,
) -> None:
    """Start the hub: the web page, the API, the Hugging Face protocol and the jobs."""
    settings = load_settings(host=host, port=port, data_dir=data, demo=demo)
    _require_public_url(settings)
    from hub.app import create_app
    from hub.context import open_hub
    from hub.errors import CannotStart

    with _listen(settings.host, settings.port) as listener:
        told = threading.Event()
        signal.signal(signal.SIGTERM, partial(_stop, told))
        try:
            with open_hub(settings) as hub:
                app = create_app(settings, hub=hub)
                # Not before: whoever reads it asks for the first page.
                _greet(settings, listener, hub.admin_token)
                with _seeding(hub) if settings.demo else nullcontext():
                    _run(app, listener, told)
        except CannotStart as error:
            raise CommandError(error.message) from error


@contextmanager
def _seeding(hub: "Hub") -> Iterator[None]:
    """Publish the demo catalogue beside the server, so that the first page need not wait for it."""
    from hub.demo import seed
    from hub.errors import HubError

    stopped = threading.Event()

    def work() -> None:
        try:
            seed(hub, demo_folders(), stopped.is_set)
        except HubError as error:
            err.print(f"the demo catalogue is not complete: {error.message}", markup=False)

    thread = threading.Thread(target=work, name="demo catalogue")
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def worker() -> None:
    """Run jobs of a hub on PostgreSQL on this machine."""
    settings = load_settings()
    if settings.database_url is None:
        raise CommandError(
            "with SQLite `graft serve` runs the jobs itself; workers need GRAFT_DATABASE_URL"
        )
    from hub.context import open_hub
    from hub.errors import CannotStart
    from hub.jobs.dispatcher import LocalDispatcher

    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        with open_hub(settings) as hub:
            dispatcher = LocalDispatcher(hub, settings.workers)
            dispatcher.start()
            out.print(f"Taking jobs, {settings.workers} at a time.")
            stopped.wait()
            dispatcher.stop()
    except CannotStart as error:
        raise CommandError(error.message) from error


def load_settings(**options: Any) -> "Settings":
    """Environment under the given options; CommandError names the one that is wrong."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from hub.settings import Settings

    given = {name: value for name, value in options.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        where = f"--{name.removesuffix('_dir')}" if name in given else f"GRAFT_{name.upper()}"
        said = first["msg"].removeprefix("Value error, ")
        raise CommandError(f"{where}: {said}") from error
    except SettingsError as error:
        # Only lists are parsed before they are validated, and this is the only one.
        wanted = 'a JSON list such as ["hub.lan", "hub.example"] is needed'
        raise CommandError(f"GRAFT_ALLOWED_HOSTS: {wanted}") from error


def demo_folders() -> Mapping[str, Path]:
    """Repo name -> folder, for everything that ships with the package."""
    import train

    home = Path(train.__file__).parent
    folders = {"demo/tiny-sd": home / "tiny" / "pipeline"}
    catalogue = home / "demo" / "catalogue"
    folders |= {f"{path.parent.name}/{path.name}": path for path in catalogue.glob("*/*")}
    return {name: path for name, path in folders.items() if path.is_dir()}


def _require_public_url(settings: "Settings") -> None:
    if settings.public_url is None and not _is_loopback(settings.host):
        raise CommandError(
            f"{settings.host} can be reached from other machines: say under which address in"
            f" GRAFT_PUBLIC_URL, for example http://{socket.gethostname()}:{settings.port}"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise CommandError(
                f"port {port} on {host} is in use; choose another one with --port"
            ) from error
        raise CommandError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def _greet(settings: "Settings", listener: socket.socket, admin_token: str | None) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    out.print(f"Grafthub is at {settings.public_url or f'http://{shown}:{port}'}")
    file = settings.data_dir.resolve() / "admin.token"
    if admin_token is not None:
        out.print(f"Token of the user admin, shown this once: {admin_token}")
    # Another server on the same catalogue may have been first, or somebody deleted it.
    where = str(file) if file.exists() else "not here; the server that was started first made it"
    out.print(f"Token file: {where}", markup=False)
    err.print("Stop with Ctrl-C.", style="dim")


def _run(app: "FastAPI", listener: socket.socket, told: threading.Event) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # Before uvicorn waits for open connections: event streams end, jobs are handed back.
            app.state.stopping.set()
            super().handle_exit(sig, frame)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if told.is_set():
                # Before this server heard of signals, and what `_stop` raised was lost.
                self.handle_exit(signal.SIGTERM, None)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=10,
    )
    Server(config).run(sockets=[listener])


def _stop(told: threading.Event, *_: Any) -> NoReturn:
    told.set()  # Python swallows what is raised while it happens to be in a destructor.
    # uvicorn raises the signal again once it has shut down; this unwinds to the open hub.
    raise SystemExit(0)
