"""--dry_run: it trains some steps, says what the run needs, and leaves nothing behind."""
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, run_script
from test_objectives import base, folder, stage  # noqa: F401  # fixtures

from core.training import dry_run
from core.training.dry_run import DryRun
from model import GPT, GPTConfig

SUMMARY = r'''dry run, nothing was written:
  parameters  (?P<parameters>[\d,]+), of which (?P<trained>[\d,]+) are trained
  memory      at least \d+ MB for weights, gradients and optimizer, and \d+ MB for (?P<rows>\d+) rows of 32
(              measured: [\d,.]+ .B; cpu has [\d,.]+ GB: it fits
)?  speed       [\d,]+ tokens a second, [\d,.]+ ms a step \((?P<timed>.*)\)
  time        [\d,.]+ \w+ for (?P<steps>[\d,]+) steps, about (?P<evaluations>[\d,.]+) \w+ of it for evaluations
'''


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(dry_run, 'STEPS', 2)


def files(path):
    return {p: p.stat().st_mtime_ns for p in path.rglob('*')}


def dry(*arguments):
    """Run with --dry_run. Returns the fields of the summary, with which the output ends, and all of the output."""
    result = run_script('train.py', *arguments, '--dry_run=True')
    assert (result.code, result.err) == (0, ''), result.err
    assert result.out.count('dry run') == 1
    return re.search(SUMMARY + r'\Z', result.out).groupdict(), result.out


