"""Checkpoints: one file that says everything about a run, written whole or not at all, and never unpickled beyond tensors."""
import glob
import math
import os
import pickle
import shutil
import sys

import torch

from core.files import atomic, find
from core.text.dataset import open_dataset
from core.text.tokenizer import Tokenizer, gpt2_tokenizer, has_tokenizer, load_tokenizer
from core.weights.huggingface import download_pretrained, load_pretrained
from core.weights.lora import add_adapters, merge, sample_weights, trained_weights, without_adapters
from core.weights.vocabulary import fit_vocabulary, new_reward_head, resize_vocabulary
from model import GPT, GPTConfig

EARLIER = 'ckpt_{:08d}.pt'  # names of the checkpoints before the last, by their steps


def save_checkpoint(checkpoint, path):
    """Write to a temporary name, flush, rename: whatever happens, `path` is a whole checkpoint. A full disk ends the script with one line."""
    torch.serialization.set_crc32_options(False)  # nobody reads the checksums, and they are half the work
    try:
        with atomic(path) as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as error:
        reason = error.__context__ if isinstance(error.__context__, OSError) else error  # torch hides a full disk behind an error of its own
        old = ' (the checkpoint that was there is still whole)' if os.path.exists(path) else ''
        sys.exit(f'{path}: could not be saved: {reason}{old}')


def copy_checkpoint(path, copy):
    """Give the file a second name: by a link, for nothing, where the file system has links."""
    if os.path.exists(copy) and os.path.samefile(path, copy):
        return  # which a rename would leave with both names
    temporary = f'{copy}.tmp{os.getpid()}'
    try:
        os.link(path, temporary)
        os.replace(temporary, copy)
    except OSError:
        try:
            with open(path, 'rb') as source, atomic(copy) as f:
                shutil.copyfileobj(source, f)
        except OSError as error:
            sys.exit(f'{copy}: could not be saved: {error}; {path} is whole')


def load_checkpoint(path, device='cpu'):
    """A checkpoint, ours or nanoGPT's, as a dict; on the device 'meta' without its tensors' contents, in no time.
    Ends the script with one line when the file is missing, torn or something else."""
    if not os.path.exists(path):
        sys.exit(f'{path}: no such checkpoint; train first, or name another folder by --out_dir (sample.py: or a file by --ckpt)')
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        state, args = checkpoint['model'], checkpoint['model_args']
        checkpoint['model'] = {key.removeprefix('_orig_mod.'): value for key, value in state.items()}
        checkpoint['model_args'] = vars(GPTConfig(**args))
    except Exception as error:  # torch raises nearly every kind there is for a damaged file
        reason = 'it holds other things than tensors and plain values' if isinstance(error, pickle.UnpicklingError) else str(error).partition('\n')[0]
        sys.exit(f'{path}: not a checkpoint of this program or nanoGPT, or a damaged one ({type(error).__name__}: {reason[:150]})')
    return checkpoint


def earlier_checkpoints(out_dir):
    """The paths of the checkpoints before the last, the newest first."""
    return sorted(glob.glob(os.path.join(glob.escape(out_dir), 'ckpt_' + '[0-9]' * 8 + '.pt')), reverse=True)


def load_last(out_dir, device='cpu'):
    """The checkpoint to resume and its path: ckpt.pt or, with a warning, the newest whole one before it, at last best.pt. Ends the script as
    load_checkpoint does."""
    first = None
    for path in (os.path.join(out_dir, 'ckpt.pt'), *earlier_checkpoints(out_dir), os.path.join(out_dir, 'best.pt')):
        try:
            checkpoint = load_checkpoint(path, device)
        except SystemExit as error:
            first = first or error
            continue
        if first:
            print(f'warning: {str(first).partition(";")[0]}; taking the one before, {path}', file=sys.stderr)
        return checkpoint, path
    raise first


def checkpoint_path(out_dir, ckpt=''):
    """
    The file to sample from: `ckpt` if it is given; else, in the run's folder, best.pt when the run was to keep only the best validation loss
    (always_save_checkpoint=False), and otherwise ckpt.pt, the last state.
    """
    if ckpt:
        return find(ckpt)
    last, best = (os.path.join(find(out_dir), name) for name in ('ckpt.pt', 'best.pt'))
    if not os.path.exists(best):
        return last
    if not os.path.exists(last):
        return best
    return last if load_checkpoint(last, 'meta').get('config', {}).get('always_save_checkpoint', True) else best


