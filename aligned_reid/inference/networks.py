"""What computes features of images: a model on a device, or an exported graph in ONNX Runtime.

Both have a `size` (height, width). A call takes uint8 images [N, h, w, 3] of that size, RGB, and gives a FeatureSet on
the CPU, as extraction does: not scaled to unit length.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligned_reid.config import Config
from aligned_reid.data.transforms import normalize_images
from aligned_reid.device import find_wrong_layer, open_accelerator
from aligned_reid.errors import InputError
from aligned_reid.evaluation.extract import FeatureSet, inference_copy, run_network
from aligned_reid.export import OnnxFeatures
from aligned_reid.model import AlignedReID
from aligned_reid.weights import first_line


class TorchNetwork:
    """A model on a device, as extraction runs it."""

    def __init__(self, model: AlignedReID, device: str, size: tuple[int, int], *, local: bool, flip: bool) -> None:
        """device: "auto", a kind of device, or one of several, such as "cuda:1". flip: average with mirror images."""
        kind, _, index = str(device).partition(":")
        if index and not index.isdecimal():
            raise InputError(f"device {device}: give its number, such as {kind}:0")
        self.size, self.local, self.flip = size, local, flip
        self.accelerator = open_accelerator(Config(device=kind), int(index) if index else None, 0)
        self.model = inference_copy(model).to(self.accelerator.device)
        self.model = self.model.to(memory_format=self.accelerator.memory_format)
        if self.accelerator.half and (wrong := find_wrong_layer(self.model, size, self.accelerator, backward=False)):
            self.accelerator.distrust_half(wrong)

    def __call__(self, pixels: Tensor) -> FeatureSet:
        with torch.no_grad():
            features = run_network(self.model, pixels.to(self.accelerator.device), self.accelerator, self.flip)
        local_feat = features.local_feat.float().cpu() if self.local else None
        return FeatureSet(features.global_feat.float().cpu(), local_feat)

    def feature_map(self, pixels: Tensor) -> Tensor:
        """The trunk's last feature map, float32 [N, C, h / stride, w / stride], on the CPU."""
        with torch.no_grad(), self.accelerator.autocast():
            images = normalize_images(pixels.to(self.accelerator.device), self.accelerator.memory_format)
            feature_map: Tensor = self.model.base(images)
        return feature_map.float().cpu()


class OnnxNetwork:
    """A graph written by script/export.py, on the CPU. One without settings needs only its own input shape."""

    def __init__(self, path: Path) -> None:
        try:
            self.graph = OnnxFeatures(path)
        except ImportError as error:
            raise InputError(f"{path} needs the package onnxruntime: pip install onnxruntime") from error
        except Exception as error:  # ONNX Runtime raises errors of many types for damaged files
            raise InputError(
                f"{path} is not an ONNX graph, or it is damaged or cut off ({first_line(error)})"
            ) from error
        inputs = self.graph.session.get_inputs()
        shape = inputs[0].shape[1:3] if self.graph.takes_uint8 else inputs[0].shape[2:4]
        if [one.name for one in inputs] != ["images"] or len(shape) != 2 or not all(isinstance(n, int) for n in shape):
            raise InputError(f"{path} is a graph of another project: its input is not `images` of one size")
        self.size: tuple[int, int] = tuple(shape)
        self.flip = False

    def read_content(self, path: Path) -> dict[str, Any]:
        """The settings and the verification record in the graph's metadata, if it has them."""
        metadata = self.graph.session.get_modelmeta().custom_metadata_map
        try:
            return {name: json.loads(metadata[name]) for name in ("config", "verification") if name in metadata}
        except ValueError as error:
            raise InputError(f"{path}: its metadata is damaged ({first_line(error)})") from error

    def __call__(self, pixels: Tensor) -> FeatureSet:
        feats = self.graph.embed(pixels)
        if self.flip:
            feats = [(one + other) / 2 for one, other in zip(feats, self.graph.embed(pixels.flip(2)), strict=True)]
        return FeatureSet(feats[0], feats[1] if len(feats) > 1 else None)


Network = TorchNetwork | OnnxNetwork
