"""A saved run comes back bit for bit, old checkpoints go, and nothing of others is touched."""

import json
import math
import os
import random

import numpy as np
import pytest
import torch

from fasttrain.checkpoint.manifest import Manifest, read_manifest, verify, write_manifest
from fasttrain.checkpoint.sharded import ShardedCheckpoint
from fasttrain.checkpoint.slices import read_whole, write_slices
from fasttrain.checkpoint.tensor_file import FileSum
from fasttrain.config.errors import UserError
from fasttrain.config.schema.checkpoint import ShardedCheckpointConfig
from fasttrain.core.checkpoint_interface import UnfitToSave
from fasttrain.core.engine_interface import NamedSlice
from fasttrain.core.interfaces import Topology
from fasttrain.runtime.files import sha256_of


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


# --- the round trip -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_comes_back_bit_for_bit_and_goes_on_alike(runs, sharded, tensors_of, dtype):
    run = runs.train(runs(dtype=dtype), 3)
    path = sharded.save(run)
    saved = tensors_of(run)
    going_on = tensors_of(runs.train(run, 2))
    fresh = runs(seed=99, dtype=dtype)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    assert sharded.find(runs.directory).path == path
    sharded.restore(fresh, path)
    restored = tensors_of(fresh)
    assert restored.keys() == saved.keys()
    assert {kind for kind, _ in saved} == {"model", "optimizer"}
    for key, tensor in saved.items():
        assert restored[key].dtype == tensor.dtype and restored[key].shape == tensor.shape
        assert torch.equal(restored[key].view(-1), tensor.view(-1)), key
    assert saved["optimizer", "norm.weight/step"].shape == ()
    assert (fresh.step, fresh.tokens) == (3, 24)
    # The batches of the next steps are drawn from the restored random state.
    for key, tensor in tensors_of(runs.train(fresh, 2)).items():
        assert torch.equal(tensor, going_on[key]), key


def test_the_layout_is_the_documented_one(runs, sharded):
    _, (path,) = runs.saved([7])
    assert path == runs.directory / "checkpoints" / "step-00000007"
    assert names_in(path) == ["config.resolved.yaml", "manifest.json", "rank-0000", "state.json"]
    assert names_in(path / "rank-0000") == [
        "model.safetensors", "optimizer.safetensors", "rng.safetensors",
    ]  # fmt: skip
    assert (path / "config.resolved.yaml").read_text() == "seed: 42  # default\n"
    assert json.loads((path / "state.json").read_text())["counters"]["step"] == 7
    manifest = read_manifest(path)
    assert (manifest.run_id, manifest.step, manifest.world_size) == ("run-a", 7, 1)


def test_plain_safetensors_reads_the_files(runs):
    run, (path,) = runs.saved([1])
    load_file = pytest.importorskip("safetensors.torch").load_file
    weights = load_file(path / "rank-0000" / "model.safetensors")
    assert weights.keys() == run.model.state_dict().keys()
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(weights[name], tensor)


def test_the_same_state_makes_the_same_bytes(runs, sharded, tmp_path):
    run = runs.train(runs(), 2)
    first = sharded.save(run)
    run.directory = tmp_path / "elsewhere"
    assert read_manifest(sharded.save(run)) == read_manifest(first)


def test_saving_a_step_again_replaces_it(runs, sharded):
    run, (path,) = runs.saved([4])
    run.best_eval_loss, run.best_step = 1.5, 4
    assert sharded.save(run) == path
    assert names_in(path.parent) == ["step-00000004"]
    assert json.loads((path / "state.json").read_text())["counters"]["best_step"] == 4
    assert sharded.find(runs.directory).path == path


def test_another_model_is_refused(runs, sharded):
    _, (path,) = runs.saved([1])
    fresh = runs()
    fresh.model.head = torch.nn.Linear(4, 13)
    with pytest.raises(
        UserError, match=r"step-00000001: head\.\w+ is .* written for another model"
    ):
        sharded.restore(fresh, path)


# --- slices of any number of ranks --------------------------------------------------------------


