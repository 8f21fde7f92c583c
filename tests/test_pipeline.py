"""What keeps a GPU busy: batches loaded ahead, numbers read late, steps left out on the device, one compilation."""
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, exit_line
from test_objectives import LETTERS, spell

from core.text.conversations import write_folders
from core.text.dataset import open_dataset
from core.training.optimizer import OPTIMIZERS, configure_optimizer
from core.training.pipeline import Unread, load_ahead
from model import GPT, GPTConfig
from objectives import next_token


@pytest.mark.parametrize('ahead', [True, False])
def test_batches_are_loaded_in_a_thread_one_step_ahead(ahead):
    loaded, threads = [], set()

    def load(step):
        loaded.append(step)
        threads.add(threading.get_ident())
        return f'batch {step}'
    steps = load_ahead(load, 3, ahead)
    assert [next(steps) for _ in range(4)] == ['batch 3', 'batch 4', 'batch 5', 'batch 6']
    steps.close()  # waits for the thread
    assert loaded == [3, 4, 5, 6, 7][:4 + ahead]
    assert threads == {threading.get_ident()} or ahead and threading.get_ident() not in threads


def test_what_loading_raises_arrives_at_its_step():
    def load(step):
        if step == 2:
            sys.exit('data/x is gone')
        return step
    steps = load_ahead(load, 0)
    assert [next(steps), next(steps)] == [0, 1]
    assert exit_line(next, steps) == 'data/x is gone'


class Event:
    """A CUDA event that counts how often somebody waited for it."""
    waits = 0

    def record(self):
        pass

    def synchronize(self):
        Event.waits += 1


def taken(unread, everything=False):
    steps = []
    while unread.is_ready(everything):
        steps.append(unread.read())
    return steps


def test_numbers_of_a_gpu_are_read_one_step_later_and_only_if_needed(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    unread = Unread(SimpleNamespace(device='cpu', device_type='cuda'))  # its tensors are on the CPU
    for step in range(3):
        unread.add((step, 'line'), [torch.tensor(step / 2), 7], needed=False)
        assert taken(unread) == [] and Event.waits == 0
    unread.add((3, 'line'), [torch.tensor(1.5), 7], needed=True)
    assert taken(unread) == [(0, 'line', 0.0, 7.0), (1, 'line', 0.5, 7.0), (2, 'line', 1.0, 7.0)]
    unread.add((4, 'line'), [torch.tensor(2.0), 7], needed=False)
    assert taken(unread) == [(3, 'line', 1.5, 7.0)]  # the step that was needed, now that another one is launched
    assert taken(unread, everything=True) == [(4, 'line', 2.0, 7.0)]
    assert taken(unread, everything=True) == []


def test_numbers_of_other_devices_are_read_at_once():
    unread = Unread(SimpleNamespace(device='cpu', device_type='cpu'))
    for step in range(3):
        unread.add((step,), [torch.tensor(0.5)], needed=False)
        assert taken(unread) == [(step, 0.5)]


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_step_is_left_out_on_the_device(name, monkeypatch):
    """The GPU's way: a tensor says whether anything may change. NaN gradients then leave no trace."""
    monkeypatch.setattr(torch.Tensor, 'is_cuda', True)

    def run(gradients):
        torch.manual_seed(1)
        model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=20, block_size=8))
        opt = configure_optimizer(model, name, 0.1, 0.01, (0.9, 0.95), 0.02)
        for seed, factor in gradients:
            torch.manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn_like(p) * factor
            opt.step(skip=torch.tensor(not np.isfinite(factor)))
        return [*model.parameters(), *(x for state in opt.state for x in state.values())]
    plain = run([(1, 1.0), (2, 1.0)])
    for expected, found in zip(plain, run([(1, 1.0), (9, float('nan')), (2, 1.0), (8, float('inf'))])):
        assert torch.equal(expected, found)


def test_batches_have_no_gaps(tiny_data):
    data = open_dataset(str(tiny_data))
    for x in next_token.load(data, 'train', np.array([5, 100, 300]), 16):
        assert x.is_contiguous()


COUNT = """
import runpy, sys
import torch, core.distributed
before = core.distributed.shutdown
def shutdown(env, status):
    import torch._dynamo.utils
    found = torch._dynamo.utils.counters
    print('graphs', found['stats']['unique_graphs'], flush=True)
    before(env, status)
core.distributed.shutdown = shutdown
runpy.run_path('train.py', run_name='__main__')
"""


def count_graphs(folder, *args):
    """Return the number of graphs that torch.compile made in a run of train.py."""
    script = folder / 'count.py'
    script.write_text(COUNT, encoding='utf-8')
    command = [sys.executable, str(script), *TINY, '--compile=True', f'--out_dir={folder}', *args]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'PYTHONUTF8': '1'}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding='utf-8', timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    if 'warning: torch.compile' in done.stdout:
        pytest.skip('no compiler here')
    return int(done.stdout.rpartition('graphs ')[2].split()[0])


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['text', 'conversations'])
def test_a_run_compiles_once(kind, tiny_data, tmp_path):
    data = tiny_data
    if kind == 'conversations':
        conversations = {'train': [spell(n) for n in range(60)], 'val': [spell(n) for n in range(60, 70)]}
        write_folders(str(tmp_path), LETTERS, conversations, {}, {}, max_tokens=32)
        data = tmp_path / 'sft'
    assert count_graphs(tmp_path, f'--dataset={data}', '--max_iters=5', '--eval_interval=3') == 1
