"""
Run the commands of README.md and docs/ in a copy of the repository, with small sizes and tiny models instead of the
hub's.
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from conftest import MIRROR, ROOT

from core.text.tokenizer import gpt2_tokenizer

FEW_STEPS = ['--max_iters=1', '--eval_iters=1', '--batch_size=2', '--gradient_accumulation_steps=2', '--compile=False']
SMALL = [*FEW_STEPS, '--max_iters=2', '--n_layer=1', '--n_head=1', '--n_kv_head=0', '--n_embd=16', '--block_size=16',
         '--wandb_log=False']
BY_MAKE = ('git clone', 'make ', 'python3 -m venv', '. .venv', 'pip install')  # `make` runs these, see test_demo
PIPELINES = 'bash '  # see test_pipelines_run
RUN_PAGES = ('README.md', 'docs/data.md', 'docs/training.md', 'docs/sampling.md', 'docs/operations.md')  # in this order
STAGE_PAGES = ('docs/teaching.md', 'docs/lora.md', 'docs/export.md')  # need the models that the first stage trains
RECIPE_PAGES = ('docs/hacking.md',)  # test_hacking.py runs their commands
FIGURE = re.compile(r'\d[\d.,:]*\d')
LEFT_OUT = shutil.ignore_patterns('.git', '.venv*', 'out*', '*.bin', 'meta.*', 'tokenizer.json', 'input.txt', 'input',
                                  '__pycache__')


def read(page):
    return (ROOT / page).read_text(encoding='utf-8')


def commands(*pages):
    """Return the commands in the sh blocks of these pages, without comments; one that ends in \\ goes on."""
    blocks = [block for page in pages for block in re.findall(r'```sh\n(.*?)```', read(page), re.DOTALL)]
    lines = re.sub(r'\\\n *', '', ''.join(blocks)).splitlines()
    return [line.partition('  # ')[0].rstrip() for line in lines]


def pages_in(language):
    """Return README and docs pages in 'en' or 'zh'."""
    pages = ['README.md', 'README.zh.md', *sorted(f'docs/{path.name}' for path in (ROOT / 'docs').glob('*.md'))]
    return [page for page in pages if page.endswith('.zh.md') == (language == 'zh')]


def test_every_command_is_run():
    """A page that is in none of the lists would go untested."""
    tested = set(RUN_PAGES + STAGE_PAGES + RECIPE_PAGES)
    pipelines = [command for command in commands(*STAGE_PAGES) if command.startswith(PIPELINES)]
    for command in commands(*RUN_PAGES):  # perhaps with fewer arguments
        assert not command.startswith(PIPELINES) or any(pipeline.startswith(command) for pipeline in pipelines), command
    untested = [page for page in pages_in('en') if commands(page) and page not in tested]
    assert untested == []


def test_every_page_is_in_both_languages():
    chinese = [page.replace('.md', '.zh.md') for page in pages_in('en') if page != 'docs/LOG.md']
    assert pages_in('zh') == chinese


@pytest.mark.parametrize('page', pages_in('zh'))
def test_both_languages_have_the_same_commands(page):
    assert commands(page) == commands(page.replace('.zh.md', '.md'))


@pytest.mark.parametrize('page', pages_in('zh'))
def test_both_languages_have_the_same_figures(page):
    """Numbers with a decimal point or of several digits; Chinese may write small numbers as words."""
    english, chinese = read(page.replace('.zh.md', '.md')), read(page)
    assert Counter(FIGURE.findall(chinese)) == Counter(FIGURE.findall(english))


def anchors(page):
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r'^#+ (.*)$', read(page), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', pages_in('en') + pages_in('zh'))
def test_links_lead_somewhere(page):
    folder = os.path.dirname(page)
    for target, _, anchor in re.findall(r'\]\((?!http)([^)#]*)(#?)([^)]*)\)', read(page)):
        linked = os.path.normpath(os.path.join(folder, target)) if target else page
        assert (ROOT / linked).exists(), target
        if anchor:
            assert anchor in anchors(linked), f'{target}#{anchor}'


@pytest.mark.parametrize('page', ['README.md', 'README.zh.md'])
def test_readmes_are_short(page):
    assert len(read(page).splitlines()) <= 200


def test_every_file_they_name_is_there():
    for page in pages_in('en') + pages_in('zh'):
        if page == 'docs/LOG.md':  # names files of its time
            continue
        created = re.findall(r'```python (\S+)', read(page))  # by the recipes of docs/hacking.md
        for name in re.findall(r'(?:config|data|docs|benchmarks)/[\w./-]+\.(?:py|md)', read(page)):
            assert (ROOT / name).exists() or name in created, f'{page}: {name}'


@pytest.mark.parametrize('page', ['docs/training.md', 'docs/training.zh.md'])
def test_every_configuration_is_listed(page):
    section = re.search(r'## (?:All configurations|全部配置)\n(.*?)\n## ', read(page), re.DOTALL)[1]
    first_column = ''.join(re.findall(r'^\| (.*?) \|', section, re.MULTILINE))
    assert set(re.findall(r'\w+\.py', first_column)) == {path.name for path in (ROOT / 'config').glob('*.py')}


ENGLISH = 'The quick brown fox jumps over the lazy dog.\n' * 50
CHINESE = '黛玉见了宝玉，便说道：“满纸荒唐言，一把辛酸泪。”\n' * 50
POEMS = (['好雨知時節，當春乃發生。', '隨風潛入夜，潤物細無聲。'], ['兩箇黃鸝鳴翠柳，一行白鷺上青天。'] * 2)


def write_json_lines(path, records):
    lines = [json.dumps(record) + '\n' for record in records]
    path.write_text(''.join(lines), encoding='utf-8')


def copy_repository(tmp_path):
    """
    Copy the repository to tmp_path, with the files that its commands expect: a user's own texts, and a mirror of what
    would come from the network, from this machine's mirror or else a few lines. Returns the copy and the environment
    to run commands in.
    """
    copy = tmp_path / 'stonegpt'
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    mirror = tmp_path / 'mirror'
    documents = [{'text': f'{i} {ENGLISH[:300 + i]}'} for i in range(5000)]
    (copy / 'my.txt').write_text(ENGLISH, encoding='utf-8')
    write_json_lines(copy / 'docs.jsonl', documents)
    (tmp_path / 'novels').mkdir()
    (tmp_path / 'novels' / 'one.txt').write_text(CHINESE, encoding='gbk')
    (tmp_path / 'novels' / 'two.txt').write_text(CHINESE + ENGLISH, encoding='utf-8')
    for corpus in ('openwebtext', 'wikipedia_zh', 'fineweb_edu'):
        (mirror / corpus).mkdir(parents=True)
        write_json_lines(mirror / corpus / 'documents.jsonl', documents)
    if MIRROR.exists():
        for path in MIRROR.iterdir():
            (mirror / path.name).symlink_to(path)
    else:
        write_texts(copy / 'data')
    environment = {
        **os.environ,
        'DATA_MIRROR': str(mirror),
        'HOME': str(tmp_path),
        'OMP_NUM_THREADS': '1',
        'PYTHON': sys.executable,
        'XDG_CACHE_HOME': os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'),
    }
    return copy, environment


def write_texts(data):
    """Write a few lines instead of each corpus, where the prepare scripts look for a user's own copy."""
    for folder in ('hongloumeng_char', 'hongloumeng_bbpe', 'hongloumeng_qwen2'):
        (data / folder / 'input.txt').write_text(CHINESE * 40, encoding='utf-8')
    classics = data / 'classics_bbpe' / 'input'
    classics.mkdir()
    for name in ('hongloumeng', 'sanguo', 'shuihu', 'xiyou'):
        (classics / f'{name}.txt').write_text(name + CHINESE * 40, encoding='utf-8')


