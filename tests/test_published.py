"""Files of benchmarks as they are published: read, and asked by the command."""

import base64
import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from star_edge.errors import EvaluationError, InputFileError
from star_edge.evaluation.configs import OFF
from star_edge.evaluation.metrics import METRICS
from star_edge.evaluation.published import LETTER, SHORT, read_question_set
from star_edge.evaluation.summary import summarise, tables
from star_edge.io.questions import sample_questions

FOLDER = Path(__file__).parent / "refvlm_questions"
QUESTIONS = [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text(encoding="utf-8").split("\n") if line]

# ---- published files ----


def picture(path, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def sources_of(found):
    return [list(q.sources) for q in found.questions]


def test_pope(tmp_path):
    """github.com/AoiDragon/POPE, output/coco/coco_pope_random.json: JSON Lines in spite of the name."""
    lines = [
        {
            "question_id": i,
            "image": "COCO_val2014_000000548882.jpg",
            "image_id": 548882,
            "text": f"Is there a {thing} in the image?",
            "label": label,
        }
        for i, (thing, label) in enumerate((("sandwich", "yes"), ("tv", "no")))
    ]
    path = tmp_path / "coco_pope_random.json"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = read_question_set(path)
    assert [(q.id, q.answers, q.prompt) for q in found.questions] == [
        ("0", ("yes",), "Is there a sandwich in the image?"),
        ("1", ("no",), "Is there a tv in the image?"),
    ]
    assert (found.metric, found.prompt_suffix) == ("auto", "")
    assert read_question_set(path, FOLDER).questions[0].sources == (str(FOLDER / "COCO_val2014_000000548882.jpg"),)


def textvqa(**changes):
    return {
        "question": "what is the brand of this camera?",
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Cassette deck", "Printer"],
        "flickr_original_url": "https://farm2.staticflickr.com/4/5_o.jpg",
        "flickr_300k_url": "https://c4.staticflickr.com/4/5_z.jpg",
        "image_width": 1024,
        "image_height": 664,
        "answers": ["nous les gosses", "dakota", *["dakota digital"] * 8],
        "question_tokens": ["what", "is"],
        "question_id": 34602,
        "set_name": "val",
        **changes,
    }


def test_textvqa(tmp_path):
    path = tmp_path / "TextVQA_0.5.1_val.json"
    data = [textvqa(), textvqa(question_id=34603, question="what does it say?")]
    path.write_text(
        json.dumps({"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data})
    )
    assert sources_of(read_question_set(path))[0] == [str(tmp_path / "003a8ae2ef43b901.jpg")]
    (tmp_path / "train_images").mkdir()
    found = read_question_set(path)
    assert sources_of(found)[0] == [str(tmp_path / "train_images" / "003a8ae2ef43b901.jpg")]
    assert (found.metric, found.prompt_suffix) == ("vqa", SHORT)
    question = found.questions[0]
    assert question.id == "34602" and len(question.answers) == 10 and question.images == ("003a8ae2ef43b901.jpg",)
    assert METRICS["vqa"]("Dakota Digital", question) == 1 and METRICS["vqa"]("dakota", question) == pytest.approx(0.3)
    assert sources_of(read_question_set(path, tmp_path))[0] == [str(tmp_path / "003a8ae2ef43b901.jpg")]
    del data[0]["answers"], data[1]["answers"]  # as in its test set
    path.write_text(json.dumps({"data": data}, indent=2))
    assert [q.answers for q in read_question_set(path).questions] == [(), ()]


def test_docvqa(tmp_path):
    """docvqa.org, task 1; the newer files have question_types."""
    entry = {
        "questionId": 337,
        "question": "what is the date mentioned in this letter?",
        "question_types": ["handwritten", "form"],
        "image": "documents/xnbl0037_1.png",
        "docId": 279,
        "ucsf_document_id": "xnbl0037",
        "ucsf_document_page_no": "1",
        "answers": ["1/8/93"],
        "data_split": "val",
    }
    older = {k: v for k, v in entry.items() if k != "question_types"} | {"questionId": 338}
    path = tmp_path / "val_v1.0.json"
    path.write_text(json.dumps({"dataset_name": "docvqa", "dataset_split": "val", "data": [entry, older]}))
    found = read_question_set(path)
    assert [(q.id, q.answers, q.category) for q in found.questions] == [
        ("337", ("1/8/93",), "handwritten"),
        ("338", ("1/8/93",), None),
    ]
    assert sources_of(found)[0] == [str(tmp_path / "documents" / "xnbl0037_1.png")]
    assert found.metric == "anls" and METRICS["anls"]("1/8/94", found.questions[0]) == pytest.approx(5 / 6)


def test_chartqa(tmp_path):
    """github.com/vis-nlp/ChartQA, ChartQA Dataset/test/test_human.json beside the folder png."""
    (tmp_path / "png").mkdir()
    path = tmp_path / "test_human.json"
    path.write_text(
        '[{"imgname": "41699051005347.png", "query": "How many food item is shown in the bar graph?", "label": "14"}, '
        '{"imgname": "41699051005347.png", "query": "Is the sum value more then Fiji?", "label": "No"}]'
    )
    found = read_question_set(path)
    assert [(q.id, q.answers) for q in found.questions] == [("1", ("14",)), ("2", ("No",))]
    assert sources_of(found) == [[str(tmp_path / "png" / "41699051005347.png")]] * 2
    assert (found.metric, found.prompt_suffix) == ("relaxed", SHORT)
    assert METRICS["relaxed"]("14.5", found.questions[0]) == 1 and METRICS["relaxed"]("no", found.questions[1]) == 1


def test_ocrbench(tmp_path):
    """github.com/Yuliang-Liu/MultimodalOCR, OCRBench.json: over several lines, one answer or a list."""
    entries = [
        {
            "dataset_name": "IIIT5K",
            "id": 2843,
            "image_path": "IIIT5K/test/918_1.png",
            "question": "what is written in the image?",
            "answers": "CENTRE",
            "type": "Regular Text Recognition",
        },
        {
            "dataset_name": "HME100k",
            "id": 2843,
            "image_path": "HME100k/a.jpg",
            "question": "Please write out the expression of the formula in the image using LaTeX format.",
            "answers": ["x ^ { 2 }", "x*x"],
            "type": "Handwritten Mathematical Expression Recognition",
        },
    ]
    (tmp_path / "OCRBench_Images").mkdir()
    path = tmp_path / "OCRBench.json"
    path.write_text(json.dumps(entries, indent=4))
    found = read_question_set(path)
    word, formula = found.questions
    assert word.sources == (str(tmp_path / "OCRBench_Images" / "IIIT5K" / "test" / "918_1.png"),)
    assert word.answers == ("CENTRE",) and word.category == "Regular Text Recognition" and word.id != formula.id
    score = METRICS[found.metric]
    assert (score("The word centre", word), score("x^{2}", formula), score("X^{2}", formula)) == (1, 1, 0)
    assert found.prompt_suffix == ""


def test_gqa(tmp_path):
    """cs.stanford.edu/people/dorarad/gqa, questions1.2/testdev_balanced_questions.json beside the folder images."""
    entry = {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
        "entailed": ["02930160"],
        "equivalent": ["02930152"],
        "question": "Is the sky dark?",
        "imageId": "2354786",
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "answer": "yes",
        "semanticStr": "select: sky (2486325)->verify color: dark [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "fullAnswer": "Yes, the sky is dark.",
    }
    (tmp_path / "images").mkdir()
    (tmp_path / "questions1.2").mkdir()
    path = tmp_path / "questions1.2" / "testdev_balanced_questions.json"
    path.write_text(json.dumps({"02930152": entry, "02930153": {**entry, "answer": "sky", "types": None}}))
    found = read_question_set(path)
    assert [(q.id, q.answers, q.category) for q in found.questions] == [
        ("02930152", ("yes",), "verify"),
        ("02930153", ("sky",), None),
    ]
    assert [Path(q.sources[0]) for q in found.questions] == [tmp_path / "images" / "2354786.jpg"] * 2
    assert found.metric == "exact" and METRICS["exact"]("Yes.", found.questions[0]) == 1


COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category")


def encoded(path):
    return base64.b64encode(Path(path).read_bytes()).decode()


def mmbench(path, *rows):
    """As pandas writes it: fields with quotes or newlines are quoted, missing ones are empty."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_mmbench(tmp_path):
    """A question with four options in four rotations, whose pictures are in the first, and one with two options."""
    image = encoded(FOLDER / "0000.png")
    options = ["a cat", 'a "dog"', "a cow", "a pig"]
    rotated = [options[i:] + options[:i] for i in range(4)]
    rows = [
        {
            "index": 241 + 1_000_000 * i,
            "question": "Which animal?\nLook well.",
            "hint": "It barks.",
            **dict(zip("ABCD", texts)),
            "answer": "ABCD"[texts.index('a "dog"')],
            "category": "object",
            "image": image if not i else "241",
        }
        for i, texts in enumerate(rotated)
    ]
    rows.append({"index": 252, "question": "Day?", "A": "yes", "B": "no", "answer": "A", "image": image})
    found = read_question_set(mmbench(tmp_path / "MMBench_DEV_EN.tsv", *rows))
    first, *_, last = found.questions
    assert first.prompt == 'It barks.\nWhich animal?\nLook well.\nA. a cat\nB. a "dog"\nC. a cow\nD. a pig'
    assert last.prompt == "Day?\nA. yes\nB. no" and last.category is None
    assert [(q.id, q.answers[0], q.group) for q in found.questions] == [
        ("241", "B", "241"),
        ("1000241", "A", "241"),
        ("2000241", "D", "241"),
        ("3000241", "C", "241"),
        ("252", "A", "252"),
    ]
    assert len({q.sources for q in found.questions}) == 1 and first.sources[0].endswith(image)
    assert len(first.images[0]) < 40 and len({q.fingerprint for q in found.questions}) == 5
    assert (found.metric, found.prompt_suffix) == ("choice", LETTER)
    assert sample_questions(found.questions, 1, None) == found.questions[:4]  # a question with its rotations
    for seed in range(5):
        assert len(sample_questions(found.questions, 1, seed)) in (4, 1)


def test_circular_evaluation_by_hand(tmp_path):
    """Five rows: three of one question, all right, and two of another, one right. 4 of 5 rows, 1 of 2 questions."""
    image = encoded(FOLDER / "0000.png")
    row = {"question": "?", "A": "x", "B": "y", "answer": "A", "image": image}
    indices = (1, 1_000_001, 2_000_001, 2, 1_000_002)
    found = read_question_set(mmbench(tmp_path / "m.tsv", *({**row, "index": i} for i in indices)))
    records = {
        (q.id, "off"): {
            "task": q.id,
            "config": "off",
            "answer": "A",
            "score": float(q.id != "2"),
            "kl": 0.0,
            "average_tokens": 1.0,
            "first_token_ms": 1.0,
            "unpruned_first_token_ms": 1.0,
            "notes": [],
        }
        for q in found.questions
    }
    summary = summarise(found.questions, [OFF], records, "choice")
    assert (summary["configs"][0]["accuracy"], summary["configs"][0]["group_accuracy"]) == (0.8, 0.5)
    assert "whole groups" in tables(summary)[0].header
    ungrouped = summarise(read_question_set(FOLDER / "questions.jsonl").questions[:1], [OFF], {}, "exact")
    assert ungrouped["configs"][0]["group_accuracy"] is None


# ---- files that are none ----


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", '[{"a": 1}]', "in no layout of TextVQA, DocVQA"),
        ("a.json", '{"data": []}', "in no layout"),
        ("a.json", '[\n{"imgname": "a", ', "not valid JSON"),
        ("a.json", "", "has no questions"),
        ("a.json", "[]", "line 1 is a list"),
        ("a.json", "{nope", "line 1 is not valid JSON"),
        ("a.json", json.dumps([{"imgname": "a", "query": "q", "label": "x"}, 5]), "item 2 is a int"),
        ("a.json", json.dumps([{"imgname": 5, "query": "q", "label": "x"}]), r"item 1 has images=\[5\]"),
        ("a.json", json.dumps([{"imgname": None, "query": "q", "label": "x"}]), "item 1 names no image"),
        ("a.json", json.dumps([{"imgname": "a", "query": 5, "label": "x"}]), "item 1 has no question"),
        ("a.json", json.dumps({"data": [textvqa(), textvqa()]}), "items 1 and 2 have the same id '34602'"),
        ("a.json", json.dumps({"data": [textvqa(image_id=[1])]}), "item 1 has images"),
        (
            "a.json",
            '[{"imgname": "a", "query": "q", "label": "x"}]\n{"image": "a", "question": "b"}',
            "line 1 is a list",
        ),
        ("a.tsv", "", "without the columns index, question"),
        ("a.tsv", "index\tquestion\tA\tB\n", "without the columns image"),
        ("a.tsv", "index\tquestion\tA\tB\timage\n", "has no questions"),
        ("a.tsv", "index\tquestion\tA\tB\timage\n1\tq\tx\n", "fewer than two options"),
        ("a.tsv", "index\tquestion\tA\tB\timage\n1\tq\tx\ty\t7\n", "no row '7' has one"),
        ("a.tsv", "index\tquestion\tA\tB\tanswer\timage\n1\tq\tx\ty\tC\t7\n", "the answer 'C'"),
        (
            "a.tsv",
            "index\tquestion\tA\tB\timage\n1\t\tx\ty\t" + "A" * 80 + "\n" + "1\t\tx\ty\t" + "A" * 80,
            "same id '1'",
        ),
    ],
)
def test_other_files_are_refused_with_the_place(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputFileError, match=words) as caught:
        read_question_set(path)
    assert name in str(caught.value) and caught.value.remedy and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "latin.tsv").write_bytes(b"index\tquestion\tA\tB\timage\n1\t\xff\n")
    for name in ("no.tsv", "no.json", "latin.tsv"):
        with pytest.raises(EvaluationError, match=f"{name} cannot be read"):
            read_question_set(tmp_path / name)
    limit = csv.field_size_limit()
    monkeypatch.setattr("star_edge.io.json_input.MAX_CHARACTERS", 100)
    (tmp_path / "long.tsv").write_text("index\tquestion\tA\tB\timage\n" + "x" * 200)
    with pytest.raises(EvaluationError, match="long.tsv cannot be read .*more than"):
        read_question_set(tmp_path / "long.tsv")
    assert csv.field_size_limit() == limit


# ---- the command ----

OWN = [q for q in QUESTIONS if q["family"] == "color"][:5]
DOCVQA = {"docId": 1, "ucsf_document_id": "x", "ucsf_document_page_no": "1", "data_split": "val"}


def published(folder, layout):
    """Five of the reference model's own questions about colours, as that benchmark publishes them."""
    own = OWN
    text = lambda q: q["question"]
    answer = lambda q: q["answer"]
    if layout == "TextVQA":
        data = [
            textvqa(question=text(q), image_id=Path(q["image"]).stem, answers=[answer(q)] * 10, question_id=i)
            for i, q in enumerate(own)
        ]
        for q in own:
            copy = folder / "train_images" / Path(q["image"]).with_suffix(".jpg").name
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes((FOLDER / q["image"]).read_bytes())  # a PNG: what counts is the content
        return "TextVQA_0.5.1_val.json", json.dumps({"data": data})
    if layout == "DocVQA":
        data = [
            {"questionId": i, "question": text(q), "image": str(FOLDER / q["image"]), "answers": [answer(q)], **DOCVQA}
            for i, q in enumerate(own)
        ]
        return "val_v1.0.json", json.dumps({"data": data})
    if layout == "ChartQA":
        return "test_human.json", json.dumps(
            [{"imgname": str(FOLDER / q["image"]), "query": text(q), "label": answer(q)} for q in own]
        )
    if layout == "OCRBench":
        return "OCRBench.json", json.dumps(
            [
                {
                    "dataset_name": "IIIT5K",
                    "id": 1,
                    "image_path": str(FOLDER / q["image"]),
                    "question": text(q),
                    "answers": answer(q),
                    "type": "Regular Text Recognition",
                }
                for q in own
            ],
            indent=4,
        )
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, delimiter="\t", restval="")
    writer.writeheader()
    for i, q in enumerate(own):
        row = {"question": text(q), "A": answer(q), "B": "nothing", "answer": "A"}
        writer.writerow({"index": i, **row, "image": encoded(FOLDER / q["image"])})
    return "mmbench_dev_en.tsv", file.getvalue()


@pytest.mark.parametrize(
    ("layout", "metric", "title"),
    [
        ("TextVQA", "vqa", "VQA accuracy"),
        ("DocVQA", "anls", "ANLS"),
        ("ChartQA", "relaxed", "relaxed accuracy"),
        ("OCRBench", "ocrbench", "OCRBench accuracy"),
        ("MMBench", "choice", "accuracy of choices"),
    ],
)
def test_eval_runs_them(star_edge, tmp_path, layout, metric, title):
    """The reference model answers its own questions; the suffix is left out, since it knows no other prompts."""
    name, text = published(tmp_path, layout)
    (tmp_path / name).write_text(text)
    args = ("eval", name, "--preset", "quality", "-n", "4", "-t", "1", "--out", "r.jsonl", "--json")
    data = json.loads(star_edge(*args, "--prompt-suffix", "").stdout)
    off = data["configs"][0]
    assert (data["metric"], data["n_tasks"], data["n_errors"]) == (metric, 5, 0)
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()][1:]
    said = {r["task"]: r["answer"].strip() for r in records if r["config"] == "off"}
    right = [a == q["answer"] for a, q in zip(said.values(), OWN)]  # one word: every metric says 1 or 0
    assert len(right) == 5 and off["accuracy"] == sum(right) / 5
    assert any(right) or layout == "MMBench"  # its prompts are none that the reference model was trained on
    table = star_edge(*args[:-1], "--prompt-suffix", "").stdout  # all from r.jsonl
    assert title in table
    if layout != "OCRBench":  # it has no suffix
        error = star_edge(*args, status=2).stderr
        assert "--prompt-suffix '', and now it is " in error and "Answer" in error


def test_a_metric_can_be_chosen(star_edge, tmp_path):
    name, text = published(tmp_path, "ChartQA")
    (tmp_path / name).write_text(text)
    args = ("eval", name, "--preset", "off", "-n", "4", "-t", "1", "--prompt-suffix", "", "--json")
    assert json.loads(star_edge(*args, "--metric", "anls").stdout)["metric"] == "anls"
    assert "letter of an option" in star_edge(*args, "--metric", "choice", status=2).stderr
