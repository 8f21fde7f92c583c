"""A network whose parameters are sharded over the processes (FSDP2), and its tensors: the part that is here, and the whole."""
import warnings


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


def local(tensor):
    """The part that this process has of a tensor; all of it where it is not sharded."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def whole(tensor):
    """All of a sharded tensor, gathered from every process, which all have to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def sharded_like(tensor, other):
    """Of a whole tensor the part that this process has of `other`."""
    if not hasattr(other, 'to_local'):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None).to_local()  # None: without asking the others


def gathered(part, other):
    """All of a tensor of which each process has a part, as of `other`."""
    if not hasattr(other, 'to_local'):
        return part
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(part, other.device_mesh, other.placements, shape=other.shape, stride=other.stride()).full_tensor()
