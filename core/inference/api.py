"""
OpenAI's API as data: the fields of a request, and the objects that answer it
(https://platform.openai.com/docs/api-reference/chat, https://platform.openai.com/docs/api-reference/completions).
"""
import itertools
import json
from collections import namedtuple

from core.inference.conversation import check_range
from core.text.chat_template import check_messages

SETTINGS = {  # fields that choose a setting of the answer; the last one given counts
    'max_tokens': 'max_new_tokens',
    'max_completion_tokens': 'max_new_tokens',
    'temperature': 'temperature',
    'top_p': 'top_p',
    'seed': 'seed',
    'presence_penalty': 'presence_penalty',
    'frequency_penalty': 'frequency_penalty',
    'top_k': 'top_k',  # this and the following ones are not OpenAI's, but vLLM's
    'min_p': 'min_p',
    'repetition_penalty': 'repetition_penalty',
}


def is_bool(x):
    return isinstance(x, bool)


def is_text(x):
    return isinstance(x, str) and bool(x)


def is_count(x):
    return type(x) is int and 0 <= x <= 20


def is_stop(x):
    return isinstance(x, list) and len(x) <= 4 and all(map(is_text, x))


def is_options(x):
    return isinstance(x, dict) and is_bool(x.get('include_usage', False))


FIELDS = {  # the other fields that count: whether a value is right, and what is expected
    'model': (lambda x: isinstance(x, str), 'its name'),
    'stop': (is_stop, 'a text or up to 4'),
    'stream': (is_bool, 'true or false'),
    'stream_options': (is_options, '{"include_usage": true or false}'),
}
CHAT_FIELDS = {
    **FIELDS,
    'logprobs': (is_bool, 'true or false'),
    'top_logprobs': (is_count, 'an int, 0 to 20'),
    'truncation': (lambda x: x in ('auto', 'disabled'), "'auto' or 'disabled'"),
}
TEXT_FIELDS = {
    **FIELDS,
    'prompt': (is_text, 'one text; lists of texts and token ids are not supported'),
    'logprobs': (is_count, 'an int, 0 to 20'),
}
UNSUPPORTED = {  # fields that it would mislead to ignore, and the only values that they may have
    'n': [1],
    'best_of': [1],
    'echo': [False],
    'suffix': [''],
    'logit_bias': [{}],
    'response_format': [{'type': 'text'}],
    'tools': [[]],
    'tool_choice': ['none', 'auto'],
    'functions': [[]],
    'function_call': ['none', 'auto'],
    'modalities': [['text']],
    'audio': [],
    'prediction': [],
    'web_search_options': [],
    # vLLM's
    'use_beam_search': [False],
    'ignore_eos': [False],
    'min_tokens': [0],
    'stop_token_ids': [[]],
    'prompt_logprobs': [],
    'guided_json': [],
    'guided_regex': [],
    'guided_choice': [],
    'guided_grammar': [],
    'structured_outputs': [],
}


# --- requests


def parse_request(body, defaults, api, system=''):
    """
    Parse the body (bytes) of a request for a completion. Returns (settings, fields).

    settings: as in LIMITS; `defaults` where the request says nothing. fields: those of the request that are not null;
    'stop' is always a list, and the messages of a chat have texts as their content. system: the system message if the
    messages have none ('': none). Unknown fields are ignored. Raises ValueError, with one line, if the request is
    invalid or asks for what is not supported.
    """
    fields = parse_json(body)
    settings = dict(defaults)
    for name, key in SETTINGS.items():
        if name in fields:
            settings[key] = check_range(key, fields[name], name)
    stop = fields.get('stop', [])
    fields['stop'] = [stop] if isinstance(stop, str) else stop
    for name, (is_right, expected) in api.fields.items():
        if name in fields and not is_right(fields[name]):
            raise ValueError(f'{name}: expected {expected}')
    for name, values in UNSUPPORTED.items():
        if name in fields and not any(type(fields[name]) is type(x) and fields[name] == x for x in values):
            if not values:
                raise ValueError(f'{name}: not supported; leave it out')
            raise ValueError(f'{name}: expected {" or ".join(map(json.dumps, values))}; others are not supported')
    if api is CHAT:
        fields['messages'] = plain_messages(fields.get('messages'), system)
        if 'top_logprobs' in fields and not fields.get('logprobs'):
            raise ValueError('top_logprobs: expected together with "logprobs": true')
    elif 'prompt' not in fields:
        raise ValueError('prompt: expected a text')
    return settings, fields


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


