"""Exports a trained model as an ONNX graph and verifies its features against torch's."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aligned_reid.data.dataset import TestImages
from aligned_reid.data.loader import make_loader
from aligned_reid.data.transforms import IM_MEAN, IM_STD
from aligned_reid.distance import normalize
from aligned_reid.errors import InputError, RunStopped
from aligned_reid.evaluation.extract import FeatureSet, inference_copy
from aligned_reid.files import write_file
from aligned_reid.model import AlignedReID
from aligned_reid.weights import find_verification, settings_of

OPSETS = range(13, 19)
NEW_EXPORTER_OPSET = 18  # the oldest that torch's newer exporter (torch 2.5) writes
HAS_NEW_EXPORTER = "dynamo" in inspect.signature(torch.onnx.export).parameters
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TOLERANCE = 1e-4  # of the largest value of a feature
CHECK_BATCHES = (3, 1)


class InferenceGraph(nn.Module):
    """The exported computation: normalization of decoded and resized RGB images, then the folded network.

    uint8_input: images are uint8 [N, H, W, 3]; else float32 [N, 3, H, W] from 0 to 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: AlignedReID, *, local: bool, uint8_input: bool, normalize_feature: bool) -> None:
        super().__init__()
        self.network = inference_copy(model)
        self.local, self.uint8_input, self.normalize_feature = local, uint8_input, normalize_feature
        scale = 255 if uint8_input else 1
        self.register_buffer("mean", scale * torch.tensor(IM_MEAN).view(3, 1, 1))
        self.register_buffer("std", scale * torch.tensor(IM_STD).view(3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images -> global_feat [N, 2048] and, if `local`, local_feat [N, H / 32, local_channels]."""
        if self.uint8_input:
            images = images.permute(0, 3, 1, 2).to(torch.float32)
        features = self.network((images - self.mean) / self.std)
        chosen = [features.global_feat, features.local_feat][: 1 + self.local]
        return tuple(normalize(feat) if self.normalize_feature else feat for feat in chosen)

    @property
    def output_names(self) -> list[str]:
        return ["global_feat", "local_feat"][: 1 + self.local]

    def example(self, num_images: int, size: tuple[int, int], seed: int = 0) -> Tensor:
        """Random images in the graph's input format."""
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (num_images, *size, 3), dtype=torch.uint8, generator=generator)
        return pixels if self.uint8_input else to_float_images(pixels)


def to_float_images(pixels: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] from 0 to 1."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32).div(255).contiguous()


def check_packages(opset: int) -> None:
    """Raise InputError if the installed packages cannot write or verify `opset`."""
    if opset not in OPSETS:
        raise InputError(f"--opset {opset}: choose one of {OPSETS[0]} to {OPSETS[-1]}")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"export needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if opset >= NEW_EXPORTER_OPSET and not HAS_NEW_EXPORTER:
        raise InputError(f"--opset {opset} needs torch 2.5 or newer, and this is {torch.__version__}; use --opset 17")


def export_onnx(
    graph: InferenceGraph,
    path: Path,
    size: tuple[int, int],
    *,
    opset: int,
    batch_size: int | None,
    metadata: Mapping[str, Any] | None = None,
) -> tuple[float, str]:
    """Write `graph` to `path` and verify it; returns the largest difference from torch and a description of the graph.

    size: height and width of its images. batch_size: None accepts any number of images. metadata: stored as JSON in
    the file's metadata_props. The difference is that of ONNX Runtime's features, relative to the largest value. If it
    exceeds TOLERANCE, raises RunStopped and leaves `path` as it was.
    """
    import onnx

    with torch.no_grad(), quiet_exporter():
        content = make_onnx(graph.eval(), size, opset, batch_size)
    onnx.helper.set_model_props(content, {name: json.dumps(value) for name, value in (metadata or {}).items()})
    serialized = content.SerializeToString()
    difference = compare(graph, serialized, size, [batch_size] if batch_size else CHECK_BATCHES)
    if not difference <= TOLERANCE:
        raise RunStopped(f"the graph's features differ from torch's by {difference:.1e} of the largest value")
    write_file(path, serialized)
    return difference, describe(content)


def make_onnx(graph: InferenceGraph, size: tuple[int, int], opset: int, batch_size: int | None) -> Any:
    """The onnx.ModelProto of a graph."""
    import onnx

    example = graph.example(batch_size or 2, size)
    named: dict[str, Any] = {"input_names": ["images"], "output_names": graph.output_names, "opset_version": opset}
    if opset >= NEW_EXPORTER_OPSET:
        shapes = None if batch_size else {"images": {0: torch.export.Dim("N")}}
        named |= {"dynamo": True, "dynamic_shapes": shapes, "external_data": False}
    else:
        axes = None if batch_size else {name: {0: "N"} for name in ("images", *graph.output_names)}
        named |= {"dynamic_axes": axes, **({"dynamo": False} if HAS_NEW_EXPORTER else {})}
    with tempfile.TemporaryDirectory() as folder:
        torch.onnx.export(graph, (example,), f"{folder}/model.onnx", **named)
        return onnx.load(f"{folder}/model.onnx")


def graph_metadata(content: Any, source: Path, size: tuple[int, int], *, normalize_feature: bool) -> dict[str, Any]:
    """What a user of the graph needs besides its features: how they are compared, and where the thresholds lie.

    content: of the weight file `source`; size, normalize_feature: as the graph was made. "config" has the settings of
    the run. "verification" is left out if it was measured on other features than the graph's.
    """
    trained = settings_of(content)
    had_unit_length = trained.get("normalize_feature", False) or trained.get("test_distance") == "cosine"
    config = {**trained, "resize_h_w": list(size)}
    if normalize_feature:
        config["normalize_feature"] = True
    as_tested = list(size) == trained.get("resize_h_w") and (had_unit_length or not normalize_feature)
    record = find_verification(content, source) if as_tested else {}
    return {"config": config, **({"verification": record} if record else {})}


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Suppress warnings and output of torch's exporters."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(None):
            yield
    finally:
        logging.disable(logging.NOTSET)


def compare(graph: InferenceGraph, serialized: bytes, size: tuple[int, int], batch_sizes: Any) -> float:
    """The largest difference of ONNX Runtime's features from torch's, relative to the largest value."""
    session = OnnxFeatures(serialized)
    differences = []
    for seed, num_images in enumerate(batch_sizes, start=1):
        images = graph.example(num_images, size, seed)
        with torch.inference_mode():
            expected = graph(images)
        for ours, theirs in zip(session(images.numpy()), expected, strict=True):
            differences.append(float(np.abs(ours - theirs.numpy()).max() / theirs.abs().max()))
    return max(differences)


def describe(content: Any) -> str:
    """Opset, inputs and outputs of an onnx.ModelProto, with types and shapes."""
    import onnx

    def typed(value: Any) -> str:
        tensor = value.type.tensor_type
        dims = [one.dim_param or str(one.dim_value) for one in tensor.shape.dim]
        return f"{value.name} {onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)} [{', '.join(dims)}]"

    inputs, outputs = (", ".join(map(typed, values)) for values in (content.graph.input, content.graph.output))
    opset = next(one.version for one in content.opset_import if one.domain in ("", "ai.onnx"))
    return f"opset {opset}, {inputs} -> {outputs}"


class OnnxFeatures:
    """An exported graph in ONNX Runtime on the CPU: images [N, ...] -> its outputs as arrays."""

    def __init__(self, source: Path | bytes) -> None:
        """source: a file, or its content."""
        import onnxruntime

        model = source if isinstance(source, bytes) else str(source)
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        size = self.session.get_inputs()[0].shape[0]
        self.batch_size = size if isinstance(size, int) else None  # None: it accepts any number
        self.takes_uint8 = self.session.get_inputs()[0].type == "tensor(uint8)"

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        return self.session.run(None, {"images": images})

    def embed(self, pixels: Tensor) -> list[Tensor]:
        """The outputs for uint8 images [N, H, W, 3], RGB; padded to the batch size of a graph that has a fixed one."""
        parts = []
        for batch in pixels.split(self.batch_size or max(1, len(pixels))):
            num_missing = (self.batch_size or len(batch)) - len(batch)
            padded = torch.cat([batch, batch.new_zeros((num_missing, *batch.shape[1:]))])
            inputs = padded if self.takes_uint8 else to_float_images(padded)
            parts.append([torch.from_numpy(output[: len(batch)]) for output in self(inputs.numpy())])
        return [torch.cat(blocks) for blocks in zip(*parts, strict=True)]

    def extract(self, images: TestImages, workers: int = 0) -> FeatureSet:
        """Features of all `images`."""
        batches = make_loader(images, batch_size=self.batch_size or 32, workers=workers)
        outputs = [torch.cat(blocks) for blocks in zip(*(self.embed(batch.images) for batch in batches), strict=True)]
        return FeatureSet(outputs[0], outputs[1] if len(outputs) > 1 else None)
