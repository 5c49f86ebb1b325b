"""Chat templates of every family: what a request says is in the prompt, and each image once, where it belongs."""

from __future__ import annotations

import json

import pytest
from helpers.chatting import DEMO, OTHER, ask, load, user
from helpers.families import FOLDER, load_fixtures
from llama_cpp import Llama

from star_edge import StarChatHandler, StarVLM, errors, refvlm
from star_edge.chat import ChatFormat, find_template, template_names
from star_edge.llamacpp.gguf import read_gguf_info
from star_edge.vision.profiles import METADATA_KEYS, find_profile

MARKER = "<__media__>"
FAMILIES = sorted(load_fixtures())
IMAGE = {"type": "image_url", "image_url": {"url": DEMO}}
SYSTEM, FIRST, REPLY, SECOND = "Answer in one word.", "What is red here?", "A star.", "And what is blue?"


def projector(path):
    return find_profile(read_gguf_info(path, METADATA_KEYS).values)[0]


@pytest.fixture(scope="module")
def chats():
    """family -> ChatFormat of its fixture, and the vocabulary that it needs."""
    made = {}

    def get(family):
        if family not in made:
            folder = FOLDER / family
            llama = Llama(str(folder / "text.gguf"), vocab_only=True, verbose=False)
            made[family] = ChatFormat(llama, None, projector(folder / "mmproj.gguf")), llama
        return made[family][0]

    return get


def texts(*parts):
    return [{"type": "text", "text": part} for part in parts]


def in_order(prompt, *pieces):
    at = 0
    for piece in pieces:
        assert piece in prompt[at:], (piece, prompt)
        at = prompt.index(piece, at) + len(piece)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_about_images(chats, family):
    chat = chats(family)
    assert FIRST in chat.format(FIRST, 0)
    for n in (1, 3):
        prompt = chat.format(FIRST, n)
        assert prompt.count(MARKER) == n and prompt.count(FIRST) == 1
        in_order(prompt, *[MARKER] * n, FIRST)
    in_order(chat.format(f"before {MARKER} after", 1), "before", MARKER, "after")
    for prompt in (chat.format(FIRST, 1), chat.format(FIRST, 0)):
        assert "'type'" not in prompt and '"type"' not in prompt and "None" not in prompt


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("as_list", [False, True], ids=["strings", "lists"])
def test_two_turns_after_a_system_message(chats, family, role, as_list):
    chat = chats(family)
    form = (lambda *parts: texts(*parts)) if as_list else (lambda *parts: "".join(parts))
    messages = [
        {"role": role, "content": form(SYSTEM[:9], SYSTEM[9:])},
        {"role": "user", "content": [IMAGE, *texts(FIRST)]},
        {"role": "assistant", "content": form(REPLY)},
        {"role": "user", "content": form(SECOND[:3], SECOND[3:])},
    ]
    prepared, images = chat.prepare(messages)
    prompt = chat.render(prepared)
    assert images == [DEMO] and prompt.count(MARKER) == 1
    bare = lambda text: "".join(text.split())  # LLaVA's template prints spaces between parts, Gemma's trims them
    assert all(bare(prompt).count(bare(text)) == 1 for text in (SYSTEM, FIRST, REPLY, SECOND)), prompt
    in_order(bare(prompt), MARKER, *map(bare, (FIRST, REPLY, SECOND)))
    assert "'type'" not in prompt and "None" not in prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_tool_calls_and_their_results(chats, family):
    """An assistant's message without content, and what the tool said, in templates that know tools and in those that do
    not.
    """
    chat = chats(family)
    call = {"id": "abcdefgh1", "type": "function", "function": {"name": "look_up", "arguments": '{"city": "Aachen"}'}}
    messages = [
        {"role": "user", "content": FIRST},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefgh1", "content": texts("it rains")},
    ]
    prompt = chat.render(chat.prepare(messages)[0])
    in_order(prompt, FIRST, "look_up", '"city": "Aachen"', "it rains")
    assert "None" not in prompt and '\\"city' not in prompt


