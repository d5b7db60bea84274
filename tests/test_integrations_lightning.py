"""The Lightning and Fabric recipes are the plain loop: in every precision, resumed, in parallel."""

from unittest import mock

import broken_torchvision  # noqa: F401  # here too: processes that are spawned read no conftest
import plain_loop
import pytest
import torch

L = pytest.importorskip("lightning", reason="needs the extra `integrations`")

import fabric_loop
import lightning_module
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader, DistributedSampler

from graph_kd import GraphTransferLoss

pytestmark = [
    # Lightning 2.6.6 asks torch 2.13 for a class by its old name.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    # It advises on idle CPUs and GPUs, and on modules in eval mode: the teacher is meant to be.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training"),
]
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
RECIPES = {
    "manual": lightning_module.Distillation,
    "automatic": lightning_module.AutomaticDistillation,
    "fabric": None,
}
forms = pytest.mark.parametrize("form", RECIPES)


def run(form, folder, epochs, *, loader=None, **settings):
    """Train by a recipe, on from the checkpoint of a folder; return the student's parameters."""
    resumes = (folder / "last.ckpt").exists()
    loader = loader or plain_loop.loader()
    student, teacher = plain_loop.pair(lightning_module.network, 3, 5)
    torch.manual_seed(9)  # heads that are neither trained nor loaded are no others'
    if form == "fabric":
        fabric = L.Fabric(accelerator="cpu", **settings)
        fabric.launch()
        heads = None if resumes else plain_loop.heads_of(fabric_loop)
        with mock.patch.object(fabric_loop, "train_heads", heads):
            fabric_loop.train(fabric, student, teacher, loader, folder, epochs)
        return student.state_dict()
    transfer = GraphTransferLoss(lightning_module.CHANNELS)
    if not resumes:
        plain_loop.heads_of(lightning_module)(transfer, teacher)
    made = RECIPES[form](teacher, transfer)
    made.student.load_state_dict(student.state_dict())
    if made.automatic_optimization:
        settings |= {"accumulate_grad_batches": plain_loop.ACCUMULATE}
        settings |= {"gradient_clip_val": plain_loop.CLIP}
    trainer = L.Trainer(max_epochs=epochs, **QUIET, **settings)
    trainer.fit(made, loader, ckpt_path=folder / "last.ckpt" if resumes else None)
    trainer.save_checkpoint(folder / "last.ckpt")
    assert trainer.global_step == 2 * epochs
    assert len(trainer.optimizers[0].gates) == 6  # what the shell's `backward` did is seen here
    return made.student.state_dict()


def plain(epochs, precision=None):
    def autocast():
        return torch.autocast("cpu", precision, enabled=precision is not None)

    transfer = GraphTransferLoss(lightning_module.CHANNELS)
    settings = {"epochs": epochs, "autocast": autocast}
    return plain_loop.trained(lightning_module, 3, 5, transfer, **settings)


@forms
def test_accumulated_training_is_the_plain_loop(form, tmp_path):
    plain_loop.assert_same_training(lambda: run(form, tmp_path, 2), lambda: plain(2))


@forms
def test_bfloat16_is_the_plain_loop_under_autocast(form, tmp_path):
    got = run(form, tmp_path, 1, precision="bf16-mixed")
    plain_loop.assert_equal(got, plain(1, torch.bfloat16))


@forms
def test_float16_is_the_plain_loop_under_autocast(form, tmp_path):
    mixed = FabricMixedPrecision if form == "fabric" else MixedPrecision
    plugin = mixed("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    got = run(form, tmp_path, 1, plugins=[plugin])
    # Scaled by powers of two: the same but for what is too small for float16.
    plain_loop.assert_equal(got, plain(1, torch.float16), tolerance=1e-4)
    assert plugin.scaler.get_scale() == 256.0


@forms
def test_resumed_run_is_the_uninterrupted_one(form, tmp_path):
    run(form, tmp_path, 1)
    plain_loop.assert_equal(run(form, tmp_path, 2), plain(2))


@pytest.mark.parametrize("recipe", [lightning_module, fabric_loop])
def test_script_runs(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe.main()


def work(rank, folder):
    data, half, trained = plain_loop.loader().dataset, plain_loop.BATCH // 2, {}
    for form in RECIPES:
        settings = {"devices": 2, "strategy": "ddp", "loader": plain_loop.loader(half)}
        if form != "fabric":  # Lightning's own sampler would shuffle
            sampler = DistributedSampler(data, 2, rank, shuffle=False)
            settings["loader"] = DataLoader(data, half, sampler=sampler)
            settings["use_distributed_sampler"] = False
        trained[form] = run(form, folder / form, 1, **settings)
    return trained


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    for trained in plain_loop.in_two_processes(work, tmp_path):
        for form in RECIPES:
            plain_loop.assert_equal(trained[form], plain(1))
