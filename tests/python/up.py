"""One `lockstep up` for the tests of this folder, with the binary and the model of random weights that
`tests/run sdk` names in LOCKSTEP and LOCKSTEP_TINY_MODEL. Prompts are token ids of its vocabulary (259), so no
tokenizer is fetched."""

import os
import pathlib
import signal
import subprocess
import time

import pytest

if "LOCKSTEP" not in os.environ:
    pytest.skip("tests/run sets LOCKSTEP", allow_module_level=True)

MODEL = "tests/tiny"
TIMEOUT = 120.0


class Up:
    """One `lockstep up` on a port that it keeps over restarts."""

    def __init__(self, data: pathlib.Path, *arguments: str):
        self.data, self.arguments, self.http = data, arguments, "127.0.0.1:0"
        self.log = data.parent / "up.log"
        self.start()

    def start(self):
        command = [os.environ["LOCKSTEP"], "up", "--http", self.http, "--data-dir", str(self.data)]
        command += ["--model", f"{MODEL}={os.environ['LOCKSTEP_TINY_MODEL']}", "--threads", "2", *self.arguments]
        log = open(self.log, "ab")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        ready = self.process.stdout.readline()
        assert ready.startswith("ready http"), f"{ready!r}; see {log.name}"
        self.url = ready.split()[1]
        self.http = self.url.partition("://")[2]

    def kill(self):
        """At once, and waits until its parts have died with it: they hold the data directory."""
        self.process.kill()
        self.process.wait()
        deadline = time.monotonic() + 60
        while self.parts() and time.monotonic() < deadline:
            time.sleep(0.05)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, "it ends cleanly"

    def parts(self) -> dict:
        """Process ids of the parts that run on this data directory, by subcommand."""
        parts = {}
        for entry in pathlib.Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(self.data).encode() in words:
                parts[words[1].decode()] = int(entry.name)
        return parts
