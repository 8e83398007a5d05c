"""Folders of runs for the report, and a strict HTML reader for its pages."""

import base64
import io
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser

from PIL import Image
from rich.console import Console

from integration.results import result
from modality_integration.app import report

UGLY = {
    "markup": '<script>alert("x")</script><img src=x onerror=alert(1)> \'&amp; {{ 7 * 7 }}',
    "long": "averyveryverylongword" * 20,
    "right to left": "שלום עולם مرحبا",
    "turning": "turned \u202e around",
    "emoji": "\U0001f469\u200d\U0001f680 \U0001f680",
    "lines": "two\nlines",
    "control": "nul \x00 and escape \x1b[31m",
    "surrogate": "a name that is not UTF-8 \udcff",
}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
QUIET = Console(quiet=True)


@dataclass
class Element:
    """An element with all the text inside it."""

    tag: str
    attributes: dict
    text: str = ""
    inside: list = field(default_factory=list)

    def all(self, tag, **attributes):
        """All descendants with this tag and these attributes."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [e for e in self._below() if e.tag == tag and wanted.items() <= e.attributes.items()]

    def _below(self):
        for element in self.inside:
            yield element
            yield from element._below()


class Reader(HTMLParser):
    """Parse HTML into elements; ValueError if tags are not closed or nested correctly."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open = [Element("", {})]

    def handle_starttag(self, tag, attrs):
        if len(dict(attrs)) < len(attrs):
            raise ValueError(f"{tag} has an attribute twice, line {self.getpos()}")
        element = Element(tag, dict(attrs))
        self.open[-1].inside.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if self.open[-1].tag != tag:
            raise ValueError(f"</{tag}> closes <{self.open[-1].tag}>, line {self.getpos()}")
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element.text += data


def read(path):
    """The page as one root element."""
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    (whole,) = reader.open
    return whole


def write(out, *paths, labels=()):
    """Write the report of these runs and parse it."""
    report.run(paths, out, labels, QUIET, overwrite=True)
    return read(out)


def section(page, name):
    """The section of the page with this heading."""
    (found,) = [s for s in page.all("section") if s.all("h2")[0].text == name]
    return found


def rows(table):
    """{row header: cell texts} of a table."""
    found = {}
    for row in table.all("tr"):
        head, *cells = [cell.text for cell in row.inside]
        found[head] = cells
    return found


def save(folder, made, record=None, **settings):
    """Write a run's folder with mir.json, and run.json if a record is given."""
    folder.mkdir(parents=True, exist_ok=True)
    made.settings = {"model": "models/a", "samples": 40, "groups": 5, **settings}
    made.to_json(folder / "mir.json")
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))
    return folder


def with_groups(made, spread=0.02, groups=5):
    """The result with a standard error, from invented leave-one-group-out distances."""
    made.left_out = [[d * (1 + spread * (g - groups // 2)) for g in range(groups)] for d in made.per_layer]
    return made


def with_sinks(made, count=7):
    """The result with attention sinks among its vision tokens in all layers but the first."""
    made.massive["vision"] = [0] + [count] * (len(made.terms) - 1)
    made.sink_positions["vision"] = {0: count - 2, 35: 2}
    made.without_sinks = [distance / 3 for distance in made.per_layer]
    return made


def jpeg(width=40, height=30):
    """A picture as a base64 JPEG."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def history(folder, steps=(0, 10, 20)):
    """Write the folder of a demo."""
    folder.mkdir(parents=True, exist_ok=True)
    with_groups(result(1)).to_json(folder / "mir.json")
    document = {
        "steps": list(steps),
        "mir": [2.0 - 0.05 * step for step in steps],
        "error": [0.02 for _ in steps],
        "per_layer": [[1.0] for _ in steps],
        "held_out_loss": [5.0 - 0.1 * step for step in steps],
        "loss": [5.0 - 0.1 * step for step in range(1, steps[-1] + 1)],
    }
    (folder / "history.json").write_text(json.dumps(document))
    return folder


STUDIES = {
    "samples": "samples,vision_tokens,mir,error,missed\n5,20,3.2,0.2,0\n50,200,3.05,0.1,0\n",
    "normalization": "layer,alpha,normalized,unnormalized,missed\n1,2,4.5,5,0\n2,2,0.5,6,0\n3,2,0.25,7,0\n",
    "content": "images,text,samples,mir,error,missed\nphotos,news,9,3.1,0.1,0\nphotos,poems,9,3.25,0.1,0\n",
    "template": "template,samples,mir,error,missed\nchat,9,3.1,0.1,0\nplain,9,3.4,,0\n",
    "layers": "layer,distance,error,mean\n1,2.5,0.1,1\n2,0,,1\n3,1.5,0.1,1\n",
}


def studies(folder):
    """Write a folder that holds only studies."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in STUDIES.items():
        (folder / f"study_{name}.csv").write_text(table)
    return folder


def record(**more):
    """The contents of run.json."""
    return {"images": "photos", "text": "news", "arguments": {"device": "cpu"}, "seconds": 1.5, **more}


def ugly(folder):
    """Write a run in which every string comes from UGLY."""
    made = result(4, layers=2)
    made.notes = list(UGLY.values())
    cards = [{"name": name, "text": name, "jpeg": jpeg()} for name in UGLY.values()]
    no_jpeg = ('"><script>alert(1)</script>', base64.b64encode(b"<svg onload=alert(1)>").decode(), 3)
    cards += [{"name": "bad", "text": "", "jpeg": words} for words in no_jpeg]
    skipped = [{"name": name, "reason": name} for name in UGLY.values()]
    settings = {f"name {name}": word for name, word in UGLY.items() if name != "surrogate"}
    settings |= {word: "x" for name, word in UGLY.items() if name != "surrogate"}
    versions = {"torch": UGLY["markup"], UGLY["markup"]: "1"}
    (folder / "x").mkdir(parents=True)
    (folder / "study_x.csv").write_text("{0},b\n{0},{0}\n".format('"<b>""x"""'))
    save(folder, made, record(samples=cards, skipped=skipped, versions=versions), **settings)
    (folder / "history.json").write_text((history(folder / "x") / "history.json").read_text())
    return folder


def all_runs(root):
    """Write one folder of every kind of run; {name: folder}."""
    cards = [{"name": f"{k}.png with {k}.txt", "text": f"prose {k}", "jpeg": jpeg()} for k in range(3)]
    versions = {"torch": "2.9.0", "transformers": "5.1"}
    plain = record(samples=cards, versions=versions, skipped=[{"name": "bad.png", "reason": "it is empty"}])
    save(root / "a", with_groups(result(0)), plain)
    other = record(samples=cards, versions={**versions, "transformers": "5.2"})
    save(root / "b", with_groups(result(2), 0.01), other, model="models/b")
    save(root / "bounds", result(1, bounds=True), record(), groups=0)
    save(root / "sinks", with_sinks(with_groups(result(3, layers=30))), None)
    history(root / "demo")
    studies(root / "studies")
    ugly(root / "ugly")
    return {folder.name: folder for folder in root.iterdir()}
