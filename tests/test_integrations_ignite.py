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
    return plain_loop.trained(recipe, 3, 5, GraphTransferLoss(recipe.CHANNELS), epochs=epochs)


@pytest.fixture(autouse=True)
def plain_heads(monkeypatch):
    monkeypatch.setattr(recipe, "train_heads", plain_loop.heads_of(recipe))


def test_accumulated_training_is_the_plain_loop(tmp_path):
    plain_loop.assert_same_training(lambda: run(tmp_path, 2), lambda: plain(2))


def test_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch):
    run(tmp_path / "whole", 2)
    run(tmp_path / "parts", 1)
    monkeypatch.delattr(recipe, "train_heads")  # a resumed run takes them from the checkpoint
    torch.manual_seed(9)  # other heads to begin with
    plain_loop.assert_equal(run(tmp_path / "parts", 2), plain(2))
    whole, parts = (torch.load(tmp_path / n / "last.pt")["average"] for n in ("whole", "parts"))
    plain_loop.assert_equal(parts, whole)


def test_script_runs(tmp_path, monkeypatch):
    monkeypatch.undo()  # it trains the heads itself
    monkeypatch.chdir(tmp_path)
    recipe.main()
