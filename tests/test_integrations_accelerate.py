"""The accelerate recipe is the plain loop: accumulated, resumed, and in two processes."""

import os

import plain_loop
import pytest
import torch
import torch.multiprocessing as mp

accelerate = pytest.importorskip("accelerate", reason="needs the extra `integrations`")

import accelerate_loop as recipe
from accelerate.state import AcceleratorState, GradientState

from graph_kd import GraphTransferLoss


def reset():
    """Let accelerate forget the run before; it keeps its state in class attributes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(folder, epochs, *, batch=plain_loop.BATCH, split=False, precision="no"):
    """Run the recipe with the plain loop's heads; return the student's parameters."""
    reset()
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
    student, teacher = plain_loop.pair(recipe.network, recipe.STUDENT, recipe.TEACHER)
    transfer = GraphTransferLoss(recipe.TEACHER, student_channels=recipe.STUDENT)
    plain_loop.train_heads(transfer, teacher, recipe.POINTS)
    plain_loop.train(student, teacher, transfer, recipe.POINTS, epochs=epochs, **settings)
    return student.state_dict()


def use_plain_heads(transfer, teacher, *_):
    plain_loop.train_heads(transfer, teacher, recipe.POINTS)


@pytest.fixture(autouse=True)
def plain_heads(monkeypatch):
    monkeypatch.setattr(recipe, "train_heads", use_plain_heads)


def refuse(*_):
    raise AssertionError("a resumed run must take its heads from the checkpoint")


def test_accumulated_training_is_the_plain_loop(tmp_path):
    with plain_loop.losses_of() as got:
        student = run(tmp_path, 2)
    with plain_loop.losses_of() as expected:
        plain_loop.assert_equal(student, plain(2))
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected))


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
    monkeypatch.chdir(tmp_path)
    reset()
    recipe.main()


def work(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    recipe.train_heads = use_plain_heads_in_parts
    state = run(folder / "run", 1, split=True)
    torch.save(state, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def use_plain_heads_in_parts(transfer, teacher, *_):
    """Train the heads on whole batches in each process."""
    group, transfer.process_group = transfer.process_group, None
    plain_loop.train_heads(transfer, teacher, recipe.POINTS)
    transfer.process_group = group


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    mp.spawn(work, args=(plain_loop.free_port(), tmp_path), nprocs=2)
    for rank in range(2):
        plain_loop.assert_equal(torch.load(tmp_path / f"{rank}.pt", weights_only=True), plain(1))
