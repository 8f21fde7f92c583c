"""
CUDA without a GPU: scripts run with --device=cuda on PyTorch's CPU build. test_cuda.py starts this file in a process of
its own, because the pretence lasts until the process ends. By hand: python tests/pretended_gpu.py train.py ARGUMENTS

GPUTensor is a tensor that says it is on 'cuda:0'; its numbers are in an ordinary CPU tensor. Every operation goes
through dispatch(), which computes on the CPU, refuses tensors of two devices as a GPU does (and of two dtypes as CPUs
do, too), and counts what makes the host wait for the GPU: .item(), blocking copies, sizes that depend on data. The
numbers are real, so losses can be compared with those of a CPU. Not shown: kernels, speed, CUDA graphs, NCCL, and
torch.compile.
"""
import collections
import contextlib
import ctypes
import functools
import json
import os
import sys
import threading
import traceback
from types import SimpleNamespace

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = os.path.realpath(os.path.join(os.path.dirname(__file__), '..'))
UNSUPPORTED = 77  # exit status: this PyTorch cannot be made to believe in a GPU
WAITS = {  # the host must know a value, or the size of the result
    'aten::_local_scalar_dense', 'aten::nonzero', 'aten::masked_select', 'aten::equal', 'aten::is_nonzero',
    'aten::bincount', 'aten::repeat_interleave.Tensor', 'aten::multinomial', 'aten::_unique2', 'aten::unique_dim',
    'aten::unique_consecutive'}
INDEXING = {'aten::index.Tensor', 'aten::index_put', 'aten::index_put_', 'aten::_index_put_impl_'}
waits = collections.Counter()  # 'file:line what': how often the main thread waited for the GPU there
busy = False  # has the GPU got something to do since the last wait?
pinned = {}  # address: weak reference to a storage that pretends to be pinned
late = []  # (CPU tensor, its numbers): asynchronous copies from the GPU, which are there when the host has waited
lock = threading.Lock()  # of late
kept_alive = []  # C++ points at these


def believe():
    """
    Make libtorch accept tensors on 'cuda:0', which a CPU build refuses in two places. Raises OSError, ValueError or
    AttributeError if its symbols are others.
    """
    folder = os.path.join(os.path.dirname(torch.__file__), 'lib')
    # 1. Operators ask a registry for the guard that switches to the tensor's GPU. A CPU build has none. PyTorch has a
    # guard that does nothing, and registers it in place of one that counts 0 GPUs. So register an object whose virtual
    # functions all return 0. The registry is an array, indexed by device type: CUDA is 1.
    if torch.version.cuda is None:
        zero = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
        functions = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
        guard = ctypes.c_void_p(ctypes.addressof(functions))  # a C++ object begins with a pointer to such a table
        library = ctypes.CDLL(os.path.join(folder, 'libc10.so'))
        registry = (ctypes.c_void_p * 2).in_dll(library, '_ZN3c104impl26device_guard_impl_registryE')
        registry[1] = ctypes.addressof(guard)
        kept_alive.extend([zero, functions, guard])
    torch._C._ensureCUDADeviceGuardSet()
    # 2. backward() asks the "CUDA hooks", an object with virtual functions, whether CUDA was built (function 2 of the
    # table; 0 and 1 are the destructor) and whether the GPU is in use (function 4). In a copy of it both say yes.
    get_hooks = ctypes.CDLL(os.path.join(folder, 'libtorch_cpu.so'))._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    hooks = ctypes.cast(get_hooks(), ctypes.POINTER(ctypes.c_void_p))
    functions = (ctypes.c_void_p * 80)(*(ctypes.c_void_p * 80).from_address(hooks[0]))
    yes = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(lambda self: True)
    functions[2] = functions[4] = ctypes.cast(yes, ctypes.c_void_p).value
    hooks[0] = ctypes.addressof(functions)
    kept_alive.extend([functions, yes])

# --- tensors


