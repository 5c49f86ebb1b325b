"""StarChatHandler with pruning: the engine's outputs, its images, and the script of its page."""

import json
import threading

import numpy as np
import pytest
from helpers import pages
from helpers.chatting import COLOR, DEMO, OTHER, PLATE, ask, assistant, data_url, load, streamed, text_of, user
from helpers.models import random_image
from helpers.presets import kept
from llama_cpp import LogitsProcessorList

from star_edge import PRESETS, PruneConfig, StarChatHandler, StarVLM, errors, refvlm
from star_edge.io.images import ImageLimits, load_image

# ---- pruned ----


CONFIGS = ["balanced", "fast", PruneConfig(0.5, 0.125, 2), PruneConfig(10, 3, vision_share=0.5)]


@pytest.mark.parametrize("family", ["refvlm", "llama", "qwen2vl"])
def test_pruned_equals_the_engine(families, family):
    """The logits of every token, and what was kept, equal StarVLM's with the same config and prompt."""
    text, mmproj = (
        (refvlm.TEXT_MODEL, refvlm.MMPROJ) if family == "refvlm" else (families[family].text, families[family].mmproj)
    )
    image = load_image(refvlm.DEMO_IMAGE) if family == "refvlm" else random_image(5, 112, 112)
    seen = []

    def capture(tokens, scores):
        seen.append((tokens.tolist(), scores.copy()))
        return scores

    options = {"max_tokens": 6, "temperature": 0.0, "logits_processor": LogitsProcessorList([capture])}
    handler = StarChatHandler(mmproj)
    with StarVLM(text, mmproj, n_ctx=512, n_threads=1) as vlm:
        llm = load(handler, text, flash_attn=True)
        for config in CONFIGS:
            answer = vlm.generate(PLATE, image, config, **options)
            expected, seen = seen, []
            handler.prune = config
            chunks = list(llm.create_chat_completion([user(data_url(image), PLATE)], stream=True, **options))
            got, seen = seen, []
            response = chunks[-1]
            assert streamed(chunks) == answer.text and len(got) == len(expected) >= 2
            for (tokens_a, logits_a), (tokens_b, logits_b) in zip(got, expected):
                assert tokens_a == tokens_b and np.array_equal(logits_a, logits_b)
            for name in ("vision_kept", "decoder_kept", "vision_scores", "decoder_scores"):
                assert np.array_equal(
                    getattr(handler.last_report.images[0], name), getattr(answer.report.images[0], name)
                )
            assert response["star_edge"]["average_tokens"] == answer.report.average_tokens < 40
            assert response["star_edge"]["n_sampled"] == answer.report.n_sampled == len(got)
        llm.close()


def test_pruned_conversation_with_images_in_several_turns(llm, handler):
    """As StarVLM reads the same prompt: each image keeps its share, and the pixels are those of its turn."""
    messages = [user(DEMO, COLOR), assistant(" red"), user(OTHER, PLATE)]
    prompt = f"USER:<__media__>{COLOR} ASSISTANT:  red</s>USER:<__media__>{PLATE} ASSISTANT:"
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, flash_attn=False, n_threads=1) as vlm:
        response = ask(llm, *messages)
        report = handler.last_report
        rendered = llm.tokenize(prompt.replace("<__media__>", "").replace("</s>", "").encode())
        assert abs(report.n_text_tokens - len(rendered)) <= 6
        _, expected = vlm.read_prompt(
            prompt.replace("</s>", ""), [refvlm.DEMO_IMAGE, random_image(3, 168, 168)], chat=False
        )
    assert (
        report.n_image_tokens == 288 and [len(i.decoder_kept) for i in report.images] == [kept("balanced").decoder] * 2
    )
    for got, want in zip(report.images, expected.images):
        assert np.array_equal(got.vision_kept, want.vision_kept)
    assert response["usage"]["prompt_tokens"] == report.n_text_tokens + 288


