"""`eureka eval` without engines: rows in every published form, what is asked, answers that were brought along judged to hand-computed scores."""

import base64
import io
import json
import zlib

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.evaluation.judge_model import Question, undecided
from eureka_megatron.evaluation.queries import message, query
from eureka_megatron.evaluation.rows import Rows, groups
from eureka_megatron.evaluation.scores import accuracy, by_group, pass_at
from eureka_megatron.evaluation.verdict import Verdict
from eureka_megatron.run.evaluate import EvalOptions, Protocol, pair_up, run_eval


def png(colour="red"):
    data = io.BytesIO()
    Image.new("RGB", (84, 84), colour).save(data, "PNG")
    return data.getvalue()


PICTURE = {"bytes": png(), "path": "1.png"}
MATHVISTA = {
    "pid": "1", "question": "How tall is it?", "image": "images/1.jpg", "decoded_image": PICTURE, "choices": None, "unit": "cm",
    "precision": 1.0, "answer": "1.2", "question_type": "free_form", "answer_type": "float",
    "metadata": {"category": "math-targeted-vqa", "task": "geometry problem solving", "skills": ["geometry reasoning", "algebraic reasoning"]},
}  # fmt: skip
MATHVERSE = {
    "sample_index": "1", "problem_index": "1", "problem_version": "Vision Only", "question": "", "image": PICTURE, "answer": "B",
    "question_type": "multi-choice", "metadata": {"subject": "Plane Geometry", "subfield": "Angle"}, "question_for_eval": "Find it.\nChoices:\nA:1\nB:2",
}  # fmt: skip
MATHVISION = {
    "id": "1", "question": "Which piece fits? <image1>", "options": ["red", "blue", "green", "white", "none"], "image": "images/1.jpg",
    "decoded_image": PICTURE, "answer": "B", "solution": None, "level": 3, "subject": "algebra",
}  # fmt: skip
OLYMPIAD = {
    "id": 7, "question": "Find $x$ in <image_1>.", "image_1": PICTURE, "image_2": None, "final_answer": ["$2$"], "context": "A ball.",
    "is_multiple_answer": False, "unit": None, "answer_type": "Numerical", "error": None, "subfield": "Mechanics",
}  # fmt: skip
WEMATH = {
    "ID": "1", "split": "testmini", "knowledge concept": "Area", "question": "How large?", "option": "A. 1; B. 2; C. No correct answer",
    "answer": "B", "image_path": PICTURE, "key": "2steps_1", "question number": 1, "knowledge concept description": "…",
}  # fmt: skip
MMK12 = {"id": "1", "question": "What is it?\nA. 1\nB、2", "answer": "B", "subject": "physics", "image": PICTURE}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def test_queries_are_the_authors_words():
    assert query("mathvista", MATHVISTA) == (
        "Hint: Please answer the question requiring a floating-point number with one decimal place and provide the final value, "
        "e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: How tall is it? (Unit: cm)"
    )
    chosen = MATHVISTA | {
        "choices": ["red", "blue"],
        "question_type": "multi_choice",
        "unit": None,
        "answer_type": "text",
    }
    assert query("mathvista", chosen) == (
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
        "Question: How tall is it?\nChoices:\n(A) red\n(B) blue"
    )
    assert query("mathverse", MATHVERSE).startswith(
        "According to the question shown in the image, please first conduct reasoning, and then"
    )
    assert query("mathverse", MATHVERSE | {"question": "Find x."}) == (
        "Please first conduct reasoning, and then answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
        "Question: Find x."
    )
    assert (
        query("mathvision", MATHVISION)
        == "Which piece fits? <image1>\n(A) red\n(B) blue\n(C) green\n(D) white\n(E) none\n"
    )
    assert query("mathvision", MATHVISION | {"options": list("ABCDE")}) == "Which piece fits? <image1>\n"
    assert query("olympiadbench", OLYMPIAD | {"subject": "Physics", "unit": "m"}) == (
        "The following is an open-ended problem from an International Physics competition. The answer of The problem should be a numerical "
        "value. Please calculate the answer according to the given requirements and the information provided. Please use LaTeX format to "
        "represent the variables and formulas used in the solution process and results. Please end your solution with "
        '"So the final answer is \\boxed{answer}(unit)." and give the result explicitly, note that the unit of the answer should not be '
        "included in \\boxed{}.\nA ball.\nFind $x$ in <image_1>."
    )
    several = OLYMPIAD | {
        "is_multiple_answer": True,
        "answer_type": "Numerical,Interval",
        "subject": "Math",
        "unit": float("nan"),
    }
    assert "with the answers in order being a numerical value, an interval. Please" in query("olympiadbench", several)
    assert "A ball" not in query("olympiadbench", several)
    assert "(unit)" not in query("olympiadbench", several)
    assert "<Answer>: <<your option>>" in query("wemath", WEMATH)
    assert query("mmk12", MMK12) == MMK12["question"]


