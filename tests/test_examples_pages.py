"""What the pages show is what the committed records and the small scripts give."""

import json
import re

import benchmark
import common
import networks
import own_heads
import pytest
import quickstart
import tables
import torch
from readme import README

ROOT = README.parent
PAGE = (ROOT / "examples/README.md").read_text(encoding="utf-8")
RESULTS = sorted((ROOT / "examples/results").glob("*.jsonl"))
TRAINED = [path for path in RESULTS if path.name.startswith("tinyimagenet32")]


def cells(text):
    """Return the cells of each line of every table, without padding."""
    return [
        tuple(cell.strip() for cell in line.strip("| \n").split("|"))
        for line in text.splitlines()
        if line.startswith("|") and not re.fullmatch(r"[|:\- ]+", line)
    ]


def assert_shown(table, page):
    lines, shown = cells(table), cells(page)
    assert lines in [shown[n : n + len(lines)] for n in range(len(shown))]


def test_each_file_of_results_has_one_picture_and_is_on_the_page():
    files = {path.name for path in (ROOT / "examples/results").iterdir()}
    assert files == {p.with_suffix(s).name for p in RESULTS for s in (".jsonl", ".png")}
    assert len(files) <= 20
    folders = [word for path in RESULTS for word in re.findall(r'": "/[^"]*', path.read_text())]
    assert not folders  # of one machine
    assert all(f"results/{name}" in PAGE for name in files if name.endswith(".png"))


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_a_table_is_made_of_its_records(path):
    records = common.read_records(path)
    assert_shown(tables.markdown(records), PAGE)
    for record in records:
        assert {"settings", "versions", "phases", "seconds"} <= record.keys()
        assert record["versions"]["commit"]
        *_, epochs = record["phases"].values()
        assert [epoch["epoch"] for epoch in epochs] == [*range(1, len(epochs) + 1)]
        # Attention heads have no accuracy, nor has a teacher that stays untrained.
        assert record.get("accuracy") == (epochs[-1].get("test_accuracy") if epochs else None)


def test_tables_of_the_readme_are_some_of_the_results():
    def rows(text):
        found = re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE)
        for head, *lines in filter(None, map(cells, found)):
            yield from (dict(zip(head, line, strict=True)) for line in lines)

    made = [row.items() for p in TRAINED for row in rows(tables.markdown(common.read_records(p)))]
    shown = [row for row in rows(README.read_text(encoding="utf-8")) if "accuracy, %" in row]
    assert shown
    for row in shown:  # some leave columns out
        assert any(row.items() <= other for other in made), row


def test_gains_are_paired_by_seed():
    def record(method, seed, accuracy, **settings):
        about = {"method": method, "seed": seed, "student": "VGG7", "data": "x", **settings}
        epochs = [{"epoch": 1, "loss": 1 + seed, "test_accuracy": accuracy}]
        return {"settings": about, "accuracy": accuracy, "phases": {"student": epochs}}

    alone = [record("student", 0, 40.0), record("student", 1, 50.0)]
    others = [record("mhgd", 0, 43.0, bound=1.0), record("mhgd", 1, 51.0, bound=1.0)]
    others.append(record("mhgd", 2, 99.0, bound=1.0))  # without a student alone
    others.append(record("mhgd", 0, 41.0, bound=3.0))
    lines = cells(tables.markdown([*others, *alone]))
    assert lines == [
        ("method", "bound", "accuracy, %", "gain, points", "95 % interval", "training loss"),
        ("Student", "–", "45.00 ± 7.07 (2)", "–", "–", "1.50 ± 0.71 (2)"),
        (
            "MHGD",
            "1.0",
            "64.33 ± 30.29 (3)",
            "+2.00 ± 1.41 (2)",
            "-10.7 to +14.7",
            "2.00 ± 1.00 (3)",
        ),
        ("MHGD", "3.0", "41.00 (1)", "+1.00 (1)", "–", "1.00 (1)"),
    ]


def test_teachers_of_two_pairs_are_two_lines():
    records = [
        {"settings": about | {"seed": 0, "data": "x"}, "accuracy": 1.0, "phases": {"a": [epoch]}}
        for epoch in [{"epoch": 1, "test_accuracy": 1.0}]
        for about in (
            {"method": "student", "student": "WRN-10-4"},
            {"method": "teacher", "teacher": "WRN-22-4"},
            {"method": "student", "student": "VGG7"},
            {"method": "teacher", "teacher": "VGG16"},
        )
    ]
    lines = cells(tables.markdown(records))
    assert [line[1] for line in lines] == ["network", "VGG16", "VGG7", "WRN-22-4", "WRN-10-4"]