def test_slices_of_several_ranks_make_whole_tensors(tmp_path):
    weight, bias = torch.randn(5, 3).bfloat16(), torch.randn(4)
    parts = [weight.flatten()[:4], weight.flatten()[4:9], weight.flatten()[9:]]
    paths, offset = [], 0
    for rank, part in enumerate(parts):
        slices = [NamedSlice("model", "weight", part, (5, 3), offset)]
        offset += part.numel()
        if rank == 1:
            slices.append(NamedSlice("model", "bias", bias, (4,)))
        paths.append(tmp_path / f"{rank}.safetensors")
        write_slices(paths[-1], slices)
    for order in (paths, paths[::-1]):
        whole = {piece.name: piece for piece in read_whole(order, "model")}
        assert torch.equal(whole["weight"].tensor, weight)
        assert whole["weight"].global_shape == (5, 3) and whole["weight"].offset == 0
        assert torch.equal(whole["bias"].tensor, bias)


@pytest.mark.parametrize("places", [[(0, 4), (4, 9)], [(0, 4), (5, 15)], [(0, 9), (4, 15)]])
def test_slices_with_gaps_or_overlaps_are_refused(tmp_path, places):
    weight, paths = torch.randn(15), []
    for rank, (start, end) in enumerate(places):
        paths.append(tmp_path / f"{rank}.safetensors")
        write_slices(paths[-1], [NamedSlice("model", "w", weight[start:end], (5, 3), start)])
    with pytest.raises(ValueError, match="w: "):
        list(read_whole(paths, "model"))


def test_a_checkpoint_of_two_ranks_is_read_by_one(runs, sharded, tensors_of):
    run = runs.train(runs(), 2)
    path = split_in_two(sharded.save(run), run)
    saved = tensors_of(run)
    fresh = runs(seed=9)
    assert sharded.find(runs.directory).path == path
    sharded.restore(fresh, path)
    for key, tensor in tensors_of(fresh).items():
        assert torch.equal(tensor, saved[key]), key
    assert [what for what, _ in fresh.notes] == ["random states"]
    assert "written by 2 processes, read by 1" in fresh.notes[0][1]


def split_in_two(path, run):
    """Rewrite a checkpoint as if two ranks had each held half of every tensor."""
    (path / "rank-0001").mkdir()
    (path / "manifest.json").unlink()
    slices = list(run.engine.state_slices())
    for kind in ("model", "optimizer"):
        (path / "rank-0000" / f"{kind}.safetensors").unlink()
        for rank in (0, 1):
            halves = [half(piece, rank) for piece in slices if piece.kind == kind]
            write_slices(path / f"rank-{rank:04d}" / f"{kind}.safetensors", halves)
    files = {
        str(file.relative_to(path)): FileSum(file.stat().st_size, sha256_of(file))
        for file in path.rglob("*")
        if file.is_file()
    }
    write_manifest(path, Manifest(run.run_id, run.step, 2, files))
    return path


def half(piece, rank):
    flat = piece.tensor.flatten()
    middle = math.ceil(flat.numel() / 2)
    part, offset = (flat[:middle], 0) if rank == 0 else (flat[middle:], middle)
    return NamedSlice(piece.kind, piece.name, part, piece.global_shape, offset)


def test_several_processes_do_not_save_yet(runs, sharded):
    run = runs()
    run.engine.topology = Topology(rank=0, world_size=2)
    with pytest.raises(AssertionError, match="one process"):
        sharded.save(run)


# --- what must not be saved ---------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "optimizer"])
def test_weights_that_are_not_finite_are_refused(runs, sharded, value, where):
    run, (path,) = runs.saved([1])
    runs.train(run)
    with torch.no_grad():
        if where == "weight":
            run.model.norm.weight[2] = value
        else:
            run.optimizer.state[run.model.head.bias]["exp_avg"][0] = value
    name = "norm.weight" if where == "weight" else "head.bias/exp_avg"
    with pytest.raises(UnfitToSave, match=f"^{name} holds NaN or infinity"):
        sharded.save(run)
    assert names_in(path.parent) == [path.name]
    assert sharded.find(runs.directory).path == path


