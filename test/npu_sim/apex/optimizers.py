from torch_npu.optim import NpuFusedAdam as NpuFusedAdam
