from torch_npu.optim import NpuFusedAdam

__all__ = ["NpuFusedAdam"]
