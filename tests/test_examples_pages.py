"""What the pages show is what the committed records and the small scripts give."""

import json
import re
from dataclasses import replace
from functools import partial

import benchmark
import common
import networks
import own_heads
import pytest
import quickstart
import tables
import torch
from readme import README

from graph_kd import FeatureHooks

PAGE = (README.parent / "examples/README.md").read_text(encoding="utf-8")
RESULTS = README.parent / "examples/results"
RECORDS = {path.stem: common.read_records(path, []) for path in sorted(RESULTS.glob("*.jsonl"))}
TRAINED = [name for name in RECORDS if name.startswith("tinyimagenet32")]
MADE = {name: partial(tables.markdown, RECORDS[name]) for name in TRAINED}
MADE["own_heads"] = partial(own_heads.table, RECORDS["digits_own_heads_dev"])
MADE |= {"networks": networks.table, "published": tables.published}
MADE |= {
    f"benchmark{n}": partial(benchmark.tables, r) for n, r in enumerate(RECORDS["benchmark_cpu"])
}


def cells(text):
    """Return the cells of each line of every table, without padding."""
    return [
        tuple(cell.strip() for cell in line.strip("| \n").split("|"))
        for line in text.splitlines()
        if line.startswith("|") and not re.fullmatch(r"[|:\- ]+", line)
    ]


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_the_page_shows_what_is_made_of_records_networks_and_published_numbers(make):
    lines, shown = cells(make()), cells(PAGE)
    assert lines in [shown[n : n + len(lines)] for n in range(len(shown))]


def test_each_file_of_results_has_one_picture_and_is_on_the_page():
    files = {path.name for path in RESULTS.iterdir()}
    assert files == {f"{name}.{ending}" for name in RECORDS for ending in ("jsonl", "png")}
    assert len(files) <= 20
    assert not re.findall(r'": "/[^"]*', json.dumps(RECORDS))  # folders of one machine
    assert all(f"results/{name}.png" in PAGE for name in RECORDS)


@pytest.mark.parametrize("name", TRAINED)
def test_records_of_training_are_complete(name):
    for record in RECORDS[name]:
        assert {"settings", "versions", "phases", "seconds"} <= record.keys()
        assert record["versions"]["commit"]
        *_, epochs = record["phases"].values()
        assert [epoch["epoch"] for epoch in epochs] == [*range(1, len(epochs) + 1)]
        # Attention heads have no accuracy, nor has a teacher that stays untrained.
        assert record.get("accuracy") == (epochs[-1].get("test_accuracy") if epochs else None)


def test_the_readme_states_the_measured_price_of_a_step():
    (steps,) = (record["step"].values() for record in RECORDS["benchmark_cpu"] if "step" in record)
    text = " ".join(README.read_text(encoding="utf-8").split())
    for form, told in (("own heads", "{} × (VGG) and {} × (WRN)"), ("complete", "{} × and {} ×")):
        assert told.format(*(f"{step[f'{form} / student alone']:.1f}" for step in steps)) in text
    most = max(step[f"{form} / floor"] for step in steps for form in ("complete", "own heads"))
    assert f"gate and optimizer take at most {100 * (1 - 1 / most):.0f} % of the step" in text


def record(method, seed=0, accuracy=1.0, **settings):
    about = {"method": method, "seed": seed, "data": "x", **settings}
    epochs = [{"epoch": 1, "loss": 1 + seed, "test_accuracy": accuracy}]
    return {"settings": about, "accuracy": accuracy, "phases": {"student": epochs}}


def test_gains_are_paired_by_seed():
    records = [record("mhgd", n, a, bound=1.0) for n, a in enumerate((43.0, 51.0, 99.0))]
    records += [record("mhgd", 0, 41.0, bound=3.0)]
    records += [record("student", n, a) for n, a in enumerate((40.0, 50.0))]  # none of seed 2
    wanted = """
| method  | bound | accuracy, %       | gain, points     | 95 % interval  | training loss   |
| Student | –     | 45.00 ± 7.07 (2)  | –                | –              | 1.50 ± 0.71 (2) |
| MHGD    | 1.0   | 64.33 ± 30.29 (3) | +2.00 ± 1.41 (2) | -10.7 to +14.7 | 2.00 ± 1.00 (3) |
| MHGD    | 3.0   | 41.00 (1)         | +1.00 (1)        | –              | 1.00 (1)        |
"""
    assert cells(tables.markdown(records)) == cells(wanted)


def test_teachers_of_two_pairs_are_two_lines():
    pairs = [("WRN-22-4", "WRN-10-4"), ("VGG16", "VGG7")]
    records = [record("student", student=student) for _, student in pairs]
    records += [record("teacher", teacher=teacher) for teacher, _ in pairs]
    lines = cells(tables.markdown(records))
    assert [line[1] for line in lines] == ["network", "VGG16", "VGG7", "WRN-22-4", "WRN-10-4"]


