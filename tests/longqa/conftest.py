"""A tokenizer, stories, and the command that builds from them."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from longqa_material import Stub, save_stories, save_tokenizer

from longlora_plugin.cli import longlora


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    return save_stories(tmp_path_factory.mktemp("stories"))


@pytest.fixture
def build(tokenizer, monkeypatch):
    """Function (source, out, *options) → click's result; options may repeat the defaults."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(source: Path, out: Path, *options: str, context: int = 1200):
        arguments = ["longqa", "build", str(source), str(out), "--tokenizer", str(tokenizer)]
        arguments += ["--context", str(context), *(str(option) for option in options)]
        return CliRunner().invoke(longlora, arguments)

    return run


@pytest.fixture(scope="session")
def six_stories(tmp_path_factory):
    return save_stories(tmp_path_factory.mktemp("stories"), 6)


def arguments(tokenizer: Path, stories: Path, out: Path, url: str, *options: object) -> list[str]:
    fixed = ["longqa", "build", stories, out, "--tokenizer", tokenizer, "--context", 1500]
    fixed += ["--base-url", url, "--model", "stub", "--questions", 2, "--answer-tokens", 200]
    return [str(part) for part in (*fixed, "--retries", 1, *options)]


@pytest.fixture
def ask(tokenizer, six_stories, tmp_path, monkeypatch):
    """Function (url, *options, out=…) → click's result."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-stub-0123456789abcdef")
    monkeypatch.setenv("COLUMNS", "300")

    def run(url: str, *options: object, out: Path = tmp_path / "a.jsonl"):
        return CliRunner().invoke(longlora, arguments(tokenizer, six_stories, out, url, *options))

    return run


@pytest.fixture(scope="session")
def whole(tokenizer, six_stories, tmp_path_factory):
    """Rows of an uninterrupted build, and how many requests it took."""
    out = tmp_path_factory.mktemp("whole") / "a.jsonl"
    with Stub() as stub:
        result = CliRunner().invoke(longlora, arguments(tokenizer, six_stories, out, stub.url))
        assert result.exit_code == 0, result.output
        return out.read_bytes(), len(stub.requests)
