"""Checkpoints: one file with everything about a run. It is replaced atomically and never unpickles objects."""
import glob
import math
import os
import pickle
import shutil
import sys

import torch

from core.device import shapes_only
from core.estimates import check_memory
from core.files import atomic, find, quoted
from core.text.dataset import open_dataset, read_meta_pkl
from core.text.download import hub_commit
from core.text.tokenizer import gpt2_tokenizer
from core.weights.huggingface import download_pretrained, load_pretrained
from core.weights.lora import add_adapters, merge, trained_weights, weight_sample, without_adapters
from core.weights.vocabulary import fit_vocabulary, new_reward_head, own_tokenizer, resize_vocabulary
from model import GPT, GPTConfig

EARLIER = 'ckpt_{:08d}.pt'  # file name of an earlier checkpoint, by its step


def save_checkpoint(checkpoint, path):
    """
    Write a checkpoint, with checksums of its tensors, to a temporary file, flush it and rename it to `path`. Exits if
    this fails (a full disk).
    """
    torch.serialization.set_crc32_options(False)  # torch.load() does not read them, and they are half the work
    checkpoint = {**checkpoint, 'checksums': checksums(checkpoint)}
    try:
        with atomic(path) as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as error:
        reason = error
        if isinstance(error.__context__, OSError):  # torch raises its own error on top of that of a full disk
            reason = error.__context__
        old = ' (the checkpoint that was there is still whole)' if os.path.exists(path) else ''
        sys.exit(f'{path}: could not be saved: {reason}{old}')


def checksums(checkpoint):
    """Return {part: the sum of its tensors' bytes as 64-bit integers}, which notices any byte that changes alone."""
    sums = {key: checksum(part) for key, part in checkpoint.items() if key != 'checksums'}
    return {key: total for key, total in sums.items() if total is not None}


def checksum(part):
    """Return the sum for a part of a checkpoint, in which tied tensors count once; None if it has no tensors."""
    tensors = {(tensor.data_ptr(), tensor.shape): tensor for tensor in tensors_in(part)}
    return sum(map(sum_of_bytes, tensors.values())) if tensors else None


def tensors_in(tree):
    """Yield the tensors of a nested checkpoint."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_in(part)


def sum_of_bytes(tensor):
    """Return the sum of a tensor's bytes as int64, modulo 2**64, plus those at the end that fill no int64."""
    if tensor.numel() == 0:
        return 0
    data = tensor.detach().flatten().view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()  # aligned
    n = len(data) // 8 * 8
    return int(data[:n].view(torch.int64).sum()) + int(data[n:].sum())


def copy_checkpoint(path, copy):
    """Give the file a second name: a hard link, which costs nothing, or a copy if the file system has no links."""
    if os.path.exists(copy) and os.path.samefile(path, copy):
        return  # os.replace() does nothing for two links to one file, and the temporary name would stay
    temporary = f'{copy}.tmp{os.getpid()}'
    try:
        os.link(path, temporary)
        os.replace(temporary, copy)
    except OSError:
        try:
            with open(path, 'rb') as original, atomic(copy) as f:
                shutil.copyfileobj(original, f)
        except OSError as error:
            sys.exit(f'{copy}: could not be saved: {error}; {path} is whole')


def load_checkpoint(path, device='cpu', check=False):
    """
    Load a checkpoint of this program or of nanoGPT as a dict. With device='meta' the tensors have shapes but no
    contents, which is fast. Exits if the file is missing, damaged or something else.

    check: exit if the checksums do not match, for resuming. Otherwise this is a warning: weights that somebody has
    edited can be sampled from.
    """
    if not os.path.exists(path):
        sys.exit(f'{path}: no such checkpoint; train first, or name another folder by --out_dir '
                 '(sample.py: or a file by --ckpt)')
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        for key, total in checkpoint.get('checksums', {}).items() if device != 'meta' else ():
            if checksum(checkpoint.get(key)) not in (None, total):  # None: somebody took the optimizer out
                fault = f'"{key}" is not what was written (if you changed it yourself, delete "checksums")'
                if check:
                    raise ValueError(fault)
                print(f'warning: {path}: damaged: {fault}', file=sys.stderr)
        state = checkpoint['model'].items()
        checkpoint['model'] = {key.removeprefix('_orig_mod.'): p for key, p in state}  # the prefix of torch.compile
        checkpoint['model_args'] = vars(GPTConfig(**checkpoint['model_args']))
    except Exception as error:  # for a damaged file torch raises nearly every class of error
        reason = str(error).partition('\n')[0].partition('. ')[0]
        if isinstance(error, pickle.UnpicklingError):
            reason = 'it holds other things than tensors and plain values'
        sys.exit(f'{path}: not a checkpoint of this program or nanoGPT, or a damaged one '
                 f'({type(error).__name__}: {reason[:150]})')
    return checkpoint


def earlier_checkpoints(out_dir):
    """Return the paths of the earlier checkpoints, ckpt_STEP.pt, newest first."""
    return sorted(glob.glob(os.path.join(glob.escape(out_dir), 'ckpt_' + '[0-9]' * 8 + '.pt')), reverse=True)


