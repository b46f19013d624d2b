"""Recipes: what --recipe sets. A flag that is given beside it wins; the log prints the difference from the reference.

`reference` is the defaults. `ascend` is what the wrappers in test/ set. `strong` is the bag of tricks (Luo et al.,
arXiv:1903.07071) without its center loss; benchmark/ablation.py trains with each trick in turn.
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
        "ids_per_batch": 16,
        "train_final_batch": True,
        "pad_crop": 10,
        "erase_prob": 0.5,
        # model
        "last_stride": 1,
        "bnneck": True,
        # losses
        "id_loss_weight": 1.0,
        "label_smoothing": 0.1,
        # schedule
        "base_lr": 3.5e-4,
        "total_epochs": 60,
        "warmup_epochs": 5,
        "lr_decay_type": "cosine",
        "decay_norms": False,
        # test
        "feature_after_bn": True,
        "test_distance": "cosine",
        "flip_test": True,
    },
}
