"""Bad input ends a script with one clear line on stderr and a non-zero exit, and leaves no file half-written."""
import contextlib
import errno
import functools
import io
import json
import operator
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, losses_of, make_dataset, run_script

from core.text.dataset import open_dataset
from core.text.tokenizer import bpe_tokenizer, char_tokenizer, load_tokenizer
from core.weights.huggingface import hf_config, model_without_weights
from model import GPT, GPTConfig


def tree(folder):
    """Return everything below a folder: {path: bytes, or None for a folder}."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob('*')}


def refuse(script, *args, names, folder=None, warnings=0):
    """
    Run a script that must exit with one line that contains all of `names`, after so many warnings, and must change
    nothing below `folder`. Returns the line.
    """
    before = tree(folder) if folder else None
    result = run_script(script, *args)
    assert result.code not in (0, None), result
    *above, line = result.err.splitlines()
    assert len(above) == warnings, result.err
    assert all(text.startswith('warning: ') for text in above), result.err
    assert 'Traceback' not in result.out + result.err
    assert all(str(name) in line for name in names), line
    if folder:
        after = tree(folder)
        assert sorted(after) == sorted(before)
        assert after == before
    return line


class Evil:
    """Unpickled by plain pickle, this creates a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@pytest.fixture
def own_run(tiny_run, tmp_path):
    """A copy of the tiny run, to be damaged."""
    return shutil.copytree(tiny_run, tmp_path / 'run')


@pytest.fixture
def own_data(tiny_data, tmp_path):
    """A copy of the tiny dataset, to be damaged."""
    return shutil.copytree(tiny_data, tmp_path / 'tiny')

# --- settings


@pytest.mark.parametrize('args, names', [
    (['--batchsize=4'], ['batchsize', 'batch_size']),
    (['--batch_size=4.5'], ["batch_size='4.5'", 'an int']),
    (['--max_iters'], ['--max_iters', 'needs a value']),
    (['config/train_shakespear.py'], ['config/train_shakespear.py']),
    (['--batch_size=0'], ['batch_size=0', 'at least 1']),
    (['--n_head=3'], ['n_embd=32', 'n_head=3', 'divisible']),
    (['--n_embd=200', '--n_head=0'], ['n_embd=200', 'n_head=3', '64 channels']),
    (['--data_order=documents'], ['data_order=documents', 'tiny', 'without document ends']),
    (['--device=tpu'], ['device=tpu', 'cpu']),
    (['--dtype=int8'], ['dtype=int8', 'float32']),
    (['--sample_interval=1', '--sample_tokens=0'], ['sample_tokens=0', 'at least 1']),
    (['—n_layer=2'], ['settings have two dashes', '--n_layer=2']),
    (['--init_from=resme'], ['did you mean resume?']),
    (['--dtype=float16'], ['dtype=float16', 'bfloat16']),
    (['--n_layer=100', '--n_embd=16384', '--n_head=1'], ['GB', 'weights and optimizer', '--n_layer or --n_embd']),
    (['--batch_size=1000000000'], ['GB', '--batch_size', '--gradient_checkpointing=True']),
    (['--objective=previous_token'], ['previous_token', 'objectives/']),
    (['--dry_run=True', '--eval_only=True'], ['dry_run=True', 'eval_only=True', 'leave one out']),
], ids=str)
def test_settings(tiny_data, tmp_path, args, names):
    """Impossible settings of train.py, end to end. test_settings.py has more values, test_configure.py types."""
    args = [*TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}', *args]
    refuse('train.py', *args, names=names, folder=tmp_path)


@pytest.mark.parametrize('text, names', [
    ('batchsize = 4', ['batchsize', 'batch_size']),
    ("batch_size = '4'", ["batch_size='4'", 'an int']),
])
def test_settings_in_a_file(tiny_data, tmp_path, text, names):
    """The line names the config file."""
    (tmp_path / 'mine.py').write_text(text)
    refuse('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}', tmp_path / 'mine.py',
           names=['mine.py', *names], folder=tmp_path)


