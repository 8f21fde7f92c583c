"""
How fast train.py trains in any configuration, also beside nanoGPT with the same settings:

    python bench.py config/train_gpt2.py --batch_size=8
    python bench.py config/train_shakespeare_char.py --nanogpt=../nanoGPT
    python bench.py config/train_shakespeare_char.py --profile

train.py runs as usual and is stopped after some steps, so a step is complete: batch, forward, backward, optimizer.
It has one micro-batch unless --gradient_accumulation_steps is given.

A row is a train.py: its parameters, the milliseconds of a step (the median; on a GPU the mean, because single steps
cannot be timed without waiting for each), tokens per second, MFU, and the most memory that its process held. With
nanoGPT the two run in turn, and the last line has the ratio of every pair. --profile adds a row for each of the ten
most expensive operations: share of the time, milliseconds and calls per step.
"""
import os
import re
import statistics
import tempfile

from benchmarks.common import print_ratios, random_dataset, time_train
from core.device import setup
from core.estimates import measured_peak
from core.files import ROOT


def time_steps(arguments, steps, seconds, runs, nanogpt, trace):
    """arguments: for train.py. nanogpt: its folder, or ''. trace: the file for a profile, or ''."""
    with tempfile.TemporaryDirectory() as out:
        quiet = quiet_arguments(out)
        ours = [*arguments, *quiet, '--tensorboard_log=False', '--sample_interval=0', '--save_minutes=0',
                '--background_save=False']
        if not any(argument.startswith('--gradient_accumulation_steps=') for argument in arguments):
            ours.append('--gradient_accumulation_steps=1')
        first = time_train(ROOT, ours, out, steps, seconds)
        if not first or (nanogpt and not nanogpt_can_read(first)):
            reason = 'nanoGPT cannot read the dataset' if first else 'the dataset is not there'
            print(f"{reason}, so random tokens of GPT-2's vocabulary stand in for it", flush=True)
            ours.append(f'--dataset={random_dataset(out)}')
            first = time_train(ROOT, ours, out, steps, seconds)

        results = {'StoneGPT': [first]}
        if nanogpt:
            theirs = [*nanogpt_arguments(nanogpt, arguments, first), *quiet]
            results['nanoGPT'] = []
            for i in range(runs):
                if i:
                    results['StoneGPT'].append(time_train(ROOT, ours, out, steps, seconds))
                results['nanoGPT'].append(time_train(nanogpt, theirs, out, steps, seconds))
                print(', '.join(f'{name}: {found[i]["ms"]:.2f} ms' for name, found in results.items()), flush=True)
        print_table(results)
        if nanogpt:
            our_ms, their_ms = ([result['ms'] for result in found] for found in results.values())
            print_ratios('StoneGPT / nanoGPT, ms per step', our_ms, their_ms)
        if trace:
            profiled = time_train(ROOT, ours, out, steps, seconds, os.path.abspath(os.path.expanduser(trace)))
            print_operations(profiled['operations'], trace)


def quiet_arguments(out):
    """Return settings of both train.py files: print every step, evaluate once, write nothing outside `out`."""
    return ['--eval_only=False', '--eval_iters=1', '--eval_interval=1000000000', '--log_interval=1',
            '--wandb_log=False', f'--out_dir={os.path.join(out, "run")}']


def nanogpt_can_read(result):
    """Return whether nanoGPT can read the dataset of a result and gives the network the same vocabulary."""
    names = ['train.bin', 'val.bin']
    if result['vocab_size'] != 50257:  # without meta.pkl nanoGPT takes GPT-2's
        names.append('meta.pkl')
    return all(os.path.exists(os.path.join(result['folder'], name)) for name in names)


def nanogpt_arguments(nanogpt, arguments, result):
    """Return the settings that our run used, as far as nanoGPT has them. Prints which of `arguments` it lacks."""
    with open(os.path.join(nanogpt, 'train.py'), encoding='utf-8') as f:
        settings_part = f.read().partition('\nconfig_keys')[0]
    names = re.findall(r'^(\w+) *= ', settings_part, re.MULTILINE)
    options = [argument for argument in arguments if argument.startswith('--')]
    unknown = [option for option in options if option[2:].partition('=')[0] not in names]
    if unknown:
        print(f'nanoGPT goes without {" ".join(unknown)}, which it does not know')
    if result['device'] == 'cpu' and result['dtype'] != 'float32':
        print(f'nanoGPT computes in float32 on a CPU, StoneGPT in {result["dtype"]} (--dtype=float32: both in that)')
    used = {}
    for key, value in result['config'].items():
        if key in names and not key.startswith('wandb') and key != 'backend':
            used[key] = value
    used.update(dataset=result['folder'], device=result['device'], dtype=result['dtype'])
    return [f'--{key}={value}' for key, value in used.items()]


def print_table(results):
    """results: {name: [what time_train() returned]}. Tokens and FLOPs are those of our network."""
    first = results['StoneGPT'][0]
    env = setup(first['device'], first['dtype'], training=True)
    peak = env.peak_flops or measured_peak(env)
    print(f'{env.device} {env.dtype}, {first["tokens"]:,} tokens per step, {first["steps"]} steps timed')
    print('            parameters  ms per step    tokens/s     MFU  peak memory')
    for name, found in results.items():
        ms = statistics.median(result['ms'] for result in found)
        tokens_per_s = first['tokens'] / ms * 1000
        mfu = first['flops'] / ms * 1000 / peak
        memory = max(result['memory'] or 0 for result in found)
        memory_text = f'{memory / 1e6:9,.0f} MB' if memory else '           -'
        parameters = found[0]['parameters']
        print(f'{name:10} {parameters:12,} {ms:12,.2f} {tokens_per_s:11,.0f} {mfu:7.1%} {memory_text}')
    if env.peak_flops:
        source = "this GPU's data sheet"
    else:
        kind = 'CPU' if env.device == 'cpu' else 'GPU'
        source = f"this {kind}'s {env.dtype} matrix product, measured just now"
    print(f'MFU: % of {peak / 1e12:,.3g} TFLOP/s, {source}')


def print_operations(operations, trace):
    """operations: [[name, calls, ms, share of the time]] of 3 steps."""
    print(f'trace of 3 steps: {trace}; what took most time in them:')
    print('   share  ms per step  calls per step  operation')
    for name, calls, ms, share in operations:
        print(f'{share:8.1%} {ms / 3:12.2f} {calls / 3:15.0f}  {name[:90]}')
