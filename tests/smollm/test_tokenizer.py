"""The tokenizer from a GGUF file and from a folder, and chat templates."""

import json
import os
import time

import pytest
import tokenizers

from newllm_jax.errors import InputError
from newllm_jax.smollm.tokenizer import Tokenizer, byte_level_bpe, read_tokenizer
from newllm_jax.smollm.tokenizer_file import refusals

TURNS = [{"role": "user", "content": "Hi {{ 7 * 7 }}"}]


@pytest.fixture(scope="module")
def backend():
    """A tokenizer of single bytes, two merges, and two control tokens."""
    letters = ["<|im_start|>", "<|im_end|>", *"abc0123Ġ", "ab", "12"]
    return byte_level_bpe(letters, [("a", "b"), ("1", "2")], [3, 3, *[1] * 10])


@pytest.fixture
def folder(backend, tmp_path):
    Tokenizer(backend, {"eos_token": "<|im_end|>"}, "{{ messages[0].content }}").save(tmp_path)
    return tmp_path


class TestRealTokenizer:
    def test_reference_ids(self, smollm2, tokenizer_ids):
        for case in tokenizer_ids:
            assert smollm2.tokenizer.encode(case["text"]) == case["ids"], case["text"]

    def test_decoding_gives_the_text_back(self, smollm2, tokenizer_ids):
        for case in tokenizer_ids:
            assert smollm2.tokenizer.decode(case["ids"]) == case["text"]

    def test_through_a_folder(self, smollm2, tokenizer_ids, tmp_path):
        smollm2.tokenizer.save(tmp_path)
        again = read_tokenizer(tmp_path)
        assert all(again.encode(case["text"]) == case["ids"] for case in tokenizer_ids)
        assert (again.eos_id, again.vocab_size, again.chat_template) == (2, 49152, smollm2.tokenizer.chat_template)

    def test_chat(self, smollm2):
        text = smollm2.tokenizer.chat(TURNS)
        assert text == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nHi {{ 7 * 7 }}<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = smollm2.tokenizer.encode(text)
        assert ids[0] == 1 and ids.count(smollm2.tokenizer.eos_id) == 2
        assert smollm2.tokenizer.chat(TURNS, add_generation_prompt=False) == text.removesuffix(
            "<|im_start|>assistant\n"
        )


@pytest.mark.quick
def test_digits_one_by_one_merges_and_control_tokens(backend):
    tokenizer = Tokenizer(backend, {"eos_token": "<|im_end|>"})
    assert tokenizer.encode("ab123 ab<|im_end|>") == [10, 6, 7, 8, 9, 10, 1]
    assert tokenizer.eos_id == 1 and tokenizer.vocab_size == 12
    assert tokenizer.decode([0, 10, 9, 2, 1]) == "ab a"


@pytest.mark.quick
def test_folder(folder):
    tokenizer = read_tokenizer(folder)
    assert tokenizer.encode("ab1") == [10, 6] and tokenizer.eos_id == 1
    assert tokenizer.chat(TURNS) == "Hi {{ 7 * 7 }}"


@pytest.mark.quick
def test_folder_with_a_template_file_and_padding(folder):
    (folder / "chat_template.jinja").write_text("{{ eos_token }}")
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    tokenizer = read_tokenizer(folder)
    assert tokenizer.chat(TURNS) == "<|im_end|>"
    assert tokenizer.encode("aaa") == [2, 2, 2]


@pytest.mark.quick
@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception('system role not supported') }}",
        "{% for %}",
        "{{ messages[3].content }}",
        "{{ 1 // 0 }}",
    ],
)
def test_templates_that_fail_or_leave_the_sandbox(backend, template):
    with pytest.raises(InputError, match="chat: the model's chat template cannot be rendered") as raised:
        Tokenizer(backend, {}, template).chat(TURNS)
    assert "\n" not in str(raised.value)