class GPUTensor(torch.Tensor):
    """A tensor that says 'cuda:0'; `here` has its numbers."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here):
        new = torch.Tensor._make_wrapper_subclass(cls, here.shape, here.stride(), here.storage_offset(),
                                                  dtype=here.dtype, device='cuda:0')
        new.here = here
        return new

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def __tensor_flatten__(self):  # with these two, Module.to() swaps parameters; it cannot assign to their .data
        return ['here'], None

    def __tensor_unflatten__(inner, context, size, stride):
        return GPUTensor(inner['here'])

    def __deepcopy__(self, memo):
        new = GPUTensor(self.here.clone()).requires_grad_(self.requires_grad)
        new._is_param = isinstance(self, torch.nn.Parameter)
        return memo.setdefault(id(self), new)

    def __reduce_ex__(self, protocol):
        wait('torch.save')
        return self.here.__reduce_ex__(protocol)

    def tolist(self):
        wait('tolist')
        return self.here.tolist()

    def data_ptr(self):
        return self.here.data_ptr()

    def record_stream(self, stream):
        pass


class PretendedGPU(TorchDispatchMode):
    """Also dispatches what has no GPUTensor among its arguments, like torch.zeros(3, device='cuda')."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args, kwargs):
    """Compute an operator of PyTorch on the CPU, and wrap the result if a GPU would have it."""
    global busy
    name = func.name()
    if name == 'aten::is_pinned':
        return is_pinned(args[0])
    if name == 'aten::_pin_memory':  # a copy with the same strides
        return pin(torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype).copy_(args[0]))
    if kwargs.get('pin_memory'):
        return pin(func(*args, **{**kwargs, 'pin_memory': False}))
    tensors = []
    replace((args, kwargs), torch.Tensor, tensors.append)
    on_gpu = any(isinstance(x, GPUTensor) for x in tensors)
    device = kwargs.get('device')  # of the result; None: that of the arguments
    to_gpu = on_gpu if device is None else torch.device(device).type == 'cuda'
    if not on_gpu and not to_gpu:
        return func(*args, **kwargs)

    on_host = [x for x in tensors if not isinstance(x, GPUTensor) and x.dim() > 0]  # single numbers travel with a call
    non_blocking = kwargs.get('non_blocking', False)
    if name == 'aten::_to_copy':
        count_copy(args[0], None, to_gpu, kwargs.get('dtype'), non_blocking)
    elif name == 'aten::copy_':
        count_copy(args[1], args[0], isinstance(args[0], GPUTensor), args[0].dtype, non_blocking or args[2:] == (True,))
    elif name in INDEXING:
        is_fill = name != 'aten::index.Tensor' and len(args[1]) == 1 and args[2].dim() == 0  # x[mask] = 0
        bools = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        if on_host or bools and not is_fill:
            wait(f'{name} with {"a CPU tensor" if on_host else "bools"}')
    elif on_host and on_gpu:
        raise RuntimeError(f'{name}: expected all tensors to be on the same device, but found cuda:0 and cpu, '
                           f'{[tuple(x.shape) for x in on_host]}')
    elif name in WAITS and kwargs.get('output_size') is None:
        wait(name)
    if name in ('aten::_softmax', 'aten::_log_softmax') and args[2]:  # fp16 in, fp32 out: CPUs have no such kernel
        args = args[0].float(), args[1], False

    args_here, kwargs_here = replace((args, kwargs), GPUTensor, lambda x: x.here)
    if device is not None:
        kwargs_here['device'] = torch.device('cpu')
    busy = True
    try:
        out = func(*args_here, **kwargs_here)
    except NotImplementedError:  # CPUs have no such kernel; some operators are also written in terms of others
        from torch._decomp import decomposition_table
        out = decomposition_table[func](*args_here, **kwargs_here)
    returns = func._schema.returns
    if len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write:
        out = kwargs.get('out', args[0])  # an operator in place
        if name == 'aten::copy_' and on_gpu and is_pinned(out):
            delay(out)
        return out
    if name == 'aten::_to_copy' and not to_gpu and non_blocking:
        delay(pin(out))  # PyTorch's memory is pinned, too
    return replace(out, torch.Tensor, GPUTensor) if to_gpu else out


