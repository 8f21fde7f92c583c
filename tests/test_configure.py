"""
configurator.py and core/configure.py, on a throwaway repository (its own script, objective and config files), and on
the real scripts.
"""
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, run_script

from core import configure, suggestions

SCRIPT = '''"""
A toy.
"""
import os
import sys

# input and output
out_dir = 'out'  # where it goes
objective = 'plain'  # what is done
# numbers
steps = 10  # how many; a whole number
rate = 0.5  # how fast
verbose = False  # say more
note = 'a=b'  # any text
_hidden = 1
config, config_given = {}, set()
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())
import importlib, json
from core.files import find
task = importlib.import_module(f'objectives.{objective}')
assert all(globals().get(key, getattr(task, key, None)) == value for key, value in config.items())
print(json.dumps([config, sorted(config_given), getattr(task, 'beta', None), find(out_dir)]))
'''


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    """The folder of a throwaway repository: toy.py, two objectives, the real configurator."""
    folder = tmp_path_factory.mktemp('toy')
    (folder / 'core').mkdir()
    (folder / 'objectives').mkdir()
    (folder / 'config').mkdir()
    shutil.copy(ROOT / 'configurator.py', folder)
    for name in 'files.py', 'configure.py', 'startup.py', 'suggestions.py':
        shutil.copy(ROOT / 'core' / name, folder / 'core')
    (folder / 'toy.py').write_text(SCRIPT)
    (folder / 'objectives' / 'plain.py').write_text('SECRET = [1]\n')
    (folder / 'objectives' / 'fancy.py').write_text('beta = 0.1  # how far to stray\n')
    (folder / 'config' / 'small.py').write_text('steps = 3\n')
    return folder


@pytest.fixture
def run(toy, tmp_path):
    """Calls toy.py from an empty folder that is not the repository's."""
    def call(*args, **env):
        command = [sys.executable, toy / 'toy.py', *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **env})
    return call


