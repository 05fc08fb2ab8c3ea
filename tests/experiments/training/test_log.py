import json

import pytest

from experiments.training.log import FILE, Log, read


def test_lines_are_read_back_and_those_after_a_resumed_step_go(tmp_path):
    log = Log(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, loss=1 / step)
    assert read(tmp_path) == [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    Log(tmp_path, 2).write(3, loss=0.25)
    assert [line["loss"] for line in read(tmp_path)] == [1.0, 0.5, 0.25]


def test_a_last_line_that_was_cut_short_goes_but_no_other_one(tmp_path):
    (tmp_path / FILE).write_text('{"step": 1}\n{"st')
    assert read(tmp_path) == [{"step": 1}]
    (tmp_path / FILE).write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(json.JSONDecodeError):
        read(tmp_path)
