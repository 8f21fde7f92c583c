"""How the HTTP server answers one request for a completion, at once or as a stream (server.py has the rest)."""
import asyncio
import json
import time
import uuid

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse

from core.inference.api import CHAT, TEXT, error_object, parse_request
from core.inference.conversation import encode_prompt, finish_reason, fit_into_context, longest_reply, reply_rows


def error_response(status, message, headers=None):
    return JSONResponse(error_object(status, message), status, headers)


class Completions:
    """
    POST /v1/chat/completions or /v1/completions. Beyond OpenAI's fields, a chat's truncation='auto' (from its Responses
    API) leaves out the oldest exchanges if the context is full; the header x-left-out says how many messages.
    """

    def __init__(self, app, api):
        self.app = app
        self.api = api

    async def __call__(self, scope, receive, send):
        request = Request(scope, receive)
        try:
            body = await self.read(request)
        except ClientDisconnect:
            return  # nobody receives an answer
        with self.app.place() as key:
            try:
                response = await self.respond(request, body, key)
            except ValueError as error:
                response = error_response(400, str(error))
            await response(scope, receive, send)

    async def read(self, request):
        """Return the body of a request. Raises HTTPException if it has another type, is too large or too slow."""
        content_type = request.headers.get('content-type', '').partition(';')[0].strip().lower()
        if content_type != 'application/json':  # other sites' pages cannot send this type without a CORS preflight
            raise HTTPException(415, 'expected Content-Type: application/json')
        seconds = self.app.limits.body_seconds
        try:
            return await asyncio.wait_for(self.read_body(request), seconds)
        except asyncio.TimeoutError:
            message = f'the body did not arrive within {seconds:g} seconds'
            raise HTTPException(408, message, {'connection': 'close'}) from None

    async def read_body(self, request):
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.app.max_body:
                raise HTTPException(413, f'the body has more than {self.app.max_body:,} bytes')
        return bytes(body)

    async def respond(self, request, body, key):
        app = self.app
        settings, fields = parse_request(body, app.settings, self.api, app.system)
        ids, headers = await app.compute(self.encode, settings, fields)
        settings['max_new_tokens'] = longest_reply(settings['max_new_tokens'], len(ids), app.model.config.block_size)
        app.reserve_cache(key, len(ids), settings['max_new_tokens'])
        settings['seed'] = fields.get('seed', [app.settings['seed'], next(app.request_numbers)])
        completion = Completion(app, self.api, request, ids, settings, fields)
        if fields.get('stream'):
            return StreamingResponse(completion.events(), media_type='text/event-stream', headers=headers)
        return await completion.response(headers)

    def encode(self, settings, fields):
        """Return the ids of the prompt, and the headers of the response."""
        headers = {'cache-control': 'no-store'}
        tokenizer, block_size = self.app.tokenizer, self.app.model.config.block_size
        if self.api is TEXT:
            return encode_prompt(fields['prompt'], tokenizer, block_size), headers
        room = None
        if fields.get('truncation') == 'auto':
            room = max(1, min(settings['max_new_tokens'], block_size // 4))
        ids, kept = fit_into_context(fields['messages'], tokenizer, block_size, room)
        return ids, {**headers, 'x-left-out': str(len(fields['messages']) - len(kept))}


class Completion:
    """One answer while it is generated, as OpenAI's objects."""

    def __init__(self, app, api, request, ids, settings, fields):
        self.app = app
        self.api = api
        self.request = request
        self.with_logprobs = fields.get('logprobs', False) is not False  # a chat's is a bool, a text's a number
        n_top = fields.get('top_logprobs', 0) if api is CHAT else fields.get('logprobs', 0)
        self.rows = reply_rows(app.model, app.tokenizer, ids, stop_texts=fields['stop'],
                               with_logprobs=self.with_logprobs, top_logprobs=n_top, **settings)
        self.n_prompt = len(ids)
        self.n_tokens = 0
        self.n_chars = 0  # of the tokens whose log-probabilities have been returned
        self.finish_reason = None
        self.include_usage = fields.get('stream_options', {}).get('include_usage', False)
        self.id = f'{api.id}{uuid.uuid4().hex}'
        self.created = int(time.time())

    async def steps(self):
        """
        Yield the new text and the tokens [(id, logprob, top_logprobs)] of every step, until the answer ends, the client
        disconnects or the server stops. The token that ends the answer is not among them.
        """
        while not self.finish_reason and not self.app.stopping() and not await self.request.is_disconnected():
            yield await self.app.compute(self.step)

    def step(self):
        row = next(self.rows)
        new = slice(self.n_tokens, len(row.ids) - (row.finish_reason == 'end'))
        self.n_tokens = len(row.ids)
        self.finish_reason = finish_reason(row)
        return row.new_text(), [*zip(row.ids[new], row.logprobs[new], row.top_logprobs[new])]

    async def response(self, headers):
        """Return the whole answer."""
        steps = [step async for step in self.steps()]
        if not self.finish_reason:
            return error_response(503, 'the server is about to end')
        text = ''.join(text for text, _ in steps)
        choice = self.choice(self.api.whole(text), [token for _, tokens in steps for token in tokens])
        content = {**self.head(self.api.object), 'choices': [choice], 'usage': self.usage()}
        return JSONResponse(content, headers=headers)

    async def events(self):
        """Yield the answer as server-sent events."""
        if self.api.first:
            yield self.event([self.choice(self.api.first, ended=False)])
        try:
            async for text, tokens in self.steps():
                if text or self.with_logprobs and tokens:
                    yield self.event([self.choice(self.api.part(text), tokens, ended=False)])
        except FloatingPointError as error:
            yield f'data: {json.dumps(error_object(500, str(error)))}\n\n'
            return
        if not self.finish_reason:
            return
        yield self.event([self.choice(self.api.last)])
        if self.include_usage:
            yield self.event([], self.usage())
        yield 'data: [DONE]\n\n'

    def choice(self, content, tokens=None, ended=True):
        logprobs = None
        if self.with_logprobs and tokens is not None:
            logprobs = self.api.logprobs(self.app.tokenizer, tokens, self.n_chars)
            self.n_chars += len(self.app.tokenizer.decode([token for token, *_ in tokens]))
        return {'index': 0, **content, 'logprobs': logprobs, 'finish_reason': self.finish_reason if ended else None}

    def event(self, choices, usage=None):
        chunk = {**self.head(self.api.chunk), 'choices': choices}
        if self.include_usage:
            chunk['usage'] = usage
        return f'data: {json.dumps(chunk, ensure_ascii=False)}\n\n'

    def head(self, object_):
        return {'id': self.id, 'object': object_, 'created': self.created, 'model': self.app.name}

    def usage(self):
        total = self.n_prompt + self.n_tokens
        return {'prompt_tokens': self.n_prompt, 'completion_tokens': self.n_tokens, 'total_tokens': total}
