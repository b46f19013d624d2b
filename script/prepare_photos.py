"""`aligned-reid prepare photos` of this checkout, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.cli import run_command
from aligned_reid.commands.prepare import photos

if __name__ == "__main__":
    run_command(photos)
