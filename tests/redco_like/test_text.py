"""Text in and out: streams equal the whole, nothing broken is shown, stop strings stop, templates are read safely."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from redco_like.chat_template import ChatTemplate
from redco_like.text import BROKEN, Text, _Bytes

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "日本語の文章です。これは試験です。",
    "emoji 😀 and 👩‍👩‍👧 and flags 🇩🇪",
    "def f(x):\n    return x + 1\n",
] * 3
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level() -> Tokenizer:
    """As GPT-2 and Llama 3 have it: every token is some bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def sentence_piece() -> Tokenizer:
    """As Llama 2 has it: words begin with a mark, characters that it does not know are their bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz."]
    merges = [("▁", "a"), ("t", "h"), ("th", "e"), ("▁", "the")]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    strip = decoders.Strip(content=" ", left=1)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return tokenizer


MADE = {"byte_level": byte_level, "sentence_piece": sentence_piece}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Texts by kind of tokenizer."""
    found = {"bytes": Text.of_bytes()}
    for name, make in MADE.items():
        folder = tmp_path_factory.mktemp(name)
        make().save(str(folder / "tokenizer.json"))
        found[name] = Text.from_folder(folder)
    return found


def streamed(text, tokens, cuts, **options):
    """The pieces of tokens that come in groups."""
    stream = text.stream(**options)
    edges = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    pieces = [stream.add(tokens[a:b]) for a, b in itertools.pairwise(edges)]
    return [*pieces, stream.end()], stream


KINDS = pytest.mark.parametrize("kind", ["byte_level", "sentence_piece", "bytes"])


@KINDS
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_of_a_text_add_up_to_it_and_none_is_broken(texts, kind, data):
    text, written = texts[kind], data.draw(TEXTS)
    tokens = text.encode(written, special=False)
    pieces, _ = streamed(text, tokens, data.draw(st.lists(st.integers(0, 200))))
    assert "".join(pieces) == text.decode(tokens)
    if BROKEN not in written:
        assert not any(BROKEN in piece for piece in pieces)


def test_a_token_that_is_not_shown_does_not_end_a_run_of_bytes(texts):
    """Bytes are text together or not at all: found by the test below."""
    text = texts["sentence_piece"]
    a, b = (text._tokenizer.id_of(name) for name in ("<0xC2>", "<0x80>"))
    for tokens, cuts in (([a, b, 0, b], [3]), ([a, b, 9999, b], [3]), ([a, b, 0], [3])):
        pieces, _ = streamed(text, tokens, cuts)
        assert "".join(pieces) == text.decode(tokens)


@KINDS
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_add_up_to_the_whole(texts, kind, data):
    """Models may write what is no text."""
    text = texts[kind]
    tokens = data.draw(st.lists(st.integers(0, text.size - 1), max_size=120))
    pieces, _ = streamed(text, tokens, data.draw(st.lists(st.integers(0, 200), max_size=120)))
    assert "".join(pieces) == text.decode(tokens)


@KINDS
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stop_strings_cut_the_text_wherever_tokens_end(texts, kind, data):
    text, written = texts[kind], data.draw(TEXTS)
    tokens = text.encode(written, special=False)
    whole = text.decode(tokens)
    start = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = [whole[start : start + data.draw(st.integers(1, 5))] or "x", data.draw(st.text(min_size=1, max_size=3))]
    pieces, stream = streamed(text, tokens, data.draw(st.lists(st.integers(0, 200))), stop=stop)
    # The one that is complete first, and of those that end together the longest.
    found = min(((at + len(s), at) for s in stop if (at := whole.find(s)) >= 0), default=None)
    first = None if found is None else found[1]
    assert "".join(pieces) == (whole if first is None else whole[:first])
    assert stream.stopped == (first is not None)


def test_what_may_begin_a_stop_string_waits(texts):
    text = texts["bytes"]
    stream = text.stream(stop=["STOP"])
    assert stream.add(text.encode("go ST")) == "go "
    assert stream.add(text.encode("AY S")) == "STAY "
    assert stream.add(text.encode("TOP and more")) == ""
    assert stream.stopped
    assert stream.add(text.encode("ignored")) + stream.end() == ""


def test_a_character_in_parts_waits_for_its_last_byte(texts):
    text = texts["bytes"]
    stream = text.stream()
    assert [stream.add([byte]) for byte in "😀".encode()] == ["", "", "", "😀"]
    stream.add("é".encode()[:1])
    assert stream.end() == BROKEN


def test_a_long_stream_takes_no_longer_per_token(texts):
    """The window is cut: decoding a token does not depend on how many came before."""
    text = texts["byte_level"]
    lengths = []

    class Counting(_Bytes):
        def decode(self, tokens, *, special):
            lengths.append(len(tokens))
            return super().decode(tokens, special=special)

    stream = type(text.stream())(Counting())
    for token in b"word " * 400:
        stream.add([token])
    assert max(lengths) < 64


def test_round_trip_with_and_without_special_tokens(texts):
    text = texts["byte_level"]
    written = "The dog 😀"
    tokens = text.encode(written)
    assert tokens[0] == 0
    assert text.decode(tokens) == written
    assert text.decode(tokens, special=True) == "<s>" + written
    assert text.encode(written, special=False) == tokens[1:]


# Folders.