def used(result):
    """Return [config, names on the command line, the objective's beta, out_dir found]."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def refusal(result):
    """Return the one line with which it exited."""
    assert result.returncode == 1 and result.stderr.count('\n') == 1, result.stderr
    return result.stderr


DEFAULTS = {'out_dir': 'out', 'objective': 'plain', 'steps': 10, 'rate': 0.5, 'verbose': False, 'note': 'a=b'}


def test_defaults(run):
    """Without arguments: the public plain globals, and nothing else."""
    assert used(run())[:2] == [DEFAULTS, []]


@pytest.mark.parametrize('args, expected', [
    (['--steps=7'], {'steps': 7}),
    (['--steps', '7'], {'steps': 7}),
    (['--steps=1e4'], {'steps': 10000}),
    (['--steps=-1'], {'steps': -1}),
    (['--rate=2'], {'rate': 2.0}),
    (['--rate', '-1e-3'], {'rate': -0.001}),
    (['--verbose=True'], {'verbose': True}),
    (['--verbose', 'true'], {'verbose': True}),
    (['--note=x=y=z'], {'note': 'x=y=z'}),
    (['--note', 'x=y'], {'note': 'x=y'}),
    (['--note=--steps=1'], {'note': '--steps=1'}),
    (['--note='], {'note': ''}),
    (['--note=3'], {'note': '3'}),
    (['--note=True'], {'note': 'True'}),
    (["--note='quoted'"], {'note': "'quoted'"}),
    (['--note=石头记 one'], {'note': '石头记 one'}),
    (['--steps=1', '--steps=2'], {'steps': 2}),
])
def test_values(run, args, expected):
    """--key=value and --key value; the type of each value is that of the default."""
    config, given, *_ = used(run(*args))
    assert config == DEFAULTS | expected
    assert [type(config[key]) for key in DEFAULTS] == [type(value) for value in DEFAULTS.values()]
    assert given == list(expected)


@pytest.mark.parametrize('args, names', [
    (['--step=1'], ['step:', 'did you mean --steps=1?']),
    (['--Out-Dir=a'], ['Out-Dir:', 'did you mean --out_dir=a?']),
    (['--note', '--steps=1'], ['--note needs a value']),
    (['--stepp', '--note=1'], ['stepp:', 'did you mean --steps=...?']),
    (['--no_verbose'], ['did you mean --verbose=False?']),
    (['--verbos'], ['did you mean --verbose?']),
    (['--nota=a b'], ["did you mean --note='a b'?"]),
    (['--config=config/small.py'], ['did you mean config/small.py without --config?']),
    (['--zzz=1'], ['zzz', '--help']),
    (['--_hidden=2'], ['_hidden']),
    (['--config=2'], ['config']),
    (['--steps=1.5'], ["steps='1.5'", 'an int']),
    (['--steps=ten'], ["steps='ten'", 'an int']),
    (['--steps=True'], ['steps', 'an int']),
    (['--steps=1e999'], ['steps', 'an int']),
    (['--rate=fast'], ["rate='fast'", 'a float']),
    (['--verbose=1'], ["verbose='1'", 'True or False']),
    (['--verbose=maybe'], ["verbose='maybe'", 'True or False']),
    (['--steps'], ['--steps', 'needs a value']),
    (['steps=3'], ['steps=3', 'did you mean --steps=3?']),
    (['-steps=3'], ['-steps: ', 'two dashes', 'did you mean --steps=3?']),
    (['-o', 'a'], ['-o: ', 'did you mean --out_dir=a?']),
    (['-v'], ['-v: ', 'two dashes']),
    (['config/big.py'], ['config/big.py', 'no config file']),
    (['--objective=nothing'], ['nothing', 'objectives/nothing.py']),
    (['--beta=1'], ['beta']),
])
def test_refused_arguments(run, args, names):
    """What cannot be meant ends the script with a line that names it and what is expected."""
    line = refusal(run(*args))
    assert all(name in line for name in names), line


@pytest.mark.parametrize('script, argument, says', [
    ('train.py', 'my.txt', ['python data/any_text/prepare.py my.txt', '--dataset=']),
    ('train.py', 'data/shakespeare_char', ['--dataset=data/shakespeare_char']),
    ('train.py', 'config/laptop', ['did you mean config/laptop.py?']),
    ('train.py', 'nothing', []),
    ('sample.py', 'my.txt', ['--start=FILE:my.txt']),
    ('sample.py', 'ckpt.pt', ['--ckpt=ckpt.pt']),
    ('evaluate.py', 'my text.txt', ["--data='my text.txt'"]),
    ('chat.py', 'my.txt', []),
])
def test_data_without_dashes(tmp_path, script, argument, says):
    """Only files that end in .py are executed. A text says in one line what it was taken for."""
    for name in 'my.txt', 'my text.txt', 'ckpt.pt':
        (tmp_path / name).write_text('open("executed", "w")\n')
    result = run_script(script, argument, cwd=tmp_path)
    assert result.code == 1 and result.err.count('\n') == 1, result.err
    assert result.err.startswith(f'{script}: {argument}: taken for a config file, but those end in .py')
    assert all(part in result.err for part in says) and ('did you mean' in result.err) == bool(says), result.err
    assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize('script, given, meant', [
    ('train.py', ['--lr=3e-4'], '--learning_rate=3e-4'),
    ('train.py', ['--num_train_epochs', '3'], '--epochs=3'),
    ('train.py', ['--bs=8'], '--batch_size=8'),
    ('train.py', ['--per_device_train_batch_size=8'], '--batch_size=8'),
    ('train.py', ['--gradient_accumulation=4'], '--gradient_accumulation_steps=4'),
    ('train.py', ['--max_steps=1000'], '--max_iters=1000'),
    ('train.py', ['--context_length=64'], '--block_size=64'),
    ('train.py', ['--max_length=64'], '--block_size=64'),
    ('train.py', ['--hidden_size=128'], '--n_embd=128'),
    ('train.py', ['--num_layers=4'], '--n_layer=4'),
    ('train.py', ['--num_heads=4'], '--n_head=4'),
    ('train.py', ['--output_dir=out-x'], '--out_dir=out-x'),
    ('train.py', ['--model=gpt2'], '--init_from=gpt2'),
    ('train.py', ['--resume', '--lr=1'], '--init_from=resume'),
    ('train.py', ['--bf16'], '--dtype=bfloat16'),
    ('train.py', ['--lora_r=8'], '--lora_rank=8'),
    ('train.py', ['--no-compile'], '--compile=False'),
    ('sample.py', ['--prompt', 'To be'], "--start='To be'"),
    ('sample.py', ['-p', 'To be'], "--start='To be'"),
    ('sample.py', ['--checkpoint=out-x/ckpt.pt'], '--init_from=out-x/ckpt.pt'),
    ('sample.py', ['--temp=1'], '--temperature=1'),
    ('sample.py', ['--max_tokens=9'], '--max_new_tokens=9'),
    ('sample.py', ['--max_length=9'], '--max_new_tokens=9'),
    ('sample.py', ['--file=a.txt'], '--prompts=a.txt'),
    ('sample.py', ['--tokenizer_path=gpt2'], '--tokenizer=gpt2'),
    ('chat.py', ['-m', 'out-x'], '--init_from=out-x'),
    ('chat.py', ['--text=Hello'], '--prompt=Hello'),
    ('evaluate.py', ['--text=my.txt'], '--data=my.txt'),
    ('export.py', ['--output_dir=x'], '--to=x'),
    ('export.py', ['--outtype=q8_0'], '--quant=q8_0'),
    ('plot.py', ['-o', 'x.png'], '--out=x.png'),
    ('data/any_text/prepare.py', ['--file=my.txt'], '--input=my.txt'),
    ('data/any_text/prepare.py', ['-i', 'my.txt'], '--input=my.txt'),
    ('data/chat/prepare.py', ['--max_length=64'], '--max_tokens=64'),
])
def test_names_from_elsewhere(script, given, meant):
    """The names that other programs give to our settings lead to ours, ready to paste."""
    result = run_script(script, *given)
    assert result.code == 1 and result.err.count('\n') == 1, result.err
    assert f'did you mean {meant}?' in result.err


def test_every_suggestion_exists():
    """Each setting that FOREIGN_NAMES suggests is one of some script."""
    helps = [run_script(script, '--help').out for script in (
        'train.py', 'sample.py', 'chat.py', 'evaluate.py', 'export.py', 'plot.py', *PREPARE)]
    ours = {key.partition('=')[0] for key in suggestions.FOREIGN_NAMES}
    assert ours <= set(re.findall(r'^  --(\w+)=', '\n'.join(helps), flags=re.M))


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'chat.py'])
@pytest.mark.parametrize('file, key', suggestions.RUN_FILES.items())
def test_a_run_given_alone(tmp_path, script, file, key):
    """The folder of a run or of a Hugging Face model without the setting's name."""
    (tmp_path / 'out-x').mkdir()
    (tmp_path / 'out-x' / file).touch()
    result = run_script(script, 'out-x', cwd=tmp_path)
    assert result.code == 1 and result.err.count('\n') == 1, result.err
    assert f'did you mean --{key}=out-x?' in result.err


