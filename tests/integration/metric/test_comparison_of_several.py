"""Comparison of several results, rankings, and notes on differing settings."""

import itertools
import json
import re
from dataclasses import replace

import pytest

from integration.metric.test_comparison import with_left_out
from integration.results import result
from modality_integration import LayerTerms, compare
from modality_integration.metric.comparison import compare_several

VERSIONS = {
    "torch_version": ("2.13.0", "2.14.0"),
    "transformers_version": ("5.1.0", "5.2.0"),
    "torchvision_version": (None, "0.28"),
}


def test_versions_that_differ_are_one_note():
    a, b = result(0), result(0)
    a.settings = {name: of[0] for name, of in VERSIONS.items()} | {
        "pillow_version": "12.0",
        "mir_kernels_version": "0.2",
    }
    b.settings = {name: of[1] for name, of in VERSIONS.items()} | {
        "pillow_version": "12.0",
        "mir_kernels_version": "0.3",
    }
    assert compare(a, b).notes == [
        "versions differ: torch 2.13.0 and 2.14.0, transformers 5.1.0 and 5.2.0, torchvision not installed and 0.28, "
        "mir-kernels 0.2 and 0.3"
    ]
    assert compare_several({"x": a, "y": b, "z": a}).notes[0] == (
        "versions differ: torch 2.13.0 (x, z) and 2.14.0 (y), transformers 5.1.0 (x, z) and 5.2.0 (y), "
        "torchvision not installed (x, z) and 0.28 (y), mir-kernels 0.2 (x, z) and 0.3 (y)"
    )


def test_another_image_processor_is_a_warning_and_another_picture_format_none():
    a, b = result(0), result(0)
    a.settings = {"image_processor": "CLIPImageProcessor", "batch_size": 1, "plot_format": "png", "processor": "P"}
    b.settings = {"image_processor": "CLIPImageProcessorFast", "batch_size": 8, "plot_format": "svg", "processor": "P"}
    assert compare(a, b).notes == [
        "image processor differs: CLIPImageProcessor and CLIPImageProcessorFast; this alone changes MIR, mostly in its "
        "4th digit",
        "batch size differs: 1 and 8",
    ]


@pytest.mark.parametrize(
    ("digests", "said"),
    [("ab", "each run has its own"), ("abc", "each run has its own"), ("bab", "the same in x and z, different in y")],
)
def test_other_samples_are_named_without_their_digests(digests, said):
    results = dict(zip("xyz", [result(0) for _ in digests], strict=False))
    for one, digest in zip(results.values(), digests, strict=True):
        one.settings = {"chosen_samples": digest * 64}
    assert compare_several(results).notes[0] == f"chosen samples differ: {said}"


def shifted(by, spread=0.001, groups=6):
    """A result with MIR increased by `by`, and a standard error."""
    made = result(0)
    made.terms = [replace(t, **{n: v * 10**by for n, v in vars(t).items() if v}) for t in made.terms]
    return with_left_out(made, spread, groups) if spread else made


def test_several_are_each_held_against_the_first():
    results = {"base": shifted(0.0), "worse": shifted(0.2), "same": shifted(0.0), "better": shifted(-0.1)}
    several = compare_several(results)
    assert list(several.against) == ["worse", "same", "better"]
    for name, one in several.against.items():
        assert one.a is results["base"]
        assert one.b is results[name]
        assert one.names == ("base", name)
    lines = several.verdict().splitlines()
    assert lines == several.lines()
    assert lines[0].startswith("base blends the modalities better: its MIR is 0.2000 below worse's")
    assert lines[1] == "base and same have the same MIR"
    assert lines[2].startswith("better blends the modalities better: its MIR is 0.1000 below base's")
    assert lines[3].startswith("lowest MIR first: better < base = same < worse")


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_are_refused(count):
    with pytest.raises(ValueError, match=f"results: expected two or more, got {count}"):
        compare_several(dict(list({"a": result(0)}.items())[:count]))


@pytest.mark.parametrize(
    ("shifts", "spreads", "groups", "ranking"),
    [
        ((0.0, 0.1, 0.2), (0.001, 0.001, 0.001), 6, "a < b < c"),
        ((0.2, 0.0, 0.1), (0.001, 0.001, 0.001), 6, "b < c < a"),
        ((0.0, 0.1, 0.101), (0.001, 0.001, 0.001), 6, "a < b ~ c"),
        ((0.0, 0.001, 0.002), (0.001, 0.001, 0.001), 6, None),
        ((0.0, 0.1, 0.2), (0.001, 0.001, 0.001), 4, None),
        ((0.0, 0.1, 0.2), (0.001, None, 0.001), 6, None),
    ],
)
def test_a_ranking_is_given_only_where_errors_allow_it(shifts, spreads, groups, ranking):
    made = [shifted(by, spread, groups) for by, spread in zip(shifts, spreads, strict=True)]
    several = compare_several(dict(zip("abc", made, strict=True)))
    assert several.ranking == ranking
    assert ("lowest MIR first" in several.verdict()) == (ranking is not None)


