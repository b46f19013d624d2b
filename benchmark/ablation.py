"""What each trick of the strong recipe is worth: one training a row, each row the one before it and one trick more.

    python benchmark/ablation.py --data_path=market1501 --pretrained=model.pth --folder=ablation [--rows=1,2] [--table]

Every row that ends appends a line to --results (default docs/ablation.jsonl), with its flags and scores. The script may
be stopped at any time: started again it goes on with the row that it was in, from its checkpoint, and makes no row
twice. --table prints the table of what is there, and trains nothing. A row takes --epochs epochs at 128 x 64 pixels.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIZE = "128,64"
# Each adds its flags to those of all rows above it.
ROWS: list[tuple[str, list[str]]] = [
    ("reference", []),
    ("16 x 4 images a batch", ["--ids_per_batch=16", "--train_final_batch=true"]),
    ("identity loss", ["-idlw=1"]),
    (
        "BNNeck, its feature at test, cosine distance",
        ["--bnneck=true", "--feature_after_bn=true", "--test_distance=cosine"],
    ),
    ("label smoothing", ["--label_smoothing=0.1"]),
    ("warm-up, cosine schedule, rate 3.5e-4", ["--warmup_epochs=1", "--lr_decay_type=cosine", "--base_lr=3.5e-4"]),
    ("norms and biases not decayed", ["--decay_norms=false"]),
    ("mirror averaging at test", ["--flip_test=true"]),
    ("padded crops", ["--pad_crop=5"]),
    ("random erasing", ["--erase_prob=0.5"]),
    ("last stride 1", ["--last_stride=1"]),
    ("moving average of weights", ["--ema_decay=0.999"]),
    ("soft margin", ["-gm=none"]),
    ("center loss", ["--center_loss_weight=5e-4"]),
    ("generalised mean pooling", ["--pooling=gem"]),
    ("trunk frozen for the first epoch", ["--freeze_trunk_epochs=1"]),
    ("local branch", ["-llw=1"]),
    ("two models, mutual learning", ["--num_models=2", "-pmlw=0.1", "-gdmlw=0.1", "-ldmlw=0.1"]),
]


def flags_of(row: int) -> list[str]:
    """The flags of row `row`, from 1: its own and those of all before it."""
    return [flag for _, flags in ROWS[:row] for flag in flags]


def read_results(path: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """The lines of a results file by row and seed."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(line["row"], line["seed"]): line for line in lines}


def run_row(row: int, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and test one row; returns its line."""
    folder = arguments.folder / f"row{row:02d}_seed{seed}"
    flags = [
        f"--data_path={arguments.data_path}",
        f"--pretrained={arguments.pretrained}",
        f"--resize_h_w={arguments.size}",
        f"--total_epochs={arguments.epochs}",
        f"--exp_decay_at_epoch={arguments.epochs // 2 + 1}",
        f"--seed={seed}",
        *flags_of(row),
    ]
    resume = (folder / "ckpt.pth").is_file()
    command = [str(ROOT / "script" / "train.py"), *flags, f"--exp_dir={folder}", f"--resume={str(resume).lower()}"]
    status = subprocess.run([sys.executable, *command], check=False).returncode
    if status:
        sys.exit(status)  # train.py has said why
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    scores = {name: score for name, score in results.items() if isinstance(score, dict) and "cmc1" in score}
    seconds = {name: results[name] for name in ("train_seconds", "evaluate_seconds")}
    return {"row": row, "name": ROWS[row - 1][0], "seed": seed, "flags": flags[2:], **seconds, "scores": scores}


def table(results: dict[tuple[int, int], dict[str, Any]]) -> str:
    """The rows that there are, as Markdown."""
    lines = [
        "| added to the row above | seed | rank@1 | mAP (step) | re-ranked rank@1 | global + local rank@1 | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (_, seed), line in sorted(results.items()):
        shown = [
            f"{100 * scores[measure]:.2f}" if (scores := line["scores"].get(distance)) else "-"
            for distance, measure in (
                ("global", "cmc1"),
                ("global", "mAP_step"),
                ("global_re_ranked", "cmc1"),
                ("global_local", "cmc1"),
            )
        ]
        lines.append(f"| {line['name']} | {seed} | {' | '.join(shown)} | {line['train_seconds'] / 60:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", help="a prepared data set")
    parser.add_argument("--pretrained", default="imagenet", help="start of the trunk, as of script/train.py")
    parser.add_argument("--folder", type=Path, default=Path("ablation"), help="where the runs' folders are")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "ablation.jsonl")
    parser.add_argument("--rows", default="", help=f"such as 1,4; default: 1 to {len(ROWS)}")
    parser.add_argument("--seeds", default="1", help="such as 1,2")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--size", default=SIZE, help="height,width in pixels")
    parser.add_argument("--table", action="store_true", help="print the table and train nothing")
    arguments = parser.parse_args()
    results = read_results(arguments.results)
    rows = [int(row) for row in arguments.rows.split(",")] if arguments.rows else range(1, len(ROWS) + 1)
    if not arguments.table:
        if not arguments.data_path:
            parser.error("--data_path is needed to train")
        for seed in map(int, arguments.seeds.split(",")):
            for row in rows:
                if (row, seed) not in results:
                    results[row, seed] = run_row(row, seed, arguments)
                    with open(arguments.results, "a", encoding="utf-8") as file:
                        file.write(json.dumps(results[row, seed]) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