def test_other_teacher_epochs_and_other_images_are_not_taken_for_seeds():
    records = [record("teacher", 0, 50.0 + n, teacher_epochs=n) for n in (1, 2)]
    records += [record("student", 0, 40.0 + n, images=n) for n in (1, 2)]
    _, *lines = cells(tables.markdown(records))
    told = [("1", "51.00 (1)"), ("2", "52.00 (1)"), ("–", "41.00 (1)"), ("–", "42.00 (1)")]
    assert [line[1:3] for line in lines] == told


def test_students_of_two_teachers_are_two_lines_and_gain_on_the_same_student_alone():
    records = [record("teacher", seed, 90.0 + seed) for seed in (0, 1)]
    records += [record("mhgd", 0, 60.0 + seed, teacher_seed=seed) for seed in (0, 1)]
    _, *lines = cells(tables.markdown([*records, record("student", 0, 50.0)]))
    told = [("0", "90.00 (1)", "–"), ("1", "91.00 (1)", "–"), ("–", "50.00 (1)", "–")]
    told += [("0", "60.00 (1)", "+10.00 (1)"), ("1", "61.00 (1)", "+11.00 (1)")]
    assert [line[1:4] for line in lines] == told


def test_a_table_has_a_picture_of_students_or_of_teachers_alone(tmp_path):
    teacher, student = record("teacher", teacher="VGG16"), record("student", student="VGG7")
    tables.picture([teacher], tmp_path / "teacher.png")
    tables.picture([teacher, student, record("student", epochs=2)], tmp_path / "both.png")
    assert {file.stem for file in tmp_path.iterdir()} == {"teacher", "both"}


def test_each_part_of_the_benchmark_leaves_a_record(tmp_path, capsys):
    small = {"width": 0.0625, "batch_size": 8, "train_steps": 1, "repeats": 1, "samples": (8,)}
    benchmark.main(benchmark.Settings(out=tmp_path, device="cpu", **small))
    records = common.read_records(tmp_path / "benchmark.jsonl", [])
    parts = ["vectors", "step", "growth"]
    assert [part for part in parts for record in records if part in record] == parts
    assert capsys.readouterr().out.count("medians of 1 rounds") == 3
    errors = {row["method"]: row.get("vector") for row in records[0]["vectors"]["small gaps"]}
    assert errors["graph-kd"] < 1e-4
    assert (tmp_path / "benchmark.png").exists()


def test_the_quickstart_gives_the_same_again(tmp_path, capsys):
    steps = {"teacher_steps": 2, "head_steps": 2, "student_steps": 2}
    for name in "ab":
        quickstart.run(quickstart.Config(out=tmp_path / name, seeds=2, **steps))
    a, b = (json.loads((tmp_path / name / "record.json").read_text()) for name in "ab")
    assert a["accuracies"] == b["accuracies"]
    assert a["accuracies"].keys() == {"teacher", *quickstart.METHODS}
    assert (tmp_path / "a/graphs.png").read_bytes().startswith(b"\x89PNG")
    assert "accuracy after the last step, test split" in capsys.readouterr().out


def test_a_form_of_own_heads_that_has_a_record_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(own_heads, "ROWS", dict([*own_heads.ROWS.items()][::8]))
    config = own_heads.Config(out=tmp_path / "own.jsonl", seeds=1, steps=2, head_steps=2)
    with pytest.raises(ValueError, match=r"must hold records to print; .*own\.jsonl has none"):
        own_heads.run(replace(config, render=True))
    own_heads.run(config)
    first = common.read_records(config.out, [])
    assert [record["row"] for record in first] == list(own_heads.ROWS)
    own_heads.run(config)
    with pytest.raises(ValueError, match="must hold records of the same split, steps and head"):
        own_heads.run(replace(config, steps=3))
    own_heads.run(replace(config, steps=3, render=True))
    assert common.read_records(config.out, []) == first


@pytest.mark.parametrize("name", networks.NETWORKS)
@pytest.mark.parametrize("size", [32, 64])
def test_a_network_shows_its_sensing_points(name, size):
    network = networks.build(name, 5, 0.125, size).eval()
    with FeatureHooks(network, [*network.sensing_points, network.embedding]) as hooks:
        logits = network(torch.randn(2, 3, size, size))
        *maps, embedding = hooks.features
    assert logits.shape == (2, 5)
    assert tuple(m.shape[1] for m in maps) == network.channels
    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    torch.testing.assert_close(last(embedding), logits)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_shortcut_is_a_strided_convolution(layout):
    shortcut = networks.Pointwise(6, 13, 2).to(memory_format=layout)
    maps = torch.randn(8, 6, 16, 16).to(memory_format=layout)
    weight = shortcut.weight.detach().double().requires_grad_()
    wanted = torch.nn.functional.conv2d(maps.double(), weight, stride=2)
    seed = torch.randn_like(wanted)
    wanted.backward(seed)
    got = shortcut(maps)
    got.backward(seed.float())
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(shortcut.weight.grad.double(), weight.grad, rtol=0, atol=1e-3)