@pytest.mark.parametrize('text, names', [
    ('output_dir = "a"', ['own.py: output_dir', 'did you mean out_dir?']),
    ('stepps = 3', ['own.py', 'stepps', 'did you mean steps?']),
    ('steps = "3"', ['own.py', "steps='3'", 'an int']),
    ('rate = None', ['own.py', 'rate=None', 'a float']),
    ('verbose = 1', ['own.py', 'verbose=1', 'True or False']),
    ('note = 5', ['own.py', 'note=5', 'text']),
    ('steps = = 3', ['own.py', 'SyntaxError']),
    ('note = ["a"]', ['own.py', "note=['a']", 'text']),
    ('rate = type("Two", (), {"__repr__": lambda self: "two\\nlines"})()', ['own.py: rate=two lines', 'a float']),
    ('raise ValueError("two\\nlines")', ['own.py: ValueError: two']),
    ('import nothing_of_that_name', ['own.py', 'nothing_of_that_name']),
    ('steps = 1 / 0', ['own.py', 'division by zero']),
])
def test_refused_config_file(run, tmp_path, text, names):
    """The same in a config file, which the line names."""
    (tmp_path / 'own.py').write_text(text + '\n')
    line = refusal(run('own.py'))
    assert all(name in line for name in names), line


def test_order(run, tmp_path):
    """Files and arguments apply in the order given; files count as not given on the command line."""
    (tmp_path / 'own.py').write_text('steps = 3\nrate = 3\n')
    assert used(run('own.py', '--steps=4'))[:2] == [DEFAULTS | {'steps': 4, 'rate': 3.0}, ['steps']]
    assert used(run('--steps=4', 'own.py'))[0]['steps'] == 3
    (tmp_path / 'second.py').write_text('steps = 5\n')
    assert used(run('own.py', 'second.py'))[0] == DEFAULTS | {'steps': 5, 'rate': 3.0}


