"""Packages that look uninstalled, for tests of what needs them and what does not."""

_HIDE = """
import sys

class _Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(_Hiding, sys.meta_path)
"""


def without(*packages: str) -> str:
    """Python source for the head of a script: from there on no finder knows `packages`, however they are installed."""
    return f"ABSENT = {set(packages)!r}{_HIDE}"
