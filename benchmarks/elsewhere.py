"""
What a run's model computes elsewhere: it is exported, opened by transformers and by the real llama.cpp (pip install transformers gguf xllamacpp), and compared, a row of
docs/RECORDS.md for each run:

    python benchmarks/elsewhere.py out-poems-dpo out-hongloumeng-qwen2
"""
import importlib
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

checkpoint, tokens, llamacpp = map(importlib.import_module, ('core.weights.checkpoint', 'core.text.dataset', 'test_gguf'))

WINDOWS = 40  # of the validation tokens, for the perplexity
QUANTS = 'f32', 'f16', 'q8_0', 'q4_0'


@torch.no_grad()
def measure(run):
    """{what: figure} of one run."""
    model, source = checkpoint.load_model(run)
    model.eval()
    tokenizer, T = checkpoint.source_tokenizer(source), model.config.block_size
    data = tokens.open_dataset(source['config']['dataset'])
    found = {'run': os.path.basename(run)}
    with tempfile.TemporaryDirectory() as folder:
        for form, quant in (('hf', 'f32'), *(('gguf', quant) for quant in QUANTS)):
            result = run_script('export.py', f'--init_from={os.path.abspath(run)}', f'--format={form}', f'--quant={quant}', f'--to={folder}/{form}-{quant}')
            assert result.code == 0, result.err
        peer = AutoModelForCausalLM.from_pretrained(f'{folder}/hf-f32').eval()
        places = np.linspace(0, data.splits['val'] - T - 1, WINDOWS).astype(int)
        windows = tokens.windows(data, 'val', places, T)[0]  # (WINDOWS, T)
        checkpoint.resize_vocabulary(model, peer.config.vocab_size, peer.config.vocab_size)  # without the rows that only round it up, as it is exported
        found['transformers: logits'] = f'{(model(windows[:8]) - peer(windows[:8]).logits).abs().max():.0e}'
        start, n = windows[:5, :16], min(100, T - 16)
        ours = torch.stack([*model.generate(start, n)], dim=1)  # (5, n)
        theirs = peer.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=n, do_sample=False, eos_token_id=None)[:, 16:]
        found['greedy there'] = f'{int((ours == theirs).sum()) // 5} of {n}'
        llamas, ends = {quant: llamacpp.Llama(f'{folder}/gguf-{quant}') for quant in QUANTS}, torch.tensor([*tokenizer.specials.values()])
        n = min(60, T - 16)
        ours = torch.stack([*model.generate(start, n, lambda logits: logits.index_fill(1, ends, float('-inf')).argmax(dim=-1))], dim=1)
        theirs = [llamas['f32'].complete(row, n, logit_bias=[[end, False] for end in ends.tolist()])['tokens'] for row in start.tolist()]
        found['llama.cpp, f32: greedy'] = f'{int((ours == torch.tensor(theirs)).sum()) // 5} of {n}'
        several = llamacpp.texts(tokenizer, 200)
        same = [llamas['f32'].post('/tokenize', content=text, parse_special=False)['tokens'] == tokenizer.encode(text).tolist() for text in several]
        found['/tokenize'] = f'{sum(same)} of {len(several)}'
        losses = {quant: np.stack([llama.losses(ids) for ids in windows.tolist()]) for quant, llama in llamas.items()}  # (WINDOWS, T - 1) each
        known = ~np.isnan(losses['f32'])
        reference = model(windows[:, :-1], windows[:, 1:]).numpy()
        error = np.abs(losses['f32'] - reference)[known]
        found['log-probabilities'] = f'{np.median(error):.0e}, at most {error.max():.0e}'
        found['perplexity'] = f'{np.exp(reference[known].mean()):.3f} on {known.sum():,} tokens'
        found.update((quant, f'{np.expm1((losses[quant] - losses["f32"])[known].mean()):+.3%}, {os.path.getsize(f"{folder}/gguf-{quant}") / 1e6:.1f} MB') for quant in QUANTS)
    return found


if __name__ == '__main__':
    for path in sys.argv[1:]:
        print(' | '.join(f'{key} {value}' for key, value in measure(path).items()), flush=True)