CONFIG = """
import time, math as m
from os.path import join
_twice = 2 * steps

def half(x):
    return x / 2

class Nothing:
    pass

steps = _twice
rate = half(m.sqrt(16))
note = join(sys.platform and "a", "石")
"""


def test_config_file_is_python(run, tmp_path):
    """A config file sees earlier settings and the script's imports. Imports, functions and _names are no settings."""
    (tmp_path / 'own.py').write_text(CONFIG)
    config, *_ = used(run('--steps=21', 'own.py'))
    assert config == DEFAULTS | {'steps': 42, 'rate': 2.0, 'note': os.path.join('a', '石')}


@pytest.mark.parametrize('args', [
    ['--objective=fancy', '--beta=3'],
    ['--beta=3', '--objective=fancy'],
    ['own.py'],
    ['backwards.py'],
    ['--beta=7', 'own.py'],
    ['other.py', '--objective=fancy'],
])
def test_objective_settings(run, tmp_path, args):
    """The objective's globals are settings, set on its module, wherever the objective itself is named."""
    (tmp_path / 'own.py').write_text('objective = "fancy"\nbeta = 3\n')
    (tmp_path / 'backwards.py').write_text('beta = 3\nobjective = "fancy"\n')
    (tmp_path / 'other.py').write_text('beta = 3\n')
    config, _, beta, _ = used(run(*args))
    assert config == DEFAULTS | {'objective': 'fancy', 'beta': 3.0}
    assert beta == 3.0


def test_objective_settings_refused(run):
    """They are checked like all others."""
    assert 'did you mean --beta=3?' in refusal(run('--objective=fancy', '--betta=3'))
    assert "beta='x': expected a float" in refusal(run('--objective=fancy', '--beta=x'))


def test_help(run):
    """--help lists every setting with default, comment and heading, also of the objective, and does nothing else."""
    for args in ['--help'], ['-h'], ['--steps=3', '--help', 'config/small.py']:
        result = run(*args)
        assert (result.returncode, result.stderr) == (0, '')
        assert result.stdout.startswith('A toy.\n')
        lines = [line.strip() for line in result.stdout.splitlines()]
        assert [re.sub(' {2,}', '  ', line) for line in lines if line.startswith('--')] == [
            "--out_dir='out'  where it goes", "--objective='plain'  what is done",
            '--steps=10  how many; a whole number', '--rate=0.5  how fast',
            '--verbose=False  say more', "--note='a=b'  any text"]
        assert lines.index('input and output') < lines.index('numbers') and 'Overriding' not in result.stdout
    assert re.search('--beta=0.1 +how far to stray', run('--help', '--objective=fancy').stdout)