# --- rotation -----------------------------------------------------------------------------------


def test_the_newest_stay(runs):
    _, paths = runs.saved([1, 2, 3, 4], keep=2)
    assert names_in(paths[0].parent) == ["step-00000003", "step-00000004"]


def test_the_best_stays_too(runs):
    run, paths = runs.saved([1, 2], keep=1)
    run.best_step = 2
    runs.saved([3, 4, 5], keep=1, run=run)
    assert names_in(paths[0].parent) == ["step-00000002", "step-00000005"]
    run.best_step = 5
    runs.saved([6], keep=1, run=run)
    assert names_in(paths[0].parent) == ["step-00000005", "step-00000006"]


def test_order_is_by_step_not_by_name_or_time(runs, sharded):
    _, (first, second) = runs.saved([1, 2])
    os.utime(first, (2e9, 2e9))
    first = first.rename(first.with_name("zzz"))
    assert sharded.find(runs.directory).path == second


def test_another_runs_checkpoints_are_never_deleted_nor_taken(runs, sharded):
    runs.saved([1, 2], run=runs(run_id="run-b"))
    runs.saved([3, 4, 5], keep=1, run=runs(run_id="run-a"))
    assert names_in(runs.directory / "checkpoints") == [
        "step-00000001", "step-00000002", "step-00000005",
    ]  # fmt: skip
    found = sharded.find(runs.directory, run_id="run-b")
    assert found.path.name == "step-00000002"
    assert found.skipped == (
        f"{runs.directory}/checkpoints/step-00000005: belongs to another run (run-a)",
    )


def test_another_runs_checkpoint_of_the_same_step_is_not_replaced(runs, sharded):
    _, (path,) = runs.saved([1], run=runs(run_id="run-b"))
    run = runs.train(runs(run_id="run-a"))
    with pytest.raises(FileExistsError, match="belongs to another run"):
        sharded.save(run)
    assert verify(path).run_id == "run-b"


def test_a_damaged_later_checkpoint_does_not_push_out_good_ones(runs):
    run, (_, second) = runs.saved([1, 9], keep=1)
    (second / "rank-0000" / "model.safetensors").write_bytes(b"")
    run.step = 2
    _, (third,) = runs.saved([3], keep=1, run=run)
    found = ShardedCheckpoint(ShardedCheckpointConfig()).find(runs.directory)
    assert found.path == third
    assert len(found.skipped) == 1 and "step-00000009" in found.skipped[0]


def test_a_damaged_checkpoint_in_the_way_steps_aside(runs, sharded, caplog):
    run, (path,) = runs.saved([1])
    (path / "state.json").write_text("{}")
    sharded.save(run)
    assert sharded.find(runs.directory).path == path
    (aside,) = [name for name in names_in(path.parent) if name != path.name]
    assert aside.startswith(".damaged-step-00000001-")
    assert "state.json has 2 bytes" in caplog.text


def test_what_a_dead_process_left_is_removed(runs, sharded):
    run, (path,) = runs.saved([1])
    left = path.parent / ".tmp-step-00000002-1-ab"
    (left / "rank-0000").mkdir(parents=True)
    (left / "rank-0000" / "model.safetensors").write_bytes(b"half")
    assert sharded.find(runs.directory).path == path
    runs.train(run)
    sharded.save(run)
    assert names_in(path.parent) == ["step-00000001", "step-00000002"]


def test_a_step_that_died_while_it_was_replaced_is_found(runs, sharded):
    _, (path,) = runs.saved([1])
    path.rename(path.with_name(path.name + ".replaced"))
    assert sharded.find(runs.directory).path.name == "step-00000001.replaced"


def test_an_empty_directory_has_none(runs, sharded):
    assert sharded.find(runs.directory).path is None
    assert sharded.find(runs.directory / "nowhere").path is None


def test_a_checkpoint_is_found_by_its_own_path(runs, sharded):
    _, (first, second) = runs.saved([1, 2])
    assert sharded.find(first).path == first
    (second / "state.json").unlink()
    found = sharded.find(second)
    assert found.path is None and found.skipped == (f"{second}: state.json is missing",)
