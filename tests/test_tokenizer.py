"""Text to tokens and back, and the bytes of every token."""

import pytest

from elastic_jax.tokenizer import BOS, EOS, ByteTokenizer, FileTokenizer
from experiments.tasks import ReasoningTask

TEXT = "naïve \N{SNOWMAN} <0x41>\r\n  two  spaces\t1234"


def trained(kind: str) -> bytes:
    """A small tokenizer.json of a kind that models come with."""
    library = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fallback = kind == "fallback"
    made = library.Tokenizer(models.BPE(byte_fallback=fallback))
    if kind == "byte level":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        alphabet = []
        made.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]
    )
    made.train_from_iterator([TEXT, "to be or not to be"] * 9, trainer)
    return made.to_str().encode()


@pytest.mark.parametrize("kind", ["byte level", "metaspace"])
def test_the_bytes_of_tokens_spell_the_text(kind):
    tokenizer = FileTokenizer(trained(kind))
    tokens = tokenizer.plain(TEXT)
    assert len(tokens) < len(TEXT.encode())
    assert b"".join(tokenizer.pieces[t] for t in tokens).decode() == TEXT
    assert tokenizer.decode(tokens) == TEXT
    special = tokenizer.plain("<s>")
    assert len(special) == 1 and tokenizer.pieces[special[0]] == b"<s>"
    assert tokenizer.plain("</s>")[0] in tokenizer.end


def test_bytes_are_tokens():
    tokenizer = ByteTokenizer()
    text = TEXT.encode()
    assert tokenizer.prompt(text).tolist() == [BOS, *text]
    assert tokenizer.encode(text).tolist() == [BOS, *text, EOS]
    assert tokenizer.decode([BOS, *text, EOS]) == TEXT
    pieces = tokenizer.pieces
    assert b"".join(pieces[t] for t in tokenizer.encode(text)) == text


def test_the_task_has_a_tokenizer_of_its_own():
    pytest.importorskip("tokenizers")
    task = ReasoningTask()
    tokenizer = FileTokenizer(task.tokenizer())
    assert tokenizer.vocab == len(task.vocabulary)
    for problem in task.problems(20):
        text = task.decode(problem.tokens)
        assert tuple(tokenizer.plain(text)) == problem.tokens
        assert tokenizer.prompt(text.encode()) == list(problem.tokens[:-1])
    with pytest.raises(ValueError, match="cannot read '4 [+]99'"):
        tokenizer.plain("4 +99")
    with pytest.raises(ValueError, match="no bytes of their own.*stop at tokens"):
        tokenizer.pieces  # noqa: B018


def test_what_is_no_tokenizer_is_refused():
    pytest.importorskip("tokenizers")
    for data in (b"", b"{}", b"\xff\xfe", b'{"model": 3}'):
        with pytest.raises(ValueError, match="not a tokenizer.json"):
            FileTokenizer(data)
