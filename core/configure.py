"""Settings of a script: its module globals, overridden by config files and by --key=value. configurator.py says how."""
import ast
import importlib
import io
import os
import sys
import tokenize
import types
from collections import namedtuple

from core import startup
from core.files import ROOT, find
from core.suggestions import known_name, meant_by_argument, meant_by_name

EXPECTED = {bool: 'True or False', int: 'an int', float: 'a float', str: 'text'}
Setting = namedtuple('Setting', 'default comment heading')  # heading: the comment line above it, or ''
Override = namedtuple('Override', 'source key value')  # source: one of the next three, or a config file
COMMAND_LINE = '--'  # the value is text, or None
POSITIONAL = ''  # an argument without -- that is no config file: the `input` of a script that has this setting
ONE_DASH = '-'  # refused once all settings are known
configured = set()  # the modules whose settings were set in this process


class Refused(Exception):
    """An argument or a config file that is wrong; the text says how."""


def configure(script):
    """Set the globals `script` from sys.argv. Exits if an argument or a config file is wrong, and after --help."""
    startup.end_imports()
    use_utf8()
    for module in configured:
        reset(module)
    arguments = [argument for argument in sys.argv[1:] if argument not in ('--help', '-h')]
    help_wanted = len(arguments) < len(sys.argv[1:])
    verbose = os.environ.get('RANK', '0') == '0' and not help_wanted  # under torchrun every process comes here
    name = os.path.basename(script['__file__'])
    try:
        own = read_settings(script)
        overrides = read_arguments(script, own, arguments, verbose)
        modules = settings_modules(script, own)
        declared = {module: read_settings(vars(module), as_written=True) for module in modules}
        settings = dict(own)
        for entries in declared.values():
            settings.update((key, entry) for key, entry in entries.items() if key not in settings)
        if help_wanted:
            print_help(name, script['__doc__'], settings)
            sys.exit(0)
        check_inputs(script, settings, overrides)
        values = apply_overrides(name, settings, overrides, verbose)
    except Refused as refused:
        sys.exit(f'{name}: {refused}')
    script.update(values)
    for module, entries in declared.items():
        configured.add(module)
        vars(module).update((key, values[key]) for key in entries)
    script['config'] = values
    script['config_given'] = {}
    for override in overrides:
        if override.source in (COMMAND_LINE, POSITIONAL):
            script['config_given'].setdefault(override.key, []).append(override.value)


def use_utf8():
    """Read and write UTF-8 on the standard streams, on a Windows console too."""
    for stream, errors in ((sys.stdout, 'replace'), (sys.stderr, 'replace'), (sys.stdin, 'surrogateescape')):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(encoding='utf-8', errors=errors)  # stdin as Python decodes the arguments


def reset(module):
    """Give the settings of a module the values that are written in its file."""
    vars(module).update((key, entry.default) for key, entry in read_settings(vars(module), as_written=True).items())


def read_settings(namespace, as_written=False):
    """
    Return {name: Setting} of a module's globals: its top-level assignments of a bool, int, float or str to a public
    name (no leading _, not in CAPITALS). The default is the current value, or the one written in the file.
    """
    with open(namespace['__file__'], encoding='utf-8') as f:
        source = f.read()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: (t.string.strip('# '), t.start[1]) for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for node in ast.parse(source).body:
        for target in node.targets if isinstance(node, ast.Assign) else []:
            key = getattr(target, 'id', '_')
            is_setting = not key.startswith('_') and not key.isupper() and type(namespace.get(key)) in EXPECTED
            if is_setting and key not in found:
                default = ast.literal_eval(node.value) if as_written else namespace[key]
                comment, _ = comments.get(node.end_lineno, ('', 0))
                above, column = comments.get(node.lineno - 1, ('', 0))
                found[key] = Setting(default, comment, above.strip('-') if column == 0 else '')
    return found


def settings_modules(script, own):
    """Return the modules whose settings are the script's too: those that it names, and its objective."""
    names = list(script.get('EXTRA_SETTINGS', ()))
    if '_settings' in script:  # prepare scripts written for earlier versions
        names.append(script['_settings'])
    if 'objective' in own:
        objective = script['objective']
        if not os.path.exists(os.path.join(ROOT, 'objectives', f'{objective}.py')):
            raise Refused(f'objective={objective!r}: there is no objectives/{objective}.py')
        names.append(f'objectives.{objective}')
    return [importlib.import_module(name) for name in names]


