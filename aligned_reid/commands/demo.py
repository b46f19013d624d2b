"""The first ten minutes: draw people, train on them from scratch, evaluate, and use the model on a folder of photos."""

import shutil
from pathlib import Path

import numpy as np
import torch

from aligned_reid.cli import OneLineParser, parse_path
from aligned_reid.config import Config
from aligned_reid.data import ReidData, TestImages, make_synthetic, open_data
from aligned_reid.data.partitions import GALLERY, QUERY
from aligned_reid.errors import InputError
from aligned_reid.evaluation import Ranking, global_distance_matrix, rank
from aligned_reid.inference import Gallery, ReID
from aligned_reid.inference.pages import write_group_page, write_search_page
from aligned_reid.inference.report import write_report
from aligned_reid.run import run

DATA = {"num_ids": 300, "num_cameras": 6, "images_per_camera": 3, "seed": 1}
RECIPE = [
    "--dataset=drawn",
    "--pretrained=none",
    "--resize_h_w=64,32",
    "--ids_per_batch=16",
    "--ims_per_id=4",
    "--normalize_feature=true",
    "--base_lr=6e-4",
    "-llw=1",
    "--last_stride=1",
    "--total_epochs=16",
    "--exp_decay_at_epoch=10",
    "--workers=0",
    "--seed=1",
]
PIXELS = (128, 64)  # height and width of the raw pixels to compare
NUM_PEOPLE = 12  # in the folder of photos


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--folder", type=parse_path, default=Path("demo"), help="folder for all files (default: demo)")
    folder = parser.parse_args().folder
    data_path = make_synthetic(folder / "data", **DATA)
    config = Config.from_arguments([f"--data_path={data_path}", f"--exp_dir={folder / 'run'}", *RECIPE])
    results = run(config)

    data = open_data(data_path)
    raw, trained = rank_pixels(data), results["global"]
    used = use_model(folder, config.run_dir, copy_photos(data, folder / "photos"))
    print(f"\nraw pixels     rank@1 {raw.cmc[0]:7.2%}, mAP {raw.mean_ap:7.2%}")
    print(f"trained model  rank@1 {trained['cmc1']:7.2%}, mAP {trained['mAP']:7.2%}, FPS {results['FPS']:.1f}\n")
    print("\n".join(used))


def rank_pixels(data: ReidData) -> Ranking:
    """The ranking by euclidean distance of raw RGB pixels, as a baseline."""
    images = TestImages(data, size=PIXELS)
    query, gallery = images.marks == QUERY, images.marks == GALLERY
    pixels = torch.from_numpy(np.stack([images[index][0].ravel() for index in range(len(images))])).float()
    dist = global_distance_matrix(pixels[query], pixels[gallery])
    ids, cameras = images.person_ids, images.cameras
    return rank(dist, ids[query], ids[gallery], cameras[query], cameras[gallery])


def copy_photos(data: ReidData, folder: Path) -> list[Path]:
    """Copy the photos of some people of the test into one folder, like a user's own; returns them in order."""
    images = TestImages(data)
    people = np.unique(images.person_ids[images.marks == QUERY])[:NUM_PEOPLE]
    names = sorted({images.image_names[index] for index in np.flatnonzero(np.isin(images.person_ids, people))})
    folder.mkdir(exist_ok=True)
    return [Path(shutil.copy(data.images_dir / name, folder)) for name in names]


def use_model(folder: Path, run_dir: Path, photos: list[Path]) -> list[str]:
    """Search for a photo, compare it with the nearest, group all photos, report on the test; returns what to print."""
    reid = ReID.from_pretrained(run_dir, log=ignore)
    gallery = Gallery.open(photos[0].parent, reid, log=ignore)
    hits = gallery.search(photos[0])
    write_search_page(folder / "search.html", photos[0], hits)
    pair = reid.compare(photos[0], hits[0].path)
    lines = [
        f"search   the {len(hits)} nearest of {len(gallery)} photos to {photos[0]}: {folder}/search.html",
        f"compare  it with the nearest: {pair}: {folder}/compare.png",
    ]
    try:
        pair.save(folder / "compare.png")
    except InputError as error:  # matplotlib is an extra
        lines[-1] = f"compare  it with the nearest: {pair}; no picture: {error}"
    groups = gallery.group()
    num_pure = sum(len({path.name[:8] for path in group.paths}) == 1 for group in groups)
    write_group_page(folder / "groups.html", groups)
    page = write_report(run_dir, folder / "report", log=ignore)
    return [
        *lines,
        f"group    {len(groups)} groups, {num_pure} of one person only ({NUM_PEOPLE} are shown): {folder}/groups.html",
        f"report   open {page.absolute().as_uri()}",
    ]


def ignore(line: str) -> None:
    """The demo's own lines say what happens."""
