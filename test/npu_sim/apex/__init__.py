"""The part of Huawei's apex that a training script calls: NVIDIA's interface with an NPU's arguments."""