def test_exact_prompts(chats):
    """Written by hand from the families' published formats."""
    say = lambda family, *messages: chats(family).render(chats(family).prepare(list(messages))[0])
    asked = {"role": "user", "content": [IMAGE, *texts(FIRST)]}
    assert say("smolvlm", asked) == f"<|im_start|>User: {MARKER}{FIRST}<end_of_utterance>\nAssistant:"
    assert (
        say("smolvlm", {"role": "user", "content": FIRST}) == f"<|im_start|>User: {FIRST}<end_of_utterance>\nAssistant:"
    )
    assert say("qwen2-vl", {"role": "system", "content": SYSTEM}, asked) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{MARKER}{FIRST}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert say("gemma3", {"role": "system", "content": texts(SYSTEM)}, asked) == (
        f"<start_of_turn>user\n{SYSTEM}\n\n{MARKER}{FIRST}<end_of_turn>\n<start_of_turn>model\n"
    )
    assert (
        say("llava-vicuna", {"role": "system", "content": SYSTEM}, asked)
        == f"{SYSTEM}\n\nUSER: {MARKER}{FIRST}\nASSISTANT:"
    )
    assert say("bakllava", {"role": "system", "content": SYSTEM}, asked).startswith(
        f"USER: {SYSTEM}\n\n{MARKER}{FIRST}\nASSISTANT:"
    )
    assert say("mobilevlm", asked) == f"### Instruction:\n{MARKER}{FIRST}\n### Response:\n"
    assert chats("llava-vicuna").is_default and not chats("llava").is_default


@pytest.mark.parametrize("family", ["smolvlm", "llava", "gemma3", "llava-vicuna"])
def test_the_handler_sends_what_is_asked(family):
    """With real requests; the prompt is what libmtmd gets."""
    folder = FOLDER / family
    handler = StarChatHandler(folder / "mmproj.gguf", verbose=False)
    llm = load(handler, folder / "text.gguf", n_ctx=2048)
    seen = []
    keep = handler._postprocess_template_text
    handler._postprocess_template_text = lambda text, *rest: seen.append(text) or keep(text, *rest)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": [IMAGE, *texts(FIRST)]}]
    messages += [{"role": "assistant", "content": REPLY}, {"role": "user", "content": SECOND}]
    response = ask(llm, *messages, max_tokens=1)
    assert all(seen[0].count(text) == 1 for text in (SYSTEM, FIRST, REPLY, SECOND, MARKER))
    assert response["star_edge"]["n_image_tokens"] > 0
    assert ask(llm, {"role": "user", "content": SECOND}, max_tokens=1)["star_edge"]["n_image_tokens"] == 0
    assert SECOND in seen[1]
    del handler._postprocess_template_text
    keep = None
    llm.close()


# ---- images in other forms and places ----


