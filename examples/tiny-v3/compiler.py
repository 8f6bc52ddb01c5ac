"""C functions, translated by the machine's own compiler when first asked: PyTorch wheels bring none, and remote code is Python."""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)


@functools.cache
def compiled(source: str, *flags: str) -> ctypes.CDLL | None:
    """The functions of `source`; `None`, said once, where there is no compiler or what it made cannot be loaded."""
    problem = "no C compiler was found"
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or list(filter(shutil.which, ("cc", "gcc", "clang")))[:1]
    except ValueError as error:
        compiler, problem = [], f"CC cannot be read: {error}"
    for options in (["-march=native", "-fopenmp"], ["-fopenmp"], []) if compiler else ():  # the last: one thread
        try:
            with tempfile.TemporaryDirectory(prefix="modeling_deepseek_") as folder:
                Path(folder, "kernels.c").write_text(source, encoding="utf-8")
                files = ["kernels.c", "-o", "kernels.so", "-lm"]
                command = [*compiler, "-O3", "-fPIC", "-shared", *options, *flags, *files]
                subprocess.run(command, cwd=folder, check=True, capture_output=True, errors="replace", timeout=120)
                return ctypes.CDLL(str(Path(folder, "kernels.so")))
        except (OSError, subprocess.SubprocessError) as error:
            problem = str(getattr(error, "stderr", None) or error).strip()
    logger.warning_once(
        "Few new tokens meet the cache and weights by PyTorch's own operations, which take up to ten times as long as the C "
        f"kernels, for which {problem}. Install a C compiler (or name it in CC)."
    )
    return None
