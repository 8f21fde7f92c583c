"""Models with random weights to chat with, and chat.py in this process or one of its own."""
import contextlib
import os
import string
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script

from core.text.chat_template import END, START, chat_tokenizer, end_of_turn
from core.text.tokenizer import EOT, QWEN2_SPLIT, bpe_tokenizer, char_tokenizer
from core.weights.checkpoint import save_checkpoint
from model import GPT, GPTConfig

CHINESE = '满纸荒唐言一把辛酸泪都云作者痴谁解其中味，。？！'
CHARS = char_tokenizer(sorted(set(string.ascii_letters + string.digits + ' .,!?:/\'"<|>_\n' + CHINESE)))
QWEN_LIKE = bpe_tokenizer(['h e', 'he l', 'i m', '_ s', 'im _s', 'Ġ t'], split=QWEN2_SPLIT, specials=(EOT, START, END))
TOKENIZERS = {
    'characters': chat_tokenizer(CHARS),
    'like Qwen': QWEN_LIKE,
    'bytes': chat_tokenizer(bpe_tokenizer([])),
}
each_tokenizer = pytest.mark.parametrize('tokenizer', TOKENIZERS.values(), ids=TOKENIZERS)


def user(text):
    return {'role': 'user', 'content': text}


def assistant(text):
    return {'role': 'assistant', 'content': text}


def system(text):
    return {'role': 'system', 'content': text}


def save_model(folder, tokenizer=CHARS, block_size=64, end_logit=None, **args):
    """
    Save a run's folder with a random network. Returns folder, model, tokenizer.
    end_logit: how much higher the logit of the end of a turn is than the others', about; None: random.
    """
    torch.manual_seed(1)
    tok = chat_tokenizer(tokenizer)
    config = GPTConfig(block_size=block_size, vocab_size=tok.vocab_size, n_layer=1, n_head=2, n_embd=32, **args)
    model = GPT(config).requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    if end_logit is not None:  # channel 0 of the last activations is always 10, and only special tokens look at it
        norm, head = model.transformer.ln_f, model.lm_head.weight
        norm.weight[0] = 0
        norm.bias[0] = 10
        head[:, 0] = 0
        head[list(tok.specials.values()), 0] = -3
        head[end_of_turn(tok), 0] = end_logit / 10
    folder.mkdir(exist_ok=True)
    checkpoint = {'model': model.state_dict(), 'model_args': vars(model.config), 'tokenizer': tok.json, 'config': {}}
    save_checkpoint({**checkpoint, 'iter_num': 7}, str(folder / 'ckpt.pt'))
    return SimpleNamespace(folder=folder, model=model.eval(), tokenizer=tok)


def save_short(folder):
    """Save a model whose answers end soon."""
    return save_model(folder, end_logit=0.5)


def save_endless(folder):
    """Save a model whose answers never end."""
    return save_model(folder, block_size=8192, end_logit=-30, rope_theta=1e4)


@contextlib.contextmanager
def one_thread():
    """Networks this small gain nothing by a second thread, and wait for it on a busy machine."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def chat(run, *args, lines=(), monkeypatch=None):
    """Run chat.py with these lines typed. Returns code, out, err."""
    lines = iter(lines)

    def typed(prompt):
        print(prompt, end='')
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    if monkeypatch:
        monkeypatch.setattr('builtins.input', typed)
    return run_script('chat.py', f'--out_dir={run.folder}', '--device=cpu', *args)


@contextlib.contextmanager
def started(run, *args):
    """Start chat.py in a process of its own, and kill it at the end."""
    command = [sys.executable, 'chat.py', f'--out_dir={run.folder}', '--device=cpu', '--max_new_tokens=8000', *args]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(command, cwd=ROOT, text=True, encoding='utf-8', **pipes,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'})
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process, text):
    """Return what the process prints, up to this text."""
    shown = ''
    while not shown.endswith(text):
        char = process.stdout.read(1)
        assert char, (shown, process.stderr.read())
        shown += char
    return shown
