"""Checks what `python -m build` made: the wheel, built from the source distribution, has the package
only; the source distribution has every file of the checkout and no other file of this machine.

    python packaging/check_dists.py DIRECTORY
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOOKS = "provider_proxy/host/vtpm/hooks/"  # installed as commands, not as a part of the package
MAX_BYTES = 5_000_000  # of either; a wheel has some 150 kB


def main() -> int:
    """Check; an AssertionError says what is wrong."""
    folder = Path(sys.argv[1])
    (wheel,) = folder.glob("provider_proxy-*.whl")
    (source,) = folder.glob("provider_proxy-*.tar.gz")
    assert wheel.stat().st_size < MAX_BYTES
    assert source.stat().st_size < MAX_BYTES
    checkout = files_of_checkout()
    package = {
        name: data
        for name, data in checkout.items()
        if name.startswith("provider_proxy/") and not name.startswith(HOOKS)
    }
    check_wheel(wheel, package)
    check_source(source, checkout)
    print(f"{wheel.name}: {len(package)} files; {source.name}: {len(checkout)} files")
    return 0


def files_of_checkout() -> dict[str, bytes]:
    """The files that git knows; without git, the files of the package."""
    done = subprocess.run(
        ["git", "ls-files", "-z"],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    names = [name for name in done.stdout.decode().split("\0") if name]
    if done.returncode or not names:
        found = (ROOT / "provider_proxy").rglob("*")
        names = [str(p.relative_to(ROOT)) for p in found if p.is_file() and p.suffix != ".pyc"]
    return {name: (ROOT / name).read_bytes() for name in names if (ROOT / name).is_file()}


def check_wheel(path: Path, package: dict[str, bytes]) -> None:
    """The package, byte by byte, its metadata and the hooks."""
    with zipfile.ZipFile(path) as wheel:
        held = {name: wheel.read(name) for name in wheel.namelist()}
    rest = {name for name in held if name not in package}
    ends = (".dist-info", ".data")  # metadata, and the hooks
    assert all(name.split("/")[0].endswith(ends) for name in rest), sorted(rest)
    missing = {name for name, data in package.items() if held.get(name) != data}
    assert not missing, sorted(missing)


def check_source(path: Path, checkout: dict[str, bytes]) -> None:
    """Every file of the checkout, byte by byte, and setuptools' own."""
    with tarfile.open(path) as archive:
        held = {}
        for member in archive.getmembers():
            assert member.isfile() or member.isdir(), member.name
            assert ".." not in Path(member.name).parts
            if (file := archive.extractfile(member)) is not None:
                held[member.name.partition("/")[2]] = file.read()
    own = {"PKG-INFO", "setup.cfg"}
    rest = {name for name in held if name not in checkout and name not in own}
    assert all(name.startswith("provider_proxy.egg-info/") for name in rest), sorted(rest)
    missing = {name for name, data in checkout.items() if held.get(name) != data}
    assert not missing, sorted(missing)


if __name__ == "__main__":
    sys.exit(main())
