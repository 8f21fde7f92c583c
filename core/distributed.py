"""A network whose parameters are sharded over the processes (FSDP2), and its tensors: the part that is here, and the whole."""
import datetime
import hashlib
import os
import sys
import uuid
import warnings

import torch
import torch.distributed as dist


def shard(model, run):
    """
    From now on each process keeps its part of every parameter, along with its gradient and moments. A block's are gathered when it computes and let
    go after it (Zhao et al. 2023: https://arxiv.org/abs/2304.11277), and so nothing of the network has to fit on one GPU but the largest block.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    warnings.filterwarnings('ignore', message='FSDP2-wrapped module')  # about in-place changes of what the network returns; there are none
    mesh = init_device_mesh(run.device_type, (run.world_size,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def to_local(tensor):
    """The part that this process has of a tensor; all of it where it is not sharded."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def full_tensor(tensor):
    """All of a sharded tensor, gathered from every process, which all have to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def shard_like(tensor, other):
    """Of a whole tensor the part that this process has of `other`."""
    if not hasattr(other, 'to_local'):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None).to_local()  # None: without asking the others


def all_gather_like(part, other):
    """All of a tensor of which each process has a part, as of `other`."""
    if not hasattr(other, 'to_local'):
        return part
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(part, other.device_mesh, other.placements, shape=other.shape, stride=other.stride()).full_tensor()


def fresh_rendezvous(rank, world_size):
    """
    Where the processes find each other, for init_process_group. torchrun's store still has the addresses of processes that were lost, and who finds these waits
    for the dead (https://github.com/pytorch/pytorch/issues/167288). So they use a name in it that is new with every start: the first process chooses one,
    and answers the others with what they say, until they have seen that the answer is to them.
    """
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return {}  # the store is the first process's own, and new
    store, name, own = next(dist.rendezvous('env://'))[0], '', uuid.uuid4().hex

    def comes(key):
        try:
            store.wait([key], datetime.timedelta(seconds=1))
            return True
        except dist.DistStoreError:
            return False
    if rank == 0:
        name = own
        store.set('start', name)
        for other in range(1, world_size):
            store.set(f'{name}/answer/{other}', store.get(f'{name}/says/{other}'))
            while not comes(f'{name}/heard/{other}'):
                store.set(f'{name}/answer/{other}', store.get(f'{name}/says/{other}'))
    else:
        while not name or not comes(f'{name}/answer/{rank}') or store.get(f'{name}/answer/{rank}').decode() != own:
            name = store.get('start').decode()
            store.set(f'{name}/says/{rank}', own)
        store.set(f'{name}/heard/{rank}', own)
    return {'store': dist.PrefixStore(name, store), 'rank': rank, 'world_size': world_size}


def all_reduce(numbers, run):
    """The sums of these numbers over all processes, as a float64 tensor on the CPU."""
    total = torch.as_tensor(numbers, dtype=torch.float64)
    if run.ddp:
        total = total.to(run.device)
        dist.all_reduce(total)
    return total.cpu()


def gather(thing, run):
    """What every process has, as a list; plain values and tensors on the CPU."""
    things = [thing] * run.world_size
    if run.ddp:
        dist.all_gather_object(things, thing)
    return things


def shutdown(run, status):
    """
    End this process, after the last one is ready to. In a group of processes without Python's clean-up: DDP keeps the threads of gloo alive, and
    one that only now lets go of its last tensor, when Python is half gone, aborts the process (https://github.com/pytorch/pytorch/pull/179291).
    """
    if run.ddp:
        dist.barrier()  # the first process may still be saving
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def check_same_on_all_ranks(seen, run):
    """End the script with one line where something, {what: text}, is not the same in every process."""
    for what, text in seen.items():
        digest = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)  # 48 bits, which a float64 holds
        digests = all_reduce([digest * (rank == run.rank) for rank in range(run.world_size)], run).tolist()
        other = [rank for rank in range(run.world_size) if digests[rank] != digests[0]]
        if other:
            sys.exit(f'{what}: process {other[0]} sees another than process 0; the files and settings must be the same for every process' if run.master else 1)