ENDLESS = "".join(f"{{% for i{level} in range(99999) %}}" for level in range(9)) + "{% endfor %}" * 9
DOUBLING = "{% set x = namespace(t='a') %}{% for i in range(99) %}{% set x.t = x.t ~ x.t %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ENDLESS, "needs more than 2 s or 512 MiB"),
        (DOUBLING, "(MemoryError)"),
        ("{{ 'a' * 10**10 }}", "(MemoryError)"),
        ("{{ 'a' * 5000000 }}", "(a text of 5000000 characters; 1048576 are read)"),
        ("{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}", "cannot be rendered ("),
        ("{{ raise_exception('a' * 10**6) }}", "a" * 500 + ")"),
    ],
    ids=["loop", "doubling", "long text", "long result", "deep", "long error"],
)
def test_templates_without_end(backend, template, message):
    start = time.monotonic()
    with pytest.raises(InputError) as raised:
        Tokenizer(backend, {}, template).chat(TURNS)
    assert str(raised.value).endswith(message) or message in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700
    assert time.monotonic() - start < 20  # 2 seconds of a processor


def test_the_current_folder_has_no_say_in_a_template(backend, tmp_path, monkeypatch):
    for name in ("json", "jinja2", "markupsafe", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("open('run', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert Tokenizer(backend, {}, "{{ messages[0].role }}").chat(TURNS) == "user"
    assert not (tmp_path / "run").exists()


def test_no_template(backend):
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer(backend).chat(TURNS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, r"tokenizer\.json: cannot be read \(No such file"),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: not "),
        ("tokenizer.json", "[1]", "it has no model"),
        ("tokenizer.json", "[" * 10**5, "nested too deeply"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is not a text"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": {}}]}', "is not a text"),
        ("tokenizer_config.json", r'{"eos_token": "\ud800"}', "surrogates not allowed"),
        ("chat_template.jinja", "a" * (2**20 + 1), "1,048,577 bytes"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: not "),
    ],
)
def test_broken_folder(folder, name, content, message):
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_pipes_are_not_read(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=rf"{name}: not a regular file"):
        read_tokenizer(folder)


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern):
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def replace(text, content):
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def template(*pieces):
    return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": {}}


TEXT = {"Sequence": {"id": "A", "type_id": 0}}


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ("pre_tokenizer", split({"Regex": LLAMA_3})),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [split({"String": " "})]}),
        ("normalizer", {"type": "Sequence", "normalizers": [replace(" ", "▁"), {"type": "Prepend", "prepend": "▁"}]}),
        ("post_processor", template(TEXT)),
    ],
)
def test_parts_of_tokenizers_of_llamas(folder, section, part):
    settings = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**settings, section: part}))
    assert read_tokenizer(folder).vocab_size == 12


