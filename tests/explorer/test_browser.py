"""The page in a real Chromium: what a reader sees, clicks and types."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from harness.browser import browser, page_of, settled
from harness.explored import large_row, made_evaluation, made_result, write_files
from zip_rc_jax import Decoder
from zip_rc_jax.evaluation.explored import ExploredSearch
from zip_rc_jax.explorer.page import page_text
from zip_rc_jax.explorer.record import CELL, introspections
from zip_rc_jax.explorer.searches import ResultFile, results_page
from zip_rc_jax.runtime.storage import write_text

HOSTILE = "</script><img src=x onerror=window.hacked=1><b>bold</b><!-- & &lt; \u2028"
PROMPTS = ["1 + 2 =", "3 + 4 = 7 so", "a b"]


@pytest.fixture(scope="module")
def chrome():
    with browser() as launched:
        yield launched


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


def written(folder, name, data):
    return write_text(folder / f"{name}.html", page_text(data)).as_uri()


@pytest.fixture(scope="module")
def rows(lm):
    """Results with what was weighed; of branching, so that prefixes are paused and forked."""
    options = {"n": 4, "interval": 4, "window": 3, "max_tokens": 24, "alpha": 1.0, "beta": 0.3}
    decoder = Decoder(lm, **options, candidates="branching")
    results = decoder(PROMPTS, return_joints=True)
    assert any(p.parent >= 0 for r in results for p in r.prefixes), "none is forked"
    told = introspections(lm, results, decoder.config)
    rows = [r.to_dict() | {"introspection": t} for r, t in zip(results, told, strict=True)]
    for i, row in enumerate(rows):
        row |= {"answer": "3", "correct": float(i % 2)}
    return json.loads(json.dumps(rows))


@pytest.fixture(scope="module")
def searches(folder, rows):
    """A page of searches, as a file."""
    return written(folder, "searches", results_page("Searches", [ResultFile("one", tuple(rows))]))


@pytest.fixture(scope="module")
def made(folder):
    """A page about a tree that is known by heart, without anything that was weighed."""
    row = made_result().to_dict()
    return written(folder, "made", results_page("Made", [ResultFile("made", (row,))]))


@pytest.fixture(scope="module")
def report(folder):
    """A report of 40 problems with the trees of its headline, and what it is of."""
    name = made_evaluation().headline[0].run.name
    evaluation = made_evaluation(
        searches=[ExploredSearch(name, i, made_result(f"p{i}")) for i in range(40)]
    )
    write_files(folder / "report", evaluation, [f"problem {i}" for i in range(40)])
    return (folder / "report" / "report.html").as_uri(), evaluation


def text_of(page, selector):
    return " ".join(page.inner_text(selector).split())


def press(page, key):
    page.keyboard.press(key)
    settled(page)


def card(page, name):
    return page.get_by_role("region", name=name, exact=True)


def slider(page):
    return page.get_by_role("slider", name="Decision")


# ---- one search


def test_the_tree_tells_every_start_fork_pause_resume_and_end(chrome, made):
    with page_of(chrome, made) as page:
        page.click("summary")
        events = [line.strip() for line in page.locator(".events li").all_inner_texts()]
        assert events == [
            "step 0: 0 starts",
            "step 0: 1 starts",
            "step 0: 2 starts",
            "step 16: 0 pauses",
            "step 16: 1 pauses",
            "step 16: 3 forks from 2",
            "step 32: 1 resumes",
            "step 44: 3 ends",
            "step 56: 1 ends",
            "step 60: 2 is the answer",
        ]
        label = page.get_by_role("img", name="4 prefixes over 60 steps").get_attribute("aria-label")
        assert all(event in label for event in events)
        # Signs of the chart: one for every event.
        assert page.locator(".tree [aria-label=dot] > *").count() == len(events)


def test_the_lines_are_colored_by_p_correct(chrome, made):
    """Orange is low and blue is high."""
    with page_of(chrome, made) as page:
        page.wait_for_selector(".tree [aria-label=link] > *", state="attached")
        colors = page.eval_on_selector_all(
            ".tree [aria-label=link] > *",
            "lines => lines.map(x => [x.getAttribute('stroke'), x.parentNode.ariaLabel])",
        )
        found = [c for own, _ in colors if own for c in [tuple(map(int, own[4:-1].split(",")))]]
        warmth = [red - blue for red, _, blue in found]
        assert max(warmth) > 60, "prefix 0 falls to 0.3"
        assert min(warmth) < -100, "the answer rises to 0.95"


def test_why_a_prefix_was_paused_has_a_numeric_answer(chrome, searches, rows):
    """For every live prefix of every decision: the numbers of the sentence and of the table are
    those of the record."""
    with page_of(chrome, searches) as page:
        answered = 0
        trace, told = rows[0]["trace"], rows[0]["introspection"]["decisions"]
        for index, (decision, actions) in enumerate(zip(trace, told, strict=True)):
            slider(page).fill(str(index))
            for place, number in enumerate(decision["prefix_ids"]):
                if decision["finished"][place]:
                    continue
                other = changed_in(actions, place)
                button = page.get_by_role(
                    "button", name="new sample" if number < 0 else str(number), exact=True
                )
                if other is None or not button.count():
                    continue
                button.first.click()
                said = text_of(page, ".why")
                if actions["utility"][other] is None:
                    assert "not allowed" in said
                    continue
                for name, digits in (("value", 4), ("compute", 1), ("latency", 1), ("utility", 4)):
                    change = actions[name][other] - actions[name][0]
                    assert signed(change, digits) in said, (said, name)
                answered += 1
        assert answered > 3


def changed_in(actions, place):
    """The best action that differs from the taken one in one prefix alone."""
    taken, best = actions["multiplicity"][0], None
    for i, row in enumerate(actions["multiplicity"]):
        if row[place] == taken[place] or any(
            k != place and x != y for k, (x, y) in enumerate(zip(row, taken, strict=True))
        ):
            continue
        worth = [-np.inf if u is None else u for u in actions["utility"]]
        if best is None or worth[i] > worth[best]:
            best = i
    return best


def signed(x, digits):
    text = f"{abs(x):.{digits}f}"
    return text if float(text) == 0 else f"{'−' if x < 0 else '+'}{text}"


def test_a_decision_lists_its_actions_with_all_terms_the_taken_one_first(chrome, searches, rows):
    with page_of(chrome, searches) as page:
        slider(page).fill("1")
        actions = rows[0]["introspection"]["decisions"][1]
        table = page.get_by_role("region", name="Actions that were weighed")
        first = table.locator("tbody tr").first.locator("td").all_inner_texts()
        digits = {"value": 4, "compute": 1, "latency": 1, "utility": 4}
        expected = [f"{actions[name][0]:.{d}f}" for name, d in digits.items()]
        assert first[:4] == expected
        assert first[-1] == "taken"
        shown = [
            float(cell) for cell in table.locator("tbody tr td:nth-child(5)").all_inner_texts()
            if cell != "not allowed"
        ]  # fmt: skip
        assert shown[1:] == sorted(shown[1:], reverse=True)


def test_keys_move_over_decisions_prefixes_and_tokens(chrome, searches, rows):
    count = len(rows[0]["trace"])
    with page_of(chrome, searches) as page:
        where = page.locator(".scrubber output")
        assert where.inner_text().startswith(f"{count} / {count}"), "it begins at the end"
        press(page, "Home")
        assert where.inner_text() == f"1 / {count}, step 0"
        press(page, "ArrowRight")
        press(page, "ArrowRight")
        press(page, "ArrowLeft")
        step = rows[0]["trace"][1]["step"]
        assert where.inner_text() == f"2 / {count}, step {step}"
        assert slider(page).get_attribute("aria-valuetext") == f"decision 2 of {count}, step {step}"
        press(page, "ArrowUp")
        before = page.locator(".texts li.selected .name").inner_text()
        press(page, "j")
        after = page.locator(".texts li.selected .name").inner_text()
        assert int(after.split()[-1]) == int(before.split()[-1]) + 1
        for _ in range(3):
            press(page, ".")
        press(page, ",")
        assert "after token 2" in text_of(page, "section[aria-label=Joint]")
        assert page.locator(".t.at").count() == 1
        press(page, "Escape")
        assert page.locator(".t.at").count() == 0


def test_a_key_in_a_field_is_text(chrome, report):
    with page_of(chrome, f"{report[0]}#evaluation") as page:
        page.get_by_role("searchbox").fill("p")
        page.get_by_role("searchbox").press("Home")
        assert page.get_by_role("searchbox").input_value() == "p"


def test_the_joint_at_the_token_under_the_pointer_is_that_of_the_record(chrome, searches, rows):
    told = rows[0]["introspection"]
    number = max(range(len(told["prefixes"])), key=lambda i: len(told["prefixes"][i]["pieces"]))
    kept, grid = told["prefixes"][number], told["grid"]
    fork = rows[0]["prefixes"][number]["fork_position"]
    shape = (-1, len(grid["reward_centres"]), len(grid["length_edges"]) - 1)
    joints = np.frombuffer(base64.b64decode(kept["joint"]), "<u2").reshape(shape) / CELL
    with page_of(chrome, searches) as page:
        place = page.locator(".texts li").filter(
            has=page.get_by_text(f"prefix {number}", exact=True)
        )
        place.scroll_into_view_if_needed()
        settled(page)
        tokens = place.locator(".t")
        for token in (0, 3, len(joints) - 2):
            tokens.nth(fork + token).hover()
            settled(page)
            panel = card(page, "Joint")
            assert f"prefix {number} after token {fork + token + 1}" in " ".join(
                panel.inner_text().split()
            )
            titles = panel.locator("svg title").evaluate_all("all => all.map(x => x.textContent)")
            shown = np.array([float(x.split(": ")[1].rstrip("%")) for x in titles])
            np.testing.assert_allclose(shown, 100 * joints[token].ravel(), atol=0.006)
        assert tokens.nth(fork).inner_text() == kept["pieces"][0]


def test_tokens_are_colored_by_p_correct_or_by_the_remaining_length(chrome, searches, rows):
    kept = rows[0]["introspection"]["prefixes"][0]
    p = np.frombuffer(base64.b64decode(kept["p_correct"]), "<f4")
    background = "x => getComputedStyle(x).backgroundColor"
    with page_of(chrome, searches) as page:
        place = page.locator(".texts li").first
        place.scroll_into_view_if_needed()
        settled(page)
        tokens = place.locator(".t")
        assert tokens.count() == len(p)
        colors = [tokens.nth(i).evaluate(background) for i in range(len(p))]
        levels = np.round(10 * p[:-1].astype(float))
        for i in range(len(p) - 1):
            for k in range(i):
                near = abs(10 * p[i] % 1 - 0.5) < 1e-3 or abs(10 * p[k] % 1 - 0.5) < 1e-3
                assert near or (colors[i] == colors[k]) == (levels[i] == levels[k])
        page.get_by_role("button", name="remaining", exact=True).click()
        assert [tokens.nth(i).evaluate(background) for i in range(len(p))] != colors
        page.get_by_role("button", name="plain").click()
        assert {tokens.nth(i).evaluate(background) for i in range(len(p))} == {"rgba(0, 0, 0, 0)"}


def test_what_is_written_after_the_decision_is_dimmed(chrome, searches, rows):
    with page_of(chrome, searches) as page:
        slider(page).fill("1")
        page.locator(".texts li").first.scroll_into_view_if_needed()
        settled(page)
        written = rows[0]["trace"][1]["tokens"][0]
        first = page.locator(".texts li").first
        assert first.locator(".t:not(.later)").count() == written
        assert (
            first.locator(".t.later").count() == len(rows[0]["prefixes"][0]["token_ids"]) - written
        )


def test_without_a_record_the_page_says_which_option_makes_one(chrome, made):
    with page_of(chrome, made) as page:
        assert text_of(page, "main").count("zip-rc decode --introspect") == 3
        assert page.locator(".texts").inner_text().count("x2") == 1


def test_a_click_on_the_tree_goes_to_its_decision_and_prefix(chrome, made):
    with page_of(chrome, made) as page:
        figure = page.locator(".tree svg").last
        box = figure.bounding_box()
        page.mouse.click(box["x"] + 58 + (box["width"] - 78) * 35 / 60, box["y"] + 40)
        assert page.locator(".scrubber output").inner_text() == "3 / 5, step 32"
        assert page.locator(".texts li.selected .name").inner_text() == "prefix 0"
        assert page.locator(".cursor").evaluate("x => parseFloat(x.style.left)") == pytest.approx(
            58 + (box["width"] - 78) * 32 / 60, abs=2
        )


# ---- text of a model


def test_text_of_a_model_is_shown_and_never_run(chrome, folder):
    row = made_result(HOSTILE, HOSTILE, HOSTILE).to_dict() | {"answer": HOSTILE, "correct": 1.0}
    row["introspection"] = {
        "settings": {"alpha": HOSTILE}, "grid": None, "decisions": [None] * 5, "root": None,
        "prefixes": [None] * 4,
    }  # fmt: skip
    rows = (row, row | {"prompt": f"{HOSTILE} 2"})
    address = written(folder, "hostile", results_page(HOSTILE, [ResultFile(HOSTILE, rows)]))
    with page_of(chrome, address) as page:
        for tab in ("Search", "Evaluation"):
            page.get_by_role("tab", name=tab).click()
            assert HOSTILE.split("\u2028")[0].strip() in page.inner_text("body")
            assert page.evaluate("window.hacked") is None
            assert page.locator("main img, main b:text('bold')").count() == 0
        assert page.title() == HOSTILE.replace("\u2028", "\u2028")


def test_a_token_that_is_markup_is_text(chrome, folder, rows):
    row = json.loads(json.dumps(rows[0]))
    for kept in row["introspection"]["prefixes"]:
        kept["pieces"] = [HOSTILE] * len(kept["pieces"])
    address = written(folder, "tokens", results_page("x", [ResultFile("x", (row,))]))
    with page_of(chrome, address) as page:
        page.locator(".texts li").first.scroll_into_view_if_needed()
        settled(page)
        page.locator(".t").first.hover()
        settled(page)
        assert page.locator(".t").first.text_content() == HOSTILE
        assert page.locator("code.piece").text_content() == HOSTILE
        assert page.evaluate("window.hacked") is None
        assert page.locator("main img").count() == 0


# ---- an evaluation


def chosen(page):
    """The run that is compared."""
    return page.locator("#problems select").first.evaluate("x => x.selectedOptions[0].text")


def test_a_point_of_the_picture_opens_its_problems(chrome, report):
    address, evaluation = report
    run = evaluation.runs[1]
    with page_of(chrome, address) as page:
        page.get_by_role("button", name=f"{run.name}:").click()
        assert chosen(page) == run.name
        said = text_of(page, "#problems [role=status]")
        cost = run.cost(evaluation.pool.mean_length, 0.1).gen_cost.mean()
        assert f"A: accuracy {100 * run.correct_by_value.mean():.1f}%, cost {cost:.2f}" in said
        page.get_by_role("button", name="majority@3:").focus()
        press(page, "Enter")
        assert chosen(page) == "majority@3"


def test_where_the_search_lost_against_best_of_n(chrome, report):
    address, evaluation = report
    row = evaluation.headline[0]
    weighted = evaluation.curves["weighted_best_of_n"][int(row.weighted.n) - 1]
    difference = row.run.correct_by_value - weighted.accuracy
    lost = np.flatnonzero(difference < -1e-4)
    with page_of(chrome, address) as page:
        page.get_by_label("show").select_option("lost")
        body = page.locator("table.problems tbody")
        assert body.locator("tr").count() == len(lost)
        page.get_by_role("button", name="A − B").click()
        numbers = [int(x) for x in body.locator("tr td:first-child").all_inner_texts()]
        assert sorted(numbers) == lost.tolist()
        assert (np.diff(difference[numbers].round(4)) >= 0).all(), "the worst first"
        page.get_by_role("button", name="A − B").click()
        assert numbers != [int(x) for x in body.locator("tr td:first-child").all_inner_texts()]


def test_problems_are_found_by_level_and_by_words(chrome, report):
    address, evaluation = report
    with page_of(chrome, address) as page:
        body = page.locator("table.problems tbody tr")
        assert body.count() == 40
        page.get_by_label("level").select_option("level 2")
        assert body.count() == (evaluation.pool.level == 2).sum()
        page.get_by_role("searchbox").fill("problem 1")
        texts = page.locator("table.problems tbody td.long").all_inner_texts()
        assert set(texts) == {f"problem {i}" for i in (1, *range(10, 20)) if i % 2}


def test_a_problem_opens_the_tree_of_its_search(chrome, report):
    with page_of(chrome, report[0]) as page:
        page.get_by_role("button", name="problem 7", exact=True).click()
        assert page.get_by_role("tab", name="Search").get_attribute("aria-selected") == "true"
        assert text_of(page, ".prompt") == "p7"
        assert page.url.endswith("#search=7")


def test_two_decodes_of_a_problem_stand_side_by_side(chrome, folder, rows):
    files = [ResultFile("one", tuple(rows)), ResultFile("other", tuple(reversed(rows)))]
    address = written(folder, "two", results_page("Two", files))
    with page_of(chrome, f"{address}#evaluation") as page:
        page.get_by_role("button", name=PROMPTS[1], exact=True).click()
        sides = page.get_by_role("region", name="Two runs side by side")
        assert sides.locator(".search").count() == 2
        settled(page)
        assert sides.evaluate("x => x.getBoundingClientRect().top < innerHeight")
        assert sides.locator(".prompt").all_inner_texts() == [PROMPTS[1]] * 2
        left, right = (sides.locator(".search").nth(i).bounding_box() for i in range(2))
        assert left["y"] == right["y"]
        assert left["x"] + left["width"] <= right["x"]


def test_the_tables_of_a_report_are_all_there(chrome, report):
    address, evaluation = report
    with page_of(chrome, f"{address}#report") as page:
        text = page.inner_text("main")
        for shown in (
            "Headline",
            "All methods",
            "By level",
            "Policy drift",
            "0.00123",
            "zip-rc evaluate 'name=<b>&'",
        ):
            assert shown in text, shown
        assert f"{100 * evaluation.headline[0].majority.difference:+.1f} [" in text


# ---- every window and every reader


@pytest.mark.parametrize("width", [360, 768, 910, 1300, 1920])
@pytest.mark.parametrize("tab", ["evaluation", "report", "search"])
def test_nothing_runs_out_of_the_window(chrome, report, width, tab):
    with page_of(chrome, f"{report[0]}#{tab}", width=width) as page:
        page.wait_for_timeout(150)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if tab == "report":
            wide = "all => all.map(x => [x.scrollWidth, x.clientWidth])"
            for inner, outer in page.locator(".report .wide").evaluate_all(wide):
                assert inner <= outer, "a table is cut"


CONTRAST = """
() => {
  const parse = text => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => {
    const linear = x => (x /= 255) <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  };
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const over = (color, below) => {
    canvas.fillStyle = `rgb(${below.join(',')})`; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const behind = element => {
    const chain = [];
    for (let x = element; x; x = x.parentElement) {
      chain.unshift(getComputedStyle(x).backgroundColor);
    }
    return chain.reduce((below, color) => over(color, below), [255, 255, 255]);
  };
  const found = [];
  for (const element of document.querySelectorAll('#app *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    const left_out = 'svg, .later, :disabled, option';
    if (!own || element.closest(left_out) || !element.checkVisibility()) continue;
    const back = behind(element);
    const front = over(getComputedStyle(element).color, back);
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${element.tagName}.${element.className} ${ratio.toFixed(2)}`);
  }
  return found;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(chrome, report, searches, scheme):
    for address in (searches, f"{report[0]}#evaluation", f"{report[0]}#report"):
        with page_of(chrome, address, scheme=scheme, height=4000) as page:
            page.wait_for_timeout(200)
            assert page.evaluate(CONTRAST) == []


def test_the_reader_may_choose_the_colors(chrome, made):
    back = "() => getComputedStyle(document.body).backgroundColor"
    with page_of(chrome, made) as page:
        before = page.evaluate(back)
        page.get_by_label("Colors").select_option("dark")
        assert page.evaluate(back) != before
        page.get_by_label("Colors").select_option("light")
        assert page.evaluate(back) == before
    with page_of(chrome, made, scheme="dark") as page:
        assert page.evaluate(back) != before


NAMELESS = """
() => [...document.querySelectorAll(
  'button, input, select, textarea, a[href], img, summary, ' +
  '[role=button], [role=tab], [role=img], [role=region]')]
  .filter(x => x.checkVisibility())
  .filter(x => !(x.getAttribute('aria-label') || x.labels?.[0]?.innerText.trim() || x.alt
    || x.textContent.trim()))
  .map(x => x.outerHTML.slice(0, 120))
"""


def test_everything_that_is_pressed_or_drawn_has_a_name(chrome, report, searches):
    for address in (
        searches,
        f"{report[0]}#evaluation",
        f"{report[0]}#report",
        f"{report[0]}#search",
    ):
        with page_of(chrome, address) as page:
            page.wait_for_selector("main .card")
            page.wait_for_timeout(150)
            assert page.evaluate(NAMELESS) == []
            assert page.locator("h1").count() == 1
            assert page.locator("html").get_attribute("lang") == "en"
            drawn = page.locator(".chart svg[role=img], .chart figure[role=img]").count()
            assert drawn == page.locator(".chart").count()


def test_tabs_are_reached_with_the_keyboard(chrome, report):
    with page_of(chrome, report[0]) as page:
        press(page, "Tab")
        assert page.evaluate("document.activeElement.textContent") == "Evaluation"
        press(page, "ArrowRight")
        press(page, "ArrowRight")
        assert page.evaluate("document.activeElement.textContent") == "Report"
        assert page.get_by_role("tabpanel", name="Report").count() == 1


def test_signs_differ_in_shape_too_for_those_who_see_no_colors(chrome, report):
    with page_of(chrome, report[0]) as page:
        page.wait_for_selector(".pressable")
        names = page.locator(".pressable").evaluate_all(
            "all => all.map(x => [x.ariaLabel.split(/[@:]/)[0], x.getAttribute('d')])"
        )
        shapes = {}
        for name, shape in names:
            shapes.setdefault(name.rsplit("/", 2)[0], set()).add(shape)
        assert len(shapes) >= 5
        assert all(len(one) == 1 for one in shapes.values())
        assert len({next(iter(one)) for one in shapes.values()}) == len(shapes)


# ---- large


def test_eight_prefixes_of_four_thousand_tokens_and_five_hundred_problems(chrome, folder):
    """What it takes is measured by benchmarks/explorer.py. Here: texts out of sight cost nothing,
    and the table holds all problems."""
    rows = [
        large_row(4096, 8, 64, 0, True),
        *(large_row(64, 4, 32, i, False) for i in range(1, 500)),
    ]
    address = written(folder, "large", results_page("Large", [ResultFile("large", tuple(rows))]))
    with page_of(chrome, address) as page:
        page.wait_for_selector(".tree svg")
        assert page.locator(".t").count() < 3 * 4096
        page.locator(".texts li").nth(7).scroll_into_view_if_needed()
        settled(page)
        page.locator(".texts li").nth(7).locator(".t").first.wait_for()
        assert page.locator(".texts li").nth(7).locator(".t").count() == 4096
        page.get_by_role("tab", name="Evaluation").click()
        assert page.locator("table.problems tbody tr").count() == 500