@pytest.mark.parametrize('settings', [
    [], ['--optimizer=muon'], ['--rope_theta=10000', '--norm=rmsnorm', '--activation=swiglu', '--dropout=0.1'],
    ['--save_interval=1', '--eval_interval=1', '--sample_interval=1', '--tensorboard_log=True'],
])
def test_leaves_nothing_behind(settings, tiny_data, tmp_path):
    """Not even where a run would save, evaluate or sample at every step."""
    out_dir = tmp_path / 'out'
    fields, out = dry(*TINY, f'--dataset={tiny_data}', f'--out_dir={out_dir}', '--max_iters=1000', *settings)
    assert fields['parameters'] == fields['trained']
    assert (fields['rows'], fields['timed'], fields['steps']) == ('4', '2 timed', '1,000')
    assert 1 < out.count('iter ') <= 5
    assert not re.search(r'^step |^saved|checkpoint', out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_warns_of_hours_before_the_first_step(tiny_data, tmp_path):
    """On a CPU the first step of a large network may itself take minutes."""
    _, out = dry(*TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--max_iters=1000000000')
    assert 'warning: on this CPU the run will take about' in out.partition('iter 0')[0]


def test_changes_nothing(tiny_data, tiny_run, tmp_path):
    """A run's folder stays as it is, byte for byte and in time, also while another run has its lock."""
    before = files(tiny_run)
    train = [*TINY, f'--dataset={tiny_data}', f'--out_dir={tiny_run}']
    assert dry(*train, '--init_from=resume', '--max_iters=14')[0]['steps'] == '10'
    assert dry(*train)[0]['steps'] == '4'
    assert files(tiny_run) == before


@pytest.mark.parametrize('name', ['sft', 'reward', 'dpo', 'grpo', 'distill'])
def test_objectives(name, base, folder, tmp_path):  # noqa: F811
    fields, _ = dry(*stage(base, folder, name)[1:], f'--out_dir={tmp_path}/out')
    assert fields['steps'] == '4'
    if name == 'grpo':
        assert fields['evaluations'] == '0.0'  # not known, because they generate
    assert list(tmp_path.iterdir()) == []


def test_lora(base, folder, tmp_path):  # noqa: F811
    fields, _ = dry(*stage(base, folder, 'sft')[1:], f'--out_dir={tmp_path}/out', '--lora_rank=2')
    parameters, trained = (int(number.replace(',', '')) for number in (fields['parameters'], fields['trained']))
    assert 0 < trained < parameters / 2


@pytest.mark.parametrize('max_iters, timed', [(1, 'the first, which takes longest'), (2, '1 timed'), (5, '2 timed')])
def test_short_runs(max_iters, timed, tiny_data, tmp_path):
    fields, _ = dry(*TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}/out', f'--max_iters={max_iters}')
    assert (fields['timed'], fields['steps']) == (timed, str(max_iters))


def test_nothing_to_time(tiny_data, tiny_run):
    result = run_script('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tiny_run}', '--init_from=resume',
                        '--dry_run=True')
    assert (result.code, result.err) == (
        1, 'dry_run: 4 steps of max_iters=4 are done, so there is none to time; raise --max_iters\n')


def test_too_large(tiny_data, tmp_path, monkeypatch):
    """It ends before anything is allocated, with the line of a run that cannot fit."""
    monkeypatch.setattr('core.estimates.total_memory', lambda env: 2**16)
    result = run_script('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--dry_run=True')
    assert (result.code, result.err.count('\n')) == (1, 1)
    assert 'and cpu has 0 GB; lower' in result.err


def test_processes_on_a_cpu_share_its_memory(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '1000000')
    result = run_script('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--dry_run=True')
    if 'measured' in result.out:  # Linux
        assert re.search(r'B in each of 1000000 processes; .*: it does not fit$', result.out, re.MULTILINE)


CONFIG = {'max_iters': 1000, 'eval_interval': 100, 'eval_iters': 10, 'batch_size': 4, 'ema': 0.0}


def rehearse(monkeypatch, capsys, step_seconds, micro_steps=1, tokens=640, kind='', ema=0.0):
    """Tell a DryRun of steps that take so many seconds. Returns their number, (speed, ms) and the line on time."""
    now = [0.0]
    env = SimpleNamespace(device='cpu', device_type='cpu', dtype='float32', ddp=False, world_size=1, sharded=False)
    model = GPT(GPTConfig(block_size=32, vocab_size=10, n_layer=1, n_head=1, n_embd=8))
    data = SimpleNamespace(kind=kind, splits={'train': 9000, 'val': 1000})
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    rehearsal = DryRun(model, data, CONFIG | {'ema': ema}, env, 4, micro_steps, 0)
    steps = 0
    done = False
    while not done:
        now[0] += step_seconds(steps)
        done = rehearsal.step(tokens)
        steps += 1
    *_, speed, line = capsys.readouterr().out.splitlines()
    numbers = re.search(r'([\d,]+) tokens a second, ([\d,.]+) ms a step', speed).groups()
    return steps, [float(number.replace(',', '')) for number in numbers], line.strip()


@pytest.mark.parametrize('ema, splits', [(0.0, 2), (0.1, 3)])  # averaged weights: the validation split again
def test_hours(ema, splits, monkeypatch, capsys):
    """The first steps, which are slow, do not count; evaluations do."""
    steps, speed, time = rehearse(monkeypatch, capsys, lambda i: 20.0 if i < 2 else 4.0, ema=ema)
    assert (steps, speed) == (5, [160, 4000])
    evaluations = 11 * splits * 10 * 4 * 32 / (3 * 160)  # seconds: at steps 0, 100, ... 1000, forward only
    assert time == (f'time        {(4000 + evaluations) / 3600:.1f} hours for 1,000 steps, about '
                    f'{evaluations / 60:.1f} minutes of it for evaluations')


def test_micro_batches_are_added(monkeypatch, capsys):
    """Only four of twenty are computed in a step."""
    _, speed, time = rehearse(monkeypatch, capsys, lambda i: 4.0, micro_steps=20)
    assert speed == [160, 20_000]
    assert '5.6 hours for 1,000 steps' in time


def test_one_step_of_a_large_network(monkeypatch, capsys):
    assert rehearse(monkeypatch, capsys, lambda i: 64.0, kind='prompts') == (
        1, [10, 64_000], 'time        17.8 hours for 1,000 steps, about 0.0 minutes of it for evaluations')


@pytest.mark.slow
def test_several_processes(tiny_data, tmp_path):
    """All stop at the same step, and one prints."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py', *TINY,
               f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}', '--max_iters=1000', '--dry_run=True']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding='utf-8', timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('dry run, nothing was written:') == 1
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_compiled(tiny_data, tmp_path):
    """The time of compiling is said apart."""
    compiled = [*TINY, '--compile=True', f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}', '--max_iters=1000']
    _, out = dry(*compiled)
    assert re.search(r'^compiled in \d+ s$', out, re.MULTILINE)
    torch.compiler.reset()