@pytest.mark.parametrize('args, names', [
    (['--num_samples=0'], ['num_samples=0', 'at least 1']),
    (['--max_new_tokens=0'], ['max_new_tokens=0', 'at least 1']),
    (['--temperature=-0.5'], ['temperature=-0.5', 'at least 0']),
    (['--top_k=-1'], ['top_k=-1', 'at least 0']),
    (['--top_p=0'], ['top_p=0.0', 'more than 0']),
    (['--top_p=1.5'], ['top_p=1.5', 'at most 1']),
    (['--start=one €'], ['€', 'U+20AC']),
    (['--start='], ['no text to continue']),
    (['--start=FILE:no/such.txt'], ['no/such.txt']),
    (['--tokenizer=no/such.json'], ['no/such.json', 'tokenizer.json']),
    (['--ckpt=no/such.pt'], ['no/such.pt', '--ckpt']),
    (['--temprature=1'], ['temprature', 'temperature']),
], ids=str)
def test_sampling_settings(tiny_run, args, names):
    """Impossible values of sample.py's settings, a prompt that the tokenizer cannot encode, and an empty prompt."""
    refuse('sample.py', f'--out_dir={tiny_run}', '--device=cpu', '--start=one', *args, names=names)


@pytest.mark.parametrize('content, names', [
    (b'', ['no text to continue']),
    ('one é'.encode('latin-1'), ['prompt.txt', 'UTF-8']),
])
def test_prompt_file(tiny_run, tmp_path, content, names):
    """An empty prompt file, and one in another encoding."""
    (tmp_path / 'prompt.txt').write_bytes(content)
    refuse('sample.py', f'--out_dir={tiny_run}', '--device=cpu', f'--start=FILE:{tmp_path / "prompt.txt"}', names=names)


@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_no_cuda(tiny_data, tiny_run, tmp_path, monkeypatch, script):
    """device=cuda, and torch sees no GPU."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    args = [f'--out_dir={tiny_run}']
    if script == 'train.py':
        args = [*TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}']
    refuse(script, *args, '--device=cuda', names=['device=cuda', '--device=cpu'], folder=tmp_path)


@pytest.mark.parametrize('script', ['sample.py', 'chat.py', 'evaluate.py'])
def test_int8_on_a_gpu(tiny_run, monkeypatch, script):
    """There it would be slower than bf16."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr('core.device.use_gpu', lambda device: None)
    refuse(script, f'--out_dir={tiny_run}', '--device=cuda', '--dtype=int8', names=['dtype=int8', '--dtype=bfloat16'])


def test_rows_for_three_processes(tiny_data, tmp_path, monkeypatch):
    """Four rows cannot be divided evenly among three processes."""
    for name, value in {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '3', 'MASTER_ADDR': '127.0.0.1'}.items():
        monkeypatch.setenv(name, value)
    # do not wait for the other two
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda *args, **kwargs: None)
    monkeypatch.setattr('core.training.run_folder.all_reduce', lambda numbers, env: torch.tensor(numbers))
    refuse('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}',
           names=['batch_size=4', 'gradient_accumulation_steps=1', '3 processes'], folder=tmp_path)

# --- datasets


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def write_meta(folder, text):
    (folder / 'meta.json').write_text(text, encoding='utf-8')


def drop_counts(folder):
    """Keep only the dtype in meta.json, because wrong counts would be noticed first."""
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    write_meta(folder, json.dumps({'dtype': meta['dtype']}))


def write_ids(path, *ids):
    drop_counts(path.parent)
    np.array(ids * 100, dtype='<u2').tofile(path)


def write_meta_pkl(folder, meta):
    (folder / 'meta.json').unlink()
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))


def delete_files(folder):
    for path in folder.iterdir():
        path.unlink()


