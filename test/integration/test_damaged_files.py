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
from PIL import Image

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
    where = random.randrange(len(mutant))
    length = random.randint(1, min(64, len(mutant)))
    kind = random.choice(["cut", "flip", "insert", "swap", "zero"])
    if kind == "cut":
        del mutant[where:]
    elif kind == "flip":
        for _ in range(random.randint(1, 8)):
            mutant[random.randrange(len(mutant))] ^= 1 << random.randrange(8)
    elif kind == "insert":
        mutant[where:where] = random.randbytes(length)
    elif kind == "swap":
        other = random.randrange(len(mutant))
        mutant[where], mutant[other] = mutant[other], mutant[where]
    else:
        mutant[where : where + length] = bytes(len(mutant[where : where + length]))
    return bytes(mutant)


def make_image(path, seed=0, size=(32, 64)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG", quality=80)
    return path


def make_fields():
    random = np.random.default_rng(0)
    return {
        "global": random.standard_normal((12, 8), dtype=np.float32),
        "local": random.standard_normal((12, 4, 3), dtype=np.float32),
        "person_id": np.arange(12) % 3,
        "camera": np.arange(12) % 2,
        "mark": np.arange(12) % 4 // 3 ^ 1,
        "image_name": np.array([f"image_{number}.jpg" for number in range(12)]),
    }


def make_h5(path):
    with h5py.File(path, "w") as file:
        for name, values in make_fields().items():
            file[name] = values.astype("S") if values.dtype.kind == "U" else values
    return path


def make_npz(path):
    np.savez(path, **make_fields())
    return path


def make_mat(path):
    scipy.io.savemat(path, make_fields())
    return path


def make_table(path):
    rows = ["path,person,camera"]
    for person in range(4):
        for camera in range(2):
            name = f"{person}_{camera}.jpg"
            make_image(path.with_name(name), seed=person)
            rows.append(f"{name},person {person},{camera}")
    path.write_text("\n".join(rows) + "\n")
    return path


def make_zip(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        image = make_image(path.with_name("one.jpg")).read_bytes()
        for part, person in (("bounding_box_train", 1), ("bounding_box_test", 2), ("query", 2), ("gt_bbox", 2)):
            for camera in (1, 2):
                file.writestr(f"Market/{part}/{person:04d}_c{camera}s1_000001_0{camera}.jpg", image)
    return path


def make_state():
    return {f"base.layer{number}.weight": torch.randn(4, 3) for number in range(5)}


def make_weights(path):
    torch.save({"model": make_state(), "config": {"seed": 1}}, path)
    return path


def make_old_weights(path):
    torch.save({"state_dicts": [make_state()]}, path, _use_new_zipfile_serialization=False)
    return path


def make_safetensors(path):
    safetensors.torch.save_file(make_state(), path)
    return path


def prepare(prepare_data, source):
    save_dir = source.with_name("prepared")
    shutil.rmtree(save_dir, ignore_errors=True)
    prepare_data(source, save_dir)


def make_partitions(path, tiny_data):
    path.write_bytes((tiny_data / "partitions.pkl").read_bytes())
    return path


READERS = {
    "image.jpg": (make_image, decode_image),
    "features.h5": (make_h5, read_features),
    "features.npz": (make_npz, read_features),
    "features.mat": (make_mat, read_features),
    "photos.csv": (make_table, lambda path: prepare(prepare_photos, path)),
    "market.zip": (make_zip, lambda path: prepare(prepare_market1501, path)),
    "weights.pth": (make_weights, read_state_dict),
    "old_weights.pth": (make_old_weights, read_state_dict),
    "weights.safetensors": (make_safetensors, read_state_dict),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*READERS, "partitions.pkl"])
def test_a_damaged_file_is_read_or_refused_in_one_line(name, tmp_path, tiny_data):
    if name == "partitions.pkl":
        path, read = make_partitions(tmp_path / name, tiny_data), read_partitions
    else:
        make, read = READERS[name]
        path = make(tmp_path / name)
    content = path.read_bytes()
    read(path)
    random = Random(1)
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