@pytest.mark.parametrize("form", ["file.parquet", "snapshot", "file.jsonl", "file.json"])
def test_pictures_come_first_whatever_the_form_of_the_file(tmp_path, form):
    row = MATHVISION
    if form.endswith(("jsonl", "json")):
        row = {key: value for key, value in MATHVISION.items() if key != "decoded_image"}
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "1.jpg").write_bytes(png())
    if form == "snapshot":
        write(tmp_path / "data" / "testmini-00000-of-00001.parquet", [row] * 3)
        write(tmp_path / "data" / "test-00000-of-00002.parquet", [row])
        write(tmp_path / "data" / "test-00001-of-00002.parquet", [row | {"id": "2"}])
        path = tmp_path
    else:
        path = write(tmp_path / form, [row, row | {"id": "2"}])
    rows = Rows("MathVision", path)
    assert (len(rows), rows.ids) == (2, ["1", "2"])
    (turn,) = rows.chat(1)
    assert [part["type"] for part in turn["content"]] == ["image", "text"]
    assert turn["content"][0]["image"] in (png(), "images/1.jpg")


def test_mathvista_of_the_repository_is_a_dictionary_by_pid(tmp_path):
    row = {key: value for key, value in MATHVISTA.items() if key not in ("pid", "decoded_image")} | {"image": "1.png"}
    (tmp_path / "1.png").write_bytes(png())
    rows = Rows("mathvista", write(tmp_path / "testmini.json", {"17": row, "18": row}))
    assert rows.ids == ["17", "18"]
    assert groups("mathvista", rows[0])["skills"] == ["geometry reasoning", "algebraic reasoning"]


def test_tables_of_vlmevalkit_are_brought_into_the_published_schema(tmp_path):
    noise = Image.frombytes(
        "RGB", (84, 84), zlib.compress(b"x") * 2117 + b"\0" * (84 * 84 * 3 - 2117 * len(zlib.compress(b"x")))
    )
    data = io.BytesIO()
    noise.save(data, "PNG")
    picture = base64.b64encode(data.getvalue()).decode()
    lines = [
        "index\timage\tquestion\tanswer\tA\tB\tkey\tID\toption\tquestion_type\tanswer_type\tchoices\tanswer_option"
    ]
    lines += [
        f"3\t{picture}\tHow large?\tB\t1\t2\t2steps_1\t5\t\t\t\t\t",
        f"4\t3\t{'x' * 9}\tA\t1\t2\t2steps_2\t5\t\t\t\t\t",
    ]
    (tmp_path / "WeMath.tsv").write_text("\n".join(lines) + "\n")
    rows = Rows("wemath", tmp_path / "WeMath.tsv")
    assert rows[0]["option"] == "A. 1; B. 2"
    assert rows.ids == ["5/2steps_1", "5/2steps_2"]
    shown = [rows.chat(index)[0]["content"][0]["image"] for index in range(2)]
    assert shown[0] == shown[1] == f"data:image/png;base64,{picture}"
    lines[1:] = [
        f"0\t{picture}\tHint: Please …\nQuestion: Which?\tB\t\t\t\t\t\tmulti_choice\ttext\t\"['red', 'blue']\"\tB".replace(
            "\n", " "
        )
    ]
    (tmp_path / "MathVista.tsv").write_text("\n".join(lines) + "\n")
    (row,) = Rows("mathvista", tmp_path / "MathVista.tsv")
    assert (row["answer"], row["pid"]) == ("blue", "0")
    assert query("mathvista", row).startswith("Hint: Please …")


def test_rows_that_cannot_be_asked_or_judged_are_told_at_once(tmp_path):
    bad = [
        MATHVISTA | {"answer": ""},
        MATHVISTA,
        MATHVISTA | {"question": None},
        MATHVISTA | {"decoded_image": {"bytes": None, "path": "gone.png"}},
    ]
    with pytest.raises(UserError) as told:
        Rows("mathvista", write(tmp_path / "a.parquet", bad))
    lines = str(told.value).splitlines()
    assert [line.partition(": ")[0][-1] for line in lines[:3]] == ["1", "3", "4"]
    assert "has no 'answer'" in lines[0]
    assert lines[3] == "(further folders of pictures: data.media; of eureka eval --media)"
    with pytest.raises(UserError, match="does not exist"):
        Rows("mathvista", tmp_path / "none.parquet")
    with pytest.raises(UserError, match=r"row a line is named \.jsonl"):
        Rows("mathvista", write(tmp_path / "x.jsonl", [{"pid": "1"}, {"pid": "2"}]).rename(tmp_path / "x.json"))


