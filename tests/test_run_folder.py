"""core/training/run_folder.py: what a run starts from after a restart, and room on the disk."""
import os
from types import SimpleNamespace

import torch
from conftest import TINY, exit_line, run_script
from test_bad_input import refuse

from core.training import run_folder
from core.training.run_folder import check_disk, resolve_init_from, write_run_json
from core.weights.checkpoint import load_checkpoint


def test_only_its_own_run_goes_on_after_a_restart(tiny_data, tmp_path, monkeypatch):
    """Never the checkpoint of an earlier run in the folder; without a restart, init_from decides."""
    args = *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--max_iters=2'
    assert run_script('train.py', *args).code == 0
    alone = SimpleNamespace(master=True, ddp=False)
    group = SimpleNamespace(master=True, ddp=True)
    monkeypatch.setattr(run_folder, 'all_reduce', lambda numbers, env: torch.tensor(numbers))

    def start(init_from, env=alone, out_dir=tmp_path):
        return resolve_init_from(init_from, str(out_dir), env)[0]

    def start_each(out_dir=tmp_path):
        return [start(init_from, out_dir=out_dir) for init_from in ('scratch', 'gpt2', 'resume', 'auto')]

    assert start_each() == ['scratch', 'gpt2', 'resume', 'resume']
    assert start('auto', out_dir=tmp_path / 'nothing') == 'scratch'
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    assert start_each() == ['resume'] * 4
    assert start_each(tmp_path / 'nothing') == ['scratch', 'gpt2', 'resume', 'scratch']
    write_run_json(str(tmp_path), run_id='another')  # started, but has no checkpoint yet
    assert start_each() == ['scratch', 'gpt2', 'resume', 'resume']
    # when a machine joins, torchrun counts no restart, but the launch is the same
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '0')
    for name, value in {'TORCHELASTIC_RUN_ID': 'a', 'MASTER_ADDR': 'b', 'MASTER_PORT': '1'}.items():
        monkeypatch.setenv(name, value)
    write_run_json(str(tmp_path), run_id=load_checkpoint(str(tmp_path / 'ckpt.pt'))['run_id'], launch='a b 1')
    assert start('scratch', group) == 'resume' and start('scratch') == 'scratch'
    monkeypatch.setenv('MASTER_PORT', '2')
    assert start('scratch', group) == 'scratch'


def test_only_its_own_temporary_files_are_deleted(tmp_path):
    own = ['ckpt.pt.tmp12', 'ckpt_00000010.pt.tmp12', 'best.pt.tmp3', 'weights.pt.tmp3', 'log.csv.tmp4',
           'run.json.tmp4', 'samples.jsonl.tmp45']
    others = ['notes.tmp1', 'ckpt.pt.tmp', 'my-ckpt.pt.tmp1', 'data.bin.tmp7']
    for name in own + others:
        (tmp_path / name).write_text('', encoding='utf-8')
    run_folder.lock_run_folder(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, 'lock'])


def test_no_room_for_the_checkpoints(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.shutil, 'disk_usage', lambda path: SimpleNamespace(free=10**6))
    line = exit_line(check_disk, str(tmp_path), 10**9, keep_last=2)
    assert all(text in line for text in ('4.7 GB', '0.93 each', '0.00093 GB', '--keep_last=2')), line
    (tmp_path / 'ckpt.pt').write_bytes(bytes(2 * 10**6))
    os.link(tmp_path / 'ckpt.pt', tmp_path / 'best.pt')  # a hard link: its room counts once
    check_disk(str(tmp_path), 10**6, keep_last=0)
    exit_line(check_disk, str(tmp_path), 10**6, keep_last=1)
    args = *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--n_embd=512'
    refuse('train.py', *args, names=[f'out_dir={tmp_path}', 'GB', '--keep_last'])
    assert not (tmp_path / 'log.csv').exists()
