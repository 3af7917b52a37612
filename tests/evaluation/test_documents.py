"""Text to evaluate on: where it may come from, and what is said where it is not text."""

import json

import pytest
from evaluation_models import write_tiny_llama

from longlora_plugin.evaluation.data import check_held_out, read_corpus, read_texts
from longlora_plugin.run.recipe import held_out_data


class OneTokenACharacter:
    """After a start token."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [1, *map(ord, text)]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(chr, ids[1:]))


tokenizer = OneTokenACharacter()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.txt").write_text("a book")
    rows = [{"text": "one", "title": "x"}, {"text": "two"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "ignored.csv").write_text("text\nno")
    return tmp_path


def test_text_file_is_one_document_with_its_start_token(folder):
    corpus = read_corpus(folder / "b.txt", tokenizer)
    assert [document.tolist() for document in corpus.documents] == [[1, *map(ord, "a book")]]


def test_json_lines_file_is_a_document_a_line(folder):
    assert list(read_texts(folder / "a.jsonl")) == ["one", "two"]


def test_folder_is_all_its_text_files_in_order(folder):
    assert list(read_texts(folder)) == ["one", "two", "a book"]


def test_max_tokens_cuts_the_last_document(folder):
    assert read_corpus(folder, tokenizer, max_tokens=6).lengths == [4, 2]
    assert read_corpus(folder, tokenizer, max_tokens=4).lengths == [4]
    assert read_corpus(folder, tokenizer, max_tokens=6).texts == ["one", "t"]


def test_digest_tells_the_same_tokens_in_other_documents_apart(tmp_path):
    (tmp_path / "a.txt").write_text("abcd")
    whole = read_corpus(tmp_path / "a.txt", tokenizer)
    again = read_corpus([tmp_path / "a.txt"], tokenizer)
    assert again.digest == whole.digest
    cut = type(whole)("cut", [whole.documents[0][:2], whole.documents[0][2:]], ["a", "bcd"])
    assert cut.digest != whole.digest


def test_another_tokenizer_reads_the_same_text(folder):
    corpus = read_corpus(folder, tokenizer, max_tokens=6)
    words = corpus.tokenized_by(lambda text, verbose: {"input_ids": [len(text)]})
    assert [tokens.tolist() for tokens in words.documents] == [[3], [1]]
    assert words.texts == corpus.texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"instruction": "x", "output": "y"}', "row 1.*'text'.*instruction, output"),
        ("a.jsonl", '{"text": 5}', "row 1.*no text in field 'text'"),
        ("a.jsonl", '{"text": "x"}\n{"text": 5}', "row 2.*no text in field 'text'"),
        ("a.jsonl", "not json", "a.jsonl cannot be read as json"),
        ("a.jsonl", "[1]", "row 1.*no text in field 'text'"),
        ("a.txt", "", "holds no document"),
    ],
)
def test_wrong_file_is_refused_with_what_it_has(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_corpus(tmp_path / name, tokenizer)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_corpus(tmp_path / "a.txt", tokenizer)


def test_missing_path_and_empty_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no file or folder"):
        read_corpus(tmp_path / "nothing.txt", tokenizer)
    with pytest.raises(ValueError, match=r"holds no \.jsonl"):
        read_corpus(tmp_path, tokenizer)


def test_other_text_field_is_read_when_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "here"}')
    assert list(read_texts(tmp_path / "a.jsonl", text_field="body")) == ["here"]


def test_hugging_face_dataset_uses_its_test_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, name, *, split, streaming):
        asked.append((path, name, split, streaming))
        return [{"text": "first"}, {"text": "second"}]

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *a: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_texts("org/books:long")) == ["first", "second"]
    assert list(read_texts("org/books", split="dev", stream=True)) == ["first", "second"]
    assert asked == [("org/books", "long", "test", False), ("org/books", None, "dev", True)]


def test_unreachable_dataset_is_refused_by_name():
    with pytest.raises(ValueError, match="'nobody/nothing' is no file or folder here"):
        list(read_texts("nobody/nothing"))


def test_recipe_names_its_held_out_data():
    raw = {
        "test_datasets": [
            {"path": "json", "data_files": ["a.jsonl"], "type": "completion", "field": "body"},
            {"path": "folder"},
        ]
    }
    assert held_out_data(raw) == (["a.jsonl", "folder"], "body")
    assert held_out_data(raw, "books.txt") == (["books.txt"], "text")
    with pytest.raises(ValueError, match="Give --data"):
        held_out_data({})


def test_home_folder_is_understood(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert list(read_texts("~/b.txt")) == ["a book"]
    with pytest.raises(ValueError, match="no file or folder ~/nothing"):
        list(read_texts("~/nothing"))


def test_held_out_text_is_refused_before_a_model_loads(folder, tmp_path_factory):
    base = write_tiny_llama(tmp_path_factory.mktemp("check") / "base")
    (folder / "b.txt").write_text("rain fell on the roofs, " * 40)
    check_held_out(folder, 64, str(base))
    check_held_out(folder, 9999, "nobody/nothing")  # no tokenizer, no lengths
    for data, length, message in [
        ("missing.txt", 8, "no file or folder"),
        ("~/missing", 8, "no file or folder"),
        (folder, 9999, r"has 9999 tokens, the longest has \d+; give longer ones"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_held_out(data, length, str(base))
    (folder / "a.jsonl").write_text('{"body": "x"}')
    with pytest.raises(ValueError, match="no text in field 'text'"):
        check_held_out(folder / "a.jsonl", 8, str(base))
    (folder / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="holds no document"):
        check_held_out(folder / "empty.txt", 8, str(base))
