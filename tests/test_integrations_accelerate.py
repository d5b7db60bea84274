"""The accelerate recipe is the plain loop: accumulated, resumed, and in two processes."""

import plain_loop
import pytest
import torch

accelerate = pytest.importorskip("accelerate", reason="needs the extra `integrations`")

import accelerate_loop as recipe

from graph_kd import GraphTransferLoss


def run(folder, epochs, *, batch=plain_loop.BATCH, split=False, precision="no"):
    """Run the recipe with the plain loop's heads; return the student's parameters."""
    plain_loop.forget_accelerate()
    accelerator = accelerate.Accelerator(
        cpu=True,
        gradient_accumulation_steps=plain_loop.ACCUMULATE,
        mixed_precision="no" if precision == "fp16" else precision,
        dataloader_config=accelerate.DataLoaderConfiguration(split_batches=split),
    )
    if precision == "fp16":  # accelerate has it on a GPU only
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    student, teacher = plain_loop.pair(recipe.network, recipe.STUDENT, recipe.TEACHER)
    recipe.train(accelerator, student, teacher, plain_loop.loader(batch), folder, epochs)
    return student.state_dict()


def plain(epochs, **settings):
    transfer = GraphTransferLoss(recipe.TEACHER, student_channels=recipe.STUDENT, squash="scaled")
    widths = recipe.STUDENT, recipe.TEACHER
    return plain_loop.trained(recipe, *widths, transfer, epochs=epochs, **settings)


@pytest.fixture(autouse=True)
def plain_heads(monkeypatch):
    monkeypatch.setattr(recipe, "train_heads", plain_loop.heads_of(recipe))


def refuse(*_):
    raise AssertionError("a resumed run must take its heads from the checkpoint")


def test_accumulated_training_is_the_plain_loop(tmp_path):
    plain_loop.assert_same_training(lambda: run(tmp_path, 2), lambda: plain(2))


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [
        ("bf16", torch.bfloat16, 1e-6),
        ("fp16", torch.float16, 1e-4),  # the plain loop's are not scaled: what is small is lost
    ],
)
def test_mixed_precision_is_the_plain_loop_under_autocast(precision, dtype, tolerance, tmp_path):
    def autocast():
        return torch.autocast("cpu", dtype)

    got = run(tmp_path, 1, precision=precision)
    plain_loop.assert_equal(got, plain(1, autocast=autocast), tolerance)


def test_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch):
    run(tmp_path, 1)
    monkeypatch.setattr(recipe, "train_heads", refuse)
    torch.manual_seed(9)  # other heads to begin with
    plain_loop.assert_equal(run(tmp_path, 2), plain(2))


def test_script_runs(tmp_path, monkeypatch):
    monkeypatch.undo()  # it trains the heads itself
    monkeypatch.chdir(tmp_path)
    plain_loop.forget_accelerate()
    recipe.main()


def work(_rank, folder):
    recipe.train_heads = plain_loop.heads_of(recipe)
    return run(folder / "run", 1, split=True)


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    for got in plain_loop.in_two_processes(work, tmp_path):
        plain_loop.assert_equal(got, plain(1))
