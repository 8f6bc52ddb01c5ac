"""What C functions need of a machine, and what is said where it is missing."""

import pytest

from modeling_deepseek import compiler

SOURCE = "int answer(void) { return ANSWER; }"


@pytest.fixture
def warned(monkeypatch):
    found = []
    monkeypatch.setattr(compiler.logger, "warning_once", found.append)
    return found


def translate(source: str = SOURCE, *flags: str):
    return compiler.compiled.__wrapped__(source, *flags)


def test_functions_are_translated_with_flags(warned):
    assert translate(SOURCE, "-DANSWER=42").answer() == 42
    assert not warned


def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch, warned):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert translate() is None
    assert len(warned) == 1 and "no-such-compiler" in warned[0] and "CC" in warned[0]
    monkeypatch.delenv("CC")
    monkeypatch.setattr(compiler.shutil, "which", lambda _: None)
    assert translate() is None
    assert "no C compiler was found" in warned[1]


def test_a_name_that_cannot_be_read_is_shown(monkeypatch, warned):
    monkeypatch.setenv("CC", "gcc 'x")
    assert translate() is None
    assert "No closing quotation" in warned[0]


def test_what_cannot_be_translated_is_shown(warned):
    assert translate("this is no C") is None
    assert "error" in warned[0]


def test_the_compiler_may_be_named_with_its_options(monkeypatch):
    monkeypatch.setenv("CC", "cc -O1 -DUNUSED='two words'")
    asked, run = [], compiler.subprocess.run
    monkeypatch.setattr(
        compiler.subprocess, "run", lambda command, **kwargs: asked.append(command) or run(command, **kwargs)
    )
    assert translate(SOURCE, "-DANSWER=1").answer() == 1
    assert asked[0][:3] == ["cc", "-O1", "-DUNUSED=two words"]


def test_without_a_place_for_temporary_files_it_goes_on(monkeypatch, warned):
    def full(**_):
        raise OSError("No space left on device")

    monkeypatch.setattr(compiler.tempfile, "TemporaryDirectory", full)
    assert translate() is None
    assert "space left" in warned[0]