def test_config_of_a_request(llm, handler):
    average = lambda: ask(llm)["star_edge"]["average_tokens"]
    assert average() == 36
    with handler.pruning("fast"):
        assert average() == kept("fast").average
        with handler.pruning(PruneConfig(1.0, 0.5, 3)):
            assert average() == 108
            stream = ask(llm, stream=True)
        with handler.pruning(None):
            assert average() == 144
        assert average() == kept("fast").average
        others = []
        thread = threading.Thread(target=lambda: others.append(average()))
        thread.start()
        thread.join()
        assert others == [36]  # another thread's requests are not in the block
        other = StarChatHandler(refvlm.MMPROJ, prune="quality")
        assert other.prune == PRESETS["quality"] and handler.prune == PRESETS["balanced"]
    assert average() == 36
    with handler.pruning(PruneConfig(1.0, 0.5, 3)):
        stream = ask(llm, stream=True)
    assert list(stream)[-1]["star_edge"]["average_tokens"] == 108
    with pytest.raises(errors.ConfigError, match="no preset 'fsat'"), handler.pruning("fsat"):
        pass
    with pytest.raises(errors.ConfigError, match="no preset"):
        handler.prune = "fsat"
    with pytest.raises(errors.ConfigError, match="no preset"):
        StarChatHandler(refvlm.MMPROJ, prune="fsat")
    assert average() == 36


def test_report_comes_back_with_the_response(llm, handler):
    response = ask(llm, user(DEMO, PLATE), max_tokens=8)
    summary = json.loads(json.dumps(response, allow_nan=False))["star_edge"]
    assert len(json.dumps(summary)) < 2000
    tokens = {
        "n_tokens": 144,
        "n_special": 0,
        "n_redundant": 0,
        "n_encoder_kept": 144,
        "n_vision_kept": kept("balanced").vision,
        "n_decoder_kept": kept("balanced").decoder,
    }
    of_no_video = {"video": None, "second": None}
    assert summary["images"] == [{"picture": 0, **tokens, "cached": True, **of_no_video}]
    assert summary["pictures"] == [{"images": [0], **tokens}]
    assert (summary["config"]["vision_keep"], summary["decoder_layer"], summary["n_layers"]) == (
        PRESETS["balanced"].vision_keep,
        4,
        6,
    )
    assert summary["n_kv_cells"] == summary["n_text_tokens"] + kept("balanced").decoder
    assert summary["n_generated"] == 2 and summary["n_sampled"] == 3  # two digits, and the end
    assert {"preprocess", "encode", "probe", "resume", "first_token", "generate"} <= set(summary["milliseconds"])
    report = handler.last_report
    assert report.figures() == summary and len(report.images[0].decoder_kept) == kept("balanced").decoder
    assert {k: report.to_dict()[k] for k in summary if k != "images"} == {
        k: v for k, v in summary.items() if k != "images"
    }
    assert report.milliseconds["first_token"] >= report.milliseconds["encode"] > 0

    chunks = list(ask(llm, user(DEMO, PLATE), max_tokens=8, stream=True))
    assert all("star_edge" not in chunk for chunk in chunks[:-1])
    last = json.loads(json.dumps(chunks[-1]))["star_edge"]
    assert last["n_generated"] == 2 and last["milliseconds"]["generate"] > 0
    assert streamed(chunks) == text_of(response)
    assert ask(llm, {"role": "user", "content": "is there a red star?"})["star_edge"]["n_image_tokens"] == 0


def test_a_template_that_takes_only_strings():
    """Many text models of LLaVA files have one: MTMDChatHandler shows them a Python list."""
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}[assistant]"
    handler = StarChatHandler(refvlm.MMPROJ)
    llm = load(handler, template=template)
    response = ask(llm, user("look:", DEMO, COLOR), assistant("red"), user(COLOR))
    text = f"[user]look:{COLOR}[assistant]red[user]{COLOR}[assistant]"
    assert abs(handler.last_report.n_text_tokens - len(llm.tokenize(text.encode()))) <= 6
    assert response["star_edge"]["n_decoder_kept"] == kept("balanced").decoder
    llm.close()


