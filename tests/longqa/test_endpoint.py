"""`longqa build` with a model: a stub server that answers well, badly, late, or not at all."""

from __future__ import annotations

import json
import logging
import socket

import pytest
from longqa_material import (
    Stub,
    answer_well,
    completion,
    error_answer,
    good_pairs,
    rows,
)

from longlora_plugin.longqa.journal import provenance_path

for package in ("openai", "sentencex", "datasketch"):
    pytest.importorskip(package)

KEY = "sk-stub-0123456789abcdef"
REQUEST = 1100  # tokens that the stub reports for one


def test_pairs_of_a_model_become_rows_with_their_evidence_in_the_record(ask, whole, tmp_path):
    with Stub() as stub:
        result = ask(stub.url, "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.jsonl").read_bytes() == whole[0]
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["pairs"]["train"] == len(rows(tmp_path / "a.jsonl")) == 2 * whole[1]
    assert report["tokens"] == [1000 * whole[1], 100 * whole[1]]
    form = stub.requests[0]["response_format"]
    assert form["type"] == "json_schema"
    assert form["json_schema"]["strict"] is True
    assert {request["model"] for request in stub.requests} == {"stub"}
    for row in rows(tmp_path / "a.jsonl"):
        assert row["output"].removeprefix("It tells this: ") in row["instruction"]


def test_the_file_does_not_depend_on_how_many_requests_run_at_once(ask, whole, tmp_path):
    with Stub(delay=0.03) as stub:
        assert ask(stub.url, "--concurrency", 5).exit_code == 0
    assert 2 <= stub.most_at_once <= 5
    assert (tmp_path / "a.jsonl").read_bytes() == whole[0]


