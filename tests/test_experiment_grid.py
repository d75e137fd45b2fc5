"""Paired statistics on numbers worked by hand, arms, and the table made of results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from focusdd_det.errors import ConfigError
from focusdd_det.experiment import results
from focusdd_det.experiment.grid import Arm, baseline_of, expand, usual_baseline
from focusdd_det.experiment.plot import lines_of, plot
from focusdd_det.experiment.results import Failure, Result
from focusdd_det.experiment.settings import steps_for, steps_of
from focusdd_det.experiment.spec import Experiment, read_experiment
from focusdd_det.experiment.statistics import Difference, paired_difference, student, summary, verdict
from focusdd_det.experiment.table import as_json, make_table, markdown

SECTIONS = {"build": ["method", "ipc", "seed"], "train": ["supervision", "seed"]}


def test_mean_and_sample_deviation() -> None:
    found = summary([2.0, 4.0, 9.0])  # mean 5; squares 9 + 1 + 16 = 26; 26 / 2 = 13
    assert found is not None
    assert (found.n, found.mean) == (3, 5.0)
    assert found.sd == pytest.approx(math.sqrt(13))
    one = summary([7.0])
    assert one is not None
    assert one.sd is None
    assert summary([]) is None


def test_differences_are_paired_by_seed() -> None:
    # seeds 0, 1, 2: 1, 2, 3 -> mean 2, deviation 1, error 1 / sqrt(3); seed 7 has no partner
    found = paired_difference({0: 5.0, 1: 9.0, 2: 4.0, 7: 99.0}, {2: 1.0, 1: 7.0, 0: 4.0})
    assert found == Difference(3, 2.0, pytest.approx(1 / math.sqrt(3)))
    assert paired_difference({0: 5.0}, {0: 4.0}) == Difference(1, 1.0, None)
    assert paired_difference({0: 5.0}, {1: 4.0}) is None


AT_95 = "more than twice its standard error, but not at 95 % with {} seeds"


@pytest.mark.parametrize(
    ("difference", "means", "floor", "expected"),
    [
        (Difference(3, 2.0, 0.4), (9.0, 7.0), 3.0, ("better", "")),
        (Difference(3, -2.0, 0.4), (7.0, 9.0), 3.0, ("worse", "")),
        (Difference(3, 4.3, 1.0), (9.0, 7.0), 3.0, ("not resolved", AT_95.format(3))),
        (Difference(3, 4.31, 1.0), (9.0, 7.0), 3.0, ("better", "")),
        (Difference(5, -2.7, 1.0), (7.0, 9.0), 3.0, ("not resolved", AT_95.format(5))),
        (Difference(5, -2.8, 1.0), (7.0, 9.0), 3.0, ("worse", "")),
        (Difference(61, 2.01, 1.0), (9.0, 7.0), 3.0, ("better", "")),
        (Difference(3, 2.0, 1.0), (9.0, 7.0), 3.0, ("not resolved", "within 2 SE")),  # exactly twice does not exceed
        (Difference(2, 2.0, 0.1), (9.0, 7.0), 3.0, ("not resolved", "2 of at least 3 seeds")),
        (Difference(3, 2.0, 0.1), (5.0, 3.0), 3.0, ("not resolved", "not above 3 mAP")),
        (Difference(3, 2.0, 0.1), (5.0, 3.0), None, ("better", "")),
        (Difference(1, 2.0, None), (5.0, 1.0), 3.0, ("not resolved", "1 of at least 3 seeds, not above 3 mAP")),
        (Difference(3, 0.0, 0.0), (5.0, 5.0), 3.0, ("not resolved", "within 2 SE")),
        (None, (), 3.0, ("not resolved", "no seed in common")),
    ],
)
def test_when_a_ranking_is_claimed(difference: Any, means: Any, floor: Any, expected: tuple[str, str]) -> None:
    assert verdict(difference, means, floor) == expected


def test_students_quantiles() -> None:
    """At 95 %, two-sided, by scipy.stats.t.ppf(0.975, pairs - 1)."""
    table = {2: 12.706, 3: 4.303, 11: 2.228, 12: 2.201, 14: 2.160, 18: 2.110, 26: 2.060, 30: 2.045, 121: 1.980}
    for pairs, quantile in table.items():
        assert student(pairs) == pytest.approx(quantile, abs=0.0015), pairs
    assert [student(n) for n in range(2, 200)] == sorted((student(n) for n in range(2, 200)), reverse=True)


def test_three_equal_arms_are_seldom_ranked() -> None:
    """Of differences that are noise around 0, a twentieth passes; by two standard errors alone 18 %."""
    noise = np.random.default_rng(0).normal(size=(4000, 3))
    found = [paired_difference(dict(enumerate(row)), dict.fromkeys(range(3), 0.0)) for row in noise]
    claimed = sum(verdict(difference, (9.0, 9.0))[0] != "not resolved" for difference in found)
    assert 0.04 < claimed / len(noise) < 0.06


@pytest.mark.parametrize(
    ("iterations", "composites", "batch", "epochs", "run"),
    [
        (660, 170, 16, 60, 660),  # 11 batches an epoch
        (100, 170, 16, 9, 99),
        (105, 170, 16, 10, 110),  # 9.545 epochs
        (1, 3150, 16, 1, 197),  # never less than one epoch
        (19700, 63, 16, 4925, 19700),
    ],
)
def test_equal_iterations_in_whole_epochs(iterations: int, composites: int, batch: int, epochs: int, run: int) -> None:
    steps = steps_for(iterations, composites, batch)
    assert (steps.epochs, steps.iterations) == (epochs, run)


def test_a_classifiers_lonely_last_picture_is_no_step(tmp_path: Path) -> None:
    for task, each in (("detect", 3), ("classify", 2)):
        found = experiment(tmp_path, task=task, train={"batch": 16}, iterations=40, arms={"a": None}, baseline=None)
        steps = steps_of(found, found.arms[0], 33)
        assert (steps.each, steps.iterations) == (each, each * round(40 / each))


def test_what_an_arm_gives_itself_is_not_replaced_from_outside(tmp_path: Path) -> None:
    arms = {"a": {"build.ipc": 3}, "b": {"train.epochs": 4}}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"task": "detect", "arms": arms, "iterations": 7}))
    for given, told in [
        ({"build.ipc": 5}, "build.ipc=5: the arms a give this themselves"),
        ({"iterations": 5}, "iterations=5: the arms b give this themselves"),
        ({"train.epochs": 5}, "train.epochs=5: the arms b give this themselves"),
    ]:
        with pytest.raises(ConfigError, match=told):
            read_experiment(file, overrides=given)
    file.write_text(yaml.safe_dump({"task": "detect", "arms": {"a": None}, "iterations": 7}))
    found = read_experiment(file, overrides={"train.epochs": 5})
    assert (found.iterations, found.train["epochs"]) == (None, 5)
    for both in ({"train.epochs": 5, "iterations": 3}, {"iterations": 3, "train.epochs": 5}):
        with pytest.raises(ConfigError, match=r"iterations and train\.epochs are both given"):
            read_experiment(file, overrides=both)


def test_a_grid_is_every_combination() -> None:
    arms = expand({"vary": {"method": ["random", "focusdd"], "ipc": [1, 10]}}, SECTIONS)
    assert [arm.name for arm in arms] == ["random, ipc=1", "random, ipc=10", "focusdd, ipc=1", "focusdd, ipc=10"]
    assert arms[1].overrides == {"build.method": "random", "build.ipc": 10}
    baseline = usual_baseline(arms)
    assert [getattr(baseline_of(arm, arms, baseline), "name", None) for arm in arms] == [
        None,
        None,
        "random, ipc=1",
        "random, ipc=10",
    ]


def test_named_arms_and_blocks() -> None:
    arms = expand([{"base": None}, {"vary": {"iterations": [5, 6]}}, {"x": {"train.lr0": 0.1}}], SECTIONS)
    assert arms[0] == Arm("base", {})
    assert [arm.name for arm in arms] == ["base", "iterations=5", "iterations=6", "x"]
    assert baseline_of(arms[3], arms, "base") is arms[0]
    assert baseline_of(arms[0], arms, "base") is None
    assert usual_baseline(arms) is None


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"vary": {"metod": ["a"]}}, "did you mean method"),
        ({"vary": {"seed": [1]}}, "is a key of build and of train; write build.seed"),
        ({"vary": {"method": "random"}}, "expected a list of values"),
        ({"vary": {"method": ["a"]}, "other": {}}, "stands alone"),
        ([{"a": {}}, {"a": {}}], "two arms are called `a`"),
        ({"a": 3}, "expected `{build.key: value"),
        ([], "expected"),
        ({"vary": {"method": ["a", "a"]}}, "two arms are called"),
    ],
)
def test_arms_that_are_refused(blocks: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("{", r"\{")):
        if not expand(blocks, SECTIONS):
            raise ConfigError("expected")


# ---- results and the table ----


def experiment(tmp_path: Path, **more: Any) -> Experiment:
    content = {
        "title": "A | test",
        "task": "detect",
        "train": {"model": "yolo11n.yaml", "supervision": "labels"},
        "arms": {"vary": {"method": ["random", "focusdd"]}},
        "iterations": 10,
        **more,
    }
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_experiment(file)


def result(wanted: Experiment, arm: int, seed: int, per_class: dict[str, float], covered: tuple[str, ...]) -> Result:
    one = wanted.arms[arm]
    mean = sum(per_class.values()) / len(per_class)
    values = {"all": mean, "covered": 50.0}
    return Result(one.name, wanted.arm_sha256(one), seed, values, per_class, covered, 20, 5, 10, {}, {"torch": "2"})


def test_a_class_that_rules_the_mean_is_named(tmp_path: Path) -> None:
    wanted = experiment(tmp_path)
    names = ("cat", "dog", "cow")

    def text(*ap: float) -> str:
        each = dict(zip(names, ap, strict=True))
        return markdown(make_table(wanted, [result(wanted, arm, 0, each, names) for arm in (0, 1)], []))

    assert "80 % of the mean over 3 classes is the AP of one, cow (over all results 16.0; the others 2.0" in text(
        1, 3, 16
    )
    assert "is the AP of one" not in text(5, 5, 10)
    assert "is the AP of one" not in text(0, 0, 0)


def test_the_covered_classes_are_those_of_all_arms(tmp_path: Path) -> None:
    wanted = experiment(tmp_path)
    found = [
        result(wanted, 0, seed, {"cat": 10.0, "dog": 4.0 + seed, "cow": 90.0}, ("cat", "dog", "cow"))
        for seed in range(3)
    ]
    found += [result(wanted, 1, seed, {"cat": 10.0, "dog": 10.0, "cow": 0.0}, ("dog", "cat")) for seed in range(3)]
    table = make_table(wanted, found, [])
    assert table.classes == ("cat", "dog")
    random, focusdd = table.rows
    assert random.seeds == {0: 7.0, 1: 7.5, 2: 8.0}
    assert random.baseline is None
    assert random.verdict == ""
    assert focusdd.seeds == {0: 10.0, 1: 10.0, 2: 10.0}
    assert focusdd.difference == Difference(3, 2.5, pytest.approx(0.5 / math.sqrt(3)))
    assert (focusdd.verdict, focusdd.baseline) == ("better", "random")
    text = markdown(table)
    assert "| focusdd | 20 | 10 | 3 | 10.00 ± 0.00 | 10.00, 10.00, 10.00 |" in text
    assert "+2.50 ± 0.29 (random) | better |" in text
    assert "10 iterations were asked for; whole epochs give 10 (" in text
    assert json.loads(json.dumps(as_json(table)))["rows"][1]["seeds"] == {"0": 10.0, "1": 10.0, "2": 10.0}


def test_a_table_of_nothing_and_of_a_part(tmp_path: Path) -> None:
    wanted = experiment(tmp_path, paper=[{"method": "focusdd", "value": 24.4}])
    empty = make_table(wanted, [], [])
    assert "6 of 6 results are not there" in markdown(empty)
    failure = Failure("focusdd", wanted.arm_sha256(wanted.arms[1]), 0, "train-1", 3, "Traceback\nDataError: gone")
    table = make_table(wanted, [result(wanted, 1, 0, {"cat": 9.0}, ("cat",))], [failure])
    text = markdown(table)
    assert "not resolved: no seed in common" in text
    assert "DataError: gone" in text
    assert "| 24.4 |" in text
    assert plot(wanted, empty).startswith(b"\x89PNG")
    assert plot(wanted, table).startswith(b"\x89PNG")


def test_versions_that_differ_are_told(tmp_path: Path) -> None:
    wanted = experiment(tmp_path)
    first, second = (result(wanted, arm, 0, {"cat": 9.0}, ("cat",)) for arm in (0, 1))
    second = Result(**{**second.__dict__, "versions": {"torch": "3"}})
    assert "different versions of torch" in markdown(make_table(wanted, [first, second], []))


def test_data_that_changed_between_results_is_told(tmp_path: Path) -> None:
    wanted = experiment(tmp_path)
    first, second, third = (result(wanted, arm, seed, {"cat": 9.0}, ("cat",)) for arm, seed in ((0, 0), (1, 0), (1, 1)))
    first.inputs.update({"pictures": "1", "a.pt": "2"})
    second.inputs.update({"pictures": "1", "b.pt": "3"})  # arms may differ in what they name
    assert "different contents" not in markdown(make_table(wanted, [first, second, third], []))
    third.inputs.update({"pictures": "4"})
    assert "different contents of pictures:" in markdown(make_table(wanted, [first, second, third], []))


def test_lines_over_what_is_varied_in_numbers(tmp_path: Path) -> None:
    wanted = experiment(tmp_path, arms={"vary": {"method": ["random", "focusdd"], "ipc": [1, 10, 50]}})
    found = lines_of(wanted, make_table(wanted, [], []))
    assert found is not None
    key, lines = found
    assert key == "build.ipc"
    assert [(line.name, [x for x, _ in line.points]) for line in lines] == [
        ("random", [1.0, 10.0, 50.0]),
        ("focusdd", [1.0, 10.0, 50.0]),
    ]
    assert lines[1].points[2][1].arm == "focusdd, ipc=50"
    bars = experiment(tmp_path)
    assert lines_of(bars, make_table(bars, [], [])) is None


def test_results_survive_a_line_that_was_cut_short(tmp_path: Path) -> None:
    wanted = experiment(tmp_path)
    first, second = (result(wanted, arm, 1, {"cat": 9.0}, ("cat",)) for arm in (0, 1))
    results.append(tmp_path, results.result_record(first))
    with (tmp_path / results.FILE).open("a") as file:
        file.write('{"kind": "result", "arm')
    results.append(tmp_path, results.result_record(second))
    assert results.read(tmp_path, wanted) == ([first, second], [])


def test_a_result_ends_a_failure_and_belongs_to_what_was_asked(tmp_path: Path) -> None:
    wanted = experiment(tmp_path)
    found = result(wanted, 0, 1, {"cat": 9.0}, ("cat",))
    failure = Failure(found.arm, found.arm_sha256, 1, "train-1", 1, "")
    results.append(tmp_path, results.failure_record(failure))
    assert results.read(tmp_path, wanted) == ([], [failure])
    results.append(tmp_path, results.result_record(found))
    assert results.read(tmp_path, wanted) == ([found], [])
    other = experiment(tmp_path, iterations=11)
    assert results.read(tmp_path, other) == ([], [])
    results.append(tmp_path, results.failure_record(failure))
    assert results.read(tmp_path, wanted) == ([], [failure]), "the older number is of what was there before"


# ---- files ----


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"titel": "x"}, "did you mean title"),
        ({"task": "segment"}, "expected detect or classify"),
        ({"iterations": 0}, "a whole number from 1 on"),
        ({"train": {"epochs": 3}}, "iterations and train.epochs are both given"),
        ({"seeds": [0, 0]}, "each seed once"),
        ({"seeds": "a,b"}, "expected a list of whole numbers"),
        ({"metric": "top1"}, "expected covered or all"),
        ({"build": {"out": "x"}}, "build.out: the experiment sets this itself"),
        ({"arms": {"a": {"train.project": "x"}}}, "train.project: the experiment sets this itself"),
        ({"baseline": "randm"}, "did you mean random"),
        ({"baseline": {"ipc": 3}}, "no arm differs from another in just that"),
        ({"relabel": {}}, "not for task detect"),
        ({"build": {"sources": ["${there}"]}}, "is not declared under needs"),
        ({"build": {"sources": ["${there}"]}, "needs": {"there": "class folders"}}, r"there=\.\.\.   class folders"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml: there is no"),
        ({"paper": [{"arm": "random"}]}, "paper"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment(tmp_path, **more)


def test_layers_and_variables(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("task: detect\nneeds: {a: A}\nbuild: {ipc: 5, sources: ['${a}']}\nseeds: [4]\n")
    (tmp_path / "small_base.yaml").write_text("build: {ipc: 1}\niterations: 3\n")
    content = {
        "base": "base.yaml",
        "build": {"grid": 3},
        "arms": {"one": {"build.ipc": 7}, "two": None},
        "paper": [{"arm": "one", "value": 1}],
        "small": {"base": "small_base.yaml", "build": {"alpha": 0}, "arms": {"two": None}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    (tmp_path / "data").mkdir()
    full = read_experiment(tmp_path / "mine.yaml", {"a": tmp_path / "data"})
    assert full.section("build", full.arms[0]) == {"ipc": 7, "grid": 3, "sources": [str(tmp_path / "data")]}
    assert (full.name, full.seeds, len(full.paper)) == ("mine", (4,), 1)
    small = read_experiment(
        tmp_path / "mine.yaml", {"a": tmp_path / "data"}, small=True, overrides={"build.ipc": 2, "seeds": "1,2"}
    )
    assert small.section("build", small.arms[0])["ipc"] == 2
    assert (small.name, small.iterations, small.seeds, small.paper) == ("mine-small", 3, (1, 2), ())
    with pytest.raises(ConfigError, match="no such file or folder"):
        read_experiment(tmp_path / "mine.yaml", {"a": "/nowhere"})
    with pytest.raises(ConfigError, match="did you mean iterations"):
        read_experiment(tmp_path / "mine.yaml", {"a": tmp_path / "data"}, overrides={"iteratons": 2})


def test_what_is_asked_of_an_arm_is_hashed_without_its_name(tmp_path: Path) -> None:
    one = experiment(tmp_path, arms={"a": {"build.ipc": 3}, "b": {"build.ipc": 4}})
    two = experiment(tmp_path, arms={"c": {"build.ipc": 3}}, seeds=[5], build={"device": "cuda:1"})
    assert one.arm_sha256(one.arms[0]) == two.arm_sha256(two.arms[0]) != one.arm_sha256(one.arms[1])
