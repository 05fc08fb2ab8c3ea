import pytest

from experiments.accuracy import parallel
from experiments.accuracy.parallel import Job, next_job, run_all
from tests.experiments.accuracy import jobs


def noted(folder) -> dict[str, list[str]]:
    return {path.name: path.read_text().rsplit(" ", 2) for path in folder.iterdir()}


def test_jobs_run_side_by_side(tmp_path):
    names = ("a", "b")
    both = [Job(n, jobs.meet, (str(tmp_path), n, o), 1) for n, o in (names, names[::-1])]
    assert run_all(both, [(), ()], memory=2) == {}


def test_memory_bounds_what_runs_at_once(tmp_path):
    both = [Job(name, jobs.note_time, (str(tmp_path), name, 0.3), 2) for name in ("a", "b")]
    assert run_all(both, [(), ()], memory=3) == {}
    (_, _, end), (_, start, _) = sorted(noted(tmp_path).values(), key=lambda times: times[1])
    assert float(end) <= float(start)


def test_a_job_larger_than_the_memory_runs_alone_and_small_ones_fill_up():
    large, middle, small = (Job(str(size), jobs.fail, (), size) for size in (9, 3, 2))
    assert next_job([large], [], memory=5) is large
    assert next_job([large, small], [middle], memory=5) is small
    assert next_job([large, small], [middle], memory=4) is None
    assert next_job([large, small], [middle], memory=None) is large


def test_a_job_stays_on_its_cores(tmp_path):
    slot = parallel.share_cores(2)[0]
    assert run_all([Job("a", jobs.note_time, (str(tmp_path), "a", 0), 1)], [slot], None) == {}
    if slot:
        assert noted(tmp_path)["a"][0] == str(sorted(slot))


def test_cores_are_dealt_out(monkeypatch):
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: {2, 3, 4, 7, 9}, raising=False)
    assert parallel.share_cores(2) == [(2, 4, 9), (3, 7)]
    assert parallel.usable_cores() == 5
    monkeypatch.delattr(parallel.os, "sched_getaffinity")
    assert parallel.share_cores(2) == [(), ()]


def test_a_failure_is_told_and_stops_no_other(tmp_path, capfd):
    several = [
        Job("expected", jobs.fail, (KeyError("no file"),), 3),
        Job("bug", jobs.fail, (RuntimeError("oh"),), 2),
        Job("killed", jobs.die, (), 2),
        Job("good", jobs.note_time, (str(tmp_path), "good", 0), 1),
    ]
    failures = run_all(several, [()], None, expected=(KeyError,))
    assert failures["expected"] == "'no file'"
    assert failures["bug"].startswith("Traceback")
    assert "out of memory? Try --config.processes=1" in failures["killed"]
    assert set(noted(tmp_path)) == {"good"}
    assert "[expected] failed: 'no file'" in capfd.readouterr().out


@pytest.mark.parametrize(("limit", "expected"), [("max", 4096_000), ("3000000", 2_100_000)])
def test_available_memory_is_that_of_the_machine_or_its_container(
    tmp_path, monkeypatch, limit, expected
):
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:   4000 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 900000\ninactive_file 100000\n")
    monkeypatch.setattr(parallel, "MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(parallel, "CGROUP", tmp_path)
    assert parallel.available_memory() == expected
    monkeypatch.setattr(parallel, "MEMORY_INFO", tmp_path / "nowhere")
    monkeypatch.setattr(parallel, "CGROUP", tmp_path / "nowhere")
    assert parallel.available_memory() is None
