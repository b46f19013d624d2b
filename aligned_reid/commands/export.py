"""Write a trained model as an ONNX graph and check the graph against torch."""

import argparse

from aligned_reid.cli import OneLineParser, parse_bool, parse_path
from aligned_reid.config import Config
from aligned_reid.flags import parse_height_width


def parse_batch_size(text: str) -> int | None:
    if text == "dynamic":
        return None
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of images nor dynamic")


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--model_weight_file", type=parse_path, required=True, help="weights: a file, or a folder that holds ckpt.pth")
    add("--save_file", type=parse_path, required=True, help="the file to write, e.g. aligned_reid.onnx")
    add("--to", choices=["onnx"], default="onnx", help="the graph's format (default: onnx)")
    add("--features", choices=["global", "global_local"], default="global", help="outputs (default: global)")
    add("--input", choices=["uint8", "float32"], default="uint8", help="resized RGB images: uint8 [N, H, W, 3], or "
        "float32 [N, 3, H, W] from 0 to 1; the graph normalizes them (default: uint8)")  # fmt: skip
    add("--batch_size", type=parse_batch_size, default=None, help="images per call, or dynamic (default: dynamic)")
    add("--resize_h_w", type=parse_height_width, help="height,width in pixels (default: as trained, or 256,128)")
    add("--normalize_feature", type=parse_bool, help="scale features to unit length (default: as trained)")
    add("--opset", type=int, default=17, help="ONNX opset, 13 to 18 (default: 17)")
    add("--data_path", type=parse_path, help="a prepared data set, to evaluate the graph on its test part")
    add("--workers", type=int, default=2, help="processes that load images (default: 2)")
    arguments = parser.parse_args()
    if arguments.workers < 0:
        parser.error("--workers is 0 or more")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from aligned_reid.data import TestImages, open_data  # torch takes seconds to import
    from aligned_reid.evaluation.protocol import EvaluationSettings, evaluate_features
    from aligned_reid.export import InferenceGraph, OnnxFeatures, check_packages, export_onnx, graph_metadata
    from aligned_reid.lock import hold
    from aligned_reid.model import open_model
    from aligned_reid.preflight import check_save_file
    from aligned_reid.weights import read_weight_file, settings_of

    check_packages(arguments.opset)
    check_save_file(arguments.save_file, "--save_file", ".onnx")
    content = read_weight_file(arguments.model_weight_file)
    trained = settings_of(content)
    size = arguments.resize_h_w or tuple(trained.get("resize_h_w", (256, 128)))
    Config.of(resize_h_w=size).checked()
    unit_length = arguments.normalize_feature
    if unit_length is None:
        unit_length = trained.get("normalize_feature", False) or trained.get("test_distance") == "cosine"
    images = TestImages(open_data(arguments.data_path), size=size) if arguments.data_path else None
    local = arguments.features == "global_local"
    model, report = open_model(content, str(arguments.model_weight_file), need_local=local)
    print(report)
    graph = InferenceGraph(model, local=local, uint8_input=arguments.input == "uint8", normalize_feature=unit_length)
    metadata = graph_metadata(content, arguments.model_weight_file, size, normalize_feature=unit_length)
    with hold(arguments.save_file, "--save_file"):
        difference, described = export_onnx(
            graph,
            arguments.save_file,
            size,
            opset=arguments.opset,
            batch_size=arguments.batch_size,
            metadata=metadata,
        )
    print(f"{arguments.save_file} ({arguments.save_file.stat().st_size / 1e6:.1f} MB): {described}")
    print(f"ONNX Runtime's features differ from torch's by at most {difference:.1e} of the largest value")
    if trained.get("flip_test"):
        print("the weights were trained for --flip_test; the graph does not average over flips, do that in the caller")
    if images is not None:
        features = OnnxFeatures(arguments.save_file).extract(images, arguments.workers)
        evaluate_features(features, images, print, EvaluationSettings())
