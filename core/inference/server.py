"""
The HTTP server of chat.py: a web page and OpenAI's chat completions
(https://platform.openai.com/docs/api-reference/chat).
"""
import asyncio
import itertools
import json
import os
import re
import socket
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from core.files import ROOT
from core.inference.conversation import check_range, fit_into_context, stream_reply
from core.text.chat_template import check_messages

COMPLETIONS = '/v1/chat/completions'
OPENAI_NAMES = {  # OpenAI's names of the settings that a request may choose; the last one given counts
    'max_tokens': 'max_new_tokens',
    'max_completion_tokens': 'max_new_tokens',
    'temperature': 'temperature',
    'top_p': 'top_p',
    'seed': 'seed',
}
BODY_SECONDS = 30  # a request must arrive within this time
PAGE_POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
               "frame-ancestors 'none'")  # what the page may load: nothing from other servers


def parse_request(body, defaults, system=''):
    """
    Parse the body (bytes) of a request for a completion. Returns (messages, settings, fields).

    settings: as in LIMITS; `defaults` where the request says nothing. fields: those of the request that are not null,
    'stop' always a list. system: the system message if the messages have none ('': none). Unknown fields are ignored.
    Raises ValueError, with one line, if the request is invalid.
    """
    fields = parse_json(body)
    settings = dict(defaults)
    for openai_name, key in OPENAI_NAMES.items():
        if openai_name in fields:
            settings[key] = check_range(key, fields[openai_name], openai_name)
    stop = fields.get('stop', [])
    fields['stop'] = [stop] if isinstance(stop, str) else stop
    check_fields(fields)
    messages = fields.get('messages')
    check_messages(messages)
    if system and all(message['role'] != 'system' for message in messages):
        messages = [{'role': 'system', 'content': system}, *messages]
    return messages, settings, fields


def parse_json(body):
    """Return the fields of a JSON object that are not null."""
    def refuse(name):
        raise ValueError(f'{name} is no number')

    try:
        fields = json.loads(body, parse_constant=refuse)  # NaN and Infinity
    except (ValueError, RecursionError) as error:
        raise ValueError(f'the body is no JSON: {str(error) or "nested too deeply"}') from None
    if not isinstance(fields, dict):
        raise ValueError('the body: expected a JSON object')
    return {key: value for key, value in fields.items() if value is not None}


def check_fields(fields):
    """Raise ValueError if a field of a request that is no setting has a wrong value."""
    stop = fields['stop']
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(text, str) and text for text in stop):
        raise ValueError('stop: expected a text or up to 4')
    if not isinstance(fields.get('stream', False), bool):
        raise ValueError('stream: expected true or false')
    options = fields.get('stream_options', {})
    if not isinstance(options, dict) or not isinstance(options.get('include_usage', False), bool):
        raise ValueError('stream_options: expected {"include_usage": true or false}')
    n = fields.get('n', 1)
    if type(n) is not int or n != 1:
        raise ValueError('n: expected 1; ask again for another answer')
    if not isinstance(fields.get('model', ''), str):
        raise ValueError('model: expected its name')
    if fields.get('truncation', 'disabled') not in ('auto', 'disabled'):
        raise ValueError("truncation: expected 'auto' or 'disabled'")


def error_response(status, message, headers=None):
    types = {429: 'rate_limit_error', 500: 'server_error', 503: 'server_error'}
    type_ = types.get(status, 'invalid_request_error')
    return JSONResponse({'error': {'message': message, 'type': type_, 'param': None, 'code': None}}, status, headers)


async def http_error(request, error):
    return error_response(error.status_code, f'{request.method} {request.url.path}: {error.detail}', error.headers)


async def internal_error(request, error):
    return error_response(500, f'{type(error).__name__}, see the terminal of the server')