def make_too_short(folder):
    drop_counts(folder)
    cut(folder / 'train.bin', 64)


def write_large_meta_pkl(folder):
    write_meta_pkl(folder, {'vocab_size': 70000, 'itos': dict(enumerate(map(chr, range(70000))))})


def write_cut_meta_pkl(folder):
    write_meta_pkl(folder, {'vocab_size': 1, 'itos': {0: 'a'}})
    cut(folder / 'meta.pkl', 10)


DATASETS = {  # name: (a function that damages the folder, what the line must contain)
    'missing': (
        shutil.rmtree, ['tiny/train.bin', 'prepare.py']),
    'empty folder': (
        delete_files, ['tiny/train.bin', 'prepare.py']),
    'empty train.bin': (
        lambda d: cut(d / 'train.bin', 0), ['train.bin is empty', 'prepare.py']),
    'odd byte': (
        lambda d: cut(d / 'train.bin', 1001), ['train.bin', '1,001 bytes', 'prepare.py']),
    'odd byte in val.bin': (
        lambda d: cut(d / 'val.bin', 1001), ['val.bin', '1,001 bytes', 'prepare.py']),
    'cut off': (
        lambda d: cut(d / 'train.bin', 2000), ['tiny', '1,000 train tokens', 'meta.json says', 'prepare.py']),
    'another val.bin': (
        lambda d: cut(d / 'val.bin', 200), ['tiny', '100 val tokens', 'meta.json says', 'prepare.py']),
    'too short': (
        make_too_short, ['block_size=32', 'has 32', '--block_size=31']),
    'ids outside the vocabulary': (
        lambda d: write_ids(d / 'train.bin', 1, 300), ['300 in train', 'vocabulary of', 'prepare']),
    'ids outside in val.bin': (
        lambda d: write_ids(d / 'val.bin', 1, 300), ['300 in val', 'vocabulary of', 'prepare']),
    'counts of another kind': (
        lambda d: write_meta(d, '{"dtype": "uint16", "train": 5}'), ['meta.json', 'prepare.py']),
    'vocabulary beyond uint16': (
        write_large_meta_pkl, ['meta.pkl', '70,000', 'uint16']),
    'meta.json of another kind': (
        lambda d: write_meta(d, '[]'), ['meta.json', 'prepare.py']),
    'meta.json cut off': (
        lambda d: cut(d / 'meta.json', 20), ['meta.json', 'prepare.py']),
    'unknown dtype': (
        lambda d: write_meta(d, '{"dtype": "text"}'), ['meta.json', 'prepare.py']),
    'no tokenizer.json': (
        lambda d: (d / 'tokenizer.json').unlink(), ['tiny', 'tokenizer.json']),
    'meta.pkl of another kind': (
        lambda d: write_meta_pkl(d, [1, 2]), ['meta.pkl', 'itos']),
    'meta.pkl cut off': (
        write_cut_meta_pkl, ['meta.pkl', 'itos']),
}


@pytest.mark.parametrize('case', DATASETS)
def test_dataset(own_data, tmp_path, case):
    """Dataset folders that are missing, damaged, too small, or not what their own description says."""
    damage, names = DATASETS[case]
    damage(own_data)
    # ids are checked when they are read: the run has started then, but has saved nothing
    folder = None if 'ids outside' in case else tmp_path
    refuse('train.py', *TINY, f'--dataset={own_data}', f'--out_dir={tmp_path / "out"}', names=names, folder=folder)
    assert not list(tmp_path.rglob('*.pt*'))
    assert not list(tmp_path.rglob('*.tmp*'))


def test_another_tokenizer(own_data, tiny_run):
    """The model of the checkpoint has fewer token ids than the dataset."""
    write_meta_pkl(own_data, {'vocab_size': 200, 'itos': {i: chr(i) for i in range(200)}})
    refuse('train.py', *TINY, f'--dataset={own_data}', f'--out_dir={tiny_run}', '--init_from=resume',
           names=[own_data, 'tokenizer'], folder=tiny_run)


