"""Perplexity against figures that are known by hand, and the chunked loss against the plain one."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_models import bigram, by_position, repeats_its_first_token
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from longlora_plugin.evaluation import perplexity
from longlora_plugin.evaluation.perplexity import (
    Execution,
    bootstrap,
    score_documents,
    token_losses,
)
from longlora_plugin.evaluation.processes import ALONE, Processes

TWO = Execution(batch_size=2)


def document(*tokens):
    return np.array(tokens, dtype=np.int32)


def small(kind=LlamaConfig, **options):
    return kind(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.5,
        attn_implementation="sdpa",
        **options,
    )


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(small()).eval()


def test_bigram_perplexity_equals_the_hand_computed_one():
    table = [[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.1, 0.1, 0.8]]
    tokens = [0, 1, 1, 2, 0, 0, 2]
    probabilities = [0.25, 0.75, 0.125, 0.1, 0.5, 0.25]
    expected = math.prod(probabilities) ** (-1 / 6)
    for length, stride in [(7, 7), (4, 2), (3, 1), (2, 2), (5, 5)]:
        scores = score_documents(
            bigram(table), [document(*tokens)], length=length, stride=stride, execution=TWO
        )
        assert scores.perplexity == pytest.approx(expected, rel=1e-6), (length, stride)
        assert scores.tokens.sum() == 6
        assert scores.token_losses == pytest.approx([-math.log(p) for p in probabilities], rel=1e-6)


def test_perplexity_over_documents_weighs_tokens_not_documents():
    half, tenth = [[0.5, 0.5], [0.9, 0.1]], [document(0, 0, 0, 0), document(1, 1)]
    scores = score_documents(bigram(half), tenth, length=2, stride=1)
    assert scores.perplexity == pytest.approx((2**3 * 10) ** (1 / 4), rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_new_and_all_modes_equal_a_direct_reimplementation(data):
    length = data.draw(st.integers(2, 24))
    stride = data.draw(st.integers(1, length))
    tokens = data.draw(st.integers(length, 90))

    def loss(p):
        return 0.1 + (p % 7) * 0.3

    model = by_position(loss, length + 1)
    documents = [np.zeros(tokens, dtype=np.int32)]

    expected, done = [], 1
    for start in range(0, tokens, stride):
        end = min(start + length, tokens)
        begin = min(start, done - 1)
        expected += [loss(token - begin) for token in range(done, end)]
        done = end
        if end == tokens:
            break
    scores = score_documents(model, documents, length=length, stride=stride)
    assert scores.mean_loss == pytest.approx(np.mean(expected), rel=1e-5)
    assert scores.token_losses == pytest.approx(expected, rel=1e-4)

    # The original script: the mean loss of each window, and the mean of those.
    window = np.mean([loss(p) for p in range(1, length)])
    original = np.mean([window for start in range(0, tokens - length + 1, stride)])
    every = score_documents(model, documents, length=length, stride=stride, score="all")
    assert every.mean_loss == pytest.approx(original, rel=1e-5)


def test_buckets_average_by_tokens_seen():
    model = by_position(lambda p: float(p), 8)
    scores = score_documents(
        model, [np.zeros(32, dtype=np.int32)], length=8, stride=4, edges=[0, 2, 4, 8]
    )
    first, second, last = scores.buckets()
    assert first["perplexity"] == pytest.approx(math.exp((1 + 2) / 2), rel=1e-5)
    assert second["perplexity"] == pytest.approx(math.exp((3 + 4) / 2), rel=1e-5)
    assert last["perplexity"] == pytest.approx(math.exp((5 + 6 + 7) / 3), rel=1e-5)
    assert [bucket["tokens"] for bucket in scores.buckets()] == [14, 14, 21]
    assert sum(bucket["tokens"] for bucket in scores.buckets()) == sum(
        window.read - 1 for window in scores.windows
    )


def test_empty_bucket_has_no_perplexity():
    scores = score_documents(
        by_position(lambda p: 1.0, 8), [np.zeros(5, np.int32)], length=8, stride=4, edges=[0, 4, 8]
    )
    assert scores.buckets()[1] == {"from": 4, "to": 8, "perplexity": None, "tokens": 0}


@pytest.mark.parametrize("score", ["new", "all"])
def test_windows_never_read_two_documents(score):
    documents = [np.full(tokens, i, dtype=np.int32) for i, tokens in enumerate([9, 4, 17, 8])]
    for stride in (1, 3, 4):
        scores = score_documents(
            repeats_its_first_token(4), documents, length=4, stride=stride, score=score
        )
        assert scores.perplexity == pytest.approx(1)


def test_no_window_at_all_is_refused():
    with pytest.raises(ValueError, match="no document has the 8 tokens"):
        score_documents(bigram([[1.0]]), [np.zeros(5, np.int32)], length=8, stride=4, score="all")


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_batches_do_not_change_the_losses_and_hold_no_padding(batch_size):
    model = by_position(lambda p: 0.2 * p, 16)
    documents = [np.zeros(50, np.int32), np.zeros(23, np.int32)]
    some, single = Execution(batch_size), Execution(1)
    scores = score_documents(model, documents, length=16, stride=8, execution=some)
    one = score_documents(model, documents, length=16, stride=8, execution=single)
    assert np.array_equal(scores.token_losses, one.token_losses)
    if batch_size == 3:
        assert max(rows for rows, _ in model.shapes) == 3


@pytest.mark.parametrize("processes", [2, 3])
def test_parts_of_several_processes_join_to_the_result_of_one(processes, llama):
    documents = [np.arange(70, dtype=np.int32) % 50, np.arange(33, dtype=np.int32)]
    parts: list = []

    class Earlier(Processes):
        def gather(self, items):
            parts.extend(items)
            raise InterruptedError

    class Last(Processes):
        def gather(self, items):
            return items + parts

    class Alone(Processes):
        def gather(self, items):
            return items

    def scores(here):
        how = Execution(batch_size=2, processes=here)
        return score_documents(
            llama, documents, length=16, stride=4, edges=[0, 8, 16], execution=how
        )

    alone = scores(ALONE)
    for rank in range(processes - 1):
        with pytest.raises(InterruptedError):
            scores(Earlier(rank, processes, "cpu"))
    joined = scores(Last(processes - 1, processes, "cpu"))
    assert np.array_equal(joined.token_losses, alone.token_losses)
    assert np.array_equal(joined.bucket_losses, alone.bucket_losses)
    with pytest.raises(RuntimeError, match="twice or not at all"):
        scores(Alone(0, processes, "cpu"))


def plain_losses(model, ids):
    logits = model(input_ids=ids).logits.float()
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


@pytest.mark.parametrize("chunk_elements", [1, 500, 2**25])
def test_chunked_loss_equals_full_logits_loss(llama, monkeypatch, chunk_elements):
    monkeypatch.setattr(perplexity, "CHUNK_ELEMENTS", chunk_elements)
    ids = torch.randint(50, (3, 37), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for whole in (None, False, True):
            losses = token_losses(llama, ids, whole_logits=whole)
            torch.testing.assert_close(losses, plain_losses(llama, ids), rtol=1e-5, atol=1e-6)


def test_chunked_loss_never_projects_more_than_a_chunk(llama, monkeypatch):
    monkeypatch.setattr(perplexity, "CHUNK_ELEMENTS", 50 * 10)
    rows = []
    hook = llama.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    with torch.no_grad():
        token_losses(llama, torch.zeros(1, 64, dtype=torch.long), whole_logits=False)
    hook.remove()
    assert rows == [10, 10, 10, 10, 10, 10, 3]


def test_model_that_changes_its_logits_after_the_head_is_called_as_a_whole():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(small(Gemma2Config, final_logit_softcapping=2.0)).eval()
    ids = torch.randint(50, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wrong = token_losses(model, ids, whole_logits=False)
        assert (wrong - plain_losses(model, ids)).abs().max() > 0.1
        torch.testing.assert_close(token_losses(model, ids), plain_losses(model, ids))


def test_scoring_leaves_training_mode(llama):
    llama.train()
    score_documents(llama, [np.arange(20, dtype=np.int32)], length=8, stride=8)
    assert not llama.training


def test_bootstrap_interval_covers_a_known_mean():
    random = np.random.default_rng(5)
    hits = 0
    for _ in range(60):
        losses = random.exponential(1.0, size=80)
        interval = bootstrap(np.arange(80), losses, np.ones(80, dtype=np.int64), over="windows")
        hits += interval.low <= math.e <= interval.high
    assert 50 <= hits <= 60


def test_bootstrap_is_wider_when_tokens_come_in_clusters():
    random = np.random.default_rng(0)
    losses = np.repeat(random.normal(2, 0.5, size=10), 20)
    ones = np.ones(200, dtype=np.int64)
    apart = bootstrap(np.arange(200), losses, ones, over="tokens")
    together = bootstrap(np.arange(200) // 20, losses, ones, over="documents")
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_one_window_has_no_interval_and_many_documents_are_resampled_whole():
    model = by_position(lambda p: 0.1 * p, 8)
    one = score_documents(model, [np.zeros(8, np.int32)], length=8, stride=8)
    assert one.interval() is None
    few = score_documents(model, [np.zeros(16, np.int32)] * 3, length=8, stride=8)
    assert few.interval().over == "windows"
    many = score_documents(model, [np.zeros(16, np.int32)] * 20, length=8, stride=8)
    assert many.interval().over == "documents"
