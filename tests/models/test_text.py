from __future__ import annotations

import sys

import pytest

from sparsify.models.text import Corpus, corpus, sentences_from_file


@pytest.fixture(scope="module")
def texts() -> Corpus:
    return corpus()


def test_same_seed_gives_the_same_text_and_another_seed_other_text(texts):
    """Conversions must be repeatable, so the text must be."""
    again = corpus()
    assert texts == again
    assert texts.sentences(50, seed=3) == again.sentences(50, seed=3)
    assert texts.passages(4, characters=500, seed=3) == again.passages(4, characters=500, seed=3)
    assert texts.sentences(50, seed=3) != texts.sentences(50, seed=4)


def test_no_sentence_is_in_two_splits(texts):
    """A score on sentences that the conversion has seen, or its options were chosen by, would flatter it."""
    splits = [texts.sentences(10**6, split=split) for split in ("calibration", "development", "held_out")]
    assert all(len(sentences) == len(set(sentences)) > 0 for sentences in splits)
    assert len(set().union(*splits)) == sum(map(len, splits))


def test_no_paragraph_is_in_two_passages_or_in_two_splits(texts):
    """Manual topics repeat one another; the repetitions must be gone."""
    splits = ("calibration", "development", "held_out")
    passages = [p for split in splits for p in texts.passages(10**6, characters=800, split=split)]
    paragraphs = [paragraph for passage in passages for paragraph in passage.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 100


def test_sentences_are_clean(texts):
    """Headings, licence text, code and line breaks are no sentences."""
    for sentence in texts.sentences(3000) + texts.sentences(400, split="held_out"):
        assert 20 <= len(sentence) <= 300
        assert sentence == " ".join(sentence.split())
        assert sentence[-1] in ".!?\"'"
        for unwanted in ("gutenberg", "::=", ">>>", "####", "****", "http"):
            assert unwanted not in sentence.lower()


def test_both_kinds_of_text_are_mixed_half_and_half(texts):
    """Calibrating on verse alone would specialise the experts in it."""
    if not texts.plays:
        pytest.skip("the archive of plays is not installed; `make test` downloads it")
    play_text = " ".join(paragraph for play in texts.plays for paragraph in play)
    from_plays = sum(sentence in play_text for sentence in texts.sentences(200))
    assert 100 <= from_plays <= 110  # a few sentences of the manual may stand in a play by chance


def test_passages_are_long_enough(texts):
    """The language models cut them into chunks of a fixed number of tokens."""
    passages = texts.passages(10, characters=1000)
    assert len(passages) == 10
    assert all(1000 <= len(passage) < 10_000 for passage in passages)


def test_without_the_archive_the_manual_is_left_and_the_sources_say_so(monkeypatch, tmp_path):
    """A plain `pip install` has no archive; nothing about that may be silent."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    texts = corpus()
    assert texts.sources == ("the Python manual",)
    assert texts.plays == ()
    assert len(texts.sentences(500)) == 500
    assert len(texts.sentences(100, split="held_out")) == 100
    assert len(texts.passages(10, characters=1000)) == 10


def test_sentences_from_a_file_of_the_user(tmp_path):
    """The user's own text is cut and cleaned like ours."""
    file = tmp_path / "notes.txt"
    file.write_text(
        "A HEADING\n\nThis is the first sentence of a paragraph. And here follows\nthe second one, over two lines!\n"
    )
    assert sentences_from_file(file) == [
        "This is the first sentence of a paragraph.",
        "And here follows the second one, over two lines!",
    ]


def test_a_file_without_sentences_is_refused(tmp_path):
    """An empty calibration would fail far from its cause."""
    file = tmp_path / "numbers.txt"
    file.write_text("1 2 3\n\n4 5 6\n")
    with pytest.raises(ValueError, match=r"numbers\.txt holds no sentence"):
        sentences_from_file(file)
