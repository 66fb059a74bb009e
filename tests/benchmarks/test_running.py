"""Tools that go wrong are told of and stop nobody."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import environments, own, plots, report, results, running
from benchmarks.cases import CASES
from benchmarks.results import CaseResult, ToolResult
from benchmarks.running import Settings
from benchmarks.tools import CannotRun, Command, Job, Tool


def scripted(name: str, code: str) -> Tool:
    """A tool that runs some Python with `job` fields filled in."""

    def command(job: Job) -> Command:
        words = [
            str(job.python),
            "-c",
            code,
            str(job.output),
            *(str(job.models[role]) for role in job.case.merge.roles),
        ]
        return Command(tuple(words), note="a tool for tests")

    return Tool(name, name, command, packages=())


COPY = "import shutil, sys; shutil.copy(sys.argv[2], sys.argv[1] + '/merged.safetensors')"


def measured(tools: list[Tool], made: Path, place: Path, **changes: object) -> CaseResult:
    settings = Settings(made, runs=1, quick=True, cold=False, limits=False, results=place)
    settings = dataclasses.replace(settings, **changes)  # type: ignore[arg-type]
    return running.CaseRunner(CASES["one-tensor"], tools, settings, lambda text: None).run()


def test_a_fast_wrong_answer_is_shown_as_wrong(made, tmp_path):
    result = measured([scripted("copier", COPY)], made, tmp_path)
    (tool,) = result.tools
    assert tool.check is not None
    assert not tool.check.ok
    assert "wrong numbers in 1 of 1" in tool.check.text
    assert "**wrong**" in report.case_section(result, tmp_path)
    assert plots.label(tool) == "copier (wrong output)"


@pytest.mark.parametrize(("asked", "allowed", "rounds"), [(5, 3, 3), (1, 3, 1), (6, None, 6)])
def test_a_case_of_hours_has_fewer_rounds(made, tmp_path, asked, allowed, rounds):
    settings = Settings(made, runs=asked, quick=True, cold=False, limits=False, results=tmp_path)
    case = dataclasses.replace(CASES["one-tensor"], rounds=allowed)
    result = running.CaseRunner(case, [scripted("copier", COPY)], settings, lambda text: None).run()
    assert [len(tool.warm) for tool in result.tools] == [rounds]


def test_failures_are_told_and_do_not_stop_others(made, tmp_path):
    crash = scripted("crasher", "raise SystemExit('no such model')")
    slow = scripted("sleeper", "import time; time.sleep(60)")
    garbage = scripted("liar", "import sys; open(sys.argv[1] + '/merged.safetensors', 'w').write('nothing')")
    nothing = scripted("idler", "pass")
    tools = [crash, slow, garbage, nothing, own.STREAMMERGE]
    result = measured(tools, made, tmp_path, runs=2, timeout=8.0)
    found = {tool.name: tool for tool in result.tools}
    assert found["crasher"].failure == "failed: no such model"
    assert len(found["crasher"].warm) == 1
    assert (made / "logs" / "one-tensor-crasher.log").read_text().strip() == "no such model"
    assert found["sleeper"].failure == "stopped after 8 s"
    assert found["liar"].check is not None
    assert found["liar"].check.text.startswith("can't be read")
    assert found["idler"].check is not None
    assert found["idler"].check.text == "no output"
    assert len(found["streammerge"].good()) == 2
    text = report.case_section(results.load(tmp_path / "one-tensor.json"), tmp_path)
    assert "no such model" in text
    for log in (made / "logs").iterdir():
        log.unlink()
    (made / "logs").rmdir()


def test_what_a_tool_cannot_do_is_a_reason(made, tmp_path):
    def refuse(job: Job) -> Command:
        raise CannotRun("it knows no tensors")

    result = measured([Tool("refuser", "the refuser", refuse)], made, tmp_path)
    assert result.tools[0].skipped == "it knows no tensors"
    assert "- the refuser: not run: it knows no tensors" in report.case_section(result, tmp_path)


def test_a_tool_whose_environment_cannot_be_made_is_a_reason(made, tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "PEERS_FOLDER", tmp_path)
    tool = dataclasses.replace(scripted("peer", COPY), requirements="peer.txt")
    with pytest.raises(CannotRun, match=r"peer\.txt, are missing"):
        environments.python_of(tool, tmp_path)
    (tmp_path / "peer.txt").write_text("--no-index\nno-such-package-anywhere==1.0\n")
    with pytest.raises(CannotRun, match="not installed"):
        environments.python_of(tool, tmp_path, install=False)
    with pytest.raises(CannotRun, match=r"could not be made \(ERROR: .*no-such-package-anywhere.*log: "):
        environments.python_of(tool, tmp_path)
    monkeypatch.setattr("benchmarks.environments.subprocess.run", None)  # it is not tried again
    with pytest.raises(CannotRun, match="could not be made"):
        environments.python_of(tool, tmp_path)
    environments.forget_failures(tmp_path)
    assert not list((tmp_path / "environments").glob("*.failed"))


def test_versions_are_those_of_the_environment():
    found = environments.versions(Path(sys.executable), ["torch", "no-such-package"])
    assert found == {"torch": torch.__version__}


def test_too_small_a_disk_is_a_reason(made, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    result = measured([own.STREAMMERGE], made, tmp_path)
    assert "are free" in result.skipped
    assert "Skipped: it takes" in report.case_section(result, tmp_path)


def test_the_budget_ends_the_runs_of_slow_tools(made):
    one = running.Contestant(scripted("x", ""), Path(sys.executable), ToolResult("x", "x"))
    assert one.may_run("warm", 0.0)
    one.used["warm"], one.last["warm"] = 60.0, 30.0
    assert one.may_run("warm", 90.0)
    assert not one.may_run("warm", 89.0)
    assert one.may_run("cold", 1.0)
