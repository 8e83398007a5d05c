"""The report in a real browser, offline: silent, fits every screen, legible in light, dark and print."""

import pytest
from PIL import Image

from integration.app import browser as browsers
from integration.app import report_pages as pages
from integration.results import result

# (contrast with its background (WCAG 2), text) of every text on the page, lowest contrast first.
CONTRASTS = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const known = {};
  const rgba = (color) => known[color] ??= paint(color);
  const paint = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (color) => {
    const [r, g, b] = rgba(color).slice(0, 3).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (rgba(color)[3] === 255) return color;
    }
    return "white";
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility() || element.tagName === "title") continue;
    const style = getComputedStyle(element);
    const ink = light(element.closest("svg") ? style.fill : style.color);
    const paper = light(behind(element));
    found.push([(Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05), node.data.trim().slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
})()
"""
# Elements that extend beyond the screen, except inside scrolling frames.
TOO_WIDE = """
[...document.querySelectorAll("body *")]
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5 && !e.closest(".scroll > *"))
  .map((e) => e.tagName + " " + e.className + " " + e.textContent.slice(0, 40))
"""
A4 = 688  # width in pixels between margins of 14 mm
SHOWN = '[...document.querySelectorAll("{}")].filter((e) => e.getBoundingClientRect().height > 0).length'


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = browsers.find_browser()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(browsers.BROWSERS)} is installed")
    opened = browsers.Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module", params=["plain", "several", "ugly", "many"])
def file(request, tmp_path_factory):
    """A report of one run; of three with training and studies; of one with ugly strings; of twelve."""
    root = tmp_path_factory.mktemp("pages")
    made = pages.with_sinks(pages.with_groups(result(3, layers=40)))
    jpeg = pages.jpeg(160, 120)
    words = [*pages.UGLY.values()] if request.param == "ugly" else ["a photo", "prose of some words"]
    record = {
        "versions": {"torch": words[0]},
        "skipped": [{"name": word, "reason": word} for word in words],
        "samples": [{"name": word, "text": word, "jpeg": jpeg} for word in words] + [{"name": "gone", "text": "prose"}],
    }
    made.notes = words
    folders = [pages.save(root / "one", made, record, prompt=words[0], long=words[-1])]
    labels = ("one",)
    if request.param == "several":
        other = pages.save(root / "other", result(1, bounds=True), record, model="models/b")
        folders += [other, pages.studies(pages.history(root / "demo"))]
        labels = ("one", "other", "demo")
    if request.param == "many":
        folders += [pages.save(root / f"run {k}", pages.with_groups(result(k)), record) for k in range(11)]
        labels = ("one", *(f"llava-1.5-7b-projector-and-last-layers-step-{k}000" for k in range(11)))
    if request.param == "ugly":
        labels = (pages.UGLY["markup"] + pages.UGLY["long"],)
    out = root / "report.html"
    pages.write(out, *folders, labels=labels)
    return out


@pytest.mark.parametrize(("width", "dark"), [(360, False), (800, True), (1400, False)])
def test_page_is_quiet_fits_and_can_be_read(browser, file, tmp_path, width, dark):
    browser.open(file, width=width, dark=dark)
    assert browser.requests() == []
    assert browser.complaints() == []
    assert browser.evaluate(TOO_WIDE) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    contrasts = browser.evaluate(CONTRASTS)
    assert len(contrasts) > 50
    assert [pair for pair in contrasts if pair[0] < 4.5] == []
    wide, narrow = (browser.evaluate(SHOWN.format(f"svg.{size}")) for size in ("wide", "narrow"))
    assert (wide == 0) == (width < 560)
    assert (narrow == 0) == (width > 560)
    with Image.open(browser.screenshot(tmp_path / "page.png", whole=False)) as shot:
        assert shot.width == width
        assert len(shot.convert("RGB").getcolors(1 << 24)) > 100
        corner = shot.convert("L").getpixel((2, 2))
        assert corner < 60 if dark else corner > 200


def test_every_curve_is_told_from_the_paper(browser, file):
    """Lines and marks have a contrast of at least 3 (WCAG 2, 1.4.11) in each theme."""
    swatches = "".join(f'<p style="color: var(--c{k})">c{k}</p>' for k in range(8))
    for dark in (False, True):
        browser.open(file, dark=dark)
        browser.evaluate(f"document.body.innerHTML = '{swatches}'")
        contrasts = browser.evaluate(CONTRASTS)
        assert len(contrasts) == 8
        assert [pair for pair in contrasts if pair[0] < 3] == []


def test_paper_has_all_there_is_and_no_dark(browser, file, tmp_path):
    browser.open(file, width=A4, dark=True)
    browser.call(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert (
        browser.evaluate(SHOWN.format("details table"))
        == browser.evaluate('document.querySelectorAll("details table").length')
        > 0
    )
    assert browser.evaluate(SHOWN.format("nav")) == 0
    assert browser.evaluate(SHOWN.format("svg.narrow")) == 0
    assert browser.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert [pair for pair in browser.evaluate(CONTRASTS) if pair[0] < 4.5] == []
    assert browser.evaluate(TOO_WIDE.replace(' && !e.closest(".scroll > *")', "")) == []
    # Elements that page breaks must not split.
    kept = browser.evaluate(
        '[...document.querySelectorAll("figure, tr, .cards li, article")].map((e) => getComputedStyle(e).breakInside)'
    )
    assert set(kept) == {"avoid"}
    assert browser.printed(tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    browser.call("Emulation.setEmulatedMedia", media="", features=[])


def test_the_browser_of_these_tests_notices_what_they_look_for(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<body style="background: white"><p style="color: #aaa; width: 2000px">pale and wide</p>'
        '<img src="http://example.invalid/x.png"><script>console.error("bad")</script>'
    )
    browser.open(page, width=360)
    assert browser.requests() == ["http://example.invalid/x.png"]
    assert len(browser.complaints()) == 2
    assert len(browser.evaluate(TOO_WIDE)) == 1
    assert browser.evaluate("document.documentElement.scrollWidth") > 2000
    ((contrast, text),) = browser.evaluate(CONTRASTS)
    assert (round(contrast, 2), text) == (2.32, "pale and wide")
