"""Files that a user gives, damaged at random: each is read, or refused in one line."""

import shutil
import zipfile
from random import Random

import h5py
import numpy as np
import pytest
import safetensors.torch
import scipy.io
import torch

from aligned_reid.data import prepare_market1501, read_partitions
from aligned_reid.data.prepare.photos import prepare_photos
from aligned_reid.data.transforms import decode_image
from aligned_reid.errors import InputError
from aligned_reid.evaluation.features import read_features
from aligned_reid.weights import read_state_dict

NUM_MUTANTS = 300


def damage(content: bytes, random: Random) -> bytes:
    """The content truncated, or with some bytes flipped, inserted, swapped or zeroed."""
    mutant = bytearray(content)
    where, other = random.randrange(len(mutant)), random.randrange(len(mutant))
    length = min(random.randint(1, 64), len(mutant) - where)
    kind = random.choice(["cut", "flip", "insert", "swap", "zero"])
    if kind == "cut":
        del mutant[where:]
    elif kind == "flip":
        for _ in range(random.randint(1, 8)):
            mutant[random.randrange(len(mutant))] ^= 1 << random.randrange(8)
    elif kind == "insert":
        mutant[where:where] = random.randbytes(length)
    elif kind == "swap":
        mutant[where], mutant[other] = mutant[other], mutant[where]
    else:
        mutant[where : where + length] = bytes(length)
    return bytes(mutant)


def write_features(path):
    random = np.random.default_rng(0)
    fields = {"global": random.random((12, 8), np.float32), "local": random.random((12, 4, 3), np.float32)}
    fields |= {"person_id": np.arange(12) % 3, "camera": np.arange(12) % 2, "mark": np.arange(12) % 4 // 3 ^ 1}
    fields["image_name"] = np.array([f"image_{number}.jpg" for number in range(12)])
    if path.suffix == ".npz":
        np.savez(path, **fields)
    elif path.suffix == ".mat":
        scipy.io.savemat(path, fields)
    else:
        with h5py.File(path, "w") as file:
            for name, values in fields.items():
                file[name] = values.astype("S") if values.dtype.kind == "U" else values


def write_weights(path):
    state = {f"base.layer{number}.weight": torch.randn(4, 3) for number in range(5)}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    elif path.name.startswith("old"):
        torch.save({"state_dicts": [state]}, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({"model": state, "config": {"seed": 1}}, path)


def write_data(path, tiny_data):
    """An image, partitions, a table of photos or a zip of Market-1501, made of tiny_data."""
    names = sorted(name for name in read_partitions(tiny_data / "partitions.pkl").test_im_names if name[0] == "0")
    if path.suffix == ".jpg":
        shutil.copy(tiny_data / "images" / names[0], path)
    elif path.suffix == ".pkl":
        shutil.copy(tiny_data / "partitions.pkl", path)
    elif path.suffix == ".csv":
        rows = [f"{tiny_data / 'images' / name},person {name[:8]},{name[9:13]}\n" for name in names]
        path.write_text("path,person,camera\n" + "".join(rows))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for part, person in (("bounding_box_train", 1), ("bounding_box_test", 2), ("query", 2), ("gt_bbox", 2)):
                for camera in (1, 2):
                    name = f"Market/{part}/{person:04d}_c{camera}s1_000001_0{camera}.jpg"
                    file.write(tiny_data / "images" / names[0], name)


def read_by_preparing(prepare):
    def read(path):
        shutil.rmtree(path.with_name("prepared"), ignore_errors=True)
        prepare(path, path.with_name("prepared"))

    return read


READERS = {
    "image.jpg": decode_image,
    "partitions.pkl": read_partitions,
    "photos.csv": read_by_preparing(prepare_photos),
    "market.zip": read_by_preparing(prepare_market1501),
    "features.h5": read_features,
    "features.npz": read_features,
    "features.mat": read_features,
    "weights.pth": read_state_dict,
    "old_weights.pth": read_state_dict,
    "weights.safetensors": read_state_dict,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name, tmp_path, tiny_data):
    path, read, random = tmp_path / name, READERS[name], Random(1)
    if read is read_features:
        write_features(path)
    elif read is read_state_dict:
        write_weights(path)
    else:
        write_data(path, tiny_data)
    content = path.read_bytes()
    read(path)
    refused = 0
    for number in range(NUM_MUTANTS):
        path.write_bytes(damage(content, random))
        try:
            read(path)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error), number
        except Exception as error:
            path.with_name(f"mutant_{number}_{name}").write_bytes(path.read_bytes())
            raise AssertionError(f"mutant {number} of {name}: {error!r}") from error
    assert refused > 0