def test_what_the_overall_score_does_not_count_is_left_out(tmp_path):
    rows = Rows("mathverse", write(tmp_path / "x.parquet", [MATHVERSE, MATHVERSE | {"problem_version": "Text Only"}]))
    assert (len(rows), sum(rows.left_out.values())) == (1, 1)
    folder = tmp_path / "hub"
    write(folder / "OE_MM_physics_en_COMP" / "train.parquet", [OLYMPIAD, OLYMPIAD])
    write(folder / "TP_MM_maths_en_COMP" / "train.parquet", [OLYMPIAD])
    write(folder / "OE_TO_maths_zh_CEE" / "train.parquet", [OLYMPIAD])
    with pytest.raises(UserError, match="holds no rows of olympiadbench"):  # its prompt is English
        Rows("olympiadbench", folder / "OE_TO_maths_zh_CEE")
    rows = Rows("olympiadbench", folder)
    assert rows.ids == ["7/OE_MM_physics_en_COMP", "7/OE_MM_physics_en_COMP#2"]
    assert "International Physics competition" in rows.chat(0)[0]["content"][-1]["text"]


def test_a_row_of_the_original_s_form_is_its_own_chat():
    chat = [{"role": "user", "content": "How many?"}]
    assert message("counting", {"message": chat, "answer": "3"}) is chat


def test_figures():
    found = accuracy([[True, False], [True, True], [False, False]])
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["pass"] == {1: pytest.approx(0.5), 2: pytest.approx(2 / 3)}
    assert 0 <= found["low"] < 0.5 < found["high"] <= 1
    assert accuracy([[True]] * 7) | {"pass": None} == {
        "accuracy": 1,
        "low": 1,
        "high": 1,
        "rows": 7,
        "samples": 1,
        "pass": None,
    }
    assert pass_at(2, 1, 4) == pytest.approx(0.5)  # 1 − C(3, 2) / C(4, 2)
    table = by_group([[True], [False], [True]], [{"skill": ["a", "b"]}, {"skill": ["b"]}, {}])
    assert {value: (s["accuracy"], s["rows"]) for value, s in table["skill"].items()} == {"a": (1.0, 1), "b": (0.5, 2)}


def test_letters_that_differ_leave_nothing_to_ask():
    assert not undecided(Verdict("A", False), "B")
    assert not undecided(Verdict(None, False), "B")
    assert not undecided(Verdict("0.5", True), "1/2")
    assert undecided(Verdict("half", False), "1/2")
    assert Question("q", "1/2", "half").answer == "half"


def test_options_that_cannot_hold_are_refused_before_anything_is_read(tmp_path, tiny_dir):
    with pytest.raises(ConfigError, match="did you mean 'mathvista'"):
        pair_up(tiny_dir, ["mathvist"], [tmp_path])
    with pytest.raises(ConfigError, match="2 benchmarks"):
        pair_up(tiny_dir, ["mathvista", "mmk12"], [tmp_path])
    options = {"model": tiny_dir, "output": tmp_path / "out"}
    for more, told in (({"samples": 4}, "--temperature above 0"), ({"judge_url": "x"}, "belong together")):
        with pytest.raises(ConfigError, match=told):
            run_eval(EvalOptions(benchmarks=(("mmk12", tmp_path),), **options, **more))
    assert EvalOptions(benchmarks=(), samples=2, max_tokens=9, **options).protocol("mmk12") == Protocol(max_tokens=9)


