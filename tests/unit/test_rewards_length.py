"""Penalties on repetition and on length."""

import pytest

from eureka_megatron.rewards import score
from eureka_megatron.rewards.length import overlong_penalty, repetition_penalty


def test_repetition_is_the_share_of_repeated_n_grams():
    assert repetition_penalty(list(range(100)), max_penalty=1.0) == 0.0
    assert repetition_penalty([7] * 101, max_penalty=1.0, ngram=2) == pytest.approx(-0.99)
    assert repetition_penalty([1, 2, 3, 1, 2, 3], max_penalty=0.5, ngram=3) == pytest.approx(-0.5 * 0.25)
    assert repetition_penalty("a b a b a b", max_penalty=1.0, ngram=2) == pytest.approx(-3 / 5)
    assert repetition_penalty([1, 2], max_penalty=1.0) == 0.0
    assert repetition_penalty([1] * 100, max_penalty=0.0) == 0.0


LOOPS = {
    "Chinese": "我们再检查一次，得到同样的结果。",
    "Chinese, a character": "哈",
    "Chinese with a formula and a word": "答案是$x=\\frac{1}{2}$，再check一下。",
    "Japanese": "もう一度確認してみます。",
    "Japanese, half width": "ｶｸﾆﾝ",
    "Thai": "เราตรวจสอบอีกครั้งและได้ผลเหมือนเดิม",
    "Lao": "ພວກເຮົາກວດຄືນອີກ",
    "Burmese": "ကျွန်ုပ်တို့ထပ်စစ်ကြည့်သည်",
    "Khmer": "យើងពិនិត្យម្តងទៀត",
    "Tibetan": "ང་ཚོས་ཡང་བསྐྱར་བརྟག་དཔྱད་བྱེད།",
    "Korean": "다시 한번 확인하면 같은 결과가 나온다. ",
    "Korean without blanks": "다시확인합니다.",
    "Korean and Chinese": "한국어와中文을섞어서쓴다",
    "English": "wait, let me check that again: it is the same. ",
    "English without blanks": "Wait,let'scheckagain.",
    "letters": "abc",
    "one letter": "a",
    "a sum": "1+",
    "a formula": "\\frac{1}{2}+",
    "signs": "😀",
    "lines": "我们再检查一次，\n得到同样的结果。\n",
}


@pytest.mark.parametrize("language", LOOPS)
def test_a_loop_is_penalised_in_any_script_and_said_once_it_is_free(language: str):
    assert repetition_penalty(LOOPS[language] * 300, max_penalty=1.0) < -0.75
    assert repetition_penalty("<think>先想想。" + LOOPS[language] + "</think>", max_penalty=1.0) == 0.0


PROSE = {
    "Chinese": (
        "设圆心为O，连接OA、OB，由垂径定理得弦长的一半等于4，再用勾股定理求出半径为5。因为三角形OAB是等腰三角形，所以底边上的高平分顶角。"
        "接着求扇形的面积：圆心角的正弦是$\\frac{4}{5}$，圆心角约为$53^\\circ$，两倍就是$106^\\circ$。最后用扇形的面积减去三角形OAB的面积，"
        "就得到弓形的面积。检验一下：弓形比扇形小，比三角形多出来的部分大于零，结果合理。"
    ),
    "Japanese": (
        "円の中心をOとし、弦ABの中点をMとします。垂直二等分線は中心を通るので、三角形OMAは直角三角形です。三平方の定理より、半径は5センチメートルになります。"
        "次に扇形の面積を求めます。中心角が分かっているので、円全体の面積に割合を掛ければよいことが分かります。"
        "最後に三角形OABの面積を引けば、求める弓形の面積が得られます。"
    ),
    "Thai": (
        "ให้จุดโอเป็นจุดศูนย์กลางของวงกลม ลากเส้นตั้งฉากไปยังคอร์ดเอบี จะแบ่งครึ่งคอร์ดพอดี จากทฤษฎีบทพีทาโกรัสจะได้รัศมีเท่ากับห้าเซนติเมตร "
        "ต่อไปหาพื้นที่ของรูปสามเหลี่ยมมุมฉาก แล้วนำพื้นที่ของรูปสามเหลี่ยมมุมฉากไปลบออกจากพื้นที่ของเซกเตอร์ ก็จะได้คำตอบที่ต้องการ"
    ),
    "Korean": (
        "원의 중심을 O라 하고 현 AB의 중점을 M이라 하자. 수직이등분선은 중심을 지나므로 삼각형 OMA는 직각삼각형이다. 피타고라스 정리에 의하여 "
        "반지름은 5이다. 이제 부채꼴의 넓이에서 삼각형 OAB의 넓이를 빼면 구하는 활꼴의 넓이를 얻는다."
    ),
    "a formula said again": "由\\sqrt{a^2+b^2}\\geq\\frac{a+b}{\\sqrt{2}}得，又\\sqrt{a^2+b^2}\\geq\\frac{a+b}{\\sqrt{2}}，故\\sqrt{a^2+b^2}\\geq\\frac{a+b}{\\sqrt{2}}成立。",
}