def test_pickled_code_in_a_dataset(own_data, tmp_path):
    """A meta.pkl that would run a command is refused, and the command does not run."""
    write_meta_pkl(own_data, {'vocab_size': 1, 'itos': {0: 'a'}, 'stoi': Evil(tmp_path / 'touched')})
    refuse('train.py', *TINY, f'--dataset={own_data}', f'--out_dir={tmp_path / "out"}', names=['meta.pkl', 'system'],
           folder=tmp_path)

# --- checkpoints


def load(path):
    return torch.load(path, weights_only=True)


def update(path, **entries):
    torch.save(load(path) | entries, path)


def drop(path, *names):
    torch.save({key: value for key, value in load(path).items() if key not in names}, path)


def save_pickled_code(path):
    torch.save({'model': Evil(path.with_name('touched')), 'model_args': {}}, path)


CHECKPOINTS = {
    'missing': lambda path: path.unlink(),
    'empty': lambda path: cut(path, 0),
    'truncated': lambda path: cut(path, path.stat().st_size // 2),
    'last byte missing': lambda path: cut(path, path.stat().st_size - 1),
    'a text': lambda path: path.write_text('not a checkpoint'),
    'a list': lambda path: torch.save([1, 2], path),
    'weights alone': lambda path: torch.save(load(path)['model'], path),
    'no model_args': lambda path: drop(path, 'model_args'),
    'arguments of another program': lambda path: update(path, model_args={'hidden_size': 32}),
    'weights of another shape': lambda path: update(path, model_args=load(path)['model_args'] | {'n_embd': 64}),
    'weights with other names': lambda path: update(path, model={'w': torch.zeros(2)}),
    'pickled code': save_pickled_code,
    'bare pickled code': lambda path: path.write_bytes(pickle.dumps(Evil(path.with_name('touched')), protocol=2)),
}


@pytest.mark.parametrize('script', ['sample.py', 'train.py'])
@pytest.mark.parametrize('case', CHECKPOINTS)
def test_checkpoint(own_run, tiny_data, case, script):
    """Missing, damaged and foreign checkpoints, and checkpoints that would run a command; to sample and to resume."""
    CHECKPOINTS[case](own_run / 'ckpt.pt')
    for name in ('best.pt', 'weights.pt'):
        (own_run / name).unlink(missing_ok=True)
    args = ['--start=one']
    if script == 'train.py':
        args = [f'--dataset={tiny_data}', '--init_from=resume', '--batch_size=4', '--compile=False']
    names = [own_run / 'ckpt.pt']
    if 'code' in case:
        names.append('other things than tensors')
    if case == 'missing':
        names.append('train first')
    warnings = int(case == 'weights with other names' and script == 'sample.py')  # of the checksums
    refuse(script, f'--out_dir={own_run}', '--device=cpu', *args, names=names, folder=own_run, warnings=warnings)
    assert not (own_run / 'touched').exists()


@pytest.mark.parametrize('damage', [
    pytest.param(lambda path: drop(path, 'optimizer', 'iter_num', 'best_val_loss'), id='weights only'),
    pytest.param(lambda path: update(path, optimizer={}), id='empty'),
    pytest.param(lambda path: update(path, optimizer={'state': {}, 'param_groups': []}), id='other groups'),
])
def test_checkpoint_without_optimizer(own_run, tiny_data, damage):
    """One can sample from it, but not resume."""
    damage(own_run / 'ckpt.pt')
    sampled = run_script('sample.py', f'--out_dir={own_run}', '--start=one', '--device=cpu', '--max_new_tokens=1')
    assert sampled.code == 0
    refuse('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={own_run}', '--init_from=resume',
           names=[own_run / 'ckpt.pt'], folder=own_run)


def test_resuming_nothing(tiny_data, tmp_path):
    """A mistyped out_dir to resume is not created."""
    refuse('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path / "typo"}', '--init_from=resume',
           names=[tmp_path / 'typo'], folder=tmp_path)


@pytest.mark.parametrize('script', ['sample.py', 'train.py'])
def test_pickled_code_in_pretrained_weights(tiny_data, tmp_path, script):
    """A GPT-2 folder whose pytorch_model.bin would run a command."""
    folder = tmp_path / 'pretrained'
    folder.mkdir()
    config = {'model_type': 'gpt2', 'n_positions': 32, 'vocab_size': 50, 'n_layer': 1, 'n_head': 1, 'n_embd': 8}
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'pytorch_model.bin').write_bytes(pickle.dumps({'wte.weight': Evil(tmp_path / 'touched')}, protocol=2))
    args = ['--device=cpu']
    if script == 'train.py':
        args = [*TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}']
    refuse(script, f'--init_from={folder}', *args, names=['pytorch_model.bin'], folder=tmp_path)


