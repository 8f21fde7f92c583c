"""core/training/saver.py: checkpoints are written in the background, one at a time, and failures end the run."""
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import exit_line

import core.training.saver as saver_module
from core.training.saver import Saver


@pytest.fixture
def saver(tmp_path):
    env = SimpleNamespace(master=True, sharded=False, device_type='cpu')
    return Saver(str(tmp_path), env, SimpleNamespace(sync=lambda: None), keep_last=1, background=True)


def state(tensor, step):
    optimizer = {'state': {0: {'step': torch.tensor(float(step))}}, 'param_groups': [{'lr': 0.1}]}
    return {'model': {'w': tensor, 'tied': tensor}, 'optimizer': optimizer, 'iter_num': step}


def test_training_goes_on_while_a_checkpoint_is_written(saver, tmp_path, monkeypatch):
    """The checkpoint does not contain later changes of the tensors; the next checkpoint waits until it is written."""
    go_on = threading.Event()
    writing = []
    written = []
    real = saver_module.save_checkpoint

    def slow(checkpoint, path):
        writing.append(checkpoint['iter_num'])
        assert go_on.wait(60) and len(writing) == len(written) + 1  # never two at once
        real(checkpoint, path)
        written.append(checkpoint['iter_num'])
    monkeypatch.setattr(saver_module, 'save_checkpoint', slow)
    w = torch.ones(3)
    saver.save(state(w, 1))
    assert saver.thread.is_alive() and not written
    w.zero_()  # a step of training
    threading.Timer(0.2, go_on.set).start()
    saver.save(state(w, 2))
    saver.wait(last=True)
    assert writing == written == [1, 2] and saver.saved == 2
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ('ckpt_00000001.pt', 'ckpt.pt'))
    assert first['model']['w'].tolist() == [1, 1, 1] and second['model']['w'].tolist() == [0, 0, 0]
    assert first['model']['w'].data_ptr() == first['model']['tied'].data_ptr()  # stored once
    assert [c['optimizer']['state'][0]['step'] for c in (first, second)] == [1, 2]


def test_a_disk_that_is_full_for_a_while(saver, tmp_path, monkeypatch, capsys):
    """One failed checkpoint is a warning; two consecutive ones, or the last, end the run."""
    real = saver_module.save_checkpoint
    full = [True, False, True, True]  # what the disk is at each attempt

    def save(checkpoint, path):
        if full.pop(0):
            sys.exit(f'{path}: could not be saved: No space left on device')
        real(checkpoint, path)
    monkeypatch.setattr(saver_module, 'save_checkpoint', save)
    for step in (1, 2):
        saver.save(state(torch.ones(3), step))
        saver.thread.join()
    assert capsys.readouterr().err.count('warning: ') == 1
    assert torch.load(tmp_path / 'ckpt.pt', weights_only=True)['iter_num'] == 2
    for step in (3, 4):
        saver.save(state(torch.ones(3), step))
        saver.thread.join()
    assert 'No space left' in exit_line(saver.save, state(torch.ones(3), 5))
    assert torch.load(tmp_path / 'ckpt.pt', weights_only=True)['iter_num'] == 2
