import pytest

from experiments.files import replacing, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    write_text(path, "old\n")

    def fail():
        with replacing(path) as file:
            file.write("new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert path.read_text() == "old\n"
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]
