"""Datasets: shards, mixtures, large vocabularies, and the tokens that evaluation counts, against plain restatements."""
import json
import math

import numpy as np
import pytest
from conftest import ROOT, TINY, losses_of, run_script

from core.text.dataset import open_dataset, windows
from core.text.tokenizer import char_tokenizer
from objectives import next_token

LETTERS = char_tokenizer('abcdefgh石头')


def folder_of(path, tokenizer=LETTERS, dtype='uint16', **splits):
    """A dataset folder written by hand: split=[array of a shard, ...]."""
    path.mkdir(parents=True)
    (path / 'tokenizer.json').write_text(tokenizer.json, encoding='utf-8', newline='')
    (path / 'meta.json').write_text(json.dumps({'dtype': dtype, 'vocab_size': tokenizer.vocab_size}), encoding='utf-8')
    for split, shards in splits.items():
        for i, shard in enumerate(shards):
            np.asarray(shard, dtype=dtype).tofile(
                path / (f'{split}_{i:05d}.bin' if len(shards) > 1 else f'{split}.bin')
            )
    return str(path)


def random_ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, 10, n)


def rows(data, split, starts, block_size):
    x, y = windows(data, split, np.array(starts), block_size)
    return x.tolist(), y.tolist()


def test_shards_are_one_text(tmp_path):
    ids = random_ids(100)
    whole = open_dataset(folder_of(tmp_path / 'whole', train=[ids], val=[ids[:30]]))
    shards = open_dataset(
        folder_of(tmp_path / 'shards', train=[ids[:40], ids[40:80], ids[80:81], ids[81:]], val=[ids[:7], ids[7:30]])
    )
    assert whole.splits == shards.splits == {'train': 100, 'val': 30}
    for split, n in whole.splits.items():
        starts = list(range(n - 1))
        assert rows(whole, split, starts, 12) == rows(shards, split, starts, 12)
    x, y = rows(shards, 'train', [35, 95], 8)
    assert x[0] == ids[35:43].tolist() and y[0] == ids[36:44].tolist()
    assert y[1] == [*ids[96:100].tolist(), -1, -1, -1, -1]


def test_a_folder_by_its_name_or_its_path(tmp_path, monkeypatch):
    """dataset=d is data/d, where there is one, and otherwise the folder d itself, from where one is."""
    path = folder_of(tmp_path / 'data' / 'd', train=[random_ids(100)], val=[random_ids(30)])
    monkeypatch.chdir(tmp_path)
    assert {open_dataset(name).splits['train'] for name in ('d', 'data/d', path)} == {100}
    folder_of(tmp_path / 'd', train=[random_ids(50)], val=[random_ids(30)])
    assert (open_dataset('d').splits['train'], open_dataset('./d').splits['train']) == (100, 100)


def test_shards_beyond_99999_keep_their_order(tmp_path):
    path = tmp_path / 'd'
    folder_of(path, train=[[1, 2], [3, 4]])
    (path / 'train_00001.bin').rename(path / 'train_99999.bin')
    np.array([5, 6], dtype='<u2').tofile(path / 'train_100000.bin')
    assert rows(open_dataset(str(path)), 'train', [0], 5)[0] == [[1, 2, 3, 4, 5]]


def test_ids_above_65536_train(tmp_path):
    chars = [chr(i) for i in range(0x4e00, 0x4e00 + 70000) if not 0xd800 <= i < 0xe000]
    ids = np.arange(len(chars))[-200:]
    path = folder_of(tmp_path / 'big', char_tokenizer(chars), 'uint32', train=[ids], val=[ids])
    data = open_dataset(path)
    assert data.dtype.itemsize == 4 and rows(data, 'train', [0], 199)[0] == [ids[:199].tolist()]
    result = run_script(
        'train.py', *TINY, '--n_embd=4', f'--dataset={path}', f'--out_dir={tmp_path / "out"}', '--max_iters=1'
    )
    assert result.code == 0, result.err
    assert (
        json.loads((tmp_path / 'big' / 'meta.json').read_text(encoding='utf-8'))['vocab_size']
        == data.vocab_size
        > 2**16
    )