@pytest.fixture(scope="module")
def chat(chats):
    return chats("qwen3-vl")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": DEMO, "detail": "low"}},
        {"type": "image_url", "image_url": DEMO},
        {"type": "image_url", "url": DEMO},
        {"type": "image", "url": DEMO},
        {"type": "image", "image": DEMO},
        {"type": "image", "image_url": {"url": DEMO}},
        {"type": "input_image", "image_url": DEMO},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DEMO.partition(",")[2]}},
        {"type": "image", "source": {"type": "url", "url": DEMO}},
    ],
    ids=lambda part: "-".join(part),
)
def test_image_parts_of_other_forms(chat, part):
    prepared, images = chat.prepare([{"role": "user", "content": [part, {"type": "input_text", "text": FIRST}]}])
    assert images == [DEMO]
    in_order(chat.render(prepared), MARKER, FIRST)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image"}, "part 0 of message 0 (image) names no image"),
        ({"type": "image_url"}, "names no image"),
        ({"type": "image_url", "image_url": {}}, "names no image"),
        ({"type": "image_url", "image_url": None}, "names no image"),
        ({"type": "image_url", "image_url": {"url": 5}}, "names no image"),
        ({"type": "image_url", "image_url": [DEMO]}, "names no image"),
        ({"type": "input_image", "file_id": "file-1"}, "names no image"),
        ({"type": "image", "url": DEMO, "image": OTHER}, "names several images"),
        ({"type": "input_audio", "input_audio": {}}, "'input_audio'"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "'input_audio'"),
        ({"type": ["image"]}, "neither text nor an image"),
        ({"text": "x"}, "neither text nor an image"),
        ({"type": "text"}, "is a NoneType"),
        ({"type": "text", "text": 5}, "is a int"),
        ({"type": "text", "text": "\ud800"}, "surrogates"),
        (5, "is a int"),
    ],
)
def test_parts_that_cannot_be_used(chat, part, words):
    with pytest.raises(errors.PromptError) as caught:
        chat.prepare([{"role": "user", "content": [part]}])
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "messages",
    [
        None,
        5,
        "hello",
        {"role": "user", "content": "x"},
        [],
        [5],
        [{"content": "x"}],
        [{"role": "user"}],
        [{"role": 5, "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": {"type": "text", "text": "x"}}],
        [{"role": "assistant", "content": None, "tool_calls": 5}],
        [{"role": "assistant", "content": None, "tool_calls": [5]}],
    ],
    ids=repr,
)
def test_messages_that_are_none(chat, messages):
    with pytest.raises(errors.PromptError) as caught:
        chat.prepare(messages)
    assert "\n" not in str(caught.value)


def test_images_in_messages_of_all_roles(chats):
    """Shown, or an error: never an answer without them."""
    for family in FAMILIES:
        chat = chats(family)
        for role in ("system", "assistant"):
            asked = [{"role": "user", "content": FIRST}]
            at = [{"role": role, "content": [IMAGE, *texts(SYSTEM)]}]
            messages = [*at, *asked] if role == "system" else [*asked, *at, {"role": "user", "content": SECOND}]
            prepared, images = chat.prepare(messages)
            assert chat.render(prepared).count(MARKER) == len(images) == 1
    silent = ChatFormat(
        chats("smolvlm")._llama(),
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    )
    assert MARKER in silent.render(
        silent.prepare([{"role": "system", "content": [IMAGE]}, {"role": "user", "content": "x"}])[0]
    )


def test_what_a_template_does_not_show_is_an_error(chats):
    llama = chats("smolvlm")._llama()
    last = ChatFormat(llama, "{{ messages[-1]['content'] }}")
    assert last.format(FIRST, 1) == MARKER + FIRST
    with pytest.raises(errors.PromptError, match="does not show what message 0"):
        last.prepare(
            [
                {"role": "user", "content": FIRST},
                {"role": "assistant", "content": REPLY},
                {"role": "user", "content": SECOND},
            ]
        )
    with pytest.raises(errors.PromptError, match="0 image markers for 1 images|does not show"):
        last.prepare([{"role": "user", "content": [IMAGE]}, {"role": "user", "content": SECOND}])
    swapped = ChatFormat(llama, "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}")
    two = [{"role": "user", "content": [IMAGE, *texts(FIRST)]}, {"role": "user", "content": [IMAGE, *texts(SECOND)]}]
    with pytest.raises(errors.PromptError, match="another order"):
        swapped.prepare(two)
    twice = ChatFormat(llama, "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}")
    with pytest.raises(errors.PromptError, match="2 image markers for 1 images"):
        twice.format(FIRST, 1)


# ---- placeholders ----