def replace(x, cls, function):
    """Return x, or nested lists, tuples and dicts of such, with function(y) in place of each y of class cls."""
    if isinstance(x, cls):
        return function(x)
    if isinstance(x, dict):
        return {key: replace(value, cls, function) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return (list if isinstance(x, list) else tuple)(replace(value, cls, function) for value in x)
    return x


def count_copy(source, target, to_gpu, dtype, non_blocking):
    """Count a copy between host and GPU, unless it is asynchronous. target: None for new memory, pinned on the host."""
    if isinstance(source, GPUTensor) == to_gpu:
        return
    host = source if to_gpu else target
    if host is not None:  # what PyTorch has to convert first, it copies to memory that is not pinned
        converts = to_gpu and dtype not in (None, source.dtype)
        non_blocking = non_blocking and is_pinned(host) and host.is_contiguous() and not converts
    if not non_blocking:
        wait(f'copy {"to" if to_gpu else "from"} the GPU')


def delay(x):
    """Put NaN or 0 in place of the numbers of a CPU tensor, until the host waits."""
    numbers = x.clone()
    x.fill_(float('nan') if x.is_floating_point() else 0)
    late.append((x, numbers))


def pin(x):
    """Return a CPU tensor, and remember that its memory is pinned, which the CPU build cannot do."""
    pinned[x.untyped_storage().data_ptr()] = StorageWeakRef(x.untyped_storage())
    return x


def is_pinned(x):
    reference = None if isinstance(x, GPUTensor) else pinned.get(x.untyped_storage().data_ptr())
    return reference is not None and not reference.expired()  # expired: freed, and perhaps used by another tensor


def wait(what):
    """Count that the host waits, at the innermost line of the repository. Other threads may wait: nothing is idle."""
    global busy
    with lock:
        while late:
            x, numbers = late.pop(0)
            x.copy_(numbers)
    if threading.current_thread() is threading.main_thread():
        busy = False
        frame = sys._getframe(1)
        while frame and not is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        place = f'{os.path.relpath(frame.f_code.co_filename, ROOT)}:{frame.f_lineno}' if frame else '?'
        waits[f'{place} {what.removeprefix("aten::")}'] += 1


@functools.cache
def is_ours(path):
    """Return whether a file is one of the repository's, and neither a test nor a package in a .venv in it."""
    return path.startswith(ROOT) and 'site-packages' not in path and os.path.dirname(path) != os.path.dirname(__file__)

# --- torch.cuda


class Stream:
    """A torch.cuda.Stream, or an Event. To synchronise is to wait, if the GPU has got work since the last time."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        pass

    wait = wait_stream = wait_event = record

    def record_event(self, event=None):
        return event or Stream()

    def synchronize(self):
        if busy:
            wait('synchronize')

    def query(self):
        return True

    def elapsed_time(self, event):
        return 1.0


NAME, MEMORY = 'NVIDIA H100 80GB HBM3', 80 * 2**30
ANSWERS = {
    'is_available': True, 'is_initialized': False, '_lazy_init': None, 'is_bf16_supported': True,
    'device_count': 1, 'current_device': 0, 'set_device': None, 'get_device_name': NAME,
    'get_device_capability': (9, 0), 'mem_get_info': (MEMORY, MEMORY), 'empty_cache': None,
    'get_device_properties': SimpleNamespace(name=NAME, total_memory=MEMORY, major=9, minor=0,
                                             multi_processor_count=132),
    'memory_allocated': 0, 'max_memory_allocated': 0, 'memory_reserved': 0, 'max_memory_reserved': 0,
    'reset_peak_memory_stats': None, 'stream': contextlib.nullcontext(), 'current_stream': Stream(),
    'default_stream': Stream()}


def start():
    """Begin the pretence: in this thread, and in those that it starts."""
    os.environ['CUDA_VISIBLE_DEVICES'] = ''  # a CUDA build must not find a real GPU
    believe()
    for name, answer in ANSWERS.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.manual_seed = torch.default_generator.manual_seed
    torch.cuda.synchronize = lambda device=None: wait('synchronize')
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # autocast and GradScaler ask this
    for kind in ('flash', 'mem_efficient', 'cudnn'):  # attention kernels, chosen by a function of the CUDA build
        getattr(torch.backends.cuda, f'enable_{kind}_sdp')(False)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(3, device='cuda') makes a CPU tensor first, and copies it
    tensor, start_thread = torch.tensor, threading.Thread.start

    def tensor_of(data, *args, **kwargs):  # torch.tensor([x]) reads a number x of the GPU past all dispatching
        return tensor(replace(data, GPUTensor, lambda x: x.item()), *args, **kwargs)

    def start_on_gpu(thread):  # dispatch modes belong to one thread
        def run(run=thread.run):
            with PretendedGPU(), torch.autograd.set_multithreading_enabled(False):
                run()
        thread.run = run
        start_thread(thread)

    def no_grad(mode):  # inference mode leaves out what wrapping a view needs
        mode._inference_mode_context = torch.set_grad_enabled(torch.is_grad_enabled() and not mode.mode)
        mode._inference_mode_context.__enter__()
    torch.tensor, threading.Thread.start, torch.inference_mode.__enter__ = tensor_of, start_on_gpu, no_grad
    torch.autograd.set_multithreading_enabled(False)  # else backward() runs in a thread of the GPU
    PretendedGPU().__enter__()


def run(script, *args):
    """Run a script as run_script() does. Returns a dict of code, out, err and waits, {'file:line what': count}."""
    from conftest import run_script  # here, because it imports from the repository
    waits.clear()
    try:
        result = run_script(script, *args)
    except Exception:
        result = SimpleNamespace(code=1, out='', err=traceback.format_exc())
    return {**vars(result), 'waits': dict(waits)}


def serve():
    """Write '' in JSON; then for every line of stdin, [script, argument, ...] in JSON, write what run() returns."""
    requests, sys.stdin = sys.stdin, open(os.devnull, encoding='utf-8')  # scripts have no input
    try:
        start()
        x = torch.ones(2, 2, device='cuda', requires_grad=True)  # a PyTorch on which this fails is found before a test
        with torch.autocast('cuda', torch.bfloat16):
            y = torch.nn.functional.linear(x, x)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and x.grad.device.type == 'cuda' and x.grad.tolist() == [[4.0, 4.0]] * 2
    except Exception as error:
        print(json.dumps(f'{type(error).__name__}: {error}'), flush=True)
        os._exit(UNSUPPORTED)
    print(json.dumps(''), flush=True)
    for line in requests:
        print(json.dumps(run(*json.loads(line))), flush=True)


if __name__ == '__main__':
    sys.path.insert(0, ROOT)
    code = 0
    if len(sys.argv) == 1:
        serve()
    else:
        start()
        result = run(*sys.argv[1:])
        code = result['code']
        print(result['out'], result['err'], *(f'{n:7} {place}\n' for place, n in result['waits'].items()), sep='')
    sys.stdout.flush()
    os._exit(code)  # Python's own end would free what C++ still points at
