"""What processes cost is told rightly: time, memory, bytes, endings, children."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from streammerge.tools.bench import launcher
from streammerge.tools.bench.measuring import (
    HAS_ACCOUNTS,
    Measured,
    Sample,
    Surroundings,
    _Curve,
    _Portable,
    end,
    import_torch_rss,
    measure,
    thinned,
)

MB = 1_000_000
linux = pytest.mark.skipif(sys.platform != "linux", reason="figures that only Linux tells")


def run(code: str, around: Surroundings | None = None) -> Measured:
    return measure([sys.executable, "-c", code], around or Surroundings())


def test_time_is_the_process_and_not_the_measuring():
    measured = run("import time; time.sleep(0.3)")
    assert measured.ok
    assert measured.wall >= 0.3
    assert measured.cpu < measured.wall


def test_cpu_time_counts_children():
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    measured = run(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])")
    assert measured.cpu >= 0.3


@pytest.mark.parametrize("megabytes", [50, 150])
def test_peak_memory_is_what_was_taken(megabytes):
    empty = run("import time; time.sleep(0.1)")
    measured = run(f"x = bytearray({megabytes} * 1000 * 1000); import time; time.sleep(0.15)")
    assert 0.9 * megabytes * MB < measured.peak_rss - empty.peak_rss < 1.2 * megabytes * MB
    if sys.platform != "darwin":
        assert measured.peak_anonymous - empty.peak_anonymous > 0.9 * megabytes * MB


@linux
def test_a_peak_between_two_looks_is_seen():
    measured = run("x = b'x' * 60_000_000; del x")
    assert measured.peak_rss > 60 * MB


def test_the_peak_of_whoever_measures_is_not_inherited():
    ours = bytearray(200 * MB)
    assert run("pass").peak_rss < 100 * MB
    assert len(ours) == 200 * MB


def test_memory_of_children_counts():
    hold = "x = bytearray(80_000_000); import time; time.sleep(0.4)"
    measured = run(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])")
    assert measured.peak_rss > 80 * MB


@linux
def test_memory_of_several_children_adds_up():
    hold = "x = bytearray(60_000_000); import time; time.sleep(0.6)"
    code = f"import subprocess, sys; two = [subprocess.Popen([sys.executable, '-c', {hold!r}]) for _ in range(2)]"
    measured = run(f"{code}\nfor one in two: one.wait()")
    assert measured.peak_rss > 120 * MB


@linux
def test_memory_that_a_forked_child_shares_counts_once():
    program = "import os, time; held = b'x' * 100_000_000; os.fork() or time.sleep(0.4); time.sleep(0.2)"
    taken = [sample.resident for sample in run(program).curve if sample.resident > 100 * MB]
    assert taken
    assert statistics.median(taken) < 150 * MB  # a sample that is taken while one ends may count some of it for both


@linux
def test_bytes_read_and_written_are_counted(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(os.urandom(5 * MB))
    copy = f"data = open({str(source)!r}, 'rb').read(); open({str(target)!r}, 'wb').write(data + data)"
    plain, measured = run("pass"), run(copy)
    assert 4.9 * MB <= measured.called_read - plain.called_read < 5.5 * MB  # starting reads more or less
    assert 10 * MB <= measured.called_written - plain.called_written < 10.5 * MB


@linux
def test_bytes_of_children_are_counted(tmp_path):
    write = f"open({str(tmp_path / 'out')!r}, 'wb').write(bytes(3_000_000))"
    measured = run(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {write!r}])")
    assert measured.called_written >= 3 * MB


def test_the_curve_rises_with_memory():
    curve = run("import time; time.sleep(0.2); x = bytearray(100_000_000); time.sleep(0.3)").curve
    assert [one.seconds for one in curve] == sorted(one.seconds for one in curve)
    assert max(one.resident for one in curve) > curve[0].resident + 80 * MB


@pytest.mark.parametrize(("code", "ending", "exit_code"), [("raise SystemExit(3)", "failed", 3), ("pass", "done", 0)])
def test_endings(code, ending, exit_code):
    measured = run(code)
    assert (measured.ending, measured.exit_code) == (ending, exit_code)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_process_is_told_from_a_failed_one():
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").ending == "killed"
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGTERM)").ending == "failed"


@pytest.mark.skipif(not HAS_ACCOUNTS, reason="without the launcher, Popen raises")
def test_a_program_that_is_not_there_fails_with_its_name_in_the_log(tmp_path):
    measured = measure(["no-such-program"], Surroundings(log=tmp_path / "log"))
    assert (measured.ending, measured.exit_code) == ("failed", 127)
    assert "no-such-program" in (tmp_path / "log").read_text()


def test_a_process_is_stopped_with_its_children_when_its_time_is_up(tmp_path):
    told = tmp_path / "pid"
    child = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run(code, Surroundings(timeout=1.5)).ending == "timeout"
    pid = int(told.read_text())
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail("the child still runs")


def test_surroundings_are_those_asked_for(tmp_path):
    log = tmp_path / "log"
    around = Surroundings(folder=tmp_path, environment={"COLOUR": "blue"}, log=log)
    run("import os, sys; print(os.getcwd(), os.environ['COLOUR']); print('also', file=sys.stderr)", around)
    assert sorted(log.read_text().split()) == sorted([str(tmp_path.resolve()), "blue", "also"])


def test_import_torch_is_the_base_line():
    assert 100 * MB < import_torch_rss() < 2000 * MB


def test_the_portable_way_sees_the_same_memory():
    words = [sys.executable, "-c", "x = bytearray(90_000_000); import time; time.sleep(30)"]
    process = subprocess.Popen(["sh", "-c", 'exec "$@" & wait', "sh", *words] if HAS_ACCOUNTS else words)
    try:
        curve = _Curve()
        look = _Portable(process.pid)
        deadline = time.monotonic() + 10
        while curve.peak_rss < 90 * MB and time.monotonic() < deadline:
            look.into(curve, 0.0)
            time.sleep(0.02)
        assert 90 * MB < curve.peak_rss < 150 * MB
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        end(process)


def test_thinning_keeps_peaks_and_order():
    samples = [Sample(float(i), 1000 if i == 777 else i % 7, 0) for i in range(5000)]
    thin = thinned(samples, 100)
    assert len(thin) == 100
    assert max(one.resident for one in thin) == 1000
    assert [one.seconds for one in thin] == sorted(one.seconds for one in thin)
    assert thinned(samples[:50], 100) == samples[:50]


@pytest.mark.skipif(not HAS_ACCOUNTS, reason="the launcher forks")
def test_the_launcher_needs_no_installation(tmp_path):
    result = tmp_path / "result.json"
    words = [
        sys.executable,
        "-I",
        "-S",
        launcher.__file__,
        str(result),
        "",
        sys.executable,
        "-c",
        "raise SystemExit(5)",
    ]
    subprocess.run(words, check=True, cwd=tmp_path)
    costs = json.loads(Path(result).read_text())
    assert costs["exit_code"] == 5
    assert costs["wall"] > 0
    assert costs["peak_rss"] > MB
