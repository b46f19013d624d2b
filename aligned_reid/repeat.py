"""Several runs of the same settings with other seeds: the mean of their scores, and how far they lie apart."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aligned_reid.config import Config
from aligned_reid.distributed import read_world
from aligned_reid.evaluation.evaluate import SCORE_NAMES
from aligned_reid.run import RESULTS_NAME, run, run_lock, write_json
from aligned_reid.training.log import Log
from aligned_reid.weights import CHECKPOINT_NAME, PREVIOUS_NAME

REPEAT_NAME = "repeat.json"
REPORTED = ("cmc1", "mAP", "mAP_step")


def repeat(config: Config) -> dict[str, Any]:
    """Run `config` --repeat times, seeds counting up from --seed (default 1), each in seed<N> of the run folder.

    A run that has ended there with the same settings is not made again, and with --resume one that has begun goes on.
    Returns what repeat.json in the run folder holds: the runs' seeds, and for each distance and score mean, standard
    deviation (of a sample) and the runs' values. Raises what `run` raises.
    """
    first = 1 if config.seed is None else config.seed
    folder, seeds = config.run_dir, range(first, first + config.repeat)
    with run_lock(config, read_world()):
        results = [run_once(config, folder / f"seed{seed}", seed) for seed in seeds]
        if not read_world().is_main:
            return {}
        report = {"seeds": list(seeds), **summary(results)}
        write_json(folder / REPEAT_NAME, report)
    log = Log(None)
    log(f"{len(results)} runs, seeds {seeds[0]} to {seeds[-1]}; mean and standard deviation:")
    for name in reversed(SCORE_NAMES):  # the plain global distance last, as in a run's log
        if name in report:
            log(f"{name}: {', '.join(describe(score, values) for score, values in report[name].items())}")
    return report


def run_once(config: Config, folder: Path, seed: int) -> dict[str, Any]:
    """The results of one seed's run: those that lie in its folder, or a new run's."""
    own = dataclasses.replace(config, exp_dir=str(folder), seed=seed, repeat=1)
    has_begun = any((folder / name).is_file() for name in (CHECKPOINT_NAME, PREVIOUS_NAME))
    own = dataclasses.replace(own, resume=config.resume and has_begun)
    former = read_results(folder / RESULTS_NAME)
    if former and not [line for line in own.differences(former["config"]) if not line.startswith("resume:")]:
        Log(None, is_main=read_world().is_main)(f"seed {seed}: done before, in {folder}")
        return former
    return run(own)


def read_results(path: Path) -> dict[str, Any]:
    """A results.json of a run; empty where there is none, or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("config"), dict) else {}


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each distance that every run has: {score: {mean, deviation, values}}, as fractions."""
    report: dict[str, Any] = {}
    for name in SCORE_NAMES:
        if all(one.get(name) for one in results):
            report[name] = {}
            for score in REPORTED:
                values = [one[name][score] for one in results]
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                report[name][score] = {"mean": statistics.fmean(values), "deviation": deviation, "values": values}
    return report


def describe(score: str, values: dict[str, Any]) -> str:
    return f"[{score}: {values['mean']:.2%} +- {values['deviation']:.2%}]"
