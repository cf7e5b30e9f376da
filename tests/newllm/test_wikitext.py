"""Texts to sequences: the published counts on the real data, and the rules on small texts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from newllm_jax.config import NewLLMConfig, load_config
from newllm_jax.content import read_arrays, write_arrays
from newllm_jax.errors import InputError, Note
from newllm_jax.newllm import sequences as sequences_module
from newllm_jax.newllm import wikitext
from newllm_jax.newllm.sequences import packed_count, packed_windows, windows
from newllm_jax.newllm.tokenizer import BOS, EOS, PAD, SPECIAL_WORDS, UNK, WordTokenizer
from newllm_jax.newllm.wikitext import load_wikitext, prepare
from newllm_jax.training import memory

PROVENANCE = {"source": "here", "asked": "here", "fallback": "", "fingerprint": "0"}


@pytest.fixture(scope="module")
def real(real_data):
    return load_wikitext(NewLLMConfig(dataset=str(real_data / "datasets" / "wikitext")))


def test_published_counts(real):
    assert {split: len(rows) for split, rows in real.sequences.items()} == {
        "train": 51_026, "validation": 5_272, "test": 5_920,
    }  # fmt: skip
    assert real.texts == {"train": 23_767, "validation": 2_461, "test": 2_891}
    assert len(real.tokenizer) == 1000
    for batch, steps in ((32, 1_595), (512, 100)):
        config = NewLLMConfig(batch_size=batch)
        assert real.summary(config)["steps_per_epoch"] == real.steps(config) == steps
    assert all(rows.shape[1] == 64 for rows in real.sequences.values())


def test_published_words(real):
    # WikiText-2's own word counts (Merity et al. 2017) are 2,088,628 / 217,646 / 245,569 with one <eos> for each line,
    # and the splits have 36,718 / 3,760 / 4,358 lines.
    with_line_ends = {"train": 2_088_628, "validation": 217_646, "test": 245_569}
    lines = {"train": 36_718, "validation": 3_760, "test": 4_358}
    assert real.words == {split: with_line_ends[split] - lines[split] for split in lines}


def test_published_targets(real):
    targets = real.sequences["train"][:, 1:]
    words = int((targets != PAD).sum())
    assert words == pytest.approx(2.75e6, rel=1e-3)
    assert (targets == UNK).sum() / words == pytest.approx(0.30, abs=0.01)


def test_real_sequences_decode_to_their_text(real, real_data):
    from newllm_jax.sources.text import open_source

    texts = open_source(str(real_data / "datasets" / "wikitext"), "", "error").splits(["train"])["train"]
    first = next(text.lower().split() for text in texts if len(text.split()) >= 5)
    decoded = real.tokenizer.decode(real.sequences["train"][0]).split()
    for word, read in zip(["<BOS>", *first, "<EOS>"], decoded, strict=False):
        assert read in (word, "<UNK>")


def test_vocabulary_is_the_most_frequent_words_in_order_of_appearance():
    tokenizer = WordTokenizer.from_texts(["b a <unk> c A", "d <unk> <unk> c"], 7)
    assert tokenizer.words == ("<PAD>", "<UNK>", "<BOS>", "<EOS>", "a", "c", "b")
    assert tokenizer.encode("C <unk> zebra b") == [BOS, 5, UNK, UNK, 6, EOS]
    assert tokenizer.decode([BOS, 5, EOS]) == "<BOS> c <EOS>"


@pytest.mark.parametrize(
    "words",
    [5, None, "<PAD>", [], ["a", "b"], SPECIAL_WORDS[:3], [*SPECIAL_WORDS, 5], [*SPECIAL_WORDS, "a", "a"],
     ["<UNK>", "<PAD>", "<BOS>", "<EOS>", "a"], dict.fromkeys([*SPECIAL_WORDS, "a"])],
)  # fmt: skip
def test_what_is_no_vocabulary(words, tmp_path):
    with pytest.raises(InputError, match="words: must be "):
        WordTokenizer(words)
    with pytest.raises(InputError, match=r"vocabulary.json: damaged \(words: must be "):
        WordTokenizer.from_json(words, tmp_path / "vocabulary.json")
    assert WordTokenizer.from_json([*SPECIAL_WORDS, "a"], tmp_path) == WordTokenizer((*SPECIAL_WORDS, "a"))


def test_arguments_of_a_tokenizer_are_checked():
    tokenizer = WordTokenizer.from_texts(["a b"], 6)
    for call, message in [
        (lambda: WordTokenizer.from_texts("a b", 6), "texts: 'a b' is not a list of texts"),
        (lambda: WordTokenizer.from_texts([5], 6), "texts: .5. is not a list of texts"),
        (lambda: WordTokenizer.from_texts(["a"], 4), "vocabulary_size: must be from 5 to 65536, not 4"),
        (lambda: tokenizer.encode(5), "text: must be a text, not 5"),
        (lambda: tokenizer.encode_prompt(None), "text: must be a text, not None"),
        (lambda: tokenizer.decode(5), "ids: 5 is not a list of integers"),
        (lambda: tokenizer.decode([1.5]), "ids: .1.5. is not a list of integers"),
        (lambda: tokenizer.decode([6]), "ids: must be from 0 to 5"),
        (lambda: tokenizer.decode([-1]), "ids: must be from 0 to 5"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    assert tokenizer.decode(np.array([4, 5], np.uint16)) == tokenizer.decode(iter([4, 5])) == "a b"


def test_sequences_that_do_not_fit_into_memory_are_not_made(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: ("this machine", 10**6))
    monkeypatch.setattr(memory, "SMALL", 0)
    texts = {split: ["a b c d e f"] * 3 for split in wikitext.SPLITS}
    with pytest.raises(InputError, match=r"memory: .* this machine has 0.00 GiB free; lower sequence_length"):
        prepare(texts, NewLLMConfig(sequence_length=10**6), PROVENANCE)
    prepare(texts, NewLLMConfig(sequence_length=10**5), PROVENANCE)


@pytest.mark.parametrize("typed", ["", "   ", "\n\t", "\x00", "zebra!!", "🦓 ? é", "A,b"])
def test_any_prompt_can_be_read(typed):
    tokenizer = WordTokenizer.from_texts(["a , b !"], 8)
    ids = tokenizer.encode_prompt(typed)
    assert ids[0] == BOS
    assert all(0 < index < len(tokenizer) for index in ids)


def test_prompts_part_punctuation_from_words_as_the_data_does():
    tokenizer = WordTokenizer.from_texts(["u.s. world , ! 's"], 9)
    assert tokenizer.encode_prompt("U.S. World's, !") == tokenizer.encode("u.s. world 's , !")[:-1]


def test_windows_are_whole_and_short_texts_are_padded():
    def rows(ids, stride=2):
        return np.concatenate([*windows(np.array(ids, np.uint16), 5, stride)]).tolist()

    assert rows([1, 2, 3]) == [[1, 2, 3, PAD, PAD]]
    assert rows(range(5)) == [[0, 1, 2, 3, 4]]
    assert rows(range(8)) == [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]]
    assert rows(range(9))[-1] == [4, 5, 6, 7, 8]
    assert rows([1]) == [[1, PAD, PAD, PAD, PAD]]


@pytest.mark.parametrize("at_once", [1, 7, 2**20])
def test_packed_windows_overlap_by_one_id(monkeypatch, at_once):
    monkeypatch.setattr(sequences_module, "IDS_AT_ONCE", at_once)
    for ids in (3, 4, 5, 6, 7, 8, 9, 100):
        stream = np.arange(1, ids + 1, dtype=np.uint16)
        parts = np.split(stream, np.sort(np.random.default_rng(ids).integers(0, ids + 1, 4)))
        found = np.concatenate([*packed_windows(parts, 4)])
        expected = np.array([[index if index <= ids else PAD for index in range(first, first + 4)]
                             for first in range(1, ids, 3)])  # fmt: skip
        assert found.tolist() == expected.tolist()
        assert len(found) == packed_count(ids, 4)


def test_short_and_empty_texts_are_dropped():
    splits = {split: ["one two three four five", "", "  ", "one two three four"] for split in wikitext.SPLITS}
    data = prepare(splits, NewLLMConfig(sequence_length=8, stride=4), PROVENANCE)
    assert data.texts["train"] == 2
    assert data.words["train"] == 9
    assert data.sequences["train"].shape == (1, 8)
    assert list(data.sequences["train"][0, [0, 6, 7]]) == [BOS, EOS, PAD]


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ([], ["a b c d e"], "no words in its train split"),
        (["  "], ["a b c d e"], "no words"),
        (["<unk>"], ["a b"], "no words"),
        (["a b c d e"], ["a b"], "the validation split of here gives no sequence"),
    ],
)
def test_sources_that_give_nothing(train, validation, message):
    with pytest.raises(InputError, match=message):
        prepare({"train": train, "validation": validation, "test": validation}, NewLLMConfig(), PROVENANCE)


def test_prepared_arrays_are_cached_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "corpus.txt"
    file.write_text("\n".join(f"the {index} cats sat on the mat number {index}" for index in range(200)))
    config = load_config("baseline", {"dataset": str(file)})
    first = load_wikitext(config)
    monkeypatch.setattr(wikitext, "take_census", lambda *_: pytest.fail("the cache was not used"))
    second = load_wikitext(config)
    assert second.tokenizer == first.tokenizer
    assert second.summary(config) == first.summary(config)
    assert all(np.array_equal(first.sequences[split], second.sequences[split]) for split in wikitext.SPLITS)
    monkeypatch.undo()

    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path / "cache"))
    file.write_text(file.read_text() + "\none more line of some new words")
    changed = load_wikitext(config)
    assert sum(changed.texts.values()) == sum(first.texts.values()) + 1


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A configuration, its data, and the file that they are cached in."""
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus.txt").write_text("\n".join(f"the {index} cats sat on the mat" for index in range(200)))
    config = load_config("quickstart", {"dataset": str(tmp_path / "corpus.txt"), "vocabulary_size": 40})
    data = load_wikitext(config)
    (file,) = (tmp_path / "cache" / "newllm").iterdir()
    return config, data, file


