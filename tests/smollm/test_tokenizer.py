"""The tokenizer from a GGUF file and from a folder, and chat templates."""

import json

import pytest

from newllm_jax.errors import InputError
from newllm_jax.smollm.tokenizer import Tokenizer, byte_level_bpe, read_tokenizer

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


def test_no_template(backend):
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer(backend).chat(TURNS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: cannot be read"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: cannot be read"),
    ],
)
def test_broken_folder(folder, name, content, message):
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_tokenizer(folder)


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