def load_last(out_dir, device='cpu'):
    """
    Load the checkpoint to resume from. Returns (checkpoint, path).

    This is ckpt.pt. If it is missing or damaged, a warning is printed and the newest readable one of ckpt_STEP.pt and
    best.pt, in this order, is taken. Exits as load_checkpoint() does if there is none.
    """
    first_error = None
    paths = [os.path.join(out_dir, 'ckpt.pt'), *earlier_checkpoints(out_dir), os.path.join(out_dir, 'best.pt')]
    for path in paths:
        try:
            checkpoint = load_checkpoint(path, device, check=device != 'meta')
        except SystemExit as error:
            first_error = first_error or error
            continue
        if first_error:
            reason = str(first_error).partition(';')[0]
            print(f'warning: {reason}; taking the one before, {path}', file=sys.stderr)
        return checkpoint, path
    others = [path for path in paths[1:] if os.path.exists(path)]
    if os.path.exists(paths[0]) and others:
        sys.exit(f'{first_error}; nor can {" or ".join(others)} be read')
    raise first_error


def checkpoint_path(out_dir, ckpt=''):
    """
    Return the path of the checkpoint to sample from.

    This is `ckpt` if it is given. Otherwise it is ckpt.pt of the run's folder, or best.pt if the run kept only the
    checkpoint with the best validation loss (always_save_checkpoint=False), or weights.pt if it is alone there.
    """
    if ckpt:
        return find(ckpt)
    if os.path.isfile(find(out_dir)):
        sys.exit(f'out_dir={out_dir}: a file; expected the folder of a run (or --ckpt={quoted(str(out_dir))})')
    last, best, weights = (os.path.join(find(out_dir), name) for name in ('ckpt.pt', 'best.pt', 'weights.pt'))
    if not os.path.exists(last):
        return next(filter(os.path.exists, (best, weights)), last)
    if not os.path.exists(best):
        return last
    config = load_checkpoint(last, 'meta').get('config', {})
    return last if config.get('always_save_checkpoint', True) else best


def best_loss(measured):
    """Return the lower validation loss of an evaluation: that of the raw or of the averaged weights; inf if none."""
    return min(measured.get('val_loss', math.inf), measured.get('val_ema_loss', math.inf))


def choose_weights(checkpoint):
    """
    Of a run with averaged weights: make 'model' those that had the lower validation loss at the last evaluation, remove
    'ema' and say in 'weights' which they are. They are the raw ones if there was no evaluation yet.
    """
    averaged = checkpoint.pop('ema', None)
    if averaged:
        measured = checkpoint.get('measured', {})
        is_better = measured.get('val_ema_loss', math.inf) < measured.get('val_loss', math.inf)
        checkpoint['model'] = averaged if is_better else checkpoint['model']
        checkpoint['weights'] = 'averaged weights' if is_better else 'raw weights'


def new_model(config, rows, T, gradient_checkpointing, env, ema=0.0):
    """Return a new model. Exits before it takes memory if training on (rows, T) tokens at a time cannot fit."""
    with shapes_only():
        shapes = GPT(config)
    shapes.gradient_checkpointing = gradient_checkpointing
    check_memory(shapes, rows, T, env, ema)
    model = GPT(config)
    print(f'new model: {describe(model)}')
    return model


def build_model(checkpoint, path, device='cpu', **overrides):
    """
    Build the network of a checkpoint on the CPU, with some of its model_args (dropout) overridden. If the checkpoint
    holds LoRA adapters, their base is loaded too, and the network is on `device`. Exits if the weights do not fit.
    """
    if checkpoint.get('lora'):
        model = load_base_with_adapters(checkpoint, path, device, **overrides)
    else:
        model = GPT(GPTConfig(**{**checkpoint['model_args'], **overrides}))
    try:
        missing, unknown = model.load_state_dict(checkpoint['model'], strict=not model.lora)
        trained = trained_weights(model)  # with adapters the checkpoint has only these
        wrong = unknown + [key for key in missing if key in trained]
        if wrong:
            raise RuntimeError(f'\nadapters of other layers: {wrong[0]}')
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        sys.exit(f'{path}: its weights do not fit its model_args: {reason[:200]}')
    return model


def load_base_with_adapters(checkpoint, path, device, **overrides):
    """Load the base model of a LoRA checkpoint and add new adapters to it. Exits if the base is gone or has changed."""
    lora = checkpoint['lora']
    args = GPTConfig(**checkpoint['model_args'])
    base = lora['base_path'] if os.path.exists(lora['base_path']) else lora['base']
    if lora['base_path'] and not os.path.exists(find(base)):
        sys.exit(f'{path}: it has adapters alone, and their base is gone: {lora["base_path"]}; '
                 f'put it back there, or where {lora["base"]} finds it from here')
    print(f'{path} has adapters alone; their base is {base}')
    model, _ = load_model(base, **overrides)

    sample = weight_sample(model)
    if sample.shape != lora['probe'].shape or not sample.allclose(lora['probe'], atol=1e-5):
        sys.exit(f'{path}: its adapters belong to other weights than those that are in {lora["base"]} now; '
                 'put back what it was trained from')
    resize_vocabulary(model, lora['known'], args.vocab_size)
    model.crop_block_size(args.block_size)
    add_adapters(model, lora, device)
    if args.reward and not model.config.reward:
        new_reward_head(model)
    return model


