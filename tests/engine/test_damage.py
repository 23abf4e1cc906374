"""Runs that go on after kills, damaged files and upgrades, and commands that are refused."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import engine
import utils
from tests.engine.runs import CPU, Both, Tiny, digits, fit

pytestmark = pytest.mark.xdist_group("damage")  # what its tests share is made once


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    fit(folder, epochs=2)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """The folder of a run that has trained two epochs."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def epoch_of(path):
    return torch.load(path, weights_only=True)["epoch"]


def change(path, edit):
    """Edit a checkpoint, whose file stays a whole one."""
    content = torch.load(path, weights_only=True)
    edit(content)
    path.unlink()  # best.pth may be the same file
    torch.save(content, path)


def test_an_interrupted_save_counts(run, capsys):
    """A kill between writing a checkpoint and renaming it: it is the newest, also where the old last.pth is damaged."""
    newest, best = (run / "last.pth").read_bytes(), (run / "best-early.pth").exists()
    (run / "new.pth").write_bytes(newest)
    (run / "last.pth").write_bytes(newest[:100])
    (run / "best.pth").write_bytes((run / "previous.pth").read_bytes())
    fit(run, epochs=2, resume="auto")
    assert "after epoch 2, step 0" in capsys.readouterr().out
    assert not best
    assert {path.name for path in run.glob("*.pth")} == {"last.pth", "previous.pth", "best.pth"}
    assert (epoch_of(run / "last.pth"), epoch_of(run / "previous.pth")) == (2, 1)
    best = torch.load(run / "last.pth", weights_only=True)["training"]["best"]["late"][1]
    assert epoch_of(run / "best.pth") == best


