"""Settings of a script: its module globals, overridden by config files and by --key=value. configurator.py says how."""
import ast
import difflib
import importlib
import io
import os
import shlex
import sys
import tokenize
import types
from collections import namedtuple

from core import startup
from core.files import ROOT, find

EXPECTED = {bool: 'True or False', int: 'an int', float: 'a float', str: 'text'}
Setting = namedtuple('Setting', 'default comment heading')  # heading: the comment line above it, or ''
Override = namedtuple('Override', 'source key value')  # source: COMMAND_LINE (value is text or None), or a config file
COMMAND_LINE = '--'
ONE_DASH = '-'  # a source, too: what is given so is refused once all settings are known

# What other programs call our settings. The first line that has the name and whose setting the script has is suggested.
FOREIGN_NAMES = {
    'to': 'output output_dir output_file outfile o save_dir',
    'out': 'output output_file outfile o',
    'out_dir': 'output_dir output o save_dir checkpoint_dir ckpt_dir run run_dir model_dir logdir log_dir',
    'init_from=resume': 'resume resume_training continue',
    'init_from': 'model model_path model_name model_name_or_path m pretrained checkpoint checkpoint_path '
                 'ckpt ckpt_path load load_from resume_from resume_from_checkpoint base_model weights',
    'start': 'prompt text p input question message starts',
    'prompt': 'start text p input question message',
    'prompts': 'file prompt_file f',
    'dataset': 'data data_dir data_path dataset_path dataset_name dataset_dir train_data train_file input text file d',
    'data': 'dataset data_dir data_path dataset_path dataset_name dataset_dir input text file d f',
    'input': 'text file data data_dir data_path dataset dataset_path input_file input_dir i f',
    'tokenizer': 'tokenizer_path tokenizer_name tokenizer_file tokenizer_name_or_path vocab',
    'val_fraction': 'val_split val_size test_size val_ratio split',
    'learning_rate': 'lr max_lr peak_lr',
    'min_lr': 'lr_min final_lr end_lr',
    'epochs': 'epoch num_epochs n_epochs num_train_epochs max_epochs e',
    'max_iters=...': 'epochs epoch num_epochs n_epochs num_train_epochs max_epochs e',  # not the same number
    'max_iters': 'steps max_steps num_steps n_steps train_steps total_steps iters num_iters num_iterations iterations',
    'warmup_iters': 'warmup warmup_steps num_warmup_steps',
    'schedule': 'scheduler lr_scheduler lr_scheduler_type lr_schedule',
    'optimizer': 'optim opt',
    'weight_decay': 'wd',
    'beta1': 'adam_beta1',
    'beta2': 'adam_beta2',
    'grad_clip': 'clip max_grad_norm grad_norm clip_grad gradient_clip gradient_clip_val clip_grad_norm',
    'batch_size': 'bs b batch micro_batch_size train_batch_size device_batch_size per_device_train_batch_size '
                  'per_device_eval_batch_size eval_batch_size',
    'gradient_accumulation_steps': 'gradient_accumulation grad_accum grad_accum_steps accumulation_steps '
                                   'accumulate_grad_batches accum_steps accum ga',
    'block_size': 'context context_length context_size ctx ctx_size c seq_len seq_length sequence_length max_seq_len '
                  'max_seq_length max_length max_position_embeddings n_ctx n_positions window',
    'max_new_tokens': 'max_tokens max_length length num_tokens n_tokens new_tokens n_predict predict n tokens',
    'max_tokens': 'max_length max_seq_len max_seq_length block_size context_length',
    'n_layer': 'num_layers n_layers num_hidden_layers layers depth',
    'n_head': 'num_heads n_heads num_attention_heads heads',
    'n_kv_head': 'num_kv_heads n_kv_heads num_key_value_heads kv_heads',
    'n_embd': 'hidden_size hidden_dim d_model dim n_embed embed_dim embedding_dim embedding_size emb_dim width',
    'n_inner': 'intermediate_size ffn_dim d_ff ffn_hidden_size',
    'activation': 'hidden_act act activation_function',
    'num_samples': 'num_return_sequences samples n_samples num_outputs',
    'temperature': 'temp t',
    'repetition_penalty': 'repeat_penalty',
    'interactive': 'i chat',
    'system': 'system_prompt sys',
    'serve': 'server api web',
    'eval_interval': 'eval_steps eval_every eval_freq evaluation_steps val_interval',
    'log_interval': 'log_steps log_every logging_steps',
    'save_interval': 'save_steps save_every checkpoint_interval checkpoint_every',
    'keep_last': 'save_total_limit',
    'wandb_log': 'wandb use_wandb',
    'tensorboard_log': 'tensorboard tb',
    'lora_rank': 'lora_r rank r lora',
    'quantize_base': 'qlora load_in_8bit load_in_4bit',
    'dtype=bfloat16': 'bf16',
    'dtype=float16': 'fp16 half',
    'dtype=float32': 'fp32',
    'dtype=int8': 'int8 load_in_8bit',
    'dtype': 'precision torch_dtype mixed_precision amp',
    'device=cpu': 'cpu no_cuda use_cpu',
    'device=cuda': 'gpu cuda',
    'quant': 'quantize quantization outtype q dtype',
    'seed': 's random_seed',
}
RUN_FILES = {'ckpt.pt': 'out_dir', 'best.pt': 'out_dir', 'weights.pt': 'out_dir', 'config.json': 'init_from'}
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
        if override.source == COMMAND_LINE:
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
        elif argument.startswith('-'):
            overrides.append(Override(ONE_DASH, *read_option(argument[1:], rest, own)))
            continue
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


