"""Plot files: formats, bytes, fonts, SVG embedded in pages; and plots into the caller's figures."""

import re
import subprocess
import sys

import pytest

from integration.app.drawings import colours, made
from modality_integration.app import plots
from modality_integration.metric import drawing, figures

LAYERS = [{"layer": n, "distance": 9.0 / n**2, "error": 0.1 / n} for n in range(1, 33)]


@pytest.mark.parametrize("suffix", figures.SUFFIXES)
def test_every_format_is_written_the_same_each_time(suffix, tmp_path):
    curves = {"before": made([30.0, 2.0, 1.0], [0.1] * 3), "after": made([3.0, 2.0, 1.0], [0.2] * 3)}
    one, two = (plots.plot_layers(curves, tmp_path / f"{name}{suffix}") for name in ("a", "b"))
    assert one.read_bytes() == two.read_bytes()
    assert b"CreationDate" not in one.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {one.name, two.name}


def test_bytes_do_not_depend_on_the_process_or_on_settings_of_the_caller(tmp_path):
    one = made([30.0, 2.0, 1.0], [0.1] * 3)
    one.to_json(tmp_path / "mir.json")
    suffixes = (".svg", ".pdf", ".png")
    code = f"""
import sys, matplotlib
sys.path[:0] = {sys.path!r}
matplotlib.rcParams.update({{"font.size": 20, "svg.fonttype": "path", "axes.facecolor": "black"}})
# To look up the backend would choose one.
before = {{key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}}
from modality_integration.app import plots
from modality_integration.metric.result import MIRResult
run = MIRResult.from_json({str(tmp_path / "mir.json")!r})
for suffix in {suffixes!r}:
    plots.plot_layers({{"run": run}}, {str(tmp_path / "there")!r} + suffix)
assert {{key: matplotlib.rcParams[key] for key in before}} == before
assert "matplotlib.pyplot" not in sys.modules
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    for suffix in suffixes:
        here = plots.plot_layers({"run": one}, tmp_path / f"here{suffix}")
        assert here.read_bytes() == (tmp_path / f"there{suffix}").read_bytes()


def test_letters_stay_letters_in_pdf_eps_and_svg(tmp_path):
    curves = {"the run": made([30.0, 2.0, 1.0], [0.1] * 3)}
    pdf = plots.plot_layers(curves, tmp_path / "a.PDF").read_bytes()
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert b"/FontType 42" in plots.plot_layers(curves, tmp_path / "a.eps").read_bytes()
    svg = plots.plot_layers(curves, tmp_path / "a.svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"decoder layer", "Fréchet distance, vision to text", drawing.ERROR_LABEL} < set(texts)
    assert any(text.startswith("the run (MIR 1.519") for text in texts)


@pytest.mark.parametrize("name", ["a.txt", "a.gif", "run-v1.5", "a.png.bak"])
@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plots.plot_layers({"run": made([1.0])}, path),
        lambda path: plots.plot_training({0: 1.0}, {}, path),
        lambda path: plots.plot_study("layers", LAYERS, path),
        lambda path: made([1.0]).plot(path),
        figures.check_suffix,
    ],
    ids=["layers", "training", "study", "result", "check"],
)
def test_other_suffixes_are_refused_by_what_is_taken(draw, name, tmp_path):
    with pytest.raises(ValueError, match=r"expected an image suffix, one of \.pdf, \.svg, .*\.png") as refused:
        draw(tmp_path / name)
    assert name in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_name_without_a_suffix_is_a_png_and_a_folder_is_refused(tmp_path):
    assert figures.check_suffix("a/layers").name == "layers.png"
    assert made([1.0, 2.0]).plot(tmp_path / "one") == tmp_path / "one.png"
    assert colours(tmp_path / "one.png") > 10
    with pytest.raises(ValueError, match="expected an image file name, got a folder"):
        figures.check_suffix(tmp_path)


def test_picture_that_cannot_be_drawn_leaves_the_one_before(tmp_path):
    path = made([1.0, 2.0]).plot(tmp_path / "a.png")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="curves: expected at least one, got none"):
        plots.plot_layers({}, path)
    assert path.read_bytes() == before


# Plots into the caller's figures


def test_curves_are_drawn_into_axes_of_the_caller():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3))
    left, right = figure.subplots(1, 2)
    assert figures.layer_figure({"run": made([30.0, 2.0, 1.0], [0.1] * 3)}, right) == (figure, right)
    assert not left.lines
    assert right.get_yscale() == "log"
    figure.draw_without_rendering()
    assert not right.get_legend().get_window_extent().overlaps(right.get_window_extent())
    assert figure.get_size_inches().tolist() == [4, 3]
    figures.layer_figure({"again": made([3.0, 2.0, 1.0, 5.0])}, right)
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["run", "again"]
    assert len({line.get_color() for line in right.lines}) == 2
    assert right.get_xlim() == (0.5, 4.5)


def test_result_gives_a_file_or_a_figure_with_its_axes(tmp_path):
    from matplotlib.figure import Figure

    one = made([30.0, 2.0, 1.0], [0.1] * 3)
    figure, axes = one.plot()
    assert figure.axes == [axes]
    assert axes.lines[0].get_label() == f"MIR {one.value:.3f} ± {one.error:.3f}"
    own = Figure().subplots()
    assert one.plot(ax=own) == (own.get_figure(), own)
    assert one.plot(tmp_path / "a.svg") == tmp_path / "a.svg"
    with pytest.raises(ValueError, match="plot: expected either path or ax, got both"):
        one.plot(tmp_path / "b.svg", ax=own)


def test_importing_plots_and_tables_loads_neither_matplotlib_nor_rich():
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
import modality_integration.app.plots, modality_integration.app.tables
assert not {{"matplotlib", "rich"}} & set(sys.modules)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