def folder_with(tmp_path, **files):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        path = tmp_path / (name + (".jinja" if name == "chat_template" else ".json"))
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({"generation_config": {"eos_token_id": [7, 9]}, "config": {"eos_token_id": 3}}, (7, 9)),
        ({"generation_config": {}, "config": {"eos_token_id": 3}}, (3,)),
        ({"config": {"text_config": {"eos_token_id": 4}}}, (4,)),
        ({"tokenizer_config": {"eos_token": "</s>"}}, (1,)),
        ({"tokenizer_config": {"eos_token": {"content": "</s>", "lstrip": False}}}, (1,)),
        ({"tokenizer_config": {"eos_token": "never seen"}}, ()),
        ({}, ()),
    ],
)
def test_where_answers_end_is_read_from_the_first_file_that_says(tmp_path, files, eos):
    assert Text.from_folder(folder_with(tmp_path, **files)).eos == eos


def test_a_folder_without_a_tokenizer_is_no_silent_fallback(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer.json.*of_bytes"):
        Text.from_folder(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        Text.from_folder(tmp_path / "missing")


def test_broken_files_are_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        Text.from_folder(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        Text.from_folder(folder_with(tmp_path, tokenizer_config="[1"))


# Chat templates.

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_a_template_is_read_from_the_config_or_from_its_own_file(tmp_path):
    text = Text.from_folder(folder_with(tmp_path, tokenizer_config={"chat_template": CHATML}))
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text.chat(MESSAGES) == expected
    assert text.chat(MESSAGES, add_generation_prompt=False) == expected.removesuffix("<|im_start|>assistant\n")
    assert text.encode_chat(MESSAGES) == text.encode(expected, special=False)
    own = "{{ bos_token }}{{ messages[0].content }}"
    text = Text.from_folder(
        folder_with(tmp_path, chat_template=own, tokenizer_config={"chat_template": CHATML, "bos_token": "<s>"})
    )
    assert text.chat(MESSAGES) == "<s>Hi"
    # The template has written the beginning itself: it is not there twice.
    assert text.encode_chat(MESSAGES)[:2] == [0, text.encode("Hi", special=False)[0]]


def test_named_templates_and_their_default(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert Text.from_folder(folder_with(tmp_path, tokenizer_config={"chat_template": named})).chat(MESSAGES) == "plain"


def test_templates_have_what_those_of_transformers_have():
    source = (
        "{% for m in messages %}\n"
        "    {% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}\n"
        "{% endfor %}\n{{ strftime_now('%Y') | length }}{{ tools[0] | tojson(indent=1) if tools }}"
    )
    rendered = ChatTemplate(source).render(
        [{"role": "system", "content": "x"}, {"role": "user", "content": "<é>"}], tools=[{"a": 1}]
    )
    assert '"<é>"' in rendered
    assert rendered.endswith('4{\n "a": 1\n}')


def test_a_template_says_what_it_refuses():
    source = "{% if messages|length > 1 %}{{ raise_exception('one message, please') }}{% endif %}x"
    with pytest.raises(ValueError, match="one message, please"):
        ChatTemplate(source).render(MESSAGES * 2)
    with pytest.raises(ValueError, match="cannot be read"):
        ChatTemplate("{% if %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source):
    with pytest.raises(ValueError, match="refuses"):
        ChatTemplate(source).render(MESSAGES)


@pytest.mark.parametrize("messages", [[], [{}], ["hello"], [{"role": 1, "content": "x"}]])
def test_messages_that_are_none_are_refused(messages):
    with pytest.raises(ValueError, match="messages"):
        ChatTemplate(CHATML).render(messages)


def test_a_folder_without_a_template_cannot_chat(texts):
    with pytest.raises(ValueError, match="no chat template"):
        texts["byte_level"].chat(MESSAGES)


@pytest.mark.reference
def test_templates_render_as_in_transformers(tmp_path):
    from transformers.utils.chat_template_utils import render_jinja_template

    sources = [CHATML, "{%- for m in messages %}\n  {{- m.role ~ ':' }}\n  {{ m.content | trim }}\n{%- endfor %}\n"]
    for source in sources:
        for prompt in (True, False):
            theirs, _ = render_jinja_template(
                conversations=[MESSAGES], chat_template=source, add_generation_prompt=prompt
            )
            assert ChatTemplate(source).render(MESSAGES, add_generation_prompt=prompt) == theirs[0]


@pytest.mark.reference
def test_a_folder_reads_as_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    tools = [{"type": "function", "function": {"name": "f", "description": "é < 1", "parameters": {}}}]
    source = CHATML + "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ eos_token }}"
    record = {
        "eos_token": "</s>",
        "bos_token": "<s>",
        "chat_template": source,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    folder = folder_with(tmp_path, tokenizer_config=record, config={"model_type": "llama"})
    text, theirs = Text.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert text.eos == (theirs.eos_token_id,)
    for written in CORPUS[:5]:
        assert text.encode(written) == theirs(written)["input_ids"]
        assert text.encode(written, special=False) == theirs(written, add_special_tokens=False)["input_ids"]
        assert text.decode(text.encode(written)) == theirs.decode(
            theirs(written)["input_ids"], skip_special_tokens=True
        )
    for options in ({}, {"tools": tools}, {"add_generation_prompt": False}):
        wanted = theirs.apply_chat_template(MESSAGES, **{"add_generation_prompt": True, **options}, tokenize=False)
        assert text.chat(MESSAGES, **options) == wanted
        ids = theirs.apply_chat_template(MESSAGES, **{"add_generation_prompt": True, **options}, return_dict=True)
        assert text.encode_chat(MESSAGES, **options) == list(ids["input_ids"])
