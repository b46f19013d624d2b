"""Files that are written whole or not at all."""

import pytest
from conftest import full_disk

from aligned_reid.files import replacing


def test_an_error_while_writing_names_the_file_and_keeps_the_former_one(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("former")
    with pytest.raises(OSError, match="results.json"), replacing(path):
        full_disk()
    assert path.read_text() == "former" and list(tmp_path.iterdir()) == [path]