def test_overrides_are_said_once(run):
    """What was overridden is printed, under torchrun by the first process only."""
    assert 'Overriding: steps = 7\n' in run('--steps=7', RANK='0').stdout
    assert 'Overriding config with config/small.py\n' in run('config/small.py').stdout
    assert 'Overriding' not in run('--steps=7', 'config/small.py', RANK='1').stdout


def test_paths(run, toy, tmp_path):
    """Config files and folders: relative to the caller's folder, then in the repository; ~ is the home folder."""
    assert used(run('config/small.py'))[0]['steps'] == 3
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config' / 'small.py').write_text('steps = 4\n')
    assert used(run('config/small.py'))[0]['steps'] == 4
    home = {'HOME': str(tmp_path), 'USERPROFILE': str(tmp_path)}
    assert used(run('~/config/small.py', '--out_dir=~/runs/a', **home))[0]['steps'] == 4
    assert used(run())[3] == 'out'
    (toy / 'out').mkdir()
    try:
        assert used(run())[3] == str(toy / 'out')
        (tmp_path / 'out').mkdir()
        assert used(run())[3] == 'out'
    finally:
        (toy / 'out').rmdir()


PREPARE = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob('data/*/prepare.py'))]


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'chat.py', 'data/tang_poems/judge.py', *PREPARE])
def test_help_of_our_scripts(script, tmp_path):
    """Each script's --help gives every setting a comment, and starts nothing."""
    result = run_script(script, '--help', cwd=tmp_path)
    assert (result.code, result.err, list(tmp_path.iterdir())) == (0, '', [])
    listed = [line for line in result.out.splitlines() if line.startswith('  --')]
    source = (ROOT / script).read_text(encoding='utf-8').split('\nexec(open(')[0]
    named = re.findall(r'^([a-z][a-z_0-9]*) = (?!{)', source, flags=re.M)
    modules = []
    if script == 'train.py':
        modules = ['core/weights/lora.py', 'objectives/next_token.py']
    elif '_settings' in source or 'EXTRA_SETTINGS' in source:
        modules = ['core/text/prepare.py']
    for module in modules:
        named += re.findall(r'^([a-z_0-9]+) = (?!{)', (ROOT / module).read_text(encoding='utf-8'), flags=re.M)
    named = list(dict.fromkeys(named))
    assert [re.match('  --([a-z_0-9]+)=', line)[1] for line in listed] == named
    assert all(re.fullmatch(r'  --\w+=\S+ +\S.{4,}', line) for line in listed), listed
    assert '  ---' not in result.out


EXEC = SCRIPT[SCRIPT.index('config, config_given'):SCRIPT.index('import importlib')]
USER = f'''"""A user."""
import json
import os
from core.shared import seen
kind = "odd"  # which
NAMING
{EXEC}
print(json.dumps([size, kind, seen(), config, sorted(config_given)]))
'''


