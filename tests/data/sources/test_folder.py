"""Folders that two processes make at once."""

import pytest

from xtuner_ext.data.sources.folder import is_made, new_folder
from xtuner_ext.errors import UserError


@pytest.mark.parametrize("seed", [0, 1], ids=["same settings", "other settings"])
def test_the_first_complete_folder_stays(tmp_path, seed):
    out = tmp_path / "data"

    def make_both():
        with new_folder(out, {"seed": seed}) as slow:
            (slow / "maker").write_text("slow")
            with new_folder(out, {"seed": 0}) as fast:
                (fast / "maker").write_text("fast")

    if seed == 0:
        make_both()
    else:
        with pytest.raises(UserError, match="was made with"):
            make_both()
    assert (out / "maker").read_text() == "fast" and is_made(out, {"seed": 0}, "maker")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