def same(left, right):
    return (
        (left.tokenizer, left.texts, left.words, left.provenance)
        == (right.tokenizer, right.texts, right.words, right.provenance)
        and all(np.array_equal(left.sequences[split], right.sequences[split]) for split in wikitext.SPLITS)
        and all(rows.dtype == np.uint16 for rows in left.sequences.values())
    )  # fmt: skip


def test_a_damaged_cache_is_made_anew_with_a_note(cached, tmp_path, monkeypatch):
    config, data, file = cached
    whole = file.read_bytes()
    assert same(load_wikitext(config), data)
    another = config.override({"stride": 8})
    load_wikitext(another)
    (swapped,) = set(file.parent.iterdir()) - {file}
    for damaged in (whole[:100], b"", whole[:-1] + b"x", whole + b"x", swapped.read_bytes()):
        file.write_bytes(damaged)
        with pytest.warns(Note, match=f"^{file}: damaged, or of something else; its content is made anew$"):
            assert same(load_wikitext(config), data)
        assert file.read_bytes() == whole


def test_a_large_cache_is_mapped_and_its_damage_noticed(cached, monkeypatch):
    config, data, file = cached
    monkeypatch.setattr(wikitext, "MAPPED_FROM", 0)
    mapped = load_wikitext(config)
    assert same(mapped, data) and not mapped.sequences["train"].flags.owndata
    whole = file.read_bytes()
    ids = data.sequences["train"].tobytes()
    swapped = whole.replace(ids, ids[2:] + ids[:2])  # ids that could be there
    for damaged in (whole[:100], whole[:-1] + b"x", whole + b"x", swapped):
        assert damaged != whole
        file.with_suffix(".new").write_bytes(damaged)
        file.with_suffix(".new").replace(file)
        with pytest.warns(Note, match=f"^{file}: damaged, or of something else; its content is made anew$"):
            assert same(load_wikitext(config), mapped)
        assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_obstacle(cached, tmp_path, monkeypatch):
    config, data, _ = cached
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path / "file"))
    assert same(load_wikitext(config), data)