def test_a_picture_is_drawn_from_records(tmp_path):
    tables.picture(common.read_records(TRAINED[0]), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_own_heads_and_networks():
    records = common.read_records(ROOT / "examples/results/digits_own_heads_dev.jsonl")
    assert_shown(own_heads.table(records), PAGE)
    assert_shown(networks.table(), PAGE)


def test_the_page_shows_published_numbers_apart_from_measured_ones():
    assert_shown(tables.published(), PAGE)
    total = sum(sum(row.published.values()) for rows in tables.TABLES.values() for row in rows)
    shown = [cell for line in cells(tables.published())[1:] for cell in line[2:]]
    assert sum(float(cell) for cell in shown if cell != "–") == pytest.approx(total)


def test_the_page_shows_what_the_benchmark_measured():
    for record in common.read_records(ROOT / "examples/results/benchmark_cpu.jsonl"):
        assert_shown(benchmark.tables(record), PAGE)


def test_the_readme_states_the_measured_price_of_a_step():
    records = common.read_records(ROOT / "examples/results/benchmark_cpu.jsonl")
    (steps,) = (record["step"].values() for record in records if "step" in record)
    steps = list(steps)
    text = README.read_text(encoding="utf-8")
    for form, told in (("complete", "{} × (VGG) and {} × (WRN)"), ("own heads", "{} × and {} ×")):
        assert told.format(*(f"{step[f'{form} / student alone']:.1f}" for step in steps)) in text
    most = max(step[f"{form} / floor"] for step in steps for form in ("complete", "own heads"))
    assert f"graphs and gate add at most {100 * (most - 1):.0f} %" in text


def test_each_part_of_the_benchmark_leaves_a_record(tmp_path, capsys):
    small = {"width": 0.0625, "batch_size": 8, "train_steps": 1, "repeats": 1, "samples": (8,)}
    benchmark.main(benchmark.Settings(out=tmp_path, device="cpu", **small))
    records = common.read_records(tmp_path / "benchmark.jsonl")
    assert [part for part in ("vectors", "step", "growth") for r in records if part in r] == [
        *("vectors", "step", "growth")
    ]
    assert capsys.readouterr().out.count("medians of 1 rounds") == 3
    errors = {row["method"]: row.get("vector") for row in records[0]["vectors"]["small gaps"]}
    assert errors["graph-kd"] < 1e-4
    assert (tmp_path / "benchmark.png").exists()


def test_the_quickstart_and_the_forms_of_own_heads_run(tmp_path, capsys, monkeypatch):
    steps = {"teacher_steps": 2, "head_steps": 2, "student_steps": 2}
    for name in "ab":
        quickstart.run(quickstart.Config(out=tmp_path / name, seeds=2, **steps))
    a, b = (json.loads((tmp_path / name / "record.json").read_text()) for name in "ab")
    assert a["accuracies"] == b["accuracies"]
    assert a["accuracies"].keys() == {"teacher", *quickstart.METHODS}
    assert (tmp_path / "a/graphs.png").read_bytes().startswith(b"\x89PNG")
    assert "accuracy after the last step, test split" in capsys.readouterr().out
    monkeypatch.setattr(own_heads, "ROWS", dict([*own_heads.ROWS.items()][::8]))
    config = own_heads.Config(out=tmp_path / "own.jsonl", seeds=1, steps=2, head_steps=2)
    own_heads.run(config)
    first = common.read_records(config.out)
    assert [record["row"] for record in first] == list(own_heads.ROWS)
    own_heads.run(config)  # what is there is not run again
    assert common.read_records(config.out) == first


@pytest.mark.parametrize(
    ("change", "message"), [({"labels": 78}, "≤ 77; got 78"), ({"seeds": 0}, "> 0")]
)
def test_settings_of_the_quickstart_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        quickstart.Config(**change)


@pytest.mark.parametrize("name", networks.NETWORKS)
@pytest.mark.parametrize("size", [32, 64])
def test_a_network_shows_its_sensing_points(name, size):
    network = networks.build(name, 5, 0.125, size).eval()
    shown = {}
    for point in (*network.sensing_points, network.embedding):
        network.get_submodule(point).register_forward_hook(
            lambda _module, _inputs, output, point=point: shown.update({point: output.clone()})
        )
    logits = network(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 5)
    maps = [shown[point] for point in network.sensing_points]
    assert tuple(m.shape[1] for m in maps) == network.channels
    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    torch.testing.assert_close(last(shown[network.embedding]), logits)
    with pytest.raises(ValueError, match=r"`images` must have shape .* Build the network with"):
        network(torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "VGG"}, "`name` must be one of VGG16, .*; got 'VGG'"),
        ({"width": 0.0}, "`width` must be above 0 and at most 4; got 0.0"),
        ({"image_size": 28}, "`image_size` must be 32 or 64; got 28"),
    ],
)
def test_networks_that_can_not_be_built_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        networks.build(**{"name": "VGG7", "classes": 5} | change)
