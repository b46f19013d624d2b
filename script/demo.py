"""The first ten minutes: draw a data set, train on it from nothing, evaluate, and show what the model finds."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from aligned_reid.command import run_command
from aligned_reid.config import Config

DATA = {"num_ids": 400, "num_cameras": 6, "images_per_camera": 2, "seed": 1}
RECIPE = ["--pretrained=none", "--resize_h_w=128,64", "--workers=0", "--seed=1"]
PIXELS = (128, 64)  # height and width at which raw pixels are compared
SHOWN = (0, 40, 80, 120, 160)  # queries in the picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where all of it goes (default: demo)")
    folder = parser.parse_args().folder

    import numpy as np  # here, so that --help answers at once
    import torch

    from aligned_reid.data import TestImages, make_synthetic, open_data
    from aligned_reid.data.partitions import GALLERY, QUERY
    from aligned_reid.evaluation import global_distance_matrix, rank
    from aligned_reid.evaluation.picture import draw_matches
    from aligned_reid.run import evaluate_checkpoint, run

    data = make_synthetic(folder / "data", **DATA)
    config = Config.from_arguments([f"--data_path={data}", f"--exp_dir={folder / 'run'}", *RECIPE])
    test = TestImages(open_data(data), size=PIXELS)
    query, gallery = test.marks == QUERY, test.marks == GALLERY
    ids, cameras = test.person_ids, test.cameras
    pixels = torch.from_numpy(np.stack([test[index][0].ravel() for index in range(len(test))])).float()
    dist = global_distance_matrix(pixels[query], pixels[gallery])
    raw = rank(dist, ids[query], ids[gallery], cameras[query], cameras[gallery])

    results = run(config)
    trained = results["global"]
    dist = evaluate_checkpoint(config)
    draw_matches(folder / "matches.png", test, dist, [row for row in SHOWN if row < query.sum()])

    print(f"raw pixels     rank@1 {raw.cmc[0]:7.2%}  mAP {raw.mean_ap:7.2%}")
    print(f"trained model  rank@1 {trained['cmc1']:7.2%}  mAP {trained['mAP']:7.2%}  {results['FPS']:.1f} images/s")
    print(f"picture of what it finds: {folder / 'matches.png'}; all figures: {config.run_dir / 'results.json'}")


if __name__ == "__main__":
    run_command(main)
