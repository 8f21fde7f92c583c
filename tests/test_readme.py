"""Run the commands of README.md and docs/ in a copy of the repository, with small sizes and a tiny GPT-2 instead of the hub's."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import MIRROR, ROOT

from core.text.tokenizer import gpt2_tokenizer

SMALL = ['--max_iters=2', '--eval_iters=1', '--batch_size=2', '--gradient_accumulation_steps=2', '--n_layer=1', '--n_head=1', '--n_kv_head=0', '--n_embd=16',
         '--block_size=16', '--compile=False', '--wandb_log=False']
BY_MAKE = ('git clone', 'make ', 'python3 -m venv', '. .venv', 'pip install')  # `make` runs these, see test_demo
RUN_PAGES = ('README.md', 'docs/data.md', 'docs/training.md', 'docs/sampling.md', 'docs/operations.md')  # in this order
STAGE_PAGES = ('docs/teaching.md', 'docs/lora.md', 'docs/export.md')  # need the models that the first stage trains
FEW = ['--max_iters=1', '--eval_iters=1', '--batch_size=2', '--gradient_accumulation_steps=2',
       '--compile=False']  # for networks whose shape comes with their weights
LEFT_OUT = shutil.ignore_patterns('.git', '.venv*', 'out*', '*.bin', 'meta.*', 'tokenizer.json', 'input.txt', 'input',
                                  '__pycache__')


def read(page):
    return (ROOT / page).read_text(encoding='utf-8')


def commands(*pages):
    """Return the commands in the sh blocks of these pages, without their comments."""
    blocks = [block for page in pages for block in re.findall(r'```sh\n(.*?)```', read(page), re.DOTALL)]
    return [line.partition('  # ')[0].rstrip() for block in blocks for line in block.splitlines()]


def pages_in(language):
    """Return README and docs pages in 'en' or 'zh'."""
    pages = ['README.md', 'README.zh.md', *sorted(f'docs/{path.name}' for path in (ROOT / 'docs').glob('*.md'))]
    return [page for page in pages if page.endswith('.zh.md') == (language == 'zh')]


def test_every_command_is_run():
    """A page that is in neither list would go untested."""
    tested = set(RUN_PAGES + STAGE_PAGES)
    untested = [page for page in pages_in('en') if commands(page) and page not in tested]
    assert untested == []


def test_both_languages_have_the_same_commands():
    translated = [page for page in pages_in('zh') if page != 'README.zh.md']
    for page in translated:
        assert commands(page) == commands(page.replace('.zh.md', '.md')), page
    if translated:  # before the Chinese pages exist, README.zh.md has the commands of all pages
        assert commands('README.zh.md') == commands('README.md')
    english = set(commands(*pages_in('en')))
    missing = set(commands('README.zh.md')) - english
    assert not missing, missing


def test_the_figures_of_the_chinese_readme_are_those_of_the_records():
    """Until the Chinese pages exist, README.zh.md has the summary of docs/RECORDS.md as its last table."""
    if any(page.startswith('docs/') for page in pages_in('zh')):
        pytest.skip('README.zh.md has the figures of README.md now')
    chinese = read('README.zh.md').partition('docs/RECORDS.md')[2]
    summary = re.search(r'(?ms)^## Summary\n(.*?)^## ', read('docs/RECORDS.md'))[1]
    table = summary[summary.index('\n| what'):]
    assert re.findall(r'\d[\d.,]*', chinese) == re.findall(r'\d[\d.,]*', table)


def test_every_file_they_name_is_there():
    for page in pages_in('en') + pages_in('zh'):
        if page == 'docs/LOG.md':  # names files of its time
            continue
        for name in re.findall(r'(?:config|data|docs|benchmarks)/[\w./-]+\.(?:py|md)', read(page)):
            assert (ROOT / name).exists(), f'{page}: {name}'


def stand_ins(house, tmp_path):
    """The user's own files that the commands name, and what the network would give: the mirror of this machine where it has one, a few lines else."""
    english, chinese = 'The quick brown fox jumps over the lazy dog.\n' * 50, '黛玉见了宝玉，便说道：“满纸荒唐言，一把辛酸泪。”\n' * 50
    documents = ''.join(json.dumps({'text': f'{i} {english[:300 + i]}'}) + '\n' for i in range(5000))
    (house / 'my.txt').write_text(english, encoding='utf-8')
    (house / 'docs.jsonl').write_text(documents, encoding='utf-8')
    (tmp_path / 'novels').mkdir()
    (tmp_path / 'novels' / 'one.txt').write_text(chinese, encoding='gbk')
    (tmp_path / 'novels' / 'two.txt').write_text(chinese + english, encoding='utf-8')
    for corpus in ('openwebtext', 'wikipedia_zh', 'fineweb_edu'):
        (tmp_path / 'mirror' / corpus).mkdir(parents=True)
        (tmp_path / 'mirror' / corpus / 'documents.jsonl').write_text(documents, encoding='utf-8')
    if MIRROR.exists():
        for path in MIRROR.iterdir():
            (tmp_path / 'mirror' / path.name).symlink_to(path)
    else:
        for folder in ('hongloumeng_char', 'hongloumeng_bbpe', 'hongloumeng_qwen2'):
            (house / 'data' / folder / 'input.txt').write_text(chinese * 40, encoding='utf-8')
        (house / 'data' / 'classics_bbpe' / 'input').mkdir()
        for name in ('hongloumeng', 'sanguo', 'shuihu', 'xiyou'):
            (house / 'data' / 'classics_bbpe' / 'input' / f'{name}.txt').write_text(name + chinese * 40, encoding='utf-8')


