import hashlib
import re

import pytest

from minipeft.errors import InputError
from minipeft.lab import data


def test_every_file_has_its_committed_hash():
    sums = data.checksums()
    files = {p.name for p in data.DATA.iterdir()} - {"SHA256SUMS", "README.md"}
    assert files == set(sums)
    for name, digest in sums.items():
        assert hashlib.sha256((data.DATA / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("novel", "opening"),
    [
        ("emma", "Emma Woodhouse, handsome, clever, and rich"),
        ("mansfield_park", "About thirty years ago Miss Maria Ward"),
        ("northanger_abbey", "No one who had ever seen Catherine Morland"),
        ("persuasion", "Sir Walter Elliot, of Kellynch Hall"),
        ("pride_and_prejudice", "It is a truth universally acknowledged"),
        ("sense_and_sensibility", "The family of Dashwood had long been settled"),
    ],
)
def test_novels_are_whole_paragraphs_of_the_right_book(novel, opening):
    text = data.austen(novel)
    assert opening in text[:2000]
    assert len(text) > 400_000
    assert not re.search(r"\n\n|  |\A\s| \n", text)
    assert "Gutenberg" not in text
    assert "NOTE ON THE TEXT" not in text


def test_held_out_novel_is_not_trained_on():
    assert data.HELD_OUT == "persuasion"
    assert data.HELD_OUT not in data.AUSTEN_TRAIN
    assert len(set(data.AUSTEN_TRAIN)) == 5


def test_unknown_novel_is_one_sentence_with_the_choices():
    with pytest.raises(InputError, match="'sanditon'; choose one of emma, "):
        data.austen("sanditon")


def test_dictionary_is_clean_prose():
    entries = data.devils_dictionary()
    assert len(entries) == len(set(entries)) == 960
    for entry in entries:
        assert entry.word == entry.word.lower()
        assert re.fullmatch(r"[a-z.]+\.", entry.part)
        assert " ".join(entry.definition.split()) == entry.definition
        assert not set("_{}") & set(entry.definition), entry
        assert entry.definition[-1] in ".!?\"')", entry
    assert data.Entry("truce", "n.", "Friendship.") in entries


def test_prompt_and_answer_make_the_printed_line():
    entry = data.Entry("truce", "n.", "Friendship.")
    assert entry.prompt + entry.answer == "Truce, n. Friendship."


def test_split_depends_on_the_word_alone():
    train = data.devils_dictionary("train")
    validation = data.devils_dictionary("validation")
    assert (len(train), len(validation)) == (846, 114)
    assert sorted(map(repr, train + validation)) == sorted(
        map(repr, data.devils_dictionary())
    )
    # A word with two entries must not be on both sides.
    assert not {e.word for e in train} & {e.word for e in validation}
    first = hashlib.sha256(b"truce").digest()
    expected = int.from_bytes(first[:4], "big") < data.VALIDATION_SHARE * 2**32
    side = data.Entry("truce", "", "").split
    assert (side == "validation") is expected


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_is_named(tmp_path, monkeypatch, damage):
    original = data.DATA
    name = "emma.txt.xz"
    content = bytearray((original / name).read_bytes())
    content[1000] ^= 1
    sums = (original / "SHA256SUMS").read_text()
    (tmp_path / "SHA256SUMS").write_text(sums)
    if damage == "flip":
        (tmp_path / name).write_bytes(content)
    if damage == "cut":
        (tmp_path / name).write_bytes((original / name).read_bytes()[:5000])
    monkeypatch.setattr(data, "DATA", tmp_path)
    data._read.cache_clear()
    with pytest.raises(InputError, match=name) as caught:
        data.austen("emma")
    assert "install minipeft again" in str(caught.value)
    data._read.cache_clear()