# Benchmark → rows, answers, right by the official rule, right by the paper's
CASES = {
    "mathvista": (
        [MATHVISTA, MATHVISTA | {"pid": "2", "choices": ["red", "blue"], "question_type": "multi_choice", "answer_type": "text", "answer": "blue"}],
        ["<answer>\\boxed{1.20}</answer>", "So it must be (B)"],
        [False, True], [True, True],
    ),
    "mathverse": ([MATHVERSE, MATHVERSE | {"sample_index": "2"}], ["\\boxed{B}", "\\boxed{(B)}"], [True, False], [True, True]),
    "mathvision": ([MATHVISION, MATHVISION | {"id": "2"}], ["The answer is (B).", "\\boxed{red}"], [True, False], [True, False]),
    "olympiadbench": (
        [OLYMPIAD, OLYMPIAD | {"id": 8}],
        ["So the final answer is \\boxed{2}.", "So the final answer is \\boxed{3}."],
        [True, False], [True, False],
    ),
    "wemath": (
        [WEMATH, WEMATH | {"key": "2steps_2"}, WEMATH | {"key": "2steps_multi"}],
        ["<Answer>: <<B>>", "<Answer>: <<A>>", "<answer>\\boxed{B}</answer>"],
        [True, False, False], [True, False, True],
    ),
    "mmk12": ([MMK12, MMK12 | {"id": "2"}], ["<answer>\\boxed{B}</answer>", "<answer>A</answer>"], [True, False], [True, False]),
}  # fmt: skip


def test_answers_that_are_there_are_judged_without_an_engine(tmp_path, tiny_dir):
    chosen = []
    for name, (rows, texts, _, _) in CASES.items():
        path = write(tmp_path / name / "rows.parquet", rows)
        folder = tmp_path / "out" / name
        ids = Rows(name, path).ids
        write(
            folder / "answers.jsonl",
            [{"id": id, "sample": 0, "response": text} for id, text in zip(ids, texts, strict=True)],
        )
        chosen.append((name, path))
    summary = run_eval(EvalOptions(model=tiny_dir, benchmarks=tuple(chosen), output=tmp_path / "out"))
    for name, (_, _, official, paper) in CASES.items():
        for rule, right in (("official", official), ("paper", paper)):
            assert summary[name]["scores"][rule]["accuracy"] == pytest.approx(sum(right) / len(right)), (name, rule)
        lines = [json.loads(line) for line in (tmp_path / "out" / name / "answers.jsonl").read_text().splitlines()]
        assert [line["official"]["correct"] for line in lines] == official, name
        assert [line["paper"]["correct"] for line in lines] == paper, name
    four = summary["wemath"]["scores"]
    assert (four["official"]["wemath"]["strict"]["IK"], four["paper"]["wemath"]["strict"]["RM"]) == (1, 1)
    assert (four["paper"]["wemath"]["loose"]["CM"], four["paper"]["wemath"]["loose"]["score"]) == (1, 1.0)
    assert summary["mathvista"]["groups"]["paper"]["skills"]["algebraic reasoning"]["rows"] == 2
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    again = run_eval(EvalOptions(model=tiny_dir, benchmarks=(chosen[0],), output=tmp_path / "out", limit=1))
    assert again["mathvista"]["rows"] == 1
    assert len((tmp_path / "out" / "mathvista" / "answers.jsonl").read_text().splitlines()) == 2  # none is lost
    assert set(json.loads((tmp_path / "out" / "summary.json").read_text())) == set(CASES)
    lines = tmp_path / "out" / "mathvista" / "answers.jsonl"
    lines.write_text(lines.read_text() + '{"id": "9", "response": "4"}\n')
    with pytest.raises(UserError, match=r"answers\.jsonl:3: a line must be a JSON object with id, sample"):
        run_eval(EvalOptions(model=tiny_dir, benchmarks=(chosen[0],), output=tmp_path / "out"))
    assert len(lines.read_text().splitlines()) == 3  # nor is anything cut
    with pytest.raises(ConfigError, match="there is no prompt 'mm_eureka_31b'"):
        run_eval(EvalOptions(model=tiny_dir, benchmarks=(chosen[0],), output=tmp_path, system_prompt="mm_eureka_31b"))
    bad = write(tmp_path / "bad" / "rows.parquet", [MMK12 | {"image": {"bytes": b"no picture", "path": None}}])
    unanswered = {"id": "1", "sample": 0, "response": "", "error": "it could not be decoded"}
    write(tmp_path / "bad" / "mmk12" / "answers.jsonl", [unanswered])
    found = run_eval(EvalOptions(model=tiny_dir, benchmarks=(("mmk12", bad),), output=tmp_path / "bad"))
    assert (found["mmk12"]["unanswered"], found["mmk12"]["scores"]["paper"]["accuracy"]) == (1, 0)
    with pytest.raises(UserError, match=r"sampled otherwise: max_tokens 4096 there, 17 now"):
        run_eval(EvalOptions(model=tiny_dir, benchmarks=(chosen[0],), output=tmp_path / "out", max_tokens=17))