def test_a_cache_of_version_0_1_0_is_passed_over(cached):
    config, data, file = cached
    file.rename(file.with_suffix(".npz"))
    assert same(load_wikitext(config), data)
    assert file.is_file()


FORGERIES = {
    "no head": lambda arrays, head: arrays.pop("head"),
    "no split": lambda arrays, head: arrays.pop("test"),
    "a type": lambda arrays, head: arrays.update(train=arrays["train"].astype(np.int32)),
    "a shape": lambda arrays, head: arrays.update(train=arrays["train"][:, 1:]),
    "dimensions": lambda arrays, head: arrays.update(train=arrays["train"].ravel()),
    "no sequence": lambda arrays, head: arrays.update(test=arrays["test"][:0]),
    "an id": lambda arrays, head: arrays.update(train=arrays["train"] + np.uint16(40)),
    "no JSON": lambda arrays, head: arrays.update(head=arrays["head"][1:]),
    "no vocabulary": lambda arrays, head: head.pop("vocabulary"),
    "a text": lambda arrays, head: head.update(vocabulary="words"),
    "no words": lambda arrays, head: head["vocabulary"].__setitem__(9, ["word"]),
    "numbers": lambda arrays, head: head["vocabulary"].__setitem__(9, 1),
    "a word twice": lambda arrays, head: head["vocabulary"].__setitem__(9, head["vocabulary"][8]),
    "a word too many": lambda arrays, head: head["vocabulary"].append("another"),
    "special words": lambda arrays, head: head["vocabulary"].reverse(),
    "half a count": lambda arrays, head: head["texts"].update(test=1.5),
    "true": lambda arrays, head: head["words"].update(test=True),
    "less than none": lambda arrays, head: head["words"].update(test=-1),
    "a count": lambda arrays, head: head["words"].pop("train"),
    "no counts": lambda arrays, head: head.update(texts=3),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_right_hash_over_what_is_no_prepared_data(cached, monkeypatch, forgery):
    config, data, _ = cached
    with monkeypatch.context() as patch:

        def forged(file, key):
            arrays = read_arrays(file, key)
            head = json.loads(arrays["head"].tobytes())
            FORGERIES[forgery](arrays, head)
            if "head" in arrays and forgery != "no JSON":
                arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
            write_arrays(file, key, arrays)

        patch.setattr(wikitext, "read_arrays", forged)
        load_wikitext(config)
    with pytest.warns(Note, match="its content is made anew"):
        assert same(load_wikitext(config), data)
    assert same(load_wikitext(config), data)  # without a note
