"""The part of Huawei's apex that a training script calls: NVIDIA's interface with an NPU's arguments."""

from apex import amp, optimizers

__all__ = ["amp", "optimizers"]