MALFORMED = [None, 'x', -1, 1.5, [1], {'a': 1}, 10**30]


def malformed(spec):
    """Yield (path of the changed entry, changed copy): each entry of a JSON object is removed, or has another form."""
    def paths(entry, path):
        yield path
        items = entry.items() if isinstance(entry, dict) else enumerate(entry[:1]) if isinstance(entry, list) else ()
        for key, value in items:
            yield from paths(value, (*path, key))

    for value in MALFORMED:
        yield (), value
    for path in paths(spec, ()):
        for value in [*MALFORMED, 'removed'] if path else ():
            copy = json.loads(json.dumps(spec))
            parent = functools.reduce(operator.getitem, path[:-1], copy)
            if value == 'removed':
                del parent[path[-1]]
            else:
                parent[path[-1]] = value
            yield path, copy


def check_malformed(spec, path, read, needed):
    """
    Write each malformed variant of a JSON file and read it. Some are harmless; the others must exit with a line that
    names the file or its folder. Those of the entries `needed` must all be refused.
    """
    for changed, content in malformed(spec):
        path.write_text(json.dumps(content), encoding='utf-8')
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                read()
        except SystemExit as refused:
            line = str(refused.code)
            assert '\n' not in line and str(path.parent) in line, (changed, content, line)
            assert not re.search(r'Error|object (is|has)|instance|subscript|unhashable', line), (changed, content, line)
        else:
            assert not changed or changed[-1] not in needed or content == spec, (changed, content)


@pytest.mark.parametrize('style', ['gpt2', 'qwen3'])
def test_malformed_config_json(tmp_path, style):
    modern = dict(rope_theta=1e4, norm='rmsnorm', activation='swiglu', bias=False, qk_norm=True)
    model = GPT(GPTConfig(vocab_size=99, block_size=32, n_layer=1, n_head=4, n_embd=32,
                          **(modern if style == 'qwen3' else {})))
    spec = {**hf_config(model.config, 'x'), 'rope_scaling': {'type': 'default'}}
    spec = {key: value for key, value in spec.items() if key not in ('rope_theta', 'n_inner', 'head_dim')}
    needed = ('model_type', 'vocab_size', 'n_positions', 'n_layer', 'n_embd', 'hidden_size', 'num_hidden_layers')
    check_malformed(spec, tmp_path / 'config.json', lambda: model_without_weights(str(tmp_path), str(tmp_path)), needed)


def test_malformed_meta_json(own_data):
    spec = json.loads((own_data / 'meta.json').read_text(encoding='utf-8'))
    check_malformed(spec, own_data / 'meta.json', lambda: open_dataset(str(own_data)), ['dtype', 'tokens'])