def plain_messages(messages, system):
    """Return checked messages whose content is a text, with the message `system` if there is none of this role."""
    if isinstance(messages, list):
        messages = [plain_message(message) for message in messages]
    check_messages(messages)
    if system and all(message['role'] != 'system' for message in messages):
        messages = [{'role': 'system', 'content': system}, *messages]
    return messages


def plain_message(message):
    """Return a message with its parts, [{"type": "text", "text": ...}, ...], joined by newlines, as in vLLM."""
    if not isinstance(message, dict) or not isinstance(message.get('content'), list):
        return message
    texts = []
    for part in message['content']:
        type_ = part.get('type') if isinstance(part, dict) else None
        if type_ != 'text':
            raise ValueError(f'a message: parts of type {type_!r:.50} are not supported, only "text"')
        if not isinstance(part.get('text'), str):
            raise ValueError('a message: expected parts {"type": "text", "text": ...}')
        texts.append(part['text'])
    return {**message, 'content': '\n'.join(texts)}


# --- responses


def token_object(tokenizer, token, logprob):
    piece = tokenizer.pieces[token]
    logprob = max(logprob, -9999.0)  # OpenAI's number for the impossible; JSON has no infinity
    return {'token': piece.decode(errors='replace'), 'logprob': logprob, 'bytes': list(piece)}


def chat_logprobs(tokenizer, tokens, offset):
    """Return the log-probabilities of tokens [(id, logprob, [(id, logprob) of the most likely ones])]."""
    content = [{**token_object(tokenizer, token, logprob), 'top_logprobs': [token_object(tokenizer, *x) for x in top]}
               for token, logprob, top in tokens]
    return {'content': content, 'refusal': None}


def text_logprobs(tokenizer, tokens, offset):
    """
    Return them in the older form of completions, where the most likely ones always include the token itself.
    offset: number of characters before the first token.
    """
    objects = [token_object(tokenizer, token, logprob) for token, logprob, _ in tokens]
    lengths = [len(x['token']) for x in objects]
    tops = [[token_object(tokenizer, *x) for x in (*top, (token, logprob))] for token, logprob, top in tokens]
    return {
        'tokens': [x['token'] for x in objects],
        'token_logprobs': [x['logprob'] for x in objects],
        'top_logprobs': [{x['token']: x['logprob'] for x in top} for top in tops],
        'text_offset': [offset + n for n in itertools.accumulate(lengths[:-1], initial=0)] if objects else [],
    }


# path; fields; id: how ids begin; object, chunk: names of the object and of its parts in a stream; whole(text),
# part(text): what a choice says about a whole text, or a part of it; first, last: the parts at both ends of a stream,
# None: none; logprobs: a function as above
Api = namedtuple('Api', 'path fields id object chunk whole part first last logprobs')
CHAT = Api(
    path='/v1/chat/completions', fields=CHAT_FIELDS, id='chatcmpl-',
    object='chat.completion', chunk='chat.completion.chunk',
    whole=lambda text: {'message': {'role': 'assistant', 'content': text, 'refusal': None}},
    part=lambda text: {'delta': {'content': text}},
    first={'delta': {'role': 'assistant', 'content': ''}}, last={'delta': {}},
    logprobs=chat_logprobs)
TEXT = Api(
    path='/v1/completions', fields=TEXT_FIELDS, id='cmpl-',
    object='text_completion', chunk='text_completion',
    whole=lambda text: {'text': text}, part=lambda text: {'text': text}, first=None, last={'text': ''},
    logprobs=text_logprobs)


def error_object(status, message):
    types = {429: 'rate_limit_error', 500: 'server_error', 503: 'server_error'}
    return {'error': {'message': message, 'type': types.get(status, 'invalid_request_error'), 'param': None,
                      'code': None}}
