"""The rules of the repository's layout: which file may import which, line lengths, a docstring in every package."""
import ast
import re
import subprocess

import pytest
from conftest import ROOT

LAYERS = [  # from the bottom up: a file imports only from its own layer or from lower ones
    r'kernels\.py',
    r'kv_cache\.py',
    r'model\.py',
    r'core/(__init__|files|startup|suggestions|configure|distributed|estimates|device|device_check)\.py',
    r'core/(text/.*|prepare|tokenizer)\.py',  # core/prepare.py and core/tokenizer.py re-export files of core/text
    r'core/(weights|inference)/.*\.py',
    r'core/training/.*\.py',
    r'objectives/.*\.py',
    r'benchmarks/.*\.py',
    r'([a-z]+|data/[^/]*/.*)\.py',  # scripts
]


def tracked_files():
    """Return the paths of all tracked Python files, relative to the repository."""
    try:
        command = ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '*.py']
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip('not a git repository')
    return sorted(name for name in names if (ROOT / name).exists())


def imports_of(name):
    """Return the files of this repository that a file imports, also inside functions, as relative paths."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{name}:{node.lineno}: write an absolute import'
            candidates = [node.module, *(f'{node.module}.{alias.name}' for alias in node.names)]
        else:
            continue
        for module in candidates:
            path = module.replace('.', '/')
            found |= {file for file in (f'{path}.py', f'{path}/__init__.py') if (ROOT / file).exists()}
    return found


def layer_of(name):
    return next(i for i, pattern in enumerate(LAYERS) if re.fullmatch(pattern, name))


SOURCES = [name for name in tracked_files() if not name.startswith(('tests/', 'config/'))]
IMPORTS = {name: imports_of(name) for name in SOURCES}
SCRIPTS = [name for name in SOURCES if '/' not in name and name not in ('model.py', 'kernels.py', 'kv_cache.py')]


@pytest.mark.parametrize('name', SOURCES)
def test_imports_run_downwards(name):
    wrong = [other for other in IMPORTS[name] if layer_of(other) > layer_of(name)]
    assert not wrong, f'{name} imports {wrong}, which are above it'


def test_no_cycles():
    """Remove files whose imports are all removed; what remains is a cycle."""
    remaining = dict(IMPORTS)
    while True:
        free = [name for name, imports in remaining.items() if not imports & remaining.keys()]
        if not free:
            break
        for name in free:
            del remaining[name]
    assert not remaining


@pytest.mark.parametrize('name', SOURCES)
def test_nothing_imports_a_script(name):
    assert not IMPORTS[name] & set(SCRIPTS)


@pytest.mark.parametrize('name', [name for name in SOURCES if re.fullmatch(r'data/[^/]+/prepare\.py', name)])
def test_prepare_scripts(name):
    """They need the text part and the paths only."""
    allowed = re.compile(r'core/(text/.*|files|startup|__init__)\.py')
    assert all(allowed.fullmatch(other) for other in IMPORTS[name])


def test_weights_and_inference_are_apart():
    for name in SOURCES:
        for one, other in (('core/weights/', 'core/inference/'), ('core/inference/', 'core/weights/')):
            if name.startswith(one):
                assert not any(imported.startswith(other) for imported in IMPORTS[name]), name


@pytest.mark.parametrize('name', [name for name in tracked_files() if name.endswith('__init__.py')])
def test_packages_have_docstrings(name):
    assert ast.get_docstring(ast.parse((ROOT / name).read_text(encoding='utf-8')))