def add_conversations(copy):
    """Add a user's conversations and preferences to the copy, and some poems: real ones, if this machine has them."""
    answers = [f'jumps over the {"lazy " * (i % 3)}dog.' for i in range(12)]
    conversations = [{'instruction': 'The quick fox', 'output': answer} for answer in answers]
    preferences = [{'prompt': 'The quick fox', 'chosen': answer, 'rejected': 'The dog.'} for answer in answers[:8]]
    write_json_lines(copy / 'conversations.jsonl', conversations)
    write_json_lines(copy / 'preferences.jsonl', preferences)
    titles = [f'春{"夜喜雨山水"[i % 5]}{"一二三四五六七"[i % 7]}' for i in range(300)]
    poems = [{'title': title, 'author': '', 'paragraphs': POEMS[i % 2]} for i, title in enumerate(titles)]
    if (MIRROR / 'tang_poems.json').exists():
        poems = json.loads((MIRROR / 'tang_poems.json').read_text(encoding='utf-8'))[:5000]
    folder = copy / 'data' / 'tang_poems' / 'input'
    folder.mkdir()
    (folder / 'tang_poems.json').write_text(json.dumps(poems), encoding='utf-8')


def save_tiny_gpt2(folder):
    """Save a network with random weights, and GPT-2's tokenizer, instead of the hub's GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel
    GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=1)).save_pretrained(folder)
    (folder / 'tokenizer.json').write_text(gpt2_tokenizer().json, encoding='utf-8')


def save_tiny_qwen3(folder):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    config = Qwen3Config(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                         num_key_value_heads=1, head_dim=16)
    Qwen3ForCausalLM(config).save_pretrained(folder)


def run(command, words, copy, environment, timeout=300):
    """Run a command, by this Python. Fails unless it exits with 0."""
    programs = {'python': [sys.executable], 'torchrun': [sys.executable, '-m', 'torch.distributed.run']}
    words = programs.get(words[0], [words[0]]) + words[1:]
    result = subprocess.run(words, cwd=copy, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
                            text=True, encoding='utf-8', timeout=timeout)
    assert result.returncode == 0, f'{command}\n{result.stdout[-2000:]}\n{result.stderr[-9000:]}'
    return result.stdout


def cut_short(command, tmp_path):
    """Return the words of a command of RUN_PAGES, with arguments that make it small."""
    words = shlex.split(command)
    named = set(words)
    if '--help' in named:
        return words
    if '--sample' in named:
        words += ['--network=char', '--new_tokens=5', '--runs=1']
    elif any(word.startswith('--minutes') for word in words):
        words += [setting for setting in SMALL if not setting.startswith('--max_iters')] + ['--minutes=0.1']
    elif named & {'train.py', 'bench.py'}:
        words += SMALL
        if 'bench.py' in named:
            words += ['--max_iters=9', '--steps=1', '--dataset=shakespeare_char']
    for word in words[:]:
        key, _, source = word.partition('=')
        if key == '--init_from' and source not in ('out-my', 'out-student', 'auto'):  # of the hub
            words.append(f'--init_from={tmp_path / os.path.basename(source)}')
    if named & {'config/train_gpt2.py', 'config/speedrun_1gpu.py', 'config/speedrun_8gpu.py'}:
        words.append('--device=cpu')
    if words[1].endswith('prepare.py'):
        words = [re.sub('=16384|=8192|=4096', '=280', word) for word in words]  # ids: more need time, and longer texts
        if 'classics' in words[1]:
            words.append('--vocab_size=300')
    if 'sample.py' in named:
        words += ['--max_new_tokens=4', '--num_samples=2']
    return [word.replace('=8', '=2') if word.startswith('--nproc') else word for word in words]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.network
def test_commands_run(tmp_path):
    copy, environment = copy_repository(tmp_path)
    save_tiny_gpt2(tmp_path / 'gpt2')
    save_tiny_qwen3(tmp_path / 'Qwen3-0.6B')
    done = [command for command in dict.fromkeys(commands(*RUN_PAGES)) if not command.startswith((*BY_MAKE, PIPELINES))]
    for command in done:
        run(command, cut_short(command, tmp_path), copy, environment)
    assert len(done) > 30


def cut_stage_short(command, tmp_path):
    """Return the words of a command of STAGE_PAGES, with arguments that make it small."""
    words = shlex.split(command)
    script = next(os.path.basename(word) for word in words if word.endswith('.py'))  # torchrun has options before it
    if script == 'train.py':
        words += FEW_STEPS
        from_scratch = 'init_from' not in command
        if from_scratch and any(name in command for name in ('pretrain', 'own_text', 'hongloumeng')):
            words += ['--n_layer=1', '--n_head=1', '--n_embd=32']
        if 'Qwen3' in command:
            words += [f'--init_from={tmp_path / "Qwen3-0.6B"}', '--sample_tokens=4']
        if 'grpo' in command:
            words += ['--group_size=2', '--max_new_tokens=4']
        if 'sft_chat' in command:
            words += ['--sample_tokens=4', '--sample_prompts=dog']
    if script == 'judge.py':
        words.append('--titles=2')
    if script in ('judge.py', 'chat.py', 'sample.py'):
        words.append('--max_new_tokens=4')
    return words


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.network
def test_stages_run(tmp_path):
    copy, environment = copy_repository(tmp_path)
    add_conversations(copy)
    save_tiny_qwen3(tmp_path / 'Qwen3-0.6B')
    before = [
        'python data/any_text/prepare.py my.txt --tokenizer=bbpe --vocab_size=280',
        'python train.py config/own_text.py --dataset=my --out_dir=out-my --block_size=64',
        'python data/hongloumeng_qwen2/prepare.py',
        'python train.py config/train_hongloumeng_qwen2.py config/qwen3.py --block_size=64',
    ]
    done = []
    for command in before + commands(*STAGE_PAGES):
        if command.startswith((PIPELINES, 'pip install')) or '--serve' in command:  # below, and in test_server.py
            continue
        run(command, cut_stage_short(command, tmp_path), copy, environment)
        done.append(command)
    assert len(done) == 28
    for name in ('exported/stone/model.safetensors', 'stone.gguf', 'stone-ollama/Modelfile',
                 'exported/out-lora/config.json', 'exported/adapter/adapter_config.json'):
        assert (copy / name).exists(), name


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('command', [command for command in commands(*STAGE_PAGES) if command.startswith(PIPELINES)])
def test_pipelines_run(tmp_path, command):
    """
    runs/poems.sh and runs/chat.sh, cut short. Started again, they train no stage twice; with another setting they stop.
    """
    copy, environment = copy_repository(tmp_path)
    add_conversations(copy)
    environment |= {'VOCAB_SIZE': '280', 'CONTEXT': '256'}
    words = shlex.split(command)
    if 'poems' in command:
        words.append('--quick')
    words += ['--max_iters=2', '--eval_iters=1', '--batch_size=4', '--gradient_accumulation_steps=1',
              '--compile=False', '--device=cpu', '--n_layer=1', '--n_head=1', '--n_embd=16']
    for again in (False, True):
        output = run(command, words, copy, environment, timeout=900)
        trained = 'iter 1:' in output or 'steps in' in output
        assert trained != again
    result = subprocess.run([*words, '--weight_decay=0.5'], cwd=copy, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert 'was made from other inputs (now: --weight_decay=0.5); to begin anew: ' in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.network
def test_demo(tmp_path):
    """
    `make demo` in a fresh copy, with the packages of this environment, reaches the loss that the README states and
    writes a play: most of its words occur in Shakespeare's.
    """
    copy = tmp_path / 'stonegpt'
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    venv = os.path.dirname(os.path.dirname(os.path.abspath(sys.executable)))
    if not os.path.exists(os.path.join(venv, 'installed')):
        pytest.skip('not an environment that make made')
    output = run('make demo', ['make', 'demo', f'VENV={venv}', '-o', f'{venv}/installed'], copy, os.environ, 900)
    assert float(re.search(r'best validation loss ([\d.]+)', output)[1]) <= 1.62
    sample = output[output.index('ROMEO:\n'):]
    assert len(sample) > 500
    assert sample.count(':\n') >= 2
    text = (copy / 'data/shakespeare_char/input.txt').read_text(encoding='utf-8')
    words = re.findall(r"[a-z']+", sample.lower())
    shakespeares_words = set(re.findall(r"[a-z']+", text.lower()))
    assert sum(word in shakespeares_words for word in words) > 0.75 * len(words)