@pytest.mark.parametrize('kind', ['char', 'bbpe'])
def test_malformed_tokenizer_json(tmp_path, kind):
    tok = char_tokenizer('abc') if kind == 'char' else bpe_tokenizer(['a b', 'ab c'])
    spec = json.loads(tok.json)
    spec['model']['vocab'] = dict(sorted(spec['model']['vocab'].items(), key=lambda item: item[0] not in 'abc'))

    def read():
        tok = load_tokenizer(str(tmp_path))
        if not tok.unknown('abc'):
            tok.decode(tok.encode('abc'))
        assert tok.utf8_states
        tok.token_bytes()
    check_malformed(spec, tmp_path / 'tokenizer.json', read, ['model'])


@pytest.mark.parametrize('script', ['export.py', 'sample.py', 'evaluate.py', 'train.py'])
@pytest.mark.parametrize('file, content, names', [
    ('config.json', {'model_type': 'llama', 'hidden_size': [1]}, ['hidden_size=[1]', 'a whole number']),
    ('config.json', {'model_type': 'llama', 'rope_scaling': 'x'}, ['rope_scaling=x', 'an object']),
    ('config.json', {'model_type': ['gpt2']}, ["model_type=['gpt2']", 'text']),
    ('config.json', [1], ['model_type']),
    ('adapter_config.json', {'target_modules': 5}, ['adapters alone', 'merge_and_unload']),
])
def test_malformed_model(tiny_data, tmp_path, script, file, content, names):
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / file).write_text(json.dumps(content), encoding='utf-8')
    args = [f'--init_from={tmp_path / "model"}']
    if script == 'train.py':
        args += [*TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}']
    elif script == 'export.py':
        args.append(f'--to={tmp_path / "exported"}')
    refuse(script, *args, names=[tmp_path / 'model', *names], folder=tmp_path)


@pytest.mark.parametrize('key, value', [
    ('n_layer', 3), ('n_head', 4), ('n_embd', 64), ('block_size', 16), ('bias', True), ('tied', False),
    ('qk_norm', True), ('rope_theta', 10000.0), ('norm', 'rmsnorm'), ('n_kv_head', 1), ('n_inner', 64),
])
def test_resume_contradicted(own_run, tiny_data, key, value):
    """The command line gives an architecture that the checkpoint does not have."""
    args = [arg for arg in TINY if not arg.startswith(f'--{key}=')]
    has = load(own_run / 'ckpt.pt')['model_args'][key]
    refuse('train.py', *args, f'--{key}={value}', f'--dataset={tiny_data}', f'--out_dir={own_run}',
           '--init_from=resume', names=[f'--{key}={value}', own_run / 'ckpt.pt', f'{key}={has}'], folder=own_run)


@pytest.mark.parametrize('key, value', [('n_layer', 3), ('bias', True), ('rope_theta', 10000.0)])
def test_weights_contradicted(own_run, tiny_data, tmp_path, key, value):
    """The same for a new run that starts from the checkpoint's weights."""
    args = [arg for arg in TINY if not arg.startswith(f'--{key}=')]
    refuse('train.py', *args, f'--{key}={value}', f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}',
           f'--init_from={own_run}', names=[f'--{key}={value}', own_run, f'which has {key}='], folder=tmp_path)


@pytest.mark.parametrize('start', ['resume', 'weights'])
def test_a_tokenizer_of_the_same_size(own_run, tmp_path, start):
    """The dataset has as many characters as the checkpoint's tokenizer, but others."""
    (tmp_path / 'input.txt').write_text('ABCDEFGHIJKLMNOP' * 200, encoding='utf-8')
    make_dataset(tmp_path, tmp_path / 'input.txt')
    init_from, out_dir = ('resume', own_run) if start == 'resume' else (own_run, tmp_path / 'out')
    refuse('train.py', *TINY, f'--dataset={tmp_path}', f'--out_dir={out_dir}', f'--init_from={init_from}',
           names=[tmp_path, 'another tokenizer', own_run], folder=out_dir.parent)


