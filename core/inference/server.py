"""
The HTTP server of chat.py: a web page, and OpenAI's chat completions and completions (api.py).
"""
import asyncio
import contextlib
import itertools
import os
import re
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

from core.files import ROOT
from core.inference.api import CHAT, TEXT
from core.inference.completions import Completions, error_response
from core.inference.connections import Limits, new_server
from kv_cache import cache_bytes

PAGE_POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
               "frame-ancestors 'none'")  # what the page may load: nothing from other servers


async def http_error(request, error):
    return error_response(error.status_code, f'{request.method} {request.url.path}: {error.detail}', error.headers)


async def not_finite(request, error):
    return error_response(500, str(error))


async def internal_error(request, error):
    return error_response(500, f'{type(error).__name__}, see the terminal of the server')


class ChatApp:
    """
    The ASGI application. All tokens are computed in one thread, one at a time: concurrent answers take turns, and each
    is the same as it would be alone.

    name: of the model. settings (as in LIMITS), system: for requests that leave them out. max_requests: completions at
    a time. max_cache: bytes of the KV caches that all of them together may need. max_body: bytes of a request.
    hosts: the Host headers to answer, in lower case; empty: any. stopping(): whether the server is about to stop;
    called between tokens.
    """

    def __init__(self, model, tokenizer, name, settings, system='', max_requests=4, max_cache=2**30, max_body=2**20,
                 hosts=(), stopping=lambda: False, limits=None):
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.settings = settings
        self.system = system
        self.max_requests = max_requests
        self.max_cache = max_cache
        self.max_body = max_body
        self.hosts = hosts
        self.stopping = stopping
        self.limits = limits or Limits()
        self.worker = ThreadPoolExecutor(1)
        self.request_numbers = itertools.count()
        self.started = int(time.time())
        self.running = {}  # the completions, and the bytes of the KV cache that each may need
        with open(os.path.join(ROOT, 'core', 'inference', 'page.html'), encoding='utf-8') as f:
            self.html = f.read()
        routes = [
            Route('/', self.page),
            Route('/v1/models', self.models),
            *(Route(api.path, Completions(self, api), methods=['POST']) for api in (CHAT, TEXT)),
        ]
        handlers = {HTTPException: http_error, FloatingPointError: not_finite, Exception: internal_error}
        self.router = Starlette(routes=routes, exception_handlers=handlers)

    async def __call__(self, scope, receive, send):
        app = self.router
        if scope['type'] == 'http':
            host = re.sub(r':\d+$', '', Headers(scope=scope).get('host', ''))
            if self.hosts and host.lower() not in self.hosts:  # DNS rebinding: another site's name for this machine
                message = f'this server does not answer to the name {host!r:.100}; start it with another --host'
                app = error_response(403, message)
        await app(scope, receive, send)

    async def page(self, request):
        return HTMLResponse(self.html, headers={'content-security-policy': PAGE_POLICY, 'cache-control': 'no-cache'})

    async def models(self, request):
        model = {'id': self.name, 'object': 'model', 'created': self.started, 'owned_by': 'stonegpt'}
        return JSONResponse({'object': 'list', 'data': [model]})

    def compute(self, function, *args):
        """Call a function in the thread that computes."""
        return asyncio.get_running_loop().run_in_executor(self.worker, function, *args)

    @contextlib.contextmanager
    def place(self):
        """Take one of the max_requests places. Gives the key of self.running, or raises HTTPException."""
        if len(self.running) >= self.max_requests:
            message = f'busy with {len(self.running)} requests; try again later'
            raise HTTPException(429, message, {'retry-after': '1'})
        key = object()
        self.running[key] = 0
        try:
            yield key
        finally:
            del self.running[key]

    def reserve_cache(self, key, n_prompt, n_new):
        """
        Count what a completion needs at most, so that none has to end early for lack of memory; the cache itself grows
        with the text. Raises ValueError if it never fits, HTTPException if it does not fit now.
        """
        config = self.model.config
        slots = min(n_prompt + n_new, config.block_size)
        number_bytes = self.model.transformer.wte.weight.element_size()
        size = cache_bytes(config, slots, number_bytes)
        if size > self.max_cache:
            raise ValueError(f'{n_prompt:,} tokens and an answer of up to {n_new:,} need a KV cache of '
                             f'{size / 2**30:.3g} GB, the limit is {self.max_cache / 2**30:.3g} GB: lower max_tokens, '
                             'or start the server with a larger --max_cache_gb')
        if sum(self.running.values()) + size > self.max_cache:
            message = 'the answers that are being generated need the memory; try again later, or lower max_tokens'
            raise HTTPException(503, message, {'retry-after': '2'})
        self.running[key] = size


def run_server(model, tokenizer, name, settings, system, host, port, **limits):
    """Serve until Ctrl-C; limits: max_requests, ... of ChatApp. Exits if the address is not available."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ':' in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        sys.exit(f'host={host}, port={port}: {error}; choose another --host or --port')
    address, port = listener.getsockname()[:2]
    hosts = ()
    if address.startswith('127.') or address == '::1':
        hosts = {'localhost', '127.0.0.1', '[::1]', host.lower(), f'[{host.lower()}]'}
    else:
        print(f'warning: host={host}: whoever reaches this machine can use the model, without a password',
              file=sys.stderr)

    app = ChatApp(model, tokenizer, name, settings, system, hosts=hosts, stopping=lambda: server.should_exit, **limits)
    server = new_server(app, app.limits)
    shown_host = f'[{host}]' if ':' in host else host
    print(f"http://{shown_host}:{port} is a page to talk to {name}, and OpenAI's API at /v1 (Ctrl-C ends it)",
          flush=True)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        print()
