"""The generator of tools/pagevlm: seeded, and its answers stand in the picture; its files: stock llama.cpp reads them
as they are meant.

Needs no torch. Where torch is there, a random model's answers are compared too.
"""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import stock
from helpers.reference_qwen2vl_vision import QwenVisionEncoder

TOOL = Path(__file__).parent.parent / "tools" / "pagevlm"
NAMES = ("batches", "config", "export", "files", "pictures", "vocabulary", "weights")
GRIDS = ((8, 8), (12, 16), (24, 24))


def load_tool(names):
    """The tool's modules: it is a folder of scripts, which import each other by bare names that tools/refvlm uses as
    well.
    """
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if (TOOL / f"{name}.py").exists()}
    sys.path.insert(0, str(TOOL))
    try:
        return {name: __import__(name) for name in names}
    finally:
        sys.path.remove(str(TOOL))
        for name in [name for name in sys.modules if (TOOL / f"{name}.py").exists()]:
            del sys.modules[name]
        sys.modules.update(hidden)


@pytest.fixture(scope="module")
def tool():
    return load_tool(NAMES)


def every_picture(tool, n=3):
    pictures = tool["pictures"]
    return [
        (f, grid, pictures.draw("test", 0, i, f, grid)) for f in pictures.FAMILIES for grid in GRIDS for i in range(n)
    ]


def test_a_picture_depends_on_its_number_alone(tool):
    draw = tool["pictures"].draw
    for family in tool["pictures"].FAMILIES:
        first = draw("test", 0, 5, family, (8, 8))
        draw("test", 0, 6, family, (12, 12))
        again = draw("test", 0, 5, family, (8, 8))
        assert (
            np.array_equal(first.tile, again.tile)
            and np.array_equal(first.palette, again.palette)
            and first.facts == again.facts
        )
        others = [draw(split, seed, 5, family, (8, 8)).facts for split, seed in (("train", 0), ("dev", 0), ("test", 1))]
        assert all(first.facts != other for other in others)


def shown(tool, picture, row, column, length):
    symbols = tool["vocabulary"].SYMBOLS
    return "".join(symbols[t] if t < len(symbols) else "#" for t in picture.tile[row, column : column + length])


def test_spelled_answers_stand_where_they_are_said_to_and_nothing_touches_them(tool):
    n = 0
    for _, _, p in every_picture(tool):
        for fact in p.facts:
            row, column, length = fact.place
            if not fact.spelled:
                continue
            assert shown(tool, p, row, column, length) == fact.answer, fact
            for beside in (column - 1, column + length):
                if 0 <= beside < p.columns:
                    assert shown(tool, p, row, beside, 1) in " #:", fact
            n += 1
    assert n > 1000


def test_what_a_question_names_stands_in_the_picture_once(tool):
    vocabulary = tool["vocabulary"]
    for family, _, p in every_picture(tool):
        lines = [re.split(r"[^A-Z0-9.]+", shown(tool, p, r, 0, p.columns)) for r in range(p.rows)]
        words = [w.strip(".") for line in lines for w in line]
        for fact in p.facts:
            assert sum(f.question == fact.question and f.answer != fact.answer for f in p.facts) == 0, fact
            for named in re.findall(r"[A-Z]{3,}", fact.question):
                if named in vocabulary.COLORS or named in vocabulary.SHAPES:
                    continue
                assert words.count(named) == 1, (family, fact)


def test_colours_of_bars_and_buttons_are_those_of_their_cells(tool):
    colors = tool["vocabulary"].COLORS
    n = 0
    for _, _, p in every_picture(tool):
        for fact in p.facts:
            row, column, _ = fact.place
            if fact.kind == "bar color":
                cell = p.paper[row - 1, column] if p.tile[row - 1, column] == 0 else p.ink[row - 1, column]
            elif fact.kind == "button color":
                cell = p.paper[row, column]
            elif fact.kind in ("color at", "color"):
                cell = p.ink[row, column]
            else:
                continue
            assert colors[cell] == fact.answer, fact
            n += 1
    assert n > 100


def test_the_highest_bar_is_the_one_of_the_largest_value(tool):
    for grid in GRIDS:
        for i in range(6):
            p = tool["pictures"].draw("test", 1, i, "chart", grid)
            values = {f.question.split()[-1].strip("?"): int(f.answer) for f in p.facts if f.kind == "height"}
            bars = {f.place[:2]: f.question.split()[-1].strip("?") for f in p.facts if f.kind == "bar color"}
            for fact in (f for f in p.facts if f.kind == "highest"):
                row = fact.place[0]
                title_row = [f for f in p.facts if f.kind == "bar color" and f.place[0] == row]
                assert values[fact.answer] >= max(
                    values[bars[f.place[:2]]] for f in title_row if same_chart(p, fact, f, values)
                )


