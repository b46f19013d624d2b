"""The first ten minutes: draw a data set, train on it from scratch, evaluate, and show what the model finds."""

from pathlib import Path

import numpy as np
import torch

from aligned_reid.cli import OneLineParser, parse_path
from aligned_reid.config import Config
from aligned_reid.data import ReidData, TestImages, make_synthetic, open_data
from aligned_reid.data.partitions import GALLERY, QUERY
from aligned_reid.device import open_accelerator
from aligned_reid.distributed import World
from aligned_reid.evaluation import Ranking, global_distance_matrix, rank
from aligned_reid.evaluation.extract import extract_features
from aligned_reid.evaluation.picture import draw_matches
from aligned_reid.model import AlignedReID, load_weights
from aligned_reid.run import run
from aligned_reid.weights import read_state_dict

DATA = {"num_ids": 300, "num_cameras": 6, "images_per_camera": 3, "seed": 1}
RECIPE = [
    "--dataset=drawn",
    "--pretrained=none",
    "--resize_h_w=64,32",
    "--ids_per_batch=16",
    "--ims_per_id=4",
    "--normalize_feature=true",
    "--base_lr=6e-4",
    "--total_epochs=22",
    "--exp_decay_at_epoch=14",
    "--workers=0",
    "--seed=1",
]
PIXELS = (128, 64)  # height and width of the raw pixels to compare
SHOWN = [0, 95, 180, 280, 375]  # queries in the picture


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--folder", type=parse_path, default=Path("demo"), help="folder for all files (default: demo)")
    folder = parser.parse_args().folder
    data_path = make_synthetic(folder / "data", **DATA)
    config = Config.from_arguments([f"--data_path={data_path}", f"--exp_dir={folder / 'run'}", *RECIPE])
    results = run(config)

    data = open_data(data_path)
    raw = rank_pixels(data)
    draw_findings(data, config, folder / "matches.png")
    trained = results["global"]
    print(f"\nraw pixels     rank@1 {raw.cmc[0]:7.2%}, mAP {raw.mean_ap:7.2%}")
    print(f"trained model  rank@1 {trained['cmc1']:7.2%}, mAP {trained['mAP']:7.2%}, FPS {results['FPS']:.1f}")
    print(f"what it finds: {folder / 'matches.png'}; all figures: {config.run_dir / 'results.json'}")


def rank_pixels(data: ReidData) -> Ranking:
    """The ranking by euclidean distance of raw RGB pixels, as a baseline."""
    images = TestImages(data, size=PIXELS)
    query, gallery = images.marks == QUERY, images.marks == GALLERY
    pixels = torch.from_numpy(np.stack([images[index][0].ravel() for index in range(len(images))])).float()
    dist = global_distance_matrix(pixels[query], pixels[gallery])
    ids, cameras = images.person_ids, images.cameras
    return rank(dist, ids[query], ids[gallery], cameras[query], cameras[gallery])


def draw_findings(data: ReidData, config: Config, path: Path) -> None:
    """Draw some queries and what the trained model ranks first for them."""
    model = AlignedReID(None, pretrained="none")
    load_weights(model, read_state_dict(config.run_dir), str(config.run_dir), need_local=False)
    images = TestImages(data, size=config.resize_h_w)
    query, gallery = images.marks == QUERY, images.marks == GALLERY
    accelerator = open_accelerator(config.device, None, 0, mixed_precision=False)
    feat = extract_features(model, images, accelerator, World(), local=False, workers=0).global_feat
    draw_matches(path, images, global_distance_matrix(feat[query], feat[gallery]), SHOWN)
