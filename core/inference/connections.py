"""Limits of the HTTP server's connections: their number, and how long a client may keep one waiting."""
import contextlib
from dataclasses import dataclass, field

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

FULL = (b'HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\nContent-Length: 0\r\n\r\n')


def most_connections():
    """Return half of the file descriptors that this process may have, or 512, so that accept() never fails."""
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files != resource.RLIM_INFINITY:
            return max(1, min(512, files // 2))
    return 512


@dataclass(frozen=True)
class Limits:
    """A connection above the number gets 503. After so many seconds a connection ends."""
    connections: int = field(default_factory=most_connections)
    head_seconds: float = 10  # in which the head of a request must arrive, and the first request begin
    body_seconds: float = 30  # in which its body must arrive (ChatApp answers 408)
    idle_seconds: float = 5  # between two requests
    send_seconds: float = 30  # in which the client must read what is sent


class Connection(H11Protocol):
    """uvicorn's connection, which by itself waits for ever for a head and for a client that does not read."""

    limits = None  # set in a subclass

    def connection_made(self, transport):
        super().connection_made(transport)
        self.timers = {}
        transport.set_write_buffer_limits(0)  # pause_writing() is called as soon as anything waits to be read
        if len(self.connections) > self.limits.connections:
            transport.write(FULL)
            transport.close()
        self.start_timer('head', self.limits.head_seconds)

    def data_received(self, data):
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:  # a request has begun
            self.stop_timer('head')
        else:
            self.start_timer('head', self.limits.head_seconds)

    def pause_writing(self):
        super().pause_writing()
        self.start_timer('send', self.limits.send_seconds)

    def resume_writing(self):
        super().resume_writing()
        self.stop_timer('send')

    def connection_lost(self, exc):
        for name in list(self.timers):
            self.stop_timer(name)
        super().connection_lost(exc)

    def start_timer(self, name, seconds):
        """Drop the connection after so many seconds, unless this timer is stopped; one that runs goes on."""
        if name not in self.timers:
            self.timers[name] = self.loop.call_later(seconds, self.transport.abort)

    def stop_timer(self, name):
        if name in self.timers:
            self.timers.pop(name).cancel()


def new_server(app, limits):
    """Return the uvicorn.Server of an ASGI application."""
    protocol = type('LimitedConnection', (Connection,), {'limits': limits})
    backlog = max(1, limits.connections // 2)  # so many are accepted at once, before any can be refused
    return uvicorn.Server(uvicorn.Config(
        app, http=protocol, ws='none', loop='asyncio', lifespan='off', log_level='error', backlog=backlog,
        timeout_keep_alive=limits.idle_seconds, timeout_graceful_shutdown=1))