def read_config_file(script, name):
    """Return the overrides of a config file. It is executed with all that the script has, imports too, as nanoGPT's."""
    path = find(name)
    run = run_setting(name, script)
    if run:
        raise Refused(f'{name}: a folder, not a config file; did you mean {run}?')
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


def run_setting(folder, settings):
    """Return the setting for a folder with a run or a Hugging Face model, as it is to be written, or ''."""
    for file, key in RUN_FILES.items():
        if key in settings and os.path.exists(os.path.join(find(folder), file)):
            return f'--{key}={shlex.quote(folder)}'
    return ''


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


def apply_overrides(name, settings, overrides, verbose):
    """Return {setting: value}."""
    values = {key: setting.default for key, setting in settings.items()}
    for override in overrides:
        if override.key not in settings or override.source == ONE_DASH:
            meant = what_was_meant(override, settings)
            hint = f'; did you mean {meant}?' if meant else ''
            problem = 'settings have two dashes' if override.source == ONE_DASH else 'no such setting'
            raise Refused(f'{describe(override)}: {problem}{hint} (python {name} --help lists them)')
        values[override.key] = convert(override, settings[override.key])
        if verbose and override.source == COMMAND_LINE:
            print(f'Overriding: {override.key} = {values[override.key]!r}')
    return values


def what_was_meant(override, settings):
    """Return the setting that an unknown name stands for, as it is to be written, or ''."""
    value = override.value
    from_file = override.source not in (COMMAND_LINE, ONE_DASH)
    if str(value).endswith('.py') and not from_file:  # --config=own.py
        return f'{value} without {describe(override)}'
    meant = known_name(override.key.replace('-', '_').lower(), settings)
    if not meant or from_file:
        return meant
    is_switch = meant in settings and type(settings[meant].default) is bool
    if '=' not in meant and not (is_switch and value is None):
        meant += '=...' if value is None else f'={shlex.quote(value)}'
    return f'--{meant}'


def known_name(name, settings):
    """Return the setting that an unknown name stands for, or 'setting=value', or ''."""
    if name in settings:
        return name
    for ours, names in FOREIGN_NAMES.items():
        if ours.partition('=')[0] in settings and name in names.split():
            return ours
    negated = name.removeprefix('no_')
    if negated in settings and type(settings[negated].default) is bool:
        return f'{negated}=False'
    near = difflib.get_close_matches(name, settings, 1)
    return near[0] if near else ''


def print_help(name, doc, settings):
    print((doc or '').strip())
    print(f'\nSettings of {name} (--key=value; a config file may set them too):')
    for key, setting in settings.items():
        if setting.heading:
            print(f'\n  {setting.heading}')
        print(f'  --{key}={setting.default!r}'.ljust(39) + f' {setting.comment}')
