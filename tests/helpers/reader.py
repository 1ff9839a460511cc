"""Types what pages say. A line of input is JSON, [kind, text]; one of output the exit code and what was printed. Each
has a child process: `steph` costs no start of Python. All have one core: no worker processes import it all again."""

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile

from steph.cli import app


def carry_out(kind: str, text: str, output: int) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    if kind == "python":
        exec(compile(text, "page", "exec"), {"__name__": "__main__"})
    elif kind == "steph":  # words as the shell makes them
        words = subprocess.run(["bash", "-c", f"printf '%s\\0' {text}"], stdout=-1, check=True).stdout
        app(words.decode().split("\0")[1:-1])
    else:
        sys.exit(subprocess.run(["bash", "-eu", "-o", "pipefail", "-c", text]).returncode)


if __name__ == "__main__":  # a worker process imports this file too
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(sys.argv[1]) % len(cores)]})
    for module in ("analysis.cost.planning", "book.doctor", "book.notebooks", "deploy.export", "deploy.report"):
        importlib.import_module(f"steph.{module}")
    for line in sys.stdin:
        with tempfile.TemporaryFile() as output:
            child = multiprocessing.get_context("fork").Process(
                target=carry_out, args=[*json.loads(line), output.fileno()]
            )
            child.start()
            child.join()
            output.seek(0)
            print(json.dumps([child.exitcode, output.read().decode()]), flush=True)
