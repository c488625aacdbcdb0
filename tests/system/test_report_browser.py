"""The report in a real browser: nothing on its console, no request, filters, keys, zoom, links, colour schemes, a phone, paper, time to open."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eureka_megatron.report.page import write_report
from tests.helpers.chromium import COMMAND, Chromium
from tests.helpers.made_run import MadeRun, make_long_run, make_run

pytestmark = pytest.mark.skipif(COMMAND is None, reason="no chromium in PATH (apt-get install chromium)")
SECTIONS = ("overview", "curves", "phases", "filter", "rollouts", "evaluation", "configuration", "faults")
HOSTILE = (
    "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"><b>bold</b>"
)
CHOSEN = "document.querySelector('#chosen span').textContent"
SHOWN = "document.querySelector('#detail h3').textContent"
COUNT = "document.querySelector('.pages').textContent"
RANGES = "[...document.querySelectorAll('#section-curves .js-plotly-plot')].slice(0, 4).map((plot) => plot.layout.xaxis.range.map(Math.round))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    one = make_run(folder / "one", MadeRun(steps=40))
    two = make_run(folder / "two", MadeRun(steps=30, seed=1), run={"name": "other"})
    hostile = make_run(folder / "hostile", MadeRun(steps=1, text=HOSTILE), run={"name": HOSTILE})
    return {
        "one": write_report([one]),
        "both": write_report([one, two], folder / "both.html"),
        "hostile": write_report([hostile]),
    }


@pytest.fixture(autouse=True)
def quiet(browser: Chromium) -> Iterator[None]:
    """Every test ends with nothing on the console, and nothing asked for but the page itself."""
    browser.errors.clear()
    browser.requests.clear()
    browser.look(1280, 900)
    yield
    assert browser.errors == []
    assert all(address.startswith(("file:", "data:", "about:", "blob:")) for address in browser.requests)


@pytest.mark.parametrize("name", ["one", "both", "hostile"])
def test_every_section_opens(browser: Chromium, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name])
    for number, section in enumerate(SECTIONS, 1):
        browser.press(str(number))
        browser.wait(f"document.querySelector('#section-{section}:not(.other)')?.children.length > 1")
    assert browser.ask("document.querySelectorAll('#main > section:not(.other)').length") == 1
    assert "taken" not in browser.ask("document.title")[:5]


def test_what_a_model_says_stays_text(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["hostile"], "#rollouts")
    browser.wait("document.querySelector('.card .text')")
    assert browser.ask("document.querySelector('.card .text').textContent") == HOSTILE + "<|im_end|>"
    assert browser.ask("document.querySelectorAll('main b b, .card .text b, img[onerror]').length") == 0
    assert browser.ask("document.title") == HOSTILE + " · eureka report"
    # Had it become markup after all, the page's policy would not have let it run.
    browser.ask(
        "document.body.append(document.createRange().createContextualFragment('<i onclick=\"window.ran = 1\"></i>'))"
    )
    browser.ask("document.querySelector('i').click()")
    assert browser.ask("window.ran === undefined")
    assert len(browser.errors) == 1
    assert "Content Security Policy" in browser.errors.pop()


def test_filters_leave_what_they_say(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["one"], "#rollouts")
    browser.wait("document.querySelector('.card')")
    assert browser.ask(COUNT).strip("‹›") == "1–100 of 160"  # steps 0, 10, 20, 30, 39
    set_field = "((label, value) => {{ const node = document.querySelector(`[aria-label='${{label}}']`); node.value = value; node.dispatchEvent(new Event('change')); }})({})"
    browser.ask(set_field.format("'step', '20'"))
    assert browser.ask(COUNT).strip("‹›") == "1–32 of 32"
    browser.ask(set_field.format("'accuracy', 'wrong'"))
    rows = "[...document.querySelectorAll('.row[role=option]')].map((row) => row.children[1].textContent + row.children[2].textContent)"
    wrong = browser.ask(rows)
    assert {row[0] for row in wrong} == {"✗"}
    browser.ask(set_field.format("'reward from', '0.5'"))
    assert browser.ask(rows) == [row for row in wrong if row != "✗0"]
    browser.ask(set_field.format("'sort by', 'longest'"))
    lengths = browser.ask(
        "[...document.querySelectorAll('.row[role=option]')].map((row) => Number(row.children[4].textContent))"
    )
    assert lengths == sorted(lengths, reverse=True)
    browser.ask(set_field.format("'tokens from', '1000'"))
    assert "No response is like this" in browser.ask("document.querySelector('#list').textContent")
    browser.ask(
        "[...document.querySelectorAll('#filters button')].find((node) => node.textContent === 'reset').click()"
    )
    assert browser.ask(COUNT).strip("‹›") == "1–100 of 160"


def test_pictures_stand_beside_prompt_and_responses(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["one"], "#rollouts/colour=difference")
    browser.wait("document.querySelector('.prompt img')?.naturalWidth === 84")
    assert browser.ask("document.querySelectorAll('.card').length") == 8
    assert "picture 1: 9 tokens" in browser.ask("document.querySelector('.prompt').textContent")
    tops = browser.ask(
        "['.prompt img', '.card'].map((name) => document.querySelector(name).getBoundingClientRect().top)"
    )
    assert abs(tops[0] - tops[1]) < 20
    for colour in ("advantage", "logprob", "difference", "entropy"):
        browser.open(pages["one"], f"#rollouts/colour={colour}")
        browser.wait("document.querySelector('.card .text span[style]')")
        shades = browser.ask(
            "new Set([...document.querySelectorAll('.card .text span')].map((node) => node.style.background)).size"
        )
        assert shades >= 2


def test_keys_walk_responses_and_groups(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["one"], "#rollouts")
    browser.wait("document.querySelector('.card')")
    for key, expected in (
        ("j", "0 · 0 · 1"),
        ("ArrowDown", "0 · 0 · 2"),
        ("k", "0 · 0 · 1"),
        ("l", "0 · 1 · 0"),
        ("ArrowRight", "0 · 2 · 0"),
        ("h", "0 · 1 · 7"),
    ):
        browser.press(key)
        browser.wait(f"{CHOSEN} === '{expected}'")
    browser.wait("document.querySelector('.card.chosen').getAttribute('aria-label') === 'response 7'")
    browser.press("c")
    browser.wait("document.querySelector('.legend').textContent.startsWith('advantage')")
    browser.press("/")
    assert browser.ask("document.activeElement.getAttribute('aria-label')") == "reward from"
    browser.press("j")
    assert browser.ask(CHOSEN) == "0 · 1 · 7", "in a field keys are text"
    browser.press("Escape")
    browser.press("?")
    assert browser.ask("document.querySelector('#help').open")


def test_a_link_leads_to_the_response(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["both"], "#rollouts/run=1&step=20&group=2&response=5")
    browser.wait("document.querySelector('.card.chosen')")
    assert browser.ask(CHOSEN) == "20 · 2 · 5"
    assert browser.ask(SHOWN).startswith("step 20 · group 2")
    browser.press("l")
    browser.wait(f"{SHOWN}.startsWith('step 20 · group 3')")
    link = browser.ask("location.hash")
    browser.open(pages["both"], link)
    browser.wait(f"{SHOWN}.startsWith('step 20 · group 3')")
    browser.open(pages["one"], "#rollouts/group=1&response=3&at=30")
    browser.wait(f"{CHOSEN} === '30 · 1 · 3'")
    assert "of 160" in browser.ask(COUNT), "nothing is filtered by that"


def test_all_charts_share_a_zoom(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["both"], "#curves")
    browser.wait(f"{RANGES}.length === 4")
    left, top, width, height = browser.ask(
        "(({left, top, width, height}) => [left, top, width, height])(document.querySelector('#section-curves .nsewdrag').getBoundingClientRect())"
    )
    middle, (begin, end) = top + height / 2, browser.ask(RANGES)[0]
    browser.drag((left + 0.25 * width, middle), (left + 0.75 * width, middle))
    browser.wait(f"new Set({RANGES}.map(String)).size === 1 && {RANGES}[0][1] < 35")
    first, last = browser.ask(RANGES)[0]
    assert abs(first - (begin + 0.25 * (end - begin))) <= 1
    assert abs(last - (begin + 0.75 * (end - begin))) <= 1
    browser.press("0")
    browser.wait(f"{RANGES}.every(([first, last]) => last >= 39)")
    browser.press("+")
    browser.wait(f"{RANGES}.every(([first, last]) => last < 35)")
    link = browser.ask("location.hash")
    assert link.startswith("#curves/from=")
    browser.open(pages["both"], link)
    browser.wait(f"{RANGES}.length === 4 && {RANGES}.every(([first, last]) => last < 35)")
    browser.press("3")
    browser.wait("document.querySelector('#section-phases .js-plotly-plot')?.layout.xaxis.range[1] < 35")


def test_dark_phone_and_paper(browser: Chromium, pages: dict[str, Path]) -> None:
    shades = []
    for dark in (False, True):
        browser.look(1280, 900, dark=dark)
        browser.open(pages["one"], "#curves")
        browser.wait("document.querySelector('.js-plotly-plot .xtick text')")
        ink, paper = browser.ask(
            "[getComputedStyle(document.querySelector('.js-plotly-plot .xtick text')).fill, getComputedStyle(document.body).backgroundColor]"
        )
        shades.append((_light(ink), _light(paper)))
    assert [ink < 100 and paper > 200 for ink, paper in shades] == [True, False]
    assert shades[1][0] > 180
    assert shades[1][1] < 60
    browser.look(390, 844, phone=True)
    for section in SECTIONS:
        browser.open(pages["both"], f"#{section}")
        time.sleep(0.3)
        assert browser.ask("document.documentElement.scrollWidth") <= 390, section
    browser.look(1280, 900)
    browser.open(pages["one"], "#rollouts")
    browser.wait("document.querySelector('.card')")
    assert browser.print().startswith(b"%PDF")


def _light(colour: str) -> float:
    numbers = [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    return sum(numbers) / 3


def test_a_thousand_steps_of_64_rollouts_open_within_two_seconds(
    browser: Chromium, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    page = write_report([make_long_run(tmp_path)])
    taken = []
    for _ in range(3):  # the machine may be at other work
        browser.open(page, "#rollouts")
        taken.append(browser.ask("Number(document.documentElement.dataset.ready)") / 1000)
    with capsys.disabled():
        print(f"\n{page.stat().st_size / 2**20:.1f} MiB open in {min(taken):.2f} s")
    assert min(taken) < 2  # measured 0.5 to 0.8 on two busy cores
    browser.wait("document.querySelector('.card')")
    assert browser.ask(COUNT).strip("‹›") == "1–100 of 64000"
