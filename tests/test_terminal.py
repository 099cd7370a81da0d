"""What is printed is plain text where it is piped, and has style where somebody looks: tried on a real terminal."""

import os
import pty
import re
import subprocess
import sys

import pytest

PRINTS = {
    "styled": "print_styled(('step', 'bold'), ' ', ('run', 'yellow'), ' ([red] is no style)', stderr=True)",
    "table": "print_table(['name', 'count'], [['[bold]ä', 1], ['日本', 22]])",
    "progress": "from pipeline.progress import Progress, Reporter\n"
    "with Progress(Reporter('step'), 3, 'images') as bar:\n"
    "    bar.advance(1)\n"
    "    bar._reporter.warn('[a] warning')\n"
    "    bar.advance(2)",
}
EXPECTED = {
    "styled": "step run ([red] is no style)\n",
    "table": "name     count\n[bold]ä  1\n日本     22\n",
    "progress": "step warning: [a] warning\n",
}
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def program(what: str) -> list[str]:
    return [sys.executable, "-c", f"from pipeline.terminal import print_styled, print_table\n{PRINTS[what]}"]


def on_a_terminal(what: str) -> str:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80"}
    child = subprocess.Popen(program(what), stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # EIO: the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert child.wait() == 0, written.decode()
    return written.decode()


@pytest.mark.parametrize("what", PRINTS)
def test_piped_it_is_plain(what: str) -> None:
    done = subprocess.run(program(what), capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == EXPECTED[what]


@pytest.mark.parametrize("what", PRINTS)
def test_on_a_terminal_it_has_style_and_the_same_words(what: str) -> None:
    written = on_a_terminal(what)
    assert "\x1b[1m" in written or "\x1b[1;" in written  # bold
    words = CONTROL.sub("", written).split()
    for word in EXPECTED[what].split():
        assert word in words


def test_no_style_library_is_loaded_where_output_is_piped() -> None:
    loaded = "\nimport sys\nsys.exit('rich.console' in sys.modules)"
    for what in ("styled", "table"):
        *python, code = program(what)
        assert subprocess.run([*python, code + loaded], capture_output=True, check=False).returncode == 0