@pytest.mark.parametrize(
    ("section", "part", "message"),
    [
        ("pre_tokenizer", split({"Regex": "(a+)+$"}), "may take any time or memory"),
        ("pre_tokenizer", split({"String": ""}), "may take any time or memory"),
        ("pre_tokenizer", split(None), "may take any time or memory"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [split({"Regex": "a*"})]}, "may take any time"),
        ("pre_tokenizer", {"pattern": {"Regex": "a*"}}, "a tokenizer with None is not supported"),
        ("pre_tokenizer", {"type": ["Split"]}, r"a tokenizer with \['Split'\] is not supported"),
        ("pre_tokenizer", [], r"a tokenizer with \[\] is not supported"),
        ("decoder", "ByteLevel", "a tokenizer with 'ByteLevel' is not supported"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "with 'Precompiled' is not supported"),
        ("normalizer", replace("a", "aa"), "may take any time or memory"),
        ("normalizer", replace("", ""), "may take any time or memory"),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "a"}, "content": ""}, "may take any time or memory"),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 5}, "may take any time or memory"),
        ("normalizer", {"type": "Sequence", "normalizers": [replace("a", "b")] * 99}, "of 104 parts is not supported"),
        ("decoder", {"type": "Sequence", "decoders": [replace("a", "a" * 9)]}, "may take any time or memory"),
        ("post_processor", template(TEXT, TEXT), "may take any time or memory"),
        ("post_processor", {"type": "Sequence", "processors": [template(*[TEXT] * 9)]}, "may take any time or memory"),
        ("model", {"type": "Unigram", "vocab": [["a", 0]]}, "tokenizer 'Unigram' is not supported, only BPE is"),
        ("model", {"vocab": {"a": 0}, "merges": []}, "tokenizer None is not supported"),
        ("model", {"type": "BPE", "continuing_subword_prefix": "##"}, "continuing_subword_prefix of a tokenizer"),
        ("model", {"type": "BPE", "end_of_word_suffix": "##"}, "end_of_word_suffix of a tokenizer is not supported"),
        ("model", {"type": "BPE", "dropout": 0.5}, "dropout of a tokenizer is not supported"),
        ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}, r"tokenizer\.json: not a tokenizer \("),
    ],
)
def test_parts_that_are_not_known_to_end(folder, section, part, message):
    settings = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**settings, section: part}))
    with pytest.raises(InputError, match=message) as raised:
        read_tokenizer(folder)
    assert "tokenizer.json" in str(raised.value) and len(str(raised.value)) < 500


def test_a_panic_is_an_error(capfd):
    from tokenizers import Regex, models, pre_tokenizers

    hostile = tokenizers.Tokenizer(models.BPE())
    hostile.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(InputError, match="text 'aaa.*b' cannot be tokenised .*retry-limit-in-match over"):
        Tokenizer(hostile).encode("a" * 99 + "b")


def test_interrupts_are_no_errors_of_a_tokenizer():
    with pytest.raises(KeyboardInterrupt), refusals("text"):
        raise KeyboardInterrupt


def test_half_a_character(backend):
    with pytest.raises(InputError, match=r"text 'a\\udcff' cannot be tokenised"):
        Tokenizer(backend).encode("a\udcff")


def test_ids_with_gaps(folder):
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["model"]["vocab"]["ab"] = 1000
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    assert read_tokenizer(folder).vocab_size == 1001


def test_many_control_tokens_take_no_time():
    start = time.monotonic()
    assert Tokenizer(byte_level_bpe([f"<{i}>" for i in range(20_000)], [], [3] * 20_000)).vocab_size == 20_000
    assert time.monotonic() - start < 10  # two minutes one by one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "llama-bpe"}, "tokenizer gpt2/llama-bpe is not supported"),
        ({"model": "llama"}, "tokenizer llama/smollm is not supported"),
        ({"tokens": ["a", "b", "b"]}, "do not fit together"),
        ({"token_type": [1, 1]}, "do not fit together"),
        ({"merges": ["a b c"]}, "do not fit together"),
        ({"merges": ["a z"]}, "merges do not fit its tokens"),
        ({"tokens": None}, "metadata tokenizer.ggml.tokens is missing"),
        ({"tokens": "abc"}, "metadata tokenizer.ggml.tokens is not of type list"),
        ({"tokens": [1, 2, 3]}, "tokens or merges are not texts"),
        ({"merges": [1, 2]}, "tokens or merges are not texts"),
        ({"eos_token_id": "2"}, "metadata tokenizer.ggml.eos_token_id is not of type int"),
    ],
)
def test_broken_gguf_tokenizer(tmp_path, change, message):
    gguf = pytest.importorskip("gguf")
    from newllm_jax.smollm.gguf_file import GGUFFile

    fields = {"model": "gpt2", "pre": "smollm", "tokens": ["a", "b", "ab"], "token_type": [1] * 3, "merges": ["a b"]}
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for key, value in {**fields, **change}.items():
        if value is not None:
            add = writer.add_string if isinstance(value, str) else writer.add_array
            add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match=message):
        read_tokenizer(GGUFFile(tmp_path / "tiny.gguf"))