def test_resume_with_another_optimizer(own_run, tiny_data):
    """Muon cannot use AdamW's moments."""
    refuse('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={own_run}', '--init_from=resume',
           '--optimizer=muon', names=[own_run / 'ckpt.pt', 'optimizer is not muon', '--init_from='], folder=own_run)


def test_resume_yields_to_the_checkpoint(own_run, tiny_data, tmp_path):
    """Defaults and config files do not contradict: the checkpoint's architecture is used, and saved in the config."""
    (tmp_path / 'mine.py').write_text('n_layer = 5\nn_head = 5\nn_embd = 320\nblock_size = 64\nbias = True\n')
    args = [arg for arg in TINY if not arg.startswith(('--n_', '--block_size'))]
    result = run_script('train.py', tmp_path / 'mine.py', *args, f'--dataset={tiny_data}', f'--out_dir={own_run}',
                        '--init_from=resume', '--max_iters=5')
    assert result.code == 0, result.err
    checkpoint = load(own_run / 'ckpt.pt')
    expected = {'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': 32, 'bias': False}
    for saved in (checkpoint['model_args'], checkpoint['config']):
        assert {key: saved[key] for key in expected} == expected
    assert checkpoint['iter_num'] == 5
    assert [step for step, _ in losses_of(own_run)] == [0, 1, 2, 3, 4]

# --- disks


def test_unwritable_out_dir(tiny_data, tmp_path):
    """An out_dir below a file, and one that is a file."""
    (tmp_path / 'file').write_text('')
    for out_dir in (tmp_path / 'file' / 'out', tmp_path / 'file'):
        refuse('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={out_dir}',
               names=[f'out_dir={out_dir}', 'cannot write'], folder=tmp_path)


def test_a_read_only_disk_is_noticed_first(tiny_run, tmp_path, monkeypatch):
    """Before the missing dataset, for a new folder and for an old one; evaluation writes nothing."""
    def read_only(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr('tempfile.TemporaryFile', read_only)
    for out_dir, init_from in ((tmp_path / 'new', 'scratch'), (tiny_run, 'resume')):
        args = *TINY, '--dataset=none', f'--out_dir={out_dir}', f'--init_from={init_from}'
        refuse('train.py', *args, names=[f'out_dir={out_dir}', 'Read-only'], folder=tmp_path)
        refuse('train.py', *args, '--eval_only=True', names=['dataset=none'], folder=tmp_path)


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no limit of file sizes')
@pytest.mark.parametrize('name, limit', [('run.json', 100), ('log.csv', 5000), ('ckpt.pt', 20000)])
def test_full_disk(own_run, tiny_data, name, limit):
    """
    The disk fills up while run.json, log.csv or the checkpoint is written. The old checkpoint survives and loads, and
    no temporary file is left.
    """
    import resource
    if name == 'log.csv':
        header, *rows = (own_run / name).read_text(encoding='utf-8').splitlines(keepends=True)
        (own_run / name).write_text(header + rows[0] * (limit // len(rows[0])), encoding='utf-8')
    checkpoint_before = (own_run / 'ckpt.pt').read_bytes()
    resume = [*TINY, f'--dataset={tiny_data}', f'--out_dir={own_run}', '--init_from=resume', '--max_iters=6']
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # for larger files, write() fails
    try:
        refuse('train.py', *resume, names=[own_run / name, os.strerror(errno.EFBIG)], warnings=int(name == 'ckpt.pt'))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (own_run / 'ckpt.pt').read_bytes() == checkpoint_before
    assert not list(own_run.glob('*.tmp*'))
    sampled = run_script('sample.py', f'--out_dir={own_run}', '--start=one', '--device=cpu', '--max_new_tokens=1')
    assert sampled.code == 0
    result = run_script('train.py', *resume)
    assert result.code == 0, result.err
    assert load(own_run / 'ckpt.pt')['iter_num'] == 6
