"""Virtual environments and commands, for the scripts that install the package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Which would let an environment see more than what is installed in it.
_OTHERS = ("PYTHONPATH", "VIRTUAL_ENV", "FUSEDCNN_TORCH_DIR", "PIP_CONSTRAINT")


class CommandError(Exception):
    """A command failed; its message has the end of what it said."""


def run(*command: object, cwd: Path, **variables: str) -> str:
    """Output of a command.

    Raises:
        CommandError: it failed.
    """
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k not in _OTHERS} | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if process.returncode:
        end = "\n".join(process.stdout.splitlines()[-60:])
        raise CommandError(f"{' '.join(map(str, command))}\n{end}")
    return process.stdout


class Environment:
    """A virtual environment, made where there is none yet."""

    def __init__(self, folder: Path, *packages: str, **variables: str) -> None:
        self.python = folder / "bin" / "python"
        self.variables = variables
        self.empty = folder / "empty"  # commands run here: nothing is imported by chance
        if not self.python.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        self.empty.mkdir(exist_ok=True)
        if packages:
            self.pip("install", "-q", *packages)

    def run(self, *arguments: object, cwd: Path | None = None) -> str:
        """Output of its Python with these arguments; raises CommandError."""
        return run(self.python, *arguments, cwd=cwd or self.empty, **self.variables)

    def pip(self, *arguments: object) -> str:
        """Output of its pip; raises CommandError."""
        return self.run("-m", "pip", *arguments)

    def torch_version(self) -> str:
        """What `import torch` brings; raises CommandError where it fails."""
        # The last line, as torch may warn first.
        return self.run("-c", "import torch; print(torch.__version__)").split()[-1]