@pytest.mark.parametrize('n, T', [(1000, 16), (129, 64), (129, 128), (17, 16), (18, 16), (31, 16), (33, 16), (20, 1)])
def test_every_token_is_a_target_once_an_epoch(n, T, tmp_path):
    """In another random order each epoch, with other cuts between the rows, across the steps of any batch."""
    data = open_dataset(folder_of(tmp_path / 'a', train=[random_ids(n)]))
    n_rows = len(next_token.epoch_starts(data, T, 1, 0, 'epochs'))
    assert n_rows == math.ceil((n - 1) / T) + ((n - 1) % T == 0 and T > 1)
    epochs = np.concatenate([next_token.draw(data, 7, T, 1, step, 'epochs') for step in range(n_rows)])
    epochs = epochs.reshape(7, n_rows)
    for starts in epochs:
        targets = [position for start in starts for position in range(max(start, 0) + 1, min(start + T, n - 1) + 1)]
        assert sorted(targets) == list(range(1, n))
    assert n_rows < 3 or len({tuple(starts) for starts in epochs}) > 1
    assert n < 1000 or len(set(epochs.min(axis=1))) > 2
    assert next_token.draw(data, n_rows, T, 1, 0, 'epochs').tolist() == epochs[0].tolist()


def test_rows_of_an_epoch(tmp_path):
    """The first one may end early and the last one may be padded: together their targets are the text."""
    ids = np.arange(37) % 10
    data = open_dataset(folder_of(tmp_path / 'a', train=[ids]))
    for epoch in range(5):
        starts = np.sort(next_token.epoch_starts(data, 16, 1, epoch, 'epochs'))
        x, y = windows(data, 'train', starts, 16)
        assert y[y != -1].tolist() == ids[1:].tolist()
        assert x[y != -1].tolist() == ids[:-1].tolist()
        assert y[0, 0] != -1  # what precedes a target in its row precedes it in the text


