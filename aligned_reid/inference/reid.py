"""A trained model as one object: images of any kind in, features and comparisons out."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from aligned_reid.config import Config, names_affecting
from aligned_reid.data.loader import num_processors
from aligned_reid.data.transforms import resize_image
from aligned_reid.distance import alignment_path, normalize
from aligned_reid.errors import InputError
from aligned_reid.evaluation.distances import global_distance_matrix
from aligned_reid.evaluation.evaluate import settle_test
from aligned_reid.evaluation.extract import BATCH_SIZE, FeatureSet
from aligned_reid.evaluation.verification import DECIDING_RATE
from aligned_reid.flags import TEST
from aligned_reid.inference.foreign import find_project, open_foreign
from aligned_reid.inference.images import as_list, cut_boxes, name_of, read_image
from aligned_reid.inference.networks import Network, OnnxNetwork, TorchNetwork
from aligned_reid.model import open_model
from aligned_reid.weights import (
    SAFETENSORS_NAME,
    digest_of,
    find_state_dict,
    find_verification,
    read_weight_file,
    settings_of,
)

BATCHES_AHEAD = 2  # that threads decode while the network computes
SECONDS_WITHOUT_BAR = 2.0
TEST_SETTINGS = names_affecting(TEST)


@dataclass(frozen=True)
class Comparison:
    """Two images compared; str() of it is a sentence."""

    distance: float  # of the global features
    local_distance: float | None  # aligned, of the stripes; None without a local branch
    path: list[tuple[int, int]] | None  # pairs of stripes that the aligned distance matches
    cost: Tensor | None  # [H, H] of each pair of stripes, in [0, 1)
    threshold: float | None  # None if the weights have none
    same_person: bool | None  # whether distance < threshold
    images: tuple[np.ndarray, np.ndarray]  # uint8 [h, w, 3], RGB, as the model sees them
    measured_on: str = ""  # the data set of the threshold
    match_rate: float | None = None  # the share of the pairs of one person that are nearer than the threshold

    def __str__(self) -> str:
        if self.threshold is None:
            return f"distance {self.distance:.2f}; the weights have no threshold that says whether this is near"
        verdict, sign, missed = "likely", "<", ""
        if not self.same_person:  # many pairs of one person are farther apart, too
            verdict, sign, missed = "uncertain", ">=", f", and {self.match_rate:.0%} of the pairs of one person are"
        return (
            f"same person: {verdict} (distance {self.distance:.2f} {sign} {self.threshold:.2f}, where 1 of 1,000 pairs "
            f"of strangers is as near{missed}; measured on {self.measured_on}'s test, other cameras shift it)"
        )

    def save(self, path: str | Path) -> None:
        """Draw both images and the stripes that match, as .png or .svg. Raises InputError without a local branch."""
        if self.path is None or self.local_distance is None:
            raise InputError("the weights have no local branch, so there is no alignment to draw")
        from aligned_reid.inference.drawing import draw_alignment  # matplotlib takes a second to import

        draw_alignment(Path(path), self.images, self.cost, self.path, self.local_distance)


class ReID:
    """A trained model for images of persons; `ReID.from_pretrained` opens one."""

    def __init__(
        self, network: Network, config: Config, verification: Mapping[str, Any], digest: str, report: str
    ) -> None:
        """verification: as in results.json. digest: of the weights. report: what was loaded and what was not."""
        self.network = network
        self.size = network.size
        self.unit_length = config.normalize_feature or config.test_distance == "cosine"
        self.verification = verification
        self.report = report
        test = [digest, network.size, *(getattr(config, name) for name in TEST_SETTINGS)]
        self.digest = blake2b(json.dumps(test).encode(), digest_size=16).hexdigest()  # of weights and test settings

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: str = "auto", log: Callable[[str], None] = print, **settings: Any
    ) -> ReID:
        """Open a run folder or a file: .pth, .safetensors, .onnx; also a ResNet-50 of other projects (docs/weights.md).

        device: "auto", "cpu", "cuda", "npu", or one of several, such as "cuda:1". log gets a line on what was loaded
        and what was not. settings: test options by name, such as resize_h_w=(384, 128); the others are as the file
        says. Raises InputError if the file, the device or a setting cannot be used.
        """
        path = Path(source).expanduser()
        if path.is_dir() and (path / SAFETENSORS_NAME).is_file():
            path = path / SAFETENSORS_NAME
        for name in settings.keys() - set(TEST_SETTINGS):
            raise InputError(f"{name} is not a test option; these are: {', '.join(TEST_SETTINGS)}")
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        lines: list[str] = []
        open_network = open_graph if path.suffix.lower() == ".onnx" else open_weights
        network, config, content, digest = open_network(path, device, settings, lines.append)
        reid = cls(network, config, find_verification(content, path), digest, "; ".join(lines))
        log(reid.report)
        return reid

    @property
    def threshold(self) -> float | None:
        """The global distance that 1 of 1,000 pairs of different persons is below; None if it was not measured."""
        return self.operating_point().get("threshold")

    def operating_point(self) -> Mapping[str, float]:
        """The threshold that decides and its true-match rate, as in results.json; empty if it was not measured."""
        rates = (self.verification.get("global") or {}).get("at_fmr") or {}
        return rates.get(DECIDING_RATE) or {}

    def __call__(
        self, images: Any, *, boxes: Any = None, bgr: bool = False, on_error: Callable[[str], None] | None = None
    ) -> FeatureSet:
        """Features of one image or several: paths, PIL images, numpy arrays, tensors (`images.read_image`).

        boxes: [N, 4] in one image (left, top, right, bottom): the features of its N parts. bgr: arrays are in the order
        blue, green, red, as OpenCV's. Raises InputError for an image or a box that cannot be used; with `on_error`,
        that gets the line instead, and the features are NaN.
        """
        if boxes is None:
            named = [(image, name_of(image, number)) for number, image in enumerate(as_list(images))]
        else:
            frame = name_of(images, 0)
            named = [(part, frame) for part in cut_boxes(read_image(images, frame, bgr=bgr), boxes, frame)]
            bgr = False
        blocks = list(self.embed(named, bgr=bgr, on_error=on_error)) or [self.compute([], None)]
        global_feats, local_feats = zip(*blocks, strict=True)
        return FeatureSet(torch.cat(global_feats), None if local_feats[0] is None else torch.cat(local_feats))

    def embed(
        self, images: Sequence[tuple[Any, str]], *, bgr: bool = False, on_error: Callable[[str], None] | None = None
    ) -> Iterator[FeatureSet]:
        """Features of images, each with its name in messages, in batches; threads decode while the network computes."""
        batches = (images[first : first + BATCH_SIZE] for first in range(0, len(images), BATCH_SIZE))
        bar = tqdm(total=len(images), unit="im", desc="features", leave=False, disable=None, delay=SECONDS_WITHOUT_BAR)
        with ThreadPoolExecutor(num_processors()) as pool, bar:
            loading = ([pool.submit(self.load, image, name, bgr) for image, name in batch] for batch in batches)
            waiting = deque(islice(loading, BATCHES_AHEAD))
            while waiting:
                loaded = [one.result() for one in waiting.popleft()]
                waiting.extend(islice(loading, 1))
                yield self.compute(loaded, on_error)
                bar.update(len(loaded))

    def load(self, image: Any, name: str, bgr: bool = False) -> np.ndarray | InputError:
        """An image as the network takes it, uint8 [h, w, 3]; if it cannot be used, the reason."""
        try:
            return image if isinstance(image, InputError) else resize_image(read_image(image, name, bgr=bgr), self.size)
        except InputError as error:
            return error

    def compute(self, loaded: Sequence[np.ndarray | InputError], on_error: Callable[[str], None] | None) -> FeatureSet:
        """Features of one batch, NaN for images that could not be loaded."""
        images = {place: image for place, image in enumerate(loaded) if not isinstance(image, InputError)}
        for error in loaded:
            if isinstance(error, InputError):
                if on_error is None:
                    raise error
                on_error(str(error))
        blank = np.zeros((*self.size, 3), np.uint8)  # for the shapes of its features
        feats = self.network(torch.from_numpy(np.stack(list(images.values()) or [blank])))
        if images and len(images) == len(loaded):
            return feats

        def spread(feat: Tensor) -> Tensor:
            rows = feat.new_full((len(loaded), *feat.shape[1:]), torch.nan)
            rows[list(images)] = feat[: len(images)]
            return rows

        return FeatureSet(spread(feats.global_feat), None if feats.local_feat is None else spread(feats.local_feat))

    def compare(self, one: Any, other: Any, *, bgr: bool = False) -> Comparison:
        """Compare two images. Raises InputError as a call does."""
        pair = [self.load(image, name_of(image, number), bgr) for number, image in enumerate((one, other))]
        feats = self.compute(pair, None)
        distance = float(self.distances(feats.global_feat[:1], feats.global_feat[1:])[0, 0])
        path = None
        if feats.local_feat is not None:
            path = alignment_path(*(normalize(feats.local_feat) if self.unit_length else feats.local_feat))
        threshold = self.threshold
        return Comparison(
            distance,
            float(path.distance) if path else None,
            path.cells if path else None,
            path.cost if path else None,
            threshold,
            None if threshold is None else distance < threshold,
            tuple(pair),  # type: ignore[arg-type]  # compute() has raised what is not an image
            self.verification.get("measured_on", "an unnamed data set"),
            self.operating_point().get("tmr"),
        )

    def save_heat_map(self, image: Any, path: str | Path, *, bgr: bool = False) -> None:
        """Draw where the trunk responds to an image, as .png or .svg; errors as of a call, and for an ONNX graph."""
        if not isinstance(self.network, TorchNetwork):
            raise InputError("an ONNX graph does not give its feature map: open the weights that it was exported from")
        from aligned_reid.inference.drawing import draw_heat_map  # matplotlib takes a second to import

        pixels = resize_image(read_image(image, name_of(image, 0), bgr=bgr), self.size)
        draw_heat_map(path, pixels, self.network.feature_map(torch.from_numpy(pixels)[None])[0])

    def distances(self, x: Tensor, y: Tensor) -> np.ndarray:
        """Distances as in the test, float32 [M, N], of global features [M, D] and [N, D]."""
        return global_distance_matrix(self.scaled(x), self.scaled(y))

    def scaled(self, feat: Tensor) -> Tensor:
        """Features as the test compares them: at unit length if the settings say so."""
        return normalize(feat) if self.unit_length else feat


Opened = tuple[Network, Config, Mapping[str, Any], str]  # ..., content of the file, digest of the weights


def open_weights(path: Path, device: str, settings: Mapping[str, Any], log: Callable[[str], None]) -> Opened:
    """The model in a weight file of ours or of another project."""
    content, source = read_weight_file(path), str(path)
    weights = find_state_dict(content, source)
    found = None if settings_of(content) else find_project(weights, source)
    if found:
        config = make_config({**found[0].settings, **settings})
        model, report = open_foreign(weights, *found, source, config.to_dict())
        local = False
    else:
        config = settle_test(make_config(settings), content, log)
        # Without settings, as in the reference's files, a local branch in the file counts as trained.
        trained = settings_of(content)
        local = trained.get("l_loss_weight", 0) > 0 if trained else "local_conv.weight" in weights
        model, report = open_model(content, source, need_local=local, settings=config.to_dict())
    log(report)
    network = TorchNetwork(model, device, config.resize_h_w, local=local, flip=config.flip_test)
    return network, config, content, digest_of(weights)


def open_graph(path: Path, device: str, settings: Mapping[str, Any], log: Callable[[str], None]) -> Opened:
    """An ONNX graph, which runs on the CPU."""
    network = OnnxNetwork(path)
    content = network.read_content(path)
    config = settle_test(make_config({**settings, "resize_h_w": network.size}), content, log)
    if settings.get("resize_h_w", network.size) != network.size or device not in ("auto", "cpu"):
        raise InputError(f"{path} takes images of {network.size} on the CPU: leave out resize_h_w and device")
    network.flip = config.flip_test
    log(f"graph {path}")
    return network, config, content, blake2b(path.read_bytes(), digest_size=16).hexdigest()


def make_config(settings: Mapping[str, Any]) -> Config:
    """A test with these options. Raises InputError if a value is not allowed."""
    return Config.of(only_test=True, **settings).checked()
