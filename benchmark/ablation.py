"""What each trick is worth: one training per row, from the reference's recipe to the strong one.

    python benchmark/ablation.py --data_path=market1501 --pretrained=model.pth --folder=ablation [--rows=1,2] [--table]

A row adds a trick to the row that it names. Each finished row appends a line with its flags and scores to --results
(default docs/ablation.jsonl). An interrupted script resumes its row from the checkpoint and skips finished rows.
--table only prints the table of finished rows. Every row trains --epochs epochs at 128 x 64 pixels in float32, so that
rows from different machines can be compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.cli import parse_ints

ROOT = Path(__file__).resolve().parents[1]
SIZE = "128,64"
COLUMNS = {
    "rank@1": ("global", "cmc1"),
    "mAP (step)": ("global", "mAP_step"),
    "re-ranked rank@1": ("global_re_ranked", "cmc1"),
    "local rank@1": ("local", "cmc1"),
    "global + local rank@1": ("global_local", "cmc1"),
}


class Row(NamedTuple):
    """A trick: its flags, and the number of the row (from 1) that it adds them to."""

    name: str
    base: int
    flags: list[str]
    trains: bool = True  # False: it tests the weights of its base in another way


ROWS = [
    Row("reference", 0, []),
    Row("8 x 4 images per batch, last batch kept", 1, ["--ids_per_batch=8", "--train_final_batch=true"]),
    Row("identity loss", 2, ["-idlw=1"]),
    Row(
        "BNNeck, tested after it, cosine distance",
        3,
        ["--bnneck=true", "--feature_after_bn=true", "--test_distance=cosine"],
    ),
    Row("label smoothing", 4, ["--label_smoothing=0.1"]),
    Row("warm-up, cosine schedule, rate 7e-4", 5, ["--warmup_epochs=1", "--lr_decay_type=cosine", "--base_lr=7e-4"]),
    Row("no weight decay on norms and biases", 6, ["--decay_norms=false"]),
    Row("padded crops", 7, ["--pad_crop=4"]),
    # the rows below add to row 8 unless they name another
    Row("mirror averaging at test", 8, ["--flip_test=true"], trains=False),
    Row("random erasing", 8, ["--erase_prob=0.5"]),
    Row("last stride 1", 8, ["--last_stride=1"]),
    Row("soft margin", 8, ["-gm=none"]),
    Row("center loss", 8, ["--center_loss_weight=5e-4"]),
    Row("GeM pooling", 8, ["--pooling=gem"]),
    Row("stem and first stage frozen from the start", 8, ["--freeze_stages=1"]),
    Row("local branch", 8, ["-llw=1"]),
    Row("two models, mutual learning", 16, ["--num_models=2", "-pmlw=0.1", "-gdmlw=0.1", "-ldmlw=0.1"]),
    Row("tested before BNNeck", 7, ["--feature_after_bn=false"], trains=False),
]


def flags_of(row: int) -> list[str]:
    """The flags of row `row` (from 1), after those of its base."""
    return [*flags_of(ROWS[row - 1].base), *ROWS[row - 1].flags] if row else []


def read_results(path: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """The lines of a results file, by row and seed."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(line["row"], line["seed"]): line for line in lines}


def folder_of(row: int, seed: int, arguments: argparse.Namespace) -> Path:
    folder: Path = arguments.folder
    return folder / f"row{row:02d}_seed{seed}"


def run_row(row: int, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and test one row; return its line of results."""
    name, base, _, trains = ROWS[row - 1]
    folder = folder_of(row, seed, arguments)
    flags = [
        f"--data_path={arguments.data_path}",
        f"--pretrained={arguments.pretrained}",
        f"--resize_h_w={arguments.size}",
        f"--total_epochs={arguments.epochs}",
        f"--exp_decay_at_epoch={arguments.epochs // 2 + 1}",
        f"--seed={seed}",
        "--amp=O0",
        *flags_of(row),
    ]
    command = [str(ROOT / "script" / "train.py"), *flags, f"--exp_dir={folder}"]
    if not trains:
        command += ["--only_test=true", f"--model_weight_file={folder_of(base, seed, arguments)}"]
    elif (folder / "ckpt.pth").is_file():
        command.append("--resume=true")
    status = subprocess.run([sys.executable, *command], check=False).returncode
    if status:
        sys.exit(status)  # train.py printed the reason
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    scores = {key: score for key, score in results.items() if isinstance(score, dict) and "cmc1" in score}
    seconds = {key: results.get(key) for key in ("train_seconds", "evaluate_seconds")}
    return {"row": row, "name": name, "base": base, "seed": seed, "flags": flags[2:], **seconds, "scores": scores}


def table(results: dict[tuple[int, int], dict[str, Any]]) -> str:
    """All results as a Markdown table."""
    heads = ["row", "what it adds", "to row", "seed", *COLUMNS, "minutes of training"]
    lines = [heads, ["---"] * len(heads)]
    for (row, seed), line in sorted(results.items()):
        scores = [line["scores"].get(distance, {}).get(measure) for distance, measure in COLUMNS.values()]
        shown = ["-" if score is None else f"{100 * score:.2f}" for score in scores]
        minutes = "-" if line["train_seconds"] is None else f"{line['train_seconds'] / 60:.0f}"
        lines.append([str(row), line["name"], str(line["base"] or "-"), str(seed), *shown, minutes])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", help="a prepared data set")
    parser.add_argument("--pretrained", default="imagenet", help="start of the trunk, as of script/train.py")
    parser.add_argument("--folder", type=Path, default=Path("ablation"), help="parent of the run folders")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "ablation.jsonl")
    parser.add_argument("--rows", type=parse_ints, default=(), help=f"such as 1,4; default: 1 to {len(ROWS)}")
    parser.add_argument("--seeds", type=parse_ints, default=(1,), help="such as 1,2")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--size", default=SIZE, help="height,width in pixels")
    parser.add_argument("--table", action="store_true", help="print the table and train nothing")
    arguments = parser.parse_args()
    results = read_results(arguments.results)
    rows = arguments.rows or range(1, len(ROWS) + 1)
    if not 1 <= min(rows) <= max(rows) <= len(ROWS):
        parser.error(f"--rows are numbers from 1 to {len(ROWS)}")
    if not arguments.table:
        if not arguments.data_path:
            parser.error("--data_path is needed to train")
        for seed in arguments.seeds:
            for row in rows:
                if (row, seed) not in results:
                    results[row, seed] = run_row(row, seed, arguments)
                    with open(arguments.results, "a", encoding="utf-8") as file:
                        file.write(json.dumps(results[row, seed]) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
