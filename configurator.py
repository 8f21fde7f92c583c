# Poor Man's Configurator (after nanoGPT's). A script's settings are its module globals, and this file, run inside the script by
#
#     exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())
#
# overrides them from config files (plain Python) and from `--key=value`, `--key value` or, for True, `--key`, in the order given:
#
#     python train.py config/train_shakespeare_char.py --batch_size=32
#
# A script that has a setting `objective` takes the settings of objectives/<objective>.py too, and one with `_settings = 'core.text.prepare'`
# those of that module; it may give one of them another default by assigning it. `--help` prints them all, with the comment that stands
# behind each. An unknown name or a value of the wrong type ends the script with one line that says what would be right.
# What is left behind in the script: `config`, every setting with its value, and `config_given`, {name: texts} of those set on the command line
# (the last text counts; a script may want them all).


def _configure(script):
    import ast
    import difflib
    import importlib
    import io
    import os
    import sys
    import tokenize
    import types

    from core.files import ROOT, find
    name = os.path.basename(script['__file__'])
    for stream, errors in ((sys.stdout, 'replace'), (sys.stderr, 'replace'), (sys.stdin, 'surrogateescape')):  # stdin as Python does the arguments
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(encoding='utf-8', errors=errors)  # a Windows console too

    def settings_of(module):
        """{setting: (default, comment, heading)} of a module's globals: its top-level assignments of plain values to public names
        (a leading _ or CAPITALS: not a setting)."""
        source = open(module['__file__'], encoding='utf-8').read()
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
        comments = {t.start[0]: (t.string.strip('# '), t.start[1]) for t in tokens if t.type == tokenize.COMMENT}
        found = {}
        for node in ast.parse(source).body:
            for target in node.targets if isinstance(node, ast.Assign) else []:
                key = getattr(target, 'id', '_')
                if not key.startswith('_') and not key.isupper() and key not in found and isinstance(module.get(key), (bool, int, float, str)):
                    above, column = comments.get(node.lineno - 1, ('', 1))
                    value = module[key] if module is script else ast.literal_eval(node.value)  # a module's globals may be what an earlier script has set
                    found[key] = value, comments.get(node.end_lineno, ('',))[0], '' if column else above.strip('-')
        return found

    def known():
        """The settings of the script and of the modules that it takes settings from: {setting: ((default, comment, heading), [globals])}."""
        found = {key: (entry, [script]) for key, entry in settings.items()}
        modules = [script['_settings']] if '_settings' in script else []
        if 'objective' in settings:
            if not os.path.exists(os.path.join(ROOT, 'objectives', f"{script['objective']}.py")):
                sys.exit(f"{name}: objective={script['objective']!r}: there is no objectives/{script['objective']}.py")
            modules.append(f"objectives.{script['objective']}")
        for module in modules:
            module = vars(importlib.import_module(module))
            for key, entry in settings_of(module).items():
                found.setdefault(key, (entry, [script]))[1].append(module)
        return found

    def convert(where, key, value, kind):
        """`value` (text if it comes from the command line) as a `kind`, or the end."""
        typed = value
        if where == '--' and kind is not str:
            try:
                typed = ast.literal_eval(value.title() if kind is bool else value)
            except (ValueError, SyntaxError):
                pass
        if kind is float and type(typed) is int or kind is int and type(typed) is float and typed.is_integer():
            typed = kind(typed)
        if type(typed) is not kind:
            sys.exit(f'{name}: {where}{key}={value!r}: expected ' + {bool: 'True or False', int: 'an int', float: 'a float', str: 'text'}[kind])
        return typed

    settings, overrides = settings_of(script), []
    arguments = [argument for argument in sys.argv[1:] if argument not in ('--help', '-h')]
    help_wanted = len(arguments) < len(sys.argv[1:])  # printed at the end, when the objective is known
    say = print if os.environ.get('RANK', '0') == '0' and not help_wanted else lambda text: None  # under torchrun every process comes by here
    while arguments:
        argument = arguments.pop(0)
        if argument.startswith('--'):
            key, equals, value = argument[2:].partition('=')
            if not equals:
                if type(settings.get(key, ('',))[0]) is bool and (arguments or ['--'])[0].title() not in ('True', 'False'):
                    arguments.insert(0, 'True')  # --key alone
                if not arguments:
                    sys.exit(f'{name}: --{key} needs a value: --{key}=...')
                value = arguments.pop(0)
            new = [('--', key, value)]
        else:
            path = find(argument)
            if not os.path.isfile(path):
                hint = f'; did you mean --{argument.lstrip("-")}?' if '=' in argument else ' (looked here and in the repository)'
                sys.exit(f'{name}: no config file {argument}{hint}')
            before = dict(script)  # a config file sees all that the script does, its imports too, as nanoGPT's do
            namespace = dict(before, __file__=path, __name__='config')
            try:
                exec(open(path, encoding='utf-8').read(), namespace)
            except Exception as error:
                sys.exit(f'{name}: {argument}: {type(error).__name__}: {error}')
            new = [(f'{argument}: ', key, value) for key, value in namespace.items() if not key.startswith('_')
                   and not isinstance(value, types.ModuleType) and not callable(value) and (key not in before or before[key] is not value)]
            say(f'Overriding config with {argument}')
        for where, key, value in new:  # what the script knows is set now, so that a later config file sees it; the rest waits for the objective
            if key in settings:
                script[key] = convert(where, key, value, type(settings[key][0]))
        overrides += new
    names = known()
    if help_wanted:
        print((script['__doc__'] or '').strip() + f'\n\nSettings of {name} (--key=value; a config file may set them too):')
        for key, ((default, comment, heading), _) in names.items():
            print(f'\n  {heading}' * bool(heading) + '\n' * bool(heading) + f'  --{key}={default!r}'.ljust(39) + f' {comment}')
        sys.exit(0)
    values = {key: default for key, ((default, *_), _) in names.items()}
    for where, key, value in overrides:
        if key not in names:
            near = ''.join(f'; did you mean {near}?' for near in difflib.get_close_matches(key, names, 1))
            sys.exit(f'{name}: {where}{key}: no such setting{near} (python {name} --help lists them)')
        values[key] = convert(where, key, value, type(values[key]))
        if where == '--':
            say(f'Overriding: {key} = {values[key]!r}')
    for key, (_, places) in names.items():
        for place in places:
            place[key] = values[key]
    script['config'] = values
    script['config_given'] = {}
    for where, key, value in overrides:
        if where == '--':
            script['config_given'].setdefault(key, []).append(value)


_configure(globals())
