"""
A model's answers to conversations: as text that comes piece by piece, and over HTTP in the form of OpenAI's chat completions
(https://platform.openai.com/docs/api-reference/chat), with a page to talk to it.
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

from core.files import ROOT
from core.inference.conversation import check_range, fit_into_context, stream_reply
from core.text.chat_template import check_messages

OURS = {'max_tokens': 'max_new_tokens', 'max_completion_tokens': 'max_new_tokens', 'temperature': 'temperature', 'top_p': 'top_p', 'seed': 'seed'}  # by OpenAI's names
PATIENCE = 30  # seconds that a request may take to arrive
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"  # what the page may load


def parse_request(body, defaults, system=''):
    """
    What the bytes of a request ask for: (messages, settings as in LIMITS, its own fields); system: the system message of those that bring none. ValueError,
    one line, where they make no sense. Fields not named here are ignored.
    """
    def no_number(name):
        raise ValueError(f'{name} is no number')
    try:
        request = json.loads(body, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'the body is no JSON: {str(error) or "nested too deeply"}') from None
    if not isinstance(request, dict):
        raise ValueError('the body: expected a JSON object')
    request = {key: value for key, value in request.items() if value is not None}
    settings = {**defaults, **{ours: check_range(ours, request[theirs], theirs) for theirs, ours in OURS.items() if theirs in request}}
    stop = request.get('stop', [])
    request['stop'] = [stop] if isinstance(stop, str) else stop
    options = request.get('stream_options', {})
    for good, what in ((isinstance(request['stop'], list) and len(request['stop']) <= 4 and all(isinstance(text, str) and text for text in request['stop']), 'stop: expected a text or up to 4'),
                       (isinstance(request.get('stream', False), bool), 'stream: expected true or false'),
                       (isinstance(options, dict) and isinstance(options.get('include_usage', False), bool), 'stream_options: expected {"include_usage": true or false}'),
                       (type(request.get('n', 1)) is int and request.get('n', 1) == 1, 'n: expected 1; ask again for another answer'),
                       (isinstance(request.get('model', ''), str), 'model: expected its name'),
                       (request.get('truncation', 'disabled') in ('auto', 'disabled'), "truncation: expected 'auto' or 'disabled'")):
        if not good:
            raise ValueError(what)
    messages = request.get('messages')
    check_messages(messages)
    return [{'role': 'system', 'content': system}] * (system != '' and all(message['role'] != 'system' for message in messages)) + messages, settings, request


def build_app(model, tokenizer, name, settings, system='', max_requests=4, max_body=2**20, hosts=(), stopping=lambda: False):
    """
    The ASGI application. name: of the model; settings, as in LIMITS, and system: what requests do not choose; hosts: by what names a browser may have found it, any if
    there are none; stopping: asked between tokens. All tokens are computed in one thread, one at a time: answers take turns, and each is as it would be alone.
    """
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    worker, numbers, started, busy = ThreadPoolExecutor(1), itertools.count(), int(time.time()), 0
    with open(os.path.join(ROOT, 'core', 'inference', 'page.html'), encoding='utf-8') as f:
        html = f.read()

    def compute(*call):
        return asyncio.get_running_loop().run_in_executor(worker, *call)

    def error(status, message, headers=None):
        kind = {429: 'rate_limit_error', 500: 'server_error', 503: 'server_error'}.get(status, 'invalid_request_error')
        return JSONResponse({'error': {'message': message, 'type': kind, 'param': None, 'code': None}}, status, headers)

    async def body_of(request):
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_body:
                raise HTTPException(413, f'the body has more than {max_body:,} bytes')
        return bytes(body)

    async def completions(request):
        """POST /v1/chat/completions. Beyond OpenAI's fields: truncation='auto', as its Responses have it, leaves out the oldest exchanges when the context is full."""
        if request.headers.get('content-type', '').partition(';')[0].strip().lower() != 'application/json':  # which other sites' pages cannot send without asking
            return error(415, 'expected Content-Type: application/json')
        try:
            messages, choice, asked = parse_request(await asyncio.wait_for(body_of(request), PATIENCE), settings, system)
            room = max(1, min(choice['max_new_tokens'], model.config.block_size // 4)) if asked.get('truncation') == 'auto' else None
            ids, kept = await compute(fit_into_context, messages, tokenizer, model.config.block_size, room)
        except ValueError as reason:
            return error(400, str(reason))
        except asyncio.TimeoutError:
            return error(408, f'the body did not arrive within {PATIENCE} seconds', {'connection': 'close'})
        except ClientDisconnect:
            return Response(status_code=400)  # to nobody
        choice['seed'] = asked.get('seed', [settings['seed'], next(numbers)])
        pieces, length, reason = stream_reply(model, tokenizer, ids, stops=asked['stop'], **choice), 0, None
        about = {'id': f'chatcmpl-{uuid.uuid4().hex}', 'object': 'chat.completion', 'created': int(time.time()), 'model': name}

        async def come():
            """The pieces, until the answer ends, the client has gone or the server stops. Nobody asks for more then, so nothing more is computed."""
            nonlocal length, reason
            while not reason and not stopping() and not await request.is_disconnected():
                text, reason = await compute(next, pieces)
                length += 1
                yield text

        def usage():
            return {'prompt_tokens': len(ids), 'completion_tokens': length, 'total_tokens': len(ids) + length}

        async def events():
            with_usage = asked.get('stream_options', {}).get('include_usage', False)

            def event(delta, reason=None, **last):
                choices = [{'index': 0, 'delta': delta, 'logprobs': None, 'finish_reason': reason}]
                return f'data: {json.dumps({**about, "choices": choices, **({"usage": None} if with_usage else {}), **last}, ensure_ascii=False)}\n\n'
            about['object'] = 'chat.completion.chunk'
            yield event({'role': 'assistant', 'content': ''})
            async for text in come():
                if text:
                    yield event({'content': text})
            if reason:
                yield event({}, reason)
                if with_usage:
                    yield event({}, choices=[], usage=usage())
                yield 'data: [DONE]\n\n'
        headers = {'cache-control': 'no-store', 'x-left-out': str(len(messages) - len(kept))}
        if asked.get('stream'):
            return StreamingResponse(events(), media_type='text/event-stream', headers=headers)
        said = ''.join([text async for text in come()])
        if not reason:
            return error(503, 'the server is about to end')
        message = {'role': 'assistant', 'content': said, 'refusal': None}
        return JSONResponse({**about, 'choices': [{'index': 0, 'message': message, 'logprobs': None, 'finish_reason': reason}], 'usage': usage()}, headers=headers)

    async def models(request):
        return JSONResponse({'object': 'list', 'data': [{'id': name, 'object': 'model', 'created': started, 'owned_by': 'stonegpt'}]})

    async def page(request):
        return HTMLResponse(html, headers={'content-security-policy': POLICY, 'cache-control': 'no-cache'})

    async def refused(request, reason):
        return error(reason.status_code, f'{request.method} {request.url.path}: {reason.detail}', reason.headers)

    async def failed(request, reason):
        return error(500, f'{type(reason).__name__}, see the terminal of the server')
    routes = [Route('/', page), Route('/v1/models', models), Route('/v1/chat/completions', completions, methods=['POST'])]
    app = Starlette(routes=routes, exception_handlers={HTTPException: refused, Exception: failed})

    async def guarded(scope, receive, send):
        """The application for those who may come in: a page of another site that has its name resolve to this machine comes with that name (DNS rebinding)."""
        nonlocal busy
        if scope['type'] != 'http':
            return await app(scope, receive, send)
        host = re.sub(r':\d+$', '', Headers(scope=scope).get('host', ''))
        if hosts and host.lower() not in hosts:
            return await error(403, f'this server does not answer to the name {host!r:.100}; start it with another --host')(scope, receive, send)
        counts = scope['path'] == '/v1/chat/completions' and scope['method'] == 'POST'
        if counts and busy >= max_requests:
            return await error(429, f'busy with {busy} requests; try again later', {'retry-after': '1'})(scope, receive, send)
        busy += counts
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:  # the server ends and waits no longer
            if not stopping():
                raise
        finally:
            busy -= counts
    return guarded


def run_server(model, tokenizer, name, settings, system, host, port, max_requests, max_body):
    """Answer over HTTP until Ctrl-C. Ends the script with one line where the address is not to be had."""
    import uvicorn
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ':' in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        sys.exit(f'host={host}, port={port}: {error}; choose another --host or --port')
    address, port = listener.getsockname()[:2]
    local = address.startswith('127.') or address == '::1'
    if not local:
        print(f'warning: host={host}: whoever reaches this machine can use the model, without a password', file=sys.stderr)
    hosts = {'localhost', '127.0.0.1', '[::1]', host.lower(), f'[{host.lower()}]'} if local else ()
    app = build_app(model, tokenizer, name, settings, system, max_requests, max_body, hosts, lambda: server.should_exit)
    server = uvicorn.Server(uvicorn.Config(app, log_level='error', timeout_graceful_shutdown=1, lifespan='off'))
    print(f'http://{f"[{host}]" if ":" in host else host}:{port} is a page to talk to {name}, and OpenAI\'s API at /v1 (Ctrl-C ends it)', flush=True)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        print()