@pytest.mark.parametrize('naming', ['EXTRA_SETTINGS = ("core.shared",)', '_settings = "core.shared"'])
def test_settings_of_a_module(toy, tmp_path, naming):
    """A script can take the settings of a module and give one another default; both see the value that was chosen."""
    module = 'size = 5  # how large\nkind = "plain"  # which\n\ndef seen():\n    return [size, kind]\n'
    (toy / 'core' / 'shared.py').write_text(module)
    (toy / 'user.py').write_text(USER.replace('NAMING', naming))

    def call(*args):
        command = [sys.executable, toy / 'user.py', *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert used(call()) == [5, 'odd', [5, 'odd'], {'kind': 'odd', 'size': 5}, []]
    assert used(call('--size=7', '--kind=new')) == [7, 'new', [7, 'new'], {'kind': 'new', 'size': 7}, ['kind', 'size']]
    assert "size='big'" in refusal(call('--size=big'))
    assert 'did you mean --size=1?' in refusal(call('--siz=1'))
    helped = call('--help').stdout
    assert "--kind='odd'" in helped and '--size=5' in helped and 'how large' in helped
    assert helped.count('--kind') == 1


def test_no_setting_leaks_to_the_next_script(tmp_path, monkeypatch):
    """In one process, every configure() first resets the modules that an earlier one has set."""
    (tmp_path / 'leaky_module.py').write_text('size = 5  # how large\n')
    (tmp_path / 'script.py').write_text('steps = 1  # how many\n')
    monkeypatch.syspath_prepend(tmp_path)
    script = {'__file__': str(tmp_path / 'script.py'), '__doc__': '', 'steps': 1}
    monkeypatch.setattr(sys, 'argv', ['script.py', '--size=7'])
    configure.configure({**script, 'EXTRA_SETTINGS': ('leaky_module',)})
    module = importlib.import_module('leaky_module')
    assert module.size == 7
    monkeypatch.setattr(sys, 'argv', ['script.py'])
    configure.configure(dict(script))
    assert module.size == 5
    configure.configured.discard(module)


@pytest.mark.parametrize('accepted, args, steps, others', [
    ('positional', ['a', '--steps=2', 'b.py'], 2, ['a', 'b.py']),
    ('all', ['a.py', '--steps', '2', '--other=3', '--more', '4', '--last'], 2,
     ['a.py', '--other=3', '--more=4', '--last']),
    ('all', ['--verbose', 'a.py', '--verbose', 'False'], 1, ['a.py']),
])
def test_other_arguments(tmp_path, monkeypatch, accepted, args, steps, others):
    """A script can say that it takes arguments which are neither its settings nor config files."""
    (tmp_path / 'script.py').write_text('steps = 1  # how many\nverbose = False  # say more\n')
    script = {'__file__': str(tmp_path / 'script.py'), '__doc__': '', 'steps': 1, 'verbose': False,
              'OTHER_ARGUMENTS': accepted}
    monkeypatch.setattr(sys, 'argv', ['script.py', *args])
    configure.configure(script)
    assert (script['steps'], script['other_arguments']) == (steps, others)
    assert script['config'] == {'steps': steps, 'verbose': False}


def test_train_and_sample_from_anywhere(tiny_data, tmp_path, monkeypatch):
    """From another folder: config/ is the repository's; data/ and out_dir the caller's, then the repository's."""
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'mine').symlink_to(tiny_data)
    config = 'config/train_shakespeare_char.py'
    result = run_script('train.py', config, *TINY, '--dataset=mine', '--out_dir=o', '--max_iters=1', cwd=tmp_path)
    assert result.code == 0, result.err
    assert (tmp_path / 'o' / 'ckpt.pt').exists()
    args = '--device=cpu', '--start=one', '--num_samples=1', '--max_new_tokens=2'
    assert run_script('sample.py', '--out_dir=o', *args, cwd=tmp_path).code == 0
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    assert run_script('sample.py', '--out_dir=~/o', *args).code == 0
    result = run_script('train.py', *TINY, '--dataset=~/data/mine', '--out_dir=~/p', '--max_iters=1')
    assert result.code == 0 and (tmp_path / 'p' / 'ckpt.pt').exists(), result.err
    result = run_script('train.py', *TINY, '--dataset=any_text', '--out_dir=q', cwd=tmp_path)
    assert str(ROOT / 'data' / 'any_text' / 'train.bin') in result.err
    result = run_script('sample.py', '--device=cpu', '--out_dir=config', cwd=tmp_path)
    assert str(ROOT / 'config' / 'ckpt.pt') in result.err
