"""Requests in text: batched by who writes, and no bad one takes another down."""

import dataclasses

import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax.request import Request, parse_request
from elastic_jax.serving import Server
from elastic_jax.tokenizer import ByteTokenizer

SMALL = {"embed": 32, "expert_ffn": 16}


class Letters(ByteTokenizer):
    """The first 97 bytes: the vocabulary of the model in these tests."""

    vocab, end = 97, ()

    def prompt(self, text):
        return np.frombuffer(text, np.uint8).astype(int)

    @property
    def pieces(self):
        return super().pieces[:97]


@pytest.fixture(scope="module")
def server(talker):
    params, cfg = talker
    budgets = {"small": ej.counts(cfg, **SMALL), "full": ej.counts(cfg)}
    return Server(params, cfg, budgets, Letters(), max_length=100, end_of_thinking="!")


def by_number(replies):
    return sorted(replies, key=lambda reply: reply.number)


GOOD = [
    Request("HELLO", id="a", budget="small", max_new_tokens=9),
    Request([1, 2, 3], budget="embed=32,expert_ffn=16", max_new_tokens=5),
    Request("A", max_new_tokens=7, temperature=0.9, seed=3),
    Request("IT", think="small", answer="full", thinking_cap=6, grace=0,
            max_new_tokens=4),
    Request("IT IS", think="small", thinking_cap=3, grace=0, max_new_tokens=4),
    Request("HELLO", max_new_tokens=6, draft="small", draft_tokens=2),
]  # fmt: skip
BAD = [
    (Request(""), "prompt: expected text, got nothing"),
    (Request([]), "prompt: expected a list of tokens"),
    (Request("{"), "token 123 is outside the vocabulary of 97"),
    (Request("A", max_new_tokens=0), "max_new_tokens: expected an int from 1 on"),
    (Request("A", think="small", thinking_cap=0), "thinking_cap: expected an int"),
    (Request("A", budget="smal"), "unknown budget 'smal'; did you mean 'small'"),
    (Request("A", budget="embed=33"), "embed"),
    (Request("A" * 99, max_new_tokens=2), "101, longer than the cache of 100"),
    (Request("A", budget="small", think="full"), "budget, or think and answer"),
    (Request("A", budget=["small", "full"]), "budget: expected the name of one budget"),
    (Request("A", temperature=-1.0), "temperature: expected finite numbers"),
    (Request("A", hand_over="x", think="small"), "hand_over: expected one of"),
    (Request("A", stop=("",)), "stop: expected strings"),
    (Request("A", draft="tiny"), "draft: unknown budget 'tiny'"),
]


@pytest.fixture(scope="module")
def served(server):
    mixed = [r for pair in zip(BAD, [*GOOD, *[None] * 8], strict=True) for r in pair]
    requests = [r[0] if isinstance(r, tuple) else r for r in mixed if r is not None]
    timings = []
    replies = by_number(server.serve(requests, on_timing=timings.append))
    return requests, replies, timings


def test_every_request_has_one_reply(served):
    requests, replies, _ = served
    assert [reply.number for reply in replies] == list(range(len(requests)))
    assert [reply.id for reply in replies] == [r.id for r in requests]


def test_bad_requests_are_told_why(served):
    requests, replies, _ = served
    for request, message in BAD:
        reply = replies[next(i for i, r in enumerate(requests) if r is request)]
        assert message in reply.error and not reply.tokens


def test_good_ones_are_answered_as_if_alone(server, served):
    requests, replies, _ = served
    for request in GOOD:
        reply = replies[next(i for i, r in enumerate(requests) if r is request)]
        assert reply.error is None and reply.tokens > 0
        (alone,) = server.serve([request])
        assert dataclasses.replace(alone, number=reply.number) == reply


def test_replies_are_what_the_functions_return(server, served, talker):
    params, cfg = talker
    _, replies, _ = served
    text = [list(b"HELLO")]
    out = ej.generate(params, text, cfg, counts=ej.counts(cfg, **SMALL),
                      max_new_tokens=9)  # fmt: skip
    reply = next(r for r in replies if r.id == "a")
    assert reply.text == ByteTokenizer().decode(out.tokens[0].tolist())
    assert (reply.tokens, reply.rounds, reply.stopped) == (9, 9, False)


def test_equal_requests_share_a_batch_and_are_timed(served):
    _, _, timings = served
    assert sum(t.requests for t in timings) == len(GOOD)
    assert len(timings) == 5  # the two that name the same small submodel are together
    for timing in timings:
        assert 0 < timing.first_token_seconds <= sum(timing.seconds.values()) + 1
        assert set(timing.tokens) <= set(timing.seconds)


def test_a_stop_string_ends_the_text_and_is_left_out(server):
    request = Request("HELLO", budget="small", max_new_tokens=9)
    (whole,) = server.serve([request])
    stop = whole.text[3:5]
    (reply,) = server.serve([dataclasses.replace(request, stop=(stop,))])
    assert reply.text == whole.text[: whole.text.find(stop)] and reply.stopped


def test_text_comes_as_it_is_written(server):
    seen = {}
    requests = [Request("HELLO", max_new_tokens=5), Request("YOU", max_new_tokens=5)]
    replies = by_number(
        server.serve(
            requests, on_text=lambda n, text: seen.setdefault(n, []).append(text)
        )
    )
    for number, reply in enumerate(replies):
        assert seen[number][-1] == reply.text and len(seen[number]) == 5
        assert all(reply.text.startswith(text) for text in seen[number])


def test_requests_are_read_from_fields():
    request = parse_request({"prompt": "a", "stop": "x", "top_k": 3}, temperature=0.5)
    assert request == Request("a", stop=("x",), top_k=3, temperature=0.5)
    # What a line says of its writers replaces what the command line said.
    request = parse_request({"prompt": "a", "think": "small"}, budget="full")
    assert (request.budget, request.writers) == (None, ("small", "small"))
    request = parse_request({"prompt": "a", "budget": "full"}, think="a", answer="b")
    assert request.writers == ("full",)
    for fields, message in (
        ([1], "expected an object, got list"),
        ({"promt": "a"}, "unknown field 'promt'; did you mean 'prompt'?; no prompt"),
        ({"prompt": 3}, "prompt: expected text or a list of tokens"),
    ):
        with pytest.raises(ValueError) as error:
            parse_request(fields)
        assert message in str(error.value)