def load_model(init_from, out_dir='out', ckpt='', dropout=0.0, quiet=False):
    """
    Load a network onto the CPU; LoRA adapters are merged into their base, and of raw and averaged weights
    choose_weights() takes the better ones. Returns (model, source). Unless quiet, print what was loaded.

    init_from: 'resume' (the run in out_dir, or the file ckpt), a checkpoint file, a run's folder, or a GPT-2, Llama
    or Qwen3 by its name on the Hugging Face hub (perhaps name@revision) or its folder.
    source: a dict that source_tokenizer() takes: the checkpoint, or for a Hugging Face model {'folder': path, 'hub':
    'repo@commit' if it is of the hub, else ''}.
    """
    folder = find(init_from)
    if init_from == 'resume':
        path = checkpoint_path(out_dir, ckpt)
    elif os.path.isfile(folder) or folder.endswith('.pt'):
        path = folder
    elif os.path.exists(os.path.join(folder, 'ckpt.pt')):
        path = checkpoint_path(folder)
    else:
        folder = download_pretrained(folder)
        model = load_pretrained(folder, dropout)
        hub = hub_commit(folder)
        commit = f' (commit {hub.partition("@")[2]})' if hub else ''
        if not quiet:
            print(f'loaded {init_from}{commit}: {describe(model)}')
        return model, {'folder': folder, 'hub': hub}

    checkpoint = load_checkpoint(path)
    choose_weights(checkpoint)
    model = build_model(checkpoint, path, dropout=dropout)
    if model.lora:
        model = merge(model)
    text = f'loaded {path}: {describe(model)}, step {checkpoint.get("iter_num", "?")}'
    loss = checkpoint.get('best_val_loss')
    if loss is not None and math.isfinite(loss):
        text += f', best validation loss {float(loss):.4f}'
    if 'weights' in checkpoint:
        text += f', {checkpoint["weights"]}'
    if not quiet:
        print(text)
    return model, checkpoint


def load_reference(path, data, env, model=None, quiet=False):
    """
    Load a frozen model onto the device: the reference of DPO and GRPO, or a reward model. Its vocabulary is fitted to
    the dataset.

    path: a checkpoint, a run's folder or a Hugging Face model. If it is the base of the adapters of `model`, the
    base's weights in memory are shared instead of loading them again.
    """
    if model and model.lora and (path == model.lora['base'] or os.path.realpath(find(path)) == model.lora['base_path']):
        return without_adapters(model)
    model, source = load_model(path, quiet=quiet)
    fit_vocabulary(model, source, data, path)
    return model.to(env.device).eval().requires_grad_(False)


def refuse_reward_model(model, name):
    """Exit if this is a reward model, which cannot write text."""
    if model.config.reward:
        sys.exit(f'{name}: this is a reward model, which judges text and writes none; '
                 'take the model that it was made from')


def source_tokenizer(source):
    """
    Return the tokenizer of a model; source: as load_model() returned it.

    nanoGPT's checkpoints contain none. For them it is the tokenizer of the dataset folder that the config names,
    which like nanoGPT's sample.py needs only the folder's meta.pkl; and GPT-2's if there is no such folder.
    """
    tok = own_tokenizer(source)
    if tok:
        return tok
    if 'folder' in source:
        sys.exit(f'{source["folder"]}: no tokenizer in this folder; say which one, e.g. --tokenizer=gpt2')

    dataset = source.get('config', {}).get('dataset', '')
    folder = find(os.path.join('data', dataset))
    if dataset and os.path.exists(os.path.join(folder, 'train.bin')):
        return open_dataset(dataset).tokenizer or gpt2_tokenizer()  # exits if it cannot be downloaded
    if dataset and os.path.exists(os.path.join(folder, 'meta.pkl')):
        return read_meta_pkl(os.path.join(folder, 'meta.pkl'))
    print('no tokenizer in the checkpoint, and no dataset folder for it: taking GPT-2 BPE')
    return gpt2_tokenizer()


def describe(model):
    """
    Return for example '804,096 parameters, 0.80M as nanoGPT counts (4 layers, 4 heads, 128 wide, context 64)'.
    The first number counts all, as transformers does; nanoGPT's get_num_params() leaves out learned positions.
    """
    c = model.config
    count = model.num_params()
    as_nanogpt = '' if c.rope_theta else f', {(count - c.block_size * c.n_embd) / 1e6:.2f}M as nanoGPT counts'
    return (f'{count:,} parameters{as_nanogpt} '
            f'({c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, context {c.block_size})')