def read_arguments(script, own, arguments, verbose):
    """
    Return the overrides of config files and options, in order. Sets the script's own settings at once, because later
    config files may use them; those of modules wait until the objective is certain.
    """
    accepted = script.get('OTHER_ARGUMENTS')
    others = []
    overrides = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument.startswith('--'):
            key, value = read_option(argument[2:], rest, own)
            if accepted == 'all' and key not in own:
                others.append(f'--{key}' if value is None else f'--{key}={value}')
                continue
            new = [Override(COMMAND_LINE, key, value)]
        elif accepted == 'all' or (accepted == 'positional' and not argument.startswith('-')):
            others.append(argument)
            continue
        elif argument.startswith(('-', '–', '—')):  # word processors make long dashes of two
            overrides.append(Override(ONE_DASH, *read_option(argument.lstrip('-–—'), rest, own)))
            continue
        elif is_data(argument):
            new = [Override(POSITIONAL, 'input', argument)]
        else:
            new = read_config_file(script, argument)
            if verbose:
                print(f'Overriding config with {argument}')
        script.update((override.key, convert(override, own[override.key])) for override in new if override.key in own)
        overrides += new
    if accepted:
        script['other_arguments'] = others
    return overrides


def read_option(argument, rest, own):
    """Return key and value of `key=value`, `key value` (taken from `rest`) or `key` (of a bool True, else None)."""
    key, equals, value = argument.partition('=')
    if equals:
        return key, value
    is_bool = key in own and type(own[key].default) is bool
    if is_bool and (not rest or rest[0].title() not in ('True', 'False')):
        return key, 'True'
    return key, rest.pop(0) if rest and not rest[0].startswith('--') else None


def is_data(argument):
    """Return whether an argument without -- is no config file (which ends in .py) and no setting without its dashes."""
    is_setting = '=' in argument and not os.path.exists(find(argument))
    return not argument.endswith('.py') and not is_setting


def read_config_file(script, name):
    """Return the overrides of a config file. It is executed with all that the script has, imports too, as nanoGPT's."""
    path = find(name)
    if not os.path.isfile(path):
        meant = f'; did you mean --{name.lstrip("-")}?' if '=' in name else ' (looked here and in the repository)'
        raise Refused(f'no config file {name}{meant}')
    namespace = dict(script, __file__=path, __name__='config')
    try:
        with open(path, encoding='utf-8') as f:
            exec(f.read(), namespace)
    except Exception as error:
        reason = str(error).partition('\n')[0]
        raise Refused(f'{name}: {type(error).__name__}: {reason}') from error

    def is_override(key, value):
        if key.startswith('_') or isinstance(value, types.ModuleType) or callable(value):
            return False
        return key not in script or script[key] is not value
    return [Override(name, key, value) for key, value in namespace.items() if is_override(key, value)]


def describe(override):
    source = override.source if override.source in (COMMAND_LINE, ONE_DASH) else f'{override.source}: '
    return f'{source}{override.key}'


def convert(override, setting):
    """Return the override's value in the type of the setting's default."""
    kind, value = type(setting.default), override.value
    if value is None and override.source == COMMAND_LINE:
        raise Refused(f'--{override.key} needs a value: --{override.key}=...')
    if override.source == COMMAND_LINE and kind is not str:
        try:
            value = ast.literal_eval(value.title() if kind is bool else value)
        except (ValueError, SyntaxError):
            pass
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not kind:
        given = ' '.join(repr(override.value).split())[:80]
        raise Refused(f'{describe(override)}={given}: expected {EXPECTED[kind]}')
    return value


def check_inputs(script, settings, overrides):
    """Exit if arguments without -- are not the input of this script, or are several where it takes one."""
    positional = [override.value for override in overrides if override.source == POSITIONAL]
    if positional and 'input' not in settings:
        meant = meant_by_argument(positional[0], settings)
        hint = f'; did you mean {meant}?' if meant else ''
        raise Refused(f'{positional[0]}: taken for a config file, but those end in .py{hint}')
    inputs = [override.value for override in overrides if override.source in (COMMAND_LINE, POSITIONAL)
              and override.key == 'input']
    if positional and len(inputs) > 1 and not script.get('SEVERAL_INPUTS'):
        raise Refused(f'{" ".join(inputs)}: several inputs; expected one, a file or a folder with all of them')


def apply_overrides(name, settings, overrides, verbose):
    """Return {setting: value}."""
    values = {key: setting.default for key, setting in settings.items()}
    for override in overrides:
        if override.key not in settings or override.source == ONE_DASH:
            if override.source not in (COMMAND_LINE, ONE_DASH):
                meant = known_name(override.key, settings)
            elif str(override.value).endswith('.py'):  # --config=own.py
                meant = f'{override.value} without {describe(override)}'
            else:
                meant = meant_by_name(override.key, override.value, settings)
            hint = f'; did you mean {meant}?' if meant else ''
            problem = 'settings have two dashes' if override.source == ONE_DASH else 'no such setting'
            raise Refused(f'{describe(override)}: {problem}{hint} (python {name} --help lists them)')
        values[override.key] = convert(override, settings[override.key])
        if verbose and override.source in (COMMAND_LINE, POSITIONAL):
            print(f'Overriding: {override.key} = {values[override.key]!r}')
    return values


def print_help(name, doc, settings):
    print((doc or '').strip())
    print(f'\nSettings of {name} (--key=value; a config file may set them too):')
    for key, setting in settings.items():
        if setting.heading:
            print(f'\n  {setting.heading}')
        print(f'  --{key}={setting.default!r}'.ljust(39) + f' {setting.comment}')