class ChatApp:
    """
    The ASGI application. All tokens are computed in one thread, one at a time: concurrent answers take turns, and each
    is the same as it would be alone.

    name: of the model. settings (as in LIMITS), system: for requests that leave them out. max_requests: completions at
    a time. max_body: bytes of a request. hosts: the Host headers to answer, in lower case; empty: any.
    stopping(): whether the server is about to stop; called between tokens.
    """

    def __init__(self, model, tokenizer, name, settings, system='', max_requests=4, max_body=2**20, hosts=(),
                 stopping=lambda: False):
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.settings = settings
        self.system = system
        self.max_requests = max_requests
        self.max_body = max_body
        self.hosts = hosts
        self.stopping = stopping
        self.worker = ThreadPoolExecutor(1)
        self.request_numbers = itertools.count()
        self.started = int(time.time())
        self.n_running = 0  # completions
        with open(os.path.join(ROOT, 'core', 'inference', 'page.html'), encoding='utf-8') as f:
            self.html = f.read()
        routes = [
            Route('/', self.page),
            Route('/v1/models', self.models),
            Route(COMPLETIONS, self.completions, methods=['POST']),
        ]
        handlers = {HTTPException: http_error, Exception: internal_error}
        self.router = Starlette(routes=routes, exception_handlers=handlers)

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http':
            return await self.router(scope, receive, send)
        host = re.sub(r':\d+$', '', Headers(scope=scope).get('host', ''))
        if self.hosts and host.lower() not in self.hosts:  # DNS rebinding: another site's name for this machine
            message = f'this server does not answer to the name {host!r:.100}; start it with another --host'
            return await error_response(403, message)(scope, receive, send)
        is_completion = scope['path'] == COMPLETIONS and scope['method'] == 'POST'
        if is_completion and self.n_running >= self.max_requests:
            message = f'busy with {self.n_running} requests; try again later'
            return await error_response(429, message, {'retry-after': '1'})(scope, receive, send)
        if is_completion:
            self.n_running += 1
        try:
            await self.router(scope, receive, send)
        except asyncio.CancelledError:  # uvicorn stops and waits no longer
            if not self.stopping():
                raise
        finally:
            if is_completion:
                self.n_running -= 1

    async def page(self, request):
        return HTMLResponse(self.html, headers={'content-security-policy': PAGE_POLICY, 'cache-control': 'no-cache'})

    async def models(self, request):
        model = {'id': self.name, 'object': 'model', 'created': self.started, 'owned_by': 'stonegpt'}
        return JSONResponse({'object': 'list', 'data': [model]})

    async def completions(self, request):
        """
        POST /v1/chat/completions. Beyond OpenAI's fields, truncation='auto' (from its Responses API) leaves out the
        oldest exchanges if the context is full; the header x-left-out says how many messages.
        """
        content_type = request.headers.get('content-type', '').partition(';')[0].strip().lower()
        if content_type != 'application/json':  # other sites' pages cannot send this type without a CORS preflight
            return error_response(415, 'expected Content-Type: application/json')
        block_size = self.model.config.block_size
        try:
            body = await asyncio.wait_for(self.read_body(request), BODY_SECONDS)
            messages, settings, fields = parse_request(body, self.settings, self.system)
            room = None
            if fields.get('truncation') == 'auto':
                room = max(1, min(settings['max_new_tokens'], block_size // 4))
            ids, kept = await self.compute(fit_into_context, messages, self.tokenizer, block_size, room)
        except ValueError as error:
            return error_response(400, str(error))
        except asyncio.TimeoutError:
            message = f'the body did not arrive within {BODY_SECONDS} seconds'
            return error_response(408, message, {'connection': 'close'})
        except ClientDisconnect:
            return Response(status_code=400)  # nobody receives it
        settings['seed'] = fields.get('seed', [self.settings['seed'], next(self.request_numbers)])
        completion = Completion(self, request, ids, settings, fields)
        headers = {'cache-control': 'no-store', 'x-left-out': str(len(messages) - len(kept))}
        if fields.get('stream'):
            return StreamingResponse(completion.events(), media_type='text/event-stream', headers=headers)
        return await completion.response(headers)

    async def read_body(self, request):
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.max_body:
                raise HTTPException(413, f'the body has more than {self.max_body:,} bytes')
        return bytes(body)

    def compute(self, function, *args):
        """Call a function in the thread that computes."""
        return asyncio.get_running_loop().run_in_executor(self.worker, function, *args)


class Completion:
    """One answer while it is generated, as OpenAI's objects."""

    def __init__(self, app, request, ids, settings, fields):
        self.app = app
        self.request = request
        self.reply = stream_reply(app.model, app.tokenizer, ids, stop_texts=fields['stop'], **settings)
        self.n_prompt = len(ids)
        self.n_tokens = 0
        self.finish_reason = None
        self.include_usage = fields.get('stream_options', {}).get('include_usage', False)
        self.id = f'chatcmpl-{uuid.uuid4().hex}'
        self.created = int(time.time())

    async def texts(self):
        """Yield the new text of every token, until the answer ends, the client disconnects or the server stops."""
        while not self.finish_reason and not self.app.stopping() and not await self.request.is_disconnected():
            text, self.finish_reason = await self.app.compute(next, self.reply)
            self.n_tokens += 1
            yield text

    async def response(self, headers):
        """Return the whole answer."""
        text = ''.join([text async for text in self.texts()])
        if not self.finish_reason:
            return error_response(503, 'the server is about to end')
        message = {'role': 'assistant', 'content': text, 'refusal': None}
        choice = {'index': 0, 'message': message, 'logprobs': None, 'finish_reason': self.finish_reason}
        content = {**self.head('chat.completion'), 'choices': [choice], 'usage': self.usage()}
        return JSONResponse(content, headers=headers)

    async def events(self):
        """Yield the answer as server-sent events."""
        yield self.event({'role': 'assistant', 'content': ''})
        async for text in self.texts():
            if text:
                yield self.event({'content': text})
        if not self.finish_reason:
            return
        yield self.event({}, self.finish_reason)
        if self.include_usage:
            yield self.format_event([], self.usage())
        yield 'data: [DONE]\n\n'

    def event(self, delta, finish_reason=None):
        return self.format_event([{'index': 0, 'delta': delta, 'logprobs': None, 'finish_reason': finish_reason}])

    def format_event(self, choices, usage=None):
        chunk = {**self.head('chat.completion.chunk'), 'choices': choices}
        if self.include_usage:
            chunk['usage'] = usage
        return f'data: {json.dumps(chunk, ensure_ascii=False)}\n\n'

    def head(self, object_):
        return {'id': self.id, 'object': object_, 'created': self.created, 'model': self.app.name}

    def usage(self):
        total = self.n_prompt + self.n_tokens
        return {'prompt_tokens': self.n_prompt, 'completion_tokens': self.n_tokens, 'total_tokens': total}


def run_server(model, tokenizer, name, settings, system, host, port, max_requests, max_body):
    """Serve until Ctrl-C. Exits if the address is not available."""
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

    app = ChatApp(model, tokenizer, name, settings, system, max_requests, max_body, hosts,
                  stopping=lambda: server.should_exit)
    server = uvicorn.Server(uvicorn.Config(app, log_level='error', timeout_graceful_shutdown=1, lifespan='off'))
    shown_host = f'[{host}]' if ':' in host else host
    print(f"http://{shown_host}:{port} is a page to talk to {name}, and OpenAI's API at /v1 (Ctrl-C ends it)",
          flush=True)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        print()
