"""The ignite recipe is the plain loop, accumulated and resumed, and averages the student."""

import plain_loop
import pytest
import torch

pytest.importorskip("ignite", reason="needs the extra `integrations`")

import ignite_engine as recipe

from graph_kd import GraphTransferLoss


def run(folder, epochs):
    student, teacher = plain_loop.pair(recipe.network, 3, 5)
    trainer = recipe.train(student, teacher, plain_loop.loader(), folder, epochs)
    assert trainer.state.epoch == epochs
    return student.state_dict()


def plain(epochs):
    student, teacher = plain_loop.pair(recipe.network, 3, 5)
    transfer = GraphTransferLoss(recipe.CHANNELS)
    plain_loop.train_heads(transfer, teacher, recipe.POINTS)
    plain_loop.train(student, teacher, transfer, recipe.POINTS, epochs=epochs)
    return student.state_dict()


@pytest.fixture(autouse=True)
def plain_heads(monkeypatch):
    def train_heads(transfer, teacher, *_):
        plain_loop.train_heads(transfer, teacher, recipe.POINTS)

    monkeypatch.setattr(recipe, "train_heads", train_heads)


def test_accumulated_training_is_the_plain_loop(tmp_path):
    with plain_loop.losses_of() as got:
        student = run(tmp_path, 2)
    with plain_loop.losses_of() as expected:
        plain_loop.assert_equal(student, plain(2))
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected))


def test_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch):
    run(tmp_path / "whole", 2)
    run(tmp_path / "parts", 1)
    monkeypatch.delattr(recipe, "train_heads")  # a resumed run takes them from the checkpoint
    torch.manual_seed(9)  # other heads to begin with
    plain_loop.assert_equal(run(tmp_path / "parts", 2), plain(2))
    whole, parts = (torch.load(tmp_path / n / "last.pt")["average"] for n in ("whole", "parts"))
    plain_loop.assert_equal(parts, whole)


def test_script_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe.main()