@pytest.mark.parametrize("name", ["<image>", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", MARKER])
@pytest.mark.parametrize("family", ["qwen2-vl", "llava", "smolvlm", "pixtral", "llava-vicuna"])
def test_placeholders_are_markers_where_counts_fit(chats, family, name):
    chat = chats(family)
    assert chat.format(f"{name}{FIRST}", 1) == chat.format(FIRST, 1)
    assert chat.format(f"first {name} second {name} end", 2) == chat.format(f"first {MARKER} second {MARKER} end", 2)
    message = {"role": "user", "content": [IMAGE, *texts(f"look {name} here")]}
    in_order(chat.render(chat.prepare([message])[0]), "look", MARKER, "here")


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_are_text_where_counts_do_not_fit(chats, family):
    """No token for an image, and no marker, comes from a text."""
    chat = chats(family)
    llama = chat._llama()
    names = ("<image>", "<|image_pad|>", "<start_of_image>", "[IMG]", "<|vision_start|>", "<|image|>")
    for name in names:
        for n_images, prompt in enumerate(
            (chat.format(f"{name} {FIRST}", 0), chat.format(f"{name} or {name}? {FIRST}", 1))
        ):
            assert prompt.count(MARKER) == n_images
            tokens = llama.tokenize(prompt.encode(), add_bos=False, special=True)
            ids = llama.tokenize(name.encode(), add_bos=False, special=True)
            if chat.is_token(name):
                assert ids[-1] not in tokens
    messages = [{"role": "user", "content": f"what does {MARKER} mean?"}]
    assert MARKER not in chat.render(chat.prepare(messages)[0])


def test_placeholders_do_not_change_the_answer():
    question = "what color is the star?"
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_threads=1) as vlm:
        say = lambda prompt, **options: vlm.generate(prompt, [refvlm.DEMO_IMAGE], max_tokens=8, **options).text
        expected = say(question)
        assert say(f"<image>\n{question}") == say(f"{question}\n<image>") == say(f"<|image_pad|>{question}") == expected
        raw = "USER:{}what color is the star? ASSISTANT:"
        assert say(raw.format("<image>"), chat=False) == say(raw.format(MARKER), chat=False)
        with pytest.raises(errors.PromptError, match="2 image markers for 1 images"):
            say(f"{MARKER}{MARKER}{question}")


# ---- templates that are given ----


def test_templates_by_name_file_and_source(tmp_path):
    source = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    (tmp_path / "a.jinja").write_text(source)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    assert (
        find_template(source)
        == find_template(tmp_path / "a.jinja")
        == find_template(str(tmp_path / "tokenizer_config.json"))
        == source
    )
    assert find_template("vicuna") == "vicuna" and {"vicuna", "chatml", "deepseek", "llama2"} <= set(template_names())
    for wrong in ("nonsense", "/nowhere/a.jinja", "", 5, str(tmp_path), "a\0b"):
        with pytest.raises(errors.UnsupportedModelError, match="chat.template"):
            find_template(wrong)
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(errors.UnsupportedModelError, match="cannot be read"):
        find_template(tmp_path / "b.json")


def test_a_given_template_is_used(tmp_path):
    (tmp_path / "a.jinja").write_text("{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{% endfor %}")
    for template, expected in (("vicuna", f"USER: {MARKER}x\nASSISTANT:"), (tmp_path / "a.jinja", f"<user> {MARKER}x")):
        with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_threads=1, chat_template=template) as vlm:
            assert vlm._chat.format("x", 1) == expected
        handler = StarChatHandler(refvlm.MMPROJ, chat_template=template, verbose=False)
        llm = load(handler)
        seen = []
        keep = StarChatHandler._postprocess_template_text
        handler._postprocess_template_text = lambda text, *rest: seen.append(text) or keep(handler, text, *rest)  # noqa: B023
        ask(llm, user(DEMO, "x"), max_tokens=1)
        assert seen == [expected]
        llm.close()
    with pytest.raises(errors.UnsupportedModelError, match="nonsense"):
        StarVLM(refvlm.TEXT_MODEL, chat_template="nonsense")
    with pytest.raises(errors.UnsupportedModelError, match="nonsense"):
        StarChatHandler(refvlm.MMPROJ, chat_template="nonsense")


