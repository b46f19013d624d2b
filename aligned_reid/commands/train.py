"""`aligned-reid train`: train AlignedReID and evaluate it, or only evaluate with --only_test true."""

from aligned_reid.config import Config


def main() -> None:
    config = Config.from_arguments()
    from aligned_reid.run import run  # importing torch takes seconds; a mistyped flag is reported before

    run(config)
