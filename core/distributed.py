"""Several processes: rendezvous, FSDP and its sharded tensors, collectives, and the exit."""
import datetime
import hashlib
import os
import sys
import uuid
import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

# --- FSDP


def shard(model, env):
    """
    Shard the model over the ranks (FSDP2) and return it. Each rank keeps its shard of every parameter, gradient and
    moment. A block's parameters are gathered while it computes and freed after it, so a GPU need only hold one whole
    block besides its shards (Zhao et al. 2023: https://arxiv.org/abs/2304.11277).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    # the warning is about in-place changes of the network's output, and nothing here makes any
    warnings.filterwarnings('ignore', message='FSDP2-wrapped module')
    mesh = init_device_mesh(env.device_type, (env.world_size,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def reshard(model):
    """
    Free the full parameters that FSDP keeps of the root after a forward pass; the next one gathers them again. Call
    this after the shards have been changed. Does nothing for a model that is not sharded.
    """
    if hasattr(model, 'reshard'):
        model.reshard()


def to_local(tensor):
    """Return this rank's shard of a tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def full_tensor(tensor):
    """Gather a sharded tensor from all ranks, which must all call this. A tensor that is not sharded is returned."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def shard_like(tensor, other):
    """Shard a full tensor the way `other` is sharded and return this rank's shard."""
    if not hasattr(other, 'to_local'):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    # src_data_rank=None: every rank has the full tensor, so no communication is needed
    sharded = distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
    return sharded.to_local()


def all_gather_like(part, other):
    """All-gather: `part`, this rank's shard, is sharded the way `other` is. Return the full tensor on every rank."""
    if not hasattr(other, 'to_local'):
        return part
    from torch.distributed.tensor import DTensor
    sharded = DTensor.from_local(
        part, other.device_mesh, other.placements, shape=other.shape, stride=other.stride())
    return sharded.full_tensor()

# --- DDP


def average_gradients(network, env):
    """Return the network, wrapped by DDP if there are several ranks and each has the full model."""
    if not env.ddp or env.sharded:
        return network
    device_ids = [env.device] if env.device_type == 'cuda' else None
    network = DDP(network, device_ids=device_ids, gradient_as_bucket_view=True)  # gradients are not copied
    network.broadcast_buffers = False  # they never change; as an argument it is deprecated in PyTorch 2.13
    return network

# --- start, collectives, exit


def fresh_rendezvous(rank, world_size):
    """
    Return the arguments of init_process_group that say where the ranks find each other.

    After a restart torchrun's store still holds the addresses of dead workers, and connecting to them hangs
    (https://github.com/pytorch/pytorch/issues/167288). So the ranks agree on a fresh key prefix at every start: rank 0
    picks it and acknowledges each rank by echoing that rank's random id. A rank that has read the prefix of an earlier
    start gets no acknowledgement and reads again.
    """
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return {}  # rank 0 creates a new store
    store = next(dist.rendezvous('env://'))[0]
    own_id = uuid.uuid4().hex

    def is_set(key):
        try:
            store.wait([key], datetime.timedelta(seconds=1))
            return True
        except dist.DistStoreError:
            return False
    if rank == 0:
        prefix = own_id
        store.set('start', prefix)
        for other in range(1, world_size):
            acknowledged = False
            while not acknowledged:
                store.set(f'{prefix}/answer/{other}', store.get(f'{prefix}/says/{other}'))
                acknowledged = is_set(f'{prefix}/heard/{other}')
    else:
        acknowledged = False
        while not acknowledged:
            prefix = store.get('start').decode()
            store.set(f'{prefix}/says/{rank}', own_id)
            answer = f'{prefix}/answer/{rank}'
            acknowledged = is_set(answer) and store.get(answer).decode() == own_id
        store.set(f'{prefix}/heard/{rank}', own_id)
    return {'store': dist.PrefixStore(prefix, store), 'rank': rank, 'world_size': world_size}


def stack_on_device(numbers, env):
    """Return these numbers, plain ones or tensors () on the device, as a float32 tensor (n,) on the device."""
    return torch.stack([x.float() if torch.is_tensor(x) else torch.full((), float(x), device=env.device)
                        for x in numbers])


def sum_on_device(numbers, env):
    """Return the sums of these numbers over all ranks; see stack_on_device(). The host does not wait for them."""
    total = stack_on_device(numbers, env)
    if env.ddp:
        dist.all_reduce(total)
    return total


def all_reduce(numbers, env):
    """Return the sums of these numbers over all ranks, as a float64 tensor on the CPU."""
    total = torch.as_tensor(numbers, dtype=torch.float64)
    if env.ddp:
        total = total.to(env.device)
        dist.all_reduce(total)
    return total.cpu()


def gather(value, env):
    """Return the values of all ranks as a list. A value consists of plain Python values and CPU tensors."""
    values = [value] * env.world_size
    if env.ddp:
        dist.all_gather_object(values, value)
    return values


def check_same_on_all_ranks(descriptions, env):
    """Exit if one of the descriptions, {name: text}, differs between ranks."""
    for name, text in descriptions.items():
        digest = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)  # 48 bits, which a float64 holds exactly
        own = [0] * env.world_size
        own[env.rank] = digest
        digests = all_reduce(own, env).tolist()
        different = [rank for rank in range(env.world_size) if digests[rank] != digests[0]]
        if different:
            message = (f'{name}: process {different[0]} sees another than process 0; '
                       'the files and settings must be the same for every process')
            sys.exit(message if env.master else 1)


def shutdown(env, status):
    """
    Exit with this status once all ranks are done.

    Under torchrun exit with os._exit, without Python's clean-up: DDP keeps gloo threads alive, and a thread that frees
    its last tensor during the clean-up aborts the process (https://github.com/pytorch/pytorch/pull/179291).
    """
    if env.ddp:
        dist.barrier()  # rank 0 may still be saving
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