def test_chat_formats_are_refused():
    """MTMDChatHandler ignores them."""
    with pytest.raises(errors.ConfigError, match="chat_format"):
        StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, chat_format="nonsense")
    llm = load(StarChatHandler(refvlm.MMPROJ), chat_format="nonsense")
    with pytest.raises(errors.ConfigError, match="nonsense"):
        ask(llm)
    llm.close()


def test_files_without_a_template():
    """LLaVA files of the older converter have none: Vicuna's, as llama.cpp's own tool says. Text alone has no family to
    tell.
    """
    folder = FOLDER / "llava-vicuna"
    with StarVLM(folder / "text.gguf", folder / "mmproj.gguf", n_ctx=256, n_threads=1) as vlm:
        assert vlm.has_chat_template and "vicuna" in vlm.chat_template_origin
        assert vlm.generate("hello", max_tokens=1).report.n_text_tokens > 5
    with (
        StarVLM(folder / "text.gguf", n_ctx=256, n_threads=1) as vlm,
        pytest.raises(errors.UnsupportedModelError, match="--chat-template"),
    ):
        vlm.generate("hello", max_tokens=1)


def test_the_command_takes_a_template(tmp_path):
    from click.testing import CliRunner

    from star_edge.cli import COMMANDS, cli

    for name in COMMANDS:
        if name not in ("demo", "completion"):
            assert "--chat-template" in CliRunner().invoke(cli, [name, "--help"]).output, name
    folder = FOLDER / "llava-vicuna"
    result = CliRunner().invoke(
        cli,
        [
            "run",
            "-m",
            str(folder / "text.gguf"),
            "--chat-template",
            "vicuna",
            "-c",
            "256",
            "-n",
            "1",
            "-t",
            "1",
            "hello",
        ],
    )
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(cli, ["run", "--chat-template", "nonsense", "hello"])
    assert isinstance(result.exception, errors.UnsupportedModelError)


def test_serve_says_at_its_start_that_there_is_no_template(monkeypatch):
    from star_edge.server.app import make_app

    monkeypatch.setattr("star_edge.chat._OF_FAMILY", {})
    folder = FOLDER / "llava-vicuna"
    with pytest.raises(errors.UnsupportedModelError, match="--chat-template"):
        make_app(folder / "text.gguf", folder / "mmproj.gguf", alias="x", n_ctx=256, n_threads=1)


def test_eval_takes_placeholders_of_question_files(tmp_path):
    """A line as LLaVA's question files have it, and the same without."""
    from star_edge.io.questions import read_questions

    lines = [
        {"image": str(refvlm.DEMO_IMAGE), "text": text, "question_id": i}
        for i, text in enumerate(("<image>\nwhat number is shown?", "what number is shown?"))
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    questions = read_questions(tmp_path / "q.jsonl")
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_threads=1) as vlm:
        with_name, without = (vlm.generate(q.prompt, q.sources, max_tokens=6).text for q in questions)
    assert with_name == without


def test_all_sides_of_a_benchmark_have_the_same_prompt():
    """A file without a template: MTMDChatHandler alone would refuse it."""
    from star_edge.benchmarking.run import make_request
    from star_edge.benchmarking.sides import SideSpec, Workbench
    from star_edge.synthetic.pictures import blocks

    folder = FOLDER / "llava-vicuna"
    request = make_request([blocks(112, 112)], "", "what?", (0.25,))
    for template in (
        None,
        "chatml",
        "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}",
    ):
        with Workbench(
            folder / "text.gguf", folder / "mmproj.gguf", n_ctx=512, n_threads=1, chat_template=template
        ) as bench:
            stock, star = (bench.ask(SideSpec(kind, kind), request, 2) for kind in ("stock", "star_edge"))
            assert (stock.n_text, stock.n_image) == (star.n_text, star.n_image) and stock.n_image == 64