def same_chart(picture, fact, other, values):
    """Charts stand beside each other on one row; only bars up to the next title's chart belong together: bars are 8 or
    10 cells apart.
    """
    columns = sorted(f.place[1] for f in picture.facts if f.kind == "bar color" and f.place[0] == fact.place[0])
    low, high = sorted((fact.place[1], other.place[1]))
    between = [c for c in columns if low <= c <= high]
    return all(b - a <= 10 for a, b in itertools.pairwise(between))


def test_batches_hold_what_is_asked(tool):
    batches, vocabulary = tool["batches"], tool["vocabulary"]
    plan = batches.BatchPlan("test", 0, 0, (12, 16), 6, 9)
    batch = batches.make_batch(plan)
    for b in range(6):
        facts = {
            f.question: f for f in tool["pictures"].draw("test", 0, b, tool["pictures"].FAMILIES[b], (12, 16)).facts
        }
        for q in range(9):
            at, target = batch["at"][b, q], batch["targets"][b, q]
            n = int((target != batches.IGNORED).sum())
            answer = vocabulary.decode(list(target[: n - 1]))
            question = vocabulary.decode(
                [t for t in batch["ids"][b, q, 1 : at[0] - 4] if t < vocabulary.N_SPECIAL_FROM]
            )
            assert facts[question].answer == answer
            assert list(batch["ids"][b, q, at[0] + 1 : at[0] + n]) == list(target[: n - 1])
            assert target[n - 1] == vocabulary.IM_END


@pytest.mark.parametrize("grid", [(8, 11), (11, 15), (6, 8)])
def test_places_and_labels_of_smaller_pictures_are_where_their_pixels_went(tool, grid):
    batches, drawn = tool["batches"], (12, 16)
    small = batches.make_batch(batches.BatchPlan("test", 0, 0, grid, 6, 9, drawn))
    full = batches.make_batch(batches.BatchPlan("test", 0, 0, drawn, 6, 9))
    assert np.array_equal(small["ids"], full["ids"]) and np.array_equal(small["cells"], full["cells"])
    asked = full["place"][..., 0] >= 0
    assert asked.sum() > 100 and (small["place"][~asked] == -1).all()
    for axis, side in ((0, 0), (2, 1)):  # rows, columns: of patches, two a token
        scale = grid[side] / drawn[side]
        begin = full["place"][asked][:, axis] * scale  # in patches of the smaller picture
        end = (full["place"][asked][:, axis + 1] + 1) * scale
        first, last = small["place"][asked][:, axis], small["place"][asked][:, axis + 1]
        near = 1e-9
        assert (first <= begin + near).all() and (first + 1 > begin - near).all()
        assert (last + 1 >= end - near).all() and (last < end + near).all()
    # Whoever asks what a point of the smaller picture shows gets what stood there
    whole = full["labels"][:, :, :, 0]
    for row, column, part in ((0, 0, 0), (5, 7, 1), (2 * grid[0] - 1, 2 * grid[1] - 1, 1)):
        y = int((row + 0.25 + 0.5 * part) * drawn[0] / grid[0])
        x = int((column + 0.5) * drawn[1] / grid[1])
        assert np.array_equal(small["labels"][:, row, column, part], whole[:, y, x])