def test_a_damaged_file_never_replaces_a_good_one(run, monkeypatch):
    """last.pth is damaged, the run goes on from previous.pth, and a kill comes between the names of the next save."""
    (run / "last.pth").write_bytes(b"damaged")
    names = []

    def replace(source, target, real=os.replace):
        names.append(os.path.basename(target))
        if names[-2:] == ["new.pth", "last.pth"]:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        fit(run, epochs=2, resume="auto")
    monkeypatch.undo()
    assert "previous.pth" not in names
    assert (epoch_of(run / "previous.pth"), epoch_of(run / "new.pth")) == (1, 2)
    fit(run, epochs=2, resume="auto")
    assert (epoch_of(run / "last.pth"), epoch_of(run / "previous.pth")) == (2, 1)


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["training"].pop("rng"),
        lambda content: content["training"].update(epoch="two"),
        lambda content: content["training"].update(step=10**6),
        lambda content: content["training"].update(best={"nowhere": (1.0, 1)}),
        lambda content: content["training"].update(objective={}),
        lambda content: content["training"]["rng"].update(cpu=torch.zeros(3)),
        lambda content: content["net_state_dict"].update({"late.w": content["net_state_dict"].pop("late.weight")}),
        lambda content: content.update(optimizer_state_dict={"param_groups": 3, "state": {}}),
        lambda content: content["optimizer_state_dict"]["state"].update({0: {"momentum_buffer": "x"}}),
        lambda content: content["optimizer_state_dict"]["state"][0]["momentum_buffer"].fill_(float("inf")),
        lambda content: content["net_state_dict"]["late.weight"].fill_(float("nan")),
        lambda content: content["net_state_dict"]["norm.running_var"].neg_(),
    ],
)
def test_odd_parts_give_way_to_the_previous_file(run, capsys, edit):
    straight = torch.load(run / "last.pth", weights_only=True)["net_state_dict"]
    change(run / "last.pth", edit)
    model, _ = fit(run, epochs=2, resume="auto")
    assert "using" in capsys.readouterr().out
    assert (epoch_of(run / "last.pth"), epoch_of(run / "previous.pth")) == (2, 1)
    assert all(torch.equal(value, straight[key]) for key, value in model.state_dict().items())


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_copy_of_the_code_is_not_named_by_commits_around_it(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words], cwd=tmp_path, check=True)

    file = tmp_path / "copy" / "utils.py"
    file.parent.mkdir()
    file.touch()
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "of another project")
    monkeypatch.setattr(utils, "__file__", str(file))
    assert utils.code_version() == "unknown"
    git("add", "copy")
    git("commit", "-q", "-m", "now it is kept there")
    assert len(utils.code_version()) == 12
    file.write_text("changed")
    assert utils.code_version().endswith("-dirty")


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"code": 3}', pytest.param(b"[" * 100_000, id="deep"), b"\xff"])
def test_what_only_readers_need_does_not_stop_a_run(run, content):
    """A description and a log that are damaged: the first is written anew, the other loses its damaged lines."""
    lines = (run / "log.jsonl").read_bytes().splitlines()
    (run / "run.json").write_bytes(content)
    (run / "log.jsonl").write_bytes(b"\n".join([lines[0], content, b'{"epoch": "1"}']))
    change(run / "last.pth", lambda file: file["training"].update(rng=None))
    fit(run, epochs=2, resume="auto")
    assert json.loads((run / "run.json").read_text())["code"]
    assert [json.loads(line)["epoch"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2]


def test_odd_parts_without_another_file_are_a_sentence(run):
    change(run / "last.pth", lambda content: content["net_state_dict"].pop("late.weight"))
    for name in ("previous.pth", "best.pth"):
        (run / name).unlink()
    with pytest.raises(utils.UserError, match=r"last.pth cannot be continued from .*--pretrained"):
        fit(run, epochs=3, resume="auto")


def test_a_best_file_that_was_kept_alone_is_not_replaced(run):
    for name in ("last.pth", "previous.pth"):
        (run / name).unlink()
    kept = (run / "best.pth").read_bytes()
    with pytest.raises(utils.UserError, match="holds a run already"):
        engine.Run(run, {"lr": 0.1})
    with pytest.raises(utils.UserError, match=r"--lr was 0.1 and is 0.2"):
        engine.Run(run, {"lr": 0.2}, "auto")
    assert (run / "best.pth").read_bytes() == kept
    continued = engine.Run(run, {"lr": 0.1}, "auto")
    continued.close()
    assert continued.checkpoint.path == run / "best.pth"


def put_bare_weights(path):
    content = torch.load(path, weights_only=True)
    path.unlink()  # other names of the run may be the same file
    torch.save(content["net_state_dict"], path)


@pytest.mark.parametrize(("name", "resume"), [("last", "file"), ("best", "file"), ("best", "auto")])
def test_weights_from_elsewhere_are_not_replaced(trained, run, name, resume):
    put_bare_weights(run / f"{name}.pth")
    before = (run / f"{name}.pth").read_bytes()
    with pytest.raises(utils.UserError, match=r"training run: move it, or name another.*--save"):
        fit(run, epochs=3, resume="auto" if resume == "auto" else str(trained / "last.pth"))
    assert (run / f"{name}.pth").read_bytes() == before


@pytest.mark.parametrize("name", ["last", "previous", "best"])
def test_a_folder_in_place_of_a_checkpoint_is_refused(run, name):
    """At the start: it could not be replaced at the end of the epoch."""
    (run / f"{name}.pth").unlink()
    (run / f"{name}.pth").mkdir()
    with pytest.raises(utils.UserError, match=rf"{name}.pth is a folder.*move it, or name another with --save"):
        fit(run, epochs=3, resume="auto")


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_best_file_of_another_run_is_not_taken_for_ones_own(trained, run, tmp_path, capsys, epochs):
    """A run goes on in the folder of a shorter one; its best weights have stayed where it was."""
    change(run / "last.pth", lambda content: content["training"].update(best={"late": (99.0, 2)}))
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    shutil.copy(other / "previous.pth", tmp_path / "first.pth")
    for path in other.glob("*.pth"):
        path.unlink()
    shutil.copy(tmp_path / "first.pth", other / "best.pth")
    _, best = fit(other, epochs=epochs, resume=str(run / "last.pth"))
    assert epoch_of(other / "best.pth") == epochs
    assert {point: epoch for point, (_, epoch) in best.items()} == ({} if epochs == 2 else {"late": 3})
    assert ("best.pth is that of the last" in capsys.readouterr().out) == (epochs == 2)


def test_what_a_killed_save_left_is_removed(run):
    left, others = run / ".new.pth.123.tmp", run / ".notes.tmp"
    for path in (left, others):
        path.write_bytes(b"half")
    engine.Run(run, {"lr": 0.1}, "auto").close()
    assert (left.exists(), others.exists()) == (False, True)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_without_locks(tmp_path, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    for resume in (None, "auto"):
        fit(tmp_path, epochs=1, resume=resume)
    assert epoch_of(tmp_path / "last.pth") == 1


def test_a_flag_that_did_not_exist_has_its_default(run):
    flags, defaults = {"lr": 0.1, "jitter": 0.0}, {"lr": 0.2, "jitter": 0.0}
    engine.Run(run, flags, "auto", defaults).close()
    with pytest.raises(utils.UserError, match=r"--jitter was 0.0 and is 0.4"):
        engine.Run(run, {"lr": 0.1, "jitter": 0.4}, "auto", defaults)
    with pytest.raises(utils.UserError, match=r"--lr was 0.1 and is unknown to this version"):
        engine.Run(run, {"jitter": 0.0}, "auto", defaults)


@pytest.mark.parametrize(
    ("schedule", "now", "sentence"),
    [
        ({"lr_schedule": "constant"}, {"epochs": 4}, None),
        ({"lr_schedule": "multistep", "lr_steps": ((1, 0.1),)}, {"epochs": 4, "lr_steps": ((1, 0.1), (3, 0.01))}, None),
        ({"lr_schedule": "multistep", "lr_steps": ()}, {"epochs": 4, "lr_steps": ((1, 0.1),)}, "changed the learning"),
        ({"lr_schedule": "cosine"}, {"epochs": 4}, "changed the learning rate"),
        ({"lr_schedule": "constant"}, {"epochs": 1}, "has 2 epochs already"),
        ({"lr_schedule": "constant"}, {"epochs": 4, "seed": 1}, "seed"),
    ],
)
def test_more_epochs_where_the_schedule_allows(tmp_path, capsys, schedule, now, sentence):
    flags = {"epochs": 2, "lr": 0.1, "seed": 0, "lr_steps": (), **schedule}
    fit(tmp_path, epochs=2, flags=flags, **schedule)
    flags |= now
    recipe = {key: value for key, value in flags.items() if key not in ("epochs", "lr", "seed")}
    if sentence:
        with pytest.raises(utils.UserError, match=sentence):
            fit(tmp_path, flags["epochs"], "auto", flags=flags, **recipe)
        assert epoch_of(tmp_path / "last.pth") == 2
        return
    fit(tmp_path, flags["epochs"], "auto", flags=flags, **recipe)
    assert "--epochs was 2 and is 4: the learning rate of what is left" in capsys.readouterr().out
    assert epoch_of(tmp_path / "last.pth") == 4


def test_drops_of_the_rate_to_come_may_change_alone(tmp_path):
    flags = {"epochs": 2, "lr": 0.1, "lr_steps": ((1, 0.1),)}
    fit(tmp_path, epochs=1, flags=flags)  # the first of its two epochs
    engine.Run(tmp_path, flags | {"lr_steps": ((1, 0.5),)}, "auto").close()
    with pytest.raises(utils.UserError, match="changed the learning rate"):
        engine.Run(tmp_path, flags | {"lr_steps": ((0, 0.5),)}, "auto")


def test_a_refused_command_leaves_no_folder(tmp_path):
    nested = tmp_path / "a" / "b"
    with pytest.raises(utils.UserError, match="there is no checkpoint"):
        engine.Run(nested, {}, "missing.pth")
    run = engine.Run(nested, {}, None)
    with pytest.raises(utils.UserError, match="no whole batch"):
        engine.fit(Tiny(), Both(), digits(128, subset=1), run, engine.Recipe(1, 0.1), CPU)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_command_keeps_what_was_there(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(utils.UserError, match="there is no checkpoint"):
        engine.Run(tmp_path, {}, "missing.pth")
    assert (tmp_path / "notes.txt").read_text() == "mine"