def test_the_key_goes_to_the_server_and_nowhere_else(ask, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    talk = [
        error_answer(500, f"I failed; your key is {KEY}"),
        lambda request, number: (
            200,
            "application/json",
            completion(json.dumps({"pairs": good_pairs(request)}).replace("It tells", KEY)),
        ),
        error_answer(401, f"Incorrect API key provided: {KEY}"),
    ]
    output = ""
    with Stub(lambda request, number: talk[min(number, 2)](request, number)) as stub:
        for _ in range(3):
            output += ask(stub.url, "--concurrency", 1, "--retries", 0).output
    assert set(stub.keys) == {f"Bearer {KEY}"}
    assert "HTTP 401" in output
    everything = (
        output
        + caplog.text
        + "".join(p.read_bytes().decode("utf-8", "replace") for p in tmp_path.iterdir())
    )
    assert KEY not in everything
    assert "***" in everything


@pytest.mark.parametrize("url", ["http://user:hunter2@localhost/v1", "localhost:8000", "ftp://x/"])
def test_a_wrong_address_is_a_usage_error(ask, url):
    result = ask(url)
    assert result.exit_code == 2
    assert "hunter2" not in result.output
    assert "--base-url" in result.output


@pytest.mark.parametrize(
    ("status", "says"),
    [(401, "refuses the key (HTTP 401)"), (403, "HTTP 403"), (404, "does not know the model")],
)
def test_a_refusal_stops_at_once_with_4(ask, tmp_path, status, says):
    with Stub(error_answer(status, "no")) as stub:
        result = ask(stub.url, "--concurrency", 1)
    assert result.exit_code == 4
    assert says in result.output
    assert len(stub.requests) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_error_is_tried_again(ask, whole, tmp_path, status):
    bad = error_answer(status, "busy")
    with Stub(lambda request, n: (bad if n % 2 == 0 else answer_well)(request, n)) as stub:
        assert ask(stub.url, "--concurrency", 1).exit_code == 0
    assert len(stub.requests) == 2 * whole[1]
    assert (tmp_path / "a.jsonl").read_bytes() == whole[0]


@pytest.mark.parametrize("status", [429, 500])
def test_an_endpoint_that_goes_down_stops_with_4_and_the_next_run_ends_the_set(
    ask, whole, tmp_path, status
):
    bad = error_answer(status, "overloaded")
    with Stub(lambda request, n: (answer_well if n < 4 else bad)(request, n)) as stub:
        result = ask(stub.url, "--concurrency", 1)
    assert result.exit_code == 4
    assert f"5 requests in a row failed, the last one: HTTP {status}: overloaded" in result.output
    assert len(rows(tmp_path / "a.jsonl")) == 8
    with Stub() as stub:
        assert ask(stub.url).exit_code == 0
    assert len(stub.requests) == whole[1] - 4
    assert (tmp_path / "a.jsonl").read_bytes() == whole[0]


def test_one_failed_request_makes_the_build_incomplete_with_3(ask, whole, tmp_path):
    bad = error_answer(500, "this one never")
    with Stub(lambda request, n: (bad if 2 <= n < 4 else answer_well)(request, n)) as stub:
        result = ask(stub.url, "--concurrency", 1)
    assert result.exit_code == 3
    assert "1 requests failed: HTTP 500: this one never" in result.output
    with Stub() as stub:
        assert ask(stub.url).exit_code == 0
    assert len(stub.requests) == 1
    found = (tmp_path / "a.jsonl").read_bytes()
    assert sorted(found.splitlines()) == sorted(whole[0].splitlines())


def test_a_server_that_is_too_slow_is_given_up(ask, tmp_path):
    with Stub(delay=1.0) as stub:
        result = ask(stub.url, "--timeout", 0.1, "--retries", 0, "--json", tmp_path / "r.json")
    assert result.exit_code == 4
    assert "no reply within 0.1 s" in result.output
    # Nobody says whether it was charged, so it counts at its largest.
    assert sum(json.loads((tmp_path / "r.json").read_text())["tokens"]) > 0


def test_a_server_that_is_not_there_says_so(ask):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = ask(f"http://127.0.0.1:{port}/v1", "--retries", 0)
    assert result.exit_code == 4
    assert "cannot be reached" in result.output


def cut_body(request, number):
    return 200, "application/json", completion("{}")[:60]


BAD_REPLIES = {
    "not json": (
        lambda r, n: (200, "application/json", completion("I would rather not.")),
        "not the JSON asked for",
    ),
    "truncated": (
        lambda r, n: (
            200,
            "application/json",
            completion('{"pairs": [{"question": "What is', finish="length"),
        ),
        "raise --answer-tokens",
    ),
    "other json": (
        lambda r, n: (200, "application/json", completion('{"questions": []}')),
        "not the JSON asked for",
    ),
    "wrong types": (
        lambda r, n: (200, "application/json", completion('{"pairs": [{"question": 5}]}')),
        "not the JSON asked for",
    ),
    "cut body": (cut_body, "no valid JSON"),
    "empty": (lambda r, n: (200, "application/json", b""), "no valid JSON"),
    "html": (
        lambda r, n: (200, "text/html", b"<html><body>Welcome to nginx!</body></html>"),
        "not as an OpenAI-compatible server",
    ),
    "no choices": (lambda r, n: (200, "application/json", b'{"hello": 1}'), "not as an OpenAI"),
    "a list": (lambda r, n: (200, "application/json", b"[1, 2]"), "JSON|not as an OpenAI"),
}


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_reply_that_is_something_else_is_asked_again_then_given_up(ask, tmp_path, name):
    answer, says = BAD_REPLIES[name]
    with Stub(answer) as stub:
        result = ask(stub.url, "--concurrency", 1)
    assert result.exit_code == 4, result.output
    assert any(part in result.output for part in says.split("|")), result.output
    assert len(stub.requests) == 15  # five units in a row, three times each
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("name", ["not json", "truncated", "html", "cut body"])
def test_a_second_try_makes_a_bad_reply_good(ask, whole, tmp_path, name):
    bad = BAD_REPLIES[name][0]
    with Stub(lambda request, n: (bad if n % 3 == 0 else answer_well)(request, n)) as stub:
        assert ask(stub.url, "--concurrency", 1).exit_code == 0
    assert (tmp_path / "a.jsonl").read_bytes() == whole[0]


def test_json_in_a_fence_or_after_thoughts_is_taken(ask, whole, tmp_path):
    def answer(request, number):
        inside = json.dumps({"pairs": good_pairs(request)})
        said = f"Let me think.\n```json\n{inside}\n```"
        return 200, "application/json", completion(said)

    with Stub(answer) as stub:
        assert ask(stub.url).exit_code == 0
    assert (tmp_path / "a.jsonl").read_bytes() == whole[0]


def test_options_that_a_server_does_not_know_are_left_out(ask, whole, tmp_path):
    def answer(request, number):
        for word in ("response_format", "seed", "max_tokens"):
            if word in request:
                hint = "; use max_completion_tokens" if word == "max_tokens" else ""
                return error_answer(400, f"Unsupported: {word}{hint}")(request, number)
        return answer_well(request, number)

    with Stub(answer) as stub:
        assert ask(stub.url).exit_code == 0
    assert stub.requests[-1]["max_completion_tokens"] == 400
    assert len(stub.requests) <= whole[1] + 3 * 4
    assert (tmp_path / "a.jsonl").read_bytes() == whole[0]


def test_answers_without_evidence_in_the_document_are_dropped_and_counted(ask, whole, tmp_path):
    def answer(request, number):
        first, second = good_pairs(request)
        first["evidence"].append("This sentence stands nowhere in the document.")
        return 200, "application/json", completion(json.dumps({"pairs": [first, second]}))

    with Stub(answer) as stub:
        assert ask(stub.url, "--json", tmp_path / "r.json").exit_code == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["dropped"] == {"evidence not in the document": whole[1]}
    assert report["pairs"] == {"train": whole[1]}


def test_an_answer_that_does_not_fit_the_context_is_dropped_and_counted(ask, whole, tmp_path):
    def answer(request, number):
        first, second = good_pairs(request)
        first["answer"] = "It goes on and on. " * 300
        return 200, "application/json", completion(json.dumps({"pairs": [first, second]}))

    with Stub(answer) as stub:
        assert ask(stub.url, "--json", tmp_path / "r.json").exit_code == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["dropped"] == {"longer than the context": whole[1]}
    assert report["pairs"] == {"train": whole[1]}


def test_evidence_with_a_slip_is_kept_where_edits_are_allowed(ask, whole, tmp_path):
    pytest.importorskip("rapidfuzz")

    def answer(request, number):
        pairs = good_pairs(request)
        pairs[0]["evidence"] = [pairs[0]["evidence"][0].replace("e", "é", 1)]
        return 200, "application/json", completion(json.dumps({"pairs": pairs}))

    with Stub(answer) as stub:
        ask(stub.url, out=tmp_path / "strict.jsonl")
        ask(stub.url, "--evidence-edits", 1, out=tmp_path / "loose.jsonl")
    assert len(rows(tmp_path / "strict.jsonl")) == whole[1]
    assert len(rows(tmp_path / "loose.jsonl")) == 2 * whole[1]


def test_the_same_question_twice_is_kept_once(ask, whole, tmp_path):
    def answer(request, number):
        pair = good_pairs(request)[0]
        again = {**pair, "answer": pair["answer"].upper()}
        return 200, "application/json", completion(json.dumps({"pairs": [pair, again]}))

    with Stub(answer) as stub:
        ask(stub.url, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["dropped"] == {"near-duplicate": whole[1]}


def test_the_token_budget_is_never_exceeded_over_all_runs(ask, whole, tmp_path):
    limit = 5 * REQUEST + 2200
    with Stub() as stub:
        result = ask(stub.url, "--max-tokens", limit, "--concurrency", 3)
        assert result.exit_code == 5
        assert "the budget is used up" in result.output
        first = len(stub.requests)
        assert 0 < first < whole[1]
        assert first * REQUEST <= limit
        assert len(rows(tmp_path / "a.jsonl")) == 2 * first
        assert ask(stub.url, "--max-tokens", limit).exit_code == 5
        assert len(stub.requests) == first
        assert ask(stub.url, "--max-tokens", 10**6).exit_code == 0
    assert (tmp_path / "a.jsonl").read_bytes() == whole[0]


def test_tokens_of_bad_replies_count_towards_the_budget(ask, tmp_path):
    with Stub(BAD_REPLIES["not json"][0]) as stub:
        result = ask(stub.url, "--max-tokens", 6000, "--json", tmp_path / "r.json")
    assert result.exit_code == 5
    report = json.loads((tmp_path / "r.json").read_text())
    assert sum(report["tokens"]) == REQUEST * len(stub.requests) <= 6000


def test_dry_run_says_what_it_would_take_and_asks_nothing(ask, whole, tmp_path):
    with Stub() as stub:
        result = ask(stub.url, "--dry-run", "--json", tmp_path / "r.json")
    assert result.exit_code == 0
    assert stub.requests == []
    assert not (tmp_path / "a.jsonl").exists()
    assert not provenance_path(tmp_path / "a.jsonl").exists()
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["to_ask"] == whole[1]
    assert report["tokens"][1] == 400 * whole[1]
    assert "completion tokens, at most" in result.output