def random_weights(config, n_tokens, seed=0):
    """Weights by the names of model.py, for the shapes of a small model."""
    rng = np.random.default_rng(seed)
    v, w, kv = config.v_width, config.width, config.kv_heads * config.head_size

    def matrix(rows, columns):
        return (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    def vector(n, middle=0.0):
        return (middle + 0.1 * rng.standard_normal(n)).astype(np.float32)

    weights = {"embedding.weight": matrix(n_tokens, w), "head.weight": matrix(n_tokens, w), "norm.weight": vector(w, 1)}
    for i in range(config.layers):
        for name, shape in {
            "q": (w, w),
            "kv": (2 * kv, w),
            "out": (w, w),
            "gate_up": (2 * config.ff, w),
            "down": (w, config.ff),
        }.items():
            weights[f"blocks.{i}.{name}.weight"] = matrix(*shape)
        weights |= {f"blocks.{i}.q.bias": vector(w), f"blocks.{i}.kv.bias": vector(2 * kv)}
        weights |= {f"blocks.{i}.norm{j}.weight": vector(w, 1) for j in (1, 2)}
    weights["vision.patch.weight"] = matrix(v, 3 * 14 * 14)
    weights |= {"vision.post_norm.weight": vector(v, 1), "vision.post_norm.bias": vector(v)}
    for i in range(config.v_layers):
        for name, shape in {"qkv": (3 * v, v), "out": (v, v), "up": (config.v_ff, v), "down": (v, config.v_ff)}.items():
            weights |= {
                f"vision.blocks.{i}.{name}.weight": matrix(*shape),
                f"vision.blocks.{i}.{name}.bias": vector(shape[0]),
            }
        for j in (1, 2):
            weights |= {f"vision.blocks.{i}.norm{j}.weight": vector(v, 1), f"vision.blocks.{i}.norm{j}.bias": vector(v)}
    weights |= {
        "merge_in.weight": matrix(4 * v, 4 * v),
        "merge_in.bias": vector(4 * v),
        "merge_out.weight": matrix(w, 4 * v),
    }
    weights["merge_out.bias"] = vector(w)
    return weights


@pytest.fixture(scope="module")
def files(tool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pagevlm")
    config = tool["config"].SIZES["tiny"]
    weights = random_weights(config, len(tool["vocabulary"].TOKENS))
    tool["export"].export(config, weights, folder)
    return folder, config, weights


def test_llama_cpp_splits_every_question_and_answer_as_the_tool_does(tool, files):
    names, vocabulary = tool["files"], tool["vocabulary"]
    llama = stock.load(files[0] / names.text_file("f16"), False, n_ctx=64)
    texts = {(f.question, f.answer) for _, _, p in every_picture(tool) for f in p.facts}
    assert len(texts) > 1000
    for question, answer in texts:
        prompt = f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
        assert llama.tokenize(prompt.encode(), add_bos=False, special=True) == list(vocabulary.encode_prompt(question))
        assert llama.tokenize(answer.encode(), add_bos=False, special=False) == vocabulary.encode(answer)
        assert len(vocabulary.encode(answer)) == len(answer) <= vocabulary.MAX_ANSWER
    llama.close()


def test_the_mmproj_has_qwen2_vls_graph(tool, files):
    """The file is complete for the float64 reference of that graph, and its weights are where the graph looks for
    them.
    """
    folder, config, weights = files
    reference = QwenVisionEncoder(folder / tool["files"].mmproj_file("f16"))
    assert (reference.n_layer, reference.n_embd, reference.n_head) == (config.v_layers, config.v_width, config.v_heads)
    q, k, v = np.split(weights["vision.blocks.1.qkv.weight"], 3)
    for name, own in zip("qkv", (q, k, v)):
        assert np.abs(reference.tensors[f"v.blk.1.attn_{name}.weight"] - own).max() < 1e-3  # float16
    assert not reference.tensors["v.patch_embd.weight.1"].any()


def test_files_give_the_weights_back(tool, files):
    """What a training run goes on from: names, order and shapes as they were written."""
    folder, _, weights = files
    for kind, most in (("f16", 1e-3), ("q8_0", 0.02)):
        alone = folder / f"only-{kind}"
        alone.mkdir()
        for file in (tool["files"].text_file(kind), tool["files"].mmproj_file(kind)):
            (alone / file).symlink_to(folder / file)
        back = tool["weights"].read_gguf(alone)
        assert back.keys() == weights.keys()
        for name, own in weights.items():
            assert back[name].shape == own.shape and np.abs(back[name] - own).max() < most, name


def test_table_of_compare(tmp_path):
    """Relative accuracy, tokens over those of the whole picture; a question that the unpruned model was not asked does
    not count.
    """

    def record(config, i, category, right, average, tokens=100):
        return {"config": config, "id": i, "image": f"{i // 2}.png", "category": category, "right": right} | {
            "tokens": tokens,
            "average_tokens": average,
        }

    rows = [record("off", i, "page" if i < 2 else "scene", i != 3, 100) for i in range(4)]
    rows += [record("half", i, "page" if i < 2 else "scene", i in (0, 2), 25, 50) for i in range(5)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(TOOL / "compare.py"), "table", str(tmp_path / "r.jsonl")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == "| config | n | tokens, % | page | scene | all | interval |"
    # Of two pictures drawn with replacement the ratio is 1/2 (the page alone), 1 (the scene alone) or 2/3
    assert lines[3] == "| half | 4 | 25 | 50.0 | 100.0 | 66.7 | 50.0 to 100.0 |"