@pytest.mark.parametrize("language", PROSE)
def test_prose_is_free(language: str):
    text = PROSE[language]
    assert repetition_penalty(text, max_penalty=1.0) == 0.0
    assert repetition_penalty(text * 20, max_penalty=1.0) < -0.75


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("我们 go，ok。", "我 们 go ， ok 。"),
        ("由$x^2=4$得x=±2", "由 $x^2=4$ 得 x=±2"),
        ("カタカナ「〇」", "カ タ カ ナ 「 〇 」"),
        ("ตรวจสอบ 12", "ตรวจ สอบ 12"),
        ("다시 ㅋㅋㅋ 확인(确认)", "다시 ㅋㅋㅋ 확인( 确 认 )"),
        ("𠀀𠀁x", "𠀀 𠀁 x"),
        ("“Straße”…\u3000naïve\u00a0déjà\nвода سلام", "“Straße”… naïve déjà вода سلام"),
        (
            "a" * 100 + " " + "abcdefghijklmnopq" * 6,
            "a" * 100 + " " + "abcd efgh ijkl mnop qabc defg hijk lmno pqab cdef "
            "ghij klmn opqa bcde fghi jklm nopq abcd efgh ijkl mnop qabc defg hijk lmno pq",
        ),
    ],
)
def test_what_an_item_of_text_is(text: str, items: str):
    names = items.split()
    expected = -(1 - len(set(names)) / len(names)) if len(names) > 1 else 0.0
    assert repetition_penalty(text, max_penalty=1.0, ngram=1) == pytest.approx(expected)
    assert repetition_penalty(text, max_penalty=1.0, ngram=1) == repetition_penalty(names, max_penalty=1.0, ngram=1)
    for ngram in (2, 3):
        doubled = repetition_penalty(f"{text} {text}", max_penalty=1.0, ngram=ngram)
        assert doubled == repetition_penalty(names * 2, max_penalty=1.0, ngram=ngram)


def test_words_between_blanks_count_as_before():
    for text in (
        "so it goes " * 40,
        "x = \\frac{1}{2} \\cdot y\n" * 30,
        "α β γ δ " * 9,
        "Да нет, да нет. " * 12,
        "1 2 3 1 2 3",
    ):
        for ngram in (1, 3, 20):
            found = repetition_penalty(text, max_penalty=0.5, ngram=ngram)
            assert found == repetition_penalty(text.split(), max_penalty=0.5, ngram=ngram)


def test_prose_and_formulas_that_go_on_are_free():
    chinese = (
        "如图，在平行四边形中，对角线相交于点，点在边上，连接并延长交于点。由平行线的性质可知两个内错角相等，又因为对顶角相等，"
        "所以两个三角形全等，从而得到对应边相等。因此四边形的对角线互相平分，它是平行四边形。接下来求面积：底边长为六，高为四，面积等于二十四。"
    )
    english = "The diagonals of a parallelogram bisect each other, so the triangles on both sides are congruent."
    formula = "\\frac{-b\\pm\\sqrt{b^2-4ac}}{2a}=" + "+".join(f"x_{{{n}}}^{n}" for n in range(60))
    for text in (chinese, english, formula, chinese + english + formula):
        assert repetition_penalty(text, max_penalty=1.0) > -0.02


@pytest.mark.parametrize(("length", "penalty"), [(0, 0), (3596, 0), (3846, -0.5), (4096, -1), (9999, -1)])
def test_overlong_falls_linearly_over_the_buffer(length: int, penalty: float):
    assert overlong_penalty(length, max_response_tokens=4096, buffer_tokens=500) == pytest.approx(penalty)


def test_a_buffer_longer_than_the_response_is_refused():
    with pytest.raises(ValueError, match=r"1\.\.100"):
        overlong_penalty(5, max_response_tokens=100, buffer_tokens=101)


def test_penalties_are_components_of_the_total():
    response = "<think>" + "la " * 50 + "</think><answer>4</answer>"
    verdict = score(
        response,
        "4",
        repetition=0.8,
        repetition_ngram=5,
        length_tokens=90,
        max_response_tokens=100,
        overlong_buffer_tokens=20,
        weights={"overlong": 0.5},
    )
    assert verdict["repetition"] == pytest.approx(-0.8 * 45 / 47, abs=0.05)
    assert verdict["overlong"] == pytest.approx(-0.25)
    assert verdict["total"] == pytest.approx(1.5 + verdict["repetition"] + verdict["overlong"])
    assert score(response, "4", weights={"accuracy": 2.0}) == {"accuracy": 1.0, "format": 0.5, "total": 2.5}
