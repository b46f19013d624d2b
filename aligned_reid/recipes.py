"""Recipes: what --recipe sets. A flag that is given beside it wins; the log prints the difference from the reference.

`reference` is the defaults. `ascend` is what the wrappers in test/ set. `strong` is the part of the bag of tricks
(Luo et al., arXiv:1903.07071) that trains in 128 minutes on two CPU cores with bfloat16 units, with the local branch.
benchmark/ablation.py trains each trick in turn. docs/training.md has the complete version for accelerators and shorter
ones for CPUs.
"""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "reference": {},
    "ascend": {
        "ids_per_batch": 128,  # a device
        "base_lr": 5e-4,
        "train_final_batch": True,
        "total_epochs": 300,
        "exp_decay_at_epoch": 151,
    },
    "strong": {
        # batches and images
        "resize_h_w": (192, 96),
        "ids_per_batch": 8,
        "train_final_batch": True,
        "pad_crop": 8,
        "erase_prob": 0.5,
        # model
        "last_stride": 1,
        "bnneck": True,
        # losses
        "global_margin": None,  # soft
        "l_loss_weight": 1.0,
        "id_loss_weight": 1.0,
        "label_smoothing": 0.1,  # with decay_norms: for a long training
        # schedule
        "base_lr": 7e-4,
        "total_epochs": 120,
        "warmup_epochs": 5,
        "lr_decay_type": "cosine",
        "decay_norms": False,
        "freeze_stages": 1,  # to save time
        "freeze_stages_from": 72,
        # test
        "flip_test": True,
    },
}
