"""Evaluation during training: the best model so far, by rank@1, is kept in best.pth."""

from __future__ import annotations

from typing import Any

from aligned_reid.config import Config
from aligned_reid.data.dataset import TestImages
from aligned_reid.device import Accelerator
from aligned_reid.distributed import World, take_from_main
from aligned_reid.errors import InputError
from aligned_reid.evaluation.evaluate import evaluation_settings
from aligned_reid.evaluation.extract import extract_features
from aligned_reid.evaluation.protocol import evaluate_features
from aligned_reid.model import AlignedReID
from aligned_reid.training.checkpoint import on_host, random_states, set_random_states, write_checkpoint
from aligned_reid.training.log import Log
from aligned_reid.weights import BEST_NAME, read_weight_file


class Best:
    """Evaluates every `--eval_every` epochs, by global distance only, and keeps the best model of them."""

    def __init__(
        self,
        config: Config,
        images: TestImages,
        accelerator: Accelerator,
        world: World,
        log: Log,
        trained_on: dict[str, list[str]],
    ) -> None:
        """trained_on: see data.identities.identity_record."""
        self.config, self.images, self.trained_on = config, images, trained_on
        self.accelerator, self.world, self.log = accelerator, world, log
        self.path = config.run_dir / BEST_NAME
        self.record: dict[str, Any] | None = None  # epoch, rank1, mAP of the best; known to rank 0

    def resume(self) -> None:
        """Continue from the run folder's best.pth, if --eval_every is on and the file is intact."""
        if not (self.config.eval_every and self.world.is_main and self.path.is_file()):
            return
        try:
            content = read_weight_file(self.path)
            self.record = {"epoch": int(content["epoch"]), **content["scores"]}
        except (InputError, KeyError, TypeError, ValueError) as error:
            self.log(f"{self.path} cannot be continued ({error}): the search for the best model starts again")

    def after_epoch(self, model: AlignedReID, epoch: int) -> None:
        """Evaluate if due; every rank calls it. The training that follows has the same bits as without it."""
        if not self.config.eval_every or epoch % self.config.eval_every:
            return
        states = random_states(self.accelerator)  # the loader of test images draws from them
        take_from_main(model.buffers())  # the batch norm statistics that the checkpoint holds
        features = extract_features(
            model,
            self.images,
            self.accelerator,
            self.world,
            local=False,
            workers=self.config.workers,
            flip=self.config.flip_test,
        )
        set_random_states(states, self.accelerator)
        if not self.world.is_main:
            return
        settings = evaluation_settings(self.config, re_ranked=False)
        measured = evaluate_features(features, self.images, lambda line: None, settings, self.config.dataset_name)
        scores = {"rank1": measured["global"]["cmc1"], "mAP": measured["global"]["mAP"]}
        if self.record is None or scores["rank1"] > self.record["rank1"]:
            content = {
                "model": on_host(model.state_dict()),
                "config": self.config.to_dict(),
                "trained_on": self.trained_on,
                "epoch": epoch,
                "scores": scores,
                "verification": measured["verification"],
            }
            write_checkpoint(self.path, content)
            self.record = {"epoch": epoch, **scores}
        shown = f"rank@1 {scores['rank1']:.2%}, mAP {scores['mAP']:.2%}"
        self.log(f"evaluated after epoch {epoch}: {shown}; best: epoch {self.record['epoch']}")
        self.log.scalars(scores, epoch)
