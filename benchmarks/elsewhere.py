"""
Compare the model of a run here, in transformers and in the real llama.cpp (pip install transformers gguf xllamacpp):

    python benchmarks/elsewhere.py out-poems-dpo out-hongloumeng-qwen2

A line is a run, a row of docs/RECORDS.md. It is exported by export.py. The figures: the largest difference of logits to
transformers; how many tokens of greedy texts agree, of n; how many texts llama.cpp splits into the same tokens; the
median and the largest difference of log-probabilities; perplexity on windows of the validation text; and for each
quantisation the change of perplexity and the size of the file.
"""
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
from conftest import run_script  # noqa: E402
from test_gguf import Llama, texts  # noqa: E402

from core.text.dataset import open_dataset, windows  # noqa: E402
from core.weights.checkpoint import load_model, source_tokenizer  # noqa: E402
from core.weights.vocabulary import resize_vocabulary  # noqa: E402

WINDOWS = 40  # of the validation split, for the perplexity
PROMPTS, PROMPT_TOKENS = 5, 16  # for greedy texts: the first tokens of some windows
QUANTS = ('f32', 'f16', 'q8_0', 'q4_0')


@torch.no_grad()
def compare(run):
    """Return {name: figure} of one run."""
    model, source = load_model(run)
    model.eval()
    tokenizer = source_tokenizer(source)
    T = model.config.block_size
    data = open_dataset(source['config']['dataset'])
    starts = np.linspace(0, data.splits['val'] - T - 1, WINDOWS).astype(int)
    idx = windows(data, 'val', starts, T)[0]  # (WINDOWS, T)
    figures = {'run': os.path.basename(run)}
    with tempfile.TemporaryDirectory() as folder:
        export(run, 'hf', 'f32', f'{folder}/hf-f32')
        for quant in QUANTS:
            export(run, 'gguf', quant, f'{folder}/gguf-{quant}')
        peer = AutoModelForCausalLM.from_pretrained(f'{folder}/hf-f32').eval()
        vocab_size = peer.config.vocab_size
        resize_vocabulary(model, vocab_size, vocab_size)  # the padding is not exported
        figures.update(compare_with_transformers(model, peer, idx))
        llamas = {quant: Llama(f'{folder}/gguf-{quant}') for quant in QUANTS}
        figures.update(compare_with_llamacpp(model, tokenizer, llamas['f32'], idx))

        losses = {}
        for quant, llama in llamas.items():
            losses[quant] = np.stack([llama.losses(ids) for ids in idx.tolist()])  # (WINDOWS, T - 1)
        counted = ~np.isnan(losses['f32'])  # llama.cpp reports no probability for parts of characters
        expected = model(idx[:, :-1], idx[:, 1:]).numpy()
        error = np.abs(losses['f32'] - expected)[counted]
        figures['log-probabilities'] = f'{np.median(error):.0e}, at most {error.max():.0e}'
        figures['perplexity'] = f'{np.exp(expected[counted].mean()):.3f} on {counted.sum():,} tokens'
        for quant in QUANTS:
            change = np.expm1((losses[quant] - losses['f32'])[counted].mean())
            megabytes = os.path.getsize(f'{folder}/gguf-{quant}') / 1e6
            figures[quant] = f'{change:+.3%}, {megabytes:.1f} MB'
    return figures


def export(run, form, quant, path):
    result = run_script(
        'export.py', f'--init_from={os.path.abspath(run)}', f'--format={form}', f'--quant={quant}', f'--to={path}')
    assert result.code == 0, result.err


def compare_with_transformers(model, peer, idx):
    difference = (model(idx[:8]) - peer(idx[:8]).logits).abs().max()
    start = idx[:PROMPTS, :PROMPT_TOKENS]
    n = min(100, idx.size(1) - PROMPT_TOKENS)
    ours = torch.stack([*model.generate(start, n)], dim=1)  # (PROMPTS, n)
    mask = torch.ones_like(start)
    theirs = peer.generate(start, attention_mask=mask, max_new_tokens=n, do_sample=False, eos_token_id=None)
    return {
        'transformers: logits': f'{difference:.0e}',
        'greedy there': describe_agreement(ours, theirs[:, PROMPT_TOKENS:]),
    }


def compare_with_llamacpp(model, tokenizer, llama, idx):
    start = idx[:PROMPTS, :PROMPT_TOKENS]
    n = min(60, idx.size(1) - PROMPT_TOKENS)
    special_ids = torch.tensor([*tokenizer.specials.values()])  # llama.cpp stops at some; forbidden in both

    def most_likely(logits):
        return logits.index_fill(1, special_ids, float('-inf')).argmax(dim=-1)

    ours = torch.stack([*model.generate(start, n, most_likely)], dim=1)  # (PROMPTS, n)
    forbidden = [[i, False] for i in special_ids.tolist()]
    theirs = [llama.complete(row, n, logit_bias=forbidden)['tokens'] for row in start.tolist()]
    samples = texts(tokenizer, 200)
    same = [llama.tokenize(text, parse_special=False) == tokenizer.encode(text).tolist() for text in samples]
    return {
        'llama.cpp, f32: greedy': describe_agreement(ours, torch.tensor(theirs)),
        '/tokenize': f'{sum(same)} of {len(samples)}',
    }


def describe_agreement(ours, theirs):
    """Two texts for every prompt, both (PROMPTS, n)."""
    return f'{int((ours == theirs).sum()) // PROMPTS} of {ours.size(1)}'


if __name__ == '__main__':
    for path in sys.argv[1:]:
        print(' | '.join(f'{name} {figure}' for name, figure in compare(path).items()), flush=True)
