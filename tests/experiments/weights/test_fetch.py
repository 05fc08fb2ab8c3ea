"""No test here leaves the machine but the one marked `network`."""

import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from experiments.weights import fetch


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXQUANT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def cached_wheel(cache: Path, files: dict[str, bytes]) -> fetch.Package:
    contents = io.BytesIO()
    with zipfile.ZipFile(contents, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    return in_cache(cache, "thing-1.0-py3-none-any.whl", contents.getvalue())


def in_cache(cache: Path, archive: str, contents: bytes) -> fetch.Package:
    (cache / archive).write_bytes(contents)
    digest = hashlib.sha256(contents).hexdigest()
    return fetch.Package("pypi", "thing", "1.0", archive, digest)


def test_extract_takes_only_what_matches(cache):
    package = cached_wheel(cache, {"a/b.pth": b"weights", "a/setup.py": b"code"})
    (path,) = fetch.extract(package, ("a/*.pth",))
    assert path.read_bytes() == b"weights"
    assert [p.name for p in (cache / "thing-1.0").rglob("*") if p.is_file()] == ["b.pth"]


def test_extract_reads_tarballs_and_skips_links(cache):
    contents = io.BytesIO()
    with tarfile.open(fileobj=contents, mode="w:gz") as tarball:
        member = tarfile.TarInfo("package/model.json")
        member.size = 2
        tarball.addfile(member, io.BytesIO(b"{}"))
        link = tarfile.TarInfo("package/link.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tarball.addfile(link)
    package = in_cache(cache, "thing-1.0.tgz", contents.getvalue())
    assert [path.name for path in fetch.extract(package, ("package/*",))] == ["model.json"]


@pytest.mark.parametrize(
    "name", ["../evil.pth", "/evil.pth", "a/../../evil.pth", "a\\..\\evil.pth"]
)
def test_a_path_out_of_the_folder_is_refused(cache, name):
    package = cached_wheel(cache, {name: b"evil"})
    with pytest.raises(fetch.FetchError, match="leads out of its folder"):
        fetch.extract(package, ("*evil.pth",))
    assert not list(cache.parent.rglob("evil.pth"))


def test_a_pattern_without_a_match_is_an_error(cache):
    package = cached_wheel(cache, {"a/b.pth": b"weights"})
    with pytest.raises(fetch.FetchError, match=r"no file matches \*\.bin"):
        fetch.extract(package, ("*.bin",))


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    def offline(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "no route to host")

    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(fetch.FetchError, match=r"is there a network(.|\n)*pip download") as error:
        fetch.fetch(fetch.FOOLBOX)
    assert "no route to host" in str(error.value)
    assert fetch.FOOLBOX.archive in str(error.value)


def test_without_the_client_the_error_names_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(fetch.FetchError, match="`npm` is not installed"):
        fetch.fetch(fetch.CIFAR10)


def test_another_checksum_is_refused(cache, monkeypatch):
    def replaced(command, cwd, **_):
        (cwd / fetch.FOOLBOX.archive).write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", replaced)
    with pytest.raises(fetch.FetchError, match=r"sha256 .* is not used|was replaced"):
        fetch.fetch(fetch.FOOLBOX)
    assert not list(cache.iterdir())


@pytest.mark.network
def test_a_package_is_downloaded_once(monkeypatch):
    archive = fetch.fetch(fetch.FOOLBOX)
    monkeypatch.setenv("PATH", "")
    assert fetch.fetch(fetch.FOOLBOX) == archive
    assert len(fetch.extract(fetch.FOOLBOX, ("foolbox/data/imagenet_*.jpg",))) == 20
