"""Scripts whose output nobody can read, whose start is interrupted, or whose memory is full."""

import io
import os
import signal
import subprocess
import sys

import pytest
import torch

import train_cifar10
from engine import failures, streams
from tests.scripts.commands import QUICK, ROOT, begun, call, command

FAST = [*QUICK, "--epochs=1"]


def run_in_shell(line, *flags):
    """Run train_cifar10.py in a line of sh, where "$@" is the command."""
    words = ["sh", "-c", line, *command("train_cifar10.py", *flags)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


@pytest.mark.exhaustive
def test_a_run_goes_on_without_its_output(tmp_path):
    done = run_in_shell('"$0" "$@" >&- 2>&-', *FAST, f"--save={tmp_path}/run")
    assert done.returncode == 0
    assert (tmp_path / "run" / "evaluation.json").exists()
    assert all(b"Epoch" not in path.read_bytes() for path in (tmp_path / "run").iterdir())


def test_output_that_is_lost_is_said_once():
    done = run_in_shell('"$0" "$@" >/dev/full', "--list_checkpoints")
    assert done.stderr.count("the output cannot be written (No space left on device): going on without it") == 1
    assert done.returncode == 0


def test_closed_streams_get_the_null_device():
    code = "import os, startup; startup.open_streams(); print(os.open('.', os.O_RDONLY), file=open('/dev/stdout', 'w'))"
    done = subprocess.run(
        ["sh", "-c", '"$@" 2>&-', "sh", sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert int(done.stdout) > 2


def test_warnings_of_this_project_are_notes_in_a_script():
    code = """
import startup, warnings
with startup.importing("__main__"):
    pass
warnings.warn_explicit("the gates start untrained", UserWarning, startup.__file__, 1)
warnings.warn_explicit("of another package", UserWarning, "/elsewhere/other.py", 1)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "note: the gates start untrained\n/elsewhere/other.py:1: UserWarning: of another package\n"


def test_ctrl_c_while_importing_is_one_word():
    code = """
import os, signal, sys, startup
with startup.importing("__main__"):
    print("ready", flush=True)
    while True:
        pass
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "stopped\n"
    assert process.returncode == 130


@pytest.mark.parametrize("script", ["train_cifar10", "train_ilsvrc", "eval_cifar10", "eval_ilsvrc", "report"])
def test_scripts_import_within_that_context(script):
    """The first thing that a script imports is small."""
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    first = lines.index("import startup")
    assert lines[first + 2] == "with startup.importing(__name__):"
    assert [line for line in lines[:first] if line.startswith(("import ", "from "))] in (
        [],
        ["from functools import partial"],
        ["import shlex", "import sys"],
    )


@pytest.mark.parametrize(
    "module",
    [
        *("reporting.__main__", "benchmarks.__main__", "tools.make_shards", "tools.add_to_zoo", "tools.time_zoo"),
        "train_cifar10",
    ],
)
def test_programs_import_torch_within_that_context(module):
    """Until then, nothing is imported that takes long enough for anyone to press Ctrl-C."""
    code = (
        "import sys, startup\nstartup.importing = lambda _: sys.exit(print('torch' in sys.modules))\nimport " + module
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_package_that_is_not_installed_is_one_sentence():
    code = "import sys, runpy\nsys.modules['torch'] = None\nsys.argv = ['train_cifar10.py']\n"
    code += "runpy.run_path('train_cifar10.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    sentence = "error: torch is not installed; python3 -m pip install -r requirements.txt installs all packages\n"
    assert (done.returncode, done.stderr) == (1, sentence)


def test_the_pictures_of_an_evaluation_are_imported_when_needed():
    import reporting

    assert reporting.plot is reporting.pictures.plot
    with pytest.raises(AttributeError, match="has no attribute 'plots'"):
        _ = reporting.plots


def test_importing_a_script_changes_no_handler():
    before = signal.getsignal(signal.SIGINT)
    import startup

    with startup.importing("train_cifar10"):
        assert signal.getsignal(signal.SIGINT) is before
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.exhaustive
def test_a_closed_terminal_saves_like_sigterm(tmp_path):
    run = begun(tmp_path / "run", stdout=subprocess.PIPE, text=True)
    run.send_signal(signal.SIGHUP)
    run.send_signal(signal.SIGHUP)  # the kernel's and the shell's
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGHUP
    assert "stopped and saved" in out


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("unable to mmap 4096 bytes from file: Cannot allocate memory (12)"),
        OSError(12, os.strerror(12)),
    ],
)
def test_full_memory_is_a_sentence(error, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(train_cifar10, "main", main)
    code, _, err = call(monkeypatch, capsys, train_cifar10)
    assert code == 1
    assert err == f"error: {failures.explain(error)}\n"
    assert "memory is full: lower --batch_size" in err


def test_what_torch_says_of_full_memory_is_recognised():
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(1 << 46)
    assert "memory is full" in failures.explain(caught.value)


def test_what_the_system_says_of_a_file_is_a_sentence(tmp_path):
    with pytest.raises(OSError, match="log") as caught, open(tmp_path / "gone" / "log.jsonl", "a"):
        pass
    text = failures.explain(caught.value)
    assert text == f"cannot use {tmp_path}/gone/log.jsonl: No such file or directory; check that place, or name another"


def test_mistakes_of_the_program_keep_their_traceback():
    assert failures.explain(RuntimeError("shapes do not match")) is None
    assert failures.explain(KeyError("x")) is None


def test_a_stream_that_fails_is_replaced(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    stream = streams.LastingStream(os.fdopen(writing, "w"))
    for _ in range(3):
        print("nobody reads this", file=stream, flush=True)
    assert stream.writable()
    whole = streams.LastingStream(io.StringIO())
    assert whole.write("a\nb") == 3
    assert whole.getvalue() == "a\nb"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "cp1252"])
def test_names_that_a_stream_cannot_hold_are_written_as_escapes(tmp_path, encoding):
    with open(tmp_path / "out", "w", encoding=encoding) as file:
        print("written: \xe9/\u65e5 \udce9", file=streams.LastingStream(file))
    expected = "written: \xe9/\u65e5 \udce9\n".encode(encoding, "backslashreplace")
    assert (tmp_path / "out").read_bytes() == expected


@pytest.mark.exhaustive
def test_lists_can_be_cut_off():
    done = run_in_shell('"$0" "$@" | head -2', "--list_checkpoints")
    assert done.stdout.startswith("name")
    assert "Traceback" not in done.stderr