def make_qwen3(folder):
    """A tiny stand-in for the hub's."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    Qwen3ForCausalLM(Qwen3Config(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=16)).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.network
def test_commands_run(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    house = tmp_path / 'stonegpt'
    shutil.copytree(ROOT, house, ignore=LEFT_OUT)
    GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=1)).save_pretrained(tmp_path / 'gpt2')
    (tmp_path / 'gpt2' / 'tokenizer.json').write_text(gpt2_tokenizer().json, encoding='utf-8')
    make_qwen3(tmp_path / 'Qwen3-0.6B')
    stand_ins(house, tmp_path)
    environment = {**os.environ, 'DATA_MIRROR': str(tmp_path / 'mirror'), 'HOME': str(tmp_path), 'OMP_NUM_THREADS': '1',
                   'XDG_CACHE_HOME': os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')}
    done = set()
    for command in commands(*RUN_PAGES):
        if command in done or command.startswith(BY_MAKE):
            continue
        done.add(command)
        words = shlex.split(command)
        if {'train.py', 'bench.py'} & set(words) and not {'--help', '--sample'} & set(words):
            words += SMALL
        if '--sample' in words:
            words += ['--network=char', '--new_tokens=5', '--runs=1']
        elif 'bench.py' in words:
            words += ['--max_iters=9', '--steps=1', '--dataset=shakespeare_char']
        words += [f'--init_from={tmp_path / os.path.basename(word.partition("=")[2])}' for word in words if word.startswith('--init_from=') and word not in ('--init_from=out-my', '--init_from=auto')]
        if {'config/train_gpt2.py', 'config/speedrun_1gpu.py', 'config/speedrun_8gpu.py'} & set(words):
            words += ['--device=cpu']
        if words[1].endswith('prepare.py'):
            few = '=16384' if MIRROR.exists() else r'=16384|=8192'
            words = [re.sub(few, '=300', word) for word in words]  # what a few lines support
            words += ['--vocab_size=300'] * ('classics' in words[1] and not MIRROR.exists())
        if 'sample.py' in words and '--help' not in words:
            words += ['--max_new_tokens=4', '--num_samples=2']
        words = [word.replace('=8', '=2') if word.startswith('--nproc') else word for word in words]
        words = {'python': [sys.executable], 'torchrun': [sys.executable, '-m', 'torch.distributed.run']}[words[0]] + words[1:]
        result = subprocess.run(words, cwd=house, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding='utf-8', timeout=300)
        assert result.returncode == 0, f'{command}\n{result.stdout[-2000:]}\n{result.stderr[-9000:]}'
    assert len(done) > 30


def stage_house(tmp_path):
    """A copy of the repository with conversations, preferences and, where this machine has no poems, some; and the environment to run its commands in."""
    house = tmp_path / 'stonegpt'
    shutil.copytree(ROOT, house, ignore=LEFT_OUT)
    stand_ins(house, tmp_path)
    talk = [{'instruction': 'The quick fox', 'output': f'jumps over the {"lazy " * (i % 3)}dog.'} for i in range(12)]
    likes = [{'prompt': 'The quick fox', 'chosen': f'jumps over the {"lazy " * (i % 3)}dog.', 'rejected': 'The dog.'} for i in range(8)]
    for name, records in (('conversations', talk), ('preferences', likes)):
        (house / f'{name}.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records), encoding='utf-8')
    if not (MIRROR / 'tang_poems.json').exists():
        poems = [{'title': f'春{"夜喜雨山水"[i % 5]}{"一二三四五六七"[i % 7]}', 'author': '', 'paragraphs': ['好雨知時節，當春乃發生。', '隨風潛入夜，潤物細無聲。'] if i % 2 else ['兩箇黃鸝鳴翠柳，一行白鷺上青天。'] * 2}
                 for i in range(300)]
        (house / 'data' / 'tang_poems' / 'input').mkdir()
        (house / 'data' / 'tang_poems' / 'input' / 'tang_poems.json').write_text(json.dumps(poems), encoding='utf-8')
    return house, {**os.environ, 'DATA_MIRROR': str(tmp_path / 'mirror'), 'HOME': str(tmp_path), 'OMP_NUM_THREADS': '1', 'PYTHON': sys.executable}


@pytest.mark.slow
@pytest.mark.network
def test_stages_run(tmp_path):
    house, environment = stage_house(tmp_path)
    make_qwen3(tmp_path / 'Qwen3-0.6B')
    first = ['python data/any_text/prepare.py --input=my.txt --tokenizer=char', 'python train.py config/train_shakespeare_char_cpu.py --dataset=my --out_dir=out-my --block_size=64',
             'python data/hongloumeng_qwen2/prepare.py', 'python train.py config/train_hongloumeng_qwen2.py config/qwen3.py --block_size=64']
    done = 0
    for command in first + commands(*STAGE_PAGES):
        if command.startswith(('bash ', 'pip install')) or '--serve' in command:  # below, and in test_chat.py
            continue
        words = shlex.split(command)
        if 'train.py' in words:
            words += FEW + ['--n_layer=1', '--n_head=1', '--n_embd=32'] * ('init_from' not in command and any(name in command for name in ('pretrain', 'shakespeare', 'hongloumeng')))
            words += [f'--init_from={tmp_path / "Qwen3-0.6B"}', '--sample_tokens=4'] * ('Qwen3' in command)
            words += ['--group_size=2', '--max_new_tokens=4'] * ('grpo' in command) + ['--sample_tokens=4', '--sample_prompts=dog'] * ('sft_chat' in command)
        words += {'judge.py': ['--titles=2', '--max_new_tokens=4'], 'chat.py': ['--max_new_tokens=4'], 'sample.py': ['--max_new_tokens=4']}.get(os.path.basename(words[1]), [])
        words = {'python': [sys.executable], 'torchrun': [sys.executable, '-m', 'torch.distributed.run']}[words[0]] + words[1:]
        result = subprocess.run(words, cwd=house, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding='utf-8', timeout=300)
        assert result.returncode == 0, f'{command}\n{result.stdout[-2000:]}\n{result.stderr[-9000:]}'
        done += 1
    assert done == 28
    for name in ('exported/stone/model.safetensors', 'stone.gguf', 'stone-ollama/Modelfile', 'exported/out-lora/config.json', 'exported/adapter/adapter_config.json'):
        assert (house / name).exists(), name


@pytest.mark.slow
@pytest.mark.parametrize('command', [command for command in commands(*STAGE_PAGES) if command.startswith('bash')])
def test_journeys_run(tmp_path, command):
    """runs/poems.sh and runs/chat.sh, cut short, and what an interrupted one does when it is started again: nothing twice."""
    house, environment = stage_house(tmp_path)
    environment |= {'VOCAB_SIZE': '280', 'CONTEXT': '256'}
    words = [*shlex.split(command), *['--quick'] * ('poems' in command), '--max_iters=2', '--eval_iters=1', '--batch_size=2', '--gradient_accumulation_steps=1', '--compile=False', '--device=cpu']
    words += ['--n_layer=1', '--n_head=1', '--n_embd=16'] * ('chat' in command)
    for again in (False, True):
        result = subprocess.run(words, cwd=house, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding='utf-8', timeout=900)
        assert result.returncode == 0, f'{result.stdout[-3000:]}\n{result.stderr[-5000:]}'
        assert ('iter 1:' in result.stdout or 'steps in' in result.stdout) != again


@pytest.mark.slow
@pytest.mark.network
def test_demo(tmp_path):
    """`make demo` in a fresh copy, with the packages of this environment: trained to the loss that the README states, and it writes a play."""
    house = tmp_path / 'stonegpt'
    shutil.copytree(ROOT, house, ignore=LEFT_OUT)
    venv = os.path.dirname(os.path.dirname(os.path.abspath(sys.executable)))
    if not os.path.exists(os.path.join(venv, 'installed')):
        pytest.skip('not an environment that make made')
    result = subprocess.run(['make', 'demo', f'VENV={venv}', '-o', f'{venv}/installed'], cwd=house, capture_output=True, text=True, encoding='utf-8', timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(re.search(r'best validation loss ([\d.]+)', result.stdout)[1]) <= 1.62
    sample = result.stdout[result.stdout.index('ROMEO:\n'):]
    words = re.findall(r"[a-z']+", sample.lower())
    known = set(re.findall(r"[a-z']+", (house / 'data/shakespeare_char/input.txt').read_text(encoding='utf-8').lower()))
    assert len(sample) > 500 and sample.count(':\n') >= 2 and sum(word in known for word in words) > 0.75 * len(words)
