"""core/device_check.py: a device that computes wrongly is named once, with both numbers."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, run_script
from torch.nn import functional as F

from core import device_check

ENV = SimpleNamespace(device='mps', device_type='mps', master=True)
measure, sdpa = device_check.measure, F.scaled_dot_product_attention


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A device that is the CPU with another attention, and the list of the devices on which networks were computed."""
    monkeypatch.setattr(device_check, 'SHAPE', {'block_size': 64, 'vocab_size': 64, 'n_layer': 1, 'n_head': 4,
                                                'n_embd': 32})
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    device = SimpleNamespace(attention=sdpa, used=[])

    def pretended(name):
        device.used.append(name)
        with monkeypatch.context() as patch:
            if name != 'cpu':
                patch.setattr(F, 'scaled_dot_product_attention', device.attention)
            return measure('cpu')
    monkeypatch.setattr(device_check, 'measure', pretended)
    return device


def not_causal(q, k, v, mask=None, p=0.0, is_causal=False, enable_gqa=False):
    return sdpa(q, k, v, mask, p)


def ignores_the_mask(q, k, v, mask=None, p=0.0, is_causal=False, enable_gqa=False):
    return sdpa(q, k, v, is_causal=True)


def rounds(q, k, v, mask=None, p=0.0, is_causal=False, enable_gqa=False):
    """As TF32 does, 10 bits of mantissa."""
    q, k, v = (x.half().float() for x in (q, k, v))
    return sdpa(q, k, v, mask, p, is_causal)


def fills_with_nan(*args, **kwargs):
    return sdpa(*args, **kwargs) * torch.nan


@pytest.mark.parametrize('attention, named', [
    (sdpa, []), (rounds, []), (not_causal, ['GPT-2 style', 'Qwen3 style']),
    (ignores_the_mask, ['GPT-2 style with several documents in a row']), (fills_with_nan, list(device_check.NETWORKS)),
])
def test_warns_of_wrong_kernels(attention, named, device, tmp_path, capsys):
    """Both losses are named; what is merely rounded is right. The second call reads the result, and warns again."""
    device.attention = attention
    device_check.check_device(ENV)
    out = capsys.readouterr().out
    assert out.count('\n') == bool(named)
    assert out.count('warning: mps computes something else') == bool(named)
    assert [network for network in device_check.NETWORKS if f'{network}: loss ' in out] == named
    assert out.count(' on mps, ') == out.count(' on the CPU; gradient of ') == len(named)
    assert device.used == ['cpu', 'mps']
    device_check.check_device(ENV)
    assert (capsys.readouterr().out, device.used) == (out, ['cpu', 'mps'])

    (path,) = (tmp_path / 'stonegpt').iterdir()
    results = json.loads(path.read_text(encoding='utf-8'))
    (key,) = results
    assert torch.__version__ in key
    results[f'another {key}'] = results.pop(key)  # of another version or device: it does not count
    path.write_text(json.dumps(results), encoding='utf-8')
    device_check.check_device(ENV)
    assert (capsys.readouterr().out, device.used) == (out, ['cpu', 'mps'] * 2)
    assert set(json.loads(path.read_text(encoding='utf-8'))) == {key, f'another {key}'}


@pytest.mark.parametrize('content', ['{"torch', '7', ''])
def test_damaged_cache(content, device, tmp_path, capsys):
    path = tmp_path / 'stonegpt' / 'device_check.json'
    path.parent.mkdir()
    path.write_text(content, encoding='utf-8')
    device_check.check_device(ENV)
    assert capsys.readouterr().out == ''
    assert list(json.loads(path.read_text(encoding='utf-8')).values()) == ['']


def test_no_cache_folder(device, tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').write_text('', encoding='utf-8')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    device_check.check_device(ENV)
    assert (capsys.readouterr().out, device.used) == ('', ['cpu', 'mps'])


@pytest.mark.parametrize('env', [
    SimpleNamespace(device='cpu', device_type='cpu', master=True),
    SimpleNamespace(device='mps', device_type='mps', master=False),
])
def test_not_needed(env, device):
    device_check.check_device(env)
    assert device.used == []


def test_random_state(device):
    """A run draws the same numbers with the check as without it."""
    before = torch.get_rng_state()
    device_check.check_device(ENV)
    assert torch.equal(torch.get_rng_state(), before)


def test_train_checks(tiny_data, tmp_path, monkeypatch):
    """train.py calls it, with the device that it trains on."""
    checked = []
    monkeypatch.setattr(device_check, 'check_device', lambda env: checked.append(env.device))
    result = run_script('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--max_iters=1')
    assert (result.code, checked) == (0, ['cpu']), result.err
