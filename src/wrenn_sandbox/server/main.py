"""Control plane and host agent of one machine, served by one process."""

import asyncio
import contextlib
import errno
import ipaddress
import resource
import signal
import socket
from collections.abc import Callable

import structlog

from wrenn_sandbox.control.app import create_app
from wrenn_sandbox.control.wiring import ControlPlane
from wrenn_sandbox.errors import Conflict, InvalidRequest
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.patience import slowness
from wrenn_sandbox.settings import ServiceSettings, Settings

from .http_server import HttpServer
from .service import Service
from .tls import Certificate

_log = structlog.get_logger(__name__)
_FILES = 65_536
_FILES_OF_HOST = 2048
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


async def run(settings: Settings, service_settings: ServiceSettings) -> None:
    """Start everything, serve until SIGINT or SIGTERM, stop everything.

    `Conflict`: the port or the data directory is in use, or the data directory's sandboxes belong
    to another database. A second signal does not wait for requests that are still under way nor
    for sandboxes that are to be paused, a third one kills. systemd is told what it asks for.
    """
    service = Service(service_settings)
    async with contextlib.AsyncExitStack() as stack:
        stopper = _Stopper(service)
        watchdog = asyncio.create_task(service.keep_alive())
        stack.callback(watchdog.cancel)
        if slowness() > 1:
            _log.info("this machine is slow, and limits in time are longer", factor=slowness())
        certificate = Certificate.of(settings)
        if certificate is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, certificate.renew)
        listener = stack.enter_context(_listen(settings.host, settings.port))
        is_local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        _allow_many_files(settings.max_connections + _FILES_OF_HOST)
        if certificate is None and not settings.trusted_proxies and not is_local:
            _log.warning("keys and tokens travel in the clear: see docs/tls.md", host=settings.host)
        host = await HostAgent.start(settings)
        stack.push_async_callback(host.close)
        app = create_app(settings, host)
        plane: ControlPlane = app.state.plane
        stopper.on_hurry = plane.pause_at_stop.skip
        if certificate is not None:
            plane.metrics.certificate.read = lambda: certificate.expires
        await stack.enter_async_context(app.router.lifespan_context(app))

        def say_ready(url: str) -> None:
            print(greeting(url, settings.domain), flush=True)
            service.ready()

        stopper.server = HttpServer(app, settings, listener, certificate, on_ready=say_ready)
        await stopper.server.serve()
    _log.info("stopped")


class _Stopper:
    """From now on the first signal stops gracefully, the second quickly."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._task = asyncio.current_task()
        self._signals = 0
        self.server: HttpServer | None = None
        self.on_hurry: Callable[[], None] | None = None
        for each in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(each, self._handle, each)

    def _handle(self, number: signal.Signals) -> None:
        self._signals += 1
        self._service.stopping()
        _log.info("stopping", signal=number.name, quickly=self._signals > 1)
        if self._signals > 1:
            for each in _SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            if self.on_hurry is not None:
                self.on_hurry()
        if self.server is None:
            if self._task is not None:
                self._task.cancel()
            return
        self.server.should_exit = True
        self.server.force_exit = self._signals > 1


def greeting(url: str, domain: str) -> str:
    """What a server that has started tells of where it is."""
    scheme, _, address = url.partition("://")
    names = f"{domain}:{address.rpartition(':')[2]}"
    e2b = [f"E2B_API_URL={url} E2B_SANDBOX_URL={url}"]
    if scheme == "https":
        e2b.append(f"E2B_DOMAIN={names}")
    lines = [
        f"Wrenn is ready at {url}",
        f"Ports of sandboxes: {scheme}://PORT-ID.{names}",
        f"Clients of E2B: {' or '.join(e2b)}",
    ]
    return "\n".join(lines)


def check_address(settings: Settings) -> None:
    """Raises what `run` raises where the port cannot be had, before anything takes long."""
    with _listen(settings.host, settings.port):
        return


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror:
        raise InvalidRequest(f"{host} is not an address to listen on") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(
                f"Port {port} of {host} is in use: stop the other program or choose another port"
                " (--port or WRENN_PORT)"
            ) from None
        raise InvalidRequest(f"Cannot listen on port {port} of {host}: {error.strerror}") from None
    return listener


def _allow_many_files(needed: int) -> None:
    """Each connection is a file, and so is much of each machine."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _FILES if most == resource.RLIM_INFINITY else min(most, _FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    if limit < needed:
        _log.warning("few files may be open; raise the limit (nofile)", limit=limit, needed=needed)