def build_model(checkpoint, path, device='cpu', **overrides):
    """The network of a checkpoint, on the CPU, with some of its arguments (dropout) overridden; one with adapters, which needs its base, on the device."""
    if checkpoint.get('lora'):
        model = load_adapted(checkpoint, path, device, **overrides)
    else:
        model = GPT(GPTConfig(**{**checkpoint['model_args'], **overrides}))
    try:
        missing, unknown = model.load_state_dict(checkpoint['model'], strict=not model.lora)
        if unknown or model.lora and trained_weights(model).keys() & missing:
            raise RuntimeError(f'\nadapters of other layers: {[*unknown, *missing][0]}')
    except RuntimeError as error:
        sys.exit(f'{path}: its weights do not fit its model_args: {str(error).splitlines()[1].strip()[:200]}')
    return model


def load_adapted(checkpoint, path, device, **overrides):
    """The network that a checkpoint's adapters belong to, with new ones in their places."""
    lora, args = checkpoint['lora'], GPTConfig(**checkpoint['model_args'])
    base = lora['base_path'] if os.path.exists(lora['base_path']) else lora['base']
    if lora['base_path'] and not os.path.exists(find(base)):
        sys.exit(f'{path}: it has adapters alone, and their base is gone: {lora["base_path"]}; put it back there, or where {lora["base"]} finds it from here')
    print(f'{path} has adapters alone; their base is {base}')
    model, _ = load_model(base, **overrides)
    found = sample_weights(model)
    if found.shape != lora['probe'].shape or not found.allclose(lora['probe'], atol=1e-5):
        sys.exit(f'{path}: its adapters belong to other weights than those that are in {lora["base"]} now; put back what it was trained from')
    resize_vocabulary(model, lora['known'], args.vocab_size)
    model.crop_block_size(args.block_size)
    add_adapters(model, lora, device)
    if args.reward and not model.config.reward:
        new_reward_head(model)
    return model


def load_model(init_from, out_dir='out', ckpt='', dropout=0.0):
    """
    A network, on the CPU: init_from is 'resume' (the run in out_dir, or the file ckpt), a checkpoint file, a run's folder, or a GPT-2 by its
    name on the Hugging Face hub or its folder. Adapters are merged into their base. Returns (model, source), the checkpoint or the folder, which source_tokenizer() takes.
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
        print(f'loaded {init_from}: {describe(model)}')
        return model, folder
    checkpoint = load_checkpoint(path)
    model = build_model(checkpoint, path, dropout=dropout)
    model = merge(model) if model.lora else model
    loss = checkpoint.get('best_val_loss')
    print(f'loaded {path}: {describe(model)}, step {checkpoint.get("iter_num", "?")}' + (f', best validation loss {float(loss):.4f}' if loss is not None and math.isfinite(loss) else ''))
    return model, checkpoint


def load_reference(path, data, run, model=None):
    """
    A network that is not trained but asked, on the device: a checkpoint, a run's folder or a Hugging Face model's, with the vocabulary of the dataset. Where it is the base
    of the adapters of `model`, that itself without them: the weights are in memory once.
    """
    if model and model.lora and (path == model.lora['base'] or os.path.realpath(find(path)) == model.lora['base_path']):
        return without_adapters(model)
    model, source = load_model(path)
    fit_vocabulary(model, source, data, path)
    return model.to(run.device).eval().requires_grad_(False)


def refuse_reward_model(model, name):
    """End the script with one line where it is a reward model."""
    if model.config.reward:
        sys.exit(f'{name}: this is a reward model, which judges text and writes none; take the model that it was made from')


def source_tokenizer(source):
    """The tokenizer that belongs to what load_model returned. nanoGPT's checkpoints hold none: theirs is that of the dataset folder which
    they name, and GPT-2's if there is none."""
    if isinstance(source, str):
        if not has_tokenizer(source):
            sys.exit(f'{source}: no tokenizer in this folder; say which one, e.g. --tokenizer=gpt2')
        return load_tokenizer(source)
    if source.get('tokenizer'):
        return Tokenizer(source['tokenizer'])
    name = source.get('config', {}).get('dataset', '')
    if name and os.path.exists(os.path.join(find(os.path.join('data', name)), 'train.bin')):
        return open_dataset(name).tokenizer or gpt2_tokenizer()  # which says why it cannot be had
    print('no tokenizer in the checkpoint, and no dataset folder for it: taking GPT-2 BPE')
    return gpt2_tokenizer()


def describe(model):
    """'0.80M parameters (4 layers, 4 heads, 128 wide, context 64)'"""
    c = model.config
    return f'{model.num_params() / 1e6:.2f}M parameters ({c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, context {c.block_size})'
