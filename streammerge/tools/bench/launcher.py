"""Starts a program and tells what it cost, by the system's own accounts: run as a script, by its path.

    python -I -S launcher.py RESULT GROUP PROGRAM WORDS...

It is a process of its own, and a small one, because a child inherits its parent's peak of resident memory, and because
the system hands the accounts of a process to its parent alone. It imports nothing that needs an installation. GROUP is
the folder of a control group that the program is to enter, or "".
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    """Run the program, wait for it, write what it cost to RESULT as JSON."""
    result, group, *words = sys.argv[1:]
    before = io_counters()
    started = time.perf_counter()
    child = os.fork()
    if not child:
        become(group, words)
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - started
    after = io_counters()
    costs = {
        "exit_code": os.waitstatus_to_exitcode(status),
        "wall": seconds,
        "user": usage.ru_utime,
        "system": usage.ru_stime,
        "peak_rss": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "major_faults": usage.ru_majflt,
        "io": {name: after[name] - before[name] for name in after},
    }
    with open(result, "w", encoding="ascii") as file:  # noqa: PTH123  (pathlib takes memory, which counts here)
        json.dump(costs, file)


def become(group: str, words: list[str]) -> None:
    """Enter the control group and turn into the program; exit code 127 where there is no such program.

    Should memory run out, it is the first to go, rather than whoever measures it.
    """
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:  # noqa: PTH123
            score.write("1000")
    except OSError:
        pass  # not Linux
    try:
        if group:
            with open(f"{group}/cgroup.procs", "w", encoding="ascii") as members:  # noqa: PTH123
                members.write("0")
        os.execvp(words[0], words)
    except OSError as error:
        os.write(2, f"{words[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def io_counters() -> dict[str, int]:
    """Bytes that this process and all children it has waited for have read and written; {} where nobody counts."""
    try:
        with open("/proc/self/io", encoding="ascii") as lines:  # noqa: PTH123
            return {name: int(value) for name, _, value in (line.partition(":") for line in lines)}
    except OSError:
        return {}


if __name__ == "__main__":
    main()