# ---- images ----


def test_sources_of_images(llm, tmp_path):
    expected = ask(llm, logprobs=None)
    path = tmp_path / "a picture.png"
    path.write_bytes(refvlm.DEMO_IMAGE.read_bytes())
    for url in (str(path), path.as_uri(), f"file://localhost{path.as_uri()[7:]}"):
        message = {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": COLOR}],
        }
        response = ask(llm, message)
        assert text_of(response) == text_of(expected) and response["usage"] == expected["usage"]
    # the question may name the image
    named = {"role": "user", "content": [message["content"][0], {"type": "text", "text": f"{url} {COLOR}"}]}
    assert ask(llm, named)["star_edge"]["n_image_tokens"] == 144


def test_image_loader_and_limits():
    asked = []

    def loader(url):
        asked.append(url)
        return load_image(refvlm.DEMO_IMAGE)[:, ::-1]  # a view: not contiguous

    llm = load(StarChatHandler(refvlm.MMPROJ, image_loader=loader))
    mirrored = ask(llm, user("data:1", "data:2", COLOR))
    assert asked == ["data:1", "data:2"] and mirrored["star_edge"]["n_image_tokens"] == 288
    report = llm.chat_handler.last_report
    llm.chat_handler.image_loader = lambda url: np.ascontiguousarray(load_image(refvlm.DEMO_IMAGE)[:, ::-1])
    ask(llm, user("data:1", "data:2", COLOR))
    assert np.array_equal(report.images[0].vision_scores, llm.chat_handler.last_report.images[0].vision_scores)
    for bad in (
        None,
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ):
        llm.chat_handler.image_loader = lambda url, bad=bad: bad
        with pytest.raises(errors.ImageError, match="image_loader returned"):
            ask(llm)
    llm.close()

    llm = load(StarChatHandler(refvlm.MMPROJ, image_limits=ImageLimits(max_pixels=1000, allow_http=False)))
    with pytest.raises(errors.ImageTooLargeError):
        ask(llm)
    with pytest.raises(errors.ImageError, match="HTTP is off"):
        ask(llm, {"role": "user", "content": [{"type": "image_url", "image_url": "http://127.0.0.1:9/a.png"}]})
    llm.close()


def test_encoder_options_reach_the_encoder(families):
    models = families["qwen2vl"]
    n_tokens = {}
    for limit in (4, 16):
        handler = StarChatHandler(models.mmproj, image_min_tokens=limit, image_max_tokens=limit, use_gpu=False)
        llm = load(handler, models.text)
        n_tokens[limit] = ask(llm, user(data_url(random_image(1, 112, 112)), "?"))["star_edge"]["n_image_tokens"]
        llm.close()
    assert n_tokens == {4: 4, 16: 16}


@pytest.mark.parametrize(
    ("llama_flash", "encoder_flash", "expected"),
    [(False, None, False), (True, None, True), (True, False, False), (False, True, True)],
)
def test_flash_attention_of_the_encoder(llama_flash, encoder_flash, expected):
    handler = StarChatHandler(refvlm.MMPROJ, encoder_flash_attn=encoder_flash)
    llm = load(handler, flash_attn=llama_flash)
    ask(llm)
    assert handler._reader.encoder.last_outcome.flash is expected
    llm.close()


# ---- the page ----


def test_script_of_the_page(tmp_path, monkeypatch, capsys):
    """The block after the marker runs as it is, with the reference model in place of the user's files."""
    (code,) = pages.executed("docs/chat-handler.md", "script")
    for name, source in (
        ("text.gguf", refvlm.TEXT_MODEL),
        ("mmproj.gguf", refvlm.MMPROJ),
        ("receipt.png", refvlm.DEMO_IMAGE),
    ):
        (tmp_path / name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    variables = {}
    exec(compile(code, "docs/chat-handler.md", "exec"), variables)
    printed = capsys.readouterr().out
    assert str(kept("balanced").average) in printed and str(kept("fast").average) in printed
    variables["llm"].close()
