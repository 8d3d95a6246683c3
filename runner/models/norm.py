"""Batch norm synchronized over all ranks, on any device."""

import torch
import torch.distributed as dist
from torch import nn

from runner.common.errors import UserError


class AllReduceSum(torch.autograd.Function):
    """Differentiable all-reduce: sums a tensor over all ranks, and its gradients in the backward pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: torch.Tensor) -> torch.Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of the global batch; `torch.nn.SyncBatchNorm` supports only GPUs.

    Ranks may have different numbers of images. In evaluation mode it is plain batch norm.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        x_float = x if x.dtype == torch.float64 else x.float()
        local_count = x_float.new_full((1,), x_float.numel() / x_float.shape[1])
        sums = AllReduceSum.apply(torch.cat([x_float.sum((0, 2, 3)), x_float.square().sum((0, 2, 3)), local_count]))
        count = sums[-1]
        mean, mean_square = (total / count for total in sums[:-1].chunk(2))
        variance = (mean_square - mean.square()).clamp_min(0)  # rounding errors may make it negative
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * count / (count - 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (x_float * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)


def convert_sync_batch_norm(model: nn.Module) -> nn.Module:
    """Converts every BatchNorm2d of a model to synchronized batch norm; parameters and their names do not change.

    Raises:
        UserError: the model has a subclass of batch norm, such as timm's BatchNormAct2d, whose activation would be
            lost, or batch norm without momentum, weights or running statistics.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and type(module) not in (nn.BatchNorm2d, SyncBatchNorm2d):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise UserError(f"--recipe.sync-batch-norm: expected a model with nn.BatchNorm2d, found {kind}")
        if isinstance(module, nn.BatchNorm2d) and not (
            module.momentum is not None and module.affine and module.track_running_stats
        ):
            expected = "batch norm with momentum, weights and running statistics"
            raise UserError(f"--recipe.sync-batch-norm: expected {expected}, found {module}")
    if not dist.is_initialized():
        return model
    if next(model.parameters()).device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model