def test_of_two_the_verdict_is_that_of_the_comparison():
    a, b = shifted(0.0), shifted(0.1)
    several = compare_several({"x": a, "y": b})
    assert several.lines() == [compare(a, b, names=("x", "y")).verdict()]
    assert several.notes == compare(a, b, names=("x", "y")).notes


@pytest.mark.parametrize(
    ("count", "groups", "rates"),
    [(3, 6, ("15%", "2.7%")), (4, 6, ("22%", "4.0%")), (9, 6, ("59%", "11%")), (9, 2, ("100%", "76%"))],
)
def test_with_more_comparisons_it_says_what_chance_does(count, groups, rates):
    several = compare_several({f"r{k}": shifted(0.1 * k, 0.001, groups) for k in range(count)})
    (said,) = [line for line in several.lines() if "at once" in line]
    assert said.startswith(
        f"{count - 1} comparisons at once: if there were no differences, at least one would exceed 2 standard"
    )
    assert re.findall(r"[\d.]+%", said) == list(rates)


def test_by_chance_is_students():
    a, b = result(0), result(1)
    for one in (a, b):
        one.left_out = [[distance * (1.0 + 0.01 * g) for g in range(5)] for distance in one.per_layer]
    apart, same = compare(a, b), compare(a, b, paired=True)
    assert [round(1 / one.by_chance(errors)) for one in (apart, same) for errors in (2, 3)] == [12, 59, 9, 25]


def test_notes_of_several_are_not_repeated_and_name_who():
    results = {name: shifted(0.1 * k) for k, name in enumerate("abcd")}
    for k, one in enumerate(results.values()):
        one.settings = {"last": "raw" if k == 2 else "normed", "chosen_samples": "s", "dealt": "in blocks", "seed": k}
    results["d"] = with_left_out(results["d"], 0.001, groups=4)
    several = compare_several(results)
    assert several.notes == [
        "last differs: normed (a, b, d) and raw (c)",
        "seed differs: 0 (a), 1 (b), 2 (c) and 3 (d)",
        "the same samples in a, b and c: each error is computed from group-by-group differences",
        "d's standard error is based on 4 groups of samples; use 5 or more",
    ]
    results["d"] = shifted(0.3, None)
    results["d"].notes = ["no standard error: 1 image for 40 samples"]
    several = compare_several(results)
    assert several.notes[-1] == "d has no standard error (1 image for 40 samples)"
    assert several.verdict().count("1 image") == 0
    results["c"] = shifted(0.2, None)
    results["c"].notes = results["d"].notes
    assert compare_several(results).notes[-1] == "c and d have no standard error (1 image for 40 samples)"
    few = {name: shifted(0.1 * k, groups=4) for k, name in enumerate("abc")}
    assert compare_several(few).notes == [
        "the standard errors of a, b and c are based on 4 groups of samples; use 5 or more"
    ]
    assert "a's MIR is 0.3000 below d's, without a standard error" in several.lines()


def test_several_as_json_hold_every_number_and_word():
    zero = result(0)
    zero.terms = [LayerTerms(0.0, 1.0, 1.0, 1.0)] * 3
    results = {"é": shifted(0.0), "b": shifted(0.1), "zero": zero, "short": result(0, layers=2)}
    several = compare_several(results)
    read = json.loads(several.to_json(), parse_constant=lambda word: pytest.fail(word))
    assert read == several.to_dict()
    assert (read["schema"], read["version"], read["reference"]) == ("modality-integration-rate-comparison", 1, "é")
    assert [one["name"] for one in read["results"]] == list(results)
    assert [one["mir"] for one in read["results"]] == [
        results["é"].value,
        results["b"].value,
        "-inf",
        results["short"].value,
    ]
    assert read["results"][1]["per_layer"] == results["b"].per_layer
    first, second, third = read["comparisons"]
    assert (first["name"], first["against"], first["difference"]) == ("b", "é", several.against["b"].difference)
    assert (first["error"], first["z"], first["paired"]) == (several.against["b"].error, several.against["b"].z, False)
    assert first["per_layer"] == several.against["b"].per_layer
    assert (second["difference"], second["error"]) == ("-inf", None)
    assert third["per_layer"] == []
    assert read["verdict"] == several.lines()
    assert read["notes"] == several.notes


def test_the_order_of_names_decides_the_reference_alone():
    made = {name: shifted(by) for name, by in (("a", 0.0), ("b", 0.1), ("c", 0.2))}
    for order in itertools.permutations(made):
        several = compare_several({name: made[name] for name in order})
        assert several.ranking == "a < b < c"
        assert {one.names[0] for one in several.against.values()} == {order[0]}