def test_a_mixture_draws_by_weight_and_never_across_folders(tmp_path):
    a, b = (
        folder_of(tmp_path / name, train=[np.full(n, i)], val=[np.full(n // 10, i)])
        for i, (name, n) in enumerate((('a', 300), ('b', 5000)))
    )
    data = open_dataset(f'{a}:0.7,{b}:0.3')
    assert data.splits == {'train': 5300, 'val': 530} and data.shortest == 300
    starts = next_token.draw(data, 20000, 16, 1, 0)
    x, y = windows(data, 'train', starts, 16)
    assert (x == x[:, :1]).all() and (y == x).all()  # each row from one folder, and none runs out of it
    assert abs((x[:, 0] == 0).float().mean().item() - 0.7) < 0.02
    assert starts[x[:, 0] == 0].min() == 0 and starts[x[:, 0] == 0].max() == 300 - 16 - 1  # every place of a
    assert abs(np.median(starts[x[:, 0] == 1]) - (300 + 2500)) < 100  # and evenly in b
    again = next_token.draw(data, 20000, 16, 1, 0)
    assert (starts == again).all()


def test_a_mixture_is_evaluated_by_weight(tmp_path):
    a, b = (
        folder_of(tmp_path / name, train=[np.full(99, i)], val=[np.full(n, i)])
        for i, (name, n) in enumerate((('a', 500), ('b', 5000)))
    )
    data = open_dataset(f'{a}:3,{b}:1')
    x, y = windows(data, 'val', next_token.fixed(data, 'val', 40, 10), 10)
    assert (x[:, 0] == 0).sum() == 30 and (x[:, 0] == 1).sum() == 10 and (y != -1).all()
    x, y = windows(data, 'val', next_token.fixed(data, 'val', -1, 10), 10)
    assert (y != -1).sum() == 499 + 4999  # the whole of both, each token once but the first of each
    assert [(y == i).sum().item() for i in (0, 1)] == [499, 4999]


def test_a_mixture_with_a_folder_without_validation(tmp_path):
    a, b = (
        folder_of(tmp_path / 'a', train=[np.zeros(200)], val=[np.zeros(100)]),
        folder_of(tmp_path / 'b', train=[np.ones(200)]),
    )
    data = open_dataset(f'{a},{b}')
    assert data.weights == [1, 1] and data.splits == {'train': 400, 'val': 100}
    assert (windows(data, 'val', next_token.fixed(data, 'val', 8, 10), 10)[0] == 0).all() and len(
        next_token.fixed(data, 'val', 8, 10)
    ) == 8
    result = run_script('train.py', *TINY, f'--dataset={a}:0.5,{b}:0.5', f'--out_dir={tmp_path / "out"}')
    assert result.code == 0 and 'val loss' in result.out, result.err


def test_a_mixture_has_no_epochs(tmp_path):
    a, b = (folder_of(tmp_path / name, train=[random_ids(100)]) for name in 'ab')
    result = run_script(
        'train.py', *TINY, f'--dataset={a}:0.5,{b}:0.5', f'--out_dir={tmp_path / "out"}', '--data_order=epochs'
    )
    assert 'mixture' in exit_line(result) and '--data_order=random' in result.err and not (tmp_path / 'out').exists()


def exit_line(result):
    assert result.code == 1 and result.err.count('\n') == 1, result.err
    return result.err


@pytest.mark.parametrize('weights', ['a:0.7,b:0', 'a:1,b:-2', 'a:0.1.2,b:1', 'a:nan,b:1'])
def test_bad_weights(tmp_path, weights):
    for name in 'ab':
        folder_of(tmp_path / 'data' / name, train=[random_ids(100)])
    line = exit_line(run_script('train.py', *TINY, f'--dataset={weights}', cwd=tmp_path))
    assert 'weight' in line or 'no data/a:nan' in line


def test_mixtures_that_cannot_be(tmp_path):
    a = folder_of(tmp_path / 'a', train=[random_ids(100)])
    b = folder_of(tmp_path / 'b', char_tokenizer('abcdefghij'), train=[random_ids(100)])
    short = folder_of(tmp_path / 'short', train=[random_ids(20)])
    line = exit_line(run_script('train.py', *TINY, f'--dataset={a}:0.5,{b}:0.5'))
    assert 'different tokenizers' in line and f'--tokenizer={a}' in line
    assert '--block_size=19' in exit_line(run_script('train.py', *TINY, f'--dataset={a}:0.5,{short}:0.5'))
    assert 'nowhere' in exit_line(run_script('train.py', *TINY, f'--dataset={a}:0.5,{tmp_path}/nowhere:0.5'))


def test_counts_that_do_not_fit_the_bins(tmp_path):
    path = tmp_path / 'd'
    folder_of(path, train=[random_ids(100), random_ids(50)])
    meta = {'dtype': 'uint16', 'vocab_size': 11, 'train': {'tokens': 150}, 'val': {'tokens': 0}}
    (path / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    assert open_dataset(str(path)).splits == {'train': 150, 'val': 0}
    (path / 'train_00001.bin').unlink()
    line = exit_line(run_script('train.py', *TINY, f'--dataset={path}'))
    assert '100 train tokens' in line and '150' in line


def test_bits_per_byte_and_per_character(tmp_path):
    """Of a text of which every character has three bytes, against the loss: a network that knows nothing."""
    path = folder_of(tmp_path / 'd', train=[np.arange(200) % 2 + 8], val=[np.arange(100) % 2 + 8])
    result = run_script(
        'train.py', *TINY, f'--dataset={path}', f'--out_dir={tmp_path / "out"}', '--max_iters=1', '--eval_iters=-1'
    )
    assert result.code == 0, result.err
    loss, bpb, bpc = (losses_of(tmp_path / 'out', f'val_{name}')[0][1] for name in ('loss', 'bpb', 'bpc'))
    assert bpc == pytest.approx(loss / math.log(2), rel=1e-5) and bpb == pytest.approx(bpc / 3, rel=1e-5)
    first = result.out[result.out.index('step 0:'):].splitlines()[0]
    assert [part.split()[:2] for part in first.removeprefix('step 0: ').split(', ')] == [
        [split, name] for name in ('loss', 'bpb', 'bpc') for split in ('train', 'val')]  # nanoGPT's two come first


@pytest.mark.parametrize('name, script, arguments', [
    ('chat/none', 'data/chat/prepare.py', ' --input=conversations.jsonl --tokenizer=data/my'),
    ('data/chat/none/', 'data/chat/prepare.py', ' --input=conversations.jsonl --tokenizer=data/my'),
    ('tang_poems/none', 'data/tang_poems/prepare.py', ''),
    ('any_text', 'data/any_text/prepare.py', ' --input=my.txt'),
    ('nothing/sft', '', ''),
])
def test_a_missing_dataset_names_the_script_that_makes_it(monkeypatch, tmp_path, name, script, arguments):
    for folder, path in ((ROOT, script), (tmp_path, str(ROOT / script))):
        monkeypatch.chdir(folder)
        with pytest.raises(SystemExit) as stopped:
            open_dataset(name)
        run = f'run: python {path}{arguments}' if script else 'any_text/prepare.py makes one from your own text'
        assert stopped.value.code.endswith(f'; {run}' if script else run)
